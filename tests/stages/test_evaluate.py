"""The evaluate stage on a synthetic subject: every key, true figures, resume, and what it says when it cannot work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import evaluation, metrics
from pipeline.clip import load_clip, load_crops
from pipeline.config import override, preset_config
from pipeline.dataset import Subject
from pipeline.errors import Interrupted, StageError
from pipeline.frames import shown_file
from pipeline.stage import Result, StageRun
from stages.evaluate import STAGE, telling_frames

CONFIG = override(preset_config("quick"), ["train.resolution=64"])


def start(subject: Subject) -> StageRun:
    work = subject.root / "work"
    work.mkdir(exist_ok=True)
    return StageRun(subject, work, CONFIG, device="cpu", threads=1)


@pytest.fixture
def evaluated(finished_subject: Subject) -> tuple[StageRun, Result, dict[str, Any]]:
    run = start(finished_subject)
    result = STAGE.run(run)
    return run, result, json.loads((run.work / "metrics.json").read_bytes())


def test_metrics_have_every_key_and_true_figures(
    evaluated: tuple[StageRun, Result, dict[str, Any]], finished_subject: Subject
) -> None:
    _, result, found = evaluated
    regions = {"psnr", "psnr_subject", "psnr_head", "psnr_torso"}
    assert (found["schema"], found["subject"], found["resolution"]) == (1, "ada", [64, 64])
    assert found["split"] == {"train": [0, 13], "test": [14, 23]}
    assert set(found["test"]) == regions | {"psnr_sure", "ssim", "ms_ssim", "l1", "flip", "lpips"}
    # The fixture's alphas are sure everywhere.
    assert found["test"]["psnr_sure"] == pytest.approx(found["test"]["psnr"], abs=1e-3)
    assert set(found["baselines"]) == {"nearest_train_frame", "nearest_by_parameters", "mean_frame"}
    assert all(set(row) == regions for row in found["baselines"].values())
    assert set(found["train"]) == {"psnr"}
    assert set(found["avatar"]) == {"model", "gaussians", "bytes"}
    assert set(found["speed"]) == {"render_fps", "train_seconds", "train_steps"}
    assert (found["speed"]["train_seconds"], found["speed"]["train_steps"]) == (2.0, 200)
    assert found["avatar"]["gaussians"] == 1500
    train = finished_subject.stage("train")
    assert found["avatar"]["bytes"] == sum((train / f"avatar.{end}").stat().st_size for end in ("json", "safetensors"))
    assert found["test"]["ms_ssim"] is None and "161" in found["ms_ssim_reason"]
    assert found["test"]["lpips"] is None or found["lpips_reason"] is None

    # One frame of the synthetic clip is marked unusable: it is counted and left out.
    frames = found["per_frame"]["frame"]
    assert frames == [14, 15, 16, 17, 18, 19, 20, 21, 23]
    assert found["counts"] == {"train": 14, "train_usable": 14, "test": 10, "test_usable": 9}
    assert "9 of 10 held-out frames" in result.verdict.text

    clip = load_clip(finished_subject, 64)
    train_images, test_images = (load_crops(clip, rows).images / 255.0 for rows in (range(14), frames))
    nearest = [max(metrics.psnr(truth, image) for image in train_images) for truth in test_images]
    assert found["per_frame"]["baselines"]["nearest_train_frame"]["psnr"] == pytest.approx(nearest, abs=1e-4)
    mean = np.mean([metrics.psnr(truth, train_images.mean(0)) for truth in test_images])
    assert found["baselines"]["mean_frame"]["psnr"] == pytest.approx(mean, abs=1e-4)
    assert found["test"]["psnr"] == pytest.approx(np.mean(found["per_frame"]["psnr"]), abs=1e-4)
    assert result.metrics["test"] == found["test"]
    parts = found["error_parts"]
    assert sum(part["error"] for part in parts.values()) == pytest.approx(1, abs=1e-3)
    assert sum(part["area"] for part in parts.values()) == pytest.approx(1, abs=1e-3)
    assert parts["outline"]["error"] == pytest.approx(found["error_share_partial_alpha"], abs=1e-3)


def test_it_writes_its_pictures(evaluated: tuple[StageRun, Result, dict[str, Any]]) -> None:
    import av

    run, result, found = evaluated
    assert result.verdict.picture == "comparison.jpg"
    shown = [shown_file(entry["frame"]) for entry in found["shown"]]
    assert [entry["kind"] for entry in found["shown"]] == ["worst"] * 3 + ["typical"]
    assert sorted(path.relative_to(run.work).as_posix() for path in run.work.glob("shown/*")) == sorted(shown)
    assert all((run.work / name).stat().st_size > 1000 for name in ("comparison.jpg", "mean_error.jpg", *shown))
    with av.open(str(run.work / "comparison.mp4")) as video:
        assert float(video.streams.video[0].average_rate) == 25
        assert sum(1 for _ in video.decode(video=0)) == 9


def test_a_stopped_evaluation_goes_on_where_it_was(finished_subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def stop_at_the_fourth() -> bool:
        nonlocal asked
        asked += 1
        return asked == 4

    run = start(finished_subject)
    with pytest.raises(Interrupted):
        STAGE.run(replace(run, stop_requested=stop_at_the_fourth))
    assert len(list(run.scratch.glob("*.npz"))) == 3

    scored = 0
    real = evaluation.score

    def counting(*args: Any) -> dict[str, float | None]:
        nonlocal scored
        scored += 1
        return real(*args)

    monkeypatch.setattr(evaluation, "score", counting)
    STAGE.run(run)
    assert scored == 6
    resumed = json.loads((run.work / "metrics.json").read_bytes())
    fresh = start(replace(finished_subject))
    (fresh.work / "metrics.json").unlink()
    for path in fresh.scratch.iterdir():
        path.unlink()
    STAGE.run(fresh)
    whole = json.loads((fresh.work / "metrics.json").read_bytes())
    assert {k: v for k, v in resumed.items() if k != "speed"} == {k: v for k, v in whole.items() if k != "speed"}


def test_no_usable_held_out_frame_is_said_in_words(finished_subject: Subject) -> None:
    path = finished_subject.stage("fit") / "fit.npz"
    with np.load(path) as file:
        fit = dict(file)
    fit["usable"][14:] = False
    np.savez(path, **fit)
    with pytest.raises(StageError) as error:
        STAGE.run(start(finished_subject))
    assert error.value.what == (
        "None of the held-out frames 14-23 of 'ada' can be used: the face is missing, occluded or off-frame in all of "
        "them."
    )
    assert "decode.end_seconds" in error.value.fix


def test_lpips_says_why_it_is_not_there(finished_subject: Subject, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HEADCAST_CACHE", str(tmp_path / "empty"))
    run = start(finished_subject)
    STAGE.run(run)
    assert "alexnet" in json.loads((run.work / "metrics.json").read_bytes())["lpips_reason"]
    off = replace(run, config=override(CONFIG, ["evaluate.lpips=false"]))
    STAGE.run(off)
    assert (
        json.loads((run.work / "metrics.json").read_bytes())["lpips_reason"] == "switched off: evaluate.lpips is false"
    )


def test_the_worst_frames_shown_are_some_way_apart() -> None:
    scores = {frame: 40.0 - frame for frame in range(20)}
    assert telling_frames(scores) == [
        *({"frame": frame, "kind": "worst"} for frame in (19, 15, 11)),
        {"frame": 8, "kind": "typical"},
    ]
    assert telling_frames({7: 30.0}) == [{"frame": 7, "kind": "worst"}]
