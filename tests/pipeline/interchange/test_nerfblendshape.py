"""NeRFBlendShape's and gaussian-head's layout: the same pixels by our reader and by what the programs do with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import oracle_nerfblendshape as oracle
import pytest
import recordings
import torch
from messages import check_messages
from PIL import Image

from pipeline.errors import UserError
from pipeline.geometry import transform_points
from pipeline.heads.flame import Flame, load_flame
from pipeline.interchange import ReadOptions, nerfblendshape
from pipeline.interchange.recording import Recording
from pipeline.interchange.sidecar import Sidecar

GOLDEN = Path(__file__).parents[2] / "golden" / "nerfblendshape"
POINTS = np.random.default_rng(3).uniform(-0.1, 0.1, (40, 3))
FACE = np.random.default_rng(4).uniform(-0.08, 0.08, (3, 478, 3)) + np.array([0.0, 0.1, 0.06])
LANDMARKS = transform_points(recordings.camera_poses(3), FACE)
CENTRED = np.array([[118.0, 0, 48], [0, 109.0, 32], [0, 0, 1]])
NAMES = tuple(f"headcast/{index:02d}" for index in range(52))


def example(intrinsics: np.ndarray = CENTRED, **changes: Any) -> Recording:
    names = changes.pop("names", NAMES)
    return recordings.recording("vhap", names=names, intrinsics=intrinsics, **changes)


def write(recording: Recording, folder: Path, flame: Flame | None = None, **changes: Any) -> list[str]:
    sidecar = Sidecar("nerfblendshape", "anna", str(recording.fps), tuple(recording.numbers.tolist()), "", ())
    return nerfblendshape.write(recording, recordings.picture, folder, flame=flame, sidecar=sidecar, **changes)


def in_its_world(folder: Path, points: np.ndarray) -> np.ndarray:
    sidecar = json.loads((folder / "headcast.json").read_text())
    return (points - sidecar["origin"]) * sidecar["scale"]


@pytest.mark.parametrize("intrinsics", [CENTRED, recordings.K], ids=["centred", "off centre"])
@pytest.mark.parametrize("landmarks", [None, LANDMARKS], ids=["bare", "landmarks"])
def test_what_is_written_is_read_as_it_was(
    tmp_path: Path, intrinsics: np.ndarray, landmarks: np.ndarray | None
) -> None:
    before = example(intrinsics)
    write(before, tmp_path, landmarks=landmarks, coefficients=0)
    assert nerfblendshape.detect(tmp_path)
    after = nerfblendshape.read(tmp_path, ReadOptions())
    np.testing.assert_allclose(recordings.pixels(after, POINTS), recordings.pixels(before, POINTS), atol=1e-8)
    np.testing.assert_allclose(after.Ts_cam_world, before.Ts_cam_world, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(after.coefficients, before.coefficients)
    assert (after.fps, after.basis, after.coefficient_names) == (Fraction(30000, 1001), "headcast", NAMES)
    assert (after.numbers.tolist(), after.size, after.alpha) == ([3, 4, 9], (96, 64), "masks")
    assert after.masks == ("mask/4.png", "mask/5.png", "mask/10.png")
    assert (after.notes, after.splits) == ((), {})


def test_both_programs_see_the_head_where_it_is(tmp_path: Path) -> None:
    before = example()
    write(before, tmp_path, landmarks=LANDMARKS)
    points, expected = in_its_world(tmp_path, POINTS), recordings.pixels(before, POINTS)
    numbers, pixels, masks = oracle.gaussian_head(tmp_path, points)
    assert numbers == [3, 4, 9]
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    np.testing.assert_array_equal(masks[0] * 255, recordings.picture(0)[1])
    numbers, pixels = oracle.nerfblendshape(tmp_path, points)
    assert numbers == [3, 4, 9]
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    oracle.training_files(tmp_path)
    marks = np.loadtxt(tmp_path / "ori_imgs" / "4.lms") + 0.5
    np.testing.assert_allclose(marks, recordings.pixels(before, FACE)[1], atol=6e-4)


def test_nerfblendshape_uses_the_principal_point_which_gaussian_head_does_not(tmp_path: Path) -> None:
    before = example(recordings.K)
    warnings = write(before, tmp_path)
    points, expected = in_its_world(tmp_path, POINTS), recordings.pixels(before, POINTS)
    np.testing.assert_allclose(oracle.nerfblendshape(tmp_path, points)[1], expected, atol=1e-6)
    off = expected - oracle.gaussian_head(tmp_path, points)[1]
    np.testing.assert_allclose(off, np.broadcast_to([-6.5, 3.25], off.shape), atol=1e-6)
    assert any("-6.5, +3.2 px beside its place" in warning for warning in warnings)


def test_the_camera_stands_at_the_usual_distance_from_the_face(tmp_path: Path) -> None:
    write(example(), tmp_path, landmarks=LANDMARKS)
    frames = json.loads((tmp_path / "transforms.json").read_text())["frames"]
    places = np.array([frame["transform_matrix"] for frame in frames])[:, :3, 3]
    assert np.median(np.linalg.norm(places, axis=1)) == pytest.approx(0.3493212163448334, abs=1e-12)
    middle = in_its_world(tmp_path, (FACE.min(1) + FACE.max(1)) / 2)
    assert np.abs(middle).max() < 0.01


def test_the_coefficients_that_vary_most_are_written(tmp_path: Path) -> None:
    before = example()
    spread = before.coefficients.std(0)
    warnings = write(before, tmp_path)
    most = sorted(np.argsort(-spread)[:46])
    after = nerfblendshape.read(tmp_path, ReadOptions())
    assert after.coefficient_names == tuple(NAMES[index] for index in most)
    np.testing.assert_array_equal(after.coefficients, before.coefficients[:, most])
    left_out = json.loads((tmp_path / "headcast.json").read_text())["left_out"]
    assert left_out == {NAMES[index]: spread[index] for index in range(52) if index not in most}
    assert max(left_out.values()) <= spread[most].min()
    assert any(warning.startswith("6 coefficients are left out") for warning in warnings)
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "max_46.txt"), after.coefficients.max(0))
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "min_46.txt"), after.coefficients.min(0))


@pytest.mark.parametrize(("count", "trains"), [(3, 0), (700, 400), (1000, 0), (1040, 40)])
def test_gaussian_head_is_told_how_few_frames_it_would_train_on(count: int, trains: int) -> None:
    warning, *_ = nerfblendshape._told_of_frames(example(numbers=range(count)))
    assert trains == len(list(range(count))[0 : count + -1000])
    assert f"of these {count} frames it would train on {trains};" in warning
    assert nerfblendshape._told_of_frames(example(numbers=range(1050))) == []


@pytest.fixture(scope="module")
def flame(tmp_path_factory: pytest.TempPathFactory) -> Flame:
    folder = tmp_path_factory.mktemp("heads")
    recordings.flame_file(folder, "flame2020")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_HEADS", str(folder))
        return load_flame("flame2020")


def test_a_head_that_moves_in_its_world_is_moved_into_the_camera(tmp_path: Path, flame: Flame) -> None:
    offset = np.random.default_rng(5).normal(0, 0.002, (5143, 3))
    track = replace(recordings.flame_track("flame2020", 3, moving=True), static_offset=offset)
    before = recordings.recording("vhap", flame=track, intrinsics=CENTRED)
    write(before, tmp_path, flame)
    # A vertex that hangs on the neck alone, without what the expression and the bending of the neck do to it.
    plain = replace(flame, pose_directions=torch.zeros_like(flame.pose_directions))
    rigid = torch.zeros_like(flame.weights)
    rigid[:, 1] = 1
    plain = replace(plain, weights=rigid, template=plain.template + torch.from_numpy(offset[:5023]))
    parts = [torch.from_numpy(np.ascontiguousarray(getattr(track, name))) for name in ("shape", "expression")]
    turns = [torch.from_numpy(getattr(track, name)) for name in ("rotation", "neck", "jaw", "eyes", "translation")]
    world = plain.vertices(*parts, *turns).numpy()
    still = plain.vertices(*parts, *(torch.zeros_like(turn) for turn in turns)).numpy()
    expected = recordings.pixels(replace(before, flame=None), world)
    after = nerfblendshape.read(tmp_path, ReadOptions())
    np.testing.assert_allclose(recordings.pixels(after, still), expected, atol=1e-6)
    assert after.basis == "flame2020-expression-100-and-pose"
    jaws = [after.coefficient_names.index(f"{after.basis}/jaw-{axis}") for axis in "xyz"]
    np.testing.assert_array_equal(after.coefficients[:, jaws], track.jaw)


def test_of_flame_what_moves_the_face_most_is_written(tmp_path: Path, flame: Flame) -> None:
    track = recordings.flame_track("flame2020", 3, moving=True)
    shrinking = flame.expressions * torch.linspace(1, 0.01, len(flame.expressions)).reshape(-1, 1, 1)
    shrinking = shrinking / flame.expressions.flatten(1).norm(dim=1).reshape(-1, 1, 1)
    steady = np.outer([-1.0, 0.0, 1.0], np.linspace(1, 1.5, 100))
    before = recordings.recording("vhap", flame=replace(track, expression=steady), intrinsics=CENTRED)
    write(before, tmp_path, replace(flame, expressions=shrinking))
    names = [name.partition("/")[2] for name in nerfblendshape.read(tmp_path, ReadOptions()).coefficient_names]
    assert len(names) == 46
    assert {"000", "001", "jaw-x", "jaw-y", "jaw-z"} <= set(names)
    assert "099" not in names


def test_flame_that_turns_needs_its_model(tmp_path: Path) -> None:
    before = recordings.recording("vhap", flame=recordings.flame_track("flame2020", 3, moving=True))
    with pytest.raises(UserError, match="need the model flame2020"):
        write(before, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_golden_is_read_as_its_programs_read_it() -> None:
    expected = json.loads(GOLDEN.with_name("nerfblendshape-expected.json").read_text())
    assert nerfblendshape.detect(GOLDEN)
    found = nerfblendshape.read(GOLDEN, ReadOptions())
    np.testing.assert_allclose(recordings.pixels(found, np.array(expected["points"])), expected["pixels"], atol=1e-8)
    frames = json.loads((GOLDEN / "transforms.json").read_text())["frames"]
    assert [frame["img_id"] for frame in frames] == [2, 0, 5]
    np.testing.assert_array_equal(found.coefficients, [frames[at]["exp_ori"] for at in (1, 0, 2)])
    assert (found.numbers.tolist(), found.fps, found.basis) == ([0, 2, 5], 25, "nerfblendshape-46")
    assert found.coefficient_names[7] == "nerfblendshape-46/07"
    assert (found.alpha, found.masks) == ("masks", ("mask/1.png", "mask/3.png", "mask/6.png"))
    assert (found.extra, found.frame_extra[1]) == ({"transforms.json": {"near": 0.2}}, {"aud_id": 2})
    assert found.notes[0] == "Lengths are the tracker's own, not metres, and stay as they are."
    assert {"bc.jpg", "max_46.txt", "min_46.txt"} <= set(found.files)


def test_golden_is_written_back_with_the_same_values(tmp_path: Path) -> None:
    write(nerfblendshape.read(GOLDEN, ReadOptions()), tmp_path)
    before, after = (json.loads((folder / "transforms.json").read_text()) for folder in (GOLDEN, tmp_path))
    before["frames"].sort(key=lambda frame: frame["img_id"])
    for old, new in zip(before["frames"], after["frames"], strict=True):
        np.testing.assert_allclose(new.pop("transform_matrix"), old.pop("transform_matrix"), atol=2e-6)
    assert after == before
    for name in ("max_46.txt", "min_46.txt"):
        np.testing.assert_allclose(np.loadtxt(tmp_path / name), np.loadtxt(GOLDEN / name), rtol=1e-7)


def test_a_parsing_serves_without_masks(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "mask")
    found = nerfblendshape.read(tmp_path / "set", ReadOptions(fps=Fraction(30)))
    assert (found.alpha, found.masks, found.fps) == ("parsing", ("parsing/0.png", "parsing/2.png", "parsing/5.png"), 30)
    shutil.rmtree(tmp_path / "set" / "parsing")
    assert nerfblendshape.read(tmp_path / "set", ReadOptions()).alpha == "none"


def test_the_last_500_are_for_the_test(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "set")
    path = tmp_path / "set" / "transforms.json"
    data = json.loads(path.read_text())
    data["frames"] = [{**data["frames"][0], "img_id": number} for number in range(503)]
    path.write_text(json.dumps(data))
    image, mask = tmp_path / "set" / "ori_imgs" / "0.jpg", tmp_path / "set" / "mask" / "1.png"
    for number in range(503):
        for source, name in ((image, f"ori_imgs/{number}.jpg"), (mask, f"mask/{number + 1}.png")):
            if not (tmp_path / "set" / name).exists():
                os.link(source, tmp_path / "set" / name)
    splits = nerfblendshape.read(tmp_path / "set", ReadOptions()).splits
    assert splits == {"train": (0, 1, 2), "test": tuple(range(3, 503))}


Change = Callable[[dict[str, Any], Path], object]


def _without(key: str) -> Change:
    return lambda data, folder: data.pop(key)


def _without_in_frame(key: str) -> Change:
    return lambda data, folder: data["frames"][1].pop(key)


def _put(key: str, value: Any) -> Change:
    return lambda data, folder: data.update({key: value})


def _put_frame(key: str, value: Any) -> Change:
    return lambda data, folder: data["frames"][1].update({key: value})


def _matrix(*changes: tuple[int, int, float]) -> Change:
    def change(data: dict[str, Any], folder: Path) -> None:
        for row, column, factor in changes:
            data["frames"][1]["transform_matrix"][row][column] *= factor

    return change


def _file(name: str, content: bytes | None) -> Change:
    def change(data: dict[str, Any], folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def _smaller(name: str) -> Change:
    return lambda data, folder: Image.new("L" if "mask" in name else "RGB", (48, 32)).save(folder / name)


def _leading_out(data: dict[str, Any], folder: Path) -> None:
    outside = folder.parent / "outside.jpg"
    shutil.move(folder / "ori_imgs" / "0.jpg", outside)
    (folder / "ori_imgs" / "0.jpg").symlink_to(outside)


def _only_video(data: dict[str, Any], folder: Path) -> None:
    shutil.rmtree(folder / "ori_imgs")
    (folder / "id1.mp4").touch()


def _ad_nerf(data: dict[str, Any], folder: Path) -> None:
    for key in ("fx", "fy"):
        data.pop(key)
    data["focal_len"] = 1200.0
    for frame in data["frames"]:
        frame.pop("exp_ori")


def _sidecar(**changes: Any) -> Change:
    values = {"schema": 1, "format": "nerfblendshape", "subject": "anna", "fps": "25", "numbers": [0, 2, 5]}
    values |= {"basis": "headcast", "names": [f"headcast/{index}" for index in range(46)]} | changes
    return lambda data, folder: (folder / "headcast.json").write_text(json.dumps(values))


FAULTS: dict[str, Change] = {
    **{f"missing {key}": _without(key) for key in oracle.TOP},
    **{f"wrong {key}": _put(key, [1, 2]) for key in oracle.TOP if key != "frames"},
    "frames no list": _put("frames", {"img_id": 0}),
    "frames empty": _put("frames", []),
    "frames of texts": lambda data, folder: data["frames"].__setitem__(1, "0"),
    "w no whole number": _put("w", 96.5),
    "fx negative": _put("fx", -131.25),
    "cx far off": _put("cx", 1e6),
    **{f"frame missing {key}": _without_in_frame(key) for key in ("img_id", "exp_ori", "transform_matrix")},
    "img_id text": _put_frame("img_id", "0"),
    "img_id fraction": _put_frame("img_id", 0.5),
    "img_id negative": _put_frame("img_id", -1),
    "img_id twice": _put_frame("img_id", 2),
    "exp_ori another length": _put_frame("exp_ori", [0.0] * 45),
    "exp_ori empty": lambda data, folder: [frame.update(exp_ori=[]) for frame in data["frames"]],
    "exp_ori texts": _put_frame("exp_ori", ["a"] * 46),
    "transform_matrix 3 rows": lambda data, folder: data["frames"][1]["transform_matrix"].pop(),
    "transform_matrix NaN": _matrix((0, 3, float("nan"))),
    "transform_matrix mirrors": _matrix((0, 0, -1), (1, 0, -1), (2, 0, -1)),
    "transform_matrix scales": _matrix((0, 0, 2), (1, 0, 2), (2, 0, 2)),
    "transform_matrix of OpenCV": _matrix(*((row, column, -1) for row in range(3) for column in (1, 2))),
    "image missing": _file("ori_imgs/0.jpg", None),
    "image no picture": _file("ori_imgs/0.jpg", b"no picture"),
    "image another size": _smaller("ori_imgs/0.jpg"),
    "image outside": _leading_out,
    "mask missing": _file("mask/6.png", None),
    "mask another size": _smaller("mask/3.png"),
    "background another size": _smaller("bc.jpg"),
    "max without min": _file("min_46.txt", None),
    "max no numbers": _file("max_46.txt", b"one two"),
    "max another length": _file("max_46.txt", b"1.0\n2.0\n"),
    "max below min": _file("max_46.txt", b"-9\n" * 46),
    "max NaN": _file("max_46.txt", b"nan\n" * 46),
    "only a video": _only_video,
    "AD-NeRF": _ad_nerf,
    "sidecar of other coefficients": _sidecar(names=["headcast/0"]),
    "sidecar without scale": _sidecar(scale=0),
    "sidecar's origin": _sidecar(origin=[0, 1]),
}


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    found = {}
    for case, change in FAULTS.items():
        folder = tmp_path / "set"
        shutil.copytree(GOLDEN, folder)
        data = json.loads((folder / "transforms.json").read_text())
        change(data, folder)
        (folder / "transforms.json").write_text(json.dumps(data))
        with pytest.raises(UserError) as error:
            nerfblendshape.read(folder, ReadOptions())
        found[case] = str(error.value).replace(str(folder), "SET")
        shutil.rmtree(folder)
    check_messages("nerfblendshape", found)


def test_one_camera_only(tmp_path: Path) -> None:
    before = example()
    Ks = before.Ks.copy()
    Ks[1, 0, 0] += 1
    with pytest.raises(UserError, match="has one camera"):
        write(replace(before, Ks=Ks), tmp_path)
    assert recordings.files_of(tmp_path) == []


def test_pictures_are_those_of_the_recording(tmp_path: Path) -> None:
    write(example(), tmp_path)
    rgb, alpha = recordings.picture(2)
    image = np.asarray(Image.open(tmp_path / "ori_imgs" / "9.jpg")).astype(int)
    assert np.abs(image - rgb).mean() < 2
    head = np.asarray(Image.open(tmp_path / "head_imgs" / "9.jpg")).astype(int)
    assert head[0, 0].min() > 250
    assert np.abs(head - image)[20:44, 36:60].mean() < 2
    parsing = np.asarray(Image.open(tmp_path / "parsing" / "9.png"))
    np.testing.assert_array_equal((parsing == (0, 0, 255)).all(-1), alpha > 127)
    assert (np.asarray(Image.open(tmp_path / "bc.jpg")) == 255).all()
