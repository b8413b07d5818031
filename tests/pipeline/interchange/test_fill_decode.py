"""Decode's files of an imported subject: every frame under its own number, alphas where the dataset keeps them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import recordings

from pipeline.config import Config, DecodeConfig
from pipeline.dataset import Dataset
from pipeline.errors import Interrupted, UserError
from pipeline.frames import FrameSet, save_image
from pipeline.interchange import fill_decode
from pipeline.interchange.recording import Recording, load_recording
from pipeline.source import register_dataset
from pipeline.stage import Result, StageRun

NAMES = ("nerfblendshape-2/00", "nerfblendshape-2/01")


def imported_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alpha: str,
    config: Config | None = None,
    size: tuple[int, int] = recordings.SIZE,
) -> StageRun:
    """A subject with a dataset of three awkward frames, which is taken for what its recording says."""
    folder = tmp_path / "theirs"
    images = tuple(f"img/{number}.png" for number in recordings.NUMBERS)
    masks = tuple(f"mask/{number}.png" for number in recordings.NUMBERS) if alpha in ("masks", "parsing") else ()
    (folder / "img").mkdir(parents=True)
    (folder / "mask").mkdir()
    for row, image in enumerate(images):
        rgb, opacity = recordings.picture(row, size)
        save_image(folder / image, np.dstack([rgb, opacity]) if alpha == "channel" else rgb)
        if masks:
            parsing = np.where(opacity[..., None] > 0, np.uint8([0, 0, 255]), np.uint8([255, 0, 0]))
            save_image(folder / masks[row], parsing if alpha == "parsing" else opacity)
    made = recordings.recording("nerfblendshape", names=NAMES, size=size, images=images, masks=masks, alpha=alpha)
    recording = replace(made, files=(*images, *masks), notes=("Taken for granted.",))
    subject = Dataset(tmp_path / "data").subject("ada")
    subject.root.mkdir(parents=True)
    register_dataset(subject, folder, recording)
    monkeypatch.setattr(fill_decode, "read_dataset", lambda subject: recording)
    work = subject.work / "decode"
    work.mkdir(parents=True)
    return StageRun(subject, work, config or Config())


def fill(run: StageRun) -> tuple[Result, FrameSet, Recording]:
    result = fill_decode.fill(run)
    return result, FrameSet.load(run.work), load_recording(run.work / "recording.npz")


@pytest.mark.parametrize("alpha", ["channel", "masks", "parsing", "none"])
def test_frames_keep_their_numbers_times_and_alphas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: str
) -> None:
    run = imported_run(tmp_path, monkeypatch, alpha)
    result, frames, recording = fill(run)
    assert frames.source_frames.tolist() == recording.numbers.tolist() == list(recordings.NUMBERS)
    assert np.allclose(frames.times, (np.array(recordings.NUMBERS) - 3) * 1001 / 30000, atol=1e-6)
    assert (frames.width, frames.height, frames.fps) == (*recordings.SIZE, recordings.FPS)
    assert (frames.has_alpha, frames.clip_names, frames.record["warnings"]) == (
        alpha != "none",
        ("theirs",),
        ["Taken for granted."],
    )
    assert frames.window(0).content == recordings.SIZE
    for row in range(len(frames)):
        rgb, opacity = recordings.picture(row)
        shown = np.where(opacity[..., None] > 0, rgb, 255) if alpha == "channel" else rgb
        assert np.abs(frames.image(row).astype(int) - shown).mean() < 2
        if alpha != "none":
            assert np.array_equal(frames.alpha(row, run.work), opacity)
    assert (run.work / "contact.jpg").is_file()
    assert (run.work / "alpha").is_dir() == (alpha != "none")
    assert "imported from 'theirs' (nerfblendshape)" in result.verdict.text
    assert "4 numbers between them are left out" in result.verdict.text


def test_large_pictures_are_reduced_as_frames_json_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = imported_run(tmp_path, monkeypatch, "masks", Config(decode=DecodeConfig(max_side_px=64)), (192, 128))
    _, frames, recording = fill(run)
    assert (frames.width, frames.height, frames.window(0).scale) == (64, 42, 1 / 3)
    assert recording.size == (192, 128)
    opacity = cv2.resize(recordings.picture(0, (192, 128))[1], (64, 42), interpolation=cv2.INTER_AREA)
    assert np.array_equal(frames.alpha(0, run.work), opacity)


def test_black_borders_are_part_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def barred(row: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        rgb, opacity = picture(row, size)
        rgb[:20] = 0
        return rgb, opacity

    picture = recordings.picture
    monkeypatch.setattr(recordings, "picture", barred)
    _, frames, _ = fill(imported_run(tmp_path, monkeypatch, "masks"))
    assert (frames.width, frames.height) == recordings.SIZE
    assert frames.image(0)[:16].max() < 16


def test_a_stopped_filling_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = imported_run(tmp_path, monkeypatch, "masks")
    monkeypatch.setattr(fill_decode, "FRAMES_AT_ONCE", 1)
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        fill_decode.fill(replace(run, threads=1, stop_requested=lambda: next(asked)))
    before = {path: path.stat().st_mtime_ns for path in run.work.glob("*/*") if path.is_file()}
    assert len(before) == 2
    _, frames, _ = fill(run)
    assert len(frames) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("alpha", ["masks", "channel"])
def test_alphas_that_say_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: str) -> None:
    picture = recordings.picture
    monkeypatch.setattr(
        recordings, "picture", lambda row, size: (picture(row, size)[0], np.full(size[::-1], 255, np.uint8))
    )
    with pytest.raises(UserError, match="say nothing: every one is 255 of 255 everywhere"):
        fill(imported_run(tmp_path, monkeypatch, alpha))


def test_pictures_that_changed_since_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = imported_run(tmp_path, monkeypatch, "masks")
    dataset = run.subject.source / "dataset"
    (dataset / "img/4.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    with pytest.raises(UserError, match=r"4\.png' is not an image that can be read"):
        fill(run)
    save_image(dataset / "img/4.png", recordings.picture(1)[0])
    (dataset / "mask/9.png").unlink()
    save_image(dataset / "mask/9.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(UserError, match=r"9\.png' is 8x8 once it is read, the dataset's pictures are 96x64"):
        fill(run)
