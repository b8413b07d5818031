"""INSTA's layout, written and read: the same pixels by our reader and by what its programs do with the files."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import oracle_insta as oracle
import pytest
import recordings
import torch
from PIL import Image

from pipeline.heads.flame import EYES, NECK, Flame, load_flame
from pipeline.interchange import ReadOptions, insta
from pipeline.interchange.recording import FlameTrack, Recording
from pipeline.interchange.sidecar import Sidecar

CENTRED = np.array([[118.0, 0, 48], [0, 109.0, 32], [0, 0, 1]])


@pytest.fixture(scope="module")
def flame(tmp_path_factory: pytest.TempPathFactory) -> Flame:
    folder = tmp_path_factory.mktemp("heads")
    recordings.flame_file(folder, "flame2020")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_HEADS", str(folder))
        return load_flame("flame2020")


def example(intrinsics: np.ndarray = recordings.K, **changes: Any) -> Recording:
    """A head that turns in a camera that turns, about three axes each; `changes` are FLAME's."""
    track = replace(recordings.flame_track("flame2020", 3, moving=True), **changes)
    return recordings.recording("vhap", flame=track, intrinsics=intrinsics)


def write(recording: Recording, folder: Path, flame: Flame | None, **changes: Any) -> list[str]:
    sidecar = Sidecar("insta", "anna", str(recording.fps), tuple(recording.numbers.tolist()), "", (), **changes)
    return insta.write(recording, recordings.picture, folder, flame=flame, sidecar=sidecar)


def joints(track: FlameTrack, flame: Flame) -> np.ndarray:
    found: np.ndarray = flame.joints(torch.from_numpy(track.shape), torch.from_numpy(track.expression)).numpy()
    return found


def seen(recording: Recording, flame: Flame) -> np.ndarray:
    """Pixels [T,V,2] of FLAME's vertices as the recording has them."""
    track = recording.flame
    assert track is not None
    names = ("shape", "expression", "rotation", "neck", "jaw", "eyes", "translation")
    vertices = flame.vertices(*[torch.from_numpy(np.ascontiguousarray(getattr(track, name))) for name in names])
    still = replace(track, rotation=0 * track.rotation, translation=0 * track.translation)
    return recordings.pixels(replace(recording, flame=still), vertices.numpy())


def test_what_is_written_is_read_as_it_was(tmp_path: Path, flame: Flame) -> None:
    before = replace(example(neck=np.zeros((3, 3))), splits={"train": (0, 1), "test": (2,), "val": (2,)})
    write(before, tmp_path, flame)
    assert insta.detect(tmp_path)
    after = insta.read(tmp_path, ReadOptions())
    assert before.flame is not None
    assert after.flame is not None
    roots = joints(before.flame, flame)[:, 0]
    np.testing.assert_allclose(after.Ts_cam_head(), before.Ts_cam_head(roots), rtol=1e-9, atol=1e-12)
    for name in ("shape", "expression", "neck", "jaw", "eyes"):
        np.testing.assert_allclose(getattr(after.flame, name), getattr(before.flame, name), atol=2e-8)
    np.testing.assert_allclose(after.Ks, before.Ks, rtol=1e-12)
    assert (after.size, after.fps, after.flame.version) == ((96, 64), Fraction(30000, 1001), "flame2020")
    assert (after.basis, after.coefficient_names) == (before.basis, before.coefficient_names)
    assert after.numbers.tolist() == [3, 4, 9]
    assert after.splits == {"train": (0, 1), "test": (2,), "val": (2,)}
    assert after.notes == ()
    assert set(after.files) >= {"transforms.json", "canonical.obj", "meshes/00009.obj", "flame/jaw/00003.txt"}
    assert set(after.files) <= set(recordings.files_of(tmp_path))


def test_readers_see_the_head_where_it_is(tmp_path: Path, flame: Flame) -> None:
    before = example()
    assert before.flame is not None
    expected = seen(before, flame)
    write(before, tmp_path, flame)
    after = insta.read(tmp_path, ReadOptions())
    meshes, faces = insta.read_meshes(tmp_path, after.meshes)
    np.testing.assert_array_equal(faces, flame.faces)
    np.testing.assert_allclose(recordings.pixels(after, meshes), expected, atol=1e-4)
    by_name = {f"images/{number:05d}.png": points for number, points in zip((3, 4, 9), expected, strict=True)}
    found = {
        "INSTA": oracle.insta(tmp_path, "transforms.json"),
        "INSTA-pytorch": oracle.insta_pytorch(tmp_path, "train") | oracle.insta_pytorch(tmp_path, "test"),
    }
    for pictures in found.values():
        assert set(pictures) == set(by_name)
        for name, points in pictures.items():
            np.testing.assert_allclose(points, by_name[name], atol=1e-4)


def test_fateavatar_sees_the_head_by_its_numbers(tmp_path: Path, flame: Flame) -> None:
    before = example(CENTRED)
    write(before, tmp_path, flame)
    found = oracle.fateavatar(tmp_path, "train", flame) | oracle.fateavatar(tmp_path, "test", flame)
    # Not the lower neck, which it cannot turn, nor what the neck's turn bends elsewhere (less than 0.1 mm).
    head = flame.weights.numpy()[:, NECK] == 1
    assert head.sum() > 1500
    for points, expected in zip(found.values(), seen(before, flame), strict=True):
        np.testing.assert_allclose(points[head], expected[head], atol=0.02)


def test_the_first_six_numbers_turn_the_eye_at_positive_x(tmp_path: Path, flame: Flame) -> None:
    gaze = np.zeros((3, 2, 3))
    gaze[:, 0, 1] = 0.4
    before = example(CENTRED, neck=np.zeros((3, 3)), eyes=gaze)
    write(before, tmp_path, flame)
    numbers = np.loadtxt(tmp_path / "flame/eyes/00004.txt")
    assert numbers[:6].tolist() != [1, 0, 0, 0, 1, 0]
    assert numbers[6:].tolist() == [1, 0, 0, 0, 1, 0]
    mesh = insta.read_meshes(tmp_path, ["meshes/00004.obj"])[0][0]
    write(example(CENTRED, neck=np.zeros((3, 3)), eyes=0 * gaze), tmp_path / "ahead", flame)
    ahead = insta.read_meshes(tmp_path / "ahead", ["meshes/00004.obj"])[0][0]
    turned, resting = (flame.weights.numpy()[:, eye] == 1 for eye in EYES)
    assert np.linalg.norm(mesh - ahead, axis=1)[turned].max() > 0.002
    assert ahead[turned, 0].mean() > 0 > ahead[resting, 0].mean()
    # FateAvatar, which takes the last six for the left eye, turns the other one.
    both = oracle.fateavatar(tmp_path, "train", flame)["images/00004.png"]
    np.testing.assert_allclose(both[~(turned | resting)], seen(before, flame)[1][~(turned | resting)], atol=0.02)
    assert np.abs(both - seen(before, flame)[1])[turned].max() > 0.1


def test_pictures_end_below_the_neck(tmp_path: Path, flame: Flame) -> None:
    before = example()
    write(before, tmp_path, flame)
    image = np.asarray(Image.open(tmp_path / "images/00004.png"))
    rgb, alpha = recordings.picture(1)
    parsing = np.asarray(Image.open(tmp_path / "seg_mask/00004.png"))[..., 0]
    cloth = parsing == insta.CLOTH
    assert cloth.any()
    np.testing.assert_array_equal(image[..., 3], np.where(cloth, 0, alpha))
    np.testing.assert_array_equal(image[..., :3], np.where(image[..., 3:] > 0, rgb, 0))
    assert (parsing[alpha == 0] == insta.BACKGROUND).all()
    assert {insta.FACE, insta.NECK, insta.HAIR} <= set(np.unique(parsing))
    # Depth is the mesh's: at a vertex in front its millimetres.
    depth = np.asarray(Image.open(tmp_path / "depth/00004.png"))
    distance = before.Ts_cam_head(joints(before.flame, flame)[:, 0])[1, 2, 3] * 1000
    assert (np.abs(depth[depth > 0].astype(float) - distance) < 150).all()


def test_an_imported_dataset_keeps_its_alphas(tmp_path: Path, flame: Flame) -> None:
    write(example(neck=np.zeros((3, 3))), tmp_path / "a", flame)
    first = insta.read(tmp_path / "a", ReadOptions())

    def pictures(row: int) -> tuple[np.ndarray, np.ndarray]:
        image = np.asarray(Image.open(tmp_path / "a" / first.images[row]))
        return image[..., :3], image[..., 3]

    sidecar = Sidecar("insta", "anna", "25", (3, 4, 9), "", ())
    insta.write(first, pictures, tmp_path / "b", flame=flame, sidecar=sidecar)
    assert recordings.files_of(tmp_path / "b") == recordings.files_of(tmp_path / "a")
    for name in recordings.files_of(tmp_path / "a"):
        if name.startswith(("images", "matted", "alpha")):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    second = insta.read(tmp_path / "b", ReadOptions())
    np.testing.assert_allclose(
        insta.read_meshes(tmp_path / "b", second.meshes)[0],
        insta.read_meshes(tmp_path / "a", first.meshes)[0],
        atol=5e-8,
    )
    np.testing.assert_allclose(second.Ts_cam_world, first.Ts_cam_world, atol=1e-12)


@pytest.mark.parametrize(
    ("count", "train", "test", "val"),
    [(1, 1, 1, 1), (3, 2, 1, 1), (90, 60, 30, 20), (3000, 2650, 350, 20)],
)
def test_some_frames_are_always_left_for_training(count: int, train: int, test: int, val: int) -> None:
    track = recordings.flame_track("flame2020", count, moving=False)
    warnings: list[str] = []
    splits = insta._splits(recordings.recording("vhap", flame=track, numbers=range(count)), warnings)
    assert [len(splits[name]) for name in ("train", "test", "val")] == [train, test, val]
    assert set(splits["val"]) <= set(splits["test"])
    assert len(warnings) == (test < 350)
