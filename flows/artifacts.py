"""What a subject's run shows on the server's page: how far it is, the stages' verdicts, and a link to the report."""

from __future__ import annotations

import contextlib
import contextvars
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL

from flows.environment import worker_run
from pipeline.dataset import Subject
from pipeline.progress import Reporter, Task
from pipeline.stage import Stage
from pipeline.summary import summarize

EVERY_SECONDS = 5.0


def artifact_key(kind: str, subject: str) -> str:
    """A key as Prefect takes it: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{kind}-{subject}".lower()).strip("-")


@contextlib.contextmanager
def progress_shown(subject: Subject, inner: Reporter) -> Iterator[Reporter]:
    """A reporter that also shows progress on the server and keeps messages in the run's log.

    The server is told from a thread, so that no stage waits for it. The embedded server has no page and is left alone.
    """
    if PREFECT_API_URL.value() is None:
        yield inner
        return
    shown, ended = _ShownReporter(inner), threading.Event()
    context = contextvars.copy_context()  # it says which run the artifact belongs to
    key = artifact_key("progress", subject.name)
    teller = threading.Thread(target=context.run, args=(_tell, key, shown, ended), daemon=True)
    teller.start()
    try:
        yield shown
    finally:
        ended.set()
        teller.join(EVERY_SECONDS)


def show_verdicts(subject: Subject, stages: Sequence[Stage]) -> None:
    """Show how the stages stand and where the report is; a server that does not answer is no fault of the run."""
    if PREFECT_API_URL.value() is None:
        return
    told = summarize(subject, stages)
    rows = [
        {"stage": stage.stage, "state": stage.state, "verdict": stage.level or "", "what": stage.text or stage.why}
        for stage in told.stages
    ]
    with contextlib.suppress(httpx.HTTPError):
        create_table_artifact(rows, artifact_key("verdicts", subject.name), f"{subject.name}: {told.standing}")
        if told.report is not None:
            link = subject.report.absolute().as_uri()
            create_link_artifact(link, "report.html", artifact_key("report", subject.name), str(subject.report))


class _ShownReporter:
    """Passes everything on and remembers the newest progress."""

    def __init__(self, inner: Reporter) -> None:
        self._inner, self._log = inner, get_run_logger()
        self.task_now: Task | None = None

    def task(self, label: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        """A counted piece of work."""
        return self._task(label, total, unit, done)

    @contextlib.contextmanager
    def _task(self, label: str, total: int, unit: str, done: int) -> Iterator[Task]:
        with self._inner.task(label, total, unit, done) as task:
            self.task_now = task
            yield task

    def message(self, text: str) -> None:
        """Keep a line in the run's log, which a worker prints, too."""
        self._log.info(text)
        if worker_run() is None:
            self._inner.message(text)


def _tell(key: str, shown: _ShownReporter, ended: threading.Event) -> None:
    artifact: Any = None
    last = ""
    while not ended.wait(EVERY_SECONDS):
        task = shown.task_now
        if task is None or (line := task.line()) == last:
            continue
        share = 100.0 * task.done / task.total if task.total else 0.0
        with contextlib.suppress(httpx.HTTPError):
            if artifact is None:
                artifact = create_progress_artifact(share, key, line)
            else:
                update_progress_artifact(artifact, share, line)
            last = line
