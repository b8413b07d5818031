"""Gaussians at random, shared by the tests of splat files."""

from __future__ import annotations

import numpy as np

from pipeline.splats import Splats


def random_splats(count: int, seed: int = 0, degree: int = 3) -> Splats:
    """Gaussians the size of a head's, with harmonics up to a degree."""
    rng = np.random.default_rng(seed)
    quats = rng.standard_normal((count, 4))
    sh = 0.3 * rng.standard_normal((count, 16, 3))
    sh[:, (degree + 1) ** 2 :] = 0
    return Splats(
        means=rng.uniform(-0.1, 0.1, (count, 3)).astype(np.float32),
        quats=(quats / np.linalg.norm(quats, axis=-1, keepdims=True)).astype(np.float32),
        scales=rng.uniform(0.005, 0.03, (count, 3)).astype(np.float32),
        opacities=rng.uniform(0.05, 0.95, count).astype(np.float32),
        sh=sh.astype(np.float32),
    )


def same_turns(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[N] degrees between rotations, unit quaternions [N,4]."""
    return np.degrees(2 * np.arccos(np.clip(np.abs((first.astype(np.float64) * second).sum(1)), 0, 1)))
