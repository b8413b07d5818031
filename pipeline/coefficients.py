"""Coefficients from other programs: CSV tables of ARKit expressions, gaze and head turns, checked at the border.

Two layouts are read: what Epic's Live Link Face app records, told by its column Timecode, and a plain one whose columns
are named as a performance's are (`pipeline.retarget`). What is wrong is refused with the line and the column.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import UserError, did_you_mean
from pipeline.geometry import matrix_to_rotvec, rotvec_to_matrix
from pipeline.heads import EXPRESSIONS
from pipeline.retarget import EYES, MOVE, TURN
from pipeline.video import simple_rate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

SUFFIXES = (".csv", ".tsv")
MAX_BYTES, MAX_ROWS, MAX_SECONDS = 256 * 2**20, 216_000, 3600.0
"""An hour at 60 rows a second."""
MIN_FPS, MAX_FPS = 1.0, 240.0
LIVE_LINK_EYES = ("LeftEyePitch", "LeftEyeYaw", "RightEyePitch", "RightEyeYaw")
"""In the order of `EYES`."""
USABLE = "usable"
"""The plain layout's column that tells which rows can be relied on."""
LIVE_LINK_IGNORED = ("BlendShapeCount", "LeftEyeRoll", "RightEyeRoll")
# What can be a coefficient, a turn or a move at all; farther off, the unit is another.
LIMITS = {
    **dict.fromkeys(EXPRESSIONS, (-0.5, 1.5, "coefficients go from 0 to 1; divide percent by 100")),
    **dict.fromkeys(EYES, (-1.6, 1.6, "eyes are given in radians; degrees times 0.01745")),
    **dict.fromkeys(TURN, (-3.2, 3.2, "the head's turn is given in radians; degrees times 0.01745")),
    **dict.fromkeys(MOVE, (-5.0, 5.0, "the head's move is given in metres")),
}
TIMECODE = re.compile(r"(\d{1,2}):(\d{2}):(\d{2})([:;])(\d{1,3}(?:\.\d+)?)")
TIMECODE_RATES = (24, 25, 30, 48, 50, 60, 120)
COMMON_RATES = tuple(Fraction(rate) for rate in (24, 25, 30, 48, 50, 60, 120)) + tuple(
    Fraction(1000 * rate, 1001) for rate in (24, 30, 48, 60, 120)
)
ALIKE = 5e-4
"""Rates that differ by a smaller share are one: clocks of telephones drift."""


@dataclass(frozen=True)
class Coefficients:
    """A table of a performance.

    Attributes:
        names: [N] its columns, each an ARKit expression or one of `EYES`, `TURN`, `MOVE` of `pipeline.retarget`.
        values: [T,N] coefficients within [0, 1], radians, metres; `TURN` is a rotation vector in the head's axes.
        times: [T] seconds from the first row, rising.
        usable: [T] whether a row can be relied on, as a face was seen; other rows hold zeros.
        fps: rows a second.
        sha256: of the file.
        notes: sentences on what was taken for granted.
        begins: seconds after midnight of the first row, by its timecode; None where it has none.
        timecode_rate: frames a second that its timecodes count.
    """

    names: tuple[str, ...]
    values: Floats
    times: Floats
    usable: NDArray[np.bool_]
    fps: Fraction
    sha256: str
    notes: tuple[str, ...] = ()
    begins: float | None = None
    timecode_rate: int = 60

    def __len__(self) -> int:
        return len(self.times)


def read_coefficients(path: Path, fps: float | None = None) -> Coefficients:
    """Read a CSV file; columns may be parted by commas, or by semicolons or tabs with decimal points or commas.

    Args:
        path: the file.
        fps: rows a second, whatever its times say; needed where it has none.

    Raises:
        UserError: the file, a column, a cell or the times are at fault.
    """
    data = _bytes_of(path)
    table = _Table.of(path, data)
    notes: list[str] = []
    recorded = "Timecode" in table.header
    columns = _live_link_columns(table) if recorded else _plain_columns(table)
    texts, seen = _cells(table, recorded)
    names = [name for name in columns if name is not None]
    values = np.zeros((len(texts), len(names)))
    chosen = [place for place, name in enumerate(columns) if name is not None]
    for row in np.flatnonzero(seen).tolist():
        values[row] = _numbers(table, row, [texts[row][place] for place in chosen], [table.header[c] for c in chosen])
    _check_ranges(table, values, names, [table.header[place] for place in chosen])
    if recorded:
        names, values = _live_link_turns(names, values, notes)
    values = _clipped(names, values, notes)
    missing = [name for name in EXPRESSIONS if name not in names]
    if missing:
        some = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        notes.append(f"It has no column for {some}: they stay at rest.")
    if not seen.any():
        raise UserError(f"'{path}' shows a face in no row.", "record it again with the face in view")
    times, rate = _times(table, texts, fps, recorded, notes)
    digest = hashlib.sha256(data).hexdigest()
    begins, counted = _clock(table, texts) if recorded else (None, 60)
    return Coefficients(tuple(names), values, times, seen, rate, digest, tuple(notes), begins, counted)


def _bytes_of(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"There is no file '{path}'.", "check the path")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"'{path}' has {size / 1e6:.0f} MB; {MAX_BYTES / 1e6:.0f} are read at most.", "cut it in parts")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.", "check its permissions") from None


@dataclass(frozen=True)
class _Table:
    """A file's cells as text."""

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    """Line number of each row, for messages."""
    comma_decimals: bool

    @staticmethod
    def of(path: Path, data: bytes) -> _Table:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"'{path}' is not text in UTF-8.", "save it as CSV (UTF-8)") from None
        first = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = max(",;\t", key=first.count)
        if not first.count(delimiter):
            raise UserError(
                f"'{path}' has no header of several columns: its first line is '{first[:60]}'.",
                "give a CSV file whose first line names the columns, parted by commas",
            )
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows, lines = [], []
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    rows.append([cell.strip() for cell in row])
                    lines.append(reader.line_num)
                if len(rows) > MAX_ROWS + 1:
                    raise UserError(f"'{path}' has more than {MAX_ROWS} rows.", "cut it in parts")
        except csv.Error as error:
            raise UserError(f"'{path}', line {reader.line_num}: {error}.", "save it as plain CSV") from None
        header, *rest = rows
        while header and not header[-1]:  # some programs end each line with a delimiter
            header.pop()
        if all(_is_number(cell) for cell in header):
            raise UserError(
                f"'{path}' has no header: its first line holds numbers.", "name the columns in the first line"
            )
        twice = sorted({name for name in header if [known.lower() for known in header].count(name.lower()) > 1})
        if twice or "" in header:
            what = f"names the column '{twice[0]}' twice" if twice else "has a column without a name"
            raise UserError(f"'{path}' {what}.", "name each column once")
        if not rest:
            raise UserError(f"'{path}' has a header and no rows.", "record it again")
        # Spelling by capitals differs between versions of the app: BlendShapeCount, BlendshapeCount.
        header = ["Timecode" if name.lower() == "timecode" else name for name in header]
        return _Table(path, header, rest, lines[1:], delimiter != ",")

    def place(self, row: int, column: str) -> str:
        """Where a cell is, for messages."""
        return f"'{self.path}', line {self.lines[row]}, column '{column}'"

    def number(self, text: str) -> float:
        """A cell's number; NaN where it is none."""
        try:
            return float(text.replace(",", ".") if self.comma_decimals else text)
        except ValueError:
            return float("nan")


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def _plain_columns(table: _Table) -> list[str | None]:
    """What each column is called here; None for the time, `usable` and MediaPipe's `_neutral`."""
    known = {name.lower(): name for name in (*EXPRESSIONS, *EYES, *TURN, *MOVE)}
    return _named(table, known, ("time", USABLE, "_neutral"))


def _live_link_columns(table: _Table) -> list[str | None]:
    own = dict(zip(LIVE_LINK_EYES, EYES, strict=True))
    known = {name.lower(): name for name in (*EXPRESSIONS, *TURN)} | {raw.lower(): own[raw] for raw in own}
    return _named(table, known, ("timecode", *(name.lower() for name in LIVE_LINK_IGNORED)))


def _named(table: _Table, known: dict[str, str], ignored: Sequence[str]) -> list[str | None]:
    for name in table.header:
        if name.lower() not in known and name.lower() not in ignored:
            near = did_you_mean(name, [*known.values(), *ignored]) or "the 52 of ARKit are known, such as jawOpen"
            raise UserError(f"'{table.path}' has an unknown column '{name}'.", f"{near}; remove or rename it")
    columns = [known.get(name.lower()) for name in table.header]
    if not any(columns):
        raise UserError(f"'{table.path}' has no column of coefficients.", "name some as ARKit does, such as jawOpen")
    return columns


def _cells(table: _Table, recorded: bool) -> tuple[list[list[str]], NDArray[np.bool_]]:
    """The rows' cells, one for each column, and which rows [T] show a face: the app leaves others empty.

    In the plain layout the column `usable`, where there is one, says so by 1 and 0.
    """
    tell = "blendshapecount" if recorded else USABLE
    counts = [place for place, name in enumerate(table.header) if name.lower() == tell]
    rows, seen = [], np.ones(len(table.rows), bool)
    for number, row in enumerate(table.rows):
        told = table.number(row[counts[0]]) if counts and len(row) > counts[0] else 1
        if not recorded and told not in (0, 1):
            raise UserError(
                f"{table.place(number, table.header[counts[0]])}: '{row[counts[0]]}' is neither 0 nor 1.",
                "1 where the row can be relied on, else 0; or remove the column",
            )
        if told == 0:
            seen[number] = False
        if (told != 0 or not recorded) and (len(row) < len(table.header) or any(row[len(table.header) :])):
            raise UserError(
                f"'{table.path}', line {table.lines[number]}, has {len(row)} cells, its header {len(table.header)}.",
                "it may be cut off: export it again",
            )
        rows.append(row)
    return rows, seen


def _numbers(table: _Table, row: int, cells: list[str], columns: list[str]) -> list[float]:
    numbers = [table.number(cell) for cell in cells]
    if not np.isfinite(numbers).all():
        at = int(np.flatnonzero(~np.isfinite(numbers))[0])
        what = f"'{cells[at]}' is no finite number" if cells[at] else "the cell is empty"
        raise UserError(f"{table.place(row, columns[at])}: {what}.", "fill it in, or remove the row or the column")
    return numbers


def _check_ranges(table: _Table, values: Floats, names: list[str], columns: list[str]) -> None:
    for place, (name, column) in enumerate(zip(names, columns, strict=True)):
        low, high, fix = LIMITS[name]
        beyond = (values[:, place] < low) | (values[:, place] > high)
        if beyond.any():
            row = int(np.flatnonzero(beyond)[0])
            raise UserError(f"{table.place(row, column)}: {values[row, place]:g} cannot be.", fix)


def _clipped(names: list[str], values: Floats, notes: list[str]) -> Floats:
    coefficients = np.isin(names, EXPRESSIONS)
    inside = values.clip(0, 1)
    changed = (np.abs(values - inside) > 1e-3) & coefficients
    if changed.any():
        which = [names[place] for place in np.flatnonzero(changed.any(0))]
        notes.append(
            f"Coefficients outside 0 to 1 were cut off, in {changed.any(1).sum()} rows ({', '.join(which[:3])})."
        )
    return np.where(coefficients, inside, values)


def _live_link_turns(names: list[str], values: Floats, notes: list[str]) -> tuple[list[str], Floats]:
    """The app's angles to ours: the sense of yaw and roll told by the eyes, Euler angles to a rotation vector.

    Pitch is down in all recordings seen. Yaw of eyes and head is to the subject's left in those of older versions and
    to the right in those of newer ones, and roll goes with it (Unreal's ARKit plugin turns both round unless the face
    is mirrored); but the eyeLook* coefficients of the same rows tell where the eyes look.
    """

    def column(name: str) -> Floats:
        return values[:, names.index(name)] if name in names else np.zeros(len(values))

    left = column("eyeLookOutLeft") - column("eyeLookInLeft")
    right = column("eyeLookInRight") - column("eyeLookOutRight")
    agreement = float(column("eyeYawLeft") @ left + column("eyeYawRight") @ right)
    sense = -1.0 if agreement < 0 else 1.0
    angles = np.stack([column(name) for name in TURN], 1)
    if angles.any() and agreement == 0:
        notes.append(
            "Its eyes do not turn, so HeadYaw and HeadRoll are taken as to the subject's left and left ear up."
        )
    if not angles.any():
        notes.append("The head does not turn in it: the app records that only when it is switched on.")
    # Other programs write the app's columns without filling in the eyes.
    left_out = (*TURN, *(EYES if agreement == 0 else ()))
    kept = [place for place, name in enumerate(names) if name not in left_out]
    senses = [sense if names[place] in ("eyeYawLeft", "eyeYawRight") else 1.0 for place in kept]
    turns = _turned(angles * np.array([1.0, sense, sense]))
    return [*(names[place] for place in kept), *TURN], np.concatenate([values[:, kept] * senses, turns], 1)


def _turned(angles: Floats) -> Floats:
    """Rotation vectors [T,3] of pitch, yaw and roll [T,3]: as Unreal's rotators, roll comes first and yaw last."""
    pitch, yaw, roll = (rotvec_to_matrix(angles[:, [axis]] * np.eye(3)[axis]) for axis in range(3))
    return matrix_to_rotvec(yaw @ pitch @ roll)


def _times(
    table: _Table, rows: list[list[str]], fps: float | None, recorded: bool, notes: list[str]
) -> tuple[Floats, Fraction]:
    """Seconds from the first row [T], and rows a second."""
    if fps is not None:
        rate = simple_rate(fps)
        return np.arange(len(rows)) / float(rate), rate
    header = [name.lower() for name in table.header]
    if recorded:
        at = header.index("timecode")
        times = _timecodes(table, [row[at] for row in rows], notes)
    elif "time" in header:
        at = header.index("time")
        times = np.array([_numbers(table, row, [cells[at]], ["time"])[0] for row, cells in enumerate(rows)])
    else:
        raise UserError(f"'{table.path}' does not tell its times.", "say how many rows a second it has: --fps 30")
    steps = np.diff(times)
    if len(times) < 2 or (steps <= 0).any():
        row = int(np.flatnonzero(steps <= 0)[0]) + 1 if len(times) > 1 else 0
        what = "the times do not rise" if len(times) > 1 else "one row has no rate"
        raise UserError(f"{table.place(row, table.header[at])}: {what}.", "mend them, or say rows a second: --fps 30")
    seconds, found = float(times[-1] - times[0]), 1 / float(np.median(steps))
    if not MIN_FPS <= found <= MAX_FPS or seconds > MAX_SECONDS:
        raise UserError(
            f"'{table.path}' lasts {seconds:g} s at {found:g} rows a second by its times.",
            "times are seconds; or say rows a second: --fps 30",
        )
    nearest = min(COMMON_RATES, key=lambda rate: abs(float(rate) / found - 1))
    alike = abs(float(nearest) / found - 1) < ALIKE
    return times - times[0], nearest if alike else Fraction(found).limit_denominator(1001)


def timecode_seconds(text: str, rate: int) -> float | None:
    """Seconds after midnight of a timecode that counts so many frames a second, none dropped; None if it is none."""
    match = TIMECODE.fullmatch(text.strip())
    if match is None:
        return None
    hours, minutes, seconds, _, frames = match.groups()
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds) + float(frames) / rate


def _clock(table: _Table, rows: list[list[str]]) -> tuple[float | None, int]:
    """When the first row was taken, seconds after midnight, and the frames a second that its timecodes count."""
    cells = [row[table.header.index("Timecode")] for row in rows]
    found = [match.groups() for cell in cells if (match := TIMECODE.fullmatch(cell))]
    if not found or any(groups[3] == ";" for groups in found):
        return None, 60
    rate = _counted(np.array([float(groups[4]) for groups in found]), np.array([float(g[2]) for g in found]))
    return timecode_seconds(cells[0], rate or 60), rate or 60


def _counted(frames: Floats, seconds: Floats) -> int | None:
    """Frames a second that timecodes count, by the highest number; None where they are too short to tell."""
    if (np.diff(seconds) != 0).sum() < 2:
        return None
    return next((rate for rate in (*TIMECODE_RATES, TIMECODE_RATES[-1] + 1) if rate > np.floor(frames.max())), None)


def _timecodes(table: _Table, cells: list[str], notes: list[str]) -> Floats:
    """Seconds [T] of timecodes HH:MM:SS:FF.subframe; with a semicolon before the frames, numbers are dropped.

    The app counts in whole frames a second and writes what its clock is beside them as subframes, so that 59.94 frames
    a second are steps of 1.001 frames.
    """
    parts = []
    for row, cell in enumerate(cells):
        match = TIMECODE.fullmatch(cell)
        if match is None:
            raise UserError(
                f"{table.place(row, 'Timecode')}: '{cell}' is no timecode.",
                "it is written HH:MM:SS:FF.subframe; or say rows a second: --fps 60",
            )
        parts.append(match.groups())
    hours, minutes, seconds = np.array([part[:3] for part in parts], np.float64).T
    frames = np.array([part[4] for part in parts], np.float64)
    drops = any(part[3] == ";" for part in parts)
    if frames.max() >= TIMECODE_RATES[-1] + 1:
        row = int(frames.argmax())
        raise UserError(
            f"{table.place(row, 'Timecode')}: no rate has a frame {frames[row]:g}.",
            "it is written HH:MM:SS:FF.subframe; or say rows a second: --fps 60",
        )
    if drops:
        rate = 30 if frames.max() < 30 else 60
    elif (told := _counted(frames, seconds)) is not None:
        rate = told
    else:
        rate = 60
        notes.append("It is too short to tell how many frames its timecodes count a second: 60, as the app does.")
    clock = 3600 * hours + 60 * minutes + seconds
    clock += 86400 * np.cumsum(np.concatenate([[0], np.diff(clock) < -43200]))  # past midnight
    if not drops:
        return clock + frames / rate
    # Drop-frame (SMPTE 12M): the first 2 (of 60: 4) numbers of each minute are left out, but for every tenth.
    whole = np.floor(clock / 60)
    number = clock * rate + frames - rate // 15 * (whole - np.floor(whole / 10))
    return number * 1001 / (1000 * rate)
