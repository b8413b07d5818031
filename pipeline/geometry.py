"""Rotations and rigid transforms, the same functions for NumPy arrays and for (differentiable) torch tensors.

Rotation vectors are axis times angle in radians, quaternions are `wxyz`, `T_a_b` takes coordinates of b to a and
multiplies column vectors. Every function works on any number of leading dimensions and takes its arguments by position.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)

# Below this squared angle the Taylor series of sin(x)/x is exact to double precision; the closed form loses digits.
_SMALL_SQUARED_ANGLE = 1e-8


class _Unary(Protocol):
    def __call__(self, first: ArrayT, /) -> ArrayT: ...


class _Binary(Protocol):
    def __call__(self, first: ArrayT, second: ArrayT, /) -> ArrayT: ...


class _Ternary(Protocol):
    def __call__(self, first: ArrayT, second: ArrayT, third: ArrayT, /) -> ArrayT: ...


@overload
def _numpy_too(function: Callable[[Tensor], Tensor]) -> _Unary: ...
@overload
def _numpy_too(function: Callable[[Tensor, Tensor], Tensor]) -> _Binary: ...
@overload
def _numpy_too(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> _Ternary: ...
def _numpy_too(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Let a torch function take NumPy arrays: it then returns a NumPy array."""

    @functools.wraps(function)
    def wrapper(*arrays: Any) -> Any:
        if isinstance(arrays[0], Tensor):
            return function(*arrays)
        return function(*(torch.from_numpy(np.require(array, requirements="W")) for array in arrays)).numpy()

    return wrapper


@_numpy_too
def skew(vectors: Tensor) -> Tensor:
    """Cross-product matrices [..., 3, 3] of vectors [..., 3]: `skew(a) @ b == cross(a, b)`."""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


@_numpy_too
def rotvec_to_matrix(rotvecs: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of rotation vectors [..., 3] (Rodrigues' formula), smooth at zero."""
    squared = rotvecs.square().sum(-1)[..., None, None]
    small = squared < _SMALL_SQUARED_ANGLE
    # The closed form is evaluated away from zero even where it is not used, else its gradient there is NaN.
    angle = torch.where(small, torch.ones_like(squared), squared).sqrt()
    a = torch.where(small, 1 - squared / 6, angle.sin() / angle)
    b = torch.where(small, 0.5 - squared / 24, (1 - angle.cos()) / angle.square())
    k = skew(rotvecs)
    return torch.eye(3, dtype=rotvecs.dtype, device=rotvecs.device) + a * k + b * (k @ k)


@_numpy_too
def matrix_to_quaternion(rotations: Tensor) -> Tensor:
    """Unit quaternions `wxyz` [..., 4] with w >= 0 of rotation matrices [..., 3, 3].

    Of the four ways to write a quaternion from its matrix the one with the largest divisor is taken (Shepperd,
    "Quaternion from rotation matrix", 1978), so that no angle is special.
    """
    m = rotations
    m00, m11, m22 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    m01, m02, m10, m12, m20, m21 = m[..., 0, 1], m[..., 0, 2], m[..., 1, 0], m[..., 1, 2], m[..., 2, 0], m[..., 2, 1]
    candidates = torch.stack(
        [
            torch.stack([1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01], -1),
            torch.stack([m21 - m12, 1 + m00 - m11 - m22, m10 + m01, m02 + m20], -1),
            torch.stack([m02 - m20, m10 + m01, 1 - m00 + m11 - m22, m21 + m12], -1),
            torch.stack([m10 - m01, m20 + m02, m21 + m12, 1 - m00 - m11 + m22], -1),
        ],
        -2,
    )
    best = torch.diagonal(candidates, dim1=-2, dim2=-1).argmax(-1)
    quaternion = candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    quaternion = quaternion / quaternion.norm(dim=-1, keepdim=True)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


@_numpy_too
def quaternion_to_matrix(quaternions: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions `wxyz` [..., 4], normalised first."""
    unit = quaternions / quaternions.norm(dim=-1, keepdim=True)
    w, k = unit[..., 0, None, None], skew(unit[..., 1:])
    return torch.eye(3, dtype=unit.dtype, device=unit.device) + 2 * (w * k + k @ k)


@_numpy_too
def quaternion_to_rotvec(quaternions: Tensor) -> Tensor:
    """Rotation vectors [..., 3] with an angle in [0, pi] of unit quaternions `wxyz` [..., 4]."""
    q = torch.where(quaternions[..., :1] < 0, -quaternions, quaternions)
    w, xyz = q[..., :1], q[..., 1:]
    squared = xyz.square().sum(-1, keepdim=True)
    small = squared < _SMALL_SQUARED_ANGLE
    sine = torch.where(small, torch.ones_like(squared), squared).sqrt()
    scale = torch.where(small, 2 + squared / 3, 2 * torch.atan2(sine, w) / sine)
    return scale * xyz


@_numpy_too
def matrix_to_rotvec(rotations: Tensor) -> Tensor:
    """Rotation vectors [..., 3] with an angle in [0, pi] of rotation matrices [..., 3, 3]."""
    return quaternion_to_rotvec(matrix_to_quaternion(rotations))


@_numpy_too
def quaternion_multiply(left: Tensor, right: Tensor) -> Tensor:
    """Hamilton product [..., 4] of quaternions `wxyz` [..., 4]: the rotation `right` first, then `left`."""
    w1, v1 = left[..., :1], left[..., 1:]
    w2, v2 = right[..., :1], right[..., 1:]
    scalar = w1 * w2 - (v1 * v2).sum(-1, keepdim=True)
    return torch.cat([scalar, w1 * v2 + w2 * v1 + torch.linalg.cross(v1, v2)], -1)


@_numpy_too
def quaternion_rotate(quaternions: Tensor, vectors: Tensor) -> Tensor:
    """Vectors [..., 3] turned by unit quaternions `wxyz` [..., 4], without a matrix for each."""
    w, axis = quaternions[..., :1], quaternions[..., 1:]
    twice = 2 * torch.linalg.cross(axis, vectors)
    return vectors + w * twice + torch.linalg.cross(axis, twice)


@_numpy_too
def slerp(start: Tensor, end: Tensor, fraction: Tensor) -> Tensor:
    """Quaternions [..., 4] at `fraction` [...] of the shorter arc from `start` to `end` [..., 4] (Shoemake, 1985)."""
    conjugate = torch.cat([start[..., :1], -start[..., 1:]], -1)
    rotvec = quaternion_to_rotvec(quaternion_multiply(end, conjugate)) * fraction[..., None]
    half = 0.5 * rotvec
    angle = half.norm(dim=-1, keepdim=True)
    step = torch.cat([angle.cos(), torch.sinc(angle / torch.pi) * half], -1)
    return quaternion_multiply(step, start)


@_numpy_too
def make_rigid(rotations: Tensor, translations: Tensor) -> Tensor:
    """Homogeneous transforms [..., 4, 4] of rotations [..., 3, 3] and translations [..., 3]."""
    top = torch.cat([rotations, translations[..., None]], -1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat([top, bottom], -2)


@_numpy_too
def invert_rigid(transforms: Tensor) -> Tensor:
    """Inverses [..., 4, 4] of rigid transforms [..., 4, 4]."""
    transposed = transforms[..., :3, :3].transpose(-1, -2)
    return make_rigid(transposed, -(transposed @ transforms[..., :3, 3:]).squeeze(-1))


@_numpy_too
def transform_points(transforms: Tensor, points: Tensor) -> Tensor:
    """Points [..., N, 3] of frame b in frame a, for `transforms` = `Ts_a_b` [..., 4, 4]."""
    return points @ transforms[..., :3, :3].transpose(-1, -2) + transforms[..., None, :3, 3]


@_numpy_too
def project_points(points_cam: Tensor, K: Tensor) -> Tensor:
    """Pixel coordinates [..., N, 2] of camera-space points [..., N, 3] (OpenCV axes) under intrinsics `K` [..., 3, 3].

    The origin is the top-left corner of the image, so the centre of the first pixel is (0.5, 0.5).
    """
    homogeneous = points_cam @ K.transpose(-1, -2)
    return homogeneous[..., :2] / homogeneous[..., 2:]
