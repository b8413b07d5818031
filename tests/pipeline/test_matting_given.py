"""Alphas that are given follow their frames through turns, bars, scale and dropped frames; bad ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from alpha_clips import movie, turned
from numpy.typing import NDArray

from pipeline.config import Config, DecodeConfig
from pipeline.dataset import Dataset, Subject
from pipeline.errors import UserError
from pipeline.frames import FrameSet
from pipeline.matting.given import check_alphas, given_alpha
from pipeline.run import RunRequest, check_input, open_subject, prepare, resolve_config
from pipeline.source import alpha_paths, alphas_digest, has_alphas, register_alphas, register_source
from pipeline.stage import run_stage, section_of, stage_key
from pipeline.video import write_video
from stages import STAGES, decode, matte

Image = NDArray[np.uint8]
WIDTH, HEIGHT, COUNT = 96, 64, 12


def pictures(count: int = COUNT, width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> list[Image]:
    """Grey frames [H, W, 3] of a smooth texture that slides by two pixels a frame."""
    rng = np.random.default_rng(seed)
    wide = rng.integers(40, 255, (height // 8 + 2, (width + 2 * count) // 8 + 2)).astype(np.float32)
    wide = np.clip(cv2.resize(wide, None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC), 30, 255).astype(np.uint8)
    return [np.repeat(wide[:height, 2 * i : 2 * i + width, None], 3, axis=2) for i in range(count)]


def clip(path: Path, images: list[Image]) -> Path:
    write_video(path, images, 25, crf=4)
    return path


def folder(path: Path, images: list[Image], name: str = "a{:03d}.png") -> Path:
    path.mkdir()
    for number, image in enumerate(images):
        assert cv2.imwrite(str(path / name.format(number)), image)
    return path


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    subject = Dataset(tmp_path / "data").subject("ada")
    subject.work.mkdir(parents=True)
    return subject


def decoded(subject: Subject, clips: list[Path], **settings: Any) -> FrameSet:
    register_source(subject, clips)
    run_stage(subject, decode.STAGE, [decode.STAGE], Config(decode=DecodeConfig(**settings)))
    return FrameSet.load(subject.stage("decode"))


def given(subject: Subject, frames: FrameSet, alphas: list[Path]) -> list[Image]:
    register_alphas(subject, alphas)
    found = given_alpha(subject, alphas_digest(subject, alphas), frames)
    assert found is not None
    return [found(index) for index in range(len(frames))]


def difference(a: Image, b: Image) -> float:
    return float(np.abs(a.astype(float) - b).mean())


def with_channel(image: Image) -> Image:
    """Other colours, and the picture as their alpha."""
    return np.dstack([255 - image, image[..., 0]])


@pytest.mark.parametrize(
    "make",
    [
        lambda path, images: folder(path, [image[..., 0] for image in images]),
        lambda path, images: folder(path, images, "frame {}.tif"),
        lambda path, images: folder(path, images, "{}.jpg"),
        lambda path, images: folder(path, [with_channel(image) for image in images]),
        lambda path, images: folder(path, [with_channel(image) for image in images], "{:05d}.webp"),
        lambda path, images: folder(path, [image[..., 0].astype(np.uint16) * 257 for image in images]),
        lambda path, images: movie(path.with_suffix(".mp4"), images, "libx264", "yuv420p"),
        lambda path, images: movie(path.with_suffix(".mkv"), images, "ffv1", "gray"),
        lambda path, images: movie(
            path.with_suffix(".mov"), [with_channel(i) for i in images], "qtrle", "argb", "rgba"
        ),
        lambda path, images: movie(
            path.with_suffix(".webm"), [with_channel(i) for i in images], "libvpx-vp9", "yuva420p", "rgba"
        ),
    ],
    ids=["grey", "rgb-tiff", "jpeg", "rgba", "rgba-webp", "16-bit", "h264", "grey-video", "argb-video", "vp9-alpha"],
)
def test_every_kind_of_alphas_is_read(
    tmp_path: Path, subject: Subject, make: Callable[[Path, list[Image]], Path]
) -> None:
    images = pictures()
    video, alphas = clip(tmp_path / "a.mp4", images), make(tmp_path / "alphas", images)
    check_alphas([video], [alphas], 1024)
    frames = decoded(subject, [video])
    for alpha, image in zip(given(subject, frames, [alphas]), images, strict=True):
        assert alpha.shape == (HEIGHT, WIDTH)
        assert difference(alpha, image[..., 0]) < 3


def test_alphas_go_the_way_of_their_frames(tmp_path: Path, subject: Subject) -> None:
    """The film itself, upright, as its alpha: turned, with bars, repeats, and reduced; beside a wider clip."""
    barred = [cv2.copyMakeBorder(image, 12, 12, 0, 0, cv2.BORDER_CONSTANT) for image in pictures(COUNT, 200, 120)]
    barred = [image for number, image in enumerate(barred) for _ in range(2 if number == 5 else 1)]
    stored = clip(tmp_path / "stored.mp4", [np.ascontiguousarray(np.rot90(image, 3)) for image in barred])
    other = pictures(COUNT, 96, 90, seed=1)
    clips = [turned(stored), clip(tmp_path / "other.mp4", other)]
    alphas = [folder(tmp_path / "one", barred), movie(tmp_path / "two.mkv", other, "ffv1", "gray")]
    check_alphas(clips, alphas, 110)
    frames = decoded(subject, clips, max_side_px=110)
    assert frames.record["clips"][0]["bars"] != [0, 0, 0, 0] and frames.record["clips"][0]["scale"] < 1
    assert len(frames) == 2 * COUNT, "the repeated frame is left out"
    for index, alpha in enumerate(given(subject, frames, alphas)):
        grey = cv2.cvtColor(frames.image(index), cv2.COLOR_RGB2GRAY)
        width, height = frames.contents[index]
        assert difference(alpha[:height, :width], grey[:height, :width]) < 3
        assert not alpha[height:].any() and not alpha[:, width:].any()


def test_alphas_of_the_decoded_size_are_taken_as_they_are(tmp_path: Path, subject: Subject) -> None:
    images = [cv2.copyMakeBorder(image, 12, 12, 0, 0, cv2.BORDER_CONSTANT) for image in pictures()]
    video = clip(tmp_path / "a.mp4", images)
    frames = decoded(subject, [video], max_side_px=48)
    small = [image[..., 0] for image in pictures(COUNT, frames.width, frames.height, seed=3)]
    alphas = folder(tmp_path / "small", small)
    with pytest.raises(UserError, match="the video's frames are 96x88 or 48x44"):
        check_alphas([video], [alphas], 48)
    check_alphas([video], [alphas], 48, subject.stage("decode"))
    for alpha, image in zip(given(subject, frames, [alphas]), small, strict=True):
        assert np.array_equal(alpha, image)


def test_frames_are_read_in_any_order(tmp_path: Path, subject: Subject) -> None:
    images = pictures()
    frames = decoded(subject, [clip(tmp_path / "a.mp4", images)])
    alphas = movie(tmp_path / "alphas.mkv", images, "ffv1", "gray")
    register_alphas(subject, [alphas])
    found = given_alpha(subject, alphas_digest(subject, [alphas]), frames)
    assert found is not None
    for index in (3, 3, 9, 0, 5):
        assert difference(found(index), images[index][..., 0]) < 1


def _broken(path: Path, images: list[Image]) -> Path:
    made = folder(path, images)
    (made / "a004.png").write_bytes((made / "a004.png").read_bytes()[:60])
    return made


def _without(path: Path, images: list[Image], *numbers: int) -> Path:
    made = folder(path, images)
    for number in numbers:
        (made / f"a{number:03d}.png").unlink()
    return made


def _wrong_size(path: Path, images: list[Image]) -> Path:
    made = folder(path, images)
    cv2.imwrite(str(made / "a007.png"), images[0][:40])
    return made


BAD: dict[str, tuple[Callable[[Path, list[Image]], Path], str]] = {
    "missing": (
        lambda path, images: folder(path, images[:-3]),
        "'{path}' has 9 alphas for the 12 frames of '{video}': 3 too few.",
    ),
    "extra": (
        lambda path, images: folder(path, [*images, images[0]]),
        "'{path}' has 13 alphas for the 12 frames of '{video}': 1 too many.",
    ),
    "gap": (
        lambda path, images: _without(path, images, 3, 4, 8),
        "'{path}' has 9 alphas for the 12 frames of '{video}': by their names, frames 3-4, 8 are missing.",
    ),
    "gap in the right number": (
        lambda path, images: _without(path, [*images, images[0]], 5),
        "'{path}' has 12 alphas for the 12 frames of '{video}': by their names, frame 5 is missing.",
    ),
    "wrong size": (
        lambda path, images: folder(path, [image[::2, ::2] for image in images]),
        "'{path}/a000.png' is 48x32, the video's frames are 96x64.",
    ),
    "one of another size": (_wrong_size, "'{path}/a007.png' is 96x40, the images before it are 96x64."),
    "unreadable": (_broken, "'{path}/a004.png' is not an image that can be read."),
    "empty folder": (lambda path, images: folder(path, []), "There are no images in the folder '{path}'."),
    "not there": (lambda path, images: path, "There is no file '{path}'."),
    "black": (
        lambda path, images: folder(path, [0 * image for image in images]),
        "'{path}' says nothing: every alpha is 0 of 255 everywhere.",
    ),
    "channel without content": (
        lambda path, images: folder(path, [np.dstack([image, np.full_like(image[..., 0], 255)]) for image in images]),
        "'{path}' says nothing: every alpha is 255 of 255 everywhere.",
    ),
    "short video": (
        lambda path, images: (
            movie(path, images[:5], "ffv1", "gray")
            if path.suffix
            else movie(path.with_suffix(".mkv"), images[:5], "ffv1", "gray")
        ),
        "'{path}' has 5 alphas for the 12 frames of '{video}': 7 too few.",
    ),
    "small video": (
        lambda path, images: movie(path.with_suffix(".mkv"), [i[:32, :48] for i in images], "ffv1", "gray"),
        "'{path}' is 48x32, the video's frames are 96x64.",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_alphas_are_refused_before_anything_is_made(
    tmp_path: Path, make: Callable[[Path, list[Image]], Path], message: str
) -> None:
    video = clip(tmp_path / "a.mp4", pictures())
    path = make(tmp_path / "alphas", pictures())
    request = RunRequest(data=tmp_path / "data", videos=(video,), alpha=(path,))
    with pytest.raises(UserError) as caught:
        prepare(request, STAGES)
        check_input(request, request.target())
    assert caught.value.what == message.format(path=path, video=video)
    assert caught.value.fix
    assert not (tmp_path / "data").exists()


def test_alphas_for_some_of_the_clips_are_refused(tmp_path: Path) -> None:
    images = pictures()
    videos = (clip(tmp_path / "a.mp4", images), clip(tmp_path / "b.mp4", images[::-1]))
    alphas = folder(tmp_path / "alphas", images)
    with pytest.raises(UserError) as caught:
        prepare(RunRequest(data=tmp_path / "data", videos=videos, alpha=(alphas,)), STAGES)
    assert caught.value.what == "--alpha is given 1 time for 2 clips."
    assert caught.value.fix == "give --alpha once for every clip, in the order of the clips"


def test_a_folder_with_the_gaps_of_its_clip_fits(tmp_path: Path) -> None:
    images = pictures(10)
    video, alphas = _without(tmp_path / "clip", images, 4), _without(tmp_path / "alphas", images, 4)
    check_alphas([video], [alphas], 1024)
    times = folder(tmp_path / "times", [])
    for number in range(9):
        cv2.imwrite(str(times / f"{number * 40:06d}.png"), images[number])
    check_alphas([video], [times], 1024)  # milliseconds in the names are no count


def test_alphas_are_kept_with_the_clips_and_told_by_their_bytes(tmp_path: Path, subject: Subject) -> None:
    images = pictures()
    video, alphas = clip(tmp_path / "a.mp4", images), folder(tmp_path / "alphas", images)
    before = register_source(subject, [video])
    record = register_alphas(subject, [alphas])
    digest = alphas_digest(subject, [alphas])
    assert record["sha256"] == before["sha256"], "the frames do not depend on them"
    assert record["alphas"][0]["sha256"] == digest
    assert str(tmp_path) not in (subject.source / "source.json").read_text()
    assert has_alphas(subject, [alphas])
    (kept,) = alpha_paths(subject, digest)
    assert [p.name for p in sorted(kept.iterdir())] == [f"{number:06d}.png" for number in range(COUNT)]
    same = folder(tmp_path / "same", images)
    assert not has_alphas(subject, [same]) and alphas_digest(subject, [same]) == digest
    register_alphas(subject, [same])
    assert has_alphas(subject, [same]) and alpha_paths(subject, digest) == [kept]
    other = movie(tmp_path / "other.MKV", images, "ffv1", "gray")
    register_alphas(subject, [other])
    assert sorted(p.suffix for p in subject.source.iterdir()) == [".json", ".mkv", ".mp4"]
    with pytest.raises(UserError, match="The alphas that were given for 'ada' are missing or were changed") as caught:
        alpha_paths(subject, digest)
    assert "give them again: headcast run VIDEO --alpha FOLDER_OR_VIDEO" in caught.value.fix
    register_alphas(subject, [alphas])
    (kept / "000004.png").unlink()
    (kept / "000004.png").write_bytes(bytes((alphas / "a004.png").stat().st_size))
    with pytest.raises(UserError, match="are missing or were changed"):
        alpha_paths(subject, digest)
    register_alphas(subject, [alphas])
    assert alpha_paths(subject, digest) == [kept]
    (kept / "000003.png").unlink()
    assert not has_alphas(subject, [alphas])
    register_alphas(subject, [alphas])
    assert has_alphas(subject, [alphas])
    register_source(subject, [clip(tmp_path / "b.mp4", images[::-1])])
    assert not has_alphas(subject, [alphas]), "they were of other clips"


def test_alphas_are_part_of_the_mattes_key_and_stay_for_reruns(tmp_path: Path) -> None:
    images = pictures()
    video, alphas = clip(tmp_path / "a.mp4", images), folder(tmp_path / "alphas", images)

    def asked(*alpha: Path, **options: Any) -> tuple[RunRequest, Subject, Config]:
        request = RunRequest(data=tmp_path / "data", alpha=alpha, subject="ada", **options)
        return request, request.target(), resolve_config(request, request.target())

    def key(config: Config) -> str:
        return stage_key(matte.STAGE, section_of(matte.STAGE, config), {})

    request, subject, config = asked(alphas, videos=(video,))
    assert not check_input(request, subject)
    with subject.lock():
        open_subject(request, subject, config)
    assert check_input(request, subject), "they were found good when they were taken in"
    assert prepare(RunRequest(data=tmp_path / "data", subject="ada"), STAGES)[1].matte.alpha == config.matte.alpha
    without = asked(videos=(video,))[2]
    cv2.imwrite(str(alphas / "a003.png"), 255 - images[3])
    changed = asked(alphas, videos=(video,))
    assert not check_input(*changed[:2])
    later = asked(alphas)
    assert not check_input(*later[:2]), "without naming the video again"
    assert later[2].matte.alpha == changed[2].matte.alpha
    assert len({key(config), key(without), key(changed[2])}) == 3
