"""Takes of the Live Link Face app: files are chosen, brought onto the video's frames, and faults told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import check_messages
from tones import write_tone

from pipeline.errors import UserError
from pipeline.exports.csv_table import write_live_link
from pipeline.geometry import rotvec_to_matrix
from pipeline.heads import EXPRESSIONS
from pipeline.interchange.livelink import OnFrames, find_take, on_frames, read_table
from pipeline.interchange.tracking import check_tracking, find_tracked
from pipeline.retarget import TURN

NAMES = (*EXPRESSIONS, *TURN)
NO_VIDEO = Path("/nonexistent.mov")


def motion(times: np.ndarray) -> np.ndarray:
    """[T,55] smooth motion that repeats within no two seconds."""
    values = np.zeros((len(times), len(NAMES)))
    for place, name in enumerate(("jawOpen", "eyeBlinkLeft", "mouthPucker", "browInnerUp")):
        waves = (np.sin(times * rate + place) for rate in (2.3 + place, 5.1, 7.7 - place))
        values[:, NAMES.index(name)] = 0.5 + sum(waves) / 7
    values[:, -3:] = 0.2 * np.sin(times[:, None] * (1.1, 1.7, 2.1))
    return values


def take(folder: Path, *, rows: int = 360, fps: float = 60, begins: float = 0.0, **how: Any) -> Path:
    """A take whose table has a row each 1/60 s, the first `begins` seconds after the video's first frame."""
    folder.mkdir(exist_ok=True)
    (folder / "S_1_iPhone.mov").touch()
    values = motion(begins + np.arange(rows) / fps)
    write_live_link(folder / "S_1_iPhone.csv", NAMES, values, fps=fps, start=3600.0, sense=1.0, **how)
    return folder


def placed(folder: Path, times: np.ndarray, offset: float | None = None, video: Path = NO_VIDEO) -> OnFrames:
    noise = np.random.default_rng(0).normal(0, 0.03, (len(times), len(EXPRESSIONS)))
    seen = motion(times)[:, : len(EXPRESSIONS)] + noise
    table = read_table(folder / "S_1_iPhone.csv")
    return on_frames(table, EXPRESSIONS, times, seen, np.ones(len(times), bool), video, offset)


@pytest.mark.parametrize("begins", [0.0, 0.55, -0.4])
def test_the_offset_is_found_by_motion(tmp_path: Path, begins: float) -> None:
    times = np.arange(150) / 29.97
    found = placed(take(tmp_path / "a", begins=begins), times)
    assert found.offset == pytest.approx(begins, abs=0.03) and found.how.startswith("found by motion")


def test_frames_get_the_tables_numbers_at_their_times(tmp_path: Path) -> None:
    times = np.arange(150) / 29.97
    found = placed(take(tmp_path / "a", begins=0.5, faceless=(100, 101, 102, 103, 104, 105, 106)), times, 0.5)
    there = found.there
    row = (times - 0.5) * 60
    assert not there[row < -0.6].any() and not there[(row > 99.6) & (row < 106.4)].any()
    assert there[(row >= 0) & ((row <= 99) | (row >= 107))].all()
    wanted = motion(times)
    np.testing.assert_allclose(found.scores[there], wanted[there, : len(EXPRESSIONS)], atol=2e-3)
    R = rotvec_to_matrix(wanted[:, -3:])
    assert found.turned and found.turns_apart(R, there) < 0.1
    moved = rotvec_to_matrix(np.array([[0.1, -0.4, 0.2]])) @ R  # a camera that stands elsewhere
    assert found.turns_apart(moved, there) < 0.5 < found.turns_apart(R.swapaxes(1, 2), there)


def test_motion_that_tells_nothing_is_said(tmp_path: Path) -> None:
    table = read_table(take(tmp_path / "a") / "S_1_iPhone.csv")
    times = np.arange(100) / 25
    found = on_frames(table, EXPRESSIONS, times, np.zeros((100, 52)), np.ones(100, bool), NO_VIDEO)
    assert found.offset == 0 and found.how.startswith("assumed")


def test_the_calibrated_table_is_chosen_and_the_frame_log_read(tmp_path: Path) -> None:
    folder = take(tmp_path / "a")
    plain = folder / "S_1_iPhone.csv"
    for ending in ("cal", "raw", "neutral"):
        (folder / f"S_1_iPhone_{ending}.csv").write_bytes(plain.read_bytes())
    (folder / "frame_log.csv").write_text("A,0,0,44100,00:59:59:00.0\nV,0,10,600,00:59:59:30.000\nV,1,20,600,0\n")
    found = find_tracked(folder)
    assert found is not None and found.file == plain
    assert found.settings == ("track.offset_seconds=0.500000",)
    for expected in ("S_1_iPhone_cal.csv", "S_1_iPhone_raw.csv"):
        (plain if expected.endswith("cal.csv") else folder / "S_1_iPhone_cal.csv").unlink()
        chosen = find_take(folder)
        assert chosen is not None and chosen.file.name == expected


def test_what_is_wrong_is_told_in_one_message(tmp_path: Path) -> None:
    good = take(tmp_path / "good")
    table = good / "S_1_iPhone.csv"
    no_video, two, other = take(tmp_path / "no video"), take(tmp_path / "two"), take(tmp_path / "other")
    (no_video / "S_1_iPhone.mov").unlink()
    (two / "S_2_iPhone.mov").touch()
    for name in ("A.csv", "B.csv"):
        (other / name).write_bytes(table.read_bytes())
    (other / "S_1_iPhone.csv").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged.csv"
    damaged.write_text("\n".join([*table.read_text().splitlines()[:3], "00:00:00:01.0,61,0.1"]))
    video = write_tone(tmp_path / "a.mp4", begins=0.1, seconds=0.3)
    calls = {
        "no video": lambda: find_tracked(no_video),
        "two videos": lambda: find_tracked(two),
        "other names": lambda: find_tracked(other),
        "no take": lambda: find_tracked(empty, "livelink"),
        "damaged": lambda: check_tracking(damaged, [video]),
        "two clips": lambda: check_tracking(table, [video, video]),
        "another time": lambda: placed(good, np.arange(50) / 25, 500.0),
    }
    found = {}
    for case, call in calls.items():
        with pytest.raises(UserError) as error:
            call()
        found[case] = str(error.value).replace(str(tmp_path), "")
    check_messages("livelink", found)
