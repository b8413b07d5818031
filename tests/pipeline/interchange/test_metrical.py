"""metrical-tracker's `.frame` files: read as torch writes them, and refused where they hold anything but data."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recordings
import torch
from messages import check_messages
from PIL import Image

from pipeline.errors import UserError
from pipeline.geometry import rotvec_to_matrix, transform_points
from pipeline.interchange import ReadOptions, metrical
from pipeline.interchange.checking import Folder
from pipeline.restricted_pickle import RefusedPickle

NUMBERS = (3, 4, 9)
TRACK = recordings.flame_track("flame2020", 3, moving=False)
Ts_cam_head = recordings.camera_poses(3)


def payload(row: int) -> dict[str, Any]:
    """What the tracker hands to torch.save: arrays of float32, each with a first axis of one."""

    def floats(value: np.ndarray) -> np.ndarray:
        return np.asarray(value, np.float32)[None]

    def six(turns: np.ndarray) -> np.ndarray:
        return rotvec_to_matrix(turns)[..., :2, :].reshape(-1)

    return {
        "flame": {
            "exp": floats(TRACK.expression[row]),
            "shape": floats(TRACK.shape),
            "tex": floats(np.zeros(140)),
            "sh": floats(np.zeros((9, 3))),
            "eyes": floats(six(TRACK.eyes[row])),
            "eyelids": floats(np.array([0.1, 0.2 * row])),
            "jaw": floats(six(TRACK.jaw[row])),
        },
        "camera": {"R": floats(np.zeros(6)), "t": floats(np.zeros(3)), "fl": floats(np.ones(1))},
        "opencv": {
            "R": floats(Ts_cam_head[row, :3, :3]),
            "t": floats(Ts_cam_head[row, :3, 3]),
            "K": floats(recordings.K),
        },
        "img_size": np.array([64, 96]),
        "frame_id": f"{NUMBERS[row]:05d}",
        "global_step": 810,
    }


@pytest.fixture
def actor(tmp_path: Path) -> Path:
    folder = tmp_path / "anna"
    for name in ("checkpoint", "input"):
        (folder / name).mkdir(parents=True)
    for row, number in enumerate(NUMBERS):
        torch.save(payload(row), folder / f"checkpoint/{number:05d}.frame")
        Image.fromarray(recordings.picture(row)[0]).save(folder / f"input/{number:05d}.png")
    return folder


def test_frames_of_torch_are_read(actor: Path) -> None:
    assert metrical.detect(actor)
    found = metrical.read(actor, ReadOptions(fps=Fraction(30000, 1001)))
    assert found.flame is not None
    np.testing.assert_allclose(found.Ts_cam_head(), Ts_cam_head, atol=1e-7)
    np.testing.assert_allclose(found.Ks, np.repeat(recordings.K[None], 3, 0), rtol=1e-7)
    for name in ("shape", "expression", "rotation", "translation"):
        np.testing.assert_allclose(getattr(found.flame, name), getattr(TRACK, name), atol=1e-6)
    for name in ("jaw", "eyes"):
        np.testing.assert_allclose(getattr(found.flame, name), getattr(TRACK, name), atol=1e-6)
    assert found.flame.eyelids is not None
    np.testing.assert_allclose(found.flame.eyelids, [[0.1, 0], [0.1, 0.2], [0.1, 0.4]], atol=1e-7)
    assert (found.size, found.fps, found.basis) == ((96, 64), Fraction(30000, 1001), "flame2020-expression-100")
    assert found.numbers.tolist() == list(NUMBERS)
    assert sorted(found.files) == recordings.files_of(actor)


def test_datasets_made_of_it_are_told_apart(actor: Path) -> None:
    (actor / "transforms.json").write_text("{}")
    assert not metrical.detect(actor)
    assert not metrical.detect(actor / "checkpoint")


def test_frames_of_older_numpy_are_read(actor: Path) -> None:
    path = actor / "checkpoint/00003.frame"
    before = metrical.read_frame(Folder(actor), "checkpoint/00003.frame")
    data = pickle.dumps(payload(0), protocol=2)
    assert b"cnumpy._core.multiarray\n" in data
    path.write_bytes(archive(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")))
    after = metrical.read_frame(Folder(actor), "checkpoint/00003.frame")
    np.testing.assert_array_equal(after.expression, before.expression)


def test_written_frames_are_what_torch_reads(actor: Path, tmp_path: Path) -> None:
    tracked = metrical.read_frame(Folder(actor), "checkpoint/00004.frame")
    data = metrical.frame_bytes(tracked, "00004")
    assert b"numpy._core" not in data, "NumPy 1 has no such module"
    found, expected = torch.load(io.BytesIO(data), weights_only=False), payload(1)
    assert set(found) == set(expected)
    assert found["img_size"].tolist() == [64, 96]
    for group in ("flame", "opencv"):
        assert set(found[group]) == set(expected[group])
        for key, value in expected[group].items():
            assert found[group][key].dtype == np.float32
            np.testing.assert_allclose(found[group][key], value, atol=1e-6)
    # PyTorch3D's camera: row vectors X R + T, +1 left and up, the shorter side from -1 to 1.
    camera = {key: value[0].astype(np.float64) for key, value in found["camera"].items()}
    first, second = camera["R"][:3], camera["R"][3:]
    R = np.stack([first, second, np.cross(first, second)])
    points = np.random.default_rng(0).normal(0, 0.05, (20, 3))
    view = points @ R + camera["t"]
    ndc = camera["fl"] * view[:, :2] / view[:, 2:] + camera["pp"]
    seen = np.array([96, 64]) / 2 - ndc * 32
    in_camera = transform_points(tracked.T_cam_head, points)
    np.testing.assert_allclose(seen, 118.0 * in_camera[:, :2] / in_camera[:, 2:] + tracked.K[:2, 2], atol=1e-3)


class Attack:
    """Makes a file when it is unpickled by what obeys it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.target}'",)


def archive(data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def test_code_in_a_frame_is_refused_and_not_run(actor: Path, tmp_path: Path) -> None:
    target = tmp_path / "broken-in"
    path = actor / "checkpoint/00004.frame"
    hidden = payload(1)
    hidden["flame"]["tex"] = Attack(target)
    for value in (Attack(target), hidden):
        torch.save(value, path)
        with pytest.raises(RefusedPickle, match=r"names posix\.system"):
            metrical.read(actor, ReadOptions())
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "it does something to whoever obeys it"


KEYS = (
    *(("flame", key) for key in ("exp", "shape", "eyes", "eyelids", "jaw")),
    *(("opencv", key) for key in ("R", "t", "K")),
    *((key,) for key in ("flame", "opencv", "img_size", "frame_id")),
)


def test_what_is_wrong_is_told(actor: Path, tmp_path: Path) -> None:
    name = "checkpoint/00004.frame"
    path = actor / name
    honest = path.read_bytes()
    found: dict[str, str] = {}

    def case(title: str, content: bytes | None) -> None:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            metrical.read(actor, ReadOptions())
        found[title] = str(error.value).replace(str(tmp_path), "")
        path.write_bytes(honest)

    def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
        values = payload(1)
        change(values)
        return archive(pickle.dumps(values, protocol=2))

    def put(keys: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], None]:
        def change(values: dict[str, Any]) -> None:
            for key in keys[:-1]:
                values = values[key]
            if value is None:
                del values[keys[-1]]
            else:
                values[keys[-1]] = value

        return change

    for keys in KEYS:
        case(f"{'.'.join(keys)} missing", changed(put(keys, None)))
        case(f"{'.'.join(keys)} of another shape", changed(put(keys, np.zeros((2, 7), np.float32))))
    poses = payload(1)["opencv"]
    case("NaN pose", changed(put(("opencv", "t"), poses["t"] * np.nan)))
    case("mirrored", changed(put(("opencv", "R"), poses["R"] * np.float32([-1, 1, 1]))))
    case("no rotation", changed(put(("opencv", "R"), poses["R"] * 2)))
    case("behind the camera", changed(put(("opencv", "t"), -poses["t"])))
    case("skew", changed(put(("opencv", "K"), poses["K"] + np.float32(1))))
    case("six zeros", changed(put(("flame", "jaw"), np.zeros((1, 6), np.float32))))
    case("another size", changed(put(("img_size",), np.array([96, 64]))))
    case("another number", changed(put(("frame_id",), "00005")))
    case("no object", archive(pickle.dumps([1, 2], protocol=2)))
    case("no names", archive(pickle.dumps({1: 2}, protocol=2)))
    case("a tensor", torch_bytes({**payload(1), "img_size": torch.tensor([64, 96])}))
    case("a zip bomb", archive(b"\0" * (64 << 20), zipfile.ZIP_DEFLATED))
    case("no zip", pickle.dumps(payload(1), protocol=2))
    case("cut off", honest[: len(honest) // 2])
    case("another zip", zip_of_a_text())
    picture = actor / "input/00004.png"
    pixels = picture.read_bytes()
    picture.unlink()
    case("no picture", honest)
    Image.fromarray(recordings.picture(1)[0][:-1]).save(picture)
    case("picture of another size", honest)
    picture.write_bytes(pixels)
    (actor / "checkpoint/last.frame").write_bytes(honest)
    case("a name that is no number", honest)
    (actor / "checkpoint/last.frame").rename(actor / "checkpoint/004.frame")
    case("twice", honest)
    check_messages("metrical", found)


def torch_bytes(values: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def zip_of_a_text() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("readme.txt", "hello")
    return buffer.getvalue()
