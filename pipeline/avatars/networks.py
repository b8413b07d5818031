"""The small networks of GaussianHead (arXiv 2312.01632): the motion deformation field and the decoders."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Motion(NamedTuple):
    """What the field adds to N Gaussians, in the units of `DeformationField`."""

    mean: Tensor
    """[N,3]."""
    rotation: Tensor
    """[N,3] rotation vectors."""
    scale: Tensor
    """[N,3] logarithms."""


class DeformationField(nn.Module):
    """Where a condition moves a point: `layers` of `width`, the input again in the middle.

    A point enters by sines and cosines of `frequencies` octaves beside itself, the code [D] as it is.
    """

    def __init__(self, layers: int, width: int, frequencies: int, code: int) -> None:
        super().__init__()
        self._frequencies = frequencies
        self._encoded = 3 + 6 * frequencies
        self.entry = nn.Linear(self._encoded + code, width)
        self.again = nn.Linear(self._encoded + code, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.answer = nn.Linear(width, 9)

    def forward(self, points: Tensor, code: Tensor) -> Motion:
        """The motion of points [N,3], about in [-1,1], under a code [D]."""
        encoded = encode(points, self._frequencies)
        x = F.relu(self._both(self.entry, encoded, code))
        for i, layer in enumerate(self.hidden):
            x = layer(x)
            if i == len(self.hidden) // 2:
                x = x + self._both(self.again, encoded, code)
            x = F.relu(x)
        return Motion(*self.answer(x).float().split(3, 1))

    def _both(self, layer: nn.Linear, encoded: Tensor, code: Tensor) -> Tensor:
        """A layer of [encoded, code], the same code for all N points and so computed once."""
        by_point, by_code = layer.weight.split([self._encoded, len(code)], 1)
        return F.linear(encoded, by_point, F.linear(code, by_code, layer.bias))


def encode(points: Tensor, frequencies: int) -> Tensor:
    """[N,3+6F] points [N,3], and the sines and cosines of them times 1, 2, 4 ... (Mildenhall et al. 2020, eq. 4)."""
    octaves = 2.0 ** torch.arange(frequencies, dtype=points.dtype, device=points.device)
    angles = (points[:, :, None] * octaves).flatten(1)
    return torch.cat([points, angles.sin(), angles.cos()], 1)


class Decoders(nn.Module):
    """From features of N Gaussians and the direction they are seen from to their opacity and colour."""

    def __init__(self, features: int, width: int, color_width: int, sh_degree: int) -> None:
        super().__init__()
        self.geometry = nn.Sequential(
            *(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, 1 + features),
        )
        self.color = nn.Sequential(nn.Linear(features + 3, width), nn.ReLU(), nn.Linear(width, color_width), nn.ReLU())
        self.base = nn.Linear(color_width, 3)
        self.rest = nn.Linear(color_width, 3 * ((sh_degree + 1) ** 2 - 1))

    def forward(self, features: Tensor, directions: Tensor, sh_degree: int) -> tuple[Tensor, Tensor]:
        """Opacity logits [N] and SH coefficients [N,(d+1)^2,3] of features [N,F] and unit directions [N,3]."""
        opacity, geometry = self.geometry(features).split([1, features.shape[1]], 1)
        color = self.color(torch.cat([geometry, directions.to(geometry)], 1))
        needed = 3 * ((sh_degree + 1) ** 2 - 1)
        rest = F.linear(color, self.rest.weight[:needed], self.rest.bias[:needed])
        return opacity[:, 0].float(), torch.cat([self.base(color), rest], 1).float().unflatten(1, (-1, 3))
