"""Decode: from the clips of the source to the frames of their shots.

Two streaming passes over each clip. The first measures each frame in a few numbers: cuts, black frames and bars,
repeats. The second writes what is kept. Neither holds more than a frame, so memory does not grow with the clip.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DecodeConfig
from pipeline.dataset import write_atomic, write_json
from pipeline.errors import UserError
from pipeline.frames import (
    SCHEMA,
    Window,
    alpha_file,
    amount_remarks,
    counted,
    evenly,
    frame_file,
    save_image,
    sharpness_of,
    write_overview,
)
from pipeline.picture_quality import BLACK_LUMA, CUT_CHANGE, colour_histogram, histogram_change
from pipeline.source import imported
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    from pipeline.video import Frame, VideoInfo

REPEAT_SHARE = 0.1
"""A repeated frame changes by at most this share of what the frames around it do."""
REPEAT_LUMA = 2.0
"""... and nowhere by more than this many grey values, which is what encoding alone does."""
THUMBNAIL = 128
MIN_FRAMES = 5
"""From fewer there is nothing to track."""
CLIP_GAP_SECONDS = 1.0
"""On the common clock a clip begins so long after the end of the one before."""


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
    clear: NDArray[np.bool_]
    """[N] something of the frame is not opaque."""
    damage: tuple[str, ...]
    """What could not be decoded, in words."""


@dataclass
class Reading:
    """One clip: what it is, what the first pass measured, and what of it is written."""

    name: str
    path: Path
    information: VideoInfo
    survey: Survey
    kept: NDArray[np.int64]
    """Source frames to write."""
    repeated: int
    """Frames left out as repeated."""
    offset: float
    """What is added to the clip's times, in seconds."""
    window: Window
    """Which part of the picture is written, and at what size."""

    @property
    def alpha(self) -> bool:
        """Whether the clip has an alpha channel that says something."""
        return bool(self.survey.clear.any())


def decode(run: StageRun) -> Result:
    """Write `frames/`, `frames.json` and a contact sheet; for an imported subject from its dataset.

    Raises:
        UserError: nothing in a clip decodes, too few frames are left, or the span asked for holds no picture.
    """
    if imported(run.subject) is not None:
        from pipeline.interchange.fill_decode import fill

        return fill(run)
    config = run.config.decode
    readings = _read_clips(run)
    _thin(readings, config.max_frames)
    count = sum(len(reading.kept) for reading in readings)
    if count < MIN_FRAMES:
        raise UserError(
            f"Only {counted(count, 'frame')} of '{run.subject.name}' can be used; a head that moves needs at least "
            f"{MIN_FRAMES}, and 10 s and more make a good avatar.",
            "film longer, or name another video",
        )
    for reading in readings:
        _measure_frame(reading, config.max_side_px)
    entries = _write_frames(run, readings)
    record = _record(readings, entries)
    write_json(run.work / "frames.json", record)
    write_overview(run.work, entries)
    size = sum((run.work / entry["file"]).stat().st_size for entry in entries)
    metrics = {
        "frames": len(entries),
        "source_frames": sum(len(reading.survey.times) for reading in readings),
        "seconds": round(sum(_kept_seconds(reading) for reading in readings), 3),
        "width": record["width"],
        "height": record["height"],
        "clips": len(readings),
        "shots": entries[-1]["shot"] + 1,
        "repeated": sum(reading.repeated for reading in readings),
        "black": sum(int(reading.survey.black.sum()) for reading in readings),
        "bytes_per_frame": size // len(entries),
    }
    return Result(_verdict(record, readings), metrics)


def _read_clips(run: StageRun) -> list[Reading]:
    """Survey every clip and choose its frames."""
    from pipeline.source import check_span, source_names, source_paths
    from pipeline.video import probe

    config = run.config.decode
    paths = source_paths(run.subject)
    check_span(config, len(paths))
    readings: list[Reading] = []
    offset = 0.0
    for number, (name, path) in enumerate(zip(source_names(run.subject), paths, strict=True)):
        information = probe(path)
        saved = run.scratch / f"survey-{number}.npz"
        survey = _load_survey(saved) or _survey(run, path, information.frames, saved)
        try:
            kept, repeated = choose_frames(survey, choose_span(survey, config), config)
        except UserError as error:
            raise UserError(f"{name}: {error.what}" if len(paths) > 1 else error.what, error.fix) from None
        window = Window((information.width, information.height))
        readings.append(Reading(name, path, information, survey, kept, repeated, offset, window))
        offset += float(survey.times[-1]) + CLIP_GAP_SECONDS
    return readings


def _thin(readings: list[Reading], max_frames: int) -> None:
    """Keep at most so many frames of all clips together, spread evenly."""
    clip = np.repeat(np.arange(len(readings)), [len(reading.kept) for reading in readings])
    frames = np.concatenate([reading.kept for reading in readings])
    chosen = evenly(len(frames), max_frames)
    for number, reading in enumerate(readings):
        reading.kept = frames[chosen][clip[chosen] == number]


def _measure_frame(reading: Reading, max_side_px: int) -> None:
    """Find the clip's black bars over the shots that are kept, and its scale."""
    shots = np.unique(reading.survey.shot[reading.kept])
    bars = reading.window.bars
    if len(shots):
        bars = black_bars(reading.survey.rows[shots].max(axis=0), reading.survey.columns[shots].max(axis=0))
    reading.window = Window.within(reading.window.source_size, bars, max_side_px)


def choose_span(survey: Survey, config: DecodeConfig) -> NDArray[np.int64]:
    """Source frames to choose from, none black: those of the span asked for, else of every shot that is long enough.

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
    # A shot lasts until its last frame gives way to the next.
    step = float(np.median(np.diff(survey.times))) if len(survey.times) > 1 else 0.0
    lengths = np.array([survey.times[last] - survey.times[first] + step for first, last in shot_ranges(survey)])
    long_enough = lengths >= min(config.min_shot_seconds, lengths.max()) - 1e-6
    return np.flatnonzero(np.isin(survey.shot, np.flatnonzero(long_enough)))


def choose_frames(survey: Survey, span: NDArray[np.int64], config: DecodeConfig) -> tuple[NDArray[np.int64], int]:
    """The source frames of one clip to keep, and how many of the span were left out as repeated.

    A frame rate above the limit is thinned evenly over time.
    """
    repeated = repeated_frames(survey.motion) & config.drop_repeated
    repeated[span[np.diff(survey.shot[span], prepend=-2) != 0]] = False
    kept = span[~repeated[span]]
    dropped = len(span) - len(kept)
    slot = np.floor((survey.times[kept] - survey.times[kept[0]]) * config.max_fps + 1e-3)
    return kept[np.diff(slot, prepend=-1) > 0], dropped


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


def _survey(run: StageRun, path: Path, promised: int, file: Path) -> Survey:
    """The first pass over a clip; its result is kept in a file of the scratch folder for a resumed run."""
    from pipeline.video import read_frames

    damage: list[str] = []
    times: list[float] = []
    black: list[bool] = []
    motion: list[float] = []
    shot: list[int] = []
    clear: list[bool] = []
    rows: list[NDArray[np.float64]] = []
    columns: list[NDArray[np.float64]] = []
    before: tuple[NDArray[np.float32], NDArray[np.float64]] | None = None
    with run.reporter.task("decode: survey", promised, "frames") as task:
        for frame in read_frames(path, threads=run.threads, on_damage=damage.append):
            run.check_stop()
            thumbnail, histogram, row, column = _measure(frame)
            dark = bool(row.max() <= BLACK_LUMA)
            cut = before is None or black[-1] or histogram_change(histogram, before[1]) > CUT_CHANGE
            if not dark and cut:
                rows.append(row)
                columns.append(column)
            elif not dark:
                rows[-1], columns[-1] = np.maximum(rows[-1], row), np.maximum(columns[-1], column)
            times.append(frame.time)
            black.append(dark)
            shot.append(-1 if dark else len(rows) - 1)
            alpha = frame.alpha()
            clear.append(alpha is not None and bool(alpha.min() < 255))
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
        np.array(clear, bool),
        tuple(damage),
    )
    _save_survey(file, survey)
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
    histogram = colour_histogram(frame.rgb(64, 64))
    height, width = luma.shape
    row = cv2.resize(luma, (min(64, width), height), interpolation=cv2.INTER_AREA).max(axis=1)
    column = cv2.resize(luma, (width, min(64, height)), interpolation=cv2.INTER_AREA).max(axis=0)
    return thumbnail, histogram, row.astype(np.float64), column.astype(np.float64)


def _largest_change(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    cell = THUMBNAIL // 16
    return float(np.abs(a - b).reshape(16, cell, 16, cell).mean(axis=(1, 3)).max())


def _save_survey(file: Path, survey: Survey) -> None:
    buffer = io.BytesIO()
    arrays = {name: value for name, value in vars(survey).items() if name != "damage"}
    np.savez(buffer, damage=np.array(json.dumps(survey.damage)), **arrays)
    write_atomic(file, buffer.getvalue())


def _load_survey(file: Path) -> Survey | None:
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as saved:
        arrays = {name: saved[name] for name in saved.files}
    damage = tuple(json.loads(str(arrays.pop("damage"))))
    return Survey(damage=damage, **arrays)


def _write_frames(run: StageRun, readings: list[Reading]) -> list[dict[str, Any]]:
    """The second pass: write the kept frames that are not there yet, and their alpha where the clip has any.

    Returns an entry of `frames.json` for each.

    All frames get one size, as wide as the widest clip and as high as the highest: a smaller picture is not enlarged
    but padded with black at the right and at the bottom, which keeps its pixels and coordinates.
    """
    import cv2

    from pipeline.video import read_frames

    frame_width, frame_height = _frame_size(readings)
    (run.work / "frames").mkdir(exist_ok=True)
    if any(reading.alpha for reading in readings):
        (run.work / "alpha").mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = []
    shot, before = -1, (-1, -1)
    with run.reporter.task("decode", sum(len(reading.kept) for reading in readings), "frames") as task:
        for number, reading in enumerate(readings):
            wanted = set(reading.kept.tolist())
            for frame in read_frames(reading.path, threads=run.threads) if wanted else ():
                if frame.index not in wanted:
                    continue
                run.check_stop()
                picture = np.ascontiguousarray(frame.rgb(*reading.window.size)[reading.window.inside])
                name, opacity_name = frame_file(len(entries)), alpha_file(len(entries))
                right, bottom = frame_width - picture.shape[1], frame_height - picture.shape[0]
                if not (run.work / name).exists():
                    padded = cv2.copyMakeBorder(picture, 0, bottom, 0, right, cv2.BORDER_CONSTANT)
                    save_image(run.work / name, np.asarray(padded, np.uint8))
                if reading.alpha and not (run.work / opacity_name).exists():
                    alpha = frame.alpha(*reading.window.size)
                    # Images of one folder may have a channel or not.
                    opacity = np.full(reading.window.size[::-1], 255, np.uint8) if alpha is None else alpha
                    inside = np.ascontiguousarray(opacity[reading.window.inside])
                    padded = cv2.copyMakeBorder(inside, 0, bottom, 0, right, cv2.BORDER_CONSTANT)
                    save_image(run.work / opacity_name, np.asarray(padded, np.uint8))
                here = number, int(reading.survey.shot[frame.index])
                shot += here != before
                before = here
                entries.append(
                    {
                        "index": len(entries),
                        "file": name,
                        "time": round(reading.offset + float(reading.survey.times[frame.index]), 6),
                        "clip": number,
                        "shot": shot,
                        "source_frame": frame.index,
                        "sharpness": sharpness_of(picture),
                    }
                )
                task.advance()
                if frame.index == reading.kept[-1]:
                    break
    return entries


def _frame_size(readings: list[Reading]) -> tuple[int, int]:
    """Width and height that hold the picture of every clip."""
    widths, heights = zip(*(reading.window.content for reading in readings), strict=True)
    return max(widths), max(heights)


def _record(readings: list[Reading], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """`frames.json`."""
    clips, warnings = [], []
    for reading in readings:
        survey, information = reading.survey, reading.information
        said = [*information.warnings, *survey.damage]
        if len(survey.times) < information.frames:
            said.append(f"The header counts {information.frames} frames, {len(survey.times)} decode.")
        warnings += [f"{reading.name}: {text}" if len(readings) > 1 else text for text in said]
        clips.append(
            {
                "name": reading.name,
                "scale": reading.window.scale,
                "content": list(reading.window.content),
                "fps": str(source_rate(survey.times, Fraction(information.fps))),
                "source_size": list(reading.window.source_size),
                "bars": list(reading.window.bars),
                "alpha": reading.alpha,
                "shots": [list(shot) for shot in shot_ranges(survey)],
                "shot_seconds": [
                    [_cents(survey.times[first]), _cents(survey.times[last])] for first, last in shot_ranges(survey)
                ],
                "kept_shots": np.unique(survey.shot[reading.kept]).tolist(),
                "repeated": reading.repeated,
                "black": int(survey.black.sum()),
            }
        )
    width, height = _frame_size(readings)
    return {
        "schema": SCHEMA,
        "width": width,
        "height": height,
        "fps": clips[0]["fps"],
        "count": len(entries),
        "clips": clips,
        "frames": entries,
        "warnings": warnings,
    }


def _kept_seconds(reading: Reading) -> float:
    """Time that the kept frames of a clip cover, without what lies between shots."""
    shots = reading.survey.shot[reading.kept]
    spans = [reading.kept[shots == shot] for shot in np.unique(shots)]
    return sum(float(reading.survey.times[span[-1]] - reading.survey.times[span[0]]) for span in spans)


def _cents(seconds: float) -> float:
    """Seconds with two decimals, rounded up, so that a span ending here holds the frame."""
    return math.ceil(round(seconds * 100, 4)) / 100


def _verdict(record: dict[str, Any], readings: list[Reading]) -> Verdict:
    count, total = record["count"], sum(len(reading.survey.times) for reading in readings)
    damaged = []
    for reading in readings:
        promised = reading.information.frames
        if reading.survey.damage or len(reading.survey.times) < 0.9 * promised:
            what = "; ".join(reading.survey.damage) or f"{promised} frames promised"
            which = f"file '{reading.name}'" if len(readings) > 1 else "file"
            damaged.append(f"the {which} is damaged or cut off ({what})")
    amount, remarks = amount_remarks(count, min(min(reading.window.content) for reading in readings))
    level: Level = "fair" if damaged and amount == "good" else amount
    parts = [f"{count} of {total} frames, {record['width']}x{record['height']}"]
    if len(readings) > 1:
        parts.append(f"{len(readings)} clips")
    there, kept = (sum(len(clip[name]) for clip in record["clips"]) for name in ("shots", "kept_shots"))
    parts.append("one shot" if there == 1 else f"{there} shots" if kept == there else f"{kept} of {there} shots")
    for name in ("repeated", "black"):
        left_out = sum(clip[name] for clip in record["clips"])
        if left_out:
            parts.append(f"{counted(left_out, f'{name} frame')} left out")
    if any(any(reading.window.bars) for reading in readings):
        parts.append("black bars cut")
    with_alpha = [reading for reading in readings if reading.alpha]
    if len(with_alpha) == len(readings):
        parts.append("with an alpha channel")
    elif with_alpha:
        parts.append(f"{len(with_alpha)} of {len(readings)} clips with an alpha channel, hence not used as matte")
    text = f"Decoding: {level}. {', '.join(parts)}"
    return Verdict(level, "; ".join([text, *damaged, *remarks]) + ".", "contact.jpg")


STAGE = Stage(
    name="decode",
    version=3,
    inputs=(),
    run=decode,
    durable=("scratch/survey-*.npz",),
    description="frames of every shot that is long enough",
)
