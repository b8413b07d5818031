"""Views that the clip never had: the angles it saw, the soft edge where it was cut, and the strip."""

from __future__ import annotations

from dataclasses import replace

import avatar_data
import numpy as np
import pytest
from reenact_data import write_dataset

from pipeline.api import Avatar, LoadedSubject
from pipeline.geometry import make_rigid, rotvec_to_matrix
from pipeline.novel_views import VIEWS, angles_seen, soft_edge, strip
from pipeline.viewpoint import angles_of, orbit, up_of


@pytest.fixture(scope="module")
def anna(tmp_path_factory: pytest.TempPathFactory) -> LoadedSubject:
    return LoadedSubject(write_dataset(tmp_path_factory.mktemp("views")).subject("anna"))


def test_going_round_by_an_angle_is_seen_from_that_angle_on(anna: LoadedSubject) -> None:
    avatar = anna.avatar()
    T_cam_head = avatar.model.neutral.T_cam_head.double().numpy()
    for yaw, pitch in ((0, 0), (33, 0), (0, -12), (-20, 15)):
        camera = orbit(anna.camera(), avatar.pivot, up_of(T_cam_head), np.radians(yaw), np.radians(pitch))
        gone = angles_of(camera.T_cam_world @ T_cam_head) - angles_of(T_cam_head)
        np.testing.assert_allclose(gone, (yaw, pitch), atol=0.2)


def test_a_head_that_turns_is_seen_from_both_sides(anna: LoadedSubject) -> None:
    rest = anna.avatar().model.neutral.T_cam_head.double().numpy()
    turns = rotvec_to_matrix(np.radians(np.linspace(-20, 30, len(anna)))[:, None] * [0.0, 1.0, 0.0])
    turned = make_rigid(rest[:3, :3] @ turns, np.broadcast_to(rest[:3, 3], (len(anna), 3)))
    clip = replace(anna.clip, Ts_cam_head=turned)
    seen = angles_seen(clip, np.arange(len(anna)), anna.avatar().model)
    # A head that turns to its left shows its right side. Few frames: percentiles cut a little.
    assert seen["yaw"] == pytest.approx([-30, 20], abs=3)
    assert np.ptp(seen["pitch"]) < 8


def test_what_the_crop_cut_off_fades_and_the_rest_stays(anna: LoadedSubject) -> None:
    avatar = anna.avatar()
    fade = soft_edge(avatar.model, anna.clip).numpy()
    camera, points = anna.camera(), avatar.rest_points
    flat = points @ camera.K.T
    rows = flat[:, 1] / flat[:, 2]
    assert (fade >= 0).all() and (fade <= 1).all()
    assert fade[rows > camera.height].max(initial=0.0) == 0
    assert np.median(fade[(rows > 0.2 * camera.height) & (rows < 0.6 * camera.height)]) == 1
    narrow = replace(anna.clip, image_sizes=((avatar_data.SIZE, avatar_data.SIZE // 2),))
    halved = soft_edge(avatar.model, narrow).numpy()
    assert (halved <= fade + 1e-6).all() and halved.sum() < 0.9 * fade.sum()


def test_the_strip_shows_every_view_at_rest_and_smiling(anna: LoadedSubject) -> None:
    picture = strip(anna.avatar(), 64)
    assert picture.shape[1] % len(VIEWS) == 0
    upper, lower = np.array_split(picture[:, : picture.shape[1] // len(VIEWS)], 2)
    assert (upper < 128).any() and (lower < 128).any()
    calm = Avatar(anna.avatar().model)
    calm.model.expression_names = tuple(f"unknown{n}" for n in range(len(calm.expression_names)))
    assert 2 * len(strip(calm, 64)) < len(picture)
