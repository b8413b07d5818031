"""The nightly flow: what is new, stale or failed in a dataset, oldest first, within a budget of time."""

from __future__ import annotations

import time
from typing import Any

from flows.batch import work_off  # it sets the environment before Prefect is imported

from prefect import flow  # isort: skip
from prefect.artifacts import create_markdown_artifact
from prefect.states import Failed

from pipeline.nightly import Night, NightlyRequest, plan, remember_night
from pipeline.run import RunRequest
from stages import STAGES


@flow(name="nightly")
def nightly_flow(request: NightlyRequest) -> Any:
    """Train what a dataset is waiting for and post a summary. Returns the account (`pipeline.nightly.Night`).

    Subjects that fail do not fail the run: they are told in the summary and tried again the next night.

    Raises:
        UserError: the inbox is no folder.
    """
    began, budget = time.monotonic(), 3600 * request.budget_hours
    planned = plan(request, STAGES)
    expected = {candidate.subject: candidate.seconds for candidate in planned.due}
    left = {candidate.subject: candidate.left for candidate in planned.candidates if candidate.left}

    def fits(run: RunRequest) -> bool:
        subject, remaining = run.target().name, budget - (time.monotonic() - began)
        seconds = expected[subject]
        if remaining <= 0 or (seconds is not None and seconds > remaining):
            takes = f"about {seconds:.0f} s" if seconds is not None else "an unknown time"
            left[subject] = f"takes {takes}, and {max(remaining, 0):.0f} s of the budget were left"
            return False
        return True

    def over() -> bool:
        return request.hard and time.monotonic() - began > budget

    outcomes = work_off(request, [candidate.run for candidate in planned.due], fits, over)
    remember_night(request, planned.due, outcomes, STAGES)
    interrupted = not over() and any(outcome.outcome == "stopped" for outcome in outcomes)
    hours = (time.monotonic() - began) / 3600
    night = Night(tuple(outcomes), tuple(left.items()), planned.faults, hours, request.budget_hours, interrupted)
    create_markdown_artifact(night.markdown(), key="nightly", description="What the night did")
    return (
        Failed(message="Stopped before its budget was over.", data=night.to_json()) if interrupted else night.to_json()
    )
