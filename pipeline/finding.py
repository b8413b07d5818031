"""What a check found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["fine", "degraded", "blocked"]
LEVELS: tuple[Level, ...] = ("fine", "degraded", "blocked")


@dataclass(frozen=True)
class Finding:
    """One thing looked at: how bad it is, what was seen, and what to do about it."""

    level: Level
    what: str
    fix: str = ""
    severe: bool = False
    """Degraded so far that the outcome will be poor rather than fair."""


def worst(findings: Iterable[Finding]) -> Level:
    """The level of the worst finding."""
    return max((finding.level for finding in findings), key=LEVELS.index)
