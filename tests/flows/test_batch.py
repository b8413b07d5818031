"""The batch flow with stages that do next to nothing: real processes, faults, clusters, Ctrl+C and `kill -9`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.batch import BatchRequest
from pipeline.dataset import Dataset
from pipeline.run import last_config
from pipeline.stage import inspect_stages
from pipeline.video import write_video
from stages import noop

pytestmark = [pytest.mark.prefect, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands that share one Prefect server of this module's own."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.delenv("PREFECT_API_URL", raising=False)
        from prefect.settings import PREFECT_API_URL
        from prefect.testing.utilities import prefect_test_harness

        import flows.subject  # noqa: F401  sets the quiet environment before Prefect is imported

        with prefect_test_harness(server_startup_timeout=180):
            yield {
                "PREFECT_API_URL": str(PREFECT_API_URL.value()),
                "PREFECT_HOME": str(home),
                "HEADCAST_STAGES": "noop",
                "PYTHONPATH": str(ROOT),
                "COLUMNS": "100",
            }


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder with one small video for each of four people."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for shade, name in enumerate(("anna", "bert", "carl", "dora"), 50):
        write_video(folder / f"{name}.mp4", [np.full((64, 64, 3), shade, np.uint8)] * 3, 25)
    return folder


@pytest.fixture
def start(tmp_path: Path, server: dict[str, str]) -> Iterator[Start]:
    """Starts `headcast` with these arguments in a process group of its own, as a terminal does."""
    begun: list[subprocess.Popen[str]] = []

    def start(*arguments: object, noop: dict[str, Any] | None = None, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
        env = {**os.environ, **server, "HEADCAST_NOOP": json.dumps(noop or {}), **environment}
        pipe = subprocess.PIPE
        begun.append(
            subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True, process_group=0)
        )
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit code and what it said."""
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def outcomes(document: str) -> dict[str, str]:
    return {entry["subject"]: entry["outcome"] for entry in json.loads(document)["subjects"]}


def unfresh(data: Path) -> list[str]:
    """Stages of the dataset's subjects that are not fresh."""
    states = {s.name: inspect_stages(s, noop.STAGES, last_config(s)) for s in Dataset(data).subjects()}
    return [
        f"{name}/{state.stage}" for name, all_of_it in states.items() for state in all_of_it if state.name != "fresh"
    ]


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    return value


def test_one_that_fails_stops_no_other_and_the_rest_is_fresh_the_next_time(
    start: Start, videos: Path, tmp_path: Path
) -> None:
    arguments = ("batch", videos, "--no-check", "--workers", 2)
    code, out, err = ended(start(*arguments, "--json", noop={"fail": {"bert": "track"}}))
    assert code == 1, err
    assert outcomes(out) == {"anna": "done", "bert": "failed", "carl": "done", "dora": "done"}
    bert = json.loads(out)["subjects"][1]
    assert bert["error"] == {"stage": "track", "what": "No face in any of 12 frames.", "fix": "film the face"}
    lines = err.splitlines()
    assert [line.partition("/")[0] for line in lines] == ["[1", "[2", "[3", "[4"]
    assert any(line.endswith("bert: failed in track: No face in any of 12 frames. -> film the face") for line in lines)
    assert unfresh(tmp_path / "data")[0] == "bert/track"
    code, out, err = ended(start(*arguments))
    assert code == 0, err
    assert out.splitlines()[-1] == "1 done, 3 fresh of 4 subjects"
    assert unfresh(tmp_path / "data") == []
    # All fresh: nothing but the manifests is asked, be there a server or not.
    code, out, err = ended(start(*arguments, PREFECT_API_URL="http://127.0.0.1:9/api"))
    assert (code, out.splitlines()[-1]) == (0, "4 fresh of 4 subjects"), err


def test_input_at_fault_starts_nothing(start: Start, videos: Path, tmp_path: Path) -> None:
    table = tmp_path / "people.csv"
    table.write_text("video\nvideos/anna.mp4\nvideos/gone.mp4\n")
    code, out, err = ended(start("batch", table))
    assert (code, out) == (2, "")
    assert "people.csv row 3: There is no file" in err
    code, out, err = ended(start("batch", videos, "--cluster", "tcp://127.0.0.1:9"))
    assert (code, out) == (2, "")
    assert "threads have no cluster" in err
    assert not (tmp_path / "data").exists()


def test_ctrl_c_stops_what_is_at_work_and_begins_nothing_more(start: Start, videos: Path, tmp_path: Path) -> None:
    arguments = ("batch", videos, "--no-check", "--workers", 2)
    process = start(*arguments, "--json", noop={"seconds": 20, "steps": 200})
    until(lambda: len(list((tmp_path / "data").glob("*/.work/decode-*/0001"))) == 2)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = ended(process)
    assert code == 130, err
    assert set(outcomes(out).values()) == {"stopped"}
    assert f"To go on: headcast batch {videos} --no-check --workers 2 --json" in err
    assert {subject.name for subject in Dataset(tmp_path / "data").subjects()} == {"anna", "bert"}
    kept = len(list((tmp_path / "data").glob("*/.work/decode-*/0*")))
    assert kept >= 2
    code, out, err = ended(start(*arguments, noop={"steps": 200}))
    assert (code, unfresh(tmp_path / "data")) == (0, []), err
    resumed = json.loads((tmp_path / "data/anna/decode/stage.json").read_text())["resumed"]
    assert resumed, "it goes on where it was"


def test_killed_and_given_again_it_finishes(start: Start, videos: Path, tmp_path: Path) -> None:
    arguments = ("batch", videos, "--no-check", "--workers", 2)
    process = start(*arguments, noop={"seconds": 1, "steps": 20})
    until(lambda: list((tmp_path / "data").glob("*/track/stage.json")))
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "stages end with their run"
    assert unfresh(tmp_path / "data")
    code, _, err = ended(start(*arguments, noop={"steps": 20}))
    assert (code, unfresh(tmp_path / "data")) == (0, []), err


def test_on_a_dask_cluster_of_which_a_worker_is_killed(start: Start, videos: Path, tmp_path: Path) -> None:
    arguments = ("batch", videos, "--no-check", "--workers", 2, "--runner", "dask", "--json")
    process = start(*arguments, noop={"seconds": 3, "steps": 30, "fail": {"bert": "decode"}})
    until(lambda: list((tmp_path / "data").glob("anna/.work/*-*/0001")), 300)
    stage = next(child for child in psutil.Process(process.pid).children(recursive=True) if "stages" in child.cmdline())
    worker = stage.parent()
    assert worker is not None
    worker.kill()
    code, out, err = ended(process)
    assert code == 1, err
    assert outcomes(out) == {"anna": "done", "bert": "failed", "carl": "done", "dora": "done"}
    assert [name for name in unfresh(tmp_path / "data") if "bert" not in name] == []


def test_on_a_ray_cluster(start: Start, videos: Path, tmp_path: Path) -> None:
    arguments = ("batch", videos, "--no-check", "--workers", 2, "--runner", "ray", "--json")
    home = {"HOME": str(tmp_path)}  # Ray keeps a token there
    code, out, err = ended(start(*arguments, noop={"fail": {"bert": "track"}}, **home))
    assert code == 1, err
    assert outcomes(out) == {"anna": "done", "bert": "failed", "carl": "done", "dora": "done"}


def test_as_a_flow_its_run_is_failed_where_a_subject_is(
    server: dict[str, str], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.batch
    import flows.subject

    monkeypatch.setattr(flows.batch, "STAGES", noop.STAGES)
    monkeypatch.setattr(flows.subject, "STAGES", noop.STAGES)
    for name, value in {**server, "HEADCAST_NOOP": '{"fail": {"bert": "track"}}'}.items():
        monkeypatch.setenv(name, value)
    request = BatchRequest(what=(str(videos),), data=tmp_path / "data", check=False, workers=2)
    state: Any = flows.batch.batch_flow(request.model_dump(mode="json"), return_state=True)
    assert state.is_failed()
    assert state.message == "3 done, 1 failed of 4 subjects."
    document = state.result(raise_on_failure=False)
    assert outcomes(json.dumps(document)) == {"anna": "done", "bert": "failed", "carl": "done", "dora": "done"}
