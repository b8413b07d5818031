"""A performance is carried over by name, from neutral to neutral, and eased where the avatar's clip showed nothing."""

from __future__ import annotations

from dataclasses import replace

import avatar_data
import numpy as np
import pytest
import torch

from pipeline.avatars import conditions_of
from pipeline.avatars.rig import with_predicted_torso
from pipeline.avatars.rigged import RiggedAvatar
from pipeline.clip import Clip, load_clip
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.geometry import make_rigid, rotvec_to_matrix
from pipeline.retarget import (
    EYES,
    MOVE,
    TURN,
    Performance,
    conditions_for,
    limits_hit,
    soft_limit,
    transfer,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    subject = avatar_data.write_subject(tmp_path_factory.mktemp("retarget") / "ada")
    return load_clip(subject, avatar_data.SIZE)


@pytest.fixture(scope="module")
def avatar() -> RiggedAvatar:
    return RiggedAvatar.start(avatar_data.training_data(), TrainConfig(gaussians=600), np.random.default_rng(0))


def carried(driver: Clip, own: Clip, overshoot: float = 1.0) -> np.ndarray:
    """[T,D] what the driver makes the avatar do."""
    performances = Performance.of(driver), Performance.of(own)
    return transfer(performances[0].values, *performances, overshoot).values


def column(clip: Clip, name: str) -> int:
    return (*clip.expression_names, *EYES, *TURN, *MOVE).index(name)


def test_an_avatar_driven_by_its_own_clip_does_what_the_clip_does(clip: Clip, avatar: RiggedAvatar) -> None:
    own = Performance.of(clip)
    done = transfer(own.values, own, own, overshoot=0.0)
    np.testing.assert_allclose(done.values, own.values, atol=1e-12)
    assert limits_hit(done, own) == {}
    conditions, truth = conditions_for(avatar, done.values, own, 0), conditions_of(clip)
    followed = with_predicted_torso(avatar, truth._replace(T_cam_skull=truth.T_cam_head))
    for name, value, expected in zip(conditions._fields, conditions, followed, strict=True):
        torch.testing.assert_close(value, expected, atol=2e-6, rtol=0, msg=name)


def test_a_drivers_constant_offset_changes_nothing(clip: Clip) -> None:
    """Neither a face that is read with a bias nor another seat, another camera tilt or a squint is carried over."""
    turn = rotvec_to_matrix(np.array([0.2, -0.5, 0.1]))
    offset = replace(
        clip,
        expression=clip.expression + np.float32(0.15),
        eyes=clip.eyes + np.float32(0.1),
        Ts_cam_head=make_rigid(turn @ clip.Ts_cam_head[:, :3, :3], clip.Ts_cam_head[:, :3, 3] + [0.1, -0.2, 0.9]),
    )
    np.testing.assert_allclose(carried(offset, clip), carried(clip, clip), atol=1e-6)


def test_a_turn_is_the_same_turn_in_the_avatars_own_axes(clip: Clip, avatar: RiggedAvatar) -> None:
    """A nod stays a nod for an avatar that faces elsewhere, and turns of turns add up."""
    own = Performance.of(clip)
    aside = make_rigid(rotvec_to_matrix(np.array([0.0, 0.6, 0.2])), np.zeros(3))
    seated = replace(own, Ts_cam_rest=own.Ts_cam_rest @ aside)
    values = np.tile(own.neutral, (3, 1))
    values[:, [column(clip, name) for name in TURN]] = [[0, 0, 0], [0.03, 0, 0], [0.06, 0, 0]]
    still, nod, twice = conditions_for(avatar, values, seated, 0).T_cam_head[:, :3, :3].double().numpy()
    np.testing.assert_allclose(still, seated.Ts_cam_rest[0, :3, :3], atol=1e-6)
    np.testing.assert_allclose(still.T @ nod, rotvec_to_matrix(np.array([0.03, 0, 0])), atol=1e-6)
    np.testing.assert_allclose(still.T @ twice, still.T @ nod @ still.T @ nod, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "axis", "toward"),
    [("headPitch", "nose", (0, 1, 0)), ("headYaw", "nose", (1, 0, 0)), ("headRoll", "left ear", (0, -1, 0))],
)
def test_positive_angles_go_where_their_names_say(
    clip: Clip, avatar: RiggedAvatar, name: str, axis: str, toward: tuple[int, int, int]
) -> None:
    """Pitch lowers the nose (the camera's y is down), yaw takes it to the subject's left, roll lifts the left ear."""
    own = Performance.of(clip)
    facing = replace(own, Ts_cam_rest=make_rigid(np.diag([1.0, -1.0, -1.0])[None], np.array([[0, 0, 0.5]])))
    values = own.neutral + 0.1 * (np.arange(len(own.names)) == column(clip, name))
    head = conditions_for(avatar, values[None], facing, 0).T_cam_head[0, :3, :3].double().numpy()
    point = np.array({"nose": (0, 0, 1), "left ear": (1, 0, 0)}[axis], float)
    moved = head @ point - facing.Ts_cam_rest[0, :3, :3] @ point
    assert moved @ np.array(toward) == pytest.approx(np.sin(0.1), abs=1e-3)


def test_the_torso_follows_as_far_as_was_seen_and_the_rest_of_a_move_whole(clip: Clip, avatar: RiggedAvatar) -> None:
    own = Performance.of(clip)
    edge = np.where(np.isin(own.names, MOVE), own.high, own.neutral)
    beyond = edge + 0.05 * np.isin(own.names, MOVE)
    conditions = conditions_for(avatar, np.stack([edge, beyond]), own, 0)
    heads, torsos = conditions.T_cam_head, conditions.T_cam_torso
    torch.testing.assert_close(heads[1, :3, 3] - heads[0, :3, 3], torch.full((3,), 0.05), atol=1e-6, rtol=0)
    torch.testing.assert_close(torsos[1, :3, 3] - torsos[0, :3, 3], torch.full((3,), 0.05), atol=1e-6, rtol=0)
    torch.testing.assert_close(torsos[1, :3, :3], torsos[0, :3, :3])


def test_columns_go_by_name(clip: Clip) -> None:
    order = np.random.default_rng(2).permutation(len(clip.expression_names))
    shuffled = replace(
        clip,
        expression=clip.expression[:, order],
        expression_names=tuple(clip.expression_names[number] for number in order),
    )
    np.testing.assert_allclose(carried(shuffled, clip), carried(clip, clip), atol=1e-12)


def test_other_names_are_refused_with_the_names(clip: Clip) -> None:
    other = replace(clip, expression_names=("expression_0", *clip.expression_names[1:]))
    with pytest.raises(UserError, match=f"it lacks {clip.expression_names[0]}; .*does not know expression_0"):
        carried(other, clip)


def test_limits_are_continuous_monotone_and_kept() -> None:
    low, high, room = np.array([0.1, 0.1]), np.array([0.4, 0.4]), np.array([0.2, 0.0])
    values = np.linspace(-1, 2, 3001)[:, None].repeat(2, 1)
    eased = soft_limit(values, low, high, room)
    inside = (values >= low) & (values <= high)
    np.testing.assert_array_equal(eased[inside], values[inside])
    steps = np.diff(eased, axis=0)
    assert (steps >= 0).all()
    assert steps.max() <= 1e-3 + 1e-12
    assert (eased >= low - room).all()
    assert (eased <= high + room).all()
    assert eased[-1, 0] == pytest.approx(0.6, abs=1e-4)


def test_what_the_avatar_never_showed_is_eased_and_told(clip: Clip) -> None:
    jaw, blink = (clip.expression_names.index(name) for name in ("jawOpen", "eyeBlinkLeft"))
    quiet = clip.expression.copy()
    wild = clip.expression.copy()
    wild[:, [jaw, blink]] = np.linspace(0, 1, len(wild))[:, None]
    quiet[:, [jaw, blink]] = 0.2 * wild[:, [jaw, blink]]
    own, driver = Performance.of(replace(clip, expression=quiet)), Performance.of(replace(clip, expression=wild))
    done = transfer(driver.values, driver, own)
    assert own.high[jaw] < done.values[:, jaw].max() <= own.high[jaw] + 0.3
    assert done.values[:, blink].max() > 0.85, "lids close in full"
    told = limits_hit(done, own)
    assert set(told) == {"jawOpen", "eyeBlinkLeft"}
    assert told["jawOpen"]["seen"] == [0, 0.2]
    assert told["jawOpen"]["frames"] == int((done.wanted[:, jaw] > own.high[jaw] + 0.02).sum())
    held = transfer(driver.values, driver, own, overshoot=0.0).values
    assert held[:, [jaw, blink]].max() <= own.high[[jaw, blink]].max()


def test_coefficients_stay_between_0_and_1(clip: Clip) -> None:
    wild = replace(clip, expression=clip.expression * 5)
    values = carried(wild, clip, overshoot=10)[:, : len(clip.expression_names)]
    assert values.min() >= 0
    assert values.max() <= 1


def test_each_camera_has_a_rest_of_its_own(clip: Clip) -> None:
    """Takes before two cameras: a jump between their poses is none of the driver's doing."""
    half = len(clip) // 2
    cameras = (np.arange(len(clip)) >= half).astype(np.int64)
    poses = clip.Ts_cam_head.copy()
    poses[half:] = poses[:half][: len(clip) - half]
    poses[half:] = make_rigid(rotvec_to_matrix(np.array([0, 0.7, 0])), np.array([0.3, 0, 0])) @ poses[half:]
    two = replace(clip, cameras=cameras, Ts_cam_head=poses, Ks=np.repeat(clip.Ks, 2, 0))
    values = Performance.of(two).values[:, [column(clip, name) for name in TURN]]
    np.testing.assert_allclose(values[half:], values[:half], atol=1e-9)


def test_times_between_frames_are_blended_and_long_gaps_held(clip: Clip) -> None:
    usable = np.ones(len(clip), bool)
    usable[[3, *range(10, 20)]] = False
    times, shots = np.arange(len(clip)) / 10, np.zeros(len(clip), np.int64)
    performance = Performance.of(replace(clip, usable=usable))
    values, held = performance.at(np.array([0.2, 0.25, 0.3, 1.1, 1.75, 5.0]), times, shots)
    rows = performance.values
    np.testing.assert_allclose(values[0], rows[2])
    np.testing.assert_allclose(values[1], 0.75 * rows[2] + 0.25 * rows[4])
    np.testing.assert_allclose(values[2], (rows[2] + rows[4]) / 2)
    np.testing.assert_allclose(values[3], rows[9])
    np.testing.assert_allclose(values[4], rows[20])
    np.testing.assert_allclose(values[5], rows[-1])
    assert held.tolist() == [False, False, False, False, False, True]
    cut, _ = performance.at(np.array([0.24, 0.36]), times, (np.arange(len(clip)) >= 3).astype(np.int64))
    np.testing.assert_allclose(cut, rows[[2, 4]])


def test_a_clip_without_a_usable_frame_cannot_drive(clip: Clip) -> None:
    with pytest.raises(UserError, match="None of the clip's frames can be used"):
        Performance.of(replace(clip, usable=np.zeros(len(clip), bool)))
