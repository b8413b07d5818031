"""The stage contract, with every failure it promises to survive really made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.config import Config, override, preset_config
from pipeline.dataset import Dataset, Subject, write_atomic, write_json
from pipeline.errors import Interrupted, StageError, SubjectBusy, UserError
from pipeline.progress import read_progress
from pipeline.stage import (
    Result,
    Stage,
    StageRun,
    Verdict,
    damaged_output,
    inspect_stages,
    publish,
    read_manifest,
    run_stage,
)

CONFIG = preset_config("quick")


class Bench:
    """Two toy stages over a subject: `decode` copies the source, `track` counts its letters, slowly if asked."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.calls: list[str] = []
        self.fail: Exception | None = None
        self.stages = (Stage("decode", 1, (), self.decode), Stage("track", 1, ("decode",), self.track))

    def decode(self, run: StageRun) -> Result:
        self.calls.append("decode")
        text = (self.subject.source / "clip").read_text()
        write_atomic(run.work / "text", text.upper().encode())
        return Result(Verdict("good", "Copied."), {"letters": len(text)})

    def track(self, run: StageRun) -> Result:
        self.calls.append("track")
        text = run.input("decode", "text").read_text()
        for number, letter in enumerate(text):
            path = run.work / "letters" / f"{number:03d}"
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                if self.fail is not None and number == 2:
                    raise self.fail
                self.calls.append(f"letter {number}")
                write_atomic(path, letter.encode())
            run.check_stop()
        return Result(Verdict("good", "Counted."))

    def run(self, config: Config = CONFIG, **options: object) -> list[str]:
        """Run both stages and return what worked."""
        self.calls.clear()
        for stage in self.stages:
            run_stage(self.subject, stage, self.stages, config, **options)  # type: ignore[arg-type]
        return list(self.calls)

    def states(self, config: Config = CONFIG) -> list[str]:
        return [state.name for state in inspect_stages(self.subject, self.stages, config)]


def set_source(subject: Subject, text: str) -> None:
    import hashlib

    subject.source.mkdir(parents=True, exist_ok=True)
    (subject.source / "clip").write_text(text)
    write_json(subject.source / "source.json", {"sha256": hashlib.sha256(text.encode()).hexdigest()})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    subject = Dataset(tmp_path).subject("anna")
    set_source(subject, "abcd")
    return Bench(subject)


def test_runs_once_and_then_is_fresh(bench: Bench) -> None:
    assert bench.states() == ["missing", "waiting"]
    assert bench.run()[0] == "decode"
    assert bench.states() == ["fresh", "fresh"]
    assert bench.run() == []
    assert not list(bench.subject.work.glob("decode-*"))


def test_manifest_tells_what_was_made_from_what(bench: Bench) -> None:
    bench.run()
    manifest = read_manifest(bench.subject.stage("track"))
    assert manifest is not None
    assert {"started", "finished", "seconds", "key", "outputs", "verdict", "metrics"} <= set(manifest)
    assert manifest["inputs"] == {"decode": read_manifest(bench.subject.stage("decode"))["digest"]}  # type: ignore[index]
    assert [entry["path"] for entry in manifest["outputs"]] == [f"letters/{n:03d}" for n in range(4)]


def test_changed_setting_reruns_only_its_stage_when_the_bytes_stay(bench: Bench) -> None:
    bench.run()
    other = override(CONFIG, ["decode.max_frames=7"])
    state = inspect_stages(bench.subject, bench.stages, other)[0]
    assert (state.name, state.why) == ("stale", "decode.max_frames changed from 1800 to 7")
    assert bench.run(other) == ["decode"], "equal bytes keep what follows fresh"


def test_setting_changed_back_is_not_served_from_the_other(bench: Bench) -> None:
    other = override(CONFIG, ["decode.max_frames=7"])
    bench.run()
    bench.run(other)
    assert bench.states() == ["stale", "stale"]
    assert bench.run() == ["decode"]


def test_changed_source_reruns_everything(bench: Bench) -> None:
    bench.run()
    set_source(bench.subject, "wxyz")
    assert bench.run()[0] == "decode"
    assert (bench.subject.stage("track") / "letters" / "000").read_text() == "W"


def test_raised_code_version_makes_stale(bench: Bench) -> None:
    bench.run()
    bench.stages = (Stage("decode", 2, (), bench.decode), bench.stages[1])
    state = inspect_stages(bench.subject, bench.stages, CONFIG)[0]
    assert (state.name, state.why) == ("stale", "the stage's code is version 2, its files are of version 1")


def test_other_data_make_stale(bench: Bench) -> None:
    head = ["one"]
    decode = bench.stages[0]
    bench.stages = (decode, Stage("track", 1, ("decode",), bench.track, data=lambda config: {"head": head[0]}))
    assert bench.run()[:2] == ["decode", "track"]
    manifest = read_manifest(bench.subject.stage("track"))
    assert manifest is not None and manifest["inputs"]["head"] == "one"
    assert bench.run() == []
    head[0] = "two"
    assert bench.states() == ["fresh", "stale"]
    assert "track" in bench.run()


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "manifest"])
def test_damage_is_seen_and_mended(bench: Bench, damage: str) -> None:
    bench.run()
    path = bench.subject.stage("track") / "letters" / "001"
    stat = path.stat()
    match damage:
        case "delete":
            path.unlink()
        case "truncate":
            path.write_bytes(b"")
        case "flip":
            path.write_bytes(b"X")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        case "manifest":
            (bench.subject.stage("track") / "stage.json").write_text('{"schema": 1, "outp')
    assert bench.states()[0] == "fresh"
    assert bench.states()[1] != "fresh"
    assert bench.run()[0] == "track"
    assert path.read_text() == "B"


def test_without_verification_manifests_are_taken_at_their_word(bench: Bench) -> None:
    bench.run()
    (bench.subject.stage("track") / "letters" / "001").write_bytes(b"X")
    believed = inspect_stages(bench.subject, bench.stages, CONFIG, verify=False)
    assert [state.name for state in believed] == ["fresh", "fresh"]
    other = inspect_stages(bench.subject, bench.stages, override(CONFIG, ["decode.max_frames=7"]), verify=False)
    assert [state.name for state in other] == ["stale", "stale"]
    (bench.subject.stage("track") / "stage.json").unlink()
    assert inspect_stages(bench.subject, bench.stages, CONFIG, verify=False)[1].name == "missing"


def test_progress_is_seen_from_outside_while_a_stage_works(bench: Bench) -> None:
    seen = []

    def work(run: StageRun) -> Result:
        with run.reporter.task("count", 3, "letters") as task:
            task.advance()
            seen.append(read_progress(bench.subject.progress))
        if bench.fail is not None:
            raise bench.fail
        return Result(Verdict("good", "Done."))

    stage = Stage("decode", 1, (), work)
    run_stage(bench.subject, stage, (stage,), CONFIG)
    assert not bench.subject.progress.exists()
    bench.fail = StageError("No face.")
    with pytest.raises(StageError):
        run_stage(bench.subject, stage, (stage,), CONFIG, force=True)
    assert not bench.subject.progress.exists()
    assert [told and (told.stage, told.label, told.total) for told in seen] == [("decode", "count", 3)] * 2


def test_dataset_can_be_moved(bench: Bench, tmp_path: Path) -> None:
    bench.run()
    moved = Subject(bench.subject.root.rename(tmp_path / "bea"))
    assert [s.name for s in inspect_stages(moved, bench.stages, CONFIG)] == ["fresh", "fresh"]


def test_failure_keeps_what_was_finished_and_is_resumed(bench: Bench) -> None:
    bench.run()
    set_source(bench.subject, "abxy")
    bench.fail = StageError("No face.", "film again")
    with pytest.raises(StageError, match="No face"):
        bench.run()
    assert (bench.subject.stage("track") / "letters" / "002").read_text() == "C", "the old result is still there"
    failed = inspect_stages(bench.subject, bench.stages, CONFIG)[1]
    assert (failed.name, failed.why, failed.fix) == ("failed", "No face.", "film again")
    assert failed.failed_at is not None
    bench.fail = None
    assert bench.run() == ["track", "letter 2", "letter 3"]
    assert bench.states() == ["fresh", "fresh"]


def test_defect_becomes_a_message_with_stage_and_cause(bench: Bench) -> None:
    bench.fail = ZeroDivisionError("division by zero")
    with pytest.raises(StageError, match=r"Stage 'track' of 'anna' failed: ZeroDivisionError"):
        bench.run()


def test_full_disk_is_said_in_words(bench: Bench) -> None:
    bench.fail = OSError(28, "No space left on device", "letters/002")
    with pytest.raises(StageError, match="No space left on device") as caught:
        bench.run()
    assert "free some space" in caught.value.fix


def test_stop_request_leaves_a_resumable_state(bench: Bench) -> None:
    with pytest.raises(Interrupted):
        bench.run(stop_requested=lambda: "letter 1" in bench.calls)
    assert bench.states() == ["fresh", "partial"]
    assert bench.run() == ["track", "letter 2", "letter 3"]


def test_scratch_and_temporary_files_are_not_published(bench: Bench) -> None:
    def messy(run: StageRun) -> Result:
        (run.scratch / "checkpoint").write_text("x")
        (run.work / ".half.tmp").write_text("x")
        (run.work / "out").write_text("x")
        return Result(Verdict("good", "Done."))

    run_stage(bench.subject, stage := Stage("decode", 1, (), messy), (stage,), CONFIG)
    assert sorted(p.name for p in bench.subject.stage("decode").iterdir()) == ["out", "stage.json"]


def test_finished_but_unpublished_work_is_published_without_working_again(bench: Bench) -> None:
    bench.run()
    manifest = read_manifest(bench.subject.stage("track"))
    assert manifest is not None
    os.rename(bench.subject.stage("track"), bench.subject.work / f"track-{manifest['key'][:16]}")
    assert bench.run() == []
    assert bench.states() == ["fresh", "fresh"]


def test_death_between_the_two_renames_loses_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run()
    set_source(bench.subject, "wxyz")
    real, count = os.rename, 0

    def dies_at_second(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", dies_at_second)
    with pytest.raises(KeyboardInterrupt):
        run_stage(bench.subject, bench.stages[0], bench.stages, CONFIG)
    monkeypatch.undo()
    assert bench.run()[0] == "track", "decode's finished work is published, not made again"


def test_force_runs_a_fresh_stage_again(bench: Bench) -> None:
    bench.run()
    bench.calls.clear()
    run_stage(bench.subject, bench.stages[0], bench.stages, CONFIG, force=True)
    assert bench.calls == ["decode"]


def test_stage_refuses_unfinished_input(bench: Bench) -> None:
    with pytest.raises(StageError, match="needs 'decode', which is missing"):
        run_stage(bench.subject, bench.stages[1], bench.stages, CONFIG)


def test_manifest_cannot_point_outside_its_folder(bench: Bench) -> None:
    bench.run()
    folder = bench.subject.stage("decode")
    manifest = read_manifest(folder)
    assert manifest is not None
    manifest["outputs"][0]["path"] = "../source/clip"
    assert damaged_output(folder, manifest) == "../source/clip lies outside the stage's folder"


def test_subject_is_held_by_one_run_and_freed_by_its_death(bench: Bench) -> None:
    script = "import sys,time; from pathlib import Path; from pipeline.dataset import Subject\n"
    script += "with Subject(Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, bench.subject.root], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert bench.subject.running()
        with pytest.raises(SubjectBusy, match=f"process {holder.pid}"), bench.subject.lock():
            pass
        holder.send_signal(signal.SIGKILL)
    with bench.subject.lock():
        pass
    assert not bench.subject.running()


def test_kill_9_at_random_moments_never_shows_half_a_stage(tmp_path: Path) -> None:
    """A stage of 60 small files is killed again and again; what is published is always whole, and it ends well."""
    script = tmp_path / "work.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, time
            from pathlib import Path
            from pipeline.config import preset_config
            from pipeline.dataset import Subject, write_atomic
            from pipeline.stage import Result, Stage, Verdict, run_stage

            def work(run):
                for number in range(60):
                    path = run.work / f"{number:02d}"
                    if not path.exists():
                        write_atomic(path, str(number).encode() * 1000)
                        time.sleep(0.004)
                return Result(Verdict("good", "Done."))

            subject = Subject(Path(sys.argv[1]))
            print("go", flush=True)
            stage = Stage("decode", 1, (), work)
            run_stage(subject, stage, (stage,), preset_config("quick"))
            """
        )
    )
    subject = Dataset(tmp_path / "data").subject("anna")
    set_source(subject, "abcd")
    kills = 0
    for attempt in range(40):
        with subprocess.Popen([sys.executable, script, subject.root], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.02 + 0.02 * attempt)
            process.send_signal(signal.SIGKILL)
        manifest = read_manifest(subject.stage("decode"))
        if manifest is not None:
            break
        kills += 1
        assert not subject.stage("decode").exists()
    assert kills >= 2, "the stage must really have been killed on its way"
    manifest = read_manifest(subject.stage("decode"))
    assert manifest is not None
    assert damaged_output(subject.stage("decode"), manifest) is None
    assert len(manifest["outputs"]) == 60


def test_publish_clears_other_attempts(bench: Bench) -> None:
    bench.run()
    other = bench.subject.work / "track-0000000000000000"
    other.mkdir()
    work = bench.subject.work / "track-1111111111111111"
    work.mkdir()
    (work / "stage.json").write_text("{}")
    publish(bench.subject, bench.stages[1].name, work)
    assert not other.exists()
    assert not work.exists()


def test_failure_record_is_plain_json(bench: Bench) -> None:
    bench.fail = StageError("No face.", "film again")
    with pytest.raises(StageError):
        bench.run()
    (record,) = bench.subject.work.glob("track-*/failure.json")
    assert json.loads(record.read_text())["fix"] == "film again"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "../x", "a.b", "-x", "x" * 65, "a b", "ä", "a\n"])
def test_unsafe_subject_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be a subject name"):
        Dataset(tmp_path).subject(name)
