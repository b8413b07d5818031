"""Files of keyframes: values at given times, eased between them. Checked strictly: anybody may have written them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import UserError

MAX_BYTES, MAX_KEYFRAMES, MAX_SECONDS = 1_000_000, 1000, 600

Time = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
"""Seconds from the start."""
FileT = TypeVar("FileT", bound="KeyframeFile")


class Strict(BaseModel):
    """Plain data in which nothing is converted, unknown or not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class KeyframeFile(Strict):
    """What all such files have beside their `keyframes`, which have a `time` each."""

    version: Literal[1] = Field(alias="schema")
    easing: Literal["smooth", "linear"] = "smooth"

    def share(self, way: float) -> float:
        """How much of the way's end is in it, `way` being the share of the time between two keyframes."""
        return eased(way) if self.easing == "smooth" else way


def check_times(times: Sequence[float]) -> None:
    """Refuse times that do not begin at 0 and rise.

    Raises:
        ValueError: they do not.
    """
    if times[0] != 0 or (np.diff(times) <= 0).any():
        raise ValueError("the times do not begin at 0 and rise")


def eased(share: float) -> float:
    """A share of the way from 0 to 1 that starts and ends slowly."""
    share = min(max(share, 0.0), 1.0)
    return share * share * (3 - 2 * share)


def between(times: Sequence[float], seconds: float) -> tuple[int, int, float]:
    """The numbers of the rising times around a moment, and the share of the time between them that is over."""
    after = int(np.searchsorted(times, seconds, side="right"))
    if after in (0, len(times)):
        end = min(after, len(times) - 1)
        return end, end, 0.0
    before = after - 1
    return before, after, (seconds - times[before]) / (times[after] - times[before])


def read_keyframes(path: Path, kind: type[FileT]) -> FileT:
    """Read and check a file of keyframes.

    Raises:
        UserError: it cannot be read, or what in it is wrong.
    """
    fix = "docs/render.md tells what such a file holds"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror}.", fix) from None
    if len(data) > MAX_BYTES:
        raise UserError(f"'{path}' is larger than {MAX_BYTES // 1000} kB.", fix)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("place", "camera"))
        what = first["msg"].removeprefix("Value error, ")
        raise UserError(f"'{path}' does not fit: {f'{where}: ' if where else ''}{what}.", fix) from None
