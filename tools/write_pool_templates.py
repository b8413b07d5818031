"""Write docker/pools/: Prefect's own job templates with what headcast needs; a test checks that they are up to date.

One file a machine class (cpu, gpu) and kind of pool; a process has nothing that differs between the classes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from flows.environment import SILENT, quiet_prefect

TARGET = Path(__file__).resolve().parent.parent / "docker" / "pools"

# Of docker/Dockerfile.
USER_ID = 10001
DATASET, MODELS = "/srv", "/var/cache/headcast"
# The image's entry point is headcast; Prefect starts a job with a command line of its own.
ENTRY_POINT = ["tini", "--"]
# How long a run that is told to stop has to finish its step and leave a checkpoint.
GRACE_SECONDS = 120

Machine = Literal["cpu", "gpu"]
MEMORY_GB = {"cpu": 6, "gpu": 16}


def templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and base job template of every pool."""
    yield "process", process_template()
    for machine in ("cpu", "gpu"):
        yield f"docker-{machine}", docker_template(machine)
        yield f"kubernetes-{machine}", kubernetes_template(machine)


def process_template() -> dict[str, Any]:
    from prefect.workers.process import ProcessWorker

    return _changed(ProcessWorker.get_default_base_job_template(), {"env": SILENT})


def docker_template(machine: Machine) -> dict[str, Any]:
    """Containers on a Docker host; its volumes headcast-dataset and headcast-models may lie anywhere."""
    from prefect_docker.worker import DockerWorker

    options: dict[str, Any] = {
        "entrypoint": ENTRY_POINT,
        "read_only": True,
        "tmpfs": {"/tmp": "", "/home/headcast": "mode=1777"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }
    if machine == "gpu":
        options["device_requests"] = [{"driver": "nvidia", "count": 1, "capabilities": [["gpu"]]}]
    defaults = {
        "env": SILENT,
        "image": _image(machine),
        "image_pull_policy": "IfNotPresent",
        "volumes": [f"headcast-dataset:{DATASET}", f"headcast-models:{MODELS}"],
        "mem_limit": f"{MEMORY_GB[machine]}g",
        "auto_remove": True,
        "container_create_kwargs": options,
    }
    return _changed(DockerWorker.get_default_base_job_template(), defaults)


def kubernetes_template(machine: Machine) -> dict[str, Any]:
    """Jobs of a cluster; the dataset is a claim that its nodes can mount at once (ReadWriteMany)."""
    from prefect_kubernetes.worker import KubernetesWorker

    defaults = {
        "env": SILENT,
        "image": _image(machine),
        "finished_job_ttl": 3600,
        "cpu_request": "2",
        "memory_request": f"{MEMORY_GB[machine] // 2}Gi",
        "memory_limit": f"{MEMORY_GB[machine]}Gi",
    }
    template = _changed(KubernetesWorker.get_default_base_job_template(), defaults)
    _add_variable(template, "dataset_claim", "headcast-dataset", "The persistent volume claim that holds the dataset.")
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = GRACE_SECONDS
    pod["securityContext"] = {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    pod["volumes"] = [{"name": "dataset", "persistentVolumeClaim": {"claimName": "{{ dataset_claim }}"}}]
    (container,) = pod["containers"]
    container["command"] = ENTRY_POINT
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container["volumeMounts"] = [{"name": "dataset", "mountPath": DATASET}]
    if machine == "gpu":
        _add_variable(template, "gpu_limit", "1", "How many GPUs a job gets; whole ones.")
        container["resources"]["limits"]["nvidia.com/gpu"] = "{{ gpu_limit }}"
    return template


def _image(machine: Machine) -> str:
    return "headcast:cpu" if machine == "cpu" else "headcast:cuda"


def _changed(template: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A copy with other defaults for variables that are there."""
    template = copy.deepcopy(template)
    for name, value in defaults.items():
        template["variables"]["properties"][name]["default"] = value
    return template


def _add_variable(template: dict[str, Any], name: str, default: str, description: str) -> None:
    template["variables"]["properties"][name] = {
        "type": "string",
        "title": name.replace("_", " ").capitalize(),
        "description": description,
        "default": default,
    }


def main() -> None:
    quiet_prefect()
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, template in templates():
        path = TARGET / f"{name}.json"
        path.write_text(json.dumps(template, indent=2, ensure_ascii=False) + "\n")
        print(path)


if __name__ == "__main__":
    main()
