"""Short videos with a tone, for tests of sound that has to stay in step with its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.video import SOUND_RATE

LOUD = 2000


def write_tone(
    path: Path,
    *,
    begins: float,
    seconds: float,
    fps: Fraction = Fraction(30000, 1001),
    rate: int = 44100,
    late: float = 0.0,
    first_picture: float = 0.0,
    images: Sequence[NDArray[np.uint8]] | None = None,
) -> Path:
    """A video whose sound track is silent for `begins` seconds and then a tone.

    Args:
        path: the file.
        begins: when the tone begins, in seconds of the track.
        seconds: length of the track.
        late: when the track begins.
        first_picture: when the pictures do.
        images: the pictures; by default grey ones for two seconds.
    """
    pictures = [np.full((64, 64, 3), 128, np.uint8)] * round(2 * fps) if images is None else images
    times = np.arange(int(seconds * rate)) / rate
    tone = (0.5 * np.sin(2 * np.pi * 440 * times) * (times >= begins)).astype(np.float32)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 90_000)
        stream.options = {"crf": "10"}
        track = file.add_stream("aac", rate=rate)
        track.layout = "mono"
        for number, image in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709"
            )
            frame.pts, frame.time_base = round((first_picture + number / fps) * 90_000), Fraction(1, 90_000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        for first in range(0, len(tone), 1024):
            sound = av.AudioFrame.from_ndarray(tone[None, first : first + 1024], format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = rate, round(late * rate) + first, Fraction(1, rate)
            file.mux(track.encode(sound))
        file.mux(track.encode(None))
    return path


def onset(sound: NDArray[np.int16]) -> float:
    """Seconds until a tone is heard."""
    return float(np.flatnonzero(np.abs(sound).max(1) > LOUD)[0] / SOUND_RATE)
