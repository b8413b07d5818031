"""LPIPS with AlexNet features (Zhang et al. 2018, version 0.1 of the published heads), in plain torch.

The published implementation needs torchvision, which does not import beside the pinned torch; the network is small
enough to state here. Its weights are two assets: AlexNet's as torchvision publishes them, and the five linear heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BACKBONE_ASSET = "alexnet"
HEADS_ASSET = "lpips_alex"
MIN_SIDE = 63
"""Smallest side in pixels that AlexNet's strides leave anything of."""

# (number in torchvision's `features`, output channels, input channels, kernel, stride, padding, pooled before)
_CONVOLUTIONS = (
    (0, 64, 3, 11, 4, 2, False),
    (3, 192, 64, 5, 1, 2, True),
    (6, 384, 192, 3, 1, 1, True),
    (8, 256, 384, 3, 1, 1, False),
    (10, 256, 256, 3, 1, 1, False),
)
# The mean and deviation of ImageNet for images in [-1, 1], as the published scaling layer rounds them.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips:
    """The distance; 0 for equal images, about 0.1 for good renders, towards 1 for images with nothing in common."""

    def __init__(self, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        """Take the weights as named in the published files.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        self._layers = []
        for tap, (number, out, into, kernel, stride, padding, pooled) in enumerate(_CONVOLUTIONS):
            weight = take_weight(backbone, f"features.{number}.weight", (out, into, kernel, kernel))
            bias = take_weight(backbone, f"features.{number}.bias", (out,))
            head = take_weight(heads, f"lin{tap}.model.1.weight", (1, out, 1, 1))
            self._layers.append((weight, bias, head, stride, padding, pooled))

    def __call__(self, truth: NDArray[np.floating[Any]], image: NDArray[np.floating[Any]]) -> float:
        """Distance of two images [H,W,3] in [0, 1]."""
        with torch.no_grad():
            a, b = (self._scaled(x) for x in (truth, image))
            total = torch.zeros(())
            for weight, bias, head, stride, padding, pooled in self._layers:
                if pooled:
                    a, b = F.max_pool2d(a, 3, 2), F.max_pool2d(b, 3, 2)
                a, b = (F.relu(F.conv2d(x, weight, bias, stride, padding)) for x in (a, b))
                total += F.conv2d((_unit(a) - _unit(b)) ** 2, head).mean()
        return float(total)

    @staticmethod
    def _scaled(image: NDArray[np.floating[Any]]) -> Tensor:
        x = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None] * 2 - 1
        return (x - torch.tensor(_SHIFT)[:, None, None]) / torch.tensor(_SCALE)[:, None, None]


def load_lpips() -> Lpips:
    """LPIPS with the weights of the asset cache; nothing is fetched here.

    Raises:
        StageError: the weights are not on this machine.
        UserError: they are not what they should be, or the registry does not know them.
    """
    from pipeline.assets import asset_path

    paths = [asset_path(name, fetch=False) for name in (BACKBONE_ASSET, HEADS_ASSET)]
    try:
        return Lpips(*(load_weights(path) for path in paths))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The LPIPS weights cannot be read: {error}.", "fetch them again: headcast assets fetch"
        ) from None


def load_weights(path: Path) -> dict[str, Tensor]:
    """A published state dictionary; `weights_only` keeps torch from running what a pickle says."""
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def take_weight(weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """One weight of a published state dictionary, float32.

    Raises:
        ValueError: it is missing or has another shape.
    """
    tensor = weights.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        raise ValueError(f"'{name}' is {found}, expected {list(shape)}")
    return tensor.detach().float()


def _unit(features: Tensor) -> Tensor:
    """Features [1,C,H,W] of length 1 at every place."""
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)
