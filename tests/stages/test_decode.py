"""Decode keeps the frames of every shot, once each, without bars and black, in flat memory, and resumes."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from alpha_clips import ALPHA_VIDEOS, movie, turned
from numpy.typing import NDArray

from pipeline import video
from pipeline.config import Config, DecodeConfig
from pipeline.dataset import Dataset, Subject
from pipeline.errors import Interrupted, UserError
from pipeline.frames import FrameSet
from pipeline.source import register_source
from pipeline.stage import outputs_digest, run_stage
from pipeline.video import write_video
from stages import decode

Image = NDArray[np.uint8]


def moving(count: int, seed: int = 0, size: tuple[int, int] = (120, 90)) -> list[Image]:
    """Frames of a smooth texture that slides by 2 pixels a frame."""
    width, height = size
    rng = np.random.default_rng(seed)
    tint = rng.integers(40, 215, 3)
    noise = rng.integers(-35, 35, (height // 8 + 2, (width + 2 * count) // 8 + 2, 3))
    wide = cv2.resize((noise + tint).astype(np.float32), None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC)
    wide = np.clip(wide, 25, 255).astype(np.uint8)
    return [np.ascontiguousarray(wide[:height, 2 * i : 2 * i + width]) for i in range(count)]


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    subject = Dataset(tmp_path / "data").subject("ada")
    subject.work.mkdir(parents=True)
    return subject


def decoded(subject: Subject, *sources: Path, **settings: Any) -> tuple[FrameSet, dict[str, Any]]:
    register_source(subject, sources)
    manifest = run_stage(subject, decode.STAGE, [decode.STAGE], Config(decode=DecodeConfig(**settings)))
    return FrameSet.load(subject.stage("decode")), manifest


def clip(folder: Path, images: list[Image], fps: float = 25, crf: int = 12, name: str = "clip.mp4") -> Path:
    write_video(folder / name, images, fps, crf=crf)
    return folder / name


def test_frames_are_written_as_they_are(tmp_path: Path, subject: Subject) -> None:
    images = moving(70)
    frames, manifest = decoded(subject, clip(tmp_path, images, 30000 / 1001))
    assert len(frames) == 70
    assert (frames.width, frames.height, frames.fps) == (120, 90, Fraction(30000, 1001))
    np.testing.assert_allclose(frames.times, np.arange(70) * 1001 / 30000, atol=1e-4)
    assert np.abs(frames.image(33).astype(float) - images[33]).mean() < 3
    assert (frames.sharpness > 0).all()
    assert manifest["verdict"]["text"].startswith("Decoding: fair. 70 of 70 frames, 120x90, one shot; under 256 pixels")
    assert (subject.stage("decode") / manifest["verdict"]["picture"]).is_file()


def test_repeated_frames_are_dropped_and_can_be_kept(tmp_path: Path, subject: Subject) -> None:
    images = [image for i, image in enumerate(moving(40)) for _ in range(2 if i % 4 == 0 else 1)]
    path = clip(tmp_path, images)
    frames, manifest = decoded(subject, path)
    assert len(frames) == 40
    assert manifest["metrics"]["repeated"] == 10
    assert "10 repeated frames left out" in manifest["verdict"]["text"]
    assert len(np.unique(np.diff(frames.source_frames))) == 2  # the source's numbers and times have the gaps
    frames, _ = decoded(subject, path, drop_repeated=False)
    assert len(frames) == 50


def test_a_person_who_keeps_still_is_no_repeat(tmp_path: Path, subject: Subject) -> None:
    rng = np.random.default_rng(1)
    still = moving(1)[0].astype(int)
    images = [np.clip(still + rng.integers(-6, 7, still.shape), 0, 255).astype(np.uint8) for _ in range(30)]
    frames, _ = decoded(subject, clip(tmp_path, images))
    assert len(frames) == 30


def test_black_frames_and_bars_are_cut(tmp_path: Path, subject: Subject) -> None:
    black = np.zeros((90, 120, 3), np.uint8)
    images = []
    for image in moving(20):
        framed = black.copy()
        framed[12:80, 8:112] = image[12:80, 8:112]
        images.append(framed)
    frames, manifest = decoded(subject, clip(tmp_path, [black, black, *images, black]))
    assert frames.source_frames.tolist() == list(range(2, 22))
    left, top, right, bottom = frames.record["clips"][0]["bars"]
    assert all(abs(found - true) <= 2 for found, true in zip((left, top, right, bottom), (8, 12, 8, 10), strict=True))
    assert (frames.width, frames.height) == (120 - left - right, 90 - top - bottom)
    assert frames.image(5)[[0, -1]].mean() > 20
    assert manifest["metrics"]["black"] == 3
    assert "3 black frames left out, black bars cut" in manifest["verdict"]["text"]


def test_every_shot_of_a_second_is_kept_and_others_on_demand(tmp_path: Path, subject: Subject) -> None:
    images = [*moving(30, seed=1), *moving(12, seed=3), *moving(40, seed=2)]
    path = clip(tmp_path, images)
    frames, manifest = decoded(subject, path)
    about = frames.record["clips"][0]
    assert about["shots"] == [[0, 29], [30, 41], [42, 81]]
    assert about["kept_shots"] == [0, 2]
    assert frames.source_frames.tolist() == [*range(30), *range(42, 82)]
    assert frames.shots.tolist() == [0] * 30 + [1] * 40
    assert not frames.clips.any()
    assert "2 of 3 shots" in manifest["verdict"]["text"]
    assert manifest["metrics"]["shots"] == 2
    frames, _ = decoded(subject, path, min_shot_seconds=0)
    assert frames.shots.tolist() == [0] * 30 + [1] * 12 + [2] * 40
    frames, _ = decoded(subject, path, min_shot_seconds=9)
    assert frames.source_frames.tolist() == [*range(42, 82)], "where none is so long, the longest"
    start, end = about["shot_seconds"][1]
    frames, _ = decoded(subject, path, start_seconds=start, end_seconds=end)
    assert frames.source_frames.tolist() == [*range(30, 42)]
    frames, _ = decoded(subject, path, start_seconds=1.0, end_seconds=2.0)
    assert frames.source_frames.tolist() == [*range(25, 51)]
    assert frames.shots.tolist() == [0] * 5 + [1] * 12 + [2] * 9


def test_clips_of_other_rates_and_sizes_become_one_set(tmp_path: Path, subject: Subject) -> None:
    wide, small = moving(30, seed=1, size=(160, 90)), moving(26, seed=2, size=(80, 120))
    first, second = clip(tmp_path, wide, 30, name="wide.mp4"), clip(tmp_path, small, 25, name="small.mp4")
    frames, manifest = decoded(subject, first, second)
    assert (frames.width, frames.height, frames.fps) == (160, 120, Fraction(30))
    assert frames.clip_names == ("wide.mp4", "small.mp4")
    assert frames.clips.tolist() == frames.shots.tolist() == [0] * 30 + [1] * 26
    assert frames.contents[[0, 29, 30, 55]].tolist() == [[160, 90]] * 2 + [[80, 120]] * 2
    assert frames.source_frames[[29, 30]].tolist() == [29, 0]
    np.testing.assert_allclose(frames.times[[29, 30, 31]], [29 / 30, 29 / 30 + 1, 29 / 30 + 1.04], atol=1e-3)
    assert frames.image(40).shape == (120, 160, 3)
    assert frames.image(40)[:, 90:].max() < 8, "padding is black"
    assert np.abs(frames.picture(40).astype(float) - small[10]).mean() < 3
    assert "56 of 56 frames, 160x120, 2 clips, 2 shots" in manifest["verdict"]["text"]
    frames, _ = decoded(subject, first, second, max_side_px=80)
    assert [about["content"] for about in frames.record["clips"]] == [[80, 45], [53, 80]]
    assert [about["scale"] for about in frames.record["clips"]] == [0.5, pytest.approx(2 / 3, abs=1e-6)]
    frames, _ = decoded(subject, first, second, max_frames=20)
    assert np.bincount(frames.clips).tolist() == [11, 9]
    frames, _ = decoded(subject, second, first)
    assert frames.contents[0].tolist() == [80, 120], "the order is the user's"
    with pytest.raises(UserError, match="name a span of one clip; 2 clips are given"):
        decoded(subject, first, second, start_seconds=0.2)


def test_a_clip_that_is_all_black_is_named(tmp_path: Path, subject: Subject) -> None:
    black = clip(tmp_path, [np.zeros((90, 120, 3), np.uint8)] * 30, name="night.mp4")
    with pytest.raises(UserError, match=r"night\.mp4: Every frame of the video is black"):
        decoded(subject, clip(tmp_path, moving(30)), black)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_clip_of_hardly_any_frames_is_refused_in_words(tmp_path: Path, subject: Subject, count: int) -> None:
    with pytest.raises(UserError) as caught:
        decoded(subject, clip(tmp_path, moving(count)))
    noun = "frame" if count == 1 else "frames"
    assert caught.value.what.startswith(f"Only {count} {noun} of 'ada' can be used; a head that moves needs at least 5")


def test_limits_thin_evenly(tmp_path: Path, subject: Subject) -> None:
    path = clip(tmp_path, moving(60), fps=60)
    frames, _ = decoded(subject, path, max_fps=30)
    assert frames.source_frames.tolist() == list(range(0, 60, 2))
    frames, _ = decoded(subject, path, max_frames=16)
    assert len(frames) == 16
    assert frames.source_frames[[0, -1]].tolist() == [0, 59]
    assert set(np.diff(frames.source_frames)) <= {3, 4}
    frames, _ = decoded(subject, path, max_side_px=60)
    assert (frames.width, frames.height) == (60, 45)


def test_a_folder_of_images_works(tmp_path: Path, subject: Subject) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(moving(12)):
        cv2.imwrite(str(folder / f"{number}.png"), image[..., ::-1])
    frames, _ = decoded(subject, folder)
    assert len(frames) == 12
    assert np.abs(frames.image(11).astype(float) - moving(12)[11]).mean() < 3


def test_a_cut_off_file_gives_what_decodes_and_says_so(tmp_path: Path, subject: Subject) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(20, 255, (90, 120, 3), np.uint8) for _ in range(60)]
    data = clip(tmp_path, images).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    frames, manifest = decoded(subject, tmp_path / "cut.mp4")
    assert 20 < len(frames) < 50
    assert manifest["verdict"]["level"] == "fair"
    assert "the file is damaged or cut off" in manifest["verdict"]["text"]
    assert f"The header counts 60 frames, {len(frames)} decode." in frames.record["warnings"]


def test_nothing_to_see_is_refused_in_words(tmp_path: Path, subject: Subject) -> None:
    path = clip(tmp_path, [np.zeros((90, 120, 3), np.uint8)] * 5)
    with pytest.raises(UserError) as caught:
        decoded(subject, path)
    assert caught.value.what == "Every frame of the video is black."
    assert caught.value.fix == "choose another video"
    path = clip(tmp_path, moving(25))
    with pytest.raises(UserError) as caught:
        decoded(subject, path, start_seconds=9.0)
    assert caught.value.what == "From 9 s on there is no picture: the video is 1.0 s long."
    assert caught.value.fix == "choose another span with --set decode.start_seconds=... and decode.end_seconds=..."


def test_a_stopped_run_resumes_to_the_same_bytes(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_source(subject, [clip(tmp_path, moving(30))])
    config, calls = Config(), [0]

    def stop() -> bool:
        calls[0] += 1
        return calls[0] > 45  # in the second pass

    with pytest.raises(Interrupted):
        run_stage(subject, decode.STAGE, [decode.STAGE], config, stop_requested=stop)
    assert not subject.stage("decode").exists()
    written: list[Path] = []
    save = decode.save_image
    monkeypatch.setattr(decode, "save_image", lambda path, *rest: (written.append(path), save(path, *rest))[1])
    monkeypatch.setattr(decode, "_survey", lambda *rest: pytest.fail("the first pass was done again"))
    resumed = run_stage(subject, decode.STAGE, [decode.STAGE], config)
    assert resumed["resumed"]
    assert len([path for path in written if path.parent.name == "frames"]) < 30
    monkeypatch.undo()
    other = Dataset(tmp_path / "data").subject("eve")
    other.work.mkdir(parents=True)
    _, manifest = decoded(other, tmp_path / "clip.mp4")
    assert manifest["digest"] == resumed["digest"] == outputs_digest(resumed["outputs"])


def test_no_more_than_a_few_frames_are_ever_held(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    most = [0]
    read = video.read_frames

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        for frame in read(*arguments, **options):
            alive.append(weakref.ref(frame))
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
            yield frame

    monkeypatch.setattr(video, "read_frames", watched)
    decoded(subject, clip(tmp_path, moving(80)))
    assert len(alive) >= 160
    assert most[0] <= 3


def cut_out(count: int = 12) -> list[Image]:
    """RGBA frames [128, 160, 4]: a sliding texture with a soft disc of alpha, garbage where clear, black bars above.

    Both sides are multiples of 16: at other widths swscale leaves out columns of the alpha when the clip is written.
    """
    row, column = np.mgrid[:88, :160]
    frames = []
    for number, colour in enumerate(moving(count, size=(160, 88))):
        alpha = np.clip(40 - np.hypot(column - 60 - 3 * number, row - 44), 0, 10) * 25.5
        image = np.dstack([np.where(alpha[..., None] > 0, colour, 7), alpha]).astype(np.uint8)
        frames.append(cv2.copyMakeBorder(image, 20, 20, 0, 0, cv2.BORDER_CONSTANT, value=(0, 0, 0, 255)))
    return frames


def over_white(image: Image) -> NDArray[np.float64]:
    alpha = image[..., 3:] / 255
    return np.asarray(image[..., :3] * alpha + 255 * (1 - alpha), np.float64)


@pytest.mark.parametrize("kind", [*ALPHA_VIDEOS, *(f"{name} turned" for name in ("prores", "vp9", "vp8"))])
def test_a_videos_alpha_channel_goes_with_its_frames(tmp_path: Path, subject: Subject, kind: str) -> None:
    suffix, codec, pixel_format = ALPHA_VIDEOS[kind.partition(" ")[0]]
    images = cut_out()
    stored = [np.ascontiguousarray(np.rot90(image, 3)) for image in images] if "turned" in kind else images
    path = movie(tmp_path / f"a{suffix}", stored, codec, pixel_format, "rgba")
    _check_cut_out(subject, turned(path) if "turned" in kind else path, images)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_the_alpha_channel_of_images_goes_with_their_frames(tmp_path: Path, subject: Subject, suffix: str) -> None:
    folder, images = tmp_path / "images", cut_out()
    folder.mkdir()
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / f"{number}{suffix}"), cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA))
    _check_cut_out(subject, folder, images)


def _check_cut_out(subject: Subject, path: Path, images: list[Image]) -> None:
    for side, limits in ((160, (1, 2.5)), (80, (1, 3))):
        frames, manifest = decoded(subject, path, max_side_px=side)
        assert frames.has_alpha and frames.record["clips"][0]["alpha"]
        assert "black bars cut, with an alpha channel" in manifest["verdict"]["text"]
        (left, top, right, bottom), scale = frames.record["clips"][0]["bars"], side / 160
        assert (left, right) == (0, 0) and 20 <= top <= 24 and 20 <= bottom <= 24
        assert len(frames) == len(images)
        for index, image in enumerate(images):
            width, height = round(160 * scale), round(128 * scale)
            truth = cv2.resize(
                np.dstack([over_white(image), image[..., 3]]), (width, height), None, 0, 0, cv2.INTER_AREA
            )
            truth = truth[math.ceil(top * scale) : math.floor((128 - bottom) * scale)]
            alpha = frames.alpha(index, frames.folder)
            assert np.abs(alpha - truth[..., 3]).mean() < limits[0]
            assert np.abs(frames.image(index) - truth[..., :3]).mean() < limits[1]
            assert frames.image(index)[alpha == 0].min() > 240, "what is clear is white"


def test_a_channel_that_is_opaque_everywhere_is_none(tmp_path: Path, subject: Subject) -> None:
    images = [np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]) for image in moving(12)]
    frames, manifest = decoded(subject, movie(tmp_path / "a.mov", images, "qtrle", "argb", "rgba"))
    assert not frames.has_alpha and not (frames.folder / "alpha").exists()
    assert "alpha" not in manifest["verdict"]["text"]
    assert np.abs(frames.image(5).astype(float) - moving(12)[5]).mean() < 3


def test_one_of_two_clips_with_alpha(tmp_path: Path, subject: Subject) -> None:
    first = movie(tmp_path / "a.mov", cut_out(), "qtrle", "argb", "rgba")
    frames, manifest = decoded(subject, first, clip(tmp_path, moving(12)))
    assert [about["alpha"] for about in frames.record["clips"]] == [True, False]
    assert not frames.has_alpha
    assert "1 of 2 clips with an alpha channel, hence not used as matte" in manifest["verdict"]["text"]
    assert len(list((frames.folder / "alpha").iterdir())) == 12


def test_frames_with_alpha_resume_to_the_same_bytes(tmp_path: Path, subject: Subject) -> None:
    path = movie(tmp_path / "a.webm", cut_out(), "libvpx-vp9", "yuva420p", "rgba")
    register_source(subject, [path])
    calls = iter(range(99))
    with pytest.raises(Interrupted):
        run_stage(subject, decode.STAGE, [decode.STAGE], Config(), stop_requested=lambda: next(calls) > 17)
    (work,) = subject.work.glob("decode-*")
    assert 0 < len(list((work / "alpha").iterdir())) < 12
    sorted((work / "alpha").iterdir())[-1].unlink()  # killed between a frame and its alpha
    resumed = run_stage(subject, decode.STAGE, [decode.STAGE], Config())
    whole = run_stage(subject, decode.STAGE, [decode.STAGE], Config(), force=True)
    assert resumed["resumed"] and not whole["resumed"]
    assert resumed["digest"] == whole["digest"]


def test_frames_json_is_checked_at_the_border(tmp_path: Path, subject: Subject) -> None:
    decoded(subject, clip(tmp_path, moving(12)))
    path = subject.stage("decode") / "frames.json"
    good = json.loads(path.read_text())

    def refused(message: str, **changes: Any) -> None:
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(UserError, match=message):
            FrameSet.load(subject.stage("decode"))

    refused("schema is 9", schema=9)
    refused("width, height, fps or count do not fit", count=5)
    refused("a file lies outside", frames=[{**good["frames"][0], "file": "../../secret.jpg"}], count=1)
    refused("the times do not increase", frames=[*good["frames"][:-1], {**good["frames"][-1], "time": 0}])
    refused("the shots do not count", frames=[{**entry, "shot": 2} for entry in good["frames"]])
    refused("the clips do not count", frames=[{**entry, "clip": 1} for entry in good["frames"]])
    refused("a shot reaches over two clips", frames=_with(good["frames"], 6, clip=1), clips=2 * good["clips"])
    refused("content does not fit", clips=[{**good["clips"][0], "content": [120, 91]}])
    refused("the indices do not count", frames=good["frames"][1:], count=11)
    path.write_text("{")
    with pytest.raises(UserError, match="Cannot read"):
        FrameSet.load(subject.stage("decode"))
    path.write_text(json.dumps(good))
    frames = FrameSet.load(subject.stage("decode"))
    (subject.stage("decode") / frames.files[3]).write_bytes(b"")
    with pytest.raises(UserError, match="is not an image that can be read"):
        frames.image(3)


def _with(entries: list[dict[str, Any]], first: int, **changes: Any) -> list[dict[str, Any]]:
    """Entries with changes from one on."""
    return [*entries[:first], *({**entry, **changes} for entry in entries[first:])]
