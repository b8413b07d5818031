"""The job templates of work pools: written by the tool, taken by a server, and jobs that the image can run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from prefect_server import PrefectServer

from flows.environment import SILENT
from tools.write_pool_templates import TARGET, templates

NAMES = ("process", "docker-cpu", "docker-gpu", "kubernetes-cpu", "kubernetes-gpu")


def committed(name: str) -> dict[str, Any]:
    return dict(json.loads((TARGET / f"{name}.json").read_text()))


def test_files_are_what_the_tool_writes() -> None:
    assert {path.stem: committed(path.stem) for path in TARGET.iterdir()} == dict(templates())
    assert {path.stem for path in TARGET.iterdir()} == set(NAMES)


@pytest.mark.prefect
def test_server_takes_every_template(tmp_path: Path) -> None:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import WorkPoolCreate

    first, *others = NAMES
    with PrefectServer(tmp_path) as server:
        command = [sys.executable, "-m", "prefect", "--no-prompt", "work-pool", "create", first, "--type", first]
        command += ["--base-job-template", str(TARGET / f"{first}.json")]
        subprocess.run(command, env=server.client_environment, stdout=subprocess.DEVNULL, check=True)
        with SyncPrefectClient(server.url) as client:
            for name in others:
                pool = WorkPoolCreate(name=name, type=name.partition("-")[0], base_job_template=committed(name))
                client.create_work_pool(pool)
            assert all(client.read_work_pool(name).base_job_template == committed(name) for name in NAMES)


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_docker_job(machine: str) -> None:
    from docker.types import HostConfig
    from prefect_docker.worker import DockerWorkerJobConfiguration

    template = committed(f"docker-{machine}")
    job = configure(DockerWorkerJobConfiguration, template)
    options = job.container_create_kwargs
    # The image's own entry point would read Prefect's command line as headcast's.
    assert options["entrypoint"] == ["tini", "--"]
    assert not set(options) & set(DockerWorkerJobConfiguration.model_fields), "the worker drops those"
    assert options["read_only"] and options["cap_drop"] == ["ALL"] and not job.privileged
    assert job.env.items() >= SILENT.items()
    assert job.image == {"cpu": "headcast:cpu", "gpu": "headcast:cuda"}[machine]
    assert {volume.partition(":")[2] for volume in job.volumes} == {"/srv", "/var/cache/headcast"}
    # What the Docker client makes of it.
    host = HostConfig(version="1.43", device_requests=options.get("device_requests"), cap_drop=options["cap_drop"])
    gpus = [(request["Driver"], request["Count"]) for request in host.get("DeviceRequests", [])]
    assert gpus == ([("nvidia", 1)] if machine == "gpu" else [])


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_kubernetes_job(machine: str) -> None:
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    job = configure(KubernetesWorkerJobConfiguration, committed(f"kubernetes-{machine}"))
    pod = job.job_manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["tini", "--"]
    assert container["image"] == {"cpu": "headcast:cpu", "gpu": "headcast:cuda"}[machine]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (machine == "gpu")
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {"dataset": "/srv"}
    assert {volume["name"] for volume in pod["volumes"]} == {"dataset"}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "headcast-dataset"
    assert pod["terminationGracePeriodSeconds"] >= 60


def configure(kind: Any, template: dict[str, Any]) -> Any:
    """A worker's job, as it makes it of a pool's template and a deployment that changes nothing; asks no server."""
    import asyncio

    return asyncio.run(kind.from_template_and_values(template, {}, client=Mock()))
