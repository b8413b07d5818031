"""The SIMD vocabulary that the kernels are written in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numba import njit

from pipeline import losses
from pipeline.avatars import deformation
from pipeline.rasterize import harmonics, kernels, reference, simd, team


def test_cached_kernels_know_what_they_were_compiled_with() -> None:
    digest = hashlib.sha256()
    for module in (simd, team, reference):
        digest.update(Path(str(module.__file__)).read_bytes())
    expected = digest.hexdigest()[:16]
    for module in (deformation, harmonics, kernels, losses):
        assert expected == module.INLINED_SOURCES, f"set INLINED_SOURCES of {module.__name__} to {expected}"


vectors = hnp.arrays(np.float32, 16, elements=st.floats(-100, 100, width=32))


@njit
def _arithmetic(x: np.ndarray, y: np.ndarray, out: np.ndarray) -> tuple[int, int]:
    a, b = simd.load(x, 0), simd.load(y, 0)
    simd.store(out, 0, a + b * 2)
    simd.store(out, 16, -a - np.float32(1))
    simd.store(out, 32, simd.minimum(a, b))
    simd.store(out, 48, simd.maximum(a, b))
    simd.store(out, 64, simd.select(a > b, simd.sqrt(simd.absolute(a)), simd.ceil(b)))
    simd.store(out, 80, a / (simd.absolute(b) + 1))
    simd.store(out, 96, simd.lane_index())
    return simd.bits((a >= b) & (a < 50)), simd.bits(a <= b)


@settings(deadline=None)
@given(vectors, vectors)
def test_lanes_compute_like_numpy(x: np.ndarray, y: np.ndarray) -> None:
    out = np.empty(112, np.float32)
    both, at_most = _arithmetic(x, y, out)
    expected = [
        x + y * 2,
        -x - 1,
        np.minimum(x, y),
        np.maximum(x, y),
        np.where(x > y, np.sqrt(np.abs(x)), np.ceil(y)),
        x / (np.abs(y) + 1),
        np.arange(16),
    ]
    # A fused multiply-add rounds once.
    np.testing.assert_allclose(out, np.concatenate(expected), rtol=1e-6, atol=1e-5)
    assert both == sum(1 << i for i in range(16) if x[i] >= y[i] and x[i] < 50)
    assert at_most == sum(1 << i for i in range(16) if x[i] <= y[i])


@njit
def _exp2(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(0, x.size, 16):
        simd.store(out, i, simd.exp2(simd.load(x, i)))


def test_exp2_is_accurate() -> None:
    x = np.linspace(-126, 126, 16 * 4096).astype(np.float32)
    out = np.empty_like(x)
    _exp2(x, out)
    np.testing.assert_allclose(out, np.exp2(x.astype(np.float64)), rtol=3e-7)


@njit
def _log2(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(0, x.size, 16):
        simd.store(out, i, simd.log2(simd.load(x, i)))


def test_log2_is_accurate() -> None:
    x = np.concatenate([np.linspace(1e-3, 1, 16 * 4096), np.geomspace(1e-3, 1, 16 * 64)]).astype(np.float32)
    out = np.empty_like(x)
    _log2(x, out)
    np.testing.assert_allclose(out, np.log2(x.astype(np.float64)), rtol=2e-7, atol=2e-7)
    odd = np.array([0.0, 1e-45, 1e-38, 5.0, 3e38] + [1.0] * 11, np.float32)
    _log2(odd, out)
    assert np.isfinite(out[:16]).all() and (out[:2] < -100).all() and out[15] == 0


@njit
def _sums(x: np.ndarray, out: np.ndarray) -> None:
    a, b, c, d = simd.load(x, 0), simd.load(x, 16), simd.load(x, 32), simd.load(x, 48)
    simd.store(out, 0, simd.sums((a, b, c, d, a + a, b + b, c + c, d + d, a - b)))
    simd.store(out, 16, simd.sums((d,)))


@settings(deadline=None)
@given(hnp.arrays(np.float32, 64, elements=st.integers(-1000, 1000)))
def test_sums_land_in_their_lane(x: np.ndarray) -> None:
    out = np.empty(32, np.float32)
    _sums(x, out)
    a, b, c, d = x.reshape(4, 16).sum(axis=1)
    np.testing.assert_array_equal(out[:9], [a, b, c, d, 2 * a, 2 * b, 2 * c, 2 * d, a - b])
    assert out[16] == d


@njit
def _append(masks: np.ndarray, out: np.ndarray) -> int:
    count = 0
    for i in range(masks.size):
        count = simd.append_set(out, count, masks[i], 16 * i)
    return count


@settings(deadline=None)
@given(st.lists(st.integers(0, 0xFFFF), max_size=8))
def test_append_set_lists_set_bits(masks: list[int]) -> None:
    out = np.full(16 * len(masks) + 16, -1, np.int32)
    count = _append(np.array(masks, np.int64), out)
    expected = [16 * i + bit for i, mask in enumerate(masks) for bit in range(16) if mask >> bit & 1]
    assert out[:count].tolist() == expected


@njit
def _copy_columns(rows: np.ndarray, out: np.ndarray, first: int, count: int) -> None:
    for column in range(3):
        simd.scatter(out, 3, column, first, count, simd.gather(rows, 3, column, first, count))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 39))
def test_gather_and_scatter_stay_inside(count: int, first: int) -> None:
    first = min(first, count - 1)
    rows = np.arange(3 * count, dtype=np.float32)
    out = np.full(3 * count + 60, -1, np.float32)
    _copy_columns(rows, out, first, count)
    stop = min(count, first + 16)
    np.testing.assert_array_equal(out[3 * first : 3 * stop], rows[3 * first : 3 * stop])
    assert (out[: 3 * first] == -1).all() and (out[3 * stop :] == -1).all()


@njit
def _copy_blocks(planes: np.ndarray, pixels: np.ndarray, out: np.ndarray, width: int, first: int) -> None:
    simd.store(out, 0, simd.load_block(planes, first, width))
    red, green, blue = simd.load_rgb_block(pixels, 3 * first, 3 * width)
    simd.store(out, 16, red)
    simd.store(out, 32, green)
    simd.store(out, 48, blue)
    simd.store_block(planes, 0, width, simd.load_block(planes, first, width))
    simd.store_rgb_block(pixels, 0, 3 * width, red, green, blue)


def test_blocks_are_loaded_and_stored_by_rows() -> None:
    height, width, x, y = 9, 11, 7, 5  # the last block that fits
    plane = np.arange(height * width, dtype=np.float32).reshape(height, width)
    pixels = 1000 * np.arange(1, 4, dtype=np.float32) + plane[..., None]
    block = plane[y : y + 4, x : x + 4].copy()
    out = np.empty(64, np.float32)
    rest = plane[4:].copy(), pixels[:, 4:].copy()
    _copy_blocks(plane.reshape(-1), pixels.reshape(-1), out, width, y * width + x)
    np.testing.assert_array_equal(out.reshape(4, 4, 4), block + 1000 * np.arange(4)[:, None, None])
    np.testing.assert_array_equal(plane[:4, :4], block)
    np.testing.assert_array_equal(pixels[:4, :4], 1000 * np.arange(1, 4) + block[..., None])
    np.testing.assert_array_equal(plane[4:], rest[0])
    np.testing.assert_array_equal(pixels[:, 4:], rest[1])
