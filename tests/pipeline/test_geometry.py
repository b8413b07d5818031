"""Rotations and rigid transforms: group axioms, round trips at the hard angles, parity with SciPy."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from pipeline import geometry as g


@pytest.fixture
def rotvecs() -> np.ndarray:
    """Rotation vectors: random, tiny, zero, and within rounding of half a turn."""
    generator = np.random.default_rng(3)
    random = generator.normal(size=(200, 3))
    random *= (generator.uniform(0, np.pi, 200) / np.linalg.norm(random, axis=1))[:, None]
    axes = np.eye(3)
    return np.concatenate([random, np.zeros((1, 3)), axes * 1e-9, axes * 1e-4, axes * (np.pi - 1e-7), -axes * 3.0])


def test_rotvec_to_matrix_matches_scipy(rotvecs: np.ndarray) -> None:
    np.testing.assert_allclose(g.rotvec_to_matrix(rotvecs), Rotation.from_rotvec(rotvecs).as_matrix(), atol=1e-13)


def test_rotations_form_a_group(rotvecs: np.ndarray) -> None:
    R = g.rotvec_to_matrix(rotvecs)
    S = R[::-1]
    np.testing.assert_allclose(R @ R.transpose(0, 2, 1), np.broadcast_to(np.eye(3), R.shape), atol=1e-13)
    np.testing.assert_allclose(np.linalg.det(R @ S), 1, atol=1e-12)
    np.testing.assert_allclose(g.rotvec_to_matrix(-rotvecs), R.transpose(0, 2, 1), atol=1e-13)
    product = g.quaternion_multiply(g.matrix_to_quaternion(R), g.matrix_to_quaternion(np.ascontiguousarray(S)))
    np.testing.assert_allclose(g.quaternion_to_matrix(product), R @ S, atol=1e-12)


def test_round_trips(rotvecs: np.ndarray) -> None:
    R = g.rotvec_to_matrix(rotvecs)
    np.testing.assert_allclose(g.quaternion_to_matrix(g.matrix_to_quaternion(R)), R, atol=1e-12)
    np.testing.assert_allclose(g.matrix_to_rotvec(R), rotvecs, atol=1e-6)
    np.testing.assert_allclose(g.rotvec_to_matrix(g.matrix_to_rotvec(R)), R, atol=1e-12)


def test_a_quaternion_turns_a_vector_as_its_matrix_does(rotvecs: np.ndarray) -> None:
    R, vectors = g.rotvec_to_matrix(rotvecs), np.random.default_rng(1).normal(size=rotvecs.shape)
    turned = g.quaternion_rotate(g.matrix_to_quaternion(R), vectors)
    np.testing.assert_allclose(turned, (R @ vectors[..., None])[..., 0], atol=1e-12)


def test_slerp_turns_at_a_constant_rate(rotvecs: np.ndarray) -> None:
    start = g.matrix_to_quaternion(g.rotvec_to_matrix(rotvecs))
    step = np.array([0.3, -0.8, 0.4])
    end = -g.matrix_to_quaternion(g.rotvec_to_matrix(step) @ g.rotvec_to_matrix(rotvecs))
    for fraction in (0.0, 0.25, 1.0):
        actual = g.quaternion_to_matrix(g.slerp(start, end, np.full(len(start), fraction)))
        np.testing.assert_allclose(actual, g.rotvec_to_matrix(step * fraction) @ g.rotvec_to_matrix(rotvecs), atol=1e-6)


def test_rigid_transforms_form_a_group(rotvecs: np.ndarray) -> None:
    translations = np.random.default_rng(4).normal(size=rotvecs.shape)
    Ts_a_b = g.make_rigid(g.rotvec_to_matrix(rotvecs), translations)
    np.testing.assert_allclose(Ts_a_b @ g.invert_rigid(Ts_a_b), np.broadcast_to(np.eye(4), Ts_a_b.shape), atol=1e-12)
    points = np.random.default_rng(5).normal(size=(len(rotvecs), 7, 3))
    there = g.transform_points(Ts_a_b, points)
    np.testing.assert_allclose(g.transform_points(g.invert_rigid(Ts_a_b), there), points, atol=1e-12)
    np.testing.assert_allclose(g.transform_points(Ts_a_b, np.zeros((1, 3)))[:, 0], translations)


def test_projection_puts_the_optical_axis_on_the_principal_point() -> None:
    K = np.array([[900.0, 0, 210.5], [0, 870.0, 333.0], [0, 0, 1]])
    points = np.array([[0, 0, 2.0], [0.1, -0.2, 0.5]])
    np.testing.assert_allclose(g.project_points(points, K), [[210.5, 333.0], [210.5 + 180, 333 - 348]])


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-4, 1.0, 3.1])
def test_gradients_are_finite_and_right(angle: float) -> None:
    rotvec = torch.tensor([[0.6, -0.64, 0.48]], dtype=torch.float64) * angle
    rotvec.requires_grad_()
    assert torch.autograd.gradcheck(g.rotvec_to_matrix, (rotvec,))
    assert torch.autograd.gradcheck(lambda r: g.matrix_to_rotvec(g.rotvec_to_matrix(r)), (rotvec,), atol=1e-4)
