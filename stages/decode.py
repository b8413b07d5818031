"""Decode: from the source to the frames of one usable span.

Two streaming passes. The first measures each frame in a few numbers: cuts, black frames and bars, repeats. The second
writes what is kept. Neither holds more than a frame, so memory does not grow with the clip.
"""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DecodeConfig
from pipeline.dataset import write_json
from pipeline.errors import UserError
from pipeline.frames import SCHEMA, contact_sheet, counted, evenly, frame_file, save_image
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    from pipeline.video import Frame

CUT_CHANGE = 0.5
"""Share of a colour histogram that changes at a cut; true cuts are seen at 0.9 and more, fast motion below 0.1."""
BLACK_LUMA = 10
"""Grey value that a black frame's brightest places, or a black bar's, do not exceed."""
REPEAT_SHARE = 0.1
"""A repeated frame changes by at most this share of what the frames around it do."""
REPEAT_LUMA = 2.0
"""... and nowhere by more than this many grey values, which is what encoding alone does."""
THUMBNAIL = 128
GOOD_FRAMES, GOOD_SIDE = 60, 256


@dataclass(frozen=True)
class Survey:
    """What the first pass measured: one number a frame, and the edges of each shot."""

    times: NDArray[np.float64]
    """[N] seconds from the first frame."""
    black: NDArray[np.bool_]
    """[N] nothing to see in the frame."""
    motion: NDArray[np.float64]
    """[N] largest mean change of a 16th by 16th of the picture since the frame before, in grey values."""
    shot: NDArray[np.int64]
    """[N] number of the shot, -1 in black frames."""
    rows: NDArray[np.float64]
    """[S, H] brightest grey value that each row of the picture reaches within each shot."""
    columns: NDArray[np.float64]
    """[S, W] the same for the columns."""
    damage: tuple[str, ...]
    """What could not be decoded, in words."""


def decode(run: StageRun) -> Result:
    """Write `frames/`, `frames.json` and a contact sheet.

    Raises:
        UserError: nothing in the source decodes, or the span asked for holds no picture.
    """
    from pipeline.source import source_path
    from pipeline.video import probe

    config = run.config.decode
    path = source_path(run.subject)
    information = probe(path)
    survey = _load_survey(run.scratch) or _survey(run, path, information.frames)
    span = choose_span(survey, config)
    kept, repeated = choose_frames(survey, span, config)
    shots = np.unique(survey.shot[kept])
    bars = black_bars(survey.rows[shots].max(axis=0), survey.columns[shots].max(axis=0))
    entries = _write_frames(run, path, kept, bars, (information.width, information.height), survey.times)
    rate = source_rate(survey.times, Fraction(information.fps))

    warnings = [*information.warnings, *survey.damage]
    if len(survey.times) < information.frames:
        warnings.append(f"The header counts {information.frames} frames, {len(survey.times)} decode.")
    if len(shots) > 1:
        warnings.append(f"The span asked for holds {counted(len(shots) - 1, 'cut')}.")
    width, height = entries[0]["size"]
    record = {
        "schema": SCHEMA,
        "width": width,
        "height": height,
        "fps": str(rate),
        "count": len(entries),
        "frames": [{k: v for k, v in entry.items() if k != "size"} for entry in entries],
        "bars": list(bars),
        "source_size": [information.width, information.height],
        "span": [int(kept[0]), int(kept[-1])],
        "shots": [list(shot) for shot in shot_ranges(survey)],
        "shot_seconds": [
            [_cents(survey.times[first]), _cents(survey.times[last])] for first, last in shot_ranges(survey)
        ],
        "repeated": repeated,
        "black": int(survey.black.sum()),
        "warnings": warnings,
    }
    write_json(run.work / "frames.json", record)
    _write_contact_sheet(run.work, entries)
    size = sum((run.work / entry["file"]).stat().st_size for entry in entries)
    metrics = {
        "frames": len(entries),
        "source_frames": len(survey.times),
        "seconds": round(float(survey.times[kept[-1]] - survey.times[kept[0]]), 3),
        "width": width,
        "height": height,
        "shots": len(record["shots"]),
        "repeated": repeated,
        "black": record["black"],
        "bytes_per_frame": size // len(entries),
    }
    return Result(_verdict(record, survey, information.frames), metrics)


def choose_span(survey: Survey, config: DecodeConfig) -> NDArray[np.int64]:
    """Source frames to choose from: those of the span asked for, else of the shot that lasts longest; none black.

    Raises:
        UserError: there are none.
    """
    seen = ~survey.black
    if config.start_seconds is not None or config.end_seconds is not None:
        start = config.start_seconds or 0.0
        end = config.end_seconds if config.end_seconds is not None else float("inf")
        span = np.flatnonzero(seen & (survey.times >= start) & (survey.times <= end))
        if not len(span):
            where = f"From {start:g} s on" if end == float("inf") else f"Between {start:g} and {end:g} s"
            raise UserError(
                f"{where} there is no picture: the video is {survey.times[-1]:.1f} s long.",
                "choose another span with --set decode.start_seconds=... and decode.end_seconds=...",
            )
        return span
    if not seen.any():
        raise UserError("Every frame of the video is black.", "choose another video")
    lengths = [survey.times[last] - survey.times[first] for first, last in shot_ranges(survey)]
    return np.flatnonzero(survey.shot == int(np.argmax(lengths)))


def choose_frames(survey: Survey, span: NDArray[np.int64], config: DecodeConfig) -> tuple[NDArray[np.int64], int]:
    """The source frames to write, and how many of the span were left out as repeated.

    A frame rate or count above the limits is thinned evenly over time.
    """
    repeated = repeated_frames(survey.motion) & config.drop_repeated
    repeated[span[0]] = False
    kept = span[~repeated[span]]
    dropped = len(span) - len(kept)
    slot = np.floor((survey.times[kept] - survey.times[kept[0]]) * config.max_fps + 1e-3)
    kept = kept[np.diff(slot, prepend=-1) > 0]
    return kept[evenly(len(kept), config.max_frames)], dropped


def repeated_frames(motion: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Frames that show the one before again, as frame-rate conversion leaves them: still amid motion.

    A person who keeps still is no repeat: the change is compared with the upper quartile of the 13 frames around.
    """
    reach = 6
    around = np.array([np.percentile(motion[max(i - reach, 1) : i + reach + 1], 75) for i in range(1, len(motion))])
    again = (motion[1:] < REPEAT_LUMA) & (motion[1:] <= REPEAT_SHARE * around)
    return np.concatenate([[False], again])


def shot_ranges(survey: Survey) -> list[tuple[int, int]]:
    """First and last source frame of each shot."""
    shots = range(int(survey.shot.max(initial=-1)) + 1)
    return [(int(frames[0]), int(frames[-1])) for frames in (np.flatnonzero(survey.shot == shot) for shot in shots)]


def black_bars(rows: NDArray[np.float64], columns: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Widths of the black bars at the left, top, right and bottom, with the blended line next to each.

    Args:
        rows: [H] brightest grey value that each row reaches.
        columns: [W] the same for the columns.
    """

    def edges(profile: NDArray[np.float64]) -> tuple[int, int]:
        bright = np.flatnonzero(profile > BLACK_LUMA)
        if len(bright) < len(profile) / 4:
            return 0, 0  # a dark film rather than bars
        before, after = int(bright[0]), int(len(profile) - 1 - bright[-1])
        return before + (before > 0), after + (after > 0)

    (top, bottom), (left, right) = edges(rows), edges(columns)
    return left, top, right, bottom


def source_rate(times: NDArray[np.float64], tagged: Fraction) -> Fraction:
    """The source's frame rate: as tagged where the frames' own times agree within 2 %, else what these say."""
    from pipeline.video import simple_rate

    if len(times) < 3:
        return tagged
    seen = 1 / float(np.median(np.diff(times)))
    return tagged if abs(seen / float(tagged) - 1) < 0.02 else simple_rate(round(seen, 3))


def _survey(run: StageRun, path: Path, promised: int) -> Survey:
    """The first pass; its result is kept in the scratch folder for a resumed run."""
    from pipeline.video import read_frames

    damage: list[str] = []
    times: list[float] = []
    black: list[bool] = []
    motion: list[float] = []
    shot: list[int] = []
    rows: list[NDArray[np.float64]] = []
    columns: list[NDArray[np.float64]] = []
    before: tuple[NDArray[np.float32], NDArray[np.float64]] | None = None
    with run.reporter.task("decode: survey", promised, "frames") as task:
        for frame in read_frames(path, threads=run.threads, on_damage=damage.append):
            run.check_stop()
            thumbnail, histogram, row, column = _measure(frame)
            dark = bool(row.max() <= BLACK_LUMA)
            cut = before is None or black[-1] or 1 - np.minimum(histogram, before[1]).sum() > CUT_CHANGE
            if not dark and cut:
                rows.append(row)
                columns.append(column)
            elif not dark:
                rows[-1], columns[-1] = np.maximum(rows[-1], row), np.maximum(columns[-1], column)
            times.append(frame.time)
            black.append(dark)
            shot.append(-1 if dark else len(rows) - 1)
            motion.append(_largest_change(thumbnail, before[0]) if before is not None else 255.0)
            before = thumbnail, histogram
            task.advance()
    survey = Survey(
        np.array(times),
        np.array(black, bool),
        np.array(motion),
        np.array(shot, np.int64),
        np.stack(rows) if rows else np.zeros((0, 0)),
        np.stack(columns) if columns else np.zeros((0, 0)),
        tuple(damage),
    )
    _save_survey(run.scratch, survey)
    return survey


def _measure(
    frame: Frame,
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """A frame's grey thumbnail, its colour histogram (summing to 1), and how bright its rows and columns get.

    Rows and columns are averaged in 64 pieces first, so that the noise of encoding does not count as bright.
    """
    import cv2

    luma = frame.luma()
    thumbnail = cv2.resize(luma, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32)
    colours = frame.rgb(64, 64)
    histogram = cv2.calcHist([colours], [0, 1, 2], None, [8] * 3, [0, 256] * 3).ravel().astype(np.float64) / 64**2
    height, width = luma.shape
    row = cv2.resize(luma, (min(64, width), height), interpolation=cv2.INTER_AREA).max(axis=1)
    column = cv2.resize(luma, (width, min(64, height)), interpolation=cv2.INTER_AREA).max(axis=0)
    return thumbnail, histogram, row.astype(np.float64), column.astype(np.float64)


def _largest_change(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    cell = THUMBNAIL // 16
    return float(np.abs(a - b).reshape(16, cell, 16, cell).mean(axis=(1, 3)).max())


def _save_survey(folder: Path, survey: Survey) -> None:
    buffer = io.BytesIO()
    arrays = {name: value for name, value in vars(survey).items() if name != "damage"}
    np.savez(buffer, damage=np.array(json.dumps(survey.damage)), **arrays)
    temporary = folder / ".survey.npz"
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, folder / "survey.npz")


def _load_survey(folder: Path) -> Survey | None:
    if not (folder / "survey.npz").is_file():
        return None
    with np.load(folder / "survey.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    damage = tuple(json.loads(str(arrays.pop("damage"))))
    return Survey(damage=damage, **arrays)


def _write_frames(
    run: StageRun,
    path: Path,
    kept: NDArray[np.int64],
    bars: tuple[int, int, int, int],
    source_size: tuple[int, int],
    times: NDArray[np.float64],
) -> list[dict[str, Any]]:
    """The second pass: write the kept frames that are not there yet; return an entry of `frames.json` for each."""
    import cv2

    from pipeline.video import read_frames

    left, top, right, bottom = bars
    width, height = source_size
    shrink = min(1.0, run.config.decode.max_side_px / max(width - left - right, height - top - bottom))
    size = (round(width * shrink), round(height * shrink))
    inside = (
        slice(int(np.ceil(top * shrink)), int(np.floor((height - bottom) * shrink))),
        slice(int(np.ceil(left * shrink)), int(np.floor((width - right) * shrink))),
    )
    (run.work / "frames").mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = []
    wanted = iter(kept.tolist())
    following = next(wanted)
    with run.reporter.task("decode", len(kept), "frames") as task:
        for frame in read_frames(path, threads=run.threads):
            if frame.index != following:
                continue
            run.check_stop()
            image = np.ascontiguousarray(frame.rgb(*size)[inside])
            name = frame_file(len(entries))
            if not (run.work / name).exists():
                save_image(run.work / name, image)
            grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
            entries.append(
                {
                    "index": len(entries),
                    "file": name,
                    "time": round(float(times[frame.index]), 6),
                    "source_frame": frame.index,
                    "sharpness": round(float((cv2.Laplacian(grey, cv2.CV_32F) ** 2).mean()), 4),
                    "size": (image.shape[1], image.shape[0]),
                }
            )
            task.advance()
            following = next(wanted, -1)
            if following < 0:
                break
    return entries


def _write_contact_sheet(work: Path, entries: list[dict[str, Any]]) -> None:
    import cv2

    shown = [entries[i] for i in evenly(len(entries), 8)]
    images = [cv2.cvtColor(cv2.imread(str(work / e["file"])), cv2.COLOR_BGR2RGB) for e in shown]
    save_image(work / "contact.jpg", contact_sheet(images, [f"{e['index']}  {e['time']:.2f} s" for e in shown]), 90)


def _cents(seconds: float) -> float:
    """Seconds with two decimals, rounded up, so that a span ending here holds the frame."""
    return math.ceil(round(seconds * 100, 4)) / 100


def _verdict(record: dict[str, Any], survey: Survey, promised: int) -> Verdict:
    count, total = record["count"], len(survey.times)
    level: Level = "good"
    remarks = []
    if survey.damage or total < 0.9 * promised:
        level = "fair"
        remarks.append(f"the file is damaged or cut off ({'; '.join(survey.damage) or f'{promised} frames promised'})")
    if min(record["width"], record["height"]) < GOOD_SIDE:
        level = "fair"
        remarks.append(f"under {GOOD_SIDE} pixels there is little detail to learn")
    if count < GOOD_FRAMES:
        level = "poor" if count < GOOD_FRAMES / 6 else "fair"
        remarks.append("that is short; 10 s and more make a better avatar")
    shots = len(record["shots"])
    parts = [f"{count} of {total} frames, {record['width']}x{record['height']}"]
    parts.append("one shot" if shots == 1 else f"{shots} shots, frames {record['span'][0]}-{record['span'][1]} taken")
    for name in ("repeated", "black"):
        if record[name]:
            parts.append(f"{counted(record[name], f'{name} frame')} left out")
    if any(record["bars"]):
        parts.append("black bars cut")
    text = f"Decoding: {level}. {', '.join(parts)}"
    return Verdict(level, "; ".join([text, *remarks]) + ".", "contact.jpg")


STAGE = Stage("decode", 1, (), decode, description="frames of the longest usable span")
