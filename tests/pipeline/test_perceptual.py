"""The perceptual loss's structure, with weights made up here: the published ones are an asset."""

from __future__ import annotations

import pytest
import torch

from pipeline.perceptual import PerceptualLoss

nn = torch.nn


def vgg16_features() -> nn.Sequential:
    """The first four blocks as torchvision builds them, which checks the numbers in the names."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def test_it_compares_the_ends_of_four_blocks() -> None:
    torch.manual_seed(0)
    features = vgg16_features().requires_grad_(False)
    loss = PerceptualLoss({f"features.{name}": value for name, value in features.state_dict().items()})
    image, truth = torch.rand(24, 32, 3), torch.rand(24, 32, 3)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    a, b = (((x - mean) / deviation).permute(2, 0, 1)[None] for x in (image, truth))
    expected = 0.0
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            expected += float((a - b).square().mean())
        a, b = layer(a), layer(b)
    assert float(loss(image, truth)) == pytest.approx(expected, rel=1e-4)
    assert float(loss(truth, truth)) == 0
    image.requires_grad_()
    loss(image, truth).backward()
    assert image.grad is not None and image.grad.abs().amax() > 0


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'features\.0\.weight' is missing"):
        PerceptualLoss({})
