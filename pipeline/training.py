"""Training of an avatar model on a clip's crops: schedule, checkpoints, resume.

Steps, not seconds, define a run, and every random choice is a function of the seed and the step. The same inputs
therefore give the same weights, and a resumed run needs no random state: it continues where its checkpoint was written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.avatars import (
    AvatarModel,
    Condition,
    Gaussians,
    ParameterGroup,
    TrainingData,
    avatar_class,
    row,
    splat,
)
from pipeline.config import flat
from pipeline.dataset import canonical_json, write_atomic
from pipeline.density import DensityControl
from pipeline.errors import StageError
from pipeline.frames import evenly
from pipeline.losses import L1_WEIGHT, SSIM_WEIGHT, photometric_loss

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.config import TrainConfig
    from pipeline.perceptual import PerceptualLoss
    from pipeline.rasterize import Render

CHECKPOINT_SCHEMA = 3
MONITORED_FRAMES = 4
CHECKPOINT = "checkpoint.safetensors"

# The end of the training span, as far from the rest as the test is, is kept back for validation until this share of the
# steps; what is left of them uses all frames. Keeping them back for longer costs half a decibel on the test.
VALIDATED_SHARE = 0.4
MAX_VALIDATION_FRAMES = 8

# What a pixel counts whose alpha is a mere guess; a sure one counts 1.
GUESSED_WEIGHT = 0.25


@dataclass(frozen=True)
class Entry:
    """One line of the training log."""

    step: int
    loss: float
    """Mean over the steps since the last entry."""
    psnr_train: float
    """Over the monitored training frames, dB, whole crop on white."""
    psnr_val: float | None
    """Over the frames kept back; None when there are none, or once they are trained on too."""


def compile_kernels(device: torch.device | str, report: Callable[[str], None]) -> None:
    """Have all kernels compiled where they are (the CPU); `report` is told if that takes a while."""
    if torch.device(device).type == "cpu":
        from pipeline.avatars import deformation  # noqa: F401 - so that its kernels are among them
        from pipeline.rasterize.cpu import warm_up

        warm_up(report)


class Trainer:
    """An avatar at work.

    Args:
        data: training frames, already without every test frame.
        config: the training settings.
        device: where to train.
        perceptual: the loss that `train.perceptual` weighs; None leaves it out.
        threads: CPU threads of the rasteriser and the loss. Torch's own threads only wait for each other on tensors
            this small; on the CPU, callers do best with `torch.set_num_threads(1)`.
    """

    def __init__(
        self,
        data: TrainingData,
        config: TrainConfig,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        perceptual: PerceptualLoss | None = None,
    ) -> None:
        self.config, self.threads, self._perceptual = config, threads, perceptual
        self.device = torch.device(device)
        self.avatar: AvatarModel = avatar_class(config.avatar).start(data, config, np.random.default_rng(config.seed))
        self.avatar.to(self.device)
        self.avatar.threads = threads
        self._clip = _digest(data)
        self.head = f"{data.head.name} {data.head.version}"
        self.step_count = 0
        self.seconds = 0.0
        self.log: list[Entry] = []
        self._losses: list[float] = []
        self._last: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._last_perceptual: float | None = None
        self._saved_step: int | None = None
        self._groups = self.avatar.parameter_groups()
        self._optimisers = _optimisers(self._groups)
        list(self._optimiser_states())  # all of one kind; Riemannian Adam would count steps in a number of its own
        self._settings = {s["name"]: s for optimiser in self._optimisers.values() for s in optimiser.param_groups}
        self._density = DensityControl(config.density, self.avatar.count, config.seed, self.device)
        conditions = Condition(*(value.to(self.device) for value in data.conditions))
        self._prepared = self.avatar.prepare(conditions)
        self._count = len(data)
        self._kept_back = min(MAX_VALIDATION_FRAMES, self._count // 20)
        self._validated_steps = math.floor(VALIDATED_SHARE * config.steps) if self._kept_back else 0
        images, alphas, Ks = (torch.from_numpy(array).to(self.device) for array in (data.images, data.alphas, data.Ks))
        inside, confidences = (
            None if array is None else torch.from_numpy(array).to(self.device)
            for array in (data.inside, data.confidences)
        )
        self._camera = data.camera
        self._levels = [_Level(images, alphas, Ks, inside, confidences)]
        if config.coarse_share > 0 and data.images.shape[1] % 2 == 0:
            self._levels.append(self._levels[0].halved())

    def step(self) -> float:
        """One optimisation step; returns its loss.

        Raises:
            StageError: the loss is not a finite number.
        """
        started = time.monotonic()
        step, config = self.step_count, self.config
        coarse = step < config.coarse_share * config.steps
        level = self._levels[-1 if coarse else 0]
        frame = self._frame_at(step)
        background = self._background_at(step)
        target, camera = level.over(frame, background), self._camera(frame)
        self.avatar.at_step(step, config.steps)
        gaussians = self.avatar.deform(row(self._prepared, frame))
        render = self._splat(gaussians, level, camera, background)
        growing = config.density.every > 0 and step < config.density.last
        if growing:
            render.means2d.retain_grad()
        image = level.cut(render.image, camera, background)
        weight = level.weight(frame)
        loss = photometric_loss(image, target, weight=weight, threads=self.threads)
        if self._perceptual is not None:
            perceptual = config.perceptual * self._perceptual(image, target)
            self._last_perceptual = perceptual.item()
            loss = loss + perceptual
        self._last = image.detach(), target, weight
        for optimiser in self._optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss of frame {frame} is {value}")
        progress = step / max(config.steps - 1, 1)
        for group in self._groups:
            self._settings[group.name]["lr"] = group.rate * (group.final_rate / group.rate) ** progress
        for optimiser in self._optimisers.values():
            optimiser.step()
        self.step_count += 1
        if growing:
            self._density.observe(render, level.size)
            self._change_density(gaussians.opacities.detach())
        self._losses.append(value)
        self.seconds += time.monotonic() - started
        return value

    @torch.no_grad()
    def render(self, frame: int, background: Tensor | None = None) -> Tensor:
        """[R,R,3] of one training frame as the avatar stands, over white unless told otherwise, in [0,1]."""
        level, camera = self._levels[0], self._camera(frame)
        background = torch.ones(3, device=self.device) if background is None else background
        gaussians = self.avatar.deform(row(self._prepared, frame))
        render = self._splat(gaussians, level, camera, background)
        return level.cut(render.image, camera, background).clamp(0, 1)

    def _splat(self, gaussians: Gaussians, level: _Level, camera: int, background: Tensor) -> Render:
        try:
            return splat(gaussians, level.Ks[camera], level.size, level.size, background, threads=self.threads)
        except ValueError as error:
            raise self._diverged(str(error)) from error

    def truth(self, frame: int) -> Tensor:
        """[R,R,3] of one training frame over white, in [0,1]."""
        return self._levels[0].images[frame].float() / 255

    def psnr(self, frames: list[int]) -> float:
        """Mean PSNR over training frames, dB, whole crop on white."""
        errors = [float((self.render(frame) - self.truth(frame)).square().mean()) for frame in frames]
        return float(np.mean([-10 * math.log10(max(error, 1e-10)) for error in errors]))

    @property
    def monitored(self) -> list[int]:
        """A few training frames for figures and previews."""
        return evenly(self._count - self._kept_back, MONITORED_FRAMES)

    def round_to_saved(self) -> None:
        """Give the avatar the weights that its file will hold."""
        saved = self.avatar.compact_weights()
        self.avatar.load_state_dict(
            {name: saved[name].to(value.dtype) for name, value in self.avatar.state_dict().items()}
        )

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step_count >= self.config.steps

    def record(self) -> Entry:
        """Add a line to the log: the loss since the last one, and the PSNR now."""
        kept_back = list(range(self._count - self._kept_back, self._count))
        unseen = bool(kept_back) and self.step_count <= self._validated_steps
        loss = float(np.mean(self._losses)) if self._losses else 0.0
        entry = Entry(
            self.step_count,
            round(loss, 6),
            round(self.psnr(self.monitored), 3),
            round(self.psnr(kept_back), 3) if unseen else None,
        )
        self.log.append(entry)
        self._losses = []
        return entry

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        """Figures of where training stands: the last step's loss by its terms as weighted, rates, Gaussians."""
        found = {f"rate/{name}": float(settings["lr"]) for name, settings in self._settings.items()}
        found["gaussians"] = self.avatar.count
        if self._last is not None:
            image, target, weight = self._last
            for name, l1, ssim in (("l1", L1_WEIGHT, 0.0), ("ssim", 0.0, SSIM_WEIGHT)):
                part = photometric_loss(image, target, l1=l1, ssim=ssim, weight=weight, threads=self.threads)
                found[f"loss of one frame/{name}"] = part.item()
        if self._last_perceptual is not None:
            found["loss of one frame/perceptual"] = self._last_perceptual
        return found

    def save_checkpoint(self, folder: Path) -> None:
        """Write everything that `resume` needs, in one piece.

        Raises:
            StageError: a weight is not a finite number; the checkpoint that was there stays.
        """
        from safetensors.torch import save

        for name, parameter in self.avatar.named_parameters():
            if not torch.isfinite(parameter).all():
                raise self._diverged(f"'{name}' holds values that are not finite")
        tensors = {f"avatar/{name}": value for name, value in self.avatar.state_dict().items()}
        for name, _, state in self._optimiser_states():
            tensors |= {f"adam/{name}/{key}": value for key, value in state.items()}
        tensors |= {"density/gradients": self._density.gradients, "density/views": self._density.views}
        described = {
            **self._identity(),
            "step": self.step_count,
            "seconds": self.seconds,
            "losses": self._losses,
            "log": [asdict(entry) for entry in self.log],
        }
        ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        described["sha256"] = _checkpoint_digest(described, ready)
        write_atomic(folder / CHECKPOINT, save(ready, {"headcast": canonical_json(described)}))
        self._saved_step = self.step_count

    def resume(self, folder: Path) -> bool:
        """Continue from a checkpoint, if there is one; returns whether there was.

        Raises:
            StageError: it is damaged, of another schema, or was made with another head, clip or other settings.
        """
        from safetensors import SafetensorError, safe_open

        path = folder / CHECKPOINT
        if not path.exists():
            return False
        restart = f"delete '{path}' to train from the start"
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                described = dict(json.loads((file.metadata() or {})["headcast"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            for name, value in self._identity().items():
                if described.get(name) != value:
                    raise StageError(
                        f"The checkpoint '{path}' has {name} {described.get(name)}, this run {value}.", restart
                    )
            if described.pop("sha256", None) != _checkpoint_digest(described, tensors):
                raise ValueError("its bytes were changed")
            self._go_on(described, tensors)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise StageError(f"The checkpoint '{path}' cannot be read: {error}.", restart) from error
        return True

    def _go_on(self, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        weights = {name.removeprefix("avatar/"): v for name, v in tensors.items() if name.startswith("avatar/")}
        count = len(tensors["density/views"])
        if count != self.avatar.count:
            self.avatar.take_rows(torch.zeros(count, dtype=torch.int64, device=self.device))
        self.avatar.load_state_dict(weights)
        self.avatar.at_step(described["step"], self.config.steps)
        for name, _, state in self._optimiser_states():
            state.update({key: tensors[f"adam/{name}/{key}"] for key in state})
        self._density.gradients, self._density.views = tensors["density/gradients"], tensors["density/views"]
        self.step_count = described["step"]
        self.seconds = described["seconds"]
        self.log = [Entry(**entry) for entry in described["log"]]
        self._losses = described["losses"]
        self._saved_step = self.step_count

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that resumes from it; the avatar model is among the settings."""
        settings = flat(self.config.keyed(), "train.")
        return {"schema": CHECKPOINT_SCHEMA, "head": self.head, "clip": self._clip, **dict(settings)}

    def _diverged(self, cause: str) -> StageError:
        kept = "" if self._saved_step is None else f"the last good checkpoint, of step {self._saved_step}, is kept; "
        return StageError(
            f"Training diverged at step {self.step_count + 1}: {cause}.",
            f"{kept}try another --set train.seed, or fewer train.gaussians",
        )

    def _optimiser_states(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor]]]:
        """Adam's state of each parameter under a stable name, made if there is none yet."""
        for group in self._groups:
            for i, parameter in enumerate(group.parameters):
                state = self._optimisers[group.sphere].state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
                    state["exp_avg"] = torch.zeros_like(parameter.data)
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data)
                yield f"{group.name}/{i}", parameter, state

    def _change_density(self, opacities: Tensor) -> None:
        """Add and take away Gaussians, with their optimiser's states, where it is time to; then reset opacities."""
        if self._density.due(self.step_count):
            index = self._density.change(self.avatar, opacities, self.step_count)
            opacities = opacities[index]
            axes = self.avatar.row_axes()
            named = {id(parameter): name for name, parameter in self.avatar.named_parameters()}
            for _, parameter, state in self._optimiser_states():
                axis = axes.get(named[id(parameter)])
                if axis is not None:
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = state[key].index_select(axis, index)
        if self._density.reset_due(self.step_count):
            self._density.reset(self.avatar, opacities)
            for _, parameter, state in self._optimiser_states():
                if parameter is self.avatar.get_parameter("opacity_logits"):
                    state["exp_avg"].zero_()
                    state["exp_avg_sq"].zero_()

    def _frame_at(self, step: int) -> int:
        """Every frame once in each pass over the clip, in an order of its own."""
        validating = step < self._validated_steps
        first, count = (0, self._count - self._kept_back) if validating else (self._validated_steps, self._count)
        turn, position = divmod(step - first, count)
        return int(_shuffled(self.config.seed, first, turn, count)[position])

    def _background_at(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.config.seed, 2, step])
        random = rng.random() < self.config.random_background
        color = rng.random(3, dtype=np.float32) if random else np.ones(3, np.float32)
        return torch.from_numpy(color).to(self.device)


def resolve_device(name: str) -> torch.device:
    """The device meant by `auto`, `cpu` or `cuda`; `auto` takes CUDA where it is there.

    Raises:
        StageError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise StageError("There is no CUDA device here.", "run with --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _optimisers(groups: list[ParameterGroup]) -> dict[bool, torch.optim.Optimizer]:
    """Adam, under True for parameters on the sphere and under False for all others."""

    def settings(sphere: bool) -> list[dict[str, Any]]:
        return [{"name": g.name, "params": g.parameters, "lr": g.rate} for g in groups if g.sphere == sphere]

    made: dict[bool, torch.optim.Optimizer] = {False: torch.optim.Adam(settings(False), eps=1e-15, fused=True)}
    if settings(True):
        from geoopt.optim import RiemannianAdam

        made[True] = RiemannianAdam(settings(True), eps=1e-15)
    return made


@functools.lru_cache(maxsize=2)
def _shuffled(seed: int, first: int, turn: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 1, first, turn]).permutation(count)


def _checkpoint_digest(described: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hash over all of a checkpoint, which its format has none of."""
    digest = hashlib.sha256(canonical_json(described).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(data: TrainingData) -> str:
    """Fingerprint of the training frames and their conditions."""
    digest = hashlib.sha256()
    arrays = [data.images, data.alphas, data.Ks, data.identity, *(value.numpy() for value in data.conditions)]
    for array in [*arrays, *(part for part in (data.confidences,) if part is not None)]:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


class _Level:
    """The training frames at one resolution, as bytes."""

    def __init__(
        self, images: Tensor, alphas: Tensor, Ks: Tensor, inside: Tensor | None, confidences: Tensor | None
    ) -> None:
        self.images, self.alphas, self.Ks, self.inside, self.confidences = images, alphas, Ks, inside, confidences
        self.size = images.shape[1]

    def over(self, frame: int, background: Tensor) -> Tensor:
        """[R,R,3] of a frame over a colour; what is over white changes by what shines through."""
        image = self.images[frame].float() / 255
        through = 1 - self.alphas[frame].float() / 255
        return image + through[..., None] * (background - 1)

    def weight(self, frame: int) -> Tensor | None:
        """[R,R] what each pixel of a frame counts in the loss; None where all count alike."""
        if self.confidences is None:
            return None
        return GUESSED_WEIGHT + (1 - GUESSED_WEIGHT) / 255 * self.confidences[frame].float()

    def cut(self, image: Tensor, camera: int, background: Tensor) -> Tensor:
        """A camera's render [R,R,3] with the background where the frame does not reach, as in the pictures."""
        if self.inside is None:
            return image
        return background + self.inside[camera, ..., None] * (image - background)

    def halved(self) -> _Level:
        """Means of 2 x 2 pixels."""

        def half(values: Tensor) -> Tensor:
            n, size = values.shape[:2]
            blocks = values.view(n, size // 2, 2, size // 2, 2, -1)
            # By row of blocks: a sum over all bytes at once would take eight times their memory.
            means = torch.stack(
                [(block.sum((1, 3), dtype=torch.int32) + 2).div(4, rounding_mode="floor") for block in blocks]
            )
            return means.to(torch.uint8).view(n, size // 2, size // 2, *values.shape[3:])

        shrink = torch.diag(torch.tensor([0.5, 0.5, 1], dtype=self.Ks.dtype, device=self.Ks.device))
        inside = None if self.inside is None else torch.nn.functional.avg_pool2d(self.inside, 2)
        confidences = None if self.confidences is None else half(self.confidences)
        return _Level(half(self.images), half(self.alphas), shrink @ self.Ks, inside, confidences)
