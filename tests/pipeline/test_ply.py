"""3DGS PLY: layout, round trips, the turn of axes, and files that nobody should trust."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splat_data import random_splats

from pipeline.errors import UserError
from pipeline.ply import COLUMNS, read_ply, write_ply
from pipeline.rasterize import rasterize
from pipeline.splats import Splats, colors_to_sh


def raw_table(path: Path) -> np.ndarray:
    """The file as a viewer reads it: 62 floats a row after the header."""
    data = path.read_bytes()
    return np.frombuffer(data[data.index(b"end_header\n") + 11 :], "<f4").reshape(-1, 62)


@given(count=st.integers(0, 20), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, count: int, seed: int) -> None:
    path = tmp_path_factory.mktemp("ply") / "a.ply"
    splats = random_splats(count, seed)
    write_ply(path, splats)
    again = read_ply(path)
    for name in ("means", "scales", "opacities", "sh"):
        np.testing.assert_allclose(getattr(again, name), getattr(splats, name), rtol=2e-5, atol=2e-6)
    signs = np.sign((again.quats * splats.quats).sum(-1, keepdims=True))
    np.testing.assert_allclose(signs * again.quats, splats.quats, atol=2e-6)


def test_layout_is_that_of_3dgs(tmp_path: Path) -> None:
    splats = random_splats(3)
    write_ply(tmp_path / "a.ply", splats)
    header = (tmp_path / "a.ply").read_bytes().split(b"end_header\n")[0].decode().splitlines()
    assert header[:2] == ["ply", "format binary_little_endian 1.0"]
    assert header[3] == "element vertex 3"
    assert [line.split()[2] for line in header[4:]] == list(COLUMNS)
    assert len(COLUMNS) == 62
    table = raw_table(tmp_path / "a.ply")
    np.testing.assert_allclose(table[:, :3], splats.means * [1, -1, -1])
    assert not table[:, 3:6].any()
    np.testing.assert_allclose(1 / (1 + np.exp(-table[:, 54])), splats.opacities, rtol=1e-5)
    np.testing.assert_allclose(np.exp(table[:, 55:58]), splats.scales, rtol=1e-5)


def test_colours_lie_channel_by_channel(tmp_path: Path) -> None:
    sh = np.zeros((1, 16, 3), np.float32)
    sh[0, 2] = [0.1, 0.2, 0.3]  # the second of the 15 rest coefficients is odd in z, so the turn flips it
    write_ply(tmp_path / "a.ply", Splats(*_plain(1), sh))
    rest = raw_table(tmp_path / "a.ply")[0, 9:54]
    np.testing.assert_allclose(rest[[1, 16, 31]], [-0.1, -0.2, -0.3], rtol=1e-6)
    assert np.count_nonzero(rest) == 3


def _plain(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    quats = np.tile(np.array([1, 0, 0, 0], np.float32), (count, 1))
    return np.zeros((count, 3), np.float32), quats, np.full((count, 3), 0.01, np.float32), np.full(count, 0.5, "f4")


def test_a_viewer_with_its_y_down_sees_the_same_picture(tmp_path: Path) -> None:
    """The file's raw columns rendered by the rules of 3DGS from the turned camera: same pixels, harmonics included."""
    splats = random_splats(60, seed=3)
    write_ply(tmp_path / "a.ply", splats)
    table = torch.from_numpy(raw_table(tmp_path / "a.ply").astype(np.float64))
    T_cam_head = torch.tensor([[0.96, 0, 0.28, 0.01], [0, -1, 0, 0.02], [0.28, 0, -0.96, 0.5], [0, 0, 0, 1.0]])
    T_head_file = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    K = torch.tensor([[90.0, 0, 31], [0, 80, 22], [0, 0, 1]])
    sh_file = torch.cat([table[:, 6:9, None], table[:, 9:54].reshape(-1, 3, 15)], -1).transpose(1, 2)
    seen = rasterize(
        table[:, :3], table[:, 58:62], table[:, 55:58].exp(), table[:, 54].sigmoid(), sh_file,
        (T_cam_head @ T_head_file).double(), K.double(), 64, 48, sh_degree=3, backend="reference",
    )  # fmt: skip
    ours = rasterize(
        *(torch.from_numpy(x.astype(np.float64)) for x in (splats.means, splats.quats, splats.scales)),
        *(torch.from_numpy(x.astype(np.float64)) for x in (splats.opacities, splats.sh)),
        T_cam_head.double(), K.double(), 64, 48, sh_degree=3, backend="reference",
    )  # fmt: skip
    assert ours.alpha.max() > 0.5
    torch.testing.assert_close(seen.image, ours.image, rtol=0, atol=1e-5)


def test_plain_colours_become_the_constant_harmonic() -> None:
    sh = colors_to_sh(np.array([[0.5, 1.0, 0.0]]))
    np.testing.assert_allclose(0.5 + 0.28209479 * sh[0, 0], [0.5, 1, 0], atol=1e-6)
    assert not sh[0, 1:].any()


def test_equal_gaussians_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.ply", "b.ply"):
        write_ply(tmp_path / name, random_splats(7))
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.ply", "b.ply"]


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    splats = random_splats(2)
    splats.means[1, 2] = np.nan
    with pytest.raises(ValueError, match="means"):
        write_ply(tmp_path / "a.ply", splats)
    assert not list(tmp_path.iterdir())


def test_other_column_orders_and_fewer_harmonics_are_read(tmp_path: Path) -> None:
    columns = [name for name in reversed(COLUMNS) if not name.startswith(("n", "f_rest_"))]
    columns = [*columns, *(f"f_rest_{i}" for i in range(9))]
    kinds = [(name, "<f4") for name in columns] + [("binding_0", "<i4")]
    row = np.zeros(1, kinds)
    row["rot_0"], row["z"], row["f_rest_4"] = 2, 0.5, 0.25
    header = ["ply", "format binary_little_endian 1.0", "obj_info x", "element vertex 1"]
    header += [f"property {'int' if name == 'binding_0' else 'float'} {name}" for name, _ in kinds]
    path = tmp_path / "other.ply"
    path.write_bytes("\n".join([*header, "end_header\n"]).encode() + row.tobytes())
    splats = read_ply(path)
    np.testing.assert_allclose(splats.means, [[0, 0, -0.5]])
    assert np.flatnonzero(splats.sh[0].ravel()).tolist() == [2 * 3 + 1]
    assert splats.scales.tolist() == [[1, 1, 1]]


HEAD = b"ply\nformat binary_little_endian 1.0\nelement vertex 1\n"
PROPERTIES = b"".join(f"property float {name}\n".encode() for name in COLUMNS)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "does not begin with 'ply'"),
        (b"solid stl\n", "does not begin with 'ply'"),
        (b"\xff" * 100_000, "does not begin with 'ply'"),
        (b"ply\n" + b"comment x\n" * 10_000, "header has no end"),
        (b"ply\nformat ascii 1.0\nelement vertex 0\nend_header\n", "its format is not"),
        (b"ply\nformat binary_big_endian 1.0\nelement vertex 0\nend_header\n", "its format is not"),
        (b"ply\nformat binary_little_endian 1.0\nelement face 1\nend_header\n", "first element is not 'vertex'"),
        (b"ply\nformat binary_little_endian 1.0\nelement vertex -1\nend_header\n", "number of Gaussians"),
        (b"ply\nformat binary_little_endian 1.0\nelement vertex 99999999999999999999\nend_header\n", "number of"),
        (HEAD + b"property list uchar int vertex_indices\nend_header\n", "where a plain property belongs"),
        (HEAD + b"property float x\nproperty float x\nend_header\n", "stands there twice"),
        (HEAD + b"property float x\nend_header\n" + bytes(4), "no column 'y'"),
        (HEAD + PROPERTIES + b"end_header\n" + bytes(62 * 4 - 1), "where its header promises"),
        (HEAD + PROPERTIES + b"end_header\n" + bytes(62 * 4 + 1), "where its header promises"),
        (HEAD + PROPERTIES + b"end_header\n" + bytes(62 * 4), "rotation of Gaussian 0"),
        (HEAD + PROPERTIES + b"element face 9\nproperty float q\nend_header\n" + bytes(62 * 4), "plain property"),
        (HEAD + PROPERTIES.replace(b"f_rest_44", b"f_rest_99") + b"end_header\n" + bytes(62 * 4), "'f_rest' columns"),
    ],
)
def test_hostile_files_are_refused_in_words(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "bad.ply"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_ply(path)
    assert complaint in error.value.what
    assert str(path) in error.value.what
    assert error.value.fix


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [("x", np.nan, "column 'x'"), ("opacity", np.inf, "column 'opacity'"), ("scale_1", 500.0, "scale of Gaussian 1")],
)
def test_senseless_values_are_refused(tmp_path: Path, column: str, value: float, complaint: str) -> None:
    path = tmp_path / "a.ply"
    write_ply(path, random_splats(2))
    data = bytearray(path.read_bytes())
    start = data.index(b"end_header\n") + 11 + 62 * 4 + 4 * COLUMNS.index(column)
    data[start : start + 4] = np.float32(value).tobytes()
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_ply(path)
    assert complaint in error.value.what


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_ply(tmp_path / "none.ply")


def test_columns_of_a_lower_degree_are_left_out(tmp_path: Path) -> None:
    splats = random_splats(5, degree=1)
    for degree, columns in ((3, 62), (1, 26)):
        write_ply(tmp_path / "a.ply", splats, degree)
        assert (tmp_path / "a.ply").read_bytes().count(b"property float") == columns
        np.testing.assert_allclose(read_ply(tmp_path / "a.ply").sh, splats.sh, atol=1e-6)
