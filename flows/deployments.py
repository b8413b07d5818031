"""What a server must know of headcast: work pools, limits, deployments and automations."""

from __future__ import annotations

import contextlib
from typing import Any

from flows.declarations import Deployment, Schedule, read_automations, read_deployments

POOLS = ("cpu", "gpu")
"""Work pools, one for each kind of machine (`Stage.needs`)."""


def set_up(
    client: Any, runs: int, gpus: int, nightly: Schedule | None = None, night: dict[str, Any] | None = None
) -> list[str]:
    """Tell a server all of it, whether it is new or knows an older state of it. Returns the deployments' names.

    Args:
        client: of the server, synchronous.
        runs: subjects at work at one time on the machines without a GPU.
        gpus: GPUs, each of which bears one task at a time.
        nightly: replaces the schedule of the deployment `nightly`.
        night: fields of its request (`pipeline.nightly.NightlyRequest`) that differ from what is declared.
    """
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists

    for name, limit in zip(POOLS, (runs, max(gpus, 1)), strict=True):
        # A pool of that name that is there may be of another type (docker/pools/), which stays as it is.
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))
    client.create_concurrency_limit("gpu", max(gpus, 1))
    known = {automation.name: automation.id for automation in client.read_automations()}
    for automation in read_automations():
        if automation.name in known:
            client.update_automation(known[automation.name], automation)
        else:
            client.create_automation(automation)
    deployments = read_deployments()
    for deployment in deployments:
        if deployment.name == "nightly":
            deployment.schedules = [nightly] if nightly is not None else deployment.schedules
            deployment.parameters = {"request": {**deployment.parameters.get("request", {}), **(night or {})}}
    return [_deploy(deployment) for deployment in deployments]


def _deploy(deployment: Deployment) -> str:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    limit = deployment.concurrency_limit
    made = RunnerDeployment.from_flow(
        deployment.flow(),
        deployment.name,
        description=deployment.description,
        parameters=deployment.parameters,
        work_pool_name=deployment.work_pool.name,
        job_variables=deployment.work_pool.job_variables,
        schedules=[
            DeploymentScheduleCreate(
                schedule=CronSchedule(cron=schedule.cron, timezone=schedule.timezone), active=schedule.active
            )
            for schedule in deployment.schedules
        ],
        concurrency_limit=None
        if limit is None
        else ConcurrencyLimitConfig(
            limit=limit.limit, collision_strategy=ConcurrencyLimitStrategy(limit.collision_strategy)
        ),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    made.apply()
    return str(made.full_name)
