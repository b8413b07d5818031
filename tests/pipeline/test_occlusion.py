"""Covered places of the flat face: large patches that stay, landmarks that can be judged, and no specks."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pipeline.fitting import reduce_to_landmarks
from pipeline.heads import load_head
from pipeline.occlusion import (
    FlatFace,
    covered_landmarks,
    covered_share,
    departures,
    flat_face,
    sample_face,
    shown_in,
    texel_places,
)

FRAMES = 40


@functools.cache
def landmarks() -> np.ndarray:
    """[478, 3] the average head's from the front, 240 pixels wide, in a picture of 320 x 320."""
    points = reduce_to_landmarks(load_head("anny")).mean * [1, -1, -1]
    points = points * 240 / np.ptp(points[:, 0])
    return points - points.mean(axis=0) + [160, 160, 0]


@functools.cache
def layout() -> FlatFace:
    return flat_face(landmarks())


def near(landmark: int, radius: float) -> np.ndarray:
    """[P] texels within pixels of a landmark."""
    apart = texel_places(landmarks(), layout()) - landmarks()[landmark, :2]
    return np.linalg.norm(apart, axis=1) < radius


def test_only_what_can_be_judged_is_covered() -> None:
    everything = np.ones((FRAMES, len(layout().texels)), bool)
    covered = covered_landmarks(everything, layout())
    assert (covered == layout().judged).all()
    assert covered[0, [13, 14, 1]].all(), "lips and the nose's tip are judged"
    assert not covered[0, [10, 107, 336, 234, 454]].any(), "forehead, brows and the sides are not"


@pytest.mark.parametrize(("first", "last", "told"), [(10, 30, True), (10, 12, False)])
def test_a_patch_that_stays_covers_the_landmarks_under_it(first: int, last: int, told: bool) -> None:
    departing = np.zeros((FRAMES, len(layout().texels)), bool)
    departing[first:last] = near(14, 40)
    covered = covered_landmarks(departing, layout())
    under = np.linalg.norm(landmarks()[:, :2] - landmarks()[14, :2], axis=1) < 40
    assert covered[:, under & layout().judged].any() == told
    assert covered[(first + last) // 2, under & layout().judged].mean() >= 0.9 * told
    assert not covered[:, ~under].any()
    assert not covered[[*range(first - 2), *range(last + 2, FRAMES)]].any()


def test_specks_are_no_cover() -> None:
    departing = np.random.default_rng(0).random((1, len(layout().texels))) < 0.15
    assert not covered_landmarks(departing.repeat(FRAMES, axis=0), layout()).any()
    one = np.zeros((FRAMES, len(layout().texels)), bool)
    one[:] = near(14, 8)
    assert not covered_landmarks(one, layout()).any()


def test_a_cover_departs_from_what_light_and_noise_leave() -> None:
    generator = np.random.default_rng(1)
    picture = (120 + 40 * np.sin(np.arange(320) / 9)[None] + 30 * np.cos(np.arange(320) / 13)[:, None]).astype(float)
    values, visible = [], []
    for frame in range(FRAMES):
        shown = picture * (1 + 0.1 * np.sin(frame / 5)) + generator.normal(0, 3, picture.shape)
        if 15 <= frame < 25:
            shown[200:260, 120:200] = 30
        one, seen = sample_face(shown.clip(0, 255).astype(np.uint8), landmarks(), layout())
        values.append(one)
        visible.append(seen)
    seen = np.stack(visible)
    odd = departures(np.stack(values), seen, layout(), np.zeros((FRAMES, 52)), np.tile(np.eye(3), (FRAMES, 1, 1)))
    share = covered_share(odd, seen)
    assert share[15:25].min() > 0.08
    assert share[[*range(15), *range(25, FRAMES)]].max() < 0.01
    places = texel_places(landmarks(), layout())
    under = ((places > [120, 200]) & (places < [200, 260])).all(axis=1)
    assert odd[20, under].mean() > 0.8
    assert odd[20, ~under].mean() < 0.1


def test_places_outside_the_picture_are_in_no_mask() -> None:
    mask = np.zeros((10, 20), np.uint8)
    mask[2:5, 15:] = 255
    places = np.array([[15.5, 2.5], [19.9, 4.9], [14.9, 3.0], [25.0, 3.0], [-3.0, 3.0], [16.0, 30.0], [np.nan, 3.0]])
    assert shown_in(mask, places).tolist() == [True, True, False, False, False, False, False]
