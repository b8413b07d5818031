"""FLAME fitted to vertices finds what they were made of, and says how far it stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import recordings
import torch

from pipeline.errors import StageError
from pipeline.geometry import make_rigid, rotvec_to_matrix, transform_points
from pipeline.heads.flame import Flame, load_flame
from pipeline.interchange.flame_refit import Target, _face, refit


@pytest.fixture(scope="module")
def flame(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flame]:
    folder = tmp_path_factory.mktemp("heads")
    recordings.flame_file(folder, "flame2023")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_HEADS", str(folder))
        yield load_flame("flame2023")


def vertices(flame: Flame, track: recordings.FlameTrack) -> np.ndarray:
    parts = {
        name: torch.tensor(getattr(track, name))
        for name in ("expression", "rotation", "neck", "jaw", "eyes", "translation")
    }
    return flame.vertices(torch.tensor(track.shape), **parts).numpy()


def truth(flame: Flame, frames: int = 6) -> tuple[recordings.FlameTrack, Target]:
    """A FLAME whose neck is straight, before the camera."""
    track = recordings.flame_track("flame2023", frames, moving=False)
    track = replace(track, neck=np.zeros((frames, 3)), shape=0.5 * track.shape)
    rng = np.random.default_rng(5)
    turns = rotvec_to_matrix(rng.uniform(-0.4, 0.4, (frames, 3))) @ np.diag([1.0, -1.0, -1.0])
    poses = make_rigid(turns, rng.uniform(-0.05, 0.05, (frames, 3)) + np.array([0, 0, 0.7]))
    placed = transform_points(poses, vertices(flame, track))
    return track, Target(
        placed, np.ones(5023), _face(flame), poses[:, None, :3, :3] @ rotvec_to_matrix(track.eyes), "the truth"
    )


def test_finds_what_the_vertices_were_made_of(flame: Flame) -> None:
    track, target = truth(flame)
    found, residual = refit(flame, target, 300, 100)
    np.testing.assert_allclose(vertices(flame, found), target.vertices, atol=5e-5)
    assert residual["head_median"] < 0.005
    assert residual["face_p95"] < 0.01
    assert np.abs(found.jaw - track.jaw).max() < 1e-3


def test_eyes_are_found_by_the_eyeballs(flame: Flame) -> None:
    track, target = truth(flame)
    found, _ = refit(flame, replace(target, eyes=None), 300, 100)
    np.testing.assert_allclose(rotvec_to_matrix(found.eyes), rotvec_to_matrix(track.eyes), atol=0.02)


def test_fewer_coefficients_are_refitted_not_cut_off(flame: Flame) -> None:
    track, target = truth(flame)
    found, residual = refit(flame, target, 100, 50)
    assert found.shape.shape == (100,)
    assert found.expression.shape == (6, 50)
    cut = replace(track, shape=track.shape[:100], expression=track.expression[:, :50])
    cut_off = np.linalg.norm(vertices(flame, cut) - vertices(flame, track), axis=2)
    measured = np.linalg.norm(vertices(flame, found) - target.vertices, axis=2)
    assert np.sqrt((measured**2).mean()) < np.sqrt((cut_off**2).mean())
    assert residual["head_median"] == pytest.approx(1e3 * np.median(measured), abs=1e-3)


def test_vertices_without_a_place_do_not_count(flame: Flame) -> None:
    _, target = truth(flame)
    lost = target.vertices.copy()
    lost[:, :1500] = 9.0
    weights = np.ones(5023)
    weights[:1500] = 0
    _, residual = refit(flame, replace(target, vertices=lost, weights=weights), 300, 100)
    assert residual["head_median"] < 0.05
    with pytest.raises(StageError, match="Only 100 of FLAME's vertices"):
        refit(flame, replace(target, weights=np.r_[np.ones(100), np.zeros(4923)]), 300, 100)
