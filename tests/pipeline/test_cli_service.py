"""What `headcast submit` asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.cli.service import Submit
from pipeline.video import write_video


def test_a_batch_has_the_time_limit_of_batches_unless_told(tmp_path: Path) -> None:
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", [np.full((64, 80, 3), 90 + number, np.uint8)] * 3, 25)
    options = {"batch": (str(tmp_path),), "data": tmp_path / "data", "no_check": True}
    assert [request.stage_minutes for request in Submit(**options).requests()] == [120.0] * 2  # type: ignore[arg-type]
    told = Submit(**options, stage_minutes=5.0).requests()  # type: ignore[arg-type]
    assert [request.stage_minutes for request in told] == [5.0] * 2
