"""The trainer recovers a known subject, is deterministic, resumes where it was, and stops on nonsense."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from avatar_data import training_data

from pipeline import training
from pipeline.avatars import Condition, TrainingData
from pipeline.config import TrainConfig
from pipeline.errors import StageError
from pipeline.training import CHECKPOINT, Trainer, resolve_device

CONFIG = TrainConfig(gaussians=600, resolution=64, steps=40)


def part(data: TrainingData, rows: slice | np.ndarray) -> TrainingData:
    """Some of the frames."""
    conditions = Condition(*(value[rows] for value in data.conditions))
    return TrainingData(data.images[rows], data.alphas[rows], conditions, data.Ks, data.head, data.identity)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: value.clone() for name, value in trainer.avatar.state_dict().items()}


def run(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.step()


def test_training_recovers_the_subject_on_frames_it_never_saw() -> None:
    data = training_data(48)
    held_out = np.arange(48) % 6 == 3
    train, test = part(data, np.flatnonzero(~held_out)), part(data, np.flatnonzero(held_out))
    trainer = Trainer(train, TrainConfig(gaussians=1500, resolution=64, steps=300), threads=1)
    run(trainer, 300)
    entry = trainer.record()
    assert entry.psnr_train > 33.8

    def error(image: np.ndarray, truth: np.ndarray) -> float:
        return float(-10 * np.log10(np.square(image / 255.0 - truth / 255.0).mean()))

    K, white = torch.from_numpy(data.Ks[0]), torch.ones(3)
    mean_frame = train.images.mean(0)
    rendered, mean = [], []
    with torch.no_grad():
        for i in range(len(test)):
            image = trainer.avatar.render(test.conditions.frame(i), K, 64, 64, white, threads=1).image.clamp(0, 1)
            rendered.append(error(image.numpy() * 255, test.images[i]))
            mean.append(error(mean_frame, test.images[i]))
    assert np.mean(rendered) > 33.8
    assert np.mean(rendered) > np.mean(mean) + 8


def test_training_learns_the_alpha() -> None:
    data = training_data()
    trainer = Trainer(data, CONFIG.model_copy(update={"steps": 150, "gaussians": 1500}), threads=1)
    run(trainer, 150)
    black = trainer.render(0, torch.zeros(3))
    alpha = 1 - (trainer.render(0) - black).mean(2)
    truth = torch.from_numpy(data.alphas[0]).float() / 255
    assert (alpha - truth).abs().mean() < 0.03


def test_the_frames_edge_is_not_learned_as_the_subjects() -> None:
    data = training_data()
    inside = np.ones((64, 64), np.float32)
    inside[48:] = 0
    images, alphas = data.images.copy(), data.alphas.copy()
    images[:, 48:], alphas[:, 48:] = 255, 0
    cut = dataclasses.replace(data, images=images, alphas=alphas, inside=inside[None])
    trainer = Trainer(cut, CONFIG.model_copy(update={"steps": 150, "gaussians": 1500}), threads=1)
    run(trainer, 150)
    assert (trainer.render(0)[48:] == 1).all()
    assert trainer.psnr([0, 12]) > 25
    # Uncut, the shoulders go on below the edge instead of ending at it.
    K = torch.from_numpy(data.Ks[0])
    whole = trainer.avatar.render(data.conditions.frame(0), K, 64, 64, torch.ones(3), threads=1)
    assert whole.alpha.detach()[48:50][torch.from_numpy(data.alphas[0][48:50] == 255)].mean() > 0.3


def test_what_is_not_sure_counts_less() -> None:
    """Where every second frame is poisoned, it pulls weights and render the less the less it is believed."""
    clean = training_data()
    poisoned = np.zeros(clean.alphas.shape, bool)
    poisoned[::2, 20:34, 24:40] = True
    images = clean.images.copy()
    images[poisoned] = (0, 255, 0)

    def trained(pixels: np.ndarray, confidence: int) -> Trainer:
        sure = np.where(poisoned, confidence, 255).astype(np.uint8)
        config = CONFIG.model_copy(update={"steps": 150})
        trainer = Trainer(dataclasses.replace(clean, images=pixels, confidences=sure), config, threads=1)
        run(trainer, 150)
        return trainer

    pulled, green = [], []
    for confidence in (255, 0):
        with_poison, without = trained(images, confidence), trained(clean.images, confidence)
        colors = [trainer.avatar.get_parameter("colors").detach() for trainer in (with_poison, without)]
        pulled.append(float((colors[0] - colors[1]).norm()))
        off = [(with_poison.render(frame) - without.render(frame))[20:34, 24:40].abs().mean() for frame in (1, 5, 13)]
        green.append(float(torch.stack(off).mean()))
    assert pulled[1] < pulled[0]
    assert green[1] < 0.5 * green[0]


def test_confidence_weighs_between_guessed_and_sure() -> None:
    data = training_data()
    confidences = np.full(data.alphas.shape, 255, np.uint8)
    confidences[:, :32] = 0
    confidences[3] = 100
    trainer = Trainer(dataclasses.replace(data, confidences=confidences), CONFIG, threads=1)
    full, coarse = trainer._levels
    for level in (full, coarse):
        weight = level.weight(0)
        assert weight is not None and weight.shape == (level.size, level.size)
        half = level.size // 2
        assert (weight[:half] == training.GUESSED_WEIGHT).all()
        torch.testing.assert_close(weight[half:], torch.ones_like(weight[half:]))
        assert level.weight(3).mean().item() == pytest.approx(0.25 + 0.75 * 100 / 255, abs=1e-5)
    assert Trainer(data, CONFIG, threads=1)._levels[0].weight(0) is None


def test_another_confidence_is_another_clip(tmp_path: Path) -> None:
    data = training_data()
    sure = np.full(data.alphas.shape, 255, np.uint8)
    trainer = Trainer(dataclasses.replace(data, confidences=sure), CONFIG, threads=1)
    trainer.save_checkpoint(tmp_path)
    unsure = sure.copy()
    unsure[7, 3, 3] = 0
    with pytest.raises(StageError, match="clip"):
        Trainer(dataclasses.replace(data, confidences=unsure), CONFIG, threads=1).resume(tmp_path)
    assert Trainer(dataclasses.replace(data, confidences=sure), CONFIG, threads=1).resume(tmp_path)


def test_every_camera_sees_through_its_own_lens() -> None:
    data = training_data()
    taken_by = np.arange(len(data)) % 2
    images, alphas, second = data.images.copy(), data.alphas.copy(), data.Ks[0].copy()
    second[0, 2] += 5
    images[1::2], alphas[1::2] = np.roll(images[1::2], 5, axis=2), np.roll(alphas[1::2], 5, axis=2)
    images[1::2, :, :5], alphas[1::2, :, :5] = 255, 0
    config = CONFIG.model_copy(update={"steps": 100, "gaussians": 1500})

    def psnr(Ks: np.ndarray) -> float:
        both = dataclasses.replace(data, images=images, alphas=alphas, Ks=Ks, cameras=taken_by)
        trainer = Trainer(both, config, threads=1)
        run(trainer, 100)
        return trainer.psnr([0, 1, 12, 13])

    assert psnr(np.stack([data.Ks[0], second])) > psnr(np.stack([data.Ks[0]] * 2)) + 3


def test_the_same_seed_gives_the_same_weights_and_another_others() -> None:
    runs = []
    for seed in (0, 0, 1):
        trainer = Trainer(training_data(), CONFIG.model_copy(update={"seed": seed}), threads=1)
        run(trainer, 12)
        runs.append(weights_of(trainer))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["means"], runs[2]["means"])


@pytest.mark.parametrize("stop_after", [3, 37])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, stop_after: int) -> None:
    through = Trainer(training_data(), CONFIG, threads=1)
    run(through, CONFIG.steps)

    first = Trainer(training_data(), CONFIG, threads=1)
    assert not first.resume(tmp_path)
    run(first, stop_after)
    first.record()
    first.save_checkpoint(tmp_path)
    second = Trainer(training_data(), CONFIG, threads=1)
    assert second.resume(tmp_path)
    assert second.step_count == stop_after
    assert second.log == first.log
    run(second, CONFIG.steps - stop_after)
    assert second.finished
    expected, found = weights_of(through), weights_of(second)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(training_data(), CONFIG, threads=1)
    trainer.step()
    trainer.save_checkpoint(tmp_path)
    with pytest.raises(StageError, match=r"train.steps 40, this run 41"):
        Trainer(training_data(), CONFIG.model_copy(update={"steps": 41}), threads=1).resume(tmp_path)
    good = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(good.replace(b'train.avatar\\":\\"rigged', b'train.avatar\\":\\"ragged'))
    with pytest.raises(StageError, match=r"train.avatar ragged, this run rigged"):
        trainer.resume(tmp_path)
    for name in (b"adam/", b"avatar/", b"density/", b"losses"):
        (tmp_path / CHECKPOINT).write_bytes(good.replace(name, b"X" + name[1:]))
        with pytest.raises(StageError, match="cannot be read"):
            Trainer(training_data(), CONFIG, threads=1).resume(tmp_path)
    for place in (len(good) - 1, len(good) // 2):
        (tmp_path / CHECKPOINT).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(StageError, match="its bytes were changed"):
            Trainer(training_data(), CONFIG, threads=1).resume(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(good)
    with pytest.raises(StageError, match="clip"):
        Trainer(part(training_data(), slice(0, 20)), CONFIG, threads=1).resume(tmp_path)
    other = Trainer(training_data(), CONFIG, threads=1)
    other.head = "flame 2023"
    with pytest.raises(StageError, match=r"head anny .*, this run flame 2023"):
        other.resume(tmp_path)
    monkeypatch.setattr(training, "CHECKPOINT_SCHEMA", 99)
    with pytest.raises(StageError, match="schema 3, this run 99"):
        trainer.resume(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(StageError, match=r"cannot be read(.|\n)*delete"):
        trainer.resume(tmp_path)


def test_divergence_stops_with_its_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(training_data(), CONFIG, threads=1)
    run(trainer, 2)
    trainer.save_checkpoint(tmp_path)
    good = (tmp_path / CHECKPOINT).read_bytes()
    with torch.no_grad():
        trainer.avatar.get_parameter("colors")[0] = float("nan")
    with pytest.raises(StageError, match="'colors' holds values that are not finite"):
        trainer.save_checkpoint(tmp_path)
    for work in (trainer.step, trainer.record):
        with pytest.raises(
            StageError, match=r"diverged at step 3: .*colors.* nan(.|\n)*checkpoint, of step 2, is kept"
        ):
            work()
    assert (tmp_path / CHECKPOINT).read_bytes() == good


def test_frames_kept_back_are_not_trained_on_while_they_validate() -> None:
    trainer = Trainer(training_data(48), CONFIG, threads=1)
    order = [trainer._frame_at(step) for step in range(CONFIG.steps)]
    validated = trainer._validated_steps
    assert 0 < validated < CONFIG.steps
    assert max(order[:validated]) < 46
    assert max(trainer.monitored) < 46


def test_cuda_is_not_pretended() -> None:
    if torch.cuda.is_available():
        assert resolve_device("auto").type == "cuda"
    else:
        assert resolve_device("auto").type == "cpu"
        with pytest.raises(StageError, match="no CUDA device"):
            resolve_device("cuda")
