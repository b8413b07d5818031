"""Decode's files of an imported subject, from its dataset: every frame that the dataset has, under its own number."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.dataset import write_json
from pipeline.errors import UserError
from pipeline.frames import (
    SCHEMA,
    Window,
    alpha_file,
    amount_remarks,
    frame_file,
    save_image,
    sharpness_of,
    write_overview,
)
from pipeline.interchange.recording import FILE, Recording, save_recording
from pipeline.source import DATASET, imported, read_dataset
from pipeline.stage import Result, StageRun, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]

FRAMES_AT_ONCE = 8
"""For each thread; a stop is heeded between them."""


@dataclass(frozen=True)
class Filled:
    """What is known of a frame that was written."""

    sharpness: float
    least: int
    """Of its alpha."""
    most: int


def fill(run: StageRun) -> Result:
    """Write `frames/`, `alpha/` where the dataset has alphas, `frames.json`, a contact sheet and `recording.npz`.

    No frame is left out and nothing is cut; of decode's settings only `decode.max_side_px` counts. A picture that is
    reduced is all there, so that the camera's scale each way is that of the pictures' sizes in whole pixels.

    Raises:
        UserError: the dataset is not what it was when it was imported, a picture is damaged, or the alphas say nothing.
    """
    recording = read_dataset(run.subject)
    window = Window.within(recording.size, (0, 0, 0, 0), run.config.decode.max_side_px)
    for name in ("frames", *(["alpha"] if recording.alpha != "none" else [])):
        (run.work / name).mkdir(exist_ok=True)
    filled = list(_fill_frames(run, recording, window))
    if recording.alpha != "none":
        _refuse_empty(run.subject.source / DATASET, filled)
    record = _record(run, recording, window, filled)
    write_json(run.work / "frames.json", record)
    save_recording(run.work / FILE, recording)
    write_overview(run.work, record["frames"])
    size = sum((run.work / entry["file"]).stat().st_size for entry in record["frames"])
    metrics = {
        "frames": len(recording),
        "source_frames": len(recording),
        "seconds": round(record["frames"][-1]["time"], 3),
        "width": record["width"],
        "height": record["height"],
        "clips": 1,
        "shots": 1,
        "repeated": 0,
        "black": 0,
        "bytes_per_frame": size // len(recording),
    }
    return Result(_verdict(run, recording, record), metrics)


def _fill_frames(run: StageRun, recording: Recording, window: Window) -> Iterator[Filled]:
    """Write the frames that are not there yet, several at a time, in order."""
    count, step = len(recording), FRAMES_AT_ONCE * run.threads
    fill_frame = partial(_fill_frame, run, recording, window)
    with run.reporter.task("decode", count, "frames") as task, ThreadPoolExecutor(run.threads) as pool:
        for first in range(0, count, step):
            run.check_stop()
            for filled in pool.map(fill_frame, range(first, min(first + step, count))):
                task.advance()
                yield filled


def _fill_frame(run: StageRun, recording: Recording, window: Window, row: int) -> Filled:
    from pipeline.video import read_image

    path = run.subject.source / DATASET / recording.images[row]
    frame = read_image(path)
    _check_size(path, (frame.width, frame.height), recording.size)
    picture = frame.rgb(*window.content)
    if not (target := run.work / frame_file(row)).exists():
        save_image(target, picture)
    alpha = None
    if recording.alpha == "channel":
        alpha = frame.alpha(*window.content)
        if alpha is None:
            raise UserError(f"'{path}' has no alpha channel, as the others have.", "complete the dataset")
    elif recording.alpha != "none":
        alpha = _alpha_of_mask(run.subject.source / DATASET / recording.masks[row], recording, window)
    if alpha is None:
        return Filled(sharpness_of(picture), 0, 255)
    if not (target := run.work / alpha_file(row)).exists():
        save_image(target, alpha)
    return Filled(sharpness_of(picture), int(alpha.min()), int(alpha.max()))


def _alpha_of_mask(path: Path, recording: Recording, window: Window) -> Image:
    """Alpha [h,w] in the frames' size from a grey mask, or from a parsing."""
    import cv2

    mode = cv2.IMREAD_COLOR_RGB if recording.alpha == "parsing" else cv2.IMREAD_GRAYSCALE
    mask = cv2.imdecode(np.fromfile(path, np.uint8), mode)
    if mask is None:
        raise UserError(f"'{path}' is not an image that can be read.", "complete the dataset")
    _check_size(path, mask.shape[1::-1], recording.size)
    if recording.alpha == "parsing":
        mask = _head_of_parsing(mask)
    if recording.size != window.content:
        mask = cv2.resize(mask, window.content, interpolation=cv2.INTER_AREA)
    return np.asarray(mask, np.uint8)


def _head_of_parsing(parsing: Any) -> Image:
    """Alpha of a parsing's colours [H,W,3], in which the head is pure blue (NeRFBlendShape, AD-NeRF)."""
    red, green, blue = np.moveaxis(parsing > 127, -1, 0)
    return np.where(blue & ~red & ~green, 255, 0).astype(np.uint8)


def _check_size(path: Path, found: tuple[int, ...], wanted: tuple[int, int]) -> None:
    """What a header says was seen at import already; a picture that its camera turns has another size."""
    if found != wanted:
        raise UserError(
            f"'{path}' is {found[0]}x{found[1]} once it is read, the dataset's pictures are {wanted[0]}x{wanted[1]}.",
            "write it again upright, without a tag that turns it",
        )


def _refuse_empty(folder: Path, filled: list[Filled]) -> None:
    least, most = min(frame.least for frame in filled), max(frame.most for frame in filled)
    if least == most:
        raise UserError(
            f"The alphas in '{folder}' say nothing: every one is {least} of 255 everywhere.",
            "complete the dataset: white or opaque is the subject, black or clear what is behind",
        )


def _record(run: StageRun, recording: Recording, window: Window, filled: list[Filled]) -> dict[str, Any]:
    """`frames.json`."""
    seconds = [float((number - recording.numbers[0]) / recording.fps) for number in recording.numbers.tolist()]
    width, height = window.content
    clip = {
        "name": (imported(run.subject) or {}).get("folder", ""),
        "scale": window.scale,
        "content": [width, height],
        "fps": str(recording.fps),
        "source_size": list(recording.size),
        "bars": [0, 0, 0, 0],
        "alpha": recording.alpha != "none",
        "shots": [[int(recording.numbers[0]), int(recording.numbers[-1])]],
        "shot_seconds": [[0.0, seconds[-1]]],
        "kept_shots": [0],
        "repeated": 0,
        "black": 0,
    }
    frames = [
        {
            "index": row,
            "file": frame_file(row),
            "time": round(seconds[row], 6),
            "clip": 0,
            "shot": 0,
            "source_frame": int(recording.numbers[row]),
            "sharpness": frame.sharpness,
        }
        for row, frame in enumerate(filled)
    ]
    return {
        "schema": SCHEMA,
        "width": width,
        "height": height,
        "fps": str(recording.fps),
        "count": len(frames),
        "clips": [clip],
        "frames": frames,
        "warnings": list(recording.notes),
    }


def _verdict(run: StageRun, recording: Recording, record: dict[str, Any]) -> Verdict:
    told = imported(run.subject) or {}
    level, remarks = amount_remarks(len(recording), min(record["width"], record["height"]))
    parts = [
        f"{len(recording)} frames, {record['width']}x{record['height']}",
        f"imported from '{told.get('folder')}' ({recording.format})",
        "without alphas" if recording.alpha == "none" else "with alphas",
    ]
    missing = int(recording.numbers[-1] - recording.numbers[0]) + 1 - len(recording)
    if missing:
        parts.append(f"{missing} numbers between them are left out")
    text = f"Decoding: {level}. {', '.join(parts)}"
    return Verdict(level, "; ".join([text, *remarks]) + ".", "contact.jpg")
