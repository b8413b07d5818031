"""What goes wrong on a machine, done for real: power cuts, full disks, rotten bits, two runs at once, a wrong clock.

After each fault nothing finished is lost, nothing half-written is believed, the same command finishes the job, and the
result equals an undisturbed run. `headcast bench faults` does the same with `kill -9` at random moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from power_cut import Recorder

from pipeline import bench_faults, lease
from pipeline import stage as stage_module
from pipeline.dataset import Dataset, Subject
from pipeline.errors import HeadcastError, StageError, UserError
from pipeline.progress import SilentReporter
from pipeline.run import RunRequest, account, carry_out, hold, last_config, open_subject, prepare
from pipeline.stage import Result, Stage, StageRun, Verdict, damaged_output, inspect_stages, read_manifest, run_stage
from pipeline.summary import age_text, summaries
from pipeline.video import write_video
from stages import noop

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that the source check takes."""
    path = tmp_path_factory.mktemp("clip") / "anna.mp4"
    write_video(path, [np.full((64, 80, 3), shade, np.uint8) for shade in (90, 40, 90)], 25)
    return path


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a thing: flushing, of which there is much here, takes no time there."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        yield Path(folder)


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
def test_power_cut_at_any_moment(clip: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Every state that a disk may be left in, from an empty dataset or while a finished subject is run again."""
    data = memory / "data"
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
        after = memory / str(number)
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=False).returncode
    ):
        pytest.skip("no small file system can be mounted here (that takes root)")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_full_disk_at_any_moment(
    small_disk: Path,
    clip: Path,
    undisturbed: dict[str, tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With less space than a run takes it ends in words, loses nothing, and ends well once there is more."""
    data, filler = small_disk / "data", small_disk / "filler"
    said = set()
    for pages in range(0, 100, 3):
        shutil.rmtree(data, ignore_errors=True)
        disk = os.statvfs(small_disk)
        filler.write_bytes(b"x" * (disk.f_bfree - pages) * disk.f_bsize)
        try:
            run(data, clip)
        except HeadcastError as error:
            assert error.fix
            assert str(small_disk) in error.what, error.what
            said.add(error.fix.partition(",")[0].partition(":")[0])
            finished = {name for name in undisturbed if read_manifest(Subject(data / "anna").stage(name))}
            filler.unlink()
            assert not finished & set(run(data, clip)), "what was finished is not done again"
        else:
            filler.unlink()
        assert keys(Subject(data / "anna")) == undisturbed
        if pages and not said:
            pytest.fail("the disk was never full")
    assert any("free some space" in fix for fix in said)


def finished_with_leftovers(data: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A subject with every kind of file: finished stages, a failed one that was begun again, and caches."""
    subject = Subject(data / "anna")
    run(data, clip)
    shutil.rmtree(subject.stage("export"))
    with monkeypatch.context() as patch:
        patch.setenv("HEADCAST_NOOP", json.dumps({"fail": {"anna": "export"}}))
        with pytest.raises(StageError):
            run(data, clip)
    status(data)  # writes its cache
    return subject


def status(data: Path) -> None:
    """`headcast status` must always have an answer: of all subjects, and of one."""
    for summary in summaries(Dataset(data), noop.STAGES):
        assert summary.subject == "anna"
    with contextlib.suppress(UserError):  # in words, where the source or the settings are gone
        subject = Dataset(data).existing("anna")
        account(subject, inspect_stages(subject, noop.STAGES, last_config(subject)))


def damages(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Ways in which a file goes wrong."""
    found = {
        "emptied": b"",
        "halved": content[: len(content) // 2],
        "zeroed": bytes(len(content)),
        "not text": b"\xff{",
    }
    found |= {"another kind": b"[]", "a number": b"1", "nothing": b"null", "no names": b"{}"}
    for place in {rng.randrange(len(content)) for _ in range(3)} if content else ():
        flipped = content[place] ^ (1 << rng.randrange(8))
        found[f"bit flipped at {place}"] = content[:place] + bytes([flipped]) + content[place + 1 :]
    return found


def test_damage_in_any_file(
    memory: Path, clip: Path, undisturbed: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever file is damaged however: status answers, and a run mends it or says what to do, never a wrong result."""
    whole = memory / "whole"
    subject = finished_with_leftovers(whole, clip, monkeypatch)
    # A lease that cannot be read is watched for 45 s, as another machine may hold it.
    monkeypatch.setattr(lease._stillness, "since", lambda *which: lease.boot_seconds() - 1000)
    rng = random.Random(3)
    files = [path for path in subject.root.rglob("*") if path.is_file()]
    kinds = {path.name for path in files}
    assert {"source.json", "run.json", "stage.json", "failure.json", "summary.json", "lock", "0000"} <= kinds
    seen = set()
    for path in files:
        kind = path.name if path.suffix != "" else path.parent.name[:8] + path.name
        if kind in seen and path.name not in ("stage.json", "failure.json"):
            continue
        seen.add(kind)
        for how, content in damages(path.read_bytes(), rng).items():
            data = memory / "damaged"
            shutil.rmtree(data, ignore_errors=True)
            shutil.copytree(whole, data)
            target = data / path.relative_to(whole)
            target.write_bytes(content)
            where = f"{path.relative_to(whole)} {how}"
            status(data)
            try:
                run(data, clip)
            except HeadcastError as error:
                assert error.fix, where
                if "delete" in error.fix:
                    target.unlink()
                run(data, clip)
            assert keys(Subject(data / "anna")) == undisturbed, where
            assert last_config(Subject(data / "anna")) == last_config(subject), where
            status(data)


def start(data: Path, clip: Path, subject: str = "anna", pace: float = 0.0, **options: Any) -> subprocess.Popen[str]:
    """A run in a process of its own, without Prefect."""
    clock = options.pop("clock", "")
    fields = {"data": str(data), "videos": [str(clip)], "subject": subject, "check": False, **options}
    return subprocess.Popen(
        [*shifted(clock), sys.executable, "-m", "stages", json.dumps(fields)],
        env={**os.environ, **noop_environment(pace), "NO_FAKE_STAT": "1"},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def noop_environment(pace: float) -> dict[str, str]:
    return {"HEADCAST_STAGES": "noop", "HEADCAST_NOOP": json.dumps({"seconds": pace})}


def test_two_runs_at_once(tmp_path: Path, clip: Path, undisturbed: dict[str, tuple[str, str]]) -> None:
    """One of them works; the other is refused or, told to wait, finds everything fresh."""
    outcomes = set()
    for number in range(4):
        wait = number % 2
        both = [start(tmp_path, clip, f"anna-{number}", 0.1, wait_minutes=wait) for _ in range(2)]
        answers = [(process.communicate(timeout=120)[1], process.returncode) for process in both]
        codes = sorted(code for _, code in answers)
        assert codes == [0, 0] if wait else codes in ([0, 0], [0, 2])
        for said, code in answers:
            assert code == 0 or f"Subject 'anna-{number}' is in use by another run" in said
        assert keys(Subject(tmp_path / f"anna-{number}")) == undisturbed
        outcomes.add(tuple(codes))
    assert (0, 2) in outcomes, "the runs never met"


def shifted(clock: str) -> list[str]:
    """What to put before a command that shall see another wall clock."""
    return ["faketime", "-f", clock] if clock else []


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
def test_clock_that_jumps(tmp_path: Path, clip: Path, undisturbed: dict[str, tuple[str, str]]) -> None:
    """Runs under clocks of the future and the past make the same; nothing goes by whose time is later."""
    for clock, last in (("+3y", "track"), ("-2d", "export")):
        process = start(tmp_path, clip, clock=clock, last=last)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 0, said
    subject = Subject(tmp_path / "anna")
    assert keys(subject) == undisturbed
    finished = [read_manifest(subject.stage(name))["finished"] for name in ("track", "export")]  # type: ignore[index]
    assert finished[0] > finished[1], "the clock was really moved"
    assert run(tmp_path, clip) == [], "by the clock of today all is fresh"
    (summary,) = summaries(Dataset(tmp_path), noop.STAGES)
    assert (summary.standing, summary.seconds >= 0) == ("fresh", True)
    assert age_text(summary.last_finished, datetime.now(UTC)) == "just now", "a time to come is no negative age"


@pytest.mark.prefect
def test_stage_that_hangs(tmp_path: Path, clip: Path, undisturbed: dict[str, tuple[str, str]]) -> None:
    """Through the command: ended when its time is up, told in words, shown by `status`, and the next run ends well."""

    def headcast(*arguments: str, **behaviour: Any) -> subprocess.CompletedProcess[str]:
        told = {"HEADCAST_STAGES": "noop", "HEADCAST_NOOP": json.dumps(behaviour)}
        return subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *arguments, "--data", str(tmp_path / "data")],
            env={**os.environ, **told, "PREFECT_HOME": str(tmp_path / "prefect")},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    command = ("run", str(clip), "--no-check", "--stage-minutes", "0.1")
    done = headcast(*command, hang={"anna": "fit"})
    assert done.returncode == 1, done.stderr
    assert "Stage 'fit' of 'anna' was still at work after 0.1 minutes and was ended." in done.stderr
    told = json.loads(headcast("status", "anna", "--json").stdout)
    states = {stage["stage"]: stage["state"] for stage in told["stages"]}
    assert (states["matte"], states["fit"]) == ("fresh", "failed")
    run(tmp_path / "data", clip)
    assert keys(Subject(tmp_path / "data" / "anna")) == undisturbed


def test_kill_9_at_random_moments() -> None:
    """A little of `headcast bench faults`."""
    document = bench_faults.bench(tuple(noop.ORDER), 3, 11, lambda line: None, ("stage", "group", "replace"))
    assert document["whole"], document["kinds"]
    assert document["kills"] >= 3
    assert document["reads"] > 0
