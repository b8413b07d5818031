"""SPZ: layout by the specification, round trips within its steps, and files that nobody should trust."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from splat_data import random_splats, same_turns

from pipeline.errors import UserError
from pipeline.spz import read_spz, write_spz


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize(("version", "degrees"), [(3, 0.25), (2, 15.0)])
def test_round_trips_stay_within_the_formats_steps(tmp_path: Path, version: int, degrees: float, degree: int) -> None:
    splats = random_splats(300, seed=degree, degree=degree)
    write_spz(tmp_path / "a.spz", splats, version)
    again = read_spz(tmp_path / "a.spz")
    np.testing.assert_allclose(again.means, splats.means, atol=2**-23)
    np.testing.assert_allclose(np.log(again.scales), np.log(splats.scales), atol=1 / 32 + 1e-5)
    np.testing.assert_allclose(again.opacities, splats.opacities, atol=1 / 510 + 1e-6)
    np.testing.assert_allclose(again.sh[:, 0], splats.sh[:, 0], atol=0.5 / 255 / 0.15 + 1e-6)
    # Bytes end at 127/128.
    np.testing.assert_allclose(again.sh[:, 1:], splats.sh[:, 1:].clip(-1, 127 / 128), atol=1 / 256 + 1e-6)
    np.testing.assert_allclose(np.linalg.norm(again.quats, axis=1), 1, atol=1e-6)
    assert same_turns(again.quats, splats.quats).max() < degrees
    assert np.median(same_turns(again.quats, splats.quats)) < (0.15 if version == 3 else 1)


@pytest.mark.parametrize("reach", [1e-4, 0.3, 0.999999, 1.0, 5.0, 4000.0])
def test_positions_get_as_many_bits_as_fit(tmp_path: Path, reach: float) -> None:
    splats = random_splats(10)
    splats = replace(splats, means=(splats.means / np.abs(splats.means).max() * reach).astype(np.float32))
    write_spz(tmp_path / "a.spz", splats)
    np.testing.assert_allclose(read_spz(tmp_path / "a.spz").means, splats.means, atol=max(reach * 2**-22, 2**-24))


def test_the_layout_is_the_specifications(tmp_path: Path) -> None:
    """One Gaussian, read as github.com/nianticlabs/spz describes the bytes, by nothing of ours."""
    splats = random_splats(1, degree=0)
    quat = np.array([[0.5, -0.1, 0.7, 0.5]], np.float32)
    quat /= np.linalg.norm(quat)
    splats = replace(splats, quats=quat)
    write_spz(tmp_path / "a.spz", splats)
    data = gzip.decompress((tmp_path / "a.spz").read_bytes())
    magic, version, count, degree, bits, flags, zero = struct.unpack_from("<IIIBBBB", data)
    assert (magic, version, count, degree, flags, zero) == (0x5053474E, 3, 1, 0, 0, 0)
    assert len(data) == 16 + 9 + 1 + 3 + 3 + 4
    for axis in range(3):
        value = int.from_bytes(data[16 + 3 * axis : 19 + 3 * axis], "little", signed=True) / 2**bits
        assert value == pytest.approx(splats.means[0, axis], abs=2**-bits)
    assert data[25] == round(255 * float(splats.opacities[0]))
    assert [byte / 255 - 0.5 for byte in data[26:29]] == pytest.approx((0.15 * splats.sh[0, 0]).tolist(), abs=1 / 510)
    assert [byte / 16 - 10 for byte in data[29:32]] == pytest.approx(np.log(splats.scales[0]).tolist(), abs=1 / 32)
    packed = int.from_bytes(data[32:36], "little")
    # The largest of x, y, z, w is y; the rest, x first, lie behind it from the top, a sign and nine bits each.
    assert packed >> 30 == 1
    for shift, expected in ((20, quat[0, 1]), (10, quat[0, 3]), (0, quat[0, 0])):
        field = packed >> shift & 1023
        value = (field & 511) / 511 / np.sqrt(2) * (-1 if field >> 9 else 1)
        assert value == pytest.approx(float(expected), abs=1 / 511)


def test_equal_gaussians_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_spz(tmp_path / name, random_splats(20))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def packed(version: int = 3, count: int = 1, degree: int = 0, bits: int = 12, flags: int = 0, body: int = 20) -> bytes:
    head = struct.pack("<IIIBBBB", 0x5053474E, version, count, degree, bits, flags, 0)
    return gzip.compress(head + bytes(body))


GOOD = packed()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "ends within its header"),
        (b"NGSP\x04\x00\x00\x00" + bytes(40), "no whole gzip file"),
        (gzip.compress(b"ply\n"), "ends within its header"),
        (gzip.compress(bytes(40)), "does not begin with NGSP"),
        (GOOD[:-6], "does not hold|no whole gzip"),
        (GOOD[:12], "ends within|no whole gzip"),
        (packed(version=1), "version 1"),
        (packed(version=4), "version 4"),
        (packed(degree=4), "degree 4"),
        (packed(bits=200), "200 bits"),
        (packed(flags=2), "flags 2"),
        (packed(count=2**32 - 1), "4294967295 Gaussians"),
        (packed(count=9_000_000), "cannot hold its 9000000"),
        (packed(body=19), "does not hold the 20 bytes"),
        (packed(body=21), "does not hold the 20 bytes"),
        # A bomb: 80 MB in 80 kB.
        (packed(count=4_000_000, body=80_000_000), "cannot hold its 4000000"),
    ],
)
def test_hostile_files_are_refused_in_words(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "bad.spz"
    path.write_bytes(data)
    with pytest.raises(UserError, match=complaint) as error:
        read_spz(path)
    assert str(path) in error.value.what and error.value.fix


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_spz(tmp_path / "none.spz")
