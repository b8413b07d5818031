"""Registering clips as a source: checked, linked, told apart by its bytes, replaced in one step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline import source
from pipeline.dataset import Dataset, Subject, sha256_file
from pipeline.errors import UserError
from pipeline.source import (
    check_sources,
    has_photo,
    is_registered,
    photo_path,
    register_photo,
    register_source,
    source_names,
    source_paths,
)
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


def test_several_clips_are_kept_in_order(tmp_path: Path, subject: Subject) -> None:
    (tmp_path / "old").mkdir()
    first, second, third = video(tmp_path / "a.mp4"), video(tmp_path / "old/a.mp4", 120), video(tmp_path / "b.mp4", 150)
    record = register_source(subject, [first, second])
    assert [clip["file"] for clip in record["clips"]] == ["a.mp4", "a-2.mp4"]
    assert source_names(subject) == ["a.mp4", "a.mp4"]
    assert [path.samefile(given) for path, given in zip(source_paths(subject), [first, second], strict=True)] == [
        True
    ] * 2
    assert is_registered(subject, [first, second])
    assert not is_registered(subject, [first])
    digests = {record["sha256"]}
    for clips in ([second, first], [first, second, third], [first]):
        digests.add(register_source(subject, clips)["sha256"])
        assert [path.samefile(clip) for path, clip in zip(source_paths(subject), clips, strict=True)] == [True] * len(
            clips
        )
    assert len(digests) == 4, "another clip, and another order, is another source"
    assert register_source(subject, [first, second])["sha256"] == record["sha256"]


def test_known_clips_are_not_read_again_beside_a_new_one(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = video(tmp_path / "a.mp4"), video(tmp_path / "b.mp4", 150)
    register_source(subject, [first])
    read: list[Path] = []
    monkeypatch.setattr(source, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    register_source(subject, [first, second])
    assert [path.name for path in read if path.name == "a.mp4"] == []


def test_a_clip_given_twice_is_refused(tmp_path: Path, subject: Subject) -> None:
    path = video(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"'.*a\.mp4' is given twice\."):
        check_sources([path, path])
    shutil.copy(path, tmp_path / "copy.mp4")
    with pytest.raises(UserError, match=r"'.*a\.mp4' and '.*copy\.mp4' are the same clip\.") as caught:
        register_source(subject, [path, tmp_path / "copy.mp4"])
    assert caught.value.fix == "name each clip once"
    assert not subject.source.exists()


def test_a_missing_second_clip_is_named_before_anything_is_taken(tmp_path: Path, subject: Subject) -> None:
    with pytest.raises(UserError, match=r"There is no file '.*gone\.mp4'"):
        register_source(subject, [video(tmp_path / "a.mp4"), tmp_path / "gone.mp4"])
    assert not subject.source.exists()


def test_a_single_photograph_is_no_clip(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "anna.JPG", tmp_path / "folder" / "anna.png"):
        cv2.imwrite(str(path), np.full((90, 90, 3), 99, np.uint8))
    for given in (tmp_path / "anna.JPG", tmp_path / "folder"):
        with pytest.raises(UserError) as caught:
            check_sources([given])
        assert caught.value.what == f"'{given}' is a single image; an avatar needs a head that moves."
        assert "--like PHOTO" in caught.value.fix


def test_a_record_of_one_clip_as_it_was_written_before_is_read(tmp_path: Path, subject: Subject) -> None:
    path = video(tmp_path / "a.mp4")
    record = register_source(subject, [path])
    (subject.source / "source.json").write_text(json.dumps({"schema": 1, **record["clips"][0]}))
    assert is_registered(subject, [path])
    assert [p.name for p in source_paths(subject)] == ["a.mp4"]
    assert source_digest(subject) == record["sha256"]


def test_a_photograph_is_kept_with_the_clips(tmp_path: Path, subject: Subject) -> None:
    clip, other = video(tmp_path / "a.mp4"), video(tmp_path / "b.mp4", 150)
    photos = [tmp_path / "anna.JPG", tmp_path / "anna.png"]
    for path in photos:
        cv2.imwrite(str(path), np.full((90, 90, 3), 99, np.uint8))
    shas = [sha256_file(path) for path in photos]
    before = register_source(subject, [clip])
    record = register_source(subject, [clip], photos[0])
    assert record["sha256"] == before["sha256"], "the frames do not depend on it"
    assert photo_path(subject, shas[0]).read_bytes() == photos[0].read_bytes()
    register_source(subject, [other])
    assert has_photo(subject, shas[0]), "it stays when the clips change"
    register_photo(subject, photos[1])
    assert has_photo(subject, shas[1])
    assert sorted(p.name for p in subject.source.iterdir()) == ["b.mp4", f"like-{shas[1][:12]}.png", "source.json"]
    photo_path(subject, shas[1]).write_bytes(b"another")
    with pytest.raises(UserError, match="is missing or was changed") as caught:
        photo_path(subject, shas[1])
    assert "give it again: headcast run VIDEO --like PHOTO" in caught.value.fix
