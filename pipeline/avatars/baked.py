"""The `baked` avatar: linear Gaussian blendshapes, driven by the 52 ARKit coefficients and the head's pose.

Its Gaussians rest in the coordinates of three rigid joints (head, torso, skull), where they are linear in the weights
of shared shapes: some of motion (mean and turn), fewer of shading (scale, colour, opacity). The weights are linear in
the drive, plus correctives: a tiny network of the drive. `pipeline.bake` makes one from any other avatar;
docs/avatars.md has the formula and the arrays, so that a player in any language can be written from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pipeline.avatars import AvatarModel, Condition, Gaussians, ParameterGroup, TrainingData
from pipeline.avatars.rig import RigAvatar, with_predicted_torso
from pipeline.errors import UserError
from pipeline.gaze import eyes_of
from pipeline.geometry import invert_rigid, matrix_to_quaternion, matrix_to_rotvec, quaternion_multiply

if TYPE_CHECKING:
    import numpy as np

    from pipeline.config import TrainConfig

# What a Gaussian at rest is made of: metres; tan(angle / 2) times the axis; log of metres; sRGB; logit.
MEAN, TURN, LOG_SCALE, COLOR, OPACITY = slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12), 12
COLUMNS = 13
# Behind the coefficients of the drive: pitch and yaw of both eyes; turn and move of the head and of the torso in it.
GAZE, POSE = 4, 12
# Poses, and all that correctives see, are held at so many deviations of what was baked.
LIMIT = 3.0

# The arrays of a file: their axes by letter or length, and their types where that is not float.
# N Gaussians, G shapes of motion, L of shading, K = G + L, H hidden units, E coefficients, M torso shapes,
# D = E + GAZE + POSE + M, I = E + GAZE + D, P = 6 + M.
ARRAYS: dict[str, tuple[str | int, ...]] = {
    "means": (3, "N"),
    "appearance": (7, "N"),
    "quats": ("N", 4),
    "joints": ("N", 2),
    "motion": ("G", 6, "N"),
    "motion_steps": ("G", 6),
    "shading": ("L", 7, "N"),
    "shading_steps": ("L", 7),
    "offset": ("K",),
    "linear": ("K", "I"),
    "hidden": ("H", "D"),
    "hidden_bias": ("H",),
    "correctives": ("K", "H"),
    "drive_mean": ("D",),
    "drive_scale": ("D",),
    "typical_head": (4, 4),
    "typical_torso": (4, 4),
    "neutral_expression": ("E",),
    "neutral_T_cam_head": (4, 4),
    "neutral_T_cam_torso": (4, 4),
    "neutral_neck": (3,),
    "neutral_eyes": (2, 3),
    "neutral_torso_shape": ("M",),
    "neutral_T_cam_skull": (4, 4),
    "predictor_T_cam_head": (4, 4),
    "predictor_T_cam_torso": (4, 4),
    "predictor_shape": ("M",),
    "predictor_weights": (6, "P"),
}
TYPES = {"joints": torch.uint8, "motion": torch.int8, "shading": torch.int8}
HALF = ("appearance", "quats", "motion_steps", "shading_steps")


class Bones(NamedTuple):
    """Poses of head, torso and skull, Ts_cam_joint; of a sequence, T leads."""

    rotations: Tensor
    """[3,3,3]."""
    translations: Tensor
    """[3,3]."""
    quats: Tensor
    """[3,4] the same rotations, all on the head's side of the sphere."""

    @classmethod
    def of(cls, conditions: Condition) -> Bones:
        """Of T conditions."""
        poses = torch.stack([conditions.T_cam_head, conditions.T_cam_torso, conditions.T_cam_skull], 1)
        quats = matrix_to_quaternion(poses[..., :3, :3])
        other_side = (quats * quats[:, :1]).sum(-1, keepdim=True) < 0
        return cls(poses[..., :3, :3], poses[..., :3, 3], torch.where(other_side, -quats, quats))


class Prepared(NamedTuple):
    """Conditions as the model uses them."""

    weights: Tensor
    """[T,K] of the shapes of motion, then of those of shading."""
    rotations: Tensor
    """[T,3,3,3], this and the next two of the bones."""
    translations: Tensor
    """[T,3,3]."""
    quats: Tensor
    """[T,3,4]."""


class BakedAvatar(AvatarModel):
    """See the module's text. Its buffers are `ARRAYS`, which docs/avatars.md describes.

    Args:
        weights: the arrays, of any floating precision.
        head: name of the head model of the avatar it was made from.
        expression_names: [E] what drives it.

    Raises:
        ValueError: an array is missing, of another shape or type, or has values that are not finite.
    """

    name: ClassVar[str] = "baked"

    means: Tensor
    quats: Tensor
    joints: Tensor
    motion: Tensor
    motion_steps: Tensor
    shading: Tensor
    shading_steps: Tensor
    offset: Tensor
    linear: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    correctives: Tensor
    drive_mean: Tensor
    drive_scale: Tensor
    typical_head: Tensor
    typical_torso: Tensor
    rest: Tensor
    motion_shapes: Tensor
    shading_shapes: Tensor
    joint_weights: Tensor

    def __init__(self, weights: dict[str, Tensor], head: str, expression_names: tuple[str, ...]) -> None:
        super().__init__()
        self.head, self.expression_names = head, expression_names
        _check(weights, len(expression_names))
        for name, value in weights.items():
            self.register_buffer(name, value.float() if value.is_floating_point() else value)
        rest = torch.cat([self.means, torch.zeros_like(self.means), weights["appearance"].float()])
        motion, shading = (
            (values.float() * steps[..., None]).flatten(1)
            for values, steps in ((self.motion, self.motion_steps), (self.shading, self.shading_steps))
        )
        more = {"rest": rest, "motion_shapes": motion, "shading_shapes": shading, "joint_weights": shares(self.joints)}
        for name, value in more.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def count(self) -> int:
        """Number of Gaussians N."""
        return len(self.quats)

    @property
    def neutral(self) -> Condition:
        """The condition of rest in the training clip's typical pose."""
        return Condition(*(getattr(self, f"neutral_{name}") for name in Condition._fields))

    def follow_face(self, expression: Tensor, Ts_cam_head: Tensor) -> Condition:
        """T conditions of a driver who gives coefficients [T,E] and head poses [T,4,4] alone, as face trackers do.

        The eyes look where the eyeLook* coefficients say, the skull moves with the head, and the torso as it did with
        the head in the training clip.
        """
        eyes = eyes_of(expression, self.expression_names)
        head = Condition(expression, Ts_cam_head, Ts_cam_head, eyes[:, 0], eyes, eyes[:, 0, :0], Ts_cam_head)
        return with_predicted_torso(self, head)

    def prepare(self, conditions: Condition) -> Prepared:
        """See `Prepared`."""
        drive = drive_of(conditions, self.typical_head, self.typical_torso)
        linear, normal = inputs_of(drive, self.drive_mean, self.drive_scale, len(self.expression_names))
        hidden = torch.tanh(normal @ self.hidden.T + self.hidden_bias)
        weights = self.offset + linear @ self.linear.T + hidden @ self.correctives.T
        return Prepared(weights, *Bones.of(conditions))

    def deform(self, prepared: Prepared) -> Gaussians:
        """The Gaussians of one prepared condition, in the camera's coordinates."""
        motion, shading = prepared.weights.split([len(self.motion), len(self.shading)])
        departure = torch.cat([motion @ self.motion_shapes, shading @ self.shading_shapes])
        rest = self.rest + departure.view(COLUMNS, -1)
        return pose(rest, self.quats, self.joint_weights, Bones(*prepared[1:]))

    def settings(self) -> dict[str, Any]:
        """Names; everything else is an array."""
        return {"head": self.head, "expression_names": list(self.expression_names)}

    def compact_weights(self) -> dict[str, Tensor]:
        """The arrays as saved."""
        return {name: value.half() if name in HALF else value for name, value in self.state_dict().items()}

    @classmethod
    def restore(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> BakedAvatar:
        """An avatar from `settings` and saved arrays."""
        return cls(weights, str(settings["head"]), tuple(str(name) for name in settings["expression_names"]))

    @classmethod
    def start(cls, data: TrainingData, config: TrainConfig, rng: np.random.Generator) -> BakedAvatar:
        """There is nothing to train.

        Raises:
            UserError: always.
        """
        raise UserError("A baked avatar is made from a trained one.", "train another model; the export bakes it")

    def parameter_groups(self) -> list[ParameterGroup]:
        """None: nothing is trained."""
        return []

    def row_axes(self) -> dict[str, int]:
        """None: its Gaussians stay as they are."""
        return {}


def drive_of(conditions: Condition, typical_head: Tensor, typical_torso: Tensor) -> Tensor:
    """What T conditions come down to [T,D]: coefficients, gaze, turn and move of head and torso, torso shape.

    Args:
        conditions: T rows.
        typical_head: [4,4] T_cam_head, typical_torso: [4,4] T_head_torso; turns and moves depart from these.
    """
    T_head_torso = invert_rigid(conditions.T_cam_head) @ conditions.T_cam_torso
    parts = [conditions.expression, conditions.eyes[..., :2].flatten(1)]
    for poses, typical in ((conditions.T_cam_head, typical_head), (T_head_torso, typical_torso)):
        turns = matrix_to_rotvec(poses[:, :3, :3] @ typical[:3, :3].T)
        parts += [turns, poses[:, :3, 3] - typical[:3, 3]]
    return torch.cat([*parts, conditions.torso_shape], 1)


def inputs_of(drive: Tensor, mean: Tensor, scale: Tensor, expressions: int) -> tuple[Tensor, Tensor]:
    """What the linear part sees of a drive [T,E+4+D], and what the correctives do [T,D].

    Both see the drive scaled and held; the linear part coefficients and gaze as they are too.
    """
    normal = ((drive - mean) / scale).clamp(-LIMIT, LIMIT)
    return torch.cat([drive[:, : expressions + GAZE], normal], 1), normal


def shares(joints: Tensor) -> Tensor:
    """Weights [N,3] of head, torso and skull from the saved bytes [N,2] of torso and skull."""
    others = joints.float() / 255
    return torch.cat([1 - others.sum(1, keepdim=True), others], 1)


def pose(rest: Tensor, quats: Tensor, joints: Tensor, bones: Bones) -> Gaussians:
    """Gaussians in the camera from those at rest [13,N], their resting turns [N,4] and joint weights [N,3]."""
    turn = torch.cat([torch.ones_like(rest[:1]), rest[TURN]]).T
    posed = RigAvatar.skin(rest[MEAN].T, quaternion_multiply(turn, quats), joints, *bones)
    return Gaussians(*posed, torch.exp(rest[LOG_SCALE].T), torch.sigmoid(rest[OPACITY]), rest[COLOR].T.contiguous())


def _check(weights: dict[str, Tensor], expressions: int) -> None:
    """Refuse what are not the arrays of a baked avatar."""
    if weights.keys() != ARRAYS.keys():
        raise ValueError(f"arrays that are missing or unknown: {', '.join(sorted(weights.keys() ^ ARRAYS.keys()))}")
    sizes: dict[str | int, int] = {"E": expressions}
    lengths = {"N": "joints", "G": "motion", "L": "shading", "H": "hidden", "M": "predictor_shape"}
    sizes |= {letter: len(weights[name]) if weights[name].dim() else 0 for letter, name in lengths.items()}
    sizes |= {"K": sizes["G"] + sizes["L"], "D": expressions + GAZE + POSE + sizes["M"], "P": 6 + sizes["M"]}
    sizes["I"] = expressions + GAZE + sizes["D"]
    for name, axes in ARRAYS.items():
        value, wanted = weights[name], [sizes.get(axis, axis) for axis in axes]
        if list(value.shape) != wanted:
            raise ValueError(f"'{name}' has shape {list(value.shape)}, not {wanted}")
        if value.dtype != TYPES.get(name, value.dtype) or (name not in TYPES and not value.is_floating_point()):
            raise ValueError(f"'{name}' holds {value.dtype}")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"'{name}' holds values that are not finite")
    if not (weights["drive_scale"] > 0).all():
        raise ValueError("'drive_scale' holds values that are not above 0")
