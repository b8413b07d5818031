"""Chroma key: a clip filmed before a green or blue screen tells itself whose pixel is whose, in every strand of hair.

The screen is found as one saturated colour along the picture's border, in every frame and not in the face. Its light
may vary over the picture, smoothly. A pixel is a mixture of the screen's colour there and the subject's near by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Image = NDArray[np.uint8]
    Floats = NDArray[np.float32]

LEAST_SATURATION = 0.18
"""Of a screen: length of its chroma over its luma; grey and bluish walls have less than 0.1."""
HUE_REACH = 0.35
"""What counts as the screen: chroma over luma as near to the screen's as this share of its length."""
BORDER_SHARE, SUBJECT_SHARE = 0.75, 0.02
"""In every frame the screen has at least so much of the border beside and above, and at most so much of the face.

A head may reach over the border above; a screen that ends inside the picture on one side falls short.
"""
ROUGHNESS_LIMIT = 0.06
"""Greatest spread of the screen's colour about its smooth course, as a share of its brightness: foliage has more."""
MIXED_UP_TO = 0.25
"""Pixels whose chroma is as far from the screen's as if they had less than this share of it show the subject alone."""
FAR = 0.05
"""Nothing is half transparent farther from the clear screen than this share of the picture's longer side."""
EVEN_PX, CHROMA_BLUR_PX = 0.7, 1.2
"""Standard deviations of the blur that evens out the chroma's steps, and of all that chroma is blurred by with it."""
SUBJECT_VARIES = 25.0
"""Standard deviation of the subject's luma about its mean near by, in 8-bit levels."""
NOISE_REACH = 2.0
"""Standard deviations of the screen's noise that are taken off."""
_SEARCH_SIDE = 192


@dataclass(frozen=True, eq=False)
class Backdrop:
    """A screen behind the subject."""

    name: Literal["green", "blue"]
    colour: Floats
    """[H, W, 3] sRGB in 0 to 255 as it would be without the subject, smooth over the picture."""
    noise: float
    """Standard deviation of the screen's chroma about that in frames reduced to 192 pixels, in 8-bit levels."""


def find_backdrop(frames: Sequence[Image], subjects: Sequence[NDArray[np.bool_]] | None = None) -> Backdrop | None:
    """The green or blue screen before which a clip was filmed; None where there is none that can be keyed.

    Args:
        frames: [H, W, 3] each; a dozen from all over the clip are enough.
        subjects: of each frame [H, W], True where the subject is for certain, such as in the face.
    """
    if not len(frames):
        return None
    import cv2

    height, width = frames[0].shape[:2]
    scale = min(1.0, _SEARCH_SIDE / max(height, width))
    small = (max(round(width * scale), 8), max(round(height * scale), 8))
    pictures = np.stack([cv2.resize(frame, small, interpolation=cv2.INTER_AREA) for frame in frames])
    hue = _hue(pictures)
    border = _border(small)
    middle = _mode(hue[:, border].reshape(-1, 2))
    saturation = float(np.linalg.norm(middle))
    screen = np.linalg.norm(hue - middle, axis=-1) < HUE_REACH * saturation
    if saturation < LEAST_SATURATION or screen[:, border].mean(1).min() < BORDER_SHARE:
        return None
    for seen, subject in zip(screen, subjects, strict=True) if subjects else ():
        face = cv2.resize(subject.astype(np.uint8), small, interpolation=cv2.INTER_NEAREST) > 0
        if face.any() and seen[face].mean() > SUBJECT_SHARE:
            return None
    if not all(_hangs_together(seen) for seen in screen):
        return None
    # Pixels beside the subject are mixed with it.
    screen = np.stack([cv2.erode(seen.astype(np.uint8), np.ones((3, 3))) > 0 for seen in screen])
    if not screen.any():
        return None
    colour = _smooth_colour(pictures, screen)
    luma = _chroma(colour)[..., 0]
    away = (_chroma(pictures) - _chroma(colour))[screen]
    name: Literal["green", "blue"] = "green" if colour[..., 1].mean() > colour[..., 2].mean() else "blue"
    dominant = 1 if name == "green" else 2
    if colour[..., 0].mean() > colour[..., dominant].mean() or np.std(away[:, 0]) > ROUGHNESS_LIMIT * luma.mean():
        return None
    large = np.asarray(cv2.resize(colour, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)
    return Backdrop(name, large, float(np.hypot(*away[:, 1:].std(0))))


def key(image: Image, backdrop: Backdrop) -> Floats:
    """Alpha [H, W] in [0, 1] of a frame [H, W, 3] before the backdrop.

    Where the subject is alone its colour is known; near by, a pixel's place on the line between that colour and the
    screen's is its alpha, judged by chroma. Video has chroma at half the resolution: the detail comes from the luma, as
    far as the luma of subject and screen differ by more than the subject's own varies.
    """
    import cv2

    screen, seen = _chroma(backdrop.colour), _chroma(image)
    solid = _solid(seen, screen)
    line = _subject_near(seen, seen, screen, solid) - screen
    away = seen - screen
    chroma = cv2.GaussianBlur(away[..., 1:], (0, 0), EVEN_PX)
    length = np.maximum(np.hypot(line[..., 1], line[..., 2]), 1e-3)
    alpha = (chroma[..., 0] * line[..., 1] + chroma[..., 1] * line[..., 2]) / length**2
    contrast = line[..., 0] ** 2
    by_luma = (away[..., 0] * line[..., 0] / np.maximum(contrast, 1)).clip(0, 1)
    trust = contrast / (contrast + SUBJECT_VARIES**2)
    alpha += trust * (by_luma - cv2.GaussianBlur(by_luma, (0, 0), CHROMA_BLUR_PX))
    # What the screen's own noise looks like is none of the subject.
    floor = NOISE_REACH * backdrop.noise / length
    alpha = ((alpha - floor) / np.maximum(1 - 2 * floor, 0.5)).clip(0, 1)
    alpha[solid] = 1
    return np.asarray(alpha, np.float32)


def despill(image: Image, alpha: Floats, backdrop: Backdrop) -> Image:
    """The subject's own colours [H, W, 3] of a frame: without the screen that shines through it and onto it.

    The screen's share is taken out; where little of the subject is left to tell by, its colours near by stand in.
    """
    import cv2

    screen, seen = _chroma(backdrop.colour), _chroma(image)
    solid = _solid(seen, screen)
    near = _subject_near(image.astype(np.float32), seen, screen, solid)
    share = alpha[..., None]
    own = (image - (1 - share) * backdrop.colour) / np.maximum(share, 0.05)
    trust = np.clip(2 * share - 0.5, 0, 1)
    colours = (trust * own + (1 - trust) * near).clip(0, 255)
    # Light of the screen on the subject: beside its edge down to grey, elsewhere no more than the greater primary.
    spill = ((_chroma(colours) * screen)[..., 1:].sum(-1) / (screen[..., 1:] ** 2).sum(-1)).clip(0, 1)
    beside = cv2.blur((~solid).astype(np.float32), (15, 15)).clip(0, 0.25) * 4
    tint = backdrop.colour - screen[..., :1]
    colours -= (spill * beside)[..., None] * tint
    primary, others = (1, (0, 2)) if backdrop.name == "green" else (2, (0, 1))
    colours[..., primary] = np.minimum(colours[..., primary], colours[..., others].max(-1))
    return np.asarray(colours.clip(0, 255).round(), np.uint8)


def _chroma(picture: NDArray[np.uint8] | Floats) -> Floats:
    """Y, Cb and Cr about 0 of sRGB in 0 to 255 (BT.601), [..., 3]."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
    return np.asarray(picture, np.float32) @ matrix.T


def _hue(picture: NDArray[np.uint8]) -> Floats:
    """Chroma over luma [..., 2]: what light of varying strength leaves as it is."""
    values = _chroma(picture)
    return np.asarray(values[..., 1:] / (values[..., :1] + 16))


def _border(size: tuple[int, int]) -> NDArray[np.bool_]:
    """[h, w] the strip above and the upper half of those beside; below is the subject."""
    width, height = size
    strip = max(round(0.04 * width), 1)
    border = np.zeros((height, width), bool)
    border[:strip] = True
    border[: height // 2, :strip] = border[: height // 2, -strip:] = True
    return border


def _mode(hue: Floats) -> NDArray[np.float64]:
    """The most frequent of [N, 2] values: the mean about the fullest cell of a grid."""
    cell = 0.04
    cells, counts = np.unique(np.round(hue / cell).astype(int), axis=0, return_counts=True)
    middle = cells[counts.argmax()] * cell
    return np.asarray(hue[np.abs(hue - middle).max(-1) < 1.5 * cell].mean(0), np.float64)


def _hangs_together(seen: NDArray[np.bool_]) -> bool:
    """Whether a screen's pixels are nearly all in pieces that reach the picture's border, and not scattered."""
    import cv2

    _, labels, statistics, _ = cv2.connectedComponentsWithStats(seen.astype(np.uint8), connectivity=4)
    outer = np.unique(np.concatenate([labels[0], labels[:, 0], labels[:, -1]]))
    large = [label for label in outer if label and statistics[label, cv2.CC_STAT_AREA] > 0.01 * seen.size]
    return bool(statistics[large, cv2.CC_STAT_AREA].sum() > 0.9 * seen.sum())


def _smooth_colour(pictures: NDArray[np.uint8], screen: NDArray[np.bool_]) -> Floats:
    """The screen's colour [h, w, 3]: its mean near by over all frames, and a fitted quadric where it is never seen."""
    import cv2

    height, width = screen.shape[1:]
    counts = screen.sum(0).astype(np.float32)
    sums = (pictures * screen[..., None]).sum(0).astype(np.float32)
    y, x = np.mgrid[:height, :width] / max(width, height) - 0.5
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    known = counts > 0
    weight = np.sqrt(counts[known])[:, None]
    coefficients = np.linalg.lstsq(terms[known] * weight, sums[known] / counts[known][:, None] * weight, rcond=None)[0]
    lowest, highest = np.percentile(sums[known] / counts[known][:, None], (1, 99), axis=0)
    quadric = (terms @ coefficients).clip(lowest, highest).astype(np.float32)
    size = (0, 0)
    near, near_counts = (cv2.GaussianBlur(values, size, sigmaX=0.02 * width) for values in (sums, counts))
    doubt = 0.02 * len(screen)
    return np.asarray((near + doubt * quadric) / (near_counts + doubt)[..., None], np.float32)


def _solid(seen: Floats, screen: Floats) -> NDArray[np.bool_]:
    """[H, W] where the subject is alone: its chroma is far from the screen's all around, or the screen is far away."""
    import cv2

    away = cv2.blur(seen - screen, (3, 3))
    share = np.hypot(away[..., 1], away[..., 2]) / np.maximum(np.hypot(screen[..., 1], screen[..., 2]), 1e-3)
    unlike = cv2.erode((share > 1 - MIXED_UP_TO).astype(np.uint8), np.ones((3, 3))) > 0
    distance = cv2.distanceTransform((share > HUE_REACH).astype(np.uint8), cv2.DIST_L2, 3)
    return np.asarray(unlike | (distance > FAR * max(share.shape)))


def _subject_near(values: Floats, seen: Floats, screen: Floats, solid: NDArray[np.bool_]) -> Floats:
    """Values [H, W, 3] of the subject near by: the darker part's for pixels darker than the screen, else the lighter's.

    A mixture is darker than the screen only if the subject is, as hair is beside a light face. The means are taken at
    half the size, as they are smooth.
    """
    import cv2

    height, width = solid.shape
    half = (max(width // 2, 1), max(height // 2, 1))
    lighter_by = seen[..., 0] - screen[..., 0]
    alone, lighter = (
        cv2.resize(plane, half, interpolation=cv2.INTER_AREA) for plane in (solid.astype(np.float32), lighter_by)
    )
    small = np.dstack([cv2.resize(values, half, interpolation=cv2.INTER_AREA), np.ones_like(alone)])
    dark, light = (
        cv2.resize(_nearest_mean(small * part[..., None]), (width, height))
        for part in ((alone > 0.99) & (lighter < 0), (alone > 0.99) & (lighter >= 0))
    )
    return np.where(lighter_by[..., None] < 0, dark, light)


def _nearest_mean(weighted: Floats) -> Floats:
    """Mean [h, w, 3] of values, each times its weight [h, w, 4]: of those near by, else of those farther away.

    Means over 5 pixels, then over 20, 68 and all, which are taken at a quarter of the size.
    """
    import cv2

    height, width = weighted.shape[:2]
    coarse = cv2.resize(weighted, (max(width // 4, 1), max(height // 4, 1)), interpolation=cv2.INTER_AREA)
    wide = sum(s * cv2.blur(coarse, (n, n), borderType=cv2.BORDER_ISOLATED) for n, s in ((5, 0.03), (17, 1e-3)))
    total = cv2.blur(weighted, (5, 5), borderType=cv2.BORDER_ISOLATED) + cv2.resize(wide, (width, height))
    total += 1e-6 * coarse.mean((0, 1))
    return np.asarray(total[..., :3] / np.maximum(total[..., 3:], 1e-12), np.float32)
