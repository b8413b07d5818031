"""Every command of docs/interchange.md runs, in the order of the page, on small synthetic datasets of those names."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imported_subjects as made
import numpy as np
import pytest
import recordings
from PIL import Image
from reenact_data import write_dataset

from pipeline import heads
from pipeline.cli import main
from pipeline.heads.external import CARRIED_REGIONS, rough_head
from pipeline.heads.flame import read_flame
from pipeline.interchange import metrical, nerfblendshape, read
from pipeline.interchange.metrical import TrackedFrame
from pipeline.interchange.sidecar import FILE, Sidecar
from pipeline.video import write_video

PAGE = Path(__file__).resolve().parents[1] / "docs" / "interchange.md"
GOLDEN = Path(__file__).parent / "golden"
SHORT = ("--set", "train.steps=8", "--set", "train.gaussians=400")
"""A training as a test can wait for it."""


def commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the datasets that the page names, and `data/` with its subjects."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(GOLDEN / "insta", folder / "bala")
    shutil.copytree(GOLDEN / "vhap", folder / "UNION10_074_EMO1")
    shutil.copytree(GOLDEN / "imavatar" / "anna", folder / "yufeng")
    (folder / "yufeng" / "anna").rename(folder / "yufeng" / "yufeng")
    write_actor(folder / "output" / "bala")
    write_portrait(folder / "id1")
    flame = folder / "heads"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HEADCAST_HEADS", str(flame))
        prepared = {name: prepared_flame(flame, name) for name in ("flame2020", "flame2023")}
        load_head = heads.load_head

        def load(name: str = "anny", report: Any = None) -> heads.HeadModel:
            return prepared.get(name) or load_head(name, report)

        patch.setattr(heads, "load_head", load)
        write_dataset(folder / "data")
        write_takes(folder)
        yield folder


def prepared_flame(folder: Path, name: str) -> heads.HeadModel:
    """A head model of FLAME that did not take minutes to prepare."""
    rough = rough_head(name, read_flame(recordings.flame_file(folder, name)))
    nowhere = np.zeros(len(rough.template), dtype=bool)
    return replace(rough, regions={**dict.fromkeys(CARRIED_REGIONS, nowhere), **rough.regions})


def write_actor(folder: Path) -> None:
    """What metrical-tracker leaves."""
    for name in ("checkpoint", "input"):
        (folder / name).mkdir(parents=True)
    track = recordings.flame_track("flame2020", 3, moving=False)
    for row, T_cam_head in enumerate(recordings.camera_poses(3)):
        frame = TrackedFrame(
            where="",
            size=recordings.SIZE,
            T_cam_head=T_cam_head,
            K=recordings.K,
            shape=track.shape,
            expression=track.expression[row],
            jaw=track.jaw[row],
            eyes=track.eyes[row],
            eyelids=np.zeros(2),
        )
        (folder / f"checkpoint/{row:05d}.frame").write_bytes(metrical.frame_bytes(frame, f"{row:05d}"))
        Image.fromarray(recordings.picture(row)[0]).save(folder / f"input/{row:05d}.png")


def write_portrait(folder: Path) -> None:
    """A talking head as gaussian-head has it, whose face MediaPipe finds."""
    recording, clip = made.nerfblendshape(), made.clip()

    def pictures(row: int) -> tuple[np.ndarray, np.ndarray]:
        return clip.images[row].round().clip(0, 255).astype(np.uint8), (255 * clip.alpha[row]).round().astype(np.uint8)

    sidecar = Sidecar("nerfblendshape", "id1", "25", tuple(recording.numbers.tolist()), recording.basis, ())
    nerfblendshape.write(recording, pictures, folder, flame=None, sidecar=sidecar)
    (folder / FILE).unlink()


def write_takes(folder: Path) -> None:
    """A take of Live Link Face, and a video with a dump of MediaPipe's landmarks."""
    clip = made.clip()
    images = [image.round().clip(0, 255).astype(np.uint8) for image in clip.images]
    for name in ("20240506_MySlate_7/MySlate_7_iPhone.mov", "take7/take7.mp4"):
        (folder / name).parent.mkdir()
        write_video(folder / name, images, 25)
    with (folder / "20240506_MySlate_7" / "MySlate_7_iPhone.csv").open("w") as file:
        names = [name[0].upper() + name[1:] for name in heads.EXPRESSIONS]
        file.write(",".join(["Timecode", "BlendShapeCount", *names]) + "\n")
        for row, values in enumerate(clip.expression):
            file.write(",".join([f"10:00:00:{row:02d}.000", "52", *(f"{value:.6f}" for value in values)]) + "\n")
    landmarks = np.stack([made.seen(row)[0].landmarks for row in range(made.FRAMES)])
    np.savez(folder / "take7" / "landmarks.npz", landmarks=landmarks)


def test_the_commands_of_the_page(place: Path) -> None:
    told = commands()
    assert len(told) > 10 and all(line.startswith("headcast ") for line in told)
    for line in told:
        words = shlex.split(line)[1:]
        with pytest.raises(SystemExit) as ended:
            main([*words, *(SHORT if words[0] == "run" else ())])
        assert ended.value.code == 0, line
    for name in ("bala", "union10", "id1", "yufeng", "yufeng-30"):
        assert (place / "data" / name / "fit" / "stage.json").is_file(), name
    assert (place / "data" / "bala" / "export" / "stage.json").is_file()
    for name in ("nerfblendshape", "insta", "vhap", "imavatar"):
        assert read(place / "data" / "bala" / "exported" / name).format == name
    assert read(place / "data" / "yufeng-30" / "source" / "dataset", "imavatar").flame is not None
