"""Eight bits a value: how far values may be off, and what does not belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from avatar_data import clip, conditions, training_data

from pipeline import compact, quantise
from pipeline.avatars import AvatarModel, load_avatar, save_avatar
from pipeline.avatars.rigged import RiggedAvatar
from pipeline.compact import choose_quantised
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.quantise import BLOCK, dequantise, pack, unpack


@pytest.fixture(scope="module")
def avatar() -> RiggedAvatar:
    found = RiggedAvatar.start(training_data(), TrainConfig(gaussians=600), np.random.default_rng(0))
    with torch.no_grad():
        found.basis.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return found.requires_grad_(False)


@pytest.mark.parametrize("shape", [(1,), (BLOCK,), (1000, 3), (3, 401), (6, 50, 13), (2, 3, 17, 19)])
def test_a_value_is_off_by_half_a_step_of_its_block_at_most(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=random) * torch.logspace(-4, 2, shape[-1])
    values, low, step = quantise.quantise(tensor)
    assert values.shape == tensor.shape and values.dtype == torch.uint8
    back = dequantise(values, low, step)
    columns = tensor.movedim(-1, 0) if len(shape) > 1 and shape[-1] <= 16 else tensor
    error = (back - tensor).movedim(-1, 0) if columns is not tensor else back - tensor
    for block, wrong in zip(columns.flatten().split(BLOCK), error.flatten().split(BLOCK), strict=True):
        span = block.max() - block.min()
        assert wrong.abs().max() <= span / 255 * 0.501 + 1e-6 * block.abs().max()


def test_what_is_constant_comes_back_exactly() -> None:
    tensor = torch.full((300, 3), -7.25)
    assert torch.equal(dequantise(*quantise.quantise(tensor)), tensor)


def test_what_does_not_belong_together_is_refused() -> None:
    packed = pack({"a": torch.randn(300), "b": torch.ones(3)}, ["a"])
    assert set(packed) == {"a", "a:low", "a:step", "b"}
    assert set(unpack(packed, ["a"])) == {"a", "b"}
    with pytest.raises(KeyError):
        unpack(packed, ["b"])
    with pytest.raises(ValueError, match="300"):
        unpack({**packed, "a:low": packed["a:low"][:2]}, ["a"])
    with pytest.raises(ValueError, match="float32"):
        unpack({**packed, "a": torch.randn(300)}, ["a"])


def test_a_quantised_avatar_loads_as_any_other(avatar: RiggedAvatar, tmp_path: Path) -> None:
    names = ("basis", "colors", "rig_expression")
    whole = save_avatar(avatar, tmp_path)
    assert save_avatar(avatar, tmp_path, quantised=names) < 0.75 * whole
    loaded, condition = load_avatar(tmp_path), conditions(clip()).frame(7)
    assert isinstance(loaded, RiggedAvatar)
    assert torch.equal(loaded.means, avatar.means)
    assert 0 < (loaded.colors - avatar.colors).abs().max() < 1 / 255
    assert (loaded.gaussians(condition).means - avatar.gaussians(condition).means).norm(dim=1).max() < 5e-4


@pytest.mark.parametrize("damage", ["[1]", '["nothing"]', "7", '["means"]'])
def test_a_damaged_list_is_refused(avatar: RiggedAvatar, tmp_path: Path, damage: str) -> None:
    save_avatar(avatar, tmp_path)
    path = tmp_path / "avatar.json"
    path.write_text(path.read_text().replace('"quantised": []', f'"quantised": {damage}'))
    with pytest.raises(UserError, match="does not fit"):
        load_avatar(tmp_path)


def test_a_poisoned_quantiser_is_found_out(avatar: RiggedAvatar, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = {name: avatar.state_dict()[name].half().float() for name in ("basis", "rig_expression")}

    def loss_db(found: AvatarModel) -> float:
        return 100 * sum(float((found.state_dict()[name] - value).abs().mean()) for name, value in watched.items())

    honest = choose_quantised(avatar, loss_db, limit_db=0.5)
    assert watched.keys() <= set(honest.names) and not honest.refused and 0 < honest.loss_db <= 0.5

    def poisoned(weights: dict[str, torch.Tensor], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        packed = pack(weights, names)
        return {name: value + 0.1 if name == "basis:low" else value for name, value in packed.items()}

    monkeypatch.setattr(compact, "pack", poisoned)
    found = choose_quantised(avatar, loss_db, limit_db=0.5)
    assert found.refused == ("basis",) and "rig_expression" in found.names
    assert found.loss_db == loss_db(found.avatar) <= 0.5
    assert torch.equal(found.avatar.state_dict()["basis"], watched["basis"])
