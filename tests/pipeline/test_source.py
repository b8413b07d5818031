"""Registering a source: checked, linked, told apart by its bytes, replaced in one step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline import source
from pipeline.dataset import Dataset, Subject, sha256_file
from pipeline.errors import UserError
from pipeline.source import register_source, source_paths
from pipeline.stage import source_digest
from pipeline.video import write_video


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    subject = Dataset(tmp_path / "data").subject("ada")
    subject.root.mkdir(parents=True)
    return subject


def video(path: Path, shade: int = 90, size: tuple[int, int] = (80, 64)) -> Path:
    image = np.full((size[1], size[0], 3), shade, np.uint8)
    write_video(path, [image, image // 2, image], 25)
    return path


def test_a_video_is_linked_under_a_safe_name(tmp_path: Path, subject: Subject) -> None:
    path = video(tmp_path / "My clip (2).mp4")
    record = register_source(subject, [path])
    (clip,) = record["clips"]
    assert (clip["file"], clip["name"]) == ("My-clip-2.mp4", "My clip (2).mp4")
    assert record["sha256"] == clip["sha256"] == sha256_file(path) == source_digest(subject)
    assert (clip["probe"]["width"], clip["probe"]["height"]) == (80, 64)
    assert source_paths(subject)[0].samefile(path)
    assert str(tmp_path) not in (subject.source / "source.json").read_text()


def test_the_same_file_is_left_alone_and_not_read_again(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = video(tmp_path / "a.mp4")
    first = register_source(subject, [path])
    written = (subject.source / "source.json").stat().st_mtime_ns
    monkeypatch.setattr(source, "sha256_file", lambda path: pytest.fail("hashed again"))
    monkeypatch.setattr(source, "probe", lambda path: pytest.fail("probed again"))
    assert register_source(subject, [path]) == first
    assert (subject.source / "source.json").stat().st_mtime_ns == written


def test_equal_bytes_under_another_name_keep_the_source(tmp_path: Path, subject: Subject) -> None:
    first = register_source(subject, [video(tmp_path / "a.mp4")])
    shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    again = register_source(subject, [tmp_path / "b.mp4"])
    assert again["sha256"] == first["sha256"]
    assert source_paths(subject)[0].name == "a.mp4"


def test_another_file_replaces_it_and_changes_the_digest(tmp_path: Path, subject: Subject) -> None:
    before = register_source(subject, [video(tmp_path / "a.mp4")])
    after = register_source(subject, [video(tmp_path / "b.mp4", shade=200)])
    assert after["sha256"] != before["sha256"]
    assert sorted(p.name for p in subject.source.iterdir()) == ["b.mp4", "source.json"]
    assert not [p for p in subject.work.iterdir() if p.name.startswith("source-")]


def test_a_file_edited_in_place_is_noticed(tmp_path: Path, subject: Subject) -> None:
    before = register_source(subject, [video(tmp_path / "a.mp4")])
    other = video(tmp_path / "other.mp4", shade=200).read_bytes()
    with open(tmp_path / "a.mp4", "r+b") as file:  # the same inode, which the dataset links to
        file.write(other)
        file.truncate()
    os.utime(tmp_path / "a.mp4", ns=(1, 1))
    assert register_source(subject, [tmp_path / "a.mp4"])["sha256"] != before["sha256"]


def test_a_lost_file_is_taken_again(tmp_path: Path, subject: Subject) -> None:
    path = video(tmp_path / "a.mp4")
    register_source(subject, [path])
    (subject.source / "a.mp4").unlink()
    with pytest.raises(UserError, match="The source of 'ada' is missing or damaged") as caught:
        source_paths(subject)[0]
    assert caught.value.fix == "give the video again: headcast run VIDEO --subject ada"
    register_source(subject, [path])
    assert source_paths(subject)[0].is_file()


def test_a_folder_of_images_is_taken_in_order(tmp_path: Path, subject: Subject) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in (1, 2, 10):
        cv2.imwrite(str(folder / f"p{number}.PNG"), np.full((64, 80, 3), number * 20, np.uint8))
    record = register_source(subject, [folder])
    assert record["clips"][0]["kind"] == "images"
    assert [p.name for p in sorted(source_paths(subject)[0].iterdir())] == ["000000.png", "000001.png", "000002.png"]
    assert cv2.imread(str(source_paths(subject)[0] / "000002.png"))[0, 0, 0] == 200
    cv2.imwrite(str(folder / "p3.PNG"), np.full((64, 80, 3), 5, np.uint8))
    assert register_source(subject, [folder])["sha256"] != record["sha256"]


@pytest.mark.parametrize(
    ("make", "message", "fix"),
    [
        (lambda folder: folder / "missing.mp4", "There is no file '{path}'.", "check the path"),
        (
            lambda folder: video(folder / "tiny.mp4", size=(16, 16)),
            "'{path}' is 16x16 pixels, too small to show a face.",
            "give a picture of at least 64 pixels each way; 256 and more make a useful avatar",
        ),
    ],
)
def test_bad_sources_are_refused_and_what_was_there_stays(
    tmp_path: Path, subject: Subject, make: object, message: str, fix: str
) -> None:
    register_source(subject, [video(tmp_path / "good.mp4")])
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        register_source(subject, [path])
    assert caught.value.what == message.format(path=path)
    assert caught.value.fix == fix
    assert source_paths(subject)[0].name == "good.mp4"


@pytest.mark.parametrize("content", [b"", b"not a video at all " * 99])
def test_a_file_that_is_no_video_leaves_nothing(tmp_path: Path, subject: Subject, content: bytes) -> None:
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"is empty|is not a video"):
        register_source(subject, [tmp_path / "bad.mp4"])
    assert not subject.source.exists()
