"""Head models behind one interface: a template with linear identity and expression shapes, a neck and two eyes.

`load_head("anny")` gives the default, which comes with the program; FLAME and GNM are the user's own files
(`docs/heads.md`). All head models use the head frame of `docs/conventions.md`: x towards the
subject's left, y up, z out of the face, metres, origin at the head joint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.heads.external import HeadFile

JOINTS = ("head", "torso", "eye_left", "eye_right")

# The 52 ARKit expressions in MediaPipe's order and spelling. MediaPipe scores all but the last.
EXPRESSIONS = (
    *("browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight"),
    *("cheekPuff", "cheekSquintLeft", "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight"),
    *("eyeLookDownLeft", "eyeLookDownRight", "eyeLookInLeft", "eyeLookInRight"),
    *("eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight"),
    *("eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight"),
    *("jawForward", "jawLeft", "jawOpen", "jawRight", "mouthClose", "mouthDimpleLeft", "mouthDimpleRight"),
    *("mouthFrownLeft", "mouthFrownRight", "mouthFunnel", "mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight"),
    *("mouthPressLeft", "mouthPressRight", "mouthPucker", "mouthRight", "mouthRollLower", "mouthRollUpper"),
    *("mouthShrugLower", "mouthShrugUpper", "mouthSmileLeft", "mouthSmileRight", "mouthStretchLeft"),
    *("mouthStretchRight", "mouthUpperUpLeft", "mouthUpperUpRight", "noseSneerLeft", "noseSneerRight", "tongueOut"),
)


@dataclass(frozen=True, eq=False)
class HeadModel:
    """A head as arrays (float32 unless stated), with differentiable functions of its parameters.

    Identity coefficients are linear with 0 at the template; expression coefficients are those of `expression_names`,
    in [0, 1]. Regions may overlap: `head` is all that turns with the skull's silhouette (eyes, teeth and tongue
    included), `torso` the rest (lower neck and shoulders).
    """

    name: str
    version: str
    """The data's own version; part of the key of whatever is computed with it."""
    template: NDArray[np.float32]
    """[V, 3] vertices of the neutral average head."""
    faces: NDArray[np.int32]
    """[F, 3] vertex indices, counter-clockwise from outside."""
    uv: NDArray[np.float32] | None
    """[U, 2] texture coordinates, origin at the bottom left; `uv_faces` [F, 3] index them."""
    uv_faces: NDArray[np.int32] | None
    identity_basis: NDArray[np.float32]
    """[S, V, 3] displacement for one unit of each identity coefficient."""
    identity_names: tuple[str, ...]
    identity_low: NDArray[np.float32]
    """[S] lowest plausible coefficients."""
    identity_high: NDArray[np.float32]
    """[S] highest plausible coefficients."""
    expression_basis: NDArray[np.float32]
    """[52, V, 3] displacement of each expression at 1; zero where the model lacks it."""
    expression_names: tuple[str, ...]
    skin_weights: NDArray[np.float32]
    """[V, 4] over `JOINTS`, rows sum to 1."""
    joints: NDArray[np.float32]
    """[4, 3] rest positions of `JOINTS`; head and torso share the neck's pivot, the origin."""
    joints_identity_basis: NDArray[np.float32]
    """[S, 4, 3] how identity moves the joints; zero for head and torso."""
    regions: Mapping[str, NDArray[np.bool_]]
    """name -> [V] mask of vertices."""
    landmark_faces: NDArray[np.int32]
    """[478] face that carries each of MediaPipe's landmarks."""
    landmark_bary: NDArray[np.float32]
    """[478, 3] where in that face."""
    landmark_spread: NDArray[np.float32]
    """[478] metres: how far MediaPipe's landmark wanders over the head as pose and expression change (median)."""
    expression_to_native: NDArray[np.float32] | None = None
    """[52, N] each expression as coefficients of the model's own controls, `native_names`; None where they are its own.
    """
    native_names: tuple[str, ...] = ()
    transfer_error: NDArray[np.float32] | None = None
    """[52] metres, RMS over what the expression moves: how far the model stays from anny's expression."""
    transfer_scale: float = 0.0
    """Metres, RMS of the 52 wanted displacements, to compare `transfer_error` with."""

    def vertices(self, identity: Tensor, expression: Tensor, neck: Tensor, eyes: Tensor) -> Tensor:
        """Vertices [T, V, 3] in the head frame: the skull stays, the torso and the eyes turn.

        Args:
            identity: [S].
            expression: [T, 52].
            neck: [T, 3] rotation vectors of the head relative to the torso, about the origin.
            eyes: [T, 2, 3] rotation vectors of the left and right eye about their centres.
        """
        import torch

        from pipeline.geometry import rotvec_to_matrix

        def tensor(array: NDArray[np.float32]) -> Tensor:
            return torch.from_numpy(array).to(device=expression.device, dtype=expression.dtype)

        neutral = tensor(self.template) + torch.einsum("s,svi->vi", identity, tensor(self.identity_basis))
        rest = neutral + torch.einsum("te,evi->tvi", expression, tensor(self.expression_basis))
        joints = tensor(self.joints) + torch.einsum("s,sji->ji", identity, tensor(self.joints_identity_basis))

        weights = tensor(self.skin_weights)
        # Right-multiplying rows by R applies its inverse: the torso turns against the head.
        torso = torch.einsum("tvi,tij->tvj", rest, rotvec_to_matrix(neck))
        posed = rest + weights[:, 1:2] * (torso - rest)
        for eye in range(2):
            moved = torch.from_numpy(np.flatnonzero(self.skin_weights[:, 2 + eye])).to(expression.device)
            offset = rest[:, moved] - joints[2 + eye]
            turned = torch.einsum("tij,tvj->tvi", rotvec_to_matrix(eyes[:, eye]), offset)
            posed = posed.index_add(1, moved, weights[moved, 2 + eye, None] * (turned - offset))
        return posed

    def landmarks(self, vertices: Tensor) -> Tensor:
        """MediaPipe's 478 landmarks [T, 478, 3] on vertices [T, V, 3]."""
        import torch

        corners = torch.from_numpy(self.faces[self.landmark_faces].astype(np.int64)).to(vertices.device)
        bary = torch.from_numpy(self.landmark_bary).to(device=vertices.device, dtype=vertices.dtype)
        return torch.einsum("lc,tlci->tli", bary, vertices[:, corners])

    def eyes_from_expression(self, expression: Tensor) -> Tensor:
        """Eye rotation vectors [T, 2, 3] that the eyeLook* coefficients of `expression` [T, 52] stand for.

        A start for a fit and a way to drive the eyes from ARKit coefficients alone, not a calibrated gaze.
        """
        from pipeline.gaze import eyes_of

        return eyes_of(expression, self.expression_names)


def load_head(name: str, report: Callable[[str], None] | None = None) -> HeadModel:
    """The head model of that name: one of `head_names()`, or "flame" for the most recent FLAME that is there.

    The first use of a user's file takes a minute or two and is cached; `report` (the log without one) announces it.

    Raises:
        UserError: there is no such head model, or its file is missing (where to get it and where it goes), or is
            another file (which array is wrong), or holds more than arrays.
        StageError: a new file needs MediaPipe's model, and that cannot be had.
    """
    if name == "anny":
        from pipeline.heads.anny import load_anny

        return load_anny()
    from pipeline.heads.external import load_external

    return load_external(head_file(name), report)


def head_file(name: str) -> HeadFile:
    """Which file of the user's a head model is: where it goes, where it comes from, its licence.

    Raises:
        UserError: no head model of that name has a file; or "flame", and no FLAME is there.
    """
    files = _external_files()
    if name == "flame":
        flames = [file for file in files.values() if file.name.startswith("flame")]
        found = next((file for file in flames if file.path.is_file()), None)
        if found is None:
            ways = "\n     or: ".join(file.missing() for file in flames)
            raise UserError("No FLAME head model is on this machine.", ways)
        return found
    if name not in files:
        raise UserError(f'There is no head model "{name}".', f"choose one of: {', '.join((*head_names(), 'flame'))}")
    return files[name]


def head_names() -> tuple[str, ...]:
    """The names of all head models, whether or not their files are there."""
    return ("anny", *_external_files())


def list_heads() -> list[dict[str, Any]]:
    """The head models that need a file of the user's, as plain data, with whether it is there."""
    return [
        {
            "name": file.name,
            "about": file.title,
            "licence": file.licence,
            "page": file.page,
            "path": str(file.path),
            "state": "ready" if file.path.is_file() else "missing",
        }
        for file in _external_files().values()
    ]


def _external_files() -> dict[str, HeadFile]:
    from pipeline.heads.flame import FLAME_FILES
    from pipeline.heads.gnm import GNM_FILE

    return {file.name: file for file in (*FLAME_FILES, GNM_FILE)}
