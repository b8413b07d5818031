"""`headcast serve`: a service for a dataset on this machine, and what is asked of it."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.cli.common import Answer, Common, Store
from pipeline.cli.run import Run
from pipeline.errors import UserError


@dataclass(frozen=True)
class Serve(Common):
    """Serve a dataset: a queue of subjects with a page to look at, until Ctrl+C.

    Server and worker are started again when they die; runs go on where they were.
    """

    host: str = "127.0.0.1"
    """What to listen on; anything but loopback is open to others."""
    port: int | None = None
    """Port of the server; by default 4200 or the next free one."""
    limit: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Subjects at work at one time; they share the cores."""
    pool: tyro.conf.UseAppendAction[tuple[Literal["cpu", "gpu"], ...]] = ()
    """Work pool that this machine serves, may be given twice; by default cpu, and gpu where there is a GPU."""
    nightly: Annotated[str | None, tyro.conf.arg(metavar="CRON")] = None
    """When to bring everything up to date by itself, for example "0 22 * * *"; needs --timezone."""
    timezone: Annotated[str | None, tyro.conf.arg(metavar="ZONE")] = None
    """Whose clock --nightly means, for example Europe/Berlin."""
    store: Store = None
    """Keep the results of runs on an object store, s3://bucket/folder, under .results."""
    inbox: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A folder in which new videos arrive; the night makes subjects of them."""
    stage_minutes: Annotated[float | None, tyro.conf.arg(metavar="MINUTES")] = None
    """Time limit of each stage of a night."""

    def answer(self) -> Answer:
        from flows.environment import gpu_count
        from flows.service import Options, serve
        from pipeline.run import check_writable
        from pipeline.store import open_store

        check_writable(self.data)
        if self.limit < 1:
            raise UserError(f"--limit is {self.limit}.", "at least one subject must be at work")
        pools = self.pool or (("cpu", "gpu") if gpu_count() else ("cpu",))
        if self.store is not None:
            open_store(self.store).check()
        night: dict[str, Any] = {"data": str(self.data.absolute())}
        if self.inbox is not None:
            night["inbox"] = str(self.inbox.absolute())
        if self.stage_minutes is not None:
            night["stage_minutes"] = self.stage_minutes
        record = serve(
            Options(self.data, self.host, self.port, self.limit, pools, self.nightly, self.timezone, self.store, night),
            _say,
        )
        return record, "Stopped.", 0


@dataclass(frozen=True)
class Submit(Run):
    """Put videos of one person, or a batch of many, in the queue of a running service; all is checked here first.

    Without a video, --subject is brought up to date with the settings of its last run. The service is the dataset's
    own (headcast serve), or the one that PREFECT_API_URL names.
    """

    batch: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER|CSV|PATTERN")] = ()
    """Many subjects, read as headcast batch reads them, each a run of its own; may be given several times."""
    route: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="gpu=FLOW/NAME")] = ()
    """Send the stages that gain from a GPU to another pool's deployment, for example gpu=subject/stages."""
    watch: bool = False
    """Wait until it has ended, and end with its exit code."""
    deployment: Annotated[str, tyro.conf.arg(metavar="FLOW/NAME")] = "subject/subject"
    """What the server is to carry out."""

    def answer(self) -> Answer:
        from pipeline.run import check_writable, nothing_to_do
        from stages import STAGES

        requests = self.requests()
        check_writable(self.data)
        waiting = [request for request in requests if nothing_to_do(request, STAGES) is None]
        if len(waiting) < len(requests):
            _say(f"{len(requests) - len(waiting)} of {len(requests)}: everything is fresh, nothing to do.")
        if not waiting:
            return {"schema": 1, "runs": []}, "", 0
        from flows.following import follow
        from flows.queue import prepared, submit
        from flows.server import connect

        with connect(self.data) as client:
            runs = submit(client, self.deployment, [prepared(request) for request in waiting])
            if runs[0].waits_for_worker:
                _say(
                    f"No worker polls pool '{runs[0].pool}' now; what is submitted waits for one: "
                    f"headcast serve, or prefect worker start --pool {runs[0].pool}"
                )
            code = follow(client, runs, _say) if self.watch else 0
        text = "\n".join(f"{run.name}  {run.id}  {run.page}" for run in runs)
        return {"schema": 1, "runs": [asdict(run) for run in runs]}, text, code

    def requests(self) -> list[Any]:
        """What is to be run, one request for each subject.

        Raises:
            UserError: nothing is named, or a batch or a route is at fault.
        """
        from pipeline.batch import BatchRequest, read_batch
        from pipeline.run import RunRequest

        if self.batch:
            if self.videos or self.subject:
                raise UserError("Both a batch and a subject are named.", "submit one after the other")
            same = {
                name: getattr(self, name) for name in ("data", "preset", "avatar", "head", "device", "stage_minutes")
            }
            told = {name: value for name, value in same.items() if value is not None}
            requests = read_batch(BatchRequest(what=self.batch, check=not self.no_check, settings=self.set, **told))
        else:
            requests = [self.request()]
        routes = dict(route.partition("=")[::2] for route in self.route)
        # Validated anew: a copy would take any route.
        return [RunRequest(**{**dict(request), "routes": routes}) for request in requests] if routes else requests

    def _options(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def resume_command(self) -> str | None:
        return None  # the service goes on without us


@dataclass(frozen=True)
class Queue(Common):
    """Show what is running, waiting, late or failed lately, and why."""

    all: bool = False
    """Of every dataset that the server knows, not only of --data."""
    watch: bool = False
    """Show it anew every two seconds, until Ctrl+C."""

    def answer(self) -> Answer:
        from flows.queue import queue
        from flows.server import connect

        with connect(self.data) as client:
            while True:
                lines = queue(client, None if self.all else self.data)
                if not self.watch:
                    return {"schema": 1, "runs": lines}, _queue_text(lines), 0
                clear = "\033[H\033[2J" if sys.stderr.isatty() else ""
                sys.stderr.write(f"{clear}{_queue_text(lines)}\n")
                time.sleep(2.0)


@dataclass(frozen=True)
class Cancel(Common):
    """Cancel runs that wait or are at work; a stage at work leaves after its step, and what is done is kept."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN_OR_SUBJECT...")] = ()
    """A run's id (or how it begins), its name, or its subject."""
    all: bool = False
    """Every run of this dataset."""

    def answer(self) -> Answer:
        from flows.queue import cancel
        from flows.server import connect

        if bool(self.runs) == self.all:
            raise UserError("Say which runs to cancel.", "headcast cancel RUN or SUBJECT, or --all")
        with connect(self.data) as client:
            lines = cancel(client, self.runs, self.data, self.all)
        told = {"Cancelling": "its stage leaves after this step, and what is done is kept"}
        text = "\n".join(
            f"{line['name']}  {line['state']}: {told.get(line['state'], line['reason'])}" for line in lines
        )
        return {"schema": 1, "runs": lines}, text or "Nothing is waiting or at work.", 0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _queue_text(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return "The queue is empty."
    rows = []
    for line in lines:
        what = line["progress"] or line["reason"] or ""
        rows.append(f"{line['group']:<10}{line['name']:<28}{line['state']:<16}{line['id'][:8]}  {what}".rstrip())
    return "\n".join(rows)
