"""What a request means, and the look at new videos before a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from face_clips import face_frames

from pipeline import capture_check
from pipeline.config import Config, MatteConfig
from pipeline.dataset import Dataset, Subject, sha256_file
from pipeline.errors import SubjectBusy, UserError
from pipeline.finding import Finding
from pipeline.progress import SilentReporter
from pipeline.run import (
    RunRequest,
    check_captures_first,
    check_input,
    hold,
    open_subject,
    prepare,
    resolve_config,
    routed,
    segments,
    stop_signals,
)
from pipeline.video import write_video
from stages import STAGES


@pytest.fixture
def videos(tmp_path: Path) -> tuple[Path, Path]:
    paths = (tmp_path / "anna 1.mp4", tmp_path / "anna 2.mp4")
    for number, path in enumerate(paths):
        write_video(path, [np.full((64, 80, 3), shade, np.uint8) for shade in (90 + number, 40, 90)], 25)
    return paths


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    cv2.imwrite(str(tmp_path / "anna.png"), face_frames()[0][..., ::-1])
    return tmp_path / "anna.png"


class Listener(SilentReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


class Checker:
    """Stands in for the capture check."""

    def __init__(self) -> None:
        self.looked: list[tuple[Path, ...]] = []
        self.findings = [
            Finding("fine", "a face in 60 of 60 frames"),
            Finding("degraded", "the head turns by 3 degrees", "turn the head"),
        ]

    def __call__(self, videos: tuple[Path, ...]) -> list[Finding]:
        self.looked.append(videos)
        return self.findings


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch) -> Checker:
    checker = Checker()
    monkeypatch.setattr(capture_check, "check_captures", checker)
    return checker


def request(folder: Path, *videos: Path, **options: object) -> tuple[RunRequest, Subject]:
    made = RunRequest(data=folder / "data", videos=videos, **options)  # type: ignore[arg-type]
    return made, made.target()


def opened(made: RunRequest, subject: Subject) -> None:
    with subject.lock():
        open_subject(made, subject, resolve_config(made, subject))


def test_the_name_is_made_from_the_first_clip(tmp_path: Path, videos: tuple[Path, Path]) -> None:
    assert request(tmp_path, *videos)[1].name == "anna-1"
    assert request(tmp_path, *videos, subject="anna")[1].name == "anna"
    with pytest.raises(UserError, match="Neither a video nor a subject is named"):
        request(tmp_path)


def test_new_videos_are_looked_at_once(tmp_path: Path, videos: tuple[Path, Path], checker: Checker) -> None:
    made, subject = request(tmp_path, *videos)
    said = Listener()
    check_captures_first(made, subject, said)
    assert checker.looked == [videos]
    (line,) = said.lines
    assert line.startswith("capture check: 0.")
    assert line.endswith(" s. fair: the head turns by 3 degrees -> turn the head")
    opened(made, subject)
    check_captures_first(made, subject, said)
    assert len(checker.looked) == 1, "the source is unchanged"
    check_captures_first(*request(tmp_path, videos[0], subject=subject.name), said)
    assert len(checker.looked) == 2
    check_captures_first(*request(tmp_path, videos[1], subject=subject.name, check=False), said)
    check_captures_first(*request(tmp_path, subject=subject.name), said)
    assert len(checker.looked) == 2


def test_what_can_never_make_an_avatar_stops_the_run(
    tmp_path: Path, videos: tuple[Path, Path], checker: Checker
) -> None:
    checker.findings = [Finding("blocked", "no face in any of 60 frames looked at", "film the face")]
    with pytest.raises(UserError) as caught:
        check_captures_first(*request(tmp_path, *videos), Listener())
    assert caught.value.what == "The capture check says: no face in any of 60 frames looked at."
    assert caught.value.fix == "film the face; to run all the same: --no-check"


def test_a_span_of_several_clips_is_refused(tmp_path: Path, videos: tuple[Path, Path]) -> None:
    span = ("decode.start_seconds=1",)
    prepare(request(tmp_path, videos[0], settings=span)[0], STAGES)
    with pytest.raises(UserError, match="name a span of one clip; 2 clips are given"):
        prepare(request(tmp_path, *videos, settings=span)[0], STAGES)


def test_a_photograph_is_refused_without_a_model_before_anything_is_made(
    tmp_path: Path, videos: tuple[Path, Path], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSIGHTFACE_HOME", str(tmp_path))
    made, subject = request(tmp_path, *videos, like=photo)
    with pytest.raises(UserError, match="a face recognition model of InsightFace is needed"):
        check_input(made, subject)
    assert not made.data.exists()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        prepare(request(tmp_path, *videos, like=tmp_path / "gone.png")[0], STAGES)
    with pytest.raises(UserError, match="Both a person's number and a photograph are named"):
        prepare(request(tmp_path, *videos, like=photo, settings=("track.person=1",))[0], STAGES)


def test_a_photograph_is_part_of_the_settings_and_stays_for_reruns(
    tmp_path: Path, videos: tuple[Path, Path], photo: Path
) -> None:
    made, subject = request(tmp_path, *videos, like=photo)
    assert resolve_config(made, subject).track.like == sha256_file(photo)
    opened(made, subject)
    assert check_input(made, subject), "it was found good when it was taken in"
    again = RunRequest(data=tmp_path / "data", subject=subject.name)
    assert prepare(again, STAGES)[1].track.like == sha256_file(photo)
    assert [s.name for s in Dataset(tmp_path / "data").subjects()] == [subject.name]


def test_a_run_needs_the_model_it_asks_for_and_none_for_alphas_of_ones_own() -> None:
    def needed(**changes: str) -> set[str]:
        config = Config(matte=MatteConfig(**changes))
        return {name for stage in STAGES for name in stage.assets(config)}

    tracker = {"face_landmarker", "palm_detection", "hand_landmark"}
    assert needed() == tracker | {"selfie_segmentation"}
    assert needed(model="isnet-general-use") == tracker | {"isnet-general-use"}
    assert needed(alpha="0" * 64) == tracker


def test_a_model_that_is_none_is_refused_before_anything_is_made(tmp_path: Path, videos: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="'nonsense' cannot be the matting model: it is not one"):
        prepare(request(tmp_path, *videos, settings=("matte.model=nonsense",))[0], STAGES)
    assert not (tmp_path / "data").exists()


def test_stages_stay_together_unless_a_route_parts_them() -> None:
    here = segments(RunRequest(subject="anna"), STAGES)
    assert [(route, len(part)) for route, part in here] == [(None, 7)]
    parted = segments(RunRequest(subject="anna", routes={"gpu": "subject/gpu"}), STAGES)
    assert [(route, [stage.name for stage in part]) for route, part in parted] == [
        (None, ["decode", "track", "matte", "fit"]),
        ("subject/gpu", ["train"]),
        (None, ["evaluate", "export"]),
    ]


@pytest.mark.parametrize(("first", "passed_on"), [("train", "train"), ("fit", None), (None, None)])
def test_what_is_sent_elsewhere_runs_there_and_goes_no_further(
    tmp_path: Path, first: str | None, passed_on: str | None
) -> None:
    request = RunRequest(data=tmp_path, subject="anna", first=first, routes={"gpu": "subject/gpu"}, stage_minutes=7)
    sent = routed(request, Dataset(tmp_path).subject("anna"), STAGES[4:5])
    assert (sent.first, sent.last, sent.stage_minutes, sent.routes) == (passed_on, "train", 7, {})
    assert sent.videos == ()


def test_waits_for_a_subject_that_is_held_and_no_longer_than_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.LOCK_RETRY_SECONDS", 0.02)
    subject = Dataset(tmp_path).subject("anna")
    with subject.lock(), pytest.raises(SubjectBusy), hold(subject, wait_minutes=0.001):
        pass
    held = threading.Event()

    def hold_a_little() -> None:
        with subject.lock():
            held.set()
            time.sleep(0.3)

    other = threading.Thread(target=hold_a_little)
    other.start()
    held.wait(10)
    with hold(subject, wait_minutes=1):
        assert subject.running()
    other.join()


def test_other_threads_hear_the_stop_that_the_main_thread_caught() -> None:
    heard = []

    def listen() -> None:
        with stop_signals() as stop_requested:
            heard.append(stop_requested())

    with stop_signals() as stop_requested:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()
        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    with stop_signals() as stop_requested:
        assert not stop_requested()
    assert heard == [True]
