"""Where a camera goes while it films an avatar: round the head by rules, or through the keyframes of a file.

Angles are degrees from the view at rest, as `Avatar.camera` takes them: yaw towards the subject's left, pitch upwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.geometry import make_rigid, matrix_to_rotvec, rotvec_to_matrix
from pipeline.keyframes import MAX_KEYFRAMES, KeyframeFile, Strict, Time, between, check_times
from pipeline.viewpoint import Camera

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MAX_YAW, MAX_PITCH = 3600.0, 85.0
"""Degrees; straight above a head there is no level."""
MIN_ZOOM, MAX_ZOOM = 0.1, 4.0
RIGID_TOLERANCE = 1e-3

CameraPath = Callable[[float, float], Camera]
"""The camera at a moment, given in seconds from the start and as a share of the whole in [0, 1)."""
Viewpoint = Callable[[float, float, float], Camera]
"""The camera at yaw and pitch in degrees, and a zoom."""


def sway(look: Viewpoint, yaw: float, pitch: float, zoom: float = 1.0) -> CameraPath:
    """Once to both sides, up and down in a lying eight, from the middle back to it, so that it can be repeated."""

    def at(seconds: float, share: float) -> Camera:
        return look(yaw * np.sin(2 * np.pi * share), pitch * np.sin(4 * np.pi * share), zoom)

    return at


def turntable(look: Viewpoint, arc: float = 360.0, pitch: float = 0.0, zoom: float = 1.0) -> CameraPath:
    """All round at an even pace; or over an arc, from the subject's right to the left and back. It can be repeated."""

    def at(seconds: float, share: float) -> Camera:
        yaw = arc * share if abs(arc) >= 360 else -arc / 2 * np.cos(2 * np.pi * share)
        return look(yaw, pitch, zoom)

    return at


def still(camera: Camera) -> CameraPath:
    """A camera that stays."""
    return lambda seconds, share: camera


Row3 = Annotated[list[float], Field(min_length=3, max_length=3)]
Row4 = Annotated[list[float], Field(min_length=4, max_length=4)]
Pixels = Annotated[int, Field(ge=1, le=65536)]


class PlaceKey(Strict):
    """A place about the head."""

    time: Time
    yaw: float = Field(0.0, ge=-MAX_YAW, le=MAX_YAW)
    pitch: float = Field(0.0, ge=-MAX_PITCH, le=MAX_PITCH)
    zoom: float = Field(1.0, ge=MIN_ZOOM, le=MAX_ZOOM)


class CameraKey(Strict):
    """A camera of its own."""

    time: Time
    K: Annotated[list[Row3], Field(min_length=3, max_length=3)]
    T_cam_world: Annotated[list[Row4], Field(min_length=4, max_length=4)]

    @model_validator(mode="after")
    def _is_a_camera(self) -> CameraKey:
        K, T_cam_world = np.array(self.K), np.array(self.T_cam_world)
        R = T_cam_world[:3, :3]
        if (K[np.tril_indices(3, -1)] != 0).any() or K[0, 1] != 0 or K[2, 2] != 1 or min(K[0, 0], K[1, 1]) <= 0:
            raise ValueError("K is not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with fx and fy above 0")
        skewed = np.abs(R @ R.T - np.eye(3)).max() > RIGID_TOLERANCE or np.linalg.det(R) < 0
        if skewed or (T_cam_world[3] != [0, 0, 0, 1]).any():
            raise ValueError("T_cam_world is not rigid: a rotation, a translation, and a last row of 0 0 0 1")
        return self

    def camera(self, size: tuple[int, int]) -> Camera:
        """The camera whose pictures have this width and height."""
        return Camera(np.array(self.K), *size, np.array(self.T_cam_world))


def _kind(key: Any) -> str:
    given = key if isinstance(key, dict) else {"K": None} if isinstance(key, CameraKey) else {}
    return "camera" if {"K", "T_cam_world"} & set(given) else "place"


class PathFile(KeyframeFile):
    """A path of cameras (docs/render.md)."""

    size: Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None = None
    """Width and height of the pictures that the K are for."""
    keyframes: list[
        Annotated[Annotated[PlaceKey, Tag("place")] | Annotated[CameraKey, Tag("camera")], Discriminator(_kind)]
    ] = Field(min_length=1, max_length=MAX_KEYFRAMES)

    @model_validator(mode="after")
    def _belongs_together(self) -> PathFile:
        check_times([key.time for key in self.keyframes])
        if len({type(key) for key in self.keyframes}) > 1:
            raise ValueError("give all keyframes yaw, pitch and zoom, or all of them K and T_cam_world")
        if isinstance(self.keyframes[0], CameraKey) and self.size is None:
            raise ValueError("'size' is missing, the [width, height] that the K are for")
        return self

    @property
    def seconds(self) -> float:
        """When the last keyframe comes."""
        return self.keyframes[-1].time

    def path(self, look: Viewpoint, width: int, height: int) -> CameraPath:
        """The way through the keyframes; after the last one the camera stays.

        Args:
            look: for keyframes that are places about the head.
            width, height: of the picture.
        """

        def at(seconds: float, share: float) -> Camera:
            before, after, way = between([key.time for key in self.keyframes], seconds)
            way = self.share(way)
            first, second = self.keyframes[before], self.keyframes[after]
            if isinstance(first, PlaceKey) and isinstance(second, PlaceKey):
                yaw, pitch = (
                    (1 - way) * a + way * b for a, b in ((first.yaw, second.yaw), (first.pitch, second.pitch))
                )
                # From 1 to 4 times as near, the middle of the way is twice.
                return look(yaw, pitch, first.zoom ** (1 - way) * second.zoom**way)
            assert isinstance(first, CameraKey) and isinstance(second, CameraKey) and self.size
            size = self.size[0], self.size[1]
            return blend(first.camera(size), second.camera(size), way).resized(width, height)

        return at


def blend(first: Camera, second: Camera, share: float) -> Camera:
    """A camera on the way between two: turned about one axis (slerp), its middle on the straight line."""
    R0, R1 = first.T_cam_world[:3, :3], second.T_cam_world[:3, :3]
    R = R0 @ rotvec_to_matrix(share * matrix_to_rotvec(R0.T @ R1))
    start, end = (np.linalg.inv(camera.T_cam_world)[:3, 3] for camera in (first, second))
    middle = (1 - share) * start + share * end
    K = (1 - share) * first.K + share * second.K
    return Camera(K, first.width, first.height, make_rigid(R, -R @ middle))
