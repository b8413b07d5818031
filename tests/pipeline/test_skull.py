"""The skull is followed where hair and forehead show it, beside a fitted head that wanders with the expression."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.geometry import make_rigid, project_points, rotvec_to_matrix, transform_points
from pipeline.skull import Skull, follow_skull
from pipeline.synthetic import SyntheticClip, make_clip
from pipeline.torso import Views

FRAMES, SIZE = 16, 192
ON_SKULL = np.array([[0.0, 0.14, 0.02], [0.08, 0.08, -0.02], [-0.08, 0.08, -0.02], [0.0, 0.1, 0.08]])
"""Points in the head frame, metres."""


@pytest.fixture(scope="module")
def made() -> SyntheticClip:
    return make_clip(FRAMES, SIZE, SIZE, seed=6, fps=Fraction(5), hair=2000, supersample=3, motion=0.3)


@pytest.fixture(scope="module")
def views(made: SyntheticClip) -> Views:
    return seen(made, (0, 0, SIZE))


def seen(made: SyntheticClip, crop: tuple[int, int, int]) -> Views:
    on_head = made.head.regions["head"]
    neutral = made.head.template + np.tensordot(made.identity, made.head.identity_basis, 1)
    heads = transform_points(made.Ts_cam_head, np.repeat(neutral[None, on_head].astype(np.float64), FRAMES, 0))
    alphas = (255 * made.alpha).round().astype(np.uint8)
    Ks = np.repeat(made.K[None], FRAMES, 0)
    return Views.load(lambda i: (made.images[i], alphas[i]), heads, Ks, np.tile(crop, (FRAMES, 1)), 2)


def disturbed(made: SyntheticClip, degrees: float = 3, mm: float = 4) -> np.ndarray:
    """The true poses, each turned and moved a little, as a crooked mouth does it."""
    rng = np.random.default_rng(7)
    turns = rotvec_to_matrix(np.radians(rng.normal(0, degrees / np.sqrt(3), (FRAMES, 3))))
    return made.Ts_cam_head @ make_rigid(turns, rng.normal(0, mm * 1e-3 / np.sqrt(3), (FRAMES, 3)))


def follow(
    made: SyntheticClip,
    views: Views,
    poses: np.ndarray,
    crop: tuple[int, int, int] = (0, 0, SIZE),
    shots: np.ndarray | None = None,
    **how: Any,
) -> Skull:
    reference, head = 0, made.head
    with torch.no_grad():
        parts = (made.expression[:1], made.neck[:1], made.eyes[:1])
        vertices = head.vertices(torch.from_numpy(made.identity), *(torch.from_numpy(part) for part in parts))[0]
    in_camera = transform_points(poses[reference], vertices.numpy().astype(np.float64))
    faces = head.faces[head.regions["head"][head.faces].all(1)]
    x0, y0, side = crop
    landmarks = (made.landmarks[reference, :, :2] - (x0, y0)) * (views.pictures.shape[1] / side)
    shots = np.zeros(FRAMES, np.int64) if shots is None else shots
    return follow_skull(views, poses, reference, in_camera, faces, landmarks, shots, **how)


def misplaced(made: SyntheticClip, views: Views, poses: np.ndarray) -> np.ndarray:
    """[T] how far points on the skull lie off in the views, in pixels, apart from what all frames have in common."""
    points = np.broadcast_to(ON_SKULL, (FRAMES, *ON_SKULL.shape))
    off = np.subtract(*(project_points(transform_points(Ts, points), views.Ks[0]) for Ts in (poses, made.Ts_cam_head)))
    return np.linalg.norm(off - np.median(off, 0), axis=-1).mean(1)


def shifted(made: SyntheticClip, mm: np.ndarray) -> np.ndarray:
    """The true poses moved to the subject's left by [T] so much."""
    turns = np.broadcast_to(np.eye(3), (FRAMES, 3, 3))
    return made.Ts_cam_head @ make_rigid(turns, 1e-3 * mm[:, None] * np.array([1, 0, 0]))


def with_noise(views: Views, frames: slice) -> Views:
    """The views with frames that show nothing of the subject."""
    pictures = views.pictures.copy()
    pictures[frames] = np.random.default_rng(0).integers(0, 256, pictures[frames].shape)
    return replace(views, pictures=pictures)


@pytest.mark.parametrize(("degrees", "mm"), [(3.0, 4.0), (0.0, 6.0), (4.0, 0.0)])
def test_poses_that_wander_are_brought_back(made: SyntheticClip, views: Views, degrees: float, mm: float) -> None:
    poses = disturbed(made, degrees, mm)
    found = follow(made, views, poses)
    before, after = misplaced(made, views, poses), misplaced(made, views, found.poses)
    assert found.confidence.min() > 0.6
    assert np.median(after) < 0.3 * np.median(before)
    assert after.max() < 0.4 * before.max()


def test_right_poses_stay_right(made: SyntheticClip, views: Views) -> None:
    found = follow(made, views, made.Ts_cam_head)
    assert misplaced(made, views, found.poses).max() < 0.25


def test_poses_are_rigid(made: SyntheticClip, views: Views) -> None:
    turns = follow(made, views, disturbed(made)).poses[:, :3, :3]
    np.testing.assert_allclose(turns @ turns.swapaxes(1, 2), np.broadcast_to(np.eye(3), turns.shape), atol=1e-9)


def test_where_the_skull_is_out_of_sight_the_heads_poses_stand(made: SyntheticClip) -> None:
    crop, poses = (75, 115, 40), disturbed(made)
    found = follow(made, seen(made, crop), poses, crop)
    assert not found.confidence.any()
    np.testing.assert_array_equal(found.poses, poses)


def test_an_empty_matte_is_no_skull(made: SyntheticClip, views: Views) -> None:
    empty = replace(views, pictures=np.zeros_like(views.pictures))
    found = follow(made, empty, made.Ts_cam_head)
    assert not found.confidence.any()
    np.testing.assert_array_equal(found.poses, made.Ts_cam_head)


def test_a_hidden_frame_departs_as_its_neighbours_do(made: SyntheticClip, views: Views) -> None:
    poses = shifted(made, np.linspace(-8, 8, FRAMES))
    found = follow(made, with_noise(views, slice(3, 4)), poses)
    assert found.confidence[3] == 0 and np.delete(found.confidence, 3).min() > 0
    assert misplaced(made, views, found.poses)[3] < 0.4 * misplaced(made, views, poses)[3]


def test_shots_do_not_mix(made: SyntheticClip, views: Views) -> None:
    """Before a cut, frames that show nothing depart as those before them do, not as those behind the cut."""
    half = FRAMES // 2
    late = np.arange(FRAMES) >= half
    poses, hidden = shifted(made, np.where(late, 6.0, -6.0)), with_noise(views, slice(half - 3, half))
    apart, mixed = (follow(made, hidden, poses, shots=shots) for shots in (late.astype(np.int64), None))
    assert not apart.confidence[half - 3 : half].any()
    gap = slice(half - 3, half)
    assert misplaced(made, views, apart.poses)[gap].max() < 0.3 * misplaced(made, views, mixed.poses)[gap].max()


def test_threads_change_nothing(made: SyntheticClip, views: Views) -> None:
    poses, looks = disturbed(made), []
    one = follow(made, views, poses)
    three = follow(made, views, poses, threads=3, on_frame=lambda: looks.append(1))
    assert len(looks) == FRAMES
    np.testing.assert_array_equal(one.poses, three.poses)
    np.testing.assert_array_equal(one.confidence, three.confidence)
