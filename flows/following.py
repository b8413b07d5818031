"""Waiting for submitted runs, as if they were carried out here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from flows.queue import Submitted, progress_of, whose
from pipeline import errors
from pipeline.errors import HeadcastError, Interrupted, StageError

CRASH_SECONDS = 30.0
"""A crashed run is scheduled again within this time, or not at all."""
POLL_SECONDS = 1.0


def follow(client: Any, runs: Sequence[Submitted], say: Callable[[str], None]) -> int:
    """Wait until runs have ended, telling each change. Returns the worst exit code."""
    told: dict[str, str] = {}
    crashed: dict[str, float] = {}
    codes: dict[str, int] = {}
    while len(codes) < len(runs):
        for entry in runs:
            if entry.id in codes:
                continue
            run = client.read_flow_run(entry.id)
            kind = run.state.type.value
            line = (progress_of(*whose(run)) if kind == "RUNNING" else None) or run.state.name
            if told.get(entry.id) != line:
                told[entry.id] = line
                say(f"{entry.name}: {line}")
            if kind == "CRASHED" and time.monotonic() < crashed.setdefault(entry.id, time.monotonic()) + CRASH_SECONDS:
                continue  # it is scheduled again meanwhile
            if kind != "CRASHED":
                crashed.pop(entry.id, None)
            if kind in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED"):
                codes[entry.id] = exit_code(run.state)
                if codes[entry.id]:
                    say(f"{entry.name}: {run.state.message}")
        time.sleep(POLL_SECONDS)
    return max(codes.values(), default=0)


def exit_code(state: Any) -> int:
    """The exit code that a run of the same request would have had here."""
    kind = state.type.value
    if kind == "COMPLETED":
        return 0
    if kind == "CANCELLED":
        return Interrupted.exit_code
    name = str(state.message or "").removeprefix("Flow run encountered an exception: ").partition(":")[0]
    known = getattr(errors, name, None)
    return known.exit_code if isinstance(known, type) and issubclass(known, HeadcastError) else StageError.exit_code
