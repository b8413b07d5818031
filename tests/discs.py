"""Discs of known alpha to build pictures from."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]


def disc(x: float, y: float, radius: float = 40, shape: tuple[int, int] = (160, 160)) -> Image:
    row, column = np.mgrid[: shape[0], : shape[1]] + 0.5
    return (np.clip(radius - np.hypot(column - x, row - y) + 0.5, 0, 1) * 255).astype(np.uint8)


def textured(x: float, y: float) -> Image:
    """A patterned disc before a patterned ground."""
    rng = np.random.default_rng(3)
    ground, pattern = (
        cv2.resize(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8), (160, 160), interpolation=cv2.INTER_CUBIC)
        for _ in range(2)
    )
    moved = cv2.warpAffine(pattern, np.float32([[1, 0, x - 80], [0, 1, y - 80]]), (160, 160))
    share = disc(x, y)[..., None] / 255
    return (moved * share + ground * (1 - share)).astype(np.uint8)
