"""What a server is told of headcast: prefect.yaml and automations.yaml fit the code."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flows.declarations import read_automations, read_deployments, read_schedule
from flows.deployments import POOLS
from flows.environment import SILENT
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_every_deployment_is_a_flow_that_takes_one_request() -> None:
    deployments = read_deployments()
    assert {deployment.name for deployment in deployments} >= {
        "subject",
        "rerun",
        "stages",
        "batch",
        "nightly",
        "reenact",
    }
    for deployment in deployments:
        flow = deployment.flow()
        assert list(flow.parameters.properties) == ["request"]
        assert flow.validate_parameters(deployment.parameters) if deployment.parameters else True


def test_every_job_is_silent_and_beats() -> None:
    for deployment in read_deployments():
        environment = deployment.work_pool.job_variables["env"]
        assert deployment.work_pool.name in POOLS
        assert environment.items() >= SILENT.items()
        assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


def test_prefects_own_tool_reads_the_same_file() -> None:
    from prefect.cli.deploy._models import PrefectYamlModel

    model = PrefectYamlModel.model_validate(yaml.safe_load((ROOT / "prefect.yaml").read_text()))
    assert [entry.name for entry in model.deployments or []] == [entry.name for entry in read_deployments()]


def test_a_crashed_run_is_tried_three_times_more_and_then_has_failed() -> None:
    crashed = [one for one in read_automations() if one.trigger.expect == {"prefect.flow-run.Crashed"}]
    counts = [one.trigger.match.root["prefect.run-count"] for one in crashed]
    assert [action.state.value for one in crashed for action in one.actions] == ["SCHEDULED", "FAILED"]
    assert counts[0] == ["1", "2", "3"]
    assert "4" in counts[1]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"cron": "0 22 * * *"}, "schedules.0.timezone: Field required"),
        ({"cron": "0 22 * * *", "timezone": "Mars/Olympus"}, "no time zone"),
        ({"cron": "at night", "timezone": "UTC"}, "cron"),
    ],
)
def test_schedule_at_fault_is_refused(tmp_path: Path, schedule: dict[str, str], words: str) -> None:
    entry = {"name": "nightly", "description": "", "entrypoint": "a.b", "work_pool": {"name": "cpu"}}
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump({"deployments": [{**entry, "schedules": [schedule]}]}))
    with pytest.raises(UserError, match="'nightly'") as caught:
        read_deployments(path)
    assert words in caught.value.what


def test_pool_that_no_worker_serves_is_refused(tmp_path: Path) -> None:
    entry = {"name": "subject", "description": "", "entrypoint": "a.b", "work_pool": {"name": "tpu"}}
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump({"deployments": [entry]}))
    with pytest.raises(UserError, match=r"work_pool.name: Input should be 'cpu' or 'gpu'"):
        read_deployments(path)


def test_a_night_needs_a_time_zone() -> None:
    assert read_schedule(None, None) is None
    told = read_schedule("0 22 * * *", "Europe/Berlin")
    assert told is not None
    assert told.active
    with pytest.raises(UserError, match="has no time zone"):
        read_schedule("0 22 * * *", None)
    with pytest.raises(UserError, match="without a schedule"):
        read_schedule(None, "UTC")
