"""What the benchmarks make of a headcast process: its answer, or its own words for what went wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.bench_run import timed
from pipeline.errors import StageError


def test_a_process_is_measured_and_its_answer_read(tmp_path: Path) -> None:
    seconds, peak_mb, document = timed(["status", "--data", str(tmp_path), "--json"])
    assert document == {"schema": 1, "subjects": []}
    assert 0 < seconds < 60
    assert peak_mb > 5


def test_what_a_process_says_is_passed_on(tmp_path: Path) -> None:
    missing = str(tmp_path / "a b.mp4")
    with pytest.raises(StageError, match="There is no file") as caught:
        timed(["run", missing, "--data", str(tmp_path), "--json"])
    assert caught.value.fix.startswith("check the path (it was: headcast run '")


def test_a_process_that_dies_without_an_answer_is_told() -> None:
    with pytest.raises(StageError, match=r"ended without an answer \(exit code 2\)"):
        timed(["run", "--no-such-option"])
