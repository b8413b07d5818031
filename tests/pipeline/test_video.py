"""Videos are read upright, in true colours, with their own times; what cannot be read is refused in words."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import video
from pipeline.errors import UserError
from pipeline.video import (
    image_files,
    probe,
    read_frames,
    sample_frames,
    simple_rate,
    to_standard_range,
    write_video,
    write_webm,
)

WIDTH, HEIGHT = 96, 64
RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 40), (40, 60, 210), (235, 235, 235)


def quadrants() -> NDArray[np.uint8]:
    """Red, green over blue, white: every turn and flip of it is different."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[: HEIGHT // 2, : WIDTH // 2], image[: HEIGHT // 2, WIDTH // 2 :] = RED, GREEN
    image[HEIGHT // 2 :, : WIDTH // 2], image[HEIGHT // 2 :, WIDTH // 2 :] = BLUE, WHITE
    return image


def encode(path: Path, images: list[NDArray[np.uint8]], **options: Any) -> Path:
    """Write a file with chosen tags: colour space, range, transfer, pixel format, time stamps, pixel shape."""
    space, full = options.get("space", 1), options.get("full", False)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = options.get("pix_fmt", "yuv420p")
        stream.options = {"crf": "8", "preset": "veryfast"}
        stream.codec_context.time_base = Fraction(1, 1000)
        context = stream.codec_context
        context.colorspace = options.get("tagged_space", space)
        context.color_range = 2 if full else 1
        context.color_trc = options.get("transfer", 1)
        if "aspect" in options:
            context.sample_aspect_ratio = options["aspect"]
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format=stream.pix_fmt,
                dst_colorspace={1: "ITU709", 5: "ITU601"}[space],
                dst_color_range="JPEG" if full else "MPEG",
            )
            frame.pts = options["pts"][index] if "pts" in options else round(index * 1000 / 30)
            frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(float) - b).mean())


def turned(path: Path, *options: str) -> Path:
    """The file with another display matrix, as FFmpeg writes it."""
    import subprocess

    import imageio_ffmpeg

    target = path.with_stem(path.stem + "-turned")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *options, "-i", str(path), "-c", "copy"]
    subprocess.run([*command, str(target)], check=True)
    return target


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("-display_rotation", "90"), lambda image: np.rot90(image, 1)),
        (("-display_rotation", "180"), lambda image: np.rot90(image, 2)),
        (("-display_rotation", "270"), lambda image: np.rot90(image, 3)),
        (("-display_hflip",), lambda image: image[:, ::-1]),
        (("-display_vflip",), lambda image: image[::-1]),
    ],
)
def test_rotation_and_flips_are_undone(tmp_path: Path, options: tuple[str, ...], shown: Any) -> None:
    path = turned(encode(tmp_path / "a.mp4", [quadrants()] * 3), *options)
    expected = shown(quadrants())
    frame = next(iter(read_frames(path)))
    assert frame.rgb().shape == expected.shape
    assert difference(frame.rgb(), expected) < 4
    assert (frame.width, frame.height) == (expected.shape[1], expected.shape[0])
    assert probe(path).width == expected.shape[1]
    assert probe(path).orientation != "upright"
    small = frame.rgb(expected.shape[1] // 2, expected.shape[0] // 2)
    assert small.shape == (expected.shape[0] // 2, expected.shape[1] // 2, 3)


@pytest.mark.parametrize("space", [1, 5])
@pytest.mark.parametrize("full", [False, True])
def test_tagged_colours_come_out_right(tmp_path: Path, space: int, full: bool) -> None:
    path = encode(tmp_path / "a.mp4", [quadrants()] * 2, space=space, full=full)
    assert difference(next(iter(read_frames(path))).rgb(), quadrants()) < 3


@pytest.mark.parametrize(("size", "space", "standard"), [((720, 1280), 1, "BT.709"), ((64, 96), 5, "BT.601")])
def test_untagged_colours_are_told_by_size_and_said(
    tmp_path: Path, size: tuple[int, int], space: int, standard: str
) -> None:
    image = cv2.resize(quadrants(), size[::-1], interpolation=cv2.INTER_NEAREST)
    path = encode(tmp_path / "a.mp4", [image] * 2, space=space, tagged_space=2, transfer=2)
    assert difference(next(iter(read_frames(path))).rgb(), image) < 2
    assert probe(path).warnings == (f"The colour standard is not tagged; {standard} is taken, as usual at this size.",)


def test_variable_rates_keep_their_times(tmp_path: Path) -> None:
    stamps = [500, 533, 600, 1000, 1011]
    path = encode(tmp_path / "a.mkv", [quadrants()] * 5, pts=stamps)
    times = [frame.time for frame in read_frames(path)]
    assert times == pytest.approx([(stamp - 500) / 1000 for stamp in stamps], abs=2e-3)


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [quadrants()] * 2, aspect=Fraction(4, 3))
    assert next(iter(read_frames(path))).rgb().shape == (HEIGHT, WIDTH * 4 // 3, 3)


def test_hdr_is_mapped_and_said(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [quadrants()] * 2, transfer=18)
    assert "it is mapped to the standard range" in probe(path).warnings[0]
    image = next(iter(read_frames(path))).rgb()
    assert image.dtype == np.uint8
    assert image.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(("transfer", "white"), [("hlg", 0.75), ("pq", 0.5807)])
def test_hdr_reference_white_and_black(transfer: str, white: float) -> None:
    levels = np.array([0, white, 1.0])
    signal = np.repeat(np.round(levels * 65535), 3).reshape(1, 3, 3).astype(np.uint16)
    grey = to_standard_range(signal, transfer)[0]
    assert (np.ptp(grey.astype(int), axis=-1) <= 1).all()  # grey stays grey
    assert grey[0, 0] == 0
    assert 215 < grey[1, 0] < 235
    assert grey[2, 0] >= 254


@pytest.mark.parametrize("transfer", ["hlg", "pq"])
def test_hdr_mapping_rises(transfer: str) -> None:
    ramp = np.repeat(np.linspace(0, 65535, 500), 3).reshape(1, 500, 3).astype(np.uint16)
    grey = to_standard_range(ramp, transfer)[0, :, 0].astype(int)
    assert (np.diff(grey) >= 0).all()


def test_frames_are_counted_by_decoding_not_by_the_header(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [np.roll(quadrants(), 7 * i, axis=1) for i in range(12)])
    assert sum(1 for _ in read_frames(path)) == 12


def test_a_cut_off_file_gives_what_decodes_and_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (64, 96, 3), np.uint8) for _ in range(40)]
    write_video(tmp_path / "whole.mp4", images, 30)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    damage: list[str] = []
    count = sum(1 for _ in read_frames(tmp_path / "cut.mp4", on_damage=damage.append))
    assert 5 < count < 40
    assert probe(tmp_path / "cut.mp4").frames == 40  # the header still promises all of them


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "text.mp4").write_text("This is not a video.\n" * 50)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "none").mkdir()
    with av.open(str(folder / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttps://example.org/a.ts\n#EXT-X-ENDLIST\n")
    return {
        "missing": (folder / "missing.mp4", "There is no file"),
        "text": (folder / "text.mp4", "is not a video that can be read"),
        "empty": (folder / "empty.mp4", r"is empty \(0 bytes\)"),
        "folder": (folder / "none", "There are no images in the folder"),
        "sound": (folder / "sound.mp4", "holds no pictures"),
        "playlist": (folder / "list.m3u8", "can be read|can be decoded|holds no pictures"),
    }


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "folder", "sound", "playlist"])
def test_what_is_no_video_is_refused_in_words(tmp_path: Path, kind: str) -> None:
    path, message = bad_files(tmp_path)[kind]
    with pytest.raises(UserError, match=message) as caught:
        probe(path)
    assert str(path) in caught.value.what
    assert caught.value.fix
    with pytest.raises(UserError, match=message):
        list(read_frames(path))


def test_a_folder_of_images_is_read_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        image = np.full((70, 80, 3), number * 10, np.uint8)
        cv2.imwrite(str(tmp_path / f"shot{number}.png"), image)
    (tmp_path / "notes.txt").write_text("x")
    assert [file.stem for file in image_files(tmp_path)] == ["shot1", "shot2", "shot10"]
    frames = list(read_frames(tmp_path))
    assert [int(frame.rgb()[0, 0, 0]) for frame in frames] == [10, 20, 100]
    assert probe(tmp_path).frames == 3


def test_images_of_different_sizes_are_refused_by_name(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((70, 80, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((80, 70, 3), np.uint8))
    with pytest.raises(UserError, match=r"b\.png' is 70x80, the images before it are 80x70"):
        list(read_frames(tmp_path))


def test_written_videos_are_equal_byte_by_byte_and_play_anywhere(tmp_path: Path) -> None:
    image = cv2.resize(quadrants(), (95, 63), interpolation=cv2.INTER_NEAREST)  # odd sides
    digests = set()
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, [np.roll(image, shift, axis=1) for shift in range(9)], Fraction(30000, 1001))
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    information = probe(tmp_path / "a.mp4")
    assert (information.codec, information.width, information.height) == ("h264", 96, 64)
    assert information.fps == "30000/1001"
    assert information.colour == "yuv420p, ITU709, limited range"
    assert not information.warnings
    frames = list(read_frames(tmp_path / "a.mp4"))
    assert len(frames) == 9
    assert difference(frames[0].rgb()[:63, :95], image) < 6
    assert b"moov" in (tmp_path / "a.mp4").read_bytes()[:256]  # the index comes first: it plays while it loads


def test_a_webm_keeps_alpha_and_colours_up_to_the_edge(tmp_path: Path) -> None:
    """A disc of one colour on nothing, which moves: decoded, it composes over green as the original does."""
    y, x = np.mgrid[:48, :64]
    given = []
    for shift in range(6):
        alpha = np.clip(14 - np.hypot(x - 22 - 2 * shift, y - 24), 0, 1)
        colour = np.where(alpha[..., None] > 0, [200, 60, 40], 0)
        given.append(np.concatenate([colour, 255 * alpha[..., None] + 0.5], -1).astype(np.uint8))
    write_webm(tmp_path / "disc.webm", given, Fraction(30000, 1001))
    assert probe(tmp_path / "disc.webm").fps == "30000/1001"
    shown = list(read_frames(tmp_path / "disc.webm"))
    assert len(shown) == len(given)
    for frame, image in zip(shown, given, strict=True):
        alpha = frame.alpha()
        assert alpha is not None
        assert np.abs(alpha.astype(int) - image[..., 3]).mean() < 1.5
        pairs = ((frame.rgb(), alpha), (image[..., :3], image[..., 3]))
        over = [a[..., None] / 255 * c + (1 - a[..., None] / 255) * [0, 177, 64] for c, a in pairs]
        assert np.abs(over[0] - over[1]).mean() < 2.5
        assert np.abs(over[0] - over[1]).max() < 60
    assert [path.name for path in tmp_path.iterdir()] == ["disc.webm"]


def test_write_video_refuses_nothing_and_mixed_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "a.mp4", [], 25)
    with pytest.raises(ValueError, match="frame 1 is uint8"):
        write_video(tmp_path / "a.mp4", [np.zeros((64, 64, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)], 25)
    with pytest.raises(ValueError, match=r"not uint8 \(64, 64, 4\)"):
        write_webm(tmp_path / "a.webm", [np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3), np.uint8)], 25)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "meant"),
    [(29.97, "30000/1001"), (23.976, "24000/1001"), (25.0, "25"), (30.0, "30"), (12.5, "25/2"), (59.94, "60000/1001")],
)
def test_rates_are_fractions(given: float, meant: str) -> None:
    assert simple_rate(given) == Fraction(meant)


def ramp(path: Path, frames: int, key_every: int) -> Path:
    """A video at 25 frames a second whose frame number can be read off its grey value."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "4", "preset": "veryfast", "g": str(key_every), "sc_threshold": "0", "bf": "2"}
        for index in range(frames):
            image = np.full((HEIGHT, WIDTH, 3), 20 + index, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode(None))
    return path


def number(frame: video.Frame) -> float:
    return float(frame.luma().mean()) - 20


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_samples_are_spread_and_are_the_frames_that_they_say(tmp_path: Path, suffix: str) -> None:
    samples = list(sample_frames(ramp(tmp_path / f"a.{suffix}", 200, 30), 20))
    assert len(samples) == 20
    numbers = np.array([number(sample) for sample in samples])
    np.testing.assert_allclose(numbers, np.arange(20) * 10 + 5, atol=3)
    # AVI has no times of presentation; its frames come as late as the decoder is ahead.
    np.testing.assert_allclose([sample.time for sample in samples], numbers / 25, atol=0.13)
    np.testing.assert_allclose([sample.index for sample in samples], numbers, atol=3.5)


def test_a_long_clip_is_sampled_without_decoding_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ramp(tmp_path / "a.mp4", 200, 25)
    decoded = []
    whole = video._decode_span

    def counted(*arguments: Any) -> Any:
        for pair in whole(*arguments):
            decoded.append(pair)
            yield pair

    monkeypatch.setattr(video, "_decode_span", counted)
    monkeypatch.setattr(video, "SAMPLE_BUDGET", 60 * WIDTH * HEIGHT)
    numbers = [number(sample) for sample in sample_frames(path, 24)]
    assert len(decoded) <= 60
    assert 16 <= len(numbers) <= 24
    assert max(np.diff(numbers, prepend=0, append=200)) < 30, "every stretch of the clip is seen"
    assert np.diff(numbers).min() > 0.5, "no frame comes twice"


def test_a_short_clip_gives_every_frame_once(tmp_path: Path) -> None:
    numbers = [number(sample) for sample in sample_frames(ramp(tmp_path / "a.mp4", 12, 5), 60)]
    np.testing.assert_allclose(numbers, np.arange(12), atol=1)


def test_a_stream_without_length_is_sampled_from_its_start(tmp_path: Path) -> None:
    numbers = [number(sample) for sample in sample_frames(ramp(tmp_path / "a.h264", 100, 10), 60)]
    assert len(numbers) >= 5
    assert (np.diff(numbers) > 0).all()


def test_of_a_folder_only_the_sampled_images_are_read(tmp_path: Path) -> None:
    for index in range(101):
        (tmp_path / f"{index}.png").write_bytes(b"broken")
    for index in (0, 50, 100):
        (tmp_path / f"{index}.png").write_bytes(cv2.imencode(".png", np.full((8, 8, 3), index, np.uint8))[1].tobytes())
    samples = list(sample_frames(tmp_path, 3))
    assert [(sample.index, int(sample.rgb()[0, 0, 0]), sample.time) for sample in samples] == [
        (0, 0, 0.0),
        (50, 50, 2.0),
        (100, 100, 4.0),
    ]


def test_sampling_refuses_what_reading_refuses(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video " * 99)
    with pytest.raises(UserError, match="not a video"):
        next(sample_frames(tmp_path / "a.mp4", 3))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no images"):
        next(sample_frames(tmp_path / "folder", 3))
