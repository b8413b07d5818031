"""`headcast reenact`: one subject's avatar driven by another subject."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.cli.common import Answer, Common, start_flow


@dataclass(frozen=True)
class Reenact(Common):
    """Drive a subject's avatar with another subject's performance: a video, and its account as JSON beside it.

    Expression, gaze, and the turns and moves of the head are carried over from neutral to neutral; the driver's sound
    is kept. Both people must have agreed to it.
    """

    avatar: Annotated[str, tyro.conf.arg(metavar="SUBJECT")] = tyro.MISSING
    """The subject whose avatar is driven; trained."""
    drive: Annotated[str, tyro.conf.arg(metavar="SUBJECT")] = tyro.MISSING
    """The subject who drives it; fitted, an avatar is not needed."""
    first_frame: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """First frame of the driver, as numbered in its report; by default its first."""
    last_frame: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Last frame of the driver, inclusive; by default its last."""
    resolution: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Width and height of the picture; by default those the avatar was trained at."""
    background: Annotated[str, tyro.conf.arg(metavar="COLOUR")] = "white"
    """white, black, grey, green, or six hexadecimal digits RRGGBB."""
    overshoot: Annotated[float, tyro.conf.arg(metavar="X")] = 1.0
    """How far the driver may take the avatar beyond what its clip showed: 0 not at all, 1 as far as looks right."""
    beside: bool = False
    """Show the driver's frame at the left of the avatar."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to render; auto takes a GPU where there is one."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The video to write; by default DATA/AVATAR/reenact/DRIVER.mp4."""
    force: bool = False
    """Replace a video that is there, also one that is fresh."""

    def answer(self) -> Answer:
        from pipeline.reenact import check_reenact, request_of

        request = request_of(
            data=self.data,
            avatar=self.avatar,
            drive=self.drive,
            first_frame=self.first_frame,
            last_frame=self.last_frame,
            resolution=self.resolution,
            background=self.background,
            overshoot=self.overshoot,
            beside=self.beside,
            device=self.device,
            out=self.out,
            force=self.force,
        )
        plan = check_reenact(request)
        account = None if request.force else plan.finished()
        if account is None:
            from flows.reenact import reenact_flow

            account = start_flow(reenact_flow, request)
        else:
            sys.stderr.write(f"{plan.out}: fresh, nothing to do.\n")
        return account, str(plan.out), 0
