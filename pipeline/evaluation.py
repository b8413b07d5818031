"""Held-out quality of an avatar: what each frame scores, and the baselines that say what the score is worth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from pipeline import metrics
from pipeline.avatars import AvatarModel, Condition, conditions_of
from pipeline.clip import Clip, Crops, load_crops
from pipeline.errors import HeadcastError
from pipeline.frames import evenly
from pipeline.geometry import matrix_to_rotvec
from pipeline.mesh_render import silhouette
from pipeline.stage import Level

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads import HeadModel

REGIONS = ("psnr", "psnr_subject", "psnr_head", "psnr_torso")
FIGURES = (*REGIONS, "psnr_sure", "ssim", "ms_ssim", "l1", "flip", "lpips")
BASELINES = ("nearest_train_frame", "nearest_by_parameters", "mean_frame")
SEARCH_BYTES = 600_000_000
"""Memory for the held-out frames while training frames pass by; more of them take another pass."""
SEARCH_BATCH = 16
PARTIAL_ALPHA = (metrics.BACKGROUND_ALPHA, 1 - metrics.BACKGROUND_ALPHA)
TRAIN_FRAMES_MEASURED = 20
WARM_UP_RENDERS, TIMED_RENDERS = 3, 40
PARTS = ("outline", "mouth", "eyes", "face", "hair", "torso", "background")
"""Where error is: the half-transparent outline first, then each pixel's part of the subject; every pixel has one."""
# MediaPipe's landmarks around the face, the lips and each eye, and by how much their hulls are grown: the lips' to the
# skin that they move, the eyes' to lids and lashes.
FACE_OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150),
    *(136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)
LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
EYES = ((362, 374, 263, 386, 380, 390, 466, 384), (33, 145, 133, 159, 153, 163, 246, 157))
FACE_GROWTH, LIPS_GROWTH, EYE_GROWTH = 1.0, 1.25, 1.6

Measure = Callable[["NDArray[np.float32]", "NDArray[np.float32]"], float]


@dataclass(frozen=True)
class Picture:
    """An image [R,R,3] over white and its alpha [R,R], float in [0, 1]."""

    image: NDArray[np.float32]
    alpha: NDArray[np.float32]

    def rgb(self) -> NDArray[np.uint8]:
        """The image [R,R,3] in 8 bits."""
        return np.asarray((self.image * 255 + 0.5).astype(np.uint8))

    @staticmethod
    def of(crops: Crops, row: int) -> Picture:
        """One row of some crops."""
        return Picture(crops.images[row].astype(np.float32) / 255, crops.alphas[row].astype(np.float32) / 255)


@dataclass(frozen=True)
class ClipRenderer:
    """An avatar with what drives it through a clip.

    Attributes:
        conditions: T rows. Ks: [C,3,3] intrinsics at `resolution` pixels. Both on the avatar's device.
        cameras: [T] which of the C cameras took a frame.
        inside: [C,R,R] share of each pixel inside the clip's frames; what is outside is white in the truth and so is it
            in a render.
    """

    avatar: AvatarModel
    conditions: Condition
    Ks: Tensor
    cameras: NDArray[np.int64]
    resolution: int
    threads: int
    inside: NDArray[np.float32]

    @staticmethod
    def of(avatar: AvatarModel, clip: Clip, threads: int, device: torch.device | str = "cpu") -> ClipRenderer:
        """The avatar, which is on `device`, driven by the clip it was fitted to, or by another one."""
        Ks = torch.as_tensor(clip.Ks, dtype=torch.float32, device=device)
        conditions = conditions_of(clip, device)
        avatar.threads = threads
        return ClipRenderer(avatar, conditions, Ks, clip.cameras, clip.resolution, threads, clip.inside())

    def render(self, frame: int) -> Picture:
        """One frame over white, clamped to what a screen can show."""
        white, camera = torch.ones(3, device=self.Ks.device), int(self.cameras[frame])
        with torch.no_grad():
            view = self.avatar.render(
                self.conditions.frame(frame),
                self.Ks[camera],
                self.resolution,
                self.resolution,
                white,
                threads=self.threads,
            )
        image, alpha = view.image.clamp(0, 1).cpu().numpy(), view.alpha.clamp(0, 1).cpu().numpy()
        inside = self.inside[camera]
        return Picture(1 + inside[..., None] * (image - 1), inside * alpha)

    def fps(self, frames: Sequence[int]) -> float:
        """Frames a second from condition to image, deformation included: the median of single renders."""
        seconds = []
        for turn in range(WARM_UP_RENDERS + TIMED_RENDERS):
            begun = time.perf_counter()
            # It ends on the CPU, so a GPU has finished when the clock is read.
            self.render(frames[turn % len(frames)])
            seconds.append(time.perf_counter() - begun)
        return 1 / median(seconds[WARM_UP_RENDERS:])


def regional_psnr(truth: Picture, picture: Picture, head: NDArray[np.bool_]) -> dict[str, float | None]:
    """PSNR over the whole crop, the subject's pixels, the head's and the torso's: what of the subject is not the head.

    None where a region is empty.
    """
    subject = metrics.subject_mask(truth.alpha, picture.alpha)
    regions = {"psnr_subject": subject, "psnr_head": head, "psnr_torso": subject & ~head}
    return {
        "psnr": metrics.psnr(truth.image, picture.image),
        **{n: metrics.psnr(truth.image, picture.image, mask) if mask.any() else None for n, mask in regions.items()},
    }


def score(
    truth: Picture,
    picture: Picture,
    regions: Regions,
    flip: NDArray[np.floating[Any]],
    lpips: Measure | None,
    confidence: NDArray[np.uint8],
) -> dict[str, float | None]:
    """Every figure of one frame; None where one cannot be had.

    Args:
        truth, picture: the frame and its render.
        regions: of the frame.
        flip: [R,R] their `metrics.flip_map`.
        lpips: the distance, where its weights are there.
        confidence: [R,R] how sure the frame's alpha is; weighs `psnr_sure`.
    """
    side = min(truth.image.shape[:2])
    error = metrics.squared_error(truth.image, picture.image)
    return {
        **regional_psnr(truth, picture, regions.head),
        "psnr_sure": metrics.psnr_of(float((error * confidence).sum() / confidence.sum()))
        if confidence.any()
        else None,
        "ssim": metrics.ssim(truth.image, picture.image),
        "ms_ssim": metrics.ms_ssim(truth.image, picture.image) if side >= metrics.MS_SSIM_MIN_SIDE else None,
        "l1": metrics.l1(truth.image, picture.image),
        "flip": float(flip.mean()),
        "lpips": lpips(truth.image, picture.image) if lpips else None,
        "squared_error": float(error.sum()),
        "squared_error_partial_alpha": float(error[_partial(truth.alpha)].sum()),
        **error_by_part(truth, picture, regions),
    }


def mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a figure over the rows that have it, rounded; None where none has."""
    values = [value for row in rows if (value := row[name]) is not None]
    return rounded(sum(values) / len(values)) if values else None


def rounded(value: float | None) -> float | None:
    """A figure with as many digits as files keep."""
    return None if value is None else round(value, 5)


def lpips_or_reason(wanted: bool, resolution: int) -> tuple[Measure | None, str | None]:
    """The LPIPS distance, or why there is none."""
    if not wanted:
        return None, "switched off: evaluate.lpips is false"
    from pipeline.lpips import MIN_SIDE, load_lpips

    if resolution < MIN_SIDE:
        return None, f"it needs sides of at least {MIN_SIDE} px"
    try:
        return load_lpips(), None
    except HeadcastError as error:
        return None, error.what


def train_psnr(
    clip: Clip,
    usable: NDArray[np.int64],
    render: Callable[[int], Picture],
    check_stop: Callable[[], None] = lambda: None,
) -> float | None:
    """Mean PSNR on training frames that are spread evenly over the usable ones."""
    rows = []
    for frame in usable[evenly(len(usable), TRAIN_FRAMES_MEASURED)].tolist():
        check_stop()
        truth = Picture.of(load_crops(clip, [frame]), 0)
        rows.append({"psnr": metrics.psnr(truth.image, render(frame).image)})
    return mean_of(rows, "psnr")


class Regions(NamedTuple):
    """Pixels [R,R] of one frame, by the fitted head."""

    head: NDArray[np.bool_]
    """Its silhouette without the torso, grown for hair."""
    face: NDArray[np.bool_]
    mouth: NDArray[np.bool_]
    eyes: NDArray[np.bool_]


def regions_of(clip: Clip, head: HeadModel, frames: Sequence[int]) -> Iterator[Regions]:
    """Where head, face, mouth and eyes are in each of these frames."""
    identity = torch.from_numpy(clip.identity)
    for frame in frames:
        rows = (torch.from_numpy(array[frame : frame + 1]) for array in (clip.expression, clip.neck, clip.eyes))
        posed = head.vertices(identity, *rows)
        T_cam_head = clip.Ts_cam_head[frame]

        def in_camera(points: Tensor, T_cam_head: NDArray[np.float64] = T_cam_head) -> NDArray[np.float64]:
            return np.asarray(points[0].double().numpy() @ T_cam_head[:3, :3].T + T_cam_head[:3, 3])

        size, K = (clip.resolution, clip.resolution), clip.Ks[clip.cameras[frame]]
        outline = silhouette(in_camera(posed), head.faces, K, *size, head.regions["head"])
        projected = in_camera(head.landmarks(posed)) @ K.T
        points = projected[:, :2] / projected[:, 2:]
        yield Regions(
            metrics.head_mask(outline),
            _hull(points[list(FACE_OVAL)], FACE_GROWTH, clip.resolution),
            _hull(points[list(LIPS)], LIPS_GROWTH, clip.resolution),
            np.logical_or(*(_hull(points[list(eye)], EYE_GROWTH, clip.resolution) for eye in EYES)),
        )


def _hull(points: NDArray[np.float64], growth: float, size: int) -> NDArray[np.bool_]:
    """Pixels [size,size] inside the convex hull of points [n,2], grown about their middle."""
    import cv2

    middle = points.mean(0)
    hull = cv2.convexHull((middle + growth * (points - middle) - 0.5).round().astype(np.int32))
    return np.asarray(cv2.fillConvexPoly(np.zeros((size, size), np.uint8), hull, 1), bool)


def error_by_part(truth: Picture, picture: Picture, regions: Regions) -> dict[str, float]:
    """Squared error and pixels of each of `PARTS`, as `error_PART` and `pixels_PART`; every pixel is in one part."""
    error = metrics.squared_error(truth.image, picture.image)
    masks = {
        "outline": _partial(truth.alpha),
        "mouth": regions.mouth,
        "eyes": regions.eyes,
        "face": regions.face,
        "hair": regions.head,
        "torso": np.ones_like(regions.head),  # what is left of the subject
    }
    # Beyond the subject there is background, wherever a region may reach.
    subject = metrics.subject_mask(truth.alpha, picture.alpha)
    found: dict[str, float] = {}
    taken = np.zeros_like(subject)
    for part, mask in masks.items():
        mine = mask & subject & ~taken
        taken |= mine
        found |= {f"error_{part}": float(error[mine].sum()), f"pixels_{part}": float(mine.sum())}
    return found | {"error_background": float(error[~taken].sum()), "pixels_background": float((~taken).sum())}


def _partial(alpha: NDArray[np.float32]) -> NDArray[np.bool_]:
    return (alpha > PARTIAL_ALPHA[0]) & (alpha < PARTIAL_ALPHA[1])


@dataclass(frozen=True)
class TrainingScan:
    """What one look at every training frame gives.

    Attributes:
        nearest: [n] for each held-out frame, the training frame that comes nearest to it.
        mean: the mean training image and alpha.
    """

    nearest: NDArray[np.int64]
    mean: Picture


def scan_training(
    clip: Clip,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    *,
    threads: int = 1,
    on_frames: Callable[[int], None] = lambda count: None,
) -> TrainingScan:
    """The mean training frame, and for each held-out frame the training frame of the highest PSNR.

    Training frames pass by in batches, so memory depends on the number of held-out frames only, and on that no more
    than `SEARCH_BYTES` allow.

    Args:
        clip: whose frames.
        train, test: frame indices.
        threads: files decoded at a time.
        on_frames: called with the number of frames after each batch.
    """
    size = clip.resolution
    values = size * size * 3
    rows = _rows_at_once(size)
    image_sum, alpha_sum = np.zeros((size, size, 3)), np.zeros((size, size))
    nearest = np.empty(len(test), np.int64)
    for first in range(0, len(test), rows):
        part = slice(first, first + rows)
        targets = torch.from_numpy(load_crops(clip, test[part], threads=threads).images).reshape(-1, values).float()
        # |x - y|^2 as |x|^2 - 2 x.y + |y|^2 is one matrix product; without their common part it keeps its digits.
        centre = targets.mean(0)
        targets -= centre
        best = torch.full((len(targets),), torch.inf)
        for start in range(0, len(train), SEARCH_BATCH):
            batch = train[start : start + SEARCH_BATCH]
            crops = load_crops(clip, batch, threads=threads)
            if first == 0:
                image_sum += crops.images.sum(0, dtype=np.float64)
                alpha_sum += crops.alphas.sum(0, dtype=np.float64)
            candidates = torch.from_numpy(crops.images).reshape(-1, values).float() - centre
            # The target's own square is the same for every candidate.
            distances = candidates.square().sum(1) - 2 * targets @ candidates.T
            value, place = distances.min(1)
            better = value < best
            best = torch.where(better, value, best)
            nearest[part][better.numpy()] = batch[place[better].numpy()]
            on_frames(len(batch))
    count = 255 * len(train)
    mean = Picture((image_sum / count).astype(np.float32), (alpha_sum / count).astype(np.float32))
    return TrainingScan(nearest, mean)


def scan_length(clip: Clip, train: NDArray[np.int64], test: NDArray[np.int64]) -> int:
    """How many frames `scan_training` will count."""
    return len(train) * math.ceil(len(test) / _rows_at_once(clip.resolution))


def _rows_at_once(resolution: int) -> int:
    """Held-out frames [R,R,3], as float32, that `SEARCH_BYTES` hold."""
    return max(1, SEARCH_BYTES // (4 * 3 * resolution**2))


def nearest_by_parameters(clip: Clip, train: NDArray[np.int64], test: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each held-out frame the training frame nearest in expression and head pose, each in training deviations.

    It sees what an avatar is driven by and nothing of the answer: the fair rival of the two nearest frames.
    """
    rotations = clip.Ts_cam_head[:, :3, :3]
    # Relative to a training pose: a head that faces the camera is half a turn from its axes, where vectors jump.
    turns = matrix_to_rotvec(rotations[train[0]].T @ rotations)
    parameters = np.concatenate([clip.expression, turns, clip.Ts_cam_head[:, :3, 3]], -1).astype(np.float64)
    spread = parameters[train].std(0)
    # A coefficient that never moved in training tells nothing.
    moving = spread > 1e-6
    scaled = parameters[:, moving] / spread[moving]
    return np.asarray(train[cdist(scaled[test], scaled[train]).argmin(1)])


def stand_ins(
    clip: Clip, train: NDArray[np.int64], test: NDArray[np.int64], scan: TrainingScan
) -> Iterator[tuple[int, Picture, dict[str, tuple[Picture, int | None]]]]:
    """Each held-out frame, its truth, and for each baseline the picture that stands in for a render.

    With the picture comes the number of the training frame that it is; None where it is none.
    """
    picks = zip(scan.nearest.tolist(), nearest_by_parameters(clip, train, test).tolist(), strict=True)
    for frame, (nearest, similar) in zip(test.tolist(), picks, strict=True):
        crops = load_crops(clip, [frame, nearest, similar])
        others = (Picture.of(crops, 1), nearest), (Picture.of(crops, 2), similar), (scan.mean, None)
        yield frame, Picture.of(crops, 0), dict(zip(BASELINES, others, strict=True))


def judge(psnr: float, baselines: dict[str, float]) -> Level:
    """What a held-out PSNR is worth beside those of the baselines.

    good: within 1 dB of the best training frame, which was picked by looking at the answer, and above the mean frame.
    fair: above what can be had without an avatar and without the answer. poor: not even that.
    """
    honest = max(baselines["nearest_by_parameters"], baselines["mean_frame"])
    if psnr >= baselines["nearest_train_frame"] - 1 and psnr > baselines["mean_frame"]:
        return "good"
    return "fair" if psnr > honest else "poor"


def verdict_text(result: dict[str, Any], level: Level) -> str:
    """The stage's verdict in words from the contents of `metrics.json`."""
    test, others, counts = result["test"], result["baselines"], result["counts"]
    first, last = result["split"]["test"]
    known = {name: f"{figures['psnr']:.1f}" for name, figures in others.items()}
    parts = [
        f"Evaluation: {level}. Held-out frames {first}-{last}: {test['psnr']:.1f} dB "
        f"(best training frame {known['nearest_train_frame']}, nearest by parameters "
        f"{known['nearest_by_parameters']}, mean frame {known['mean_frame']})"
    ]
    if test["psnr_head"] is not None:
        parts.append(
            f"the head alone {test['psnr_head']:.1f} dB (best training frame "
            f"{others['nearest_train_frame']['psnr_head']:.1f})"
        )
    text = "; ".join(parts) + "."
    if counts["test_usable"] < counts["test"]:
        text += f" Measured on {counts['test_usable']} of {counts['test']} held-out frames: the others are not usable."
    share = result["error_share_partial_alpha"]
    if share is not None and share > 0.5:
        text += f" {share:.0%} of the error lies along the outline, where the matte is half transparent."
    return text + f" Renders {result['speed']['render_fps']:.0f} frames a second."
