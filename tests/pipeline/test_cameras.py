import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cameras import crop_intrinsics, look_at, make_intrinsics
from pipeline.geometry import project_points, transform_points

POINTS = np.array([[0.1, -0.05, 0.7], [-0.2, 0.1, 1.1], [0.0, 0.0, 0.5]])
OFF_CENTRE = np.array([[800.0, 0.0, 301.5], [0.0, 760.0, 189.0], [0.0, 0.0, 1.0]])


@given(
    x0=st.floats(-200, 200),
    y0=st.floats(-200, 200),
    side=st.floats(10, 900),
    resolution=st.sampled_from([64, 255, 512]),
)
def test_crop_camera_sees_what_the_resized_crop_shows(x0: float, y0: float, side: float, resolution: int) -> None:
    whole = project_points(POINTS, OFF_CENTRE)
    cropped = project_points(POINTS, crop_intrinsics(OFF_CENTRE, (x0, y0, side), resolution))
    np.testing.assert_allclose(cropped, (whole - [x0, y0]) * resolution / side, atol=1e-7)


def test_crop_of_the_whole_square_at_its_own_size_changes_nothing() -> None:
    np.testing.assert_allclose(crop_intrinsics(OFF_CENTRE, (0, 0, 480), 480), OFF_CENTRE)


def test_point_on_the_axis_falls_in_the_middle() -> None:
    K = make_intrinsics(900.0, 640, 360)
    np.testing.assert_allclose(project_points(np.array([[0.0, 0.0, 2.0]]), K), [[320, 180]])


def test_look_at_puts_the_target_ahead_and_up_upwards() -> None:
    eye, target, up = np.array([0.3, 0.2, 0.6]), np.array([0.0, 0.05, 0.02]), np.array([0.0, 1.0, 0.0])
    T_cam_world = look_at(eye, target, up)
    seen = transform_points(T_cam_world, np.stack([eye, target, target + 0.01 * up]))
    np.testing.assert_allclose(seen[0], 0, atol=1e-12)
    np.testing.assert_allclose(seen[1], [0, 0, np.linalg.norm(target - eye)], atol=1e-12)
    assert seen[2, 1] < 0, "y points down in the image"
    np.testing.assert_allclose(T_cam_world[:3, :3] @ T_cam_world[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(T_cam_world[:3, :3]) == pytest.approx(1)


@pytest.mark.parametrize("up", [(0.0, 0.0, 1.0), (0.0, 0.0, 0.0)])
def test_look_at_refuses_what_has_no_answer(up: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="up vector"):
        look_at(np.zeros(3), np.array([0.0, 0.0, 1.0]), np.array(up))
