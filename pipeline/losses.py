"""The photometric loss of 3D Gaussian splatting: L1 and structural similarity (SSIM), as torch and as a fused kernel.

SSIM is that of Wang et al. 2004 with the window of the 3DGS code and gsplat: 11 x 11 Gaussian of sigma 1.5, zero
padding to the image's own size, C1 = 0.01^2, C2 = 0.03^2, images in [0, 1].
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.rasterize import team
from pipeline.rasterize.simd import LANES, absolute, at, load, put, select, store
from pipeline.rasterize.team import counters, done, doubles, floats, integer, kernel, take, wait

RADIUS = 5
C1, C2 = 0.01**2, 0.03**2
L1_WEIGHT, SSIM_WEIGHT = 0.8, 0.2

INLINED_SOURCES = "bfa23c98c280a9bd"
"""As in `pipeline.rasterize.kernels`."""

_taps = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / 1.5) ** 2)
TAPS = (_taps / _taps.sum()).astype(np.float32)
"""The window's 11 weights along one axis."""


def photometric_loss(
    image: Tensor,  # [H,W,C]
    target: Tensor,  # [H,W,C]
    *,
    l1: float = L1_WEIGHT,
    ssim: float = SSIM_WEIGHT,
    weight: Tensor | None = None,  # [H,W]
    backend: Literal["auto", "cpu", "reference"] = "auto",
    threads: int | None = None,
) -> Tensor:
    """`mean(weight * (l1 * |image - target| + ssim * (1 - SSIM)))`, a scalar (Kerbl et al. 2023, eq. 7).

    Args:
        image: rendered, in [0, 1].
        target: truth, in [0, 1]. It gets no gradient, nor does the weight.
        l1, ssim: weights of the two terms.
        weight: weight of each pixel; none is one everywhere. The mean is over all pixels, whatever their weight.
        backend: "cpu" is the fused kernel (float32), "reference" plain torch; "auto" takes the kernel where it can.
        threads: for the kernel; None takes torch.get_num_threads().

    Raises:
        ValueError: shapes that differ or have no pixels, or the kernel asked for another device.
        TypeError: the kernel asked for another dtype than float32.
    """
    if image.dim() != 3 or image.shape != target.shape or image.numel() == 0:
        raise ValueError(
            f"image has shape {list(image.shape)} and target {list(target.shape)}; expected the same [H, W, C]"
        )
    if weight is not None and weight.shape != image.shape[:2]:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected {list(image.shape[:2])}")
    fits = image.device.type == "cpu" and image.dtype == torch.float32
    if backend == "reference" or (backend == "auto" and not fits):
        return _reference(image, target.detach(), l1, ssim, None if weight is None else weight.detach())
    if backend not in ("auto", "cpu"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'cpu' or 'reference'")
    if image.dtype != torch.float32:
        raise TypeError(f"image is {image.dtype}; the cpu backend wants float32")
    for name, tensor in (("image", image), ("target", target), ("weight", weight)):
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; the cpu backend wants the CPU")
    return _Photometric.apply(image, target, weight, float(l1), float(ssim), threads)


def ssim_map(image: Tensor, target: Tensor) -> Tensor:
    """SSIM [H,W,C] at every pixel and channel of two images [H,W,C]."""
    channels = image.shape[-1]
    taps = torch.tensor(TAPS, dtype=image.dtype, device=image.device)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), padding=(RADIUS, 0), groups=channels)
        return F.conv2d(x, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), padding=(0, RADIUS), groups=channels)

    x, y = image.permute(2, 0, 1)[None], target.permute(2, 0, 1)[None]
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    values = ((2 * mean_x * mean_y + C1) * (2 * cov + C2)) / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))
    return values[0].permute(1, 2, 0)


def _reference(image: Tensor, target: Tensor, l1: float, ssim: float, weight: Tensor | None) -> Tensor:
    loss = l1 * (image - target).abs() + ssim * (1 - ssim_map(image, target))
    return (loss if weight is None else loss * weight[..., None]).mean()


class _Photometric(torch.autograd.Function):
    """The fused loss; the forward pass leaves the derivatives of SSIM by its three local moments of the image."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        target: Tensor,
        weight: Tensor | None,
        l1: float,
        ssim: float,
        threads: int | None,
    ) -> Tensor:
        height, width, channels = image.shape
        size = height * -(-width * channels // LANES) * LANES
        planes = image.new_empty(3 * size)
        moments = image.new_empty(3 * size if ctx.needs_input_grad[0] else 0)
        sums = image.new_empty(height, 2, dtype=torch.float64)
        team.run(
            loss_forward, threads, image.contiguous(), target.float().contiguous(),
            image.new_empty(0) if weight is None else weight.float().contiguous(), planes, moments, sums, *image.shape,
        )  # fmt: skip
        ctx.arrays = planes, moments
        ctx.shape, ctx.factors, ctx.threads = image.shape, (l1 / image.numel(), ssim / image.numel()), threads
        l1_sum, ssim_sum = sums.sum(dim=0).tolist()
        return image.new_tensor((l1 * l1_sum + ssim * ssim_sum) / image.numel())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_loss: Tensor) -> tuple[Tensor | None, ...]:
        planes, moments = ctx.arrays
        v_image = v_loss.new_empty(ctx.shape)
        scale = float(v_loss)
        factors = torch.tensor([scale * ctx.factors[0], -scale * ctx.factors[1]])
        team.run(loss_backward, ctx.threads, planes, moments, factors, v_image, *ctx.shape)
        return v_image, None, None, None, None, None


_f = np.float32
_ZERO, _ONE, _TWO, _HALF, _C1, _C2 = _f(0.0), _f(1.0), _f(2.0), _f(0.5), _f(C1), _f(C2)
_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def _forward(
    sync: np.ndarray,
    image: np.ndarray,  # [H,W,C]
    target: np.ndarray,  # [H,W,C]
    weights: np.ndarray,  # [H,W], or empty for one everywhere
    planes: np.ndarray,  # [3,H,R]
    moments: np.ndarray,  # [3,H,R], or empty where no gradient is wanted
    sums: np.ndarray,  # [H,2]
    height: int,
    width: int,
    channels: int,
) -> None:
    """Sums of the weighted |d| and 1 - SSIM per row [H,2], and what the backward pass needs.

    A row is flat, channels interleaved, so that a step of one pixel is `channels` floats. `planes` [3,H,R] gets image,
    target and weight; `moments` [3,H,R] the weighted derivatives of SSIM by the local means of x, x^2 and x y.
    Sum and difference of the images need four blurred planes where the images themselves would need five.
    """
    n = width * channels
    size = -(-n // LANES) * LANES
    pad = -(-RADIUS * channels // LANES) * LANES
    plane, stride = height * size, size + 2 * pad
    blurred = np.zeros(4 * stride, np.float32)
    row_sums = np.empty(2 * LANES, np.float32)
    while True:
        y = take(sync, 0, height)
        if y < 0:
            break
        here = y * size
        for first in (here, plane + here, 2 * plane + here):
            planes[first + n : first + size] = _ZERO
        planes[here : here + n] = image[y * n : (y + 1) * n]
        planes[plane + here : plane + here + n] = target[y * n : (y + 1) * n]
        here += 2 * plane
        if weights.size == 0:
            planes[here : here + n] = _ONE
        else:
            for x in range(width):
                for c in range(channels):
                    put(planes, here + x * channels + c, at(weights, y * width + x))
        done(sync, 0)
    wait(sync, 0, height)
    while True:
        y = take(sync, 1, height)
        if y < 0:
            break
        first, last = max(0, y - RADIUS), min(height, y + RADIUS + 1)
        for j in range(0, size, LANES):
            zero = load(planes, j) * _ZERO
            s_mean, d_mean, s_square, d_square = zero, zero, zero, zero
            for k in range(first, last):
                tap = TAPS[k - y + RADIUS]
                a, b = load(planes, k * size + j), load(planes, plane + k * size + j)
                s, d = a + b, a - b
                s_tap, d_tap = s * tap, d * tap
                s_mean, d_mean = s_mean + s_tap, d_mean + d_tap
                s_square, d_square = s_square + s * s_tap, d_square + d * d_tap
            store(blurred, pad + j, s_mean)
            store(blurred, stride + pad + j, d_mean)
            store(blurred, 2 * stride + pad + j, s_square)
            store(blurred, 3 * stride + pad + j, d_square)
        # Columns past the last pixel have been blurred vertically from zeros, so they are zero padding already.
        l1_sum, ssim_sum = load(planes, 0) * _ZERO, load(planes, 0) * _ZERO
        for j in range(0, size, LANES):
            zero = load(planes, j) * _ZERO
            s_mean, d_mean, s_square, d_square = zero, zero, zero, zero
            for k in range(2 * RADIUS + 1):
                tap = TAPS[k]
                there = pad + j + (k - RADIUS) * channels
                s_mean, d_mean = s_mean + load(blurred, there) * tap, d_mean + load(blurred, stride + there) * tap
                s_square = s_square + load(blurred, 2 * stride + there) * tap
                d_square = d_square + load(blurred, 3 * stride + there) * tap
            here = y * size + j
            weight = load(planes, 2 * plane + here)
            d = load(planes, here) - load(planes, plane + here)
            l1_sum = l1_sum + absolute(d) * weight
            ss, dd = s_mean * s_mean, d_mean * d_mean
            s_var, d_var = s_square - ss, d_square - dd
            top_1, bottom_1 = (ss - dd) * _HALF + _C1, (ss + dd) * _HALF + _C1
            top_2, bottom_2 = (s_var - d_var) * _HALF + _C2, (s_var + d_var) * _HALF + _C2
            inverse = _ONE / (bottom_1 * bottom_2)
            value = top_1 * top_2 * inverse
            ssim_sum = ssim_sum + (_ONE - value) * weight
            if moments.size:
                # By E[s^2], E[d^2] (through the variances) and by the means of s and d.
                by_top_2, by_bottom_2 = top_1 * inverse * _HALF, value * bottom_1 * inverse * _HALF
                by_ss, by_dd = by_top_2 - by_bottom_2, -(by_top_2 + by_bottom_2)
                by_top_1, by_bottom_1 = top_2 * inverse, value * bottom_2 * inverse
                by_s = s_mean * (by_top_1 - by_bottom_1 - by_ss * _TWO)
                by_d = d_mean * (-(by_top_1 + by_bottom_1) - by_dd * _TWO)
                store(moments, here, (by_s + by_d) * weight)
                store(moments, plane + here, (by_ss + by_dd) * weight)
                store(moments, 2 * plane + here, (by_ss - by_dd) * _TWO * weight)
        store(row_sums, 0, l1_sum)
        store(row_sums, LANES, ssim_sum)
        for part in range(2):
            total = 0.0
            for k in range(LANES):
                total += row_sums[part * LANES + k]
            sums[2 * y + part] = total
        done(sync, 1)
    wait(sync, 1, height)


@_jit
def _backward(
    sync: np.ndarray,
    planes: np.ndarray,  # [3,H,R]
    moments: np.ndarray,  # [3,H,R]
    factors: np.ndarray,  # [2]
    v_image: np.ndarray,  # [H,W,C]
    height: int,
    width: int,
    channels: int,
) -> None:
    """Gradient by the image: `factors` are those of the sums of weighted |d| and SSIM.

    The window is symmetric, so the transpose of the blur is the blur:
    d/dx = blur(by mean) + 2 x blur(by mean of x^2) + y blur(by mean of x y).
    """
    n = width * channels
    size = -(-n // LANES) * LANES
    pad = -(-RADIUS * channels // LANES) * LANES
    plane, stride = height * size, size + 2 * pad
    blurred = np.zeros(3 * stride, np.float32)
    row = np.empty(size, np.float32)
    l1, ssim = factors[0], factors[1]
    while True:
        y = take(sync, 0, height)
        if y < 0:
            break
        first, last = max(0, y - RADIUS), min(height, y + RADIUS + 1)
        for j in range(0, size, LANES):
            by_mean = load(planes, j) * _ZERO
            by_xx, by_xy = by_mean, by_mean
            for k in range(first, last):
                tap = TAPS[k - y + RADIUS]
                here = k * size + j
                by_mean = by_mean + load(moments, here) * tap
                by_xx = by_xx + load(moments, plane + here) * tap
                by_xy = by_xy + load(moments, 2 * plane + here) * tap
            store(blurred, pad + j, by_mean)
            store(blurred, stride + pad + j, by_xx)
            store(blurred, 2 * stride + pad + j, by_xy)
        for j in range(0, size, LANES):
            by_mean = load(planes, j) * _ZERO
            by_xx, by_xy = by_mean, by_mean
            for k in range(2 * RADIUS + 1):
                tap = TAPS[k]
                there = pad + j + (k - RADIUS) * channels
                by_mean = by_mean + load(blurred, there) * tap
                by_xx = by_xx + load(blurred, stride + there) * tap
                by_xy = by_xy + load(blurred, 2 * stride + there) * tap
            here = y * size + j
            a, b, weight = load(planes, here), load(planes, plane + here), load(planes, 2 * plane + here)
            sign = select(a > b, weight, select(a < b, -weight, weight * _ZERO))
            store(row, j, sign * l1 + (by_mean + a * _TWO * by_xx + b * by_xy) * ssim)
        v_image[y * n : (y + 1) * n] = row[:n]
        done(sync, 0)
    wait(sync, 0, height)


@kernel
def loss_forward(job: Any) -> None:
    """`_forward` with its arguments taken from a job."""
    _forward(
        counters(job), floats(job, 0), floats(job, 1), floats(job, 2), floats(job, 3), floats(job, 4), doubles(job, 5),
        integer(job, 6), integer(job, 7), integer(job, 8),
    )  # fmt: skip


@kernel
def loss_backward(job: Any) -> None:
    """`_backward` with its arguments taken from a job."""
    _backward(
        counters(job), floats(job, 0), floats(job, 1), floats(job, 2), floats(job, 3),
        integer(job, 4), integer(job, 5), integer(job, 6),
    )  # fmt: skip
