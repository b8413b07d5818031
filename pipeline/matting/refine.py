"""Edges: what share of a pixel is the subject's, told from the colours on both sides of the outline.

A network's answer is coarse (256 or 320 pixels for the whole picture), its outline a few pixels off. Inside a band
around it, the colours of what is surely subject and surely background are carried over from both sides, and a pixel's
alpha is its place between the two (the compositing equation I = a F + (1 - a) B, solved for a). Where the two colours
are alike, or the pixel is none of their mixtures, the network's answer stands. The same colours give what the subject
looks like without the background that shines through its edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from numpy.typing import NDArray

BAND = 0.014
"""Half the width of the band around the outline, as a share of the picture's longer side."""
SURE = 0.9
"""A network's alpha from which, or below one minus which, a pixel outside the band is taken for sure."""
CONTRAST = 0.08
"""Distance of subject's and background's colour, in [0, 1], at which they are half told apart."""
VARIED = 20.0
"""How much more the colours must differ where they vary: weight of the variance of their brightness."""
MIXTURE = 0.06
"""How far a pixel may lie off the line between both colours and still be taken for a mixture of them."""
PRIOR = 0.15
"""Weight of the network beside colours that are told apart entirely; what they lack comes on top."""
STRETCH = (0.1, 0.85)
"""Alphas below and above are noise of texture: 0 and 1."""
SPREAD = 4.0
"""Colours are taken from the finest scale at which a quarter of the neighbourhood is sure."""


@dataclass(frozen=True)
class Refined:
    """A refined frame."""

    alpha: NDArray[np.float32]
    """[H, W] in [0, 1]."""
    foreground: NDArray[np.uint8]
    """[H, W, 3] the subject's own colours: the frame where alpha is 1, carried on outwards where it is 0."""
    certainty: NDArray[np.float32]
    """[H, W] in [0, 1]: 1 where the network or the colours are sure of the pixel."""


@dataclass(frozen=True)
class Plate:
    """The empty scene behind the subject."""

    image: NDArray[np.uint8]
    """[H, W, 3]."""
    known: NDArray[np.float32]
    """[H, W] in [0, 1]: how well each pixel was seen without the subject."""


def refine(image: NDArray[np.uint8], coarse: NDArray[np.float32], plate: Plate | None = None) -> Refined:
    """Alpha and colours of a frame from a coarse alpha.

    Args:
        image: [H, W, 3].
        coarse: [H, W] in [0, 1].
        plate: the scene behind, where it is known.
    """
    import cv2

    reach = max(2, round(BAND * max(coarse.shape)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    inside = cv2.erode((coarse > SURE).astype(np.uint8), disc)
    outside = cv2.erode((coarse < 1 - SURE).astype(np.uint8), disc)
    subject, background = spread(image, inside), spread(image, outside)
    if plate is not None:
        known = plate.known[..., None]
        background[..., :3] += known * (plate.image - background[..., :3])
        # What is known pixel by pixel does not vary.
        background[..., 3] += plate.known * (background[..., :3].mean(-1) ** 2 - background[..., 3])
    alpha, certainty = np.empty_like(coarse), np.empty_like(coarse)
    colours = np.empty_like(image)
    _solve(image, coarse, inside, outside, subject, background, alpha, certainty, colours)
    return Refined(alpha, colours, certainty)


def foreground(image: NDArray[np.uint8], alpha: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The subject's own colours [H, W, 3] for an alpha [H, W] that is known, as `Refined.foreground`."""
    inside, outside = ((side).astype(np.uint8) for side in (alpha > 0.98, alpha < 0.02))
    colours = np.empty_like(image)
    _unmix(image, alpha.astype(np.float32), spread(image, inside), spread(image, outside), colours)
    return colours


def spread(image: NDArray[np.uint8], sure: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The picture's colours where `sure` [H, W] is 1, carried on smoothly to where it is 0: [H, W, 4], 0 to 255.

    The fourth is the mean square of their brightness, which tells how much they vary there.

    The pull-push of Gortler et al. 1996 ("The Lumigraph", 4.3): sums over ever larger neighbourhoods, and each pixel
    takes the finest that knows enough. It works at half size, for what it gives is smooth.
    """
    import cv2

    height, width = sure.shape
    half = (max(width // 2, 1), max(height // 2, 1))
    weighted = cv2.resize(image * sure[..., None], half, interpolation=cv2.INTER_AREA).astype(np.float32)
    weight = cv2.resize(255 * sure, half, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    bright = weighted.mean(-1)
    levels = [np.dstack([weighted, bright * bright / np.maximum(weight, 1e-6), weight])]
    while min(levels[-1].shape[:2]) > 3:
        levels.append(cv2.pyrDown(levels[-1]))
    top = levels[-1]
    known = top[..., :4] / np.maximum(top[..., 4:], 1e-6)
    for level in reversed(levels[:-1]):
        known = cv2.pyrUp(known, dstsize=level.shape[1::-1])
        _pull(level, known)
    return np.asarray(cv2.resize(known, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)


@njit(cache=True, nogil=True)
def _pull(level: Any, known: Any) -> None:
    """Blend what a level [h, w, 5] knows by itself into what coarser ones say [h, w, 4]."""
    for y in range(known.shape[0]):
        for x in range(known.shape[1]):
            weight = level[y, x, 4]
            if weight <= 0:
                continue
            share = min(SPREAD * weight, np.float32(1))
            for c in range(4):
                known[y, x, c] += share * (level[y, x, c] / weight - known[y, x, c])


@njit(cache=True, nogil=True)
def _solve(
    image: Any, coarse: Any, inside: Any, outside: Any, subject: Any, background: Any, alpha: Any, certainty: Any,
    colours: Any,
) -> None:  # fmt: skip
    low, high = STRETCH
    for y in range(coarse.shape[0]):
        for x in range(coarse.shape[1]):
            if inside[y, x]:
                alpha[y, x], certainty[y, x] = 1, 1
                for c in range(3):
                    colours[y, x, c] = image[y, x, c]
                continue
            if outside[y, x]:
                alpha[y, x], certainty[y, x] = 0, 1
                for c in range(3):
                    colours[y, x, c] = np.uint8(min(max(subject[y, x, c] + 0.5, 0.0), 255.0))
                continue
            along, length = 0.0, 0.0
            for c in range(3):
                d = (subject[y, x, c] - background[y, x, c]) / 255
                along += d * (image[y, x, c] - background[y, x, c]) / 255
                length += d * d
            mixed = min(max(along / max(length, 1e-5), 0.0), 1.0)
            off = 0.0
            for c in range(3):
                d = (image[y, x, c] - mixed * subject[y, x, c] - (1 - mixed) * background[y, x, c]) / 255
                off += d * d
            doubt = CONTRAST**2 + VARIED * (_variance(subject, y, x) + _variance(background, y, x))
            apart = length / (length + doubt)
            weight = apart * np.exp(-off / (2 * MIXTURE**2))
            prior, trust = coarse[y, x], PRIOR + 1 - apart
            value = (weight * mixed + trust * prior) / (weight + trust)
            value = min(max((value - low) / (high - low), 0.0), 1.0)
            alpha[y, x] = value
            # Sure where the colours tell, where the network does, and all the more where both agree.
            told = max(weight, abs(2 * prior - 1))
            certainty[y, x] = told * (1 - abs(mixed - prior) * (1 - weight))
            _unmixed(image, subject, background, value, y, x, colours)


@njit(cache=True, nogil=True, inline="always")
def _variance(colours: Any, y: int, x: int) -> float:
    """Of the brightness of what a spread colour stands for, in [0, 1]."""
    mean = (colours[y, x, 0] + colours[y, x, 1] + colours[y, x, 2]) / 3
    return max(colours[y, x, 3] - mean * mean, 0.0) / 255**2


@njit(cache=True, nogil=True)
def _unmix(image: Any, alpha: Any, subject: Any, background: Any, colours: Any) -> None:
    for y in range(alpha.shape[0]):
        for x in range(alpha.shape[1]):
            _unmixed(image, subject, background, alpha[y, x], y, x, colours)


@njit(cache=True, nogil=True, inline="always")
def _unmixed(image: Any, subject: Any, background: Any, a: float, y: int, x: int, colours: Any) -> None:
    """The subject's colour in a pixel: near what surrounds it, and such that the mixture gives the frame's colour.

    What the two colours leave unexplained is shared between them by their part in the pixel (Forte 2021, "Approximate
    fast foreground colour estimation", equation 6 with a pixel of its own).
    """
    share = a / (a * a + (1 - a) * (1 - a))
    for c in range(3):
        rest = image[y, x, c] - a * subject[y, x, c] - (1 - a) * background[y, x, c]
        colours[y, x, c] = np.uint8(min(max(subject[y, x, c] + share * rest + 0.5, 0.0), 255.0))
