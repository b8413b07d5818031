"""What a rectified camera projects is where the rectified picture shows it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import recordings

from pipeline.errors import UserError
from pipeline.interchange.rectify import rectified

NAMES = ("mine-2/0", "mine-2/1")


def dots(points: np.ndarray, size: tuple[int, int]) -> Any:
    """Pictures with a blurred dot at each frame's point [T,2]."""

    def picture(row: int) -> tuple[np.ndarray, np.ndarray]:
        y, x = np.mgrid[: size[1], : size[0]] + 0.5
        blob = np.exp(-((x - points[row, 0]) ** 2 + (y - points[row, 1]) ** 2) / 8)
        return np.repeat((255 * blob)[..., None], 3, 2).astype(np.uint8), (255 * blob).astype(np.uint8)

    return picture


def centroid(alpha: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[: alpha.shape[0], : alpha.shape[1]] + 0.5
    return np.array([(x * alpha).sum(), (y * alpha).sum()]) / alpha.sum()


@pytest.mark.parametrize("how", ["centred", "square"])
def test_picture_and_camera_move_together(how: str) -> None:
    recording = recordings.recording("x", names=NAMES)
    points = recordings.pixels(recording, np.array([[0.01, 0.02, 0.03]]))[:, 0]
    new, pictures, about = rectified(recording, dots(points, recording.size), how)  # type: ignore[arg-type]
    assert about["K"] == recording.Ks[0].tolist()
    assert about["to"] == new.Ks[0].tolist()
    np.testing.assert_array_equal(new.Ts_cam_world, recording.Ts_cam_world)
    moved = recordings.pixels(new, np.array([[0.01, 0.02, 0.03]]))[:, 0]
    for row in range(len(recording)):
        rgb, alpha = pictures(row)
        assert rgb.shape == (new.size[1], new.size[0], 3)
        np.testing.assert_allclose(centroid(alpha), moved[row], atol=0.1)
    if how == "centred":
        assert (new.Ks[:, 0, 0] == new.Ks[:, 1, 1]).all()
        np.testing.assert_array_equal(new.Ks[:, :2, 2], np.tile(np.array(new.size) / 2, (3, 1)))
    else:
        assert new.size == (96, 96)
        np.testing.assert_array_equal(new.Ks, recording.Ks)


@pytest.mark.parametrize("how", ["centred", "square"])
def test_nothing_of_the_picture_is_lost(how: str) -> None:
    recording = recordings.recording("x", names=NAMES)
    white = np.full((64, 96, 3), 9, np.uint8), np.full((64, 96), 255, np.uint8)
    new, pictures, _ = rectified(recording, lambda row: white, how)  # type: ignore[arg-type]
    scale = (new.Ks[0, 0, 0] / recording.Ks[0, 0, 0]) * (new.Ks[0, 1, 1] / recording.Ks[0, 1, 1])
    rgb, alpha = pictures(0)
    assert alpha.sum() / 255 == pytest.approx(96 * 64 * scale, rel=0.01)
    assert (rgb[alpha == 0] == 255).all()


def test_what_is_right_already_is_not_touched() -> None:
    K = np.array([[80.0, 0, 48.0], [0, 80.0, 32.0], [0, 0, 1]])
    recording = recordings.recording("x", names=NAMES, intrinsics=K)
    assert rectified(recording, recordings.picture, "centred") == (recording, recordings.picture, {})
    odd = recordings.recording("x", names=NAMES, size=(33, 33), intrinsics=K)
    assert rectified(odd, recordings.picture, "square")[2] == {}


def test_cameras_that_differ_become_one() -> None:
    recording = recordings.recording("x", names=NAMES)
    Ks = recording.Ks.copy()
    Ks[1, 0, 0] += 7
    Ks[2, :2, 2] += (3, -4)
    changed = replace(recording, Ks=Ks)
    new, pictures, _ = rectified(changed, dots(recordings.pixels(changed, np.zeros((1, 3)))[:, 0], (96, 64)), "centred")
    assert (new.Ks == new.Ks[0]).all()
    for row, point in enumerate(recordings.pixels(new, np.zeros((1, 3)))[:, 0]):
        np.testing.assert_allclose(centroid(pictures(row)[1]), point, atol=0.1)


def test_a_camera_that_cannot_be_meant_is_refused() -> None:
    K = np.array([[80.0, 0, 9000.0], [0, 80.0, 32.0], [0, 0, 1]])
    with pytest.raises(UserError, match="principal point is 9000, 32"):
        rectified(recordings.recording("x", names=NAMES, intrinsics=K), recordings.picture, "centred")
