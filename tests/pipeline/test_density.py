"""Density control: what grows, what goes, that states follow, and that a still camera does not delete the avatar."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from avatar_data import training_data

from pipeline.avatars import Condition, TrainingData
from pipeline.avatars.rigged import RiggedAvatar
from pipeline.config import DensityConfig, TrainConfig
from pipeline.density import DensityControl, extent_of
from pipeline.training import Trainer

DENSITY = DensityConfig(every=4, first=4, last=24, reset_every=12, gradient=2e-5, max_gaussians=700)
CONFIG = TrainConfig(gaussians=400, resolution=64, steps=30, density=DENSITY)


def started(count: int = 300) -> RiggedAvatar:
    return RiggedAvatar.start(training_data(), TrainConfig(gaussians=count), np.random.default_rng(0))


def control(avatar: RiggedAvatar, **changes: float) -> DensityControl:
    """Each Gaussian seen once, none pulled."""
    made = DensityControl(DENSITY.model_copy(update=changes), avatar.count, 0, torch.device("cpu"))
    made.views += 1
    return made


def test_small_ones_are_cloned_large_ones_split_and_faint_ones_go() -> None:
    avatar, half = started(), torch.full((300,), 0.5)
    rest = {name: parameter.detach().clone() for name, parameter in avatar.named_parameters()}
    density = control(avatar)
    small, large, faint = 3, 5, 7
    with torch.no_grad():
        avatar.log_scales[small] = math.log(1e-3 * extent_of(avatar.means))
        avatar.log_scales[large] = math.log(0.05 * extent_of(avatar.means))
    rest["log_scales"] = avatar.log_scales.detach().clone()
    density.gradients[[small, large]] = 1.0
    half[faint] = 0.001
    index = density.change(avatar, half, step=4)

    assert avatar.count == len(index) == 301
    assert torch.bincount(index, minlength=300)[[small, large, faint]].tolist() == [2, 2, 0]
    # Every row that nothing happened to, and every row of a clone, is its parent's.
    same = index != large
    for name, axis in avatar.row_axes().items():
        if name in rest:
            expected = rest[name].index_select(axis, index[same])
            found = avatar.get_parameter(name).index_select(axis, torch.nonzero(same).squeeze(1))
            assert torch.equal(found, expected), name
    children = torch.nonzero(index == large).squeeze(1)
    assert torch.allclose(avatar.log_scales[children], rest["log_scales"][large] - math.log(1.6))
    apart = (avatar.means[children] - rest["means"][large]).norm(dim=1)
    assert (apart > 0).all() and (apart < 5 * rest["log_scales"][large].exp().max()).all()
    assert density.gradients.tolist() == density.views.tolist()  # both start again from zero


def test_there_is_a_limit_and_never_nothing() -> None:
    avatar = started()
    density = control(avatar, max_gaussians=310)
    density.gradients += torch.arange(300) + 1.0
    index = density.change(avatar, torch.full((300,), 0.5), step=4)
    assert avatar.count == 310
    # The hardest pulled are the ones doubled.
    assert torch.nonzero(torch.bincount(index) == 2).min() == 290
    nothing = control(avatar)
    nothing.change(avatar, torch.full((310,), 1e-4), step=8)
    assert avatar.count >= 1


def test_a_still_head_is_not_deleted_by_its_size() -> None:
    """The reference implementation measures sizes by how far the camera moves: 0.026 on one clip, and most are gone."""
    data = training_data()
    first = Condition(*(value[:1].expand_as(value) for value in data.conditions))
    still: TrainingData = dataclasses.replace(data, conditions=first)
    avatar = RiggedAvatar.start(still, TrainConfig(gaussians=300), np.random.default_rng(0))
    density = control(avatar)
    density.change(avatar, torch.full((300,), 0.5), step=DENSITY.reset_every + 4)
    assert avatar.count > 290
    # And what is as large as the head does go.
    with torch.no_grad():
        avatar.log_scales[:10] = math.log(0.5 * extent_of(avatar.means))
    before = avatar.count
    density.change(avatar, torch.full((before,), 0.5), step=DENSITY.reset_every + 8)
    assert avatar.count == before - 10


def test_a_reset_shows_in_the_next_render() -> None:
    trainer = Trainer(training_data(), CONFIG, threads=1)
    condition = training_data().conditions.frame(0)
    before = trainer.avatar.gaussians(condition).opacities.detach()
    assert before.max() > 0.5
    trainer._density.reset(trainer.avatar, before)
    after = trainer.avatar.gaussians(condition).opacities
    assert after.max() < DENSITY.reset_opacity + 1e-5
    faint = before < DENSITY.reset_opacity
    assert torch.equal(after[faint], before[faint])


def test_states_follow_their_gaussians() -> None:
    trainer = Trainer(training_data(), CONFIG, threads=1)
    for _ in range(DENSITY.first - 1):
        trainer.step()
    opacities = trainer.avatar.gaussians(training_data().conditions.frame(0)).opacities.detach()
    trainer.step_count += 1  # the next change is due without a step of the optimiser between
    before = {name: {k: v.clone() for k, v in state.items()} for name, _, state in trainer._optimiser_states()}
    marked = {}
    original = trainer._density.change

    def change(*arguments: object) -> torch.Tensor:
        marked["index"] = original(*arguments)  # type: ignore[arg-type]
        return marked["index"]

    trainer._density.change = change  # type: ignore[method-assign]
    trainer._change_density(opacities)
    index = marked["index"]
    assert len(index) > 400
    for name, parameter, state in trainer._optimiser_states():
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].shape == parameter.shape, name
        assert state["step"] == before[name]["step"]
    states = {name: state for name, _, state in trainer._optimiser_states()}
    for name in ("means/0", "colors/0"):
        assert torch.equal(states[name]["exp_avg"], before[name]["exp_avg"][index])
        assert states[name]["exp_avg"].abs().sum() > 0
    assert torch.equal(states["basis/0"]["exp_avg"], before["basis/0"]["exp_avg"][:, index])


@pytest.mark.parametrize("stop_after", [3, 14, 29])
def test_a_grown_run_resumes_to_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    through = Trainer(training_data(), CONFIG, threads=1)
    while not through.finished:
        through.step()
    assert through.avatar.count != 400

    first = Trainer(training_data(), CONFIG, threads=1)
    for _ in range(stop_after):
        first.step()
    first.save_checkpoint(tmp_path)
    second = Trainer(training_data(), CONFIG, threads=1)
    assert second.resume(tmp_path)
    while not second.finished:
        second.step()
    expected, found = through.avatar.state_dict(), second.avatar.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(through.avatar.get_buffer("follow"), second.avatar.get_buffer("follow"))
