"""Novel views on request: pictures and videos decoded back, alpha and all, fresh and forced; bad requests in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from reenact_data import FPS, FRAMES, TONE_BEGINS, change_fit, finish, write_dataset
from tones import onset

from pipeline.api import Avatar, LoadedSubject
from pipeline.avatars import conditions_of
from pipeline.cli import main
from pipeline.dataset import Dataset
from pipeline.errors import HeadcastError, Interrupted, StageError, SubjectBusy, UserError
from pipeline.evaluation import ClipRenderer
from pipeline.metrics import psnr
from pipeline.rendering import RenderPlan, RenderRequest, check_render, render, sway, turntable
from pipeline.sound import read_sound
from pipeline.video import read_frames


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("render")).root


@pytest.fixture
def dataset(written: Path, tmp_path: Path) -> Dataset:
    """A dataset of one's own."""
    return Dataset(Path(shutil.copytree(written, tmp_path / "data")))


def plan_of(dataset: Dataset, **fields: Any) -> RenderPlan:
    return check_render(RenderRequest(**{"data": dataset.root, "subject": "anna", "size": (64, 48), **fields}))


def left_over(dataset: Dataset) -> list[str]:
    folder = dataset.root / "anna" / "renders"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def read_png(path: Path) -> NDArray[np.uint8]:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB), np.uint8)


def over_white(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    alpha = image[..., 3:] / 255.0
    return np.asarray(alpha * image[..., :3] + 255 * (1 - alpha))


def test_a_transparent_picture_composes_to_the_white_one(dataset: Dataset) -> None:
    fields = {"path": "front", "yaw": 12.0, "expression": {"jawOpen": 0.5}}
    clear = render(plan_of(dataset, **fields, background="transparent"))
    white = render(plan_of(dataset, **fields))
    assert (clear["file"], white["file"]) == ("front-transparent.png", "front.png")
    assert white["frames"] == 1 and white["looked_from"]["yaw"] == pytest.approx([12, 12], abs=0.2)
    folder = dataset.root / "anna/renders"
    image, expected = read_png(folder / "front-transparent.png"), read_png(folder / "front.png")
    assert image.shape == (48, 64, 4) and expected.shape == (48, 64, 3)
    assert image[..., 3].min() == 0 and image[..., 3].max() > 250
    assert np.abs(over_white(image) - expected).max() <= 2
    assert left_over(dataset) == ["front-transparent.json", "front-transparent.png", "front.json", "front.png"]


def test_a_webm_decodes_with_the_alpha_of_the_pictures(dataset: Dataset) -> None:
    fields = {"path": "turntable", "yaw": 50.0, "seconds": 0.2, "background": "transparent"}
    video, pictures = (plan_of(dataset, **fields, **how) for how in ({}, {"format": "frames"}))
    assert render(video)["frames"] == render(pictures)["frames"] == 6
    files = sorted(pictures.product.path.glob("*.png"))
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(6)]
    shown = list(read_frames(video.product.path))
    assert len(shown) == 6
    for frame, file in zip(shown, files, strict=True):
        image, alpha = read_png(file), frame.alpha()
        assert alpha is not None and alpha.max() > 240
        assert np.abs(alpha.astype(int) - image[..., 3]).mean() < 3
        composed = over_white(np.dstack([frame.rgb(), alpha]))
        assert psnr(composed.astype(np.float32) / 255, over_white(image).astype(np.float32) / 255) > 25
    assert not np.array_equal(read_png(files[0]), read_png(files[3]))


def test_a_video_has_the_size_rate_and_colour_asked_for(dataset: Dataset) -> None:
    plan = plan_of(dataset, seconds=0.5, fps=24, background="204060", out=dataset.root.parent / "mine.mp4")
    account = render(plan)
    with av.open(str(plan.product.path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec.name, stream.width, stream.height, stream.average_rate) == ("h264", 64, 48, 24)
        first = next(file.decode(video=0)).to_ndarray(format="rgb24")
    np.testing.assert_allclose(first[2, 2].astype(int), [0x20, 0x40, 0x60], atol=6)
    assert (account["frames"], account["seconds"], account["size"]) == (12, 0.5, [64, 48])
    assert "12 frames, 0.5 s at 24 a second" in account["text"]
    assert account == json.loads((dataset.root.parent / "mine.json").read_text())


def test_the_clips_own_view_of_its_performance_is_what_evaluation_renders(dataset: Dataset) -> None:
    change_fit(dataset.subject("anna"), usable=np.arange(FRAMES) != 4)
    subject = LoadedSubject(dataset.subject("anna"))
    side = subject.clip.resolution
    span = {"first_frame": 2, "last_frame": 6}
    plan = plan_of(dataset, path="clip", drive="clip", edge="cut", size=(side, side), format="frames", **span)
    account = render(plan)
    assert (account["fps"], account["frames"]) == (str(FPS), 5)
    own = ClipRenderer.of(subject.avatar().model, subject.clip, 1)
    for number, frame in enumerate((2, 3, 3, 5, 6)):  # frame 4 cannot be used: the one before is held
        shown = read_png(plan.product.path / f"{number:06d}.png").astype(np.float32) / 255
        assert psnr(own.render(frame).image, shown) > 50
    assert len(conditions_of(subject.clip).expression) == FRAMES


def test_a_film_of_the_clips_performance_has_its_sound(dataset: Dataset) -> None:
    plan = plan_of(dataset, drive="clip", first_frame=6)
    account = render(plan)
    assert account["sound"] and account["frames"] == FRAMES - 6
    sound = np.concatenate(list(read_sound(plan.product.path, 0.0, account["seconds"])))
    assert onset(sound) == pytest.approx(TONE_BEGINS - float(6 / FPS), abs=0.01)
    assert not render(plan_of(dataset, drive="clip", first_frame=6, last_frame=7, background="transparent"))["sound"]


def test_files_of_cameras_and_of_a_performance_are_followed(dataset: Dataset, tmp_path: Path) -> None:
    cameras, acts = tmp_path / "around.json", tmp_path / "jaw.json"
    cameras.write_text(json.dumps({"schema": 1, "keyframes": [{"time": 0}, {"time": 0.2, "yaw": 30}]}))
    keys = [{"time": 0}, {"time": 0.2, "expression": {"jawOpen": 1.0}, "pose": {"yaw": 10}}]
    acts.write_text(json.dumps({"schema": 1, "keyframes": keys}))
    plan = plan_of(dataset, path=str(cameras), drive=str(acts), fps=10, format="frames", edge="cut")
    assert plan.product.path.name == "around-jaw-frames"
    assert render(plan)["frames"] == 3
    avatar = LoadedSubject(dataset.subject("anna")).avatar()
    from pipeline.api import Pose

    for number, (yaw, opened) in enumerate(((0, 0.0), (15, 0.5), (30, 1.0))):
        expected = avatar.render({"jawOpen": opened}, Pose(yaw=10 * opened), avatar.camera((64, 48), yaw))
        shown = read_png(plan.product.path / f"{number:06d}.png")
        assert psnr(expected.astype(np.float32) / 255, shown.astype(np.float32) / 255) > 45


def test_a_second_time_it_is_fresh_and_whatever_changes_makes_it_anew(dataset: Dataset) -> None:
    fields = {"path": "front", "yaw": 3.0}
    first = render(plan_of(dataset, **fields))
    made = (dataset.root / "anna/renders/front.png").stat()
    assert render(plan_of(dataset, **fields, threads=1)) == first
    assert (dataset.root / "anna/renders/front.png").stat().st_mtime_ns == made.st_mtime_ns
    with pytest.raises(UserError, match="is there already"):
        plan_of(dataset, path="front", yaw=4.0)
    finish(dataset.subject("anna"), "train", "2")
    with pytest.raises(UserError, match="is there already"):
        plan_of(dataset, **fields)
    again = render(plan_of(dataset, **fields, force=True))
    assert (again["sha256"], again["key"] == first["key"]) == (first["sha256"], False)


def test_a_stop_or_a_change_meanwhile_leaves_nothing(dataset: Dataset) -> None:
    request = RenderRequest(data=dataset.root, subject="anna", size=(32, 32), seconds=0.2)
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        render(check_render(request, stop_requested=lambda: next(asked)))
    assert left_over(dataset) == []

    def replaced() -> bool:
        finish(dataset.subject("anna"), "train", "2")
        return False

    with pytest.raises(SubjectBusy):
        render(check_render(request, stop_requested=replaced))
    assert left_over(dataset) == []


def test_a_place_that_cannot_be_written_is_told(dataset: Dataset) -> None:
    plan = plan_of(dataset, path="front", out=Path("/proc/self/front.png"))
    with pytest.raises(StageError, match=r"front\.png' could not be written"):
        render(plan)


def test_frames_for_notebooks(written: Path) -> None:
    avatar = LoadedSubject(Dataset(written).subject("anna")).avatar()
    around = list(turntable(avatar, seconds=0.2, size=32, fps=20, background=None))
    assert [frame.shape for frame in around] == [(32, 32, 4)] * 4
    still = avatar.render(camera=avatar.camera(32, 90, 0, 0.9), background=None)
    np.testing.assert_array_equal(around[1], still)
    smiling = list(sway(avatar, 5, 2, expression={"mouthSmileLeft": 1.0}, seconds=0.1, size=(48, 32)))
    assert [frame.shape for frame in smiling] == [(32, 48, 3)] * 3
    assert not np.array_equal(smiling[0], next(sway(Avatar(avatar.model), 5, 2, seconds=0.1, size=(48, 32))))


def _nothing(dataset: Dataset) -> None:
    pass


def _untrain(dataset: Dataset) -> None:
    shutil.rmtree(dataset.root / "anna/train")


def _occupy(dataset: Dataset) -> None:
    (dataset.root / "anna/renders").mkdir()
    (dataset.root / "anna/renders/orbit.mp4").write_bytes(b"mine")


def _hide(dataset: Dataset) -> None:
    change_fit(dataset.subject("anna"), usable=np.arange(FRAMES) < 10)


def _finish_export(dataset: Dataset) -> None:
    (dataset.root / "anna/export").mkdir()
    about = {"schema": 1, "stage": "export", "key": "k", "digest": "d", "inputs": {}, "outputs": []}
    (dataset.root / "anna/export/stage.json").write_text(json.dumps(about))


def _path_with_nan(dataset: Dataset) -> None:
    (dataset.root.parent / "path.json").write_text('{"schema": 1, "keyframes": [{"time": 0, "yaw": NaN}]}')


def _wild_drive(dataset: Dataset) -> None:
    key = {"time": 0, "expression": {"jawOpen": 3}}
    (dataset.root.parent / "path.json").write_text(json.dumps({"schema": 1, "keyframes": [key]}))


def _unknown_drive(dataset: Dataset) -> None:
    key = {"time": 0, "expression": {"jawopen": 1}}
    (dataset.root.parent / "path.json").write_text(json.dumps({"schema": 1, "keyframes": [key]}))


HERE = "<here>"


@pytest.mark.parametrize(
    ("spoil", "fields", "message"),
    [
        (_nothing, {"subject": "carl"}, "No subject 'carl'"),
        (_nothing, {"subject": "../anna"}, "cannot be a subject name"),
        (_nothing, {"subject": "bert"}, "'bert' has no trained avatar"),
        (_untrain, {}, "'anna' has no trained avatar"),
        (_nothing, {"path": "spiral"}, "There is no path 'spiral'"),
        (_nothing, {"drive": "bert"}, "There is no drive 'bert'"),
        (_nothing, {"path": f"{HERE}/none.json"}, "Cannot read '.*none.json': No such file"),
        (_path_with_nan, {"path": f"{HERE}/path.json"}, r"keyframes\.0\.yaw: .*finite number"),
        (_wild_drive, {"drive": f"{HERE}/path.json"}, "jawOpen is 3, not in"),
        (_unknown_drive, {"drive": f"{HERE}/path.json", "format": "frames"}, "no coefficient 'jawopen'"),
        (_nothing, {"path": "clip", "yaw": 3.0}, "--yaw means nothing with --path clip"),
        (_nothing, {"drive": "clip", "expression": {"jawOpen": 1.0}}, "--set means nothing with --drive clip"),
        (_nothing, {"first_frame": 2}, "are of the clip"),
        (_nothing, {"drive": "clip", "last_frame": FRAMES}, f"Frames 0 to {FRAMES} of 'anna' are not all there"),
        (_hide, {"drive": "clip", "first_frame": 12}, "Frames 12 to 23 of 'anna' hold none that can be used"),
        (_nothing, {"drive": "clip", "seconds": 9.0}, "The performance lasts 0.80 s, not 9"),
        (_nothing, {"expression": {"jawopen": 1.0}}, "no coefficient 'jawopen'"),
        (_nothing, {"size": (63, 48)}, "A video cannot have 63x48 pixels"),
        (_nothing, {"seconds": 600.0, "fps": 60}, "36,000 frames are too many"),
        (_nothing, {"format": "mp4", "background": "transparent"}, "An .mp4 cannot be transparent"),
        (_nothing, {"format": "png"}, "One picture cannot show --path orbit"),
        (_nothing, {"path": "front", "seconds": 2.0, "format": "png"}, "One picture cannot show --seconds"),
        (_nothing, {"out": Path("a.gif")}, "'a.gif' does not name anything known"),
        (_nothing, {"out": Path("a.mp4"), "format": "webm"}, "'a.mp4' does not name a webm file"),
        (_nothing, {"out": Path("no/such/place.mp4")}, "there is no folder"),
        (_occupy, {}, "orbit.mp4' is there already"),
        (_nothing, {"baked": True}, "no exported avatar"),
        (_finish_export, {"baked": True, "path": "front"}, "'anna' has no baked avatar"),
    ],
)
def test_bad_requests_are_refused_in_words(
    dataset: Dataset, spoil: Callable[[Dataset], None], fields: dict[str, Any], message: str
) -> None:
    spoil(dataset)
    before = sorted(dataset.root.rglob("*"))
    here = str(dataset.root.parent)
    fields = {name: value.replace(HERE, here) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(HeadcastError, match=message) as caught:
        render(plan_of(dataset, **fields))
    assert caught.value.fix
    assert sorted(dataset.root.rglob("*")) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (8, 64)}, "a side has 16 to 4096 pixels"),
        ({"size": (64, 5000)}, "a side has 16 to 4096 pixels"),
        ({"background": "teal-ish"}, "choose transparent, white"),
        ({"expression": {"jawOpen": 1.5}}, "jawOpen is 1.5"),
        ({"expression": {"jawOpen": float("nan")}}, "finite"),
        ({"yaw": float("inf")}, "finite"),
        ({"pitch": 90.0}, "85"),
        ({"seconds": 0.0}, "greater than 0"),
        ({"zoom": 0.0}, "0.1"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_values_that_cannot_be_are_refused_by_the_request(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RenderRequest(subject="anna", **fields)


def test_the_command_answers_with_the_account_and_refuses_what_is_no_value(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--path", "front", "--size", "32x24", "--set", "jawOpen=0.5", "--set", "browInnerUp=1")
    command = ["render", "anna", "--data", str(dataset.root), "--json", *options]
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
    assert read_png(dataset.root / "anna/renders/front.png").shape == (24, 32, 3)
    assert "front.png: fresh, nothing to do" in capsys.readouterr().err
    for wrong, message in (
        (("--size", "0512"), "'0512' is no size."),
        (("--size", "9x16"), "'(9, 16)' cannot be the size: Value error, a side has 16 to 4096 pixels."),
        (("--set", "jawOpen=wide"), "'wide' is no number for jawOpen."),
        (("--set", "jawOpen"), "'jawOpen' is not NAME=VALUE."),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["render", "anna", "--data", str(dataset.root), *wrong])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
