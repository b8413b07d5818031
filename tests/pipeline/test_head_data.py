"""What tells one state of a head model's data from another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import head_data as module
from pipeline.head_data import head_data
from pipeline.heads import head_file


def test_the_bundled_head_changes_with_each_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = head_data("anny")
    assert before == head_data("anny") and len(before) == 64
    for name in ("anny.npz", "anny_landmarks.npz"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("anny.npz", "anny_landmarks.npz"):
            (folder / file).write_bytes((module.BUNDLED / file).read_bytes() + (b"x" if file == name else b""))
        with monkeypatch.context() as patch:
            patch.setattr(module, "BUNDLED", folder)
            assert head_data("anny") != before


def test_a_users_file_is_told_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_HEADS", str(tmp_path))
    assert head_data("flame2023") == head_data("flame") == "missing"
    path = head_file("flame2023").path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"one head")
    first = head_data("flame2023")
    assert first == head_data("flame") != "missing"
    path.write_bytes(b"two head")
    os.utime(path, ns=(1, 1))
    assert head_data("flame2023") not in (first, "missing")
