"""The subject flow: the videos of one person to one avatar, seven stages as cached and resumable tasks.

The manifests in the dataset are the only truth about what is fresh (`pipeline.stage`): a task whose stage is fresh
ends as `Cached` without working, so results can never drift apart from the files they stand for.
"""

from __future__ import annotations

import contextlib
from typing import Any

from flows.environment import quiet_prefect, shield_server
from pipeline.threads import one_blas_thread

quiet_prefect()
one_blas_thread()

from prefect import flow, task  # noqa: E402  the environment must be set first
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed  # noqa: E402

from pipeline.assets import ensure_assets  # noqa: E402
from pipeline.progress import default_reporter  # noqa: E402
from pipeline.report import build_report  # noqa: E402
from pipeline.run import (  # noqa: E402
    RunRequest,
    check_captures_first,
    check_input,
    hold,
    open_subject,
    prepare,
    stop_signals,
)
from pipeline.stage import inspect_stages, run_stage  # noqa: E402
from stages import STAGES  # noqa: E402

shield_server()


def _run_name() -> str:
    request: RunRequest = flow_run.parameters["request"]
    return f"subject-{request.target().name}"


@flow(name="subject", flow_run_name=_run_name)
def subject_flow(request: RunRequest) -> list[str]:
    """Bring a subject up to date, stage after stage, and write its report. Returns the stages that worked.

    Raises:
        HeadcastError: the request is at fault, or a stage failed; the report is written all the same.
    """
    reporter = default_reporter()
    subject, config, wanted = prepare(request, STAGES)

    def bring_up_to_date(stage_name: str) -> Any:
        until = next(number for number, stage in enumerate(STAGES, 1) if stage.name == stage_name)
        state = inspect_stages(subject, STAGES[:until], config)[-1]
        force = request.first == stage_name
        if state.name == "fresh" and not force:
            return Completed(name="Cached", message="fresh: the manifest carries this key")
        with stop_signals() as stop_requested:
            return run_stage(
                subject,
                STAGES[until - 1],
                STAGES,
                config,
                force=force,
                device=request.device,
                threads=request.threads,
                reporter=reporter,
                stop_requested=stop_requested,
            )

    worked = []
    check_input(request, subject)
    with hold(subject):
        check_captures_first(request, subject, reporter)
        open_subject(request, subject, config)
        ensure_assets({name for stage in wanted for name in stage.assets(config)}, reporter)
        try:
            for number, stage in enumerate(wanted, 1):
                label = f"[{number}/{len(wanted)}] {stage.name}"
                outcome = task(name=stage.name, cache_policy=NO_CACHE)(bring_up_to_date)(stage.name)
                if isinstance(outcome, dict):
                    worked.append(stage.name)
                    reporter.message(f"{label}: {outcome['seconds']:.1f} s. {outcome['verdict']['text']}")
                else:
                    reporter.message(f"{label}: fresh, left as it is")
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk must not hide the stage's own error
                build_report(subject, STAGES, config)
            raise
        build_report(subject, STAGES, config)
    return worked
