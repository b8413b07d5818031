"""A finished subject as a recording and pictures, ready for another project's layout.

An imported subject gives back what was imported, to the last digit, where the target can hold it. Any other gives its
fit; where the target wants FLAME, FLAME is fitted to the vertices of the head that was fitted, as numbers of one head
model, or of one version of FLAME, mean nothing in another (`pipeline.interchange.flame_refit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError, UserError
from pipeline.interchange.recording import FILE, FlameTrack, Recording, load_recording
from pipeline.source import DATASET

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.clip import Clip
    from pipeline.dataset import Subject
    from pipeline.frames import FrameSet
    from pipeline.heads.flame import Flame
    from pipeline.interchange.recording import Pictures

    Floats = NDArray[np.float64]

ARKIT = "arkit-52"
CHUNK = 64
"""Frames whose vertices are held at once."""


@dataclass(frozen=True)
class Outgoing:
    """A subject, ready to be written.

    Attributes:
        recording: its frames that can be relied on.
        pictures: of them.
        flame: the FLAME that the recording's numbers belong to; None without.
        about: the coefficients in a sentence.
        residual_mm: what FLAME's vertices stay from those of the fitted head; None where nothing was refitted.
        landmarks: [T,478,3] MediaPipe's points of the fitted head in the camera's coordinates, metres; None where the
            layout has no place for them.
    """

    recording: Recording
    pictures: Pictures
    flame: Flame | None
    about: str
    residual_mm: dict[str, float] | None = None
    landmarks: Floats | None = None


@dataclass(frozen=True)
class Wanted:
    """What a layout holds.

    Attributes:
        flame: name of the FLAME to write; empty for a layout without.
        shapes, expressions: how many of its coefficients.
        eyelids, static_offset: whether there is a place for them.
        square: whether the pictures must be square: the head's crop is taken then.
    """

    flame: str = ""
    shapes: int = 300
    expressions: int = 100
    eyelids: bool = False
    static_offset: bool = False
    square: bool = False


def outgoing(
    subject: Subject,
    wanted: Wanted,
    *,
    clip: int | None = None,
    report: Callable[[str], None] = lambda text: None,
    on_round: Callable[[], None] = lambda: None,
) -> Outgoing:
    """The subject as this layout wants it.

    Args:
        subject: decode, matte and fit are finished.
        wanted: what the layout holds.
        clip: number of the clip, where there are several.
        report: told what takes long.
        on_round: called now and then while FLAME is fitted.

    Raises:
        UserError: FLAME is not on this machine, or it is not plain which clip is meant.
        StageError: stages do not belong together.
    """
    from pipeline.clip import load_clip
    from pipeline.frames import FrameSet
    from pipeline.heads.flame import load_flame

    flame = load_flame(wanted.flame) if wanted.flame else None
    frames = FrameSet.load(subject.stage("decode"))
    fitted = load_clip(subject, 64)
    view = _View.of(subject, frames, fitted, clip, wanted.square)
    pictures = _Pictures(subject, frames, view)
    stored = subject.stage("decode") / FILE
    imported = load_recording(stored) if stored.is_file() else None
    recording = _of_import(imported, view) if imported else _of_fit(subject, frames, fitted, view)
    if flame is None:
        track = recording.flame
        source = load_flame(track.version) if track is not None and track.moves_head else None
        landmarks = _landmarks(fitted, view.rows)
        return Outgoing(recording, pictures, source, _about(recording), landmarks=landmarks)
    if imported is not None and _holds(imported, wanted):
        return Outgoing(recording, pictures, flame, f"FLAME's own, as imported: {recording.basis}")
    from pipeline.interchange.flame_refit import refit, target_of

    target = target_of(fitted, view.rows, flame, imported, subject.source / DATASET, report)
    report(f"Fitting {flame.name} to the vertices of {len(view.rows)} frames")
    track, residual = refit(flame, target, wanted.shapes, wanted.expressions, on_round)
    basis = f"{flame.name}-expression-{wanted.expressions}"
    world = _camera_before_the_head()
    recording = replace(
        recording,
        Ts_cam_world=np.repeat(world[None], len(view.rows), 0),
        basis=basis,
        coefficient_names=tuple(f"{basis}/{index:03d}" for index in range(wanted.expressions)),
        coefficients=track.expression,
        flame=_in_world(track, world, flame),
        meshes=(),
    )
    return Outgoing(recording, pictures, flame, target.about, residual)


@dataclass(frozen=True, eq=False)
class _View:
    """Which frames, and which part of them.

    Attributes:
        rows: [T] of the subject's frames.
        window: (x0, y0, width, height) in pixels of the decoded frames; may reach over their edge.
        Ks: [T,3,3] of the decoded frames.
        fps: of the clip.
    """

    rows: NDArray[np.int64]
    window: tuple[int, int, int, int]
    Ks: Floats
    fps: Fraction

    @staticmethod
    def of(subject: Subject, frames: FrameSet, fitted: Clip, clip: int | None, square: bool) -> _View:
        """The usable frames of a clip.

        Raises:
            UserError: there are several clips and none is named, or no such clip.
            StageError: no frame can be used.
        """
        from pipeline.advice import stage_arrays

        takes = np.unique(frames.clips).tolist()
        if clip is None and len(takes) > 1:
            raise UserError(
                f"'{subject.name}' was filmed in {len(takes)} clips, each with a camera of its own.",
                f"a dataset holds one: choose it with --set clip=0 (to {max(takes)})",
            )
        chosen = takes[0] if clip is None else clip
        if chosen not in takes:
            raise UserError(
                f"'{subject.name}' has no clip {chosen}.", f"there are: {', '.join(str(take) for take in takes)}"
            )
        rows = np.flatnonzero(fitted.usable & (frames.clips == chosen))
        if not len(rows):
            raise StageError(f"No frame of '{subject.name}' can be used.", f"look at {subject.report.name}")
        Ks = stage_arrays(subject, "fit", "fit.npz")["Ks"].astype(np.float64)[rows]
        width, height = (int(side) for side in frames.contents[rows[0]])
        window = (0, 0, width, height)
        if square and width != height:
            x0, y0, side = fitted.crops[fitted.cameras[rows[0]]]
            window = (x0, y0, side, side)
        fps = Fraction((frames.record.get("clips") or [{}])[chosen].get("fps", frames.fps))
        return _View(rows, window, Ks, fps)

    @property
    def size(self) -> tuple[int, int]:
        return self.window[2], self.window[3]

    @property
    def cropped(self) -> Floats:
        """[T,3,3] intrinsics of the window."""
        Ks = self.Ks.copy()
        Ks[:, :2, 2] -= self.window[:2]
        return Ks


class _Pictures:
    """The subject's own colours and its alpha."""

    def __init__(self, subject: Subject, frames: FrameSet, view: _View) -> None:
        self._frames, self._view, self._matte = frames, view, subject.stage("matte")

    def __call__(self, row: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        index = int(self._view.rows[row])
        x0, y0, width, height = self._view.window
        shown_width, shown_height = (int(side) for side in self._frames.contents[index])
        rgb = np.full((height, width, 3), 255, np.uint8)
        alpha = np.zeros((height, width), np.uint8)
        left, top = max(x0, 0), max(y0, 0)
        right, bottom = min(x0 + width, shown_width), min(y0 + height, shown_height)
        inside = slice(top - y0, bottom - y0), slice(left - x0, right - x0)
        rgb[inside] = self._frames.foreground(index, self._matte)[top:bottom, left:right]
        alpha[inside] = self._frames.alpha(index, self._matte)[top:bottom, left:right]
        return rgb, alpha


def _of_fit(subject: Subject, frames: FrameSet, fitted: Clip, view: _View) -> Recording:
    """Our own fit: the head moves before the camera, driven by ARKit's coefficients."""
    from pipeline.heads import EXPRESSIONS

    names = fitted.expression_names
    if tuple(names) != EXPRESSIONS:
        raise StageError(
            f"The fit of '{subject.name}' has other coefficients than ARKit's 52.", "fit again: headcast rerun SUBJECT"
        )
    return Recording(
        format="headcast",
        size=view.size,
        fps=view.fps,
        numbers=frames.source_frames[view.rows].astype(np.int64),
        Ks=view.cropped,
        Ts_cam_world=fitted.Ts_cam_head[view.rows],
        images=(),
        alpha="masks",
        masks=(),
        basis=ARKIT,
        coefficient_names=tuple(f"{ARKIT}/{name}" for name in names),
        coefficients=fitted.expression[view.rows].astype(np.float64),
    )


def _of_import(imported: Recording, view: _View) -> Recording:
    """What was imported, in the pictures as decode keeps them."""
    rows = view.rows
    if len(rows) and rows.max() >= len(imported):
        raise StageError("The recording does not belong to the decoded frames.", "import the dataset again")
    picked: dict[str, Any] = {
        "numbers": imported.numbers[rows],
        "Ts_cam_world": imported.Ts_cam_world[rows],
        "coefficients": imported.coefficients[rows],
        "frame_extra": tuple(imported.frame_extra[row] for row in rows) if imported.frame_extra else (),
        "images": tuple(imported.images[row] for row in rows),
        "masks": tuple(imported.masks[row] for row in rows) if imported.masks else (),
        "meshes": tuple(imported.meshes[row] for row in rows) if imported.meshes else (),
    }
    at = {int(row): place for place, row in enumerate(rows)}
    splits = {name: tuple(at[row] for row in part if row in at) for name, part in imported.splits.items()}
    # The fit has the camera in metres where the dataset has not; pixels are the same.
    unreduced = imported.size == view.size and view.window[:2] == (0, 0)
    Ks = imported.Ks[rows] if unreduced else view.cropped
    return replace(imported, **picked, splits=splits, size=view.size, Ks=Ks, flame=_rows_of(imported, rows))


def _rows_of(imported: Recording, rows: NDArray[np.int64]) -> FlameTrack | None:
    track = imported.flame
    if track is None:
        return None
    moving = ("expression", "rotation", "translation", "neck", "jaw", "eyes", "eyelids")
    return replace(track, **{name: value[rows] for name in moving if (value := getattr(track, name)) is not None})


def _holds(imported: Recording, wanted: Wanted) -> bool:
    """Whether the layout has a place for all of an imported recording's FLAME, of its very version."""
    track = imported.flame
    if track is None or track.version != wanted.flame:
        return False
    fits = len(track.shape) <= wanted.shapes and track.expression.shape[1] <= wanted.expressions
    lids = wanted.eyelids or track.eyelids is None or not track.eyelids.any()
    offset = wanted.static_offset or track.static_offset is None or not track.static_offset.any()
    return fits and lids and offset


def _landmarks(fitted: Clip, rows: NDArray[np.int64]) -> Floats:
    """MediaPipe's points [T,478,3] of the fitted head in the camera's coordinates."""
    import torch

    from pipeline.geometry import transform_points

    head = fitted.personal_head()
    identity = torch.from_numpy(fitted.identity.astype(np.float32))
    found = []
    with torch.no_grad():
        for part in np.array_split(rows, math.ceil(len(rows) / CHUNK)):
            pose = (fitted.expression[part], fitted.neck[part], fitted.eyes[part])
            posed = head.vertices(identity, *(torch.from_numpy(value.astype(np.float32)) for value in pose))
            found.append(transform_points(fitted.Ts_cam_head[part], head.landmarks(posed).numpy().astype(np.float64)))
    return np.concatenate(found)


def _about(recording: Recording) -> str:
    if recording.basis == ARKIT:
        return "ARKit's 52 coefficients as headcast fits them, in [0, 1]"
    return f"as imported: {recording.basis}"


def _camera_before_the_head() -> Floats:
    """`T_cam_world` of a camera that looks at the origin from one metre before it, the world's y up."""
    T_cam_world = np.diag([1.0, -1.0, -1.0, 1.0])
    T_cam_world[2, 3] = 1.0
    return T_cam_world


def _in_world(track: FlameTrack, T_cam_world: Floats, flame: Flame) -> FlameTrack:
    """FLAME's parameters in camera axes as those in the world's.

    A turn of the world about its origin turns the head about its root joint and moves that joint.
    """
    import torch

    from pipeline.geometry import matrix_to_rotvec, rotvec_to_matrix

    root = flame.joints(torch.from_numpy(track.shape), torch.from_numpy(track.expression))[:, 0].numpy()
    T_world_cam = np.linalg.inv(T_cam_world)
    rotation = matrix_to_rotvec(np.ascontiguousarray(T_world_cam[:3, :3] @ rotvec_to_matrix(track.rotation)))
    joint = (root + track.translation) @ T_world_cam[:3, :3].T + T_world_cam[:3, 3]
    return replace(track, rotation=rotation, translation=joint - root)
