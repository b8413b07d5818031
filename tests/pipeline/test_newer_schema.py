"""A dataset that a newer headcast wrote is left alone, in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.dataset import Dataset, Subject, sealed, write_json
from pipeline.errors import UserError
from pipeline.run import RunRequest, prepare
from pipeline.source import source_paths
from pipeline.stage import inspect_stages, run_stage
from pipeline.summary import summaries
from stages.noop import STAGES


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    subject = Dataset(tmp_path).subject("anna")
    subject.source.mkdir(parents=True)
    subject.work.mkdir()
    write_json(subject.source / "source.json", sealed({"schema": 2, "sha256": "0" * 64, "clips": []}))
    write_json(subject.root / "run.json", sealed({"schema": 1, "config": Config().model_dump(mode="json")}))
    run_stage(subject, STAGES[0], STAGES, Config())
    return subject


def raise_schema(path: Path, seal: Callable[[dict[str, object]], dict[str, object]] = sealed) -> None:
    """Let a record be of a schema to come."""
    record = json.loads(path.read_bytes())
    record.pop("seal", None)
    write_json(path, seal({**record, "schema": 99}))


LOOKS: dict[str, Callable[[Subject], object]] = {
    "run.json": lambda subject: prepare(RunRequest(data=subject.root.parent, subject="anna"), STAGES),
    "source/source.json": source_paths,
    "decode/stage.json": lambda subject: inspect_stages(subject, STAGES, Config()),
}


@pytest.mark.parametrize("name", LOOKS)
def test_whoever_reads_it_refuses_it(subject: Subject, name: str) -> None:
    raise_schema(subject.root / name)
    with pytest.raises(UserError, match=r"made by a newer headcast: its schema is 99, and this one knows [12]"):
        LOOKS[name](subject)


@pytest.mark.parametrize("name", ["run.json", "decode/stage.json"])
def test_status_tells_it_of_the_one_subject(subject: Subject, name: str) -> None:
    raise_schema(subject.root / name)
    [summary] = summaries(Dataset(subject.root.parent), STAGES)
    assert summary.standing == "unreadable"
    assert "newer headcast" in summary.why


def test_a_named_preset_does_not_write_over_newer_settings(subject: Subject) -> None:
    raise_schema(subject.root / "run.json")
    with pytest.raises(UserError, match="newer headcast"):
        prepare(RunRequest(data=subject.root.parent, subject="anna", preset="quick"), STAGES)


def test_a_stage_does_not_work_over_newer_files(subject: Subject) -> None:
    raise_schema(subject.stage("decode") / "stage.json")
    with pytest.raises(UserError, match="newer headcast"):
        run_stage(subject, STAGES[0], STAGES, Config())


def test_a_flipped_bit_is_damage_and_no_newer_schema(subject: Subject) -> None:
    raise_schema(subject.stage("decode") / "stage.json", seal=lambda record: {**record, "seal": "0" * 64})
    assert inspect_stages(subject, STAGES, Config())[0].name == "missing"
