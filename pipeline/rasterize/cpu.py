"""CPU backend: numba kernels with explicit SIMD and hand-written gradients, float32.

The first call compiles for some seconds; numba keeps the result beside the source, or in the user's cache directory
where that cannot be written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.rasterize import Outputs, check_finite, kernels, team
from pipeline.rasterize.harmonics import sh_to_colors
from pipeline.rasterize.reference import ALPHA_FLOOR
from pipeline.rasterize.simd import LANES


def warm_up(report: Callable[[str], None]) -> None:
    """Compile ahead what has not been compiled before on this machine; `report` is told if that takes a while."""
    team.compile_kernels(report)


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
    depth: bool,
    threads: int | None,
) -> Outputs:
    """Image, alpha, means2d, radii, depths and depth image of the arguments of `pipeline.rasterize.rasterize`.

    Raises:
        TypeError: the tensors are not float32.
        ValueError: the tensors are not on the CPU, or not finite.
    """
    if means.dtype != torch.float32:
        raise TypeError(f"means is {means.dtype}; the cpu backend wants float32 (the reference backend takes any)")
    if means.device.type != "cpu":
        raise ValueError(f"means is on {means.device}; the cpu backend wants the CPU")
    camera = _camera(viewmat, K, width, height)
    check_finite(background=background)
    if sh_degree is not None:
        colors = sh_to_colors(sh_degree, means, colors, viewmat, threads)
    scene = _Scene(camera, width, height, threads)
    means2d, conics, depths, radii = _Project.apply(means, quats, scales, opacities, colors, viewmat, scene)
    if not scene.finite:
        check_finite(means=means, quats=quats, scales=scales, opacities=opacities, colors=colors)
    channels = colors.shape[1]
    if channels == 0:
        raise ValueError(f"colors has shape {list(colors.shape)}; expected at least one channel")
    if depth:
        colors = torch.cat([colors, depths[:, None]], dim=-1)
        background = None if background is None else F.pad(background, (0, 1))
    images, alpha = [], None
    for first in range(0, colors.shape[1], 3):
        image, this_alpha = _Composite.apply(
            means2d, conics, opacities, _three(colors, first), _three(background, first), scene
        )
        images.append(image)
        alpha = this_alpha if alpha is None else alpha
    assert alpha is not None
    image = images[0] if len(images) == 1 else torch.cat(images, dim=-1)
    depth_image = image[..., channels] / alpha.clamp_min(ALPHA_FLOOR) if depth else None
    if image.shape[-1] != channels:
        image = image[..., :channels]
    return image, alpha, means2d, radii, depths, depth_image


def _three(values: Tensor | None, first: int) -> Tensor | None:
    """Three channels from `first` on, zeros where there are none."""
    if values is None or values.shape[-1] == 3:
        return values
    values = values[..., first : first + 3]
    return F.pad(values, (0, 3 - values.shape[-1]))


def _camera(viewmat: Tensor, K: Tensor, width: int, height: int) -> Tensor:
    """The packed camera of `kernels.CAMERA` floats."""
    rows, (row_u, row_v, row_w) = viewmat.tolist(), K.tolist()
    values = [*rows[0][:3], *rows[1][:3], *rows[2][:3], rows[0][3], rows[1][3], rows[2][3]]
    values += [row_u[0], row_v[1], row_u[2], row_v[2], width, height]
    if not math.isfinite(sum(values) + sum(rows[3]) + sum(row_u) + sum(row_v) + sum(row_w)):
        check_finite(viewmat=viewmat, K=K)
    if not (row_u[0] > 0 and row_v[1] > 0):
        raise ValueError(f"K has focal lengths {row_u[0]} and {row_v[1]}; expected both above 0")
    return torch.tensor(values, dtype=torch.float32)


@dataclass
class _Scene:
    """What a projection leaves for compositing, beside the values that carry gradients; see `kernels`."""

    camera: Tensor
    width: int
    height: int
    threads: int | None
    finite: bool = field(init=False)
    packed: Tensor = field(init=False)
    order: Tensor = field(init=False)
    boxes: Tensor = field(init=False)
    cursors: Tensor = field(init=False)
    first_slots: Tensor = field(init=False)
    offsets: Tensor = field(init=False)
    totals: Tensor = field(init=False)


class _Project(torch.autograd.Function):
    """means2d, conics, depths (differentiable) and radii of 3D Gaussians, which are sorted into tiles on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        quats: Tensor,
        scales: Tensor,
        opacities: Tensor,
        colors: Tensor,
        viewmat: Tensor,
        scene: _Scene,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = len(means)
        tiles = -(-scene.width // kernels.TILE) * -(-scene.height // kernels.TILE)
        means, quats, scales = means.contiguous(), quats.contiguous(), scales.contiguous()
        means2d, conics, depths, radii = (means.new_empty(shape) for shape in ((n, 2), (n, 3), n, n))
        scene.packed = means.new_empty(n, kernels.PACKED)
        scene.order, scene.boxes = (torch.empty(size, dtype=torch.int32) for size in (n, 4 * n))
        scene.cursors, scene.first_slots, scene.offsets, scene.totals, flags = (
            torch.empty(size, dtype=torch.int64) for size in (kernels.PARTS * tiles, n, tiles + 1, 2 + kernels.PARTS, 1)
        )
        flags[0] = 0
        team.run(
            kernels.prepare, scene.threads, means, quats, scales, opacities.contiguous(), colors.contiguous(),
            scene.camera, means2d, conics, depths, radii, scene.packed, flags, scene.order, scene.boxes, scene.cursors,
            scene.first_slots, scene.offsets, scene.totals, scene.width, scene.height,
        )  # fmt: skip
        scene.finite = not int(flags)
        ctx.save_for_backward(means, quats, scales, conics, radii)
        ctx.scene = scene
        pixel_radii = radii.int()
        ctx.mark_non_differentiable(pixel_radii)
        ctx.set_materialize_grads(False)
        return means2d, conics, depths, pixel_radii

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, v_means2d: Tensor | None, v_conics: Tensor | None, v_depths: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        means, quats, scales, conics, radii = ctx.saved_tensors
        n = len(means)
        v_means, v_quats, v_scales = torch.empty_like(means), torch.empty_like(quats), torch.empty_like(scales)
        shares = means.new_empty(-(-n // kernels.GAUSSIANS_PER_CHUNK), 12)
        team.run(
            kernels.project_backward, ctx.scene.threads, means, quats, scales, ctx.scene.camera, conics, radii,
            torch.zeros_like(means[:, :2]) if v_means2d is None else v_means2d.contiguous(),
            torch.zeros_like(conics) if v_conics is None else v_conics.contiguous(),
            means.new_empty(0) if v_depths is None else v_depths.contiguous(),
            v_means, v_quats, v_scales, shares,
        )  # fmt: skip
        v_viewmat = None
        if ctx.needs_input_grad[5]:
            total = shares.sum(dim=0)
            v_viewmat = means.new_zeros(4, 4)
            v_viewmat[:3, :3], v_viewmat[:3, 3] = total[:9].view(3, 3), total[9:]
        return v_means, v_quats, v_scales, None, None, v_viewmat, None


class _Composite(torch.autograd.Function):
    """Image [H,W,3] and alpha [H,W] of projected Gaussians."""

    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        conics: Tensor,
        opacities: Tensor,
        colors: Tensor,
        background: Tensor | None,
        scene: _Scene,
    ) -> tuple[Tensor, Tensor]:
        visible, entries = scene.totals[:2].tolist()
        rows = means2d.new_empty(kernels.ROW * visible)
        slot_starts = torch.empty(visible + 1, dtype=torch.int64)
        entry_rows, entry_slots = (torch.empty(entries, dtype=torch.int32) for _ in range(2))
        entry_masks = torch.empty(entries, dtype=torch.int16)
        image, alpha = means2d.new_empty(scene.height, scene.width, 3), means2d.new_empty(scene.height, scene.width)
        team.run(
            kernels.composite, scene.threads, scene.packed, colors.contiguous(),
            means2d.new_zeros(3) if background is None else background.contiguous(), scene.order, scene.boxes,
            scene.cursors, scene.first_slots, scene.offsets, scene.totals, rows, slot_starts, entry_rows, entry_slots,
            entry_masks, image, alpha, scene.width, scene.height,
        )  # fmt: skip
        ctx.save_for_backward(opacities, image, alpha)
        ctx.scene, ctx.entries = scene, (rows, slot_starts, entry_rows, entry_slots, entry_masks)
        ctx.set_materialize_grads(False)
        return image, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_image: Tensor | None, v_alpha: Tensor | None) -> tuple[Tensor | None, ...]:
        opacities, image, alpha = ctx.saved_tensors
        scene: _Scene = ctx.scene
        n = len(opacities)
        v_image = torch.zeros_like(image) if v_image is None else v_image.contiguous()
        gradients = image.new_empty(9 * n)
        v_means2d, v_conics, v_opacities, v_colors = gradients.split([2 * n, 3 * n, n, 3 * n])
        slots = _borrow(LANES * len(ctx.entries[2]))
        team.run(
            kernels.composite_backward, scene.threads, opacities.contiguous(), scene.order, scene.offsets, scene.totals,
            *ctx.entries, image, alpha, v_image, image.new_empty(0) if v_alpha is None else v_alpha.contiguous(), slots,
            v_means2d, v_conics, v_opacities, v_colors, scene.width, scene.height,
        )  # fmt: skip
        _give_back(slots)
        v_background = None
        if ctx.needs_input_grad[4]:
            v_background = torch.einsum("hw,hwc->c", 1 - alpha, v_image)
        return v_means2d.view(n, 2), v_conics.view(n, 3), v_opacities, v_colors.view(n, 3), v_background, None


_spare: list[Tensor] = []


def _borrow(size: int) -> Tensor:
    """Uninitialised float32 memory of at least this size, to be given back: fresh pages cost more than their use."""
    buffer = _spare.pop() if _spare else torch.empty(0)
    return buffer if len(buffer) >= size else torch.empty(size + size // 4)


def _give_back(buffer: Tensor) -> None:
    _spare.append(buffer)
