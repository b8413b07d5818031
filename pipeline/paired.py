"""How much better one avatar is than another, frame by frame, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
MIN_FRAMES = 4
"""Fewer make no two blocks of two."""


class PairedDifference(NamedTuple):
    """Mean of first minus second over the same frames, with its interval; that is None where frames are too few."""

    mean: float
    low: float | None
    high: float | None
    frames: int
    blocks: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """The mean difference over frames, and the interval that holds what it would be over other frames like these.

    Neighbouring frames are alike, so their errors are no independent draws. The frames are cut into blocks of
    neighbours, sqrt(n) of them, and Student's t is taken over the blocks' means (the method of batch means; Schmeiser
    1982, "Batch size effects in the analysis of simulation output").

    Args:
        first, second: a figure of the same n frames, in their order.

    Raises:
        ValueError: they are not of the same frames, or there are none.
    """
    from scipy.stats import t

    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} figures are no pairs")
    differences = np.subtract(first, second, dtype=np.float64)
    mean = float(differences.mean())
    if len(differences) < MIN_FRAMES:
        return PairedDifference(mean, None, None, len(differences), 0)
    blocks = math.isqrt(len(differences))
    means = np.array([block.mean() for block in np.array_split(differences, blocks)])
    reach = float(t.ppf((1 + CONFIDENCE) / 2, blocks - 1) * means.std(ddof=1) / math.sqrt(blocks))
    return PairedDifference(mean, mean - reach, mean + reach, len(differences), blocks)
