"""For notebooks and scripts: `load_subject`, `load_avatar`, `avatar.render(expression, pose, camera)`.

import pipeline

anna = pipeline.load_avatar("anna")
picture = anna.render({"jawOpen": 0.6, "mouthSmileLeft": 0.4}, pipeline.Pose(yaw=15))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.avatars import DESCRIPTION, AvatarModel, Condition, conditions_of, splat, trained_resolution
from pipeline.avatars import load_avatar as load_model
from pipeline.avatars.rig import with_predicted_torso
from pipeline.clip import Clip, load_clip, load_crops, split
from pipeline.dataset import Dataset, Subject, read_json
from pipeline.errors import UserError, did_you_mean
from pipeline.gaze import eyes_of
from pipeline.geometry import make_rigid, matrix_to_rotvec, rotvec_to_matrix, transform_points
from pipeline.products import Sources
from pipeline.rasterize import Render
from pipeline.run import used_settings
from pipeline.viewpoint import HEAD_MIDDLE, Camera, framing, orbit, up_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZE_PX = 512
STAGES = ("decode", "fit", "train")
WHITE = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Pose:
    """How a head is held, from its pose at rest. All zero is rest.

    Attributes:
        pitch, yaw, roll: degrees in the head's own axes: down, to the subject's left, left ear up.
        right, down, away: metres in the camera's axes.
        gaze: degrees (pitch, yaw) of both eyes in the head; None looks where the eyeLook* coefficients say.
        body_follows: whether the torso moves with the head as it did in the clip; else it stays and the neck bends.
    """

    pitch: float = 0.0
    yaw: float = 0.0
    roll: float = 0.0
    right: float = 0.0
    down: float = 0.0
    away: float = 0.0
    gaze: tuple[float, float] | None = None
    body_follows: bool = True


class Avatar:
    """An avatar that is driven by names and poses. `model` is the `AvatarModel` behind it.

    Args:
        model: ready to render.
        threads: of the rasteriser; None takes its default.
        fade: [N] factors of the Gaussians' opacities, such as `novel_views.soft_edge`; None leaves them.
    """

    def __init__(self, model: AvatarModel, threads: int | None = None, fade: torch.Tensor | None = None) -> None:
        self.model = model
        self.threads = threads
        self.fade = fade

    def __repr__(self) -> str:
        return f"Avatar({self.model.name}, {self.model.count:,} Gaussians, {len(self.expression_names)} coefficients)"

    @cached_property
    def rest(self) -> Condition:
        """The condition of rest in the training clip's typical pose."""
        return self.model.neutral

    @property
    def expression_names(self) -> tuple[str, ...]:
        """Names of the coefficients."""
        return self.model.expression_names

    def expression(self, given: Mapping[str, float] | Sequence[float] | NDArray[np.floating] | None) -> torch.Tensor:
        """[E] coefficients of what was given: by name, the others at rest; all of them in order; or None, at rest.

        Raises:
            UserError: a name is unknown, a number is none, or there are not E of them.
        """
        rest = self.rest.expression
        if given is None:
            return rest
        if isinstance(given, Mapping):
            values = rest.clone()
            for name, value in given.items():
                values[self._column(name)] = float(value)
        else:
            values = torch.as_tensor(np.asarray(given, np.float32)).to(rest.device)
        if values.shape != rest.shape or not torch.isfinite(values).all():
            wrong = "are not finite" if values.shape == rest.shape else f"have the shape {list(values.shape)}"
            raise UserError(f"The coefficients {wrong}.", f"give {len(rest)} finite numbers, or a dict by name")
        return values

    def _column(self, name: str) -> int:
        if name in self.expression_names:
            return self.expression_names.index(name)
        fix = did_you_mean(name, self.expression_names) or "see avatar.expression_names"
        raise UserError(f"The avatar has no coefficient '{name}'.", fix)

    def condition(
        self,
        expression: Mapping[str, float] | Sequence[float] | NDArray[np.floating] | None = None,
        pose: Pose | NDArray[np.floating] | None = None,
    ) -> Condition:
        """What drives the model.

        Args:
            expression: see `expression`.
            pose: from rest; or `T_cam_head` [4,4] in the clip's camera; None is rest.

        Raises:
            UserError: the expression or the pose is at fault.
        """
        rest, coefficients = self.rest, self.expression(expression)
        if expression is None and (pose is None or (isinstance(pose, Pose) and pose == Pose())):
            return rest
        posed = pose if isinstance(pose, Pose) else Pose()
        T_cam_head = self.head_of(pose)
        if posed.gaze is not None:
            pitch, yaw = np.radians(posed.gaze)
            eyes = torch.tensor([[pitch, yaw, 0.0]] * 2, dtype=coefficients.dtype, device=coefficients.device)
        elif expression is not None and _moves_eyes(expression):
            eyes = eyes_of(coefficients[None], self.expression_names)[0]
        else:
            eyes = rest.eyes
        condition = rest._replace(expression=coefficients, T_cam_head=T_cam_head, T_cam_skull=T_cam_head, eyes=eyes)
        if posed.body_follows and hasattr(self.model, "predictor_weights"):
            one = with_predicted_torso(self.model, Condition(*(value[None] for value in condition)))
            return one.frame(0)
        neck = matrix_to_rotvec(condition.T_cam_torso[:3, :3].T @ T_cam_head[:3, :3])
        return condition._replace(neck=neck)

    def head_of(self, pose: Pose | NDArray[np.floating] | None) -> torch.Tensor:
        """[4,4] T_cam_head of a pose from rest, or of itself; None is rest.

        Raises:
            UserError: the pose is none.
        """
        rest = self.rest.T_cam_head
        if pose is None:
            return rest
        if isinstance(pose, Pose):
            turn = rotvec_to_matrix(np.radians([pose.pitch, pose.yaw, pose.roll]))
            array = rest.double().cpu().numpy()
            array = make_rigid(array[:3, :3] @ turn, array[:3, 3] + [pose.right, pose.down, pose.away])
        else:
            array = np.asarray(pose, np.float64)
        if array.shape != (4, 4) or not np.isfinite(array).all():
            raise UserError("The pose is no 4x4 matrix of finite numbers.", "give T_cam_head [4,4], or pipeline.Pose")
        return torch.as_tensor(array, dtype=rest.dtype, device=rest.device)

    @cached_property
    def rest_points(self) -> NDArray[np.float64]:
        """[N,3] the Gaussians' positions at rest, in the clip's camera."""
        with torch.no_grad():
            gaussians = self.model.gaussians(self.rest)
        points = gaussians.means.double().cpu().numpy()
        if gaussians.T_cam_world is None:
            return np.asarray(points)
        return np.asarray(transform_points(gaussians.T_cam_world.double().cpu().numpy(), points))

    def camera(
        self, size: int | tuple[int, int] = SIZE_PX, yaw: float = 0.0, pitch: float = 0.0, zoom: float = 1.0
    ) -> Camera:
        """A camera that frames the avatar at rest, gone round its head.

        Args:
            size: width and height in pixels, or both.
            yaw: degrees towards the subject's left.
            pitch: degrees upwards.
            zoom: how many times nearer.
        """
        return self.viewpoints(size)(yaw, pitch, zoom)

    def viewpoints(self, size: int | tuple[int, int] = SIZE_PX) -> Callable[[float, float, float], Camera]:
        """`camera` at any yaw, pitch and zoom for pictures of one size, which are framed once."""
        width, height = (size, size) if isinstance(size, int) else size
        shown = slice(None) if self.fade is None else (self.fade > 0.5).cpu().numpy()
        start, pivot = framing(self.rest_points[shown], width, height), self.pivot
        up = up_of(self.rest.T_cam_head.double().cpu().numpy())
        return lambda yaw, pitch, zoom: orbit(start, pivot, up, np.radians(yaw), np.radians(pitch), zoom)

    @property
    def pivot(self) -> NDArray[np.float64]:
        """[3] the point that cameras go round: the middle of the head at rest, in the clip's camera."""
        T_cam_head = self.rest.T_cam_head.double().cpu().numpy()
        return np.asarray(T_cam_head[:3, 3] + T_cam_head[:3, :3] @ np.array(HEAD_MIDDLE))

    def render(
        self,
        expression: Mapping[str, float] | Sequence[float] | NDArray[np.floating] | Condition | None = None,
        pose: Pose | NDArray[np.floating] | None = None,
        camera: Camera | None = None,
        background: Sequence[float] | None = WHITE,
    ) -> NDArray[np.uint8]:
        """A picture, [H,W,3] uint8 sRGB, or [H,W,4] with straight alpha where `background` is None.

        Args:
            expression: coefficients by name or in order, None for rest; or a whole condition, such as
                `subject.condition(frame)`.
            pose: from rest, or `T_cam_head` [4,4]; None is rest.
            camera: from `avatar.camera(...)` or `subject.camera(...)`; by default one that frames the head.
            background: sRGB in [0,1]; None for a transparent one.

        Raises:
            UserError: the expression or the pose is at fault.
        """
        condition = expression if isinstance(expression, Condition) else self.condition(expression, pose)
        camera = camera or self.camera()
        device = self.rest.T_cam_head.device
        K, view = (torch.as_tensor(a, dtype=torch.float32, device=device) for a in (camera.K, camera.T_cam_world))
        behind = torch.tensor(
            [0.0] * 3 if background is None else tuple(background), dtype=torch.float32, device=device
        )
        with torch.no_grad():
            gaussians = self.model.gaussians(condition)
            if self.fade is not None:
                gaussians = gaussians._replace(opacities=gaussians.opacities * self.fade)
            shown = splat(gaussians, K, camera.width, camera.height, behind, threads=self.threads, view=view)
            return picture_of(shown, transparent=background is None)


def picture_of(shown: Render, transparent: bool = False) -> NDArray[np.uint8]:
    """A render as 8-bit sRGB [H,W,3], or, of one over nothing, [H,W,4] with straight alpha."""
    import cv2

    image = shown.image
    if transparent:
        alpha = shown.alpha.clamp(0, 1)[..., None]
        image = torch.cat([image / alpha.clamp(min=1e-6), alpha], -1)
    # Rounds and saturates in one pass, ten times as fast as tensors do.
    flat = cv2.multiply(image.cpu().numpy().reshape(len(image), -1), 255.0, dtype=cv2.CV_8U)
    return np.asarray(flat, np.uint8).reshape(image.shape)


def _moves_eyes(expression: Any) -> bool:
    if isinstance(expression, Mapping):
        return any(name.startswith("eyeLook") for name in expression)
    return True


class LoadedSubject:
    """A finished subject: its frames, what drives its avatar through them, and its figures.

    Args:
        subject: whose stages decode, fit and train are finished.
        resolution: of pictures and cameras, in pixels; None takes the one it was trained at.

    Raises:
        UserError: a stage is not finished, or its files cannot be read.
        StageError: files are damaged or do not belong together.
    """

    def __init__(self, subject: Subject, resolution: int | None = None) -> None:
        self.subject, self.sources = subject, Sources.of(subject=(subject, STAGES))
        self.clip: Clip = load_clip(subject, resolution or trained_resolution(subject.stage("train")))

    def __repr__(self) -> str:
        return f"LoadedSubject({self.name}, {len(self)} frames, {int(self.clip.usable.sum())} usable)"

    def __len__(self) -> int:
        return len(self.clip)

    @property
    def name(self) -> str:
        """Of the subject."""
        return self.subject.name

    @cached_property
    def _conditions(self) -> Condition:
        return conditions_of(self.clip)

    @cached_property
    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        settings = used_settings(self.subject)
        return split(len(self), settings["evaluate.holdout"], settings["evaluate.min_holdout_frames"])

    @property
    def train_frames(self) -> NDArray[np.int64]:
        """Numbers of the frames that the avatar was trained on, as far as they are usable."""
        return self._split[0][self.clip.usable[self._split[0]]]

    @property
    def test_frames(self) -> NDArray[np.int64]:
        """Numbers of the usable held-out frames."""
        return self._split[1][self.clip.usable[self._split[1]]]

    def condition(self, frame: int) -> Condition:
        """What drives the avatar in a frame."""
        return self._conditions.frame(self._checked(frame))

    def expression(self, frame: int) -> dict[str, float]:
        """Coefficients of a frame, by name."""
        values = self.clip.expression[self._checked(frame)].tolist()
        return dict(zip(self.clip.expression_names, values, strict=True))

    def pose(self, frame: int) -> NDArray[np.float64]:
        """`T_cam_head` [4,4]: how the head is held in a frame; `avatar.render` takes it."""
        return self.clip.Ts_cam_head[self._checked(frame)]

    @cached_property
    def fps(self) -> Fraction:
        """Frames a second of the clip; of several, the first one's.

        Raises:
            UserError: `frames.json` cannot be read.
        """
        return Fraction(read_json(self.subject.stage("decode") / "frames.json")["fps"])

    def camera(self, frame: int = 0) -> Camera:
        """The camera that took a frame, of its square training crop."""
        size = self.clip.resolution
        return Camera.of_clip(self.clip.Ks[self.clip.cameras[self._checked(frame)]], size, size)

    def picture(self, frame: int) -> NDArray[np.uint8]:
        """[R,R,3] a frame's matted crop over white: what training saw.

        Raises:
            StageError: the matte stage's files of it cannot be read.
        """
        return load_crops(self.clip, [self._checked(frame)]).images[0]

    def render(self, frame: int, avatar: Avatar | None = None) -> NDArray[np.uint8]:
        """[R,R,3] a frame as an avatar shows it, its own by default: what `picture(frame)` is to be compared with.

        It is the evaluation's render: over white, and white beyond the edge of the film as the picture is.

        Raises:
            UserError: the avatar cannot be read.
        """
        picture = (avatar or self._own_avatar).render(self.condition(frame), camera=self.camera(frame))
        inside = self._inside[self.clip.cameras[frame]][..., None]
        return np.asarray((255 + inside * (picture.astype(np.float32) - 255) + 0.5).astype(np.uint8))

    @cached_property
    def _inside(self) -> NDArray[np.float32]:
        return self.clip.inside()

    @cached_property
    def _own_avatar(self) -> Avatar:
        return self.avatar()

    @property
    def metrics(self) -> dict[str, Any]:
        """The evaluation's `metrics.json`.

        Raises:
            UserError: there is none.
        """
        return dict(read_json(self.subject.stage("evaluate") / "metrics.json"))

    def avatar(self, *, baked: bool = False, device: str = "cpu", soft_edge: bool = False) -> Avatar:
        """Its avatar.

        Args:
            baked: the baked form of it.
            device: where it shall be rendered.
            soft_edge: fade it out where the clip cut it off, as `headcast render` does, for views of one's own.

        Raises:
            UserError: it cannot be read.
        """
        folder = self.subject.stage("export") / "baked" if baked else self.subject.stage("train")
        model = load_model(folder, device)
        if not soft_edge:
            return Avatar(model)
        from pipeline.novel_views import soft_edge as fade_of

        return Avatar(model, fade=fade_of(model, self.clip))

    def _checked(self, frame: int) -> int:
        if not 0 <= frame < len(self):
            raise UserError(f"'{self.name}' has no frame {frame}.", f"choose one of 0 to {len(self) - 1}")
        return frame


def load_subject(name: str, data: str | Path = "data", resolution: int | None = None) -> LoadedSubject:
    """A finished subject of a dataset.

    Raises:
        UserError: there is no such subject, or a stage of it is not finished.
        StageError: its files are damaged.
    """
    return LoadedSubject(Dataset(Path(data)).existing(name), resolution)


def load_avatar(what: str | Path, data: str | Path = "data", device: str = "cpu") -> Avatar:
    """An avatar: of a subject by name, or of a folder that holds `avatar.json`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder = Path(what)
    if (folder / DESCRIPTION).is_file():
        return Avatar(load_model(folder, device))
    return Avatar(load_model(Dataset(Path(data)).existing(str(what)).stage("train"), device))
