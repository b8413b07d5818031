"""OBJ files, written and read back; what is no mesh is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.obj import ObjReader, write_obj

TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"


def test_reads_what_it_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    faces = rng.integers(0, 40, (70, 3))
    reader = ObjReader()
    for index in range(3):
        vertices = rng.normal(0, 0.1, (40, 3))
        write_obj(tmp_path / f"{index}.obj", vertices, faces, 8)
        found, same = reader.read(tmp_path / f"{index}.obj")
        np.testing.assert_allclose(found, vertices, atol=5.1e-9)
        np.testing.assert_array_equal(same, faces)


@pytest.mark.parametrize(
    "text",
    [
        "# made by trimesh\nmtllib a.mtl\no head\nvn 0 0 1\nvt 0 0\n"
        + TRIANGLE.replace("f 1 2 3", "f 1/1/1 2/1/1 3/1/1"),
        "v 0 0 0 0.5 0.5 0.5\nv 1 0 0 0.5 0.5 0.5\nv 0 1 0 0.5 0.5 0.5\nf 1//1 2//1 3//1\n",
        TRIANGLE.replace("\n", "\r\n"),
    ],
)
def test_reads_what_other_programs_write(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.obj").write_text(text, newline="")
    vertices, faces = ObjReader().read(tmp_path / "a.obj")
    np.testing.assert_array_equal(vertices, [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(faces, [[0, 1, 2]])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no vertices"),
        ("v 0 0 0\n", "has no faces"),
        (TRIANGLE.replace("v 1 0 0", "v 1 0"), "vertex that cannot be read"),
        (TRIANGLE.replace("v 1 0 0", "v 1 0 x"), "vertex that cannot be read"),
        (TRIANGLE.replace("v 1 0 0", "v 1 0 nan"), "not a number"),
        (TRIANGLE.replace("f 1 2 3", "f 1 2 3 1"), "no triangle"),
        (TRIANGLE.replace("f 1 2 3", "f 1 2 4"), "has a face of vertex 4 and only 3"),
        (TRIANGLE.replace("f 1 2 3", "f 0 1 2"), "counted from 1"),
        (TRIANGLE.replace("f 1 2 3", "f -3 -2 -1"), "counted from 1"),
        (TRIANGLE.replace("f 1 2 3", f"f 1 2 {10**30}"), "face that cannot be read"),
    ],
)
def test_tells_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.obj").write_text(text)
    with pytest.raises(UserError, match=said):
        ObjReader().read(tmp_path / "a.obj")
