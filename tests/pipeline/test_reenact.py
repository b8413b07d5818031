"""One subject drives another's avatar: the video, its account, and every bad request in one clear message."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from reenact_data import FPS, FRAMES, TONE_BEGINS, change_fit, finish, read_fit, write_dataset
from tones import onset, write_tone

from pipeline.cli.reenact import Reenact
from pipeline.dataset import Dataset
from pipeline.errors import HeadcastError, Interrupted, StageError, SubjectBusy, UserError
from pipeline.metrics import psnr
from pipeline.progress import SilentReporter
from pipeline.reenact import Plan, ReenactRequest, Scene, check_reenact, driver_run, reenact, request_of
from pipeline.sound import read_sound
from pipeline.source import register_source


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("reenact")).root


@pytest.fixture
def dataset(written: Path, tmp_path: Path) -> Dataset:
    """A dataset of one's own."""
    return Dataset(Path(shutil.copytree(written, tmp_path / "data")))


def plan_of(dataset: Dataset, **fields: Any) -> Plan:
    return check_reenact(request_of(**{"data": dataset.root, "avatar": "anna", "drive": "bert", **fields}))


def pictures(path: Path) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def picture_of(plan: Plan, frame: int) -> NDArray[np.uint8]:
    picture = plan.driver.picture(frame, plan.clip.resolution)
    assert picture is not None
    return picture


def left_over(dataset: Dataset) -> list[str]:
    folder = dataset.root / "anna" / "reenact"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_her_double_drives_her_as_her_own_clip_does(dataset: Dataset) -> None:
    """The whole way: what the video shows is the avatar's own render, but for the torso, which is predicted."""
    from pipeline.avatars import conditions_of, load_avatar
    from pipeline.avatars.rig import with_predicted_torso
    from pipeline.evaluation import ClipRenderer

    plan = plan_of(dataset)
    account = reenact(plan)
    avatar = load_avatar(plan.avatar.stage("train"))
    filmed = ClipRenderer.of(avatar, plan.clip, threads=1)
    truth = conditions_of(plan.clip)
    own = ClipRenderer(
        avatar, with_predicted_torso(avatar, truth), filmed.Ks, filmed.cameras, filmed.resolution, 1, filmed.inside
    )
    shown = pictures(plan.out)
    assert len(shown) == account["frames"] == FRAMES
    scene = Scene.of(plan, SilentReporter())
    for frame in (0, 7, FRAMES - 1):
        expected = own.render(frame).image
        assert psnr(expected, scene.picture(frame, (1.0, 1.0, 1.0)).astype(np.float32) / 255) > 50
        assert psnr(expected, shown[frame].astype(np.float32) / 255) > 28  # compressed
    assert account["limits"] == {}


def test_rate_length_and_sound_are_the_drivers(dataset: Dataset) -> None:
    plan = plan_of(dataset, first_frame=5, last_frame=20)
    account = reenact(plan)
    with av.open(str(plan.out)) as file:
        stream = file.streams.video[0]
        assert (stream.average_rate, stream.frames) == (FPS, 16)
    assert (account["fps"], account["frames"]) == ("30000/1001", 16)
    assert account["seconds"] == pytest.approx(float(16 / FPS), abs=1e-6)
    assert account["sound"]
    sound = np.concatenate(list(read_sound(plan.out, 0.0, float(16 / FPS))))
    assert onset(sound) == pytest.approx(TONE_BEGINS - float(5 / FPS), abs=0.01)


def test_frames_that_are_missing_keep_their_time(dataset: Dataset) -> None:
    """Repeated frames are dropped by decode, and in others no face is seen: the clock runs on all the same."""
    bert = dataset.subject("bert")
    kept = [number for number in range(FRAMES) if number not in (4, 5, 11)]
    path = bert.stage("decode") / "frames.json"
    listing = json.loads(path.read_text())
    entries = [listing["frames"][number] for number in kept]
    listing["frames"] = [{**entry, "index": number} for number, entry in enumerate(entries)]
    path.write_text(json.dumps({**listing, "count": len(kept)}))
    fit = read_fit(bert)
    whole = ("head", "identity", "expression_names", "landmark_offsets", "expression_offsets", "image_size")
    change_fit(bert, **{name: array[kept] for name, array in fit.items() if name not in whole})
    usable = np.ones(len(kept), bool)
    usable[kept.index(15)] = False
    change_fit(bert, usable=usable)
    plan = plan_of(dataset)
    scene = Scene.of(plan, SilentReporter())
    assert len(scene) == FRAMES
    assert [kept[number] for number in scene.shown] == [*range(4), 3, 3, *range(6, 11), 10, *range(12, FRAMES)]
    own = Scene.of(plan_of(dataset, drive="anna"), SilentReporter()).renderer.conditions.T_cam_head
    turned = scene.renderer.conditions.T_cam_head
    np.testing.assert_allclose(turned[12, :3, 3], own[12, :3, 3], atol=2e-3)
    middle = (turned[14, :3, 3] + turned[16, :3, 3]) / 2
    np.testing.assert_allclose(turned[15, :3, 3], middle, atol=1e-4)


def test_of_two_clips_each_brings_its_own_sound(dataset: Dataset, tmp_path: Path) -> None:
    """The second clip begins a second after the first ends, as decode has it; nobody is seen in between."""
    bert = dataset.subject("bert")
    half = FRAMES // 2
    begins = float((half - 1) / FPS) + 1
    path = bert.stage("decode") / "frames.json"
    listing = json.loads(path.read_text())
    about = {"name": "", "content": [listing["width"], listing["height"]], "fps": str(FPS)}
    for entry in listing["frames"][half:]:
        number = entry["index"] - half
        entry |= {"clip": 1, "shot": 1, "source_frame": number, "time": round(begins + float(number / FPS), 6)}
    path.write_text(json.dumps({**listing, "clips": [about, about]}))
    change_fit(bert, clips=(np.arange(FRAMES) >= half).astype(np.int64))
    silent = write_tone(tmp_path / "one.mp4", begins=9.0, seconds=0.4, fps=FPS)
    register_source(bert, [silent, write_tone(tmp_path / "two.mp4", begins=0.2, seconds=1.0, fps=FPS)])
    plan = plan_of(dataset)
    account = reenact(plan)
    assert account["frames"] == round((begins + float((half - 1) / FPS)) * FPS) + 1
    assert 12 <= account["held_frames"] <= 18
    sound = np.concatenate(list(read_sound(plan.out, 0.0, account["seconds"])))
    assert onset(sound) == pytest.approx(begins + 0.2, abs=0.01)
    late = plan_of(dataset, first_frame=half + 2, force=True)
    reenact(late)
    sound = np.concatenate(list(read_sound(late.out, 0.0, 0.3)))
    assert onset(sound) == pytest.approx(0.2 - float(2 / FPS), abs=0.01)


def test_a_second_time_it_is_fresh_and_whatever_changes_makes_it_anew(dataset: Dataset) -> None:
    first = reenact(plan_of(dataset, last_frame=3))
    made = (dataset.root / "anna/reenact/bert.mp4").stat()
    assert reenact(plan_of(dataset, last_frame=3)) == first
    assert (dataset.root / "anna/reenact/bert.mp4").stat().st_mtime_ns == made.st_mtime_ns
    with pytest.raises(UserError, match="is there already"):
        plan_of(dataset, last_frame=4)
    finish(dataset.subject("bert"), "fit", "2")
    with pytest.raises(UserError, match="is there already"):
        plan_of(dataset, last_frame=3)
    again = reenact(plan_of(dataset, last_frame=3, force=True))
    assert (again["sha256"], again["key"] == first["key"]) == (first["sha256"], False)
    assert again["keys"]["drive"]["fit"] == "key bert fit 2"
    assert again["keys"]["avatar"]["train"] == "key anna train 1"
    with open(dataset.root / "anna/reenact/bert.mp4", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="is there already"):
        plan_of(dataset, last_frame=3)
    assert left_over(dataset) == ["bert.json", "bert.mp4"]


def test_a_stop_leaves_nothing(dataset: Dataset) -> None:
    asked = threading.Event()
    plan = plan_of(dataset)

    def stop() -> bool:
        was = asked.is_set()
        asked.set()
        return was

    with pytest.raises(Interrupted):
        reenact(plan, stop_requested=stop)
    assert left_over(dataset) == []


def test_a_subject_that_is_worked_on_meanwhile_is_told(dataset: Dataset) -> None:
    plan = plan_of(dataset)
    finish(dataset.subject("anna"), "train", "2")
    with pytest.raises(SubjectBusy, match="'train' of 'anna' was replaced"):
        reenact(plan)
    beside = plan_of(dataset, beside=True)

    def replaced_at_work() -> bool:
        finish(dataset.subject("bert"), "decode", "2")
        return False

    with pytest.raises(SubjectBusy, match="'decode' of 'bert' was replaced"):
        reenact(beside, stop_requested=replaced_at_work)
    assert left_over(dataset) == []


def test_background_resolution_and_the_driver_beside(dataset: Dataset) -> None:
    plan = plan_of(dataset, last_frame=2, resolution=96, background="#204060", beside=True)
    account = reenact(plan)
    (picture, *_) = pictures(plan.out)
    assert picture.shape == (96, 192, 3)
    assert account["size"] == [192, 96]
    np.testing.assert_allclose(picture[2, -3].astype(int), [0x20, 0x40, 0x60], atol=6)
    np.testing.assert_allclose(picture[:, :96].mean((0, 1)), picture_of(plan, 0).mean((0, 1)), atol=6)


def test_a_drivers_frame_is_cut_as_its_crop_is(dataset: Dataset) -> None:
    change_fit(dataset.subject("bert"), crops=np.tile([-8.0, 16.0, 64.0], (FRAMES, 1)))
    plan = plan_of(dataset)
    picture, frame = picture_of(plan, 3), plan.driver.frames.image(3)
    np.testing.assert_array_equal(picture[:48, 8:], frame[16:, :56])
    assert (picture[:, :8] == 255).all()
    assert (picture[48:] == 255).all()


def test_a_driver_whose_source_is_gone_drives_in_silence(dataset: Dataset) -> None:
    (dataset.root / "bert/source/bert.mp4").unlink()
    account = reenact(plan_of(dataset, last_frame=2))
    assert not account["sound"]
    assert "no sound" in account["text"]


def test_what_was_never_shown_is_told(dataset: Dataset) -> None:
    bert = dataset.subject("bert")
    fit = read_fit(bert)
    jaw = fit["expression_names"].tolist().index("jawOpen")
    fit["expression"][:, jaw] = np.linspace(0, 1, FRAMES)
    change_fit(bert, expression=fit["expression"])
    account = reenact(plan_of(dataset))
    assert list(account["limits"]) == ["jawOpen"]
    assert f"is guessed, and eased: jawOpen in {account['limits']['jawOpen']['frames']} frames." in account["text"]


def table_of(dataset: Dataset, path: Path) -> Path:
    """What bert's fit says, as a plain table."""
    driver = plan_of(dataset).driver
    performance = driver.performance(read_fit(dataset.subject("bert"))["expression_names"].tolist())
    lines = [",".join(("time", *performance.names))]
    for time, row in zip(driver.times, performance.values, strict=True):
        lines.append(",".join(f"{number:.9g}" for number in (time, *row)))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_of_the_same_numbers_drives_alike(dataset: Dataset, tmp_path: Path) -> None:
    table = table_of(dataset, tmp_path / "take 1.csv")
    plan = plan_of(dataset, drive=str(table))
    assert plan.out == dataset.root / "anna/reenact/take-1.mp4"
    by_table, by_subject = (Scene.of(each, SilentReporter()) for each in (plan, plan_of(dataset)))
    for name in ("expression", "eyes", "T_cam_head", "T_cam_torso"):
        a, b = (getattr(scene.renderer.conditions, name) for scene in (by_table, by_subject))
        np.testing.assert_allclose(a, b, atol=2e-5)
    account = reenact(plan)
    assert (account["frames"], account["sound"], account["fps"]) == (FRAMES, False, "30000/1001")
    assert set(account["keys"]) == {"avatar"}
    assert reenact(plan_of(dataset, drive=str(table))) == account
    table.write_text(table.read_text().replace("time", "TIME"))
    with pytest.raises(UserError, match="is there already"):
        plan_of(dataset, drive=str(table))


def test_a_file_gives_its_sound_from_the_drivers_first_frame_on(dataset: Dataset, tmp_path: Path) -> None:
    sound = write_tone(tmp_path / "voice.mp4", begins=0.6, seconds=1.5, fps=FPS)
    alone = tmp_path / "voice.m4a"
    with av.open(str(sound)) as given, av.open(str(alone), "w", format="ipod") as taken:
        stream = taken.add_stream_from_template(given.streams.audio[0])
        for packet in given.demux(given.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                taken.mux(packet)
    table = table_of(dataset, tmp_path / "bert.csv")
    for path in (sound, alone):
        plan = plan_of(dataset, drive=str(table), sound=path, first_frame=6, force=True)
        assert reenact(plan)["sound"]
        heard = np.concatenate(list(read_sound(plan.out, 0.0, float(18 / FPS))))
        assert onset(heard) == pytest.approx(0.6 - float(6 / FPS), abs=0.02)


def test_rest_can_be_named(dataset: Dataset) -> None:
    plan = plan_of(dataset, neutral_frame=5)
    scene = Scene.of(plan, SilentReporter())
    own = scene.own
    np.testing.assert_allclose(scene.wanted[5], own.neutral, atol=1e-4)  # times are rounded
    assert plan.product.key() != plan_of(dataset).product.key()


def test_metrics_are_added_to_a_video_that_is_there(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSIGHTFACE_HOME", str(dataset.root / "none"))
    account = reenact(plan_of(dataset))
    made = (dataset.root / "anna/reenact/bert.mp4").stat().st_mtime_ns
    plan = plan_of(dataset, metrics=True)
    assert plan.finished() is None
    measured = reenact(plan)
    assert (dataset.root / "anna/reenact/bert.mp4").stat().st_mtime_ns == made
    assert {**measured, "metrics": None, "text": None} == {**account, "metrics": None, "text": None}
    metrics = measured["metrics"]
    assert metrics["found"] > 0.9
    assert metrics["pose"]["error_degrees"] < metrics["pose"]["at_rest_degrees"]  # bert is anna's double
    assert metrics["own"]["frames"] > 20
    assert "no face recognition model" in measured["text"]
    assert plan_of(dataset, metrics=True).finished() == measured
    assert left_over(dataset) == ["bert.json", "bert.mp4"]


def test_a_video_is_a_subject_before_it_drives(dataset: Dataset, tmp_path: Path) -> None:
    """One that is registered drives as that subject; a new one, and one whose name is taken, are told apart."""
    source = dataset.root / "bert/source/bert.mp4"
    request = request_of(data=dataset.root, avatar="anna", drive=str(source))
    run = driver_run(request)
    assert run is not None
    assert (run.subject, run.videos, run.last) == ("bert", (), "fit")
    assert check_reenact(request).product.key() == plan_of(dataset).product.key()
    new = write_tone(tmp_path / "carl 2.mp4", begins=0.1, seconds=0.5, fps=FPS)
    request = request_of(data=dataset.root, avatar="anna", drive=str(new))
    run = driver_run(request)
    assert run is not None
    assert (run.subject, run.videos, run.last) == ("carl-2", (new,), "fit")
    with pytest.raises(UserError, match="is not tracked yet"):
        check_reenact(request)
    (dataset.root / "anna/reenact").mkdir()
    (dataset.root / "anna/reenact/carl-2.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match="is there already"):
        driver_run(request)
    other = write_tone(tmp_path / "bert.mp4", begins=0.1, seconds=0.5, fps=FPS)
    with pytest.raises(UserError, match="would become the subject 'bert', who was made from another video"):
        driver_run(request_of(data=dataset.root, avatar="anna", drive=str(other)))
    for drive, avatar in ((new, "bert"), (new, "carl")):  # told before the video is worked on
        with pytest.raises(UserError, match=r"has no trained avatar|No subject"):
            driver_run(request_of(data=dataset.root, avatar=avatar, drive=str(drive)))
    assert driver_run(request_of(data=dataset.root, avatar="anna", drive="bert")) is None


def test_after_a_stop_the_same_command_is_told() -> None:
    command = Reenact(avatar="anna", drive="my take.csv", last_frame=0, beside=True, fps=30.0)
    expected = "headcast reenact --avatar anna --drive 'my take.csv' --last-frame 0 --beside --fps 30.0"
    assert command.resume_command() == expected


@pytest.mark.parametrize(
    ("name", "text", "fields", "message"),
    [
        ("t.csv", "time,jawOpn\n0,0\n", {}, "unknown column 'jawOpn'"),
        ("t.csv", "time,jawOpen\n0,nan\n", {}, "'nan' is no finite number"),
        ("t.csv", "jawOpen,jawLeft\n0,0\n0,0\n", {"fps": 25}, None),
        ("t.csv", "jawOpen,jawLeft\n0,0\n0,0\n", {"fps": 25, "beside": True}, "no picture of 't' to show beside"),
        (
            "t.csv",
            "jawOpen,jawLeft\n0,0\n0,0\n",
            {"fps": 25, "neutral_frame": 2},
            "cannot be its rest: it has",
        ),
        ("t.csv", "jawOpen,jawLeft\n0,0\n0,0\n", {"fps": 0}, "fps 0 does not fit"),
        ("t.csv", "jawOpen,jawLeft\n0,0\n0,0\n", {"fps": 25, "sound": "t.csv"}, "is not a video that can be read"),
        ("t.txt", "jawOpen,jawLeft\n0,0\n", {}, "is not a video that can be read"),
        ("t.png", "no picture", {}, "single image"),
        (None, "", {"drive": "none.csv"}, "cannot be a subject name, and there is no such file"),
        (None, "", {"drive": "bert", "fps": 25}, "--fps says how many rows a second a CSV file has"),
    ],
)
def test_bad_drivers_are_refused_in_words(
    dataset: Dataset, tmp_path: Path, name: str | None, text: str, fields: dict[str, Any], message: str | None
) -> None:
    given = dict(fields)
    if name is not None:
        (tmp_path / name).write_text(text)
        given["drive"] = str(tmp_path / name)
    if "sound" in given:
        given["sound"] = tmp_path / given["sound"]
    if message is None:
        assert len(plan_of(dataset, **given).driver.times) == 2
        return
    with pytest.raises(UserError, match=message) as caught:
        plan_of(dataset, **given)
    assert caught.value.fix


def _unfit(dataset: Dataset) -> None:
    shutil.rmtree(dataset.root / "bert/fit")


def _untrain(dataset: Dataset) -> None:
    shutil.rmtree(dataset.root / "anna/train")


def _refit(dataset: Dataset) -> None:
    finish(dataset.subject("anna"), "fit", "2")


def _rename(dataset: Dataset) -> None:
    names = read_fit(dataset.subject("bert"))["expression_names"]
    change_fit(dataset.subject("bert"), expression_names=np.array([f"e{n}" for n in range(len(names))]))


def _hide(dataset: Dataset) -> None:
    change_fit(dataset.subject("bert"), usable=np.arange(FRAMES) < 10)


def _occupy(dataset: Dataset) -> None:
    (dataset.root / "anna/reenact").mkdir()
    (dataset.root / "anna/reenact/bert.mp4").write_bytes(b"mine")


def _link(dataset: Dataset) -> None:
    (dataset.root / "elsewhere").mkdir()
    (dataset.root / "anna/reenact").symlink_to(dataset.root / "elsewhere")


def _damage(dataset: Dataset) -> None:
    (dataset.root / "anna/train/avatar.json").write_text("{}")


def _enlarge(dataset: Dataset) -> None:
    path = dataset.root / "anna/train/avatar.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "training": {"resolution": 10**9}}))


def _outdate(dataset: Dataset) -> None:
    path = dataset.root / "anna/train/avatar.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))


def _nothing(dataset: Dataset) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "fields", "message"),
    [
        (_nothing, {"avatar": "carl"}, "No subject 'carl'"),
        (_nothing, {"drive": "carl"}, "No subject 'carl'"),
        (_nothing, {"drive": "../bert"}, "cannot be a subject name"),
        (_nothing, {"avatar": "bert", "drive": "anna"}, "'bert' has no trained avatar"),
        (_untrain, {}, "'anna' has no trained avatar: stage 'train' is not finished"),
        (_unfit, {}, "'bert' has no fit to drive with: stage 'fit' is not finished"),
        (_refit, {}, "'train' of 'anna' was made from another 'fit'"),
        (_damage, {}, "avatar.json' is not what training writes: KeyError 'expression_names'"),
        (_enlarge, {}, "avatar.json' is not what training writes: ValueError a resolution of 1000000000"),
        (_outdate, {}, "avatar.json' has schema 99; this version reads"),
        (_rename, {}, "The driver's coefficients are not those of the avatar: it lacks .* and 48 more"),
        (_nothing, {"last_frame": FRAMES}, f"Frames 0 to {FRAMES} of 'bert' are not all there"),
        (_nothing, {"first_frame": 9, "last_frame": 3}, "first_frame 9 comes after last_frame 3"),
        (_nothing, {"first_frame": -1}, "first_frame -1 does not fit"),
        (_hide, {"first_frame": 12}, "None of the frames 12 to 23 of 'bert' can be used"),
        (_nothing, {"resolution": 8}, "resolution 8 does not fit"),
        (_nothing, {"background": "teal-ish"}, "background 'teal-ish' does not fit: choose white"),
        (_nothing, {"overshoot": float("nan")}, "overshoot nan does not fit"),
        (_nothing, {"colour": "red"}, "colour 'red' does not fit"),
        (_occupy, {}, "bert.mp4' is there already"),
        (_link, {}, "is a link; nothing is written through it"),
        (_nothing, {"out": Path("anna.avi")}, "does not end in .mp4"),
        (_nothing, {"out": Path("no/such/place.mp4")}, "there is no folder"),
    ],
)
def test_bad_requests_are_refused_in_words(
    dataset: Dataset, spoil: Callable[[Dataset], None], fields: dict[str, Any], message: str
) -> None:
    spoil(dataset)
    before = sorted(dataset.root.rglob("*"))
    with pytest.raises(HeadcastError, match=message) as caught:
        plan_of(dataset, **fields)
    assert isinstance(caught.value, UserError | StageError)
    assert caught.value.fix
    assert sorted(dataset.root.rglob("*")) == before


def test_the_datasets_own_files_are_never_the_output(dataset: Dataset) -> None:
    for place in ("bert/source/bert.mp4", "anna/train/bert.mp4", "bert.mp4"):
        with pytest.raises(UserError, match="among the dataset's own files"):
            plan_of(dataset, out=dataset.root / place, force=True)
    assert plan_of(dataset, out=dataset.root.parent / "mine.mp4").out.name == "mine.mp4"


def test_a_request_survives_the_way_to_a_worker() -> None:
    request = request_of(avatar="anna", drive="bert", data=Path("somewhere"), background="20242c", first_frame=3)
    assert ReenactRequest.model_validate_json(request.model_dump_json()) == request
    assert Fraction(request.colour()[2]).limit_denominator(255) == Fraction(0x2C, 255)
    described = ReenactRequest.model_json_schema()["properties"]
    assert all(field["description"] for field in described.values())
