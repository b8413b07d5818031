"""The decoded frames of a subject: reading `frames.json`, the images and their alpha, checked at the border."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import read_json
from pipeline.errors import UserError

SCHEMA = 1
GOOD_FRAMES, GOOD_SIDE = 60, 256


@dataclass(frozen=True)
class Window:
    """Which part of a clip's upright picture its frames show, and at what size."""

    source_size: tuple[int, int]
    """Width and height of the picture, upright, with square pixels."""
    bars: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Black bars at the left, top, right and bottom, in source pixels."""
    scale: float = 1.0
    """Pixels of a frame per pixel of the source."""

    @staticmethod
    def within(source_size: tuple[int, int], bars: tuple[int, int, int, int], max_side_px: int) -> Window:
        """What lies within the bars, reduced so that the longer side has at most so many pixels."""
        (width, height), (left, top, right, bottom) = source_size, bars
        return Window(source_size, bars, min(1.0, max_side_px / max(width - left - right, height - top - bottom)))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole source picture at this scale."""
        return round(self.source_size[0] * self.scale), round(self.source_size[1] * self.scale)

    @property
    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of that picture within the bars."""
        (width, height), (left, top, right, bottom) = self.source_size, self.bars
        return (
            slice(math.ceil(top * self.scale), math.floor((height - bottom) * self.scale)),
            slice(math.ceil(left * self.scale), math.floor((width - right) * self.scale)),
        )

    @property
    def content(self) -> tuple[int, int]:
        """Width and height of what lies within the bars."""
        rows, columns = self.inside
        width, height = self.size
        return min(columns.stop, width) - columns.start, min(rows.stop, height) - rows.start


@dataclass(frozen=True)
class FrameSet:
    """The frames that the decode stage wrote, clip after clip, each in order of time."""

    folder: Path
    """The decode stage's folder."""
    width: int
    height: int
    """Size of every frame; a smaller clip's picture lies at the top left, what is beside it is black."""
    fps: Fraction
    """Nominal rate of the first clip; the frames' own `times` are what counts."""
    files: tuple[str, ...]
    """Path of each frame in `folder`."""
    times: NDArray[np.float64]
    """[T] seconds from the first clip's start; a later clip begins one second after the one before it ends."""
    clips: NDArray[np.int64]
    """[T] number of each frame's clip, from 0."""
    shots: NDArray[np.int64]
    """[T] number of each frame's shot, from 0, counted over all clips."""
    contents: NDArray[np.int64]
    """[T, 2] width and height of the part of each frame, from its top-left corner, that is picture."""
    source_frames: NDArray[np.int64]
    """[T] number of each frame in its clip."""
    sharpness: NDArray[np.float32]
    """[T] mean square of the Laplacian of the frame's grey values; comparable within a clip only."""
    clip_names: tuple[str, ...]
    """Names of the clips as they were given; empty where the file does not tell."""
    record: dict[str, Any]
    """`frames.json` as it stands."""

    @staticmethod
    def load(folder: Path) -> FrameSet:
        """Read and check a decode stage's `frames.json`.

        Raises:
            UserError: it is missing or damaged, with the field that is wrong.
        """
        path = folder / "frames.json"
        record = read_json(path)
        try:
            if record["schema"] != SCHEMA:
                raise ValueError(f"schema is {record['schema']}, this version reads {SCHEMA}")
            width, height, fps = int(record["width"]), int(record["height"]), Fraction(record["fps"])
            entries = record["frames"]
            if min(width, height) < 1 or fps <= 0 or not entries or record["count"] != len(entries):
                raise ValueError("width, height, fps or count do not fit")
            files = tuple(str(entry["file"]) for entry in entries)
            times = np.array([float(entry["time"]) for entry in entries])
            clips = np.array([int(entry.get("clip", 0)) for entry in entries])
            shots = np.array([int(entry.get("shot", 0)) for entry in entries])
            about = record.get("clips") or [{"name": "", "content": [width, height]}]
            names = tuple(str(clip["name"]) for clip in record.get("clips", []))
            numbers = np.array([int(entry["source_frame"]) for entry in entries])
            sharpness = np.array([float(entry["sharpness"]) for entry in entries], np.float32)
            if [entry["index"] for entry in entries] != list(range(len(entries))):
                raise ValueError("the indices do not count 0, 1, 2, ...")
            if any(Path(file).is_absolute() or ".." in Path(file).parts for file in files):
                raise ValueError("a file lies outside the stage's folder")
            if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
                raise ValueError("the times do not increase")
            if shots[0] != 0 or not np.isin(np.diff(shots), (0, 1)).all():
                raise ValueError("the shots do not count 0, 1, 2, ...")
            if clips.min() < 0 or clips[-1] >= len(about) or (np.diff(clips) < 0).any():
                raise ValueError("the clips do not count up within their list")
            if (np.diff(clips).astype(bool) & (np.diff(shots) == 0)).any():
                raise ValueError("a shot reaches over two clips")
            contents = np.array([[int(side) for side in clip["content"]] for clip in about])[clips]
            if (contents < 1).any() or (contents > [width, height]).any():
                raise ValueError("the clips' content does not fit the frames")
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(
                f"'{path}' is not what the decode stage writes: {error}.", "rerun the stage: headcast rerun SUBJECT"
            ) from None
        return FrameSet(
            folder, width, height, fps, files, times, clips, shots, contents, numbers, sharpness, names, record
        )

    def __len__(self) -> int:
        return len(self.files)

    @property
    def has_alpha(self) -> bool:
        """Whether every clip has an alpha channel of its own, whose values lie in `folder` as a matte's do."""
        clips = self.record.get("clips") or [{}]
        return all(clip.get("alpha") is True for clip in clips)

    def window(self, clip: int) -> Window:
        """Which part of a clip's picture its frames show.

        Raises:
            UserError: `frames.json` does not tell.
        """
        try:
            about = self.record["clips"][clip]
            (width, height), (left, top, right, bottom) = about["source_size"], about["bars"]
            bars = int(left), int(top), int(right), int(bottom)
            window = Window((int(width), int(height)), bars, float(about["scale"]))
            if list(window.content) != list(about["content"]):
                raise ValueError("content does not fit source_size, bars and scale")
            return window
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"'{self.folder / 'frames.json'}' does not tell where clip {clip} lies in its source: {error}.",
                "rerun the stage: headcast rerun SUBJECT --from decode",
            ) from None

    def image(self, index: int) -> NDArray[np.uint8]:
        """Frame `index` as sRGB [H, W, 3].

        Raises:
            UserError: the file is missing, damaged or of another size.
        """
        import cv2

        path = self.folder / self.files[index]
        return self._checked(path, cv2.cvtColor(_read(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The part of frame `index` that is picture, sRGB [h, w, 3] without the padding.

        Raises:
            UserError: as `image`.
        """
        width, height = self.contents[index]
        return self.image(index)[:height, :width]

    def alpha(self, index: int, matte: Path | None = None) -> NDArray[np.uint8]:
        """Alpha of frame `index` as [H, W], 0 background to 255 subject.

        Args:
            index: the frame.
            matte: the matte stage's folder, by default the one beside the decode stage's; or the decode stage's own,
                where the clip brought its alpha along (`has_alpha`).

        Raises:
            UserError: the file is missing, damaged or of another size.
        """
        import cv2

        path = (matte or self.folder.parent / "matte") / alpha_file(index)
        return self._checked(path, _read(path, cv2.IMREAD_GRAYSCALE))

    def foreground(self, index: int, matte: Path | None = None) -> NDArray[np.uint8]:
        """The subject's own colours in frame `index`, sRGB [H, W, 3]: without what shines through its edge.

        Args:
            index: the frame.
            matte: the matte stage's folder, by default the one beside the decode stage's.

        Raises:
            UserError: the file is missing, damaged or of another size.
        """
        import cv2

        path = (matte or self.folder.parent / "matte") / foreground_file(index)
        return self._checked(path, cv2.cvtColor(_read(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))

    def _checked(self, path: Path, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if image.shape[:2] != (self.height, self.width):
            raise UserError(
                f"'{path}' is {image.shape[1]}x{image.shape[0]}, the frames are {self.width}x{self.height}.",
                "rerun the stage that writes it",
            )
        return image


def frame_file(index: int) -> str:
    """Path of a frame in the decode stage's folder."""
    return f"frames/{index:06d}.jpg"


def alpha_file(index: int) -> str:
    """Path of a frame's alpha in the matte stage's folder, or of its own in the decode stage's."""
    return f"alpha/{index:06d}.png"


def shown_file(index: int) -> str:
    """Path of a held-out frame's truth, render and error in the evaluate stage's folder."""
    return f"shown/{index:06d}.jpg"


def foreground_file(index: int) -> str:
    """Path of the subject's own colours in the matte stage's folder."""
    return f"foreground/{index:06d}.jpg"


def confidence_file(index: int) -> str:
    """Path of how sure a frame's alpha is, in the matte stage's folder."""
    return f"confidence/{index:06d}.png"


def save_image(path: Path, image: NDArray[np.uint8] | NDArray[np.uint16], quality: int = 95) -> None:
    """Write an image by temporary file and rename, JPEG or PNG by the name's ending.

    Grey is [H, W], RGB [H, W, 3], RGB with straight alpha [H, W, 4] (PNG only); 16 bits are for PNG. JPEG keeps full
    colour resolution (4:4:4). Nothing is flushed to disk: a stage does that once, before publication.

    Raises:
        OSError: the file cannot be written.
    """
    import cv2

    swapped = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    bgr = cv2.cvtColor(image, swapped[image.shape[2]]) if image.ndim == 3 else image
    options = (
        [cv2.IMWRITE_PNG_COMPRESSION, 3]
        if path.suffix == ".png"
        else [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    )
    _, data = cv2.imencode(path.suffix, bgr, options)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.tobytes())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def contact_sheet(
    images: list[NDArray[np.uint8]], labels: list[str], *, columns: int = 4, width: int = 320
) -> NDArray[np.uint8]:
    """Images of one size side by side in rows, each `width` pixels wide with its label; empty places are white."""
    import cv2

    height = round(images[0].shape[0] * width / images[0].shape[1])
    sheet = np.full((math.ceil(len(images) / columns) * height, columns * width, 3), 255, np.uint8)
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        tile = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(tile, label, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, thickness, cv2.LINE_AA)
        y, x = place // columns * height, place % columns * width
        sheet[y : y + height, x : x + width] = tile
    return sheet


def write_overview(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Write a decode stage's `contact.jpg` of these frames of `frames.json`."""
    import cv2

    shown = [entries[i] for i in evenly(len(entries), 8)]
    images = [cv2.cvtColor(_read(folder / entry["file"], cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for entry in shown]
    labels = [f"{entry['index']}  {entry['time']:.2f} s" for entry in shown]
    save_image(folder / "contact.jpg", contact_sheet(images, labels), 90)


def sharpness_of(picture: NDArray[np.uint8]) -> float:
    """Mean square of the Laplacian of a picture's grey values, as `frames.json` has it."""
    import cv2

    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return round(float((cv2.Laplacian(grey, cv2.CV_32F) ** 2).mean()), 4)


def amount_remarks(count: int, side: int) -> tuple[Literal["good", "fair", "poor"], list[str]]:
    """What so many frames with so many pixels on their shorter side are worth, and why in words."""
    level: Literal["good", "fair", "poor"] = "good"
    remarks = []
    if side < GOOD_SIDE:
        level = "fair"
        remarks.append(f"under {GOOD_SIDE} pixels there is little detail to learn")
    if count < GOOD_FRAMES:
        level = "poor" if count < GOOD_FRAMES / 6 else "fair"
        remarks.append("that is short; 10 s and more make a better avatar")
    return level, remarks


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, spread evenly, ends included."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, wanted)).round())]


def ranges_text(flags: NDArray[np.bool_]) -> str:
    """The numbers of set flags in words: `frames 12-40, 77`, or `no frames`."""
    numbers = np.flatnonzero(flags)
    if not len(numbers):
        return "no frames"
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return ("frame " if len(numbers) == 1 else "frames ") + ", ".join(parts)


def counted(number: int, noun: str) -> str:
    """`1 frame`, `2 frames`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _read(path: Path, mode: int) -> NDArray[np.uint8]:
    import cv2

    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror}.", "rerun the stage that writes it") from None
    image = cv2.imdecode(data, mode) if len(data) else None
    if image is None:
        raise UserError(f"'{path}' is not an image that can be read.", "rerun the stage that writes it")
    return np.asarray(image, np.uint8)
