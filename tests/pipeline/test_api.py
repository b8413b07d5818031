"""What notebooks use: names, poses and cameras go where they say, and nonsense is refused in words."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from reenact_data import write_dataset

import pipeline
from pipeline.dataset import Subject, read_json, write_json
from pipeline.errors import UserError
from pipeline.evaluation import ClipRenderer
from pipeline.geometry import transform_points
from pipeline.viewpoint import Camera, orbit, up_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("api")).root


@pytest.fixture(scope="module")
def anna(data: Path) -> pipeline.LoadedSubject:
    return pipeline.load_subject("anna", data)


def test_a_frames_own_condition_and_camera_give_the_evaluations_picture(anna: pipeline.LoadedSubject) -> None:
    avatar = anna.avatar()
    theirs = ClipRenderer.of(avatar.model, anna.clip, 1).render(3)
    ours = avatar.render(anna.condition(3), camera=anna.camera(3))
    inside = anna.clip.inside()[0] == 1
    difference = np.abs(ours.astype(float) - 255 * theirs.image)[inside]
    assert inside.any() and difference.max() <= 0.51


def test_a_subject_renders_its_frames_as_the_evaluation_does(anna: pipeline.LoadedSubject) -> None:
    avatar, crop = anna.avatar(), (-20, 6, 64)
    cut = pipeline.LoadedSubject(anna.subject)
    cut.clip = cut.clip.recropped([crop])
    for subject in (anna, cut):
        theirs = ClipRenderer.of(avatar.model, subject.clip, 1).render(3)
        assert np.abs(subject.render(3, avatar).astype(float) - 255 * theirs.image).max() <= 1.01
    assert (cut.render(3)[:, :20] == 255).all(), "beyond the film's edge"
    assert np.array_equal(anna.pose(3), anna.clip.Ts_cam_head[3]) and anna.fps == Fraction(30000, 1001)


def test_what_training_was_told_decides_the_split(data: Path, tmp_path: Path) -> None:
    subject = Subject(Path(shutil.copytree(data / "anna", tmp_path / "anna")))
    manifest = subject.stage("train") / "stage.json"
    told = {"config": {"evaluate.holdout": 0.5, "evaluate.min_holdout_frames": 1}}
    write_json(manifest, read_json(manifest) | told)
    assert pipeline.LoadedSubject(subject).test_frames.tolist() == list(range(12, 24))


def test_pictures_change_with_expression_pose_and_camera(data: Path) -> None:
    avatar = pipeline.load_avatar("anna", data)
    rest = avatar.render()
    assert rest.shape == (512, 512, 3) and rest.dtype == np.uint8
    small = avatar.camera(64)
    at_rest = avatar.render(camera=small).astype(int)
    shown = {
        "jaw": avatar.render({"jawOpen": 1.0}, camera=small),
        "turned": avatar.render(pose=pipeline.Pose(yaw=20), camera=small),
        "round": avatar.render(camera=avatar.camera(64, yaw=20)),
    }
    for name, picture in shown.items():
        assert np.abs(picture.astype(int) - at_rest).max() > 20, name


def test_a_transparent_picture_composed_over_white_is_the_white_one(data: Path) -> None:
    avatar = pipeline.load_avatar("anna", data)
    camera = avatar.camera(96)
    clear, white = avatar.render(camera=camera, background=None).astype(float), avatar.render(camera=camera)
    alpha = clear[..., 3:] / 255
    assert alpha.min() == 0 and alpha.max() > 0.9
    assert np.abs(alpha * clear[..., :3] + (1 - alpha) * 255 - white).max() <= 3


def test_orbit_keeps_the_pivot_in_place_and_shows_the_side_it_says() -> None:
    T_cam_head = np.array([[1.0, 0, 0, 0.02], [0, -1, 0, 0.1], [0, 0, -1, 0.6], [0, 0, 0, 1]])
    pivot = T_cam_head[:3, 3]
    start = Camera.of_clip(np.array([[500.0, 0, 128], [0, 500, 128], [0, 0, 1]]), 256, 256)
    for yaw, pitch in ((0.4, 0.0), (0.0, 0.3), (-0.7, 0.5)):
        moved = orbit(start, pivot, up_of(T_cam_head), yaw, pitch)
        np.testing.assert_allclose(transform_points(moved.T_cam_world, pivot[None])[0], pivot, atol=1e-12)
    # The head looks at the camera, its left ear at the right of the picture; from its left that ear comes nearer.
    ear = transform_points(T_cam_head, np.array([[0.07, 0, 0.0]]))
    from_left = orbit(start, pivot, up_of(T_cam_head), 0.5, 0)
    assert transform_points(from_left.T_cam_world, ear)[0, 2] < ear[0, 2] - 0.02
    top = transform_points(T_cam_head, np.array([[0, 0.1, 0.0]]))
    from_above = orbit(start, pivot, up_of(T_cam_head), 0, 0.5)
    assert transform_points(from_above.T_cam_world, top)[0, 2] < top[0, 2] - 0.02
    nearer = orbit(start, pivot, up_of(T_cam_head), 0.2, 0, zoom=2)
    np.testing.assert_allclose(transform_points(nearer.T_cam_world, pivot[None])[0], pivot / 2, atol=1e-12)


def test_gaze_by_pose_and_by_coefficients_agree(data: Path) -> None:
    from pipeline.gaze import GAZE_RANGE_RAD

    avatar = pipeline.load_avatar("anna", data)
    by_name = avatar.condition({"eyeLookDownLeft": 0.5, "eyeLookDownRight": 0.5}).eyes
    by_pose = avatar.condition(pose=pipeline.Pose(gaze=(float(np.degrees(0.5 * GAZE_RANGE_RAD["Down"])), 0.0))).eyes
    torch.testing.assert_close(by_name[:, 0], by_pose[:, 0])


def test_nonsense_is_refused(anna: pipeline.LoadedSubject, data: Path) -> None:
    avatar = anna.avatar()
    with pytest.raises(UserError, match="no coefficient 'jawopen'") as caught:
        avatar.render({"jawopen": 1.0})
    assert "jawOpen" in caught.value.fix
    for wrong, message in (({"jawOpen": float("nan")}, "not finite"), ([0.0], "the shape")):
        with pytest.raises(UserError, match=message):
            avatar.render(wrong)
    for pose in (np.zeros((3, 3)), np.full((4, 4), np.nan)):
        with pytest.raises(UserError, match="no 4x4 matrix"):
            avatar.render(pose=pose)
    with pytest.raises(UserError, match="no frame 9999"):
        anna.picture(9999)
    with pytest.raises(UserError, match="No subject 'nobody'"):
        pipeline.load_avatar("nobody", data)


def test_frames_of_the_split_are_usable_ones(anna: pipeline.LoadedSubject) -> None:
    both = np.concatenate([anna.train_frames, anna.test_frames])
    assert len(set(both)) == len(both) and anna.clip.usable[both].all()
    assert anna.picture(0).shape == (anna.clip.resolution, anna.clip.resolution, 3)
    assert set(anna.expression(0)) == set(anna.clip.expression_names)
