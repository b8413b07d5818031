"""Progress: what the lines say, and that the estimate rests on what was done in this run."""

from __future__ import annotations

import io
import re

import pytest

from pipeline import progress
from pipeline.progress import PlainReporter, SilentReporter, Task


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
