"""Hands between looks: carried where they were seen twice, held at the ends, none where nobody is."""

from __future__ import annotations

import numpy as np

from pipeline.hands import HAND_LANDMARKS, LOOK_EVERY, bridge_hands, joined


def hand(x: float) -> np.ndarray:
    points = np.linspace(0, 40, HAND_LANDMARKS)
    return np.stack([x + points, 100 + points], axis=1).astype(np.float32)


TIMES = np.arange(30) / 30
LOOKS = range(0, 30, LOOK_EVERY)
EVERYWHERE = np.ones(30, bool)


def places(hands: np.ndarray) -> list[float | None]:
    assert hands.shape[1] <= 1
    return [None if not hands.shape[1] or np.isnan(one[0, 0, 0]) else float(one[0, 0, 0]) for one in hands]


def test_a_hand_moves_evenly_over_looks_that_missed_it() -> None:
    looks = {index: [hand(2.0 * index)] if index in (6, 9, 18) else [] for index in LOOKS}
    found = places(bridge_hands(looks, TIMES, EVERYWHERE))
    assert found[4:6] == [12, 12]  # held before the first look that shows it
    np.testing.assert_allclose(found[6:19], 2.0 * np.arange(6, 19), rtol=1e-6)
    assert found[19:21] == [36, 36]
    assert found[:4] == [None] * 4
    assert found[21:] == [None] * 9


def test_a_hand_seen_once_is_none() -> None:
    looks = {index: [hand(50)] if index == 12 else [] for index in LOOKS}
    assert bridge_hands(looks, TIMES, EVERYWHERE).shape == (30, 0, HAND_LANDMARKS, 2)


def test_a_hand_elsewhere_does_not_confirm_one() -> None:
    looks = {index: [hand(50)] if index == 12 else [hand(300)] if index == 15 else [] for index in LOOKS}
    assert not bridge_hands(looks, TIMES, EVERYWHERE).size


def test_hands_are_only_where_the_face_is_and_two_stay_two() -> None:
    present = EVERYWHERE.copy()
    present[10:20] = False
    looks = {index: [hand(50), hand(300)] for index in LOOKS if present[index]}
    hands = bridge_hands(looks, TIMES, present)
    assert hands.shape == (30, 2, HAND_LANDMARKS, 2)
    assert (np.isfinite(hands).all(axis=(1, 2, 3)) == present).all()
    assert sorted(hands[4, :, 0, 0].tolist()) == [50, 300]


def test_shots_with_different_numbers_of_hands_join() -> None:
    two, none = np.ones((3, 2, HAND_LANDMARKS, 2), np.float32), np.ones((4, 0, HAND_LANDMARKS, 2), np.float32)
    whole = joined([none, two])
    assert whole.shape == (7, 2, HAND_LANDMARKS, 2)
    assert np.isnan(whole[:4]).all()
    assert (whole[4:] == 1).all()
