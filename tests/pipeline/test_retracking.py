"""The metrics of a reenactment: right for what is known, worse for what is wrong, and honest about rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from face_clips import person_frames, write_recognition_model

from pipeline.assets import FACE_LANDMARKER, asset_path
from pipeline.faces import Detector
from pipeline.geometry import matrix_to_rotvec
from pipeline.heads import EXPRESSIONS
from pipeline.recognition import MODELS, Recognizer
from pipeline.retracking import MAIN, Seen, expression_error, likeness, look, metrics_text, pose_error
from pipeline.synthetic import SyntheticClip, make_clip


@pytest.fixture(scope="module")
def clip() -> SyntheticClip:
    return make_clip(16, 200, 200, seed=5, background="plain", motion=2.0)


@pytest.fixture(scope="module")
def seen(clip: SyntheticClip) -> Seen:
    with Detector(asset_path(FACE_LANDMARKER)) as detector:
        return look(list(clip.images), len(clip.images), detector)


def turns(clip: SyntheticClip) -> np.ndarray:
    return matrix_to_rotvec(np.ascontiguousarray(clip.Ts_cam_head[:, :3, :3]))


def test_a_known_performance_is_seen_and_another_order_is_worse(clip: SyntheticClip, seen: Seen) -> None:
    assert seen.found.all()
    truth = clip.expression.astype(np.float64)
    other = np.roll(np.arange(len(truth)), len(truth) // 2)
    right, wrong = (expression_error(seen.scores, truth[order], EXPRESSIONS) for order in (slice(None), other))
    assert right["error"] < 0.85 * wrong["error"]
    for what in ("jaw", "smile"):
        assert right["correlation"][what] > 0.8
        assert wrong["correlation"][what] < 0
    right, wrong = (pose_error(seen.rotations, turns(clip)[order]) for order in (slice(None), other))
    assert right["error_degrees"] < 0.5 * right["at_rest_degrees"]
    assert wrong["error_degrees"] > 3 * right["error_degrees"]


def test_an_avatar_that_rests_gets_what_is_stated_for_rest(clip: SyntheticClip) -> None:
    truth = clip.expression.astype(np.float64)
    still = expression_error(np.full_like(truth, 0.3), truth, EXPRESSIONS)
    assert still["error"] == still["at_rest"] > 0
    assert {value for value in still["correlation"].values() if value is not None} == {0.0}
    pose = pose_error(np.tile(np.eye(3), (len(truth), 1, 1)), turns(clip))
    assert pose["error_degrees"] == pose["at_rest_degrees"] > 0


def test_offsets_do_not_count_and_hardly_any_motion_has_no_correlation(clip: SyntheticClip) -> None:
    truth = clip.expression.astype(np.float64)
    shifted = expression_error(truth + 0.1, truth, EXPRESSIONS)
    assert shifted["error"] == 0
    assert set(shifted["correlation"]) == set(MAIN)
    assert all(value is None or value == pytest.approx(1) for value in shifted["correlation"].values())
    nothing = expression_error(truth, np.zeros_like(truth), EXPRESSIONS)
    assert set(nothing["correlation"].values()) == {None}
    T = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    assert pose_error(T @ clip.Ts_cam_head[:, :3, :3], turns(clip))["error_degrees"] < 0.01


def test_likeness_stands_beside_other_peoples(tmp_path: Path) -> None:
    recognizer = Recognizer(write_recognition_model(tmp_path / MODELS["buffalo_l"]))
    with Detector(asset_path(FACE_LANDMARKER)) as detector:
        people = [look(person_frames(number, 6), 6, detector) for number in range(2)]
    found = likeness(recognizer, people[0], people[0], people[0], people[1])
    assert found["result"] == found["rendered"] > found["driver"] + 0.05
    assert found["clip"] > found["driver"] + 0.05
    nobody = people[0]._replace(portraits=[])
    assert likeness(recognizer, nobody, people[0], people[0], None)["result"] is None


def test_words_name_every_number_and_what_is_missing() -> None:
    one = {"error": 0.03, "at_rest": 0.06, "correlation": {"jaw": 0.9, "brows": None}}
    pose = {"error_degrees": 1.2, "at_rest_degrees": 3.4}
    own = {"frames": 9, "expression": {**one, "error": 0.01}, "pose": {**pose, "error_degrees": 0.8}}
    identity = {"model": "m", "result": 0.7, "clip": 0.8, "rendered": 0.75, "driver": None}
    metrics = {"frames": 9, "found": 1.0, "expression": one, "pose": pose, "own": own, "identity": identity}
    text = metrics_text(metrics)
    for part in ("100 %", "0.030", "0.060", "0.010", "jaw 0.90", "1.2 degrees", "3.4", "0.8 for", "result 0.70"):
        assert part in text
    assert "brows" not in text
    assert "driver" not in text
    bare = metrics_text({"frames": 0, "found": 0.0, "identity_lacks": "there is no model"})
    assert "in 0 % of the frames" in bare
    assert "there is no model" in bare
