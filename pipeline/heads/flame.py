"""FLAME 2020, 2023 and 2023 Open, from the user's own file (Li et al. 2017, "Learning a model of facial shape and
expression from 4D scans").

Of FLAME are taken: the template, the first 100 shape components (one unit is one standard deviation), the 100
expression components, the jaw (its rotation linearised about `JAW_ANGLE_RAD`, pose correctives included, so that it is
exact there), and the neck's and the eyes' skinning. The neck's pose correctives and the expressions' small effect on
joints are left out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.heads.external import HeadFile, NativeHead, check_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

VERTICES, FACES, SHAPES, EXPRESSIONS = 5023, 9976, 300, 100
USED_SHAPES = 100
JAW_ANGLE_RAD = 0.2
PARENTS = (0, 1, 1, 1)  # of neck, jaw, left eye, right eye; the root has none
ROOT, NECK, JAW, *EYES = range(5)
CONTROL_NAMES = (*(f"expression_{index:03d}" for index in range(EXPRESSIONS)), "jaw_x", "jaw_y", "jaw_z")
"""The jaw's are components of its rotation vector, in radians."""

_EXPECTED = {
    "v_template": (VERTICES, 3),
    "f": (FACES, 3),
    "shapedirs": (VERTICES, 3, SHAPES + EXPRESSIONS),
    "posedirs": (VERTICES, 3, 36),
    "J_regressor": (5, VERTICES),
    "weights": (VERTICES, 5),
    "kintree_table": (2, 5),
}


@dataclass(frozen=True, eq=False)
class Flame:
    """FLAME itself, all of it: float64 tensors.

    Attributes:
        name: of the head model, such as "flame2023": numbers of one version are meaningless in another.
        template: [5023,3] metres. faces: [9976,3].
        shapes: [300,5023,3]. expressions: [100,5023,3].
        pose_directions: [36,5023,3]. regressor: [5,5023]. weights: [5023,5] over root, neck, jaw and the two eyes.
    """

    name: str
    template: Tensor
    faces: NDArray[np.int64]
    shapes: Tensor
    expressions: Tensor
    pose_directions: Tensor
    regressor: Tensor
    weights: Tensor

    def shaped(self, shape: Tensor, expression: Tensor) -> Tensor:
        """Vertices [T,5023,3] before anything turns.

        Args:
            shape: [S], S up to 300. expression: [T,E], E up to 100.
        """
        import torch

        neutral = self.template + torch.einsum("s,svi->vi", shape, self.shapes[: len(shape)])
        return neutral + torch.einsum("te,evi->tvi", expression, self.expressions[: expression.shape[1]])

    def joints(self, shape: Tensor, expression: Tensor, static_offset: Tensor | None = None) -> Tensor:
        """Joints [T,5,3] before anything turns: root, neck, jaw and the two eyes. They follow the expression too.

        Args:
            shape: [S], S up to 300. expression: [T,E], E up to 100. static_offset: [5023,3].
        """
        import torch

        shaped = self.shaped(shape, expression)
        return torch.einsum("jv,tvi->tji", self.regressor, shaped if static_offset is None else shaped + static_offset)

    def vertices(
        self,
        shape: Tensor,
        expression: Tensor,
        rotation: Tensor,
        neck: Tensor,
        jaw: Tensor,
        eyes: Tensor,
        translation: Tensor,
        static_offset: Tensor | None = None,
    ) -> Tensor:
        """Vertices [T,5023,3], differentiable (Li et al. 2017, equations 1 to 4).

        Args:
            shape: [S], S up to 300. expression: [T,E], E up to 100.
            rotation: [T,3] rotation vectors about the root joint; neck, jaw: [T,3]. eyes: [T,2,3] of joints 3 and 4.
            translation: [T,3] metres, added last.
            static_offset: [5023,3] metres added to the shaped template.
        """
        import torch

        from pipeline.geometry import rotvec_to_matrix

        frames = len(expression)
        shaped = self.shaped(shape, expression)
        if static_offset is not None:
            shaped = shaped + static_offset
        joints = torch.einsum("jv,tvi->tji", self.regressor, shaped)
        turns = rotvec_to_matrix(torch.cat([torch.stack([rotation, neck, jaw], 1), eyes], 1))
        identity = torch.eye(3, dtype=shaped.dtype)
        bent = (turns[:, 1:] - identity).reshape(frames, 36)
        rest = shaped + torch.einsum("tp,pvi->tvi", bent, self.pose_directions)
        globals_: list[tuple[Tensor, Tensor]] = [(turns[:, 0], joints[:, 0])]
        for joint, parent in enumerate(PARENTS, 1):
            R, at = globals_[parent]
            place = at + torch.einsum("tij,tj->ti", R, joints[:, joint] - joints[:, parent])
            globals_.append((R @ turns[:, joint], place))
        posed = torch.zeros_like(rest)
        for joint, (R, at) in enumerate(globals_):
            turned = torch.einsum("tij,tvj->tvi", R, rest - joints[:, None, joint]) + at[:, None]
            posed = posed + self.weights[:, joint, None] * turned
        return posed + translation[:, None]


def load_flame(name: str) -> Flame:
    """FLAME of a version, from the user's own file.

    Args:
        name: "flame2020", "flame2023" or "flame2023open".

    Raises:
        UserError: the file is not there (where to get it and where it goes), or is not FLAME.
    """
    file = next(file for file in FLAME_FILES if file.name == name)
    if not file.path.is_file():
        raise UserError(f"This needs {file.title}, which is not on this machine.", file.missing())
    return _load_flame(name, file.path, file.path.stat().st_mtime_ns)


@functools.cache
def _load_flame(name: str, path: Path, stamp: int) -> Flame:
    """`stamp` tells a file that was replaced."""
    import torch

    arrays = {key: torch.tensor(value) for key, value in _read_arrays(path).items()}
    directions = arrays["shapedirs"].movedim(2, 0).contiguous()
    return Flame(
        name=name,
        template=arrays["v_template"],
        faces=arrays["f"].numpy().astype(np.int64),
        shapes=directions[:SHAPES],
        expressions=directions[SHAPES:],
        pose_directions=arrays["posedirs"].movedim(2, 0).contiguous(),
        regressor=arrays["J_regressor"],
        weights=arrays["weights"],
    )


def _read_arrays(path: Path) -> dict[str, NDArray[np.float64]]:
    """FLAME's arrays out of its pickle, by the restricted reader, dense.

    Raises:
        UserError: the file holds something else than plain arrays, or not FLAME's.
    """
    from scipy import sparse

    from pipeline.restricted_pickle import load_plain

    data = load_plain(path)
    if not isinstance(data, dict):
        raise UserError(f"'{path}' is not FLAME: it holds a {type(data).__name__}.", "get it again from its publisher")
    found = {name: tuple(data[name].shape) for name in _EXPECTED if hasattr(data.get(name), "shape")}
    check_shapes(path, "FLAME", found, _EXPECTED)

    def array(name: str) -> NDArray[Any]:
        value = data[name].toarray() if sparse.issparse(data[name]) else data[name]
        if value.dtype.kind not in "iuf":
            raise UserError(f"'{path}' is not FLAME: {name} holds no numbers.", "get it again from its publisher")
        return np.asarray(value, np.float64)

    parents = tuple(int(parent) for parent in array("kintree_table")[0, 1:])
    if parents != PARENTS:
        raise UserError(
            f"'{path}' is not FLAME: its joints hang on {parents}, expected {PARENTS}.",
            "get it again from its publisher",
        )
    return {name: array(name) for name in _EXPECTED}


def read_flame(path: Path) -> NativeHead:
    """FLAME as a head that is driven by its controls, its jaw linearised.

    Raises:
        UserError: the file holds something else than plain arrays, or not FLAME's.
    """
    from pipeline.geometry import rotvec_to_matrix

    arrays = _read_arrays(path)
    template, regressor = arrays["v_template"], arrays["J_regressor"]
    directions = np.ascontiguousarray(np.moveaxis(arrays["shapedirs"], 2, 0))
    shapes, expressions = directions[:USED_SHAPES], directions[SHAPES:]
    weights = arrays["weights"]
    joints = regressor @ template
    joint_directions = np.einsum("jv,svi->sji", regressor, shapes)

    jaw = []
    for axis in np.eye(3):
        rotation = rotvec_to_matrix(JAW_ANGLE_RAD * axis)
        # Pose correctives: 9 entries of R - I for each joint but the root, whose next is the neck.
        corrected = template + arrays["posedirs"][:, :, 9 * (JAW - 1) : 9 * JAW] @ (rotation - np.eye(3)).ravel()
        turned = (corrected - joints[JAW]) @ rotation.T + joints[JAW]
        jaw.append((corrected + weights[:, [JAW]] * (turned - corrected) - template) / JAW_ANGLE_RAD)

    # Our origin is the neck's joint, of every identity.
    left, right = sorted(EYES, key=lambda eye: -joints[eye, 0])
    order = [NECK, NECK, left, right]
    pivot, pivot_directions = joints[NECK], joint_directions[:, NECK]
    return NativeHead(
        template=template - pivot,
        faces=arrays["f"].astype(np.int32),
        identity_basis=(shapes - pivot_directions[:, None]).astype(np.float32),
        identity_names=tuple(f"shape_{index:03d}" for index in range(USED_SHAPES)),
        controls=np.concatenate([expressions, jaw]).astype(np.float32),
        control_names=CONTROL_NAMES,
        skin_weights=np.stack(
            [weights[:, NECK] + weights[:, JAW], weights[:, ROOT], weights[:, left], weights[:, right]], axis=1
        ),
        joints=joints[order] - pivot,
        joints_identity_basis=joint_directions[:, order] - pivot_directions[:, None],
    )


_PAGE = "https://flame.is.tue.mpg.de/"
_LICENCE = "Max Planck's licence: non-commercial research only, not to be passed on"

FLAME_FILES = (
    HeadFile(
        name="flame2023open",
        title="FLAME 2023 Open",
        file="flame2023_Open.pkl",
        page=_PAGE,
        licence="CC-BY-4.0: free also for commercial use, with attribution",
        read=read_flame,
        how=f'register at {_PAGE}, download "FLAME 2023 Open", unzip it',
    ),
    HeadFile(
        name="flame2023",
        title="FLAME 2023",
        file="flame2023.pkl",
        page=_PAGE,
        licence=_LICENCE,
        may_be_passed_on=False,
        read=read_flame,
        how=f'register at {_PAGE}, download "FLAME 2023", unzip it',
    ),
    HeadFile(
        name="flame2020",
        title="FLAME 2020",
        file="generic_model.pkl",
        page=_PAGE,
        licence=_LICENCE,
        may_be_passed_on=False,
        read=read_flame,
        how=f'register at {_PAGE}, download "FLAME 2020", unzip it',
    ),
)
"""The most recent first."""
