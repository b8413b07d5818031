"""Colours from spherical harmonics for the CPU backend: numba kernels with hand-written gradients, float32.

The mathematics is that of `reference.sh_to_colors`; arrays and the work of the team are as in
`pipeline.rasterize.kernels`. A lane is a Gaussian. All 16 bases of degree 3 are evaluated whatever the degree: what
takes time is to fetch the coefficients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.rasterize import check_finite, team
from pipeline.rasterize.simd import (
    LANES,
    at,
    bits,
    gather,
    lane_index,
    load,
    maximum,
    scatter,
    select,
    sqrt,
    store,
    sums,
)
from pipeline.rasterize.team import counters, done, floats, int64s, integer, kernel, take, wait

Floats = np.ndarray  # float32
Ints = np.ndarray

INLINED_SOURCES = "bfa23c98c280a9bd"
"""As in `pipeline.rasterize.kernels`."""

GAUSSIANS_PER_CHUNK = 512
BASES = 16

_f = np.float32
_ZERO, _HALF, _ONE, _TWO, _THREE = _f(0.0), _f(0.5), _f(1.0), _f(2.0), _f(3.0)
_TINY = _f(1e-12)
"""A direction is divided by its length or this, whichever is greater, as by torch.nn.functional.normalize."""

# Factors of the bases, named by degree and absolute order; the three of degree 1 are alike.
_Y00 = _f(math.sqrt(1 / math.pi) / 2)
_Y1 = _f(math.sqrt(3 / math.pi) / 2)
_Y20, _Y21, _Y22 = (_f(math.sqrt(s / math.pi) / 4) for s in (5, 60, 15))
_Y30, _Y31, _Y32, _Y33 = (_f(math.sqrt(s / math.pi) / 4) for s in (7, 21 / 2, 105, 35 / 2))

_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def _direction(means: Floats, center: Floats, first: int, count: int) -> Any:
    """Unit vector (x, y, z) from the camera to each of 16 Gaussians, and what it was multiplied by."""
    x = gather(means, 3, 0, first, count) - center[0]
    y = gather(means, 3, 1, first, count) - center[1]
    z = gather(means, 3, 2, first, count) - center[2]
    inverse = _ONE / maximum(sqrt(x * x + y * y + z * z), _TINY)
    return x * inverse, y * inverse, z * inverse, inverse


@_jit
def _evaluate(x: Any, y: Any, z: Any, bases: Floats) -> None:
    """`reference.sh_bases` [BASES,LANES] of degree 3 at 16 directions."""
    zz, xy, xx_yy = z * z, _TWO * x * y, x * x - y * y
    axial = (_ONE - _f(5.0) * zz) * _Y31
    for k, basis in enumerate(
        (
            zz * _ZERO + _Y00,
            -(y * _Y1),
            z * _Y1,
            -(x * _Y1),
            xy * _Y22,
            -(y * z * _Y21),
            (_THREE * zz - _ONE) * _Y20,
            -(x * z * _Y21),
            xx_yy * _Y22,
            -((x * xy + y * xx_yy) * _Y33),
            z * xy * _Y32,
            y * axial,
            z * (_f(5.0) * zz - _THREE) * _Y30,
            x * axial,
            z * xx_yy * _Y32,
            -((x * xx_yy - y * xy) * _Y33),
        )
    ):
        store(bases, LANES * k, basis)


@_jit
def _evaluate_backward(x: Any, y: Any, z: Any, v_bases: Floats) -> Any:
    """The gradient (x, y, z) of `_evaluate`."""
    b1, b2, b3 = load(v_bases, LANES), load(v_bases, 2 * LANES), load(v_bases, 3 * LANES)
    b4, b5, b6 = load(v_bases, 4 * LANES), load(v_bases, 5 * LANES), load(v_bases, 6 * LANES)
    b7, b8, b9 = load(v_bases, 7 * LANES), load(v_bases, 8 * LANES), load(v_bases, 9 * LANES)
    b10, b11, b12 = load(v_bases, 10 * LANES), load(v_bases, 11 * LANES), load(v_bases, 12 * LANES)
    b13, b14, b15 = load(v_bases, 13 * LANES), load(v_bases, 14 * LANES), load(v_bases, 15 * LANES)
    zz, xy, xx_yy = z * z, _TWO * x * y, x * x - y * y
    axial = (_ONE - _f(5.0) * zz) * _Y31
    v_axial = y * b11 + x * b13
    v_xy = b4 * _Y22 + z * b10 * _Y32 - (x * b9 - y * b15) * _Y33
    v_xx_yy = b8 * _Y22 + z * b14 * _Y32 - (y * b9 + x * b15) * _Y33
    v_zz = b6 * (_THREE * _Y20) + z * b12 * (_f(5.0) * _Y30) - v_axial * (_f(5.0) * _Y31)
    v_x = axial * b13 + _TWO * (y * v_xy + x * v_xx_yy) - b3 * _Y1 - z * b7 * _Y21 - (xy * b9 + xx_yy * b15) * _Y33
    v_y = axial * b11 + _TWO * (x * v_xy - y * v_xx_yy) - b1 * _Y1 - z * b5 * _Y21 - (xx_yy * b9 - xy * b15) * _Y33
    v_z = (
        _TWO * z * v_zz
        + b2 * _Y1
        - (y * b5 + x * b7) * _Y21
        + (xy * b10 + xx_yy * b14) * _Y32
        + (_f(5.0) * zz - _THREE) * b12 * _Y30
    )
    return v_x, v_y, v_z


@_jit
def _finite(values: Floats, start: int, stop: int) -> bool:
    """Whether values[start:stop] are all finite."""
    poison = lane_index() * _ZERO
    whole = stop - (stop - start) % LANES
    for i in range(start, whole, LANES):
        poison = poison + load(values, i) * _ZERO  # NaN where the value is not finite
    for i in range(whole, stop):
        poison = poison + at(values, i) * _ZERO
    return bits(poison >= _ZERO) == 0xFFFF


@_jit
def _forward(
    sync: Ints,
    means: Floats,  # [N,3]
    center: Floats,  # [3]
    coefficients: Floats,  # [N,K,3]
    values: Floats,  # [N,3]
    colors: Floats,  # [N,3]
    flags: Ints,  # [1]
    used: int,
) -> None:
    """Colours by the first `used` bases, and their `values` before the clamp.

    `flags[0]` is raised where a coefficient is not finite, be it used or not.
    """
    n = means.size // 3
    width = coefficients.size // n if n else 0
    chunks = (n + GAUSSIANS_PER_CHUNK - 1) // GAUSSIANS_PER_CHUNK
    bases = np.empty(BASES * LANES, np.float32)
    while True:
        chunk = take(sync, 0, chunks)
        if chunk < 0:
            break
        start, stop = chunk * GAUSSIANS_PER_CHUNK, min(n, (chunk + 1) * GAUSSIANS_PER_CHUNK)
        for i in range(start, stop, LANES):
            if not _finite(coefficients, width * i, width * min(i + LANES, stop)):
                flags[0] = 1
            x, y, z, _ = _direction(means, center, i, n)
            _evaluate(x, y, z, bases)
            for c in range(3):
                value = lane_index() * _ZERO + _HALF
                for k in range(used):
                    value = value + load(bases, LANES * k) * gather(coefficients, width, 3 * k + c, i, n)
                scatter(values, 3, c, i, n, value)
                scatter(colors, 3, c, i, n, maximum(_ZERO, value))  # in this order NaN stays
        done(sync, 0)
    wait(sync, 0, chunks)


@_jit
def _backward(
    sync: Ints,
    means: Floats,  # [N,3]
    center: Floats,  # [3]
    coefficients: Floats,  # [N,K,3]
    values: Floats,  # [N,3]
    v_colors: Floats,  # [N,3]
    v_coefficients: Floats,  # [N,K,3]
    v_means: Floats,  # [N,3], or empty where it is not wanted
    shares: Floats,  # [chunks,3]
    used: int,
) -> None:
    """Gradients of `_forward`. `shares` [chunks,3] gets each chunk's sum of `v_means`: the centre's gradient is minus
    the sum of all."""
    n = means.size // 3
    width = coefficients.size // n if n else 0
    chunks = (n + GAUSSIANS_PER_CHUNK - 1) // GAUSSIANS_PER_CHUNK
    bases = np.empty(BASES * LANES, np.float32)
    v_bases = np.zeros(BASES * LANES, np.float32)
    v_values = np.empty(3 * LANES, np.float32)
    partial = np.empty(LANES, np.float32)
    while True:
        chunk = take(sync, 0, chunks)
        if chunk < 0:
            break
        start, stop = chunk * GAUSSIANS_PER_CHUNK, min(n, (chunk + 1) * GAUSSIANS_PER_CHUNK)
        if 3 * used < width:
            v_coefficients[width * start : width * stop] = _ZERO
        zero = lane_index() * _ZERO
        total_x, total_y, total_z = zero, zero, zero
        for i in range(start, stop, LANES):
            x, y, z, inverse = _direction(means, center, i, n)
            _evaluate(x, y, z, bases)
            for c in range(3):
                passes = gather(values, 3, c, i, n) >= _ZERO
                store(v_values, LANES * c, select(passes, gather(v_colors, 3, c, i, n), _ZERO))
            for k in range(used):
                basis, v_basis = load(bases, LANES * k), zero
                for c in range(3):
                    v_value = load(v_values, LANES * c)
                    scatter(v_coefficients, width, 3 * k + c, i, n, basis * v_value)
                    v_basis = v_basis + v_value * gather(coefficients, width, 3 * k + c, i, n)
                store(v_bases, LANES * k, v_basis)
            if not v_means.size:
                continue
            v_x, v_y, v_z = _evaluate_backward(x, y, z, v_bases)
            # What would lengthen a direction has no effect, as it is normalised; closer than _TINY it is not.
            along = select(inverse < _ONE / _TINY, x * v_x + y * v_y + z * v_z, _ZERO)
            v_x, v_y, v_z = (v_x - x * along) * inverse, (v_y - y * along) * inverse, (v_z - z * along) * inverse
            scatter(v_means, 3, 0, i, n, v_x)
            scatter(v_means, 3, 1, i, n, v_y)
            scatter(v_means, 3, 2, i, n, v_z)
            # Surplus lanes repeat the last Gaussian and must not count twice.
            alive = lane_index() < _f(n - i)
            total_x = total_x + select(alive, v_x, _ZERO)
            total_y = total_y + select(alive, v_y, _ZERO)
            total_z = total_z + select(alive, v_z, _ZERO)
        store(partial, 0, sums((total_x, total_y, total_z)))
        shares[3 * chunk : 3 * chunk + 3] = partial[:3]
        done(sync, 0)
    wait(sync, 0, chunks)


@kernel
def evaluate_sh(job: Any) -> None:
    """Colours of spherical harmonics."""
    _forward(
        counters(job), floats(job, 0), floats(job, 1), floats(job, 2), floats(job, 3), floats(job, 4), int64s(job, 5),
        integer(job, 6),
    )  # fmt: skip


@kernel
def evaluate_sh_backward(job: Any) -> None:
    """Gradients of `evaluate_sh`."""
    _backward(
        counters(job), floats(job, 0), floats(job, 1), floats(job, 2), floats(job, 3), floats(job, 4), floats(job, 5),
        floats(job, 6), floats(job, 7), integer(job, 8),
    )  # fmt: skip


class _Harmonics(torch.autograd.Function):
    """Colours [N,3] of coefficients [N,K,3] at means [N,3], seen from the camera's centre [3]."""

    @staticmethod
    def forward(
        ctx: Any, means: Tensor, center: Tensor, coefficients: Tensor, used: int, threads: int | None
    ) -> Tensor:
        means, center, coefficients = means.contiguous(), center.contiguous(), coefficients.contiguous()
        values, colors, flags = torch.empty_like(means), torch.empty_like(means), torch.zeros(1, dtype=torch.int64)
        team.run(evaluate_sh, threads, means, center, coefficients, values, colors, flags, used)
        if int(flags):
            check_finite(colors=coefficients)
        ctx.save_for_backward(means, center, coefficients, values)
        ctx.used, ctx.threads = used, threads
        return colors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_colors: Tensor) -> tuple[Tensor | None, ...]:
        means, center, coefficients, values = ctx.saved_tensors
        wants_means = any(ctx.needs_input_grad[:2])  # the centre's gradient is made of theirs
        v_coefficients, v_means = torch.empty_like(coefficients), torch.empty_like(means if wants_means else means[:0])
        shares = means.new_empty(-(-len(means) // GAUSSIANS_PER_CHUNK), 3)
        team.run(
            evaluate_sh_backward, ctx.threads, means, center, coefficients, values, v_colors.contiguous(),
            v_coefficients, v_means, shares, ctx.used,
        )  # fmt: skip
        if not wants_means:
            return None, None, v_coefficients, None, None
        return v_means, -shares.sum(dim=0), v_coefficients, None, None


def sh_to_colors(degree: int, means: Tensor, coefficients: Tensor, viewmat: Tensor, threads: int | None) -> Tensor:
    """Colours [N,3] of SH coefficients [N,>=(degree+1)^2,3] seen from the camera: max(SH + 0.5, 0).

    All tensors are float32 and on the CPU. Gradients reach means, coefficients and viewmat, and do not depend on the
    number of threads.

    Args:
        degree: 0 to 3. Coefficients beyond it are unused and get a gradient of zero.
        means: centres in world coordinates [N,3].
        coefficients: in the order of `reference.sh_bases`.
        viewmat: `T_cam_world` [4,4].
        threads: how many threads work; None takes torch.get_num_threads().

    Raises:
        ValueError: a coefficient is not finite; the message calls it `colors` and names its place.
    """
    center = -viewmat[:3, :3].T @ viewmat[:3, 3]
    return _Harmonics.apply(means, center, coefficients, (degree + 1) ** 2, threads)
