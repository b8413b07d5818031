"""The empty scene behind the subject, where the camera stands still: each pixel's usual colour while it is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.matting.refine import Plate

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAMES = 24
"""Frames of a shot that are looked at, spread evenly."""
CLEAR = 0.1
"""A pixel counts as background in a frame where the coarse alpha stays below this all around it."""
MARGIN = 0.02
"""All around: within this share of the picture's longer side."""
MIN_SEEN = 4
"""Times a pixel has to be seen before its colour is believed."""
STEADY = 6.0
"""Grey values by which the background of a standing camera departs from its median, at nine pixels in ten."""
ROWS = 64
"""Rows worked on at a time, for memory."""


def estimate_plate(
    image: Callable[[int], NDArray[np.uint8]],
    coarse: Callable[[int], NDArray[np.uint8]],
    indices: Sequence[int],
) -> Plate | None:
    """The plate of one shot, or None where the camera moves or hardly any background is seen.

    Whether the camera stands still is told by the background itself: under a camera that moves, colours change from
    frame to frame wherever there is anything to see. A plain wall passes either way, and its plate is right either way.

    Args:
        image: gives frame i, [H, W, 3]. coarse: its alpha [H, W], 0 to 255.
        indices: the shot's frames with the subject in them, in order.
    """
    import cv2

    from pipeline.frames import evenly

    chosen = [indices[i] for i in evenly(len(indices), FRAMES)]
    if len(chosen) < MIN_SEEN:
        return None
    pictures, clear = [], []
    for index in chosen:
        picture, alpha = image(index), coarse(index)
        reach = 2 * max(1, round(MARGIN * max(alpha.shape))) + 1
        pictures.append(picture)
        clear.append(cv2.dilate(alpha, np.ones((reach, reach), np.uint8)) < 255 * CLEAR)
    seen = np.stack(clear)
    usual = np.zeros_like(pictures[0])
    departure = np.full(seen.shape[1:], np.nan, np.float32)
    counts = seen.sum(0)
    for top in range(0, seen.shape[1], ROWS):
        rows = slice(top, top + ROWS)
        stack = np.stack([picture[rows] for picture in pictures]).astype(np.int16)
        covered = ~seen[:, rows, :, None]
        usual[rows] = _median(np.where(covered, np.int16(999), stack), counts[rows])
        away = np.abs(stack - usual[rows]).max(-1, keepdims=True)
        departure[rows] = _median(np.where(covered, np.int16(999), away), counts[rows])[..., 0]
    enough = counts >= MIN_SEEN
    if enough.mean() < 0.02 or np.percentile(departure[enough], 90) > STEADY:
        return None
    steady = np.clip(2 - departure / STEADY, 0, 1)
    known = np.where(enough, steady, 0).astype(np.float32)
    return Plate(usual, np.minimum(known, cv2.blur(known, (5, 5))))


def _median(values: NDArray[np.int16], counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Lower median over the first axis of the `counts` smallest values of each pixel; 0 where there is none."""
    ordered = np.sort(values, axis=0)
    middle = np.maximum(counts - 1, 0) // 2
    picked = np.take_along_axis(ordered, middle[None, :, :, None], 0)[0]
    return np.where(counts[..., None] > 0, picked, 0).astype(np.uint8)
