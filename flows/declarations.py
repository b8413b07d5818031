"""What `prefect.yaml` and `automations.yaml` declare, read and checked."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import UserError


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
