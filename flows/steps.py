"""The steps of a run: tasks that are tried again where that helps, and work that is sent to another pool.

Imported once `flows.environment.quiet_prefect` has been called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any
from uuid import UUID

import httpx
from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.tasks import exponential_backoff

from flows.environment import gpu_count
from pipeline.errors import LeaseLost, StageDied, StageError, UserError
from pipeline.progress import default_reporter
from pipeline.run import RunRequest
from pipeline.stage import Stage

RETRIES = 3
BACKOFF_SECONDS = 5.0
POLL_SECONDS = 5.0


def send_to(deployment: str, request: RunRequest) -> None:
    """Have another work pool carry out part of a run, and wait for it.

    Raises:
        UserError: the server knows no such deployment.
        StageDied: the run over there crashed.
        StageError: it failed.
    """
    try:
        parameters = {"request": request.model_dump(mode="json", exclude_unset=True)}
        run: Any = run_deployment(deployment, parameters=parameters, timeout=None, poll_interval=POLL_SECONDS)
    except ObjectNotFound:
        raise UserError(
            f"There is no deployment '{deployment}' to send stages to.",
            "prefect deployment ls shows them; routes are given as FLOW/NAME",
        ) from None
    if not run.state.is_completed():
        kind = StageDied if run.state.is_crashed() else StageError
        why = run.state.message
        raise kind(f"Run '{run.name}' of deployment '{deployment}' did not finish: {why}.", "its log tells more")


def limits_of(request: RunRequest, stage: Stage) -> set[str]:
    """The tags by which a server limits how many of a stage there are at one time: `gpu` where it will use one."""
    return {"gpu"} if stage.needs == "gpu" and request.device != "cpu" and gpu_count() else set()


def cancel_asked() -> bool:
    """Whether the server wants this run cancelled; a server that does not answer says nothing."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run.id)).state
    except httpx.HTTPError:
        return False
    return state is not None and state.is_cancelling()


def attempt(name: str, work: Callable[..., Any], *arguments: Any, tags: Collection[str] = ()) -> Any:
    """Carry out a step as a task of the run; it is tried again where that can help (`HeadcastError.retryable`)."""
    patient: Task[..., Any] = Task(
        work,
        name=name,
        tags=tags,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(BACKOFF_SECONDS),
        retry_jitter_factor=0.5,
        retry_condition_fn=_can_help,
    )
    return patient(*arguments)


def _can_help(step: Any, run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    if not getattr(error, "retryable", False) or isinstance(error, LeaseLost):  # that takes a new run
        return False
    default_reporter().message(f"{step.name}: {getattr(error, 'what', error)} Trying again up to {RETRIES} times.")
    return True
