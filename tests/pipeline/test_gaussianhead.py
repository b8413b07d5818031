"""`gaussianhead` has none of the released defects, recovers a known subject, and its compact variant is small."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avatar_data import training_data

from pipeline.avatars import Condition, Gaussians, TrainingData, load_avatar, row, save_avatar
from pipeline.avatars.gaussianhead import GaussianHeadAvatar, GaussianHeadPlusAvatar
from pipeline.avatars.rigged import RiggedAvatar
from pipeline.config import DensityConfig, GaussianHeadConfig, TrainConfig, configure, preset_config
from pipeline.errors import UserError
from pipeline.geometry import quaternion_to_matrix
from pipeline.training import Trainer

SMALL = GaussianHeadConfig(
    field_layers=4, field_width=32, frequencies=4, warmup_steps=5, plane_size=16, sh_every=10, final_share=0.1
)
CONFIG = TrainConfig(avatar="gaussianhead", gaussians=600, resolution=64, steps=40, gaussianhead=SMALL)


def config(steps: int = 40, density: DensityConfig | None = None, gaussians: int = 600, **own: Any) -> TrainConfig:
    """Small settings with changes of the model's own."""
    changed = GaussianHeadConfig.model_validate({**SMALL.model_dump(), **own})
    return CONFIG.model_copy(
        update={"steps": steps, "gaussianhead": changed, "density": density or DensityConfig(), "gaussians": gaussians}
    )


def trained(steps: int, settings: TrainConfig = CONFIG, data: TrainingData | None = None) -> Trainer:
    """A trainer after some steps."""
    trainer = Trainer(data or training_data(), settings, threads=1)
    for _ in range(steps):
        trainer.step()
    return trainer


def avatar_of(trainer: Trainer) -> GaussianHeadAvatar:
    assert isinstance(trainer.avatar, GaussianHeadAvatar)
    return trainer.avatar


def shown(trainer: Trainer, frame: int = 3) -> Gaussians:
    """The Gaussians of a training frame."""
    with torch.no_grad():
        return trainer.avatar.deform(row(trainer._prepared, frame))


@pytest.mark.parametrize("avatar", ["gaussianhead", "gaussianhead-plus"])
def test_every_channel_of_every_group_is_trained(avatar: str) -> None:
    settings = config(hash_coarsest=4, hash_finest=16, hash_entries=64).model_copy(update={"avatar": avatar})
    before = Trainer(training_data(), settings, threads=1)
    started = [parameter.detach().clone() for parameter in avatar_of(before).planes.parameters()]  # type: ignore[union-attr]
    after = trained(3, settings)
    for old, new in zip(started, avatar_of(after).planes.parameters(), strict=True):  # type: ignore[union-attr]
        moved = (new - old).abs().flatten(2).amax(2)
        assert moved.shape[0] == 3 * 4
        assert (moved > 0).all()


def test_the_derivation_follows_its_schedule_and_never_freezes() -> None:
    trainer = trained(0, config(derivation_rate=2e-3, final_share=0.1))
    derivation = avatar_of(trainer).derivation
    assert derivation is not None
    rates, last = [], derivation.detach().clone()
    for step in range(40):
        trainer.step()
        rates.append(trainer._settings["derivation"]["lr"])
        if step >= 30:
            assert not torch.equal(derivation, last)
        last = derivation.detach().clone()
    assert rates[0] == pytest.approx(2e-3) and rates[-1] == pytest.approx(2e-4)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    for preset in ("quick", "standard", "best"):
        settings = preset_config(preset, "gaussianhead").train
        avatar = GaussianHeadAvatar.start(
            training_data(), settings.model_copy(update={"gaussians": 100}), np.random.default_rng(0)
        )
        assert all(group.rate > 0 and group.final_rate > 0 for group in avatar.parameter_groups())
        trained_ones = {id(p) for group in avatar.parameter_groups() for p in group.parameters}
        assert {name for name, p in avatar.named_parameters() if id(p) not in trained_ones} <= {"colors"}


def test_rotations_stay_on_the_sphere_and_turn_each_gaussian_by_its_own() -> None:
    start = avatar_of(trained(0, config(derivation_rate=0.05)))
    avatar = avatar_of(trained(40, config(derivation_rate=0.05)))
    assert avatar.derivation is not None and start.derivation is not None
    assert (avatar.derivation - start.derivation).abs().amax() > 0.05
    torch.testing.assert_close(avatar.derivation.norm(dim=2), torch.ones(600, 4), rtol=0, atol=1e-5)
    with torch.no_grad():
        rest = avatar.means + 0.01
        turned = avatar.doppelgangers(rest)
        place = (rest - avatar.centre) / avatar.radius
        for gaussian in (0, 7, 599):
            for k in range(4):
                R = quaternion_to_matrix(avatar.derivation[gaussian, k])
                torch.testing.assert_close(R @ R.T, torch.eye(3), rtol=0, atol=1e-5)
                assert torch.linalg.det(R) == pytest.approx(1, abs=1e-5)
                torch.testing.assert_close(turned[gaussian, k], R @ place[gaussian], rtol=0, atol=1e-5)
    # From the start the coordinates that the planes are read at are three numbers of their own, in every group.
    doppelgangers = start.doppelgangers(start.means).detach()
    for k in range(4):
        spread = torch.linalg.svdvals(doppelgangers[:, k] - doppelgangers[:, k].mean(0))
        assert spread[2] > 0.1 * spread[0]


def test_new_gaussians_inherit_rotations_and_their_optimiser_state() -> None:
    density = DensityConfig(every=8, first=8, last=8, reset_every=0, gradient=1e-6, max_gaussians=700)
    trainer = trained(7, config(density=density))
    avatar = avatar_of(trainer)
    taken: list[torch.Tensor] = []
    before: dict[str, torch.Tensor] = {}
    take_rows = avatar.take_rows

    def spy(index: torch.Tensor) -> None:
        assert avatar.derivation is not None
        before["derivation"] = avatar.derivation.detach().clone()
        state = trainer._optimisers[True].state[avatar.derivation]
        before.update({key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")})
        taken.append(index)
        take_rows(index)

    avatar.take_rows = spy  # type: ignore[method-assign]
    trainer.step()
    (index,) = taken
    assert avatar.count == len(index) == 700
    assert avatar.derivation is not None
    assert torch.equal(avatar.derivation, before["derivation"][index])
    state = trainer._optimisers[True].state[avatar.derivation]
    for key in ("exp_avg", "exp_avg_sq"):
        assert before[key].abs().amax() > 0
        assert torch.equal(state[key], before[key][index])
    previous = avatar.derivation.detach().clone()
    trainer.step()
    assert (avatar.derivation != previous).flatten(1).any(1).all()


def test_opacities_reset_are_low_at_the_next_render() -> None:
    density = DensityConfig(every=1000, first=1000, last=1000, reset_every=20, reset_opacity=0.01)
    trainer = trained(19, config(density=density))
    assert shown(trainer).opacities.median() > 0.3
    trainer.step()
    # Measured at the frame of the step itself; a different one may open some again a little.
    assert shown(trainer, trainer._frame_at(19)).opacities.max() < 0.02
    assert shown(trainer).opacities.quantile(0.99) < 0.05


def test_a_head_that_barely_moves_is_not_pruned_away() -> None:
    data = training_data()
    still = Condition(*(value[:1].expand_as(value).clone() for value in data.conditions))
    frozen = dataclasses.replace(data, images=data.images[:1].repeat(24, 0), conditions=still)
    density = DensityConfig(every=5, first=5, last=40, reset_every=15, gradient=1.0)
    trainer = trained(40, config(density=density), frozen)
    assert trainer.avatar.count > 0.9 * 600


def test_the_field_is_off_during_the_warm_up() -> None:
    trainer = trained(5)
    field = avatar_of(trainer).field
    assert field is not None
    assert all(parameter.grad is None for parameter in field.parameters())
    assert field.answer.weight.abs().max() == 0
    trainer.step()
    assert field.answer.weight.abs().max() > 0
    # Without the rig, whose triangles grow with the expression, the field alone changes scales.
    still, moved = (trained(15, config(warmup_steps=steps, rig=False)) for steps in (100, 5))
    for trainer, differs in ((still, False), (moved, True)):
        one, other = (shown(trainer, frame).scales for frame in (0, 12))
        assert torch.equal(one, other) != differs


def test_harmonics_rise_by_degrees() -> None:
    trainer = trained(0, config(sh_degree=2))
    for step in range(35):
        trainer.step()
        degree = min(step // 10, 2)
        gaussians = shown(trainer)
        assert gaussians.sh_degree == degree
        assert gaussians.colors.shape == (600, (degree + 1) ** 2, 3)


def test_gaussians_stand_in_the_heads_coordinates() -> None:
    """However the head is held, what is rigid with it stays where it is, and so does what harmonics mean."""
    trainer = trained(20, config(rig=False))
    one, other = shown(trainer, 0), shown(trainer, 12)
    conditions = training_data().conditions
    assert one.T_cam_world is not None and other.T_cam_world is not None
    torch.testing.assert_close(one.T_cam_world, conditions.T_cam_head[0])
    torch.testing.assert_close(other.T_cam_world, conditions.T_cam_head[12])
    same = conditions.frame(0)._replace(T_cam_head=conditions.T_cam_head[12], eyes=conditions.eyes[12])
    with torch.no_grad():
        turned = trainer.avatar.gaussians(same)
    for name in ("means", "quats", "scales"):
        torch.testing.assert_close(getattr(turned, name), getattr(one, name), rtol=0, atol=1e-5)


def test_the_rig_moves_them_as_it_moves_rigged() -> None:
    """Before anything is learned, both models put a Gaussian of the same seed on the same spot of the picture."""
    settings = TrainConfig(gaussians=600, resolution=64)
    data = training_data()
    ours = GaussianHeadAvatar.start(data, settings, np.random.default_rng(0)).requires_grad_(False)
    theirs = RiggedAvatar.start(data, settings, np.random.default_rng(0)).requires_grad_(False)
    condition = data.conditions.frame(7)
    mine, other = ours.gaussians(condition), theirs.gaussians(condition)
    T = mine.T_cam_world
    assert T is not None
    torch.testing.assert_close(mine.means @ T[:3, :3].T + T[:3, 3], other.means, rtol=0, atol=1e-5)
    turned = T[:3, :3] @ quaternion_to_matrix(mine.quats)
    torch.testing.assert_close(turned, quaternion_to_matrix(other.quats), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "part",
    [{"derivations": 0}, {"field_layers": 0}, {"plane_size": 0}, {"start": "random"}, {"rig": False}],
    ids=lambda part: next(iter(part)),
)
def test_parts_can_be_left_out(part: dict[str, Any], tmp_path: Path) -> None:
    settings = config(steps=40, **part)
    trainer = trained(40, settings)
    assert trainer.psnr([0, 9]) > trained(0, settings).psnr([0, 9]) + 1
    avatar = avatar_of(trainer)
    assert (avatar.derivation is None) == (part.get("derivations") == 0)
    assert (avatar.field is None) == (part.get("field_layers") == 0)
    assert (avatar.planes is None) == (part.get("plane_size") == 0)
    index = torch.tensor([5, 5, 9])
    rows = shown(trainer)
    avatar.take_rows(index)
    taken = shown(trainer)
    torch.testing.assert_close(taken.means, rows.means[index])
    torch.testing.assert_close(taken.colors, rows.colors[index])
    torch.testing.assert_close(taken.opacities, rows.opacities[index])
    save_avatar(avatar, tmp_path)
    assert load_avatar(tmp_path).count == 3


@pytest.mark.parametrize("avatar", ["gaussianhead", "gaussianhead-plus"])
def test_saved_avatars_render_the_same(avatar: str, tmp_path: Path) -> None:
    trainer = trained(30, CONFIG.model_copy(update={"avatar": avatar}))
    save_avatar(trainer.avatar, tmp_path)
    loaded = load_avatar(tmp_path)
    assert (loaded.name, loaded.count, loaded.head) == (avatar, 600, "anny")
    data = training_data()
    K, white = torch.from_numpy(data.Ks[0]), torch.ones(3)
    for condition in (data.conditions.frame(3), loaded.neutral):
        one = trainer.avatar.render(condition, K, 64, 64, white).image
        two = loaded.render(condition, K, 64, 64, white).image
        assert (one - two).abs().mean() < 0.5 / 255


def test_networks_in_half_precision_render_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(40)
    own = trainer.render(3)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    half = trainer.render(3)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    full = trainer.render(3)
    assert not torch.equal(half, full)
    assert (half - full).abs().mean() < 0.5 / 255
    assert torch.equal(own, half) or torch.equal(own, full)


@pytest.mark.parametrize("stop_after", [3, 21])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(stop_after: int, tmp_path: Path) -> None:
    density = DensityConfig(every=8, first=8, last=30, reset_every=16, gradient=2e-5, max_gaussians=700)
    settings = config(steps=30, density=density)
    through = trained(30, settings)
    assert through.avatar.count != 600
    trained(stop_after, settings).save_checkpoint(tmp_path)
    second = Trainer(training_data(), settings, threads=1)
    assert second.resume(tmp_path)
    for _ in range(30 - stop_after):
        second.step()
    expected, found = through.avatar.state_dict(), second.avatar.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("avatar", ["gaussianhead", "gaussianhead-plus"])
def test_training_recovers_the_subject_on_frames_it_never_saw(avatar: str) -> None:
    data = training_data(48)
    held_out = np.arange(48) % 6 == 3

    def part(rows: np.ndarray) -> TrainingData:
        conditions = Condition(*(value[rows] for value in data.conditions))
        return dataclasses.replace(data, images=data.images[rows], alphas=data.alphas[rows], conditions=conditions)

    settings = config(steps=250, gaussians=1500, sh_every=50).model_copy(update={"avatar": avatar})
    trainer = trained(250, settings, part(np.flatnonzero(~held_out)))
    test = part(np.flatnonzero(held_out))
    K, white = torch.from_numpy(data.Ks[0]), torch.ones(3)
    errors = []
    with torch.no_grad():
        for i in range(len(test)):
            image = trainer.avatar.render(test.conditions.frame(i), K, 64, 64, white, threads=1).image.clamp(0, 1)
            errors.append(float((image - torch.from_numpy(test.images[i]) / 255).square().mean()))
    assert np.mean(-10 * np.log10(errors)) > 30


def test_the_compact_variant_is_small_and_smaller(tmp_path: Path) -> None:
    """At every preset's sizes, for the Gaussians it starts with and the most it may come to."""
    bent = training_data()
    bent = dataclasses.replace(bent, conditions=bent.conditions._replace(torso_shape=torch.zeros(24, 4)))
    for preset in ("quick", "standard", "best"):
        settings = preset_config(preset, "gaussianhead-plus").train
        most = settings.density.max_gaussians if settings.density.every else settings.gaussians
        settings = settings.model_copy(update={"gaussians": max(most, settings.gaussians)})
        sizes = [
            save_avatar(model.start(bent, settings, np.random.default_rng(0)), tmp_path)
            for model in (GaussianHeadAvatar, GaussianHeadPlusAvatar)
        ]
        assert sizes[1] < sizes[0]
        assert sizes[1] <= 4_500_000


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("plane_channels=30", "plane_channels=30 does not fit.*30 channels cannot be shared evenly by 4 derivations"),
        ("hash_levels=3", "hash_levels=3 does not fit.*8 channels of a group cannot be shared evenly by 3 levels"),
    ],
)
def test_channels_that_cannot_be_shared_are_refused_with_words(setting: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        configure("quick", ["train.avatar=gaussianhead-plus", f"train.gaussianhead.{setting}"])
