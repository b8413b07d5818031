"""Runs whose process is gone: on one machine found by looking for it, in seconds, without waiting for heartbeats."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flows.environment import MARK_SERVICE
from flows.server import polled
from pipeline.supervision import environments

CHECKS = {"RUNNING": 2, "CANCELLING": 2, "PENDING": 10, "CRASHED": 20}
"""So often in a row a run must be found without a process. One that is pending has its process yet to come; one that is
crashed is the automations' to schedule, which a server that was busy or killed just then forgets."""
CRASHED_HOURS = 24
ATTEMPTS = 4
"""As in automations.yaml."""


class Watch:
    """Looks after the runs of pools that only this machine serves.

    Args:
        home: the folder of the service's database, which marks its processes.
        workers: the name of this machine's worker, by pool.
    """

    def __init__(self, home: Path, workers: dict[str, str]) -> None:
        self._home, self._workers = home, workers
        self._missed: dict[tuple[Any, str], int] = {}

    def check(self) -> Iterator[str]:
        """Set the state of runs that nobody carries out any more, and tell so."""
        import httpx
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
                yield from self._check(client)
        except httpx.HTTPError:
            return  # the server died meanwhile or is busy; the next check comes soon

    def _check(self, client: Any) -> Iterator[str]:
        from prefect.client.schemas.filters import FlowRunFilter
        from prefect.states import Cancelled, Failed, Scheduled

        deployed = {"deployment_id": {"is_null_": False}}
        open_ended = {"state": {"type": {"any_": ["RUNNING", "CANCELLING", "PENDING"]}}}
        since = datetime.now(UTC) - timedelta(hours=CRASHED_HOURS)
        crashed = {"state": {"type": {"any_": ["CRASHED"]}}, "start_time": {"after_": since}}
        runs = []
        for wanted in (open_ended, crashed):
            runs += client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({**wanted, **deployed}))
        runs = [run for run in runs if run.work_pool_name in self._workers]
        carried = self._carried() if runs else set()
        seen, self._missed = self._missed, {}
        for run in runs:
            if str(run.id) in carried or not self._alone(client, run.work_pool_name):
                continue
            kind = run.state.type.value
            missed = seen.get((run.id, kind), 0) + 1
            if missed < CHECKS[kind]:
                self._missed[run.id, kind] = missed
                continue
            state: Any
            if kind == "CANCELLING":
                state, what = Cancelled(message="Cancelled; its process was gone."), "it is cancelled"
            elif kind == "PENDING":
                state, what = Scheduled(message="Its worker died before it began."), "it is scheduled again"
            elif run.run_count < ATTEMPTS:
                message = "Its process is gone: killed, or out of memory. It goes on where it was."
                state, what = Scheduled(name="AwaitingRetry", message=message), "it is scheduled again"
            else:
                message = (
                    f"Its process died {run.run_count} times at work; its log tells more. What is finished is kept."
                )
                state, what = Failed(message=message), "it has failed"
            client.set_flow_run_state(run.id, state, force=True)
            yield f"Run '{run.name}' has no process any more: {what}."

    def _carried(self) -> set[str]:
        """Runs that a process of this service carries out."""
        return {
            environment.get("PREFECT__FLOW_RUN_ID", "")
            for _, environment in environments()
            if environment.get(MARK_SERVICE) == str(self._home)
        }

    def _alone(self, client: Any, pool: str) -> bool:
        """Whether no other machine's worker polls a pool."""
        return set(polled(client, pool)) <= {self._workers[pool]}
