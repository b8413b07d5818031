"""The picture of a scene from a camera: the avatar by our rasteriser, the fitted head's mesh, the clip's own frame."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.api import Avatar, LoadedSubject, picture_of
from pipeline.avatars import Condition, Gaussians, splat
from pipeline.clip import load_crops
from pipeline.dataset import Subject
from pipeline.errors import HeadcastError, UserError
from pipeline.geometry import project_points, transform_points
from pipeline.mesh_render import lambert, rasterize_mesh, vertex_normals
from pipeline.novel_views import HOLDS_DEG, angles_seen, soft_edge
from pipeline.products import Sources
from pipeline.viewer.scene import Opening, Scene, fitted, opening
from pipeline.viewpoint import Camera, angles_of

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
FILM_SIDE, FILM_BYTES = 512, 300_000_000
"""Pixels of the clip's frames that are shown beside, at most, and memory for those that were shown."""


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
        self._posed: tuple[Any, Condition, Gaussians | None] | None = None
        self._film: dict[int, tuple[Picture, Picture]] = {}

    @staticmethod
    def of(subject: Subject, threads: int) -> Painter:
        """For a subject, whose film is shown as fine as it was filmed.

        Raises:
            UserError: a stage is not finished, or its avatar cannot be read.
            StageError: files are damaged.
        """
        loaded = LoadedSubject(subject)
        side = max(crop[2] for crop in loaded.clip.crops)
        if min(side, FILM_SIDE) > loaded.clip.resolution:
            loaded = LoadedSubject(subject, min(side, FILM_SIDE))
        painter = Painter(loaded, threads)
        if painter.full.expression_names != loaded.clip.expression_names:
            raise UserError(
                f"The avatar of '{subject.name}' has other coefficients than its fit.",
                f"train it again: headcast rerun {subject.name} --from train",
            )
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
        avatar.fade = soft_edge(avatar.model, self.subject.clip)
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
    def opening(self) -> Opening:
        """Where a viewer's camera begins."""
        clip = self.subject.clip
        return opening(self.full, clip.Ts_cam_head[clip.usable] if clip.usable.any() else clip.Ts_cam_head)

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

    @cached_property
    def _edges(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """[n,2] the mesh's edges, each once, and [F,3] the numbers of each face's."""
        pairs = np.sort(self.head.faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), 1)
        edges, of_face = np.unique(pairs, axis=0, return_inverse=True)
        return edges, of_face.reshape(-1, 3)

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
            width, height = camera.width, camera.height
            if not scene.beside:
                return self._seen(scene, camera, width, height, transparent)
            left = max(1, width // 2)
            right = max(1, width - left)
            pair = (
                self._frame(scene, left, height, transparent),
                self._seen(scene, camera, right, height, transparent),
            )
            return np.concatenate(pair, 1)[:, :width]

    def _seen(self, scene: Scene, camera: Camera, width: int, height: int, transparent: bool) -> Picture:
        """The avatar through the camera, or through the clip's own, cut off where the clip's frames were."""
        if not scene.locked:
            return self._avatar(scene, camera.resized(width, height), transparent)
        inside = _square(width, height)
        looking = fitted(self.subject.camera(scene.frame), width, height)
        picture = _ground(scene, width, height, transparent)
        picture[inside] = self._avatar(scene, looking, transparent)[inside]
        return picture

    def _condition(self, scene: Scene) -> Condition:
        driven = (scene.frame,) if scene.drive == "clip" else (scene.expression, scene.pose)
        key = (scene.baked, scene.drive, *driven)
        if self._posed is None or self._posed[0] != key:
            self._posed = (key, scene.condition(self.subject, self.avatar(scene)), None)
        return self._posed[1]

    def _gaussians(self, scene: Scene) -> Gaussians:
        """Kept while only the camera moves."""
        condition = self._condition(scene)
        key, _, gaussians = self._posed or (None, None, None)
        if gaussians is None:
            gaussians = self.avatar(scene).model.gaussians(condition)
            self._posed = (key, condition, gaussians)
        return gaussians

    def _avatar(self, scene: Scene, camera: Camera, transparent: bool) -> Picture:
        condition = self._condition(scene)
        if scene.show == "mesh":
            picture = self._shaded(condition, camera, scene, transparent)
        else:
            gaussians, fade = self._gaussians(scene), self.avatar(scene).fade
            if fade is not None and not scene.locked:  # from elsewhere what the clip cut would look torn
                gaussians = gaussians._replace(opacities=gaussians.opacities * fade)
            if scene.show == "points":
                gaussians = _as_points(gaussians)
            K, view = (torch.as_tensor(array, dtype=torch.float32) for array in (camera.K, camera.T_cam_world))
            behind = torch.tensor([0.0] * 3 if transparent else scene.background) / 255
            shown = splat(gaussians, K, camera.width, camera.height, behind, threads=self.threads, view=view)
            picture = picture_of(shown, transparent)
        return self._overlaid(picture, scene, condition, camera)

    @cached_property
    def _angles_seen(self) -> dict[str, list[float]]:
        return angles_seen(self.subject.clip, self.subject.train_frames, self.full.model)

    def seen(self, scene: Scene, camera: Camera) -> bool:
        """Whether the clip shows the head about from where the camera does: elsewhere the avatar is a guess."""
        if scene.locked:
            return True
        with self._lock:
            T_cam_head = self._condition(scene).T_cam_head.double().cpu().numpy()
        rest = self.full.rest.T_cam_head.double().cpu().numpy()
        angles = angles_of(camera.T_cam_world @ T_cam_head) - angles_of(rest)
        ends = [self._angles_seen[name] for name in ("yaw", "pitch")]
        return all(low - HOLDS_DEG <= a <= high + HOLDS_DEG for a, (low, high) in zip(angles, ends, strict=True))

    def _mesh(self, condition: Condition) -> Floats:
        """[V,3] the fitted head's vertices, in the clip's world."""
        one = (value[None] for value in (condition.expression, condition.neck, condition.eyes))
        vertices = self.head.vertices(torch.zeros(0), *one)[0].double().numpy()
        return np.asarray(transform_points(condition.T_cam_head.double().numpy(), vertices))

    def _shaded(self, condition: Condition, camera: Camera, scene: Scene, transparent: bool) -> Picture:
        vertices, faces = transform_points(camera.T_cam_world, self._mesh(condition)), self.head.faces
        raster = rasterize_mesh(vertices, faces, camera.K, camera.width, camera.height)
        seen = np.flatnonzero(raster.face_index >= 0)
        corners = lambert(vertex_normals(vertices, faces))[faces[raster.face_index.reshape(-1)[seen]]]
        light = np.einsum("nc,nc->n", corners, raster.bary.reshape(-1, 3)[seen])
        picture = _ground(scene, camera.width, camera.height, transparent)
        clay = np.empty((len(seen), picture.shape[2]), np.uint8)
        clay[:, :3], clay[:, 3:] = np.clip(light[:, None] * CLAY, 0, 255), 255
        picture.reshape(-1, picture.shape[2])[seen] = clay
        return picture

    def _overlaid(self, picture: Picture, scene: Scene, condition: Condition, camera: Camera) -> Picture:
        """With mesh edges or landmarks drawn over it."""
        if scene.overlay == "none":
            return picture
        import cv2

        picture = np.ascontiguousarray(picture)
        vertices = transform_points(camera.T_cam_world, self._mesh(condition))
        if scene.overlay == "landmarks":
            points = self.head.landmarks(torch.from_numpy(vertices)[None])[0].numpy()
            for x, y in _sixteenths(project_points(points[points[:, 2] > 0], camera.K)):
                cv2.circle(picture, (int(x), int(y)), 20, (*LANDMARKS, 255), -1, cv2.LINE_AA, 4)
            return picture
        corners = vertices[self.head.faces]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        towards = (np.einsum("fi,fi->f", normals, corners[:, 0]) < 0) & (corners[..., 2] > 0).all(1)
        edges, of_face = self._edges
        shown = np.zeros(len(edges), bool)
        shown[of_face[towards]] = True
        lines = _sixteenths(project_points(vertices, camera.K))[edges[shown]]
        drawn = cv2.polylines(picture.copy(), list(lines), False, (*EDGES, 255), 1, cv2.LINE_AA, 4)
        return np.asarray(cv2.addWeighted(drawn, 0.45, picture, 0.55, 0), np.uint8)

    def _crop(self, frame: int) -> tuple[Picture, Picture]:
        """A frame's matted crop over white and its alpha, kept as far as memory for it goes."""
        found = self._film.pop(frame, None)
        if found is None:
            crops = load_crops(self.subject.clip, [frame])
            found = crops.images[0], crops.alphas[0]
        self._film[frame] = found
        if len(self._film) * found[0].nbytes > FILM_BYTES:
            del self._film[next(iter(self._film))]
        return found

    def _frame(self, scene: Scene, width: int, height: int, transparent: bool) -> Picture:
        """The clip's frame, matted, over the scene's background."""
        import cv2

        camera = fitted(self.subject.camera(scene.frame), width, height)
        inside, side = _square(width, height), min(width, height)
        image, alpha = (cv2.resize(a, (side, side), interpolation=cv2.INTER_AREA) for a in self._crop(scene.frame))
        # It is over white; over another colour it is what white leaves out.
        lacking = 255 - np.array([0, 0, 0] if transparent else scene.background, np.uint16)
        over = image - np.minimum(image, (255 - alpha)[..., None].astype(np.uint16) * lacking // 255).astype(np.uint8)
        if transparent:
            straight = np.minimum(255, over.astype(np.uint16) * 255 // np.maximum(alpha, 1)[..., None])
            over = np.dstack([straight.astype(np.uint8), alpha])
        picture = _ground(scene, width, height, transparent)
        picture[inside] = over
        return self._overlaid(picture, scene, self.subject.condition(scene.frame), camera)


def _square(width: int, height: int) -> tuple[slice, slice]:
    """Rows and columns of a picture that a clip's square crop takes when all of it is shown."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return slice(top, top + side), slice(left, left + side)


def _ground(scene: Scene, width: int, height: int, transparent: bool) -> Picture:
    """Nothing but the background."""
    colour = [0] * 4 if transparent else list(scene.background)
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, len(colour))).copy()


def _as_points(gaussians: Gaussians) -> Gaussians:
    """The same centres and colours as small dots."""
    shown = (gaussians.opacities > POINT_OPACITY).to(gaussians.opacities)
    return gaussians._replace(scales=torch.full_like(gaussians.scales, POINT_M), opacities=shown)


def _sixteenths(pixels: Floats) -> NDArray[np.int32]:
    """Places in sixteenths of a pixel, as OpenCV draws finely; its pixel centres are whole numbers."""
    return np.rint(16 * (pixels - 0.5)).clip(-(2**20), 2**20).astype(np.int32)


def png(picture: Picture) -> bytes:
    """A picture [H,W,3] or [H,W,4] as the bytes of a PNG."""
    import cv2

    order = cv2.COLOR_RGBA2BGRA if picture.shape[2] == 4 else cv2.COLOR_RGB2BGR
    return bytes(cv2.imencode(".png", cv2.cvtColor(picture, order))[1].tobytes())
