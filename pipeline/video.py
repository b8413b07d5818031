"""Reading and writing video files with PyAV."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_video(
    path: Path, frames: Iterable[NDArray[np.uint8]], fps: Fraction | float, *, crf: int = 20, threads: int = 2
) -> None:
    """Write an H.264 file that every browser plays: 4:2:0, BT.709, index at the front. Equal frames give equal bytes.

    Args:
        path: the file, replaced at the end in one step.
        frames: sRGB images [H, W, 3] of one size; an odd side is extended by repeating its last row or column.
        fps: frames a second; a float is taken for the nearest simple fraction (29.97 is 30000/1001).
        crf: x264's quality, 0 lossless to 51.
        threads: the encoder's; part of what decides the bytes, hence not the machine's count.

    Raises:
        ValueError: there are no frames, or they differ in size.
    """
    import av

    stream_of_frames = iter(frames)
    first = next(stream_of_frames, None)
    if first is None:
        raise ValueError(f"no frames to write to {path}")
    height, width = first.shape[:2]
    rate = simple_rate(fps)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".mp4")
    os.close(handle)
    try:
        with av.open(temporary, "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as file:
            stream = file.add_stream("libx264", rate=rate)
            stream.width, stream.height = width + width % 2, height + height % 2
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": str(crf), "preset": "medium", "threads": str(threads)}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1
            context.color_range = 1
            for index, image in enumerate(itertools.chain([first], stream_of_frames)):
                if image.shape != (height, width, 3) or image.dtype != np.uint8:
                    raise ValueError(f"frame {index} is {image.dtype} {image.shape}, not uint8 ({height}, {width}, 3)")
                even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", interpolation="AREA"
                )
                frame.pts = index
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def simple_rate(fps: Fraction | float) -> Fraction:
    """A frame rate as the fraction that is meant: 29.97 and 29.970029 give 30000/1001."""
    if isinstance(fps, Fraction):
        return fps
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    if abs(float(ntsc) - fps) < 5e-3 and abs(fps - round(fps)) > 1e-3:
        return ntsc
    return Fraction(fps).limit_denominator(1001)
