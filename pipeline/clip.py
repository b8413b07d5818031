"""A finished subject as training and evaluation see it: which frames are whose, square crops, and per-frame conditions.

A subject may have been filmed in several takes, each with a camera of its own; their frames follow one another. Test
frames are the end of the whole. Nothing here reads a frame or an alpha that was not asked for by index, so training
can ask for its own frames only.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cameras import crop_intrinsics
from pipeline.dataset import Subject, read_json
from pipeline.errors import StageError
from pipeline.frames import alpha_file, confidence_file, foreground_file
from pipeline.heads.stored import FILE as HEAD_FILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads import HeadModel

MIN_FRAMES = 2
RERUN_FIT = "run the fit again with: headcast rerun SUBJECT --from fit"


@dataclass(frozen=True)
class Clip:
    """Cameras, conditions and file names of a subject's T frames; no pixels.

    Attributes:
        Ks: [C,3,3] intrinsics of each camera's square training crop at `resolution` pixels.
        resolution: width and height of the crops in pixels after resizing.
        crops: [C] (x0, y0, side) in whole pixels of the decoded frames; it may reach over their edge.
        cameras: [T] which camera took a frame.
        Ts_cam_head, Ts_cam_skull, Ts_cam_torso: [T,4,4]. neck: [T,3] and eyes: [T,2,3] rotation vectors.
        expression: [T,E] coefficients of `expression_names`. identity: [S].
        usable: [T] whether a frame's fit can be relied on. times: [T] seconds from the clip's start.
        head: name of the head model.
        head_file: the subject's own head model, where it is no model of `pipeline.heads`; else None.
        foregrounds, alphas, confidences: [T] paths of the matte stage's images.
        torso_shape: [T,M] how the torso bends beside its rigid motion; M is 0 where the fit does not tell.
        image_sizes: [C] (width, height) of what the decoded frames hold of the picture; None where every crop lies
            inside.
        landmark_offsets: [L,3] and expression_offsets: [E,L,3] what makes the head personal; None for the plain model.
    """

    Ks: NDArray[np.float64]
    resolution: int
    crops: tuple[tuple[int, int, int], ...]
    cameras: NDArray[np.int64]
    Ts_cam_head: NDArray[np.float64]
    Ts_cam_skull: NDArray[np.float64]
    Ts_cam_torso: NDArray[np.float64]
    expression: NDArray[np.float32]
    expression_names: tuple[str, ...]
    identity: NDArray[np.float32]
    neck: NDArray[np.float32]
    eyes: NDArray[np.float32]
    usable: NDArray[np.bool_]
    times: NDArray[np.float64]
    head: str
    foregrounds: tuple[Path, ...]
    alphas: tuple[Path, ...]
    confidences: tuple[Path, ...]
    torso_shape: NDArray[np.float32]
    image_sizes: tuple[tuple[int, int], ...] | None = None
    landmark_offsets: NDArray[np.float32] | None = None
    expression_offsets: NDArray[np.float32] | None = None
    head_file: Path | None = None

    def __len__(self) -> int:
        return len(self.alphas)

    @property
    def main_camera(self) -> int:
        """The number of the camera that took the most usable frames; 0 where there are none."""
        return int(np.bincount(self.cameras[self.usable], minlength=1).argmax())

    def inside(self) -> NDArray[np.float32]:
        """[C,R,R] share of each of a crop's pixels that lies inside the frame.

        Where the crop reaches over the frame's edge the pictures are white, and what the subject looks like there is
        not known: a render has to be cut off at the same edge before it is compared with them.
        """
        if self.image_sizes is None:
            return np.ones((len(self.crops), self.resolution, self.resolution), np.float32)
        pairs = zip(self.crops, self.image_sizes, strict=True)
        return np.stack([_inside(crop, size, self.resolution) for crop, size in pairs])

    def recropped(self, crops: Sequence[tuple[int, int, int]]) -> Clip:
        """The same clip in other square crops, one a camera, at the same resolution.

        Args:
            crops: [C] (x0, y0, side) in whole pixels of the decoded frames.
        """
        Ks = [
            crop_intrinsics(K, np.array([x0 - left, y0 - top, side]) * (self.resolution / old), self.resolution)
            for K, (left, top, old), (x0, y0, side) in zip(self.Ks, self.crops, crops, strict=True)
        ]
        return replace(self, Ks=np.stack(Ks), crops=tuple(crops))

    def head_model(self) -> HeadModel:
        """The head model of the fit: one of `pipeline.heads`, or the subject's own.

        Raises:
            StageError: the subject's own is damaged, or has other expressions than the fit.
        """
        from pipeline.heads import load_head
        from pipeline.heads.stored import load_stored

        if self.head_file is None:
            return load_head(self.head)
        model = load_stored(self.head_file).model
        if model.expression_names != self.expression_names:
            raise StageError(f"'{self.head_file}' has other expressions than the fit beside it.", RERUN_FIT)
        return model

    def personal_head(self) -> HeadModel:
        """The head model with what the fit found at its landmarks built in; `identity` comes on top."""
        from pipeline.personal import personalise

        head = self.head_model()
        if self.landmark_offsets is None or self.expression_offsets is None:
            return head
        return personalise(head, self.landmark_offsets, self.expression_offsets)


def _inside(crop: tuple[int, int, int], image_size: tuple[int, int], resolution: int) -> NDArray[np.float32]:
    import cv2

    (x0, y0, side), (width, height) = crop, image_size
    canvas = np.zeros((side, side), np.float32)
    canvas[max(-y0, 0) : max(height - y0, 0), max(-x0, 0) : max(width - x0, 0)] = 1
    how = cv2.INTER_AREA if side >= resolution else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(canvas, (resolution, resolution), interpolation=how), np.float32)


@dataclass(frozen=True)
class Crops:
    """Square crops of n frames at the clip's resolution R.

    Attributes:
        images: [n,R,R,3] uint8 RGB over white. alphas: [n,R,R] uint8.
        confidences: [n,R,R] uint8, how sure the alphas are; 255 outside the frame.
    """

    images: NDArray[np.uint8]
    alphas: NDArray[np.uint8]
    confidences: NDArray[np.uint8]


def split(count: int, holdout: float, min_holdout: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of training and test frames: the test is the clip's last `max(min_holdout, floor(holdout * count))`.

    A clip too short for that keeps at least one frame for training.

    Raises:
        StageError: fewer than two frames cannot be split.
    """
    if count < MIN_FRAMES:
        raise StageError(
            f"The clip has {count} frame(s); training and its test need at least {MIN_FRAMES}.", "give a longer clip"
        )
    # 0.29 * 100 is 28.999... in binary; the share is meant as a decimal number.
    held_out = max(min_holdout, math.floor(round(holdout * count, 9)))
    first_test = count - min(held_out, count - 1)
    return np.arange(first_test), np.arange(first_test, count)


def load_clip(subject: Subject, resolution: int) -> Clip:
    """Read the decode, matte and fit stages' finished files of a subject, checked at this border.

    Args:
        subject: whose files.
        resolution: width and height of the training crop, in pixels.

    Raises:
        StageError: a file is damaged or the stages do not belong together.
        UserError: `frames.json` cannot be read.
    """
    listing = read_json(subject.stage("decode") / "frames.json")
    frames = listing["frames"]
    path = subject.stage("fit") / "fit.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            fit = dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise StageError(f"'{path}' cannot be read: {error}.", RERUN_FIT) from error
    count = len(frames)
    names = tuple(str(name) for name in _take(fit, "expression_names", (None,), path))
    arrays = {
        name: _take(fit, name, shape, path)
        for name, shape in {
            "Ks": (count, 3, 3),
            "Ts_cam_head": (count, 4, 4),
            "Ts_cam_skull": (count, 4, 4),
            "Ts_cam_torso": (count, 4, 4),
            "expression": (count, len(names)),
            "identity": (None,),
            "neck": (count, 3),
            "eyes": (count, 2, 3),
            "usable": (count,),
            "crops": (count, 3),
            "clips": (count,),
        }.items()
    }
    personal = {"landmark_offsets": (None, 3), "expression_offsets": (len(names), None, 3)}
    offsets = {n: _take(fit, n, shape, path).astype(np.float32) for n, shape in personal.items() if n in fit}
    bent = "torso_shape" in fit
    shape = _take(fit, "torso_shape", (count, None), path) if bent else np.zeros((count, 0))
    # One camera a take: the frames of a take share theirs.
    takes, first, cameras = np.unique(arrays["clips"], return_index=True, return_inverse=True)
    x0s, y0s, sides = np.round(arrays["crops"][first].astype(np.float64)).astype(np.int64).T.tolist()
    crops = tuple(zip(x0s, y0s, sides, strict=True))
    if min(sides) < 1 or resolution < 1:
        raise StageError(f"'{path}' has a crop with sides of {min(sides)} px.", RERUN_FIT)
    whole = [int(listing["width"]), int(listing["height"])]
    contents = [take.get("content", whole) for take in listing.get("clips", [])] or [whole] * len(takes)
    if not 0 <= takes.min() <= takes.max() < len(contents):
        raise StageError(f"'{path}' is not of the clips in 'frames.json'.", RERUN_FIT)
    return Clip(
        Ks=np.stack(
            [
                crop_intrinsics(K.astype(np.float64), crop, resolution)
                for K, crop in zip(arrays["Ks"][first], crops, strict=True)
            ]
        ),
        resolution=resolution,
        crops=crops,
        cameras=cameras.astype(np.int64),
        Ts_cam_head=arrays["Ts_cam_head"].astype(np.float64),
        Ts_cam_skull=arrays["Ts_cam_skull"].astype(np.float64),
        Ts_cam_torso=arrays["Ts_cam_torso"].astype(np.float64),
        expression=arrays["expression"].astype(np.float32),
        expression_names=names,
        identity=arrays["identity"].astype(np.float32),
        neck=arrays["neck"].astype(np.float32),
        eyes=arrays["eyes"].astype(np.float32),
        usable=arrays["usable"].astype(bool),
        times=np.array([frame["time"] for frame in frames], np.float64),
        head=str(_take(fit, "head", (), path)),
        foregrounds=tuple(subject.stage("matte") / foreground_file(index) for index in range(count)),
        alphas=tuple(subject.stage("matte") / alpha_file(index) for index in range(count)),
        confidences=tuple(subject.stage("matte") / confidence_file(index) for index in range(count)),
        torso_shape=shape.astype(np.float32),
        image_sizes=tuple((int(contents[take][0]), int(contents[take][1])) for take in takes),
        landmark_offsets=offsets.get("landmark_offsets"),
        expression_offsets=offsets.get("expression_offsets"),
        head_file=own if (own := subject.stage("fit") / HEAD_FILE).is_file() else None,
    )


def load_crops(
    clip: Clip,
    indices: Sequence[int] | NDArray[np.int64],
    *,
    threads: int = 1,
    on_frame: Callable[[], None] = lambda: None,
) -> Crops:
    """Subject, alphas and confidences of these indices as square crops; outside the frame white, alpha 0, for sure.

    Args:
        clip: whose frames.
        indices: n frame indices; no other file is opened.
        threads: files decoded at a time.
        on_frame: called after each frame, in order.

    Raises:
        StageError: a frame or alpha is missing, damaged, or of another size than its partner.
    """
    size = clip.resolution
    images = np.empty((len(indices), size, size, 3), np.uint8)
    alphas, confidences = (np.empty((len(indices), size, size), np.uint8) for _ in range(2))

    def load(row: int) -> None:
        frame = int(indices[row])
        images[row], alphas[row], confidences[row] = _load_crop(
            clip.foregrounds[frame],
            clip.alphas[frame],
            clip.confidences[frame],
            clip.crops[clip.cameras[frame]],
            size,
        )

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in pool.map(load, range(len(indices))):
            on_frame()
    return Crops(images, alphas, confidences)


def _load_crop(
    foreground_path: Path, alpha_path: Path, confidence_path: Path, crop: tuple[int, int, int], resolution: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    import cv2

    foreground = _read_picture(foreground_path, cv2.IMREAD_COLOR_RGB)
    alpha, confidence = (_read_picture(path, cv2.IMREAD_GRAYSCALE) for path in (alpha_path, confidence_path))
    for path, other in ((foreground_path, foreground), (confidence_path, confidence)):
        if other.shape[:2] != alpha.shape:
            raise StageError(
                f"'{path}' has {other.shape[1::-1]} pixels, its alpha {alpha.shape[::-1]}.",
                "run: headcast rerun SUBJECT --from matte",
            )
    x0, y0, side = crop
    height, width = alpha.shape
    left, top = min(max(x0, 0), width), min(max(y0, 0), height)
    right, bottom = min(max(x0 + side, left), width), min(max(y0 + side, top), height)
    opacity = alpha[top:bottom, left:right, None].astype(np.float32) / 255
    inside = foreground[top:bottom, left:right].astype(np.float32)
    canvas = np.zeros((side, side, 4), np.float32)
    canvas[..., :3] = 255
    sure = np.full((side, side), 255, np.float32)
    window = canvas[top - y0 : bottom - y0, left - x0 : right - x0]
    window[..., :3] = 255 + opacity * (inside - 255)
    window[..., 3:] = 255 * opacity
    sure[top - y0 : bottom - y0, left - x0 : right - x0] = confidence[top:bottom, left:right]
    # Averaging over areas is right for reducing only; enlarging with it would repeat pixels.
    how = cv2.INTER_AREA if side >= resolution else cv2.INTER_LINEAR
    resized, sure = (cv2.resize(array, (resolution, resolution), interpolation=how) for array in (canvas, sure))
    rounded = np.clip(resized + 0.5, 0, 255).astype(np.uint8)
    return rounded[..., :3], rounded[..., 3], np.asarray(sure + 0.5, np.uint8)


def _read_picture(path: Path, flags: int) -> NDArray[np.uint8]:
    import cv2

    try:
        picture = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    except (OSError, cv2.error) as error:
        raise StageError(f"'{path}' cannot be read: {error}.", "run: headcast rerun SUBJECT --from matte") from error
    if picture is None:
        raise StageError(f"'{path}' is damaged.", "run: headcast rerun SUBJECT --from matte")
    return np.asarray(picture, np.uint8)


def _take(arrays: dict[str, NDArray[Any]], name: str, shape: tuple[int | None, ...], path: Path) -> NDArray[Any]:
    """An array of a fit of this shape (None: any length), numbers finite."""
    if name not in arrays:
        raise StageError(f"'{path}' has no '{name}'.", RERUN_FIT)
    array = arrays[name]
    fits = len(array.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise StageError(f"'{path}': '{name}' has shape {list(array.shape)}, not [{wanted}].", RERUN_FIT)
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise StageError(f"'{path}': '{name}' holds values that are not finite.", RERUN_FIT)
    return array
