"""Baking: what is linear comes back, what is not comes near, every coefficient moves, and bad files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avatar_data import SIZE, clip, conditions, linear_avatar, training_data

from pipeline.avatars import WEIGHTS, AvatarModel, Condition, Gaussians, load_avatar, save_avatar
from pipeline.avatars.baked import BakedAvatar
from pipeline.avatars.rigged import RiggedAvatar
from pipeline.bake import bake, sample_rows
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.export import mean_psnr
from pipeline.gaze import eyes_of, looking
from pipeline.geometry import invert_rigid, matrix_to_quaternion, quaternion_multiply, transform_points
from pipeline.heads import EXPRESSIONS
from pipeline.metrics import psnr
from pipeline.splats import SH_C0

TRAINED = 18
K = torch.from_numpy(clip().K).float()


def seen(avatar: AvatarModel, condition: Condition) -> np.ndarray:
    image = avatar.render(condition, K, SIZE, SIZE, torch.ones(3), threads=1).image
    return np.asarray(image.clamp(0, 1).numpy())


def baked_from(avatar: AvatarModel) -> BakedAvatar:
    known = Condition(*(value[:TRAINED] for value in conditions(clip())))
    return bake(avatar, known, K.expand(TRAINED, 3, 3), SIZE, threads=1)


@pytest.fixture(scope="module")
def trained() -> RiggedAvatar:
    """Trained on the first part of the clip for a second."""
    from dataclasses import replace

    from pipeline.training import Trainer

    data = training_data()
    known = replace(
        data,
        images=data.images[:TRAINED],
        alphas=data.alphas[:TRAINED],
        conditions=Condition(*(value[:TRAINED] for value in data.conditions)),
    )
    trainer = Trainer(known, TrainConfig(gaussians=800, resolution=SIZE, steps=150, coarse_share=0), threads=1)
    while not trainer.finished:
        trainer.step()
    assert isinstance(trainer.avatar, RiggedAvatar)
    return trainer.avatar.requires_grad_(False)


@pytest.fixture(scope="module")
def baked(trained: RiggedAvatar) -> BakedAvatar:
    return baked_from(trained)


def test_it_comes_near_on_frames_that_it_was_not_baked_from(trained: RiggedAvatar, baked: BakedAvatar) -> None:
    film = list(training_data().images[TRAINED:] / np.float32(255))
    rows = [conditions(clip()).frame(i) for i in range(TRAINED, TRAINED + len(film))]
    full, ours = ([seen(avatar, condition) for condition in rows] for avatar in (trained, baked))
    assert mean_psnr(film, full) > 24
    assert mean_psnr(film, ours) > mean_psnr(film, full) - 0.5
    assert min(map(psnr, full, ours)) > 36


def test_every_coefficient_does_what_it_does_in_the_full_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # So small a picture would hide what eight bits cost; and untrained, the full model is linear.
    monkeypatch.setattr("pipeline.bake.NOISE_DB", 80.0)
    full = RiggedAvatar.start(training_data(), TrainConfig(gaussians=800), np.random.default_rng(0))
    baked, rest = baked_from(full.requires_grad_(False)), full.neutral
    before, ours = seen(full, rest), seen(baked, rest)
    assert psnr(before, ours) > 45
    for i, name in enumerate(EXPRESSIONS):
        alone = torch.eye(len(EXPRESSIONS))[i]
        condition = rest._replace(expression=alone, eyes=rest.eyes + eyes_of(alone[None], EXPRESSIONS)[0])
        wanted, changed = seen(full, condition) - before, seen(baked, condition) - ours
        assert np.abs(wanted).max() > 0.02, name
        # A third of a grey level is what rounding leaves.
        assert np.linalg.norm(changed - wanted) < 0.1 * np.linalg.norm(wanted) + 0.15, name


def test_it_finds_how_far_torso_and_skull_take_a_gaussian_along(trained: RiggedAvatar, baked: BakedAvatar) -> None:
    weights = trained.joint_weights()
    for column, joint in ((1, 1), (2, 4)):
        assert (baked.joint_weights[:, column] - weights[:, joint]).abs().max() < 0.01


def test_a_linear_avatar_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.bake.NOISE_DB", 90.0)
    given = linear_avatar()
    found, driven = baked_from(given), conditions(clip())
    assert (found.joints.int() - given.joints.int()).abs().max() <= 1
    for i in range(TRAINED, len(driven.eyes), 2):
        wanted, ours = given.gaussians(driven.frame(i)), found.gaussians(driven.frame(i))
        moved = (wanted.means - given.gaussians(driven.frame(0)).means).norm(dim=1)
        assert (wanted.means - ours.means).norm(dim=1).max() < 3e-4 < 0.02 * moved.max()
        assert (wanted.colors - ours.colors).abs().max() < 4e-3
        assert (wanted.scales / ours.scales).log().abs().max() < 0.02
        assert psnr(seen(given, driven.frame(i)), seen(found, driven.frame(i))) > 50


class Shaded(RiggedAvatar):
    """The same in the head's axes, with a colour that depends on the direction it is seen from."""

    def deform(self, prepared: Any) -> Gaussians:
        given = super().deform(prepared)
        T_cam_head = torch.eye(4)
        T_cam_head[:3, :3], T_cam_head[:3, 3] = prepared.rotations[0], prepared.translations[0]
        back = invert_rigid(T_cam_head)
        sh = torch.zeros(len(given.means), 4, 3)
        sh[:, 0] = (given.colors - 0.5) / SH_C0
        sh[:, 3, 0], sh[:, 1, 2] = 0.4, -0.4
        turn = matrix_to_quaternion(back[:3, :3]).expand_as(given.quats)
        quats = quaternion_multiply(turn, given.quats)
        return Gaussians(transform_points(back, given.means), quats, given.scales, given.opacities, sh, 1, T_cam_head)


def test_harmonics_become_colours_that_depend_on_the_pose(trained: RiggedAvatar) -> None:
    shaded = Shaded.restore(trained.settings(), trained.compact_weights()).requires_grad_(False)
    found = baked_from(shaded)
    rows = [conditions(clip()).frame(i) for i in range(TRAINED, 24)]
    plain = np.mean([psnr(seen(shaded, row), seen(trained, row)) for row in rows])
    ours = [psnr(seen(shaded, row), seen(found, row)) for row in rows]
    assert plain < 35 < min(ours)


def test_a_face_tracker_drives_it(baked: BakedAvatar) -> None:
    driven = conditions(clip())
    told = looking(driven.expression, EXPRESSIONS, driven.eyes)
    found = baked.follow_face(told, driven.T_cam_head)
    torch.testing.assert_close(found.eyes, driven.eyes)
    assert torch.equal(found.T_cam_skull, driven.T_cam_head)
    spread = (driven.T_cam_torso - driven.T_cam_torso.mean(0)).square().mean()
    assert (found.T_cam_torso - driven.T_cam_torso).square().mean() < 0.5 * spread


def test_the_file_holds_what_was_baked(baked: BakedAvatar, tmp_path: Path) -> None:
    save_avatar(baked, tmp_path)
    loaded, condition = load_avatar(tmp_path), conditions(clip()).frame(20)
    for ours, theirs in zip(baked.gaussians(condition)[:5], loaded.gaussians(condition)[:5], strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(*pair) for pair in zip(loaded.neutral, baked.neutral, strict=True))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("linear", lambda x: x[:, :-1], "'linear' has shape"),
        ("motion", lambda x: x[..., :10], "'motion' has shape"),
        ("shading", lambda x: x.float(), "'shading' holds torch.float32"),
        ("means", lambda x: x.int(), "'means' holds torch.int32"),
        ("quats", lambda x: x * np.nan, "not finite"),
        ("offset", lambda x: x[0], "'offset' has shape"),
        ("drive_scale", lambda x: 0 * x, "above 0"),
        ("joints", None, "missing or unknown: joints"),
    ],
)
def test_damaged_files_are_refused(baked: BakedAvatar, tmp_path: Path, name: str, damage: Any, words: str) -> None:
    from safetensors.torch import load_file, save_file

    save_avatar(baked, tmp_path)
    arrays = load_file(tmp_path / WEIGHTS)
    value = arrays.pop(name)
    save_file(arrays if damage is None else {**arrays, name: damage(value).contiguous()}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=words):
        load_avatar(tmp_path)


def test_it_cannot_be_trained() -> None:
    with pytest.raises(UserError, match="made from a trained one"):
        BakedAvatar.start(training_data(), TrainConfig(), np.random.default_rng(0))


def test_large_avatars_are_sampled_less(trained: RiggedAvatar, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample_rows(trained, 500) == (120, 160, 61)
    assert sample_rows(trained, 30) == (30, 250, 61)
    monkeypatch.setattr(RiggedAvatar, "count", 60_000)
    assert sum(sample_rows(trained, 500)) * 60_000 * 13 * 4 < 450_000_000
