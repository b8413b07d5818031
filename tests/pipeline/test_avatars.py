"""The avatar interface and its file, and that `rigged` moves as the fitted head does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from avatar_data import clip, conditions, training_data

from pipeline.avatars import DESCRIPTION, WEIGHTS, Condition, avatar_class, load_avatar, save_avatar
from pipeline.avatars.rig import joint_transforms
from pipeline.avatars.rigged import RiggedAvatar
from pipeline.avatars.seeding import spread_frames
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.geometry import make_rigid, quaternion_to_matrix, rotvec_to_matrix

CONFIG = TrainConfig(gaussians=600, resolution=64)


@pytest.fixture(scope="module")
def avatar() -> RiggedAvatar:
    """Untrained: its basis is zero, so that only the head model moves it."""
    return RiggedAvatar.start(training_data(), CONFIG, np.random.default_rng(0)).requires_grad_(False)


def test_gaussians_on_the_surface_ride_on_the_mesh(avatar: RiggedAvatar) -> None:
    made, driven = clip(), conditions(clip())
    head = made.head
    vertices = head.vertices(torch.from_numpy(made.identity), driven.expression, driven.neck, driven.eyes)
    corners = avatar.rig_corners.long()
    neutral = torch.from_numpy(
        head.template + np.einsum("s,svi->vi", made.identity, head.identity_basis).astype(np.float32)
    )
    # The avatar keeps the vertices it needs; find them in the head by where they are.
    distances = torch.cdist(avatar.rig_vertices, neutral, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(1).values.max() < 1e-6
    index = distances.argmin(1)
    rigid = (torch.from_numpy(head.skin_weights)[index][corners][..., :2].max(-1).values > 0.999).all(1)
    on_surface = (avatar.rig_follow > 0.999) & rigid
    assert on_surface.sum() > 100
    for frame in (0, 7, 19):
        means = avatar.gaussians(driven.frame(frame)).means
        surface = torch.einsum("nc,nci->ni", avatar.rig_bary, vertices[frame][index[corners]])
        in_camera = surface @ driven.T_cam_head[frame, :3, :3].T + driven.T_cam_head[frame, :3, 3]
        # A start weight of 5 % torso on the head is meant to be learned away; compare where the two agree.
        share = avatar.joint_weights()[:, 1].minimum(1 - avatar.joint_weights()[:, 1])
        moved = (driven.T_cam_head[frame] - driven.T_cam_torso[frame])[:3, :3].norm() * 0.2
        error = (means - in_camera).norm(dim=1)[on_surface]
        assert (error < 1e-3 + share[on_surface] * moved).all()


def test_a_move_of_head_skull_and_torso_moves_every_gaussian(avatar: RiggedAvatar) -> None:
    condition = conditions(clip()).frame(5)
    move = torch.from_numpy(
        make_rigid(rotvec_to_matrix(np.array([0.1, -0.7, 0.3])), np.array([0.05, 0.1, 0.2]))
    ).float()
    poses = ("T_cam_head", "T_cam_skull", "T_cam_torso")
    moved = condition._replace(**{name: move @ getattr(condition, name) for name in poses})
    before, after = avatar.gaussians(condition), avatar.gaussians(moved)
    assert torch.allclose(after.means, before.means @ move[:3, :3].T + move[:3, 3], atol=1e-5)
    turned = move[:3, :3] @ quaternion_to_matrix(before.quats)
    assert torch.allclose(quaternion_to_matrix(after.quats), turned, atol=1e-4)
    assert torch.equal(after.scales, before.scales)


def test_the_skull_takes_the_hair_along_and_leaves_the_face(avatar: RiggedAvatar) -> None:
    condition = conditions(clip()).frame(5)
    turn = torch.from_numpy(make_rigid(rotvec_to_matrix(np.array([0.1, -0.15, 0.05])), np.zeros(3))).float()
    turned = condition._replace(T_cam_skull=condition.T_cam_head @ turn)
    before, after = avatar.gaussians(condition), avatar.gaussians(turned)
    weights = avatar.joint_weights()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    skull, torso = weights[:, 4], weights[:, 1]
    hair, face = (skull > 0.85) & (torso < 0.1), skull + torso < 0.15
    assert hair.sum() > 10 and face.sum() > 100
    to_head = torch.linalg.inv(condition.T_cam_head)
    in_head = before.means @ to_head[:3, :3].T + to_head[:3, 3]
    wanted = (in_head @ turn[:3, :3].T + turn[:3, 3]) - in_head
    moved = (after.means - before.means) @ to_head[:3, :3].T
    # Each goes as far as its share of the skull, exactly.
    near = torso < 0.1
    torch.testing.assert_close(moved[near], (skull[:, None] * wanted)[near], rtol=0, atol=2e-3)
    assert (moved[hair] - wanted[hair]).norm(dim=1).mean() < 0.2 * wanted[hair].norm(dim=1).mean()
    assert moved[face].norm(dim=1).mean() < 0.15 * wanted[face].norm(dim=1).mean()
    # Gaussians of face and eyes start on the face.
    assert weights[avatar.rig_eyes.sum(1) > 0.99, 4].max() < 0.02


def test_without_a_skull_of_its_own_the_head_carries_all(avatar: RiggedAvatar) -> None:
    condition = conditions(clip()).frame(5)
    assert torch.equal(condition.T_cam_skull, condition.T_cam_head)
    one = avatar.gaussians(condition)
    logits = avatar.skull_logits.clone()
    try:
        avatar.skull_logits.fill_(-20)
        other = avatar.gaussians(condition)
    finally:
        avatar.skull_logits.copy_(logits)
    torch.testing.assert_close(one.means, other.means, rtol=0, atol=1e-6)
    torch.testing.assert_close(quaternion_to_matrix(one.quats), quaternion_to_matrix(other.quats), rtol=0, atol=1e-5)


def test_eyes_turn_about_their_centres() -> None:
    driven = conditions(clip())
    centres = torch.tensor([[0.03, 0.04, 0.08], [-0.03, 0.04, 0.08]])
    joints = joint_transforms(driven, centres)
    for eye in range(2):
        still = driven.T_cam_head[:, :3, :3] @ centres[eye] + driven.T_cam_head[:, :3, 3]
        turned = joints[:, 2 + eye, :3, :3] @ centres[eye] + joints[:, 2 + eye, :3, 3]
        assert torch.allclose(still, turned, atol=1e-6)


def test_gaussians_grow_with_their_triangles(avatar: RiggedAvatar) -> None:
    """A lid that closes unfolds: its Gaussians cover the larger surface, and only they grow."""
    rest = avatar.neutral
    blink = rest.expression.clone()
    blink[[avatar.expression_names.index(f"eyeBlink{side}") for side in ("Left", "Right")]] = 1
    before, after = avatar.gaussians(rest), avatar.gaussians(rest._replace(expression=blink))
    growth = torch.log(after.scales / before.scales)
    corners = avatar.rig_corners.long()
    still, closed = (
        avatar.rig_vertices + torch.einsum("e,evi->vi", e, avatar.rig_expression) for e in (0 * blink, blink)
    )

    def area(vertices: torch.Tensor) -> torch.Tensor:
        a, b, c = vertices[corners].unbind(1)
        return torch.linalg.cross(b - a, c - a).norm(dim=1)

    change = torch.log(area(closed) / area(still))
    unfolded = (avatar.rig_follow > 0.99) & (change > 0.3)
    untouched = change.abs() < 1e-4
    assert unfolded.sum() > 5 and untouched.sum() > 100
    # Linear in the coefficient, so only near the true growth (half of the area's, in each direction).
    assert (growth[unfolded] > 0.25 * change[unfolded, None]).all()
    assert growth.max() <= 2 * 1.0 + 1e-4
    assert growth[untouched].abs().max() < 1e-3


def test_lids_turn_their_gaussians(avatar: RiggedAvatar) -> None:
    rest = avatar.neutral
    blink = rest.expression.clone()
    blink[[avatar.expression_names.index(f"eyeBlink{side}") for side in ("Left", "Right")]] = 1
    before = quaternion_to_matrix(avatar.gaussians(rest).quats)
    after = quaternion_to_matrix(avatar.gaussians(rest._replace(expression=blink)).quats)
    cosine = ((after.transpose(-1, -2) @ before).diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    assert torch.isfinite(cosine).all()
    degrees = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
    assert degrees.max() > 15
    assert (degrees < 1).float().mean() > 0.5


def test_what_was_never_seen_does_not_steer_the_network(avatar: RiggedAvatar) -> None:
    far = conditions(clip()).frame(0)._replace(expression=torch.full((52,), 50.0))
    features = avatar.prepare(Condition(*(value[None] for value in far))).features
    assert features.abs().max() <= 3


def test_start_shows_the_subject(avatar: RiggedAvatar) -> None:
    data = training_data()
    white = torch.ones(3)
    image = avatar.render(data.conditions.frame(0), torch.from_numpy(data.Ks[0]), 64, 64, white).image
    truth = torch.from_numpy(data.images[0]).float() / 255
    assert (image - truth).square().mean() < 0.5 * (1 - truth).square().mean()


def test_saved_avatars_render_the_same(avatar: RiggedAvatar, tmp_path: Path) -> None:
    data = training_data()
    size = save_avatar(avatar, tmp_path, {"steps": 0})
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    loaded = load_avatar(tmp_path)
    assert (loaded.head, loaded.count) == ("anny", 600)
    assert loaded.expression_names == data.head.expression_names
    K = torch.from_numpy(data.Ks[0])
    for condition in (data.conditions.frame(3), loaded.neutral):
        one = avatar.render(condition, K, 64, 64, torch.ones(3)).image
        two = loaded.render(condition, K, 64, 64, torch.ones(3)).image
        assert (one - two).abs().mean() < 0.5 / 255
    save_avatar(loaded, tmp_path, {"steps": 0})
    assert load_avatar(tmp_path).state_dict().keys() == loaded.state_dict().keys()


def test_damaged_avatars_are_refused(avatar: RiggedAvatar, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable avatar"):
        load_avatar(tmp_path)
    save_avatar(avatar, tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    for change, says in (({"schema": 99}, "schema 99"), ({"model": "cube"}, "no avatar model 'cube'")):
        (tmp_path / DESCRIPTION).write_text(json.dumps({**description, **change}))
        with pytest.raises(UserError, match=says):
            load_avatar(tmp_path)
    (tmp_path / DESCRIPTION).write_text(
        json.dumps({**description, "settings": {**description["settings"], "basis": 3}})
    )
    with pytest.raises(UserError, match="does not fit its model"):
        load_avatar(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(UserError, match="no readable avatar"):
        load_avatar(tmp_path)


def test_unknown_models_are_named() -> None:
    with pytest.raises(UserError, match="rigged"):
        avatar_class("gaussianheads")


def test_spread_frames_are_distinct_and_take_the_extremes() -> None:
    line = np.concatenate([np.zeros(20), [5.0], np.ones(20), [-4.0]])[:, None]
    chosen = spread_frames(line, 4)
    assert len(set(chosen.tolist())) == 4
    assert {20, 41} <= set(chosen.tolist())


def test_without_a_torso_the_head_moves_it_as_in_training(avatar: RiggedAvatar) -> None:
    condition = conditions(clip())
    moved = avatar.with_predicted_torso(condition._replace(T_cam_torso=torch.zeros_like(condition.T_cam_torso)))
    spread = (condition.T_cam_torso - condition.T_cam_torso.mean(0)).square().mean()
    assert (moved.T_cam_torso - condition.T_cam_torso).square().mean() < 0.5 * spread
    turned = moved.T_cam_torso[:, :3, :3] @ rotvec_to_matrix(moved.neck)
    assert torch.allclose(turned, moved.T_cam_head[:, :3, :3], atol=1e-4)


def test_the_shape_bends_the_torso_alone() -> None:
    data = training_data()
    shaped = replace(data, conditions=data.conditions._replace(torso_shape=torch.linspace(-1, 1, len(data))[:, None]))
    avatar = RiggedAvatar.start(shaped, CONFIG, np.random.default_rng(0))
    with torch.no_grad():
        avatar.torso_basis.fill_(1.0)
        one = avatar.gaussians(shaped.conditions.frame(0)).means
        bent = shaped.conditions._replace(torso_shape=shaped.conditions.torso_shape + 1)
        other = avatar.gaussians(bent.frame(0)).means
    share = avatar.joint_weights()[:, 1]
    moved = (one - other).norm(dim=1)
    assert moved[share > 0.9].min() > 3 * moved[share < 0.1].max() > 0
