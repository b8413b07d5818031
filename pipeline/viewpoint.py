"""Cameras to look at a performing avatar from: the clip's own, a framed one, and those on an orbit about the head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.geometry import invert_rigid, make_rigid, rotvec_to_matrix, transform_points

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FRAMING_MARGIN = 1.08
FRAMED_SHARE = (0.5, 99.5)
"""Percentiles of the Gaussians' positions between which a picture is framed: strays do not shrink the rest."""
ROOM = 0.9
"""Zoom of a camera that goes round: room in the picture for what comes in from the sides."""
UP_HEAD = np.array([0.0, 1.0, 0.0])
HEAD_MIDDLE = (0.0, 0.04, 0.05)
"""Metres in the head's axes: between the ears and the face, above the head joint. Cameras go round it."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera in the world of a clip, whose axes are those of the clip's own camera (docs/conventions.md).

    Attributes:
        K: [3,3] intrinsics in pixels.
        width, height: of the picture.
        T_cam_world: [4,4]; the identity for the clip's own camera.
    """

    K: Floats
    width: int
    height: int
    T_cam_world: Floats

    @staticmethod
    def of_clip(K: NDArray[np.floating], width: int, height: int) -> Camera:
        """The clip's own camera."""
        return Camera(np.asarray(K, np.float64), width, height, np.eye(4))

    def resized(self, width: int, height: int) -> Camera:
        """The same view in a picture of another size: as high as the old one shows, its middle stays the middle."""
        scale = height / self.height
        K = np.diag([scale, scale, 1.0]) @ self.K
        K[0, 2] += (width - scale * self.width) / 2
        return replace(self, K=K, width=width, height=height)


def framing(points_world: NDArray[np.floating], width: int, height: int) -> Camera:
    """The clip's camera with a focal length and a principal point that fill a picture with these points [N,3].

    Only what lies before the camera is framed.
    """
    seen = points_world[points_world[:, 2] > 0].astype(np.float64)
    flat = seen[:, :2] / seen[:, 2:]
    low, high = np.percentile(flat, FRAMED_SHARE[0], axis=0), np.percentile(flat, FRAMED_SHARE[1], axis=0)
    focal = float(np.min(np.array([width, height]) / (FRAMING_MARGIN * (high - low))))
    middle = np.array([width, height]) / 2 - focal * (low + high) / 2
    return Camera.of_clip(np.array([[focal, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1]]), width, height)


def orbit(camera: Camera, pivot: Floats, up: Floats, yaw: float, pitch: float, zoom: float = 1.0) -> Camera:
    """A camera that went round a point, at the same distance from it unless zoomed.

    Args:
        camera: where it starts.
        pivot: [3] the point, in the world.
        up: [3] the axis of yaw, in the world: the head's own up (`up_of`).
        yaw: radians; positive goes towards the subject's left, where its left side is seen.
        pitch: radians; positive goes up, where it is seen from above.
        zoom: how many times nearer.
    """
    up = np.asarray(up, np.float64) / np.linalg.norm(up)
    about_up = rotvec_to_matrix(yaw * up)
    # The camera's own axis to the right after the yaw, level with respect to `up`.
    forward = about_up @ (np.asarray(pivot) - np.linalg.inv(camera.T_cam_world)[:3, 3])
    right = np.cross(forward, up)
    about_right = rotvec_to_matrix(-pitch * right / np.linalg.norm(right))
    turned = about_right @ about_up
    # The world turns the other way about the pivot.
    T_turn = make_rigid(turned.T, pivot - turned.T @ pivot)
    T_cam_world = camera.T_cam_world @ T_turn
    if zoom != 1:
        T_cam_world = T_cam_world.copy()
        T_cam_world[:3, 3] += (1 / zoom - 1) * transform_points(T_cam_world, np.asarray(pivot, np.float64)[None])[0]
    return replace(camera, T_cam_world=T_cam_world)


def up_of(T_cam_head: NDArray[np.floating]) -> Floats:
    """[3] where the top of a head with this pose points, in the world."""
    return np.asarray(T_cam_head, np.float64)[:3, :3] @ UP_HEAD


def angles_of(Ts_cam_head: NDArray[np.floating]) -> Floats:
    """[..., 2] yaw and pitch in degrees at which cameras stand about heads with these poses [..., 4, 4].

    Both are 0 straight before the face; positive towards the subject's left, and above.
    """
    Ts_head_cam = np.asarray(invert_rigid(np.asarray(Ts_cam_head, np.float64)))
    x, y, z = np.moveaxis(Ts_head_cam[..., :3, 3] - np.array(HEAD_MIDDLE), -1, 0)
    return np.degrees(np.stack([np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))], -1))
