"""Alphas that nobody has to estimate: the user's own for every frame (`--alpha`), or the clip's own alpha channel."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import Subject
from pipeline.errors import UserError
from pipeline.frames import FrameSet, Window, counted, ranges_text
from pipeline.interchange.recording import FILE as RECORDING
from pipeline.source import alpha_paths
from pipeline.video import Frame, image_files, probe, read_frames

SHOWN_GAPS = 20
"""Missing numbers that a message names at most."""
_found_good: set[tuple[object, ...]] = set()
"""Alphas that this process has checked, with the sizes and times of change that they had."""


class GivenAlpha:
    """The alpha of each decoded frame, as it was given: call it with the frame's index. Videos are read in one go where
    the indices rise; one thread at a time.
    """

    def __init__(self, frames: FrameSet, alphas: list[Path] | None, threads: int) -> None:
        self._frames, self._alphas, self._threads = frames, alphas, threads
        self._clip = -1
        self._reading: Iterator[Frame] = iter(())
        self._at: Frame | None = None

    @property
    def origin(self) -> str:
        """Where the alphas come from, in words."""
        own = "the dataset" if (self._frames.folder / RECORDING).is_file() else "the video's own alpha channel"
        return own if self._alphas is None else "the alphas given with --alpha"

    def __call__(self, index: int) -> NDArray[np.uint8]:
        """Alpha [H, W] of decoded frame `index`, 0 background to 255 subject; 0 where the frame is no picture.

        Raises:
            UserError: it is missing, or of a size that fits neither the source nor the decoded frames.
        """
        if self._alphas is None:
            return self._frames.alpha(index, self._frames.folder)
        clip, number = int(self._frames.clips[index]), int(self._frames.source_frames[index])
        window, path = self._frames.window(clip), self._alphas[clip]
        alpha = self._read(clip, number)
        if (alpha.width, alpha.height) not in (window.source_size, window.content):
            raise _wrong_size(path, (alpha.width, alpha.height), [window.source_size, window.content])
        width, height = window.content
        canvas = np.zeros((self._frames.height, self._frames.width), np.uint8)
        if (alpha.width, alpha.height) == window.source_size:
            canvas[:height, :width] = _values(alpha, *window.size)[window.inside]
        else:
            canvas[:height, :width] = _values(alpha)
        return canvas

    def _read(self, clip: int, number: int) -> Frame:
        """Alpha `number` of a clip; what lies before it is passed over."""
        assert self._alphas is not None
        if clip != self._clip or (self._at is not None and self._at.index > number):
            self._clip, self._at = clip, None
            self._reading = read_frames(self._alphas[clip], threads=self._threads)
        while self._at is None or self._at.index < number:
            self._at = next(self._reading, None)
            if self._at is None:
                raise UserError(
                    f"'{self._alphas[clip]}' has no alpha for frame {number} of its video.",
                    "give one alpha for every frame of the video, in its order, with --alpha",
                )
        return self._at


def given_alpha(subject: Subject, sha256: str, frames: FrameSet, threads: int = 2) -> GivenAlpha | None:
    """The alphas to take as they are: those given with `--alpha`, else the clips' own where all of them have any.

    Args:
        subject: whose source holds the alphas.
        sha256: hash of those given, as `matte.alpha` has it; empty where none are.
        frames: the decoded frames.
        threads: for decoding.

    Raises:
        UserError: those given are missing or were changed since.
    """
    if sha256:
        return GivenAlpha(frames, alpha_paths(subject, sha256), threads)
    return GivenAlpha(frames, None, threads) if frames.has_alpha else None


def check_alphas(
    clips: Sequence[Path], alphas: Sequence[Path], max_side_px: int, decoded: Path | None = None, threads: int = 2
) -> None:
    """Refuse alphas that do not fit their clips, one for every frame; decodes both, once a process.

    Args:
        clips: videos or folders of images.
        alphas: likewise, one for each clip.
        max_side_px: longer side of the decoded frames at most (`decode.max_side_px`).
        decoded: folder of the decode stage's result for these clips, whether or not it is there.
        threads: for decoding.

    Raises:
        UserError: alphas are missing or too many, cannot be read, have another size, or say nothing.
    """
    frames = FrameSet.load(decoded) if decoded is not None and (decoded / "frames.json").is_file() else None
    for number, (clip, alpha) in enumerate(zip(clips, alphas, strict=True)):
        known = (*_stamps(clip), *_stamps(alpha), max_side_px, decoded)
        if known in _found_good:
            continue
        information = probe(clip)
        source = (information.width, information.height)
        sizes = [source, Window.within(source, (0, 0, 0, 0), max_side_px).content]
        if frames is not None and number < len(frames.clip_names):
            sizes.append(frames.window(number).content)
        _check_alpha(clip, alpha, sizes, threads)
        _found_good.add(known)


def _check_alpha(clip: Path, alpha: Path, sizes: list[tuple[int, int]], threads: int) -> None:
    files = image_files(alpha) if alpha.is_dir() else []
    gaps = _missing_numbers(files)
    if gaps and clip.is_dir() and _numbers(image_files(clip)) == _numbers(files):
        gaps = []  # the same gaps in the clip
    wanted = len(image_files(clip)) if clip.is_dir() else sum(1 for _ in read_frames(clip, threads=threads))
    if files and (gaps or len(files) != wanted):
        raise _wrong_count(alpha, len(files), clip, wanted, gaps)
    count, least, most = 0, 255, 0
    for frame in read_frames(alpha, threads=threads):
        if (frame.width, frame.height) not in sizes:
            raise _wrong_size(files[frame.index] if files else alpha, (frame.width, frame.height), sizes)
        values = _values(frame)
        least, most, count = min(least, int(values.min())), max(most, int(values.max())), count + 1
    if count != wanted:
        raise _wrong_count(alpha, count, clip, wanted, [])
    if least == most:
        raise UserError(
            f"'{alpha}' says nothing: every alpha is {least} of 255 everywhere.",
            "give grey images, 0 background to 255 subject, or images whose alpha channel holds it",
        )


def _values(frame: Frame, width: int | None = None, height: int | None = None) -> NDArray[np.uint8]:
    """What a frame says as an alpha [height, width]: its alpha channel, else its grey values, in full range."""
    import cv2

    alpha = frame.alpha(width, height)
    if alpha is not None:
        return alpha
    grey = frame.luma()
    if (width or frame.width, height or frame.height) == (frame.width, frame.height):
        return grey
    return np.asarray(cv2.resize(grey, (width or 0, height or 0), interpolation=cv2.INTER_AREA), np.uint8)


def _stamps(path: Path) -> tuple[object, ...]:
    stats = [file.stat() for file in (image_files(path) if path.is_dir() else [path])]
    return (path.absolute(), *((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats))


def _numbers(files: Sequence[Path]) -> list[int]:
    """The numbers in the names of images that differ in nothing else; none where they do."""
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*)", file.stem) for file in files]
    if not all(parts) or len({(part[1], part[3]) for part in parts if part}) > 1:
        return []
    return [int(part[2]) for part in parts if part]


def _missing_numbers(files: Sequence[Path]) -> list[int]:
    """Numbers that are left out between the first and the last of a folder's images.

    Where most are, the names are no count (times, for example), and nothing is.
    """
    numbers = _numbers(files)
    if not numbers or max(numbers) - min(numbers) >= 2 * len(numbers):
        return []
    return sorted(set(range(min(numbers), max(numbers) + 1)) - set(numbers))


def _wrong_count(alpha: Path, count: int, clip: Path, wanted: int, gaps: list[int]) -> UserError:
    what = f"'{alpha}' has {counted(count, 'alpha')} for the {counted(wanted, 'frame')} of '{clip}'"
    if gaps:
        flags = np.zeros(gaps[-1] + 1, bool)
        flags[gaps[:SHOWN_GAPS]] = True
        more = f" and {len(gaps) - SHOWN_GAPS} more" if len(gaps) > SHOWN_GAPS else ""
        what += f": by their names, {ranges_text(flags)}{more} {'is' if len(gaps) == 1 else 'are'} missing"
    elif count != wanted:
        what += f": {abs(wanted - count)} {'too few' if count < wanted else 'too many'}"
    return UserError(f"{what}.", "give one alpha for every frame of the video, in its order")


def _wrong_size(path: Path, size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> UserError:
    fitting = " or ".join(dict.fromkeys(f"{width}x{height}" for width, height in sizes))
    return UserError(
        f"'{path}' is {size[0]}x{size[1]}, the video's frames are {fitting}.",
        "give alphas of the size of the upright video",
    )
