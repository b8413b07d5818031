"""VHAP's layout: what is written is what its readers put on the picture, and comes back."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle_vhap as oracle
import pytest
import recordings
import torch
from messages import check_messages
from PIL import Image

from pipeline.errors import UserError
from pipeline.heads.flame import Flame, load_flame
from pipeline.interchange import ReadOptions, detect, read, vhap
from pipeline.interchange.recording import FlameTrack, Recording
from pipeline.interchange.rectify import rectified
from pipeline.interchange.sidecar import Sidecar

GOLDEN = Path(__file__).parents[2] / "golden"
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


@pytest.mark.parametrize(("motion", "vertices"), [("head", 0), ("camera", 5023), ("camera and head", 5143)])
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


@pytest.mark.parametrize("motion", ["camera", "camera and head"])
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
        assert set(one) == set(other)
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


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the files that VHAP leaves: a monocular sequence, every other frame, one missing."""
    return fresh(tmp_path)


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder / "golden", ignore_errors=True)
    return Path(shutil.copytree(GOLDEN / "vhap", folder / "golden"))


def test_golden_is_read(golden: Path) -> None:
    assert vhap.detect(golden)
    found = vhap.read(golden, ReadOptions())
    expected = json.loads((GOLDEN / "vhap-expected.json").read_text())
    assert found.flame is not None
    assert [str(number) for number in found.numbers] == list(expected["frames"])
    root = np.tile(expected["root_joint_m"], (4, 1))
    pixels = recordings.pixels(found, np.array(expected["points_m"]), root)
    for row, frame in enumerate(expected["frames"].values()):
        np.testing.assert_allclose(pixels[row], frame["pixels"], atol=1e-9)
        assert found.flame.jaw[row].tolist() == frame["jaw"]
        assert found.coefficients[row, :3].tolist() == frame["expression"]
    assert found.images == tuple(f"images/{row:05d}_00.png" for row in range(4))
    assert found.masks == tuple(f"fg_masks/{row:05d}_00.png" for row in range(4))
    assert sorted(found.files) == recordings.files_of(golden)
    assert found.splits == {"train": (0, 1, 2), "val": (), "test": (3,)}
    assert (found.alpha, found.fps, found.flame.version, len(found.notes)) == ("masks", 25, "flame2023", 2)


def test_golden_is_written_back_as_it_was(golden: Path, tmp_path: Path, flame: Flame) -> None:
    """Values of known keys, and keys and arrays that are nobody's."""
    write(vhap.read(golden, ReadOptions()), tmp_path / "out", flame)
    for name in ("transforms.json", *(f"transforms_{part}.json" for part in (*vhap.SPLITS, "backup_flame"))):
        before, after = (json.loads((folder / name).read_text()) for folder in (golden, tmp_path / "out"))
        before["frames"].sort(key=lambda frame: frame["timestep_index"])
        # VHAP has its first guess of a camera there, where nobody looks.
        for key in ("cx", "cy", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y"):
            del before[key], after[key]
        assert_near(after, before)
    for name in (f"flame_param/{row:05d}.npz" for row in range(4)):
        with np.load(golden / name) as before, np.load(tmp_path / "out" / name) as after:
            assert set(after) == set(before) | {"static_offset", "dynamic_offset"}
            for key, value in before.items():
                np.testing.assert_array_equal(after[key], value)


def test_what_is_of_the_pictures_is_not_kept_for_others(golden: Path, tmp_path: Path, flame: Flame) -> None:
    found = vhap.read(golden, ReadOptions())
    sidecar = replace(SIDECAR, rectified={"size": [80, 64]})
    vhap.write(found, recordings.picture, tmp_path / "out", flame=flame, sidecar=sidecar)
    after = json.loads((tmp_path / "out" / "transforms.json").read_text())
    assert "aabb_scale" not in after
    assert "take" not in after["frames"][2]


def test_sets_of_lam_have_no_splits_and_shapes_have_rows(golden: Path) -> None:
    for name in vhap.SPLITS:
        (golden / f"transforms_{name}.json").unlink()
    edit_arrays(golden, "flame_param/00002.npz", lambda arrays: arrays.update(shape=arrays["shape"][None]))
    found = vhap.read(golden, ReadOptions(flame="flame2020"))
    assert found.splits == {}
    assert found.flame is not None
    assert found.flame.shape.shape == (300,)
    assert found.basis == "flame2020-expression-100"


def test_what_is_too_large_to_keep_is_told(golden: Path) -> None:
    for row in range(4):
        more = {"dynamic_offset": np.full((1, 5143, 3), 1e-3), "verts": np.zeros((5143, 3)), "odd": np.array([np.nan])}
        edit_arrays(golden, f"flame_param/{row:05d}.npz", lambda arrays, more=more: arrays.update(more))
    found = vhap.read(golden, ReadOptions())
    assert "Not taken from the FLAME files: dynamic_offset, odd, verts." in found.notes


def test_meshes_of_vhap_are_not_taken_for_instas(golden: Path) -> None:
    def meshes(data: dict[str, Any]) -> None:
        for frame in data["frames"]:
            del frame["flame_param_path"]
            frame.update(exp_path="flame/exp/00000.txt", mesh_path="meshes/00000.obj")

    edit_json(golden, meshes)
    assert detect(golden) == "vhap"
    with pytest.raises(UserError, match="--flame_mode param"):
        read(golden)


def edit_json(folder: Path, edit: Callable[[dict[str, Any]], object], name: str = "transforms.json") -> None:
    data = json.loads((folder / name).read_text())
    edit(data)
    (folder / name).write_text(json.dumps(data))


def edit_arrays(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    with np.load(folder / name) as file:
        arrays = dict(file)
    edit(arrays)
    np.savez(folder / name, **arrays)


def in_frame(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["frames"][1].update({key: value})


def out_of_frame(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: [data["frames"][1].pop(key), data.pop(key, None)]


def matrix(*diagonal: float, last: float = 1) -> list[list[float]]:
    return np.diag([*diagonal, last]).tolist()


FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "timestep_indices missing": lambda data: data.pop("timestep_indices"),
    "camera_indices missing": lambda data: data.pop("camera_indices"),
    "frames missing": lambda data: data.pop("frames"),
    "timestep_indices texts": lambda data: data.update(timestep_indices=["a"]),
    "camera_indices a number": lambda data: data.update(camera_indices=0),
    "frames empty": lambda data: data.update(frames=[]),
    "frames an object": lambda data: data.update(frames={}),
    "frames of numbers": lambda data: data.update(frames=[1, 2]),
    **{
        f"frames.{key} missing": out_of_frame(key)
        for key in (
            *("timestep_index", "camera_index", "w", "h", "camera_angle_x"),
            *("transform_matrix", "file_path", "fg_mask_path", "flame_param_path"),
        )
    },
    **{
        f"frames.{key} a text": in_frame(key, "12")
        for key in (
            *("timestep_index", "timestep_index_original", "camera_index", "w", "h", "cx", "cy", "fl_x", "fl_y"),
            *("camera_angle_x", "camera_angle_y", "transform_matrix"),
        )
    },
    **{
        f"frames.{key} a number": in_frame(key, 1.5)
        for key in ("timestep_id", "camera_id", "file_path", "fg_mask_path", "flame_param_path", "timestep_index")
    },
    "timestep_index twice": in_frame("timestep_index", 2),
    "timestep_index_original twice": in_frame("timestep_index_original", 6),
    "timestep_index negative": in_frame("timestep_index", -1),
    "two cameras": in_frame("camera_index", 8),
    "h another": lambda data: data["frames"][1].update(h=60, cy=30),
    "cx NaN": in_frame("cx", math.nan),
    "cy from one side": in_frame("cy", 30.5),
    "fl_x negative": in_frame("fl_x", -118.0),
    "fl_x against the angle": in_frame("fl_x", 100.0),
    "camera_angle_x in degrees": in_frame("camera_angle_x", 44.0),
    "transform_matrix 3x4": in_frame("transform_matrix", matrix(1, 1, 1)[:3]),
    "transform_matrix ragged": in_frame("transform_matrix", [[1.0], 2.0]),
    "transform_matrix NaN": in_frame("transform_matrix", matrix(1, 1, math.nan)),
    "transform_matrix mirrors": in_frame("transform_matrix", matrix(-1, 1, 1)),
    "transform_matrix scales": in_frame("transform_matrix", matrix(2, 2, 2)),
    "transform_matrix last row": in_frame("transform_matrix", matrix(1, 1, 1, last=2)),
    "unknown key NaN": in_frame("take", {"light": [math.inf]}),
    "file_path climbs": in_frame("file_path", "../golden/images/00000_00.png"),
    "file_path absolute": in_frame("file_path", "/etc/images/0.png"),
    "file_path not there": in_frame("file_path", "images/00077_00.png"),
    "fg_mask_path climbs": in_frame("fg_mask_path", "..\\mask.png"),
    "flame_param_path climbs": in_frame("flame_param_path", "../../00000.npz"),
    "flame_param_path not there": in_frame("flame_param_path", "flame_param/00077.npz"),
}

OFFSET = np.zeros((1, 5143, 3), np.float32)
ARRAYS = ("translation", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "shape", "expr")
ARRAY_FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"{key} missing": lambda arrays, key=key: arrays.pop(key) for key in ARRAYS},
    **{f"{key} of 7": lambda arrays, key=key: arrays.update({key: np.zeros((1, 7))}) for key in ARRAYS},
    **{f"{key} texts": lambda arrays, key=key: arrays.update({key: np.array([["a"]])}) for key in ARRAYS},
    "rotation NaN": lambda arrays: arrays.update(rotation=arrays["rotation"] * np.nan),
    "shape NaN": lambda arrays: arrays.update(shape=arrays["shape"] * np.nan),
    "rotation of all frames": lambda arrays: arrays.update(rotation=np.zeros((4, 3))),
    "shape of another head": lambda arrays: arrays.update(shape=arrays["shape"] + 1),
    "static_offset in one": lambda arrays: arrays.update(static_offset=OFFSET),
    "static_offset of 5118": lambda arrays: arrays.update(static_offset=OFFSET[:, :5118]),
    "static_offset flat": lambda arrays: arrays.update(static_offset=OFFSET[0]),
    "dynamic_offset of 100": lambda arrays: arrays.update(dynamic_offset=OFFSET[:, :100]),
    "rotation pickled": lambda arrays: arrays.update(rotation=np.array([{}], object)),
}


def file_faults(golden: Path) -> dict[str, Callable[[], object]]:
    def picture(name: str, size: tuple[int, int]) -> Callable[[], object]:
        return lambda: Image.new("L", size).save(golden / name)

    def link() -> None:
        (golden / "images/00001_00.png").unlink()
        (golden / "images/00001_00.png").symlink_to(GOLDEN / "vhap" / "images" / "00001_00.png")

    def tracker() -> None:
        (golden / "transforms.json").unlink()
        np.savez(golden / "tracked_flame_params_30.npz", rotation=np.zeros((4, 3)))

    def sidecar(**changes: Any) -> Callable[[], object]:
        told = {"schema": 1, "format": "vhap", "subject": "anna", "fps": "25", "numbers": [], "basis": ""}
        return lambda: (golden / "headcast.json").write_text(json.dumps({**told, **changes}))

    def split(edit: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
        return lambda: edit_json(golden, edit, "transforms_train.json")

    return {
        "image missing": lambda: (golden / "images/00001_00.png").unlink(),
        "image no picture": lambda: (golden / "images/00001_00.png").write_bytes(b"GIF89a"),
        "image of another size": picture("images/00002_00.png", (64, 96)),
        "image leads outside": link,
        "mask missing": lambda: (golden / "fg_masks/00001_00.png").unlink(),
        "mask of another size": picture("fg_masks/00003_00.png", (48, 32)),
        "FLAME file no npz": lambda: (golden / "flame_param/00001.npz").write_bytes(b"PK"),
        "canonical no npz": lambda: (golden / "canonical_flame_param.npz").write_bytes(b"PK"),
        "no file": lambda: (golden / "transforms.json").unlink(),
        "no JSON": lambda: (golden / "transforms.json").write_bytes(b"{'frames': 1}"),
        "a list": lambda: (golden / "transforms.json").write_text("[]"),
        "tracker's own": tracker,
        "split missing": lambda: (golden / "transforms_val.json").unlink(),
        "split without frames": split(lambda data: data.pop("frames")),
        "split of other steps": split(lambda data: data["frames"][0].update(timestep_index=77)),
        "split without steps": split(lambda data: data["frames"][0].pop("timestep_index")),
        "sidecar of another version": sidecar(flame="flame2020"),
        "sidecar of no version": sidecar(flame="smplx"),
        "sidecar damaged": sidecar(fps="fast"),
    }


def test_messages(tmp_path: Path) -> None:
    """One clear message for each fault."""
    golden, found = tmp_path / "golden", {}
    cases: dict[str, Callable[[], object]] = {
        **{case: lambda edit=edit: edit_json(golden, edit) for case, edit in FAULTS.items()},
        **{
            f"arrays, {case}": lambda edit=edit: edit_arrays(golden, "flame_param/00001.npz", edit)
            for case, edit in ARRAY_FAULTS.items()
        },
        **file_faults(golden),
    }
    for case, spoil in cases.items():
        fresh(tmp_path)
        spoil()
        with pytest.raises(UserError) as caught:
            vhap.read(golden, ReadOptions(flame="flame2023"))
        found[case] = str(caught.value).replace(str(tmp_path), "TMP")
    check_messages("vhap", found)


def test_what_cannot_be_written_is_refused(tmp_path: Path, flame: Flame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_HEADS", "HEADS")
    right, pictures, _ = rectified(example(), recordings.picture, vhap.RECTIFY)
    track = right.flame
    assert track is not None
    focal, centre, moving = right.Ks.copy(), right.Ks.copy(), right.Ks.copy()
    focal[:, 1, 1] += 1
    centre[:, 1, 2] += 1
    moving[1, :2] *= 1.01
    cases: dict[str, tuple[Recording, Flame | None]] = {
        "no FLAME": (right, None),
        "no FLAME parameters": (replace(right, flame=None), flame),
        "another version": (replace(right, flame=replace(track, version="flame2020")), flame),
        "more shapes": (replace(right, flame=replace(track, shape=np.zeros(400))), flame),
        "more expressions": (replace(right, flame=replace(track, expression=np.zeros((3, 120)))), flame),
        "eyelids": (replace(right, flame=replace(track, eyelids=np.ones((3, 2)))), flame),
        "other focal length down": (replace(right, Ks=focal), flame),
        "principal point off the middle": (replace(right, Ks=centre), flame),
        "focal length that changes": (replace(right, Ks=moving), flame),
    }
    found = {}
    for case, (recording, model) in cases.items():
        with pytest.raises(UserError) as caught:
            vhap.write(recording, pictures, tmp_path / "out", flame=model, sidecar=SIDECAR)
        found[case] = str(caught.value)
        assert not (tmp_path / "out").exists()
    check_messages("vhap-write", found)


def test_fewer_coefficients_are_filled_up_and_other_versions_warned_of(tmp_path: Path, flame: Flame) -> None:
    few = recordings.flame_track("flame2020", 3, moving=True, expressions=50)
    given = recordings.recording("imavatar", flame=replace(few, shape=few.shape[:100]))
    flat, warnings = write(given, tmp_path, replace(flame, name="flame2020"))
    assert ["GaussianAvatars reads FLAME 2023" in text for text in warnings] == [True]
    found = vhap.read(tmp_path, ReadOptions())
    assert found.flame is not None
    assert (found.flame.version, found.flame.shape.shape, found.coefficients.shape) == ("flame2020", (300,), (3, 100))
    np.testing.assert_allclose(seen(found, flame), seen(flat, flame), atol=1e-4)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"frames": 1}', '{"frames": [1]}', '{"frames": [{"exp_path": ""}]}'])
def test_other_folders_are_not_detected(tmp_path: Path, text: str) -> None:
    assert not vhap.detect(tmp_path)
    (tmp_path / "transforms.json").write_text(text)
    assert not vhap.detect(tmp_path)
