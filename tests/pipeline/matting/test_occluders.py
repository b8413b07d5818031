"""What is drawn of covers and hands: over the covered landmarks and the fingers, and nowhere else."""

from __future__ import annotations

import numpy as np

from pipeline.hands import HAND_LANDMARKS
from pipeline.matting.occluders import covered_pixels, hand_pixels

SHAPE = (200, 240, 3)


def face() -> np.ndarray:
    """478 landmarks spread over a square of 100 pixels."""
    y, x = np.mgrid[:22, :22].reshape(2, -1)[:, :478]
    return np.stack([70 + x * 100 / 21 + 0.1 * y, 50 + y * 100 / 21], axis=1)


def test_nothing_covered_is_nothing() -> None:
    assert not covered_pixels(face(), np.zeros(478, bool), SHAPE).any()
    assert not hand_pixels(np.full((2, HAND_LANDMARKS, 2), np.nan), SHAPE).any()
    assert not hand_pixels(np.zeros((0, HAND_LANDMARKS, 2)), SHAPE).any()


def test_covered_pixels_fill_the_place_of_the_covered_landmarks() -> None:
    points = face()
    covered = (np.abs(points - [120, 110]) <= 20).all(axis=1)
    mask = covered_pixels(points, covered, SHAPE)
    assert mask.shape == SHAPE[:2]
    assert set(np.unique(mask)) == {0, 255}
    y, x = np.nonzero(mask)
    assert (mask[95:126, 105:136] == 255).all()
    assert np.abs(x - 120).max() < 32
    assert np.abs(y - 110).max() < 32


def test_a_landmark_outside_the_picture_is_no_error() -> None:
    points = face() - [150, 0]
    covered = points[:, 0] < 5
    mask = covered_pixels(points, covered, SHAPE)
    assert mask[100, 0] == 255
    assert not mask[:, 40:].any()


def open_hand() -> np.ndarray:
    """A hand with its wrist at the bottom and five fingers upwards."""
    roots = [(80, 150), (95, 110), (110, 106), (125, 110), (138, 118)]
    fingers = [[(x, y - 14 * step) for step in range(4)] for x, y in roots]
    return np.array([(110, 170), *(point for finger in fingers for point in finger)], float)


def test_a_hand_is_its_palm_and_fingers() -> None:
    hand = open_hand()
    mask = hand_pixels(hand[None], SHAPE)
    x, y = hand.round().astype(int).T
    assert (mask[y, x] == 255).all()
    assert mask[140, 110] == 255  # the middle of the palm
    assert not mask[:45].any()
    assert not mask[:, 170:].any()
