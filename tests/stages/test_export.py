"""The export stage: the PLY looks like the avatar, the copies are the avatar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.avatars import load_avatar
from pipeline.config import override, preset_config
from pipeline.dataset import Subject
from pipeline.export import neutral_splats, portrait
from pipeline.metrics import psnr
from pipeline.ply import read_ply
from pipeline.rasterize import rasterize
from pipeline.stage import Result, StageRun
from stages.export import STAGE


def export(subject: Subject, *settings: str) -> tuple[Path, Result]:
    work = subject.root / "work"
    work.mkdir()
    return work, STAGE.run(StageRun(subject, work, override(preset_config("quick"), list(settings)), threads=1))


def test_the_ply_shows_what_the_avatar_shows(finished_subject: Subject) -> None:
    work, _ = export(finished_subject)
    avatar = load_avatar(finished_subject.stage("train"))
    K = torch.tensor([[190.0, 0, 61], [0, 180, 52], [0, 0, 1]])
    white = torch.ones(3)
    truth = avatar.render(avatar.neutral, K, 128, 112, background=white, threads=1)
    splats = read_ply(work / "avatar.ply")
    seen = rasterize(
        *(torch.from_numpy(x) for x in (splats.means, splats.quats, splats.scales, splats.opacities, splats.sh)),
        avatar.neutral.T_cam_head, K, 128, 112, background=white, sh_degree=3, threads=1,
    )  # fmt: skip
    assert truth.alpha.max() > 0.9
    assert psnr(truth.image.clamp(0, 1).numpy(), seen.image.clamp(0, 1).numpy()) > 60


def test_the_head_is_upright_and_in_metres(finished_subject: Subject) -> None:
    avatar = load_avatar(finished_subject.stage("train"))
    splats = neutral_splats(avatar)
    brightness = (0.5 + 0.2820948 * splats.sh[:, 0]).mean(-1)
    head, shoulders = splats.means[:, 1] > 0.12, splats.means[:, 1] < -0.05
    assert head.any() and shoulders.any() and brightness[head].size
    assert 0.3 < np.ptp(splats.means[:, 1]) < 0.8


def test_the_files_are_the_avatar_and_are_counted(finished_subject: Subject) -> None:
    work, result = export(finished_subject)
    for name in ("avatar.safetensors", "avatar.json"):
        assert (work / name).read_bytes() == (finished_subject.stage("train") / name).read_bytes()
    assert sorted(path.name for path in work.iterdir()) == [
        *("avatar.json", "avatar.ply", "avatar.safetensors", "neutral.jpg"),
    ]
    assert result.metrics["gaussians"] == 1500
    assert result.metrics["bytes"]["avatar.ply"] == (work / "avatar.ply").stat().st_size > 1500 * 62 * 4
    assert "1,500 Gaussians" in result.verdict.text


def test_the_ply_can_be_left_out(finished_subject: Subject) -> None:
    work, result = export(finished_subject, "export.ply=false")
    assert not (work / "avatar.ply").exists()
    assert "PLY" not in result.verdict.text and "avatar.ply" not in result.metrics["bytes"]


def test_a_portrait_is_framed(finished_subject: Subject) -> None:
    avatar = load_avatar(finished_subject.stage("train"))
    picture = portrait(neutral_splats(avatar), avatar.neutral.T_cam_head.double().numpy(), 96, threads=1)
    rows = np.flatnonzero((picture < 250).any((1, 2)))
    assert picture.shape == (96, 96, 3)
    assert rows[-1] - rows[0] > 60


@pytest.mark.parametrize("name", ["avatar.json", "avatar.safetensors"])
def test_a_damaged_avatar_is_refused(finished_subject: Subject, name: str) -> None:
    from pipeline.errors import UserError

    (finished_subject.stage("train") / name).write_bytes(b"{")
    with pytest.raises(UserError, match="holds no readable avatar"):
        export(finished_subject)
