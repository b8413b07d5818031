"""What a clip showed: angles and coefficients in training, and what held-out frames have beyond them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.coverage import Coverage
from pipeline.geometry import rotvec_to_matrix

NAMES = ("jawOpen", "eyeBlinkLeft", "eyeBlinkRight", "mouthSmileLeft", "mouthSmileRight")
COUNT = 60
SPLIT = {"train": [0, 49], "test": [50, 59]}


def poses(turns_deg: Any) -> np.ndarray:
    """[T,4,4] of heads that face the camera and are turned about their own axes (x: down, y: to their left)."""
    Ts = np.tile(np.eye(4), (len(turns_deg), 1, 1))
    Ts[:, :3, :3] = np.diag([1.0, -1, -1]) @ rotvec_to_matrix(np.radians(np.asarray(turns_deg, np.float64)))
    return Ts


def fit(**changes: Any) -> dict[str, Any]:
    plain = {
        "expression": np.zeros((COUNT, len(NAMES))),
        "expression_names": np.array(NAMES),
        "Ts_cam_head": poses(np.zeros((COUNT, 3))),
        "eyes": np.zeros((COUNT, 2, 3)),
        "usable": np.ones(COUNT, bool),
    }
    return {**plain, **changes}


def coverage(**changes: Any) -> Coverage:
    found = Coverage.of(fit(**changes), SPLIT)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("axis", "sign", "words"),
    [
        (1, 1, "turned 12° left"),
        (1, -1, "turned 12° right"),
        (0, 1, "facing 12° down"),
        (0, -1, "facing 12° up"),
        (2, -1, "tilted 12° left"),
        (2, 1, "tilted 12° right"),
    ],
)
def test_a_turn_beyond_training_is_told_with_its_side(axis: int, sign: int, words: str) -> None:
    turns = np.zeros((COUNT, 3))
    turns[55, axis] = 12 * sign
    found = coverage(Ts_cam_head=poses(turns))
    assert found.lacking(55)[0].startswith(words) and not found.lacking(54)
    assert found.beyond().tolist() == [55]


def test_gaze_has_sides_too() -> None:
    eyes = np.zeros((COUNT, 2, 3))
    eyes[52, :, 0], eyes[53, :, 1] = np.radians(9), np.radians(-8)
    found = coverage(eyes=eyes)
    assert found.lacking(52) == ["eyes 9° down (training: eyes 0° down)"]
    assert found.lacking(53) == ["eyes 8° right (training: eyes 0° left)"]


def test_what_was_shown_is_not_said_to_be_missing() -> None:
    expression = np.zeros((COUNT, len(NAMES)))
    expression[10, 0] = expression[11, 1] = expression[12, 4] = 0.9
    said = " ".join(coverage(expression=expression).never_shown())
    assert not any(action in said for action in ("opened the mouth", "closed the eyes", "smiled"))
    said = " ".join(coverage().never_shown())
    assert "never opened the mouth beyond 0.00 of 1" in said and "never turned left never turned right" in said
    # Names that are not there are not spoken of.
    assert "brows" not in said
    wide = np.zeros((COUNT, 3))
    wide[:2, 1] = 20, -20
    assert "turned left" not in " ".join(coverage(Ts_cam_head=poses(wide)).never_shown()).replace("eyes", "")


def test_held_out_and_unusable_frames_do_not_count_as_shown() -> None:
    expression, usable = np.zeros((COUNT, len(NAMES))), np.ones(COUNT, bool)
    expression[55, 0] = expression[3, 0] = 0.8
    usable[3] = False
    found = coverage(expression=expression, usable=usable)
    (jaw, *_) = found.ranges()
    assert (jaw.train, jaw.test, jaw.beyond) == ((0, 0), (0, 0.8), True)
    assert found.lacking(55) == ["jawOpen 0.80 (training: up to 0.00)"]
    assert "jawOpen" in found.hardly_shown()


def test_distance_is_in_units_of_training_frames_and_finds_its_neighbour() -> None:
    rng = np.random.default_rng(0)
    expression = rng.random((COUNT, len(NAMES)))
    expression[50], expression[51] = expression[7], expression[8] + 10
    distances, nearest = coverage(expression=expression).novelty()
    assert (distances[0], nearest[0]) == (pytest.approx(0), 7)
    assert distances[1] > 10
    assert 0.2 < np.median(distances[2:]) < 3


def test_frames_that_never_move_have_a_distance_of_nothing() -> None:
    distances, _ = coverage().novelty()
    assert distances.tolist() == [0] * 10


@pytest.mark.parametrize(
    "changes",
    [
        {"eyes": np.zeros((3, 2, 3))},
        {"expression": np.full((COUNT, len(NAMES)), np.nan)},
        {"usable": np.zeros(COUNT, bool)},
    ],
)
def test_a_fit_that_does_not_tell_gives_nothing(changes: dict[str, Any]) -> None:
    assert Coverage.of(fit(**changes), SPLIT) is None
    assert Coverage.of({}, SPLIT) is None
    assert Coverage.of(fit(), {"train": [0, 59], "test": [60, 70]}) is None
