"""Where the skull is, seen in the matted frames: hair, ears and forehead registered beside the fitted face.

The fitted head pose rests on landmarks of the face, and those wander with the expression: a crooked mouth turns the
fitted head by a degree or two, and with it hair and outline by pixels. What does not take part in expressions tells how
the skull really moves. Every frame's skull is registered to a template, the robust middle of all of them, at the places
where the fitted pose expects it, by a small shift, turn and growth of the picture (Gauss-Newton with the template's own
slopes and Huber weights, as in `pipeline.torso`). Alpha is a channel like the colours, so the outline counts.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.frames import evenly
from pipeline.geometry import invert_rigid, make_rigid, project_points, rotvec_to_matrix, transform_points
from pipeline.mesh_render import rasterize_mesh

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.torso import Views

    Floats = NDArray[np.float64]

# MediaPipe's landmarks at the middle of the brows, and before the ears.
BROWS, EARS = (105, 334), (234, 454)
FACE = 468
# How far the template reaches beyond the fitted head (hair), below the ears, and beyond the outline: shares of the
# head's height.
HAIR_REACH, BELOW_EARS, RIM = 0.28, 0.1, 0.03
# Points of the template at most, and frames that it is made from.
POINTS, TEMPLATE_FRAMES = 3000, 64
HUBER = 0.06
STEPS, STEP_PX = 10, 0.01
STIFFNESS = 1e-6
# Mean weight of the points from which a frame's skull is believed.
MIN_CONFIDENCE = 0.6
LEAST_POINTS = 200


class Skull(NamedTuple):
    """The skull's motion over T frames."""

    poses: Floats
    """[T,4,4] Ts_cam_skull, in the head's own frame: equal to Ts_cam_head where face and skull agree."""
    confidence: Floats
    """[T] in [0,1]; 0 where the frame does not tell and the head's pose, or its neighbours' departure, stands in."""


def follow_skull(
    views: Views,
    Ts_cam_head: Floats,
    reference: int,
    vertices_cam: NDArray[np.floating],
    faces: NDArray[np.int32],
    landmarks: NDArray[np.floating],
    shots: NDArray[np.int64],
    threads: int = 1,
    on_frame: Callable[[], None] = lambda: None,
) -> Skull:
    """The skull as the frames show it; the head's poses, with confidence 0, where too little of it is in sight.

    Args:
        views: the matted frames.
        Ts_cam_head: [T,4,4] the fitted head.
        reference: the frame from which the template is taken.
        vertices_cam: [V,3] the fitted head in that frame, in camera space. faces: [F,3] without the torso's.
        landmarks: [478,2] in pixels of the reference picture.
        shots: [T]; departures are carried over gaps within a shot.
        threads: frames registered at a time.
        on_frame: called once for each frame, by one thread at a time.
    """
    points = _skull_points(views, reference, vertices_cam, faces, landmarks)
    if len(points) < LEAST_POINTS:
        return Skull(Ts_cam_head, np.zeros(len(Ts_cam_head)))
    in_head = transform_points(invert_rigid(Ts_cam_head[reference]), points)
    registration = _Registration(views, reference, in_head, Ts_cam_head)
    few = evenly(len(Ts_cam_head), TEMPLATE_FRAMES)
    registration.rebuild(few, [registration.register(frame)[0] for frame in few])
    found, confidence = np.zeros((len(Ts_cam_head), 4)), np.zeros(len(Ts_cam_head))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for frame, (parameters, trust) in enumerate(pool.map(registration.register, range(len(found)))):
            found[frame], confidence[frame] = parameters, trust
            on_frame()
    seen = confidence > 0
    if not seen.any():
        return Skull(Ts_cam_head, confidence)
    # What all frames have in common is the template's own place, not motion.
    found -= np.median(found[seen], 0)
    for shot in np.unique(shots):
        rows = np.flatnonzero(shots == shot)
        known = rows[seen[rows]]
        for column in range(4):
            found[rows, column] = np.interp(rows, known, found[known, column]) if len(known) else 0.0
    return Skull(registration.poses(found), confidence)


def _skull_points(
    views: Views,
    reference: int,
    vertices_cam: NDArray[np.floating],
    faces: NDArray[np.int32],
    landmarks: NDArray[np.floating],
) -> Floats:
    """[P,3] what the reference picture shows of the skull, hair at the depth of the nearest skin, in camera space."""
    import cv2
    from scipy.ndimage import distance_transform_edt

    picture, K = views.pictures[reference], views.Ks[reference]
    size = len(picture)
    raster = rasterize_mesh(vertices_cam, faces, K, size, size)
    head = raster.face_index >= 0
    if not head.any():
        return np.zeros((0, 3))
    height = float(np.ptp(np.flatnonzero(head.any(1))))
    distance, (near_row, near_column) = distance_transform_edt(~head, return_indices=True)
    middle = landmarks[:FACE].mean(0)
    outline = cv2.convexHull((0.93 * (landmarks[:FACE] - middle) + middle).astype(np.float32))
    face = cv2.fillConvexPoly(np.zeros((size, size), np.uint8), outline.round().astype(np.int32), 1)
    face[: max(round(float(landmarks[list(BROWS), 1].min())) - 2, 0)] = 0
    rim = 2 * max(1, round(RIM * height)) + 1
    subject = cv2.dilate((picture[..., 3] > 12).astype(np.uint8), np.ones((rim, rim), np.uint8))
    region = (subject > 0) & (face == 0) & (distance < HAIR_REACH * height) & views.inside[reference]
    region[max(round(float(landmarks[list(EARS), 1].mean()) + BELOW_EARS * height), 0) :] = False
    rows, columns = np.nonzero(region)
    chosen = evenly(len(rows), POINTS) if len(rows) else []
    rows, columns = rows[chosen], columns[chosen]
    depth = raster.depth[near_row[rows, columns], near_column[rows, columns]].astype(np.float64)
    rays = np.linalg.solve(K, np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))]))
    return np.ascontiguousarray((rays * depth).T)


class _Registration:
    """A template of P points on the skull, and the similarities that take it to each frame."""

    def __init__(self, views: Views, reference: int, in_head: Floats, Ts_cam_head: Floats) -> None:
        self._views, self._Ts_cam_head = views, Ts_cam_head
        self._expected = [
            project_points(transform_points(T_cam_head, in_head), K)
            for T_cam_head, K in zip(Ts_cam_head, views.Ks, strict=True)
        ]
        start = self._expected[reference]
        self._reach = float(np.abs(start - start.mean(0)).max())
        self._where = tuple(np.floor(start).astype(np.int64).T[::-1])
        self._canvas = views.pictures[reference].astype(np.float32) / 255
        self._slopes_by = self._basis(reference)
        self._take(self._canvas[self._where])

    def _take(self, values: NDArray[np.float32]) -> None:
        """Use these colours [P,4] as the template."""
        self._canvas[self._where] = values
        self._values = values
        slopes = np.stack([np.gradient(self._canvas, axis=axis)[self._where] for axis in (1, 0)], -1)
        self._slopes = np.einsum("pci,pid->pcd", slopes, self._slopes_by).reshape(-1, 4)

    def _basis(self, frame: int) -> NDArray[np.float32]:
        """[P,2,4] displacements: shift right, shift down, turn, growth, about the middle of what is expected."""
        expected = self._expected[frame]
        x, y = ((expected - expected.mean(0)) / self._reach).T
        one, none = np.ones_like(x), np.zeros_like(x)
        return np.stack([np.stack([one, none, -y, x], 1), np.stack([none, one, x, y], 1)], 1).astype(np.float32)

    def _sample(
        self, frame: int, basis: NDArray[np.float32], parameters: Floats
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Colours [P,4] of a frame where the parameters put the template, and whether [P] it is in the picture."""
        import cv2

        at = (self._expected[frame] + basis @ parameters - 0.5).astype(np.float32)[None]
        views = self._views
        colours = cv2.remap(views.pictures[frame], at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        inside = cv2.remap(
            views.inside[frame].astype(np.uint8), at, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT
        )
        return colours[0].astype(np.float32) / 255, inside.reshape(-1).astype(np.float32)

    def register(self, frame: int) -> tuple[Floats, float]:
        """Parameters [4] of a frame, and how far they can be trusted."""
        basis, parameters = self._basis(frame), np.zeros(4)
        weights = np.zeros(len(self._values), np.float32)
        for _ in range(STEPS):
            colours, inside = self._sample(frame, basis, parameters)
            difference = colours - self._values
            weights = inside * np.minimum(1, HUBER / np.maximum(np.linalg.norm(difference, axis=1), 1e-6))
            rows = np.repeat(weights, 4)[:, None] * self._slopes
            curvature = rows.T @ self._slopes + STIFFNESS * len(weights) * np.eye(4)
            step = np.linalg.solve(curvature, rows.T @ difference.ravel())
            parameters = parameters - step
            if np.abs(step).max() < STEP_PX:
                break
        confidence = float(weights.mean())
        return (parameters, confidence) if confidence >= MIN_CONFIDENCE else (np.zeros(4), 0.0)

    def rebuild(self, frames: list[int], parameters: list[Floats]) -> None:
        """Take the middle of these frames, each brought back by its parameters, as the template."""
        samples = [
            self._sample(frame, self._basis(frame), found)[0] for frame, found in zip(frames, parameters, strict=True)
        ]
        self._take(np.median(samples, 0).astype(np.float32))

    def poses(self, parameters: Floats) -> Floats:
        """Ts_cam_skull [T,4,4]: the head's poses moved as the similarities [T,4] move its picture."""
        moved = np.empty_like(self._Ts_cam_head)
        axis = np.array([[0.0, 0.0, 1.0]])
        for frame, (T_cam_head, K, found) in enumerate(zip(self._Ts_cam_head, self._views.Ks, parameters, strict=True)):
            centre, depth = self._expected[frame].mean(0), T_cam_head[2, 3]
            turn = rotvec_to_matrix(axis * found[2] / self._reach)[0]
            before = depth * np.linalg.solve(K, [*centre, 1.0])
            after = depth / (1 + found[3] / self._reach) * np.linalg.solve(K, [*(centre + found[:2]), 1.0])
            moved[frame] = make_rigid(turn, after - turn @ before) @ T_cam_head
        return moved
