"""Progress: what the lines say, what the estimate rests on, and what those outside can read of it."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline import progress
from pipeline.progress import PlainReporter, Progress, RecordingReporter, SilentReporter, Task, read_progress


def test_estimate_leaves_out_the_first_piece_and_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    task = Task("train", 50, "steps", done=10, first=10)
    assert task.eta_seconds() is None
    now += 60  # a compiler at work
    task.advance()
    assert task.eta_seconds() is None
    now += 8
    task.advance(4)
    assert task.eta_seconds() == pytest.approx(2.0 * 35)
    assert task.line() == "train: 15/50 steps (30 %), 70 s left"


def test_plain_lines_end_with_the_time_taken() -> None:
    stream = io.StringIO()
    with PlainReporter(stream, every_seconds=0).task("track", 2, "frames") as task:
        task.advance()
        task.advance(note="face 200 px")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "track: 1/2 frames (50 %)"
    assert re.fullmatch(r"track: 2/2 frames \(100 %\), face 200 px, \d+\.\d s", lines[-1])


def test_silent_reporter_counts_too() -> None:
    with SilentReporter().task("fit", 3, "steps") as task:
        task.advance(3)
    assert task.done == 3


def record(folder: Path, every_seconds: float = 0) -> RecordingReporter:
    return RecordingReporter(SilentReporter(), folder / "progress.json", "fit", every_seconds)


def test_progress_can_be_read_from_outside(tmp_path: Path) -> None:
    reporter = record(tmp_path)
    begun = read_progress(tmp_path / "progress.json")
    assert begun == Progress("fit", updated=1, pid=os.getpid())
    assert begun.line() == "fit: begun"
    with reporter.task("landmarks", 4, "steps", done=1) as task:
        task.advance(note="0.5 px")
        task.advance(np.int64(1))  # type: ignore[arg-type]
        told = read_progress(tmp_path / "progress.json")
        assert told is not None and told.eta_seconds is not None
        assert (told.done, told.total, told.updated) == (3, 4, 4)
        assert told.line() == "fit, landmarks: 3/4 steps (75 %), 0 s left, 0.5 px"
    reporter.close()
    assert list(tmp_path.iterdir()) == []


def test_progress_is_written_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with record(tmp_path, every_seconds=1.0).task("fit", 100, "steps") as task:
        seen = []
        for _ in range(100):
            now += 0.09
            task.advance()
            seen.append(read_progress(tmp_path / "progress.json"))
    assert len({told.updated for told in seen if told}) == 9


def test_the_one_who_shows_progress_hears_of_it_as_before(tmp_path: Path) -> None:
    stream = io.StringIO()
    reporter = RecordingReporter(PlainReporter(stream, every_seconds=0), tmp_path / "progress.json", "fit")
    with reporter.task("fit", 2, "steps") as task:
        task.advance()
    reporter.message("said")
    assert stream.getvalue().splitlines()[0] == "fit: 1/2 steps (50 %)"
    assert stream.getvalue().splitlines()[-1] == "said"


def test_a_full_disk_does_not_stop_the_work(tmp_path: Path) -> None:
    with RecordingReporter(SilentReporter(), tmp_path / "gone" / "progress.json", "fit").task(
        "fit", 2, "steps"
    ) as task:
        task.advance(2)
    assert task.done == 2


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"stage": 7}', '{"stage": "fit", "more": 1}', '{"stage": "fit", "done": "many"}'),
        *('{"stage": "fit", "eta_seconds": NaN}', '{"stage": "fit", "done": true}', "[" * 100_000),
    ],
)
def test_what_is_no_progress_is_not_believed(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert read_progress(tmp_path / "progress.json") is None
    assert read_progress(tmp_path / "gone") is None
