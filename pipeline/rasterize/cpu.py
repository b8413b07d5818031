"""CPU backend: numba kernels with explicit SIMD and hand-written gradients, float32.

The first call compiles for some seconds; numba keeps the result beside the source, or in the user's cache directory
where that cannot be written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.rasterize import check_camera, check_finite, kernels, team
from pipeline.rasterize.reference import sh_to_colors
from pipeline.rasterize.simd import LANES


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    *,
    background: Tensor | None,
    sh_degree: int | None,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image, alpha, means2d, radii and depths of the arguments of `pipeline.rasterize.rasterize`.

    Raises:
        TypeError: the tensors are not float32.
        ValueError: the tensors are not on the CPU, or not finite.
    """
    if means.dtype != torch.float32:
        raise TypeError(f"means is {means.dtype}; the cpu backend wants float32 (the reference backend takes any)")
    if means.device.type != "cpu":
        raise ValueError(f"means is on {means.device}; the cpu backend wants the CPU")
    check_camera(viewmat, K)
    check_finite(background=background)
    with torch.no_grad():
        log2_opacities = torch.log2(opacities)
    means2d, conics, depths, radii, extents, finite = _Project.apply(
        means, quats, scales, opacities, log2_opacities, viewmat, K, width, height, threads
    )
    if not finite:
        check_finite(means=means, quats=quats, scales=scales, opacities=opacities)
    if sh_degree is not None:
        colors = sh_to_colors(sh_degree, means, colors, viewmat)
    if not torch.isfinite(colors.detach().sum()):
        check_finite(colors=colors)

    bins = _bin(means2d, depths, radii, extents, width, height, threads)
    images, alpha = [], None
    for first in range(0, colors.shape[1], 3):
        channels = colors[:, first : first + 3]
        missing = 3 - channels.shape[1]
        behind = colors.new_zeros(3) if background is None else background[first : first + 3]
        if missing:
            channels = torch.nn.functional.pad(channels, (0, missing))
            behind = torch.nn.functional.pad(behind, (0, 3 - len(behind)))
        image, this_alpha = _Composite.apply(
            means2d, conics, opacities, channels, behind, log2_opacities, bins, threads
        )
        images.append(image[..., : 3 - missing] if missing else image)
        alpha = this_alpha if alpha is None else alpha
    if alpha is None:
        raise ValueError(f"colors has shape {list(colors.shape)}; expected at least one channel")
    image = images[0] if len(images) == 1 else torch.cat(images, dim=-1)
    return image, alpha, means2d, radii.int(), depths


def _flat(tensor: Tensor) -> np.ndarray:
    """The tensor's values as a flat array, without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).numpy()


def _empty(size: int) -> np.ndarray:
    """An uninitialised float32 array; torch's begin with a cache line, numpy's do not."""
    return torch.empty(size, dtype=torch.float32).numpy()


class _Project(torch.autograd.Function):
    """means2d, conics, depths (differentiable) and radii, extents, all-finite (not) of 3D Gaussians."""

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        quats: Tensor,
        scales: Tensor,
        opacities: Tensor,
        log2_opacities: Tensor,
        viewmat: Tensor,
        K: Tensor,
        width: int,
        height: int,
        threads: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool]:
        n = len(means)
        camera = np.empty(kernels.CAMERA, np.float32)
        camera[:9] = viewmat.detach()[:3, :3].reshape(-1).numpy()
        camera[9:12] = viewmat.detach()[:3, 3].numpy()
        camera[12:] = float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2]), width, height
        means2d, conics, depths = means.new_empty(n, 2), means.new_empty(n, 3), means.new_empty(n)
        radii, extents = means.new_empty(n), means.new_empty(n, 2)
        flags = np.zeros(1, np.int64)
        if n:
            team.run(
                kernels.project_forward, threads, _flat(means), _flat(quats), _flat(scales), _flat(log2_opacities),
                _flat(opacities), camera, _flat(means2d), _flat(conics), _flat(depths), _flat(radii), _flat(extents),
                flags,
            )  # fmt: skip
        ctx.save_for_backward(means, quats, scales, conics, radii)
        ctx.camera, ctx.threads = camera, threads
        ctx.mark_non_differentiable(radii, extents)
        return means2d, conics, depths, radii, extents, not flags[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_means2d: Tensor, v_conics: Tensor, v_depths: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        means, quats, scales, conics, radii = ctx.saved_tensors
        n = len(means)
        v_means, v_quats, v_scales = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (means, quats, scales)
        )
        shares = means.new_zeros(-(-n // kernels.GAUSSIANS_PER_CHUNK), 12)
        if n:
            team.run(
                kernels.project_backward, ctx.threads, _flat(means), _flat(quats), _flat(scales), ctx.camera,
                _flat(conics), _flat(radii), _flat(v_means2d), _flat(v_conics), _flat(v_depths),
                _flat(v_means), _flat(v_quats), _flat(v_scales), _flat(shares),
            )  # fmt: skip
        v_viewmat = None
        if ctx.needs_input_grad[5]:
            total = shares.sum(dim=0)
            v_viewmat = means.new_zeros(4, 4)
            v_viewmat[:3, :3], v_viewmat[:3, 3] = total[:9].view(3, 3), total[9:]
        return v_means, v_quats, v_scales, None, None, v_viewmat, None, None, None, None


@dataclass(frozen=True)
class _Bins:
    """Which Gaussians meet which tile, in depth order; see `kernels.bin_tiles`."""

    width: int
    height: int
    order: np.ndarray
    boxes: np.ndarray
    cursors: np.ndarray
    slot_starts: np.ndarray
    offsets: np.ndarray
    totals: np.ndarray


def _bin(
    means2d: Tensor, depths: Tensor, radii: Tensor, extents: Tensor, width: int, height: int, threads: int | None
) -> _Bins:
    n = len(means2d)
    tiles = -(-width // kernels.TILE) * -(-height // kernels.TILE)
    bins = _Bins(
        width,
        height,
        order=np.empty(n, np.int32),
        boxes=np.empty(4 * n, np.int32),
        cursors=np.empty((kernels.PARTS, tiles), np.int64),
        slot_starts=np.empty(n + 1, np.int64),
        offsets=np.empty(tiles + 1, np.int64),
        totals=np.zeros(3 + kernels.PARTS, np.int64),
    )
    team.run(
        kernels.bin_tiles, threads, _flat(means2d), _flat(depths), _flat(radii), _flat(extents), width, height,
        bins.order, bins.boxes, bins.cursors, bins.slot_starts, bins.offsets, bins.totals,
    )  # fmt: skip
    return bins


class _Composite(torch.autograd.Function):
    """Image [H,W,3] and alpha [H,W] of projected Gaussians."""

    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        conics: Tensor,
        opacities: Tensor,
        colors: Tensor,
        background: Tensor,
        log2_opacities: Tensor,
        bins: _Bins,
        threads: int | None,
    ) -> tuple[Tensor, Tensor]:
        visible, entries = int(bins.totals[0]), int(bins.totals[1])
        rows = _empty(kernels.ROW * visible)
        entry_rows, entry_slots = np.empty(entries, np.int32), np.empty(entries, np.int32)
        entry_masks = np.empty(entries, np.uint16)
        slot_starts = bins.slot_starts.copy()
        image, alpha = means2d.new_empty(bins.height, bins.width, 3), means2d.new_empty(bins.height, bins.width)
        team.run(
            kernels.composite_forward, threads, _flat(means2d), _flat(conics), _flat(log2_opacities), _flat(colors),
            _flat(background), bins.width, bins.height, bins.order, bins.boxes, bins.cursors.copy(), slot_starts,
            bins.offsets, bins.totals, rows, entry_rows, entry_slots, entry_masks, _flat(image), _flat(alpha),
        )  # fmt: skip
        ctx.save_for_backward(conics, opacities, image, alpha)
        ctx.bins, ctx.threads = bins, threads
        ctx.entries = slot_starts, rows, entry_rows, entry_slots, entry_masks
        return image, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_image: Tensor, v_alpha: Tensor) -> tuple[Tensor | None, ...]:
        conics, opacities, image, alpha = ctx.saved_tensors
        bins: _Bins = ctx.bins
        slot_starts, rows, entry_rows, entry_slots, entry_masks = ctx.entries
        n = len(opacities)
        v_means2d, v_conics, v_opacities = conics.new_zeros(n, 2), conics.new_zeros(n, 3), conics.new_zeros(n)
        v_colors = conics.new_zeros(n, 3)
        slots = _empty(LANES * len(entry_rows))
        team.run(
            kernels.composite_backward, ctx.threads, _flat(conics), _flat(opacities), bins.width, bins.height,
            bins.order, slot_starts, bins.offsets, bins.totals, rows, entry_rows, entry_slots, entry_masks,
            _flat(image), _flat(alpha), _flat(v_image), _flat(v_alpha), slots,
            _flat(v_means2d), _flat(v_conics), _flat(v_opacities), _flat(v_colors),
        )  # fmt: skip
        v_background = None
        if ctx.needs_input_grad[4]:
            v_background = torch.einsum("hw,hwc->c", 1 - alpha, v_image)
        return v_means2d, v_conics, v_opacities, v_colors, v_background, None, None, None
