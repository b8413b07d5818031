"""The doctor looks at everything and ends with the verdict on the videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.assets import FACE_LANDMARKER, asset_path
from pipeline.doctor import examine
from pipeline.errors import HeadcastError
from pipeline.finding import worst
from pipeline.heads import list_heads
from pipeline.video import write_video


def test_head_models_are_listed_with_the_place_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_HEADS", str(tmp_path))
    first, *others = list_heads()
    Path(first["path"]).write_bytes(b"the user's file")
    findings = [finding for finding in examine(tmp_path, set()) if finding.what.startswith("head model ")]
    assert findings[0].what.startswith("head model anny ")
    assert first["path"] in findings[1].what
    assert not findings[1].fix
    for finding, head in zip(findings[2:], others, strict=True):
        assert (finding.level, head["path"] in finding.fix, head["page"] in finding.fix) == ("fine", True, True)


def test_a_video_that_cannot_be_read_is_the_last_finding(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video " * 99)
    last = examine(tmp_path, set(), [tmp_path / "a.mp4"])[-1]
    assert (last.level, "is not a video that can be read" in last.what, bool(last.fix)) == ("blocked", True, True)


def test_several_videos_get_one_verdict(tmp_path: Path) -> None:
    try:
        asset_path(FACE_LANDMARKER)
    except HeadcastError as error:
        pytest.skip(f"the face landmarker is not here: {error.what}")
    videos = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for grey, video in zip((0, 1), videos, strict=True):
        write_video(video, [np.full((96, 96, 3), grey, np.uint8)] * 4, 25)
    findings = examine(tmp_path, set(), videos)
    assert worst(findings) == "blocked"
    assert findings[-1].what.startswith("these videos are poor: 'a.mp4': every one of the 4 frames looked at is black")
    assert "'b.mp4': every one" in findings[-1].what
