"""A take of Epic's Live Link Face app: its table of ARKit coefficients, brought onto the frames of its video.

A take is a folder: `SLATE_TAKE_SUBJECT.mov`, the table `SLATE_TAKE_SUBJECT.csv`, or for a calibrated one
`..._cal.csv`, `..._raw.csv` and `..._neutral.csv`, and beside them `take.json`, `frame_log.csv`, `video_metadata.json`
and `thumbnail.jpg`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import UserError
from pipeline.heads import EXPRESSIONS
from pipeline.interchange.tracking import Tracked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.coefficients import Coefficients

    Floats = NDArray[np.float64]

VIDEO_SUFFIXES = (".mov", ".mp4", ".m4v")
TELLING = ("jawOpen", "eyeBlinkLeft", "eyeBlinkRight", "mouthPucker", "mouthSmileLeft", "browInnerUp")
"""Coefficients whose motion both trackers see alike."""
MAX_SHIFT_SECONDS, SHIFT_STEP_SECONDS = 2.0, 1 / 120
SURE, CLEARER = 0.4, 0.1
"""Least correlation at the shift that is found, and by how much it is better than at shifts farther off."""
APART_SECONDS = 0.25
"""Shifts that lie farther apart are others."""
FARTHEST_SECONDS = 600.0
"""Clocks that differ by more are not those of one take."""
GAP_SECONDS = 0.1
"""Between rows that lie farther apart nothing is interpolated."""
LOG_BYTES = 64 * 2**20


@dataclass(frozen=True)
class OnFrames:
    """A take's table at the frames of its video."""

    scores: Floats
    """[T,N] coefficients in the order of the names asked for; 0 where the table has no column."""
    there: NDArray[np.bool_]
    """[T] frames for which the table has rows with a face."""
    turns: Floats
    """[T,3,3] how the head is turned by the table."""
    offset: float
    """Seconds of the table's first row from the video's first frame."""
    how: str
    """Where the offset is from, in words."""

    @property
    def turned(self) -> bool:
        """Whether the table records how the head turns."""
        return bool(np.ptp(self.turns[self.there], axis=0).max() > 1e-6)

    def turns_apart(self, Rs_cam_face: NDArray[np.floating], rows: NDArray[np.bool_]) -> float:
        """Median angle in degrees between the table's turns and others of the head, each from its mean.

        Args:
            Rs_cam_face: [T,3,3] rotations of the same frames.
            rows: [T] those to compare.
        """
        from scipy.spatial.transform import Rotation

        ours, theirs = Rotation.from_matrix(Rs_cam_face[rows]), Rotation.from_matrix(self.turns[rows])
        apart = (ours.mean().inv() * ours).inv() * (theirs.mean().inv() * theirs)
        return float(np.degrees(np.median(apart.magnitude())))


def is_table(path: Path) -> bool:
    """Whether a file's first line has the app's column Timecode and is no frame log."""
    if path.suffix.lower() not in (".csv", ".tsv") or not path.is_file():
        return False
    with path.open("rb") as file:
        columns = file.readline(65536).decode("utf-8-sig", "replace").lower()
    return "timecode" in columns and any(name.lower() in columns for name in EXPRESSIONS)


def find_take(folder: Path) -> Tracked | None:
    """The video and the table of a take; None where the folder is none.

    Of several tables the one without a suffix counts, else the calibrated one (`_cal`), whose coefficients are 0 at the
    subject's rest, else the raw one (`_raw`); the neutral one (`_neutral`) is never taken.

    Raises:
        UserError: it has tables and not exactly one video, or several takes.
    """
    tables = sorted(path for path in folder.iterdir() if is_table(path))
    if not tables:
        return None
    videos = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if len(videos) != 1:
        names = ", ".join(f"'{video.name}'" for video in videos[:3])
        beside = f"several videos: {names}" if videos else "no video"
        raise UserError(
            f"'{folder}' has a table of the Live Link Face app and {beside}.",
            "name the folder of one take as the app saves it; or: headcast run VIDEO --tracking TABLE.csv",
        )
    stem = videos[0].stem
    known = [path for ending in ("", "_cal", "_raw") for path in tables if path.stem == stem + ending]
    others = [path for path in tables if not path.stem.lower().endswith("_neutral")]
    if not known and len(others) != 1:
        names = ", ".join(f"'{path.name}'" for path in tables[:3])
        raise UserError(
            f"None of the tables of '{folder}' is called '{stem}.csv': {names}.",
            "name the table of this video: headcast run VIDEO --tracking TABLE.csv",
        )
    table = (known or others)[0]
    notes = [f"Its table is '{table.name}'" + (f", of {len(tables)}." if len(tables) > 1 else ".")]
    offset = _logged_offset(folder, table)
    settings = () if offset is None else (f"track.offset_seconds={offset:.6f}",)
    if offset is not None:
        notes.append(f"frame_log.csv tells that the table begins {offset:.3f} s after the video.")
    return Tracked("livelink", videos[0], table, settings, tuple(notes))


def read_table(path: Path) -> Coefficients:
    """A take's table.

    Raises:
        UserError: what is wrong in it, and where.
    """
    from pipeline.coefficients import read_coefficients

    table = read_coefficients(path)
    if not set(EXPRESSIONS) & set(table.names):
        raise UserError(f"'{path}' has no column of ARKit's coefficients.", "name a take's table")
    return table


def _logged_offset(folder: Path, table: Path) -> float | None:
    """Seconds of the table's first row from the video's first frame by `frame_log.csv`; None where it does not tell.

    Its lines are kind (V for a video frame), number, time as numerator and denominator, timecode, and perhaps whether
    the frame was dropped.
    """
    path = folder / "frame_log.csv"
    if not path.is_file() or path.stat().st_size > LOG_BYTES:
        return None
    from pipeline.coefficients import timecode_seconds

    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        first = next((row for row in csv.reader(file) if len(row) >= 5 and row[0][:1] == "V"), None)
    coefficients = read_table(table)
    begins = None if first is None else timecode_seconds(first[4], coefficients.timecode_rate)
    return _between(begins, coefficients)


def _video_timecode(video: Path) -> str | None:
    """The timecode of a video's first frame, as its timecode track says."""
    from pipeline.video import open_container

    if not video.is_file():
        return None
    with open_container(video) as container:
        told = [stream.metadata.get("timecode") for stream in container.streams] + [container.metadata.get("timecode")]
    return next((text for text in told if text), None)


def _between(video_begins: float | None, table: Coefficients) -> float | None:
    """Seconds from the video's first frame to the table's first row, over midnight too; None where clocks differ."""
    if video_begins is None or table.begins is None:
        return None
    seconds = (table.begins - video_begins + 43200) % 86400 - 43200
    return seconds if abs(seconds) < FARTHEST_SECONDS else None


def on_frames(
    table: Coefficients,
    names: tuple[str, ...],
    times: Floats,
    seen: Floats,
    detected: NDArray[np.bool_],
    video: Path,
    offset: float | None = None,
) -> OnFrames:
    """A table at the times of frames, each number interpolated between its rows.

    Args:
        table: as `read_table` gives it.
        names: [N] coefficients in the order of `seen`.
        times: [T] seconds of the frames from the video's first.
        seen: [T,N] what another tracker sees in the frames, for finding the offset.
        detected: [T] whether it sees a face.
        video: the take's video, whose timecode is looked at.
        offset: what the user or the take says; else timecodes, else motion, else 0.

    Raises:
        UserError: no frame has a row.
    """
    from pipeline.coefficients import timecode_seconds
    from pipeline.geometry import rotvec_to_matrix
    from pipeline.retarget import TURN

    how = "as told"
    if offset is None:
        text = _video_timecode(video)
        offset = _between(timecode_seconds(text or "", table.timecode_rate), table)
        how = "by the video's timecode"
    if offset is None:
        offset, how = _found_offset(table, names, times, seen, detected)
    scores = np.stack([_column(table, name, times - offset) for name in names], 1)
    there = _there(table, times - offset)
    if not there.any():
        raise UserError(
            f"None of the video's frames has a row in the take's table, which begins {offset:.3f} s after it.",
            "see that both are of one take, or say when it begins: --set track.offset_seconds=0",
        )
    turns = np.stack([_column(table, name, times - offset) for name in TURN], 1)
    return OnFrames(scores, there, rotvec_to_matrix(turns), offset, how)


def _column(table: Coefficients, name: str, at: Floats) -> Floats:
    if name not in table.names:
        return np.zeros(len(at))
    return np.interp(at, table.times[table.usable], table.values[table.usable, table.names.index(name)])


def _there(table: Coefficients, at: Floats) -> NDArray[np.bool_]:
    """Times that lie on or between rows with a face that are not far apart."""
    rows = table.times[table.usable]
    step = 0.5 / float(table.fps)
    after = np.searchsorted(rows, at).clip(0, len(rows) - 1)
    before = (np.searchsorted(rows, at, side="right") - 1).clip(0, len(rows) - 1)
    near = np.minimum(np.abs(rows[after] - at), np.abs(rows[before] - at)) <= step
    between = (rows[before] <= at) & (at <= rows[after]) & (rows[after] - rows[before] <= GAP_SECONDS)
    return near | between


def _found_offset(
    table: Coefficients, names: tuple[str, ...], times: Floats, seen: Floats, detected: NDArray[np.bool_]
) -> tuple[float, str]:
    """The shift at which the table's motion is most like what is seen, and how sure that is; 0 where it is not."""
    chosen = [name for name in TELLING if name in names and name in table.names]
    moving = [name for name in chosen if seen[detected, names.index(name)].std() > 0.02]
    shifts = np.arange(-MAX_SHIFT_SECONDS, MAX_SHIFT_SECONDS + SHIFT_STEP_SECONDS / 2, SHIFT_STEP_SECONDS)
    alike = np.full(len(shifts), -1.0)
    for place, shift in enumerate(shifts):
        rows = detected & _there(table, times - shift)
        if rows.sum() < max(10, 0.5 * detected.sum()) or not moving:
            continue
        pairs = [(_column(table, name, times[rows] - shift), seen[rows, names.index(name)]) for name in moving]
        alike[place] = np.mean([np.corrcoef(a, b)[0, 1] if a.std() > 1e-6 else 0.0 for a, b in pairs])
    best = int(alike.argmax())
    elsewhere = alike[np.abs(shifts - shifts[best]) > APART_SECONDS]
    if alike[best] < SURE or alike[best] - elsewhere.max(initial=-1.0) < CLEARER:
        return 0.0, "assumed: neither timecodes nor motion tell"
    return float(shifts[best]), f"found by motion, which correlates at {alike[best]:.2f}"
