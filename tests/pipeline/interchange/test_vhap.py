"""VHAP's layout: what is written is what its readers put on the picture, and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recordings
import torch

from pipeline.heads.flame import Flame, load_flame
from pipeline.interchange import ReadOptions, vhap
from pipeline.interchange.recording import Recording
from pipeline.interchange.rectify import rectified
from pipeline.interchange.sidecar import Sidecar

POINTS = slice(None, None, 97)
SIDECAR = Sidecar("vhap", "somebody", "30000/1001", (), "", ())


@pytest.fixture(scope="module")
def flame(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flame]:
    folder = tmp_path_factory.mktemp("heads")
    recordings.flame_file(folder, "flame2023")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_HEADS", str(folder))
        yield load_flame("flame2023")


def pixels(recording: Recording, flame: Flame) -> np.ndarray:
    """Where some of FLAME's vertices lie in the pictures [T,N,2], root turned and moved."""
    track = recording.flame
    assert track is not None
    offset = None if track.static_offset is None else torch.from_numpy(track.static_offset[:5023].copy())
    parts = [torch.from_numpy(np.ascontiguousarray(getattr(track, name))) for name in ("neck", "jaw", "eyes")]
    shape, expression = torch.from_numpy(track.shape), torch.from_numpy(track.expression)
    rotation, translation = torch.from_numpy(track.rotation), torch.from_numpy(track.translation)
    vertices = flame.vertices(shape, expression, rotation, *parts, translation, offset)[:, POINTS].numpy()
    world = replace(recording, flame=None)
    return recordings.pixels(world, vertices)


@pytest.mark.parametrize("moving", [True, False], ids=["head moves", "camera moves"])
def test_round_trip(tmp_path: Path, flame: Flame, moving: bool) -> None:
    track = recordings.flame_track("flame2023", 3, moving=moving)
    given = recordings.recording("x", flame=track)
    if moving:
        given = replace(given, Ts_cam_world=np.repeat(given.Ts_cam_world[:1], 3, 0))
    flat, pictures, _ = rectified(given, recordings.picture, vhap.RECTIFY)
    warnings = vhap.write(flat, pictures, tmp_path / "set", flame=flame, sidecar=SIDECAR)
    assert warnings == []
    assert vhap.detect(tmp_path / "set")
    found = vhap.read(tmp_path / "set", ReadOptions())
    np.testing.assert_allclose(pixels(found, flame), pixels(flat, flame), atol=1e-4)
    np.testing.assert_array_equal(found.numbers, given.numbers)
    assert found.fps == given.fps
    assert found.size == flat.size
    np.testing.assert_allclose(found.coefficients, given.coefficients, rtol=1e-6, atol=1e-7)
