"""Runs whose source is another project's dataset: taken in, decoded, replaced, kept in a store, cut by the power."""

from __future__ import annotations

import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from power_cut import Recorder

from pipeline import lease
from pipeline.dataset import Subject
from pipeline.errors import UserError
from pipeline.frames import FrameSet
from pipeline.progress import SilentReporter
from pipeline.run import (
    Import,
    RunRequest,
    carry_out,
    check_input,
    hold,
    needed_assets,
    open_subject,
    prepare,
    resolve_config,
)
from pipeline.source import imported, read_dataset
from pipeline.stage import inspect_stages
from pipeline.video import write_video
from stages import STAGES

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(autouse=True)
def without_flame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_HEADS", str(tmp_path / "heads"))


def request(data: Path, name: str = "insta", **options: Any) -> RunRequest:
    imports = Import(folder=GOLDEN / name, force=options.pop("force", False))
    return RunRequest(data=data, subject="ada", imports=imports, last="decode", **options)


def run(made: RunRequest) -> list[str]:
    check_input(made, made.target())
    return carry_out(made, STAGES, SilentReporter())


def video(folder: Path) -> Path:
    path = folder / "film.mp4"
    write_video(path, [np.full((64, 80, 3), shade, np.uint8) for shade in (90, 40, 70, 20, 60)], 25)
    return path


@pytest.mark.parametrize("name", ["insta", "nerfblendshape"])
def test_a_dataset_becomes_a_subject_once(tmp_path: Path, name: str) -> None:
    made = request(tmp_path, name)
    assert run(made) == ["decode"]
    subject = Subject(tmp_path / "ada")
    told = imported(subject)
    assert told is not None
    assert (told["format"], told["folder"]) == (name, name)
    frames, recording = FrameSet.load(subject.stage("decode")), made.imports and made.imports.read()
    assert recording is not None
    assert frames.source_frames.tolist() == recording.numbers.tolist()
    assert (frames.has_alpha, len(frames)) == (recording.alpha != "none", len(recording))
    again = read_dataset(subject)
    assert (again.files, again.fps, again.notes) == (recording.files, recording.fps, recording.notes)
    assert np.array_equal(again.Ts_cam_world, recording.Ts_cam_world)
    assert run(made) == []
    assert carry_out(RunRequest(data=tmp_path, subject="ada", last="decode"), STAGES, SilentReporter()) == []


def test_another_source_is_replaced_only_when_told(tmp_path: Path) -> None:
    run(request(tmp_path))
    with pytest.raises(UserError, match=r"was imported from 'insta' as insta\.\n.*--subject.*--force"):
        run(request(tmp_path, "nerfblendshape"))
    told = imported(Subject(tmp_path / "ada"))
    assert told is not None
    assert told["format"] == "insta"
    assert run(request(tmp_path, "nerfblendshape", force=True)) == ["decode"]
    filmed = RunRequest(data=tmp_path, subject="ada", videos=(video(tmp_path),), last="decode", check=False)
    assert carry_out(filmed, STAGES, SilentReporter()) == ["decode"]
    assert imported(Subject(tmp_path / "ada")) is None
    assert not (tmp_path / "ada/decode/recording.npz").exists()
    with pytest.raises(UserError, match="was made from something else"):
        run(request(tmp_path))


def test_settings_that_say_nothing_to_it_are_refused_and_the_others_kept(tmp_path: Path) -> None:
    run(request(tmp_path, settings=("train.steps=77", "decode.max_side_px=48")))
    assert FrameSet.load(tmp_path / "ada/decode").width == 48

    def asked(**options: Any) -> RunRequest:
        return RunRequest(data=tmp_path, subject="ada", **options)

    faults: list[tuple[dict[str, Any], str]] = [
        ({"settings": ("fit.head=anny",)}, "fit.head"),
        ({"settings": ("track.smooth_seconds=0",)}, "track.smooth_seconds"),
        ({"settings": ("decode.max_fps=10",)}, "decode.max_fps"),
        ({"alpha": (tmp_path,)}, "--alpha"),
        ({"like": tmp_path}, "--like"),
    ]
    for options, named in faults:
        with pytest.raises(UserError, match=f"^{named} says nothing to 'ada': its frames"):
            prepare(asked(**options), STAGES)
    subject = Subject(tmp_path / "ada")
    config = prepare(asked(settings=("train.avatar=gaussianhead",)), STAGES)[1]
    assert (config.train.steps, config.decode.max_side_px, config.train.avatar) == (77, 48, "gaussianhead")
    assert config.train.gaussianhead.field_layers == 4, "the preset's numbers for that avatar"
    assert resolve_config(request(tmp_path), subject).train.steps == 77
    assert resolve_config(asked(preset="standard"), subject).train.steps == 4000


def test_models_that_its_alphas_make_needless_are_not_asked_for(tmp_path: Path) -> None:
    run(request(tmp_path))
    _, config, _ = prepare(RunRequest(data=tmp_path, subject="ada"), STAGES)
    stages = [stage for stage in STAGES if stage.name in ("decode", "track", "matte", "fit")]
    every = {name for stage in stages for name in stage.assets(config)}
    assert every - needed_assets(Subject(tmp_path / "ada"), config, stages) == {"selfie_segmentation"}


def test_a_store_brings_it_to_another_machine(tmp_path: Path) -> None:
    store = f"memory://{secrets.token_hex(4)}"
    assert run(request(tmp_path / "here", store=store)) == ["decode"]
    there = RunRequest(data=tmp_path / "there", subject="ada", last="decode", store=store)
    assert carry_out(there, STAGES, SilentReporter()) == []
    here = Subject(tmp_path / "here/ada"), Subject(tmp_path / "there/ada")
    assert imported(here[1]) == imported(here[0])
    assert read_dataset(here[1]).files == read_dataset(here[0]).files
    shutil.rmtree(here[1].stage("decode"))
    assert carry_out(there, STAGES, SilentReporter()) == [], "the store has it"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a thing: flushing takes no time there."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_power_cut_while_a_dataset_is_taken_in(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a disk holds after a cut, the subject has the whole dataset or none, and the same command goes on."""
    made = request(memory / "data", "nerfblendshape")
    (memory / "data").mkdir()
    recorder = Recorder(memory / "data")
    with recorder.recording():
        subject, config, _ = prepare(made, STAGES)
        with hold(subject):
            open_subject(made, subject, config)
        recorder.mark("taken in")
    expected = subject.source.joinpath("source.json").read_bytes()
    monkeypatch.setattr(lease._stillness, "since", lambda *which: lease.boot_seconds() - 1000)
    states = list(recorder.states(random.Random(7)))
    assert len(states) > 20
    for number, cut in enumerate(states[::4]):
        after = memory / str(number)
        after.mkdir()
        cut.lay_out(after)
        left = Subject(after / "ada")
        if left.source.exists():
            assert (left.source / "source.json").read_bytes() == expected
            assert read_dataset(left).files
        else:
            assert "taken in" not in cut.marks
        again = made.model_copy(update={"data": after})
        with hold(left):
            open_subject(again, left, config)
        assert [state.name for state in inspect_stages(left, STAGES[:1], config)] == ["missing"]
        assert read_dataset(left).files
        shutil.rmtree(after)
