"""The matting benchmark: known errors come out as such, in the frames' own geometry; no test looks at the times."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from face_clips import decoded_subject

from pipeline import bench_matte
from pipeline.assets import asset_path
from pipeline.dataset import Subject, subject_name_for, write_json
from pipeline.frames import FrameSet, alpha_file, save_image
from pipeline.synthetic import make_clip
from pipeline.video import read_frames


def matted(folder: Path, images: list[np.ndarray], alphas: np.ndarray, **about: Any) -> Subject:
    """A subject with these frames and alphas, as decode and matte leave them."""
    subject = decoded_subject(folder, images, **about)
    (subject.stage("matte") / "alpha").mkdir(parents=True)
    for index, alpha in enumerate(alphas):
        save_image(subject.stage("matte") / alpha_file(index), (alpha * 255).round().astype(np.uint8))
    write_json(subject.stage("matte") / "stage.json", {"metrics": {"ms_per_frame": None}})
    return subject


def test_known_errors_come_out(tmp_path: Path) -> None:
    clip = make_clip(5, 64, 64, seed=1)
    wrong = clip.alpha.copy()
    wrong[:, :8, :8] = 1
    wrong[2, 8:16, :8] = 1
    subject = matted(tmp_path / "ada", list(clip.images), wrong)
    frames, matte = FrameSet.load(subject.stage("decode")), subject.stage("matte")
    figures = bench_matte.compare(frames, matte, clip.alpha)
    assert figures["sad"] == pytest.approx((64 + 64 / 5) / 1000, abs=1e-3)
    assert figures["mad"] == pytest.approx((64 + 64 / 5) / 64**2, abs=1e-3)
    assert figures["dtssd"] == pytest.approx(2 * np.sqrt(64 / 64**2) / 4, abs=2e-3)
    assert figures["flicker_px"] > figures["flicker_px_truth"]
    assert json.loads(json.dumps(figures)) == figures
    cut = matted(tmp_path / "bob", list(clip.images), wrong, shots=[0, 0, 1, 2, 2])
    figures = bench_matte.compare(FrameSet.load(cut.stage("decode")), cut.stage("matte"), clip.alpha)
    assert figures["dtssd"] < 2e-3
    assert figures["flicker_px"] == 0


def test_the_truth_follows_bars_scale_and_dropped_frames(tmp_path: Path) -> None:
    truth = np.random.default_rng(0).uniform(0, 1, (4, 50, 80)).astype(np.float32)
    subject = decoded_subject(tmp_path / "ada", [np.zeros((20, 30, 3), np.uint8)] * 2)
    frames = FrameSet.load(subject.stage("decode"))
    frames.record["clips"][0]["bars"] = [12, 4, 8, 6]
    frames = dataclasses.replace(frames, source_frames=np.array([1, 3]))
    seen = list(bench_matte.truth_on_frames(frames, truth))
    for number, alpha in zip((1, 3), seen, strict=True):
        halved = truth[number, 4:44, 12:72].reshape(20, 2, 30, 2).mean((1, 3))
        np.testing.assert_allclose(alpha, halved, atol=1e-6)


def test_the_scenes_hold_the_subject_over_their_grounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matte that is the truth has no error but for eight bits; every scene's video is one of the subject."""
    for name in bench_matte.GROUND_CLIPS:
        asset_path(name)
    side, count = 96, 4
    clip = make_clip(count, side, side, seed=7, background="plain", hair=bench_matte.STRANDS, supersample=4)
    videos: list[np.ndarray] = []

    def perfect(video: Path, data: Path, *options: str) -> tuple[Path, dict[str, Any]]:
        images = [frame.rgb() for frame in read_frames(video)]
        videos.append(np.stack(images))
        subject = matted(data / subject_name_for(video), images, clip.alpha)
        record = json.loads((subject.stage("decode") / "frames.json").read_text())
        record["clips"][0]["bars"] = [0, 0, 0, 0]
        write_json(subject.stage("decode") / "frames.json", record)
        return subject.stage("matte"), {"ms_per_frame": None}

    monkeypatch.setattr(bench_matte, "_matte", perfect)
    scenes = list(bench_matte.bench_composites(tmp_path, count, side))
    assert [scene["scene"] for scene in scenes] == ["still", "pan", "moving", "wall", "screen"]
    assert all(scene["mad"] < 2e-3 and scene["iou"] > 0.99 for scene in scenes)
    solid = clip.alpha == 1
    own = [np.abs(video[solid].astype(float) - clip.images[solid]).mean() for video in videos]
    assert max(own) < 8, "the subject is the same in all"
    moves = {name: bool((ground(0) != ground(30)).any()) for name, ground in bench_matte._grounds(40, 64).items()}
    assert moves == {"still": False, "pan": True, "moving": True, "wall": False, "screen": False}
    text = bench_matte.table({"preset": "quick", "composites": scenes, "clips": []})
    assert text.count("\n") == 1 + len(scenes)


def test_a_clip_before_a_screen_is_compared_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = make_clip(3, 128, 128, seed=7, background="plain", supersample=4)
    colours = clip.images - 255 * (1 - clip.alpha[..., None]) * clip.background
    before_green = list(bench_matte.composite(colours, clip.alpha, lambda index: np.full((128, 128, 3), (40, 180, 80))))
    asked: list[str] = []

    def ran(arguments: list[str]) -> None:
        asked.append(" ".join(arguments))
        data = Path(arguments[arguments.index("--data") + 1])
        images = before_green if "green" in arguments[1] else list(clip.images)
        if (data / subject_name_for(Path(arguments[1]))).exists():
            return
        subject = matted(data / subject_name_for(Path(arguments[1])), images, clip.alpha)
        metrics = {"flicker_px": 0.1, "partial_alpha_share": 0.05, "ms_per_frame": None}
        write_json(subject.stage("matte") / "stage.json", {"metrics": metrics})
        subject.stage("evaluate").mkdir()
        figures = {
            "test": {"psnr": 30.0, "psnr_head": 28.0},
            "baselines": {"nearest_train_frame": {"psnr": 27.5, "psnr_head": 29.0}},
            "error_share_partial_alpha": None,
        }
        write_json(subject.stage("evaluate") / "metrics.json", figures)

    monkeypatch.setattr(bench_matte, "timed", ran)
    monkeypatch.setattr(bench_matte, "bench_composites", lambda *_, **__: iter(()))
    document = bench_matte.bench([Path("green.mp4"), Path("room.mp4")], "quick", tmp_path / "data")
    green, room = document["clips"]
    assert green["gain_over_best_training_frame"] == {"psnr": 2.5, "psnr_head": -1.0}
    assert green["network_against_key"]["iou"] > 0.98
    assert green["network_against_key"]["mad"] < 0.01
    assert room["network_against_key"] is None
    assert ["matte.source=network" in line for line in asked] == [False, True, False]
    assert json.loads(json.dumps(document)) == document
    assert bench_matte.table(document).count("green.mp4") == 2
