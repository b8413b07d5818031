"""What goes wrong on a machine, done for real: power cuts, full disks, rotten bits, two runs at once, a wrong clock.

After each fault nothing finished is lost, nothing half-written is believed, the same command finishes the job, and the
result equals an undisturbed run. `headcast bench faults` does the same with `kill -9` at random moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from power_cut import Recorder

from pipeline import lease
from pipeline import stage as stage_module
from pipeline.dataset import Dataset, Subject
from pipeline.errors import HeadcastError
from pipeline.lease import hold_folder
from pipeline.progress import SilentReporter
from pipeline.run import RunRequest, carry_out, hold, open_subject, prepare
from pipeline.stage import Result, Stage, StageRun, Verdict, damaged_output, inspect_stages, read_manifest, run_stage
from pipeline.video import write_video
from stages import noop

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that the source check takes."""
    path = tmp_path_factory.mktemp("clip") / "anna.mp4"
    write_video(path, [np.full((64, 80, 3), shade, np.uint8) for shade in (90, 40, 90)], 25)
    return path


def keys(subject: Subject, stages: tuple[Stage, ...] = noop.STAGES) -> dict[str, tuple[str, str]]:
    """Key and digest of every stage; each must be whole."""
    found = {}
    for stage in stages:
        manifest = read_manifest(subject.stage(stage.name))
        assert manifest is not None, f"{stage.name} is missing"
        assert damaged_output(subject.stage(stage.name), manifest) is None
        found[stage.name] = (manifest["key"], manifest["digest"])
    return found


def run(data: Path, clip: Path, stages: tuple[Stage, ...] = noop.STAGES, **options: Any) -> list[str]:
    request = RunRequest(data=data, videos=(clip,), check=False, **options)
    return carry_out(request, stages, SilentReporter())


@pytest.fixture
def undisturbed(clip: Path, tmp_path: Path) -> dict[str, tuple[str, str]]:
    """Keys and digests of a run that nothing disturbs."""
    run(tmp_path / "undisturbed", clip)
    return keys(Subject(tmp_path / "undisturbed" / "anna"))


def careless(run: StageRun) -> Result:
    """Writes files as `save_image` does, without flushing, and resumes by their names."""
    for step in range(3):
        path = run.work / "frames" / f"{step}.png"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.with_name(f".{step}").write_bytes(b"frame %d" % step)
            os.replace(path.with_name(f".{step}"), path)
    return Result(Verdict("good", "Done."))


FEW = (Stage("decode", 1, (), careless), Stage("track", 1, ("decode",), noop.work, durable=("*",)))


@pytest.mark.parametrize("what", ["new", "again"])
def test_power_cut_at_any_moment(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Every state that a disk may be left in, from an empty dataset or while a finished subject is run again."""
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else tmp_path) as scratch:
        data = Path(scratch, "data")
        data.mkdir()
        options: dict[str, Any] = {}
        if what == "again":
            run(data, clip, FEW)
            options = {"first": "decode"}
        recorder = Recorder(data)
        request = RunRequest(data=data, videos=(clip,), check=False, **options)
        with recorder.recording():
            subject, config, _ = prepare(request, FEW)
            with hold(subject) as held:
                open_subject(request, subject, config)
                for stage in FEW:
                    run_stage(subject, stage, FEW, config, force=stage.name == request.first, still_held=held.check)
                    recorder.mark(stage.name)
        expected = keys(subject, FEW)
        monkeypatch.setattr(stage_module, "_boot", lambda: "the start after the power cut")
        # The lease that the run before the cut left would be watched for 45 s each time.
        monkeypatch.setattr(lease._stillness, "since", lambda *which: lease.boot_seconds() - 1000)
        states = 0
        for number, cut in enumerate(recorder.states(random.Random(7))):
            after = Path(scratch, str(number))
            after.mkdir()
            cut.lay_out(after)
            left = Subject(after / "anna")
            if left.source.exists():
                assert (left.source / clip.name).read_bytes() == clip.read_bytes()
            for stage in FEW:
                where = f"{stage.name} after {cut.number} events, {cut.kept}"
                manifest = read_manifest(left.stage(stage.name))
                if manifest is None:
                    assert not left.stage(stage.name).exists(), f"{where}: in place without its manifest"
                    assert stage.name not in cut.marks, f"{where}: finished and lost"
                else:
                    assert damaged_output(left.stage(stage.name), manifest) is None, where
            run(after, clip, FEW, **options)
            assert keys(left, FEW) == expected
            states += 1
        assert states > 20
