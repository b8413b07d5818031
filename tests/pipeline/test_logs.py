"""Structured logs: every line on standard error is one JSON object, from every process of a run."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.logs import JsonFormatter, event, json_line, json_wanted
from pipeline.progress import JsonReporter, default_reporter

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pathlib import Path
from pipeline.config import preset_config
from pipeline.dataset import Subject
from pipeline.isolation import StageProcess
from pipeline.logs import set_up_logging
from pipeline.progress import default_reporter
from stages import STAGES

set_up_logging()
subject = Subject(Path(sys.argv[1]))
with subject.lock() as held, StageProcess(subject, STAGES, 60, held) as process:
    for stage in STAGES[:2]:
        process.run(stage, preset_config("quick"), force=False, device="cpu", threads=1,
                    reporter=default_reporter(subject.name))
"""


def parsed(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert {"time", "level", "event", "text"} <= set(line)
        assert datetime.fromisoformat(line["time"]).utcoffset() == datetime.now(UTC).utcoffset()
    return lines


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HEADCAST_LOG": "json", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_a_line_holds_whatever_a_text_holds() -> None:
    text = 'two\nlines, "quotes", \ud800, \x1b[31m'
    line = json_line("info", "message", text, subject=None, path=Path("a"))
    assert line.count("\n") == 1
    assert json.loads(line) | {"time": ""} == {
        **{"time": "", "level": "info", "event": "message", "text": text, "path": "a"},
    }


def test_records_become_objects_with_their_fields_and_tracebacks() -> None:
    stream = io.StringIO()
    logger, handler = logging.getLogger("pipeline.test_logs"), logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    try:
        logger.warning("%d left", 3)
        logger.warning("Done.", extra=event("stage-end", subject="anna", seconds=1.5, level="error"))
        try:
            raise ZeroDivisionError("by zero")
        except ZeroDivisionError:
            logger.warning("odd", exc_info=True)
    finally:
        logger.removeHandler(handler)
    plain, told, odd = parsed(stream.getvalue())
    assert (plain["level"], plain["event"], plain["text"]) == ("warning", "log", "3 left")
    assert (told["event"], told["subject"], told["seconds"], told["level"]) == ("stage-end", "anna", 1.5, "error")
    assert "traceback" not in told
    assert odd["traceback"].endswith("ZeroDivisionError: by zero")


def test_progress_is_told_in_objects() -> None:
    stream = io.StringIO()
    reporter = JsonReporter(stream, every_seconds=0, subject="anna")
    with reporter.task("track", 2, "frames") as task:
        task.advance(note="face 200 px")
    reporter.message("said")
    progress, end, said = parsed(stream.getvalue())
    assert (progress["event"], progress["task"], progress["done"], progress["total"]) == ("progress", "track", 1, 2)
    assert (end["event"], end["seconds"] >= 0) == ("task-end", True)
    assert (said["event"], said["text"], said["subject"]) == ("message", "said", "anna")


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_LOG", "json")
    assert json_wanted() and isinstance(default_reporter("anna"), JsonReporter)
    monkeypatch.setenv("HEADCAST_LOG", "plain")
    assert not json_wanted() and not isinstance(default_reporter(), JsonReporter)
    monkeypatch.setenv("HEADCAST_LOG", "jsn")
    with pytest.raises(UserError, match="HEADCAST_LOG is 'jsn'"):
        json_wanted()


def test_stages_in_a_process_of_their_own_log_in_objects(tmp_path: Path) -> None:
    (tmp_path / "anna" / "source").mkdir(parents=True)
    (tmp_path / "anna" / ".work").mkdir()
    (tmp_path / "anna" / "source" / "source.json").write_text('{"sha256": "0"}')
    behaviour = json.dumps({"fail": {"anna": "track"}})
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "anna")]
    done = run(command, tmp_path, HEADCAST_STAGES="noop", HEADCAST_NOOP=behaviour)
    logged = [line for line in done.stderr.splitlines() if line.startswith("{")]
    told = [(line["event"], line["stage"]) for line in parsed("\n".join(logged)) if line["event"].startswith("stage-")]
    assert told == [
        *[("stage-begin", "decode"), ("stage-end", "decode"), ("stage-begin", "track"), ("stage-failed", "track")],
    ]
    lines = {line["event"]: line for line in parsed("\n".join(logged))}
    assert (lines["stage-end"]["subject"], lines["stage-end"]["verdict"]) == ("anna", "good")
    assert lines["stage-end"]["seconds"] >= 0
    assert (lines["stage-failed"]["level"], lines["stage-failed"]["subject"]) == ("error", "anna")


def test_the_command_says_its_errors_in_objects(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "run", "gone.mp4"]
    done = run(command, tmp_path)
    (line,) = parsed(done.stderr)
    assert (done.returncode, line["level"], line["event"]) == (2, "error", "error")
    assert "There is no file" in line["text"] and line["fix"]
    done = run(command, tmp_path, HEADCAST_LOG="nonsense")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: HEADCAST_LOG is 'nonsense'.")
