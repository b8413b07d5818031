"""Recordings survive being saved; heads that turn about FLAME's root joint lie where FLAME puts them."""

from __future__ import annotations

from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import recordings
import torch

from pipeline.errors import StageError
from pipeline.geometry import transform_points
from pipeline.heads.flame import Flame, load_flame
from pipeline.interchange.recording import Recording, load_recording, save_recording


@pytest.fixture(scope="module")
def flame(tmp_path_factory: pytest.TempPathFactory) -> Flame:
    folder = tmp_path_factory.mktemp("heads")
    recordings.flame_file(folder, "flame2023")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_HEADS", str(folder))
        return load_flame("flame2023")


def same(one: object, other: object) -> None:
    for each in fields(one):  # type: ignore[arg-type]
        a, b = getattr(one, each.name), getattr(other, each.name)
        if each.name == "flame" and a is not None:
            same(a, b)
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b, each.name


def example() -> Recording:
    track = recordings.flame_track("flame2023", 3, moving=True)
    splits = {"train": (0, 1), "test": (2,), "val": ()}
    return recordings.recording(
        "vhap", flame=track, splits=splits, extra={"transforms.json": {"who": ["x", 1]}}, frame_extra=({}, {"a": 1}, {})
    )


def test_saved_recording_is_the_same(tmp_path: Path) -> None:
    save_recording(tmp_path / "recording.npz", example())
    found = load_recording(tmp_path / "recording.npz")
    same(example(), found)
    assert found.fps == Fraction(30000, 1001)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no more", None])
def test_damaged_recording_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "recording.npz"
    if damage is None:
        np.savez(path, text=np.frombuffer(b'{"schema": 1, "format": "vhap"}', np.uint8))
    else:
        path.write_bytes(damage)
    with pytest.raises(StageError, match="cannot be used"):
        load_recording(path)


def test_root_joint_poses_are_flames_own(flame: Flame) -> None:
    """FLAME with its root turned and moved is FLAME at rest under `Ts_cam_head`."""
    recording = example()
    track = recording.flame
    assert track is not None
    shape, expression, rotation, translation, neck, jaw, eyes = (
        torch.from_numpy(getattr(track, name))
        for name in ("shape", "expression", "rotation", "translation", "neck", "jaw", "eyes")
    )
    still = torch.zeros_like(rotation)
    moved = flame.vertices(shape, expression, rotation, neck, jaw, eyes, translation).numpy()
    rest = flame.vertices(shape, expression, still, neck, jaw, eyes, still).numpy()
    root = flame.joints(shape, expression)[:, 0].numpy()
    there = transform_points(recording.Ts_cam_world, moved)
    np.testing.assert_allclose(transform_points(recording.Ts_cam_head(root), rest), there, atol=1e-12)
    with pytest.raises(ValueError, match="root joint"):
        recording.Ts_cam_head()
    in_camera = recording.with_head_in_camera(recording.Ts_cam_head(root))
    np.testing.assert_array_equal(in_camera.Ts_cam_head(), recording.Ts_cam_head(root))


def test_flame_agrees_with_its_own_package(tmp_path: Path, flame: Flame) -> None:
    """Our forward against the published one: shape, expression, neck, jaw and both eyes at once."""
    from body_models.flame.numpy import FLAME

    track = example().flame
    assert track is not None
    model = FLAME(model_path=recordings.flame_file(tmp_path, "flame2023"))
    rotations = np.concatenate([track.neck[:, None], track.jaw[:, None], track.eyes], 1).astype(np.float32)
    expected = model.forward_vertices(
        rotations,
        shape=np.repeat(track.shape[None], 3, 0).astype(np.float32),
        expression=track.expression.astype(np.float32),
    )
    still = torch.zeros(3, 3, dtype=torch.float64)
    parts = [torch.from_numpy(part) for part in (track.neck, track.jaw, track.eyes)]
    found = flame.vertices(torch.from_numpy(track.shape), torch.from_numpy(track.expression), still, *parts, still)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
