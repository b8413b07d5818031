"""Train: from crops, alphas and the fit to a Gaussian avatar."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.errors import StageError
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pipeline.avatars import TrainingData
    from pipeline.clip import Clip
    from pipeline.perceptual import PerceptualLoss
    from pipeline.tensorboard import EventLog
    from pipeline.training import Entry, Trainer

CHECKPOINT_SECONDS = 10.0
PREVIEW_SECONDS, LOGGED_PREVIEW_SECONDS = 5.0, 20.0
LOG_STEPS = 100
FEW_FRAMES = 30
GOOD_PSNR, FAIR_PSNR = 28.0, 24.0
OUT_OF_MEMORY = ("memory", "can't start new thread")
"""What torch's and Python's errors say when there is none left; numpy and numba raise `MemoryError`."""


def run(run: StageRun) -> Result:
    """Train the avatar of a subject; resumes from the checkpoint in the work folder if there is one.

    Raises:
        StageError: there are no usable frames, training diverged, memory ran out, or a checkpoint does not fit.
        Interrupted: a stop was asked for; a checkpoint was written.
    """
    import torch

    from pipeline.clip import load_clip
    from pipeline.training import Trainer, compile_kernels, resolve_device

    device = resolve_device(run.device)
    compile_kernels(device, run.reporter.message)
    # Torch's threads only wait for each other on tensors this small (16 times slower on busy cores); the rasteriser,
    # the loss and the reading of frames have their own.
    torch.set_num_threads(1)
    try:
        data = load_data(run, load_clip(run.subject, run.config.train.resolution))
        trainer = Trainer(data, run.config.train, device, run.threads, load_perceptual_loss(run, device))
        trainer.resume(run.scratch)
        with training_log(run, trainer.step_count) as log:
            optimise(run, trainer, log)
            return finish(run, trainer, len(data), log)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise StageError(
            "Training ran out of memory.", "lower train.resolution, train.max_frames or train.gaussians with --set"
        ) from error


def load_data(run: StageRun, clip: Clip) -> TrainingData:
    """The usable frames of the training span, at most `train.max_frames` of them. No test frame is opened.

    Raises:
        StageError: no frame of the training span is usable.
    """
    import numpy as np

    from pipeline.avatars import Condition, TrainingData, conditions_of
    from pipeline.clip import load_crops, split
    from pipeline.frames import evenly

    evaluate, config = run.config.evaluate, run.config.train
    train, test = split(len(clip), evaluate.holdout, evaluate.min_holdout_frames)
    usable = train[clip.usable[train]]
    if len(usable) == 0:
        raise StageError(
            f"None of the {len(train)} training frames is usable ({len(test)} more are held out for the test).",
            "look at the track and fit verdicts; film the face larger, sharper and from the front",
        )
    if len(usable) < FEW_FRAMES:
        run.reporter.message(
            f"Only {len(usable)} usable training frames: expect an avatar that looks right near these poses and "
            "expressions only. Ten seconds of varied motion make a good one."
        )
    indices = usable[np.array(evenly(len(usable), config.max_frames))]
    with run.reporter.task("train: reading", len(indices), "frames") as task:
        crops = load_crops(clip, indices, threads=run.threads, on_frame=task.advance)
    rows = conditions_of(clip)
    chosen = Condition(*(value[indices] for value in rows))
    inside = clip.inside()
    return TrainingData(
        crops.images,
        crops.alphas,
        chosen,
        clip.Ks,
        clip.personal_head(),
        clip.identity,
        clip.cameras[indices],
        None if inside.min() == 1 else inside,
        crops.confidences,
    )


def load_perceptual_loss(run: StageRun, device: torch.device) -> PerceptualLoss | None:
    """The loss that `train.perceptual` weighs; None where that is 0 or, with words, without its weights."""
    from pipeline.perceptual import load_perceptual

    if run.config.train.perceptual == 0:
        return None
    try:
        return load_perceptual(device)
    except StageError as error:
        run.reporter.message(f"The perceptual loss is off: {error.what} To have it, {error.fix}.")
        return None


@contextlib.contextmanager
def training_log(run: StageRun, step: int) -> Iterator[EventLog | None]:
    """The log for TensorBoard, from this step on; None where `train.tensorboard` is off."""
    from pipeline.tensorboard import open_log

    # The work folder's name tells this training from others.
    log = open_log(run.subject, run.work.name, step, run.reporter.message) if run.config.train.tensorboard else None
    try:
        yield log
    finally:
        if log is not None:
            log.close()


def optimise(run: StageRun, trainer: Trainer, log: EventLog | None) -> None:
    """Take all steps, with a checkpoint and a preview every few seconds."""
    begun = saved = shown = logged = time.monotonic()
    with run.reporter.task("train", run.config.train.steps, "steps", trainer.step_count) as task:
        while not trainer.finished:
            trainer.step()
            note = None
            if trainer.step_count % LOG_STEPS == 0 or trainer.finished:
                entry = trainer.record()
                note = f"PSNR {entry.psnr_train:.1f} dB"
                if log is not None:
                    log.scalars(entry.step, {**_figures(entry), **trainer.scalars()})
            now = time.monotonic()
            stopping = run.stop_requested()
            if stopping or now - saved >= CHECKPOINT_SECONDS:
                trainer.save_checkpoint(run.scratch)
                saved = now
            if now - shown >= PREVIEW_SECONDS:
                due = now - logged >= LOGGED_PREVIEW_SECONDS
                write_preview(run, trainer, log if due else None)
                logged = now if due else logged
                if shown == begun:
                    run.reporter.message(
                        f"train: truth and avatar so far, anew every few seconds: {run.work}/preview.jpg"
                    )
                shown = now
            task.advance(1, note)
            if stopping:
                run.check_stop()


def _figures(entry: Entry) -> dict[str, float]:
    """A line of the log by the names that TensorBoard shows."""
    named = {"loss": entry.loss, "psnr/training frames": entry.psnr_train, "psnr/frames kept back": entry.psnr_val}
    return {name: value for name, value in named.items() if value is not None}


def write_preview(run: StageRun, trainer: Trainer, log: EventLog | None = None) -> None:
    """Truth and render side by side for two training frames."""
    import torch

    from pipeline.frames import save_image

    pairs = [torch.cat([trainer.truth(frame), trainer.render(frame)], 1) for frame in trainer.monitored[:2]]
    picture = (torch.cat(pairs, 1) * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    save_image(run.work / "preview.jpg", picture.cpu().numpy())
    if log is not None:
        size = picture.shape[1], picture.shape[0]
        log.image(trainer.step_count, "truth and render of two training frames", run.work / "preview.jpg", size)


def finish(run: StageRun, trainer: Trainer, frames: int, log: EventLog | None) -> Result:
    """Write the avatar, its log and preview, and judge them."""
    from pipeline.avatars import save_avatar
    from pipeline.dataset import write_json

    trainer.round_to_saved()
    write_preview(run, trainer, log)
    config, entry = run.config.train, trainer.log[-1]
    validated = [line for line in trainer.log if line.psnr_val is not None]
    psnr_val = validated[-1].psnr_val if validated else None
    size = save_avatar(
        trainer.avatar, run.work, {"resolution": config.resolution, "steps": trainer.step_count, "frames": frames}
    )
    write_json(run.work / "log.json", [asdict(line) for line in trainer.log])
    judged = entry.psnr_train if psnr_val is None else psnr_val
    level: Level = "good" if judged >= GOOD_PSNR else "fair" if judged >= FAIR_PSNR else "poor"
    if frames < FEW_FRAMES and level == "good":
        level = "fair"
    unseen = "" if psnr_val is None else f", {psnr_val:.1f} dB on frames kept back"
    few = f" Only {frames} usable frames: poses and expressions beside them are guesses." if frames < FEW_FRAMES else ""
    text = (
        f"Training: {level}. {trainer.step_count} steps in {trainer.seconds:.0f} s on {frames} frames, "
        f"PSNR {entry.psnr_train:.1f} dB on training frames{unseen}; "
        f"{trainer.avatar.count:,} Gaussians, {size / 1e6:.1f} MB.{few}"
    )
    metrics = {
        "psnr_train": entry.psnr_train,
        "psnr_val": psnr_val,
        "steps": trainer.step_count,
        "train_seconds": round(trainer.seconds, 2),
        "steps_per_second": round(trainer.step_count / max(trainer.seconds, 1e-9), 2),
        "gaussians": trainer.avatar.count,
        "frames": frames,
        "bytes": size,
        "log_seconds": None if log is None else round(log.seconds, 3),
    }
    return Result(Verdict(level, text, "preview.jpg"), metrics)


STAGE = Stage(
    name="train",
    version=6,
    inputs=("decode", "matte", "fit"),
    run=run,
    reads=("evaluate.holdout", "evaluate.min_holdout_frames"),
    needs="gpu",
    durable=("scratch/*.safetensors",),
    description="from crops, alphas and the fit to a Gaussian avatar",
)
