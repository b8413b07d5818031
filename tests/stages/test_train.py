"""The train stage: its files, its refusals, and that test frames never touch it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from avatar_data import write_subject

from pipeline.avatars import load_avatar
from pipeline.clip import split
from pipeline.config import Config, EvaluateConfig, GaussianHeadConfig, TrainConfig, override
from pipeline.dataset import Subject
from pipeline.errors import Interrupted, StageError
from pipeline.progress import PlainReporter
from pipeline.stage import StageRun, section_of
from pipeline.training import Trainer
from stages import train

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Config(
    train=TrainConfig(gaussians=500, resolution=64, steps=30), evaluate=EvaluateConfig(min_holdout_frames=4)
)


def stage_run(subject: Subject, work: Path, **changes: object) -> StageRun:
    """A run of the stage on the CPU, single-threaded."""
    work.mkdir(exist_ok=True)
    return dataclasses.replace(StageRun(subject, work, CONFIG, "cpu", 1), **changes)


def poison(subject: Subject, frame: int) -> None:
    """Make a frame's colours, alpha, confidence and fit nonsense of the right form."""
    noise = np.random.default_rng(frame).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(subject.stage("matte") / f"foreground/{frame:06d}.jpg"), noise)
    cv2.imwrite(str(subject.stage("matte") / f"alpha/{frame:06d}.png"), noise[..., 0])
    cv2.imwrite(str(subject.stage("matte") / f"confidence/{frame:06d}.png"), noise[..., 1])
    path = subject.stage("fit") / "fit.npz"
    with np.load(path) as file:
        fit = dict(file)
    fit["expression"][frame] = 7
    fit["Ts_cam_head"][frame, :3, 3] = (1, 2, 3)
    fit["Ts_cam_skull"][frame, :3, 3] = (2, 1, 3)
    fit["Ts_cam_torso"][frame, :3, 3] = (3, 2, 1)
    np.savez(path, **fit)


@pytest.mark.parametrize("avatar", ["rigged", "gaussianhead"])
def test_test_frames_leave_the_weights_bit_identical(avatar: str, tmp_path: Path) -> None:
    own = GaussianHeadConfig(field_layers=2, field_width=32, warmup_steps=5)
    config = CONFIG.model_copy(
        update={"train": CONFIG.train.model_copy(update={"avatar": avatar, "gaussianhead": own, "steps": 15})}
    )
    results = []
    for name, poisoned in (("clean", False), ("poisoned", True)):
        subject = write_subject(tmp_path / name)
        training, test = split(24, CONFIG.evaluate.holdout, CONFIG.evaluate.min_holdout_frames)
        assert test.tolist() == [20, 21, 22, 23]
        if poisoned:
            for frame in test:
                poison(subject, frame)
            (subject.stage("matte") / "foreground/000022.jpg").unlink()
        run = stage_run(subject, tmp_path / f"work-{name}", config=config)
        result = train.run(run)
        assert result.metrics["frames"] == len(training)
        results.append((run.work / "avatar.safetensors").read_bytes())
    assert results[0] == results[1]

    poison(subject, 3)
    run = stage_run(subject, tmp_path / "work-third", config=config)
    train.run(run)
    assert (run.work / "avatar.safetensors").read_bytes() != results[0]


def test_without_its_weights_the_perceptual_loss_is_off_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADCAST_CACHE", str(tmp_path / "cache"))
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"perceptual": 0.01, "steps": 2})})
    run = stage_run(write_subject(tmp_path / "s"), tmp_path / "work", config=config, reporter=PlainReporter())
    assert train.run(run).metrics["steps"] == 2
    said = capsys.readouterr()
    assert "perceptual loss is off: Asset 'vgg16'" in said.out + said.err
    assert "headcast assets fetch vgg16" in said.out + said.err


def test_a_run_leaves_what_the_layout_promises(tmp_path: Path) -> None:
    run = stage_run(write_subject(tmp_path / "s", frames=48), tmp_path / "work")
    result = train.run(run)
    outputs = {path.name for path in run.work.iterdir() if path.name != "scratch"}
    assert outputs == {"avatar.safetensors", "avatar.json", "log.json", "preview.jpg"}
    log = json.loads((run.work / "log.json").read_text())
    assert log[-1]["step"] == 30
    assert log[-1]["psnr_train"] == result.metrics["psnr_train"] > 15
    assert result.metrics["gaussians"] == load_avatar(run.work).count == 500
    assert result.verdict.text.startswith(f"Training: {result.verdict.level}. 30 steps in ")


def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(train, "LOG_STEPS", 5)
    subject = write_subject(tmp_path / "s")
    whole = stage_run(subject, tmp_path / "whole")
    train.run(whole)

    checks = iter(range(1000))
    stopped = stage_run(subject, tmp_path / "stopped", stop_requested=lambda: next(checks) >= 11)
    with pytest.raises(Interrupted):
        train.run(stopped)
    assert (stopped.scratch / "checkpoint.safetensors").is_file()
    assert not (stopped.work / "avatar.json").exists()
    train.run(stage_run(subject, tmp_path / "stopped"))
    # TensorBoard has the log's numbers, each step once.
    log = json.loads((tmp_path / "whole" / "log.json").read_text())
    for work in ("whole", "stopped"):
        events = EventAccumulator(str(subject.root / "tensorboard" / work)).Reload()
        for tag, key in (
            ("loss", "loss"),
            ("psnr/training frames", "psnr_train"),
            ("psnr/frames kept back", "psnr_val"),
        ):
            wanted = [(line["step"], line[key]) for line in log if line[key] is not None]
            found = [(event.step, event.value) for event in events.Scalars(tag)] if wanted else []
            assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
        terms = sum(events.Scalars(f"loss of one frame/{name}")[-1].value for name in ("l1", "ssim"))
        assert 0 < terms < 1 and events.Scalars("gaussians")[-1].value == 500
    for name in ("avatar.safetensors", "avatar.json", "log.json", "preview.jpg"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_tensorboard_is_left_out_of_the_key_and_can_be_switched_off(tmp_path: Path) -> None:
    off = override(CONFIG, ["train.tensorboard=false"])
    assert section_of(train.STAGE, off) == section_of(train.STAGE, CONFIG)
    assert "tensorboard" not in section_of(train.STAGE, CONFIG)
    run = stage_run(write_subject(tmp_path / "s"), tmp_path / "work", config=off)
    assert train.run(run).metrics["log_seconds"] is None
    assert not (run.subject.root / "tensorboard").exists()


def test_few_frames_say_what_to_expect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = stage_run(write_subject(tmp_path / "s"), tmp_path / "work", reporter=PlainReporter())
    result = train.run(run)
    assert "Only 20 usable training frames" in capsys.readouterr().err
    assert result.verdict.level != "good"
    assert "Only 20 usable frames" in result.verdict.text


def test_a_run_that_diverges_leaves_its_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = write_subject(tmp_path / "s")
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    step, ahead = Trainer.step, [20]

    def poisoned(trainer: Trainer) -> float:
        if trainer.step_count == ahead[0]:
            with torch.no_grad():
                trainer.avatar.get_parameter("means")[7] = torch.nan
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", poisoned)
    run = stage_run(subject, tmp_path / "work")
    with pytest.raises(StageError, match=r"diverged at step 21: .*means.* nan(.|\n)*checkpoint, of step 20, is kept"):
        train.run(run)
    assert not (run.work / "avatar.json").exists()
    ahead[0] = -1
    train.run(run)
    whole = stage_run(subject, tmp_path / "whole")
    train.run(whole)
    assert (run.work / "avatar.safetensors").read_bytes() == (whole.work / "avatar.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
@pytest.mark.parametrize(
    ("change", "begin", "cause"),
    [
        ("resolution=2048", "limit(100)", "MemoryError"),
        (
            "gaussians=150_000, basis=64",
            "load = train.load_data; train.load_data = lambda *given: (load(*given), limit(300))[0]",
            "DefaultCPUAllocator",
        ),
    ],
    ids=["numpy", "torch"],
)
def test_out_of_memory_names_what_to_lower(tmp_path: Path, change: str, begin: str, cause: str) -> None:
    script = f"""
import resource
from pathlib import Path
from pipeline.config import Config, TrainConfig
from pipeline.dataset import Subject
from pipeline.stage import StageRun, section_of
from pipeline.training import compile_kernels
from stages import train

def limit(megabytes):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

compile_kernels("cpu", print)
work, config = Path({str(tmp_path)!r}), Config(train=TrainConfig({change}))
{begin}
train.run(StageRun(Subject(work / "s"), work, config, "cpu", 1))
"""
    write_subject(tmp_path / "s")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT, timeout=200
    )
    assert "StageError: Training ran out of memory." in done.stderr, done.stderr
    assert "-> lower train.resolution, train.max_frames or train.gaussians" in done.stderr
    assert cause in done.stderr


def test_no_usable_frame_is_an_error(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "s")
    path = subject.stage("fit") / "fit.npz"
    with np.load(path) as file:
        fit = dict(file)
    np.savez(path, **{**fit, "usable": np.arange(24) >= 20})
    with pytest.raises(StageError, match="None of the 20 training frames is usable"):
        train.run(stage_run(subject, tmp_path / "work"))
