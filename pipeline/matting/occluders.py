"""Pixels that show something in front of the subject's face: covered parts of it, and hands."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]

GROWN = 0.03
"""Room around what covers, in face sizes or hand lengths: landmarks stand apart, and edges are soft."""
FINGER_WIDTH = 0.2
"""Of a palm's length."""
PALM_SHAPE = 0.6
"""Width of a palm between its outer knuckles over its length from wrist to middle knuckle."""
PALM = (0, 1, 5, 9, 13, 17)
FINGERS = ((1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12), (13, 14, 15, 16), (17, 18, 19, 20))


def covered_pixels(landmarks: NDArray[np.floating], covered: NDArray[np.bool_], shape: tuple[int, ...]) -> Mask:
    """255 where something lies over the face [H, W]: the triangles between covered landmarks, a little grown.

    Args:
        landmarks: [478, 2 or more] in pixels.
        covered: [478] landmarks that something lies over.
        shape: height and width of the picture.
    """
    import cv2
    from scipy.spatial import Delaunay

    mask = np.zeros(shape[:2], np.uint8)
    if not covered.any():
        return mask
    points = landmarks[:, :2].astype(np.float64)
    triangles = Delaunay(points).simplices
    chosen = triangles[covered[triangles].sum(axis=1) >= 2]
    for triangle in points[chosen].round().astype(np.int32):
        cv2.fillConvexPoly(mask, triangle, 255)
    return _grown(mask, GROWN * float(np.ptp(points, axis=0).max()))


def hand_pixels(hands: NDArray[np.floating], shape: tuple[int, ...]) -> Mask:
    """255 where hands are [H, W]: their palms and fingers, a little grown.

    Args:
        hands: [N, 21, 2] landmarks in pixels as in `track.npz`; rows of NaN are left out.
        shape: height and width of the picture.
    """
    import cv2

    mask = np.zeros(shape[:2], np.uint8)
    for hand in hands[np.isfinite(hands).all(axis=(1, 2))].astype(np.float64):
        # A palm seen from its edge is narrow, one that points at the camera short.
        length = max(float(np.linalg.norm(hand[9] - hand[0])), float(np.linalg.norm(hand[17] - hand[5])) / PALM_SHAPE)
        width = max(1, round((FINGER_WIDTH + 2 * GROWN) * length))
        points = hand.round().astype(np.int32)
        cv2.fillConvexPoly(mask, cv2.convexHull(points[list(PALM)]), 255)
        cv2.polylines(mask, [points[list(PALM)]], True, 255, width)
        cv2.polylines(mask, [points[list(finger)] for finger in FINGERS], False, 255, width)
    return mask


def _grown(mask: Mask, radius_px: float) -> Mask:
    import cv2

    side = 2 * max(1, round(radius_px)) + 1
    return np.asarray(cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))), np.uint8)
