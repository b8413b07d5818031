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
from pipeline.rasterize.simd import LANES, absolute, load, select, store
from pipeline.rasterize.team import done, take, wait

RADIUS = 5
C1, C2 = 0.01**2, 0.03**2

INLINED_SOURCES = "f807d09814611e3a"
"""As in `pipeline.rasterize.kernels`."""

_taps = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / 1.5) ** 2)
TAPS = (_taps / _taps.sum()).astype(np.float32)
"""The window's 11 weights along one axis."""


def photometric_loss(
    image: Tensor,  # [H,W,C]
    target: Tensor,  # [H,W,C]
    *,
    l1: float = 0.8,
    ssim: float = 0.2,
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
        row = -(-width * channels // LANES) * LANES
        planes = np.empty((3, height, row), np.float32)
        moments = np.empty((3 if ctx.needs_input_grad[0] else 0, height, row), np.float32)
        sums = np.zeros((height, 2), np.float64)
        weights = np.empty((0, 0), np.float32) if weight is None else weight.detach().float().contiguous().numpy()
        team.run(
            _forward, threads, image.detach().contiguous().numpy(), target.detach().float().contiguous().numpy(),
            weights, planes, moments, sums,
        )  # fmt: skip
        ctx.arrays = planes, moments
        ctx.shape, ctx.factors, ctx.threads = image.shape, (l1 / image.numel(), ssim / image.numel()), threads
        l1_sum, ssim_sum = sums.sum(axis=0)
        return image.new_tensor((l1 * l1_sum + ssim * ssim_sum) / image.numel())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_loss: Tensor) -> tuple[Tensor | None, ...]:
        planes, moments = ctx.arrays
        v_image = v_loss.new_empty(ctx.shape)
        scale = float(v_loss)
        factors = np.array([scale * ctx.factors[0], -scale * ctx.factors[1]], np.float32)
        team.run(_backward, ctx.threads, planes, moments, factors, v_image.numpy())
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
    moments: np.ndarray,  # [3,H,R], or [0,H,R] where no gradient is wanted
    sums: np.ndarray,  # [H,2]
) -> None:
    """Sums of the weighted |d| and 1 - SSIM per row [H,2], and what the backward pass needs.

    A row is flat, channels interleaved, so that a step of one pixel is `channels` floats. `planes` [3,H,R] gets image,
    target and weight; `moments` [3,H,R] the weighted derivatives of SSIM by the local means of x, x^2 and x y.
    Sum and difference of the images need four blurred planes where the images themselves would need five.
    """
    height, width, channels = image.shape
    n = width * channels
    size = planes.shape[2]
    pad = -(-RADIUS * channels // LANES) * LANES
    blurred = np.zeros((4, size + 2 * pad), np.float32)
    flat_planes, flat_moments, flat_blurred = planes.reshape(-1), moments.reshape(-1), blurred.reshape(-1)
    plane, stride = height * size, size + 2 * pad
    while True:
        y = take(sync, 0, height)
        if y < 0:
            break
        planes[:, y, n:] = _ZERO
        planes[0, y, :n] = image[y].reshape(-1)
        planes[1, y, :n] = target[y].reshape(-1)
        if weights.size == 0:
            planes[2, y, :n] = _ONE
        else:
            for x in range(width):
                for c in range(channels):
                    planes[2, y, x * channels + c] = weights[y, x]
        done(sync, 0)
    wait(sync, 0, height)
    while True:
        y = take(sync, 1, height)
        if y < 0:
            break
        first, last = max(0, y - RADIUS), min(height, y + RADIUS + 1)
        for j in range(0, size, LANES):
            zero = load(flat_planes, j) * _ZERO
            s_mean, d_mean, s_square, d_square = zero, zero, zero, zero
            for k in range(first, last):
                tap = TAPS[k - y + RADIUS]
                a, b = load(flat_planes, k * size + j), load(flat_planes, plane + k * size + j)
                s, d = a + b, a - b
                s_tap, d_tap = s * tap, d * tap
                s_mean, d_mean = s_mean + s_tap, d_mean + d_tap
                s_square, d_square = s_square + s * s_tap, d_square + d * d_tap
            store(flat_blurred, pad + j, s_mean)
            store(flat_blurred, stride + pad + j, d_mean)
            store(flat_blurred, 2 * stride + pad + j, s_square)
            store(flat_blurred, 3 * stride + pad + j, d_square)
        # Columns past the last pixel have been blurred vertically from zeros, so they are zero padding already.
        l1_sum, ssim_sum = load(flat_planes, 0) * _ZERO, load(flat_planes, 0) * _ZERO
        for j in range(0, size, LANES):
            zero = load(flat_planes, j) * _ZERO
            s_mean, d_mean, s_square, d_square = zero, zero, zero, zero
            for k in range(2 * RADIUS + 1):
                tap = TAPS[k]
                at = pad + j + (k - RADIUS) * channels
                s_mean, d_mean = s_mean + load(flat_blurred, at) * tap, d_mean + load(flat_blurred, stride + at) * tap
                s_square = s_square + load(flat_blurred, 2 * stride + at) * tap
                d_square = d_square + load(flat_blurred, 3 * stride + at) * tap
            here = y * size + j
            weight = load(flat_planes, 2 * plane + here)
            d = load(flat_planes, here) - load(flat_planes, plane + here)
            l1_sum = l1_sum + absolute(d) * weight
            ss, dd = s_mean * s_mean, d_mean * d_mean
            s_var, d_var = s_square - ss, d_square - dd
            top_1, bottom_1 = (ss - dd) * _HALF + _C1, (ss + dd) * _HALF + _C1
            top_2, bottom_2 = (s_var - d_var) * _HALF + _C2, (s_var + d_var) * _HALF + _C2
            inverse = _ONE / (bottom_1 * bottom_2)
            value = top_1 * top_2 * inverse
            ssim_sum = ssim_sum + (_ONE - value) * weight
            if moments.shape[0] > 0:
                # By E[s^2], E[d^2] (through the variances) and by the means of s and d.
                by_top_2, by_bottom_2 = top_1 * inverse * _HALF, value * bottom_1 * inverse * _HALF
                by_ss, by_dd = by_top_2 - by_bottom_2, -(by_top_2 + by_bottom_2)
                by_top_1, by_bottom_1 = top_2 * inverse, value * bottom_2 * inverse
                by_s = s_mean * (by_top_1 - by_bottom_1 - by_ss * _TWO)
                by_d = d_mean * (-(by_top_1 + by_bottom_1) - by_dd * _TWO)
                store(flat_moments, here, (by_s + by_d) * weight)
                store(flat_moments, plane + here, (by_ss + by_dd) * weight)
                store(flat_moments, 2 * plane + here, (by_ss - by_dd) * _TWO * weight)
        row_sums = np.empty(2 * LANES, np.float32)
        store(row_sums, 0, l1_sum)
        store(row_sums, LANES, ssim_sum)
        for k in range(LANES):
            sums[y, 0] += row_sums[k]
            sums[y, 1] += row_sums[LANES + k]
        done(sync, 1)
    wait(sync, 1, height)


@_jit
def _backward(
    sync: np.ndarray,
    planes: np.ndarray,  # [3,H,R]
    moments: np.ndarray,  # [3,H,R]
    factors: np.ndarray,  # [2]
    v_image: np.ndarray,  # [H,W,C]
) -> None:
    """Gradient by the image: `factors` are those of the sums of weighted |d| and SSIM.

    The window is symmetric, so the transpose of the blur is the blur:
    d/dx = blur(by mean) + 2 x blur(by mean of x^2) + y blur(by mean of x y).
    """
    height, width, channels = v_image.shape
    n = width * channels
    size = planes.shape[2]
    pad = -(-RADIUS * channels // LANES) * LANES
    stride = size + 2 * pad
    plane = height * size
    flat_planes, flat_moments = planes.reshape(-1), moments.reshape(-1)
    blurred = np.zeros(3 * stride, np.float32)
    row = np.empty(size, np.float32)
    flat_v = v_image.reshape(-1)
    l1, ssim = factors[0], factors[1]
    while True:
        y = take(sync, 0, height)
        if y < 0:
            break
        first, last = max(0, y - RADIUS), min(height, y + RADIUS + 1)
        for j in range(0, size, LANES):
            by_mean = load(flat_planes, j) * _ZERO
            by_xx, by_xy = by_mean, by_mean
            for k in range(first, last):
                tap = TAPS[k - y + RADIUS]
                here = k * size + j
                by_mean = by_mean + load(flat_moments, here) * tap
                by_xx = by_xx + load(flat_moments, plane + here) * tap
                by_xy = by_xy + load(flat_moments, 2 * plane + here) * tap
            store(blurred, pad + j, by_mean)
            store(blurred, stride + pad + j, by_xx)
            store(blurred, 2 * stride + pad + j, by_xy)
        for j in range(0, size, LANES):
            by_mean = load(flat_planes, j) * _ZERO
            by_xx, by_xy = by_mean, by_mean
            for k in range(2 * RADIUS + 1):
                tap = TAPS[k]
                at = pad + j + (k - RADIUS) * channels
                by_mean = by_mean + load(blurred, at) * tap
                by_xx = by_xx + load(blurred, stride + at) * tap
                by_xy = by_xy + load(blurred, 2 * stride + at) * tap
            here = y * size + j
            a, b, weight = load(flat_planes, here), load(flat_planes, plane + here), load(flat_planes, 2 * plane + here)
            sign = select(a > b, weight, select(a < b, -weight, weight * _ZERO))
            store(row, j, sign * l1 + (by_mean + a * _TWO * by_xx + b * by_xy) * ssim)
        flat_v[y * n : (y + 1) * n] = row[:n]
        done(sync, 0)
    wait(sync, 0, height)
