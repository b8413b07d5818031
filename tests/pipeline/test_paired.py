"""Paired differences: intervals hold the truth as often as they say, also where neighbouring frames are alike."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.paired import paired_difference


def test_the_interval_holds_the_truth_where_neighbours_are_alike() -> None:
    rng = np.random.default_rng(0)
    truth, repeats, frames, alike = 0.5, 400, 100, 0.7
    held = naive = 0
    for _ in range(repeats):
        noise = rng.normal(size=frames)
        for i in range(1, frames):
            noise[i] = alike * noise[i - 1] + np.sqrt(1 - alike**2) * noise[i]
        both = rng.normal(30, 3, frames)  # what is hard for one is hard for the other
        found = paired_difference(list(both + truth + noise), list(both))
        assert found.low is not None and found.high is not None
        held += found.low <= truth <= found.high
        error = 1.96 * noise.std(ddof=1) / np.sqrt(frames)
        naive += abs(noise.mean()) <= error
    assert held / repeats > 0.88
    assert naive / repeats < 0.7, "else this case would not tell blocks from single frames"


def test_what_is_the_same_cannot_be_told_apart_and_a_plain_lead_can() -> None:
    figures = [30.0 + i % 3 for i in range(20)]
    same, ahead = paired_difference(figures, figures), paired_difference([f + 1 for f in figures], figures)
    assert (same.mean, same.told_apart) == (0, False)
    assert ahead.mean == pytest.approx(1) and ahead.told_apart


def test_few_frames_have_no_interval_and_unpaired_ones_are_refused() -> None:
    few = paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert (few.mean, few.low, few.told_apart) == (2, None, False)
    for first, second in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="no pairs"):
            paired_difference(first, second)
