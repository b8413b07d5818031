"""The export stage: the PLY looks like the avatar, the copies are the avatar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.avatars import load_avatar
from pipeline.config import override, preset_config
from pipeline.dataset import Subject
from pipeline.errors import Interrupted
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


FILES = ("avatar.json", "avatar.ply", "avatar.safetensors", "baked", "baked.jpg", "neutral.jpg", "novel_views.jpg")


def test_the_files_are_the_avatar_and_are_counted(finished_subject: Subject) -> None:
    work, result = export(finished_subject)
    for name in ("avatar.safetensors", "avatar.json"):
        assert (work / name).read_bytes() == (finished_subject.stage("train") / name).read_bytes()
    assert sorted(path.name for path in work.iterdir()) == sorted(FILES)
    assert result.metrics["gaussians"] == 1500
    assert result.metrics["compact"] == {"form": "half", "loss_db": 0.0, "quantised": [], "refused": []}
    for name, size in result.metrics["bytes"].items():
        assert (work / name).stat().st_size == size
    assert result.metrics["bytes"]["avatar.ply"] > 1500 * 62 * 4
    assert "shows this head over" in result.metrics["seen_from"]["text"]
    assert "1,500 Gaussians" in result.verdict.text and "as training left them" in result.verdict.text


def test_what_baking_costs_is_measured(finished_subject: Subject) -> None:
    from pipeline.clip import load_clip, load_crops, split
    from pipeline.evaluation import ClipRenderer, Picture

    settings = ("train.resolution=64", "evaluate.min_holdout_frames=4")
    work, result = export(finished_subject, *settings)
    assert (work / result.verdict.picture).is_file() and result.verdict.picture == "baked.jpg"
    baked, clip = load_avatar(work / "baked"), load_clip(finished_subject, 64)
    held_out = [int(i) for i in split(len(clip), 0.1, 4)[1] if clip.usable[i]]
    renderer = ClipRenderer.of(baked, clip, 1)
    truth = load_crops(clip, held_out)
    scores = [psnr(Picture.of(truth, i).image, renderer.render(f).image) for i, f in enumerate(held_out)]
    figures = result.metrics["baked"]
    assert figures["psnr"]["baked"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert figures["loss_db"] == pytest.approx(figures["psnr"]["full"] - figures["psnr"]["baked"], abs=2e-4)
    assert figures["loss_db"] < 0.5 and result.verdict.level == "good"
    assert figures["bytes_packed"] < result.metrics["bytes"]["baked/avatar.safetensors"]


def test_a_dear_bake_is_judged_fair(finished_subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.export.BAKE_LIMIT_DB", -0.5)
    monkeypatch.setattr("pipeline.bake.FARTHEST", (0.0,) * 13)
    _, result = export(finished_subject, "train.resolution=64")
    assert result.verdict.level == "fair"


def test_held_out_frames_do_not_reach_the_bake(finished_subject: Subject) -> None:
    work, _ = export(finished_subject, "train.resolution=64")
    first = (work / "baked/avatar.safetensors").read_bytes()
    path = finished_subject.stage("fit") / "fit.npz"
    fit = dict(np.load(path))
    fit["expression"][-10:] = 0.5
    fit["Ts_cam_head"][-10:, 2, 3] += 0.3
    np.savez(path, **fit)
    for file in work.rglob("*"):
        if file.is_file():
            file.unlink()
    (work / "baked").rmdir()
    work.rmdir()
    work, _ = export(finished_subject, "train.resolution=64")
    assert (work / "baked/avatar.safetensors").read_bytes() == first


def test_a_stopped_export_goes_on(finished_subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(preset_config("quick"), ["train.resolution=64"])
    work = finished_subject.root / "work"
    work.mkdir()
    asked = iter([False] * 30 + [True] * 1000)
    with pytest.raises(Interrupted):
        STAGE.run(StageRun(finished_subject, work, config, threads=1, stop_requested=lambda: next(asked)))
    assert not (work / "baked/avatar.json").exists()
    STAGE.run(StageRun(finished_subject, work, config, threads=1))
    monkeypatch.setattr("pipeline.bake.bake", None)
    result = STAGE.run(StageRun(finished_subject, work, config, threads=1))
    assert result.metrics["baked"]["seconds"] is None
    assert sorted(path.name for path in work.iterdir()) == sorted(FILES)


def test_eight_bits_are_smaller_and_their_cost_is_told(finished_subject: Subject) -> None:
    settings = ("train.resolution=64", "export.compact=quantised", "export.bake=false", "export.ply=false")
    work, result = export(finished_subject, *settings)
    figures = result.metrics["compact"]
    assert figures["form"] == "quantised" and figures["loss_db"] <= 0.1
    assert (
        result.metrics["bytes"]["avatar.safetensors"]
        < 0.7 * (finished_subject.stage("train") / "avatar.safetensors").stat().st_size
    )
    assert sorted(path.name for path in work.iterdir()) == [
        *("avatar.json", "avatar.safetensors", "neutral.jpg", "novel_views.jpg")
    ]
    assert load_avatar(work).count == 1500
    assert result.verdict.picture == "neutral.jpg" and "8 bits" in result.verdict.text


def test_eight_bits_that_cost_too_much_are_not_taken(finished_subject: Subject) -> None:
    settings = ("train.resolution=64", "export.compact=quantised", "export.bake=false", "export.max_loss_db=0")
    _, result = export(finished_subject, *settings)
    assert result.metrics["compact"]["refused"] and "stayed as training left them" in result.verdict.text
    assert result.metrics["compact"]["loss_db"] <= 0


def test_the_ply_can_be_left_out(finished_subject: Subject) -> None:
    work, result = export(finished_subject, "export.ply=false", "export.bake=false")
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
