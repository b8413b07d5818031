"""Seven stages that do next to nothing: what orchestration costs, and what it survives, is measured with them.

`HEADCAST_STAGES=noop` puts them in the place of the real ones, in every command and process. They write a few files,
one step after another, and resume as the real ones do. `HEADCAST_NOOP` says how, as JSON (`Behaviour`).
"""

from __future__ import annotations

import os
import time

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.dataset import write_atomic
from pipeline.errors import StageError, Unavailable, UserError
from pipeline.stage import Result, Stage, StageRun, Verdict

ORDER = {
    "decode": (),
    "track": ("decode",),
    "matte": ("decode", "track"),
    "fit": ("decode", "track", "matte"),
    "train": ("decode", "matte", "fit"),
    "evaluate": ("decode", "matte", "fit", "train"),
    "export": ("decode", "matte", "fit", "train"),
}


class Behaviour(BaseModel):
    """What the stages do; a fault names the stage that has it, by subject."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = 2
    """Files that a stage writes."""
    seconds: float = 0.0
    """How long a stage takes."""
    slow: dict[str, float] = {}
    """As `seconds`, for these subjects."""
    bytes: int = 64
    """Size of each file."""
    fail: dict[str, str] = {}
    """Fails each time, as a video without a face does."""
    flaky: dict[str, str] = {}
    """Fails at its first attempt, as a network that comes back does."""
    hang: dict[str, str] = {}
    """Never ends, and hears no stop."""


def behaviour() -> Behaviour:
    """What HEADCAST_NOOP asks for.

    Raises:
        UserError: it is not JSON of that kind.
    """
    try:
        return Behaviour.model_validate_json(os.environ.get("HEADCAST_NOOP", "{}"))
    except ValidationError as error:
        raise UserError(f"HEADCAST_NOOP cannot be read: {error}.", "see stages/noop.py") from None


def work(run: StageRun) -> Result:
    """Write the files that are not there yet, step by step.

    Raises:
        StageError: as told to.
        Interrupted: a stop was asked for.
    """
    told = behaviour()
    stage, subject = run.work.name.partition("-")[0], run.subject.name
    if told.fail.get(subject) == stage:
        raise StageError("No face in any of 12 frames.", "film the face")
    if told.flaky.get(subject) == stage and not (run.scratch / "tried").exists():
        write_atomic(run.scratch / "tried", b"")
        raise Unavailable("The file server did not answer.", "try again")
    while told.hang.get(subject) == stage:
        time.sleep(60)
    with run.reporter.task(stage, told.steps, "steps") as task:
        for step in range(told.steps):
            path = run.work / f"{step:04d}"
            if not path.exists():
                time.sleep(told.slow.get(subject, told.seconds) / told.steps)
                write_atomic(path, f"{stage} {step} ".encode().ljust(told.bytes, b"."))
            task.advance()
            run.check_stop()
    return Result(Verdict("good", f"{stage.capitalize()}: good. {told.steps} steps."), {"steps": told.steps})


STAGES: tuple[Stage, ...] = tuple(
    Stage(name, 1, inputs, work, needs="gpu" if name == "train" else "cpu", durable=("*", "scratch/*"))
    for name, inputs in ORDER.items()
)
