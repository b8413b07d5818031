"""Pinhole cameras: intrinsics, those of a resized square crop, and where to stand to look at a point.

Conventions as in `docs/conventions.md`: OpenCV axes, pixel centres at +0.5. Projection is `geometry.project_points`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.geometry import make_rigid


def make_intrinsics(focal_px: float, width: int, height: int) -> np.ndarray:
    """Intrinsics `K` [3, 3] of square pixels with the principal point in the middle of the image."""
    return np.array([[focal_px, 0.0, width / 2], [0.0, focal_px, height / 2], [0.0, 0.0, 1.0]])


def crop_intrinsics(K: np.ndarray, crop: Sequence[float] | np.ndarray, resolution: int) -> np.ndarray:
    """Intrinsics [3, 3] of the square `crop` (x0, y0, side; pixels of K's image) resized to `resolution` pixels a side.

    The origin is the corner of a pixel, not its centre, so a crop shifts and a resize multiplies: no half pixels.
    """
    x0, y0, side = (float(value) for value in crop)
    scale = resolution / side
    change = np.array([[scale, 0.0, -scale * x0], [0.0, scale, -scale * y0], [0.0, 0.0, 1.0]])
    return change @ np.asarray(K, dtype=np.float64)


def look_at(eye: np.ndarray, target: np.ndarray, up: np.ndarray) -> np.ndarray:
    """`T_cam_world` [4, 4] of a camera at `eye` [3] looking at `target` [3], with `up` [3] upwards in its image.

    Raises:
        ValueError: `eye` and `target` coincide, or `up` is along the line of sight.
    """
    forward = np.asarray(target, dtype=np.float64) - np.asarray(eye, dtype=np.float64)
    right = np.cross(forward, np.asarray(up, dtype=np.float64))
    if not (np.linalg.norm(forward) > 0 and np.linalg.norm(right) > 1e-9 * np.linalg.norm(forward)):
        raise ValueError("look_at needs an eye away from its target and an up vector across the line of sight")
    forward /= np.linalg.norm(forward)
    right /= np.linalg.norm(right)
    R_cam_world = np.stack([right, np.cross(forward, right), forward])
    return make_rigid(R_cam_world, -R_cam_world @ np.asarray(eye, dtype=np.float64))
