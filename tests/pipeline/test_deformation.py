"""The fused deformation of `rigged` against the same in torch and double precision."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from avatar_data import training_data

from pipeline.avatars import Gaussians, row
from pipeline.avatars.rigged import RiggedAvatar
from pipeline.config import TrainConfig


@pytest.fixture(scope="module")
def avatar() -> RiggedAvatar:
    """Every weight moved away from where it starts; the number of Gaussians fills neither vectors nor chunks."""
    data = training_data()
    generator = torch.Generator().manual_seed(1)
    bent = data.conditions._replace(torso_shape=0.01 * torch.randn(len(data), 2, generator=generator))
    config = TrainConfig(gaussians=777, resolution=64)
    made = RiggedAvatar.start(replace(data, conditions=bent), config, np.random.default_rng(0))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        made.means.div_(10)
    made.conditions = bent
    return made


def outcome(avatar: RiggedAvatar, frame: int) -> tuple[Gaussians, dict[str, torch.Tensor]]:
    """The Gaussians, and the gradients of a sum over all of them with weights of their own."""
    conditions = type(avatar.conditions)(*(value.to(avatar.means.dtype) for value in avatar.conditions))
    gaussians = avatar.deform(row(avatar.prepare(conditions), frame))
    generator = torch.Generator().manual_seed(2)
    values = [value for value in gaussians if isinstance(value, torch.Tensor)]
    weights = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in values]
    names, parameters = zip(*avatar.named_parameters(), strict=True)
    total = torch.stack([(w * v).sum() for w, v in zip(weights, values, strict=True)]).sum()
    return gaussians, dict(zip(names, torch.autograd.grad(total, parameters), strict=True))


def test_kernels_give_the_values_and_gradients_of_torch(avatar: RiggedAvatar) -> None:
    double = copy.deepcopy(avatar).double()
    for frame in (0, 11):
        (found, slopes), (expected, expected_slopes) = outcome(avatar, frame), outcome(double, frame)
        for name in ("means", "quats", "scales", "opacities", "colors"):
            torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=2e-5, atol=2e-6)
        assert set(slopes) == set(expected_slopes)
        for name, slope in expected_slopes.items():
            assert (slopes[name] - slope).abs().max() < 5e-5 * slope.abs().max(), name


def test_gradients_do_not_depend_on_threads(avatar: RiggedAvatar) -> None:
    results = []
    for threads in (1, 3):
        other = copy.deepcopy(avatar)
        other.threads = threads
        results.append(outcome(other, 4)[1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_weight_that_is_not_finite_stays_to_be_found(avatar: RiggedAvatar) -> None:
    for name in ("means", "quats", "log_scales", "opacity_logits", "colors"):
        broken = copy.deepcopy(avatar)
        with torch.no_grad():
            broken.get_parameter(name)[5] = torch.nan
        gaussians = outcome(broken, 0)[0]
        shown = {"log_scales": "scales", "opacity_logits": "opacities"}.get(name, name)
        bad = ~torch.isfinite(getattr(gaussians, shown)).reshape(777, -1).all(1)
        assert bad.nonzero().tolist() == [[5]], name
