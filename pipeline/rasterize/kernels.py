"""The CPU backend's numba kernels: projection, binning, compositing, and their hand-written backward passes.

Arrays are contiguous and float32 ones are passed flat, whatever shape stands beside them. Every kernel is worked by a
team (`pipeline.rasterize.team`): its first argument hands out the chunks. What each chunk writes is its own, and sums
run in a fixed order, so results do not depend on the number of threads.

Layout of compositing: tiles of 16 x 16 pixels, each 16 blocks of 4 x 4 pixels, which are one vector of 16 lanes. A
Gaussian that meets a tile is an *entry*; an exact test of its ellipse against the 16 blocks gives the *pairs* (entry,
block) that are evaluated. The backward pass walks front to back: what lies behind a Gaussian is the pixel's total minus
what came before, so no transmittance is stored.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from pipeline.rasterize.reference import ALPHA_MAX, ALPHA_MIN, EPS_2D, FAR_PLANE, NEAR_PLANE, TRANSMITTANCE_MIN
from pipeline.rasterize.reference import MAX_EXTENT_SIGMAS as _MAX_EXTENT
from pipeline.rasterize.simd import (
    LANES,
    absolute,
    append_set,
    at,
    bits,
    ceil,
    exp2,
    gather,
    lane_index,
    load,
    load_block,
    load_rgb_block,
    log2,
    lowest_bit,
    maximum,
    minimum,
    prefetch,
    put,
    scatter,
    select,
    sqrt,
    store,
    store_block,
    store_rgb_block,
    sums,
)
from pipeline.rasterize.team import counters, done, floats, int32s, int64s, integer, kernel, take, uint16s, wait

Floats = np.ndarray  # float32
Ints = np.ndarray

INLINED_SOURCES = "bfa23c98c280a9bd"
"""Digest of the files whose code is compiled into these kernels. Numba renews a cached kernel only when this file
changes; a test keeps the digest, and so this file, in step with them."""

TILE_BITS = 4
TILE = 1 << TILE_BITS
GAUSSIANS_PER_CHUNK = 512
ENTRIES_PER_ROUND = 64
"""Entries culled before they are composited; after each round finished blocks drop out."""
PREFETCH = 8
"""Places ahead of the one at work whose data are fetched into the cache: depth order is no order in memory."""
PARTS = 8
"""Independent slices of the depth order in the counting sort by tile."""
PACKED = 8
"""Floats in a projected Gaussian."""
ROW = 16
"""Floats in a visible Gaussian, in depth order: one cache line."""
CAMERA = 18
"""Floats of a packed camera: rotation (9), translation (3), fx, fy, cx, cy, width, height."""

_f = np.float32
_LOG2_E = _f(math.log2(math.e))
_LN_2 = _f(math.log(2.0))
_LOG2_ALPHA_MIN = _f(math.log2(ALPHA_MIN))
_CULL_SLACK = _f(1e-3)
"""Added to log2 alpha in the block test, above its rounding error, so that no contributing pixel is lost."""
_LANE_X = np.tile(np.arange(4, dtype=np.float32), 4)
_LANE_Y = np.repeat(np.arange(4, dtype=np.float32), 4)
_HALF, _ONE, _TWO, _ZERO = _f(0.5), _f(1.0), _f(2.0), _f(0.0)
_EPS_2D, _NEAR, _FAR = _f(EPS_2D), _f(NEAR_PLANE), _f(FAR_PLANE)
_ALPHA_MAX, _ALPHA_MIN, _STOP = _f(ALPHA_MAX), _f(ALPHA_MIN), _f(TRANSMITTANCE_MIN)
_EXTENT_CAP = _f(_MAX_EXTENT)
_FOV_MARGIN = _f(0.15)
_TINY = _f(1e-12)

_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def _scratch(size: int) -> Floats:
    """An uninitialised array that begins with a cache line: vectors across two lines take twice the time."""
    buffer = np.empty(size + LANES, np.float32)
    skip = -(buffer.ctypes.data >> 2) & (LANES - 1)
    return buffer[skip : skip + size]


@_jit
def _project_forward(
    sync: Ints,
    means: Floats,  # [N,3]
    quats: Floats,  # [N,4]
    scales: Floats,  # [N,3]
    opacities: Floats,  # [N]
    colors: Floats,  # [N*C]
    camera: Floats,  # [CAMERA]
    means2d: Floats,  # [N,2]
    conics: Floats,  # [N,3]
    depths: Floats,  # [N]
    radii: Floats,  # [N]
    packed: Floats,  # [N,PACKED]
    flags: Ints,  # [1]
) -> None:
    """Projection of `reference.project`; `flags[0]` is raised where an input is not finite.

    `packed` [N,PACKED] gets what compositing wants of a Gaussian, in two half cache lines: u, v, the exact half-sizes
    of its box (0 where culled), the roots (see `_composite_forward`) and the log2 of its opacity.
    """
    n = opacities.size
    channels = colors.size // n if n else 0
    chunks = (n + GAUSSIANS_PER_CHUNK - 1) // GAUSSIANS_PER_CHUNK
    r00, r01, r02 = camera[0], camera[1], camera[2]
    r10, r11, r12 = camera[3], camera[4], camera[5]
    r20, r21, r22 = camera[6], camera[7], camera[8]
    t0, t1, t2 = camera[9], camera[10], camera[11]
    fx, fy, cx, cy, width, height = camera[12], camera[13], camera[14], camera[15], camera[16], camera[17]
    x_low, x_high = -(cx / fx + _FOV_MARGIN * width / fx), (width - cx) / fx + _FOV_MARGIN * width / fx
    y_low, y_high = -(cy / fy + _FOV_MARGIN * height / fy), (height - cy) / fy + _FOV_MARGIN * height / fy
    while True:
        chunk = take(sync, 0, chunks)
        if chunk < 0:
            break
        for i in range(chunk * GAUSSIANS_PER_CHUNK, min(n, (chunk + 1) * GAUSSIANS_PER_CHUNK), LANES):
            mx, my, mz = gather(means, 3, 0, i, n), gather(means, 3, 1, i, n), gather(means, 3, 2, i, n)
            qw, qx = gather(quats, 4, 0, i, n), gather(quats, 4, 1, i, n)
            qy, qz = gather(quats, 4, 2, i, n), gather(quats, 4, 3, i, n)
            s0, s1, s2 = gather(scales, 3, 0, i, n), gather(scales, 3, 1, i, n), gather(scales, 3, 2, i, n)
            opacity = gather(opacities, 1, 0, i, n)
            # Anything not finite times zero is NaN, and NaN is not >= 0.
            poison = (
                (mx * 0 + my * 0 + mz * 0)
                + (qw * 0 + qx * 0 + qy * 0 + qz * 0)
                + (s0 * 0 + s1 * 0 + s2 * 0)
                + opacity * 0
            )
            for c in range(channels):
                poison = poison + gather(colors, channels, c, i, n) * 0
            if bits(poison >= 0) != 0xFFFF:
                flags[0] = 1

            x = mx * r00 + my * r01 + mz * r02 + t0
            y = mx * r10 + my * r11 + mz * r12 + t1
            z = mx * r20 + my * r21 + mz * r22 + t2
            in_range = (z > _NEAR) & (z < _FAR)
            rz = _ONE / select(in_range, z, _ONE)
            xz, yz = x * rz, y * rz
            j00, j11 = rz * fx, rz * fy
            j02 = -(minimum(maximum(xz, x_low), x_high) * j00)
            j12 = -(minimum(maximum(yz, y_low), y_high) * j11)
            # U = J R_cam, 2 x 3; H = U R_gauss S, 2 x 3; covariance = H H^T + blur.
            u00, u01, u02 = j00 * r00 + j02 * r20, j00 * r01 + j02 * r21, j00 * r02 + j02 * r22
            u10, u11, u12 = j11 * r10 + j12 * r20, j11 * r11 + j12 * r21, j11 * r12 + j12 * r22
            norm = _ONE / maximum(sqrt(qw * qw + qx * qx + qy * qy + qz * qz), _TINY)
            w, a, b, c = qw * norm, qx * norm, qy * norm, qz * norm
            g00, g01, g02 = _ONE - (b * b + c * c) * _TWO, (a * b - w * c) * _TWO, (a * c + w * b) * _TWO
            g10, g11, g12 = (a * b + w * c) * _TWO, _ONE - (a * a + c * c) * _TWO, (b * c - w * a) * _TWO
            g20, g21, g22 = (a * c - w * b) * _TWO, (b * c + w * a) * _TWO, _ONE - (a * a + b * b) * _TWO
            h00, h01 = (u00 * g00 + u01 * g10 + u02 * g20) * s0, (u00 * g01 + u01 * g11 + u02 * g21) * s1
            h02 = (u00 * g02 + u01 * g12 + u02 * g22) * s2
            h10, h11 = (u10 * g00 + u11 * g10 + u12 * g20) * s0, (u10 * g01 + u11 * g11 + u12 * g21) * s1
            h12 = (u10 * g02 + u11 * g12 + u12 * g22) * s2
            cov_xx = h00 * h00 + h01 * h01 + h02 * h02 + _EPS_2D
            cov_xy = h00 * h10 + h01 * h11 + h02 * h12
            cov_yy = h10 * h10 + h11 * h11 + h12 * h12 + _EPS_2D
            det = maximum(cov_xx * cov_yy - cov_xy * cov_xy, _f(1e-10))
            inverse = _ONE / det
            u, v = xz * fx + cx, yz * fy + cy

            log2_opacity = log2(opacity)
            extent = sqrt(maximum((log2_opacity - _LOG2_ALPHA_MIN) * (_TWO * _LN_2), _ZERO))
            extent = minimum(extent, _EXTENT_CAP)
            extent_x, extent_y = extent * sqrt(cov_xx), extent * sqrt(cov_yy)
            radius_x, radius_y = ceil(extent_x), ceil(extent_y)
            visible = in_range & (opacity >= _ALPHA_MIN)
            visible = visible & (u + radius_x > _ZERO) & (u - radius_x < width)
            visible = visible & (v + radius_y > _ZERO) & (v - radius_y < height)

            scatter(means2d, 2, 0, i, n, u)
            scatter(means2d, 2, 1, i, n, v)
            k_xx, k_xy = cov_yy * inverse, -(cov_xy * inverse)
            scatter(conics, 3, 0, i, n, k_xx)
            scatter(conics, 3, 1, i, n, k_xy)
            scatter(conics, 3, 2, i, n, cov_xx * inverse)
            alpha = sqrt(k_xx * (_HALF * _LOG2_E))
            scatter(depths, 1, 0, i, n, z)
            scatter(radii, 1, 0, i, n, select(visible, maximum(radius_x, radius_y), _ZERO))
            scatter(packed, PACKED, 0, i, n, u)
            scatter(packed, PACKED, 1, i, n, v)
            scatter(packed, PACKED, 2, i, n, select(visible, extent_x, _ZERO))
            scatter(packed, PACKED, 3, i, n, select(visible, extent_y, _ZERO))
            scatter(packed, PACKED, 4, i, n, alpha)
            scatter(packed, PACKED, 5, i, n, k_xy * (_HALF * _LOG2_E) / alpha)
            scatter(packed, PACKED, 6, i, n, sqrt((_HALF * _LOG2_E) / cov_yy))
            scatter(packed, PACKED, 7, i, n, log2_opacity)
        done(sync, 0)
    wait(sync, 0, chunks)


@_jit
def _project_backward(
    sync: Ints,
    means: Floats,  # [N,3]
    quats: Floats,  # [N,4]
    scales: Floats,  # [N,3]
    camera: Floats,  # [CAMERA]
    conics: Floats,  # [N,3]
    radii: Floats,  # [N]
    v_means2d: Floats,  # [N,2]
    v_conics: Floats,  # [N,3]
    v_depths: Floats,  # [N], or empty for zeros
    v_means: Floats,  # [N,3]
    v_quats: Floats,  # [N,4]
    v_scales: Floats,  # [N,3]
    v_camera: Floats,  # [chunks,12]
) -> None:
    """Gradients of `_project_forward`. `v_camera` [chunks, 12] gets each chunk's share of the gradient of the camera's
    rotation and translation."""
    n = radii.size
    chunks = (n + GAUSSIANS_PER_CHUNK - 1) // GAUSSIANS_PER_CHUNK
    r00, r01, r02 = camera[0], camera[1], camera[2]
    r10, r11, r12 = camera[3], camera[4], camera[5]
    r20, r21, r22 = camera[6], camera[7], camera[8]
    t0, t1, t2 = camera[9], camera[10], camera[11]
    fx, fy, cx, cy, width, height = camera[12], camera[13], camera[14], camera[15], camera[16], camera[17]
    x_low, x_high = -(cx / fx + _FOV_MARGIN * width / fx), (width - cx) / fx + _FOV_MARGIN * width / fx
    y_low, y_high = -(cy / fy + _FOV_MARGIN * height / fy), (height - cy) / fy + _FOV_MARGIN * height / fy
    partial = np.empty(LANES, np.float32)
    while True:
        chunk = take(sync, 0, chunks)
        if chunk < 0:
            break
        zero = lane_index() * _ZERO
        w00, w01, w02, w10, w11, w12, w20, w21, w22 = zero, zero, zero, zero, zero, zero, zero, zero, zero
        vt0, vt1, vt2 = zero, zero, zero
        for i in range(chunk * GAUSSIANS_PER_CHUNK, min(n, (chunk + 1) * GAUSSIANS_PER_CHUNK), LANES):
            mx, my, mz = gather(means, 3, 0, i, n), gather(means, 3, 1, i, n), gather(means, 3, 2, i, n)
            qw, qx = gather(quats, 4, 0, i, n), gather(quats, 4, 1, i, n)
            qy, qz = gather(quats, 4, 2, i, n), gather(quats, 4, 3, i, n)
            s0, s1, s2 = gather(scales, 3, 0, i, n), gather(scales, 3, 1, i, n), gather(scales, 3, 2, i, n)
            k_xx, k_xy, k_yy = gather(conics, 3, 0, i, n), gather(conics, 3, 1, i, n), gather(conics, 3, 2, i, n)
            visible = gather(radii, 1, 0, i, n) > _ZERO
            vu = select(visible, gather(v_means2d, 2, 0, i, n), _ZERO)
            vv = select(visible, gather(v_means2d, 2, 1, i, n), _ZERO)
            vk_xx = select(visible, gather(v_conics, 3, 0, i, n), _ZERO)
            vk_xy = select(visible, gather(v_conics, 3, 1, i, n), _ZERO) * _HALF
            vk_yy = select(visible, gather(v_conics, 3, 2, i, n), _ZERO)

            x = mx * r00 + my * r01 + mz * r02 + t0
            y = mx * r10 + my * r11 + mz * r12 + t1
            z = mx * r20 + my * r21 + mz * r22 + t2
            rz = _ONE / select((z > _NEAR) & (z < _FAR), z, _ONE)
            xz, yz = x * rz, y * rz
            j00, j11 = rz * fx, rz * fy
            xc, yc = minimum(maximum(xz, x_low), x_high), minimum(maximum(yz, y_low), y_high)
            j02, j12 = -(xc * j00), -(yc * j11)
            u00, u01, u02 = j00 * r00 + j02 * r20, j00 * r01 + j02 * r21, j00 * r02 + j02 * r22
            u10, u11, u12 = j11 * r10 + j12 * r20, j11 * r11 + j12 * r21, j11 * r12 + j12 * r22
            norm = _ONE / maximum(sqrt(qw * qw + qx * qx + qy * qy + qz * qz), _TINY)
            w, a, b, c = qw * norm, qx * norm, qy * norm, qz * norm
            g00, g01, g02 = _ONE - (b * b + c * c) * _TWO, (a * b - w * c) * _TWO, (a * c + w * b) * _TWO
            g10, g11, g12 = (a * b + w * c) * _TWO, _ONE - (a * a + c * c) * _TWO, (b * c - w * a) * _TWO
            g20, g21, g22 = (a * c - w * b) * _TWO, (b * c + w * a) * _TWO, _ONE - (a * a + b * b) * _TWO
            m00, m01, m02, m10, m11, m12 = g00 * s0, g01 * s1, g02 * s2, g10 * s0, g11 * s1, g12 * s2
            m20, m21, m22 = g20 * s0, g21 * s1, g22 * s2
            h00, h01 = u00 * m00 + u01 * m10 + u02 * m20, u00 * m01 + u01 * m11 + u02 * m21
            h02 = u00 * m02 + u01 * m12 + u02 * m22
            h10, h11 = u10 * m00 + u11 * m10 + u12 * m20, u10 * m01 + u11 * m11 + u12 * m21
            h12 = u10 * m02 + u11 * m12 + u12 * m22

            # d inverse(C) = -inverse(C) dC inverse(C), so the covariance gets -K vK K, and H twice that times H.
            p00, p01 = k_xx * vk_xx + k_xy * vk_xy, k_xx * vk_xy + k_xy * vk_yy
            p10, p11 = k_xy * vk_xx + k_yy * vk_xy, k_xy * vk_xy + k_yy * vk_yy
            vc_xx = (p00 * k_xx + p01 * k_xy) * _f(-2.0)
            vc_xy = (p00 * k_xy + p01 * k_yy) * _f(-2.0)
            vc_yy = (p10 * k_xy + p11 * k_yy) * _f(-2.0)
            vh00, vh01, vh02 = vc_xx * h00 + vc_xy * h10, vc_xx * h01 + vc_xy * h11, vc_xx * h02 + vc_xy * h12
            vh10, vh11, vh12 = vc_xy * h00 + vc_yy * h10, vc_xy * h01 + vc_yy * h11, vc_xy * h02 + vc_yy * h12

            # H = U M
            vm00, vm01, vm02 = u00 * vh00 + u10 * vh10, u00 * vh01 + u10 * vh11, u00 * vh02 + u10 * vh12
            vm10, vm11, vm12 = u01 * vh00 + u11 * vh10, u01 * vh01 + u11 * vh11, u01 * vh02 + u11 * vh12
            vm20, vm21, vm22 = u02 * vh00 + u12 * vh10, u02 * vh01 + u12 * vh11, u02 * vh02 + u12 * vh12
            vu00 = vh00 * m00 + vh01 * m01 + vh02 * m02
            vu01 = vh00 * m10 + vh01 * m11 + vh02 * m12
            vu02 = vh00 * m20 + vh01 * m21 + vh02 * m22
            vu10 = vh10 * m00 + vh11 * m01 + vh12 * m02
            vu11 = vh10 * m10 + vh11 * m11 + vh12 * m12
            vu12 = vh10 * m20 + vh11 * m21 + vh12 * m22

            # M = R_gauss S
            vs0 = vm00 * g00 + vm10 * g10 + vm20 * g20
            vs1 = vm01 * g01 + vm11 * g11 + vm21 * g21
            vs2 = vm02 * g02 + vm12 * g12 + vm22 * g22
            vg00, vg01, vg02, vg10, vg11, vg12 = vm00 * s0, vm01 * s1, vm02 * s2, vm10 * s0, vm11 * s1, vm12 * s2
            vg20, vg21, vg22 = vm20 * s0, vm21 * s1, vm22 * s2
            vw = (a * (vg21 - vg12) + b * (vg02 - vg20) + c * (vg10 - vg01)) * _TWO
            va = (b * (vg01 + vg10) + c * (vg02 + vg20) + w * (vg21 - vg12) - a * (vg11 + vg22) * _TWO) * _TWO
            vb = (a * (vg01 + vg10) + c * (vg12 + vg21) + w * (vg02 - vg20) - b * (vg00 + vg22) * _TWO) * _TWO
            vc = (a * (vg02 + vg20) + b * (vg12 + vg21) + w * (vg10 - vg01) - c * (vg00 + vg11) * _TWO) * _TWO
            along = w * vw + a * va + b * vb + c * vc
            scatter(v_quats, 4, 0, i, n, (vw - w * along) * norm)
            scatter(v_quats, 4, 1, i, n, (va - a * along) * norm)
            scatter(v_quats, 4, 2, i, n, (vb - b * along) * norm)
            scatter(v_quats, 4, 3, i, n, (vc - c * along) * norm)
            scatter(v_scales, 3, 0, i, n, vs0)
            scatter(v_scales, 3, 1, i, n, vs1)
            scatter(v_scales, 3, 2, i, n, vs2)

            # U = J R_cam, J of the camera-space centre; the clamped slope has no gradient outside its range.
            vj00 = vu00 * r00 + vu01 * r01 + vu02 * r02
            vj02 = vu00 * r20 + vu01 * r21 + vu02 * r22
            vj11 = vu10 * r10 + vu11 * r11 + vu12 * r12
            vj12 = vu10 * r20 + vu11 * r21 + vu12 * r22
            v_xz = vu * fx - select((xz >= x_low) & (xz <= x_high), vj02 * j00, _ZERO)
            v_yz = vv * fy - select((yz >= y_low) & (yz <= y_high), vj12 * j11, _ZERO)
            vx, vy = v_xz * rz, v_yz * rz
            vz = -(rz * (v_xz * xz + v_yz * yz + vj00 * j00 + vj11 * j11 + vj02 * j02 + vj12 * j12))
            if v_depths.size:
                vz = vz + gather(v_depths, 1, 0, i, n)
            scatter(v_means, 3, 0, i, n, vx * r00 + vy * r10 + vz * r20)
            scatter(v_means, 3, 1, i, n, vx * r01 + vy * r11 + vz * r21)
            scatter(v_means, 3, 2, i, n, vx * r02 + vy * r12 + vz * r22)

            # Surplus lanes repeat the last Gaussian and must not count twice.
            alive = lane_index() < _f(n - i)
            vx, vy, vz = select(alive, vx, _ZERO), select(alive, vy, _ZERO), select(alive, vz, _ZERO)
            j00, j02 = select(alive, j00, _ZERO), select(alive, j02, _ZERO)
            j11, j12 = select(alive, j11, _ZERO), select(alive, j12, _ZERO)
            vt0, vt1, vt2 = vt0 + vx, vt1 + vy, vt2 + vz
            w00, w01, w02 = w00 + vx * mx + j00 * vu00, w01 + vx * my + j00 * vu01, w02 + vx * mz + j00 * vu02
            w10, w11, w12 = w10 + vy * mx + j11 * vu10, w11 + vy * my + j11 * vu11, w12 + vy * mz + j11 * vu12
            w20 = w20 + vz * mx + j02 * vu00 + j12 * vu10
            w21 = w21 + vz * my + j02 * vu01 + j12 * vu11
            w22 = w22 + vz * mz + j02 * vu02 + j12 * vu12
        store(partial, 0, sums((w00, w01, w02, w10, w11, w12, w20, w21, w22, vt0, vt1, vt2)))
        for k in range(12):
            v_camera[12 * chunk + k] = partial[k]
        done(sync, 0)
    wait(sync, 0, chunks)


@_jit
def _sort_by_depth(
    depths: Floats,  # [N]
    radii: Floats,  # [N]
    order: Ints,  # [N]
) -> int:
    """Write the indices of the visible Gaussians to `order`, front to back, ties by index; how many there are.

    A stable radix sort on the bits of the depth, which is positive, so its bits sort like its value.
    """
    n = depths.size
    keys = np.empty(n, np.uint32)
    ids = np.empty(n, np.int32)
    other_keys = np.empty(n, np.uint32)
    other_ids = order
    histogram = np.zeros((3, 2048), np.int64)
    depth_bits = depths.view(np.uint32)
    count = 0
    for i in range(n):
        if radii[i] > _ZERO:
            key = depth_bits[i]
            keys[count] = key
            ids[count] = i
            count += 1
            histogram[0, key & 2047] += 1
            histogram[1, (key >> 11) & 2047] += 1
            histogram[2, key >> 22] += 1
    for digit in range(3):
        shift = 11 * digit
        if count > 0 and histogram[digit, (keys[0] >> shift) & 2047] == count:
            continue  # all alike in this digit
        total = 0
        for value in range(2048):
            size = histogram[digit, value]
            histogram[digit, value] = total
            total += size
        for i in range(count):
            value = (keys[i] >> shift) & 2047
            position = histogram[digit, value]
            histogram[digit, value] = position + 1
            other_keys[position] = keys[i]
            other_ids[position] = ids[i]
        keys, other_keys = other_keys, keys
        ids, other_ids = other_ids, ids
    for i in range(count):
        order[i] = ids[i]
    return count


@_jit
def _bin_tiles(
    sync: Ints,
    phase: int,
    packed: Floats,  # [N,PACKED]
    depths: Floats,  # [N]
    radii: Floats,  # [N]
    order: Ints,  # [N]
    boxes: Ints,  # [N,4]
    cursors: Ints,  # [PARTS,tiles]
    slot_starts: Ints,  # [N]
    offsets: Ints,  # [tiles+1]
    totals: Ints,  # [2+PARTS]
    width: int,
    height: int,
) -> None:
    """Count the entries of every tile.

    Writes the depth order [N] int32; per place in it the box of tiles [N,4] int32 (x0, y0, x1, y1, half open) and the
    number of its first slot in its part [N] int64; `cursors` [PARTS, tiles] int64, where each part's entries of each
    tile begin; `offsets` [tiles+1] int64; `totals` = [visible Gaussians, entries, each part's first slot].
    """
    tiles_x, tiles_y = (width + TILE - 1) // TILE, (height + TILE - 1) // TILE
    tiles = tiles_x * tiles_y
    if take(sync, phase, 1) == 0:
        totals[0] = _sort_by_depth(depths, radii, order)
        done(sync, phase)
    wait(sync, phase, 1)
    visible = totals[0]
    while True:
        part = take(sync, phase + 1, PARTS)
        if part < 0:
            break
        counts = cursors[part * tiles : (part + 1) * tiles]
        counts[:] = 0
        slots = 0
        for i in range(visible * part // PARTS, visible * (part + 1) // PARTS):
            prefetch(packed, PACKED * at(order, min(i + PREFETCH, visible - 1)))
            g = PACKED * at(order, i)
            u, v, ex, ey = at(packed, g), at(packed, g + 1), at(packed, g + 2), at(packed, g + 3)
            # Pixels whose centre lies in the box; a little slack for rounding, clamped before it becomes an integer.
            x0 = int(max(_ZERO, np.ceil(u - ex - _f(0.51)))) >> TILE_BITS
            y0 = int(max(_ZERO, np.ceil(v - ey - _f(0.51)))) >> TILE_BITS
            x1 = (int(max(-_ONE, min(_f(width - 1), np.floor(u + ex - _f(0.49))))) >> TILE_BITS) + 1
            y1 = (int(max(-_ONE, min(_f(height - 1), np.floor(v + ey - _f(0.49))))) >> TILE_BITS) + 1
            put(boxes, 4 * i, np.int32(x0))
            put(boxes, 4 * i + 1, np.int32(y0))
            put(boxes, 4 * i + 2, np.int32(x1))
            put(boxes, 4 * i + 3, np.int32(y1))
            put(slot_starts, i, slots)  # within the part for now
            for ty in range(y0, y1):
                for tile in range(ty * tiles_x + x0, ty * tiles_x + x1):
                    put(counts, tile, at(counts, tile) + 1)
                    slots += 1
        totals[2 + part] = slots
        done(sync, phase + 1)
    wait(sync, phase + 1, PARTS)
    if take(sync, phase + 2, 1) == 0:
        total = 0
        for tile in range(tiles):
            offsets[tile] = total
            for part in range(PARTS):
                size = cursors[part * tiles + tile]
                cursors[part * tiles + tile] = total
                total += size
        offsets[tiles] = total
        totals[1] = total
        base = 0
        for part in range(PARTS):
            size = totals[2 + part]
            totals[2 + part] = base
            base += size
        done(sync, phase + 2)
    wait(sync, phase + 2, 1)


@_jit
def _fill_entries(
    sync: Ints,
    phase: int,
    packed: Floats,  # [N,PACKED]
    colors: Floats,  # [N,3]
    width: int,
    order: Ints,  # [N]
    boxes: Ints,  # [N,4]
    first_cursors: Ints,  # [PARTS,tiles]
    first_slots: Ints,  # [N]
    totals: Ints,  # [2+PARTS]
    rows: Floats,  # [visible,ROW]
    slot_starts: Ints,  # [visible+1]
    entry_rows: Ints,  # [entries]
    entry_slots: Ints,  # [entries]
) -> None:
    """Pack the visible Gaussians in depth order and list the entries of every tile, front to back."""
    tiles_x = (width + TILE - 1) // TILE
    tiles = first_cursors.size // PARTS
    visible = totals[0]
    while True:
        part = take(sync, phase, PARTS)
        if part < 0:
            break
        cursor = first_cursors[part * tiles : (part + 1) * tiles].copy()
        base = totals[2 + part]
        for i in range(visible * part // PARTS, visible * (part + 1) // PARTS):
            ahead = at(order, min(i + PREFETCH, visible - 1))
            prefetch(packed, PACKED * ahead)
            prefetch(colors, 3 * ahead)
            g = at(order, i)
            p = PACKED * g
            alpha, beta, gamma = at(packed, p + 4), at(packed, p + 5), at(packed, p + 6)
            log2_opacity = at(packed, p + 7)
            r = ROW * i
            put(rows, r, at(packed, p))
            put(rows, r + 1, at(packed, p + 1))
            put(rows, r + 2, alpha)
            put(rows, r + 3, beta)
            put(rows, r + 4, gamma)
            put(rows, r + 5, log2_opacity)
            put(rows, r + 6, at(colors, 3 * g))
            put(rows, r + 7, at(colors, 3 * g + 1))
            put(rows, r + 8, at(colors, 3 * g + 2))
            put(rows, r + 9, -alpha * beta / (beta * beta + gamma * gamma))
            put(rows, r + 10, -beta / alpha)
            put(rows, r + 11, log2_opacity - _LOG2_ALPHA_MIN + _CULL_SLACK)
            slot = base + at(first_slots, i)
            put(slot_starts, i, slot)
            x0, x1 = at(boxes, 4 * i), at(boxes, 4 * i + 2)
            for ty in range(at(boxes, 4 * i + 1), at(boxes, 4 * i + 3)):
                for tile in range(ty * tiles_x + x0, ty * tiles_x + x1):
                    e = at(cursor, tile)
                    put(cursor, tile, e + 1)
                    put(entry_rows, e, np.int32(r))
                    put(entry_slots, e, np.int32(slot))
                    slot += 1
        if part == PARTS - 1:
            slot_starts[visible] = totals[1]
        done(sync, phase)
    wait(sync, phase, PARTS)


@_jit
def _composite_forward(
    sync: Ints,
    packed: Floats,  # [N,PACKED]
    colors: Floats,  # [N,3]
    background: Floats,  # [3]
    order: Ints,  # [N]
    boxes: Ints,  # [N,4]
    first_cursors: Ints,  # [PARTS,tiles]
    first_slots: Ints,  # [N]
    offsets: Ints,  # [tiles+1]
    totals: Ints,  # [2+PARTS]
    rows: Floats,  # [visible,ROW]
    slot_starts: Ints,  # [visible+1]
    entry_rows: Ints,  # [entries]
    entry_slots: Ints,  # [entries]
    entry_masks: Ints,  # [entries]
    image: Floats,  # [H,W,3]
    alpha_image: Floats,  # [H,W]
    width: int,
    height: int,
) -> None:
    """Image [H,W,3] and alpha [H,W] of the binned Gaussians; `entry_masks` keeps which blocks each entry meets.

    The log2 of a Gaussian's alpha at an offset (dx, dy) from a pixel to its centre is log2 opacity - p^2 - q^2 with
    p = alpha dx + beta dy and q = gamma dy: alpha, beta, gamma are the Cholesky root of its conic times log2(e) / 2.
    Within a block p and q are those of its first pixel less a pattern of 16 that all blocks share.
    """
    _fill_entries(
        sync, 0, packed, colors, width, order, boxes, first_cursors, first_slots, totals,
        rows, slot_starts, entry_rows, entry_slots,
    )  # fmt: skip
    tiles_x, tiles_y = (width + TILE - 1) // TILE, (height + TILE - 1) // TILE
    tiles = tiles_x * tiles_y
    pairs = np.empty(LANES * (ENTRIES_PER_ROUND + 1), np.int32)
    # Per entry of a round: p and q at the first pixel of each block.
    firsts = _scratch(2 * LANES * ENTRIES_PER_ROUND)
    # Per block: transmittance (negative once the pixel is finished), red, green, blue.
    state = _scratch(16 * 4 * LANES)
    lane_x, lane_y = load(_LANE_X, 0), load(_LANE_Y, 0)
    zero = lane_x * _ZERO
    b0, b1, b2 = background[0], background[1], background[2]
    while True:
        tile = take(sync, 1, tiles)
        if tile < 0:
            break
        left, top = (tile % tiles_x) * TILE, (tile // tiles_x) * TILE
        first, last = offsets[tile], offsets[tile + 1]
        alive = 0
        for block in range(16):
            if left + 4 * (block % 4) < width and top + 4 * (block // 4) < height:
                alive |= 1 << block
            s = 4 * LANES * block
            store(state, s, zero + _ONE)
            store(state, s + 16, zero)
            store(state, s + 32, zero)
            store(state, s + 48, zero)
        block_left, block_top = lane_x * _f(4.0) + (_f(left) + _HALF), lane_y * _f(4.0) + (_f(top) + _HALF)
        for start in range(first, last, ENTRIES_PER_ROUND):
            stop = min(last, start + ENTRIES_PER_ROUND)
            if alive == 0:
                entry_masks[start:last] = 0
                break
            count = 0
            for e in range(start, stop):
                prefetch(rows, at(entry_rows, min(e + PREFETCH, last - 1)))
                r = at(entry_rows, e)
                alpha, beta, gamma = at(rows, r + 2), at(rows, r + 3), at(rows, r + 4)
                x_high, y_high = at(rows, r) - block_left, at(rows, r + 1) - block_top
                f = 2 * LANES * (e - start)
                store(firsts, f, x_high * alpha + y_high * beta)
                store(firsts, f + 16, y_high * gamma)
                # The least of a convex quadratic over a rectangle lies on the edges that face its centre.
                x_low, y_low = x_high - _f(3.0), y_high - _f(3.0)
                x_near, y_near = maximum(x_low, minimum(x_high, _ZERO)), maximum(y_low, minimum(y_high, _ZERO))
                y_best = maximum(y_low, minimum(y_high, x_near * at(rows, r + 9)))
                x_best = maximum(x_low, minimum(x_high, y_near * at(rows, r + 10)))
                p, q = x_near * alpha + y_best * beta, y_best * gamma
                on_x = p * p + q * q
                p, q = x_best * alpha + y_near * beta, y_near * gamma
                on_y = p * p + q * q
                mask = bits(minimum(on_x, on_y) < at(rows, r + 11)) & alive
                put(entry_masks, e, np.uint16(mask))
                count = append_set(pairs, count, mask, np.int32(32 * (e - start)))
            for k in range(count):
                one = at(pairs, k)
                r = at(entry_rows, start + (one >> 5))
                s = 4 * LANES * (one & 31)
                alpha, beta, gamma = at(rows, r + 2), at(rows, r + 3), at(rows, r + 4)
                p = at(firsts, one) - (lane_x * alpha + lane_y * beta)
                q = at(firsts, one + 16) - (lane_y * gamma)
                power = at(rows, r + 5) - p * p - q * q
                a_pixel = minimum(select(power >= _LOG2_ALPHA_MIN, exp2(power), _ZERO), _ALPHA_MAX)
                trans = load(state, s)
                weight = a_pixel * trans
                after = trans - weight
                open_ = after > _STOP
                weight = select(open_, weight, _ZERO)
                store(state, s, select(open_, after, -absolute(trans)))
                store(state, s + 16, load(state, s + 16) + weight * at(rows, r + 6))
                store(state, s + 32, load(state, s + 32) + weight * at(rows, r + 7))
                store(state, s + 48, load(state, s + 48) + weight * at(rows, r + 8))
            for block in range(16):
                if bits(load(state, 4 * LANES * block) > _ZERO) == 0:
                    alive &= ~(1 << block)
        for block in range(16):
            x0, y0 = left + 4 * (block % 4), top + 4 * (block // 4)
            s = 4 * LANES * block
            behind = absolute(load(state, s))
            out_alpha, red = _ONE - behind, load(state, s + 16) + behind * b0
            green, blue = load(state, s + 32) + behind * b1, load(state, s + 48) + behind * b2
            if x0 + 4 <= width and y0 + 4 <= height:
                store_block(alpha_image, y0 * width + x0, width, out_alpha)
                store_rgb_block(image, 3 * (y0 * width + x0), 3 * width, red, green, blue)
                continue
            store(state, s, out_alpha)
            store(state, s + 16, red)
            store(state, s + 32, green)
            store(state, s + 48, blue)
            for y in range(min(4, height - y0)):
                for x in range(min(4, width - x0)):
                    pixel = (y0 + y) * width + x0 + x
                    lane = s + 4 * y + x
                    put(alpha_image, pixel, at(state, lane))
                    put(image, 3 * pixel, at(state, lane + 16))
                    put(image, 3 * pixel + 1, at(state, lane + 32))
                    put(image, 3 * pixel + 2, at(state, lane + 48))
        done(sync, 1)
    wait(sync, 1, tiles)


@_jit
def _composite_backward(
    sync: Ints,
    opacities: Floats,  # [N]
    order: Ints,  # [N]
    offsets: Ints,  # [tiles+1]
    totals: Ints,  # [2+PARTS]
    rows: Floats,  # [visible,ROW]
    slot_starts: Ints,  # [visible+1]
    entry_rows: Ints,  # [entries]
    entry_slots: Ints,  # [entries]
    entry_masks: Ints,  # [entries]
    image: Floats,  # [H,W,3]
    alpha_image: Floats,  # [H,W]
    v_image: Floats,  # [H,W,3]
    v_alpha: Floats,  # [H,W], or empty for zeros
    slots: Floats,  # [entries,16]
    v_means2d: Floats,  # [N,2]
    v_conics: Floats,  # [N,3]
    v_opacities: Floats,  # [N]
    v_colors: Floats,  # [N,3]
    width: int,
    height: int,
) -> None:
    """Gradients of `_composite_forward` for the Gaussians. `slots` [entries, 16] holds each entry's share."""
    tiles_x, tiles_y = (width + TILE - 1) // TILE, (height + TILE - 1) // TILE
    tiles = tiles_x * tiles_y
    visible = totals[0]
    # Per block: transmittance, gradient of what is behind, gradient of red, green, blue.
    state = _scratch(16 * 5 * LANES)
    firsts = _scratch(2 * LANES)
    share = _scratch(LANES)
    lane_x, lane_y = load(_LANE_X, 0), load(_LANE_Y, 0)
    zero = lane_x * _ZERO
    while True:
        tile = take(sync, 0, tiles)
        if tile < 0:
            break
        left, top = (tile % tiles_x) * TILE, (tile // tiles_x) * TILE
        if offsets[tile] == offsets[tile + 1]:
            done(sync, 0)
            continue
        for block in range(16):
            x0, y0 = left + 4 * (block % 4), top + 4 * (block // 4)
            s = 5 * LANES * block
            store(state, s, zero + _ONE)
            # What is behind: the rest of the colours and, through the last transmittance, background and alpha.
            if x0 + 4 <= width and y0 + 4 <= height:
                pixel = y0 * width + x0
                v_red, v_green, v_blue = load_rgb_block(v_image, 3 * pixel, 3 * width)
                red, green, blue = load_rgb_block(image, 3 * pixel, 3 * width)
                out = v_red * red + v_green * green + v_blue * blue
                if v_alpha.size:
                    out = out - (_ONE - load_block(alpha_image, pixel, width)) * load_block(v_alpha, pixel, width)
                store(state, s + 16, out)
                store(state, s + 32, v_red)
                store(state, s + 48, v_green)
                store(state, s + 64, v_blue)
                continue
            for offset in range(16, 80, LANES):
                store(state, s + offset, zero)  # pixels outside the image keep it
            for y in range(min(4, height - y0)):
                for x in range(min(4, width - x0)):
                    pixel = (y0 + y) * width + x0 + x
                    lane = s + 4 * y + x
                    total = _ZERO
                    if v_alpha.size:
                        total = -(_ONE - at(alpha_image, pixel)) * at(v_alpha, pixel)
                    for c in range(3):
                        total += at(v_image, 3 * pixel + c) * at(image, 3 * pixel + c)
                        put(state, lane + 32 + LANES * c, at(v_image, 3 * pixel + c))
                    put(state, lane + 16, total)
        block_left, block_top = lane_x * _f(4.0) + (_f(left) + _HALF), lane_y * _f(4.0) + (_f(top) + _HALF)
        last = offsets[tile + 1] - 1
        for e in range(offsets[tile], last + 1):
            prefetch(rows, at(entry_rows, min(e + PREFETCH, last)))
            prefetch(slots, LANES * at(entry_slots, min(e + PREFETCH, last)))
            mask = np.int64(at(entry_masks, e))  # blocks that finished rounds ago have left it
            r = at(entry_rows, e)
            alpha, beta, gamma = at(rows, r + 2), at(rows, r + 3), at(rows, r + 4)
            log2_opacity, red, green, blue = at(rows, r + 5), at(rows, r + 6), at(rows, r + 7), at(rows, r + 8)
            y_first = at(rows, r + 1) - block_top
            store(firsts, 0, (at(rows, r) - block_left) * alpha + y_first * beta)
            store(firsts, LANES, y_first * gamma)
            p_pattern, q_pattern = lane_x * alpha + lane_y * beta, lane_y * gamma
            s0, sp, sq, spp, spq, sqq, s_red, s_green, s_blue = zero, zero, zero, zero, zero, zero, zero, zero, zero
            while mask != 0:
                one = lowest_bit(mask)
                mask &= mask - 1
                s = 5 * LANES * one
                p = at(firsts, one) - p_pattern
                q = at(firsts, one + 16) - q_pattern
                power = log2_opacity - p * p - q * q
                a_free = select(power >= _LOG2_ALPHA_MIN, exp2(power), _ZERO)
                a_pixel = minimum(a_free, _ALPHA_MAX)
                trans = load(state, s)
                weight = a_pixel * trans
                after = trans - weight
                open_ = after > _STOP
                weight = select(open_, weight, _ZERO)
                v_red, v_green = load(state, s + 32), load(state, s + 48)
                v_blue = load(state, s + 64)
                seen = v_red * red + v_green * green + v_blue * blue
                behind = load(state, s + 16) - weight * seen
                # d alpha, times alpha: the gradient of log alpha, zero where alpha is capped.
                slope = a_pixel * (trans * seen - behind / (_ONE - a_pixel))
                slope = select(open_ & (a_free <= _ALPHA_MAX), slope, _ZERO)
                store(state, s, select(open_, after, _ZERO))
                store(state, s + 16, behind)
                slope_p, slope_q = slope * p, slope * q
                s0, sp, sq = s0 + slope, sp + slope_p, sq + slope_q
                spp, spq = spp + slope_p * p, spq + slope_p * q
                sqq = sqq + slope_q * q
                s_red, s_green = s_red + weight * v_red, s_green + weight * v_green
                s_blue = s_blue + weight * v_blue
            store(slots, LANES * at(entry_slots, e), sums((s0, sp, sq, spp, spq, sqq, s_red, s_green, s_blue)))
        done(sync, 0)
    wait(sync, 0, tiles)

    n = v_opacities.size
    if visible < n:
        while True:
            part = take(sync, 1, PARTS)
            if part < 0:
                break
            start, stop = n * part // PARTS, n * (part + 1) // PARTS
            v_means2d[2 * start : 2 * stop] = _ZERO
            v_conics[3 * start : 3 * stop] = _ZERO
            v_opacities[start:stop] = _ZERO
            v_colors[3 * start : 3 * stop] = _ZERO
            done(sync, 1)
        wait(sync, 1, PARTS)

    chunks = (visible + GAUSSIANS_PER_CHUNK - 1) // GAUSSIANS_PER_CHUNK
    while True:
        chunk = take(sync, 2, chunks)
        if chunk < 0:
            break
        for i in range(chunk * GAUSSIANS_PER_CHUNK, min(visible, (chunk + 1) * GAUSSIANS_PER_CHUNK)):
            total = zero
            for slot in range(at(slot_starts, i), at(slot_starts, i + 1)):
                total = total + load(slots, LANES * slot)
            store(share, 0, total)
            g, r = at(order, i), ROW * i
            alpha, beta, gamma = at(rows, r + 2), at(rows, r + 3), at(rows, r + 4)
            sp, sq, spp = at(share, 1), at(share, 2), at(share, 3)
            # By dx = (p - beta dy) / alpha and dy = q / gamma.
            tilt = beta / gamma
            spq, sqq = at(share, 4), at(share, 5)
            put(v_means2d, 2 * g, -_TWO * _LN_2 * alpha * sp)
            put(v_means2d, 2 * g + 1, -_TWO * _LN_2 * (beta * sp + gamma * sq))
            put(v_conics, 3 * g, -_HALF * (spp - tilt * (_TWO * spq - tilt * sqq)) / (alpha * alpha))
            put(v_conics, 3 * g + 1, -(spq - tilt * sqq) / (alpha * gamma))
            put(v_conics, 3 * g + 2, -_HALF * sqq / (gamma * gamma))
            put(v_opacities, g, at(share, 0) / at(opacities, g))
            put(v_colors, 3 * g, at(share, 6))
            put(v_colors, 3 * g + 1, at(share, 7))
            put(v_colors, 3 * g + 2, at(share, 8))
        done(sync, 2)
    wait(sync, 2, chunks)


# What the team calls: the kernels above with their arguments taken from a job, in the order that `team.run` gets them.


@kernel
def prepare(job: Any) -> None:
    """Project the Gaussians, sort them by depth and count the entries of every tile."""
    sync = counters(job)
    depths, radii, packed = floats(job, 8), floats(job, 9), floats(job, 10)
    _project_forward(
        sync, floats(job, 0), floats(job, 1), floats(job, 2), floats(job, 3), floats(job, 4), floats(job, 5),
        floats(job, 6), floats(job, 7), depths, radii, packed, int64s(job, 11),
    )  # fmt: skip
    _bin_tiles(
        sync, 1, packed, depths, radii, int32s(job, 12), int32s(job, 13), int64s(job, 14), int64s(job, 15),
        int64s(job, 16), int64s(job, 17), integer(job, 18), integer(job, 19),
    )  # fmt: skip


@kernel
def composite(job: Any) -> None:
    """List the entries of every tile and composite them."""
    _composite_forward(
        counters(job), floats(job, 0), floats(job, 1), floats(job, 2), int32s(job, 3), int32s(job, 4), int64s(job, 5),
        int64s(job, 6), int64s(job, 7), int64s(job, 8), floats(job, 9), int64s(job, 10), int32s(job, 11),
        int32s(job, 12), uint16s(job, 13), floats(job, 14), floats(job, 15), integer(job, 16), integer(job, 17),
    )  # fmt: skip


@kernel
def composite_backward(job: Any) -> None:
    """Gradients of `composite`."""
    _composite_backward(
        counters(job), floats(job, 0), int32s(job, 1), int64s(job, 2), int64s(job, 3), floats(job, 4), int64s(job, 5),
        int32s(job, 6), int32s(job, 7), uint16s(job, 8), floats(job, 9), floats(job, 10), floats(job, 11),
        floats(job, 12), floats(job, 13), floats(job, 14), floats(job, 15), floats(job, 16), floats(job, 17),
        integer(job, 18), integer(job, 19),
    )  # fmt: skip


@kernel
def project_backward(job: Any) -> None:
    """Gradients of the projection in `prepare`."""
    _project_backward(
        counters(job), floats(job, 0), floats(job, 1), floats(job, 2), floats(job, 3), floats(job, 4), floats(job, 5),
        floats(job, 6), floats(job, 7), floats(job, 8), floats(job, 9), floats(job, 10), floats(job, 11),
        floats(job, 12),
    )  # fmt: skip
