"""Matting figures against values by hand and against what must not change them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pipeline.matting.metrics import Flicker, dtssd, gradient_error, iou, mad, mse, partial_alpha_share, sad


def alphas(seed: int, shape: tuple[int, ...] = (4, 20, 30)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, shape)


def test_differences_by_hand() -> None:
    truth, alpha = np.zeros((10, 20)), np.zeros((10, 20))
    alpha[2, 3:5] = 0.5
    alpha[4, 4] = 1
    assert sad(truth, alpha) == pytest.approx(2 / 1000)
    assert mad(truth, alpha) == pytest.approx(2 / 200)
    assert mse(truth, alpha) == pytest.approx(1.5 / 200)


def test_a_sequence_has_the_mean_of_its_frames() -> None:
    truth, alpha = alphas(1), alphas(2)
    for figure in (sad, mad, mse, gradient_error, iou):
        each = [figure(a, b) for a, b in zip(truth, alpha, strict=True)]
        assert figure(truth, alpha) == pytest.approx(np.mean(each))


def test_equal_alphas_are_without_error() -> None:
    truth = alphas(3)
    assert [figure(truth, truth) for figure in (sad, mad, mse, gradient_error, dtssd)] == [0] * 5
    assert iou(truth, truth) == 1


def test_alphas_of_other_shapes_are_refused() -> None:
    for figure in (sad, mad, mse, gradient_error, dtssd, iou):
        with pytest.raises(ValueError, match="of one shape"):
            figure(np.zeros((4, 5)), np.zeros((5, 4)))


def test_the_gradient_error_of_a_step_by_hand() -> None:
    """Along a step the response is the running sum of the derivative kernel times the sum of the smoothing one."""
    x = np.arange(-4, 5)
    gauss = np.exp(-(x**2) / (2 * 1.4**2))
    slope = x * gauss
    gauss, slope = gauss / np.sqrt((gauss**2).sum()), slope / np.sqrt((slope**2).sum())
    step = np.zeros((12, 40))
    step[:, 20:] = 1
    response = np.array([slope[x + column >= 20].sum() for column in range(40)]) * gauss.sum()
    assert gradient_error(np.zeros_like(step), step) == pytest.approx(12 * (response**2).sum() / 1000)
    assert gradient_error(np.zeros_like(step), step.T[:, ::-1].T) == pytest.approx(gradient_error(step * 0, step))
    assert gradient_error(step, 1 - step) == pytest.approx(0, abs=1e-12)
    assert gradient_error(step * 0.3 + 0.1, step * 0.3 + 0.5) == pytest.approx(0, abs=1e-12)


def test_dtssd_by_hand_and_blind_to_what_stays() -> None:
    truth = alphas(4)
    assert dtssd(truth, truth + 0.25) == pytest.approx(0, abs=1e-12)
    assert dtssd(truth, truth + alphas(5, (20, 30))) == pytest.approx(0, abs=1e-12)
    blinking = truth.copy()
    blinking[1] += 0.5
    assert dtssd(truth, blinking) == pytest.approx((0.5 + 0.5 + 0) / 3)
    half = truth.copy()
    half[1, :10] += 0.5
    assert dtssd(truth, half) == pytest.approx((2 * 0.5 * np.sqrt(0.5)) / 3)
    assert dtssd(truth[0], blinking[0]) == 0


def test_iou_by_hand() -> None:
    truth, alpha = np.zeros((10, 10)), np.zeros((10, 10))
    truth[:, :6] = 0.5
    alpha[:, 3:9] = 0.9
    alpha[:, 9] = 0.49
    assert iou(truth, alpha) == pytest.approx(3 / 9)
    assert iou(np.zeros((4, 4)), np.zeros((4, 4))) == 1
    assert iou(np.zeros((4, 4)), np.ones((4, 4))) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_partial_alpha_counts_levels_14_to_241(dtype: type) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert partial_alpha_share(levels.astype(dtype) / dtype(255)) == (241 - 13) / (255 - 13)
    assert partial_alpha_share(np.zeros((3, 3))) == 0
    assert partial_alpha_share(np.stack([np.zeros((3, 3)), np.full((3, 3), 0.5)])) == 0.5


SIZE, RADIUS = 200, 50


def scene(x: float, jump: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A patterned disc before a patterned ground, and its alpha, `jump` too wide."""
    rng = np.random.default_rng(3)
    ground, pattern = (
        cv2.resize(rng.integers(0, 255, (25, 25, 3)).astype(np.uint8), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
        for _ in range(2)
    )
    row, column = np.mgrid[:SIZE, :SIZE] + 0.5
    away = np.hypot(column - x, row - SIZE / 2)
    true, alpha = np.clip(RADIUS - away + 0.5, 0, 1), np.clip(RADIUS + jump - away + 0.5, 0, 1)
    moved = cv2.warpAffine(pattern, np.float32([[1, 0, x - SIZE / 2], [0, 1, 0]]), (SIZE, SIZE))
    return (moved * true[..., None] + ground * (1 - true[..., None])).astype(np.uint8), alpha


def flicker(places: list[float], jumps: list[float]) -> float:
    accumulator = Flicker()
    for place, jump in zip(places, jumps, strict=True):
        accumulator.add(*scene(place, jump))
    return accumulator.mean()


def test_flicker_counts_jumps_and_not_what_stands() -> None:
    assert flicker([100] * 5, [0] * 5) < 0.01
    assert flicker([100] * 5, [2] * 5) < 0.01
    assert flicker([100] * 6, [0, 1] * 3) == pytest.approx(1, rel=0.1)
    assert flicker([100] * 6, [0, 2] * 3) == pytest.approx(2, rel=0.1)


def test_flicker_ignores_motion_that_the_picture_shows() -> None:
    """A panning camera and a swinging one; then a subject before a ground that stands, where flow errs at its edge."""
    image = scene(100)[0]

    def panned(offsets: list[int], jumps: list[int], seen: bool = True) -> float:
        accumulator = Flicker()
        for offset, jump in zip(offsets, jumps, strict=True):
            shown = np.roll(image, offset, axis=1) if seen else image
            accumulator.add(shown, np.roll(scene(100, jump)[1], offset, axis=1))
        return accumulator.mean()

    for offsets in ([0, 4, 8, 12, 16], [0, 5, 0, 5, 0]):
        assert panned(offsets, [0] * 5) < 0.2
        assert panned(offsets, [0] * 5, seen=False) > 2
        assert panned(offsets, [0, 2, 0, 2, 0]) == pytest.approx(2, rel=0.15)
    assert flicker([95 + t for t in range(6)], [0] * 6) < 0.4
    assert flicker([95 + t for t in range(6)], [0, 2] * 3) == pytest.approx(2, rel=0.15)


def test_flicker_takes_bytes_and_broken_sequences() -> None:
    floats, integers, broken = Flicker(), Flicker(), Flicker()
    for t in range(5):
        image, alpha = scene(100, t % 2)
        floats.add(image, alpha)
        integers.add(image, (alpha * 255).round().astype(np.uint8))
        broken.add(image, alpha)
        if t % 2:
            broken.add(None, None)
    assert integers.mean() == pytest.approx(floats.mean(), rel=1e-2)
    assert broken.mean() == 0
    empty = Flicker()
    for _ in range(4):
        empty.add(image, np.zeros_like(alpha))
    assert empty.mean() == 0


def test_flicker_does_not_depend_on_threads() -> None:
    before = cv2.getNumThreads()
    values = []
    for threads in (1, 4):
        cv2.setNumThreads(threads)
        values.append(flicker([90, 94, 98, 102], [0, 1, 0, 1]))
    cv2.setNumThreads(before)
    assert values[0] == values[1]
