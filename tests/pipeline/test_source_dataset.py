"""A dataset of another project as a subject's source: taken in whole, told by bytes and by how it is read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import recordings

from pipeline.dataset import Dataset, Subject
from pipeline.errors import UserError
from pipeline.frames import save_image
from pipeline.interchange.recording import Recording
from pipeline.source import (
    imported,
    is_registered,
    is_registered_dataset,
    register_dataset,
    register_source,
    source_files,
    source_names,
    source_paths,
)
from pipeline.stage import source_digest
from pipeline.store import source_key
from pipeline.video import write_video


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    subject = Dataset(tmp_path / "data").subject("ada")
    subject.root.mkdir(parents=True)
    return subject


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "their data"
    (folder / "images").mkdir(parents=True)
    for row, number in enumerate(recordings.NUMBERS):
        save_image(folder / f"images/{number:05d}.png", recordings.picture(row)[0])
    (folder / "transforms.json").write_text("{}")
    (folder / "notes.txt").write_text("not part of it")
    return folder


def recording(**changes: object) -> Recording:
    images = tuple(f"images/{number:05d}.png" for number in recordings.NUMBERS)
    made = recordings.recording("nerfblendshape", names=["nerfblendshape-2/00", "nerfblendshape-2/01"], images=images)
    return replace(made, files=(*images, "transforms.json"), notes=("Taken for granted.",), **changes)


def files_of(subject: Subject) -> list[str]:
    return [path.relative_to(subject.source).as_posix() for path in source_files(subject)]


def test_its_files_keep_their_places_and_nothing_else_comes_along(subject: Subject, folder: Path) -> None:
    record = register_dataset(subject, folder, recording())
    assert files_of(subject) == ["dataset/" + name for name in sorted(recording().files)]
    assert (subject.source / "dataset/transforms.json").samefile(folder / "transforms.json")
    assert (source_names(subject), source_paths(subject)) == (["their data"], [subject.source / "dataset"])
    probe = record["clips"][0]["probe"]
    assert [probe[name] for name in ("width", "height", "fps", "frames")] == [*recordings.SIZE, "30000/1001", 3]
    assert str(folder.parent) not in (subject.source / "source.json").read_text()


def test_it_tells_where_it_was_imported_from(subject: Subject, folder: Path, tmp_path: Path) -> None:
    assert imported(subject) is None
    register_dataset(subject, folder, recording())
    told = imported(subject)
    assert told is not None
    expected = ("nerfblendshape", "their data", "30000/1001", None, "nerfblendshape-2", ["Taken for granted."])
    assert tuple(told[name] for name in ("format", "folder", "fps", "flame", "basis", "notes")) == expected
    video = tmp_path / "a.mp4"
    write_video(video, [np.full((64, 80, 3), shade, np.uint8) for shade in (90, 40, 70)], 25)
    assert not is_registered(subject, [video])
    register_source(subject, [video])
    assert imported(subject) is None
    assert files_of(subject) == ["a.mp4"]


def test_what_is_there_already_is_left_alone(subject: Subject, folder: Path) -> None:
    assert not is_registered_dataset(subject, folder, recording())
    first = register_dataset(subject, folder, recording())
    assert is_registered_dataset(subject, folder, recording())
    assert register_dataset(subject, folder, recording()) == first
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    assert is_registered_dataset(subject, copy, recording())
    again = register_dataset(subject, copy, recording())
    assert (again["sha256"], again["imported"]) == (first["sha256"], first["imported"])


def test_other_bytes_names_and_ways_of_reading_are_other_sources(subject: Subject, folder: Path) -> None:
    def digests(changed: Recording) -> tuple[str | None, str]:
        register_dataset(subject, folder, changed)
        return source_digest(subject), source_key(subject)

    found = {digests(recording()), digests(recording(fps=Fraction(25)))}
    found.add(digests(recording(flame=recordings.flame_track("flame2020", 3, moving=False))))
    found.add(digests(recording(flame=recordings.flame_track("flame2023", 3, moving=False))))
    (folder / "transforms.json").write_text('{"changed": 1}')
    found.add(digests(recording()))
    (folder / "transforms.json").rename(folder / "other.json")
    found.add(digests(replace(recording(), files=(*recording().images, "other.json"))))
    assert len(found) == 6 and all(len(set(column)) == 6 for column in zip(*found, strict=True)), found


def test_a_changed_file_is_named(subject: Subject, folder: Path) -> None:
    register_dataset(subject, folder, recording())
    path = subject.source / "dataset/transforms.json"
    path.unlink()
    path.write_text("[]")
    with pytest.raises(UserError, match=r"was changed since .*\n.*headcast import FOLDER --subject ada --force"):
        source_files(subject)


@pytest.mark.parametrize("name", ["../outside.png", ".hidden/a.png", "a\nb.png", "Images/00003.png"])
def test_names_that_cannot_be_kept_are_refused(subject: Subject, folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be kept|differ in capitals only"):
        register_dataset(subject, folder, replace(recording(), files=(*recording().files, name)))
    assert not subject.source.exists()
