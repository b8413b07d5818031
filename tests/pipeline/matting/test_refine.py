"""Edges found anew in the picture: alpha, colours, and what is left to the network, on composites with known truth."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.matting.metrics import mad
from pipeline.matting.refine import Plate, foreground, refine, spread

SIZE = 256
Image = NDArray[np.uint8]
Floats = NDArray[np.float32]


def silhouette(strands: int = 120) -> Floats:
    """[SIZE, SIZE] a disc with hairs of half a pixel around it."""
    rng, scale = np.random.default_rng(2), 8
    large = np.zeros((SIZE * scale, SIZE * scale), np.uint8)
    middle, radius = SIZE * scale // 2, SIZE * scale // 4
    cv2.circle(large, (middle, middle), radius, 255, -1)
    for angle in rng.uniform(0, 2 * np.pi, strands):
        towards = np.array([np.cos(angle), np.sin(angle)])
        bent = np.array([np.cos(angle + rng.normal(0, 0.06)), np.sin(angle + rng.normal(0, 0.06))])
        start, end = (middle + towards * radius * 0.98), (middle + bent * radius * 1.08)
        cv2.line(large, start.astype(int).tolist(), end.astype(int).tolist(), 255, scale // 2)
    return cv2.resize(large, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def noise(low: int, high: int, cells: int, seed: int) -> Image:
    """[SIZE, SIZE, 3] soft patches of colour."""
    rng = np.random.default_rng(seed)
    patches = rng.uniform(low, high, (cells, cells, 3)).astype(np.float32)
    return cv2.resize(patches, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


def composite(subject: Image, ground: Image, alpha: Floats) -> Image:
    share = alpha[..., None]
    return (share * subject + (1 - share) * ground + 0.5).astype(np.uint8)


def as_networks_see(alpha: Floats) -> Floats:
    """The alpha at a fifth of the size and grown again, a pixel off."""
    small = cv2.resize(alpha, (SIZE // 5, SIZE // 5), interpolation=cv2.INTER_AREA)
    grown = cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return np.roll(grown, (1, 1), (0, 1))


DARK, BRIGHT = noise(20, 60, 6, 0), noise(150, 240, 6, 1)


def test_a_soft_edge_and_hairs_are_recovered_from_a_coarse_alpha() -> None:
    truth = silhouette()
    coarse = as_networks_see(truth)
    found = refine(composite(DARK, BRIGHT, truth), coarse)
    assert mad(truth, found.alpha) < 0.25 * mad(truth, coarse)
    hairs = (truth > 0.2) & (coarse < 0.5)
    assert hairs.sum() > 100
    assert np.abs(found.alpha - truth)[hairs].mean() < 0.3 * np.abs(coarse - truth)[hairs].mean()


def test_the_subjects_colours_hold_no_background() -> None:
    truth = silhouette()
    image = composite(DARK, BRIGHT, truth)
    found = refine(image, as_networks_see(truth))
    edge = (truth > 0.1) & (truth < 0.9)
    ours, theirs = (np.abs(colours[edge] - DARK[edge].astype(float)).mean() for colours in (found.foreground, image))
    assert ours < 0.2 * theirs
    white = np.full_like(image, 255)
    wanted = composite(DARK, white, truth).astype(float)
    off = [np.abs(composite(c, white, found.alpha) - wanted)[edge].mean() for c in (found.foreground, image)]
    assert off[0] < 0.4 * off[1]


def test_inside_the_frame_stands_as_it_is() -> None:
    truth = silhouette(0)
    image = composite(DARK, BRIGHT, truth)
    found = refine(image, as_networks_see(truth))
    deep = cv2.erode((truth == 1).astype(np.uint8), np.ones((21, 21))) > 0
    far = cv2.dilate((truth > 0).astype(np.uint8), np.ones((21, 21))) == 0
    np.testing.assert_array_equal(found.foreground[deep], image[deep])
    assert (found.alpha[deep] == 1).all() and not found.alpha[far].any()
    assert (found.certainty[deep] == 1).all() and (found.certainty[far] == 1).all()
    assert found.certainty.min() >= 0 and found.certainty.max() <= 1


def test_where_both_sides_look_alike_the_network_stands() -> None:
    truth = silhouette(0)
    flat = np.full((SIZE, SIZE, 3), 120, np.uint8)
    coarse = as_networks_see(truth)
    found = refine(flat, coarse)
    stretched = np.clip((coarse - 0.1) / 0.75, 0, 1)
    assert np.abs(found.alpha - stretched).max() < 1e-3
    guess = np.abs(coarse - 0.5) < 0.1
    told = refine(composite(DARK, BRIGHT, truth), coarse).certainty
    assert found.certainty[guess].max() < 0.25
    assert told[guess].mean() > 2 * found.certainty[guess].mean()


def test_a_plate_helps_before_a_ground_full_of_detail() -> None:
    truth = silhouette()
    ground = noise(0, 255, 60, 4)
    image, coarse = composite(DARK, ground, truth), as_networks_see(truth)
    errors = [
        mad(truth, refine(image, coarse, plate).alpha)
        for plate in (None, Plate(ground, np.ones((SIZE, SIZE), np.float32)))
    ]
    assert errors[1] < 0.4 * errors[0]
    unknown = refine(image, coarse, Plate(np.zeros_like(ground), np.zeros((SIZE, SIZE), np.float32)))
    np.testing.assert_array_equal(unknown.alpha, refine(image, coarse).alpha)


def test_spreading_reproduces_a_constant_and_is_exact_where_it_is_sure() -> None:
    sure = (silhouette(0) > 0.5).astype(np.uint8)
    flat = np.full((SIZE, SIZE, 3), (30, 140, 250), np.uint8)
    flat[sure == 0] = 0
    carried = spread(flat, sure)
    np.testing.assert_allclose(carried[..., :3], np.broadcast_to((30, 140, 250), (SIZE, SIZE, 3)), atol=1.5)
    np.testing.assert_allclose(carried[..., 3], 140**2, rtol=0.01)
    ramp = np.stack([np.tile(np.linspace(0, 255, SIZE), (SIZE, 1))] * 3, -1).astype(np.uint8)
    deep = cv2.erode(sure, np.ones((9, 9))) > 0
    assert np.abs(spread(ramp, sure)[..., :3] - ramp)[deep].max() < 1.5


def test_spreading_from_nowhere_is_finite() -> None:
    assert np.isfinite(spread(DARK, np.zeros((SIZE, SIZE), np.uint8))).all()


@pytest.mark.parametrize("shape", [(7, 300), (61, 33), (3, 3)])
def test_any_size_will_do(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = refine(image, rng.random(shape, np.float32))
    assert found.alpha.shape == found.certainty.shape == shape
    assert np.isfinite(found.alpha).all() and 0 <= found.alpha.min() <= found.alpha.max() <= 1


def test_a_known_composite_is_taken_apart() -> None:
    truth = silhouette()
    image = composite(DARK, BRIGHT, truth)
    colours = foreground(image, truth)
    seen = truth > 0.1
    assert np.abs(colours[seen] - DARK[seen].astype(float)).mean() < 1
    assert np.abs(image[seen] - DARK[seen].astype(float)).mean() > 4
    again = composite(colours, BRIGHT, truth)
    assert np.abs(again[seen] - image[seen].astype(float)).mean() < 2
