"""The sound of a video, in step with its pictures, or of a file with sound alone: 48 kHz stereo, for other pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.video import SOUND_RATE, first_frame, open_container

PIECE_SAMPLES = SOUND_RATE // 10
JITTER_SAMPLES = SOUND_RATE // 20
"""Sound follows what came before it unless its time stamp says otherwise by this much."""


def has_sound(path: Path) -> bool:
    """Whether a file has a sound track; a folder of images has none.

    Raises:
        UserError: there is no such file, or it holds neither pictures nor sound.
    """
    if path.is_dir():
        return False
    with open_container(path, sound_is_enough=True) as container:
        return bool(container.streams.audio)


def check_sound(path: Path) -> None:
    """Refuse a file without sound.

    Raises:
        UserError: there is no such file, or it has none.
    """
    if not has_sound(path):
        raise UserError(f"'{path}' has no sound.", "name a file with sound, such as a .wav, .m4a or .mp4")


def read_sound(path: Path, start: float, seconds: float) -> Iterator[NDArray[np.int16]]:
    """The sound of a span of a video as pieces [n, 2] that add up to its length exactly; silence where there is none.

    Args:
        path: a video, a file with sound alone, or a folder of images, which is silent.
        start: seconds from the first picture, the time that `read_frames` gives a frame; it may lie before it. Sound
            alone starts at 0.
        seconds: length of the span.

    Raises:
        UserError: there is no such file, it is no video, or none of its pictures can be decoded.
    """
    given, wanted = 0, round(seconds * SOUND_RATE)
    if has_sound(path):
        for at, samples in _decoded(path, start):
            if at >= wanted:
                break
            yield from _silence(at - given)
            given = max(given, at)
            piece = samples[given - at : wanted - at]
            if len(piece):
                yield piece
                given += len(piece)
    yield from _silence(wanted - given)


def _silence(samples: int) -> Iterator[NDArray[np.int16]]:
    """Pieces of silence; none where `samples` is not above 0."""
    for done in range(0, samples, PIECE_SAMPLES):
        yield np.zeros((min(PIECE_SAMPLES, samples - done), 2), np.int16)


def _decoded(path: Path, start: float) -> Iterator[tuple[int, NDArray[np.int16]]]:
    """Resampled pieces [n, 2] of the whole track, each with the number of its first sample counted from `start`."""
    import av

    with open_container(path, sound_is_enough=True) as container:
        # A first picture without a time stamp is at 0, as `read_frames` has it.
        first = first_frame(container, path).time if container.streams.video else 0.0
        origin = (first or 0.0) + start
    with open_container(path, sound_is_enough=True) as container:
        stream = container.streams.audio[0]
        resampler, after = av.AudioResampler("s16", "stereo", SOUND_RATE), None
        packets, packet = container.demux(stream), None
        while True:
            # Of a damaged track what can be decoded is kept; its place is in its time stamps.
            try:
                packet = next(packets, None)
                frames: list[Any] = [] if packet is None else stream.decode(packet)
                pieces = [piece for frame in frames for piece in resampler.resample(frame)]
                pieces += resampler.resample(None) if packet is None else []
            except (av.error.FFmpegError, ValueError):
                pieces = []
            for piece in pieces:
                samples = piece.to_ndarray().reshape(-1, 2)
                at = after or 0
                if piece.pts is not None:
                    stamped = round((float(piece.pts * piece.time_base) - origin) * SOUND_RATE)
                    at = stamped if after is None or abs(stamped - after) > JITTER_SAMPLES else after
                after = at + len(samples)
                yield at, samples
            if packet is None:
                return
