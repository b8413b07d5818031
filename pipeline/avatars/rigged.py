"""The `rigged` avatar: Gaussians that ride on the fitted head, and a small learned basis on top.

What the mesh knows is not learned again: each Gaussian is bound to a triangle of the fitted head, follows the
expression shapes of that triangle (interpolated, fixed), and is skinned to head, torso and eyes like the head model,
except that the share of head and torso is learned. On top come K learned vectors over mean, rotation, scale, colour
and opacity, weighted by a tiny network of expression, pose and gaze: wrinkles, shading, hair, what the mesh lacks. And
a small rigid twist of the head, linear in the same features: what the fit's poses get wrong in the same way
whenever the same expression or pose comes back. The torso has none: how it moves is seen in the frames. What it bends
beside its rigid motion moves its Gaussians by a learned basis of their own, linear in the torso's shape.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.avatars import AvatarModel, Condition, Gaussians, ParameterGroup, TrainingData
from pipeline.errors import StageError
from pipeline.geometry import (
    invert_rigid,
    make_rigid,
    matrix_to_quaternion,
    matrix_to_rotvec,
    quaternion_multiply,
    rotvec_to_matrix,
    skew,
)
from pipeline.mesh_render import Raster, interpolate, rasterize_mesh
from pipeline.torso import Torso, TorsoPredictor, head_cover, torso_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.config import TrainConfig
    from pipeline.heads import HeadModel

# What one unit of a basis coefficient means: metres, radians, log-scale, colour, opacity logit. It brings the columns
# to one learning rate.
_BASIS_UNITS = (0.02,) * 3 + (0.3,) * 3 + (0.5,) * 3 + (0.5,) * 3 + (2.0,)
_MEAN, _ROTATION, _SCALE, _COLOR, _OPACITY = slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12), 12

# The same for the head's twist: radians and metres; and which joints (head, torso, eyes, skull) it turns.
_TWIST_UNITS = (0.02,) * 3 + (0.005,) * 3
_TWISTED = (1.0, 0.0, 1.0, 1.0, 0.0)

# Conditions beyond this many standard deviations of the training clip are held there: what was never seen must not
# steer the network.
_FEATURE_LIMIT = 3.0
# A feature that hardly moves in the clip is not blown up: spread below which it counts as constant.
_FEATURE_FLOOR = 0.05

# Metres that one unit of a torso mode moves a Gaussian, and that a mode which hardly shows in the clip counts for.
_BEND_UNIT = 0.005
_SHAPE_FLOOR_M = 1e-4

START_FRAMES = 12


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


class RiggedAvatar(AvatarModel):
    """See the module's text. Parameters are float32; a saved avatar holds all but the means in half precision."""

    name: ClassVar[str] = "rigged"

    rig_eyes: Tensor
    rig_eye_centres: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    shape_scale: Tensor
    neutral_T_cam_head: Tensor
    neutral_T_cam_torso: Tensor
    neutral_eyes: Tensor
    units: Tensor
    twist_units: Tensor
    follow: Tensor

    def __init__(
        self,
        rig: Rig,
        basis_size: int,
        hidden: int,
        features: int,
        shape: int,
        head: str,
        expression_names: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.head, self.expression_names = head, expression_names
        self._size = {"basis": basis_size, "hidden": hidden, "features": features, "shape": shape}
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
        self.register_buffer("units", torch.tensor(_BASIS_UNITS), persistent=False)
        self.register_buffer(
            "twist_units", torch.outer(torch.tensor(_TWISTED), torch.tensor(_TWIST_UNITS)), persistent=False
        )
        self.register_buffer("follow", _following(rig), persistent=False)
        self.means = nn.Parameter(torch.zeros(n, 3))
        self.quats = nn.Parameter(torch.tensor([1.0, 0, 0, 0]).repeat(n, 1))
        self.log_scales = nn.Parameter(torch.zeros(n, 3))
        self.opacity_logits = nn.Parameter(torch.zeros(n))
        self.colors = nn.Parameter(torch.zeros(n, 3))
        self.torso_logits = nn.Parameter(torch.zeros(n))
        self.skull_logits = nn.Parameter(torch.zeros(n))
        self.basis = nn.Parameter(torch.zeros(basis_size, n * len(_BASIS_UNITS)))
        self.torso_basis = nn.Parameter(torch.zeros(shape, n * 3))
        self.driver = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, basis_size))
        self.twist = nn.Linear(features, 6)

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

    def with_predicted_torso(self, conditions: Condition) -> Condition:
        """T conditions of a driver without a torso, with one that moves with the head as it did in training."""
        fields = (getattr(self, f"predictor_{name}").double().cpu().numpy() for name in TorsoPredictor._fields)
        head = conditions.T_cam_head
        poses, shape = (
            torch.as_tensor(array, dtype=head.dtype, device=head.device)
            for array in TorsoPredictor(*fields).predict(head.double().cpu().numpy())
        )
        neck = matrix_to_rotvec(poses[:, :3, :3].transpose(-1, -2) @ head[:, :3, :3])
        return conditions._replace(T_cam_torso=poses, neck=neck, torso_shape=shape)

    def prepare(self, conditions: Condition) -> Prepared:
        """See `Prepared`."""
        transforms = joint_transforms(conditions, self.rig_eye_centres)
        quats = matrix_to_quaternion(transforms[..., :3, :3])
        same_side = (quats * quats[:, :1]).sum(-1, keepdim=True) < 0
        features = (_features(conditions) - self.feature_mean) / self.feature_scale
        return Prepared(
            conditions.expression,
            features.clamp(-_FEATURE_LIMIT, _FEATURE_LIMIT),
            transforms[..., :3, :3],
            transforms[..., :3, 3],
            torch.where(same_side, -quats, quats),
            (conditions.torso_shape / self.shape_scale).clamp(-_FEATURE_LIMIT, _FEATURE_LIMIT),
        )

    def deform(self, prepared: Prepared) -> Gaussians:
        """The Gaussians of one prepared condition, in the camera's coordinates."""
        n = self.count
        ridden = (prepared.expression @ self.follow).view(n, 6)
        learned = (self.driver(prepared.features) @ self.basis).view(n, -1) * self.units
        joints = self.joint_weights()
        bent = (prepared.torso_shape @ self.torso_basis).view(n, 3) * (_BEND_UNIT * joints[:, 1:2])
        rest = self.means + ridden[:, :3] + learned[:, _MEAN] + bent
        turn = 0.5 * (ridden[:, 3:] + learned[:, _ROTATION])
        twists = self.twist(prepared.features) * self.twist_units
        nudge = torch.eye(3, device=rest.device) + skew(twists[:, :3])
        rotations = prepared.rotations @ nudge
        translations = prepared.translations + (prepared.rotations @ twists[:, 3:, None]).squeeze(-1)
        posed = (rest @ rotations.permute(2, 0, 1).reshape(3, 15)).view(n, 5, 3) + translations
        means = (joints[:, :, None] * posed).sum(1)
        # A small rotation vector is twice the vector part of its quaternion; the rasteriser normalises.
        small = torch.cat([torch.ones_like(turn[:, :1]), turn], 1)
        half = torch.cat([torch.ones_like(twists[:, :1]), 0.5 * twists[:, :3]], 1)
        quats = quaternion_multiply(
            joints @ quaternion_multiply(prepared.quats, half), quaternion_multiply(small, self.quats)
        )
        return Gaussians(
            means,
            quats,
            torch.exp(self.log_scales + learned[:, _SCALE]),
            torch.sigmoid(self.opacity_logits + learned[:, _OPACITY]),
            self.colors + learned[:, _COLOR],
        )

    def joint_weights(self) -> Tensor:
        """Skinning weights [N,5] over head, torso, left and right eye, skull."""
        torso, skull = torch.sigmoid(self.torso_logits), torch.sigmoid(self.skull_logits)
        body = 1 - self.rig_eyes.sum(1)
        head = body * (1 - torso)
        own = torch.stack([head * (1 - skull), body * torso], 1)
        return torch.cat([own, self.rig_eyes, (head * skull)[:, None]], 1)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Learning rates are for metres, logits and colours in [0,1]."""
        return [
            ParameterGroup("means", [self.means], 1.5e-4, 1.5e-5),
            ParameterGroup("quats", [self.quats], 4e-3, 4e-4),
            ParameterGroup("log_scales", [self.log_scales], 1e-2, 1e-3),
            ParameterGroup("opacities", [self.opacity_logits], 3e-2, 3e-3),
            ParameterGroup("colors", [self.colors], 5e-3, 5e-4),
            ParameterGroup("torso", [self.torso_logits], 2e-2, 2e-3),
            ParameterGroup("skull", [self.skull_logits], 2e-2, 2e-3),
            ParameterGroup("basis", [self.basis], 2e-3, 2e-4),
            ParameterGroup("torso_basis", [self.torso_basis], 2e-3, 2e-4),
            ParameterGroup("driver", list(self.driver.parameters()), 2e-3, 2e-4),
            ParameterGroup("twist", list(self.twist.parameters()), 1e-3, 1e-4),
        ]

    def settings(self) -> dict[str, Any]:
        """Sizes and names; everything else is a weight."""
        return {**self._size, "head": self.head, "expression_names": list(self.expression_names)}

    def compact_weights(self) -> dict[str, Tensor]:
        """The weights as saved: half precision except where half would cost a tenth of a millimetre."""
        exact = {"means", "feature_mean", "feature_scale", "shape_scale", "neutral_T_cam_head", "neutral_T_cam_torso"}
        exact |= {f"predictor_{name}" for name in TorsoPredictor._fields}
        return {
            name: value.half() if value.is_floating_point() and name not in exact else value
            for name, value in self.state_dict().items()
        }

    @classmethod
    def restore(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> RiggedAvatar:
        """An avatar from `settings` and saved weights of any precision."""
        full = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
        rig = Rig(*(full[f"rig_{name}"] for name in Rig._fields))
        names = tuple(settings["expression_names"])
        avatar = cls(
            rig, settings["basis"], settings["hidden"], settings["features"], settings["shape"], settings["head"], names
        )
        avatar.load_state_dict(full)
        return avatar

    @classmethod
    def start(cls, data: TrainingData, config: TrainConfig, rng: np.random.Generator) -> RiggedAvatar:
        """Gaussians where the frames show the subject, in the colours they show there.

        Pixels of a few frames, spread over pose and expression, are drawn at random, more of them at eyes and mouth.
        A pixel that sees the fitted head becomes a Gaussian on that spot of its surface; one that sees hair or clothes
        beside it is put at the depth of the nearest spot and hangs on that.
        """
        features, shape = _features(data.conditions), data.conditions.torso_shape
        identity = data.identity.astype(np.float64)
        neutral = data.head.template + np.einsum("s,svi->vi", identity, data.head.identity_basis)
        centres = data.head.joints + np.einsum("s,sji->ji", identity, data.head.joints_identity_basis)
        eye_centres = torch.from_numpy(centres[2:].astype(np.float32))
        candidates = spread_frames(features.numpy(), min(START_FRAMES, len(data)))
        views = [view for frame in candidates if (view := _View.of(data, frame, neutral, eye_centres)) is not None]
        if not views:
            raise StageError(
                "The fitted head lies outside the training crop in every frame looked at.",
                "look at the fit's overlay; run: headcast rerun SUBJECT --from fit",
            )
        shares = np.diff(np.linspace(0, config.gaussians, len(views) + 1).round().astype(int))
        parts = [_seeds(data, view, share, config.gaussians, rng) for view, share in zip(views, shares, strict=True)]
        seeds = _Seeds(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        corners = data.head.faces[seeds.face]
        used, compact = np.unique(corners, return_inverse=True)
        skin = np.einsum("nc,ncj->nj", seeds.bary, data.head.skin_weights[corners])
        eyes = np.where(seeds.follow[:, None] > 0.5, skin[:, 2:], 0)
        rig = Rig(
            torch.from_numpy(neutral[used].astype(np.float32)),
            torch.from_numpy(np.ascontiguousarray(data.head.expression_basis[:, used])),
            torch.from_numpy(compact.reshape(-1, 3).astype(np.int32)),
            torch.from_numpy(seeds.bary.astype(np.float32)),
            torch.from_numpy(seeds.follow.astype(np.float32)),
            torch.from_numpy(eyes.astype(np.float32)),
            eye_centres,
        )
        avatar = cls(
            rig,
            config.basis,
            config.hidden,
            features.shape[1],
            shape.shape[1],
            data.head.name,
            data.head.expression_names,
        )
        torso = np.where(seeds.torso, 1, skin[:, 1] / np.maximum(skin[:, :2].sum(1), 1e-6)).clip(0.05, 0.95)
        middle = _most_typical(features)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        with torch.no_grad():
            avatar.feature_mean.copy_(features.mean(0))
            avatar.feature_scale.copy_(features.std(0, correction=0) + _FEATURE_FLOOR)
            followed = Torso(data.conditions.T_cam_torso.double().numpy(), shape.double().numpy(), np.ones(len(data)))
            predictor = TorsoPredictor.fit(data.conditions.T_cam_head.double().numpy(), followed)
            for name, array in predictor._asdict().items():
                getattr(avatar, f"predictor_{name}").copy_(torch.from_numpy(array))
            avatar.shape_scale.copy_(shape.square().mean(0).sqrt() + _SHAPE_FLOOR_M)
            avatar.neutral_T_cam_head.copy_(data.conditions.T_cam_head[middle])
            avatar.neutral_T_cam_torso.copy_(data.conditions.T_cam_torso[middle])
            avatar.neutral_eyes.copy_(data.conditions.eyes.mean(0))
            avatar.means.copy_(torch.from_numpy(seeds.rest))
            avatar.quats.copy_(torch.from_numpy(_turn_z_to(seeds.normal)))
            flat = np.array([1, 1, 0.4], np.float32)
            avatar.log_scales.copy_(torch.from_numpy(np.log(seeds.size[:, None] * flat)))
            avatar.opacity_logits.fill_(math.log(0.7 / 0.3))
            avatar.colors.copy_(torch.from_numpy(seeds.color))
            avatar.torso_logits.copy_(torch.from_numpy(np.log(torso / (1 - torso))))
            avatar.skull_logits.copy_(torch.from_numpy(np.log(seeds.skull / (1 - seeds.skull))))
            for layer in avatar.driver:
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(0, 1 / math.sqrt(layer.in_features), generator=generator)
                    layer.bias.zero_()
            avatar.twist.weight.zero_()
            avatar.twist.bias.zero_()
        return avatar


def joint_transforms(conditions: Condition, eye_centres: Tensor) -> Tensor:
    """Ts_cam_joint [T,5,4,4] of head, torso, left and right eye, skull; all take rest coordinates of the head frame."""
    rotations = rotvec_to_matrix(conditions.eyes)
    about_centres = eye_centres - (rotations @ eye_centres[..., None]).squeeze(-1)
    eyes = conditions.T_cam_head[:, None] @ make_rigid(rotations, about_centres)
    head, torso, skull = (conditions.T_cam_head, conditions.T_cam_torso, conditions.T_cam_skull)
    return torch.cat([head[:, None], torso[:, None], eyes, skull[:, None]], 1)


def spread_frames(features: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """`count` rows of `features` [T,D] far from each other by farthest-point sampling, sorted."""
    scaled = (features - features.mean(0)) / (features.std(0) + _FEATURE_FLOOR)
    chosen = [int(np.square(scaled).sum(1).argmin())]
    distance = np.square(scaled - scaled[chosen[0]]).sum(1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.square(scaled - scaled[chosen[-1]]).sum(1))
    return np.sort(np.array(chosen))


def _features(conditions: Condition) -> Tensor:
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


def _most_typical(features: Tensor) -> int:
    scaled = (features - features.mean(0)) / (features.std(0, correction=0) + _FEATURE_FLOOR)
    return int(scaled.square().sum(1).argmin())


def _following(rig: Rig) -> Tensor:
    """[E,6N] displacement and rotation vector that each expression at 1 gives each Gaussian through its triangle."""
    corners = rig.corners.long()
    shift = torch.einsum("nc,enci->eni", rig.bary, rig.expression[:, corners])
    triangles, where = torch.unique(corners, dim=0, return_inverse=True)
    rest = _triangle_frames(rig.vertices[triangles])
    # Half of each expression keeps the rotation well below pi, where it is close to linear in the coefficient.
    bent = _triangle_frames(rig.vertices[triangles] + 0.5 * rig.expression[:, triangles])
    turn = 2 * matrix_to_rotvec(bent @ rest.transpose(-1, -2))
    return (torch.cat([shift, turn[:, where]], -1) * rig.follow[:, None]).flatten(1)


def _triangle_frames(corners: Tensor) -> Tensor:
    """Rotations [...,3,3] whose columns are an edge, a perpendicular in the plane, and the normal of each triangle."""
    edge = nn.functional.normalize(corners[..., 1, :] - corners[..., 0, :], dim=-1)
    normal = nn.functional.normalize(torch.linalg.cross(edge, corners[..., 2, :] - corners[..., 0, :]), dim=-1)
    return torch.stack([edge, torch.linalg.cross(normal, edge), normal], -1)


class _Seeds(NamedTuple):
    """Where Gaussians start, n of them."""

    face: NDArray[np.int64]
    bary: NDArray[np.float64]
    follow: NDArray[np.float64]
    rest: NDArray[np.float32]
    normal: NDArray[np.float32]
    size: NDArray[np.float32]
    color: NDArray[np.float32]
    torso: NDArray[np.bool_]
    """[n] of clothes and shoulders that the head does not hide."""
    skull: NDArray[np.float64]
    """[n] how far it is hair, ears or neck rather than face."""


class _View(NamedTuple):
    """The fitted head in one training frame."""

    frame: int
    joints: NDArray[np.float64]
    """[5,4,4] Ts_cam_joint."""
    neutral: NDArray[np.float64]
    """[V,3]."""
    expressed: NDArray[np.float64]
    """[V,3], still in the head frame."""
    raster: Raster
    cover: NDArray[np.bool_]
    """[R,R] what the head may hide of the torso."""

    @classmethod
    def of(cls, data: TrainingData, frame: int, neutral: NDArray[np.float64], eye_centres: Tensor) -> _View | None:
        """None where the crop shows nothing of the head."""
        head, size = data.head, data.images.shape[1]
        condition = Condition(*(value[frame : frame + 1].double() for value in data.conditions))
        joints = joint_transforms(condition, eye_centres.double())[0].numpy()
        expressed = neutral + np.einsum("e,evi->vi", condition.expression[0].numpy(), head.expression_basis)
        blended = np.einsum("vj,jab->vab", head.skin_weights, joints[:4])
        posed = np.einsum("vab,vb->va", blended[:, :3, :3], expressed) + blended[:, :3, 3]
        raster = rasterize_mesh(posed, head.faces, data.Ks[data.camera(frame)], size, size)
        if not (raster.face_index >= 0).any():
            return None
        cover = head_cover(posed[head.regions["head"]], data.Ks[data.camera(frame)], size, size)
        return cls(frame, joints, neutral, expressed, raster, cover)


def _seeds(data: TrainingData, view: _View, share: int, total: int, rng: np.random.Generator) -> _Seeds:
    """`share` seeds from one frame's pixels; `total` seeds over all frames decide how large each has to be."""
    head, raster, size = data.head, view.raster, data.images.shape[1]
    alpha = data.alphas[view.frame].astype(np.float64) / 255

    weight = np.where(alpha > 0.3, _importance(head, raster), 0)
    flat = weight.ravel()
    if np.count_nonzero(flat) == 0:
        flat = np.ones_like(flat)
    probability = flat / flat.sum()
    too_few = bool(np.count_nonzero(flat) < share)
    pixels = rng.choice(len(flat), share, replace=too_few, p=probability)
    rows, columns = np.divmod(pixels, size)

    seen = raster.face_index >= 0
    near_rows, near_columns, distance = _nearest_seen(seen, rows, columns)
    face = raster.face_index[near_rows, near_columns].astype(np.int64)
    bary = raster.bary[near_rows, near_columns].astype(np.float64)
    depth = raster.depth[near_rows, near_columns].astype(np.float64)
    K = data.Ks[data.camera(view.frame)]
    depth_to_metres = depth / K[0, 0]
    follow = np.exp(-np.square(distance * depth_to_metres / 0.015))

    x = (columns + 0.5 - K[0, 2]) / K[0, 0] * depth
    y = (rows + 0.5 - K[1, 2]) / K[1, 1] * depth
    corners = head.faces[face]
    skin = np.einsum("nc,nci->ni", bary, head.skin_weights[corners])
    skull = follow * np.einsum("nc,nc->n", bary, head.regions["face"][corners]) if "face" in head.regions else follow
    skull = np.clip(1 - skull, 0.05, 0.95)
    weights = np.concatenate([skin, skin[:, :1] * skull[:, None]], 1)
    weights[:, 0] *= 1 - skull
    bone = np.einsum("nj,jab->nab", weights, view.joints)
    unposed = np.linalg.solve(bone[:, :3, :3], (np.stack([x, y, depth], 1) - bone[:, :3, 3])[..., None])[..., 0]
    shift = np.einsum("nc,nci->ni", bary, (view.expressed - view.neutral)[corners])
    rest = unposed - follow[:, None] * shift

    a, b, c = (view.neutral[corners[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    towards_camera = np.broadcast_to(-view.joints[0, 2, :3], normal.shape)
    normal = np.where(distance[:, None] > 0, towards_camera, normal)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)

    spacing = 1 / np.sqrt(np.maximum(total * probability[pixels], 1e-6))
    opacity = np.maximum(alpha[rows, columns], 0.3)[:, None]
    over_white = data.images[view.frame][rows, columns] / 255
    color = np.clip((over_white - (1 - opacity)) / opacity, 0, 1)
    return _Seeds(
        face,
        bary,
        follow,
        rest.astype(np.float32),
        normal.astype(np.float32),
        (np.clip(0.6 * spacing, 0.5, 8) * depth_to_metres).astype(np.float32),
        color.astype(np.float32),
        torso_mask(alpha, view.cover, view.joints[1], K)[rows, columns],
        skull,
    )


def _importance(head: HeadModel, raster: Raster) -> NDArray[np.float64]:
    """[H,W] how densely Gaussians start: 1 beside the face, more on it, most at eyes and mouth."""
    fine = np.zeros(len(head.template), np.float32)
    for region in ("lips", "eyelids", "eyes", "teeth", "tongue", "mouth_interior"):
        if region in head.regions:
            fine[head.regions[region]] = 1
    face = head.regions["face"].astype(np.float32) if "face" in head.regions else np.ones_like(fine)
    regions = interpolate(raster, head.faces, np.stack([face, fine], 1))
    return 1.0 + regions[..., 0] + 2.0 * regions[..., 1]


def _nearest_seen(
    seen: NDArray[np.bool_], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The nearest pixel that sees the head, and its distance in pixels (0 where a pixel sees it itself)."""
    from scipy.ndimage import distance_transform_edt

    distance, nearest = distance_transform_edt(~seen, return_indices=True)
    return nearest[0][rows, columns], nearest[1][rows, columns], distance[rows, columns]


def _turn_z_to(normals: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit quaternions wxyz [N,4] of the shortest turn from the z axis to unit vectors [N,3]."""
    x, y, z = normals.T
    quats = np.stack([1 + z, -y, x, np.zeros_like(x)], 1)
    quats[z < -0.9999] = (0, 1, 0, 0)
    return (quats / np.linalg.norm(quats, axis=1, keepdims=True)).astype(np.float32)
