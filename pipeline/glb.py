"""GLB, the binary form of glTF 2.0: one JSON document and one buffer of arrays ("accessors").

Axes and units of glTF are those of the head: x to the subject's left, y up, z out of the face, metres.

A file to read may come from anywhere: sizes, offsets, types and counts are checked before they are used.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import __version__
from pipeline.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_JSON_BYTES = 16_000_000
POINTS, TRIANGLES = 0, 4

_MAGIC, _JSON, _BINARY = 0x46546C67, 0x4E4F534A, 0x004E4942
_TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
_FINISH = {"i1": 127, "u1": 255, "i2": 32767, "u2": 65535}


@dataclass
class Glb:
    """A document and its buffer; `add` arrays, then `write`.

    Attributes:
        document: glTF's JSON.
        buffer: the bytes that its buffer views cut up.
    """

    document: dict[str, Any] = field(default_factory=dict)
    buffer: bytearray = field(default_factory=bytearray)

    @staticmethod
    def of_one_mesh(primitive: dict[str, Any], name: str, **mesh: Any) -> Glb:
        """A scene of one node with one mesh of one primitive."""
        return Glb(
            {
                "asset": {"version": "2.0", "generator": f"headcast {__version__}"},
                "scene": 0,
                "scenes": [{"nodes": [0]}],
                "nodes": [{"mesh": 0, "name": name}],
                "meshes": [{"primitives": [primitive], "name": name, **mesh}],
                "accessors": [],
                "bufferViews": [],
            }
        )

    def add(self, array: NDArray[Any], *, normalized: bool = False, bounds: bool = False, indices: bool = False) -> int:
        """Append an array [n] or [n,2..4]; returns the number of its accessor.

        Args:
            array: float32, or integers of at most 32 bits.
            normalized: integers stand for [0, 1] or [-1, 1].
            bounds: tell least and greatest values, as positions must.
            indices: of vertices rather than values at them.
        """
        flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        component = next(code for code, kind in _TYPES.items() if np.dtype(kind) == flat.dtype)
        width = 1 if flat.ndim == 1 else flat.shape[1]
        self.buffer += bytes(-len(self.buffer) % 4)
        view = {"buffer": 0, "byteOffset": len(self.buffer), "byteLength": flat.nbytes}
        self.document["bufferViews"].append(view | {"target": 34963 if indices else 34962})
        self.buffer += flat.tobytes()
        accessor = {
            "bufferView": len(self.document["bufferViews"]) - 1,
            "componentType": component,
            "count": len(flat),
            "type": next(name for name, columns in _WIDTHS.items() if columns == width),
        }
        if normalized:
            accessor["normalized"] = True
        if bounds:
            table = flat.reshape(len(flat), width)
            accessor |= {"min": table.min(0).tolist(), "max": table.max(0).tolist()}
        self.document["accessors"].append(accessor)
        return len(self.document["accessors"]) - 1

    def write(self, path: Path) -> None:
        """Write the file."""
        self.document["buffers"] = [{"byteLength": len(self.buffer)}]
        text = json.dumps(self.document, separators=(",", ":"), allow_nan=False).encode()
        text += b" " * (-len(text) % 4)
        binary = bytes(self.buffer) + bytes(-len(self.buffer) % 4)
        size = 12 + 8 + len(text) + 8 + len(binary)
        heads = struct.pack("<III", _MAGIC, 2, size), struct.pack("<II", len(text), _JSON)
        path.write_bytes(b"".join([*heads, text, struct.pack("<II", len(binary), _BINARY), binary]))

    @staticmethod
    def read(path: Path) -> Glb:
        """Read a file's document and buffer.

        Raises:
            UserError: it cannot be read or is no GLB.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"Cannot read '{path}': {error.strerror or error}.", "check the path") from None
        try:
            return _parsed(data)
        except (ValueError, RecursionError) as error:
            raise refusal(path, error) from None

    def array(self, accessor: Any) -> NDArray[Any]:
        """An accessor's values [n] or [n,k], float32 where they are floats or normalised.

        Raises:
            ValueError: the document does not describe a finite array within the buffer.
        """
        entry = _entry(self.document, "accessors", accessor)
        view = _entry(self.document, "bufferViews", entry.get("bufferView"))
        kind, width = _TYPES.get(entry.get("componentType", 0)), _WIDTHS.get(entry.get("type", ""))
        if kind is None or width is None or "sparse" in entry or "extensions" in view:
            raise ValueError(f"its accessor {accessor} is none of plain numbers")
        layout = np.dtype(kind)
        count, offset = whole(entry, "count"), whole(entry, "byteOffset", 0)
        start, length = whole(view, "byteOffset", 0), whole(view, "byteLength")
        stride = whole(view, "byteStride", 0) or width * layout.itemsize
        last = offset + (count - 1) * stride + width * layout.itemsize if count else offset
        if last > length or start + length > len(self.buffer) or stride < width * layout.itemsize:
            raise ValueError(f"its accessor {accessor} lies outside its buffer")
        table: NDArray[Any] = np.ndarray(
            (count, width), layout, bytes(self.buffer), start + offset, (stride, layout.itemsize)
        )
        values = np.array(table)
        if entry.get("normalized") is True and kind[1:] in _FINISH:
            values = np.maximum(values.astype(np.float32) / _FINISH[kind[1:]], -1)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"its accessor {accessor} holds values that are not finite")
        return values[:, 0] if width == 1 else values


def refusal(path: Path, error: Exception) -> UserError:
    """What to say of a file that is at fault."""
    return UserError(f"'{path}' is not a GLB that can be read: {error}.", "export it again")


def whole(entry: dict[str, Any], name: str, default: int | None = None) -> int:
    """A number from 0 of a document's entry.

    Raises:
        ValueError: it is none.
    """
    value = entry.get(name, default)
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(f"its '{name}' is {str(value)[:40]}")
    return value


def _entry(document: dict[str, Any], group: str, index: Any) -> dict[str, Any]:
    entries = document.get(group)
    if not isinstance(entries, list) or type(index) is not int or not 0 <= index < len(entries):
        raise ValueError(f"it has no {group}[{str(index)[:40]}]")
    if not isinstance(entries[index], dict):
        raise ValueError(f"its {group}[{index}] is no object")
    return dict(entries[index])


def _parsed(data: bytes) -> Glb:
    if len(data) < 20 or struct.unpack_from("<II", data) != (_MAGIC, 2):
        raise ValueError("it does not begin as GLB of version 2 does")
    (size,), (length, kind) = struct.unpack_from("<I", data, 8), struct.unpack_from("<II", data, 12)
    if size != len(data):
        raise ValueError(f"it has {len(data)} bytes where its header promises {size}")
    if kind != _JSON or length > min(MAX_JSON_BYTES, len(data) - 20):
        raise ValueError("its first part is no JSON of a possible size")
    document = json.loads(data[20 : 20 + length])
    if not isinstance(document, dict):
        raise ValueError("its JSON is no object")
    rest = data[20 + length :]
    if not rest:
        return Glb(document)
    if len(rest) < 8 or struct.unpack_from("<II", rest) != (len(rest) - 8, _BINARY):
        raise ValueError("its second part is no buffer of its size")
    return Glb(document, bytearray(rest[8:]))
