"""A service on one machine: Prefect's server and workers as children that are started again when they die.

`headcast serve` is the supervisor. Its children end with it, however it ends; what a former one left is ended by the
next. Runs whose process is gone are found here within seconds (`flows.recovery`); automations do the same from their
heartbeats where there is no supervisor (`automations.yaml`).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.environment import LOOPBACK, MARK_SERVICE, gpu_count, quiet_prefect, service_environment, worker_name
from flows.server import HOME, RECORD, is_healthy, only_one, polled
from pipeline.dataset import write_json
from pipeline.errors import StageError
from pipeline.supervision import Child, Say, end_marked, free_port, stop_asked

FIRST_PORT, LAST_PORT = 4200, 4299
START_SECONDS = 180.0
WORKER_SECONDS = 60.0
STOP_SECONDS = 45.0  # of a worker, which gives each of its runs 30 s
CHECK_SECONDS = 2.0


@dataclass(frozen=True)
class Options:
    """What a service is told."""

    data: Path
    """The dataset directory; the server's database lies in it."""
    host: str = "127.0.0.1"
    port: int | None = None
    runs: int = 1
    """Subjects at work at one time."""
    pools: Sequence[str] = ("cpu",)
    """Work pools that this machine's workers serve."""
    cron: str | None = None
    timezone: str | None = None
    store: str | None = None  # where the results of runs are kept
    night: dict[str, Any] | None = None  # fields of the nightly request

    @property
    def home(self) -> Path:
        return self.data.absolute() / HOME


def serve(options: Options, say: Say) -> dict[str, Any]:
    """Serve a dataset until Ctrl+C or SIGTERM. Returns what the service was, as plain data.

    Raises:
        UserError: another service serves this dataset, the port is taken, or the schedule is none.
        StageError: the server does not start.
    """
    from flows.declarations import read_schedule

    quiet_prefect()
    nightly = read_schedule(options.cron, options.timezone)
    options.home.mkdir(parents=True, exist_ok=True)
    with only_one(options.data), stop_asked() as stop:
        end_marked(MARK_SERVICE, str(options.home), 10.0)  # what a killed service left
        service = Service(options, stop, say)
        try:
            service.start_server()
            if not stop.is_set():
                service.introduce(nightly)
                service.supervise()
        finally:
            say("Stopping: stages at work leave after their step and go on with the next headcast serve.")
            service.end()
    return service.record


class Service:
    """A server and the workers of this machine.

    Args:
        options: what it is told.
        stop: set when it shall end.
        say: takes lines for the user.
    """

    def __init__(self, options: Options, stop: threading.Event, say: Say) -> None:
        self._options, self._stop, self._say = options, stop, say
        port = free_port(options.host, [options.port] if options.port else range(FIRST_PORT, LAST_PORT + 1))
        address = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
        page = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        self._url = f"{page}/api"
        self._server = self._prefect("server", "server", "start", "--host", options.host, "--port", str(port))
        self._workers = [
            self._prefect(f"worker-{pool}", "worker", "start", "--pool", pool, "--name", worker_name(pool))
            for pool in options.pools
        ]
        self.record = {
            "schema": 1,
            "url": self._url,
            "page": page,
            "data": str(options.data.absolute()),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _prefect(self, name: str, *arguments: str) -> Child:
        options = self._options
        environment = service_environment(options.home, self._url, options.host, options.runs)
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        return Child(name, command, environment, options.home / f"{name}.log")

    def start_server(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            StageError: it does not.
        """
        self._server.start()
        end = time.monotonic() + START_SECONDS
        while not is_healthy(self._url, 5.0) and not self._stop.wait(0.3):
            if not self._server.alive() or time.monotonic() > end:
                raise StageError("The server does not start.", f"its log tells why: {self._server.log}")

    def introduce(self, nightly: Any) -> None:
        """Tell the server what it must know, start the workers, and say where everything is.

        Raises:
            StageError: the server does not take it.
        """
        os.environ.update({"PREFECT_API_URL": self._url, "PREFECT_HOME": str(self._options.home)})
        os.environ.pop("PREFECT_PROFILE", None)
        import httpx
        from prefect.client.orchestration import get_client
        from prefect.deployments.runner import DeploymentApplyError

        from flows.deployments import set_up
        from flows.results import share_results

        try:
            with get_client(sync_client=True) as client:
                names = set_up(client, self._options.runs, gpu_count(), nightly, self._options.night)
                share_results(self._options.store)
                for worker in self._workers:
                    worker.start()
                self._wait_for_workers(client)
        except (httpx.HTTPError, DeploymentApplyError) as error:
            raise StageError(f"The server does not take its deployments: {str(error)[:300]}.", "see its log") from error
        write_json(self._options.home / RECORD, self.record)
        data, host = self._options.data, self._options.host
        self._say(f"Serving '{data}' at {self.record['page']} (deployments: {', '.join(names)}).")
        if host not in LOOPBACK:
            self._say(
                f"Warning: {host} is open to others, and who reaches it can run code here. "
                "Set PREFECT_SERVER_API_AUTH_STRING, or use a tunnel."
            )
        if nightly is not None:
            self._say(f"Nightly: {nightly.cron} in {nightly.timezone}.")
        where = "" if data == Path("data") else f" --data {data}"
        self._say(f"Submit: headcast submit VIDEO{where}    Look: headcast queue{where}    Stop: Ctrl+C")

    def _wait_for_workers(self, client: Any) -> None:
        """Wait until workers poll, for a while: one that dies at its start is the supervisor's to start again."""
        end = time.monotonic() + WORKER_SECONDS
        while time.monotonic() < end and not self._stop.wait(0.5):
            if all(polled(client, pool) for pool in self._options.pools):
                return

    def supervise(self) -> None:
        """Start again what dies, and find runs whose process is gone, until asked to stop."""
        from flows.recovery import Watch

        watch = Watch(self._options.home, {pool: worker_name(pool) for pool in self._options.pools})
        while not self._stop.wait(CHECK_SECONDS):
            alive = [child.check(self._say) for child in (self._server, *self._workers)]
            if alive[0] and is_healthy(self._url, 2.0):
                for line in watch.check():
                    self._say(line)

    def end(self) -> None:
        """End workers first, so that their runs' last words reach the server."""
        for worker in self._workers:
            worker.ask_to_stop()
        for worker in self._workers:
            worker.finish(STOP_SECONDS)
        self._server.ask_to_stop()
        self._server.finish(15.0)
        end_marked(MARK_SERVICE, str(self._options.home), 5.0)
        (self._options.home / RECORD).unlink(missing_ok=True)
