"""The batch flow: many subjects at a time, each a subject flow of its own, so that one that fails stops no other."""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from flows.subject import subject_flow  # it sets the environment before Prefect is imported

from prefect import Task, flow  # isort: skip
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed

from flows.runners import workers
from pipeline.assets import ensure_assets
from pipeline.batch import BatchRequest, Outcome, Pool, batch_document, exit_code, outcome_of, read_batch, tally
from pipeline.dataset import Dataset
from pipeline.dataset_page import write_dataset_page
from pipeline.errors import HeadcastError, Interrupted, StageError
from pipeline.logs import json_wanted
from pipeline.progress import SilentReporter, default_reporter, reporting
from pipeline.run import RunRequest, ask_to_stop, check_writable, nothing_to_do, resolve_config, stop_signals
from stages import STAGES

POLL_SECONDS = 0.5


@flow(name="batch")
def batch_flow(request: BatchRequest) -> Any:
    """Bring many subjects up to date. Returns the account of them (`pipeline.batch.batch_document`).

    The run is failed where a subject is, but not before all others are done.

    Raises:
        UserError: something that is named cannot be used; nothing was started.
    """
    return account_of(work_off(request, read_batch(request)))


def account_of(outcomes: Sequence[Outcome]) -> Any:
    """The document of a run of many subjects as a flow's result: in a failed state where a subject is not done."""
    document = batch_document(outcomes)
    return Failed(message=f"{tally(outcomes)}.", data=document) if exit_code(outcomes) else document


def work_off(
    pool: Pool,
    runs: Sequence[RunRequest],
    begin: Callable[[RunRequest], bool] = lambda run: True,
    over: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """Carry out runs, so many at a time as there are workers, and say a line as each ends. To be called in a flow.

    The dataset's page and metrics are written at the end.

    Ctrl+C and SIGTERM stop what is at work, and nothing more is begun; on a cluster that was running before, a stage
    that is at work there goes on.

    Args:
        pool: what carries them out.
        runs: of different subjects, in the order in which they begin.
        begin: asked as soon as a worker is free for a run; a run that it refuses is left out.
        over: asked again and again; once it is true, all is stopped as by Ctrl+C.

    Returns:
        How it went, in the order of the runs.
    """
    check_writable(pool.data)
    reporter = default_reporter()
    if names := {name for run in runs for name in _assets(run)}:
        ensure_assets(names, reporter)
    waiting, ended = deque(runs), queue.SimpleQueue[Any]()
    at_work: dict[Any, RunRequest] = {}
    outcomes: dict[str, Outcome] = {}
    with workers(pool) as (runner, count), stop_signals() as stop_requested:
        while True:
            while waiting and len(at_work) < count and not stop_requested():
                run = waiting.popleft()
                if begin(run):
                    step = Task(bring_up_to_date, name=run.target().name, cache_policy=NO_CACHE)
                    future = runner.submit(step, {"request": run})
                    at_work[future.task_run_id] = run
                    future.add_done_callback(ended.put)
            if not at_work or (stop_requested() and pool.runner != "threads"):
                break  # leaving a cluster ends the work there; threads hear the stop themselves
            with contextlib.suppress(queue.Empty):
                future = ended.get(timeout=POLL_SECONDS)
                outcome = _outcome(future, at_work.pop(future.task_run_id))
                outcomes[outcome.subject] = outcome
                if outcome.outcome != "stopped":
                    reporter.message(f"[{len(outcomes)}/{len(runs)}] {outcome.line()}")
            if over():
                ask_to_stop()
    with contextlib.suppress(OSError):  # a page that cannot be written must not hide how it went
        write_dataset_page(Dataset(pool.data), STAGES)
    for run in (*at_work.values(), *waiting):
        outcomes[run.target().name] = outcome_of(run.target(), STAGES, "stopped")
    return [outcomes[run.target().name] for run in runs if run.target().name in outcomes]


def bring_up_to_date(request: RunRequest) -> Outcome:
    """One subject of many, as a task: a subject flow, unless everything is fresh; its errors become an outcome."""
    subject, began = request.target(), time.monotonic()
    # A person reads a line a subject; a log collector wants every event.
    with reporting(default_reporter(subject.name) if json_wanted() else SilentReporter()):
        try:
            if nothing_to_do(request, STAGES) is not None:
                return outcome_of(subject, STAGES, "fresh")
            subject_flow(request)
        except Exception as error:
            return _failure(request, error, time.monotonic() - began)
    return outcome_of(subject, STAGES, "done", time.monotonic() - began)


def _outcome(future: Any, run: RunRequest) -> Outcome:
    """What a task returned; where it did not, its worker died or the orchestrator failed."""
    try:
        outcome = future.result()
    except Exception as error:
        return _failure(run, error)
    assert isinstance(outcome, Outcome)
    return outcome


def _failure(run: RunRequest, error: Exception, seconds: float = 0.0) -> Outcome:
    if isinstance(error, Interrupted):
        return outcome_of(run.target(), STAGES, "stopped", seconds)
    if not isinstance(error, HeadcastError):
        error = StageError(
            f"The orchestrator failed: {type(error).__name__}: {error}.",
            "run the same command again, with --verbose for its log; what is finished is kept",
        )
    return outcome_of(run.target(), STAGES, "failed", seconds, error)


def _assets(run: RunRequest) -> set[str]:
    config = resolve_config(run, run.target())
    return {name for stage in STAGES for name in stage.assets(config)}
