"""A tracked head as another project keeps it, in headcast's conventions: cameras, poses, coefficients, file names.

OpenCV axes, pixels with centres at +0.5, metres, rotation vectors in radians, float64 throughout: a dataset that was
read and is written again loses nothing but what the other layout cannot hold.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from pipeline.dataset import write_atomic
from pipeline.errors import StageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.stage import StageRun

    Floats = NDArray[np.float64]

FILE = "recording.npz"
"""A recording's name in the decode stage's folder."""
SCHEMA = 1
FLAME_VERSIONS = ("flame2020", "flame2023", "flame2023open")


@dataclass(frozen=True, eq=False)
class FlameTrack:
    """FLAME's parameters of T frames. Pose order and meaning as FLAME's: `rotation` turns about the root joint of the
    shaped template, `translation` adds afterwards (Li et al. 2017, section 3).

    Attributes:
        version: one of `FLAME_VERSIONS`; numbers of one are meaningless in another.
        shape: [S]. expression: [T,E].
        rotation, neck, jaw: [T,3] rotation vectors. eyes: [T,2,3] of FLAME's joints 3 and 4, in that order.
        translation: [T,3] metres.
        eyelids: [T,2] metrical-tracker's two blendshapes outside FLAME, left, right; None without.
        static_offset: [V',3] metres added to the template, V' is 5023 or 5143; None without.
    """

    version: str
    shape: Floats
    expression: Floats
    rotation: Floats
    translation: Floats
    neck: Floats
    jaw: Floats
    eyes: Floats
    eyelids: Floats | None = None
    static_offset: Floats | None = None

    @property
    def moves_head(self) -> bool:
        """Whether root or neck turn the head, or the translation shifts it, against the world."""
        return bool(self.rotation.any() or self.neck.any() or self.translation.any())


@dataclass(frozen=True, eq=False)
class Recording:
    """A tracked sequence of T frames of one camera and one head; no pixels.

    The head frame is the other project's own: of FLAME, its model space with root rotation and translation zero; of
    NeRFBlendShape, its world.

    Attributes:
        format: one of `pipeline.interchange.FORMATS`.
        size: (width, height) of every picture.
        fps: frames a second; the time of a frame is its number over this.
        numbers: [T] the frame's number in its video, rising; gaps are kept.
        Ks: [T,3,3].
        Ts_cam_world: [T,4,4]. Without `flame`, or with its rotation and translation zero, the world is the head.
        images: [T] paths in the dataset, with '/'.
        alpha: where alphas are: in the pictures' own channel, in `masks` as grey pictures, in `masks` as the colours of
            a parsing, or nowhere.
        masks: [T] paths in the dataset; empty for "channel" and "none".
        basis: what the coefficients are, such as "nerfblendshape-46" or "flame2020-expression-100".
        coefficient_names: [E] unique, each with the basis before a slash, such as "nerfblendshape-46/07".
        coefficients: [T,E]; for FLAME its expression.
        flame: FLAME's parameters; None where the layout has none.
        meshes: [T] paths of meshes of one topology in the head frame, metres; empty where there are none.
        splits: name ("train", "val", "test") -> rows; empty where the layout has none. A row may be in several.
        files: every file of the dataset that belongs to it, images and masks included.
        extra: file -> the JSON keys (or arrays as lists) that are not part of the format as it is known.
        frame_extra: [T] the same of each frame; or empty.
        notes: sentences on what was taken for granted.
    """

    format: str
    size: tuple[int, int]
    fps: Fraction
    numbers: NDArray[np.int64]
    Ks: Floats
    Ts_cam_world: Floats
    images: tuple[str, ...]
    alpha: Literal["channel", "masks", "parsing", "none"]
    masks: tuple[str, ...]
    basis: str
    coefficient_names: tuple[str, ...]
    coefficients: Floats
    flame: FlameTrack | None = None
    meshes: tuple[str, ...] = ()
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    frame_extra: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def Ts_cam_head(self, root_joint: Floats | None = None) -> Floats:
        """Poses [T,4,4] of the head frame in the camera.

        Args:
            root_joint: [T,3] FLAME's root joint of the shaped template (`Flame.joints`); needed where the head turns
                against the world.
        """
        if self.flame is None or not (self.flame.rotation.any() or self.flame.translation.any()):
            return self.Ts_cam_world
        if root_joint is None:
            raise ValueError("a head that turns about its root joint needs to know where that is")
        from pipeline.geometry import make_rigid, rotvec_to_matrix

        rotations = rotvec_to_matrix(self.flame.rotation)
        return self.Ts_cam_world @ make_rigid(
            rotations, root_joint - np.einsum("tij,tj->ti", rotations, root_joint) + self.flame.translation
        )

    def with_head_in_camera(self, Ts_cam_head: Floats) -> Recording:
        """The same with all head motion in the camera: FLAME's rotation and translation are zero."""
        flame = self.flame
        if flame is not None:
            still = np.zeros_like(flame.rotation)
            flame = replace(flame, rotation=still, translation=still.copy())
        return replace(self, Ts_cam_world=Ts_cam_head, flame=flame)


def has_recording(run: StageRun) -> bool:
    """Whether a stage's subject is an imported dataset: what decode leaves beside its frames tells."""
    return run.input("decode", FILE).is_file()


class Pictures(Protocol):
    """The pictures of a recording that is written, in the size that it says."""

    def __call__(self, row: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """RGB [H,W,3], straight, and alpha [H,W] of the frame in this row."""


def save_recording(path: Path, recording: Recording) -> None:
    """Write it as an `.npz` of plain arrays and a JSON text."""
    arrays: dict[str, Any] = {}
    text: dict[str, Any] = {"schema": SCHEMA}
    parts = [("", recording), *([("flame.", recording.flame)] if recording.flame is not None else [])]
    for prefix, part in parts:
        for each in fields(part):  # type: ignore[arg-type]
            value = getattr(part, each.name)
            if isinstance(value, np.ndarray):
                arrays[prefix + each.name] = value
            elif each.name != "flame" and value is not None:
                text[prefix + each.name] = str(value) if isinstance(value, Fraction) else value
    arrays["text"] = np.frombuffer(json.dumps(text, allow_nan=False).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def load_recording(path: Path) -> Recording:
    """Read what `save_recording` wrote.

    Raises:
        StageError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        text = json.loads(bytes(arrays.pop("text")))
        if text.pop("schema") != SCHEMA:
            raise ValueError("it has another schema")
        values = {**text, **arrays}
        flame = {name.partition(".")[2]: value for name, value in values.items() if name.startswith("flame.")}
        own = {name: value for name, value in values.items() if not name.startswith("flame.")}
        for name in ("images", "masks", "coefficient_names", "meshes", "files", "frame_extra", "notes", "size"):
            own[name] = tuple(own[name])
        own["splits"] = {name: tuple(rows) for name, rows in own["splits"].items()}
        own["fps"] = Fraction(own["fps"])
        return Recording(**own, flame=FlameTrack(**flame) if flame else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise StageError(
            f"'{path}' cannot be used: {error}.", "import the dataset again: headcast import FOLDER"
        ) from None
