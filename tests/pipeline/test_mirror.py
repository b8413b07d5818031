"""Two machines that work on one subject through a store: nothing finished is made again, nothing damaged is taken."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from object_store import BUCKET, s3_server, set_source, tree

from pipeline.config import Config, override, preset_config
from pipeline.dataset import Dataset, write_atomic
from pipeline.errors import HeadcastError, StoreDamaged
from pipeline.mirror import Mirror, in_step, open_mirror
from pipeline.progress import SilentReporter
from pipeline.stage import Result, Stage, StageRun, Verdict, inspect_stages, run_stage
from pipeline.store import DatasetStore, open_store

ROOT = Path(__file__).resolve().parents[2]
CONFIG = preset_config("quick")


class Messages(SilentReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


class Machine:
    """A machine with a local copy of subject `anna` and two toy stages; `made` lists what worked here."""

    def __init__(self, folder: Path, store: DatasetStore | None) -> None:
        self.subject = Dataset(folder).subject("anna")
        self.reporter = Messages()
        self.mirror = Mirror(self.subject, self.reporter, store)
        self.made: list[str] = []
        self.stages = (Stage("decode", 1, (), self.work), Stage("track", 1, ("decode",), self.work))

    def work(self, run: StageRun) -> Result:
        name = run.work.name.partition("-")[0]
        self.made.append(name)
        write_atomic(run.work / "out", f"{name} of {(self.subject.source / 'clip.mp4').read_text()}".encode())
        return Result(Verdict("good", name))

    def run(self, config: Config = CONFIG, *, known: bool = True) -> list[str]:
        """Bring both stages up to date, as a run does; returns what worked here."""
        self.made.clear()
        self.subject.work.mkdir(parents=True, exist_ok=True)
        self.mirror.pull_source(known)
        self.mirror.push_source()
        for until, stage in enumerate(self.stages, 1):
            states = self.mirror.fetch(lambda until=until: inspect_stages(self.subject, self.stages[:until], config))
            if states[-1].name != "fresh":
                run_stage(self.subject, stage, self.stages, config)
            self.mirror.publish(stage.name)
        self.subject.report.write_text("report")
        self.mirror.push_report()
        return list(self.made)


@pytest.fixture
def store() -> DatasetStore:
    return open_store(f"memory://{secrets.token_hex(4)}")


@pytest.fixture
def machines(tmp_path: Path, store: DatasetStore) -> tuple[Machine, Machine]:
    """Two machines; the first has the clip."""
    first, second = Machine(tmp_path / "a", store), Machine(tmp_path / "b", store)
    set_source(first.subject, "abcd")
    return first, second


def test_two_machines_work_one_after_another(machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    both = first.stages
    first.stages = both[:1]
    assert first.run() == ["decode"]
    assert second.run() == ["track"]
    first.stages = both
    assert first.run() == []
    assert tree(first.subject.root) == tree(second.subject.root)


def test_what_was_finished_without_the_store_is_kept_and_taken_there(machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    first.run()
    other = override(CONFIG, ["decode.max_frames=7"])
    alone = Machine(second.subject.root.parent, None)
    set_source(alone.subject, "abcd")
    assert alone.run(other) == ["decode", "track"]
    assert second.run(other) == [], "the older stages of the store do not replace these"
    assert first.run(other) == []


def test_in_step_means_that_the_store_knows_the_same(machines: tuple[Machine, Machine], store: DatasetStore) -> None:
    first, second = machines
    assert not in_step(store.url, first.subject)
    first.run()
    assert in_step(store.url, first.subject)
    assert not in_step(store.url, second.subject)
    second.run()
    (second.subject.root / "run.json").write_text("{}")
    assert not in_step(store.url, second.subject)
    second.mirror.push_source()
    assert in_step(store.url, second.subject)
    assert not in_step(store.url, first.subject), "the settings were changed there"


def test_settings_of_the_last_run_travel(machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    first.run()
    second.run()
    record = second.subject.root / "run.json"
    assert record.read_bytes() == (first.subject.root / "run.json").read_bytes()
    record.write_text('{"schema": 1}')
    second.mirror.push_source()
    first.mirror.pull_source(known=True)
    assert (first.subject.root / "run.json").read_text() == '{"schema": 1}'


@pytest.mark.parametrize("damaged", ["out", "track.json"])
def test_damage_in_the_store_is_named_and_made_anew(
    machines: tuple[Machine, Machine], store: DatasetStore, damaged: str, tmp_path: Path
) -> None:
    first, second = machines
    first.run()
    (path,) = (p for p in store.fs.find(f"{store.root}/anna") if "/track" in p and p.endswith(damaged))
    store.fs.pipe_file(path, b"?" + store.fs.cat_file(path)[1:])
    assert second.run() == ["track"]
    (message,) = second.reporter.texts
    assert "'track' of 'anna'" in message
    assert "'out' was changed" in message or "its entry" in message
    third = Machine(tmp_path / "c", store)
    assert third.run() == []
    assert tree(third.subject.root)["track/out"] == tree(first.subject.root)["track/out"]


def test_a_damaged_source_has_to_be_given_again(machines: tuple[Machine, Machine], store: DatasetStore) -> None:
    first, second = machines
    first.run()
    (path,) = (p for p in store.fs.find(store.root) if p.endswith("clip.mp4"))
    store.fs.pipe_file(path, b"abcX")
    with pytest.raises(StoreDamaged, match=r"'clip\.mp4' was changed") as caught:
        second.run()
    assert "headcast run VIDEO --subject anna" in caught.value.fix
    set_source(second.subject, "abcd")
    assert second.run(known=False) == []
    assert first.run() == []


def test_nothing_is_published_by_a_run_that_lost_its_subject(
    machines: tuple[Machine, Machine], store: DatasetStore
) -> None:
    def lost() -> None:
        raise HeadcastError("another run took over")

    first, second = machines
    first.run()
    before = {path: store.fs.cat_file(path) for path in store.fs.find(store.root)}
    second.mirror.still_held = lost
    set_source(second.subject, "wxyz")
    with pytest.raises(HeadcastError, match="took over"):
        second.run(known=False)
    assert {path: data for path, data in before.items() if store.fs.cat_file(path) != data} == {}


def test_without_a_store_nothing_but_the_run_happens(tmp_path: Path) -> None:
    machine = Machine(tmp_path, None)
    set_source(machine.subject, "abcd")
    assert machine.run() == ["decode", "track"]
    assert machine.run() == []
    assert open_mirror(None, machine.subject, machine.reporter).store is None


@pytest.fixture
def bucket() -> Iterator[DatasetStore]:
    with s3_server():
        yield open_store(f"s3://{BUCKET}/{secrets.token_hex(4)}")


@pytest.mark.slow  # a minute, most of it until the lease of the killed run is over
def test_a_killed_run_is_continued_on_another_machine(bucket: DatasetStore, tmp_path: Path) -> None:
    images = tmp_path / "given"
    images.mkdir()
    for number in range(2):
        cv2.imwrite(str(images / f"{number}.png"), np.full((80, 64, 3), 90 * number, np.uint8))

    def begin(machine: str, *videos: str, seconds: float = 0.0) -> subprocess.Popen[str]:
        """A run without an orchestrator, of noop stages."""
        told = {"data": str(tmp_path / machine), "subject": "anna", "videos": videos, "store": bucket.url}
        how = {"HEADCAST_STAGES": "noop", "HEADCAST_NOOP": json.dumps({"seconds": seconds, "steps": 4})}
        command = [sys.executable, "-m", "stages", json.dumps(told)]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **how}, stderr=subprocess.PIPE, text=True)

    with begin("a", str(images), seconds=2.0) as process:
        while "fit" not in bucket.manifests("anna"):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    for machine, made in (("b", {"train", "evaluate", "export"}), ("a", set())):
        with begin(machine) as process:
            assert process.stderr is not None
            told = process.stderr.read()
        assert process.returncode == 0, told
        assert {line.partition(":")[0] for line in told.splitlines() if "4/4 steps" in line} == made, told
    assert tree(tmp_path / "a" / "anna") == tree(tmp_path / "b" / "anna")
