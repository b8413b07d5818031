"""Track finds the subject and says which frames to trust: hands, edges, blur, other people, nobody."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from face_clips import (
    Image,
    decoded_subject,
    empty_room,
    face_frames,
    padded,
    person_frames,
    stage_run,
    write_recognition_model,
)
from numpy.typing import NDArray

from pipeline.assets import asset_path, ensure_assets
from pipeline.config import Config, DecodeConfig, TrackConfig
from pipeline.dataset import Dataset, sha256_file
from pipeline.errors import Interrupted, StageError, UserError
from pipeline.faces import Face
from pipeline.source import register_source
from pipeline.stage import Result, StageRun, run_stage
from pipeline.video import read_frames
from stages import decode, track


@pytest.fixture(scope="module", autouse=True)
def model() -> Iterator[None]:
    """The stage's models, fetched before it works, as a run does; and no recognition model of the user's."""
    ensure_assets(track.STAGE.assets(Config()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INSIGHTFACE_HOME", "/nonexistent")
        yield


def tracked(
    folder: Path,
    images: list[Image],
    shots: list[int] | None = None,
    clips: list[int] | None = None,
    contents: list[tuple[int, int]] | None = None,
    **settings: Any,
) -> tuple[Result, dict[str, NDArray[Any]]]:
    folder.mkdir(exist_ok=True)
    subject = decoded_subject(folder / "ada", images, shots=shots, clips=clips, contents=contents)
    run = stage_run(subject, folder / "work", Config(track=TrackConfig(**settings)))
    result = track.track(run)
    with np.load(run.work / "track.npz", allow_pickle=False) as file:
        return result, dict(file)


def test_one_face_in_every_frame(tmp_path: Path) -> None:
    images = list(face_frames())
    result, arrays = tracked(tmp_path, images)
    count = len(images)
    shapes = {name: (value.dtype.kind, value.shape) for name, value in arrays.items()}
    assert shapes == {
        "landmarks": ("f", (count, 478, 3)),
        "landmarks_raw": ("f", (count, 478, 3)),
        "blendshapes": ("f", (count, 52)),
        "blendshape_names": ("U", (52,)),
        "Ts_cam_face": ("f", (count, 4, 4)),
        "detected": ("b", (count,)),
        "confidence": ("f", (count,)),
        "others": ("f", (count, 0, 4)),
        "hands": ("f", (count, 0, 21, 2)),
        "covered": ("b", (count, 478)),
        "occluded": ("b", (count,)),
        "off_frame": ("b", (count,)),
        "blurred": ("b", (count,)),
        "usable": ("b", (count,)),
        "boxes": ("f", (count, 4)),
        "shots": ("i", (count,)),
        "clips": ("i", (count,)),
    }
    assert arrays["usable"].all()
    assert not arrays["covered"].any()
    assert arrays["blendshape_names"][[0, -1]].tolist() == ["browDownLeft", "tongueOut"]
    assert not np.isnan(arrays["landmarks"]).any()
    apart = np.linalg.norm((arrays["landmarks"] - arrays["landmarks_raw"])[..., :2], axis=-1)
    assert np.median(apart) < 0.5
    rotations, positions = arrays["Ts_cam_face"][:, :3, :3], arrays["Ts_cam_face"][:, :3, 3]
    np.testing.assert_allclose(rotations @ rotations.transpose(0, 2, 1), np.tile(np.eye(3), (count, 1, 1)), atol=1e-3)
    assert (positions[:, 2] > 0.1).all()  # in front of the camera, metres
    assert (positions[:, 2] < 2).all()
    # The face looks at the camera: its z comes towards it, its y goes up while the picture's goes down.
    assert (rotations[:, 2, 2] < -0.7).all()
    assert (rotations[:, 1, 1] < -0.7).all()
    assert result.verdict.text.startswith("Tracking: good. 72 of 72 frames usable, face ")
    assert (tmp_path / "work" / "overlay.jpg").is_file()


def test_the_sample_clips_hands_are_named(tmp_path: Path) -> None:
    subject = Dataset(tmp_path).subject("sample")
    subject.work.mkdir(parents=True)
    register_source(subject, [asset_path("sample_clip")])
    stages, config = [decode.STAGE, track.STAGE], Config(decode=DecodeConfig(max_fps=12))
    run_stage(subject, decode.STAGE, stages, config)
    manifest = run_stage(subject, track.STAGE, stages, config)
    with np.load(subject.stage("track") / "track.npz", allow_pickle=False) as file:
        occluded, covered, found = file["occluded"], file["covered"], file["hands"]
    times = np.array([f["time"] for f in track.FrameSet.load(subject.stage("decode")).record["frames"]])
    hands = (times > 3.0) & (times < 9.3)
    assert occluded[hands].mean() > 0.95
    assert occluded[(times < 2.0) | (times > 10.0)].mean() < 0.03
    with_hands, with_cover = np.isfinite(found).any(axis=(1, 2, 3)), covered.any(axis=1)
    assert with_hands[hands_there := (times > 4.0) & (times < 9.2)].mean() > 0.9
    assert covered[hands_there].sum(axis=1).min() > 40
    assert not with_hands[clear := (times < 1.8) | (times > 10.0)].any()
    assert with_cover[clear].mean() < 0.1
    numbers = np.flatnonzero(occluded)
    assert f"occluded: frames {numbers[0]}-{numbers[-1]}" in manifest["verdict"]["text"]
    assert "off-frame: frame" in manifest["verdict"]["text"]


def test_something_over_the_face_is_flagged_and_nothing_else(tmp_path: Path) -> None:
    images = [image.copy() for image in face_frames()]
    _, clean = tracked(tmp_path, images[:2], min_run_frames=1)
    x0, y0, x1, y1 = clean["boxes"][0].astype(int)
    patch = images[0][y0 + (y1 - y0) // 4 : y0 + (y1 - y0) // 3, x0 + (x1 - x0) // 3 : x1 - (x1 - x0) // 3]
    skin = np.median(patch.reshape(-1, 3), axis=0)
    covered = np.zeros(len(images), bool)
    covered[25:40] = True
    for index in np.flatnonzero(covered):  # four skin-coloured fingers over mouth and cheek, with the dark between
        for finger in range(4):
            top = int(x0 + (0.15 + 0.18 * finger) * (x1 - x0)), int(y0 + 0.5 * (y1 - y0))
            tip = int(top[0] + 0.05 * (x1 - x0)), int(y1)
            cv2.line(images[index], top, tip, (skin * 0.35).tolist(), int(0.16 * (x1 - x0)))
            cv2.line(images[index], top, tip, (skin * 0.9).tolist(), int(0.11 * (x1 - x0)))
    (tmp_path / "second").mkdir()
    result, arrays = tracked(tmp_path / "second", images)
    assert arrays["occluded"][covered].mean() > 0.65
    assert not arrays["occluded"][[*range(23), *range(42, 72)]].any()
    assert not arrays["usable"][arrays["occluded"]].any()
    assert arrays["confidence"][covered].mean() < arrays["confidence"][~covered].mean() - 0.1
    assert "occluded: frames 2" in result.verdict.text


def test_covered_landmarks_are_those_under_what_covers(tmp_path: Path) -> None:
    images = [image.copy() for image in face_frames()]
    _, clean = tracked(tmp_path, images)
    under = np.zeros((len(images), 478), bool)
    times = slice(30, 44)
    for index in range(len(images))[times]:  # a striped patch over the mouth, moving with the face
        points = clean["landmarks"][index, :, :2]
        size = np.ptp(points[:, 0])
        middle, half = points[[13, 14]].mean(axis=0), np.array([0.28, 0.16]) * size
        x0, y0, x1, y1 = np.concatenate([middle - half, middle + half]).astype(int)
        images[index][y0:y1, x0:x1] = np.where(np.arange(y1 - y0)[:, None, None] // 3 % 2, 250, 60)
        under[index] = ((points >= [x0, y0]) & (points < [x1, y1])).all(axis=1)
    (tmp_path / "second").mkdir()
    _, arrays = tracked(tmp_path / "second", images)
    covered = arrays["covered"]
    assert (covered & under).sum() > 0.75 * under.sum()
    assert (covered & under).sum() > 0.75 * covered.sum()
    assert not covered[[*range(28), *range(46, 72)]].any()


def test_a_face_that_leaves_is_off_frame(tmp_path: Path) -> None:
    room = 340
    images = []
    for index, image in enumerate(face_frames()):
        shift = max(0, index - 30) * 8
        wide = padded(image, left=room, right=room)
        images.append(np.ascontiguousarray(wide[:, room + shift : room + shift + 640]))
    _, arrays = tracked(tmp_path, images)
    left = arrays["boxes"][:, 0]
    assert arrays["usable"][:31].all()
    assert not arrays["usable"][left < -10].any()
    assert (arrays["off_frame"] | ~arrays["detected"])[left < -10].all()


def test_blurred_frames_are_flagged(tmp_path: Path) -> None:
    images = list(face_frames())[:40]
    for index in range(10, 14):
        images[index] = cv2.blur(images[index], (13, 1))
    result, arrays = tracked(tmp_path, images)
    assert np.flatnonzero(arrays["blurred"]).tolist() == [10, 11, 12, 13]
    assert "blurred: frames 10-13" in result.verdict.text


def test_other_faces_keep_their_boxes_and_a_mirror_is_asked_about(tmp_path: Path) -> None:
    # The mirror shows a man who stands beside it, its glass a little smaller and darker than he is.
    images = []
    for index, image in enumerate(face_frames()[:48]):
        glass = cv2.resize(image[:, ::-1], None, fx=0.9, fy=0.9, interpolation=cv2.INTER_AREA) // 10 * 9
        beside = padded(glass, top=360 - glass.shape[0])
        images.append(np.concatenate([image, beside if index < 40 else np.zeros_like(beside)], axis=1))
    result, arrays = tracked(tmp_path, images)
    assert arrays["others"].shape == (48, 1, 4)
    shown = np.isfinite(arrays["others"]).all(axis=(1, 2))
    assert shown.tolist() == [True] * 40 + [False] * 8
    assert (arrays["others"][shown, 0, 0] > 640).all()
    assert (arrays["boxes"][:, 2] < 640).all()
    assert "a mirror? a face copies the subject's in frames 0-39; it counts as another person" in result.verdict.text
    assert result.metrics["mirrored"] == 40


def test_of_two_people_the_one_who_stays_is_taken(tmp_path: Path) -> None:
    images = []
    for index, image in enumerate(face_frames()[:40]):
        other = empty_room() if index > 15 else image[:, ::-1]
        images.append(np.concatenate([other, image], axis=1))
    result, arrays = tracked(tmp_path, images)
    assert arrays["detected"].all()
    assert (arrays["boxes"][:, 0] > 640).all()
    assert (
        "2 faces are in view, numbered from the left in frame 0: person 2 was taken, who is there longest; "
        "choose with --person" in result.verdict.text
    )
    assert {name: result.metrics[name] for name in ("faces", "people", "person", "chosen_by")} == {
        "faces": 2,
        "people": 2,
        "person": 2,
        "chosen_by": "longest",
    }


PLACE = 130
"""Pixels for each of several people: the detector misses faces that are small beside the whole picture's width."""


def beside(*numbers: int | None, count: int = 12) -> list[Image]:
    """Frames of people side by side; None leaves a place empty."""
    wall = np.full((200, PLACE, 3), person_frames(0)[0][0, 0], np.uint8)
    first = (200 - PLACE) // 2
    places = [
        [wall] * count if number is None else [image[:, first : first + PLACE] for image in person_frames(number)]
        for number in numbers
    ]
    return [np.concatenate([place[index] for place in places], axis=1) for index in range(count)]


@pytest.mark.parametrize("person", [1, 2, 3])
def test_a_person_is_chosen_by_number_from_the_left(tmp_path: Path, person: int) -> None:
    result, arrays = tracked(tmp_path, beside(2, 0, 1), person=person)
    middle = arrays["boxes"][:, [0, 2]].mean(axis=1)
    assert arrays["detected"].all()
    assert (middle // PLACE == person - 1).all()
    assert f"3 faces are in view, numbered from the left in frame 0: person {person} was taken, as asked for" in (
        result.verdict.text
    )
    assert (result.metrics["person"], result.metrics["chosen_by"]) == (person, "number")


def test_a_number_that_nobody_has_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        tracked(tmp_path, [*beside(0, None, None), *beside(2, 0, 1)], person=7)
    assert caught.value.what == "There is no person 7: at most 3 faces at a time can be seen, first in frame 12."
    assert caught.value.fix == "choose from --person 1 to 3, numbered from the left"
    with pytest.raises(StageError) as caught:
        tracked(tmp_path / "fewer", beside(2, 0, 1), person=3, max_faces=2)
    assert "at most 2 faces" in caught.value.what
    assert caught.value.fix.endswith("; to look for more faces: --set track.max_faces=4")


def test_one_who_leaves_and_returns_elsewhere_is_one_person(tmp_path: Path) -> None:
    images = [*beside(0, None), *beside(None, None, count=40), *beside(None, 0)]
    _, arrays = tracked(tmp_path / "alone", images)
    assert np.flatnonzero(arrays["detected"]).tolist() == [*range(12), *range(52, 64)]
    assert not np.isnan(arrays["landmarks"]).any()
    images = [*beside(0, 1, None, count=16), *beside(None, 1, None, count=20), *beside(None, 1, 0)]
    _, arrays = tracked(tmp_path / "beside", images, person=1)
    assert np.flatnonzero(arrays["detected"]).tolist() == [*range(16), *range(36, 48)]
    assert (arrays["boxes"][36:, 0] > 2 * PLACE).all(), "not the one who stayed"


def test_after_a_cut_the_subject_is_found_and_others_are_left_out(tmp_path: Path) -> None:
    shots = [0] * 12 + [1] * 20 + [2] * 12 + [3] * 12
    images = [*beside(0, None), *beside(None, 1, count=20), *beside(2, 0), *beside(None, 0)]
    result, arrays = tracked(tmp_path / "all", images, shots=shots)
    numbers = arrays["shots"]
    assert numbers.tolist() == shots
    assert not arrays["detected"][numbers == 1].any(), "the longest shot is somebody else's"
    assert not arrays["usable"][numbers == 1].any()
    assert arrays["detected"][numbers != 1].all()
    assert (arrays["boxes"][numbers == 0, 2] < PLACE).all()
    assert (arrays["boxes"][numbers >= 2, 0] > PLACE).all()
    assert not np.isnan(arrays["landmarks"]).any()
    assert "the subject is in 3 of 4 shots, not in frames 12-31" in result.verdict.text
    assert "of several faces in 1 shot the one most alike was taken, by colours and proportions alone" in (
        result.verdict.text
    )
    assert (result.metrics["shots"], result.metrics["shots_with_subject"]) == (4, 3)
    _, alone = tracked(tmp_path / "alone", images[:12])
    for name in ("landmarks", "landmarks_raw", "blendshapes", "usable", "occluded", "confidence"):
        np.testing.assert_array_equal(
            arrays[name][:12], alone[name], err_msg=f"{name}: shots know nothing of each other"
        )


def test_a_clip_of_somebody_else_is_used_with_a_warning(tmp_path: Path) -> None:
    images, numbers = [*person_frames(0)[:14], *person_frames(2)[:12]], [0] * 14 + [1] * 12
    result, arrays = tracked(tmp_path / "two", images, shots=numbers, clips=numbers)
    assert arrays["detected"].all()
    assert arrays["clips"].tolist() == numbers
    assert result.verdict.level == "fair"
    assert "frames 14-25 of '1.mp4' may show another person, told by colours and proportions alone" in (
        result.verdict.text
    )
    images = [*person_frames(0)[:14], *person_frames(0)[14:]]
    result, _ = tracked(tmp_path / "one", images, shots=[0] * 14 + [1] * 10, clips=[0] * 14 + [1] * 10)
    assert "another person" not in result.verdict.text


def test_the_padding_of_a_smaller_clip_is_outside_the_picture(tmp_path: Path) -> None:
    cut = []
    for image in person_frames(0)[:12]:
        black = np.zeros_like(image)
        black[:, :90] = image[:, :90]
        cut.append(black)
    images, numbers = [*person_frames(0)[:12], *cut], [0] * 12 + [1] * 12
    _, arrays = tracked(tmp_path, images, shots=numbers, clips=numbers, contents=[(200, 200), (90, 200)])
    second = slice(12, 24)
    assert arrays["usable"][:12].all()
    assert (arrays["off_frame"] | ~arrays["detected"])[second].all()


@pytest.fixture
def recognition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a recognition model."""
    monkeypatch.setenv("INSIGHTFACE_HOME", str(tmp_path / "insightface"))
    return write_recognition_model(tmp_path / "insightface/models/buffalo_s/w600k_mbf.onnx")


def with_photo(folder: Path, images: list[Image], photo: Image) -> tuple[StageRun, str]:
    """A run of a subject whose source holds a photograph."""
    from pipeline.video import write_video

    subject = decoded_subject(folder / "ada", images)
    subject.work.mkdir()
    write_video(folder / "clip.mp4", images, 25)
    cv2.imwrite(str(folder / "photo.png"), photo[..., ::-1])
    register_source(subject, [folder / "clip.mp4"], folder / "photo.png")
    sha = sha256_file(folder / "photo.png")
    return stage_run(subject, folder / "work", Config(track=TrackConfig(like=sha))), sha


@pytest.mark.parametrize("place", [0, 1])
def test_a_person_is_chosen_by_a_photograph(tmp_path: Path, recognition: Path, place: int) -> None:
    run, _ = with_photo(tmp_path, beside(0, 1), person_frames(place)[20])
    result = track.track(run)
    with np.load(run.work / "track.npz") as file:
        assert (file["boxes"][:, 0] // PLACE == place).all()
    assert (result.metrics["person"], result.metrics["chosen_by"]) == (place + 1, "photograph")
    assert result.metrics["recognition"] == "buffalo_s/w600k_mbf.onnx"
    assert f"person {place + 1} was taken, by the photograph" in result.verdict.text


def test_a_photograph_of_nobody_there_is_refused(tmp_path: Path, recognition: Path) -> None:
    run, _ = with_photo(tmp_path, beside(0, None), person_frames(1)[20])
    with pytest.raises(StageError, match="Nobody in 'ada' looks like the photograph: the most alike of 1 face reaches"):
        track.track(run)


def test_a_photograph_that_went_missing_is_named(tmp_path: Path, recognition: Path) -> None:
    run, sha = with_photo(tmp_path, beside(0, None), person_frames(0)[20])
    (run.subject.source / f"like-{sha[:12]}.png").unlink()
    with pytest.raises(UserError, match="The photograph that tells which person of 'ada' is meant is missing"):
        track.track(run)


def test_with_a_model_another_persons_clip_is_left_out(tmp_path: Path, recognition: Path) -> None:
    numbers = [0] * 14 + [1] * 12
    images = [*person_frames(0)[:14], *person_frames(1)[:12]]
    result, arrays = tracked(tmp_path, images, shots=numbers, clips=numbers)
    assert arrays["detected"].tolist() == [True] * 14 + [False] * 12
    assert "1 shot with somebody else left out, told by buffalo_s/w600k_mbf.onnx" in result.verdict.text


@pytest.fixture(scope="module")
def real(clips: Path) -> Callable[[str, int, int], list[Image]]:
    """Frames [320, 320, 3] of a real clip, from one to another."""

    def cut_out(name: str, first: int, last: int) -> list[Image]:
        images = []
        for frame in itertools.islice(read_frames(clips / f"{name}.mp4"), first, last):
            image = frame.rgb()
            side = min(image.shape[:2])
            top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
            square = image[top : top + side, left : left + side]
            images.append(np.asarray(cv2.resize(square, (320, 320), interpolation=cv2.INTER_AREA), np.uint8))
        return images

    return cut_out


def test_real_people_are_told_apart_across_cuts(tmp_path: Path, real: Callable[[str, int, int], list[Image]]) -> None:
    shots = [("d18", 0, 24), ("d20", 0, 40), ("d18", 60, 84), ("d10", 0, 30), ("d18", 120, 144), ("d0", 0, 20)]
    images = [image for shot in shots for image in real(*shot)]
    numbers = [number for number, (_, first, last) in enumerate(shots) for _ in range(first, last)]
    _, arrays = tracked(tmp_path, images, shots=numbers)
    assert arrays["detected"].tolist() == [shots[number][0] == "d18" for number in numbers]


@pytest.mark.parametrize("person", [1, 2, 3])
def test_real_people_side_by_side(tmp_path: Path, real: Callable[[str, int, int], list[Image]], person: int) -> None:
    rows = zip(*(real(name, 0, 12) for name in ("d18", "d20", "d10")), strict=True)
    result, arrays = tracked(tmp_path, [np.concatenate(row, axis=1) for row in rows], person=person)
    assert arrays["detected"].all()
    assert (arrays["boxes"][:, [0, 2]].mean(axis=1) // 320 == person - 1).all()
    assert result.metrics["people"] == 3


def test_a_small_face_is_found_in_crops(tmp_path: Path) -> None:
    images = []
    for image in face_frames()[:8]:
        small = cv2.resize(image, None, fx=0.45, fy=0.45, interpolation=cv2.INTER_AREA)
        images.append(padded(small, left=900, top=700, right=100, bottom=100))
    result, arrays = tracked(tmp_path, images)
    assert arrays["detected"].all()
    assert (arrays["boxes"][:, 0] > 900).all()
    assert "under 100 px a face shows little detail, film closer" in result.verdict.text


def test_no_face_is_a_message_not_a_guess(tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        tracked(tmp_path, [empty_room()] * 12)
    assert caught.value.what == "No face in the 12 frames of 'ada' (0.0 to 0.4 s of the video)."
    assert caught.value.fix == (
        "film one person who faces the camera, in good light, the face at least 100 pixels wide, and run that"
    )


def test_a_face_for_three_frames_only_is_too_little(tmp_path: Path) -> None:
    images = [empty_room()] * 8 + list(face_frames()[:3]) + [empty_room()] * 8
    with pytest.raises(StageError) as caught:
        tracked(tmp_path, images)
    assert caught.value.what == (
        "A face is seen in only 3 of the 19 frames of 'ada' (0.0 to 0.6 s of the video), never in 5 in a row."
    )


def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "CHUNK", 8)
    subject = decoded_subject(tmp_path / "ada", list(face_frames()[:20]))
    seen = [0]

    def stop() -> bool:
        seen[0] += 1
        return seen[0] > 2

    work = tmp_path / "work"
    with pytest.raises(Interrupted):
        track.track(stage_run(subject, work, stop_requested=stop))
    calls = [0]
    detect = track.Detector.detect

    def counting(self: track.Detector, *arguments: Any) -> list[Face]:
        calls[0] += 1
        return detect(self, *arguments)

    monkeypatch.setattr(track.Detector, "detect", counting)
    track.track(stage_run(subject, work))
    assert calls[0] == 4  # 16 of 20 frames were there
    whole = tmp_path / "whole"
    track.track(stage_run(subject, whole))
    for name in ("track.npz", "overlay.jpg"):
        assert (work / name).read_bytes() == (whole / name).read_bytes()


def test_missing_system_libraries_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mediapipe.tasks.python import vision

    def fail(options: Any) -> Any:
        raise OSError("libEGL.so.1: cannot open shared object file")

    monkeypatch.setattr(vision, "FaceLandmarker", SimpleNamespace(create_from_options=fail))
    with pytest.raises(StageError) as caught:
        tracked(tmp_path, [empty_room()] * 2)
    assert caught.value.what == "The face tracker cannot start: libEGL.so.1: cannot open shared object file."
    assert caught.value.fix == "it needs two system libraries, run: apt-get install libegl1 libgles2"


def test_a_missing_model_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_CACHE", str(tmp_path / "nothing"))
    with pytest.raises(StageError, match="is not on this machine") as caught:
        tracked(tmp_path, [empty_room()] * 2)
    assert caught.value.fix == "run: headcast assets fetch face_landmarker"


def test_nothing_is_written_to_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracked(tmp_path, list(face_frames()[:6]))
    assert capfd.readouterr().err == ""
    print("still here", file=sys.stderr)  # noqa: T201
    assert capfd.readouterr().err == "still here\n"


def face_at(x: float, y: float, size: float = 50) -> Face:
    corners = np.zeros((478, 3), np.float32)
    corners[:, 0], corners[:, 1] = (
        np.linspace(x - size / 2, x + size / 2, 478),
        np.linspace(y - size / 2, y + size / 2, 478),
    )
    return Face(corners, np.zeros(52, np.float32), np.eye(4, dtype=np.float32))


def test_faces_that_cross_are_not_swapped() -> None:
    seen = [[face_at(100 + 8 * i, 100), face_at(300 - 8 * i, 190)] for i in range(26)]
    tracks = track.link_faces(seen, np.zeros(26, np.int64))
    assert [len(t.faces) for t in tracks] == [26, 26]
    assert tracks[0].faces[25].box[0] == pytest.approx(275)


def test_a_short_gap_is_bridged_and_a_jump_is_not() -> None:
    seen = [[face_at(100, 100)] if not 4 <= i < 9 else [] for i in range(20)] + [[face_at(400, 100)]] * 5
    shots = np.zeros(25, np.int64)
    assert [len(t.faces) for t in track.link_faces(seen, shots)] == [15, 5]
    shots[10:] = 1
    assert [len(t.faces) for t in track.link_faces(seen, shots)] == [5, 10, 5], "nor is a cut"


@pytest.mark.parametrize(
    ("numbers", "longest"), [([], 0), ([4], 1), ([1, 2, 3, 9, 10], 3), ([1, 3, 5], 1), ([0, 1, 5, 6, 7, 8], 4)]
)
def test_longest_run(numbers: list[int], longest: int) -> None:
    assert track.longest_run(np.array(numbers, np.int64)) == longest


def test_runs_and_hysteresis() -> None:
    flags = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)
    assert track.short_runs(flags, 3).tolist() == [True, True, False, False, False, False, False, True]
    values = np.array([0, 0.09, 0.2, 0.1, 0, 0.1, 0.1, 0])
    assert track.hysteresis(values, 0.15, 0.08).tolist() == [False, True, True, True, False, False, False, False]


@pytest.mark.parametrize("curve", [lambda t: 3 + 2 * t, lambda t: 1 - t + 5 * t**2])
def test_smoothing_keeps_lines_and_parabolas_at_uneven_times(curve: Callable[[Any], Any]) -> None:
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.06, 60))
    values = curve(times)[:, None]
    np.testing.assert_allclose(track.smooth(values, times, np.ones(60, bool), 0.05), values, atol=1e-9)


def test_smoothing_lowers_noise_without_delay_and_respects_gaps() -> None:
    rng = np.random.default_rng(1)
    times = np.arange(200) / 30
    truth = np.sin(2 * np.pi * times)
    noisy = truth + rng.normal(0, 0.1, 200)
    valid = np.ones(200, bool)
    even = track.smooth(noisy[:, None], times, valid, 0.1)[:, 0]
    assert np.std(even - truth) < 0.6 * np.std(noisy - truth)
    shifts = [np.corrcoef(np.roll(even, shift)[20:-20], truth[20:-20])[0, 1] for shift in range(-3, 4)]
    assert int(np.argmax(shifts)) == 3
    valid[100] = False
    step = np.where(times < times[100], 0.0, 1.0)
    split = track.smooth(step[:, None], times, valid, 0.1)[:, 0]
    np.testing.assert_allclose(split[valid], step[valid], atol=1e-9)
    np.testing.assert_array_equal(track.smooth(noisy[:, None], times, valid, 0.0)[:, 0], noisy)
