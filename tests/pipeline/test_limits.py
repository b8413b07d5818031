"""What limited quality: told only when it was measured, ranked by decibels, with what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.coverage import Coverage
from pipeline.limits import MAX_TOLD, limits

GOOD = {
    "train": {"psnr": 38.0},
    "test": {"psnr": 36.5, "psnr_sure": 36.9},
    "counts": {"train": 200, "train_usable": 200},
    "error_parts": {
        "outline": {"error": 0.09, "area": 0.04},
        "mouth": {"error": 0.05, "area": 0.02},
        "face": {"error": 0.35, "area": 0.3},
        "torso": {"error": 0.3, "area": 0.2},
        "background": {"error": 0.21, "area": 0.4},
    },
}
MANIFESTS = {
    "track": {"metrics": {"frames": 200, "blurred": 2}},
    "fit": {
        "metrics": {
            "reprojection_px": {"median": 0.3},
            **{"face_width_px": 200.0, "torso_followed": 1.0, "skull_followed": 0.95},
        }
    },
    "matte": {"metrics": {"flicker_px": 0.2}},
}


def titles(metrics: dict[str, Any], manifests: dict[str, Any] | None = None) -> list[str]:
    return [limit.title for limit in limits(metrics, MANIFESTS if manifests is None else manifests)]


def test_a_good_run_has_no_limits() -> None:
    assert titles(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "title", "figure"),
    [
        ({"train": {"psnr": 43.0}}, "What training did not see", "43.0 dB, held-out ones at 36.5"),
        ({"train": {"psnr": 30.0}}, "Training itself", "30.0 dB"),
        ({"test": {"psnr": 36.0, "psnr_sure": 37.2}}, "Pixels whose matte is doubtful", "37.2 dB instead of 36.0"),
        ({"counts": {"train": 300, "train_usable": 200}}, "Frames that cannot be used", "100 of 300"),
        ({"counts": {"train": 90, "train_usable": 90}}, "Few frames", "90 usable"),
        ({"error_parts": {"outline": {"error": 0.6, "area": 0.05}}}, "The half-transparent outline", "60%"),
        ({"error_parts": {"mouth": {"error": 0.12, "area": 0.02}}}, "The mouth", "12%"),
        ({"error_parts": None, "error_share_partial_alpha": 0.5}, "The half-transparent outline", "50%"),
    ],
)
def test_each_figure_has_its_words(changes: dict[str, Any], title: str, figure: str) -> None:
    (limit,) = limits({**GOOD, **changes}, MANIFESTS)
    assert limit.title == title and figure in limit.text and limit.remedy


@pytest.mark.parametrize(
    ("stage", "figures", "title"),
    [
        ("track", {"frames": 200, "blurred": 40}, "Blur"),
        ("fit", {"reprojection_px": {"median": 1.5}, "face_width_px": 200.0}, "The fit"),
        ("fit", {"torso_followed": 0.4}, "The torso's motion"),
        ("fit", {"skull_followed": 0.4}, "Hair and skull's motion"),
        ("matte", {"flicker_px": 2.0}, "An outline that flickers"),
    ],
)
def test_each_stage_has_its_words(stage: str, figures: dict[str, Any], title: str) -> None:
    assert titles(GOOD, {**MANIFESTS, stage: {"metrics": figures}}) == [title]


def test_what_has_more_decibels_comes_first_and_the_list_is_short() -> None:
    bad = {
        "train": {"psnr": 33.0},
        "test": {"psnr": 25.0, "psnr_sure": 27.0},
        "counts": {"train": 200, "train_usable": 100},
        "error_parts": {"outline": {"error": 0.3, "area": 0.04}, "mouth": {"error": 0.5, "area": 0.05}},
    }
    found = limits(bad, MANIFESTS)
    assert [limit.title for limit in found][:3] == [
        "What training did not see",
        "The mouth",
        "Pixels whose matte is doubtful",
    ]
    assert len(found) == MAX_TOLD
    assert [limit.weight_db for limit in found] == sorted((limit.weight_db for limit in found), reverse=True)


@pytest.mark.parametrize("nothing", [None, "x", float("nan"), True, [], {}])
def test_what_was_not_measured_is_not_told(nothing: Any) -> None:
    assert titles({}, {}) == []
    broken = {
        "train": {"psnr": nothing},
        "test": {"psnr": 20.0, "psnr_sure": nothing},
        "counts": {"train": nothing, "train_usable": nothing},
        "error_parts": {"mouth": nothing, "eyes": {"error": nothing, "area": 0.1}},
        "error_share_partial_alpha": nothing,
    }
    stages = {"track": {"metrics": {"frames": 10, "blurred": nothing}}, "fit": {"metrics": nothing or {}}, "matte": {}}
    assert titles(broken, stages) == []


def test_it_says_when_error_follows_the_distance_from_training() -> None:
    count, names = 100, np.array(["jawOpen", "eyeBlinkLeft"])
    rng = np.random.default_rng(0)
    expression = rng.uniform(0, 0.3, (count, 2))
    expression[80:, 0] = np.linspace(0.3, 1, 20)
    fit = {
        "expression": expression,
        "expression_names": names,
        "Ts_cam_head": np.tile(np.diag([1.0, -1, -1, 1]), (count, 1, 1)),
        "eyes": np.zeros((count, 2, 3)),
        "usable": np.ones(count, bool),
    }
    coverage = Coverage.of(fit, {"train": [0, 79], "test": [80, 99]})
    wide = {**GOOD, "train": {"psnr": 43.0}}
    falling, flat = np.linspace(40, 30, 20).tolist(), rng.uniform(30, 40, 20).tolist()
    for scores, follows in ((falling, True), (flat, False), (falling[::-1], False)):
        rows = {"per_frame": {"frame": list(range(80, 100)), "psnr": scores}}
        (limit,) = limits({**wide, **rows}, MANIFESTS, coverage)
        assert ("The further a frame is" in limit.text) is follows
        assert "of 20 held-out frames have" in limit.text
