"""The torso is followed where it moves by itself, and not pretended where it cannot be seen."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from pipeline.geometry import make_rigid, project_points, rotvec_to_matrix, transform_points
from pipeline.synthetic import SyntheticClip, make_clip
from pipeline.torso import Torso, TorsoPredictor, Views, follow_torso, head_cover, steady, torso_mask

FRAMES, SIZE = 12, 160
SHOULDERS = np.array([[0.15, -0.2, 0.0], [-0.15, -0.2, 0.0], [0.0, -0.2, 0.05]])


@pytest.fixture(scope="module")
def made() -> SyntheticClip:
    return make_clip(FRAMES, SIZE, SIZE, seed=4, fps=Fraction(5))


def truth(made: SyntheticClip) -> np.ndarray:
    turns = rotvec_to_matrix(made.neck.astype(np.float64)).swapaxes(-1, -2)
    return made.Ts_cam_head @ make_rigid(turns, np.zeros((len(turns), 3)))


def views(made: SyntheticClip, crop: tuple[int, int, int] = (0, 0, SIZE)) -> Views:
    count = len(made.images)
    on_head = made.head.regions["head"]
    neutral = made.head.template + np.tensordot(made.identity, made.head.identity_basis, 1)
    heads = transform_points(made.Ts_cam_head, np.repeat(neutral[None, on_head].astype(np.float64), count, 0))
    alphas = (255 * made.alpha).round().astype(np.uint8)
    Ks = np.repeat(made.K[None], count, 0)
    return Views.load(lambda i: (made.images[i], alphas[i]), heads, Ks, np.tile(crop, (count, 1)), 2)


def follow(made: SyntheticClip, seen: Views, shots: np.ndarray | None = None) -> Torso:
    count = len(made.images)
    shots = np.zeros(count, np.int64) if shots is None else shots
    return follow_torso(seen, made.Ts_cam_head, truth(made), np.ones(count, bool), shots)


def pixels(made: SyntheticClip, poses: np.ndarray) -> np.ndarray:
    points = np.broadcast_to(SHOULDERS, (len(poses), 3, 3))
    return project_points(transform_points(poses, points), made.K)


@pytest.mark.parametrize("crop", [(0, 0, SIZE), (-20, -10, 200)])
def test_the_torso_of_a_synthetic_subject_is_found(made: SyntheticClip, crop: tuple[int, int, int]) -> None:
    found, right = follow(made, views(made, crop)), truth(made)
    assert found.confidence.min() > 0.5
    error = np.linalg.norm(pixels(made, found.poses) - pixels(made, right), axis=-1)
    still = np.linalg.norm(pixels(made, right) - pixels(made, right).mean(0), axis=-1)
    assert np.median(error) < 0.4 * np.median(still)


def test_motion_between_shots_and_the_order_of_frames_do_not_matter(made: SyntheticClip) -> None:
    one, cut = follow(made, views(made)), follow(made, views(made), np.arange(FRAMES) // 6)
    assert np.linalg.norm(pixels(made, one.poses) - pixels(made, cut.poses), axis=-1).max() < 1


def test_a_frame_without_the_torso_lies_between_its_neighbours(made: SyntheticClip) -> None:
    seen = views(made)
    pictures = seen.pictures.copy()
    pictures[5] = 0
    found, whole = follow(made, replace(seen, pictures=pictures)), follow(made, seen)
    assert found.confidence[5] == 0
    assert np.delete(found.confidence, 5).min() > 0.5
    error = np.linalg.norm(pixels(made, found.poses)[5] - pixels(made, whole.poses)[5], axis=-1)
    assert error.max() < 2


def test_a_torso_out_of_sight_keeps_its_guess(made: SyntheticClip) -> None:
    found = follow(made, views(made, (50, 25, 60)))
    assert not found.confidence.any()
    assert np.array_equal(found.poses, truth(made))
    assert not found.shape.any()


def test_the_mask_is_below_the_head_and_of_the_subject() -> None:
    K = np.array([[100.0, 0, 50], [0, 100, 50], [0, 0, 1]])
    T_cam_torso = np.diag([1.0, -1, -1, 1])
    T_cam_torso[2, 3] = 1
    head = np.array([[x, y, 1.0] for x in (-0.1, 0.1) for y in (-0.3, 0.1)])
    cover = head_cover(head, K, 100, 100)
    alpha = np.zeros((100, 100))
    alpha[:, 20:80] = 1
    mask = torso_mask(alpha, cover, T_cam_torso, K)
    assert cover[50, 50]
    assert not cover[70, 50]
    assert mask[70, 50]
    assert mask[55, 25]
    assert not mask[:50].any(), "above the neck's pivot"
    assert not mask[:, :20].any(), "not the subject"
    assert not (mask & cover).any()


def test_a_linear_relation_of_head_and_torso_is_recovered() -> None:
    rng = np.random.default_rng(0)
    turns, moves = rng.normal(0, 0.1, (200, 3)), rng.normal(0, 0.02, (200, 3))
    head = make_rigid(rotvec_to_matrix(turns), moves + np.array([0, 0, 0.6]))
    body = make_rigid(rotvec_to_matrix(0.3 * turns), 0.8 * moves + np.array([0, 0.05, 0.6]))
    shape = 0.05 * moves[:, :1] + 0.01
    trust = np.ones(200)
    trust[50:60], body[50:60, 0, 3], shape[50:60] = 0, 9, 9
    predictor = TorsoPredictor.fit(head, Torso(body, shape, trust))
    poses, bent = predictor.predict(head)
    right = np.arange(200) < 50
    assert np.abs(poses - body)[right].max() < 6e-3
    assert np.abs(bent - shape)[right].max() < 3e-4


def test_smoothing_keeps_slow_motion_and_takes_noise_away() -> None:
    rng = np.random.default_rng(1)
    times = np.arange(100)
    head = np.tile(np.diag([1.0, -1, -1, 1]), (100, 1, 1))
    body = head.copy()
    body[:, 0, 3] = 0.02 * np.sin(times / 15)
    noisy = body.copy()
    noisy[:, 0, 3] += rng.normal(0, 5e-4, 100)
    trust = np.ones(100)
    trust[40:44], noisy[40:44, 0, 3] = 0, 5.0
    smooth = steady(Torso(noisy, np.zeros((100, 1)), trust), head, np.zeros(100, np.int64))
    error = smooth.poses[:, 0, 3] - body[:, 0, 3]
    assert error[trust > 0].std() < 0.97 * 5e-4
    assert np.abs(error[40:44]).max() < 2e-3
