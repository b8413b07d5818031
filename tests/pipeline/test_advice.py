"""Advice on filming: it comes where a figure asks for it, with that figure, and not otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.advice import advise, head_angles_deg
from pipeline.dataset import Subject
from pipeline.geometry import make_rigid, rotvec_to_matrix

FRAMES = 300
NAMES = ("jawOpen", "eyeBlinkLeft", "eyeBlinkRight", "mouthSmileLeft", "mouthSmileRight")
FACING = np.diag([1.0, -1, -1])


def poses(yaw_deg: float, pitch_deg: float) -> np.ndarray:
    """Heads that sweep over this range, around a face that looks into the camera."""
    phase = np.linspace(0, 2 * np.pi, FRAMES)
    turns = np.radians(np.stack([pitch_deg / 2 * np.sin(2 * phase), yaw_deg / 2 * np.sin(phase), 0 * phase], -1))
    return make_rigid(FACING @ rotvec_to_matrix(turns), np.tile([0, 0, 0.6], (FRAMES, 1)))


@pytest.fixture
def film(tmp_path: Path) -> Callable[..., Subject]:
    """Write a well-filmed subject, with these arrays of `track.npz` and `fit.npz` instead."""

    def write(seconds: float = 12.0, yaw_deg: float = 60, pitch_deg: float = 30, **track: Any) -> Subject:
        subject = Subject(tmp_path / "ada")
        for stage in ("decode", "track", "fit"):
            subject.stage(stage).mkdir(parents=True)
        entries = [
            {"index": i, "file": f"frames/{i:06d}.jpg", "time": i * seconds / FRAMES, "source_frame": i, "sharpness": 1}
            for i in range(FRAMES)
        ]
        listing = {"schema": 1, "width": 640, "height": 480, "fps": "25/1", "count": FRAMES, "frames": entries}
        (subject.stage("decode") / "frames.json").write_text(json.dumps(listing))
        no, yes = np.zeros(FRAMES, bool), np.ones(FRAMES, bool)
        good = {"detected": yes, "usable": yes, "blurred": no, "off_frame": no, "occluded": no}
        good |= {"boxes": np.tile(np.float32([100, 80, 320, 360]), (FRAMES, 1)), "blendshape_names": np.array(NAMES)}
        good |= {"blendshapes": np.tile(np.linspace(0, 0.9, FRAMES, dtype=np.float32)[:, None], (1, len(NAMES)))}
        np.savez(subject.stage("track") / "track.npz", **{**good, **track})
        np.savez(subject.stage("fit") / "fit.npz", Ts_cam_head=poses(yaw_deg, pitch_deg), usable=yes)
        return subject

    return write


def flags(first: int, last: int) -> np.ndarray:
    found = np.zeros(FRAMES, bool)
    found[first : last + 1] = True
    return found


def closed(name: str) -> np.ndarray:
    scores = np.full((FRAMES, len(NAMES)), 0.8, np.float32)
    scores[:, [i for i, known in enumerate(NAMES) if known.startswith(name)]] = 0.1
    return scores


def test_a_well_filmed_clip_gets_no_advice(film: Callable[..., Subject]) -> None:
    assert advise(film(), {"matte": {"metrics": {"flicker_px": 0.3}}}) == []


@pytest.mark.parametrize(
    ("changes", "title", "figure"),
    [
        ({"seconds": 4.0}, "Film longer", "300 usable frames in 4.0 s"),
        ({"usable": np.arange(FRAMES) % 3 == 0}, "Film longer", "100 usable frames in 12.0 s"),
        ({"yaw_deg": 10}, "Show both sides", "turns by 10 degrees"),
        ({"pitch_deg": 4}, "Look up and down", "nods by 4 degrees"),
        ({"blurred": flags(30, 89)}, "Sharper frames", "20% of the frames are blurred"),
        ({"off_frame": flags(12, 40)}, "Keep the whole head in the picture", "frames 12-40"),
        ({"occluded": flags(0, 59)}, "Keep hands and hair off the face", "frames 0-59"),
        ({"detected": ~flags(200, 259)}, "Stay in view", "No face was found in 20% of the frames: frames 200-259"),
        ({"boxes": np.tile([10, 10, 98, 110], (FRAMES, 1))}, "Come closer", "100 px high"),
        ({"blendshapes": closed("jaw")}, "Open the mouth", "0.10 of 1"),
        ({"blendshapes": closed("eyeBlink")}, "Close the eyes", "0.10 of 1"),
        ({"blendshapes": closed("mouthSmile")}, "Smile", "0.10 of 1"),
    ],
)
def test_each_fault_is_named_with_its_figure(
    film: Callable[..., Subject], changes: dict[str, Any], title: str, figure: str
) -> None:
    found = advise(film(**changes), {})
    assert [item.title for item in found] == [title]
    assert figure in found[0].text


def test_a_flickering_matte_wants_a_plainer_background(film: Callable[..., Subject]) -> None:
    found = advise(film(), {"matte": {"metrics": {"flicker_px": 2.04}}})
    assert [item.title for item in found] == ["A plainer background"]
    assert "2.0 px" in found[0].text


def test_missing_and_damaged_files_give_no_advice(tmp_path: Path, film: Callable[..., Subject]) -> None:
    assert advise(Subject(tmp_path / "nobody"), {}) == []
    subject = film(blurred=flags(0, 200))
    (subject.stage("track") / "track.npz").write_bytes(b"PK\x03\x04 broken")
    (subject.stage("fit") / "fit.npz").write_bytes(b"")
    (subject.stage("decode") / "frames.json").write_bytes(b"{")
    assert advise(subject, {"matte": {"metrics": None}}) == []


def test_head_angles_are_zero_into_the_camera_and_recover_a_turn() -> None:
    yaw, pitch = np.radians(25), np.radians(-10)
    turned = FACING @ rotvec_to_matrix(np.array([[0, yaw, 0], [pitch, 0, 0], [0, 0, 0]]))
    yaws, pitches = head_angles_deg(make_rigid(turned, np.zeros((3, 3))))
    np.testing.assert_allclose(yaws, [25, 0, 0], atol=1e-6)
    np.testing.assert_allclose(np.abs(pitches), [0, 10, 0], atol=1e-6)
