"""The subject flow on Prefect's embedded server, with toy stages in place of the real ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, s3_server, set_source

from pipeline.dataset import Dataset, Subject, write_atomic, write_json
from pipeline.errors import StageError, SubjectBusy, Unavailable, UserError
from pipeline.run import RunRequest
from pipeline.stage import Result, Stage, StageRun, Verdict

pytestmark = pytest.mark.prefect


class Toys:
    """Stand-ins for decode and track that write one file each, and fail when told to."""

    def __init__(self) -> None:
        self.worked: list[str] = []
        self.fail = ""
        self.flaky = 0
        self.stages = (Stage("decode", 1, (), self.run), Stage("track", 1, ("decode",), self.run))

    def run(self, run: StageRun) -> Result:
        name = run.work.name.partition("-")[0]
        if name == self.fail:
            raise StageError("No face in any of 12 frames.", "film the face")
        if name == "track" and self.flaky:
            self.flaky -= 1
            raise Unavailable("The file server did not answer.")
        self.worked.append(name)
        write_atomic(run.work / "out", name.encode())
        return Result(Verdict("good", f"{name}: good."))


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home and an embedded server of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.delenv("PREFECT_API_URL", raising=False)
        from prefect.testing.utilities import prefect_test_harness

        import flows.subject  # noqa: F401  sets the quiet environment before Prefect is imported

        with prefect_test_harness(server_startup_timeout=180):
            yield


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Toys:
    import flows.subject

    toys = Toys()
    monkeypatch.setattr(flows.subject, "STAGES", toys.stages)
    monkeypatch.setattr(flows.subject, "build_report", lambda subject, stages, config: None)
    return toys


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    subject = Dataset(tmp_path).subject("anna")
    subject.source.mkdir(parents=True)
    write_json(subject.source / "source.json", {"sha256": "0" * 64})
    return subject


def run(subject: Subject, **options: str) -> list[str]:
    from flows.subject import subject_flow

    return subject_flow(RunRequest(data=subject.root.parent, subject=subject.name, **options))  # type: ignore[arg-type]


def task_states() -> dict[str, str]:
    """Name and state of the newest flow run's tasks."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        newest = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
        only = FlowRunFilter(id=FlowRunFilterId(any_=[newest.id]))
        tasks = client.read_task_runs(flow_run_filter=only)
    return {task.name.rpartition("-")[0]: str(task.state_name) for task in tasks}


def test_second_run_is_cached_and_damage_runs_again(toys: Toys, subject: Subject) -> None:
    assert run(subject) == ["decode", "track"]
    assert run(subject) == []
    assert task_states() == {"decode": "Cached", "track": "Cached"}
    (subject.stage("track") / "out").unlink()
    assert run(subject) == ["track"]
    assert task_states() == {"decode": "Cached", "track": "Completed"}


def test_failed_stage_is_failed_for_prefect_and_rerun_goes_on_there(toys: Toys, subject: Subject) -> None:
    toys.fail = "track"
    with pytest.raises(StageError, match="No face in any of 12 frames") as caught:
        run(subject)
    assert caught.value.fix == "film the face"
    assert task_states() == {"decode": "Completed", "track": "Failed"}
    toys.fail = ""
    assert run(subject) == ["track"]


def test_first_forces_its_stage_and_equal_bytes_keep_the_rest(toys: Toys, subject: Subject) -> None:
    run(subject)
    assert run(subject, first="decode") == ["decode"]


def test_last_ends_the_run_there(toys: Toys, subject: Subject) -> None:
    assert run(subject, last="decode") == ["decode"]
    assert not subject.stage("track").exists()


def kept_results(store: str) -> list[Any]:
    """What lies under `.results` in a store; anything but JSON is an error."""
    import fsspec

    files, root = fsspec.url_to_fs(f"{store}/.results")
    return [json.loads(files.cat_file(path)) for path in files.find(root)]


def test_results_are_kept_in_the_store_as_json(toys: Toys, subject: Subject) -> None:
    from flows.results import results_in
    from flows.subject import subject_flow

    set_source(subject, "abcd")
    with s3_server():
        store = f"s3://{BUCKET}/results"
        flow = subject_flow.with_options(**results_in(store))
        request = RunRequest(data=subject.root.parent, subject=subject.name, store=store)
        state = flow(request, return_state=True)
        assert state.result() == ["decode", "track"]
        assert kept_results(store) == [["decode", "track"]], "and nothing of the stages, whose manifests tell"
        toys.fail = "track"
        state = flow(request.model_copy(update={"first": "track"}), return_state=True)
        with pytest.raises(Exception, match="No face in any of 12 frames"):
            state.result()
        assert any("No face" in json.dumps(result) for result in kept_results(store))


def test_every_run_of_a_server_keeps_its_result_in_the_shared_store(toys: Toys, subject: Subject) -> None:
    from prefect.client.orchestration import get_client

    from flows.results import share_results

    store = f"memory://{subject.root.parent.name}"
    share_results(store)
    try:
        assert run(subject) == ["decode", "track"]
        assert kept_results(store) == [["decode", "track"]]
    finally:
        with get_client(sync_client=True) as client:
            client.clear_server_default_result_storage()


def test_two_runs_of_one_subject_do_not_mix(toys: Toys, subject: Subject) -> None:
    with subject.lock(), pytest.raises(SubjectBusy, match="'anna' is in use"):
        run(subject)
    assert toys.worked == []


def test_what_can_pass_is_tried_again_and_the_rest_is_not(
    toys: Toys, subject: Subject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows.steps.BACKOFF_SECONDS", 0.01)
    toys.flaky = 2
    assert run(subject) == ["decode", "track"]
    assert capsys.readouterr().err.count("track: The file server did not answer. Trying again") == 2
    toys.fail = "track"
    with pytest.raises(StageError):
        run(subject, first="track")
    assert "Trying again" not in capsys.readouterr().err


def test_route_without_a_deployment_is_told(toys: Toys, subject: Subject) -> None:
    from flows.subject import subject_flow

    request = RunRequest(data=subject.root.parent, subject=subject.name, routes={"cpu": "subject/nowhere"})
    with pytest.raises(UserError, match="There is no deployment 'subject/nowhere'"):
        subject_flow(request)
    assert not subject.running(), "the lock is let go for the run over there"
