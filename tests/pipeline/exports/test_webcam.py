"""What the webcam needs is packed as it is, or the message says what to do without."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from pipeline.errors import StageError
from pipeline.exports import webcam
from pipeline.retarget import EYES, MOVE, TURN, Performance

NAMES = ("jawOpen", *EYES, *TURN, *MOVE)


def performance() -> Performance:
    zeros = np.zeros(len(NAMES))
    poses = np.stack([np.eye(4), 2 * np.eye(4)])
    return Performance(NAMES, zeros[None], np.ones(1, bool), zeros, zeros, zeros, poses)


def test_the_files_are_packed_with_the_avatars_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in webcam._PARTS.values():
        (tmp_path / name).write_bytes(f"the bytes of {name}".encode())
    monkeypatch.setattr(webcam, "asset_path", lambda name, reporter: tmp_path / name)
    packed = webcam.pack(performance(), 1)
    assert packed == webcam.pack(performance(), 1)
    data = gzip.decompress(packed)
    parts = {name: part.tobytes() for name, part in load(data).items()}
    assert parts.pop("worker") == webcam.WORKER.read_bytes()
    assert parts == {part: f"the bytes of {name}".encode() for part, name in webcam._PARTS.items()}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    limits = json.loads(header["__metadata__"]["headcast"])
    assert limits["names"] == list(NAMES)
    assert limits["room"][NAMES.index("headYaw")] == 0.08
    assert limits["T_cam_rest"] == (2 * np.eye(4)).ravel().tolist()


def test_without_npm_the_webcam_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError) as caught:
        webcam.pack(performance(), 0)
    assert "there is no npm on this machine" in caught.value.what
    assert caught.value.fix.startswith("install npm and check its registry, or put the file by hand at ")
    assert caught.value.fix.endswith(", or leave the webcam out with --set webcam=false")
