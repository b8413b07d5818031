"""LPIPS' structure, with weights made up here: the published ones are an asset that not every machine has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.lpips import Lpips


@pytest.fixture
def weights() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    backbone, heads = {}, {}
    for tap, (number, shape) in enumerate(shapes.items()):
        backbone[f"features.{number}.weight"] = 0.05 * torch.randn(shape, generator=generator)
        backbone[f"features.{number}.bias"] = torch.zeros(shape[0])
        heads[f"lin{tap}.model.1.weight"] = torch.rand((1, shape[0], 1, 1), generator=generator)
    return backbone, heads


def test_it_is_a_distance(weights: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    distance = Lpips(*weights)
    rng = np.random.default_rng(0)
    truth = rng.random((64, 80, 3))
    near, far = np.clip(truth + 0.02 * rng.random(truth.shape), 0, 1), rng.random(truth.shape)
    assert distance(truth, truth) == 0
    assert 0 < distance(truth, near) < distance(truth, far)
    assert distance(truth, far) == pytest.approx(distance(far, truth), rel=1e-5)


def test_it_matches_a_network_of_modules(weights: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """The same network as `torch.nn` modules in torchvision's order, so that the numbers in the names are checked."""
    backbone, heads = weights
    nn = torch.nn
    features = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )
    features.load_state_dict({name.removeprefix("features."): value for name, value in backbone.items()})
    rng = np.random.default_rng(1)
    images = [rng.random((70, 66, 3)) for _ in range(2)]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = (((torch.tensor(x).float() * 2 - 1 - shift) / scale).permute(2, 0, 1)[None] for x in images)
    expected, tap = 0.0, 0
    with torch.no_grad():
        for layer in features:
            a, b = layer(a), layer(b)
            if isinstance(layer, nn.ReLU):
                normed = [x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b)]
                head = heads[f"lin{tap}.model.1.weight"]
                expected += float(((normed[0] - normed[1]).pow(2) * head).sum(1).mean())
                tap += 1
    assert tap == 5
    assert Lpips(backbone, heads)(*images) == pytest.approx(expected, rel=1e-5)


def test_other_weights_are_refused(weights: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    backbone, heads = weights
    with pytest.raises(ValueError, match=r"features\.3\.weight"):
        Lpips({name: value for name, value in backbone.items() if name != "features.3.weight"}, heads)
    with pytest.raises(ValueError, match="lin4"):
        Lpips(backbone, {**heads, "lin4.model.1.weight": torch.zeros(1, 3, 1, 1)})
