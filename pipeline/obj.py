"""Wavefront OBJ: a triangle mesh as text that every 3D program opens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.dataset import write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray


def write_obj(path: Path, vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> None:
    """Write vertices [V,3] in metres, to a micrometre, and faces [F,3], counted from 1."""
    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices.tolist()]
    lines += [f"f {a} {b} {c}" for a, b, c in (faces + 1).tolist()]
    write_atomic(path, ("\n".join(lines) + "\n").encode())
