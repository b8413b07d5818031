"""The `gaussianhead` avatar (arXiv 2312.01632), and `gaussianhead-plus`, the same with hash grids in place of planes.

Canonical Gaussians are moved by a field of expression and pose. Each has K rotations of its own, the learnable
derivation: its moved mean turned by them gives K doppelgangers, which read their groups of a tri-plane's features where
they project on it. From the features come opacity and, with the direction of view, spherical harmonics.

Gaussians stand in the head's coordinates. The paper hangs all of them on the head and drives the field by expression
alone; here, unless it is switched off, they ride on the rig (`pipeline.avatars.rig`), which knows torso, eyes and
skull, and the torso bends by a learned basis, linear in its shape.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import geoopt
import numpy as np
import torch
from torch import Tensor, nn

from pipeline.avatars import Gaussians, ParameterGroup, TrainingData
from pipeline.avatars.networks import Decoders, DeformationField
from pipeline.avatars.rig import EXACT, Prepared, Rig, RigAvatar, features_of, unpacked
from pipeline.avatars.seeding import Start, start_on_head
from pipeline.avatars.triplane import HashPlanes, TriPlane
from pipeline.config import GaussianHeadConfig
from pipeline.geometry import make_rigid, quaternion_multiply, quaternion_rotate

if TYPE_CHECKING:
    from pipeline.config import TrainConfig

# What one unit of the field's answer means: share of the extent, radians, log-scale.
_MEAN_UNIT, _ROTATION_UNIT, _SCALE_UNIT = 0.1, 0.3, 0.5

# Metres that one unit of a torso mode moves a Gaussian.
_BEND_UNIT = 0.005
# How opaque Gaussians start on the head, and at random as in 3DGS.
_START_OPACITY = {"head": 0.7, "random": 0.1}
# Band 0 of the spherical harmonics.
_SH_0 = 0.28209479177387814
# Metres from the surface over which a random point still follows it.
_FOLLOW_M = 0.015


class GaussianHeadAvatar(RigAvatar):
    """See the module's text. Parameters are float32; a saved avatar holds all but the means in half precision."""

    name: ClassVar[str] = "gaussianhead"
    hashed: ClassVar[bool] = False
    exact: ClassVar[frozenset[str]] = EXACT | {"centre", "radius"}

    centre: Tensor
    radius: Tensor
    reached: Tensor

    def __init__(
        self,
        rig: Rig,
        config: GaussianHeadConfig,
        features: int,
        shape: int,
        head: str,
        expression_names: tuple[str, ...],
    ) -> None:
        super().__init__(rig, features, shape, head, expression_names)
        self.config = config
        self._size = {"features": features, "shape": shape}
        n, groups = len(rig.corners), max(config.derivations, 1)
        channels = config.plane_channels
        # The ball that planes and encoding cover, and how far warm-up and harmonics have come: [degree, field on].
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("radius", torch.ones(()))
        self.register_buffer("reached", torch.zeros(2, dtype=torch.int64))
        self.torso_basis = nn.Parameter(torch.zeros(shape, n, 3))
        self.derivation: nn.Parameter | None = None
        if config.derivations:
            at_rest = torch.tensor([1.0, 0, 0, 0]).repeat(n, groups, 1)
            self.derivation = geoopt.ManifoldParameter(at_rest, manifold=geoopt.Sphere())
        self.field: DeformationField | None = None
        if config.field_layers:
            code = features + shape if config.rig else len(expression_names)
            self.field = DeformationField(config.field_layers, config.field_width, config.frequencies, code)
        self.planes: TriPlane | HashPlanes | None = None
        self.vectors: nn.Parameter | None = None
        if config.plane_size == 0:
            self.vectors = nn.Parameter(torch.zeros(n, channels))
        elif self.hashed:
            self.planes = HashPlanes(
                groups, channels // groups, config.hash_levels, config.hash_coarsest, config.hash_finest,
                config.hash_entries,
            )  # fmt: skip
        else:
            self.planes = TriPlane(groups, channels // groups, config.plane_size)
        self.decoders = Decoders(channels, config.decoder_width, config.color_width, config.sh_degree)

    def row_axes(self) -> dict[str, int]:
        """See `AvatarModel.row_axes`."""
        optional = [name for name in ("derivation", "vectors") if getattr(self, name) is not None]
        own = dict.fromkeys(optional, 0)
        return {**super().row_axes(), **own, "torso_basis": 1}

    def at_step(self, step: int, steps: int) -> None:
        """Switch the field on after the warm-up, and raise the harmonics by degrees."""
        degree = min(step // self.config.sh_every, self.config.sh_degree)
        self.reached.copy_(torch.tensor([degree, step >= self.config.warmup_steps]))

    def deform(self, prepared: Prepared) -> Gaussians:
        """The Gaussians of one prepared condition, in the head's coordinates."""
        degree, deforms = self.reached.tolist()
        ridden, joints = self.ridden(prepared), self.joint_weights()
        bent = (prepared.torso_shape @ self.torso_basis.flatten(1)).view(-1, 3) * (_BEND_UNIT * joints[:, 1:2])
        shift, turn, log_scales = ridden[:, :3] + bent, ridden[:, 3:6], self.log_scales + ridden[:, 6:]
        if self.field is not None and deforms:
            with self._lean():
                motion = self.field((self.means - self.centre) / self.radius, self.code(prepared))
            shift = shift + _MEAN_UNIT * self.radius * motion.mean
            turn = turn + _ROTATION_UNIT * motion.rotation
            log_scales = log_scales + _SCALE_UNIT * motion.scale
        rest = self.means + shift
        # The joints as the head sees them: the first is the head itself.
        R_cam_head, t_cam_head = prepared.rotations[0], prepared.translations[0]
        to_head = prepared.quats[0] * torch.tensor([1.0, -1, -1, -1], device=rest.device)
        # A small rotation vector is twice the vector part of its quaternion; the rasteriser normalises.
        small = torch.cat([torch.ones_like(turn[:, :1]), 0.5 * turn], 1)
        posed = self.skin(
            rest,
            quaternion_multiply(small, self.quats),
            joints,
            R_cam_head.T @ prepared.rotations,
            (prepared.translations - t_cam_head) @ R_cam_head,
            quaternion_multiply(to_head.expand(5, 4), prepared.quats),
        )
        camera = -t_cam_head @ R_cam_head
        directions = nn.functional.normalize(posed.means - camera, dim=1)
        features = self.features(rest)
        with self._lean():
            opacity, harmonics = self.decoders(features, directions, degree)
        base = torch.cat([(self.colors - 0.5)[:, None] / _SH_0, torch.zeros_like(harmonics[:, 1:])], 1)
        return Gaussians(
            *posed,
            torch.exp(log_scales),
            torch.sigmoid(self.opacity_logits + opacity),
            base + harmonics,
            degree,
            make_rigid(R_cam_head, t_cam_head),
        )

    def _lean(self) -> torch.autocast:
        """The networks in bfloat16 where the processor multiplies it: a quarter less time, no loss that shows."""
        on_cpu = self.means.device.type == "cpu"
        capable = on_cpu and any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
        return torch.autocast(self.means.device.type, torch.bfloat16, enabled=capable)

    def code(self, prepared: Prepared) -> Tensor:
        """[D] what drives the field: the paper's expression, or all that the rig knows."""
        if not self.config.rig:
            return prepared.expression
        return torch.cat([prepared.features, prepared.torso_shape])

    def doppelgangers(self, rest: Tensor) -> Tensor:
        """[N,K,3] moved means [N,3] under each of their K rotations, in radii about the centre."""
        place = ((rest - self.centre) / self.radius)[:, None]
        return place if self.derivation is None else quaternion_rotate(self.derivation, place)

    def features(self, rest: Tensor) -> Tensor:
        """[N,C] of moved means [N,3]: from the planes, or a learned vector each where there are none."""
        if self.planes is not None:
            return self.planes(self.doppelgangers(rest))
        assert self.vectors is not None
        return self.vectors

    def parameter_groups(self) -> list[ParameterGroup]:
        """The paper's rates; that of the means is a share of the extent."""
        config = self.config
        extent = float(self.radius)

        def group(name: str, parameters: list[nn.Parameter], rate: float, sphere: bool = False) -> ParameterGroup:
            return ParameterGroup(name, parameters, rate, rate * config.final_share, sphere)

        decoders = self.decoders
        groups = [
            ParameterGroup("means", [self.means], config.mean_rate * extent, config.mean_final_rate * extent),
            group("quats", [self.quats], config.rotation_rate),
            group("log_scales", [self.log_scales], config.scale_rate),
            group("opacities", [self.opacity_logits], config.opacity_rate),
            group("geometry", list(decoders.geometry.parameters()), config.geometry_rate),
            group("color", [*decoders.color.parameters(), *decoders.base.parameters()], config.sh_rate),
            group("sh_rest", list(decoders.rest.parameters()), config.sh_rate / config.sh_rest_divisor),
        ]
        if config.color_rate:
            groups.append(group("colors", [self.colors], config.color_rate))
        if config.rig:
            groups.append(group("joints", [self.torso_logits, self.skull_logits], config.joint_rate))
            groups.append(group("torso_basis", [self.torso_basis], config.bend_rate))
        if self.derivation is not None:
            groups.append(group("derivation", [self.derivation], config.derivation_rate, sphere=True))
        if self.field is not None:
            groups.append(group("field", list(self.field.parameters()), config.field_rate))
        if self.planes is not None:
            groups.append(group("planes", list(self.planes.parameters()), config.plane_rate))
        if self.vectors is not None:
            groups.append(group("vectors", [self.vectors], config.plane_rate))
        return groups

    def settings(self) -> dict[str, Any]:
        """Sizes, names and the section of the settings; everything else is a weight."""
        return {
            **self._size,
            "gaussianhead": self.config.model_dump(),
            "head": self.head,
            "expression_names": list(self.expression_names),
        }

    @classmethod
    def restore(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> GaussianHeadAvatar:
        """An avatar from `settings` and saved weights of any precision."""
        full, rig = unpacked(weights)
        config = GaussianHeadConfig.model_validate(settings["gaussianhead"])
        names = tuple(settings["expression_names"])
        avatar = cls(rig, config, settings["features"], settings["shape"], settings["head"], names)
        avatar.load_state_dict(full)
        return avatar

    @classmethod
    def start(cls, data: TrainingData, config: TrainConfig, rng: np.random.Generator) -> GaussianHeadAvatar:
        """Gaussians where `pipeline.avatars.seeding` puts them or at random, a field of zeros, random networks.

        Raises:
            StageError: see `start_on_head`.
        """
        own = config.gaussianhead
        begin = start_on_head(data, config.gaussians, rng)
        if own.start == "random":
            begin = _scattered(begin, rng)
        if not own.rig:
            begin = _on_the_head(begin)
        features, shape = features_of(data.conditions).shape[1], data.conditions.torso_shape.shape[1]
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        head = data.head
        avatar = cls(begin.rig, own, features, shape, head.name, head.expression_names)
        flat = (1, 1, 0.4 if own.start == "head" else 1)
        avatar.adopt(data, begin, _START_OPACITY[own.start], flat)
        with torch.no_grad():
            avatar.centre.copy_(begin.means.mean(0))
            avatar.radius.copy_((begin.means - avatar.centre).norm(dim=1).quantile(0.99) * 1.1)
            if avatar.derivation is not None:
                avatar.derivation.copy_(_spread_rotations(own.derivations, generator))
            if avatar.planes is not None:
                avatar.planes.start(generator)
            _start_layers(avatar, generator)
        return avatar


class GaussianHeadPlusAvatar(GaussianHeadAvatar):
    """The compact variant: the tri-plane's features are in hash grids."""

    name: ClassVar[str] = "gaussianhead-plus"
    hashed: ClassVar[bool] = True


def _start_layers(avatar: GaussianHeadAvatar, generator: torch.Generator) -> None:
    """Layers at random (He et al. 2015), but what the networks add to motion, opacity and colour starts at nothing."""
    for module in avatar.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, math.sqrt(2 / module.in_features), generator=generator)
            module.bias.zero_()
    decoders = avatar.decoders
    last = decoders.geometry[-1]
    assert isinstance(last, nn.Linear)
    last.weight[0] = 0
    for layer in (decoders.base, decoders.rest, *([avatar.field.answer] if avatar.field else [])):
        layer.weight.zero_()


def _spread_rotations(count: int, generator: torch.Generator) -> Tensor:
    """Unit quaternions [K,4]: none, then at random; of some draws the one whose rotations lie the furthest apart."""
    drawn = nn.functional.normalize(torch.randn(64, count, 4, generator=generator), dim=2)
    drawn[:, 0] = torch.tensor([1.0, 0, 0, 0])
    alike = (drawn @ drawn.transpose(1, 2)).abs() - torch.eye(count)
    return drawn[alike.flatten(1).amax(1).argmin()]


def _scattered(begin: Start, rng: np.random.Generator) -> Start:
    """As many points at random in the box around the seeds, grey; each hangs on what the seed nearest to it does."""
    from scipy.spatial import cKDTree

    seeds = begin.means.numpy()
    points = rng.uniform(seeds.min(0), seeds.max(0), seeds.shape).astype(np.float32)
    distance, nearest = cKDTree(seeds).query(points)
    spacing = cKDTree(points).query(points, 2)[0][:, 1]
    rows = torch.from_numpy(nearest)
    follow = torch.from_numpy(np.exp(-np.square(distance / _FOLLOW_M)).astype(np.float32))
    rig = begin.rig._replace(
        corners=begin.rig.corners[rows], bary=begin.rig.bary[rows], follow=begin.rig.follow[rows] * follow,
        eyes=begin.rig.eyes[rows],
    )  # fmt: skip
    return Start(
        rig,
        torch.from_numpy(points),
        torch.tensor([1.0, 0, 0, 0]).repeat(len(points), 1),
        torch.from_numpy(spacing.astype(np.float32)),
        torch.full_like(begin.colors, 0.5),
        begin.torso[rows],
        begin.skull[rows],
    )


def _on_the_head(begin: Start) -> Start:
    """All of it on the head joint alone, as in the paper: a rig of one triangle that moves nothing."""
    rig = begin.rig
    bare = rig._replace(
        vertices=rig.vertices[:3],
        expression=rig.expression[:, :3] * 0,
        corners=torch.arange(3, dtype=rig.corners.dtype).expand(len(rig.corners), 3).clone(),
        follow=rig.follow * 0,
        eyes=rig.eyes * 0,
    )
    return begin._replace(rig=bare, torso=begin.torso * 0, skull=begin.skull * 0)
