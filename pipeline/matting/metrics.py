"""The field's figures for alphas of a video: how far from the truth, and how unsteady.

Alphas are float in [0, 1], [H, W] or [T, H, W], of equal shape, the truth first; figures of a sequence are means over
its frames. `evaluate_lr.py` of Robust Video Matting (Lin et al. 2022) computes them so too, over whole pictures, and
prints MAD and MSE times 1000 and dtSSD times 100.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.matting.flow import boundary_length, dense_flow, half_grey, single_threaded_opencv, warp

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Alpha = NDArray[np.floating[Any]]

SOLID, CLEAR = 242 / 255, 13 / 255
"""From the one alpha on a pixel is all the subject's; up to the other it is none of it."""
GRADIENT_SIGMA_PX = 1.4
"""Of the Gaussian in `gradient_error`."""


def sad(truth: Alpha, alpha: Alpha) -> float:
    """Sum of absolute differences of a frame over 1000 (Rhemann et al. 2009)."""
    return float(np.abs(_difference(truth, alpha)).sum((-2, -1)).mean()) / 1000


def mad(truth: Alpha, alpha: Alpha) -> float:
    """Mean absolute difference (Rhemann et al. 2009 over all pixels)."""
    return float(np.abs(_difference(truth, alpha)).mean())


def mse(truth: Alpha, alpha: Alpha) -> float:
    """Mean squared difference (Rhemann et al. 2009 over all pixels)."""
    return float(np.square(_difference(truth, alpha)).mean())


def gradient_error(truth: Alpha, alpha: Alpha) -> float:
    """Sum over a frame of `(|grad truth| - |grad alpha|)^2` over 1000 (Rhemann et al. 2009).

    The gradient is the convolution with the first derivatives of a Gaussian of 1.4 pixels, cut where it falls below 1 %
    and scaled so that the squares of the kernel's values sum to 1, as the authors' and everybody's code has it.
    """
    difference = [
        np.square(_gradient_length(a) - _gradient_length(b)).sum()
        for a, b in zip(*(_frames(x) for x in _checked(truth, alpha)), strict=True)
    ]
    return float(np.mean(difference)) / 1000


def dtssd(truth: Alpha, alpha: Alpha) -> float:
    """Mean over t = 1 ... T-1 of `sqrt(mean over the pixels of ((alpha_t - alpha_t-1) - (truth_t - truth_t-1))^2)`.

    Erofeev et al. 2015, with the sum over the pixels divided by their number. 0 for fewer than two frames.
    """
    steps = np.diff(_frames(_difference(truth, alpha)), axis=0)
    return float(np.sqrt(np.square(steps).mean((-2, -1))).mean()) if len(steps) else 0.0


def iou(truth: Alpha, alpha: Alpha) -> float:
    """Intersection over union of the pixels with alpha of at least 0.5; 1 where both are empty."""
    a, b = (_frames(x) >= 0.5 for x in _checked(truth, alpha))
    both, either = (a & b).sum((-2, -1)), (a | b).sum((-2, -1))
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())


def partial_alpha_share(alpha: Alpha) -> float:
    """Share of the subject's pixels (alpha above 13/255) that are half transparent (below 242/255); 0 without any."""
    frames = _frames(alpha)
    subject = (frames > CLEAR).sum((-2, -1))
    edge = ((frames > CLEAR) & (frames < SOLID)).sum((-2, -1))
    return float((edge / np.maximum(subject, 1)).mean())


class Flicker:
    """How far the alpha's boundary jumps to and fro against the motion of the picture, in pixels.

    Of three frames in a row the outer alphas are moved to the middle one by optical flow of the frames. What differs
    from their mean there, `sum |a_t - (W a_t-1 + W a_t+1) / 2|`, is taken over the length of the middle's boundary.
    Motion that the flow follows cancels, however fast. Of a perfect alpha remains what the flow errs at its edge: about
    0.3 pixels where it moves by one a frame before a ground that stands.
    """

    def __init__(self) -> None:
        self._last: tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32] | None] | None = None
        """Grey frame, its alpha, and the alpha of the frame before moved to it."""
        self._values: list[float] = []

    def add(self, image: NDArray[np.uint8] | None, alpha: NDArray[Any] | None) -> None:
        """The next frame [H, W, 3] and its alpha [H, W], 8-bit or in [0, 1]; None and None break the sequence."""
        if image is None or alpha is None:
            self._last = None
            return
        grey, this = half_grey(image), alpha.astype(np.float32) / np.float32(255 if alpha.dtype == np.uint8 else 1)
        came = None
        if self._last is not None:
            last_grey, last, before = self._last
            with single_threaded_opencv():
                came = warp(last, dense_flow(last_grey, grey))
                if before is not None and (length := boundary_length(last)) > 0:
                    after = warp(this, dense_flow(grey, last_grey))
                    self._values.append(float(np.abs(last - (before + after) / 2).sum()) / length)
        self._last = grey, this, came

    def mean(self) -> float:
        """Mean over the frames that have two neighbours; 0 where none has."""
        return float(np.mean(self._values)) if self._values else 0.0


def _checked(truth: Alpha, alpha: Alpha) -> tuple[Alpha, Alpha]:
    if truth.shape != alpha.shape or truth.ndim not in (2, 3):
        raise ValueError(f"alphas of shapes {truth.shape} and {alpha.shape}; wanted are two of one shape, [T, H, W]")
    return truth, alpha


def _difference(truth: Alpha, alpha: Alpha) -> NDArray[np.float64]:
    truth, alpha = _checked(truth, alpha)
    return np.asarray(alpha, np.float64) - truth


def _frames(alpha: NDArray[Any]) -> NDArray[Any]:
    """[T, H, W], of one frame too."""
    return alpha.reshape(-1, *alpha.shape[-2:])


@functools.cache
def _gradient_kernels() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The Gaussian and its derivative, cut where the former falls below 1 %; the squares of each sum to 1."""
    sigma = GRADIENT_SIGMA_PX
    radius = int(np.ceil(sigma * np.sqrt(-2 * np.log(np.sqrt(2 * np.pi) * sigma * 0.01))))
    x = np.arange(-radius, radius + 1)
    gauss = np.exp(-(x**2) / (2 * sigma**2))
    slope = x * gauss
    return gauss / np.linalg.norm(gauss), slope / np.linalg.norm(slope)


def _gradient_length(alpha: Alpha) -> NDArray[np.float64]:
    import cv2

    gauss, slope = _gradient_kernels()
    plane = np.asarray(alpha, np.float64)
    right, down = (
        cv2.sepFilter2D(plane, cv2.CV_64F, x, y, borderType=cv2.BORDER_REPLICATE)
        for x, y in ((slope, gauss), (gauss, slope))
    )
    return np.hypot(right, down)
