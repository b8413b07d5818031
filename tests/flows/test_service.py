"""A real service (server and worker under `headcast serve`) with stages that do next to nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.environment import MARK_SERVICE
from pipeline.supervision import environments, marked

pytestmark = [pytest.mark.prefect, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
GENEROUS_SECONDS = 240.0
"""Limits what waits for ever; nothing is timed here."""
BEHAVIOUR = {"seconds": 1.0, "steps": 4, "slow": {"cleo": 20.0}, "fail": {"broken": "track"}}
COMMAND = [sys.executable, "-m", "pipeline.cli"]


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**own, "HEADCAST_STAGES": "noop", "HEADCAST_NOOP": json.dumps(BEHAVIOUR), "PYTHONPATH": str(ROOT), **more}


def wait_for(what: Callable[[], Any]) -> Any:
    """The first true answer."""
    end = time.monotonic() + GENEROUS_SECONDS
    while not (answer := what()):
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.2)
    return answer


@dataclass
class Service:
    """A dataset and its service."""

    data: Path
    clip: Path
    process: subprocess.Popen[bytes]

    @property
    def record(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.data / ".prefect" / "serve.json").read_text())
        return content

    def command(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments, "--data", str(self.data)],
            env=environment(**more),
            capture_output=True,
            text=True,
            check=False,
            timeout=GENEROUS_SECONDS,
        )

    def submit(self, subject: str, *more: str) -> str:
        """Put a subject in the queue; the run's id."""
        done = self.command("submit", str(self.clip), "--subject", subject, "--no-check", "--json", *more)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["runs"][0]["id"])

    def run(self, identifier: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = httpx.get(f"{self.record['url']}/flow_runs/{identifier}", timeout=30).json()
        except httpx.HTTPError:  # the server was killed and is on its way back
            return {"state": {"name": "unknown"}}
        return content

    def ended(self, identifier: str) -> dict[str, Any]:
        """The run, once it has come to its end."""

        def look() -> dict[str, Any] | None:
            run = self.run(identifier)
            return run if run["state"]["name"] in ("Completed", "Failed", "Cancelled") else None

        run: dict[str, Any] = wait_for(look)
        return run

    def at_work(self, subject: str) -> None:
        """Wait until a stage of a subject has written something."""
        wait_for(lambda: list((self.data / subject).glob(".work/*/0000")))

    def processes(self, words: str) -> list[int]:
        """The service's processes with these words in their command line, or this run in their environment."""
        found = []
        for process, told in environments():
            if told.get(MARK_SERVICE) == str(self.data / ".prefect"):
                line = Path("/proc", str(process), "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if words in line or told.get("PREFECT__FLOW_RUN_ID") == words:
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    import av
    import numpy as np

    folder = tmp_path_factory.mktemp("service")
    clip = folder / "clip.mp4"
    with av.open(str(clip), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        for shade in range(0, 250, 25):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    data = folder / "data"
    with open(folder / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [*COMMAND, "serve", "--data", str(data)], env=environment(), stdout=log, stderr=log, process_group=0
        )
    service = Service(data, clip, process)
    try:
        wait_for(lambda: process.poll() is not None or (data / ".prefect" / "serve.json").exists())
        assert process.poll() is None, (folder / "serve.log").read_text()
        yield service
    finally:
        service.process.terminate()  # a test may have put another one in its place
        try:
            service.process.wait(90)
        finally:
            service.process.kill()


def test_submitted_subjects_are_done_or_tell_why_not(service: Service) -> None:
    first = service.submit("anna")
    second = service.command("submit", str(service.clip), "--subject", "broken", "--no-check", "--watch")
    assert service.ended(first)["state"]["name"] == "Completed"
    assert (service.data / "anna" / "export" / "stage.json").is_file()
    assert second.returncode == 1
    assert "No face in any of 12 frames" in second.stderr
    queue = json.loads(service.command("queue", "--json").stdout)["runs"]
    assert [(line["subject"], line["group"]) for line in queue] == [("broken", "failed")]
    assert "No face" in queue[0]["reason"]
    again = service.command("submit", str(service.clip), "--subject", "anna", "--no-check")
    assert (again.returncode, again.stdout.strip()) == (0, "")
    assert "nothing to do" in again.stderr


def test_page_shows_verdicts_and_a_link_to_the_report(service: Service) -> None:
    found = httpx.post(f"{service.record['url']}/artifacts/latest/filter", json={}, timeout=30).json()
    shown = {artifact["key"]: artifact["data"] for artifact in found}
    rows = json.loads(shown["verdicts-anna"])
    assert [row["stage"] for row in rows] == ["decode", "track", "matte", "fit", "train", "evaluate", "export"]
    assert {row["verdict"] for row in rows} == {"good"}
    assert (service.data / "anna" / "report.html").as_uri() in shown["report-anna"]


def test_cancelled_runs_stop_and_keep_what_is_done(service: Service) -> None:
    running = service.submit("cleo")
    service.at_work("cleo")
    waiting = service.submit("dora")
    done = service.command("cancel", "cleo", waiting)
    assert done.returncode == 0, done.stderr
    assert service.ended(running)["state"]["name"] == "Cancelled"
    assert service.ended(waiting)["state"]["name"] == "Cancelled"
    assert list((service.data / "cleo").glob(".work/decode-*/0000"))
    assert "cleo" not in service.command("queue").stdout


def test_a_killed_worker_and_its_run_are_started_again(service: Service) -> None:
    run = service.submit("emil")
    service.at_work("emil")
    for process in [*service.processes("worker start"), *service.processes(run)]:
        os.kill(process, signal.SIGKILL)
    ended = service.ended(run)
    assert ended["state"]["name"] == "Completed"
    assert ended["run_count"] == 2


def test_a_killed_server_is_started_again_and_the_run_ends(service: Service) -> None:
    run = service.submit("fritz")
    service.at_work("fritz")
    for process in service.processes("server start"):
        os.kill(process, signal.SIGKILL)
    assert service.ended(run)["state"]["name"] == "Completed"


def test_bad_input_is_told_in_one_message(service: Service) -> None:
    video = ["submit", str(service.clip), "--subject", "gina", "--no-check"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
    cases: list[tuple[list[str], dict[str, str], int, str]] = [
        ([*video, "--deployment", "subject/none"], {}, 2, "There is no deployment 'subject/none'"),
        (["queue"], {"PREFECT_API_URL": nobody}, 1, f"The server at {nobody} does not answer"),
        (["queue"], {"PREFECT_API_URL": "4200"}, 2, "PREFECT_API_URL is '4200'"),
        (["submit", "nowhere.mp4"], {}, 2, "nowhere.mp4"),
        (["cancel", "nobody"], {}, 2, "No run 'nobody' is waiting or at work"),
        (["cancel"], {}, 2, "Say which runs to cancel"),
        (["serve"], {}, 2, f"is served already: {service.record['page']}"),
        (["serve", "--nightly", "0 22 * * *"], {}, 2, "has no time zone"),
        (["serve", "--nightly", "0 22 * * *", "--timezone", "Mars"], {}, 2, "'Mars' is no time zone"),
    ]
    for arguments, more, code, words in cases:
        done = service.command(*arguments, **more)
        assert (done.returncode, words in done.stderr) == (code, True), (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.count("error:") == 1


def test_a_pool_without_a_worker_is_told(service: Service) -> None:
    done = service.command(
        "submit", str(service.clip), "--subject", "hugo", "--no-check", "--deployment", "subject/stages"
    )
    assert done.returncode == 0
    assert "No worker polls pool 'gpu' now" in done.stderr
    assert service.command("cancel", "hugo").returncode == 0


def test_a_service_that_is_killed_leaves_nothing_running_and_the_next_goes_on(service: Service) -> None:
    run = service.submit("ida")
    service.at_work("ida")
    service.process.kill()
    service.process.wait()
    home = service.data / ".prefect"
    wait_for(lambda: not marked(MARK_SERVICE, str(home)))
    (home / "serve.json").unlink()
    with open(home / "serve.log", "wb") as log:
        service.process = subprocess.Popen(
            [*COMMAND, "serve", "--data", str(service.data)],
            env=environment(),
            stdout=log,
            stderr=log,
            process_group=0,
        )
    wait_for((home / "serve.json").exists)
    assert service.ended(run)["state"]["name"] == "Completed"
    service.process.terminate()
    assert service.process.wait(90) == 0
    assert not marked(MARK_SERVICE, str(home))
    assert not (home / "serve.json").exists()


def test_without_a_service_it_is_said_how_to_start_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "queue", "--data", str(tmp_path)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "No service runs for" in done.stderr
    assert f"headcast serve --data {tmp_path}" in done.stderr
