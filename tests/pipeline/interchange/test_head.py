"""Heads of imported datasets lie where the datasets put them: FLAME's parameters, meshes, and landmarks alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import imported_subjects as made
import numpy as np
import pytest
import recordings
import torch

from pipeline import heads
from pipeline.errors import StageError
from pipeline.geometry import make_rigid, project_points, rotvec_to_matrix, transform_points
from pipeline.heads.external import rough_head
from pipeline.heads.flame import Flame, load_flame, read_flame
from pipeline.interchange.head import (
    ImportedHead,
    flame_head,
    imported_head,
    landmark_head,
    mesh_basis,
    mesh_head,
    triangulate,
)

LOOKS = {row: made.seen(row)[0].landmarks[:, :2].astype(np.float64) for row in range(made.FRAMES)}


@pytest.fixture(scope="module")
def flame(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """FLAME, and a head model of it that did not take minutes to prepare."""
    folder = tmp_path_factory.mktemp("heads")
    path = recordings.flame_file(folder, "flame2023")
    prepared = rough_head("flame2023", read_flame(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_HEADS", str(folder))
        patch.setattr(heads, "load_head", lambda name, report=None: prepared)
        yield load_flame("flame2023")


def posed(imported: ImportedHead, neck: np.ndarray) -> np.ndarray:
    """Vertices [T,V,3] in the camera."""
    values = (imported.coefficients, neck, imported.eyes)
    with torch.no_grad():
        parts = (torch.from_numpy(value.astype(np.float64)) for value in values)
        vertices = imported.stored.model.vertices(torch.zeros(0, dtype=torch.float64), *parts).numpy()
    return transform_points(imported.Ts_cam_head, vertices)


def wanted(flame: Flame, recording: Any) -> np.ndarray:
    track = recording.flame
    parts = (track.expression, track.rotation, track.neck, track.jaw, track.eyes, track.translation)
    offset = None if track.static_offset is None else torch.from_numpy(track.static_offset[:5023])
    vertices = flame.vertices(torch.from_numpy(track.shape), *(torch.from_numpy(p) for p in parts), offset).numpy()
    return transform_points(recording.Ts_cam_world, vertices)


@pytest.mark.parametrize("moving", [True, False])
def test_flame_is_posed_as_flame_poses_itself(flame: Flame, moving: bool) -> None:
    offset = np.random.default_rng(4).normal(0, 1e-3, (5143, 3))
    track = recordings.flame_track("flame2023", 5, moving=moving)
    track = replace(track, jaw=np.repeat([[0.15, 0.02, -0.01]], 5, 0), static_offset=offset)
    recording = recordings.recording("vhap", flame=track, numbers=range(5))
    imported = flame_head(recording)
    error = np.linalg.norm(posed(imported, track.neck) - wanted(flame, recording), axis=2)
    # At the jaw's mean the linearisation is exact: single precision, but where jaw and neck blend in one vertex.
    assert np.percentile(error, 95) < 2e-6
    assert error.max() < 2e-4
    assert imported.stored.model.expression_names[0] == "flame2023-expression-100/000"
    assert imported.stored.model.expression_names[-3:] == tuple(f"flame2023-jaw/{axis}" for axis in "xyz")
    assert not imported.stored.may_be_passed_on
    assert imported.Ts_cam_torso is not None


def test_a_jaw_that_moves_is_linear_about_its_mean(flame: Flame) -> None:
    track = recordings.flame_track("flame2023", 12, moving=True)
    recording = recordings.recording("vhap", flame=track, numbers=range(12))
    error = np.linalg.norm(posed(flame_head(recording), track.neck) - wanted(flame, recording), axis=2)
    # Turns of 0 to 0.2 radians: the arc's sagitta at the chin, 10 cm from the hinge, is half a millimetre; and the
    # expressions, large ones here, turn along with the jaw's mean only.
    assert error.max() < 2e-3
    assert error.mean() < 5e-5


def test_eyelids_are_numbers_beside_flame(flame: Flame) -> None:
    track = replace(recordings.flame_track("flame2023", 4, moving=False), eyelids=np.full((4, 2), 0.5))
    imported = flame_head(recordings.recording("metrical", flame=track, numbers=range(4)))
    assert imported.stored.model.expression_names[-2:] == ("metrical-eyelid/left", "metrical-eyelid/right")
    np.testing.assert_array_equal(imported.coefficients[:, -2:], 0.5)


def test_meshes_are_met_by_a_linear_basis() -> None:
    rng = np.random.default_rng(0)
    coefficients, hidden = rng.normal(0.4, 1, (40, 5)), rng.normal(0, 1, (40, 2))
    shapes = rng.normal(0, 1e-3, (7, 300, 3))
    meshes = 0.1 * rng.normal(size=(300, 3)) + np.einsum("te,evi->tvi", np.hstack([coefficients, hidden]), shapes)
    template, basis, extra = mesh_basis(coefficients, meshes)
    assert extra.shape == (40, 2)
    values = np.hstack([coefficients, extra])
    error = template + np.einsum("te,evi->tvi", values, basis) - meshes
    assert np.sqrt(np.square(error).sum(2).mean()) < 1e-4
    # A first coefficient moves what it moved, as far as chance does not tie it to what is hidden.
    assert np.linalg.norm(basis[0] - shapes[0]) < 0.6 * np.linalg.norm(shapes[0])


def test_a_head_of_meshes_lies_on_what_is_seen() -> None:
    meshes, faces = made.meshes()
    recording = made.insta()
    looks = {row: LOOKS[row] for row in range(0, made.FRAMES, 2)}
    imported = mesh_head(recording, meshes, faces, recording.Ks, looks)
    model = imported.stored.model
    vertices = posed(imported, np.zeros((made.FRAMES, 3)))
    error = np.linalg.norm(vertices - transform_points(recording.Ts_cam_world, meshes.astype(np.float64)), axis=2)
    assert np.sqrt(np.square(error).mean()) < 1.1e-4
    distance = np.linalg.norm(
        project_points(imported.landmarks_cam(), recording.Ks) - made.clip().landmarks[..., :2], axis=2
    )
    assert np.median(distance) < 0.5
    own = made.clip().head.regions
    assert (model.regions["eyes"] == own["eyes"]).all()
    assert np.mean(model.regions["face"] == own["face"]) > 0.95
    assert np.mean(model.regions["torso"] == own["torso"]) > 0.9
    assert model.joints[2, 0] > 0.02 > -0.02 > model.joints[3, 0]
    assert all(name.startswith(("insta-expression-2/", "insta-mesh-")) for name in model.expression_names)


def test_components_of_two_datasets_have_two_names() -> None:
    meshes, faces = made.meshes()
    recording = made.insta()
    other = 1.01 * meshes
    names = [
        mesh_head(recording, one, faces, recording.Ks, LOOKS).stored.model.expression_names for one in (meshes, other)
    ]
    assert names[0][-1].startswith("insta-mesh-")
    assert not set(names[0][2:]) & set(names[1][2:])


def test_points_and_their_moves_are_triangulated() -> None:
    rng = np.random.default_rng(2)
    points, moves = rng.uniform(-0.08, 0.08, (30, 3)), rng.normal(0, 2e-3, (4, 30, 3))
    values = rng.normal(size=(60, 4))
    Ts = recordings.camera_poses(60)
    Ks = np.repeat(np.diag([10, 10, 1])[None] @ recordings.K, 60, 0)
    at = points + np.tensordot(values, moves, 1)
    found, moved = triangulate(project_points(transform_points(Ts, at), Ks), Ks, Ts, values)
    np.testing.assert_allclose(found, points, atol=1e-4)
    np.testing.assert_allclose(moved, moves, atol=5e-4)


def test_a_head_of_landmarks_alone_finds_unit_and_place() -> None:
    recording = made.nerfblendshape()
    imported = landmark_head(recording, recording.Ks, LOOKS)
    pixels = project_points(imported.landmarks_cam(), recording.Ks)
    skin = slice(0, 468)
    assert np.median(np.linalg.norm(pixels - made.clip().landmarks[..., :2], axis=2)[:, skin]) < 1
    depth = imported.landmarks_cam()[..., 2].mean()
    assert abs(depth / transform_points(made.clip().Ts_cam_head, np.zeros((1, 3)))[..., 2].mean() - 1) < 0.15
    assert imported.stored.may_be_passed_on
    assert imported.stored.model.expression_names == recording.coefficient_names
    assert imported.stored.model.expression_basis.any()


def test_cameras_of_another_convention_bring_nothing_together() -> None:
    right = made.nerfblendshape()
    flipped = right.Ts_cam_world.copy()
    flipped[:, 1:3] *= -1  # OpenGL's axes taken for OpenCV's
    recording = replace(right, Ts_cam_world=flipped)
    with pytest.raises(StageError, match="convention"):
        landmark_head(recording, recording.Ks, LOOKS)


def test_a_head_needs_faces() -> None:
    recording = made.nerfblendshape()
    with pytest.raises(StageError, match="A face is found in 1 "):
        imported_head(recording, Path(), recording.Ks, {0: LOOKS[0]})


def test_a_mesh_without_eyes_is_refused() -> None:
    meshes, faces = made.meshes()
    skin = ~made.clip().head.regions["eyes"]
    with pytest.raises(StageError, match="0 eyeballs"):
        mesh_head(made.insta(), meshes, faces[skin[faces].all(1)], made.insta().Ks, LOOKS)


def test_the_poses_of_a_still_camera_are_rigid(flame: Flame) -> None:
    track = recordings.flame_track("flame2023", 3, moving=True)
    imported = flame_head(recordings.recording("vhap", flame=track, numbers=range(3)))
    rotations = imported.Ts_cam_head[:, :3, :3]
    np.testing.assert_allclose(rotations @ rotations.transpose(0, 2, 1), np.repeat(np.eye(3)[None], 3, 0), atol=1e-12)
    np.testing.assert_allclose(make_rigid(rotations, imported.Ts_cam_head[:, :3, 3]), imported.Ts_cam_head)
    assert rotvec_to_matrix(track.neck).shape == rotations.shape
