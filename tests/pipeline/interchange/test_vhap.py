"""VHAP's layout: what is written is what its readers put on the picture, and comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle_vhap as oracle
import pytest
import recordings
import torch
from PIL import Image

from pipeline.heads.flame import Flame, load_flame
from pipeline.interchange import ReadOptions, vhap
from pipeline.interchange.recording import FlameTrack, Recording
from pipeline.interchange.rectify import rectified
from pipeline.interchange.sidecar import Sidecar

SIDECAR = Sidecar("vhap", "somebody", "30000/1001", (), "", ())


@pytest.fixture(scope="module")
def flame(tmp_path_factory: pytest.TempPathFactory) -> Flame:
    folder = tmp_path_factory.mktemp("heads")
    recordings.flame_file(folder, "flame2023")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_HEADS", str(folder))
        loaded = load_flame("flame2023")
    # Joints that follow the expression, as the real ones do a little and the synthetic file's do not.
    near = torch.exp(-200 * torch.cdist(loaded.regressor @ loaded.template, loaded.template))
    return replace(loaded, regressor=near / near.sum(1, keepdim=True))


def example(motion: str = "camera and head", vertices: int = 0, **changes: Any) -> Recording:
    """A head before a camera that turns about three axes; `vertices`: of a static offset."""
    track = recordings.flame_track("flame2023", 3, moving=motion != "camera")
    if vertices:
        track = replace(track, static_offset=np.random.default_rng(7).normal(0, 2e-3, (vertices, 3)))
    given = recordings.recording("insta", flame=track, **changes)
    return replace(given, Ts_cam_world=given.Ts_cam_world[[0, 0, 0]]) if motion == "head" else given


def write(recording: Recording, folder: Path, flame: Flame | None, **changes: Any) -> tuple[Recording, list[str]]:
    """The recording as it was rectified, and the warnings."""
    flat, pictures, about = rectified(recording, recordings.picture, vhap.RECTIFY)
    sidecar = replace(SIDECAR, rectified=about, **changes)
    return flat, vhap.write(flat, pictures, folder, flame=flame, sidecar=sidecar)


def posed(track: FlameTrack, flame: Flame) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [T,5023,3] in the world and the root joint [T,3]."""
    names = ("shape", "expression", "rotation", "neck", "jaw", "eyes", "translation")
    parts = [torch.from_numpy(np.ascontiguousarray(getattr(track, name))) for name in names]
    offset = None if track.static_offset is None else torch.from_numpy(track.static_offset[:5023].copy())
    return flame.vertices(*parts, offset).numpy(), flame.joints(parts[0], parts[1], offset)[:, 0].numpy()


def seen(recording: Recording, flame: Flame) -> np.ndarray:
    """Pixels [T,5023,2] of FLAME's vertices."""
    assert recording.flame is not None
    return recordings.pixels(replace(recording, flame=None), posed(recording.flame, flame)[0])


@pytest.mark.parametrize("motion", ["head", "camera", "camera and head"])
@pytest.mark.parametrize("vertices", [0, 5023, 5143])
def test_what_is_written_is_read_as_it_was(tmp_path: Path, flame: Flame, motion: str, vertices: int) -> None:
    before = example(motion, vertices, splits={"train": (0, 2), "test": (1,)})
    flat, warnings = write(before, tmp_path / "set", flame)
    assert warnings == []
    assert vhap.detect(tmp_path / "set")
    after = vhap.read(tmp_path / "set", ReadOptions())
    assert flat.flame is not None
    assert after.flame is not None
    np.testing.assert_allclose(seen(after, flame), seen(flat, flame), atol=1e-4)
    roots = [posed(each.flame, flame)[1] for each in (after, flat) if each.flame]
    np.testing.assert_allclose(after.Ts_cam_head(roots[0]), flat.Ts_cam_head(roots[1]), rtol=1e-6, atol=1e-6)
    for name in ("shape", "expression", "neck", "jaw", "eyes"):
        np.testing.assert_allclose(getattr(after.flame, name), getattr(flat.flame, name), rtol=1e-7, atol=1e-9)
    assert (after.fps, after.size, after.basis) == (before.fps, flat.size, "flame2023-expression-100")
    assert after.coefficient_names == before.coefficient_names
    assert after.numbers.tolist() == [3, 4, 9]
    assert after.splits == {"train": (0, 2), "val": (), "test": (1,)}
    assert (after.alpha, after.notes) == ("masks", ())


@pytest.mark.parametrize("motion", ["head", "camera", "camera and head"])
def test_readers_see_the_head_where_it_is(tmp_path: Path, flame: Flame, motion: str) -> None:
    flat, _ = write(example(motion, 5023), tmp_path, flame)
    for reader in (oracle.gaussian_avatars, oracle.vhap):
        found = reader(tmp_path, flame)
        np.testing.assert_allclose([found[row] for row in range(3)], seen(flat, flame), atol=1e-4)


def test_lam_sees_it_too_where_nothing_is_offset(tmp_path: Path, flame: Flame) -> None:
    flat, _ = write(example(), tmp_path, flame)
    found = oracle.lam(tmp_path, flame)
    np.testing.assert_allclose([found[row] for row in range(3)], seen(flat, flame), atol=1e-4)


def test_pictures_lie_on_white(tmp_path: Path, flame: Flame) -> None:
    centred = np.array([[118.0, 0, 48], [0, 118.0, 32], [0, 0, 1]])
    write(example(intrinsics=centred), tmp_path, flame)
    for row in range(3):
        rgb, alpha = recordings.picture(row)
        image = np.asarray(Image.open(tmp_path / f"images/{row:05d}_00.png"))
        np.testing.assert_array_equal(image[alpha == 255], rgb[alpha == 255])
        assert (image[alpha == 0] == 255).all()


def test_head_lies_about_the_origin_before_an_upright_camera(tmp_path: Path, flame: Flame) -> None:
    write(example(), tmp_path, flame)
    frames = json.loads((tmp_path / "transforms.json").read_text())["frames"]
    cameras = np.array([frame["transform_matrix"] for frame in frames])
    np.testing.assert_allclose(cameras[:, :3, :3], np.tile(np.eye(3), (3, 1, 1)), atol=1e-6)
    np.testing.assert_allclose(cameras[:, :3, 3], cameras[[0, 0, 0], :3, 3], atol=1e-6)
    translations = [oracle.arrays_of(tmp_path, frame["flame_param_path"])["translation"] for frame in frames]
    np.testing.assert_allclose(np.mean(translations, 0), 0, atol=1e-6)


def test_written_again_nothing_changes(tmp_path: Path, flame: Flame) -> None:
    """Not even the last bit that single precision has."""
    write(example("camera", 5143), tmp_path / "once", flame)
    write(vhap.read(tmp_path / "once", ReadOptions()), tmp_path / "twice", flame)
    for name in recordings.files_of(tmp_path / "once"):
        once, twice = (tmp_path / folder / name for folder in ("once", "twice"))
        if name.endswith(".npz"):
            for key, value in oracle.arrays_of(once.parent, once.name).items():
                np.testing.assert_array_equal(oracle.arrays_of(twice.parent, twice.name)[key], value)
        elif name.startswith("transforms"):
            assert_near(json.loads(twice.read_text()), json.loads(once.read_text()))


def assert_near(one: Any, other: Any) -> None:
    """The same JSON, numbers to a millionth of a millionth."""
    if isinstance(other, dict):
        assert list(one) == list(other)
        for key, value in other.items():
            assert_near(one[key], value)
    elif isinstance(other, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_near(a, b)
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-12, abs=1e-12)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("given", "train", "test", "warned"),
    [
        ({}, (0, 1, 2), (), False),
        ({"train": (0, 1), "test": (2,)}, (0, 1), (2,), False),
        ({"train": (1, 2), "test": (0,)}, (0, 1, 2), (), True),
    ],
)
def test_first_frame_is_for_training(
    tmp_path: Path, flame: Flame, given: dict[str, Any], train: tuple[int, ...], test: tuple[int, ...], warned: bool
) -> None:
    _, warnings = write(example(splits=given), tmp_path, flame)
    assert [text for text in warnings if text.startswith("Frame 3, the first, is for training")] == warnings
    assert bool(warnings) is warned
    assert vhap.read(tmp_path, ReadOptions()).splits == {"train": train, "val": (), "test": test}


def test_seven_tenths_of_the_time_are_for_training(tmp_path: Path, flame: Flame) -> None:
    track = recordings.flame_track("flame2023", 11, moving=True)
    many = recordings.recording("imavatar", flame=track, numbers=range(11))
    write(many, tmp_path, flame)
    found = vhap.read(tmp_path, ReadOptions())
    assert found.splits == {"train": tuple(range(8)), "val": (), "test": (8, 9, 10)}
