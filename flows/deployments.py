"""What a server must know of headcast: work pools, limits, deployments and automations, from the files that say it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import UserError

POOLS = ("cpu", "gpu")
"""Work pools, one for each kind of machine (`Stage.needs`)."""


class Schedule(BaseModel):
    """When a deployment runs by itself."""

    model_config = ConfigDict(extra="forbid")

    cron: str
    timezone: str
    active: bool = False

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ValueError, OSError, KeyError):
            raise ValueError(f"'{value}' is no time zone; for example Europe/Berlin") from None
        return value

    @field_validator("cron")
    @classmethod
    def _readable(cls, value: str) -> str:
        from prefect.client.schemas.schedules import CronSchedule

        CronSchedule(cron=value)
        return value


class Limit(BaseModel):
    """How many runs of a deployment there are at one time."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"


class Pool(BaseModel):
    """The work pool that a deployment's runs wait in."""

    name: Literal["cpu", "gpu"]
    job_variables: dict[str, Any] = Field(default_factory=dict)


class Deployment(BaseModel):
    """One entry of `prefect.yaml`."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str
    entrypoint: str
    """The flow, as module.function."""
    work_pool: Pool
    parameters: dict[str, Any] = Field(default_factory=dict)
    schedules: list[Schedule] = Field(default_factory=list)
    concurrency_limit: Limit | None = None

    def flow(self) -> Any:
        """The flow itself."""
        module, _, function = self.entrypoint.rpartition(".")
        return getattr(importlib.import_module(module), function)


def read_deployments(path: Path | None = None) -> list[Deployment]:
    """The deployments of `prefect.yaml`.

    Raises:
        UserError: an entry is not one, such as a schedule without a time zone.
    """
    path = path or _shipped("prefect.yaml")
    deployments = []
    for entry in _read_yaml(path).get("deployments", []):
        try:
            deployments.append(Deployment.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            name = entry.get("name") if isinstance(entry, dict) else entry
            raise UserError(f"'{path}', deployment '{name}', {where}: {first['msg']}.", "mend the file") from None
    return deployments


def read_automations() -> list[Any]:
    """The automations of `automations.yaml`, as Prefect's objects."""
    from prefect.events.schemas.automations import AutomationCore

    entries = _read_yaml(_shipped("automations.yaml"))["automations"]
    return [AutomationCore.model_validate(entry) for entry in entries]


def set_up(client: Any, runs: int, gpus: int, nightly: Schedule | None = None) -> list[str]:
    """Tell a server all of it, whether it is new or knows an older state of it. Returns the deployments' names.

    Args:
        client: of the server, synchronous.
        runs: subjects at work at one time on the machines without a GPU.
        gpus: GPUs, each of which bears one task at a time.
        nightly: replaces the schedule of the deployment `nightly`.
    """
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

    for name, limit in zip(POOLS, (runs, max(gpus, 1)), strict=True):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"), overwrite=True)
        client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))
    client.create_concurrency_limit("gpu", max(gpus, 1))
    known = {automation.name: automation.id for automation in client.read_automations()}
    for automation in read_automations():
        if automation.name in known:
            client.update_automation(known[automation.name], automation)
        else:
            client.create_automation(automation)
    return [_deploy(deployment, nightly) for deployment in read_deployments()]


def _deploy(deployment: Deployment, nightly: Schedule | None) -> str:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    schedules = [nightly] if nightly is not None and deployment.name == "nightly" else deployment.schedules
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
            for schedule in schedules
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


def _shipped(name: str) -> Path:
    """A file that comes with headcast: at the top of a checkout, or where an installation puts it."""
    places = (Path(__file__).parents[1], Path(sys.prefix, "share", "headcast"))
    return next((place / name for place in places if (place / name).is_file()), places[0] / name)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"'{path}' cannot be read: {error}.", "install headcast again, or mend the file") from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is no list of deployments.", "install headcast again, or mend the file")
    return content


def read_schedule(cron: str | None, timezone: str | None) -> Schedule | None:
    """What `--nightly` and `--timezone` ask for.

    Raises:
        UserError: no time zone, or one that is none, or no cron expression.
    """
    if cron is None:
        if timezone is not None:
            raise UserError("A time zone without a schedule.", 'say when: --nightly "0 22 * * *"')
        return None
    if timezone is None:
        raise UserError(
            f"The schedule '{cron}' has no time zone.", "say whose night it is: --timezone Europe/Berlin, or UTC"
        )
    try:
        return Schedule(cron=cron, timezone=timezone, active=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"'{cron}' in '{timezone}' is no schedule: {reason}.", 'for example: "0 22 * * *"') from None
