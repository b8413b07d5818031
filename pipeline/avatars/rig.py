"""The part of a fitted head that Gaussians hang on, and an avatar whose Gaussians ride and are skinned on it.

A Gaussian is bound to a triangle of the fitted head, follows the expression shapes of that triangle (interpolated,
fixed), and is skinned to five joints: head, torso, both eyes and skull. The shares of head, torso and skull are
learned.
"""

from __future__ import annotations

import math
from abc import ABC
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.avatars import AvatarModel, Condition, TrainingData
from pipeline.geometry import (
    invert_rigid,
    make_rigid,
    matrix_to_quaternion,
    matrix_to_rotvec,
    quaternion_multiply,
    rotvec_to_matrix,
)
from pipeline.torso import Torso, TorsoPredictor

if TYPE_CHECKING:
    from pipeline.avatars.seeding import Start

# Conditions beyond this many standard deviations of the training clip are held there: what was never seen must not
# steer a network.
FEATURE_LIMIT = 3.0
# A feature that hardly moves in the clip is not blown up: spread below which it counts as constant.
FEATURE_FLOOR = 0.05
# Gaussians times expressions that a rig may have: their displacements are some two gigabytes while they are computed.
MOST_FOLLOWING = 50_000_000
# Metres that a torso mode which hardly shows in the clip counts for.
_SHAPE_FLOOR_M = 1e-4
# A logit that leaves nothing.
_NONE = -20.0
# Growth of log-scales that an expression at 1 may give, and the area in square metres that a triangle has at least.
_MAX_GROWTH, _LEAST_AREA = 1.0, 1e-8


class Prepared(NamedTuple):
    """Conditions as the model uses them."""

    expression: Tensor
    """[T,E]."""
    features: Tensor
    """[T,D] input of the network."""
    rotations: Tensor
    """[T,5,3,3] of the joints."""
    translations: Tensor
    """[T,5,3]."""
    quats: Tensor
    """[T,5,4] the same rotations as quaternions, all on the head's side of the sphere."""
    torso_shape: Tensor
    """[T,M] in the training clip's standard deviations."""


class Rig(NamedTuple):
    """The part of the fitted head that N Gaussians hang on (U vertices)."""

    vertices: Tensor
    """[U,3] neutral, metres."""
    expression: Tensor
    """[E,U,3]."""
    corners: Tensor
    """[N,3] int32 vertices of each Gaussian's triangle."""
    bary: Tensor
    """[N,3]."""
    follow: Tensor
    """[N] how far a Gaussian follows its triangle's expression: 1 on the surface, falling to 0 away from it."""
    eyes: Tensor
    """[N,2] skinning weights of the left and right eye."""
    eye_centres: Tensor
    """[2,3]."""


EXACT = frozenset(
    {"means", "feature_mean", "feature_scale", "shape_scale", "neutral_T_cam_head", "neutral_T_cam_torso"}
    | {f"predictor_{name}" for name in TorsoPredictor._fields}
)
"""Weights that half precision would cost a tenth of a millimetre."""


class Posed(NamedTuple):
    """Where N Gaussians stand in the camera's coordinates."""

    means: Tensor
    """[N,3]."""
    quats: Tensor
    """[N,4] wxyz, of any norm."""


class RigAvatar(AvatarModel, ABC):
    """What avatars on the rig share: it, the Gaussians' rest state, and how a condition moves them."""

    exact: ClassVar[frozenset[str]] = EXACT

    rig_eyes: Tensor
    rig_eye_centres: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    shape_scale: Tensor
    neutral_T_cam_head: Tensor
    neutral_T_cam_torso: Tensor
    neutral_eyes: Tensor
    follow: Tensor

    def __init__(self, rig: Rig, features: int, shape: int, head: str, expression_names: tuple[str, ...]) -> None:
        super().__init__()
        _refuse_misfit(rig, len(expression_names))
        self.head, self.expression_names = head, expression_names
        for name, value in rig._asdict().items():
            self.register_buffer(f"rig_{name}", value)
        n = len(rig.corners)
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_scale", torch.ones(features))
        self.register_buffer("shape_scale", torch.ones(shape))
        self.register_buffer("neutral_T_cam_head", torch.eye(4))
        self.register_buffer("neutral_T_cam_torso", torch.eye(4))
        self.register_buffer("neutral_eyes", torch.zeros(2, 3))
        predictor = TorsoPredictor(np.eye(4), np.eye(4), np.zeros(shape), np.zeros((6, 6 + shape)))
        for name, array in predictor._asdict().items():
            self.register_buffer(f"predictor_{name}", torch.from_numpy(array).float())
        self.register_buffer("follow", _following(rig), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module._bind())
        self.means = nn.Parameter(torch.zeros(n, 3))
        self.quats = nn.Parameter(torch.tensor([1.0, 0, 0, 0]).repeat(n, 1))
        self.log_scales = nn.Parameter(torch.zeros(n, 3))
        self.opacity_logits = nn.Parameter(torch.zeros(n))
        self.colors = nn.Parameter(torch.zeros(n, 3))
        self.torso_logits = nn.Parameter(torch.zeros(n))
        self.skull_logits = nn.Parameter(torch.zeros(n))

    @property
    def count(self) -> int:
        """Number of Gaussians N."""
        return len(self.means)

    @property
    def neutral(self) -> Condition:
        """The condition of rest in the training clip's typical pose."""
        expression = torch.zeros(len(self.expression_names), device=self.means.device)
        head, torso = self.neutral_T_cam_head, self.neutral_T_cam_torso
        neck = matrix_to_rotvec(torso[:3, :3].T @ head[:3, :3])
        return Condition(expression, head, torso, neck, self.neutral_eyes, torch.zeros_like(self.shape_scale), head)

    def row_axes(self) -> dict[str, int]:
        """See `AvatarModel.row_axes`."""
        rows = ("means", "quats", "log_scales", "opacity_logits", "colors", "torso_logits", "skull_logits")
        bound = ("rig_corners", "rig_bary", "rig_follow", "rig_eyes")
        return dict.fromkeys((*rows, *bound), 0)

    def take_rows(self, index: Tensor) -> None:
        """See `AvatarModel.take_rows`."""
        super().take_rows(index)
        self._bind()

    def _bind(self) -> None:
        self.follow = _following(Rig(*(getattr(self, f"rig_{name}") for name in Rig._fields)))

    def with_predicted_torso(self, conditions: Condition) -> Condition:
        """See the function of this name."""
        return with_predicted_torso(self, conditions)

    def prepare(self, conditions: Condition) -> Prepared:
        """See `Prepared`."""
        transforms = joint_transforms(conditions, self.rig_eye_centres)
        quats = matrix_to_quaternion(transforms[..., :3, :3])
        same_side = (quats * quats[:, :1]).sum(-1, keepdim=True) < 0
        features = (features_of(conditions) - self.feature_mean) / self.feature_scale
        return Prepared(
            conditions.expression,
            features.clamp(-FEATURE_LIMIT, FEATURE_LIMIT),
            transforms[..., :3, :3],
            transforms[..., :3, 3],
            torch.where(same_side, -quats, quats),
            (conditions.torso_shape / self.shape_scale).clamp(-FEATURE_LIMIT, FEATURE_LIMIT),
        )

    def ridden(self, prepared: Prepared) -> Tensor:
        """[N,7] displacement, rotation vector and growth (of log-scales) that each Gaussian's triangle gives it."""
        return (prepared.expression @ self.follow.flatten(1)).view(-1, 7)

    def joint_weights(self) -> Tensor:
        """Skinning weights [N,5] over head, torso, left and right eye, skull."""
        torso, skull = torch.sigmoid(self.torso_logits), torch.sigmoid(self.skull_logits)
        body = 1 - self.rig_eyes.sum(1)
        head = body * (1 - torso)
        own = torch.stack([head * (1 - skull), body * torso], 1)
        return torch.cat([own, self.rig_eyes, (head * skull)[:, None]], 1)

    @staticmethod
    def skin(
        rest: Tensor, quats: Tensor, joints: Tensor, rotations: Tensor, translations: Tensor, turns: Tensor
    ) -> Posed:
        """Linear blend skinning of rest means [N,3] and rotations [N,4], the rotations by blended quaternions.

        Args:
            rest, quats: in rest coordinates.
            joints: [N,5] weights.
            rotations, translations, turns: [5,3,3], [5,3] and [5,4] of the joints, the quaternions on one side of the
                sphere.
        """
        posed = (rest @ rotations.permute(2, 0, 1).reshape(3, -1)).view(len(rest), -1, 3) + translations
        return Posed((joints[:, :, None] * posed).sum(1), quaternion_multiply(joints @ turns, quats))

    def compact_weights(self) -> dict[str, Tensor]:
        """The weights as saved: half precision except where half would cost a tenth of a millimetre."""
        return {
            name: value.half() if value.is_floating_point() and name not in self.exact else value
            for name, value in self.state_dict().items()
        }

    @torch.no_grad()
    def adopt(self, data: TrainingData, begin: Start, opacity: float, flat: tuple[float, float, float]) -> None:
        """Take what the training conditions say (spread of features, typical pose, how the torso follows) and a start.

        Args:
            data: the training frames.
            begin: where Gaussians start.
            opacity: how opaque.
            flat: their scales along the axes, as shares of their sizes.
        """
        features, shape = features_of(data.conditions), data.conditions.torso_shape
        middle = most_typical(features)
        self.feature_mean.copy_(features.mean(0))
        self.feature_scale.copy_(features.std(0, correction=0) + FEATURE_FLOOR)
        followed = Torso(data.conditions.T_cam_torso.double().numpy(), shape.double().numpy(), np.ones(len(data)))
        predictor = TorsoPredictor.fit(data.conditions.T_cam_head.double().numpy(), followed)
        for name, array in predictor._asdict().items():
            getattr(self, f"predictor_{name}").copy_(torch.from_numpy(array))
        self.shape_scale.copy_(shape.square().mean(0).sqrt() + _SHAPE_FLOOR_M)
        self.neutral_T_cam_head.copy_(data.conditions.T_cam_head[middle])
        self.neutral_T_cam_torso.copy_(data.conditions.T_cam_torso[middle])
        self.neutral_eyes.copy_(data.conditions.eyes.mean(0))
        self.means.copy_(begin.means)
        self.quats.copy_(begin.quats)
        self.log_scales.copy_(torch.log(begin.sizes[:, None] * torch.tensor(flat)))
        self.opacity_logits.fill_(math.log(opacity / (1 - opacity)))
        self.colors.copy_(begin.colors)
        self.torso_logits.copy_(torch.logit(begin.torso).clamp(min=_NONE))
        self.skull_logits.copy_(torch.logit(begin.skull).clamp(min=_NONE))


def unpacked(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Rig]:
    """Saved weights of any precision in single precision, and the rig that is among them."""
    full = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    return full, Rig(*(full[f"rig_{name}"] for name in Rig._fields))


def joint_transforms(conditions: Condition, eye_centres: Tensor) -> Tensor:
    """Ts_cam_joint [T,5,4,4] of head, torso, left and right eye, skull; all take rest coordinates of the head frame."""
    rotations = rotvec_to_matrix(conditions.eyes)
    about_centres = eye_centres - (rotations @ eye_centres[..., None]).squeeze(-1)
    eyes = conditions.T_cam_head[:, None] @ make_rigid(rotations, about_centres)
    head, torso, skull = (conditions.T_cam_head, conditions.T_cam_torso, conditions.T_cam_skull)
    return torch.cat([head[:, None], torso[:, None], eyes, skull[:, None]], 1)


def with_predicted_torso(avatar: AvatarModel, conditions: Condition) -> Condition:
    """T conditions of a driver without a torso, with one that moves with the head as it did in training.

    Args:
        avatar: one with the fields of `TorsoPredictor` as buffers, `predictor_...`.
        conditions: what drives it; what they say of the torso is not read.
    """
    fields = (getattr(avatar, f"predictor_{name}").double().cpu().numpy() for name in TorsoPredictor._fields)
    head = conditions.T_cam_head
    poses, shape = (
        torch.as_tensor(array, dtype=head.dtype, device=head.device)
        for array in TorsoPredictor(*fields).predict(head.double().cpu().numpy())
    )
    neck = matrix_to_rotvec(poses[:, :3, :3].transpose(-1, -2) @ head[:, :3, :3])
    return conditions._replace(T_cam_torso=poses, neck=neck, torso_shape=shape)


def features_of(conditions: Condition) -> Tensor:
    """[T,D] numbers that vary smoothly with a condition: expression, head pose, torso in the head, gaze."""
    T_head_torso = invert_rigid(conditions.T_cam_head) @ conditions.T_cam_torso
    return torch.cat(
        [
            conditions.expression,
            conditions.T_cam_head[:, :3].flatten(1),
            T_head_torso[:, :3].flatten(1),
            conditions.eyes.flatten(1),
        ],
        1,
    )


def most_typical(features: Tensor) -> int:
    scaled = (features - features.mean(0)) / (features.std(0, correction=0) + FEATURE_FLOOR)
    return int(scaled.square().sum(1).argmin())


def _refuse_misfit(rig: Rig, expressions: int) -> None:
    """Refuse a rig whose parts do not fit each other, or that takes memory out of all proportion.

    Raises:
        ValueError: what is wrong with it.
    """
    u, n = len(rig.vertices), len(rig.corners)
    shapes = ((u, 3), (expressions, u, 3), (n, 3), (n, 3), (n,), (n, 2), (2, 3))
    for name, value, shape in zip(Rig._fields, rig, shapes, strict=True):
        if value.shape != shape:
            raise ValueError(f"rig_{name} has shape {tuple(value.shape)}, not {shape}")
    if rig.corners.dtype != torch.int32 or not ((rig.corners >= 0) & (rig.corners < u)).all():
        raise ValueError(f"rig_corners are not numbers of the {u} vertices")
    if expressions * n > MOST_FOLLOWING:
        raise ValueError(f"{n} Gaussians that follow {expressions} expressions are too many")


def _following(rig: Rig) -> Tensor:
    """[E,N,7] displacement, rotation vector and growth that each expression at 1 gives each Gaussian by its triangle.

    Growth is that of log-scales, half the logarithm of the triangle's area. Without it a lid that closes and a lip that
    stretches leave holes between their Gaussians.
    """
    corners = rig.corners.long()
    shift = torch.einsum("nc,enci->eni", rig.bary, rig.expression[:, corners])
    triangles, where = torch.unique(corners, dim=0, return_inverse=True)
    rest = rig.vertices[triangles]
    # Half of each expression keeps the rotation well below pi, where it is close to linear in the coefficient.
    bent = rest + 0.5 * rig.expression[:, triangles]
    turn = 2 * matrix_to_rotvec(_triangle_frames(bent) @ _triangle_frames(rest).transpose(-1, -2))
    growth = torch.log(_areas(bent) / _areas(rest)).clamp(-_MAX_GROWTH, _MAX_GROWTH)
    whole = torch.cat([turn, growth[..., None]], -1)
    return torch.cat([shift, whole[:, where]], -1) * rig.follow[:, None]


def _areas(corners: Tensor) -> Tensor:
    """[...] of triangles [...,3,3] in square metres; none is quite 0."""
    sides = corners[..., 1:, :] - corners[..., :1, :]
    return 0.5 * torch.linalg.cross(sides[..., 0, :], sides[..., 1, :]).norm(dim=-1) + _LEAST_AREA


def _triangle_frames(corners: Tensor) -> Tensor:
    """Rotations [...,3,3] whose columns are an edge, a perpendicular in the plane, and the normal of each triangle."""
    edge = nn.functional.normalize(corners[..., 1, :] - corners[..., 0, :], dim=-1)
    normal = nn.functional.normalize(torch.linalg.cross(edge, corners[..., 2, :] - corners[..., 0, :]), dim=-1)
    return torch.stack([edge, torch.linalg.cross(normal, edge), normal], -1)
