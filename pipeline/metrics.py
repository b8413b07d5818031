"""How like two images are: PSNR, L1, SSIM, MS-SSIM and FLIP, and the regions that the figures are taken over.

Images are float [H,W,3] in [0, 1], sRGB-encoded, of equal shape; the truth comes first. LPIPS needs weights and has a
module of its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PSNR_CAP_DB = 100.0
"""PSNR of equal images, and of any two that differ by less: keeps means and JSON finite."""
BACKGROUND_ALPHA = 0.02
"""Below this alpha a pixel is background: five 8-bit levels, about the noise of a matte."""
HEAD_GROWTH = 0.15
"""By what share of its height a head's silhouette is grown, to take the hair in and leave the torso out."""
MS_SSIM_MIN_SIDE = 161
"""Smallest side, in pixels, on which the window of 11 pixels fits MS-SSIM's fifth scale."""

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def psnr(truth: NDArray[Any], image: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> float:
    """Peak signal-to-noise ratio in dB, `-10 log10(mean squared error)`, at most `PSNR_CAP_DB`.

    Args:
        mask: [H,W] pixels to look at; all by default.

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    error = squared_error(truth, image)
    if mask is not None:
        error = error[_checked_mask(mask, error.shape)]
    return psnr_of(float(error.mean()))


def psnr_of(mean_squared_error: float) -> float:
    """PSNR in dB of a mean squared error of images in [0, 1]."""
    return min(PSNR_CAP_DB, -10 * math.log10(max(mean_squared_error, 1e-30)))


def squared_error(truth: NDArray[Any], image: NDArray[Any]) -> NDArray[np.float64]:
    """[H,W] squared error, mean over the channels."""
    _check(truth, image)
    return np.asarray(((truth.astype(np.float64) - image) ** 2).mean(-1))


def l1(truth: NDArray[Any], image: NDArray[Any]) -> float:
    """Mean absolute error."""
    _check(truth, image)
    return float(np.abs(truth.astype(np.float64) - image).mean())


def ssim(truth: NDArray[Any], image: NDArray[Any]) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, where it fits; channels' mean.

    Raises:
        ValueError: shapes differ, or a side is shorter than the window.
    """
    similarity, _ = _ssim_terms(truth, image)
    return similarity


def ms_ssim(truth: NDArray[Any], image: NDArray[Any]) -> float:
    """Multi-scale structural similarity (Wang et al. 2003, equation 7, and its five weights); channels' mean.

    Raises:
        ValueError: shapes differ, or a side is shorter than `MS_SSIM_MIN_SIDE`.
    """
    _check(truth, image)
    if min(truth.shape[:2]) < MS_SSIM_MIN_SIDE:
        raise ValueError(f"MS-SSIM needs sides of at least {MS_SSIM_MIN_SIDE} px, the images are {truth.shape[:2]}")
    a, b = truth.astype(np.float64), image.astype(np.float64)
    product = 1.0
    for scale, weight in enumerate(_SCALE_WEIGHTS):
        if scale:
            a, b = _halved(a), _halved(b)
        similarity, contrast = _ssim_terms(a, b)
        # A negative term has no real power; below zero the images have nothing in common.
        product *= max(similarity if scale == len(_SCALE_WEIGHTS) - 1 else contrast, 0.0) ** weight
    return product


def flip_map(truth: NDArray[Any], image: NDArray[Any]) -> NDArray[np.float32]:
    """FLIP's perceived error (Andersson et al. 2020) of every pixel, [H,W] in [0, 1], at 67 pixels a degree.

    The mean of the map is the image's FLIP.
    """
    import flip_evaluator

    _check(truth, image)
    a, b = (np.ascontiguousarray(np.clip(x, 0, 1), dtype=np.float32) for x in (truth, image))
    error, _, _ = flip_evaluator.evaluate(a, b, "LDR", applyMagma=False, computeMeanError=False)
    return np.asarray(error, np.float32).reshape(a.shape[:2])


def subject_mask(truth_alpha: NDArray[Any], image_alpha: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels [H,W] where truth or image is not background; alphas [H,W] in [0, 1]."""
    return np.asarray((truth_alpha > BACKGROUND_ALPHA) | (image_alpha > BACKGROUND_ALPHA))


def head_mask(silhouette: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A head's silhouette [H,W] grown on every side by `HEAD_GROWTH` of its height in pixels."""
    import cv2

    rows = np.flatnonzero(silhouette.any(1))
    if not len(rows):
        return silhouette
    reach = HEAD_GROWTH * (rows[-1] - rows[0] + 1)
    distance = cv2.distanceTransform((~silhouette).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(distance <= reach)


def _ssim_terms(truth: NDArray[Any], image: NDArray[Any]) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure term."""
    import cv2

    _check(truth, image)
    if min(truth.shape[:2]) < _WINDOW:
        raise ValueError(f"SSIM needs sides of at least {_WINDOW} px, the images are {truth.shape[:2]}")
    taps = cv2.getGaussianKernel(_WINDOW, _SIGMA, cv2.CV_64F)
    edge = _WINDOW // 2

    def window(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.sepFilter2D(values, cv2.CV_64F, taps, taps)[edge:-edge, edge:-edge])

    a, b = truth.astype(np.float64), image.astype(np.float64)
    mean_a, mean_b = window(a), window(b)
    variance_a = window(a * a) - mean_a**2
    variance_b = window(b * b) - mean_b**2
    covariance = window(a * b) - mean_a * mean_b
    contrast = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return float((luminance * contrast).mean()), float(contrast.mean())


def _halved(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of 2 x 2 pixels; an odd side is first extended by repeating its last row or column."""
    height, width = image.shape[:2]
    even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.asarray((even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4)


def _check(truth: NDArray[Any], image: NDArray[Any]) -> None:
    if truth.shape != image.shape or truth.ndim != 3 or truth.shape[-1] != 3:
        raise ValueError(f"images of shapes {truth.shape} and {image.shape} cannot be compared; both must be [H,W,3]")
    if not (np.issubdtype(truth.dtype, np.floating) and np.issubdtype(image.dtype, np.floating)):
        raise ValueError(f"images are {truth.dtype} and {image.dtype}; expected floats in [0, 1]")


def _checked_mask(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if mask.shape != shape or mask.dtype != np.bool_:
        raise ValueError(f"the mask is {mask.dtype} {mask.shape}, expected bool {shape}")
    if not mask.any():
        raise ValueError("the mask is empty")
    return mask
