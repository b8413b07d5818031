"""`headcast import` as a user meets it: what is told, and that bad datasets leave the data folder as it was."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import check_messages

from pipeline.cli import main
from pipeline.frames import save_image

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "imavatar"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "theirs"))


@pytest.fixture(autouse=True)
def without_flame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_HEADS", str(tmp_path / "heads"))


def headcast(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def parameters(folder: Path) -> Path:
    return next(folder.rglob("flame_params.json"))


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A fault in `flame_params.json`."""

    def spoil(folder: Path) -> None:
        document = json.loads(parameters(folder).read_text())
        change(document)
        parameters(folder).write_text(json.dumps(document))

    return spoil


def mirrored(document: dict[str, Any]) -> None:
    document["frames"][1]["world_mat"][0][0] *= -1


def not_a_number(document: dict[str, Any]) -> None:
    document["frames"][1]["world_mat"][0][3] = float("nan")


def climbing(document: dict[str, Any]) -> None:
    document["frames"][1]["file_path"] = "../../../../../image/7"


def no_picture(folder: Path) -> None:
    sorted(folder.rglob("image/*.png"))[1].unlink()


def link_outside(folder: Path) -> None:
    picture = sorted(folder.rglob("image/*.png"))[1]
    picture.rename(folder.parent / "outside.png")
    picture.symlink_to(folder.parent / "outside.png")


def other_mask(folder: Path) -> None:
    save_image(sorted(folder.rglob("mask/*.png"))[1], np.zeros((8, 8), np.uint8))


def other_flame(folder: Path) -> None:
    told = {
        **{"schema": 1, "format": "imavatar", "subject": "ada", "fps": "25", "numbers": [0, 1, 2]},
        **{"basis": "flame2023-expression-50", "names": [], "flame": "flame2023"},
    }
    parameters(folder).with_name("headcast.json").write_text(json.dumps(told))


def two_layouts(folder: Path) -> None:
    frames = {"frames": [{"flame_param_path": "flame_param/00000.npz", "file_path": "images/00000_00.png"}]}
    (folder / "transforms.json").write_text(json.dumps(frames))


def none_of_them(folder: Path) -> None:
    parameters(folder).rename(folder / "notes.json")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def code_in_a_frame(folder: Path) -> None:
    parameters(folder).unlink()
    payload = io.BytesIO()
    with zipfile.ZipFile(payload, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"flame": Evil()}, 2))
        archive.writestr("archive/version", "3")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint/00000.frame").write_bytes(payload.getvalue())


BAD: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "none of the layouts": (none_of_them, ()),
    "two of the layouts": (two_layouts, ()),
    "a missing picture": (no_picture, ()),
    "a mask of another size": (other_mask, ()),
    "a pose that is no number": (changed(not_a_number), ()),
    "a mirrored rotation": (changed(mirrored), ()),
    "another FLAME than told": (other_flame, ("--flame", "2020")),
    "a path that climbs out": (changed(climbing), ()),
    "a link that leads out": (link_outside, ()),
    "code in a .frame": (code_in_a_frame, ()),
    "no such format inside": (lambda folder: None, ("--format", "vhap")),
    "no frame rate": (lambda folder: None, ("--fps", "fast")),
    "a frame rate of nothing": (lambda folder: None, ("--fps", "0")),
    "a setting of tracking": (lambda folder: None, ("--set", "track.person=2")),
    "another head": (lambda folder: None, ("--set", "fit.head=anny")),
    "a name that cannot be": (lambda folder: None, ("--subject", "../ada")),
    "no FLAME here": (lambda folder: None, ()),
}


def test_bad_datasets_get_one_clear_message_and_leave_everything_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = {}
    for case, (spoil, options) in BAD.items():
        folder = tmp_path / "theirs"
        shutil.copytree(GOLDEN, folder)
        spoil(folder)
        before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
        code, out, err = headcast(capsys, "import", folder, "--data", tmp_path / "data", *options)
        assert (code, out, err[:7], err.count("error:")) == (2, "", "error: ", 1), f"{case}: {err}"
        assert not (tmp_path / "data").exists(), case
        assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before, case
        found[case] = err.replace(str(tmp_path), "").strip()
        shutil.rmtree(folder)
    assert not (tmp_path / "ran").exists()
    check_messages("import", found)
