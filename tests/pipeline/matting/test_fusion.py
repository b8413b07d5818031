"""Alphas taken together over time: single flaws go, motion and uncovered ground stay what they are."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.matting.flow import single_threaded_opencv
from pipeline.matting.fusion import Motion, fuse, middle_of_three

SIZE, FRAMES = 160, 9
Image = NDArray[np.uint8]


def disc(x: float, y: float = 80, radius: float = 32) -> Image:
    row, column = np.mgrid[:SIZE, :SIZE] + 0.5
    return (np.clip(radius - np.hypot(column - x, row - y) + 0.5, 0, 1) * 255).astype(np.uint8)


def pattern(seed: int) -> Image:
    cells = np.random.default_rng(seed).integers(0, 255, (24, 24, 3)).astype(np.uint8)
    return cv2.resize(cells, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def scene(x: float) -> Image:
    """A patterned disc before a patterned ground that stands still."""
    moved = cv2.warpAffine(pattern(1), np.float32([[1, 0, x - 80], [0, 1, 0]]), (SIZE, SIZE))
    share = disc(x)[..., None] / 255
    return (moved * share + pattern(0) * (1 - share)).astype(np.uint8)


def fused(places: list[float], alphas: list[Image]) -> list[Image]:
    with single_threaded_opencv():
        return fuse(alphas, Motion([scene(x) for x in places]))


def centre(alpha: Image) -> float:
    return float((alpha.sum(0) * (np.arange(SIZE) + 0.5)).sum() / alpha.sum())


STILL = [80.0] * FRAMES
STEADY = [60 + 3.0 * i for i in range(FRAMES)]


@pytest.mark.parametrize("places", [STILL, STEADY], ids=["still", "moving"])
@pytest.mark.parametrize("flaw", [0, 255], ids=["hole", "blob"])
def test_a_flaw_of_one_frame_is_healed(places: list[float], flaw: int) -> None:
    truth = [disc(x) for x in places]
    alphas = [alpha.copy() for alpha in truth]
    row, column = (70, int(places[4]) - 6) if flaw == 0 else (10, 20)
    where = slice(row, row + 14), slice(column, column + 14)
    alphas[4][where] = flaw
    found = fused(places, alphas)
    before, after = (np.abs(one[4][where].astype(float) - truth[4][where]).mean() for one in (alphas, found))
    assert after < 0.35 * before
    for other in (0, 2, 3, 5, 6, 8):
        assert np.abs(found[other][where].astype(float) - truth[other][where]).mean() < 0.25 * before


def test_noise_from_frame_to_frame_becomes_less() -> None:
    rng = np.random.default_rng(0)
    # As a network's outline wanders: the disc is now larger, now smaller.
    sizes = 32 + rng.normal(0, 2, FRAMES)
    found = fused(STILL, [disc(80, radius=size) for size in sizes])
    areas = [[one.sum() / 255 for one in alphas] for alphas in ([disc(80, radius=size) for size in sizes], found)]
    assert np.std(areas[1]) < 0.5 * np.std(areas[0])


@pytest.mark.parametrize("speed", [-4.0, 1.5, 4.0])
def test_what_moves_steadily_is_not_lagged(speed: float) -> None:
    places = [80 + speed * (i - FRAMES // 2) for i in range(FRAMES)]
    truth = [disc(x) for x in places]

    def lags(found: list[Image]) -> list[float]:
        return [centre(one) - centre(right) for one, right in zip(found, truth, strict=True)]

    followed, averaged = lags(fused(places, truth)), lags(fused(STILL, truth))
    # What comes before and after cancels inside the run; at its ends there is one side only.
    assert abs(np.mean(followed)) < 0.15
    assert abs(followed[4]) < 0.2 and np.abs(followed[3:6]).max() < 0.6
    assert np.abs(followed).max() < 2.3
    assert np.abs(followed).max() < 0.55 * np.abs(averaged).max()


def test_ground_that_is_uncovered_shows_no_ghost() -> None:
    places = [50 + 6.0 * i for i in range(FRAMES)]
    found = fused(places, [disc(x) for x in places])
    for x, alpha in zip(places, found, strict=True):
        assert alpha[disc(x, radius=37) == 0].mean() < 2
        assert alpha[disc(x, radius=27) == 255].mean() > 250


def test_a_constant_stays_and_a_single_frame_is_itself() -> None:
    for value in (0, 7, 255):
        alphas = [np.full((SIZE, SIZE), value, np.uint8)] * 4
        assert all((one == value).all() for one in fused(STEADY[:4], alphas))
    alone = disc(80)
    np.testing.assert_array_equal(fused([80.0], [alone])[0], alone)


def test_frames_larger_than_the_flow_keep_their_size() -> None:
    large = [cv2.resize(scene(x), (700, 650)) for x in (80.0, 82.0)]
    alpha = cv2.resize(disc(80), (700, 650))
    with single_threaded_opencv():
        motion = Motion(large)
        assert max(motion.forth[0].shape[:2]) <= 256
        moved = motion.from_before(1, alpha)
    assert moved.shape == (650, 700)
    right = cv2.resize(disc(82), (700, 650)).astype(float)
    assert np.abs(moved - right).sum() < 0.5 * np.abs(alpha - right).sum()


def test_the_middle_of_three_drops_what_only_one_frame_says() -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 256, (3, 40, 30), dtype=np.uint8)
    np.testing.assert_array_equal(middle_of_three(a, b, c), np.median([a, b, c], 0).astype(np.uint8))
    np.testing.assert_array_equal(middle_of_three(None, b, c), b)
    np.testing.assert_array_equal(middle_of_three(a, b, None), b)
