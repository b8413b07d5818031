"""Avatar models: from an expression, a pose and a gaze to Gaussians. One small interface, one file format.

A model is a `torch.nn.Module` with the methods of `AvatarModel`; `MODELS` lists them. A saved avatar is a folder with
`avatar.json` (what it is) and `avatar.safetensors` (its weights), and needs no head model and no dataset to be loaded.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.dataset import write_atomic, write_json
from pipeline.errors import UserError
from pipeline.quantise import pack, unpack
from pipeline.rasterize import Backend, Render, rasterize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.clip import Clip
    from pipeline.config import TrainConfig
    from pipeline.heads import HeadModel

SCHEMA = 2
WEIGHTS = "avatar.safetensors"
DESCRIPTION = "avatar.json"

# name -> module and class; imported when asked for.
MODELS = {
    "rigged": ("pipeline.avatars.rigged", "RiggedAvatar"),
    "gaussianhead": ("pipeline.avatars.gaussianhead", "GaussianHeadAvatar"),
    "gaussianhead-plus": ("pipeline.avatars.gaussianhead", "GaussianHeadPlusAvatar"),
    "baked": ("pipeline.avatars.baked", "BakedAvatar"),
}


class Condition(NamedTuple):
    """What drives an avatar. Every field may have one more leading dimension T for a sequence."""

    expression: Tensor
    """[E] coefficients of the avatar's expression names."""
    T_cam_head: Tensor
    """[4,4]."""
    T_cam_torso: Tensor
    """[4,4], equal to `T_cam_head` where the neck is straight."""
    neck: Tensor
    """[3] rotation vector of the head relative to the torso."""
    eyes: Tensor
    """[2,3] rotation vectors of the left and the right eye in the head."""
    torso_shape: Tensor
    """[M] how the torso bends beside its rigid motion, as `pipeline.torso` measures it; zeros where it is not known."""
    T_cam_skull: Tensor
    """[4,4] of hair and skull, equal to `T_cam_head` where it is not known apart (`pipeline.skull`)."""

    def frame(self, index: int) -> Condition:
        """One frame of a sequence."""
        return Condition(*(value[index] for value in self))


class Gaussians(NamedTuple):
    """N Gaussians as `pipeline.rasterize` takes them, in the camera's coordinates or those of `T_cam_world`."""

    means: Tensor
    """[N,3] metres."""
    quats: Tensor
    """[N,4] wxyz, of any norm."""
    scales: Tensor
    """[N,3] standard deviations in metres."""
    opacities: Tensor
    """[N] in [0,1]."""
    colors: Tensor
    """[N,3] sRGB; may leave [0,1] a little. With `sh_degree` d [N,(d+1)^2,3] coefficients of spherical harmonics."""
    sh_degree: int | None = None
    T_cam_world: Tensor | None = None
    """[4,4] from the coordinates that means, rotations and harmonics are in to the camera's; None: the camera's own.

    Harmonics are to be in the head's axes, `T_cam_head`, where a file of the avatar at rest has them too.
    """


class ParameterGroup(NamedTuple):
    """Parameters that share a learning rate."""

    name: str
    parameters: list[nn.Parameter]
    rate: float
    final_rate: float
    sphere: bool = False
    """Rows are unit vectors (geoopt's manifold parameters) and stay so: Riemannian Adam moves them."""


@dataclass(frozen=True)
class TrainingData:
    """n training frames at resolution R, and the head they were fitted with.

    Attributes:
        images: [n,R,R,3] uint8 RGB over white. alphas: [n,R,R] uint8.
        conditions: n rows. identity: [S].
        Ks: [C,3,3] float64 of the cameras. cameras: [n] which of them took a frame; None where there is one.
        inside: [C,R,R] share of each pixel that lies inside the frame (`Clip.inside`); None where all does.
        confidences: [n,R,R] uint8 how sure the alphas are; None where all are.
    """

    images: NDArray[np.uint8]
    alphas: NDArray[np.uint8]
    conditions: Condition
    Ks: NDArray[np.float64]
    head: HeadModel
    identity: NDArray[np.float32]
    cameras: NDArray[np.int64] | None = None
    inside: NDArray[np.float32] | None = None
    confidences: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def camera(self, frame: int) -> int:
        """The number of the camera that took a frame."""
        return 0 if self.cameras is None else int(self.cameras[frame])


class AvatarModel(nn.Module, ABC):
    """An avatar: `gaussians(condition)` is all that rendering needs.

    Attributes:
        head: name of the head model it was fitted with.
        expression_names: [E] names of the coefficients it is driven by.
        neutral: the condition of rest in the training clip's typical pose.
        threads: of its own CPU kernels; None takes torch.get_num_threads().
    """

    threads: int | None = None
    name: ClassVar[str]
    head: str
    expression_names: tuple[str, ...]

    @classmethod
    @abstractmethod
    def start(cls, data: TrainingData, config: TrainConfig, rng: np.random.Generator) -> AvatarModel:
        """An untrained avatar, placed and coloured by the training frames."""

    @classmethod
    @abstractmethod
    def restore(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> AvatarModel:
        """An avatar from what `settings` and `state_dict` gave."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain data that `restore` needs besides the weights."""

    @abstractmethod
    def prepare(self, conditions: Condition) -> NamedTuple:
        """What of a sequence of T conditions does not depend on weights, computed once; fields have T rows."""

    @abstractmethod
    def deform(self, prepared: Any) -> Gaussians:
        """The Gaussians of one row of `prepare`'s result."""

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """What is trained, and how fast."""

    @abstractmethod
    def compact_weights(self) -> dict[str, Tensor]:
        """The weights as they are saved, at half precision where that does not show."""

    @abstractmethod
    def row_axes(self) -> dict[str, int]:
        """Names of the parameters and buffers that have a row for each Gaussian, and the axis of the rows.

        Density control (`pipeline.density`) needs `means`, `quats`, `log_scales` and `opacity_logits` among them, where
        an offset to an opacity logit moves that Gaussian's opacity.
        """

    @torch.no_grad()
    def take_rows(self, index: Tensor) -> None:
        """Become the avatar of Gaussians `index` [M] int64, which may repeat; parameters stay the same objects."""
        for name, axis in self.row_axes().items():
            owner, _, field = name.rpartition(".")
            tensor = getattr(self.get_submodule(owner), field)
            tensor.grad = None
            tensor.data = tensor.data.index_select(axis, index)

    def at_step(self, step: int, steps: int) -> None:
        """Hear that step `step` of `steps` comes: warm-ups and what is raised by degrees. Nothing by default."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of Gaussians N."""

    @property
    @abstractmethod
    def neutral(self) -> Condition:
        """The condition of rest in the training clip's typical pose."""

    def gaussians(self, condition: Condition) -> Gaussians:
        """The Gaussians of one condition, in the camera's coordinates."""
        prepared = self.prepare(Condition(*(value[None] for value in condition)))
        return self.deform(row(prepared, 0))

    def render(
        self,
        condition: Condition,
        K: Tensor,
        width: int,
        height: int,
        background: Tensor | None = None,
        backend: Backend = "auto",
        threads: int | None = None,
        view: Tensor | None = None,
    ) -> Render:
        """Render one condition; arguments as in `splat`."""
        return splat(self.gaussians(condition), K, width, height, background, backend, threads, view)


def row(prepared: Any, index: int) -> Any:
    """One row of each field of a named tuple of tensors."""
    return type(prepared)(*(value[index] for value in prepared))


def splat(
    gaussians: Gaussians,
    K: Tensor,
    width: int,
    height: int,
    background: Tensor | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
    view: Tensor | None = None,
) -> Render:
    """Rasterise what an avatar gave; arguments as in `pipeline.rasterize.rasterize`.

    Args:
        view: [4,4] from the axes of the clip's camera, in which the avatar performs, to those of the camera that looks;
            None looks through the clip's own. What the avatar does is the same from all sides.
    """
    means, quats, scales, opacities, colors, sh_degree, viewmat = gaussians
    if viewmat is None:
        viewmat = torch.eye(4, dtype=means.dtype, device=means.device)
    if view is not None:
        viewmat = view.to(viewmat) @ viewmat
    return rasterize(
        means, quats, scales, opacities, colors, viewmat, K, width, height,
        background=background, sh_degree=sh_degree, backend=backend, threads=threads,
    )  # fmt: skip


def conditions_of(clip: Clip, device: torch.device | str = "cpu") -> Condition:
    """The conditions of all T frames of a clip, float32."""
    arrays = (
        *(clip.expression, clip.Ts_cam_head, clip.Ts_cam_torso, clip.neck, clip.eyes),
        *(clip.torso_shape, clip.Ts_cam_skull),
    )
    return Condition(*(torch.as_tensor(array, dtype=torch.float32, device=device) for array in arrays))


def avatar_class(name: str) -> type[AvatarModel]:
    """The class of an avatar model.

    Raises:
        UserError: there is no such model.
    """
    if name not in MODELS:
        raise UserError(f"There is no avatar model '{name}'.", f"choose one of: {', '.join(MODELS)}")
    module, attribute = MODELS[name]
    found: type[AvatarModel] = getattr(importlib.import_module(module), attribute)
    return found


def save_avatar(
    avatar: AvatarModel, folder: Path, training: dict[str, Any] | None = None, quantised: Collection[str] = ()
) -> int:
    """Write `avatar.json` and `avatar.safetensors`, each in one piece; returns their size in bytes.

    Args:
        avatar: what to save.
        folder: an existing folder.
        training: plain data on how it was made, kept in `avatar.json`.
        quantised: names of weights to keep in 8 bits a value (`pipeline.quantise`).
    """
    from safetensors.torch import save

    weights = pack(avatar.compact_weights(), quantised)
    write_atomic(folder / WEIGHTS, save({name: value.detach().cpu().contiguous() for name, value in weights.items()}))
    description = {
        "schema": SCHEMA,
        "model": avatar.name,
        "head": avatar.head,
        "gaussians": avatar.count,
        "expression_names": list(avatar.expression_names),
        "settings": avatar.settings(),
        "training": training or {},
        "quantised": sorted(quantised),
    }
    write_json(folder / DESCRIPTION, description)
    return sum((folder / name).stat().st_size for name in (WEIGHTS, DESCRIPTION))


def check_schema(schema: Any, path: Path) -> None:
    """Refuse an avatar's description `path` that another version of the layout wrote.

    Raises:
        UserError: which schema it has, and which is read.
    """
    if schema != SCHEMA:
        raise UserError(f"'{path}' has schema {schema}; this version reads {SCHEMA}.", "train the avatar again")


def load_avatar(folder: Path, device: torch.device | str = "cpu") -> AvatarModel:
    """Read a saved avatar, ready to render (no gradients).

    Raises:
        UserError: the files are missing, damaged, of another schema or of an unknown model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
        schema, model, settings = description["schema"], description["model"], description["settings"]
        weights = load((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"'{folder}' holds no readable avatar: {error}.", "train it again") from error
    check_schema(schema, path)
    try:
        weights = unpack(weights, description.get("quantised", []))
        _refuse_oversize(settings, weights)
        avatar = avatar_class(model).restore(settings, weights).requires_grad_(False).eval()
        _refuse_nonsense(avatar, weights)
    except _DAMAGE as error:
        raise UserError(f"'{folder}' does not fit its model '{model}': {error}.", "train it again") from error
    return avatar.to(device)


def trained_resolution(folder: Path) -> int:
    """Width and height of the crops that a saved avatar was trained on, in pixels.

    Raises:
        UserError: its description does not tell.
    """
    path = folder / DESCRIPTION
    try:
        resolution = json.loads(path.read_bytes())["training"]["resolution"]
        if type(resolution) is not int or resolution < 1:
            raise ValueError(f"a resolution of {resolution!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path}' does not tell what the avatar was trained at: {error}.", "train it again") from error
    return int(resolution)


# What a model's code may raise over weights and settings that somebody else wrote.
_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(MemoryError, RuntimeError, TypeError, ValueError),
)


def _refuse_oversize(settings: Any, weights: dict[str, Tensor]) -> None:
    """Refuse sizes that no weight has, before a model takes memory for them.

    Raises:
        ValueError: which one.
    """
    largest = max((size for weight in weights.values() for size in weight.shape), default=0)
    for name, value in settings.items():
        if isinstance(value, int | float) and not abs(value) <= max(largest, 1024):
            raise ValueError(f"{name} is {value}, and no weight has more than {largest} rows")


def _refuse_nonsense(avatar: AvatarModel, weights: dict[str, Tensor]) -> None:
    """Refuse an avatar with numbers that are none, or that cannot be driven and rendered; at rest it is, to one pixel.

    Raises:
        ValueError: what is wrong with it; the code of model and rasteriser may raise others.
    """
    made = avatar.state_dict()
    for name, weight in weights.items():
        if name in made and weight.is_floating_point() != made[name].is_floating_point():
            raise ValueError(f"'{name}' is {weight.dtype} where {made[name].dtype} is meant")
        if not torch.isfinite(weight).all():
            raise ValueError(f"'{name}' holds values that are not finite")
    if not all(isinstance(name, str) for name in (avatar.head, *avatar.expression_names)):
        raise ValueError("the names of its head or expressions are none")
    if not torch.isfinite(avatar.render(avatar.neutral, torch.eye(3), 1, 1, backend="reference").image).all():
        raise ValueError("at rest it is nothing that can be shown")
