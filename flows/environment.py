"""Prefect's settings for a machine that keeps to itself: quiet, offline, nothing reported to anyone."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from pipeline.logs import json_wanted, set_up_logging
from pipeline.run import usable_cores
from pipeline.supervision import environments

SILENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
}
"""What keeps Prefect from reporting to anyone; servers, workers and jobs in containers have it too (docker/)."""

_SETTINGS = {
    **SILENT,
    # The embedded server serves no page; a cold start on a busy machine takes longer than the default allows.
    "PREFECT_SERVER_UI_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    # A stage's error is a message of ours; Prefect's traceback goes to the run's log, not to the terminal.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # What is kept of a run's results is read by other machines: never a pickle.
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
}

# An embedded server inherits this mark of the process that started it.
_MARK = "HEADCAST_PROCESS"
# Processes of a service, and those that they start, inherit the folder of its database.
MARK_SERVICE = "HEADCAST_SERVICE"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def quiet_prefect() -> None:
    """Set the environment before the first `import prefect`; what the user has set stays.

    Without a server of the user's own, Prefect's home is headcast's, so that an embedded server never migrates the
    database of another installation.
    """
    if json_wanted():  # a worker's process has not passed the command line
        set_up_logging()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ[_MARK] = str(os.getpid())
    end_orphaned_servers()
    if not {"PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_HOME"} & set(os.environ):
        os.environ["PREFECT_HOME"] = str(_own_home())


def shield_server() -> None:
    """Start embedded servers in a process group of their own, once Prefect is imported.

    A terminal sends Ctrl+C to the whole group; without its server a run that stops would wait for it for minutes.
    """
    from prefect.server.api import server

    popen = functools.partial(subprocess.Popen, process_group=0)
    vars(server)["subprocess"] = SimpleNamespace(**{**vars(subprocess), "Popen": popen})


def _own_home() -> Path:
    """A folder for the embedded server's database; a passing one where the user's data folder cannot be written."""
    import platformdirs

    home = platformdirs.user_data_path("headcast", appauthor=False) / "prefect"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="headcast-prefect-"))
    return home


def end_orphaned_servers() -> None:
    """End embedded servers whose headcast was killed: `kill -9` leaves it no time to do so itself (Linux)."""
    for process, environment in environments():
        starter = environment.get(_MARK, "")
        if starter and "PREFECT__SERVER_EPHEMERAL" in environment and not Path("/proc", starter).exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)


def service_environment(home: Path, url: str, host: str, runs: int) -> dict[str, str]:
    """What a service's children are started with.

    Args:
        home: the folder of its database.
        url: of its API.
        host: what it listens on.
        runs: subjects at work at one time, which share the cores.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if name not in (_MARK, "PREFECT_PROFILE")},
        # Runs work in a folder of their own, with this very code and interpreter.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_UI_ENABLED": "true",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",  # to the log files
        "PREFECT_WORKER_QUERY_SECONDS": "3",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "HEADCAST_THREADS": str(max(usable_cores() // runs, 1)),
        MARK_SERVICE: str(home),
    }
    return environment if host in LOOPBACK else {**environment, "PREFECT_SERVER_UI_API_URL": "/api"}


def gpu_count() -> int:
    """NVIDIA devices of this machine, told without loading torch."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def worker_run() -> str | None:
    """The id of the run that a worker started this process for, where one did."""
    return os.environ.get("PREFECT__FLOW_RUN_ID")


def end_with_worker() -> None:
    """Have a run that a worker started stop when that worker dies: nobody would hear what comes of it."""
    if worker_run() is not None:
        threading.Thread(target=_watch_worker, args=(os.getppid(),), daemon=True).start()


def _watch_worker(worker: int) -> None:
    while os.getppid() == worker:
        time.sleep(0.1)
    # Nobody reads what is printed any more; a broken pipe must not look like a fault of the stage.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.kill(os.getpid(), signal.SIGTERM)


def worker_name(pool: str) -> str:
    """A worker's name; it tells which machine serves a pool."""
    return f"{socket.gethostname()}-{pool}"
