"""The synthetic subject: its truth agrees with its pictures, and MediaPipe takes it for a person."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import HeadcastError
from pipeline.geometry import project_points, transform_points
from pipeline.heads import load_head
from pipeline.mesh_render import silhouette
from pipeline.synthetic import SyntheticClip, default_intrinsics, grow_hair, make_clip, render_head, write_frames

WIDTH, HEIGHT = 272, 208


@pytest.fixture(scope="module")
def clip() -> SyntheticClip:
    return make_clip(50, WIDTH, HEIGHT, seed=5)


def truth_vertices(clip: SyntheticClip) -> np.ndarray:
    """Vertices [T, V, 3] in the camera."""
    arrays = (clip.identity, clip.expression, clip.neck, clip.eyes)
    vertices = clip.head.vertices(*(torch.from_numpy(array) for array in arrays)).numpy()
    return transform_points(clip.Ts_cam_head, vertices.astype(np.float64))


def test_the_same_seed_gives_the_same_clip(clip: SyntheticClip) -> None:
    again, other = make_clip(50, 32, 24, seed=5), make_clip(50, 32, 24, seed=6)
    np.testing.assert_array_equal(again.expression, clip.expression)
    np.testing.assert_array_equal(again.identity, clip.identity)
    np.testing.assert_array_equal(again.images, make_clip(50, 32, 24, seed=5).images)
    assert not np.array_equal(again.expression, other.expression)


def test_shapes_and_ranges(clip: SyntheticClip) -> None:
    assert clip.images.shape == (50, HEIGHT, WIDTH, 3)
    assert clip.images.dtype == np.uint8
    assert clip.alpha.shape == (50, HEIGHT, WIDTH)
    assert clip.alpha.min() == 0
    assert clip.alpha.max() == 1
    assert clip.expression.min() >= 0
    assert clip.expression.max() <= 1
    assert (clip.head.identity_low <= clip.identity).all()
    assert (clip.identity <= clip.head.identity_high).all()
    assert clip.K[0, 0] != clip.K[1, 1]
    assert clip.K[0, 2] != WIDTH / 2
    R = clip.Ts_cam_head[:, :3, :3]
    np.testing.assert_allclose(R @ R.transpose(0, 2, 1), np.broadcast_to(np.eye(3), R.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(R), 1)


def test_landmarks_are_the_projected_truth(clip: SyntheticClip) -> None:
    vertices_cam = truth_vertices(clip)
    head = clip.head
    corners = vertices_cam[:, head.faces[head.landmark_faces]]
    points = np.einsum("lc,tlci->tli", head.landmark_bary, corners)
    np.testing.assert_allclose(clip.landmarks[..., :2], project_points(points, clip.K), atol=1e-3)
    nose, ear = clip.landmarks[:, 1, 2], clip.landmarks[:, 234, 2]
    assert (nose < ear).all(), "nearer is smaller"
    np.testing.assert_allclose(clip.landmarks[..., 2].mean(axis=1), 0, atol=1e-9)
    # Half a face in depth is about as many pixels as half a face in width.
    width = np.ptp(clip.landmarks[..., 0], axis=1)
    assert (np.ptp(clip.landmarks[..., 2], axis=1) > 0.3 * width).all()


def test_the_face_fills_a_portrait(clip: SyntheticClip) -> None:
    height = np.ptp(clip.landmarks[..., 1], axis=1)
    assert (height > 0.25 * HEIGHT).all()
    assert (clip.landmarks[..., :2] > 0).all()
    assert (clip.landmarks[..., :2] < [WIDTH, HEIGHT]).all()


def test_alpha_is_the_coverage_of_the_true_mesh(clip: SyntheticClip) -> None:
    fine = silhouette(truth_vertices(clip)[7], clip.head.faces, np.diag([8, 8, 1]) @ clip.K, 8 * WIDTH, 8 * HEIGHT)
    coverage = fine.reshape(HEIGHT, 8, WIDTH, 8).mean(axis=(1, 3))
    difference = np.abs(clip.alpha[7] - coverage)
    assert difference.max() <= 0.5
    assert difference.mean() < 2e-3
    assert clip.alpha[7].sum() == pytest.approx(coverage.sum(), rel=2e-3)


def test_background_shows_where_alpha_is_zero(clip: SyntheticClip) -> None:
    outside = clip.alpha == 0
    background = np.broadcast_to(np.round(clip.background * 255), clip.images.shape)
    np.testing.assert_array_equal(clip.images[outside], background[outside])


def test_motion_is_smooth_and_the_eyes_blink(clip: SyntheticClip) -> None:
    translation = clip.Ts_cam_head[:, :3, 3]
    assert np.linalg.norm(np.diff(translation, n=2, axis=0), axis=1).max() < 1e-3
    blink = clip.expression[:, clip.head.expression_names.index("eyeBlinkLeft")]
    assert blink.max() == 1
    assert np.median(blink) == 0
    slow = np.delete(clip.expression, [clip.head.expression_names.index(f"eyeBlink{s}") for s in ("Left", "Right")], 1)
    assert np.abs(np.diff(slow, axis=0)).max() < 0.15


def test_more_samples_only_smooth_the_picture() -> None:
    head = load_head("anny")
    T_cam_head = np.diag([1.0, -1, -1, 1])
    T_cam_head[2, 3] = 0.8
    K = default_intrinsics(96, 128)
    coarse, fine = (render_head(head, head.template, T_cam_head, K, 96, 128, supersample=n)[0] for n in (2, 6))
    assert coarse.shape == (128, 96, 3)
    assert np.abs(coarse - fine).mean() < 0.01
    assert np.abs(coarse.mean(axis=(0, 1)) - fine.mean(axis=(0, 1))).max() < 2e-3


def test_hair_over_black_and_white_is_consistent_with_its_alpha() -> None:
    """What a second background shows more is what the alpha leaves; most strands cover a pixel in part."""
    head = load_head("anny")
    T_cam_head = np.diag([1.0, -1, -1, 1])
    T_cam_head[2, 3] = 0.8
    K = default_intrinsics(160, 160)
    hair = grow_hair(head, head.template, 60, np.random.default_rng(0))

    def drawn(background: float, strands: bool = True) -> tuple[np.ndarray, np.ndarray]:
        return render_head(head, head.template, T_cam_head, K, 160, 160, None, background, 4, hair if strands else None)

    (black, alpha), (white, again), (_, bald) = drawn(0.0), drawn(1.0), drawn(0.0, strands=False)
    np.testing.assert_array_equal(alpha, again)
    np.testing.assert_allclose(white - black, np.repeat(1 - alpha[..., None], 3, axis=-1), atol=1e-6)
    assert (alpha >= bald).all()
    new = alpha > bald
    assert 300 < new.sum() < 0.1 * alpha.size
    assert ((alpha > 0.1) & (alpha < 0.9))[new].mean() > 0.6
    colours = black[new & (bald == 0)] / alpha[new & (bald == 0)][:, None]
    assert colours.max() < 0.4, "hair is dark"


def test_hair_moves_with_the_head_and_leaves_the_rest_as_it_is() -> None:
    bald, hairy = (make_clip(2, 96, 96, seed=5, hair=count, supersample=4) for count in (0, 80))
    np.testing.assert_array_equal(bald.landmarks, hairy.landmarks)
    untouched = hairy.alpha == bald.alpha
    outside = untouched & (bald.alpha == 0)
    np.testing.assert_array_equal(hairy.images[outside], bald.images[outside])
    assert (hairy.alpha - bald.alpha).sum((1, 2)).min() > 20
    # Its root on the scalp takes each strand along: it covers what it did, moved as the head.
    first, last = hairy.Ts_cam_head[0], hairy.Ts_cam_head[1]
    moved = project_points(transform_points(last, np.array([[0, 0.15, 0.0]])), hairy.K) - project_points(
        transform_points(first, np.array([[0, 0.15, 0.0]])), hairy.K
    )
    assert np.abs(moved).max() < 3
    rows, columns = np.nonzero(~untouched[1])
    there = np.stack([rows, columns], 1).mean(0) - np.stack(np.nonzero(~untouched[0]), 1).mean(0)
    np.testing.assert_allclose(there[::-1], moved[0], atol=0.7)


def test_frames_are_written_as_they_are(tmp_path: Path) -> None:
    import cv2

    clip = make_clip(2, 33, 21, seed=0)
    write_frames(clip, tmp_path / "frames")
    assert [path.name for path in sorted((tmp_path / "frames").iterdir())] == ["000000.png", "000001.png"]
    image = cv2.imread(str(tmp_path / "frames" / "000001.png"))
    assert image is not None
    np.testing.assert_array_equal(image[..., ::-1], clip.images[1])


@pytest.fixture(scope="module")
def landmarker() -> Iterator[Any]:
    from pipeline.assets import asset_path
    from pipeline.faces import Detector

    try:
        model = asset_path("face_landmarker")
    except HeadcastError as error:
        pytest.skip(f"the face landmarker is not here: {error.what}")
    with Detector(model) as task:
        yield task


@pytest.mark.parametrize(("width", "height", "seed"), [(400, 300, 1), (288, 384, 2)])
def test_mediapipe_finds_the_face_where_it_is(width: int, height: int, seed: int, landmarker: Any) -> None:
    from pipeline.landmark_embedding import detect

    clip = make_clip(8, width, height, seed)
    for image, truth in zip(clip.images, clip.landmarks, strict=True):
        detected = detect(landmarker, image / 255)
        assert detected is not None
        face_width = np.ptp(truth[:, 0])
        assert np.median(np.linalg.norm(detected - truth[:, :2], axis=1)) < 0.03 * face_width
