"""The empty scene behind the subject is found where the camera stands still, and only there."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.matting.plate import MIN_SEEN, estimate_plate
from pipeline.matting.refine import Plate

SIZE, FRAMES = 128, 20
Image = NDArray[np.uint8]


def texture(side: int = 2 * SIZE) -> Image:
    cells = np.random.default_rng(3).integers(0, 255, (side // 6, side // 6, 3)).astype(np.uint8)
    return cv2.resize(cells, (side, side), interpolation=cv2.INTER_CUBIC)


def disc(x: float, radius: float = 22) -> NDArray[np.float32]:
    row, column = np.mgrid[:SIZE, :SIZE] + 0.5
    return np.clip(radius - np.hypot(column - x, row - 64) + 0.5, 0, 1).astype(np.float32)


def places(moves: bool) -> list[float]:
    return [30 + (68 * i / (FRAMES - 1) if moves else 0) for i in range(FRAMES)]


def plate_of(
    grounds: list[Image], where: list[float], noise: float = 1.5, indices: list[int] | None = None
) -> Plate | None:
    """The plate of a red disc that is at these places before these grounds."""
    rng = np.random.default_rng(0)
    images = []
    for ground, x in zip(grounds, where, strict=True):
        share = disc(x)[..., None]
        picture = share * np.array([200, 40, 40]) + (1 - share) * ground + rng.normal(0, noise, ground.shape)
        images.append(picture.round().clip(0, 255).astype(np.uint8))
    alphas = [(255 * disc(x)).astype(np.uint8) for x in where]
    return estimate_plate(
        images.__getitem__, alphas.__getitem__, list(range(len(where))) if indices is None else indices
    )


def test_a_ground_behind_something_that_moves_is_found_whole() -> None:
    ground = texture()[:SIZE, :SIZE]
    plate = plate_of([ground] * FRAMES, places(moves=True))
    assert plate is not None
    assert plate.known.mean() > 0.9
    known = plate.known > 0.5
    error = np.abs(plate.image[known].astype(float) - ground[known])
    assert error.mean() < 2 and np.percentile(error, 99) < 6


def test_only_what_was_seen_is_known() -> None:
    ground = texture()[:SIZE, :SIZE]
    plate = plate_of([ground] * FRAMES, places(moves=False))
    assert plate is not None
    assert not plate.known[disc(30) > 0].any()
    assert not plate.known[disc(30, radius=23) > 0].any(), "nor at the outline, which coarse alphas miss"
    assert (plate.known[:, 70:] > 0.9).all()
    assert plate.known.min() >= 0 and plate.known.max() <= 1


def test_a_part_that_keeps_moving_is_not_known() -> None:
    rng = np.random.default_rng(1)
    grounds = []
    for _ in range(FRAMES):
        ground = texture()[:SIZE, :SIZE].copy()
        ground[:12, 90:] = rng.integers(0, 255, (12, SIZE - 90, 3))
        grounds.append(ground)
    plate = plate_of(grounds, places(moves=True))
    assert plate is not None
    assert plate.known[:10, 94:].max() < 0.2
    assert plate.known[20:60, 94:].mean() > 0.9


def test_a_camera_that_pans_has_no_plate() -> None:
    wide = texture()
    grounds = [wide[:SIZE, 3 * i : 3 * i + SIZE] for i in range(FRAMES)]
    assert plate_of(grounds, places(moves=False)) is None


def test_before_a_plain_wall_nobody_can_tell_and_the_plate_is_right() -> None:
    wall = np.full((SIZE, SIZE, 3), (90, 120, 150), np.uint8)
    plate = plate_of([wall] * FRAMES, places(moves=True))
    assert plate is not None
    assert np.abs(plate.image[plate.known > 0.5].astype(float) - (90, 120, 150)).max() < 4


def test_too_little_to_go_by_is_no_plate() -> None:
    ground = texture()[:SIZE, :SIZE]
    assert plate_of([ground] * FRAMES, places(moves=True), indices=list(range(MIN_SEEN - 1))) is None
    everywhere = np.full((SIZE, SIZE), 255, np.uint8)
    assert estimate_plate(lambda i: ground, lambda i: everywhere, range(FRAMES)) is None
