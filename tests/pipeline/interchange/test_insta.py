"""INSTA's layout, written and read: the same pixels by our reader and by what its programs do with the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import oracle_insta as oracle
import pytest
import recordings
import torch
from messages import check_messages
from PIL import Image

from pipeline.errors import UserError
from pipeline.heads.flame import EYES, NECK, Flame, load_flame
from pipeline.interchange import ReadOptions, insta
from pipeline.interchange.recording import FlameTrack, Recording
from pipeline.interchange.sidecar import Sidecar

GOLDEN = Path(__file__).parents[2] / "golden"
CENTRED = np.array([[118.0, 0, 48], [0, 109.0, 32], [0, 0, 1]])


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


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the files that INSTA's own scripts leave, with FateAvatar's."""
    shutil.copytree(GOLDEN / "insta", tmp_path / "golden")
    return tmp_path / "golden"


def test_golden_is_read(golden: Path) -> None:
    found = insta.read(golden, ReadOptions())
    expected = json.loads((GOLDEN / "insta-expected.json").read_text())
    assert [f"{number:05d}" for number in found.numbers] == list(expected)
    meshes, faces = insta.read_meshes(golden, found.meshes)
    assert (meshes.shape, len(faces)) == ((3, 40, 3), 76)
    assert found.flame is not None
    for row, frame in enumerate(expected.values()):
        np.testing.assert_allclose(recordings.pixels(found, meshes)[row, :4], frame["pixels"], atol=1e-9)
        assert found.coefficients[row, :3].tolist() == frame["expression"]
        np.testing.assert_allclose(found.flame.jaw[row], frame["jaw"], atol=2e-8)
        np.testing.assert_allclose(found.flame.eyes[row], frame["eyes"], atol=2e-8)
    assert found.splits == {"train": (0, 2), "test": (1,), "val": (0, 1, 2)}
    assert (found.alpha, found.masks, found.fps, found.basis) == ("channel", (), 25, "flame2020-expression-100")
    assert found.images == ("images/00000.png", "images/00002.png", "images/00007.png")
    assert sorted(found.files) == [name for name in recordings.files_of(golden) if not name.startswith("matted")]
    assert len(found.notes) == 2


def test_stock_insta_has_meshes_only(golden: Path) -> None:
    for name in ("shape", "jaw", "eyes", "eyelids"):
        shutil.rmtree(golden / "flame" / name)
    for name in ("alpha", "depth", "seg_mask"):
        shutil.rmtree(golden / name)
    found = insta.read(golden, ReadOptions())
    assert (found.flame, len(found.meshes), found.coefficients.shape) == (None, 3, (3, 100))
    assert "its meshes are the head" in found.notes[-1]


def test_the_trackers_own_files_complete_it(golden: Path, tmp_path: Path, flame: Flame) -> None:
    before = insta.read(golden, ReadOptions())
    write(before, tmp_path / "out", flame)
    for name in ("shape", "jaw", "eyes", "eyelids"):
        shutil.rmtree(tmp_path / "out" / "flame" / name)
    after = insta.read(tmp_path / "out", ReadOptions())
    assert before.flame is not None
    assert after.flame is not None
    for name in ("shape", "jaw", "eyes", "eyelids", "expression"):
        np.testing.assert_allclose(getattr(after.flame, name), getattr(before.flame, name), atol=1e-6)


def assert_near(found: Any, expected: Any) -> None:
    """The same JSON, numbers up to the last digits of a matrix inverted twice."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            assert_near(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-9, abs=1e-12) if isinstance(expected, float) else expected)


def test_golden_is_written_back_as_it_was(golden: Path, tmp_path: Path, flame: Flame) -> None:
    """Values of known keys, and keys that are nobody's."""
    write(insta.read(golden, ReadOptions()), tmp_path / "out", flame)
    for file in (insta.FILE, *insta.SPLITS.values()):
        before, after = (json.loads((folder / file).read_text()) for folder in (golden, tmp_path / "out"))
        before["frames"].sort(key=lambda frame: frame["mesh_path"])
        assert_near(after, before)
    for text in ("exp", "shape", "eyelids"):
        for path in (golden / "flame" / text).iterdir():
            assert (tmp_path / "out" / "flame" / text / path.name).read_text() == path.read_text()


CAMERA = ("w", "h", "cx", "cy", "fl_x", "fl_y")
ANGLES = ("camera_angle_x", "camera_angle_y", "x_fov", "y_fov", "integer_depth_scale")
PATHS = ("file_path", "mesh_path", "exp_path", "depth_path", "seg_mask_path")


def test_what_is_wrong_is_told(golden: Path, tmp_path: Path) -> None:
    found: dict[str, str] = {}

    def case(title: str, change: Callable[[Path], object]) -> None:
        folder = tmp_path / "case"
        shutil.copytree(golden, folder)
        change(folder)
        with pytest.raises(UserError) as error:
            insta.read(folder, ReadOptions())
        found[title] = str(error.value).replace(str(tmp_path), "")
        shutil.rmtree(folder)

    def edit(change: Callable[[dict[str, Any]], object], file: str = insta.FILE) -> Callable[[Path], None]:
        def edited(folder: Path) -> None:
            data = json.loads((folder / file).read_text())
            change(data)
            (folder / file).write_text(json.dumps(data))

        return edited

    for key in CAMERA:
        case(f"{key} missing", edit(lambda data, key=key: data.pop(key)))
    for key in (*CAMERA, *ANGLES):
        case(f"{key} is a list", edit(lambda data, key=key: data.update({key: [1.0, 2.0]})))
    for key in ("camera_angle_y", "x_fov"):
        case(f"{key} says otherwise", edit(lambda data, key=key: data.update({key: 0.6})))
    case("frames missing", edit(lambda data: data.pop("frames")))
    case("no frames", edit(lambda data: data.update(frames=[])))
    case("frames are no list", edit(lambda data: data.update(frames={"0": 1})))
    case("lens distortion", edit(lambda data: data.update(k1=0.1)))
    frame = {key: lambda data, key=key: data["frames"][1].pop(key) for key in ("transform_matrix", *PATHS[:3])}
    for key, change in frame.items():
        case(f"{key} missing", edit(change))
    for key in PATHS:
        case(f"{key} is a number", edit(lambda data, key=key: data["frames"][1].update({key: 3})))
        if not key.startswith(("depth", "seg")):
            case(f"{key} is not there", edit(lambda data, key=key: data["frames"][1].update({key: "a/00011.png"})))
    poses = {
        "three rows": np.eye(4)[:3],
        "NaN": np.full((4, 4), np.nan),
        "mirrored": np.diag([1.0, -1, 1, 1]),
        "no rotation": np.diag([2.0, 2, 2, 1]),
        "last row": np.diag([1.0, -1, -1, 2]),
    }
    opengl = np.eye(4)
    opengl[2, 3] = 0.5
    poses["head behind the camera"] = opengl
    for title, pose in poses.items():
        case(f"pose: {title}", edit(lambda data, pose=pose: data["frames"][1].update(transform_matrix=pose.tolist())))
    case("a frame twice", edit(lambda data: data["frames"].append(data["frames"][0])))
    case("a camera of the frame's own", edit(lambda data: data["frames"][1].update(fl_x=3.0)))
    case("no number", edit(lambda data: data["frames"][1].update(file_path="images/first.png")))
    for title, path in (("..", "../00000.png"), ("absolute", "/etc/00000.png"), ("drive", "C:\\00000.png")):
        case(f"path out of the folder: {title}", edit(lambda data, path=path: data["frames"][1].update(file_path=path)))

    def linked(folder: Path) -> None:
        (folder / "meshes/00000.obj").unlink()
        (folder / "meshes/00000.obj").symlink_to(golden / "meshes/00000.obj")

    case("path out of the folder: link", linked)
    for split in ("train", "test"):
        case(f"no {split} file", lambda folder, split=split: (folder / insta.SPLITS[split]).unlink())
    train = insta.SPLITS["train"]
    case("another camera in a split", edit(lambda data: data.update(cx=40.0), train))
    case("another frame in a split", edit(lambda data: data["frames"][0].update(file_path="images/00003.png"), train))
    moved = np.linalg.inv(opengl).tolist()
    case("another pose in a split", edit(lambda data: data["frames"][0].update(transform_matrix=moved), train))
    case("a split is damaged", lambda folder: (folder / train).write_text("{"))

    def picture(path: str, size: tuple[int, int]) -> Callable[[Path], None]:
        return lambda folder: Image.new("RGBA", size).save(folder / path)

    for name, what in (("images", "image"), ("depth", "depth"), ("seg_mask", "parsing")):
        case(f"{what} of another size", picture(f"{name}/00002.png", (64, 96)))
    case("image is a text", lambda folder: (folder / "images/00002.png").write_text("no"))
    meshes = {
        "empty": "",
        "another topology": "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n",
        "a letter": "v 0 0 x\nv 1 0 0\nv 0 1 0\nf 1 2 3\n",
    }
    for title, text in meshes.items():
        case(f"mesh: {title}", lambda folder, text=text: (folder / "meshes/00002.obj").write_text(text))
    for name, count in (("exp", 100), ("shape", 300), ("jaw", 6), ("eyes", 12), ("eyelids", 2)):
        path = f"flame/{name}/00002.txt"
        case(f"{name} missing", lambda folder, path=path: (folder / path).unlink())
        case(f"{name} too short", lambda folder, path=path, n=count: (folder / path).write_text("1.0\n" * (n - 1)))
        case(f"{name} is text", lambda folder, path=path: (folder / path).write_text("one\n"))
    case("jaw is no rotation", lambda folder: (folder / "flame/jaw/00002.txt").write_text("0\n" * 6))
    check_messages("insta", found)


def test_what_cannot_be_written_is_refused(tmp_path: Path, flame: Flame) -> None:
    track = example().flame
    assert track is not None
    zoom = np.linspace(1, 1.2, 3)[:, None, None] * recordings.K
    cases: dict[str, tuple[Recording, Flame | None, str]] = {
        "no FLAME": (example(), None, "out"),
        "no parameters": (replace(example(), flame=None), flame, "out"),
        "another FLAME": (example(version="flame2023"), flame, "out"),
        "too many coefficients": (example(expression=np.zeros((3, 120))), flame, "out"),
        "a zoom": (replace(example(), Ks=zoom), flame, "out"),
        "a folder that INSTA-pytorch cannot read": (example(), flame, "images/out"),
    }
    found = {}
    for title, (recording, model, folder) in cases.items():
        with pytest.raises(UserError) as error:
            write(recording, tmp_path / folder, model)
        found[title] = str(error.value).replace(str(tmp_path), "").replace(str(Path.home()), "~")
        assert not (tmp_path / folder).exists(), "nothing is written"
    found["no FLAME"] = found["no FLAME"].split("\n")[0]
    found["no parameters"] = found["no parameters"].split("\n")[0]
    check_messages("insta-write", found)
