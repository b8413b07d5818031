"""What the webcam needs is packed as it is, or the message says what to do without."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import avatar_data
import pytest
from safetensors.numpy import load

from pipeline.clip import Clip, load_clip
from pipeline.errors import StageError
from pipeline.exports import webcam
from pipeline.retarget import OVERSHOOT, Performance


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(avatar_data.write_subject(tmp_path_factory.mktemp("data") / "anna"), avatar_data.SIZE)


def test_files_are_packed_with_the_avatars_limits(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in webcam._PARTS.values():
        (tmp_path / name).write_bytes(f"the bytes of {name}".encode())
    monkeypatch.setattr(webcam, "asset_path", lambda name, reporter: tmp_path / name)
    packed = webcam.pack(clip)
    assert packed == webcam.pack(clip)
    data = gzip.decompress(packed)
    parts = {name: part.tobytes() for name, part in load(data).items()}
    assert parts.pop("worker") == webcam.WORKER.read_bytes()
    assert parts == {part: f"the bytes of {name}".encode() for part, name in webcam._PARTS.items()}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    limits, own = json.loads(header["__metadata__"]["headcast"]), Performance.of(clip)
    assert limits["names"] == list(own.names)
    assert limits["low"] == own.low.tolist()
    assert limits["room"][own.names.index("headYaw")] == OVERSHOOT["headYaw"]
    assert limits["T_cam_rest"] == own.Ts_cam_rest[0].ravel().tolist()


def test_without_npm_the_webcam_may_be_left_out(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError) as caught:
        webcam.pack(clip)
    assert "there is no npm on this machine" in caught.value.what
    assert caught.value.fix.startswith("install npm and check its registry, or put the file by hand at ")
    assert caught.value.fix.endswith(", or leave the webcam out with --set webcam=false")
