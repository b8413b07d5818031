"""What a night decides to do, in which order, what it leaves alone and why, and its account in the morning."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_store import publish_manifests
from pydantic import ValidationError

from pipeline.batch import Outcome
from pipeline.bench_status import make_finished_subject
from pipeline.dataset import Dataset, Subject, write_json
from pipeline.errors import UserError
from pipeline.nightly import (
    MEMORY,
    Candidate,
    Night,
    NightlyRequest,
    Plan,
    plan,
    plan_document,
    plan_table,
    remember_night,
)
from pipeline.run import RunRequest, hold, last_config, open_subject, resolve_config
from pipeline.stage import inspect_stages, work_folder
from pipeline.store import open_store
from pipeline.video import write_video
from stages.noop import STAGES


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def finished(data: Path, name: str, day: int = 1) -> Subject:
    """A subject that was finished on a day of January."""
    subject = Dataset(data).subject(name)
    make_finished_subject(subject, STAGES, frames=1)
    for stage in STAGES:
        edit(subject, stage.name, finished=f"2026-01-{day:02d}T00:00:00.000+00:00")
    return subject


def edit(subject: Subject, stage: str, **changes: Any) -> None:
    path = subject.stage(stage) / "stage.json"
    write_json(path, json.loads(path.read_bytes()) | changes)


def begin(subject: Subject, stage: str) -> Path:
    """A work folder of the stage for the key that it has now."""
    number = [each.name for each in STAGES].index(stage)
    key = inspect_stages(subject, STAGES, last_config(subject), verify=False)[number].key
    work = work_folder(subject, STAGES[number], str(key))
    work.mkdir(parents=True)
    return work


def fail(subject: Subject, stage: str) -> None:
    """As if the stage had failed on the 6th of January."""
    record = {"what": "No face in any of 12 frames.", "fix": "film the face", "at": "2026-01-06T00:00:00+00:00"}
    write_json(begin(subject, stage) / "failure.json", record)


def stale(subject: Subject, stage: str) -> None:
    edit(subject, stage, version=0, key="0" * 64)


def planned(data: Path, **options: Any) -> dict[str, Candidate]:
    return {each.subject: each for each in plan(NightlyRequest(data=data, **options), STAGES).candidates}


@pytest.fixture
def clip(tmp_path: Path) -> Callable[..., Path]:
    """Makes small videos in the inbox, each of another shade, that arrived an hour ago."""
    shades = iter(range(20, 250, 5))

    def make(name: str, hours_ago: float = 1.0) -> Path:
        path = tmp_path / "inbox" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, [np.full((64, 64, 3), next(shades), np.uint8)] * 3, 25)
        arrived = time.time() - 3600 * hours_ago
        os.utime(path, (arrived, arrived))
        return path

    return make


def registered(data: Path, video: Path) -> Subject:
    """A subject whose source this video is."""
    request = RunRequest(data=data, videos=(video,))
    subject = request.target()
    with hold(subject):
        open_subject(request, subject, resolve_config(request, subject))
    return subject


def test_what_is_not_fresh_is_found_and_the_one_that_waits_longest_comes_first(data: Path) -> None:
    finished(data, "anna", 1)
    stale(finished(data, "bert", 5), "train")
    begun = finished(data, "carl", 3)
    stale(begun, "fit")
    begin(begun, "fit")
    failed = finished(data, "dora", 4)
    stale(failed, "track")
    fail(failed, "track")
    found = planned(data)
    assert [(name, each.reason) for name, each in found.items()] == [
        ("carl", "partial"),
        ("bert", "stale"),
        ("dora", "failed"),  # it waits since it failed
    ]
    assert found["dora"].why == "track: No face in any of 12 frames."
    assert found["bert"].waiting_since == datetime(2026, 1, 5, tzinfo=UTC)
    assert "version" in found["bert"].why
    assert all(not each.left for each in found.values())
    assert found["bert"].run.subject == "bert"
    assert found["bert"].run.preset is None, "subjects that are there keep their settings"


def test_one_that_a_run_holds_is_nobodys_business(data: Path) -> None:
    subject = finished(data, "anna")
    stale(subject, "fit")
    with subject.lock():
        # The lock is asked for from another process, as a night does.
        if os.fork() == 0:
            os._exit(len(planned(data)))
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    assert list(planned(data)) == ["anna"]


def test_files_are_read_only_when_asked_to(data: Path) -> None:
    finished(data, "anna")  # its manifests list files that are not there
    assert planned(data) == {}
    assert planned(data, verify=True)["anna"].reason == "stale"
    assert "is missing" in planned(data, verify=True)["anna"].why


def test_settings_that_cannot_be_read_are_left_with_what_to_do(data: Path) -> None:
    (finished(data, "anna").root / "run.json").write_text("{")
    found = planned(data)["anna"]
    assert (found.reason, found.seconds) == ("failed", None)
    assert "name a preset" in found.left


def test_what_arrived_is_new_until_it_is_in_the_dataset_as_it_is(data: Path, clip: Callable[..., Path]) -> None:
    inbox = clip("anna.mp4", hours_ago=2).parent
    known, other = clip("bert.mp4"), clip("carl.mp4")
    for video in (known, other):
        registered(data, video)
    clip("carl.mp4", hours_ago=3)
    clip("dora/1.mp4")
    clip("dora/2.mp4", hours_ago=0)
    (inbox / "emil.mp4").write_text("no video\n" * 99)
    whole = plan(NightlyRequest(data=data, inbox=inbox, preset="standard"), STAGES)
    found = {each.subject: each for each in whole.candidates}
    assert {name: each.reason for name, each in found.items()} == {
        "anna": "new",
        "bert": "new",  # known, and none of its stages has run yet
        "carl": "stale",
        "dora": "new",
    }
    assert found["carl"].why == "its video was changed"
    assert [path.name for path in found["anna"].run.videos] == ["anna.mp4"]
    assert found["anna"].run.preset == "standard"
    assert not found["bert"].run.videos
    assert found["dora"].left == "it is still arriving"
    assert found["anna"].left == ""
    (fault,) = whole.faults
    assert "emil.mp4" in fault
    assert not (data / "anna").exists(), "a plan makes nothing"


def test_an_inbox_that_is_none_is_refused_and_an_empty_one_is_not(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        planned(data, inbox=tmp_path / "gone")
    (tmp_path / "inbox").mkdir()
    assert plan(NightlyRequest(data=data, inbox=tmp_path / "inbox"), STAGES) == Plan(())


def test_time_is_expected_as_manifests_tell(data: Path, clip: Callable[..., Path]) -> None:
    own = finished(data, "anna")
    edit(own, "train", seconds=100.0)
    stale(own, "fit")
    assert planned(data)["anna"].seconds == 30 + 100 + 30 + 30, "fit and what follows, as they took before"
    for name, seconds in (("bert", 60.0), ("carl", 61.0)):
        edit(finished(data, name), "decode", seconds=seconds)
    inbox = clip("dora.mp4").parent
    expected = 60 + 5 * 30 + 30  # the middle of three
    assert planned(data, inbox=inbox, preset="quick")["dora"].seconds == expected
    assert planned(data, inbox=inbox, preset="best")["dora"].seconds is None, "nobody took that budget before"


def test_who_fails_night_after_night_is_left_alone_until_something_changes(
    data: Path, clip: Callable[..., Path]
) -> None:
    subject = finished(data, "anna")
    stale(subject, "track")
    fail(subject, "track")
    video = clip("bert.mp4")
    request = NightlyRequest(data=data, inbox=video.parent, max_failures=2)

    def night(*outcomes: Outcome) -> dict[str, str]:
        remember_night(request, plan(request, STAGES).due, outcomes, STAGES)
        return {each.subject: each.left for each in plan(request, STAGES).candidates}

    anna = Outcome("anna", "failed", stage="track", what="No face.")
    bert = Outcome("bert", "failed", what="The capture check says: no face.")
    assert night(anna, bert) == {"anna": "", "bert": ""}
    assert night(Outcome("anna", "stopped")) == {"anna": "", "bert": ""}, "a stop is no failure"
    left = night(anna, bert)
    assert left["anna"] == left["bert"]
    assert left["anna"].startswith("failed in 2 nights in a row; change its video or settings")
    assert planned(data, max_failures=3)["anna"].left == ""
    clip("bert.mp4", hours_ago=5)
    edit(subject, "decode", digest="1" * 64)  # what track is made from
    assert {each.subject: each.left for each in plan(request, STAGES).candidates} == {"anna": "", "bert": ""}


def test_a_night_that_goes_well_is_forgiven(data: Path) -> None:
    subject = finished(data, "anna")
    stale(subject, "track")
    fail(subject, "track")
    request = NightlyRequest(data=data, max_failures=1)
    due = plan(request, STAGES).due
    remember_night(request, due, [Outcome("anna", "failed", stage="track", what="No face.")], STAGES)
    assert planned(data, max_failures=1)["anna"].left
    remember_night(request, due, [Outcome("anna", "done")], STAGES)
    assert not planned(data, max_failures=1)["anna"].left


@pytest.mark.parametrize(
    "content", ["", "[]", '{"failures": []}', '{"failures": {"anna": 3}}', '{"failures": {"anna": {}}}']
)
def test_a_memory_that_cannot_be_read_holds_nothing_against_anyone(data: Path, content: str) -> None:
    stale(finished(data, "anna"), "fit")
    (data / MEMORY).write_text(content)
    assert planned(data)["anna"].left == ""


def test_a_request_is_refused_as_it_is_submitted() -> None:
    for fields in ({"budget_hours": 0}, {"max_failures": 0}, {"colour": 1}, {"cluster": "tcp://h:1"}):
        with pytest.raises(ValidationError):
            NightlyRequest.model_validate(fields)
    assert all(field["description"] for field in NightlyRequest.model_json_schema()["properties"].values())


def test_the_plan_in_lines(data: Path) -> None:
    stale(finished(data, "anna", 2), "fit")
    stale(finished(data, "bert", 1), "evaluate")
    request = NightlyRequest(data=data, budget_hours=60 / 3600, workers=1)
    first, second, last = plan_table(plan(request, STAGES), request).splitlines()
    assert first.startswith("1. bert: stale, since 2026-01-01 00:00, takes about 30 s (evaluate: ")
    assert second.startswith(
        "2. anna: stale, since 2026-01-02 00:00, takes about 2 min; more than the budget may hold ("
    )
    assert last == "2 subjects to do, about 2 min of work known."
    document = json.loads(json.dumps(plan_document(plan(request, STAGES))))
    assert document["candidates"][0]["waiting_since"] == "2026-01-01T00:00:00+00:00"


def test_the_account_in_the_morning() -> None:
    night = Night(
        (
            Outcome("anna", "done", 61.0, 34.7),
            Outcome("bert", "failed", stage="track", what="<b>No *face*</b>\n# in", fix="film the face"),
            Outcome("carl", "stopped"),
        ),
        (("dora", "takes about 900 s, and 60 s of the budget were left"),),
        ("inbox/emil.mp4: it is no video",),
        7.5,
        8,
    )
    page = night.markdown()
    assert page.startswith("7.5 of 8 hours used: 1 done, 1 failed, 2 left.\n")
    assert r"- bert: failed in track: \<b\>No \*face\*\</b\> \# in -\> film the face" in page
    assert "- dora: takes about 900 s" in page
    assert "- carl: stopped; it goes on where it was" in page
    assert "- inbox/emil.mp4: it is no video" in page
    document = json.loads(json.dumps(night.to_json()))
    assert document["left"] == [{"subject": "dora", "why": night.left[0][1]}]
    assert document["summary"] == page
    assert [entry["outcome"] for entry in document["subjects"]] == ["done", "failed", "stopped"]


def test_a_store_counts_with_what_is_known_here(data: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in ("anna", "bert", "cleo", "dora"):
        finished(elsewhere, name)
    for name in ("anna", "bert", "cleo"):
        finished(data, name)
    stale(Dataset(elsewhere).subject("bert"), "fit")
    stale(Dataset(elsewhere).subject("dora"), "export")
    stale(Dataset(elsewhere).subject("cleo"), "train")
    stale(Dataset(data).subject("cleo"), "train")
    fail(Dataset(data).subject("cleo"), "train")
    stale(Dataset(data).subject("anna"), "fit")
    finished(data, "emil")
    store = open_store(f"memory://{tmp_path.name}")
    publish_manifests(store, Dataset(elsewhere))
    told = planned(data, store=store.url)
    assert {name: each.reason for name, each in told.items()} == {
        "bert": "partial",
        "cleo": "failed",
        "dora": "stale",
        "emil": "partial",
    }, "anna is fresh there, whatever is here"
    assert told["emil"].why == f"finished here, not in '{store.url}' yet"
    assert told["dora"].run.store == store.url
