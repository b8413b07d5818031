"""3D Gaussians in SOG, PlayCanvas' format: a zip of `meta.json` and of lossless WebP textures, a pixel a Gaussian.

Positions are 16 bits between the clip's least and greatest, of `sign(x) log(1 + |x|)`; rotations the three smaller
components in 8 bits, times sqrt 2, and which is left out in alpha (252 + its number in wxyz); log-scales and colours a
byte each into a codebook of 256 numbers; opacity a byte; harmonics a label into a palette whose entries are bytes into
a codebook. Gaussians lie in Morton order. The axes are those of a 3DGS PLY, y down, as everybody writes them.

A file to read may come from anywhere: names, sizes and values are checked before they are used.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import __version__
from pipeline.errors import UserError
from pipeline.splats import MIN_SCALE, Splats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float64]

SCHEMA = 2
MAX_PALETTE = 65_536
MAX_GAUSSIANS = 10_000_000
MAX_META_BYTES = 1_000_000
PALETTE_COLUMNS = 64
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
"""What Python raises over zip files of somebody else; the last where an entry is encrypted, or of a new kind."""

_LEVELS = 256
_TAG = 252
_OTHERS = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
_STAMP = (1980, 1, 1, 0, 0, 0)  # the least that a zip can hold: equal Gaussians shall give equal bytes


def write_sog(path: Path, splats: Splats) -> None:
    """Write Gaussians. Equal Gaussians give equal bytes.

    Raises:
        ValueError: there are none, the arrays do not fit each other or are not finite; or there are harmonics and more
            Gaussians than the palette has entries.
    """
    if not len(splats.checked()):
        raise ValueError("there are no Gaussians")
    order = _morton(splats.means)
    turned, degree = splats.turned(), splats.degree()
    count = len(splats)
    if degree and count > MAX_PALETTE:
        raise ValueError(f"a palette of harmonics has {MAX_PALETTE} entries, there are {count} Gaussians")
    width = 4 * int(np.ceil(np.sqrt(count) / 4))
    height = 4 * int(np.ceil(count / width / 4))

    def texture(*channels: NDArray[Any]) -> bytes:
        pixels = np.zeros((height * width, 4), np.uint8)
        pixels[:, 3] = 255
        for channel, values in enumerate(channels):
            pixels[:count, channel] = values[order]
        return _packed(pixels.reshape(height, width, 4))

    flat = np.sign(turned.means) * np.log1p(np.abs(turned.means.astype(np.float64)))
    low, high = flat.min(0), flat.max(0)
    steps = np.round(65535 * (flat - low) / np.maximum(high - low, 1e-9)).astype(np.int64)
    scales, scale_book = _quantised(np.log(np.maximum(turned.scales, MIN_SCALE)))
    colors, color_book = _quantised(turned.sh[:, 0])
    quats, tags = _smaller_three(turned.quats)
    opacities = np.round(255 * turned.opacities)
    files = {
        "means_l.webp": texture(*(steps & 255).T),
        "means_u.webp": texture(*(steps >> 8).T),
        "scales.webp": texture(*scales.T),
        "quats.webp": texture(*quats.T, tags),
        "sh0.webp": texture(*colors.T, opacities),
    }
    meta: dict[str, Any] = {
        "version": SCHEMA,
        "asset": {"generator": f"headcast {__version__}"},
        "count": count,
        "means": {"mins": low.tolist(), "maxs": high.tolist(), "files": ["means_l.webp", "means_u.webp"]},
        "scales": {"codebook": scale_book.tolist(), "files": ["scales.webp"]},
        "quats": {"files": ["quats.webp"]},
        "sh0": {"codebook": color_book.tolist(), "files": ["sh0.webp"]},
    }
    if degree:
        bands = (degree + 1) ** 2 - 1
        values, book = _quantised(turned.sh[:, 1 : 1 + bands])
        rows = int(np.ceil(count / PALETTE_COLUMNS))
        palette = np.zeros((rows * PALETTE_COLUMNS, bands, 4), np.uint8)
        palette[..., 3] = 255
        palette[:count, :, :3] = values
        labels = np.arange(count)
        files["shN_centroids.webp"] = _packed(palette.reshape(rows, PALETTE_COLUMNS * bands, 4))
        files["shN_labels.webp"] = texture(labels & 255, labels >> 8, np.zeros(count))
        names = ["shN_centroids.webp", "shN_labels.webp"]
        meta["shN"] = {"count": count, "bands": degree, "codebook": book.tolist(), "files": names}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"meta.json": json.dumps(meta).encode(), **files}.items():
            file.writestr(zipfile.ZipInfo(name, _STAMP), data)


def read_sog(path: Path) -> Splats:
    """Read Gaussians of version 2, bundled in one file.

    Raises:
        UserError: the file cannot be read, is no such SOG, or holds what makes no sense.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return _read(file).turned()
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror or error}.", "check the path") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, *ZIP_DAMAGE) as error:
        raise UserError(
            f"'{path}' is not a SOG that can be read: {error}.", "export it again; headcast reads version 2"
        ) from None


def _read(file: zipfile.ZipFile) -> Splats:
    meta = json.loads(_entry(file, "meta.json", MAX_META_BYTES))
    count = meta["count"]
    if meta.get("version") != SCHEMA or type(count) is not int or not 0 < count <= MAX_GAUSSIANS:
        raise ValueError(f"its version is {str(meta.get('version'))[:20]}, its count {str(count)[:20]}")

    def texture(name: str, number: int = 0) -> Bytes:
        # A pixel has four bytes; lossless WebP needs hardly more for noise.
        pixels = _unpacked(_entry(file, meta[name]["files"][number], 8 * count + 100_000), 4 * count + 100_000)
        if len(pixels) < count:
            raise ValueError(f"its texture of '{name}' is too small")
        return pixels[:count]

    def book(name: str) -> NDArray[np.float32]:
        values = np.array(meta[name]["codebook"], np.float32)
        if values.shape != (_LEVELS,) or not np.isfinite(values).all():
            raise ValueError(f"its codebook of '{name}' has not {_LEVELS} finite numbers")
        return values

    low, high = (np.array(meta["means"][name], np.float64) for name in ("mins", "maxs"))
    if low.shape != (3,) or high.shape != (3,) or not (np.abs([low, high]) < 50).all():
        raise ValueError("its bounds make no sense")
    lower, upper = (texture("means", number)[:, :3].astype(np.float64) for number in (0, 1))
    flat = low + (high - low) * (lower + 256 * upper) / 65535
    quats = texture("quats")
    if (quats[:, 3] < _TAG).any():
        raise ValueError("a rotation makes no sense")
    shades, sh = texture("sh0"), np.zeros((count, 16, 3), np.float32)
    sh[:, 0] = book("sh0")[shades[:, :3]]
    with np.errstate(over="ignore"):
        scales = np.exp(book("scales")[texture("scales")[:, :3]])
    if not np.isfinite(scales).all():
        raise ValueError("a scale makes no sense")
    if "shN" in meta:
        bands, entries = meta["shN"]["bands"], meta["shN"]["count"]
        if bands not in (1, 2, 3) or type(entries) is not int or not 0 < entries <= MAX_PALETTE:
            raise ValueError("its palette of harmonics makes no sense")
        size = (bands + 1) ** 2 - 1
        labels = texture("shN", 1).astype(np.int64) @ np.array([1, 256, 0, 0])
        most = size * (entries + PALETTE_COLUMNS)
        pixels = _unpacked(_entry(file, meta["shN"]["files"][0], 8 * most + 100_000), most)
        palette = pixels[: len(pixels) // size * size].reshape(-1, size, 4)
        if labels.max() >= min(entries, len(palette)):
            raise ValueError("a label lies outside its palette")
        sh[:, 1 : 1 + size] = book("shN")[palette[labels, :, :3]]
    means = np.sign(flat) * np.expm1(np.abs(flat))
    opacities = np.asarray(shades[:, 3] / 255, np.float32)
    return Splats(np.asarray(means, np.float32), _from_smaller_three(quats), scales, opacities, sh)


def _entry(file: zipfile.ZipFile, name: Any, most: int) -> bytes:
    """An entry's bytes, of which there are no more than is believed."""
    info = file.getinfo(name)
    if info.file_size > most:
        raise ValueError(f"its '{name[:40]}' has {info.file_size} bytes")
    with file.open(info) as stream:
        return stream.read(most)


def _packed(pixels: Bytes) -> bytes:
    """RGBA [h,w,4] as lossless WebP."""
    import cv2

    bgra = np.ascontiguousarray(pixels[..., [2, 1, 0, 3]])
    # More than 100 stands for lossless. A picture without transparency is written without alpha.
    seen = bgra if (pixels[..., 3] < 255).any() else np.ascontiguousarray(bgra[..., :3])
    done, data = cv2.imencode(".webp", seen, (cv2.IMWRITE_WEBP_QUALITY, 101))
    if not done:
        raise ValueError("WebP cannot be written")
    return bytes(data.tobytes())


def _unpacked(data: bytes, most: int) -> Bytes:
    """RGBA [n,4] of a lossless WebP of at most so many pixels.

    Raises:
        ValueError: it is none, or larger.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
        if image.width * image.height > most:
            raise ValueError(f"a texture has {image.width} x {image.height} pixels")
        return np.asarray(image.convert("RGBA")).reshape(-1, 4)


def _quantised(values: NDArray[np.float32]) -> tuple[Bytes, Floats]:
    """A byte for each number, and the 256 numbers that they stand for.

    These lie as dense as the values do, mixed with evenly: no step is wider than a 128th of the range. The few largest
    Gaussians are seen most, so the least squared error (k-means) looks worse.
    """
    flat = np.sort(values.astype(np.float64).ravel())
    evenly = (flat - flat[0]) / max(flat[-1] - flat[0], 1e-9)
    ranks = np.linspace(0, 1, len(flat))
    book = np.interp(np.linspace(0, 1, _LEVELS), (evenly + ranks) / max(evenly[-1] + 1, 1e-9), flat)
    return np.searchsorted((book[1:] + book[:-1]) / 2, values).astype(np.uint8), book


def _smaller_three(quats: NDArray[np.float32]) -> tuple[Bytes, Bytes]:
    """Bytes [N,3] and tags [N]."""
    rows, largest = np.arange(len(quats)), np.abs(quats).argmax(1)
    upper = quats * np.where(quats[rows, largest] < 0, -1, 1)[:, None]
    three = np.take_along_axis(upper, _OTHERS[largest], 1)
    return np.round(255 * (three * np.sqrt(0.5) + 0.5)).clip(0, 255).astype(np.uint8), (_TAG + largest).astype(np.uint8)


def _from_smaller_three(pixels: Bytes) -> NDArray[np.float32]:
    largest, rows = pixels[:, 3].astype(np.int64) - _TAG, np.arange(len(pixels))
    three = (pixels[:, :3] / 255 * 2 - 1) * np.sqrt(0.5)
    quats = np.zeros((len(pixels), 4))
    np.put_along_axis(quats, _OTHERS[largest], three, 1)
    quats[rows, largest] = np.sqrt(np.maximum(0, 1 - np.square(three).sum(1)))
    return np.asarray(quats / np.linalg.norm(quats, axis=1, keepdims=True), np.float32)


def _morton(points: NDArray[np.float32]) -> NDArray[np.int64]:
    """An order [N] in which neighbours in space mostly follow each other: textures pack better."""
    low, high = points.min(0), points.max(0)
    cells = (1023 * (points - low) / np.maximum(high - low, 1e-9)).astype(np.int64)
    code = np.zeros(len(points), np.int64)
    for bit in range(10):
        for axis in range(3):
            code |= (cells[:, axis] >> bit & 1) << (3 * bit + axis)
    return np.argsort(code, kind="stable")
