"""Dense optical flow between frames, and alphas moved by it."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@contextlib.contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """Keep OpenCV to one thread meanwhile: its optical flow gives other numbers with other thread counts."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def half_grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame [H, W, 3] as `dense_flow` wants it: grey, at half size, no side below 32 pixels."""
    import cv2

    height, width = image.shape[:2]
    half = (max(width // 2, 32), max(height // 2, 32))
    return np.asarray(cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), half, interpolation=cv2.INTER_AREA), np.uint8)


def dense_flow(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Where in the source each pixel of the target comes from: [h, w, 2] offsets in pixels of these grey images.

    DIS flow (Kroeger et al. 2016). Its numbers depend on OpenCV's thread count: see `single_threaded_opencv`.
    """
    import cv2

    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(target, source, None)
    return np.asarray(flow, np.float32)


def warp(alpha: NDArray[Any], flow: NDArray[np.float32]) -> NDArray[Any]:
    """The source's alpha [H, W], 8-bit or float32, moved to the target by `dense_flow` of any size."""
    import cv2

    height, width = alpha.shape
    scale = np.array([width / flow.shape[1], height / flow.shape[0]], np.float32)
    at = cv2.resize(flow * scale, (width, height))
    at += _pixels(width, height)
    return np.asarray(cv2.remap(alpha, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))


@functools.lru_cache(maxsize=4)
def _pixels(width: int, height: int) -> NDArray[np.float32]:
    """[H, W, 2] column and row of each pixel."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)


def carry(source: NDArray[np.uint8], target: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The source frame's alpha [H, W] moved to the target frame by dense optical flow at half size."""
    return warp(alpha, dense_flow(half_grey(source), half_grey(target)))


def boundary_length(alpha: NDArray[np.floating[Any]]) -> float:
    """Length in pixels of an alpha's boundary, soft or hard: the sum of its gradient's length, for alpha in [0, 1]."""
    down, right = np.gradient(alpha)
    return float(np.hypot(down, right).sum())
