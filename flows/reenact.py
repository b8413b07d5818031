"""The reenact flow: one subject's avatar driven by another subject, a video or a table, as a video."""

from __future__ import annotations

from typing import Any

from flows.environment import quiet_prefect
from pipeline.threads import one_blas_thread

quiet_prefect()
one_blas_thread()

from prefect import flow  # noqa: E402  the environment must be set first
from prefect.runtime import flow_run  # noqa: E402

from flows.steps import attempt  # noqa: E402
from flows.subject import subject_flow  # noqa: E402
from pipeline.drivers import driver_name  # noqa: E402
from pipeline.progress import default_reporter  # noqa: E402
from pipeline.reenact import ReenactRequest, check_reenact, driver_run, reenact  # noqa: E402
from pipeline.run import stop_signals  # noqa: E402


def _run_name() -> str:
    request: ReenactRequest = flow_run.parameters["request"]
    return f"reenact-{request.avatar}-by-{driver_name(request.drive)}"


@flow(name="reenact", flow_run_name=_run_name)
def reenact_flow(request: ReenactRequest) -> dict[str, Any]:
    """Drive an avatar and write the video. Returns its account.

    A driver's video is made a fitted subject first, by the subject flow. After that no subject is locked: finished
    stages are only read.

    Raises:
        HeadcastError: the request is at fault, or a subject's files are.
    """
    run = driver_run(request)
    if run is not None:
        default_reporter().message(f"'{request.drive}' drives as the subject '{run.target().name}'")
        subject_flow(run)
    return dict(attempt("reenact", check_and_reenact, request))


def check_and_reenact(request: ReenactRequest) -> dict[str, Any]:
    """The flow's work; done again when a subject was worked on while it was read."""
    with stop_signals() as stop_requested:
        return reenact(check_reenact(request), default_reporter(), stop_requested)
