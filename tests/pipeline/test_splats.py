"""Gaussians as arrays: the turn of axes is that of the picture, the degree is the least that says the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from splat_data import random_splats

from pipeline.avatars import splat
from pipeline.export import gaussians_of, splats_of
from pipeline.geometry import make_rigid, rotvec_to_matrix

K = torch.tensor([[300.0, 0, 32], [0, 290, 24], [0, 0, 1]])


def picture(splats, T_cam_axes):
    return splat(gaussians_of(splats, torch.as_tensor(T_cam_axes)), K, 64, 48, torch.ones(3), threads=1).image.numpy()


def test_turned_gaussians_give_the_same_picture_from_turned_axes() -> None:
    splats = random_splats(40)
    T = make_rigid(rotvec_to_matrix(np.array([2.8, 0.3, 0.2])), np.array([0.01, 0.02, 0.6]))
    turn = np.diag([1.0, -1.0, -1.0, 1.0])
    np.testing.assert_allclose(picture(splats.turned(), T @ turn), picture(splats, T), atol=2e-5)
    again = splats.turned().turned()
    np.testing.assert_allclose(again.means, splats.means)
    np.testing.assert_allclose(again.sh, splats.sh)


def test_harmonics_turn_with_any_axes() -> None:
    """What `splats_of` says in other axes looks the same, view-dependent colours included."""
    splats = random_splats(40)
    T = make_rigid(rotvec_to_matrix(np.array([2.8, 0.3, 0.2])), np.array([0.01, 0.02, 0.6]))
    T_cam_other = torch.from_numpy(make_rigid(rotvec_to_matrix(np.array([0.4, -1.3, 0.7])), np.array([0.1, 0, 0.5])))
    other = splats_of(gaussians_of(splats, torch.from_numpy(T)), torch.linalg.inv(T_cam_other).float())
    assert np.abs(other.sh[:, 1:] - splats.sh[:, 1:]).max() > 0.1
    np.testing.assert_allclose(picture(other, T_cam_other), picture(splats, T), atol=1e-4)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_degree_is_the_least(degree: int) -> None:
    assert random_splats(3, degree=degree).degree() == degree
    assert random_splats(0).degree() == 0
