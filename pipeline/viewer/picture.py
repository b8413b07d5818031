"""The picture of a scene from a camera: the avatar by our rasteriser, the fitted head's mesh, the clip's own frame."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pipeline.api import Avatar, LoadedSubject, picture_of
from pipeline.avatars import Condition, Gaussians, splat
from pipeline.clip import load_crops
from pipeline.dataset import Subject
from pipeline.errors import HeadcastError
from pipeline.geometry import project_points, transform_points
from pipeline.mesh_render import interpolate, lambert, rasterize_mesh, vertex_normals
from pipeline.products import Sources
from pipeline.viewer.scene import Scene, fitted
from pipeline.viewpoint import Camera

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads import HeadModel

    Floats = NDArray[np.float64]
    Picture = NDArray[np.uint8]

POINT_M = 0.0006
"""Standard deviation of a Gaussian that is shown as a point; those fainter than this are not shown:"""
POINT_OPACITY = 0.1
CLAY = np.array([222, 205, 190], np.float32)
EDGES, LANDMARKS = (64, 156, 255), (255, 196, 0)
JPEG_QUALITY = 90


class _Mesh(NamedTuple):
    """The fitted head of one condition, in the clip's world."""

    vertices: Floats
    """[V,3]."""
    landmarks: Floats
    """[L,3]."""


@dataclass
class Painter:
    """Paints scenes of one subject; one picture at a time, whoever asks.

    Attributes:
        subject: whose avatar, at the resolution that its film is shown at.
        threads: of rasteriser and avatar.
    """

    subject: LoadedSubject
    threads: int

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._posed: tuple[Any, Condition, Gaussians] | None = None
        self._film: tuple[int, Picture, Picture] | None = None

    @staticmethod
    def of(subject: Subject, threads: int) -> Painter:
        """For a subject, whose film is shown as fine as it was filmed.

        Raises:
            UserError: a stage is not finished, or its avatar cannot be read.
            StageError: files are damaged.
        """
        loaded = LoadedSubject(subject)
        side = max(crop[2] for crop in loaded.clip.crops)
        if side > loaded.clip.resolution:
            loaded = LoadedSubject(subject, min(side, 1024))
        painter = Painter(loaded, threads)
        _ = painter.full
        return painter

    @cached_property
    def full(self) -> Avatar:
        """The trained avatar."""
        return self._ready(self.subject.avatar())

    @cached_property
    def baked(self) -> Avatar | HeadcastError:
        """The baked avatar, or why there is none."""
        try:
            Sources.of(subject=(self.subject.subject, ("train", "export")))
            return self._ready(self.subject.avatar(baked=True))
        except HeadcastError as error:
            return error

    def _ready(self, avatar: Avatar) -> Avatar:
        avatar.threads = avatar.model.threads = self.threads
        return avatar

    def avatar(self, scene: Scene) -> Avatar:
        """The one that a scene shows.

        Raises:
            HeadcastError: there is no baked one.
        """
        if not scene.baked:
            return self.full
        if isinstance(self.baked, HeadcastError):
            raise self.baked
        return self.baked

    @cached_property
    def head(self) -> HeadModel:
        """The head model as the fit made it this person's.

        Raises:
            HeadcastError: the head model's files are not there.
        """
        head = self.subject.clip.personal_head()
        identity = self.subject.clip.identity
        # Built in once: it does not change from frame to frame.
        return replace(
            head,
            template=head.template + np.einsum("s,svi->vi", identity, head.identity_basis),
            joints=head.joints + np.einsum("s,sji->ji", identity, head.joints_identity_basis),
            identity_basis=head.identity_basis[:0],
            joints_identity_basis=head.joints_identity_basis[:0],
        )

    def paint(self, scene: Scene, camera: Camera, transparent: bool = False) -> Picture:
        """The picture [H,W,3], or [H,W,4] with straight alpha.

        Args:
            scene: what is seen.
            camera: by whom; a locked scene takes its size alone.
            transparent: leave the background out.

        Raises:
            HeadcastError: what the scene shows cannot be had.
        """
        with self._lock, torch.no_grad():
            clip_camera = self.subject.camera(scene.frame)
            width, height = camera.width, camera.height
            if not scene.beside:
                return self._avatar(scene, fitted(clip_camera, width, height) if scene.locked else camera, transparent)
            left = max(1, width // 2)
            right = max(1, width - left)
            looking = fitted(clip_camera, right, height) if scene.locked else camera.resized(right, height)
            pair = (self._frame(scene, left, height, transparent), self._avatar(scene, looking, transparent))
            return np.concatenate(pair, 1)[:, :width]

    def _pose(self, scene: Scene) -> tuple[Condition, Gaussians]:
        key = (scene.baked, scene.drive, *((scene.frame,) if scene.drive == "clip" else (scene.expression, scene.pose)))
        if self._posed is None or self._posed[0] != key:
            avatar = self.avatar(scene)
            condition = scene.condition(self.subject, avatar)
            self._posed = (key, condition, avatar.model.gaussians(condition))
        return self._posed[1:]

    def _avatar(self, scene: Scene, camera: Camera, transparent: bool) -> Picture:
        condition, gaussians = self._pose(scene)
        if scene.show == "mesh":
            picture = self._shaded(self._mesh(condition), camera, scene, transparent)
        else:
            if scene.show == "points":
                gaussians = _as_points(gaussians)
            K, view = (torch.as_tensor(array, dtype=torch.float32) for array in (camera.K, camera.T_cam_world))
            behind = torch.tensor([0.0] * 3 if transparent else scene.background) / 255
            shown = splat(gaussians, K, camera.width, camera.height, behind.float(), threads=self.threads, view=view)
            picture = picture_of(shown, transparent)
        return self._overlaid(picture, scene, condition, camera)

    def _mesh(self, condition: Condition) -> _Mesh:
        one = (value[None] for value in (condition.expression, condition.neck, condition.eyes))
        vertices = self.head.vertices(torch.zeros(0), *one)
        T_cam_head = condition.T_cam_head.double().numpy()
        world, landmarks = (
            transform_points(T_cam_head, points[0].double().numpy())
            for points in (vertices, self.head.landmarks(vertices))
        )
        return _Mesh(world, landmarks)

    def _shaded(self, mesh: _Mesh, camera: Camera, scene: Scene, transparent: bool) -> Picture:
        vertices = transform_points(camera.T_cam_world, mesh.vertices)
        raster = rasterize_mesh(vertices, self.head.faces, camera.K, camera.width, camera.height)
        light = lambert(vertex_normals(vertices, self.head.faces))[:, None]
        seen = raster.face_index >= 0
        clay = np.clip(interpolate(raster, self.head.faces, light) * CLAY, 0, 255).astype(np.uint8)
        if transparent:
            return np.dstack([clay, np.where(seen, 255, 0).astype(np.uint8)])
        return np.where(seen[..., None], clay, np.array(scene.background, np.uint8))

    def _overlaid(self, picture: Picture, scene: Scene, condition: Condition, camera: Camera) -> Picture:
        """With mesh edges or landmarks drawn over it."""
        if scene.overlay == "none":
            return picture
        import cv2

        picture, mesh = np.ascontiguousarray(picture), self._mesh(condition)
        if scene.overlay == "landmarks":
            points = transform_points(camera.T_cam_world, mesh.landmarks)
            for x, y in _sixteenths(project_points(points[points[:, 2] > 0], camera.K)):
                cv2.circle(picture, (int(x), int(y)), 20, (*LANDMARKS, 255), -1, cv2.LINE_AA, 4)
            return picture
        vertices = transform_points(camera.T_cam_world, mesh.vertices)
        corners = vertices[self.head.faces]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        towards = (np.einsum("fi,fi->f", normals, corners[:, 0]) < 0) & (corners[..., 2] > 0).all(1)
        lines = _sixteenths(project_points(vertices, camera.K))[_edges(self.head.faces[towards])]
        drawn = cv2.polylines(picture.copy(), list(lines), False, (*EDGES, 255), 1, cv2.LINE_AA, 4)
        return np.asarray(cv2.addWeighted(drawn, 0.45, picture, 0.55, 0), np.uint8)

    def _frame(self, scene: Scene, width: int, height: int, transparent: bool) -> Picture:
        """The clip's frame, matted, over the scene's background."""
        import cv2

        camera = fitted(self.subject.camera(scene.frame), width, height)
        if self._film is None or self._film[0] != scene.frame:
            crops = load_crops(self.subject.clip, [scene.frame])
            self._film = (scene.frame, crops.images[0], crops.alphas[0])
        _, image, alpha = self._film
        share = 1 - alpha[..., None].astype(np.float32) / 255
        # It is over white; over another colour it is what white leaves out.
        over = image - share * (255 - np.array([0.0] * 3 if transparent else scene.background, np.float32))
        if transparent:
            over = np.dstack([over / np.maximum(1 - share, 1e-6), alpha])
        scale = camera.K[0, 0] / self.subject.camera(scene.frame).K[0, 0]
        side = max(1, round(scale * self.subject.clip.resolution))
        small = cv2.resize(over.clip(0, 255).astype(np.uint8), (side, side), interpolation=cv2.INTER_AREA)
        behind = [0] * 4 if transparent else scene.background
        picture = np.broadcast_to(np.array(behind, np.uint8), (height, width, len(behind))).copy()
        side_x, side_y = min(side, width), min(side, height)
        left, top = (width - side_x) // 2, (height - side_y) // 2
        picture[top : top + side_y, left : left + side_x] = small[:side_y, :side_x]
        return self._overlaid(picture, scene, self.subject.condition(scene.frame), camera)


def _as_points(gaussians: Gaussians) -> Gaussians:
    """The same centres and colours as small dots."""
    shown = (gaussians.opacities > POINT_OPACITY).to(gaussians.opacities)
    return gaussians._replace(scales=torch.full_like(gaussians.scales, POINT_M), opacities=shown)


def _edges(faces: NDArray[np.int32]) -> NDArray[np.int64]:
    """[n,2] each edge of some faces once."""
    pairs = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2).astype(np.int64), 1)
    return np.stack(np.divmod(np.unique(pairs[:, 0] << 32 | pairs[:, 1]), 1 << 32), 1)


def _sixteenths(pixels: Floats) -> NDArray[np.int32]:
    """Places in sixteenths of a pixel, as OpenCV draws finely; its pixel centres are whole numbers."""
    return np.rint(16 * (pixels - 0.5)).clip(-(2**20), 2**20).astype(np.int32)


def png(picture: Picture) -> bytes:
    """A picture [H,W,3] or [H,W,4] as the bytes of a PNG."""
    import cv2

    order = cv2.COLOR_RGBA2BGRA if picture.shape[2] == 4 else cv2.COLOR_RGB2BGR
    return bytes(cv2.imencode(".png", cv2.cvtColor(picture, order))[1].tobytes())
