"""Features on three planes, read where a point projects on them: a grid each, or hash grids of several resolutions.

Channels stand in K groups, and each group is read at a point of its own: the doppelgangers of GaussianHead (arXiv
2312.01632). The three planes' features multiply.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Each keeps two axes of a point: (x, y), (y, z) and (z, x).
_PLANES = 3

# Features start near one, where a product of three passes on what each of them learns.
_START, _START_SPREAD = 1.0, 0.1

# The second factor of Instant-NGP's spatial hash (Müller et al. 2022, eq. 4); the first is 1.
_PRIME = 2_654_435_761


class TriPlane(nn.Module):
    """Three planes of `size` x `size` over [-1,1], with `channels` in each of `groups` groups."""

    def __init__(self, groups: int, channels: int, size: int) -> None:
        super().__init__()
        self.planes = nn.Parameter(torch.ones(_PLANES * groups, channels, size, size))

    def start(self, generator: torch.Generator) -> None:
        """Fill the planes at random, near one."""
        _near_one(self.planes, generator)

    def forward(self, points: Tensor) -> Tensor:
        """Features [N,G*C] of points [N,G,3]: group g is read at a row's point g, and stands at g*C of the answer."""
        return _product(_read(self.planes, _places(points)), points)


class HashPlanes(nn.Module):
    """The same over hash grids (Instant-NGP, Müller et al. 2022): `levels` grids from `coarsest` to `finest` a side.

    Each level gives its share of the channels of a group. A grid with more points than `entries` keeps that many, and
    each point takes the one that its hash names; grids are spread out before they are read, since they have far fewer
    points than there are readings.
    """

    def __init__(self, groups: int, channels: int, levels: int, coarsest: int, finest: int, entries: int) -> None:
        super().__init__()
        if channels % levels:
            raise ValueError(f"channels is {channels}, which {levels} levels cannot share evenly")
        growth = (finest / coarsest) ** (1 / max(levels - 1, 1))
        self._sides = [round(coarsest * growth**level) for level in range(levels)]
        rows, share = _PLANES * groups, channels // levels
        self.tables = nn.ParameterList(
            nn.Parameter(torch.ones(rows, share, min(side * side, entries))) for side in self._sides
        )
        for level, side in enumerate(self._sides):
            self.register_buffer(f"hash_{level}", _hashed(side, entries), persistent=False)

    def start(self, generator: torch.Generator) -> None:
        """Fill the tables at random, near one."""
        for table in self.tables:
            _near_one(table, generator)

    def forward(self, points: Tensor) -> Tensor:
        """Features [N,G*C] as `TriPlane` gives them."""
        places = _places(points)
        levels = []
        for level, (side, table) in enumerate(zip(self._sides, self.tables, strict=True)):
            grid = table.index_select(2, self.get_buffer(f"hash_{level}")) if table.shape[2] < side * side else table
            levels.append(_read(grid.unflatten(2, (side, side)), places))
        return _product(torch.cat(levels, 1), points)


def _near_one(values: Tensor, generator: torch.Generator) -> None:
    with torch.no_grad():
        values.normal_(_START, _START_SPREAD, generator=generator)


def _hashed(side: int, entries: int) -> Tensor:
    """[side*side] the entry of each point of a grid."""
    along = torch.arange(side)
    return ((along[:, None] * _PRIME) ^ along).flatten() % entries


def _places(points: Tensor) -> Tensor:
    """Projections [3*G,1,N,2] of points [N,G,3] on the planes, all groups of a plane in a row."""
    projected = torch.cat([points, points[..., :1]], 2).unfold(2, 2, 1)
    return projected.permute(2, 1, 0, 3).flatten(0, 1)[:, None]


def _read(grids: Tensor, places: Tensor) -> Tensor:
    """Bilinear values [3*G,C,N] of grids [3*G,C,S,S]; beyond the edge is as at the edge."""
    return F.grid_sample(grids, places, mode="bilinear", padding_mode="border", align_corners=True)[:, :, 0]


def _product(features: Tensor, points: Tensor) -> Tensor:
    """[N,G*C] the planes' features [3*G,C,N] multiplied."""
    n, groups = points.shape[:2]
    first, second, third = features.view(_PLANES, groups, -1, n)
    return (first * second * third).flatten(0, 1).t()
