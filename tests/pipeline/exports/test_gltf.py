"""GLB of Gaussians: what KHR_gaussian_splatting demands, exact round trips, and files that nobody should trust."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from splat_data import random_splats

from pipeline.errors import UserError
from pipeline.exports.gltf import EXTENSION, linear_of, read_splats, write_splats
from pipeline.glb import Glb


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The document and the buffer, by the layout of GLB and nothing of ours."""
    data = path.read_bytes()
    magic, version, size, length, kind = struct.unpack_from("<4sIII4s", data)
    assert (magic, version, size, kind) == (b"glTF", 2, len(data), b"JSON") and length % 4 == 0
    rest, kind = struct.unpack_from("<I4s", data, 20 + length)
    assert kind == b"BIN\0" and len(data) == 28 + length + rest and rest % 4 == 0
    return json.loads(data[20 : 20 + length]), data[28 + length :]


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_file_is_what_the_extension_demands(tmp_path: Path, degree: int) -> None:
    splats = random_splats(7, degree=degree)
    write_splats(tmp_path / "a.glb", splats)
    document, buffer = parts(tmp_path / "a.glb")
    assert document["asset"]["version"] == "2.0" and document["extensionsUsed"] == [EXTENSION]
    assert document["scenes"][document["scene"]]["nodes"] == [0] and document["nodes"][0]["mesh"] == 0
    (primitive,) = document["meshes"][0]["primitives"]
    assert primitive["mode"] == 0
    about = primitive["extensions"][EXTENSION]
    assert about["kernel"] == "ellipse" and about["colorSpace"] == "srgb_rec709_display"
    assert about["projection"] == "perspective" and about["sortingMethod"] == "cameraDistance"
    wanted = {"POSITION": "VEC3", "COLOR_0": "VEC4"}
    wanted |= {f"{EXTENSION}:{name}": kind for name, kind in (("ROTATION", "VEC4"), ("SCALE", "VEC3"))}
    wanted |= {f"{EXTENSION}:OPACITY": "SCALAR"}
    wanted |= {f"{EXTENSION}:SH_DEGREE_{d}_COEF_{n}": "VEC3" for d in range(degree + 1) for n in range(2 * d + 1)}
    assert primitive["attributes"].keys() == wanted.keys()
    values = {}
    for name, index in primitive["attributes"].items():
        accessor = document["accessors"][index]
        view = document["bufferViews"][accessor["bufferView"]]
        assert accessor["type"] == wanted[name] and accessor["count"] == 7
        assert view["byteOffset"] % 4 == 0 and view["byteOffset"] + view["byteLength"] <= len(buffer)
        assert accessor["componentType"] == (5123 if name == "COLOR_0" else 5126)
        kind = "<u2" if name == "COLOR_0" else "<f4"
        values[name] = np.frombuffer(buffer[view["byteOffset"] :][: view["byteLength"]], kind).reshape(7, -1)
    position = document["accessors"][primitive["attributes"]["POSITION"]]
    assert position["min"] == splats.means.min(0).tolist() and position["max"] == splats.means.max(0).tolist()
    np.testing.assert_array_equal(values[f"{EXTENSION}:SCALE"], splats.scales)  # linear, not negative
    np.testing.assert_array_equal(values[f"{EXTENSION}:ROTATION"], splats.quats[:, [1, 2, 3, 0]])
    seen = 0.28209479177387814 * splats.sh[:, 0] + 0.5
    np.testing.assert_allclose(values["COLOR_0"][:, :3] / 65535, linear_of(seen), atol=1e-5)


@pytest.mark.parametrize("degree", [0, 3])
def test_what_is_written_is_read_back_exactly(tmp_path: Path, degree: int) -> None:
    splats = random_splats(50, degree=degree)
    write_splats(tmp_path / "a.glb", splats)
    again = read_splats(tmp_path / "a.glb")
    for name in ("means", "scales", "opacities", "sh"):
        np.testing.assert_array_equal(getattr(again, name), getattr(splats, name))
    np.testing.assert_allclose(again.quats, splats.quats, atol=1e-7)


def test_quantised_and_interleaved_values_of_others_are_read(tmp_path: Path) -> None:
    write_splats(tmp_path / "a.glb", random_splats(2, degree=0))
    glb = Glb.read(tmp_path / "a.glb")
    attributes = glb.document["meshes"][0]["primitives"][0]["attributes"]
    rotations = np.array([[127, 0, 0, 0], [0, 0, 90, 90]], np.int8)
    attributes[f"{EXTENSION}:ROTATION"] = glb.add(rotations, normalized=True)
    attributes[f"{EXTENSION}:OPACITY"] = glb.add(np.array([255, 51], np.uint8), normalized=True)
    points = glb.document["accessors"][glb.add(np.arange(8, dtype=np.float32).reshape(2, 4))]
    glb.document["bufferViews"][points["bufferView"]]["byteStride"] = 16
    attributes["POSITION"] = len(glb.document["accessors"]) - 1
    points["type"] = "VEC3"
    glb.write(tmp_path / "b.glb")
    again = read_splats(tmp_path / "b.glb")
    np.testing.assert_allclose(again.quats, [[0, 1, 0, 0], [0.5**0.5, 0, 0, 0.5**0.5]], atol=1e-6)
    np.testing.assert_allclose(again.opacities, [1, 0.2])
    np.testing.assert_array_equal(again.means, [[0, 1, 2], [4, 5, 6]])


def change(document: dict[str, Any], path: str, value: Any) -> None:
    """Set what `a/0/b` names."""
    *outer, last = path.split("/")
    for key in outer:
        document = document[int(key)] if isinstance(document, list) else document[key]
    document[int(last) if isinstance(document, list) else last] = value


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("meshes", [], "no primitive with"),
        ("meshes", 3, "not a GLB"),
        ("meshes/0/primitives/0/extensions", [], "no primitive with"),
        ("meshes/0/primitives/0/extensions/KHR_gaussian_splatting/kernel", "cube", "another kernel"),
        ("meshes/0/primitives/0/attributes", {"POSITION": 0}, "no attribute"),
        ("meshes/0/primitives/0/attributes/POSITION", 99, "no accessors"),
        ("meshes/0/primitives/0/attributes/POSITION", True, "no accessors"),
        ("nodes/0/translation", [1, 0, 0], "a node that moves them"),
        ("accessors/0/count", 10**9, "outside its buffer"),
        ("accessors/0/count", 4, "its .* has shape"),
        ("accessors/0/count", -1, "its 'count' is -1"),
        ("accessors/0/count", 2**60, "its 'count'"),
        ("accessors/0/byteOffset", 4, "outside its buffer"),
        ("accessors/0/componentType", 5130, "none of plain numbers"),
        ("accessors/0/type", "MAT4", "none of plain numbers"),
        ("accessors/0/sparse", {}, "none of plain numbers"),
        ("accessors/0/bufferView", None, "no bufferViews"),
        ("bufferViews/0/byteOffset", 10**9, "outside its buffer"),
        ("bufferViews/0/byteStride", 1, "outside its buffer"),
        ("bufferViews", {}, "no bufferViews"),
        ("accessors/0", 5, "is no object"),
    ],
)
def test_hostile_documents_are_refused_in_words(tmp_path: Path, path: str, value: Any, complaint: str) -> None:
    write_splats(tmp_path / "a.glb", random_splats(5, degree=0))
    glb = Glb.read(tmp_path / "a.glb")
    change(glb.document, path, value)
    glb.write(tmp_path / "b.glb")
    with pytest.raises(UserError, match=complaint) as error:
        read_splats(tmp_path / "b.glb")
    assert "b.glb" in error.value.what and error.value.fix


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("means", np.nan, "not finite"),
        ("scales", -1, "scale below 0"),
        ("quats", 0, "a rotation makes no sense"),
        ("opacities", np.inf, "not finite"),
    ],
)
def test_senseless_values_are_refused(tmp_path: Path, field: str, value: float, complaint: str) -> None:
    splats = random_splats(5, degree=0)
    write_splats(tmp_path / "a.glb", splats)
    data, array = bytearray((tmp_path / "a.glb").read_bytes()), getattr(splats, field)
    stored = array[:, [1, 2, 3, 0]] if field == "quats" else array
    start = bytes(data).index(stored.tobytes())
    data[start : start + stored.nbytes] = np.full_like(stored, value).tobytes()
    (tmp_path / "a.glb").write_bytes(data)
    with pytest.raises(UserError, match=complaint):
        read_splats(tmp_path / "a.glb")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "does not begin"),
        (b"glTF" + bytes(40), "does not begin"),
        (struct.pack("<4sIII4s", b"glTF", 2, 20, 2**31, b"JSON"), "no JSON of a possible size"),
        (struct.pack("<4sIII4s", b"glTF", 2, 99, 0, b"JSON"), "its header promises 99"),
        (struct.pack("<4sIII4s", b"glTF", 2, 24, 4, b"JSON") + b"[[[[", "not a GLB"),
        (struct.pack("<4sIII4s", b"glTF", 2, 24, 4, b"JSON") + b"[]  ", "no object"),
        (struct.pack("<4sIII4s", b"glTF", 2, 28, 4, b"JSON") + b"{}  junk", "no buffer of its size"),
        (struct.pack("<4sIII4s", b"glTF", 2, 100_020, 100_000, b"JSON") + b"[" * 100_000, "not a GLB"),
    ],
)
def test_hostile_containers_are_refused_in_words(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "a.glb").write_bytes(data)
    with pytest.raises(UserError, match=complaint):
        read_splats(tmp_path / "a.glb")
