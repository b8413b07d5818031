"""The baked avatar and its clip packed small for the browser player; docs/player.md has the layout.

gzip around safetensors. Gaussians follow a Morton curve, so that neighbours in the file are neighbours in space and
move alike: the shapes' bytes are differences along it. Where that is not small enough, the least shapes are left out.
"""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.avatars import Condition
from pipeline.avatars.baked import HALF, BakedAvatar
from pipeline.errors import UserError
from pipeline.expressions import is_arkit
from pipeline.geometry import make_rigid, matrix_to_rotvec, rotvec_to_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCHEMA = 1
LIMIT_BYTES, LIMIT_PACKED = 5_000_000, 3_000_000
"""Of the file, unpacked and as it is."""
FRAMES = 1800
"""A longer clip is cut: a minute at 30 frames a second."""
METADATA = "headcast"
DELTAS = ("motion", "shading", "grid_means")
SHARES = np.linspace(1, 0.2, 17)
"""Of the shapes that may stay, tried in turn."""
MORTON_BITS = 10
POSES = ("T_cam_head", "T_cam_torso", "T_cam_skull")


class Performance(NamedTuple):
    """What drives the avatar through its clip."""

    conditions: Condition
    """T rows."""
    times: NDArray[np.float64]
    """[T] seconds from the clip's start."""


class Packed(NamedTuple):
    """A packed avatar.

    Attributes:
        data: the file.
        size: of what is in it, unpacked.
        avatar: what a reader makes of it.
        performance: what a reader makes of the clip.
    """

    data: bytes
    size: int
    avatar: BakedAvatar
    performance: Performance


def pack(avatar: BakedAvatar, performance: Performance) -> Packed:
    """Pack an avatar within the limits.

    Raises:
        UserError: it has too many Gaussians for them.
    """
    from safetensors.numpy import save

    performance = Performance(
        Condition(*(value[:FRAMES] for value in performance.conditions)), performance.times[:FRAMES]
    )
    ordered = _ordered(avatar)
    for share in SHARES:
        arrays = _arrays(_with_fewer_shapes(ordered, share)) | _clip_arrays(
            performance, is_arkit(avatar.expression_names)
        )
        about = {"schema": SCHEMA, "expression_names": list(avatar.expression_names), "head": avatar.head}
        data = save(arrays, {METADATA: json.dumps(about)})
        if len(data) > LIMIT_BYTES:
            continue
        # No time of day in it: equal avatars give equal bytes.
        packed = gzip.compress(data, 9, mtime=0)
        if len(packed) <= LIMIT_PACKED:
            return Packed(packed, len(data), *unpack(packed))
    raise UserError(
        f"The avatar has {avatar.count:,} Gaussians, more than the player's {LIMIT_PACKED / 1e6:.0f} MB hold.",
        "train one with fewer: --set train.gaussians=20000",
    )


def unpack(data: bytes) -> tuple[BakedAvatar, Performance]:
    """What `pack` packed, of data that it wrote.

    Raises:
        ValueError: it is nothing of the kind.
    """
    from safetensors.torch import load

    raw = gzip.decompress(data)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    about = json.loads(header["__metadata__"][METADATA])
    if about["schema"] != SCHEMA:
        raise ValueError(f"schema {about['schema']}")
    arrays = load(raw)
    for name in DELTAS:
        whole = arrays[name].numpy()
        arrays[name] = torch.from_numpy(np.cumsum(whole, axis=-1, dtype=whole.dtype))
    low, step = arrays.pop("means_low"), arrays.pop("means_step")
    arrays["means"] = low[:, None] + step[:, None] * arrays.pop("grid_means").float()
    clip = {name: arrays.pop(f"clip_{name}") for name in ("expression", "eyes", "shape", "times", *POSES)}
    weights = {name: value.float() if value.is_floating_point() else value for name, value in arrays.items()}
    return BakedAvatar(weights, str(about["head"]), tuple(about["expression_names"])), _performance(clip)


def _ordered(avatar: BakedAvatar) -> dict[str, Tensor]:
    """Its arrays with the Gaussians along a Morton curve (Morton 1966) through their means at rest."""
    arrays = avatar.compact_weights()
    means = arrays["means"].double()
    extent = (means.amax(1, keepdim=True) - means.amin(1, keepdim=True)).max().clamp(min=1e-9)
    cells = ((means - means.amin(1, keepdim=True)) / extent * (2**MORTON_BITS - 1)).long()
    code = torch.zeros_like(cells[0])
    for bit in range(MORTON_BITS):
        for axis in range(3):
            code |= ((cells[axis] >> bit) & 1) << (3 * bit + axis)
    order = torch.argsort(code, stable=True)
    along = {"means": 1, "appearance": 1, "quats": 0, "joints": 0, "motion": 2, "shading": 2}
    return {name: value.index_select(along[name], order) if name in along else value for name, value in arrays.items()}


def _with_fewer_shapes(arrays: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The arrays with the first shapes alone; they come in the order of what they show."""
    motions, shadings = len(arrays["motion"]), len(arrays["shading"])
    some, few = max(round(share * motions), 1), max(round(share * shadings), 1)
    rows = torch.tensor([*range(some), *range(motions, motions + few)])
    kept = {name: arrays[name][rows] for name in ("offset", "linear", "correctives")}
    kept |= {name: arrays[name][:some] for name in ("motion", "motion_steps")}
    return arrays | kept | {name: arrays[name][:few] for name in ("shading", "shading_steps")}


def _arrays(weights: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """The file's arrays of an avatar's."""
    arrays = {name: (value.half() if name in HALF else value).contiguous().numpy() for name, value in weights.items()}
    means = arrays.pop("means").astype(np.float64)
    low, step = means.min(1), np.maximum(np.ptp(means, axis=1), 1e-6) / 65535
    arrays["grid_means"] = ((means - low[:, None]) / step[:, None]).round().clip(0, 65535).astype(np.uint16)
    arrays |= {"means_low": low.astype(np.float32), "means_step": step.astype(np.float32)}
    for name in DELTAS:
        arrays[name] = np.diff(arrays[name], axis=-1, prepend=arrays[name].dtype.type(0))
    return arrays


def _clip_arrays(performance: Performance, within_one: bool) -> dict[str, NDArray[Any]]:
    """What drives the avatar through its clip; `within_one`: its coefficients go from 0 to 1."""
    conditions, times = performance
    expression = conditions.expression.numpy()
    arrays = {
        "clip_times": times.astype(np.float32),
        "clip_expression": (expression.clip(0, 1) * 65535).round().astype(np.uint16) if within_one else expression,
        "clip_eyes": conditions.eyes[..., :2].flatten(1).numpy(),
        "clip_shape": conditions.torso_shape.numpy(),
    }
    for name in POSES:
        poses = getattr(conditions, name)
        turns = matrix_to_rotvec(poses[:, :3, :3].double()).float()
        arrays[f"clip_{name}"] = torch.cat([turns, poses[:, :3, 3]], 1).numpy()
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _performance(clip: dict[str, Tensor]) -> Performance:
    head, torso, skull = (make_rigid(rotvec_to_matrix(clip[name][:, :3]), clip[name][:, 3:]) for name in POSES)
    eyes = torch.nn.functional.pad(clip["eyes"].view(-1, 2, 2), (0, 1))
    neck = matrix_to_rotvec(torso[:, :3, :3].mT @ head[:, :3, :3])
    expression = clip["expression"]
    if not expression.is_floating_point():
        expression = expression.float() / 65535
    conditions = Condition(expression, head, torso, neck, eyes, clip["shape"], skull)
    return Performance(conditions, clip["times"].double().numpy())
