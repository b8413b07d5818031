"""What is asked of a running service: submit, look at the queue, cancel. A thin client of Prefect's server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flows.server import polled
from pipeline.dataset import Subject
from pipeline.errors import HeadcastError, UserError
from pipeline.progress import read_progress
from pipeline.run import STAGE_MINUTES, RunRequest

WAIT_MINUTES = 720.0
"""A submitted run waits for another one of its subject, as the queue itself would have it wait."""
FAILED_DAYS = 7
ACTIVE = ("RUNNING", "PENDING", "CANCELLING", "SCHEDULED", "PAUSED")


@dataclass(frozen=True)
class Submitted:
    """A run in the queue."""

    id: str
    name: str
    page: str
    pool: str
    waits_for_worker: bool
    """No worker polls its pool."""


def submit(client: Any, deployment_name: str, requests: Sequence[RunRequest]) -> list[Submitted]:
    """Put one run for each request in the queue.

    Raises:
        UserError: there is no such deployment, or it has no work pool, or a request does not fit its parameters.
    """
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Scheduled

    try:
        deployment = client.read_deployment_by_name(deployment_name)
    except (ObjectNotFound, ValueError):
        known = ", ".join(sorted(deployment_names(client).values())) or "none"
        raise UserError(
            f"There is no deployment '{deployment_name}' (there: {known}).",
            "headcast serve makes them; on a server of your own: prefect --no-prompt deploy --all",
        ) from None
    pool = deployment.work_pool_name
    if pool is None:
        raise UserError(
            f"Deployment '{deployment_name}' belongs to no work pool that is there, so no worker would ever run it.",
            "make the pool and deploy again: prefect --no-prompt deploy --all",
        )
    idle = not polled(client, pool)
    runs = []
    for request in requests:
        run = client.create_flow_run_from_deployment(
            deployment.id,
            parameters={"request": request.model_dump(mode="json", exclude_unset=True, exclude={"threads"})},
            name=f"{deployment_name.partition('/')[0]}-{request.target().name}",
            state=Scheduled(),
        )
        page = f"{str(client.api_url).rstrip('/').removesuffix('/api')}/runs/flow-run/{run.id}"
        runs.append(Submitted(str(run.id), run.name, page, pool, idle))
    return runs


def prepared(request: RunRequest) -> RunRequest:
    """A request as a worker carries it out: every path absolute, busy subjects waited for, a time limit for stages."""
    changes: dict[str, Any] = {
        "data": request.data.absolute(),
        "wait_minutes": WAIT_MINUTES,
        "stage_minutes": request.stage_minutes or STAGE_MINUTES,
    }
    if request.videos:
        changes["videos"] = tuple(path.absolute() for path in request.videos)
    if request.alpha:
        changes["alpha"] = tuple(path.absolute() for path in request.alpha)
    if request.like is not None:
        changes["like"] = request.like.absolute()
    if request.tracking is not None:
        changes["tracking"] = request.tracking.absolute()
    return request.model_copy(update=changes)


def deployment_names(client: Any) -> dict[Any, str]:
    """Every deployment's FLOW/NAME by its id."""
    flows = {flow.id: flow.name for flow in client.read_flows()}
    return {entry.id: f"{flows.get(entry.flow_id)}/{entry.name}" for entry in client.read_deployments()}


def queue(client: Any, data: Path | None = None) -> list[dict[str, Any]]:
    """Runs that are at work, waiting or late, and those that failed lately, as plain data.

    Args:
        client: of the server.
        data: only runs of this dataset; None: all.
    """
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    active = FlowRunFilter.model_validate({"state": {"type": {"any_": list(ACTIVE)}}})
    since = datetime.now(UTC) - timedelta(days=FAILED_DAYS)
    ended = FlowRunFilter.model_validate(
        {"state": {"type": {"any_": ["FAILED", "CRASHED"]}}, "start_time": {"after_": since}}
    )
    names = deployment_names(client)
    runs = client.read_flow_runs(flow_run_filter=active, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=200)
    runs += client.read_flow_runs(flow_run_filter=ended, sort=FlowRunSort.END_TIME_DESC, limit=20)
    lines = [_line(run, names) for run in runs if run.deployment_id is not None]
    order = ["running", "late", "scheduled", "failed"]
    lines.sort(key=lambda line: order.index(line["group"]))
    return [line for line in lines if data is None or line["data"] in (None, str(data.absolute()))]


def _line(run: Any, names: dict[Any, str]) -> dict[str, Any]:
    kind = run.state.type.value
    group = {"FAILED": "failed", "CRASHED": "failed", "SCHEDULED": "scheduled", "PAUSED": "scheduled"}.get(
        kind, "running"
    )
    if run.state.name == "Late":
        group = "late"
    subject, data = whose(run)
    expected = run.expected_start_time
    return {
        "id": str(run.id),
        "name": run.name,
        "deployment": names.get(run.deployment_id),
        "pool": run.work_pool_name,
        "subject": subject,
        "data": data,
        "group": group,
        "state": run.state.name,
        "since": run.state.timestamp.isoformat(timespec="seconds"),
        "expected": expected.isoformat(timespec="seconds") if expected else None,
        "attempt": run.run_count,
        "reason": run.state.message,
        "progress": progress_of(subject, data) if kind == "RUNNING" else None,
    }


def whose(run: Any) -> tuple[str | None, str | None]:
    """Subject and dataset of a run, where its request names them."""
    request = run.parameters.get("request")
    if not isinstance(request, dict):
        return None, None
    data = request.get("data")
    try:
        subject = RunRequest.model_validate(request).target().name
    except (ValueError, HeadcastError):  # a batch or a night is of no one subject
        subject = None
    return subject, str(data) if data else None


def progress_of(subject: str | None, data: str | None) -> str | None:
    """How far a subject's stage is, where its folder can be seen from here and tells."""
    if subject is None or data is None:
        return None
    progress = read_progress(Subject(Path(data, subject)).progress)
    return progress.line() if progress else None


def cancel(client: Any, wanted: Sequence[str], data: Path | None, everything: bool) -> list[dict[str, Any]]:
    """Cancel runs that wait or are at work, by id, name or subject. Returns them with their new state.

    Raises:
        UserError: nothing that is waiting or at work goes by one of the names.
    """
    from prefect.states import Cancelling

    active = [line for line in queue(client, data) if line["group"] != "failed"]
    chosen = {} if not everything else {line["id"]: line for line in active}
    for name in wanted:
        found = [line for line in active if name in (line["name"], line["subject"]) or line["id"].startswith(name)]
        if not found:
            known = ", ".join(sorted({line["subject"] or line["name"] for line in active})) or "nothing"
            raise UserError(f"No run '{name}' is waiting or at work (there: {known}).", "headcast queue shows what is")
        chosen.update((line["id"], line) for line in found)
    for line in chosen.values():
        result = client.set_flow_run_state(line["id"], Cancelling(message="Cancelled with headcast cancel."))
        run = client.read_flow_run(line["id"])
        line.update(state=run.state.name, reason=run.state.message)
        if result.state is None:
            line["reason"] = getattr(result.details, "reason", line["reason"])
    return list(chosen.values())
