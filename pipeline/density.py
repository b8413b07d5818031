"""Density control: Gaussians are added where the picture asks for more, and taken away where they do nothing.

After Kerbl et al. 2023 (3D Gaussian splatting, section 5): a Gaussian whose place on the screen keeps pulling hard is
cloned if it is small and split if it is large; faint and huge ones go; opacities are reset from time to time. It works
on any avatar through `AvatarModel.row_axes`. Sizes are measured against the avatar itself, not against how far the
camera travels: before a head that hardly moves, that would be nothing, and everything would be too large.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.avatars import AvatarModel
from pipeline.geometry import quaternion_to_matrix
from pipeline.rasterize import Render

if TYPE_CHECKING:
    from pipeline.config import DensityConfig

# A split Gaussian's children are smaller by this.
_SPLIT_SHRINK = 1.6


class DensityControl:
    """What is known about each of N Gaussians since the last change.

    Attributes:
        gradients: [N] sum of the norms of the gradient by the place on the screen, in units of half the picture.
        views: [N] in how many renders a Gaussian was seen.
    """

    def __init__(self, config: DensityConfig, count: int, seed: int, device: torch.device) -> None:
        self.config, self._seed = config, seed
        self.gradients = torch.zeros(count, device=device)
        self.views = torch.zeros(count, device=device)

    @torch.no_grad()
    def observe(self, render: Render, size: int) -> None:
        """Take in a render of `size` pixels a side whose means2d kept their gradient, after its backward pass."""
        assert render.means2d.grad is not None
        seen = render.radii.reshape(-1) > 0
        norms = render.means2d.grad.reshape(-1, 2).norm(dim=1) * (size / 2)
        self.gradients += torch.where(seen, norms, 0)
        self.views += seen

    def due(self, step: int) -> bool:
        """Whether Gaussians are to be changed after `step` steps."""
        config = self.config
        return config.every > 0 and config.first <= step <= config.last and step % config.every == 0

    def reset_due(self, step: int) -> bool:
        """Whether opacities are to be reset after `step` steps."""
        config = self.config
        return config.every > 0 and config.reset_every > 0 and step <= config.last and step % config.reset_every == 0

    @torch.no_grad()
    def change(self, avatar: AvatarModel, opacities: Tensor, step: int) -> Tensor:
        """Clone, split and take away Gaussians; returns the rows [M] that the new ones come from.

        Each new Gaussian inherits all of its parent's rows; the optimiser's states are to be taken by the same index.

        Args:
            avatar: whose Gaussians; it has M of them afterwards.
            opacities: [N] as they were rendered last.
            step: steps done, which also seeds where children go.
        """
        config = self.config
        log_scales = avatar.get_parameter("log_scales")
        sizes = torch.exp(log_scales).amax(1)
        extent = extent_of(avatar.get_parameter("means"))
        keep = opacities >= config.min_opacity
        if config.reset_every and step > config.reset_every:
            keep &= sizes <= config.max_size_share * extent
        if not keep.any():  # an avatar of nothing learns nothing more
            keep = opacities == opacities.max()
        pull = torch.where(keep, self.gradients / self.views.clamp(min=1), 0)
        wanted = pull >= config.gradient
        room = max(config.max_gaussians - int(keep.sum()), 0)
        if int(wanted.sum()) > room:
            strongest = torch.argsort(pull, descending=True, stable=True)[:room]
            wanted = torch.zeros_like(wanted)
            wanted[strongest] = True
        split = wanted & (sizes > config.dense_share * extent)
        clone = wanted & ~split
        parts = [torch.nonzero(mask).squeeze(1) for mask in (keep & ~split, clone, split, split)]
        index = torch.cat(parts)
        avatar.take_rows(index)
        self._part(avatar, len(parts[0]) + len(parts[1]), step)
        self.gradients, self.views = (torch.zeros(len(index), device=index.device) for _ in range(2))
        return index

    def _part(self, avatar: AvatarModel, first: int, step: int) -> None:
        """Put the Gaussians from `first` on, the children of splits, at random places inside their parents."""
        means, quats, log_scales = (avatar.get_parameter(name) for name in ("means", "quats", "log_scales"))
        rng = np.random.default_rng([self._seed, 3, step])
        noise = rng.standard_normal((len(means) - first, 3), np.float32)
        offsets = torch.exp(log_scales[first:]) * torch.from_numpy(noise).to(means.device)
        turned = quaternion_to_matrix(torch.nn.functional.normalize(quats[first:], dim=1)) @ offsets[..., None]
        means[first:] += turned.squeeze(-1)
        log_scales[first:] -= math.log(_SPLIT_SHRINK)

    @torch.no_grad()
    def reset(self, avatar: AvatarModel, opacities: Tensor) -> None:
        """Lower what was rendered above `reset_opacity` to it, through the logits that every render adds.

        Args:
            avatar: whose `opacity_logits`.
            opacities: [N] as they were rendered last.
        """
        highest = math.log(self.config.reset_opacity / (1 - self.config.reset_opacity))
        too_much = (torch.logit(opacities, eps=1e-6) - highest).clamp(min=0)
        avatar.get_parameter("opacity_logits").sub_(too_much)


def extent_of(means: Tensor) -> float:
    """How large an avatar is: distance of its Gaussians [N,3] from their middle that one in twenty exceeds."""
    return float(torch.quantile((means - means.median(0).values).norm(dim=1), 0.95))
