"""What a single picture says of itself before anything is tracked: colours, light, sharpness, room around the head."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from pipeline.faces import Face

BLACK_LUMA = 10
"""Grey value that a black frame's brightest places, or a black bar's, do not exceed."""
BURNT_LUMA = 250
"""Grey value from which nothing can be told apart."""
CUT_CHANGE = 0.5
"""Share of a colour histogram that changes at a cut; true cuts are seen at 0.9 and more, fast motion below 0.1."""
SHARP_OCTAVE, LOST_OCTAVE = 0.65, 0.35
"""Contrast of an octave over that of the next coarser one: faces in focus have 0.65 to 0.85 at every size, and after a
Gaussian blur of two pixels 0.33 to 0.39."""
_OUTER_EYES, _FOREHEAD = (33, 263), 10
_EYES_AND_FOREHEAD_CM = 8.892 + 5.750
"""In MediaPipe's canonical face: from eye to eye (outer corners), and from between them to the forehead's top."""
_HEAD_FROM_EYES_CM = np.array([0.0, 1.8, -7.4])
"""Middle of head and hair as seen from between the eyes' corners, in the canonical face's axes (y up, z forward)."""
_HEAD_RADIUS_CM = 9.7
"""Skull (about 8.5 to 9.5 cm) with some hair."""


def colour_histogram(thumbnail: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Shares [512] of the colours of a picture [H, W, 3], in 8 steps a channel."""
    import cv2

    counts = cv2.calcHist([thumbnail], [0, 1, 2], None, [8] * 3, [0, 256] * 3).ravel()
    return np.asarray(counts / counts.sum(), np.float64)


def histogram_change(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Share of the colours that differs between two histograms, 0 to 1."""
    return float(1 - np.minimum(a, b).sum())


def face_detail(grey: NDArray[np.uint8], box: NDArray[np.floating]) -> float:
    """Mean square of the Laplacian over a face, brought to one size so that distance does not count.

    Args:
        grey: the frame [H, W].
        box: x0, y0, x1, y1 of the face.
    """
    import cv2

    face = crop(grey, box)
    if min(face.shape) < 2:
        return 0.0
    even = cv2.resize(face, (128, 128), interpolation=cv2.INTER_AREA)
    return float((cv2.Laplacian(even, cv2.CV_32F) ** 2).mean())


def lost_octaves(grey: NDArray[np.uint8]) -> float:
    """How often a picture [H, W] of a face could be halved without losing detail: 0 in focus, 1 for half its size.

    In natural pictures every octave of detail has nearly as much contrast as the next; blur and strong compression take
    the finest away. Noise and what scaling up makes of edges pass for detail in part, so a picture may hold less yet.
    """
    import cv2

    picture = grey.astype(np.float32)
    contrasts: list[float] = []
    while min(picture.shape) >= 24 and len(contrasts) < 6:
        coarse = cv2.pyrDown(picture)
        contrasts.append(float((picture - cv2.pyrUp(coarse, dstsize=picture.shape[::-1])).std()))
        picture = coarse
    lost = 0.0
    for fine, next_coarser in itertools.pairwise(contrasts):
        ratio = fine / max(next_coarser, 1e-6)
        gone = float(np.clip((SHARP_OCTAVE - ratio) / (SHARP_OCTAVE - LOST_OCTAVE), 0, 1))
        lost += gone
        if gone < 0.5:
            break
    return lost


def face_light(grey: NDArray[np.uint8], face: Face) -> tuple[float, float, float]:
    """Median grey value of a face, its mean light (linear, 0 to 1), and the share of it that is burnt out.

    Args:
        grey: the frame [H, W].
        face: what the detector saw in it.
    """
    import cv2

    corner = np.maximum(face.box[:2], 0).astype(int)
    inside = crop(grey, face.box)
    mask = np.zeros(inside.shape, np.uint8)
    hull = cv2.convexHull((face.landmarks[:, :2] - corner).astype(np.int32))
    cv2.fillConvexPoly(mask, hull, 1)
    values = inside[mask > 0]
    if not len(values):
        return 0.0, 0.0, 0.0
    return float(np.median(values)), float(((values / 255.0) ** 2.2).mean()), float((values >= BURNT_LUMA).mean())


def flat_share(grey: NDArray[np.uint8]) -> float:
    """Share of a face's picture [H, W], its border and what is burnt out aside, that no pixel beside differs from.

    Skin has grain in films, also in dark, soft and compressed ones; a drawing is filled with colours.
    """
    import cv2

    around = np.ones((3, 3), np.uint8)
    spread = cv2.dilate(grey, around) - cv2.erode(grey, around)
    top, left = grey.shape[0] // 5, grey.shape[1] // 5
    middle = (slice(top, grey.shape[0] - top), slice(left, grey.shape[1] - left))
    counted = grey[middle] < BURNT_LUMA
    return float((spread[middle] <= 1)[counted].mean()) if counted.any() else 0.0


def head_circle(face: Face) -> tuple[float, float, float]:
    """Where a head of average size with some hair is, from its face alone: x, y and radius in pixels.

    A sphere behind the face, placed by the detector's rotation and the size of what the jaw does not move.
    """
    points = face.landmarks.astype(np.float64)
    right, left = points[list(_OUTER_EYES)]
    middle = (right + left) / 2
    size = float(np.linalg.norm(left - right) + np.linalg.norm(points[_FOREHEAD] - middle))
    px_per_cm = size / _EYES_AND_FOREHEAD_CM
    x, y, _ = face.pose[:3, :3].astype(np.float64) @ _HEAD_FROM_EYES_CM * px_per_cm
    return float(middle[0] + x), float(middle[1] - y), _HEAD_RADIUS_CM * px_per_cm


def crop(image: NDArray[np.uint8], box: NDArray[np.floating]) -> NDArray[np.uint8]:
    """What a box x0, y0, x1, y1 holds of an image [H, W, ...]; empty where it lies outside."""
    x0, y0 = np.maximum(box[:2], 0).astype(int)
    x1, y1 = np.maximum(np.ceil(box[2:]), 0).astype(int)
    return image[y0:y1, x0:x1]
