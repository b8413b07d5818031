"""The numbered examples run as they stand, on a small subject, and write what they say."""

from __future__ import annotations

import csv
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from reenact_data import write_dataset

import pipeline
from pipeline.metrics import psnr

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("examples") / "data").root


@pytest.fixture
def run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the test in an empty folder, with the arguments that an example is given."""
    monkeypatch.chdir(tmp_path)
    # A kernel's own arguments are no example's.
    arguments = ["--data", str(data), "--subject", "anna", "-f", "kernel.json"]
    monkeypatch.setattr(sys, "argv", ["example", *arguments])


def example(start: str) -> Path:
    (path,) = EXAMPLES.glob(f"{start}_*.py")
    runpy.run_path(str(path), run_name="__main__")
    return path


def pixels(name: str) -> np.ndarray:
    with Image.open(name) as image:
        return np.asarray(image)


@pytest.mark.usefixtures("run")
def test_render(tmp_path: Path) -> None:
    example("01")
    rest, happy, surprised, turned = np.split(pixels("expressions.png").astype(int), 4, axis=1)
    assert rest.shape == (320, 320, 3)
    assert all(np.abs(picture - rest).max() > 20 for picture in (happy, surprised, turned))
    assert pixels("views.png").shape == (320, 960, 3)
    alpha = pixels("cutout.png")[..., 3]
    assert alpha.shape == (512, 512) and alpha.min() == 0 and alpha.max() > 200
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.usefixtures("run")
def test_drive(data: Path) -> None:
    example("02")
    subject = pipeline.load_subject("anna", data)
    for name in ("own_numbers.mp4", "own_clip.mp4"):
        with av.open(name) as film:
            frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in film.decode(video=0)]
            assert film.streams.video[0].average_rate == subject.fps
        assert len(frames) == len(subject) and frames[0].shape == (384, 384, 3)
        assert np.abs(frames[0] - frames[len(frames) // 2]).max() > 20, "it moves"
    assert pixels("subdued.png").shape == subject.picture(0).shape


@pytest.mark.usefixtures("run")
def test_measure(data: Path) -> None:
    example("03")
    subject = pipeline.load_subject("anna", data)
    with open("measured.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["frame"]) for row in rows] == subject.test_frames.tolist()
    first = int(rows[0]["frame"])
    expected = psnr(subject.picture(first) / 255, subject.render(first) / 255)
    assert float(rows[0]["psnr"]) == pytest.approx(expected)
    assert all(0 < float(row["flip"]) < 1 and 0 < float(row["ssim"]) < 1 for row in rows)
    assert pixels("worst.png").shape[1] == 3 * 256


def test_what_the_page_about_notebooks_shows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = EXAMPLES.parent / "docs" / "notebooks.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(data.parent)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert (names["picture"].shape, names["cutout"].shape) == ((512, 512, 3), (512, 512, 4))
    assert psnr(names["truth"] / 255, names["shown"] / 255) > 15
    assert names["subdued"].shape == names["truth"].shape and names["own"].fade.min() < 0.5


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_opens_as_a_short_notebook(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    assert len(text.splitlines()) < 60
    assert text.count("\n# %%\n") >= 3, "cells of code"
