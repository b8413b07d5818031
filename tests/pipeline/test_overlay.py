"""Pictures of a fit: drawn where they should be, the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.cameras import make_intrinsics
from pipeline.overlay import LANDMARK_COLOR, draw_torso, front_and_side, overlay, plot_curves

SQUARE = np.array([[-0.1, -0.1, 1.0], [0.1, -0.1, 1.0], [0.1, 0.1, 1.0], [-0.1, 0.1, 1.0]])
FACES = np.array([[0, 1, 2], [0, 2, 3]], np.int32)


def test_overlay_changes_what_the_mesh_covers_and_nothing_else() -> None:
    image = np.full((60, 90, 3), 100, np.uint8)
    K = make_intrinsics(100.0, 90, 60)
    drawn = overlay(image, SQUARE, FACES, K)
    changed = (drawn != image).any(2)
    expected = np.zeros((60, 90), bool)
    expected[20:40, 35:55] = True
    np.testing.assert_array_equal(changed, expected)
    assert (image == 100).all(), "the frame itself is left alone"


def test_landmarks_are_dots_and_may_lie_outside() -> None:
    image = np.zeros((60, 90, 3), np.uint8)
    points = np.array([[10.5, 20.5], [-5.0, 3.0], [np.nan, np.nan], [89.9, 59.9]])
    drawn = overlay(image, SQUARE + np.array([5.0, 0, 0]), FACES, make_intrinsics(100.0, 90, 60), points)
    assert tuple(drawn[20, 10]) == LANDMARK_COLOR
    assert tuple(drawn[59, 89]) == LANDMARK_COLOR
    assert (drawn != 0).any(2).sum() == 2


def test_front_and_side_show_the_box_whole() -> None:
    corners = np.array([[x, y, z] for x in (-0.1, 0.1) for y in (-0.1, 0.1) for z in (-0.1, 0.1)])
    faces = np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [1, 5, 7], [1, 7, 3]], np.int32)
    views = front_and_side(corners, faces, size=90)
    assert views.shape == (90, 270, 3)
    assert views.dtype == np.uint8
    border = np.concatenate([views[0], views[-1], views[:, 0], views[:, -1]])
    assert (border == 255).all()
    assert all((views[:, 90 * i : 90 * i + 90] < 255).any() for i in range(3))


def test_curves_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    times = np.linspace(0, 2, 30)
    panels = [("a", {"sin": np.sin(times), "cos": np.cos(times)}), ("b", {"t": np.where(times > 1, times, np.nan)})]
    for name in ("one.png", "two.png"):
        plot_curves(tmp_path / name, times, panels, times < 0.2)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_curves_mark_cuts(tmp_path: Path) -> None:
    times = np.linspace(0, 2, 30)
    panels = [("a", {"t": np.where(times > 1, times, 0.0)})]
    none = np.zeros(30, bool)
    plot_curves(tmp_path / "one.png", times, panels, none, np.zeros(30, int))
    plot_curves(tmp_path / "plain.png", times, panels, none)
    plot_curves(tmp_path / "two.png", times, panels, none, (times > 1).astype(int))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert (tmp_path / "two.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


def test_the_torso_is_drawn_where_it_is_in_the_color_of_its_confidence() -> None:
    K = np.array([[100.0, 0, 32], [0, 100, 32], [0, 0, 1]])
    pose = np.diag([1.0, -1, -1, 1])
    pose[2, 3] = 0.5
    image, where = np.full((64, 64, 3), 128, np.uint8), np.zeros((64, 64), bool)
    where[32:] = True
    sure, unsure = (draw_torso(image, pose, K, where, confidence) for confidence in (1.0, 0.0))
    assert (sure[:32] == 128).all()
    assert (sure[32:] != 128).any()
    drawn = (sure != image).any(-1)
    assert (sure[drawn, 1] >= sure[drawn, 0]).all()
    assert (unsure[drawn, 0] >= unsure[drawn, 1]).all()
    pose[0, 3] += 0.05 / 2
    assert not np.array_equal(draw_torso(image, pose, K, where, 1.0), sure)
