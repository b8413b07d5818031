"""Reading and writing videos with PyAV, and reading a folder of images as if it were one.

PyAV decodes but leaves orientation, untagged colour and high dynamic range to its caller; they are handled here, so
that a frame is an upright sRGB image with a time. Nothing is held but the frame at hand.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_ALPHA_SUFFIXES = (".png", ".webp", ".tif", ".tiff")
IMAGE_FOLDER_FPS = Fraction(25)
"""Images carry no time; they are taken to follow each other at this rate."""

SOUND_RATE, SOUND_BIT_RATE = 48_000, 160_000
"""Samples a second of all sound that is read and written, and bits a second of what is written."""

SAMPLE_BUDGET = 500_000_000
"""Pixels that sampling may decode: 240 frames of 1920x1080, one to two seconds on two cores."""

CLEAR, CARRIED_PX = 0.05, 9
"""Below this alpha a WebM's colours are those around it, within so many pixels."""

# Numbers of ISO/IEC 23091-2 (H.273): matrix coefficients to swscale's colour spaces, and the two HDR transfers.
_SWS_COLOURSPACE = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}
_UNTAGGED, _RGB = 2, 0
_PQ, _HLG = 16, 18
_BT2020_PRIMARIES = 9
_FULL_RANGE = 2


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself, checked by decoding its first frame."""

    kind: str
    """`video` or `images`."""
    codec: str
    width: int
    height: int
    """Size of the upright picture with square pixels."""
    fps: str
    """Mean rate as a fraction, as tagged."""
    frames: int
    """Number of frames as tagged, 0 where untagged; headers lie, only decoding tells."""
    seconds: float
    orientation: str
    """`upright`, or what is done to the stored picture."""
    colour: str
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "warnings": list(self.warnings)}


class Frame:
    """One decoded frame: its number in the source, its time, and its pixels in the forms that are asked for."""

    def __init__(self, index: int, time: float, width: int, height: int) -> None:
        self.index = index
        self.time = time
        """Seconds from the first frame."""
        self.width = width
        self.height = height
        """Size of the upright picture with square pixels."""

    def luma(self) -> NDArray[np.uint8]:
        """Grey values [H, W], 0 black to 255 white."""
        grey = self._luma()
        return grey if self._opacity is None else _over_white(grey[..., None], self._opacity)[..., 0]

    def rgb(self, width: int | None = None, height: int | None = None) -> NDArray[np.uint8]:
        """The sRGB image [height, width, 3], averaged down to that size where one is given.

        What is not opaque lies over white, its colours taken for straight (not multiplied by the alpha).
        """
        size = width or self.width, height or self.height
        if self._opacity is None:
            return self._rgb(*size)
        # Blended before it is averaged: the colour of what is clear is anything.
        return _reduced(_over_white(self._rgb(self.width, self.height), self._opacity), size)

    def alpha(self, width: int | None = None, height: int | None = None) -> NDArray[np.uint8] | None:
        """The source's own alpha [height, width], 0 clear to 255 opaque, likewise; None where it has none."""
        size = width or self.width, height or self.height
        return None if self._opacity is None else _reduced(self._opacity, size)

    @functools.cached_property
    def _opacity(self) -> NDArray[np.uint8] | None:
        return self._alpha()

    def _luma(self) -> NDArray[np.uint8]:
        raise NotImplementedError

    def _rgb(self, width: int, height: int) -> NDArray[np.uint8]:
        raise NotImplementedError

    def _alpha(self) -> NDArray[np.uint8] | None:
        raise NotImplementedError


class _ImageFrame(Frame):
    def __init__(self, index: int, image: NDArray[np.uint8], alpha: NDArray[np.uint8] | None) -> None:
        super().__init__(index, float(index / IMAGE_FOLDER_FPS), image.shape[1], image.shape[0])
        self._image, self._own_alpha = image, alpha

    def _luma(self) -> NDArray[np.uint8]:
        import cv2

        return np.asarray(cv2.cvtColor(self._image, cv2.COLOR_RGB2GRAY), np.uint8)

    def _rgb(self, width: int, height: int) -> NDArray[np.uint8]:
        return _reduced(self._image, (width, height))

    def _alpha(self) -> NDArray[np.uint8] | None:
        return self._own_alpha


class _VideoFrame(Frame):
    """A frame of PyAV's; `twin` is the same frame from a decoder that knows its alpha, where the first does not."""

    def __init__(
        self, index: int, time: float, frame: Any, turn: tuple[int, int, int, int], aspect: Fraction, twin: Any = None
    ) -> None:
        self._frame, self._turn, self._twin = frame, turn, frame if twin is None else twin
        self._stored = (max(1, round(frame.width * aspect)), frame.height)
        size = self._stored if turn[0] else self._stored[::-1]
        super().__init__(index, time, *size)

    def _luma(self) -> NDArray[np.uint8]:
        return self._converted("gray", self.width, self.height)

    def _rgb(self, width: int, height: int) -> NDArray[np.uint8]:
        if self._frame.color_trc in (_PQ, _HLG):
            signal = self._converted("rgb48le", width, height)
            return to_standard_range(signal, "pq" if self._frame.color_trc == _PQ else "hlg")
        return self._converted("rgb24", width, height)

    def _alpha(self) -> NDArray[np.uint8] | None:
        about = next((component for component in self._twin.format.components if component.is_alpha), None)
        if about is None:
            return None
        # Planes are read as they are: swscale (FFmpeg 8) leaves out the last columns of their alpha at some widths.
        if len(self._twin.planes) == 4:
            return np.ascontiguousarray(_upright(self._alpha_plane(about.bits), self._turn))
        plane = self._reformatted(self._twin, "ya8", self.width, self.height).planes[0]
        height, width = (self.height, self.width) if self._turn[0] else (self.width, self.height)
        pairs = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, : 2 * width]
        return np.ascontiguousarray(_upright(pairs[:, 1::2], self._turn))

    def _alpha_plane(self, bits: int) -> NDArray[np.uint8]:
        """The fourth plane of the frame as it is stored, with square pixels, 0 to 255; deeper ones are rounded."""
        import cv2

        plane, kind = self._twin.planes[3], np.dtype("<u2" if bits > 8 else "u1")
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
            : plane.height, : plane.width * kind.itemsize
        ]
        values = np.ascontiguousarray(rows).view(kind)
        if bits > 8:
            most = (1 << bits) - 1
            values = ((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
        if values.shape[::-1] != self._stored:
            values = cv2.resize(values, self._stored, interpolation=cv2.INTER_LINEAR)
        return np.asarray(values, np.uint8)

    def _converted(self, pixel_format: str, width: int, height: int) -> NDArray[Any]:
        """The upright picture in a full-range format."""
        frame = self._reformatted(self._frame, pixel_format, width, height)
        return np.ascontiguousarray(_upright(frame.to_ndarray(), self._turn))

    def _reformatted(self, frame: Any, pixel_format: str, width: int, height: int) -> Any:
        """A frame as it is stored, in a full-range format; colour space and range are named, not left to defaults.

        Args:
            frame: PyAV's.
            pixel_format: FFmpeg's name.
            width, height: of the upright picture.
        """
        stored = (width, height) if self._turn[0] else (height, width)
        return frame.reformat(
            *stored,
            format=pixel_format,
            src_colorspace=_colourspace(frame, *self._stored),
            src_color_range="JPEG" if _is_full_range(frame) else "MPEG",
            dst_color_range="JPEG",
            interpolation="AREA" if stored != (frame.width, frame.height) else "BICUBIC",
        )


def _over_white(colour: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Straight colour [H, W, C] over white by alpha [H, W]."""
    return np.asarray(255 - ((255 - colour).astype(np.uint16) * alpha[..., None] + 127) // 255, np.uint8)


def _reduced(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """An image averaged down to a width and height."""
    import cv2

    if size == (image.shape[1], image.shape[0]):
        return image
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def probe(path: Path) -> VideoInfo:
    """What a video file or a folder of images is.

    Raises:
        UserError: it is missing, empty, no video, or nothing in it decodes.
    """
    if path.is_dir():
        files = image_files(path)
        height, width = _read_image(files[0])[0].shape[:2]
        seconds = float(len(files) / IMAGE_FOLDER_FPS)
        suffix = files[0].suffix[1:].lower()
        return VideoInfo(
            "images", suffix, width, height, str(IMAGE_FOLDER_FPS), len(files), seconds, "upright", "sRGB", ()
        )
    with open_container(path) as container:
        stream = container.streams.video[0]
        frame = first_frame(container, path)
        turn = _display_turn(frame)
        shown = _VideoFrame(0, 0.0, frame, turn, _pixel_aspect(stream, frame))
        space, full = _colourspace(frame, frame.width, frame.height), _is_full_range(frame)
        warnings = []
        if frame.colorspace == _UNTAGGED and frame.format.name.startswith("yuv"):
            standard = "BT.709" if space == "ITU709" else "BT.601"
            warnings.append(f"The colour standard is not tagged; {standard} is taken, as usual at this size.")
        if frame.color_trc in (_PQ, _HLG):
            name = "PQ" if frame.color_trc == _PQ else "HLG"
            warnings.append(f"The video is HDR ({name}); it is mapped to the standard range, highlights are dulled.")
        elif frame.color_primaries == _BT2020_PRIMARIES:
            warnings.append("The video has wide-gamut colours; they are shown a little pale.")
        if frame.interlaced_frame:
            warnings.append("The video is interlaced; fast motion will show combs.")
        seconds = float(container.duration or 0) / 1_000_000
        return VideoInfo(
            kind="video",
            codec=stream.codec_context.name,
            width=shown.width,
            height=shown.height,
            fps=str(stream.average_rate or stream.guessed_rate or IMAGE_FOLDER_FPS),
            frames=int(stream.frames),
            seconds=round(seconds, 3),
            orientation=_turn_name(turn),
            colour=f"{frame.format.name}, {space or 'RGB'}, {'full' if full else 'limited'} range",
            warnings=tuple(warnings),
        )


def read_frames(
    path: Path, *, threads: int = 2, on_damage: Callable[[str], None] = lambda text: None
) -> Iterator[Frame]:
    """Decode a video file or a folder of images, frame by frame, in order of time; only one frame is held.

    Times are the frames' own (presentation time stamps), so a variable rate is kept; they strictly increase.

    Args:
        path: the file or folder.
        threads: decoding threads.
        on_damage: told in words what could not be decoded; the frames that can be are delivered.

    Raises:
        UserError: it is missing, empty, no video, nothing in it decodes, or an image differs in size.
    """
    if path.is_dir():
        yield from _read_images(path)
        return
    import av

    with open_container(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        step = float(1 / (stream.average_rate or stream.guessed_rate or IMAGE_FOLDER_FPS))
        index, start, last, broken = 0, None, -math.inf, 0
        alpha_decoder, twins = _alpha_decoder(stream, threads), dict[int, Any]()
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                on_damage(f"the file breaks off after frame {index}: {error.strerror}")
                packet = None
            try:
                frames = stream.decode(packet) if packet is not None else stream.decode(None)
            except av.error.EOFError:
                frames = []
            except av.error.FFmpegError:
                frames, broken = [], broken + 1
            if alpha_decoder is not None:
                with contextlib.suppress(av.error.FFmpegError):  # the other decoder meets the same damage and tells
                    twins |= {twin.pts: twin for twin in alpha_decoder.decode(packet) if twin.pts is not None}
            for frame in frames:
                stamp = float(frame.time) if frame.time is not None else None
                start = stamp if start is None else start
                time = stamp - start if stamp is not None and start is not None else last + step
                time = time if time > last else last + step / 100
                last = time
                turn, aspect = _display_turn(frame), _pixel_aspect(stream, frame)
                twin = twins.pop(frame.pts, None)
                if twin is not None:  # those of frames that did not decode must not pile up
                    twins = {stamp: other for stamp, other in twins.items() if stamp > frame.pts}
                yield _VideoFrame(index, max(time, 0.0), frame, turn, aspect, twin)
                index += 1
            if packet is None or (packet.dts is None and not packet.size):
                break
        if broken:
            on_damage(f"{broken} parts of the file could not be decoded")
        if not index:
            raise UserError(f"No frame of '{path}' can be decoded.", "check that it plays, and copy or record it again")


def _alpha_decoder(stream: Any, threads: int) -> Any:
    """A second decoder for VP8 and VP9 with alpha, which FFmpeg's own pass over; None for all other streams.

    It is libvpx's; it knows neither the display matrix nor the colours of the container, so only its alpha is used.
    """
    import av

    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    tagged = {key.lower(): value for key, value in stream.metadata.items()}
    if name is None or tagged.get("alpha_mode") != "1":
        return None
    decoder = av.CodecContext.create(name, "r")
    decoder.thread_count = threads
    return decoder


def sample_frames(path: Path, count: int, *, threads: int = 2) -> Iterator[Frame]:
    """About `count` frames spread over a video or a folder of images, in order of time, without decoding all of it.

    Each is reached from the key frame before it. Where that asks for more than `SAMPLE_BUDGET`, the frames are drawn
    nearer to their key frames, in the end onto these, of which there may be fewer. A file that does not tell its length
    is sampled twice a second from its start. Frames that do not decode are left out. The frames' numbers are computed
    from their times.

    Raises:
        UserError: it is missing, empty, no video, or nothing in it decodes.
    """
    if path.is_dir():
        files = image_files(path)
        for index in np.unique(np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)):
            yield _ImageFrame(int(index), *_read_image(files[index]))
        return
    with open_container(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        rate = float(stream.average_rate or stream.guessed_rate or IMAGE_FOLDER_FPS)
        start = float((stream.start_time or 0) * stream.time_base)
        if not container.duration:
            every = max(1, round(rate / 2))
            frames = read_frames(path, threads=threads)
            yield from itertools.islice(frames, 0, every * count, every)
            return
        seconds = float(container.duration) / 1_000_000
        targets = [start + (place + 0.5) * seconds / count for place in range(count)]
        spans: dict[float, tuple[float, list[float]]] = {}
        for target in targets:
            key, entry = _key_before(container, stream, target, start)
            spans.setdefault(key, (entry, []))[1].append(target)
        # A key frame and the few that the decoder is ahead of what it shows are decoded in any case.
        afford = SAMPLE_BUDGET / max(1, stream.width * stream.height) - 4 * len(spans)
        asked = rate * sum(span[-1] - key for key, (_, span) in spans.items())
        if asked > afford:
            # Frames that no other needs are up to half of a file's and need not be decoded to reach the rest.
            stream.codec_context.skip_frame = "NONREF"
        share = min(1.0, max(0.0, afford) / max(1.0, asked))
        shown = -math.inf
        for key, (entry, span) in spans.items():
            wanted = [key + share * (target - key) for target in span]
            spare: tuple[Any, float] | None = None
            for frame, time in _decode_span(container, stream, key, entry, wanted[-1], 1 / rate):
                if time > shown:
                    spare = frame, time
                    if wanted and time >= wanted[0] - 0.5 / rate:
                        wanted = [later for later in wanted if later > time + 0.5 / rate]
                        shown, spare = time, None
                        yield _sample(stream, frame, time - start, rate)
            if wanted and spare is not None:
                shown = spare[1]
                yield _sample(stream, spare[0], shown - start, rate)
        if shown == -math.inf:
            raise UserError(f"No frame of '{path}' can be decoded.", "check that it plays, and copy or record it again")


def _sample(stream: Any, frame: Any, time: float, rate: float) -> Frame:
    turn, aspect = _display_turn(frame), _pixel_aspect(stream, frame)
    return _VideoFrame(max(0, round(time * rate)), max(0.0, time), frame, turn, aspect)


def _key_before(container: Any, stream: Any, time: float, start: float) -> tuple[float, float]:
    """Time of the key frame from which `time` is reached, and the time to seek to for it to come next.

    Without a key frame before it, that is the file's start.
    """
    import av

    for back in (0.0, 1.0, 4.0, 16.0):
        entry = time - back
        try:
            container.seek(int(entry / stream.time_base), stream=stream, backward=True)
            found = None
            for number, packet in enumerate(container.demux(stream)):
                if packet.pts is None or packet.dts is None or float(packet.dts * stream.time_base) > time:
                    break
                key = float(packet.pts * stream.time_base)
                if packet.is_keyframe and key <= time:
                    found = key
                    # With an index, the file is entered at the key frame; without, it may be followed by others.
                    if number == 0 and not back:
                        break
            if found is not None:
                return found, entry
        except av.error.FFmpegError:
            break
    return start, start - 1


def _decode_span(
    container: Any, stream: Any, key: float, entry: float, until: float, step: float
) -> Iterator[tuple[Any, float]]:
    """Decoded frames with their times, from a key frame on to about `until`; damaged ones are left out.

    Args:
        key: time of the key frame.
        entry: time to seek to.
        until: when to stop.
        step: seconds from frame to frame where there are no time stamps.
    """
    import av

    time, fed, begun = entry - step, entry, False
    try:
        container.seek(int(entry / stream.time_base), stream=stream, backward=True)
        for packet in itertools.chain(container.demux(stream), [None]):
            begun = begun or packet is None or packet.pts is None or float(packet.pts * stream.time_base) >= key - 1e-6
            stamp = packet and (packet.dts if packet.dts is not None else packet.pts)
            fed = float(stamp * stream.time_base) if stamp is not None else fed + step
            # A packet comes in the order of decoding, before or with its time of presentation.
            done = packet is None or not packet.size or fed > until + 1e-6
            frames: list[Any] = []
            if begun:
                with contextlib.suppress(av.error.FFmpegError):
                    frames = stream.decode(None if done else packet)
            for frame in frames:
                # A frame that is drained from the decoder has its stamp, but no `time`.
                time = float(frame.pts * stream.time_base) if frame.pts is not None else time + step
                yield frame, time
            if done:
                return
    except av.error.FFmpegError:
        return


def image_files(folder: Path) -> list[Path]:
    """The images of a folder in the order of their names, numbers by value (`2.png` before `10.png`).

    Raises:
        UserError: there are none.
    """
    files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()]
    if not files:
        raise UserError(
            f"There are no images in the folder '{folder}'.",
            f"name a video, or a folder with files that end in {', '.join(IMAGE_SUFFIXES)}",
        )
    return sorted(files, key=natural_order)


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sorts names as people do: numbers by value, without regard to case."""
    import re

    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name.lower())]


def to_standard_range(signal: NDArray[np.uint16], transfer: str) -> NDArray[np.uint8]:
    """HDR to sRGB: BT.2100's transfer to light, BT.2020 to BT.709 primaries, and a shoulder for the highlights.

    The reference white of BT.2408 (203 cd/m2) becomes 0.8 of the light of sRGB's white; what is brighter, up to
    1000 cd/m2, is compressed into the rest.

    Args:
        signal: full-range R'G'B' [H, W, 3], 0 to 65535.
        transfer: `pq` or `hlg` (the latter shown at 1000 cd/m2, system gamma 1.2).
    """
    import cv2

    levels = np.linspace(0, 1, 4096)
    if transfer == "pq":
        root = levels ** (1 / 78.84375)
        table = 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        table = np.where(levels <= 0.5, levels**2 / 3, (np.exp((levels - c) / a) + b) / 12)
    light = table.astype(np.float32)[signal >> 4]
    if transfer == "hlg":
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= 1000 * np.maximum(luminance, 1e-6)[..., None] ** 0.2
    to_bt709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    light = np.maximum(cv2.transform(light, to_bt709.astype(np.float32)) * np.float32(0.8 / 203), 0)
    peak, knee, top = light.max(axis=-1, keepdims=True), 0.7, 0.8 * 1000 / 203
    over = np.clip((peak - knee) / (top - knee), 0, 1)
    # Rises from the knee with slope 1 and reaches 1 at the top; it scales all channels alike, which keeps the hue.
    slope = (top - knee) / (1 - knee)
    shoulder = knee + (1 - knee) * slope * over / (1 + (slope - 1) * over)
    light *= np.where(peak > knee, shoulder / np.maximum(peak, 1e-6), 1)
    steps = np.linspace(0, 1, 4096)
    srgb = np.where(steps <= 0.0031308, 12.92 * steps, 1.055 * steps ** (1 / 2.4) - 0.055)
    return np.round(srgb * 255).astype(np.uint8)[np.clip(light * 4095 + 0.5, 0, 4095).astype(np.uint16)]


def read_image(file: Path) -> Frame:
    """An image as a frame, upright.

    Raises:
        UserError: it cannot be read.
    """
    return _ImageFrame(0, *_read_image(file))


def _read_images(folder: Path) -> Iterator[Frame]:
    size: tuple[int, ...] | None = None
    for index, file in enumerate(image_files(folder)):
        image, alpha = _read_image(file)
        size = size or image.shape
        if image.shape != size:
            raise UserError(
                f"'{file}' is {image.shape[1]}x{image.shape[0]}, the images before it are {size[1]}x{size[0]}.",
                "give images of one size",
            )
        yield _ImageFrame(index, image, alpha)


def _read_image(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """An upright image [H, W, 3], and its straight alpha [H, W] where it has one.

    Raises:
        UserError: it cannot be read.
    """
    import cv2

    data = file.read_bytes()
    both = _with_alpha(data) if file.suffix.lower() in _ALPHA_SUFFIXES else None
    if both is not None:
        return np.ascontiguousarray(both[..., :3]), np.ascontiguousarray(both[..., 3])
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise UserError(f"'{file}' is not an image that can be read.", "remove it from the folder or replace it")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8), None


def _with_alpha(data: bytes) -> NDArray[np.uint8] | None:
    """An upright image [H, W, 4] whose colours are straight; None where it has no alpha, or Pillow cannot read it.

    Pillow, because OpenCV hands out TIFF's colours multiplied by the alpha, and leaves images with alpha unturned.
    """
    import io

    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            if not image.has_transparency_data:
                return None
            return np.asarray(ImageOps.exif_transpose(image).convert("RGBA"), np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def open_container(path: Path, *, sound_is_enough: bool = False) -> Any:
    """An opened container with a video stream, or with one of either kind. Only plain files: a playlist cannot make it
    open a connection.

    Raises:
        UserError: there is no such file, or it is none of this kind.
    """
    import av

    if not path.exists():
        raise UserError(f"There is no file '{path}'.", "check the path")
    if not path.is_file():
        raise UserError(f"'{path}' is neither a file nor a folder.", "name a video file or a folder of images")
    if not path.stat().st_size:
        raise UserError(f"'{path}' is empty (0 bytes).", "copy or record it again")
    try:
        container = av.open(f"file:{path.resolve()}", options={"protocol_whitelist": "file"})
    except PermissionError:
        raise UserError(f"'{path}' may not be read.", "change its permissions") from None
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(
            f"'{path}' is not a video that can be read ({error.strerror or error}).",
            "name a video file such as .mp4, .mov or .webm; if it is one, it may be cut off: copy or record it again",
        ) from None
    if not container.streams.video and not (sound_is_enough and container.streams.audio):
        container.close()
        raise UserError(f"'{path}' holds no pictures, only sound or text.", "name a video file")
    return container


def first_frame(container: Any, path: Path) -> Any:
    """The first picture of an opened container.

    Raises:
        UserError: none can be decoded.
    """
    import av

    try:
        for frame in container.decode(video=0):
            return frame
    except av.error.FFmpegError as error:
        raise UserError(f"No frame of '{path}' can be decoded ({error.strerror}).", "copy or record it again") from None
    raise UserError(f"No frame of '{path}' can be decoded.", "check that it plays, and copy or record it again")


def _display_turn(frame: Any) -> tuple[int, int, int, int]:
    """The rotation and flip that make a frame upright, as the 2x2 part of its display matrix with entries -1, 0, 1.

    The matrix takes stored x, y to (a x + c y, b x + d y). PyAV's `rotation` alone cannot tell a flip from a turn.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            matrix = np.frombuffer(bytes(data), np.int32)[:5].astype(float)
            a, b, c, d = matrix[[0, 1, 3, 4]]
            if abs(a) >= abs(b):
                return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
            return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)
    return (1, 0, 0, 1)


def _upright(image: NDArray[Any], turn: tuple[int, int, int, int]) -> NDArray[Any]:
    a, b, c, d = turn
    if not a:
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: d or 1, :: a or 1]


def _turn_name(turn: tuple[int, int, int, int]) -> str:
    a, b, c, d = turn
    if turn == (1, 0, 0, 1):
        return "upright"
    mirrored = a * d - b * c < 0
    degrees = {(-1, 0): "180", (0, 1): "90", (0, -1): "270"}.get((a, b), "0")
    return f"turned {degrees} degrees clockwise" + (", mirrored" if mirrored else "")


def _pixel_aspect(stream: Any, frame: Any) -> Fraction:
    """Width of a stored pixel over its height."""
    aspect = stream.sample_aspect_ratio
    return Fraction(aspect) if aspect else Fraction(1)


def _colourspace(frame: Any, width: int, height: int) -> str | None:
    """swscale's name for the frame's colour matrix; untagged ones are told by size; None where the pixels are RGB."""
    if frame.colorspace == _RGB or frame.format.is_rgb:
        return None
    by_size = "ITU709" if height >= 720 or width >= 1280 else "ITU601"
    return _SWS_COLOURSPACE.get(frame.colorspace, by_size)


def _is_full_range(frame: Any) -> bool:
    return bool(frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj") or frame.format.is_rgb)


def write_video(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    fps: Fraction | float,
    *,
    sound: Iterable[NDArray[np.int16]] | None = None,
    crf: int = 20,
    threads: int = 2,
) -> None:
    """Write an H.264 file that every browser plays: 4:2:0, BT.709, index at the front. Equal frames give equal bytes.

    Args:
        path: the file, replaced at the end in one step.
        frames: sRGB images [H, W, 3] of one size; an odd side is extended by repeating its last row or column.
        fps: frames a second; a float is taken for the nearest simple fraction (29.97 is 30000/1001).
        sound: pieces [n, 2] of stereo at `SOUND_RATE` (`pipeline.sound`), written as AAC; the first sample belongs to
            the start of the first frame.
        crf: x264's quality, 0 lossless to 51.
        threads: the encoder's; part of what decides the bytes, hence not the machine's count.

    Raises:
        ValueError: there are no frames, or they differ in size.
    """
    import av

    height, width, images = _of_one_size(frames, 3, path)
    rate = simple_rate(fps)
    with (
        _replacing(path) as temporary,
        av.open(temporary, "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as file,
    ):
        stream = file.add_stream("libx264", rate=rate)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        # x264's macroblock tree was seen to give other bytes now and then for the same frames.
        stream.options = {"crf": str(crf), "preset": "medium", "threads": str(threads), "x264-params": "mbtree=0"}
        _mark_bt709(stream.codec_context)
        track = None if sound is None else _SoundTrack(file, sound)
        for index, image in enumerate(images):
            file.mux(stream.encode(_subsampled(image, index)))
            if track is not None:
                track.write_until(float((index + 1) / rate))
        file.mux(stream.encode(None))
        if track is not None:
            track.finish()


def write_webm(
    path: Path, frames: Iterable[NDArray[np.uint8]], fps: Fraction | float, *, crf: int = 18, threads: int = 2
) -> None:
    """Write a WebM file with alpha, VP9 4:2:0, BT.709, as browsers show it over what is behind.

    Args:
        path: the file, replaced at the end in one step.
        frames: sRGB images with straight alpha [H, W, 4] of one size; an odd side is extended as in `write_video`.
        fps: frames a second; a float is taken for the nearest simple fraction.
        crf: VP9's quality, 0 lossless to 63.
        threads: the encoder's.

    Raises:
        ValueError: there are no frames, or they differ in size.
    """
    import av

    height, width, images = _of_one_size(frames, 4, path)
    with (
        _replacing(path) as temporary,
        av.open(temporary, "w", format="webm", options={"fflags": "+bitexact"}) as file,
    ):
        stream = file.add_stream("libvpx-vp9", rate=simple_rate(fps))
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuva420p"
        stream.bit_rate = 0  # the quality alone decides
        # A frame that is kept back for later ones has no alpha of its own: libvpx refuses alt-ref frames with alpha.
        settings = {"crf": crf, "deadline": "good", "cpu-used": 4, "row-mt": 1, "threads": threads, "auto-alt-ref": 0}
        stream.options = {name: str(value) for name, value in settings.items()}
        stream.metadata["alpha_mode"] = "1"
        _mark_bt709(stream.codec_context)
        for index, image in enumerate(images):
            file.mux(stream.encode(_subsampled(_carried_on(image), index)))
        file.mux(stream.encode(None))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """A file to write that takes the place of `path` at the end."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield temporary
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _of_one_size(
    frames: Iterable[NDArray[np.uint8]], channels: int, path: Path
) -> tuple[int, int, Iterator[NDArray[np.uint8]]]:
    """Height and width of the first frame, and all of them, checked as they pass."""
    stream = iter(frames)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"no frames to write to {path}")
    height, width = first.shape[:2]

    def checked() -> Iterator[NDArray[np.uint8]]:
        for index, image in enumerate(itertools.chain([first], stream)):
            if image.shape != (height, width, channels) or image.dtype != np.uint8:
                wanted = f"uint8 ({height}, {width}, {channels})"
                raise ValueError(f"frame {index} is {image.dtype} {image.shape}, not {wanted}")
            yield image

    return height, width, checked()


def _mark_bt709(context: Any) -> None:
    """Say that colours are BT.709 of limited range, as `_subsampled` makes them."""
    context.colorspace = context.color_primaries = context.color_trc = 1
    context.color_range = 1


def _subsampled(image: NDArray[np.uint8], index: int) -> Any:
    """A picture [H, W, 3 or 4] as an even-sided 4:2:0 frame, with alpha where it has some."""
    import av

    height, width, channels = image.shape
    even = np.ascontiguousarray(np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
    frame = av.VideoFrame.from_ndarray(even, format="rgb24" if channels == 3 else "rgba")
    frame = frame.reformat(
        format="yuv420p" if channels == 3 else "yuva420p",
        dst_colorspace="ITU709",
        dst_color_range="MPEG",
        interpolation="AREA",
    )
    frame.pts = index
    return frame


def _carried_on(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture [H, W, 4] with its colours carried outwards: chroma that pixels share gets no black from outside."""
    import cv2

    alpha = image[..., 3:].astype(np.float32) / 255
    colour = image[..., :3].astype(np.float32)
    kernel = (CARRIED_PX, CARRIED_PX)
    around = cv2.blur(colour * alpha, kernel) / np.maximum(cv2.blur(alpha, kernel), 1e-6)[..., None]
    carried = np.where(alpha > CLEAR, colour, around)
    return np.concatenate([carried.clip(0, 255).astype(np.uint8), image[..., 3:]], -1)


class _SoundTrack:
    """The AAC stream of a file at work, written in step with its pictures so that both lie side by side."""

    def __init__(self, file: Any, pieces: Iterable[NDArray[np.int16]]) -> None:
        self._file, self._pieces, self._samples = file, iter(pieces), 0
        self._stream = file.add_stream("aac", rate=SOUND_RATE)
        self._stream.layout, self._stream.bit_rate = "stereo", SOUND_BIT_RATE

    def write_until(self, seconds: float) -> None:
        """Write the pieces that begin before this time."""
        while self._samples < seconds * SOUND_RATE and self._write_piece():
            pass

    def finish(self) -> None:
        """Write what is left."""
        while self._write_piece():
            pass
        self._file.mux(self._stream.encode(None))

    def _write_piece(self) -> bool:
        import av

        piece = next(self._pieces, None)
        if piece is None:
            return False
        frame = av.AudioFrame.from_ndarray(piece.reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, self._samples, Fraction(1, SOUND_RATE)
        self._samples += len(piece)
        self._file.mux(self._stream.encode(frame))
        return True


def simple_rate(fps: Fraction | float) -> Fraction:
    """A frame rate as the fraction that is meant: 29.97 and 29.970029 give 30000/1001."""
    if isinstance(fps, Fraction):
        return fps
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    if abs(float(ntsc) - fps) < 5e-3 and abs(fps - round(fps)) > 1e-3:
        return ntsc
    return Fraction(fps).limit_denominator(1001)
