"""Flow moves alphas with the picture."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from discs import disc, textured

from pipeline.matting.flow import boundary_length, carry, dense_flow, half_grey, single_threaded_opencv, warp


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance in pixels between two alphas' boundaries."""
    return float(np.abs(a.astype(float) - b).sum() / boundary_length(a.astype(float)))


def test_carrying_moves_the_alpha_with_the_picture() -> None:
    carried = carry(textured(76, 80), textured(80, 82), disc(76, 80))
    assert carried.dtype == np.uint8
    assert distance(disc(80, 82), carried) < 1
    assert distance(disc(80, 82), disc(76, 80)) > 2


def test_float_alphas_move_as_bytes_do() -> None:
    flow = dense_flow(half_grey(textured(76, 80)), half_grey(textured(80, 82)))
    moved = warp(disc(76, 80).astype(np.float32) / 255, flow)
    assert np.abs(moved * 255 - carry(textured(76, 80), textured(80, 82), disc(76, 80))).max() < 1.01


def test_a_warp_goes_where_the_flow_points_at_any_size() -> None:
    alpha = np.zeros((40, 60), np.float32)
    alpha[10, 20] = 1
    flow = np.broadcast_to(np.float32([2.5, -1]), (20, 30, 2))  # of half the size: five to the right, two up
    moved = warp(alpha, np.ascontiguousarray(flow))
    assert np.argwhere(moved).tolist() == [[12, 15]]


def test_the_boundary_of_a_disc_is_its_circumference() -> None:
    assert boundary_length(disc(80, 80) / 255) == pytest.approx(2 * np.pi * 40, rel=0.02)


def test_opencv_has_its_threads_back_afterwards() -> None:
    before = cv2.getNumThreads()
    with pytest.raises(KeyError), single_threaded_opencv():
        assert cv2.getNumThreads() == 1
        raise KeyError
    assert cv2.getNumThreads() == before
