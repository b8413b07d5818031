"""Telling frames where something covers the face: the skin's look is compared with what the clip leads to expect.

The landmark detector follows a face through a hand without a word. Each frame's face is therefore laid out flat by its
landmarks, and the brightness of every point of it is predicted from the pose and the expression by a robust linear fit
over the whole clip. Where a large part of the face departs from that, something lies over it. Only the face below the
eyes is judged: hair, brows and glasses make the upper part change by themselves. A cover that is there for most of
the clip passes for the face, and in a clip of few frames one that always comes with the same expression may.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GRID = 64
"""Side of the flat face in texels."""
EXPRESSION_MODES = 5
FRAMES_PER_MODE = 36
RIDGE = 0.02
CAUCHY_SCALE = 8.0
"""Grey values; larger departures lose their weight in the fit."""
EXPECTED_DEPARTURE = 15.0
"""Grey values that light and expression may change beyond the prediction."""
MIN_STRETCH = 0.3
"""A triangle seen at less than this share of its usual area is turned away, and its texels are not judged."""
LEAST_PATCH = 0.04
"""Share of the judged face that a patch must have to be a cover; what is smaller is a shadow, a fold, a highlight."""
STAY_FRAMES = 2
"""Frames before and after, most of which must show a patch too."""

LEFT_EYE = (249, 263, 362, 373, 374, 380, 381, 382, 384, 385, 386, 387, 388, 390, 398, 466)
RIGHT_EYE = (7, 33, 133, 144, 145, 153, 154, 155, 157, 158, 159, 160, 161, 163, 173, 246)


@dataclass(frozen=True)
class FlatFace:
    """A layout of the face: which landmarks, in which parts, make each texel that is judged."""

    corners: NDArray[np.int64]
    """[P, 3] landmarks around each texel."""
    weights: NDArray[np.float64]
    """[P, 3] barycentric weights."""
    texels: NDArray[np.int64]
    """[P] place of each texel in the flattened grid."""
    triangle: NDArray[np.int64]
    """[P] triangle of each texel."""
    triangles: NDArray[np.int64]
    """[F, 3] landmarks of the triangles."""
    areas: NDArray[np.float64]
    """[F] their signed areas in the layout."""
    points: NDArray[np.float64]
    """[478, 2] the landmarks in the layout, in texels."""
    judged: NDArray[np.bool_]
    """[478] landmarks that lie among the texels."""


def flat_face(landmarks: NDArray[np.floating]) -> FlatFace:
    """Lay out the face as it is seen from the front.

    Args:
        landmarks: [478, 3] a typical face turned to the front; x right, y down.
    """
    from scipy.spatial import Delaunay

    points = landmarks[:, :2].astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - low) / (high - low) * (GRID - 1)
    mesh = Delaunay(points)
    y, x = np.mgrid[:GRID, :GRID].reshape(2, -1)
    grid = np.stack([x, y], axis=-1).astype(np.float64)
    triangle = mesh.find_simplex(grid)
    below_eyes = y > points[[*LEFT_EYE, *RIGHT_EYE], 1].max() + 1
    # The sides are where hair hangs and where a slight turn already shows what is behind.
    inner = np.abs(x - (GRID - 1) / 2) < 0.74 * (GRID - 1) / 2
    chosen = np.flatnonzero((triangle >= 0) & below_eyes & inner)
    affine = mesh.transform[triangle[chosen]]
    first_two = np.einsum("pij,pj->pi", affine[:, :2], grid[chosen] - affine[:, 2])
    weights = np.concatenate([first_two, 1 - first_two.sum(axis=1, keepdims=True)], axis=1)
    triangles = mesh.simplices.astype(np.int64)
    areas = _areas(points, triangles)
    judged = np.isin(points.round().astype(np.int64) @ [1, GRID], chosen)
    return FlatFace(triangles[triangle[chosen]], weights, chosen, triangle[chosen], triangles, areas, points, judged)


def texel_places(landmarks: NDArray[np.floating], layout: FlatFace) -> NDArray[np.float64]:
    """Where each texel [P, 2] is in a frame with these landmarks [478, 2 or 3], in pixels."""
    points = landmarks[:, :2].astype(np.float64)
    return np.asarray(np.einsum("pk,pkc->pc", layout.weights, points[layout.corners]), np.float64)


def sample_face(
    grey: NDArray[np.uint8], landmarks: NDArray[np.floating], layout: FlatFace
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Grey value of each texel [P] in a frame, and whether it is in the picture and faces the camera [P].

    Args:
        grey: the frame [H, W].
        landmarks: [478, 2 or 3] in pixels, centres at +0.5.
        layout: the flat face.
    """
    import cv2

    points = landmarks[:, :2].astype(np.float64)
    texel_px = float(np.ptp(points, axis=0).max() / GRID)
    at = texel_places(landmarks, layout)
    height, width = grey.shape
    inside = ((at >= 0) & (at < [width, height])).all(axis=1)
    size = max(1, round(texel_px))
    soft = cv2.blur(grey, (size, size)) if size > 1 else grey
    at32 = (at - 0.5).astype(np.float32)
    values = cv2.remap(soft, at32[None, :, 0], at32[None, :, 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    stretch = _areas(points, layout.triangles) / layout.areas
    stretch /= np.median(stretch)
    return values[0].astype(np.float32), inside & (stretch[layout.triangle] > MIN_STRETCH)


def shown_in(mask: NDArray[np.uint8], places: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Whether each place [N, 2] in pixels lies in the picture where the mask [H, W] is set."""
    x, y = np.nan_to_num(places, nan=-1).clip(-1, max(mask.shape)).astype(np.int64).T
    inside = (places >= 0).all(axis=1) & (x < mask.shape[1]) & (y < mask.shape[0])
    return np.asarray(inside & (mask[np.where(inside, y, 0), np.where(inside, x, 0)] > 0), np.bool_)


def departures(
    values: NDArray[np.float32],
    visible: NDArray[np.bool_],
    layout: FlatFace,
    expressions: NDArray[np.floating],
    rotations: NDArray[np.floating],
) -> NDArray[np.bool_]:
    """Texels [T, P] that look otherwise than the clip leads to expect.

    Each texel's brightness is fitted over time by pose and by the main modes of expression, with Cauchy weights and a
    small ridge; the whole frame's brightness is divided out first.

    Args:
        values: [T, P] grey values.
        visible: [T, P] whether they count.
        layout: the flat face.
        expressions: [T, E] expression scores.
        rotations: [T, 3, 3] head rotations.
    """
    import cv2

    frames = len(values)
    level = np.median(values, axis=0)
    for _ in range(2):
        ratio = np.where(visible, values / np.maximum(level, 8), np.nan)
        gain = np.array([np.nanmedian(row) if seen.any() else 1.0 for row, seen in zip(ratio, visible, strict=True)])
        even = values / np.maximum(gain, 0.05)[:, None]
        level = np.median(even, axis=0)

    modes, _, _ = np.linalg.svd(expressions - expressions.mean(axis=0), full_matrices=False)
    count = min(EXPRESSION_MODES, max(1, frames // FRAMES_PER_MODE))
    turn = np.stack([rotations[:, 0, 2], rotations[:, 1, 2], rotations[:, 0, 1]], axis=1)
    turn = (turn - turn.mean(axis=0)) / (turn.std(axis=0) + 0.05)
    predictors = np.concatenate([np.ones((frames, 1)), modes[:, :count] * np.sqrt(frames), turn], axis=1)
    ridge = np.diag([1e-6, *[RIDGE * frames] * (predictors.shape[1] - 1)])
    target = even - level
    # The weights start from the clip's usual look, so that a cover does not get to explain itself by its own frames.
    weights = visible / (1 + (target / CAUCHY_SCALE) ** 2)
    rest = target
    for _ in range(5):
        normal = np.einsum("tp,ti,tj->pij", weights, predictors, predictors, optimize=True) + ridge
        right = np.einsum("tp,ti->pi", weights * target, predictors)
        rest = target - predictors @ np.linalg.solve(normal, right[..., None])[..., 0].T
        weights = visible / (1 + (rest / CAUCHY_SCALE) ** 2)

    departure = np.zeros_like(rest)
    for frame in range(frames):
        grids = np.zeros((2, GRID * GRID))
        grids[:, layout.texels] = np.abs(rest[frame]) * visible[frame], visible[frame]
        total, seen = (cv2.blur(grid.reshape(GRID, GRID), (5, 5)).ravel()[layout.texels] for grid in grids)
        departure[frame] = total / np.maximum(seen, 0.2)
    limit = np.maximum(EXPECTED_DEPARTURE, 3 * np.median(departure, axis=0))
    return np.asarray((departure > limit) & visible, np.bool_)


def covered_share(departing: NDArray[np.bool_], visible: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of the face below the eyes that looks otherwise than expected, 0 to 1, a number a frame [T].

    Args:
        departing: [T, P] from `departures`.
        visible: [T, P] texels that count.
    """
    counted = np.maximum(visible.sum(axis=1), visible.shape[1] / 2)
    return np.asarray(departing.sum(axis=1) / counted, np.float64)


def covered_landmarks(departing: NDArray[np.bool_], layout: FlatFace) -> NDArray[np.bool_]:
    """Landmarks [T, 478] that something lies over: those on patches of departing texels that are large and stay.

    Landmarks that are not judged, above the eyes and at the sides, are never among them.

    Args:
        departing: [T, P] from `departures`, of successive frames.
        layout: the flat face.
    """
    import cv2

    frames = len(departing)
    covered = np.zeros((frames, len(layout.points)), bool)
    x, y = layout.points.round().astype(np.int64).T
    least = LEAST_PATCH * len(layout.texels)
    for frame in np.flatnonzero(departing.sum(axis=1) >= least):
        near = departing[max(0, frame - STAY_FRAMES) : frame + STAY_FRAMES + 1]
        grid = np.zeros(GRID * GRID, np.uint8)
        grid[layout.texels] = near.mean(axis=0) > 0.5
        solid = cv2.morphologyEx(grid.reshape(GRID, GRID), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        _, labels, stats, _ = cv2.connectedComponentsWithStats(solid, connectivity=8)
        large = np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= least) + 1
        covered[frame] = np.isin(labels, large)[y, x] & layout.judged
    return covered


def _areas(points: NDArray[np.float64], triangles: NDArray[np.int64]) -> NDArray[np.float64]:
    """Signed areas [F] of triangles [F, 3] over points [L, 2], times two."""
    a, b, c = (points[triangles[:, k]] for k in range(3))
    ab, ac = b - a, c - a
    return np.asarray(ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0])
