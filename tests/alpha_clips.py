"""Videos with chosen codecs and pixel formats, among them those that carry an alpha channel."""

from __future__ import annotations

import subprocess
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

ALPHA_VIDEOS = {
    "prores": (".mov", "prores_ks", "yuva444p10le"),
    "quicktime-animation": (".mov", "qtrle", "argb"),
    "png-in-mov": (".mov", "png", "rgba"),
    "ffv1": (".mkv", "ffv1", "bgra"),
    "vp9": (".webm", "libvpx-vp9", "yuva420p"),
    "vp8": (".webm", "libvpx", "yuva420p"),
}
"""Suffix, encoder and pixel format of videos with an alpha channel."""
_OPTIONS = {
    "libx264": {"crf": "4"},
    "libvpx": {"auto-alt-ref": "0", "crf": "4", "b": "8M"},
    "libvpx-vp9": {"crf": "4", "b": "8M", "deadline": "realtime"},
    "prores_ks": {"profile": "4444"},
}


def movie(path: Path, images: list[NDArray[np.uint8]], codec: str, pixel_format: str, given: str = "rgb24") -> Path:
    """Write images, of the format `given`, as a video."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.options = _OPTIONS.get(codec, {})
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format=given).reformat(format=pixel_format)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def turned(path: Path) -> Path:
    """The file with a display matrix that turns it by 90 degrees against the clock, as `numpy.rot90` does."""
    target = path.with_stem(path.stem + "-turned")
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-display_rotation", "90"]
    subprocess.run([*ffmpeg, "-i", str(path), "-c", "copy", str(target)], check=True)
    return target
