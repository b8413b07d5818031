"""The subject flow: the videos of one person to one avatar, seven stages as cached and resumable tasks.

The manifests in the dataset are the only truth about what is fresh (`pipeline.stage`): a task whose stage is fresh
ends as `Cached` without working, so results can never drift apart from the files they stand for.
"""

from __future__ import annotations

import contextlib
import signal
from typing import Any

from flows.environment import end_with_worker, quiet_prefect, shield_server, worker_run
from pipeline.threads import one_blas_thread

quiet_prefect()
one_blas_thread()

from prefect import flow  # noqa: E402  the environment must be set first
from prefect.exceptions import TerminationSignal  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Cancelled, Completed  # noqa: E402

from flows.artifacts import progress_shown, show_verdicts  # noqa: E402
from flows.steps import attempt, cancel_asked, limits_of, send_to  # noqa: E402
from pipeline.assets import ensure_assets  # noqa: E402
from pipeline.config import Config  # noqa: E402
from pipeline.dataset import Subject  # noqa: E402
from pipeline.errors import HeadcastError, Interrupted  # noqa: E402
from pipeline.lease import Held  # noqa: E402
from pipeline.mirror import Mirror, open_mirror  # noqa: E402
from pipeline.progress import default_reporter  # noqa: E402
from pipeline.report import build_report  # noqa: E402
from pipeline.run import (  # noqa: E402
    RunRequest,
    Worker,
    check_captures_first,
    check_input,
    hold,
    needed_assets,
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

Plan = tuple[Config, list[Stage]]
"""The settings that a request means, and the stages to bring up to date."""


@flow(name="subject", flow_run_name=lambda: f"subject-{flow_run.parameters['request'].target().name}")
def subject_flow(request: RunRequest) -> Any:
    """Bring a subject up to date, stage after stage, and write its report. Returns the stages that worked.

    Raises:
        HeadcastError: the request is at fault, or a stage failed; the report is written all the same.
    """
    subject = request.target()
    with progress_shown(subject, default_reporter(subject.name)) as reporter, contextlib.ExitStack() as holding:
        mirror = open_mirror(request.store, subject, reporter)
        planned = plan(request) if request.store is None else None  # with a store, the subject may not be here yet
        held = take_hold(request, mirror, holding)
        config, wanted = open_up(request, mirror, planned)
        try:
            worked = work_through(request, mirror, holding, held, config, wanted)
        except BaseException as error:
            # A full disk or a store that is down must not hide the stage's own error.
            with contextlib.suppress(OSError, HeadcastError):
                show(subject, config)
                mirror.push_report()
            if isinstance(error, Interrupted) and flow_run.id == worker_run():
                if cancel_asked():
                    return Cancelled(message=error.what)
                # Tells Prefect that this run was stopped and has not failed: it is crashed, and then scheduled again.
                raise TerminationSignal(signal.SIGTERM) from error
            raise
        show(subject, config)
        if request.store is not None:
            attempt("push_report", mirror.push_report)
        return worked


def plan(request: RunRequest) -> Plan:
    """What a request means, once it and its videos are found good."""
    subject, config, wanted = prepare(request, STAGES)
    check_input(request, subject)
    return config, wanted


def take_hold(request: RunRequest, mirror: Mirror, holding: contextlib.ExitStack) -> Held:
    """Hold the subject, here and in its store, until `holding` is closed."""
    held = holding.enter_context(hold(mirror.subject, request.wait_minutes, request.store))
    mirror.still_held = held.check
    return held


def open_up(request: RunRequest, mirror: Mirror, planned: Plan | None) -> Plan:
    """Bring the source here and to the store, and the models that the stages need to this machine."""
    if request.store is not None:
        attempt("pull_source", mirror.pull_source, not request.new_source)
    config, wanted = planned or plan(request)
    check_captures_first(request, mirror.subject, mirror.reporter)
    open_subject(request, mirror.subject, config)
    if request.store is not None:
        attempt("push_source", mirror.push_source)
    if assets := needed_assets(mirror.subject, config, wanted):
        attempt("assets", ensure_assets, assets, mirror.reporter)
    return config, wanted


def work_through(
    request: RunRequest,
    mirror: Mirror,
    holding: contextlib.ExitStack,
    held: Held,
    config: Config,
    wanted: list[Stage],
) -> list[str]:
    """Bring the stages up to date, here or where they are sent; the names of those that worked here."""
    subject, reporter, worked = mirror.subject, mirror.reporter, []
    for route, part in segments(request, wanted):
        if route is not None:
            holding.close()  # the run over there takes the lock
            attempt(route, send_to, route, routed(request, subject, part))
            held = take_hold(request, mirror, holding)
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
    return worked


def bring_up_to_date(work: Worker, stage: Stage) -> Any:
    """A stage as a task: its manifest, or the state `Cached`."""
    return work(stage) or Completed(name="Cached", message="fresh: the manifest carries this key")


def show(subject: Subject, config: Config) -> None:
    """Write the report, and put the verdicts on the server's page."""
    build_report(subject, STAGES, config)
    show_verdicts(subject, STAGES)
