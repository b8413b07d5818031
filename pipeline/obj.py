"""Wavefront OBJ: a triangle mesh as text that every 3D program opens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.dataset import write_atomic
from pipeline.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BYTES = 32 << 20


def write_obj(
    path: Path, vertices: NDArray[np.floating], faces: NDArray[np.integer], digits: int = 6, *, sync: bool = True
) -> None:
    """Write vertices [V,3] in metres, by default to a micrometre, and faces [F,3], counted from 1."""
    lines = [f"v {x:.{digits}f} {y:.{digits}f} {z:.{digits}f}" for x, y, z in vertices.tolist()]
    lines += [f"f {a} {b} {c}" for a, b, c in (faces + 1).tolist()]
    write_atomic(path, ("\n".join(lines) + "\n").encode(), sync=sync)


class ObjReader:
    """Reads meshes of one topology fast: faces that stand as they stood in the mesh before are not parsed again."""

    def __init__(self) -> None:
        self._text: list[bytes] | None = None
        self._faces = np.zeros((0, 3), np.int32)

    def read(self, path: Path) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Vertices [V,3] and triangles [F,3], counted from 0; textures, normals, colours and groups are passed over.

        Raises:
            UserError: it is too large, no OBJ, has polygons, or faces without vertices.
            OSError: it cannot be read.
        """
        if path.stat().st_size > MAX_BYTES:
            raise _wrong(path, f"has more than {MAX_BYTES >> 20} MB")
        lines = path.read_bytes().split(b"\n")
        vertices = _numbers(path, [line for line in lines if line[:2] == b"v "])
        text = [line for line in lines if line[:2] == b"f "]
        if text != self._text:
            self._faces = _triangles(path, text)
            self._text = text
        if self._faces.max() >= len(vertices):
            raise _wrong(path, f"has a face of vertex {self._faces.max() + 1} and only {len(vertices)} vertices")
        return vertices, self._faces


def _numbers(path: Path, lines: list[bytes]) -> NDArray[np.float64]:
    if not lines:
        raise _wrong(path, "has no vertices")
    words = b" ".join(lines).split()
    # x y z, with a weight, or with a colour.
    width = len(words) // len(lines)
    try:
        if width not in (4, 5, 7) or len(words) != width * len(lines) or set(words[::width]) != {b"v"}:
            raise ValueError("no three numbers")
        columns = [np.array(list(map(float, words[axis::width]))) for axis in (1, 2, 3)]
    except ValueError as error:
        raise _wrong(path, f"has a vertex that cannot be read: {error}") from None
    vertices = np.stack(columns, 1)
    if not np.isfinite(vertices).all():
        raise _wrong(path, "has a vertex that is not a number (NaN or infinite)")
    return vertices


def _triangles(path: Path, lines: list[bytes]) -> NDArray[np.int32]:
    if not lines:
        raise _wrong(path, "has no faces")
    words = b" ".join(lines).split()
    if len(words) != 4 * len(lines) or set(words[::4]) != {b"f"}:
        raise _wrong(path, "has a face that is no triangle")
    try:
        corners = [[int(word.partition(b"/")[0]) for word in words[corner::4]] for corner in (1, 2, 3)]
        faces = np.array(corners, np.int32).T - 1
    except (ValueError, OverflowError) as error:
        raise _wrong(path, f"has a face that cannot be read: {error}") from None
    if faces.min() < 0:
        raise _wrong(path, f"has a face of vertex {faces.min() + 1}; vertices are counted from 1")
    return faces


def _wrong(path: Path, what: str) -> UserError:
    return UserError(f"'{path}' {what}.", "mend the mesh, or make it again with its own tools")
