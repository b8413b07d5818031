"""Event files as TensorBoard itself reads them, after resumes and when the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.frames import save_image
from pipeline.tensorboard import KEPT, EventLog


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def steps(folder: Path, tag: str = "loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def no_report(text: str) -> None:
    raise AssertionError(text)


def test_tensorboard_reads_figures_and_pictures_back(tmp_path: Path) -> None:
    import numpy as np

    picture = tmp_path / "preview.jpg"
    save_image(picture, np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    log = EventLog(tmp_path / "log", 0, no_report)
    log.scalars(100, {"loss": 0.25, "rate/means": 1e-3})
    log.image(100, "preview", picture, (64, 48))
    log.scalars(200, {"loss": 0.125})
    log.close()
    events = read(tmp_path / "log")
    assert set(events.Tags()["scalars"]) == {"loss", "rate/means"}
    assert steps(tmp_path / "log") == [(100, 0.25), (200, 0.125)]
    (image,) = events.Images("preview")
    assert (image.width, image.height) == (64, 48)
    assert image.encoded_image_string == picture.read_bytes()


def test_a_resumed_training_has_every_step_once(tmp_path: Path) -> None:
    first = EventLog(tmp_path / "log", 0, no_report)
    for step in (100, 200, 300):  # 300 was logged after the last checkpoint, at 250
        first.scalars(step, {"loss": 1.0 * step})
    # It was killed: nothing is closed.
    second = EventLog(tmp_path / "log", 250, no_report)
    for step in (300, 400):
        second.scalars(step, {"loss": 2.0 * step})
    second.close()
    first.close()
    assert steps(tmp_path / "log") == [(100, 100), (200, 200), (300, 600), (400, 800)]


def test_a_training_that_starts_anew_forgets_what_was_there(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        log = EventLog(tmp_path / "log", 0, no_report)
        log.scalars(100, {"loss": value})
        log.close()
    assert steps(tmp_path / "log") == [(100, 2.0)]


def test_old_trainings_go(tmp_path: Path) -> None:
    for i in range(KEPT + 2):
        (tmp_path / f"train-{i}").mkdir()
        os.utime(tmp_path / f"train-{i}", (i, i))
    EventLog(tmp_path / "train-new", 0, no_report).close()
    assert {path.name for path in tmp_path.iterdir()} == {"train-new", *(f"train-{i}" for i in range(3, KEPT + 2))}


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    log = EventLog(tmp_path / "log", 0, told.append)

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        log.scalars(100, {"loss": 1.0})
    log.scalars(200, {"loss": 1.0})
    log.close()
    assert len(told) == 1 and "No space left on device" in told[0] and "Training goes on" in told[0]


def test_a_folder_that_cannot_be_made_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told: list[str] = []
    log = EventLog(tmp_path / "file" / "log", 0, told.append)
    log.scalars(100, {"loss": 1.0})
    assert len(told) == 1
