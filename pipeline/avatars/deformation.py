"""The `rigged` avatar's deformation on the CPU: numba kernels with hand-written gradients, float32.

The mathematics is that of `RiggedAvatar.deform`; arrays and the work of the team are as in
`pipeline.rasterize.kernels`. A lane is a Gaussian. What in torch is a chain of small operations, each with its own trip
through memory, is one pass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.rasterize import team
from pipeline.rasterize.simd import LANES, at, exp2, gather, lane_index, load, maximum, minimum, scatter, select, store
from pipeline.rasterize.team import counters, done, floats, kernel, take, wait

Floats = np.ndarray  # float32
Ints = np.ndarray

INLINED_SOURCES = "bfa23c98c280a9bd"
"""As in `pipeline.rasterize.kernels`."""

GAUSSIANS_PER_CHUNK = 512
JOINTS = 5
BONE = 16
"""Floats of a joint, and of a blend of joints: rotation (9), translation (3), rotation as a quaternion (4)."""
RIDDEN, LEARNED, BENT = 7, 13, 3
"""Floats of a Gaussian that its triangle, the learned basis and the torso's basis give it."""
STATE = 9
"""Floats that the backward pass wants of a Gaussian: rest mean (3), half its rotation vector (3), torso's bend (3)."""

_f = np.float32
_ZERO, _HALF, _ONE = _f(0.0), _f(0.5), _f(1.0)
_LOG2_E = _f(math.log2(math.e))
_EXP2_LIMIT = _f(126.0)

_jit = njit(nogil=True, cache=True, error_model="numpy")


@_jit
def _exp(x: Any) -> Any:
    """e to the power of each lane; what is not finite stays so, and is found by the rasteriser."""
    return exp2(minimum(maximum(x * _LOG2_E, -_EXP2_LIMIT), _EXP2_LIMIT)) + x * _ZERO


@_jit
def _sigmoid(x: Any) -> Any:
    return _ONE / (_ONE + _exp(-x))


@_jit
def _multiply(a: Any, b: Any) -> Any:
    """Product of two quaternions wxyz."""
    return (
        a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
        a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
        a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
        a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
    )


@_jit
def _conjugate(q: Any) -> Any:
    return q[0], -q[1], -q[2], -q[3]


@_jit
def _row3(array: Floats, stride: int, column: int, i: int, n: int) -> Any:
    return (
        gather(array, stride, column, i, n),
        gather(array, stride, column + 1, i, n),
        gather(array, stride, column + 2, i, n),
    )


@_jit
def _put3(array: Floats, stride: int, column: int, i: int, n: int, values: Any) -> None:
    scatter(array, stride, column, i, n, values[0])
    scatter(array, stride, column + 1, i, n, values[1])
    scatter(array, stride, column + 2, i, n, values[2])


@_jit
def _quat(array: Floats, i: int, n: int) -> Any:
    return gather(array, 4, 0, i, n), gather(array, 4, 1, i, n), gather(array, 4, 2, i, n), gather(array, 4, 3, i, n)


@_jit
def _put_quat(array: Floats, i: int, n: int, values: Any) -> None:
    scatter(array, 4, 0, i, n, values[0])
    scatter(array, 4, 1, i, n, values[1])
    scatter(array, 4, 2, i, n, values[2])
    scatter(array, 4, 3, i, n, values[3])


@_jit
def _mix(weights: Floats, rows: Floats, length: int, first: int, count: int, out: Floats) -> None:
    """out[:count] = the sum of weights [K] times rows [K,length], from place `first` on."""
    whole = count - count % LANES
    out[:count] = _ZERO
    for k in range(weights.size):
        weight, here = weights[k], k * length + first
        if weight == _ZERO:
            continue
        for j in range(0, whole, LANES):
            store(out, j, load(out, j) + load(rows, here + j) * weight)
        for j in range(whole, count):
            out[j] += at(rows, here + j) * weight


@_jit
def _mix_backward(
    weights: Floats, rows: Floats, length: int, first: int, count: int, v_out: Floats, v_weights: Floats, v_rows: Floats
) -> None:
    """Gradients of `_mix`: all of `v_weights` [K], and the part of `v_rows` [K,length] that `_mix` read."""
    whole = count - count % LANES
    for k in range(weights.size):
        weight, here = weights[k], k * length + first
        along = lane_index() * _ZERO
        for j in range(0, whole, LANES):
            v = load(v_out, j)
            store(v_rows, here + j, v * weight)
            along = along + v * load(rows, here + j)
        total = _sum(along)
        for j in range(whole, count):
            v_rows[here + j] = v_out[j] * weight
            total += v_out[j] * at(rows, here + j)
        v_weights[k] = total


@_jit
def _sum(vector: Any) -> Any:
    lanes = np.empty(LANES, np.float32)
    store(lanes, 0, vector)
    return lanes.sum()


@_jit
def _shares(torso_logits: Floats, skull_logits: Floats, eyes: Floats, i: int, n: int) -> Any:
    """Torso's and skull's shares, what the eyes leave, and the weights of the joints (`RigAvatar.joint_weights`)."""
    torso, skull = _sigmoid(gather(torso_logits, 1, 0, i, n)), _sigmoid(gather(skull_logits, 1, 0, i, n))
    left, right = gather(eyes, 2, 0, i, n), gather(eyes, 2, 1, i, n)
    body = _ONE - left - right
    head = body * (_ONE - torso)
    return torso, skull, body, (head * (_ONE - skull), body * torso, left, right, head * skull)


@_jit
def _blend(joints: Floats, weights: Any, place: int) -> Any:
    """One float of the blend of all joints."""
    return (
        weights[0] * at(joints, place)
        + weights[1] * at(joints, BONE + place)
        + weights[2] * at(joints, 2 * BONE + place)
        + weights[3] * at(joints, 3 * BONE + place)
        + weights[4] * at(joints, 4 * BONE + place)
    )


@_jit
def _forward(
    sync: Ints,
    means: Floats,  # [N,3]
    quats: Floats,  # [N,4]
    log_scales: Floats,  # [N,3]
    opacity_logits: Floats,  # [N]
    colors: Floats,  # [N,3]
    torso_logits: Floats,  # [N]
    skull_logits: Floats,  # [N]
    eyes: Floats,  # [N,2]
    expression: Floats,  # [E]
    follow: Floats,  # [E,N,RIDDEN]
    coefficients: Floats,  # [K]
    basis: Floats,  # [K,N,LEARNED]
    shape: Floats,  # [M]
    torso_basis: Floats,  # [M,N,BENT]
    joints: Floats,  # [JOINTS,BONE]
    units: Floats,  # [LEARNED]
    posed_means: Floats,  # [N,3]
    posed_quats: Floats,  # [N,4]
    scales: Floats,  # [N,3]
    opacities: Floats,  # [N]
    posed_colors: Floats,  # [N,3]
    state: Floats,  # [N,STATE]
) -> None:
    n = opacities.size
    chunks = (n + GAUSSIANS_PER_CHUNK - 1) // GAUSSIANS_PER_CHUNK
    ridden = np.empty(RIDDEN * GAUSSIANS_PER_CHUNK, np.float32)
    learned = np.empty(LEARNED * GAUSSIANS_PER_CHUNK, np.float32)
    bent = np.empty(BENT * GAUSSIANS_PER_CHUNK, np.float32)
    while True:
        chunk = take(sync, 0, chunks)
        if chunk < 0:
            break
        start = chunk * GAUSSIANS_PER_CHUNK
        count = min(n - start, GAUSSIANS_PER_CHUNK)
        _mix(expression, follow, RIDDEN * n, RIDDEN * start, RIDDEN * count, ridden)
        _mix(coefficients, basis, LEARNED * n, LEARNED * start, LEARNED * count, learned)
        _mix(shape, torso_basis, BENT * n, BENT * start, BENT * count, bent)
        for here in range(0, count, LANES):
            i = start + here
            _, _, _, weights = _shares(torso_logits, skull_logits, eyes, i, n)
            mean, shift = _row3(means, 3, 0, i, n), _row3(ridden, RIDDEN, 0, here, count)
            moved, bend = _row3(learned, LEARNED, 0, here, count), _row3(bent, BENT, 0, here, count)
            x = mean[0] + shift[0] + moved[0] * units[0] + bend[0] * weights[1]
            y = mean[1] + shift[1] + moved[1] * units[1] + bend[1] * weights[1]
            z = mean[2] + shift[2] + moved[2] * units[2] + bend[2] * weights[1]
            for a in range(3):
                row = 3 * a
                placed = _blend(joints, weights, row) * x + _blend(joints, weights, row + 1) * y
                placed = placed + _blend(joints, weights, row + 2) * z + _blend(joints, weights, 9 + a)
                scatter(posed_means, 3, a, i, n, placed)

            bone = (
                _blend(joints, weights, 12),
                _blend(joints, weights, 13),
                _blend(joints, weights, 14),
                _blend(joints, weights, 15),
            )
            turned, turn = _row3(ridden, RIDDEN, 3, here, count), _row3(learned, LEARNED, 3, here, count)
            a, b = (turned[0] + turn[0] * units[3]) * _HALF, (turned[1] + turn[1] * units[4]) * _HALF
            c = (turned[2] + turn[2] * units[5]) * _HALF
            quat = _quat(quats, i, n)
            quat = _multiply(bone, _multiply((a * _ZERO + _ONE, a, b, c), quat))
            _put_quat(posed_quats, i, n, quat)
            _put3(state, STATE, 0, i, n, (x, y, z))
            _put3(state, STATE, 3, i, n, (a, b, c))
            _put3(state, STATE, 6, i, n, bend)

            for k in range(3):
                size = gather(log_scales, 3, k, i, n) + gather(learned, LEARNED, 6 + k, here, count) * units[6 + k]
                size = size + gather(ridden, RIDDEN, 6, here, count)
                color = gather(colors, 3, k, i, n) + gather(learned, LEARNED, 9 + k, here, count) * units[9 + k]
                scatter(scales, 3, k, i, n, _exp(size))
                scatter(posed_colors, 3, k, i, n, color)
            logit = gather(opacity_logits, 1, 0, i, n) + gather(learned, LEARNED, 12, here, count) * units[12]
            scatter(opacities, 1, 0, i, n, _sigmoid(logit))
        done(sync, 0)
    wait(sync, 0, chunks)


@_jit
def _backward(
    sync: Ints,
    quats: Floats,  # [N,4]
    torso_logits: Floats,  # [N]
    skull_logits: Floats,  # [N]
    eyes: Floats,  # [N,2]
    coefficients: Floats,  # [K]
    basis: Floats,  # [K,N,LEARNED]
    shape: Floats,  # [M]
    torso_basis: Floats,  # [M,N,BENT]
    joints: Floats,  # [JOINTS,BONE]
    units: Floats,  # [LEARNED]
    scales: Floats,  # [N,3]
    opacities: Floats,  # [N]
    state: Floats,  # [N,STATE]
    v_posed_means: Floats,  # [N,3]
    v_posed_quats: Floats,  # [N,4]
    v_scales: Floats,  # [N,3]
    v_opacities: Floats,  # [N]
    v_posed_colors: Floats,  # [N,3]
    v_means: Floats,  # [N,3]
    v_quats: Floats,  # [N,4]
    v_log_scales: Floats,  # [N,3]
    v_opacity_logits: Floats,  # [N]
    v_torso_logits: Floats,  # [N]
    v_skull_logits: Floats,  # [N]
    v_basis: Floats,  # [K,N,LEARNED]
    v_torso_basis: Floats,  # [M,N,BENT]
    v_coefficients: Floats,  # [chunks,K]
    v_shape: Floats,  # [chunks,M]
    v_joints: Floats,  # [chunks,JOINTS,BONE]
) -> None:
    """Gradients of `_forward`; that of the colours is the one of `posed_colors`. Each chunk writes its share of those
    of the coefficients, the torso's shape and the joints."""
    n = opacities.size
    k_size, m_size = coefficients.size, shape.size
    chunks = (n + GAUSSIANS_PER_CHUNK - 1) // GAUSSIANS_PER_CHUNK
    v_learned = np.empty(LEARNED * GAUSSIANS_PER_CHUNK, np.float32)
    v_bent = np.empty(BENT * GAUSSIANS_PER_CHUNK, np.float32)
    v_bone = np.empty(BONE * LANES, np.float32)
    held = np.empty(JOINTS * LANES, np.float32)
    shares = np.empty(JOINTS * BONE * LANES, np.float32)
    while True:
        chunk = take(sync, 0, chunks)
        if chunk < 0:
            break
        start = chunk * GAUSSIANS_PER_CHUNK
        count = min(n - start, GAUSSIANS_PER_CHUNK)
        shares[:] = _ZERO
        for here in range(0, count, LANES):
            i = start + here
            torso, skull, body, weights = _shares(torso_logits, skull_logits, eyes, i, n)
            # Surplus lanes repeat the last Gaussian and must not count twice.
            alive = select(lane_index() < _f(count - here), lane_index() * _ZERO + _ONE, lane_index() * _ZERO)
            store(held, 0, weights[0] * alive)
            store(held, LANES, weights[1] * alive)
            store(held, 2 * LANES, weights[2] * alive)
            store(held, 3 * LANES, weights[3] * alive)
            store(held, 4 * LANES, weights[4] * alive)
            v_mean = _row3(v_posed_means, 3, 0, i, n)
            rest = _row3(state, STATE, 0, i, n)
            for a in range(3):
                v = gather(v_posed_means, 3, a, i, n)
                store(v_bone, (3 * a) * LANES, v * rest[0])
                store(v_bone, (3 * a + 1) * LANES, v * rest[1])
                store(v_bone, (3 * a + 2) * LANES, v * rest[2])
                store(v_bone, (9 + a) * LANES, v)

            quat = _quat(quats, i, n)
            half = _row3(state, STATE, 3, i, n)
            small = (half[0] * _ZERO + _ONE, half[0], half[1], half[2])
            bone = (
                _blend(joints, weights, 12),
                _blend(joints, weights, 13),
                _blend(joints, weights, 14),
                _blend(joints, weights, 15),
            )
            v_quat = _quat(v_posed_quats, i, n)
            v_turn = _multiply(v_quat, _conjugate(_multiply(small, quat)))
            store(v_bone, 12 * LANES, v_turn[0])
            store(v_bone, 13 * LANES, v_turn[1])
            store(v_bone, 14 * LANES, v_turn[2])
            store(v_bone, 15 * LANES, v_turn[3])
            v_inner = _multiply(_conjugate(bone), v_quat)
            v_small = _multiply(v_inner, _conjugate(quat))
            v_inner = _multiply(_conjugate(small), v_inner)
            _put_quat(v_quats, i, n, v_inner)

            # A blend is linear in the joints and in their weights.
            zero = lane_index() * _ZERO
            v_head, v_torso, v_skull = zero, zero, zero
            for place in range(BONE):
                v = load(v_bone, place * LANES)
                v_head = v_head + v * at(joints, place)
                v_torso = v_torso + v * at(joints, BONE + place)
                v_skull = v_skull + v * at(joints, 4 * BONE + place)
                for joint in range(JOINTS):
                    there = (joint * BONE + place) * LANES
                    store(shares, there, load(shares, there) + v * load(held, joint * LANES))

            v_rest = (
                _rotated_back(joints, weights, 0, v_mean),
                _rotated_back(joints, weights, 1, v_mean),
                _rotated_back(joints, weights, 2, v_mean),
            )
            _put3(v_means, 3, 0, i, n, v_rest)
            bend = _row3(state, STATE, 6, i, n)
            v_torso = v_torso + v_rest[0] * bend[0] + v_rest[1] * bend[1] + v_rest[2] * bend[2]
            _put3(
                v_bent, BENT, 0, here, count, (v_rest[0] * weights[1], v_rest[1] * weights[1], v_rest[2] * weights[1])
            )
            v_share = body * (v_torso - (_ONE - skull) * v_head - skull * v_skull)
            scatter(v_torso_logits, 1, 0, i, n, v_share * torso * (_ONE - torso))
            v_share = body * (_ONE - torso) * (v_skull - v_head)
            scatter(v_skull_logits, 1, 0, i, n, v_share * skull * (_ONE - skull))

            for k in range(3):
                v_size = gather(v_scales, 3, k, i, n) * gather(scales, 3, k, i, n)
                scatter(v_log_scales, 3, k, i, n, v_size)
                scatter(v_learned, LEARNED, 6 + k, here, count, v_size * units[6 + k])
                v_color = gather(v_posed_colors, 3, k, i, n)
                scatter(v_learned, LEARNED, 9 + k, here, count, v_color * units[9 + k])
            scatter(v_learned, LEARNED, 0, here, count, v_rest[0] * units[0])
            scatter(v_learned, LEARNED, 1, here, count, v_rest[1] * units[1])
            scatter(v_learned, LEARNED, 2, here, count, v_rest[2] * units[2])
            scatter(v_learned, LEARNED, 3, here, count, v_small[1] * (units[3] * _HALF))
            scatter(v_learned, LEARNED, 4, here, count, v_small[2] * (units[4] * _HALF))
            scatter(v_learned, LEARNED, 5, here, count, v_small[3] * (units[5] * _HALF))
            opacity = gather(opacities, 1, 0, i, n)
            v_logit = gather(v_opacities, 1, 0, i, n) * opacity * (_ONE - opacity)
            scatter(v_opacity_logits, 1, 0, i, n, v_logit)
            scatter(v_learned, LEARNED, 12, here, count, v_logit * units[12])
        _mix_backward(
            coefficients, basis, LEARNED * n, LEARNED * start, LEARNED * count, v_learned,
            v_coefficients[chunk * k_size : (chunk + 1) * k_size], v_basis,
        )  # fmt: skip
        _mix_backward(
            shape, torso_basis, BENT * n, BENT * start, BENT * count, v_bent,
            v_shape[chunk * m_size : (chunk + 1) * m_size], v_torso_basis,
        )  # fmt: skip
        for k in range(JOINTS * BONE):
            v_joints[chunk * JOINTS * BONE + k] = _sum(load(shares, k * LANES))
        done(sync, 0)
    wait(sync, 0, chunks)


@_jit
def _rotated_back(joints: Floats, weights: Any, column: int, v_mean: Any) -> Any:
    """One coordinate of a gradient in the camera, taken to rest coordinates."""
    return (
        _blend(joints, weights, column) * v_mean[0]
        + _blend(joints, weights, 3 + column) * v_mean[1]
        + _blend(joints, weights, 6 + column) * v_mean[2]
    )


@kernel
def deform_forward(job: Any) -> None:
    """`_forward` with its arguments taken from a job."""
    _forward(
        counters(job), floats(job, 0), floats(job, 1), floats(job, 2), floats(job, 3), floats(job, 4), floats(job, 5),
        floats(job, 6), floats(job, 7), floats(job, 8), floats(job, 9), floats(job, 10), floats(job, 11),
        floats(job, 12), floats(job, 13), floats(job, 14), floats(job, 15), floats(job, 16), floats(job, 17),
        floats(job, 18), floats(job, 19), floats(job, 20), floats(job, 21),
    )  # fmt: skip


@kernel
def deform_backward(job: Any) -> None:
    """`_backward` with its arguments taken from a job."""
    _backward(
        counters(job), floats(job, 0), floats(job, 1), floats(job, 2), floats(job, 3), floats(job, 4), floats(job, 5),
        floats(job, 6), floats(job, 7), floats(job, 8), floats(job, 9), floats(job, 10), floats(job, 11),
        floats(job, 12), floats(job, 13), floats(job, 14), floats(job, 15), floats(job, 16), floats(job, 17),
        floats(job, 18), floats(job, 19), floats(job, 20), floats(job, 21), floats(job, 22), floats(job, 23),
        floats(job, 24), floats(job, 25), floats(job, 26), floats(job, 27), floats(job, 28),
    )  # fmt: skip


class Rest(NamedTuple):
    """What N Gaussians are before a condition moves them, learned except `eyes`."""

    means: Tensor
    quats: Tensor
    log_scales: Tensor
    opacity_logits: Tensor
    colors: Tensor
    torso_logits: Tensor
    skull_logits: Tensor
    eyes: Tensor


class _Deform(torch.autograd.Function):
    """Means, quaternions, scales, opacities and colours of N Gaussians in the camera's coordinates."""

    @staticmethod
    def forward(
        ctx: Any,
        threads: int | None,
        units: Tensor,  # [13]
        expression: Tensor,  # [E]
        follow: Tensor,  # [E,N,6]
        coefficients: Tensor,  # [K]
        basis: Tensor,  # [K,N,13]
        shape: Tensor,  # [M]
        torso_basis: Tensor,  # [M,N,3]
        joints: Tensor,  # [5,16]
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        gaussians = Rest(*(value.contiguous() for value in rest))
        n = len(gaussians.means)
        mixed = [value.contiguous() for value in (coefficients, basis, shape, torso_basis, joints, units)]
        out = [torch.empty_like(value) for value in gaussians[:5]]
        state = out[0].new_empty(n, STATE)
        team.run(deform_forward, threads, *gaussians, expression.contiguous(), follow.contiguous(), *mixed, *out, state)
        ctx.save_for_backward(*gaussians, *mixed, *out[2:4], state)
        ctx.threads = threads
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *v_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gaussians, mixed, kept = Rest(*saved[:8]), saved[8:14], saved[14:]
        coefficients, basis, shape, torso_basis, joints, _ = mixed
        v_out = tuple(value.contiguous() for value in v_out)
        learned = (gaussians.means, gaussians.quats, gaussians.log_scales, gaussians.opacity_logits)
        v_rest = [torch.empty_like(value) for value in (*learned, gaussians.torso_logits, gaussians.skull_logits)]
        v_basis, v_torso_basis = torch.empty_like(basis), torch.empty_like(torso_basis)
        chunks = -(-len(gaussians.means) // GAUSSIANS_PER_CHUNK)
        shares = [basis.new_empty(chunks, *value.shape) for value in (coefficients, shape, joints)]
        team.run(
            deform_backward, ctx.threads, gaussians.quats, gaussians.torso_logits, gaussians.skull_logits,
            gaussians.eyes, *mixed, *kept, *v_out, *v_rest, v_basis, v_torso_basis, *shares,
        )  # fmt: skip
        v_coefficients, v_shape, v_joints = (share.sum(0) for share in shares)
        v_means, v_quats, v_log_scales, v_opacity_logits, v_torso_logits, v_skull_logits = v_rest
        return (
            *(None, None, None, None, v_coefficients, v_basis, v_shape, v_torso_basis, v_joints),
            *(v_means, v_quats, v_log_scales, v_opacity_logits, v_out[4], v_torso_logits, v_skull_logits, None),
        )


def deform(
    rest: Rest,
    units: Tensor,
    expression: Tensor,
    follow: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    shape: Tensor,
    torso_basis: Tensor,
    joints: Tensor,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means, quaternions, scales, opacities and colours in the camera's coordinates; float32, on the CPU.

    Gradients reach all but `units`, `expression`, `follow` and `rest.eyes`, and do not depend on the number of threads.

    Args:
        rest: the Gaussians at rest.
        units: [13] what one unit of a basis coefficient means in each column.
        expression, follow: [E] and [E,N,7], as in `RigAvatar.ridden`.
        coefficients, basis: [K] and [K,N,13].
        shape, torso_basis: [M] in metres, and [M,N,3].
        joints: [5,16] rotation, translation and quaternion of each joint.
        threads: how many threads work; None takes torch.get_num_threads().
    """
    means, quats, scales, opacities, colors = _Deform.apply(
        threads, units, expression, follow, coefficients, basis, shape, torso_basis, joints, *rest
    )
    return means, quats, scales, opacities, colors
