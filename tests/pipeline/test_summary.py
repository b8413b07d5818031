"""Summaries: what they say of every standing, and that no cache ever makes them say anything else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import summary as module
from pipeline.bench_status import make_finished_subject
from pipeline.config import Config, override, preset_config
from pipeline.dataset import Dataset, Subject, write_json
from pipeline.progress import Progress
from pipeline.stage import Stage, inspect_stages, work_folder
from pipeline.summary import CACHE, Summary, mending_command, summaries, summarize

CONFIG = preset_config("quick")
HEAD = ["anny 1"]
"""What the toy fit reads beside its inputs."""


def toy_stages(track_version: int = 1) -> tuple[Stage, ...]:
    def never(run: Any) -> Any:
        raise AssertionError("a summary runs nothing")

    return (
        Stage("decode", 1, (), never),
        Stage("track", track_version, ("decode",), never),
        Stage("fit", 1, ("decode", "track"), never, data=lambda config: {"head": HEAD[0]}),
        Stage("train", 1, ("decode", "fit"), never, reads=("evaluate.holdout",)),
        Stage("evaluate", 1, ("decode", "train"), never),
        Stage("export", 1, ("train",), never),
    )


STAGES = toy_stages()


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return make(tmp_path)


def make(folder: Path, name: str = "anna") -> Subject:
    subject = Dataset(folder).subject(name)
    make_finished_subject(subject, STAGES, frames=3)
    return subject


def edit(subject: Subject, stage: str, **changes: Any) -> None:
    path = subject.stage(stage) / "stage.json"
    write_json(path, json.loads(path.read_bytes()) | changes)


def begin(subject: Subject, stage: str, config: Config = CONFIG) -> Path:
    """Make a work folder for the key that the stage has now."""
    states = {state.stage: state for state in inspect_stages(subject, STAGES, config, verify=False)}
    work = work_folder(subject, STAGES[[s.name for s in STAGES].index(stage)], str(states[stage].key))
    work.mkdir(parents=True, exist_ok=True)
    return work


def uncached(subject: Subject, stages: tuple[Stage, ...] = STAGES) -> Summary:
    (subject.work / CACHE).unlink(missing_ok=True)
    return summarize(subject, stages)


def test_a_finished_subject(subject: Subject) -> None:
    told = summarize(subject, STAGES)
    manifests = {s.name: json.loads((subject.stage(s.name) / "stage.json").read_bytes()) for s in STAGES}
    assert (told.subject, told.standing, told.why) == ("anna", "fresh", "")
    assert [stage.state for stage in told.stages] == ["fresh"] * len(STAGES)
    assert told.psnr == manifests["evaluate"]["metrics"]["test"]["psnr"]
    assert told.psnr_baseline == manifests["evaluate"]["metrics"]["baselines"]["nearest_train_frame"]["psnr"]
    assert (told.avatar, told.preset) == ("rigged", "quick")
    assert [stage.bytes for stage in told.stages] == [sum(o["size"] for o in m["outputs"]) for m in manifests.values()]
    assert told.bytes == sum(stage.bytes for stage in told.stages)
    assert told.thumbnail == "export/neutral.jpg"
    assert told.report is None
    assert told.seconds == 30 * len(STAGES)
    assert str(told.first_finished) == "2026-01-01 00:00:30+00:00"
    assert str(told.last_finished) == "2026-01-01 00:05:30+00:00"
    assert told.failed_at is None
    assert mending_command(told, Path("data")) is None


def test_the_worst_verdict_stands_for_the_subject(subject: Subject) -> None:
    for stage in STAGES:
        edit(subject, stage.name, verdict={"level": "good", "text": f"{stage.name}: good.", "picture": ""})
    assert (summarize(subject, STAGES).level, summarize(subject, STAGES).verdict) == ("good", "export: good.")
    edit(subject, "fit", verdict={"level": "poor", "text": "Fit: poor.", "picture": ""})
    edit(subject, "train", verdict={"level": "fair", "text": "Training: fair.", "picture": ""})
    assert (summarize(subject, STAGES).level, summarize(subject, STAGES).verdict) == ("poor", "Fit: poor.")


def test_figures_and_states_are_those_of_the_manifests_held_against_the_settings(subject: Subject) -> None:
    record = {"schema": 1, "config": override(CONFIG, ["fit.crop_margin=0.5"]).model_dump(mode="json")}
    write_json(subject.root / "run.json", record)
    told = summarize(subject, STAGES)
    assert (told.standing, told.why) == ("stale", "fit: fit.crop_margin changed from 0.35 to 0.5")
    assert [stage.state for stage in told.stages] == ["fresh", "fresh", "stale", "stale", "stale", "stale"]
    assert told.psnr is not None, "the files of the earlier run are still there"
    assert mending_command(told, Path("data")) == "headcast rerun anna"
    assert mending_command(told, Path("my data")) == "headcast rerun anna --data 'my data'"


def test_missing_partial_failed_and_running(subject: Subject) -> None:
    shutil.rmtree(subject.stage("train"))
    told = summarize(subject, STAGES)
    assert (told.standing, told.why) == ("missing", "train: not run yet")
    work = begin(subject, "train")
    assert summarize(subject, STAGES).standing == "partial"
    write_json(work / "failure.json", {"what": "No face.", "fix": "film again", "at": "2026-02-01T10:00:00+00:00"})
    told = summarize(subject, STAGES)
    assert (told.standing, told.why, told.fix) == ("failed", "train: No face.", "film again")
    assert str(told.failed_at) == "2026-02-01 10:00:00+00:00"
    (work / "failure.json").unlink()
    subject.progress.write_text(
        json.dumps({"stage": "train", "label": "train", "done": 5, "total": 10, "unit": "steps"})
    )
    assert summarize(subject, STAGES).progress is None, "nobody holds the subject, so nobody is at it"
    with subject.lock():
        told = summarize(subject, STAGES)
    assert (told.standing, told.why) == ("running", "train: 5/10 steps (50 %)")
    assert told.progress == Progress("train", "train", 5, 10, "steps")
    assert told.stages[3].state == "running"


def test_a_failure_counts_more_than_what_merely_waits_before_it(subject: Subject) -> None:
    edit(subject, "evaluate", key="of other settings")
    write_json(begin(subject, "export") / "failure.json", {"what": "never seen: export is fresh"})
    assert summarize(subject, STAGES).standing == "stale"
    shutil.rmtree(subject.stage("export"))
    assert summarize(subject, STAGES).standing == "failed"


def test_settings_that_cannot_be_read_are_said(subject: Subject) -> None:
    (subject.root / "run.json").write_text('{"config": {"nonsense": 1}}')
    told = summarize(subject, STAGES)
    assert (told.standing, told.stages) == ("unreadable", ())
    assert "cannot be read as this version's settings" in told.why
    assert "--preset" in told.fix


def test_json_round_trip(subject: Subject) -> None:
    with subject.lock():
        subject.progress.write_text(json.dumps({"stage": "fit"}))
        told = summarize(subject, STAGES)
    assert Summary.from_json(json.loads(json.dumps(told.to_json()))) == told
    with pytest.raises(ValueError, match="standing"):
        Summary.from_json(told.to_json() | {"standing": "sitting"})


def test_all_subjects_by_name(tmp_path: Path) -> None:
    for name in ("bert", "anna", "cleo"):
        make(tmp_path, name)
    (tmp_path / "no subject").mkdir()
    assert [told.subject for told in summaries(Dataset(tmp_path), STAGES)] == ["anna", "bert", "cleo"]
    assert summaries(Dataset(tmp_path / "gone"), STAGES) == []


def test_what_does_not_fit_in_a_manifest_is_left_out(subject: Subject) -> None:
    good = summarize(subject, STAGES)
    for hostile in (None, [], "x", 7, {"psnr": "high"}, {"psnr": float("nan")}, {"psnr": 10**400}, {"psnr": True}):
        edit_raw(subject, "evaluate", metrics={"test": hostile, "baselines": {"a": hostile, "b": {"psnr": 1}}})
        edit_raw(subject, "fit", verdict=hostile, seconds=hostile, finished=hostile)
        told = summarize(subject, STAGES)
        assert (told.psnr if told.psnr != 1.0 else None, told.psnr_baseline) == (None, 1.0)
        assert (told.stages[2].level, told.stages[2].seconds in (None, 7.0)) == (None, True)
        assert uncached(subject) == told
    edit_raw(subject, "train", preset="\ud800", config={"avatar": ["x"]}, digest="\ud800")
    assert summarize(subject, STAGES).preset == "?"
    for outputs in ({}, "x", [7], [{"path": 7, "size": 1}], [{"path": "a", "size": "1"}], [{"path": "a"}]):
        edit_raw(subject, "decode", outputs=outputs)
        assert summarize(subject, STAGES).stages[0].state == "missing"
    (subject.stage("decode") / "stage.json").write_text("[" * 100_000)
    assert summarize(subject, STAGES).stages[0].state == "missing"
    assert good.standing == "fresh"


def edit_raw(subject: Subject, stage: str, **changes: Any) -> None:
    """As `edit`, with what JSON does not know."""
    path = subject.stage(stage) / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def test_the_cache_saves_reading_the_manifests(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    told = remembered(subject)

    def unread(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a manifest was read")

    monkeypatch.setattr(module, "published_states", unread)
    assert summarize(subject, STAGES) == told
    with pytest.raises(AssertionError, match="was read"):
        uncached(subject)


def remembered(subject: Subject) -> Summary:
    """A summary that is kept: made when the manifests are older than the file system's last tick."""
    while not (subject.work / CACHE).exists():
        time.sleep(0.005)
        told = summarize(subject, STAGES)
    return told


def test_what_changed_in_this_tick_of_the_clock_is_not_remembered(subject: Subject) -> None:
    """A second change in the same tick would leave the same stamp; here the file seems to be of the future."""
    tomorrow = time.time() + 86_400
    os.utime(subject.stage("fit") / "stage.json", (tomorrow, tomorrow))
    summarize(subject, STAGES)
    assert not (subject.work / CACHE).exists()


@pytest.mark.parametrize("obstacle", ["cache", "work"])
def test_a_dataset_that_cannot_be_written_is_summarised(subject: Subject, obstacle: str) -> None:
    """A folder or file in the way stops even root, as a read-only file system does."""
    told = uncached(subject)
    shutil.rmtree(subject.work)
    if obstacle == "work":
        subject.work.write_text("no folder")
        shutil.rmtree(subject.stage("train"))  # must not be looked for in there
        assert summarize(subject, STAGES).stages[3].state == "missing"
    else:
        (subject.work / CACHE).mkdir(parents=True)
        time.sleep(0.02)
        assert summarize(subject, STAGES) == told
        assert [path.name for path in subject.work.iterdir()] == [CACHE], "nothing half-written is left"


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b'{"seal": 1, "summary": {}}', b"[" * 100_000, b"\xff\x00"])
def test_a_damaged_cache_is_ignored(subject: Subject, junk: bytes) -> None:
    told = remembered(subject)
    (subject.work / CACHE).write_bytes(junk)
    assert summarize(subject, STAGES) == told


def test_a_cache_with_any_byte_changed_is_ignored(subject: Subject) -> None:
    told = remembered(subject)
    data = bytearray((subject.work / CACHE).read_bytes())
    for place in range(0, len(data), 13):
        changed = data.copy()
        changed[place] ^= 1
        (subject.work / CACHE).write_bytes(changed)
        assert summarize(subject, STAGES) == told


def test_a_copied_or_renamed_subject_is_not_told_by_the_other_ones_cache(subject: Subject) -> None:
    told = remembered(subject)
    copy = Subject(Path(shutil.copytree(subject.root, subject.root.with_name("bert"))))
    assert summarize(copy, STAGES).subject == "bert"
    moved = Subject(subject.root.rename(subject.root.with_name("cleo")))
    assert summarize(moved, STAGES) == module.replace(told, subject="cleo")


# What can happen to a subject between two looks. Each is done at once, in the same tick of the clock as the last look
# or later, and some restore the time stamps as a hostile or careless tool would.


def _in_place(subject: Subject, stage: str, old: bytes, new: bytes) -> None:
    """Change bytes without changing size, inode or mtime."""
    path = subject.stage(stage) / "stage.json"
    if path.exists():
        status = path.stat()
        with open(path, "r+b") as file:
            data = file.read().replace(old, new)
            file.seek(0)
            file.write(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _swap(subject: Subject, one: str, other: str) -> None:
    for source, target in ((one, "swap"), (other, one), ("swap", other)):
        if subject.stage(source).exists():
            subject.stage(source).rename(subject.stage(target))


def _settings(subject: Subject, *changes: str) -> None:
    record = {"schema": 1, "config": override(CONFIG, list(changes)).model_dump(mode="json")}
    write_json(subject.root / "run.json", record)


def _old_cache(subject: Subject) -> None:
    """Keep a cache, and bring it back the next time."""
    kept = subject.root / "kept.json"
    if kept.exists():
        kept.rename(subject.work / CACHE)
    elif (subject.work / CACHE).exists():
        shutil.copy2(subject.work / CACHE, kept)


def _fail(subject: Subject, stage: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        write_json(begin(subject, stage) / "failure.json", {"what": "No.", "fix": "film again", "at": "now"})


CHANGES: dict[str, Callable[[Subject], None]] = {
    "nothing": lambda subject: None,
    "time passes": lambda subject: time.sleep(0.012),
    "a digit changes in place": lambda s: _in_place(s, "evaluate", b'"seconds":30', b'"seconds":40'),
    "and back": lambda s: _in_place(s, "evaluate", b'"seconds":40', b'"seconds":30'),
    "a digest changes in place": lambda s: _in_place(s, "track", b'"digest":"', b'"digesT":"'),
    "a digest changes back": lambda s: _in_place(s, "track", b'"digesT":"', b'"digest":"'),
    "a stage is deleted": lambda s: shutil.rmtree(s.stage("fit"), ignore_errors=True),
    "everything is made again": lambda s: make_finished_subject(s, STAGES, frames=3),
    "more frames": lambda s: make_finished_subject(s, STAGES, frames=4),
    "two stages change places": lambda s: _swap(s, "train", "evaluate"),
    "another source": lambda s: write_json(s.source / "source.json", {"sha256": "0" * 64}),
    "other settings": lambda s: _settings(s, "fit.crop_margin=0.5"),
    "a setting that a stage reads": lambda s: _settings(s, "evaluate.holdout=0.2"),
    "the first settings": _settings,
    "settings of another program": lambda s: (s.root / "run.json").write_text("{}") and None,
    "another head model": lambda s: HEAD.__setitem__(0, "anny 2" if HEAD[0] == "anny 1" else "anny 1"),
    "an attempt": lambda s: begin(s, "fit") and None,
    "a failure": lambda s: _fail(s, "track"),
    "a report": lambda s: s.report.touch(),
    "work is cleared": lambda s: shutil.rmtree(s.work),
    "an old cache comes back": _old_cache,
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(CHANGES)), min_size=2, max_size=12), st.booleans())
def test_whatever_changes_the_cache_never_tells(changes: list[str], newer_track: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subject = make(Path(folder))
        stages = STAGES
        for number, change in enumerate(changes):
            with contextlib.suppress(FileNotFoundError):
                CHANGES[change](subject)
            if newer_track and number == len(changes) // 2:
                stages = toy_stages(track_version=2)
            told = summarize(subject, stages)
            kept = subject.root / "beside"
            with contextlib.suppress(FileNotFoundError):
                os.rename(subject.work / CACHE, kept)
            assert told == summarize(subject, stages), f"after {changes[: number + 1]}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(kept, subject.work / CACHE)
