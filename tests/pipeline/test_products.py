"""Products made on request: fresh, foreign, damaged, killed, and those whose sources changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from reenact_data import write_dataset

from pipeline.dataset import Subject
from pipeline.errors import StageError, SubjectBusy, UserError
from pipeline.products import Product, Sources, place_for


@pytest.fixture
def anna(tmp_path: Path) -> Subject:
    return write_dataset(tmp_path).existing("anna")


def product(anna: Subject, folder: bool = False, **fields: Any) -> Product:
    sources = Sources.of(avatar=(anna, ("decode", "fit", "train")))
    path = place_for(anna, "things", "thing" if folder else "thing.txt", None)
    return Product(path, sources, **{"settings": {"size": 3}, "folder": folder, **fields})


def write_file(path: Path) -> dict[str, Any]:
    path.write_text("made")
    return {"text": "one word"}


def write_folder(path: Path) -> dict[str, Any]:
    (path / "inner").mkdir()
    (path / "inner" / "a.txt").write_text("made")
    return {"text": "one word"}


@pytest.mark.parametrize("folder", [False, True])
def test_fresh_until_anything_changes(anna: Subject, folder: bool) -> None:
    made = product(anna, folder)
    account = made.make(write_folder if folder else write_file)
    assert account["text"] == "one word"
    assert made.finished() == account == json.loads(made.account.read_bytes())
    assert product(anna, folder, settings={"size": 4}).finished() is None
    assert product(anna, folder, version=2).finished() is None
    file = made.path / "inner" / "a.txt" if folder else made.path
    file.write_text("mode")
    assert made.finished() is None
    with pytest.raises(UserError, match="is there already"):
        made.check_free()
    product(anna, folder, force=True).check_free()
    assert made.make(write_folder if folder else write_file) == account
    names = sorted(path.name for path in made.path.parent.iterdir())
    assert names == (["thing"] if folder else ["thing.json", "thing.txt"])


def test_a_folder_of_somebody_else_is_never_replaced(anna: Subject) -> None:
    made = product(anna, True, force=True)
    made.path.mkdir(parents=True)
    (made.path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="did not write"):
        made.check_free()


@pytest.mark.parametrize("text", ['{"years": "of work"}', "[1]", "3", "years of work"])
def test_a_document_of_somebody_else_is_never_replaced(anna: Subject, text: str) -> None:
    made = product(anna, force=True)
    made.path.parent.mkdir()
    made.account.write_text(text)
    with pytest.raises(UserError, match="in the way"):
        made.check_free()


def test_nothing_is_written_when_a_source_changes_meanwhile(anna: Subject) -> None:
    made = product(anna)

    def write(path: Path) -> dict[str, Any]:
        manifest = anna.stage("train") / "stage.json"
        record = json.loads(manifest.read_bytes())
        record.pop("seal", None)
        manifest.write_text(json.dumps(record | {"key": "0" * 64}))
        return write_file(path)

    with pytest.raises(SubjectBusy, match="replaced while it was read"):
        made.make(write)
    assert list(made.path.parent.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_holds_is_not(anna: Subject) -> None:
    made = product(anna)
    dead = made.path.parent / f".{made.path.name}.dead"
    dead.mkdir(parents=True)
    (dead / made.path.name).write_text("half")

    def write(path: Path) -> dict[str, Any]:
        assert not dead.exists()
        mine = path.parent
        product(anna).make(write_file)  # another process meanwhile
        assert mine.exists()
        return write_file(path)

    made.make(write)
    assert sorted(path.name for path in made.path.parent.iterdir()) == ["thing.json", "thing.txt"]


def test_a_full_disk_is_told_with_the_path(anna: Subject) -> None:
    def write(path: Path) -> dict[str, Any]:
        raise OSError(28, os.strerror(28), str(path))

    with pytest.raises(StageError, match=r"thing\.txt' could not be written: No space left"):
        product(anna).make(write)


def test_places_among_the_datasets_own_files_are_refused(anna: Subject, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="among the dataset's own files"):
        place_for(anna, "things", "thing.txt", anna.stage("train") / "thing.txt")
    with pytest.raises(UserError, match="no folder"):
        place_for(anna, "things", "thing.txt", tmp_path / "nowhere" / "thing.txt")
    with pytest.raises(UserError, match=r"does not end in \.mp4"):
        place_for(anna, "things", "thing.mp4", tmp_path / "thing.avi", ".mp4")
    (anna.root / "things").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link"):
        place_for(anna, "things", "thing.txt", None)
