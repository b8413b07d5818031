"""3D Gaussians in SPZ, Niantic's format (github.com/nianticlabs/spz): a gzip of a header and of one array a quantity.

Header, 16 bytes little endian: magic `NGSP`, version, number of Gaussians (uint32 each); degree of the harmonics, bits
of the fraction, flags, 0 (bytes). Then positions (24-bit fixed point), opacities, colours, log-scales, rotations and
harmonics, each of all Gaussians. The axes are right, up, back ("RUB"): those of the head, and nothing is turned.

A rotation is four bytes in version 3: the number of its largest component in 2 bits, then sign and 9 bits of each
other one in steps of 1 / (511 sqrt 2); or three bytes in version 2: x, y, z, while w is not negative. We give positions
as many bits of fraction as fit (the reference has 12, 0.24 mm, which would show), and harmonics all of their 8 bits.

(A version 4, no gzip any more, came in 2026; whatever reads it reads version 3.)

A file to read may come from anywhere: what it unpacks to is bounded by what its header says, and that by its size.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from pipeline.errors import UserError
from pipeline.splats import MIN_SCALE, Splats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

MAGIC = 0x5053474E
VERSIONS = (2, 3)
MAX_GAUSSIANS = 10_000_000
"""As the reference implementation."""
MAX_RATIO = 200
"""A file that unpacks to more times its size is no file of Gaussians."""

_HEADER = struct.Struct("<IIIBBBB")
_EXTENDED = 0x2
_POSITION_BITS, _MOST_BITS = 24, 23
_GZIP = 31  # of zlib: the largest window, in a gzip container
_COLOR_SCALE = 0.15
_SQRT_HALF = np.float32(np.sqrt(0.5))


def write_spz(path: Path, splats: Splats, version: int = 3) -> None:
    """Write Gaussians. Equal Gaussians give equal bytes.

    Raises:
        ValueError: the arrays do not fit each other, hold values that are not finite, or reach further than 8 km.
    """
    count, degree = len(splats.checked()), splats.degree()
    farthest = float(np.abs(splats.means).max(initial=0))
    bits = int(np.clip(_POSITION_BITS - 1 - np.ceil(np.log2(max(farthest, 1e-9) + 1e-6)), 0, _MOST_BITS))
    fixed = np.round(splats.means.astype(np.float64) * 2**bits).astype(np.int64)
    if len(fixed) and np.abs(fixed).max() >= 2 ** (_POSITION_BITS - 1):
        raise ValueError("positions reach further than 8 km")
    parts = (
        np.ascontiguousarray(fixed.astype("<i4")).view(np.uint8).reshape(count, 3, 4)[..., :3],
        _bytes(255 * splats.opacities),
        _bytes(255 * (_COLOR_SCALE * splats.sh[:, 0] + 0.5)),
        _bytes(16 * (np.log(np.maximum(splats.scales, MIN_SCALE)) + 10)),
        (_largest_apart if version == 3 else _first_three)(splats.quats),
        _bytes(128 * splats.sh[:, 1 : (degree + 1) ** 2] + 128),
    )
    header = _HEADER.pack(MAGIC, version, count, degree, bits, 0, 0)
    pack = zlib.compressobj(9, wbits=_GZIP)
    path.write_bytes(
        b"".join([pack.compress(header), *(pack.compress(part.tobytes()) for part in parts), pack.flush()])
    )


def read_spz(path: Path) -> Splats:
    """Read Gaussians of version 2 or 3.

    Raises:
        UserError: the file cannot be read, is no SPZ of these versions, or is cut short, padded or damaged.
    """
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror or error}.", "check the path") from None

    def refuse(what: str) -> NoReturn:
        fix = "export it again; headcast reads SPZ of version 2 and 3"
        raise UserError(f"'{path}' is not an SPZ that can be read: {what}.", fix)

    stream = zlib.decompressobj(_GZIP)
    try:
        head = stream.decompress(packed, _HEADER.size)
        if len(head) < _HEADER.size:
            refuse("it ends within its header")
        magic, version, count, degree, bits, flags, _ = _HEADER.unpack(head)
        if magic != MAGIC:
            refuse("its header does not begin with NGSP")
        if version not in VERSIONS:
            refuse(f"it has version {version}")
        if count > MAX_GAUSSIANS or degree > 3 or bits > _MOST_BITS or flags & _EXTENDED:
            refuse(f"its header says {count} Gaussians, degree {degree}, {bits} bits of fraction, flags {flags}")
        sizes = [9, 1, 3, 3, 4 if version == 3 else 3, 3 * ((degree + 1) ** 2 - 1)]
        size = count * sum(sizes)
        if size > MAX_RATIO * len(packed):
            refuse(f"{len(packed)} bytes cannot hold its {count} Gaussians")
        body = stream.decompress(stream.unconsumed_tail, size + 1)
        if len(body) != size or not stream.eof:
            refuse(f"it does not hold the {size} bytes that its header promises")
    except zlib.error as error:
        refuse(f"it is no whole gzip file ({error})")
    values = np.frombuffer(body, np.uint8)
    ends = np.cumsum([0, *sizes]) * count
    split = [values[start:end].reshape(count, -1) for start, end in itertools.pairwise(ends)]
    positions, opacities, colors, scales, rotations, rest = split
    sh = np.zeros((count, 16, 3), np.float32)
    sh[:, 0] = (colors / 255 - 0.5) / _COLOR_SCALE
    sh[:, 1 : (degree + 1) ** 2] = (rest.reshape(count, -1, 3) - np.float32(128)) / 128
    quats = (_from_largest_apart if version == 3 else _from_first_three)(rotations)
    return Splats(
        np.asarray(_fixed(positions.reshape(count, 3, 3)) / 2.0**bits, np.float32),
        np.asarray(quats / np.linalg.norm(quats, axis=1, keepdims=True), np.float32),
        np.exp(np.asarray(scales / 16 - 10, np.float32)),
        np.asarray(opacities[:, 0] / 255, np.float32),
        sh,
    )


def _bytes(values: NDArray[Any]) -> Bytes:
    return np.asarray(np.clip(np.round(values), 0, 255), np.uint8)


def _fixed(three: Bytes) -> NDArray[np.int32]:
    """[...] signed numbers of three little-endian bytes [...,3]."""
    low, middle, high = np.moveaxis(three.astype(np.int32), -1, 0)
    return low | middle << 8 | (high ^ 0x80) - 0x80 << 16


def _first_three(quats: NDArray[np.float32]) -> Bytes:
    upper = quats * np.where(quats[:, :1] < 0, -1, 1)
    return _bytes(127.5 * upper[:, 1:] + 127.5)


def _from_first_three(three: Bytes) -> NDArray[np.float32]:
    xyz = three.astype(np.float32) / np.float32(127.5) - 1
    w = np.sqrt(np.maximum(0, 1 - np.square(xyz).sum(1, keepdims=True)))
    return np.concatenate([w, xyz], 1)


def _largest_apart(quats: NDArray[np.float32]) -> Bytes:
    xyzw = quats[:, [1, 2, 3, 0]]
    largest = np.abs(xyzw).argmax(1)
    rows = np.arange(len(xyzw))
    xyzw = xyzw * np.where(xyzw[rows, largest] < 0, -1, 1)[:, None]
    packed = largest.astype(np.uint32)
    for i in range(4):
        size = np.minimum(np.floor(511 * np.abs(xyzw[:, i]) / _SQRT_HALF + 0.5), 511).astype(np.uint32)
        more = packed << np.uint32(10) | (xyzw[:, i] < 0).astype(np.uint32) << np.uint32(9) | size
        packed = np.where(largest == i, packed, more)
    return packed.astype("<u4").view(np.uint8).reshape(-1, 4)


def _from_largest_apart(four: Bytes) -> NDArray[np.float32]:
    packed = np.ascontiguousarray(four).view("<u4")[:, 0].astype(np.uint32)
    largest = packed >> np.uint32(30)
    xyzw = np.zeros((len(packed), 4), np.float32)
    for i in reversed(range(4)):
        size = _SQRT_HALF * (packed & np.uint32(511)).astype(np.float32) / 511
        signed = np.where(packed >> np.uint32(9) & np.uint32(1), -size, size)
        here = largest == i
        xyzw[:, i] = np.where(here, 0, signed)
        packed = np.where(here, packed, packed >> np.uint32(10))
    rows = np.arange(len(packed))
    xyzw[rows, largest] = np.sqrt(np.maximum(0, 1 - np.square(xyzw).sum(1)))
    return xyzw[:, [3, 0, 1, 2]]
