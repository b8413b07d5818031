"""IMavatar's layout, written and read: the same pixels by our reader and by what its programs do with the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import oracle_imavatar as oracle
import pytest
import recordings
import torch
from messages import check_messages
from PIL import Image

from pipeline.errors import UserError
from pipeline.geometry import project_points, rotvec_to_matrix, transform_points
from pipeline.heads.flame import Flame, load_flame
from pipeline.interchange import ReadOptions, imavatar
from pipeline.interchange.recording import FlameTrack, Recording
from pipeline.interchange.sidecar import Sidecar

GOLDEN = Path(__file__).parents[2] / "golden"
SIDE = 64
CENTRED = np.array([[118.0, 0, 32], [0, 118.0, 32], [0, 0, 1]])
NAMES = tuple(f"flame2020-expression-50/{index:03d}" for index in range(50))


@pytest.fixture(scope="module")
def flame(tmp_path_factory: pytest.TempPathFactory) -> Flame:
    folder = tmp_path_factory.mktemp("heads")
    recordings.flame_file(folder, "flame2020")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_HEADS", str(folder))
        loaded = load_flame("flame2020")
    # Joints that follow the expression, as the real ones do a little and the synthetic file's do not.
    near = torch.exp(-200 * torch.cdist(loaded.regressor @ loaded.template, loaded.template))
    return replace(loaded, regressor=near / near.sum(1, keepdim=True))


def example(intrinsics: np.ndarray = recordings.K, **changes: Any) -> Recording:
    """A head that turns in a camera that turns, both about three axes."""
    track = recordings.flame_track("flame2020", 3, moving=True, expressions=50)
    track = replace(track, shape=track.shape[:100])
    return recordings.recording("vhap", flame=track, size=(SIDE, SIDE), intrinsics=intrinsics, **changes)


def write(recording: Recording, folder: Path, flame: Flame | None, **changes: Any) -> list[str]:
    sidecar = Sidecar("imavatar", "anna", str(recording.fps), tuple(recording.numbers.tolist()), "", (), **changes)
    return imavatar.write(
        recording, lambda row: recordings.picture(row, (SIDE, SIDE)), folder, flame=flame, sidecar=sidecar
    )


def posed(track: FlameTrack, flame: Flame) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [T,V,3] in the world and the root joint [T,3]."""
    names = ("shape", "expression", "rotation", "neck", "jaw", "eyes", "translation")
    parts = [torch.from_numpy(np.ascontiguousarray(getattr(track, name))) for name in names]
    return flame.vertices(*parts).numpy(), flame.joints(parts[0], parts[1])[:, 0].numpy()


def seen(recording: Recording, flame: Flame) -> np.ndarray:
    """Pixels [T,V,2] of FLAME's vertices."""
    assert recording.flame is not None
    still = replace(
        recording, flame=replace(recording.flame, rotation=0 * recording.flame.rotation, translation=np.zeros((3, 3)))
    )
    return recordings.pixels(still, posed(recording.flame, flame)[0])


def test_what_is_written_is_read_as_it_was(tmp_path: Path, flame: Flame) -> None:
    before = example(splits={"train": (0, 2), "test": (1,)})
    assert write(before, tmp_path / "out", flame) == []
    assert imavatar.detect(tmp_path / "out")
    after = imavatar.read(tmp_path / "out", ReadOptions())
    assert before.flame is not None
    assert after.flame is not None
    np.testing.assert_allclose(seen(after, flame), seen(before, flame), atol=1e-8)
    roots = posed(before.flame, flame)[1]
    np.testing.assert_allclose(after.Ts_cam_head(roots), before.Ts_cam_head(roots), rtol=1e-9, atol=1e-12)
    for name in ("shape", "expression", "neck", "jaw", "eyes"):
        np.testing.assert_array_equal(getattr(after.flame, name), getattr(before.flame, name))
    assert (after.fps, after.flame.version, after.basis) == (Fraction(30000, 1001), "flame2020", before.basis)
    assert after.coefficient_names == NAMES
    assert after.numbers.tolist() == [3, 4, 9]
    assert after.splits == {"train": (0, 2), "test": (1,)}
    assert after.notes == ()


READERS: dict[str, Callable[..., np.ndarray]] = {
    "imavatar": oracle.imavatar,
    "pointavatar": oracle.pointavatar,
    "splattingavatar": oracle.splattingavatar,
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_see_the_head_where_it_is(tmp_path: Path, flame: Flame, reader: str) -> None:
    before = example()
    write(before, tmp_path, flame)
    data = oracle.load(tmp_path / "anna" / "anna" / "anna_train")
    for frame, expected in zip(data["frames"], seen(before, flame), strict=True):
        np.testing.assert_allclose(
            READERS[reader](data, frame, oracle.vertices(flame, data, frame)), expected, atol=1e-6
        )


def test_fateavatar_sees_it_too_in_rectified_pictures(tmp_path: Path, flame: Flame) -> None:
    before = example(CENTRED)
    write(before, tmp_path, flame)
    data = oracle.load(tmp_path / "anna" / "anna" / "anna_train")
    for frame, expected in zip(data["frames"], seen(before, flame), strict=True):
        points = oracle.vertices(flame, data, frame, scale=1)
        np.testing.assert_allclose(oracle.fateavatar(data, frame, points), expected, atol=1e-6)


def test_fewer_coefficients_are_filled_up(tmp_path: Path, flame: Flame) -> None:
    before = example()
    assert before.flame is not None
    track = replace(before.flame, shape=before.flame.shape[:80], expression=before.flame.expression[:, :20])
    before = replace(before, flame=track, coefficients=track.expression, coefficient_names=NAMES[:20])
    write(before, tmp_path, flame)
    after = imavatar.read(tmp_path, ReadOptions())
    np.testing.assert_allclose(seen(after, flame), seen(before, flame), atol=1e-8)


def test_read_with_options_of_its_own(tmp_path: Path, flame: Flame) -> None:
    write(example(), tmp_path, flame)
    (tmp_path / "headcast.json").unlink()
    video = tmp_path / "anna" / "anna" / "anna_train"
    assert imavatar.read(video, ReadOptions()).fps == Fraction(30000, 1001)
    (video / "headcast.json").unlink()
    found = imavatar.read(tmp_path, ReadOptions(fps=Fraction(50), flame="flame2023"))
    assert found.fps == 50
    assert found.flame is not None
    assert (found.flame.version, found.basis) == ("flame2023", "flame2023-expression-50")
    assert len(imavatar.read(tmp_path, ReadOptions()).notes) == 2


def test_files_of_every_reader(tmp_path: Path, flame: Flame) -> None:
    """FateAvatar opens matted/, SplattingAvatar images/ before image/; both want an alpha channel."""
    write(example(CENTRED, splits={"train": (0, 1), "test": (2,)}), tmp_path, flame)
    video = "anna/anna/anna_test"
    of_test = [f"{video}/{name}" for name in ("flame_params.json", "headcast.json")]
    of_test += [f"{video}/{name}/10.png" for name in ("image", "images", "mask", "matted")]
    found = recordings.files_of(tmp_path)
    assert [name for name in found if name.startswith(video)] == sorted(of_test)
    assert [name for name in found if "/" not in name] == ["dataset.conf", "headcast.json"]
    rgb, alpha = recordings.picture(2, (SIDE, SIDE))
    with Image.open(tmp_path / video / "matted" / "10.png") as picture:
        rgba = np.asarray(picture)
    np.testing.assert_array_equal(rgba[..., 3], alpha)
    np.testing.assert_array_equal(rgba[alpha > 0][:, :3], rgb[alpha > 0])
    settings = (tmp_path / "dataset.conf").read_text()
    for line in ("subject_name = anna", "sub_dir = [anna_test]", "ghostbone = True", "root_path = anna/anna"):
        assert line in settings
    write(example(), tmp_path / "off_centre", flame)
    assert "use insta" in (tmp_path / "off_centre" / "dataset.conf").read_text()


def test_box_lies_about_the_face(tmp_path: Path, flame: Flame) -> None:
    """The jaw's and the eyes' vertices lie in it, or it is the whole picture where the head is out of sight."""
    before = example(CENTRED)
    write(before, tmp_path, flame)
    video = tmp_path / "anna" / "anna" / "anna_train"
    face = flame.weights[:, 2:].sum(1).numpy() > 0.5
    for frame, points in zip(oracle.load(video)["frames"], seen(before, flame)[:, face], strict=True):
        corners = (np.array(frame["bbox"]).reshape(2, 2) + 1) * SIDE / 2
        np.testing.assert_allclose(corners, [points.min(0).clip(0, SIDE), points.max(0).clip(0, SIDE)], atol=1e-9)
    away = before.Ts_cam_world.copy()
    away[:, 0, 3] += 5
    write(replace(before, Ts_cam_world=away), tmp_path / "away", flame)
    video = tmp_path / "away" / "anna" / "anna" / "anna_train"
    assert oracle.load(video)["frames"][0]["bbox"] == [-1, -1, 1, 1]


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the files that IMavatar's own tools leave."""
    shutil.copytree(GOLDEN / "imavatar", tmp_path / "golden")
    return tmp_path / "golden"


VIDEO = "anna/anna/MVI_1810"


def test_golden_is_read(golden: Path) -> None:
    found = imavatar.read(golden, ReadOptions())
    expected = json.loads((GOLDEN / "imavatar-expected.json").read_text())
    assert found.flame is not None
    assert [str(number) for number in found.numbers] == list(expected["frames"])
    pixels = project_points(transform_points(found.Ts_cam_world, np.array(expected["points_m"])), found.Ks)
    for row, frame in enumerate(expected["frames"].values()):
        np.testing.assert_allclose(pixels[row], frame["pixels"], atol=1e-9)
        assert found.flame.jaw[row].tolist() == frame["jaw"]
        assert found.coefficients[row, :3].tolist() == frame["expression"]
    assert found.images == tuple(f"{VIDEO}/image/{number}.png" for number in (1, 2, 3))
    assert found.masks == tuple(f"{VIDEO}/mask/{number}.png" for number in (1, 2, 3))
    assert sorted(found.files) == recordings.files_of(golden)
    assert (found.alpha, found.splits, found.fps, len(found.notes)) == ("masks", {}, 25, 2)


@pytest.mark.parametrize("inside", [".", "anna", "anna/anna", VIDEO])
def test_any_folder_above_the_video_will_do(golden: Path, inside: str) -> None:
    assert imavatar.detect(golden / inside)
    assert len(imavatar.read(golden / inside, ReadOptions())) == 3
    assert not imavatar.detect(golden / VIDEO / "image")


def test_golden_is_written_back_as_it_was(golden: Path, tmp_path: Path, flame: Flame) -> None:
    """Values of known keys, and keys that are nobody's."""
    write(imavatar.read(golden, ReadOptions()), tmp_path / "out", flame)
    before = json.loads((golden / VIDEO / "flame_params.json").read_text())
    after = json.loads((tmp_path / "out" / "anna" / "anna" / "anna_train" / "flame_params.json").read_text())
    before["frames"].sort(key=lambda frame: frame["file_path"])
    assert_near(after, before)


def test_picture_keys_are_not_kept_for_other_pictures(golden: Path, tmp_path: Path, flame: Flame) -> None:
    write(imavatar.read(golden, ReadOptions()), tmp_path / "out", flame, rectified={"size": [80, 64]})
    after = json.loads((tmp_path / "out" / "anna" / "anna" / "anna_train" / "flame_params.json").read_text())
    assert set(after["frames"][0]) == {"file_path", "world_mat", "expression", "pose", "bbox"}


def test_old_pixel_form_and_numbers_from_zero(golden: Path) -> None:
    expected = imavatar.read(golden, ReadOptions())

    def old(data: dict[str, Any]) -> None:
        data["intrinsics"] = [512 * value for value in data["intrinsics"]]
        for frame in data["frames"]:
            number = int(frame["file_path"].split("/")[-1])
            frame["file_path"] = f"image/{number - 1:05d}"

    change(golden, old)
    for kind in ("image", "mask"):
        for number in (1, 2, 3):
            (golden / VIDEO / kind / f"{number}.png").rename(golden / VIDEO / kind / f"{number - 1:05d}.png")
    found = imavatar.read(golden, ReadOptions())
    np.testing.assert_allclose(found.Ks, expected.Ks, rtol=1e-12)
    assert found.numbers.tolist() == expected.numbers.tolist()


def test_camera_that_turns_is_read_as_imavatar_does(golden: Path) -> None:
    turn = rotvec_to_matrix(np.array([0.1, -0.3, 0.2]))

    def turned(data: dict[str, Any]) -> None:
        for frame in data["frames"]:
            matrix = np.array(frame["world_mat"])
            matrix[:, :3] = turn
            frame["world_mat"] = matrix.tolist()

    change(golden, turned)
    found = imavatar.read(golden, ReadOptions())
    assert [note for note in found.notes if "PointAvatar puts such heads elsewhere" in note]
    points = np.array([[0.02, 0.05, 0.06], [-0.04, 0.01, 0.03]])
    data = oracle.load(golden / VIDEO)
    frame = next(frame for frame in data["frames"] if frame["file_path"] == "./image/1")
    pixels = project_points(transform_points(found.Ts_cam_world, points), found.Ks)
    np.testing.assert_allclose(pixels[0], oracle.imavatar(data, frame, 4 * points), atol=1e-9)
    assert np.abs(pixels[0] - oracle.pointavatar(data, frame, 4 * points)).max() > 1


def change(folder: Path, edit: Callable[[dict[str, Any]], object], video: str = VIDEO) -> None:
    path = folder / video / "flame_params.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def assert_near(one: Any, other: Any) -> None:
    """The same JSON, numbers to a millionth of a millionth."""
    if isinstance(other, dict):
        assert list(one) == list(other) or set(one) == set(other)
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


def frame_edit(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["frames"][1].__setitem__(key, value)


def world_mat(rotation: Any = ((1, 0, 0), (0, 1, 0), (0, 0, 1)), translation: Any = (0, 0, -4)) -> list[list[float]]:
    return [[*row, at] for row, at in zip(rotation, translation, strict=True)]


FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"{key} missing": lambda data, key=key: data.pop(key) for key in ("frames", "intrinsics", "shape_params")},
    **{
        f"frames.{key} missing": lambda data, key=key: data["frames"][1].pop(key)
        for key in ("file_path", "world_mat", "expression", "pose")
    },
    "frames empty": lambda data: data.update(frames=[]),
    "frames an object": lambda data: data.update(frames={}),
    "frames of numbers": lambda data: data.update(frames=[1, 2]),
    "intrinsics of three": lambda data: data["intrinsics"].pop(),
    "intrinsics texts": lambda data: data.update(intrinsics=["a", "b", "c", "d"]),
    "intrinsics positive": lambda data: data["intrinsics"].__setitem__(0, 3.0),
    "intrinsics half in pixels": lambda data: data["intrinsics"].__setitem__(1, 1500.0),
    "shape_params of 300": lambda data: data.update(shape_params=[0.0] * 300),
    "shape_params ragged": lambda data: data.update(shape_params=[[1.0], 2.0]),
    "file_path a number": frame_edit("file_path", 7),
    "file_path without number": frame_edit("file_path", "./image/first"),
    "file_path twice image": frame_edit("file_path", "./images/image/1"),
    "file_path without image": frame_edit("file_path", "./frame/1"),
    "file_path climbs": frame_edit("file_path", "../../../image/1"),
    "file_path absolute": frame_edit("file_path", "/etc/image/1"),
    "file_path not there": frame_edit("file_path", "./image/77"),
    "file_path twice": frame_edit("file_path", "./image/3"),
    "world_mat 4x4": frame_edit("world_mat", np.eye(4).tolist()),
    "world_mat NaN": frame_edit("world_mat", world_mat(translation=(0, float("nan"), -4))),
    "world_mat mirrors": frame_edit("world_mat", world_mat(rotation=((-1, 0, 0), (0, 1, 0), (0, 0, 1)))),
    "world_mat scales": frame_edit("world_mat", world_mat(rotation=((4, 0, 0), (0, 4, 0), (0, 0, 4)))),
    "world_mat behind": frame_edit("world_mat", world_mat(translation=(0, 0, 4))),
    "expression of 100": frame_edit("expression", [0.0] * 100),
    "expression null": frame_edit("expression", None),
    "pose of 6": frame_edit("pose", [0.0] * 6),
    "pose infinite": frame_edit("pose", [float("inf")] * 15),
    "bbox of 2": frame_edit("bbox", [0.0, 1.0]),
    "flame_keypoints of 3": frame_edit("flame_keypoints", [[0.0, 1.0, 2.0]]),
}


def file_faults(golden: Path) -> dict[str, Callable[[], object]]:
    video = golden / VIDEO

    def picture(name: str, size: tuple[int, int]) -> Callable[[], object]:
        return lambda: Image.new("L" if "mask" in name else "RGB", size).save(video / name)

    def link() -> None:
        (video / "image" / "1.png").unlink()
        (video / "image" / "1.png").symlink_to(GOLDEN / "imavatar" / VIDEO / "image" / "1.png")

    def more(*names: str) -> Callable[[], object]:
        def copy() -> None:
            for name in names:
                shutil.copytree(video, video.parent / name)

        return copy

    def pair(edit: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
        def copy() -> None:
            more("anna_train", "anna_test")()
            shutil.rmtree(video)
            change(golden, edit, "anna/anna/anna_test")

        return copy

    def sidecar(**changes: Any) -> Callable[[], object]:
        told = {"schema": 1, "format": "imavatar", "subject": "anna", "fps": "25", "numbers": [], "basis": ""}
        return lambda: (golden / "headcast.json").write_text(json.dumps({**told, **changes}))

    return {
        "image missing": lambda: (video / "image" / "2.png").unlink(),
        "image no picture": lambda: (video / "image" / "2.png").write_bytes(b"GIF89a"),
        "image of another size": picture("image/2.png", (32, 32)),
        "image not square": picture("image/1.png", (64, 48)),
        "image leads outside": link,
        "mask missing": lambda: (video / "mask" / "2.png").unlink(),
        "mask of another size": picture("mask/3.png", (32, 64)),
        "no file": lambda: (video / "flame_params.json").unlink(),
        "no JSON": lambda: (video / "flame_params.json").write_bytes(b"{'frames': 1}"),
        "a list": lambda: (video / "flame_params.json").write_text("[]"),
        "several videos": more("MVI_1811", "MVI_1812"),
        "train and test with the same numbers": pair(lambda data: None),
        "train and test of other shapes": pair(lambda data: data.update(shape_params=[0.0] * 100)),
        "sidecar of another version": sidecar(flame="flame2023"),
        "sidecar of no version": sidecar(flame="smplx"),
        "sidecar damaged": sidecar(fps="fast"),
    }


def test_messages(golden: Path, tmp_path: Path) -> None:
    """One clear message for each fault."""
    found = {}
    for case, edit in FAULTS.items():
        shutil.rmtree(golden)
        shutil.copytree(GOLDEN / "imavatar", golden)
        change(golden, edit)
        found[case] = message(golden, tmp_path)
    for case, spoil in file_faults(golden).items():
        shutil.rmtree(golden)
        shutil.copytree(GOLDEN / "imavatar", golden)
        spoil()
        found[case] = message(golden, tmp_path)
    check_messages("imavatar", found)


def message(folder: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        imavatar.read(folder, ReadOptions(flame="flame2020"))
    return str(caught.value).replace(str(tmp_path), "TMP")


def test_what_cannot_be_written_is_refused(tmp_path: Path, flame: Flame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_HEADS", "HEADS")
    right = example()
    track = right.flame
    assert track is not None
    moving = right.Ks.copy()
    moving[1, 0, 0] += 1
    cases: dict[str, tuple[Recording, Flame | None, str]] = {
        "no FLAME": (right, None, "out"),
        "no FLAME parameters": (replace(right, flame=None), flame, "out"),
        "another version": (replace(right, flame=replace(track, version="flame2023")), flame, "out"),
        "more shapes": (replace(right, flame=replace(track, shape=np.zeros(300))), flame, "out"),
        "more expressions": (replace(right, flame=replace(track, expression=np.zeros((3, 100)))), flame, "out"),
        "offset": (replace(right, flame=replace(track, static_offset=np.ones((5023, 3)))), flame, "out"),
        "not square": (replace(right, size=(96, 64)), flame, "out"),
        "camera that changes": (replace(right, Ks=moving), flame, "out"),
        "image in the path": (right, flame, "images/out"),
    }
    found = {}
    for case, (recording, model, name) in cases.items():
        with pytest.raises(UserError) as caught:
            write(recording, tmp_path / name, model)
        found[case] = str(caught.value).replace(str(tmp_path), "TMP")
        assert not list(tmp_path.iterdir()), case
    check_messages("imavatar-write", found)


def test_warnings(tmp_path: Path, flame: Flame) -> None:
    track = replace(example().flame, version="flame2023", eyelids=np.full((3, 2), 0.3))  # type: ignore[type-var]
    other = replace(flame, name="flame2023")
    found = write(replace(example(), flame=track), tmp_path, other)
    assert len(found) == 2
    assert "generic_model.pkl" in found[0]
    assert "eyelids" in found[1]
    assert imavatar.read(tmp_path, ReadOptions()).flame.version == "flame2023"  # type: ignore[union-attr]
