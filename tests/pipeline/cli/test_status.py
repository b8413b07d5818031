"""`headcast status` and `page`: one line a subject, one subject in detail, and watching both."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import publish_manifests

from pipeline.bench_status import make_finished_subject
from pipeline.cli.status import Page, Status
from pipeline.config import preset_config
from pipeline.dataset import Dataset, Subject, write_json
from pipeline.errors import UserError
from pipeline.run import account
from pipeline.stage import inspect_stages
from pipeline.store import DatasetStore, open_store
from stages import STAGES

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """`anna` and `bert`, finished as their manifests say; their files were never made."""
    for name in ("anna", "bert"):
        make_finished_subject(Dataset(tmp_path).subject(name), STAGES, frames=2)
    return tmp_path


@pytest.fixture
def running(data: Path) -> Iterator[Subject]:
    """`bert` held by a run that is half way through its training."""
    subject = Dataset(data).subject("bert")
    shutil.rmtree(subject.stage("train"))
    with subject.lock():
        write_progress(subject, 5)
        yield subject


def write_progress(subject: Subject, done: int) -> None:
    record = {"stage": "train", "label": "train", "done": done, "total": 10, "unit": "steps", "note": "1 \x1b[31mdB"}
    write_json(subject.progress, record)


def watch(data: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pipeline.cli",
        "status",
        *arguments,
        "--data",
        str(data),
        "--watch",
        "--every",
        "0.2",
    ]


def test_a_line_for_each_subject_and_how_many_stand_how(data: Path, running: Subject) -> None:
    _, text, code = Status(data=data).answer()
    head, anna, bert, total = text.splitlines()
    assert code == 0
    assert head.split() == ["subject", "standing", "verdict", "dB", "(best", "baseline)", "age", "why"]
    assert anna.split()[:2] == ["anna", "fresh"]
    assert bert.endswith("train: 5/10 steps (50 %), 1  [31mdB"), "a file cannot drive the terminal"
    assert total.startswith("2 subjects: 1 fresh, 1 running; ")


def test_what_has_failed_comes_with_its_command(data: Path) -> None:
    (data / "anna" / "run.json").write_text("{")
    _, text, _ = Status(data=data).answer()
    assert "cannot be read as this version's settings. -> name a preset" in text


def test_documents_of_all_subjects_have_the_keys_of_a_single_one(data: Path) -> None:
    document, _, _ = Status(data=data, json=True).answer()
    assert json.loads(json.dumps(document)) == document
    whole = document["subjects"][0]
    subject = Dataset(data).subject("anna")
    single = account(subject, inspect_stages(subject, STAGES, preset_config("quick"), verify=False))
    assert set(single) <= set(whole)
    assert {name: whole[name] for name in single if name != "stages"} == {
        name: value for name, value in single.items() if name != "stages"
    }
    for ours, theirs in zip(whole["stages"], single["stages"], strict=True):
        assert ours == {**theirs, "metrics": None}


def test_files_are_read_for_one_subject_and_when_asked(data: Path) -> None:
    assert "2 subjects: 2 fresh" in Status(data=data).answer()[1]
    told, text, _ = Status(data=data, verify=True).answer()
    assert "2 subjects: 2 stale" in text
    assert told["subjects"][0]["why"] == "decode: frames/000000.jpg is missing"
    assert "2 subjects: 2 fresh" in Status(data=data).answer()[1], "what was read is not remembered as believed"
    document, _, _ = Status(data=data, subject="anna").answer()
    assert document["stages"][0]["why"] == "frames/000000.jpg is missing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json": True}, "--watch does not go with --json"),
        ({"verify": True}, "--watch does not go with --verify"),
        *(({"every": seconds}, "--every is") for seconds in (0.0, -1.0, float("nan"), float("inf"))),
        ({"subject": "nobody"}, "No subject 'nobody'"),
    ],
)
def test_watching_refuses_what_makes_no_sense(data: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Status(data=data, watch=True, **options).answer()  # type: ignore[arg-type]


def test_watching_redraws_in_a_terminal_until_ctrl_c(data: Path, running: Subject) -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen(watch(data), cwd=ROOT, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        assert "train: 5/10 steps" in read_until(leader, "train: 5/10")
        write_progress(running, 9)
        assert "train: 9/10 steps" in read_until(leader, "train: 9/10")
        process.send_signal(signal.SIGINT)
        rest = read_until(leader, None)
    os.close(leader)
    assert process.returncode == 0
    assert "2 subjects: " in rest and "Traceback" not in rest


def read_until(leader: int, text: str | None) -> str:
    """What the terminal shows until it has shown a text, or all there is."""
    seen, end = "", time.monotonic() + 60
    while time.monotonic() < end and (text is None or text not in seen):
        if select.select([leader], [], [], 0.5)[0]:
            try:
                seen += os.read(leader, 65536).decode()
            except OSError:  # the other side is gone
                break
    return seen


def test_watching_writes_what_changes_where_there_is_no_terminal(data: Path, running: Subject) -> None:
    with subprocess.Popen(watch(data, "bert"), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(9)]
        write_progress(running, 9)
        assert process.stdout.readline().startswith("  now      train: 9/10 steps (90 %)"), "only what is new"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.returncode == 0
    assert lines[0].startswith("bert  (")
    assert lines[8].startswith("  now      train: 5/10 steps (50 %)")


def test_the_page_is_written_and_named(data: Path) -> None:
    document, text, code = Page(data=data).answer()
    assert (text, code) == (str(data / "index.html"), 0)
    assert Path(document["page"]).is_file() and Path(document["metrics"]).is_file()
    with pytest.raises(UserError, match="There is no data folder"):
        Page(data=data / "gone").answer()


@pytest.fixture
def store(data: Path) -> DatasetStore:
    """What publishes `anna` and `bert` on an object store, and none of their files."""
    (data / "anna" / "report.html").write_text("report")
    store = open_store(f"memory://{data.name}")
    publish_manifests(store, Dataset(data))
    return store


def test_a_store_tells_the_same_as_the_dataset(data: Path, store: DatasetStore) -> None:
    shutil.rmtree(data / "bert" / "train")
    store.fs.rm(f"{store.root}/bert/train.json")
    document, text, code = Status(store=store.url).answer()
    local = Status(data=data).answer()
    for mine, theirs in zip(document["subjects"], local[0]["subjects"], strict=True):
        assert {**mine, "folder": None, "report": None} == {**theirs, "folder": None, "report": None}
    assert (text, code) == local[1:]
    assert document["subjects"][0]["folder"] == f"{store.url}/anna"
    assert [subject["report"] for subject in document["subjects"]] == [f"{store.url}/anna/report.html", None]


def test_one_subject_of_a_store_is_told_in_detail(store: DatasetStore) -> None:
    document, text, _ = Status(store=store.url, subject="anna").answer()
    assert document["subject"] == "anna"
    assert text.startswith(f"anna  ({store.url}/anna)\n")
    with pytest.raises(UserError, match=f"No subject 'cleo' in '{store.url}'"):
        Status(store=store.url, subject="cleo").answer()
    with pytest.raises(UserError, match="--store does not go with --verify"):
        Status(store=store.url, verify=True).answer()
    with pytest.raises(UserError, match="is no URL of a store"):
        Status(store="data").answer()
