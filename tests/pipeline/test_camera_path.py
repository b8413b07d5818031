"""Where cameras go: starts, ends, loops, the pivot that stays, smooth ways between keyframes, bad files in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.camera_path import CameraPath, PathFile, blend, sway, turntable
from pipeline.errors import UserError
from pipeline.geometry import make_rigid, matrix_to_rotvec, project_points, rotvec_to_matrix, transform_points
from pipeline.keyframes import read_keyframes
from pipeline.viewpoint import Camera, orbit

PIVOT, UP = np.array([0.02, 0.03, 0.6]), np.array([0.0, -1.0, 0.1])
FRONT = Camera.of_clip(np.array([[300.0, 0, 64], [0, 310, 50], [0, 0, 1]]), 128, 96)


def look(yaw: float, pitch: float, zoom: float) -> Camera:
    return orbit(FRONT, PIVOT, UP, np.radians(yaw), np.radians(pitch), zoom)


def middles(path: CameraPath, count: int = 48) -> np.ndarray:
    cameras = [path(0.0, i / count) for i in range(count)]
    return np.array([np.linalg.inv(camera.T_cam_world)[:3, 3] for camera in cameras])


PATHS = {
    "sway": sway(look, 20, 8),
    "all round": turntable(look, 360, pitch=10),
    "arc": turntable(look, 90, zoom=1.5),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_head_stays_in_its_place_and_the_way_can_be_repeated(path: CameraPath) -> None:
    spots = [
        project_points(transform_points(camera.T_cam_world, PIVOT[None]), camera.K)[0]
        for camera in (path(0.0, share) for share in np.linspace(0, 1, 9))
    ]
    np.testing.assert_allclose(spots, np.broadcast_to(spots[0], (9, 2)), atol=1e-6)
    np.testing.assert_allclose(path(0.0, 1.0).T_cam_world, path(0.0, 0.0).T_cam_world, atol=1e-9)
    found = middles(path)
    steps = np.linalg.norm(np.diff(found, axis=0, append=found[:1]), axis=1)
    assert steps.max() < 2.5 * np.median(steps) + 0.01  # nothing jumps, not even from the end to the start
    distances = np.linalg.norm(found - PIVOT, axis=1)
    assert np.ptp(distances) < 1e-9


def test_a_sway_goes_as_far_as_told_and_starts_in_front() -> None:
    path = sway(look, 20, 8)
    np.testing.assert_allclose(path(0.0, 0.0).T_cam_world, FRONT.T_cam_world, atol=1e-12)
    np.testing.assert_allclose(path(0.0, 0.25).T_cam_world, look(20, 0, 1).T_cam_world, atol=1e-9)
    np.testing.assert_allclose(path(0.0, 0.125).T_cam_world, look(20 * np.sqrt(0.5), 8, 1).T_cam_world, atol=1e-9)


def test_between_two_cameras_the_turn_is_even_and_the_ends_are_theirs() -> None:
    def turned(angle: float, x: float) -> Camera:
        R = rotvec_to_matrix(np.array([0.1, angle, -0.2]))
        return Camera(FRONT.K * [[1 + x], [1 + x], [1]], 128, 96, make_rigid(R, -R @ np.array([x, 0.1, 0.0])))

    first, second = turned(-0.4, 0.0), turned(1.1, 0.3)
    for share, expected in ((0.0, first), (1.0, second)):
        np.testing.assert_allclose(blend(first, second, share).T_cam_world, expected.T_cam_world, atol=1e-9)
    half = blend(first, second, 0.5)
    np.testing.assert_allclose(half.T_cam_world[:3, :3] @ half.T_cam_world[:3, :3].T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.linalg.inv(half.T_cam_world)[:3, 3], [0.15, 0.1, 0], atol=1e-9)
    halves = [
        np.linalg.norm(matrix_to_rotvec(a.T_cam_world[:3, :3].T @ half.T_cam_world[:3, :3])) for a in (first, second)
    ]
    assert halves[0] == pytest.approx(halves[1], abs=1e-9)
    back = blend(second, first, 0.5)
    np.testing.assert_allclose(back.T_cam_world, half.T_cam_world, atol=1e-9)


def written(folder: Path, **content: Any) -> Path:
    path = folder / "path.json"
    path.write_text(json.dumps({"schema": 1, **content}))
    return path


def test_places_are_eased_from_key_to_key_and_held_at_the_end(tmp_path: Path) -> None:
    keys = [{"time": 0}, {"time": 2, "yaw": 30, "zoom": 4}, {"time": 3, "yaw": 30, "pitch": -10, "zoom": 4}]
    file = read_keyframes(written(tmp_path, keyframes=keys), PathFile)
    assert file.seconds == 3
    at = file.path(look, 128, 96)
    for seconds, place in ((0, (0, 0, 1)), (1, (15, 0, 2)), (2, (30, 0, 4)), (3, (30, -10, 4)), (9, (30, -10, 4))):
        np.testing.assert_allclose(at(seconds, 0.0).T_cam_world, look(*place).T_cam_world, atol=1e-9)
    soon = np.linalg.inv(at(0.1, 0.0).T_cam_world)[:3, 3]
    even = read_keyframes(written(tmp_path, keyframes=keys, easing="linear"), PathFile).path(look, 128, 96)
    assert np.linalg.norm(soon) < 0.3 * np.linalg.norm(np.linalg.inv(even(0.1, 0.0).T_cam_world)[:3, 3])


def test_cameras_of_a_file_are_resized_to_the_picture(tmp_path: Path) -> None:
    key = {"K": [[300, 0, 64], [0, 310, 50], [0, 0, 1]], "T_cam_world": np.eye(4).tolist()}
    file = read_keyframes(written(tmp_path, size=[128, 96], keyframes=[{"time": 0, **key}]), PathFile)
    camera = file.path(look, 256, 192)(0.0, 0.0)
    np.testing.assert_allclose(camera.K, [[600, 0, 128], [0, 620, 100], [0, 0, 1]])


EYE = np.eye(4).tolist()
K = [[300, 0, 64], [0, 310, 50], [0, 0, 1]]
BAD = {
    "not JSON": ("{", "Invalid JSON"),
    "a list": ("[]", "object"),
    "another schema": ({"schema": 2, "keyframes": [{"time": 0}]}, "schema: Input should be 1"),
    "no keyframes": ({"keyframes": []}, "at least 1 item"),
    "NaN": ('{"schema": 1, "keyframes": [{"time": 0, "yaw": NaN}]}', r"keyframes\.0\.yaw: .*finite"),
    "text": ({"keyframes": [{"time": "0"}]}, r"keyframes\.0\.time: .*number"),
    "unknown": ({"keyframes": [{"time": 0, "jaw": 1}]}, r"keyframes\.0\.jaw: Extra inputs"),
    "not from 0": ({"keyframes": [{"time": 1}]}, "do not begin at 0 and rise"),
    "back in time": ({"keyframes": [{"time": 0}, {"time": 1}, {"time": 1}]}, "do not begin at 0 and rise"),
    "too long": ({"keyframes": [{"time": 0}, {"time": 601}]}, r"keyframes\.1\.time: .*less than or equal to 600"),
    "too many": ({"keyframes": [{"time": t / 10} for t in range(1001)]}, "at most 1000 items"),
    "over the top": ({"keyframes": [{"time": 0, "pitch": 90}]}, r"pitch: .*less than or equal to 85"),
    "mixed": (
        {"size": [9, 9], "keyframes": [{"time": 0}, {"time": 1, "K": K, "T_cam_world": EYE}]},
        "or all of them K",
    ),
    "no size": ({"keyframes": [{"time": 0, "K": K, "T_cam_world": EYE}]}, "'size' is missing"),
    "half a camera": ({"size": [9, 9], "keyframes": [{"time": 0, "K": K}]}, "T_cam_world: Field required"),
    "skewed K": ({"size": [9, 9], "keyframes": [{"time": 0, "K": EYE[:3], "T_cam_world": EYE}]}, r"K\.0: .*at most 3"),
    "not rigid": (
        {"size": [9, 9], "keyframes": [{"time": 0, "K": K, "T_cam_world": (2 * np.eye(4)).tolist()}]},
        "T_cam_world is not rigid",
    ),
    "mirrored": (
        {"size": [9, 9], "keyframes": [{"time": 0, "K": K, "T_cam_world": np.diag([-1.0, 1, 1, 1]).tolist()}]},
        "T_cam_world is not rigid",
    ),
    "no focal length": (
        {"size": [9, 9], "keyframes": [{"time": 0, "K": np.zeros((3, 3)).tolist(), "T_cam_world": EYE}]},
        "K is not",
    ),
    "deep": ("[" * 100_000, "does not fit"),
    "large": (" " * 1_000_001, "larger than 1000 kB"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_refused_in_words(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "path.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"schema": 1, **content}))
    with pytest.raises(UserError, match=message) as caught:
        read_keyframes(path, PathFile)
    assert str(path) in caught.value.what and caught.value.fix


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="Cannot read"):
            read_keyframes(path, PathFile)
