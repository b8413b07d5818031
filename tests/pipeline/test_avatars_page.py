"""The examples of docs/avatars.md do what the page says: an own model trains, saves and loads like any other."""

from __future__ import annotations

import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from avatar_data import training_data
from torch import nn

from pipeline import avatars
from pipeline.avatars import load_avatar, save_avatar
from pipeline.avatars.rigged import RiggedAvatar
from pipeline.config import TrainConfig
from pipeline.training import Trainer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "avatars.md"
CONFIG = TrainConfig(gaussians=1500, resolution=64, steps=60)


def example(word: str) -> str:
    """The page's Python block that contains a word."""
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if word in block]
    return str(found)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's own model, listed as the page says; the setting's type does not know it."""
    module = types.ModuleType("still_avatar")
    vars(module).update(vars(avatars) | {"math": math, "nn": nn, "torch": torch})
    exec(example("class StillAvatar"), vars(module))
    monkeypatch.setitem(sys.modules, "still_avatar", module)
    monkeypatch.setitem(avatars.MODELS, "still", ("still_avatar", "StillAvatar"))
    return "still"


def test_a_model_of_ones_own(still: str, tmp_path: Path) -> None:
    data, config = training_data(), CONFIG.model_copy(update={"avatar": still})
    trainer = Trainer(data, config, threads=1)
    before = trainer.psnr(trainer.monitored)
    while not trainer.finished:
        trainer.step()
        if trainer.step_count == 30:
            trainer.save_checkpoint(tmp_path)
    assert trainer.psnr(trainer.monitored) > before + 3
    resumed = Trainer(data, config, threads=1)
    assert resumed.resume(tmp_path)
    while not resumed.finished:
        resumed.step()
    assert resumed.psnr([0, 9]) == trainer.psnr([0, 9])
    save_avatar(trainer.avatar, tmp_path)
    loaded, K = load_avatar(tmp_path), torch.from_numpy(data.Ks[0])
    image = loaded.render(data.conditions.frame(9), K, 64, 64, torch.ones(3)).image
    assert torch.equal(image.clamp(0, 1), trainer.render(9))


def test_driving_a_saved_avatar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "ada" / "export"
    folder.mkdir(parents=True)
    save_avatar(RiggedAvatar.start(training_data(), CONFIG, np.random.default_rng(0)), folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, torch.Tensor] = {}
    exec(example("mouthSmile"), names)
    assert names["image"].shape == (256, 256, 3)
    assert names["image"].min() < 0.5
