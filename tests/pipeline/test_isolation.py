"""Stages in a process of their own: the same files, a limit that holds, a death that is told, no child left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config import Config
from pipeline.dataset import Dataset, Subject, write_json
from pipeline.errors import Interrupted, LeaseLost, StageDied, StageError, StageTimeout
from pipeline.isolation import StageProcess
from pipeline.lease import Times
from pipeline.mirror import Mirror
from pipeline.progress import PlainReporter, SilentReporter
from pipeline.run import RunRequest, stage_worker
from pipeline.stage import inspect_stages, run_stage
from stages import noop

DECODE, TRACK = noop.STAGES[:2]


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setenv("HEADCAST_STAGES", "noop")
    subject = Dataset(tmp_path).subject("anna")
    subject.source.mkdir(parents=True)
    write_json(subject.source / "source.json", {"sha256": "0" * 64})
    return subject


def behave(monkeypatch: pytest.MonkeyPatch, **behaviour: Any) -> None:
    monkeypatch.setenv("HEADCAST_NOOP", json.dumps(behaviour))


@pytest.fixture
def child(subject: Subject) -> Iterator[StageProcess]:
    with subject.lock() as held, StageProcess(subject, noop.STAGES, 60, held) as child:
        yield child


def work(child: StageProcess, stage: Any = DECODE, **options: Any) -> dict[str, Any]:
    how: dict[str, Any] = {"force": False, "device": "cpu", "threads": 1, "reporter": SilentReporter(), **options}
    return child.run(stage, Config(), **how)


def descendants(process: int | None = None) -> set[int]:
    """The children of this process, or of another, and theirs."""
    return {child.pid for child in psutil.Process(process).children(recursive=True)}


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.05)


def test_same_files_as_in_the_run_itself(subject: Subject, child: StageProcess, tmp_path: Path) -> None:
    one, two = work(child), work(child, TRACK)
    other = Dataset(tmp_path / "other").subject("anna")
    other.source.mkdir(parents=True)
    write_json(other.source / "source.json", {"sha256": "0" * 64})
    other.work.mkdir()
    alike = [run_stage(other, stage, noop.STAGES, Config()) for stage in (DECODE, TRACK)]
    assert [one["digest"], two["digest"]] == [manifest["digest"] for manifest in alike]
    assert (subject.stage("track") / "0000").is_file()


def test_progress_and_messages_come_through(
    subject: Subject, child: StageProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    work(child, reporter=PlainReporter())
    assert "decode: 2/2 steps (100 %)" in capsys.readouterr().err


def test_error_comes_through_in_words(subject: Subject, child: StageProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(monkeypatch, fail={"anna": "decode"})
    with pytest.raises(StageError, match=r"No face in any of 12 frames\.") as caught:
        work(child)
    assert (caught.value.fix, caught.value.retryable) == ("film the face", False)


def test_limit_ends_a_stage_that_hears_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(monkeypatch, hang={"anna": "decode"})
    with subject.lock() as held, StageProcess(subject, noop.STAGES, 6, held) as child:
        before = descendants()
        with pytest.raises(StageTimeout, match=r"'decode' of 'anna' was still at work after 0\.1 minutes"):
            work(child)
        assert descendants() <= before
    state = inspect_stages(subject, noop.STAGES, Config())[0]
    assert (state.name, "still at work" in state.why) == ("failed", True)


def test_killed_child_is_told_and_the_next_attempt_resumes(
    subject: Subject, child: StageProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, steps=40, seconds=8)

    def kill() -> bool:
        if list(subject.work.glob("decode-*/0003")):
            for process in descendants():
                os.kill(process, signal.SIGKILL)
        return False

    with pytest.raises(StageDied, match="was killed by signal 9") as caught:
        work(child, stop_requested=kill)
    assert caught.value.retryable
    kept = (next(subject.work.glob("decode-*")) / "0002").stat().st_mtime_ns
    behave(monkeypatch, steps=40)
    manifest = work(child)
    assert manifest["resumed"]
    assert (subject.stage("decode") / "0002").stat().st_mtime_ns == kept


def test_stop_is_passed_on_and_obeyed(subject: Subject, child: StageProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(monkeypatch, steps=100, seconds=60)
    with pytest.raises(Interrupted):
        work(child, stop_requested=lambda: bool(list(subject.work.glob("decode-*/0002"))))
    assert inspect_stages(subject, noop.STAGES, Config())[0].name in ("partial", "running")


def test_a_subject_that_is_lost_stops_the_child(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(monkeypatch, steps=100, seconds=60)

    def lose() -> None:
        wait_for(lambda: list(subject.work.glob("decode-*/0002")))
        next(subject.work.glob("lease-*")).unlink()

    request = RunRequest(data=subject.root.parent, subject="anna", stage_minutes=10, threads=1)
    silent = SilentReporter()
    with subject.lock(times=Times(renew=0.2, period=20.0)) as held, ThreadPoolExecutor() as other:
        other.submit(lose)
        with (
            stage_worker(request, subject, noop.STAGES, Config(), held, Mirror(subject, silent), silent) as work_on,
            pytest.raises(LeaseLost, match="its lease was removed"),
        ):
            work_on(DECODE)
    assert inspect_stages(subject, noop.STAGES, Config())[0].name == "partial"


RUN = """
import sys
from pathlib import Path
from pipeline.config import Config
from pipeline.dataset import Subject
from pipeline.isolation import StageProcess
from pipeline.progress import SilentReporter
from stages import STAGES
subject = Subject(Path(sys.argv[1]))
with subject.lock() as held, StageProcess(subject, STAGES, 600, held) as child:
    child.run(STAGES[0], Config(), force=False, device="cpu", threads=1, reporter=SilentReporter())
"""


def test_child_ends_with_a_killed_run_and_holds_the_lock_until_then(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, hang={"anna": "decode"})
    run = subprocess.Popen([sys.executable, "-c", RUN, str(subject.root)])
    wait_for(lambda: list(subject.work.glob("decode-*")))
    (child,) = descendants(run.pid)
    os.kill(child, signal.SIGSTOP)
    wait_for(lambda: psutil.Process(child).status() == psutil.STATUS_STOPPED)
    run.kill()
    run.wait()
    assert subject.running(), "the child still lives, though it is stopped"
    os.kill(child, signal.SIGCONT)
    wait_for(lambda: gone(child))
    assert not subject.running()
