"""The run history lies in PostgreSQL and survives servers and databases that are killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect_server import PrefectServer, free_port

from pipeline.dataset import Dataset, write_json

PROGRAMS = ("initdb", "postgres")
PASSWORD = "a password with / and @"


class Postgres:
    """A PostgreSQL of the test's own on loopback; it refuses to run as root, so a root's test lends it another user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user = "nobody" if os.geteuid() == 0 else None
        self.port = free_port()
        password = folder / "password"
        password.write_text(PASSWORD)
        if self.user:
            shutil.chown(folder, self.user)
            shutil.chown(password, self.user)
        self._run("initdb", "--pgdata", str(folder / "db"), "--username=prefect", "--auth=scram-sha-256",
                  f"--pwfile={password}", "--no-sync")  # fmt: skip

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run([program, *arguments], user=self.user, cwd=self.folder, stdout=subprocess.DEVNULL, check=True)

    def start(self) -> None:
        options = ["-p", str(self.port), "-c", "listen_addresses=127.0.0.1", "-k", str(self.folder)]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["postgres", "-D", str(self.folder / "db"), *options], user=self.user, cwd=self.folder, stderr=log
            )

    def crash(self) -> None:
        """End it at once, without writing out what it has in memory."""
        self.process.send_signal(3)
        self.process.wait()


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"no {' and no '.join(missing)} here: apt-get install postgresql")
    # Not in pytest's folder, which another user may not enter.
    with tempfile.TemporaryDirectory(prefix="headcast-postgres-") as folder:
        postgres = Postgres(Path(folder))
        postgres.start()
        yield postgres
        postgres.crash()


def history(server: PrefectServer, kind: str) -> list[tuple[str, str]]:
    """Name and state of every run, sorted."""
    request = urllib.request.Request(
        f"{server.url}/{kind}/filter", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        runs: list[dict[str, Any]] = json.load(answer)
    return sorted((run["name"], run["state_type"]) for run in runs)


@pytest.mark.prefect
def test_history_survives_killed_server_and_database(postgres: Postgres, tmp_path: Path) -> None:
    settings = {
        "DRIVER": "postgresql+asyncpg",
        "HOST": "127.0.0.1",
        "PORT": str(postgres.port),
        "USER": "prefect",
        "NAME": "postgres",
        "PASSWORD": PASSWORD,
    }
    subject = Dataset(tmp_path / "data").subject("anna")
    subject.source.mkdir(parents=True)
    write_json(subject.source / "source.json", {"sha256": "0" * 64})
    command = [sys.executable, "-m", "pipeline.cli", "rerun", "anna", "--data", str(subject.root.parent)]
    with PrefectServer(
        tmp_path, {f"PREFECT_SERVER_DATABASE_{name}": value for name, value in settings.items()}
    ) as server:
        environment = {**server.client_environment, "HEADCAST_STAGES": "noop"}
        subprocess.run(command, env=environment, check=True)
        flow_runs, task_runs = history(server, "flow_runs"), await_tasks(server, 7)
        assert [state for _, state in flow_runs] == ["COMPLETED"]

        server.kill()
        postgres.crash()
        postgres.start()
        server.start()

        assert history(server, "flow_runs") == flow_runs
        assert history(server, "task_runs") == task_runs
    assert not list(server.home.glob("*.db")), "the server kept a database of its own"


def await_tasks(server: PrefectServer, count: int) -> list[tuple[str, str]]:
    """Every task's run, once they are all there: the server learns of them by events, a little later."""
    end = time.monotonic() + 60
    while len(done := history(server, "task_runs")) < count or {state for _, state in done} != {"COMPLETED"}:
        assert time.monotonic() < end, f"of {count} tasks the server knows {done}"
        time.sleep(0.5)
    return done
