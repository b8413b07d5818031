"""Where the skull is, seen in the matted frames: hair, ears and forehead registered beside the fitted face.

The fitted head pose rests on landmarks of the face, and those wander with the expression: a crooked mouth turns the
fitted head by a degree or two, and with it hair and outline by pixels. What does not take part in expressions tells how
the skull really moves. Every frame's skull is registered to a template, the robust middle of all of them, at the places
where the fitted pose expects it, by a small move and turn (Gauss-Newton with the template's own
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
# Moves right, down and forward, and turns about the same axes, and what the square of each, in pixels, costs in squared
# difference: nodding and shaking look like moving, so they have to be worth it.
DEGREES = 6
STIFFNESS = np.array([1e-6, 1e-6, 1e-5, 1e-4, 1e-4, 1e-6])
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
    found, confidence = np.zeros((len(Ts_cam_head), DEGREES)), np.zeros(len(Ts_cam_head))
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
        for column in range(DEGREES):
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
    """A template of P points on the skull, and the small motions that take it to each frame."""

    def __init__(self, views: Views, reference: int, in_head: Floats, Ts_cam_head: Floats) -> None:
        self._views, self._Ts_cam_head, self._in_head = views, Ts_cam_head, in_head
        self._reach = float(np.linalg.norm(in_head - in_head.mean(0), axis=1).max())
        start, self._slopes_by = self._expect(reference)
        rows, columns = np.floor(start).astype(np.int64).T[::-1]
        self._where = rows, columns
        self._canvas = views.pictures[reference].astype(np.float32) / 255
        self._take(self._canvas[self._where])

    def _take(self, values: NDArray[np.float32]) -> None:
        """Use these colours [P,4] as the template."""
        self._canvas[self._where] = values
        self._values = values
        slopes = np.stack([np.gradient(self._canvas, axis=axis)[self._where] for axis in (1, 0)], -1)
        self._slopes = np.einsum("pci,pid->pcd", slopes, self._slopes_by).reshape(-1, DEGREES)

    def _expect(self, frame: int) -> tuple[Floats, NDArray[np.float32]]:
        """Where [P,2] the fitted head puts the points in a frame, and what [P,2,6] moves them there by a pixel or so.

        The six: moves right, down and forward of the head's middle, and turns about it; each of a size that would show
        as one pixel at the middle or at the head's border.
        """
        points, K = transform_points(self._Ts_cam_head[frame], self._in_head), self._views.Ks[frame]
        middle = points.mean(0)
        pixel = middle[2] / K[0, 0]
        motions = np.zeros((len(points), 6, 3))
        motions[:, range(3), range(3)] = pixel * np.array([1, 1, middle[2] / self._reach])
        offsets = points - middle
        for axis in range(3):
            motions[:, 3 + axis] = np.cross(np.eye(3)[axis], offsets) * pixel / self._reach
        depth = points[:, 2, None]
        focal = np.array([K[0, 0], K[1, 1]])
        places = project_points(points, K)
        # d(f X / Z) = f (dX - X / Z dZ) / Z
        rates = motions[..., :2] - (points[:, :2] / depth)[:, None] * motions[..., 2:]
        basis = focal[None, :, None] * rates.swapaxes(1, 2) / depth[..., None]
        return places, basis.astype(np.float32)

    def _sample(self, frame: int, at: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Colours [P,4] of a frame at places [P,2], and whether [P] they are in the picture."""
        import cv2

        places, views = (at - 0.5).astype(np.float32)[None], self._views
        colours = cv2.remap(views.pictures[frame], places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        there = views.inside[frame].astype(np.uint8)
        inside = cv2.remap(there, places, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT)
        return colours[0].astype(np.float32) / 255, inside.reshape(-1).astype(np.float32)

    def register(self, frame: int) -> tuple[Floats, float]:
        """Parameters [6] of a frame, and how far they can be trusted."""
        (places, basis), parameters = self._expect(frame), np.zeros(DEGREES)
        weights = np.zeros(len(self._values), np.float32)
        for _ in range(STEPS):
            colours, inside = self._sample(frame, places + basis @ parameters)
            difference = colours - self._values
            weights = inside * np.minimum(1, HUBER / np.maximum(np.linalg.norm(difference, axis=1), 1e-6))
            rows = np.repeat(weights, 4)[:, None] * self._slopes
            prior = len(weights) * STIFFNESS
            curvature = rows.T @ self._slopes + np.diag(prior)
            step = np.linalg.solve(curvature, rows.T @ difference.ravel() + prior * parameters)
            parameters = parameters - step
            if np.abs(step).max() < STEP_PX:
                break
        confidence = float(weights.mean())
        return (parameters, confidence) if confidence >= MIN_CONFIDENCE else (np.zeros(DEGREES), 0.0)

    def rebuild(self, frames: list[int], parameters: list[Floats]) -> None:
        """Take the middle of these frames, each brought back by its parameters, as the template."""
        samples = []
        for frame, found in zip(frames, parameters, strict=True):
            places, basis = self._expect(frame)
            samples.append(self._sample(frame, places + basis @ found)[0])
        self._take(np.median(samples, 0).astype(np.float32))

    def poses(self, parameters: Floats) -> Floats:
        """Ts_cam_skull [T,4,4]: the head's poses moved and turned by the parameters [T,6]."""
        middles = transform_points(self._Ts_cam_head, self._in_head.mean(0)[None])[:, 0]
        pixels = (middles[:, 2] / self._views.Ks[:, 0, 0])[:, None]
        forward = np.stack([np.ones(len(middles)), np.ones(len(middles)), middles[:, 2] / self._reach], 1)
        moves = pixels * forward * parameters[:, :3]
        turns = rotvec_to_matrix(pixels / self._reach * parameters[:, 3:])
        about_middles = middles + moves - (turns @ middles[..., None])[..., 0]
        return make_rigid(turns, about_middles) @ self._Ts_cam_head
