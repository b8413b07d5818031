"""The `rigged` avatar: Gaussians that ride on the fitted head, and a small learned basis on top.

What the mesh knows is not learned again: the rig (`pipeline.avatars.rig`) moves each Gaussian with its triangle and its
joints. On top come K learned vectors over mean, rotation, scale, colour and opacity, weighted by a tiny network of
expression, pose and gaze: wrinkles, shading, hair, what the mesh lacks. And a small rigid twist of the head, linear in
the same features: what the fit's poses get wrong in the same way whenever the same expression or pose comes back. The
torso has none: how it moves is seen in the frames. What it bends beside its rigid motion moves its Gaussians by a
learned basis of their own, linear in the torso's shape.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.avatars import Gaussians, ParameterGroup, TrainingData
from pipeline.avatars.deformation import Rest, deform
from pipeline.avatars.rig import Prepared, Rig, RigAvatar, features_of, unpacked
from pipeline.avatars.seeding import start_on_head
from pipeline.geometry import quaternion_multiply, skew

if TYPE_CHECKING:
    import numpy as np

    from pipeline.config import TrainConfig

# What one unit of a basis coefficient means: metres, radians, log-scale, colour, opacity logit. It brings the columns
# to one learning rate.
_BASIS_UNITS = (0.02,) * 3 + (0.3,) * 3 + (0.5,) * 3 + (0.5,) * 3 + (2.0,)
_MEAN, _ROTATION, _SCALE, _COLOR, _OPACITY = slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12), 12

# The same for the head's twist: radians and metres; and which joints (head, torso, eyes, skull) it turns.
_TWIST_UNITS = (0.02,) * 3 + (0.005,) * 3
_TWISTED = (1.0, 0.0, 1.0, 1.0, 0.0)

# Metres that one unit of a torso mode moves a Gaussian.
_BEND_UNIT = 0.005


class RiggedAvatar(RigAvatar):
    """See the module's text. Parameters are float32; a saved avatar holds all but the means in half precision."""

    name: ClassVar[str] = "rigged"

    units: Tensor
    twist_units: Tensor

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
        super().__init__(rig, features, shape, head, expression_names)
        self._size = {"basis": basis_size, "hidden": hidden, "features": features, "shape": shape}
        n = len(rig.corners)
        self.register_buffer("units", torch.tensor(_BASIS_UNITS), persistent=False)
        self.register_buffer(
            "twist_units", torch.outer(torch.tensor(_TWISTED), torch.tensor(_TWIST_UNITS)), persistent=False
        )
        self.basis = nn.Parameter(torch.zeros(basis_size, n, len(_BASIS_UNITS)))
        self.torso_basis = nn.Parameter(torch.zeros(shape, n, 3))
        self.driver = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, basis_size))
        self.twist = nn.Linear(features, 6)

    def row_axes(self) -> dict[str, int]:
        """See `AvatarModel.row_axes`."""
        return {**super().row_axes(), "basis": 1, "torso_basis": 1}

    def deform(self, prepared: Prepared) -> Gaussians:
        """The Gaussians of one prepared condition, in the camera's coordinates."""
        twists = self.twist(prepared.features) * self.twist_units
        nudge = torch.eye(3, device=twists.device) + skew(twists[:, :3])
        rotations = prepared.rotations @ nudge
        translations = prepared.translations + (prepared.rotations @ twists[:, 3:, None]).squeeze(-1)
        # A small rotation vector is twice the vector part of its quaternion; the rasteriser normalises.
        half = torch.cat([torch.ones_like(twists[:, :1]), 0.5 * twists[:, :3]], 1)
        turns = quaternion_multiply(prepared.quats, half)
        coefficients, shape = self.driver(prepared.features), _BEND_UNIT * prepared.torso_shape
        if self.means.device.type == "cpu" and self.means.dtype == torch.float32:
            rest = Rest(
                *(self.means, self.quats, self.log_scales, self.opacity_logits, self.colors),
                *(self.torso_logits, self.skull_logits, self.rig_eyes),
            )
            joints = torch.cat([rotations.flatten(1), translations, turns], 1)
            mixed = (prepared.expression, self.follow, coefficients, self.basis, shape, self.torso_basis)
            return Gaussians(*deform(rest, self.units, *mixed, joints, self.threads))
        n = self.count
        ridden = self.ridden(prepared)
        learned = (coefficients @ self.basis.flatten(1)).view(n, -1) * self.units
        joints = self.joint_weights()
        bent = (shape @ self.torso_basis.flatten(1)).view(n, 3) * joints[:, 1:2]
        moved = self.means + ridden[:, :3] + learned[:, _MEAN] + bent
        turn = 0.5 * (ridden[:, 3:6] + learned[:, _ROTATION])
        small = torch.cat([torch.ones_like(turn[:, :1]), turn], 1)
        posed = self.skin(moved, quaternion_multiply(small, self.quats), joints, rotations, translations, turns)
        return Gaussians(
            *posed,
            torch.exp(self.log_scales + ridden[:, 6:] + learned[:, _SCALE]),
            torch.sigmoid(self.opacity_logits + learned[:, _OPACITY]),
            self.colors + learned[:, _COLOR],
        )

    def parameter_groups(self) -> list[ParameterGroup]:
        """Learning rates are for metres, logits and colours in [0,1], and for a few thousand steps."""
        return [
            ParameterGroup("means", [self.means], 3e-4, 3e-5),
            ParameterGroup("quats", [self.quats], 1.2e-2, 1.2e-3),
            ParameterGroup("log_scales", [self.log_scales], 3e-2, 3e-3),
            ParameterGroup("opacities", [self.opacity_logits], 9e-2, 9e-3),
            ParameterGroup("colors", [self.colors], 1.5e-2, 1.5e-3),
            ParameterGroup("torso", [self.torso_logits], 6e-2, 6e-3),
            ParameterGroup("skull", [self.skull_logits], 6e-2, 6e-3),
            ParameterGroup("basis", [self.basis], 2e-3, 2e-4),
            ParameterGroup("torso_basis", [self.torso_basis], 2e-3, 2e-4),
            ParameterGroup("driver", list(self.driver.parameters()), 2e-3, 2e-4),
            ParameterGroup("twist", list(self.twist.parameters()), 1e-3, 1e-4),
        ]

    def settings(self) -> dict[str, Any]:
        """Sizes and names; everything else is a weight."""
        return {**self._size, "head": self.head, "expression_names": list(self.expression_names)}

    @classmethod
    def restore(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> RiggedAvatar:
        """An avatar from `settings` and saved weights of any precision."""
        full, rig = unpacked(weights)
        names = tuple(settings["expression_names"])
        avatar = cls(
            rig, settings["basis"], settings["hidden"], settings["features"], settings["shape"], settings["head"], names
        )
        avatar.load_state_dict(full)
        return avatar

    @classmethod
    def start(cls, data: TrainingData, config: TrainConfig, rng: np.random.Generator) -> RiggedAvatar:
        """Gaussians where `pipeline.avatars.seeding` puts them, a basis of zeros and a random driver.

        Raises:
            StageError: see `start_on_head`.
        """
        begin = start_on_head(data, config.gaussians, rng)
        features, shape = features_of(data.conditions).shape[1], data.conditions.torso_shape.shape[1]
        head = data.head
        avatar = cls(begin.rig, config.basis, config.hidden, features, shape, head.name, head.expression_names)
        avatar.adopt(data, begin, opacity=0.7, flat=(1, 1, 0.4))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        with torch.no_grad():
            for layer in avatar.driver:
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(0, 1 / math.sqrt(layer.in_features), generator=generator)
                    layer.bias.zero_()
            avatar.twist.weight.zero_()
            avatar.twist.bias.zero_()
        return avatar
