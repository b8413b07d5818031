"""The subject flow: the videos of one person to one avatar, seven stages as cached and resumable tasks.

The manifests in the dataset are the only truth about what is fresh (`pipeline.stage`): a task whose stage is fresh
ends as `Cached` without working, so results can never drift apart from the files they stand for.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Collection
from typing import Any

from flows.environment import end_with_worker, gpu_count, quiet_prefect, shield_server, worker_run
from pipeline.threads import one_blas_thread

quiet_prefect()
one_blas_thread()

from prefect import Task, flow  # noqa: E402  the environment must be set first
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.deployments import run_deployment  # noqa: E402
from prefect.exceptions import ObjectNotFound, TerminationSignal  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed  # noqa: E402
from prefect.tasks import exponential_backoff  # noqa: E402

from flows.artifacts import progress_shown, show_verdicts  # noqa: E402
from pipeline.assets import ensure_assets  # noqa: E402
from pipeline.config import Config  # noqa: E402
from pipeline.errors import (  # noqa: E402
    HeadcastError,
    Interrupted,
    LeaseLost,
    StageDied,
    StageError,
    UserError,
)
from pipeline.mirror import open_mirror  # noqa: E402
from pipeline.progress import Reporter, default_reporter  # noqa: E402
from pipeline.report import build_report  # noqa: E402
from pipeline.run import (  # noqa: E402
    RunRequest,
    Worker,
    check_captures_first,
    check_input,
    hold,
    open_subject,
    prepare,
    routed,
    segments,
    stage_worker,
)
from pipeline.stage import Stage  # noqa: E402
from stages import STAGES  # noqa: E402

shield_server()
end_with_worker()

RETRIES = 3
BACKOFF_SECONDS = 5.0
POLL_SECONDS = 5.0


@flow(name="subject", flow_run_name=lambda: f"subject-{flow_run.parameters['request'].target().name}")
def subject_flow(request: RunRequest) -> list[str]:
    """Bring a subject up to date, stage after stage, and write its report. Returns the stages that worked.

    Raises:
        HeadcastError: the request is at fault, or a stage failed; the report is written all the same.
    """
    with progress_shown(request.target(), default_reporter(request.target().name)) as reporter:
        return _bring_up_to_date(request, reporter)


def _bring_up_to_date(request: RunRequest, reporter: Reporter) -> list[str]:
    subject, worked = request.target(), []
    mirror = open_mirror(request.store, subject, reporter)

    def exchange(step: Callable[..., None], *arguments: Any) -> None:
        if request.store is not None:
            attempt(step.__name__, step, *arguments)

    def plan() -> tuple[Config, list[Stage]]:
        _, config, wanted = prepare(request, STAGES)
        check_input(request, subject)
        return config, wanted

    planned = plan() if request.store is None else None  # with a store, the subject may not be here yet
    with contextlib.ExitStack() as holding:
        held = holding.enter_context(hold(subject, request.wait_minutes, request.store))
        mirror.still_held = held.check
        exchange(mirror.pull_source, not request.videos)
        config, wanted = planned or plan()
        check_captures_first(request, subject, reporter)
        open_subject(request, subject, config)
        exchange(mirror.push_source)
        assets = {name for stage in wanted for name in stage.assets(config)}
        if assets:
            attempt("assets", ensure_assets, assets, reporter)
        try:
            for route, part in segments(request, wanted):
                if route is not None:
                    holding.close()  # the run over there takes the lock
                    attempt(route, send_to, route, routed(request, subject, part))
                    held = holding.enter_context(hold(subject, request.wait_minutes, request.store))
                    mirror.still_held = held.check
                    continue
                with stage_worker(request, subject, STAGES, config, held, mirror, reporter) as work:
                    for stage in part:
                        label = f"[{wanted.index(stage) + 1}/{len(wanted)}] {stage.name}"
                        manifest = attempt(stage.name, bring_up_to_date, work, stage, tags=limits_of(request, stage))
                        if isinstance(manifest, dict):
                            worked.append(stage.name)
                            reporter.message(f"{label}: {manifest['seconds']:.1f} s. {manifest['verdict']['text']}")
                        else:
                            reporter.message(f"{label}: fresh, left as it is")
        except BaseException as error:
            # A full disk or a store that is down must not hide the stage's own error.
            with contextlib.suppress(OSError, HeadcastError):
                build_report(subject, STAGES, config)
                show_verdicts(subject, STAGES)
                mirror.push_report()
            if isinstance(error, Interrupted) and flow_run.id == worker_run():
                # Tells Prefect that this run was stopped and has not failed: it is cancelled if that was asked for,
                # else crashed, and then scheduled again.
                raise TerminationSignal(signal.SIGTERM) from error
            raise
        build_report(subject, STAGES, config)
        show_verdicts(subject, STAGES)
        exchange(mirror.push_report)
    return worked


def bring_up_to_date(work: Worker, stage: Stage) -> Any:
    """A stage as a task: its manifest, or the state `Cached`."""
    return work(stage) or Completed(name="Cached", message="fresh: the manifest carries this key")


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
