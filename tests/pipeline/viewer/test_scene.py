"""What the sliders, presets and cameras of the viewer mean, without a browser."""

from __future__ import annotations

import numpy as np
import pytest
from reenact_data import write_dataset

import pipeline
from pipeline.geometry import matrix_to_quaternion, project_points, transform_points
from pipeline.heads import EXPRESSIONS
from pipeline.retarget import Performance
from pipeline.viewer.scene import (
    FOLDERS,
    MOST_PIXELS,
    OTHERS,
    PRESETS,
    Scene,
    camera_of,
    eased,
    fitted,
    in_folders,
    label_of,
    opening,
    partner_of,
    size_within,
    taken_over,
)


@pytest.fixture(scope="module")
def anna(tmp_path_factory: pytest.TempPathFactory) -> pipeline.LoadedSubject:
    return pipeline.load_subject("anna", write_dataset(tmp_path_factory.mktemp("scene")).root)


def look(height: int, width: int, fov: float) -> tuple[np.ndarray, np.ndarray, float, int, int]:
    """Viser's numbers of a camera two metres beside the origin that looks along the world's x axis, level."""
    R_world_cam = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # columns: right, down and forward in the world
    return matrix_to_quaternion(R_world_cam), np.array([-2.0, 0, 0]), fov, width, height


def test_presets_are_coefficients_of_arkit() -> None:
    for name, preset in PRESETS.items():
        assert set(preset) <= set(EXPRESSIONS), name
        assert all(0 < value <= 1 for value in preset.values()), name


def test_every_coefficient_has_one_slider_with_a_label_of_its_own() -> None:
    folders = in_folders([*EXPRESSIONS, "<b>ear</b>"])
    assert sorted(name for inside in folders.values() for name in inside) == sorted([*EXPRESSIONS, "<b>ear</b>"])
    assert folders[OTHERS] == ["<b>ear</b>"]
    assert set(folders) == {*FOLDERS, OTHERS}
    for folder, inside in folders.items():
        assert len({label_of(name, folder) for name in inside}) == len(inside)
    assert label_of("mouthSmileLeft", "Mouth") == "Smile left"
    assert label_of("cheekPuff", "Cheeks, nose, tongue") == "Cheek puff"


def test_partners_belong_to_each_other_and_eyes_look_to_one_side() -> None:
    for name in EXPRESSIONS:
        partner = partner_of(name, EXPRESSIONS)
        assert partner is None or partner_of(partner, EXPRESSIONS) == name
    assert partner_of("mouthSmileLeft", EXPRESSIONS) == "mouthSmileRight"
    assert partner_of("eyeLookInLeft", EXPRESSIONS) == "eyeLookOutRight"
    assert partner_of("jawLeft", EXPRESSIONS) is None
    assert partner_of("mouthSmileLeft", ("mouthSmileLeft",)) is None


def test_visers_camera_sees_what_ours_does() -> None:
    camera = camera_of(*look(400, 600, np.pi / 2))
    assert camera is not None
    # Ahead in the middle; at 45 degrees upwards at the upper edge; the world's -z is at the right.
    points = np.array([[1.0, 0, 0], [0.0, -2, 0], [0.0, 0, -2]])
    pixels = project_points(transform_points(camera.T_cam_world, points), camera.K)
    np.testing.assert_allclose(pixels, [[300, 200], [300, 0], [500, 200]], atol=1e-9)


@pytest.mark.parametrize("fault", ["nan", "zero quaternion", "flat", "no window"])
def test_what_is_no_camera_is_none(fault: str) -> None:
    wxyz, position, fov, width, height = look(40, 60, 1.0)
    if fault == "nan":
        position = position * np.nan
    elif fault == "zero quaternion":
        wxyz = np.zeros(4)
    elif fault == "flat":
        fov = np.pi
    else:
        width = 0
    assert camera_of(wxyz, position, fov, width, height) is None


def test_sizes_keep_the_shape_and_the_limits() -> None:
    assert size_within(800, 600) == (800, 600)
    assert size_within(1600, 1200, shorter=512) == (683, 512)
    assert size_within(100_000, 50_000) == (MOST_PIXELS, MOST_PIXELS // 2)
    assert size_within(4000, 1, shorter=10) == (MOST_PIXELS, 1)


def test_a_fitted_camera_shows_all_in_the_middle(anna: pipeline.LoadedSubject) -> None:
    camera = anna.camera(0)
    wide = fitted(camera, 200, 100)
    points = np.array([[0.02, 0.01, 1.0], [-0.05, 0.03, 1.2]])
    scale = 100 / camera.height
    expected = scale * project_points(points, camera.K) + [(200 - 100) / 2, 0]
    np.testing.assert_allclose(project_points(points, wide.K), expected)


def test_the_first_view_shows_the_whole_head_upright(anna: pipeline.LoadedSubject) -> None:
    avatar = anna.avatar()
    start = opening(avatar, anna.clip.Ts_cam_head)
    half = np.tan(start.fov / 2) * np.linalg.norm(start.look_at - start.position)
    top = avatar.rest_points[:, 1].min() - avatar.pivot[1]
    middles = anna.clip.Ts_cam_head @ [0, 0.04, 0.05, 1]
    assert start.look_at[1] - half < top + middles[:, 1].min()
    assert half < 3 * abs(top)
    assert start.up @ [0, 1, 0] < 0


def test_sliders_taken_over_from_a_frame_show_that_frame(anna: pipeline.LoadedSubject) -> None:
    avatar = anna.avatar()
    expression, pose = taken_over(anna, avatar, 7)
    driven = Scene(drive="sliders", expression=expression, pose=pose).condition(anna, avatar)
    frame = Scene(drive="clip", frame=7).condition(anna, avatar)
    np.testing.assert_allclose(driven.expression, frame.expression, atol=1e-6)
    np.testing.assert_allclose(driven.T_cam_head, frame.T_cam_head, atol=1e-5)
    np.testing.assert_allclose(driven.eyes.mean(0), frame.eyes.mean(0), atol=1e-5)


def test_what_the_clip_showed_is_left_alone_and_more_is_eased(anna: pipeline.LoadedSubject) -> None:
    avatar, seen = anna.avatar(), Performance.of(anna.clip)
    expression, pose = taken_over(anna, avatar, 7)
    same, same_pose, changed = eased(expression, pose, avatar, seen)
    assert changed == []
    for name, value in expression.items():
        assert same.get(name, 0) == pytest.approx(value, abs=1e-6)
    assert (same_pose.yaw, same_pose.pitch, same_pose.right) == pytest.approx(
        (pose.yaw, pose.pitch, pose.right), abs=1e-4
    )
    _, turned, changed = eased({}, pipeline.Pose(yaw=60), avatar, seen)
    assert "headYaw" in changed and turned.yaw < 45
    assert eased({}, pipeline.Pose(), avatar, seen)[0] == {}
