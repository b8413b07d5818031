"""Recordings last as long as they ran, and hold each picture until the next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.video import probe
from pipeline.viewer import recording
from pipeline.viewer.recording import FPS, Recording


def grey(value: int) -> np.ndarray:
    return np.full((6, 8, 3), value, np.uint8)


def test_each_picture_is_held_until_the_next() -> None:
    made = Recording((8, 6), begun=10.0)
    made.add(grey(20), 10.0)
    made.add(grey(200), 10.5)
    frames = list(made.frames(ended=11.0))
    assert len(frames) == FPS
    assert [int(frame.mean()) for frame in frames] == [20] * 15 + [200] * 15


def test_it_is_written_as_a_film_of_even_sides(tmp_path: Path) -> None:
    made = Recording((7, 5), begun=0.0)
    made.add(np.zeros((made.size[1], made.size[0], 3), np.uint8), 0.0)
    account = made.write(tmp_path / "film.mp4", ended=0.5)
    found = probe(tmp_path / "film.mp4")
    assert account["size"] == [8, 6] == [found.width, found.height]
    assert account["seconds"] == 0.5 and found.fps == str(FPS)


def test_it_is_full_by_time_and_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Recording((8, 6), begun=0.0)
    assert list(made.frames(1.0)) == []
    assert not made.full(recording.MOST_SECONDS)
    assert made.full(recording.MOST_SECONDS + 1)
    monkeypatch.setattr(recording, "MOST_BYTES", 10)
    made.add(grey(3), 0.1)
    assert made.full(0.2)
