"""Baselines and judgement of held-out quality."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline import evaluation, metrics
from pipeline.clip import Clip, load_crops
from pipeline.evaluation import (
    PARTS,
    Picture,
    Regions,
    error_by_part,
    judge,
    nearest_by_parameters,
    scan_training,
    score,
)


@pytest.fixture
def clip(tmp_path: Path) -> Clip:
    """Eight random frames of 16 x 16 with random alpha, and random poses of a head that faces the camera."""
    rng = np.random.default_rng(0)
    count, size = 8, 16
    frames, alphas, confidences = [], [], []
    for i in range(count):
        frames.append(tmp_path / f"{i}.png")
        alphas.append(tmp_path / f"{i}-alpha.png")
        confidences.append(tmp_path / f"{i}-confidence.png")
        cv2.imwrite(str(frames[-1]), rng.integers(0, 256, (size, size, 3), np.uint8))
        cv2.imwrite(str(alphas[-1]), rng.integers(0, 256, (size, size), np.uint8))
        cv2.imwrite(str(confidences[-1]), np.full((size, size), 255, np.uint8))
    poses = np.tile(np.diag([1.0, -1, -1, 1]), (count, 1, 1))
    poses[:, :3, 3] = rng.normal([0, 0, 0.6], 0.02, (count, 3))
    return Clip(
        Ks=np.array([[[20.0, 0, 8], [0, 20, 8], [0, 0, 1]]]),
        resolution=size,
        crops=((0, 0, size),),
        cameras=np.zeros(count, np.int64),
        Ts_cam_head=poses,
        Ts_cam_skull=poses,
        Ts_cam_torso=poses,
        expression=rng.random((count, 52)).astype(np.float32),
        expression_names=tuple(f"e{i}" for i in range(52)),
        identity=np.zeros(3, np.float32),
        neck=np.zeros((count, 3), np.float32),
        eyes=np.zeros((count, 2, 3), np.float32),
        usable=np.ones(count, bool),
        times=np.arange(count) / 25,
        head="anny",
        foregrounds=tuple(frames),
        alphas=tuple(alphas),
        confidences=tuple(confidences),
        torso_shape=np.zeros((count, 2), np.float32),
    )


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
def test_the_nearest_frame_is_the_one_of_highest_psnr(
    clip: Clip, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "SEARCH_BYTES", rows_at_once * 4 * 3 * 16 * 16)
    monkeypatch.setattr(evaluation, "SEARCH_BATCH", 2)
    train, test = np.array([0, 1, 3, 4, 5]), np.array([2, 6, 7])
    counted: list[int] = []
    scan = scan_training(clip, train, test, on_frames=counted.append)
    images = load_crops(clip, np.arange(8)).images / 255.0
    best = [max(train, key=lambda i: metrics.psnr(images[t], images[i])) for t in test]
    assert scan.nearest.tolist() == best
    assert sum(counted) == evaluation.scan_length(clip, train, test)
    np.testing.assert_allclose(scan.mean.image, images[train].mean(0), atol=1e-6)


def test_a_frame_is_found_again_by_its_parameters(clip: Clip) -> None:
    expression, poses = clip.expression.copy(), clip.Ts_cam_head.copy()
    expression[6:], poses[6:] = expression[[4, 1]], poses[[4, 1]]
    again = replace(clip, expression=expression, Ts_cam_head=poses)
    assert nearest_by_parameters(again, np.arange(6), np.array([6, 7])).tolist() == [4, 1]


def test_small_turns_about_half_a_turn_stay_small(clip: Clip) -> None:
    """A face that looks into the camera is turned by pi from the head's axes; the vector's sign must not matter."""
    angles = np.pi + np.array([-0.3, -0.02, 0.25, 0.4, 0.5, 0.6, 0.02, 0.0])
    poses = clip.Ts_cam_head.copy()
    poses[:, :3, 3] = [0, 0, 0.6]
    for pose, angle in zip(poses, angles, strict=True):
        pose[:3, :3] = [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    still = replace(clip, expression=np.zeros_like(clip.expression), Ts_cam_head=poses)
    assert nearest_by_parameters(still, np.arange(6), np.array([6, 7])).tolist() == [1, 1]


SURE = np.full((32, 32), 255, np.uint8)
NOWHERE = np.zeros((32, 32), bool)


def only_head(head: np.ndarray) -> Regions:
    return Regions(head, NOWHERE, NOWHERE, NOWHERE)


def test_a_doubtful_pixel_counts_less() -> None:
    truth = Picture(np.full((32, 32, 3), 0.5, np.float32), np.ones((32, 32), np.float32))
    wrong = truth.image.copy()
    wrong[:16] += 0.2
    doubtful = SURE.copy()
    doubtful[:16] = 85
    head, flip = only_head(~NOWHERE), np.zeros((32, 32))
    sure = score(truth, Picture(wrong, truth.alpha), head, flip, None, SURE)
    less = score(truth, Picture(wrong, truth.alpha), head, flip, None, doubtful)
    assert sure["psnr_sure"] == pytest.approx(sure["psnr"])
    assert less["psnr_sure"] == pytest.approx(-10 * np.log10(0.04 / 4), abs=1e-4)
    assert score(truth, truth, head, flip, None, 0 * SURE)["psnr_sure"] is None


def test_a_perfect_render_scores_perfectly() -> None:
    rng = np.random.default_rng(1)
    alpha = np.zeros((32, 32), np.float32)
    alpha[8:24, 8:24], alpha[8, 8:24] = 1, 0.5
    truth = Picture(rng.random((32, 32, 3)).astype(np.float32), alpha)
    flip = np.zeros((32, 32))
    figures = score(truth, truth, only_head(alpha > 0.5), flip, lambda a, b: float(np.abs(a - b).mean()), SURE)
    regions = {figures[name] for name in ("psnr", "psnr_subject", "psnr_head", "psnr_torso")}
    assert regions == {metrics.PSNR_CAP_DB}
    assert figures["ssim"] == pytest.approx(1)
    assert figures["l1"] == figures["flip"] == figures["lpips"] == figures["squared_error"] == 0
    assert figures["ms_ssim"] is None


def test_regions_see_their_own_errors_only() -> None:
    alpha = np.zeros((32, 32), np.float32)
    alpha[8:24, 8:24], alpha[8, 8:24] = 1, 0.5
    truth = Picture(np.full((32, 32, 3), 0.5, np.float32), alpha)
    wrong = truth.image.copy()
    wrong[8] += 0.2  # half of this row is of partial alpha, the rest of it is background
    head = np.zeros((32, 32), bool)
    head[12:20, 12:20] = True
    figures = score(truth, Picture(wrong, alpha), only_head(head), np.full((32, 32), 0.25), None, SURE)
    assert (figures["flip"], figures["psnr_head"]) == (0.25, metrics.PSNR_CAP_DB)
    assert figures["psnr"] == pytest.approx(-10 * np.log10(0.04 / 32), abs=1e-4)
    assert figures["psnr_subject"] == pytest.approx(-10 * np.log10(0.04 / 16), abs=1e-4)
    # The torso is the subject less the head.
    assert figures["psnr_torso"] == pytest.approx(-10 * np.log10(0.04 * 16 / (256 - 64)), abs=1e-4)
    assert figures["squared_error_partial_alpha"] == pytest.approx(0.5 * figures["squared_error"])
    nobody = Picture(truth.image, np.zeros((32, 32), np.float32))
    figures = score(nobody, nobody, only_head(NOWHERE), np.zeros((32, 32)), None, SURE)
    assert figures["psnr_subject"] is figures["psnr_torso"] is None


def test_error_goes_to_the_part_it_is_in_and_nowhere_twice() -> None:
    alpha = np.zeros((32, 32), np.float32)
    alpha[4:28, 4:28], alpha[4, 4:28] = 1, 0.5
    truth = Picture(np.full((32, 32, 3), 0.5, np.float32), alpha)
    head, face, mouth, eyes = (np.zeros((32, 32), bool) for _ in range(4))
    head[:20], face[8:18, 8:24], mouth[14:17, 12:20], eyes[9:11, 10:22] = True, True, True, True
    regions = Regions(head, face, mouth, eyes)
    places = {"outline": (4, 6), "mouth": (15, 15), "eyes": (9, 12), "face": (12, 9), "hair": (6, 6)}
    places |= {"torso": (25, 15), "background": (1, 1)}
    assert set(places) == set(PARTS)
    for part, place in places.items():
        wrong = truth.image.copy()
        wrong[place] += 0.25
        found = error_by_part(truth, Picture(wrong, alpha), regions)
        assert {name: found[f"error_{name}"] for name in PARTS} == {**dict.fromkeys(PARTS, 0), part: 0.0625}
        assert sum(found[f"pixels_{name}"] for name in PARTS) == 32 * 32


@pytest.mark.parametrize(
    ("psnr", "nearest", "similar", "mean", "level"),
    [
        (33.4, 34.4, 32.0, 31.9, "good"),
        (33.3, 34.4, 32.0, 31.9, "fair"),
        (31.95, 34.4, 32.0, 31.9, "poor"),
        (32.0, 32.5, 30.0, 32.3, "poor"),
    ],
)
def test_a_figure_is_judged_beside_the_baselines(
    psnr: float, nearest: float, similar: float, mean: float, level: str
) -> None:
    baselines = {"nearest_train_frame": nearest, "nearest_by_parameters": similar, "mean_frame": mean}
    assert judge(psnr, baselines) == level
