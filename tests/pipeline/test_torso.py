"""The torso is followed where it moves by itself, and not pretended where it cannot be seen."""

from __future__ import annotations

from fractions import Fraction

import cv2
import numpy as np
import pytest

from pipeline.geometry import make_rigid, project_points, rotvec_to_matrix, transform_points
from pipeline.synthetic import make_clip
from pipeline.torso import follow_torso, register, torso_poses


def scene(angle: float, shift: tuple[float, float], size: int = 96) -> np.ndarray:
    """A textured picture turned about its origin and moved, in pixels with centres at +0.5."""
    noise = np.random.default_rng(2).integers(0, 256, (size, size)).astype(np.float32)
    texture = cv2.GaussianBlur(noise, (0, 0), 3)
    texture = (texture - texture.min()) / np.ptp(texture) * 255
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    offset = turn @ [0.5, 0.5] + shift - 0.5
    warp = np.concatenate([turn, offset[:, None]], 1)
    return cv2.warpAffine(texture, warp, (size, size), borderMode=cv2.BORDER_REFLECT).round().astype(np.uint8)


MASK = np.zeros((96, 96), bool)
MASK[55:90, 10:86] = True


def test_known_motion_is_recovered() -> None:
    moves = [(0.0, (0.0, 0.0)), (0.01, (0.7, -0.4)), (0.02, (1.5, -1.0)), (-0.02, (-2.0, 1.25))]
    warps, trusted = register(lambda i: scene(*moves[i]), 4, 0, MASK)
    assert trusted.all()
    points = np.array([[20.0, 60], [80, 60], [50, 85]])
    for warp, (angle, shift) in zip(warps, moves, strict=True):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        assert np.allclose(points @ warp[:, :2].T + warp[:, 2], points @ turn.T + shift, atol=0.1)


def test_frames_without_the_torso_lie_between_their_neighbours() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96)).astype(np.uint8)
    pictures = [scene(0, (0, 0)), noise, scene(0, (2, -1))]
    warps, trusted = register(lambda i: pictures[i], 3, 0, MASK)
    assert trusted.tolist() == [True, False, True]
    assert np.allclose(warps[1, :, 2], 0.5 * (warps[0, :, 2] + warps[2, :, 2]), atol=1e-6)


@pytest.mark.parametrize("crop", [(0, 0, 160), (-20, -10, 200)])
def test_the_torso_of_a_synthetic_subject_is_found(crop: tuple[int, int, int]) -> None:
    made = make_clip(12, 160, 160, seed=4, fps=Fraction(5))
    turns = rotvec_to_matrix(made.neck.astype(np.float64)).swapaxes(-1, -2)
    truth = made.Ts_cam_head @ make_rigid(turns, np.zeros((12, 3)))
    # The guess is right in the reference frame only: elsewhere the torso is taken to be where it was at first.
    found, trusted = follow_torso(
        lambda i: made.images[i], made.head, made.K, crop, made.Ts_cam_head, truth, made.identity, np.ones(12, bool)
    )
    assert trusted.mean() > 0.5
    shoulders = np.array([[0.15, -0.2, 0.0], [-0.15, -0.2, 0.0], [0.0, -0.2, 0.05]])

    def pixels(poses: np.ndarray) -> np.ndarray:
        return project_points(transform_points(poses, np.broadcast_to(shoulders, (12, 3, 3))), made.K)

    error = np.linalg.norm(pixels(found) - pixels(truth), axis=-1)
    still = np.linalg.norm(pixels(truth) - pixels(truth).mean(0), axis=-1)
    assert np.median(error[trusted]) < 0.5 * np.median(still[trusted])


def test_a_torso_out_of_sight_keeps_its_guess() -> None:
    made = make_clip(3, 64, 64, seed=4)
    guess = made.Ts_cam_head + 0.0
    face = (20, 10, 24)
    found, trusted = follow_torso(
        lambda i: made.images[i], made.head, made.K, face, made.Ts_cam_head, guess, made.identity, np.ones(3, bool)
    )
    assert not trusted.any()
    assert np.array_equal(found, guess)


def test_poses_project_where_the_warp_says() -> None:
    K = np.array([[300.0, 0, 40], [0, 310, 60], [0, 0, 1]])
    reference = np.eye(4)
    reference[:3, 3] = (0.02, -0.05, 0.7)
    warp = np.array([[[np.cos(0.1), -np.sin(0.1), 3], [np.sin(0.1), np.cos(0.1), -2]]])
    pose = torso_poses(warp, K, reference)[0]
    before, after = K @ reference[:3, 3], K @ pose[:3, 3]
    assert after[2] == pytest.approx(0.7)
    assert np.allclose(after[:2] / after[2], warp[0, :, :2] @ (before[:2] / before[2]) + warp[0, :, 2])
    assert np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3))
