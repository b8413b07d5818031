"""`headcast reenact`: one subject's avatar driven by another subject, by a video or by a table of coefficients."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.cli.common import Answer, Common, start_flow


@dataclass(frozen=True)
class Reenact(Common):
    """Drive a subject's avatar with another's performance: a video, and its account as JSON beside it.

    Expression, gaze, and the turns and moves of the head are carried over from neutral to neutral; the driver's sound
    is kept. A driver's video is tracked and fitted first, as headcast run VIDEO --to fit does. Both people must have
    agreed to it.
    """

    avatar: Annotated[str, tyro.conf.arg(metavar="SUBJECT")] = tyro.MISSING
    """The subject whose avatar is driven; trained."""
    drive: Annotated[str, tyro.conf.arg(metavar="SUBJECT|VIDEO|CSV")] = tyro.MISSING
    """Who drives it: a fitted subject, a video, or ARKit coefficients, from Live Link Face or as in docs/reenact.md."""
    first_frame: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """First frame of the driver, as numbered in its report, or row of its table from 0; by default its first."""
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
    metrics: bool = False
    """Track the video again, and say how well it does what was asked and whom it shows; takes about as long again."""
    neutral_frame: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """A frame in which the driver is at rest; by default told by low values and the mean pose."""
    fps: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """Rows a second of a CSV file, whatever its times say; needed where it has none."""
    sound: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A file whose sound goes with the driver's first frame, instead of the driver's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to render; auto takes a GPU where there is one."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The video to write; by default DATA/AVATAR/reenact/DRIVER.mp4."""
    force: bool = False
    """Replace a video that is there, also one that is fresh."""

    def answer(self) -> Answer:
        from pipeline.reenact import avatar_and_place, check_reenact, driver_run, request_of
        from pipeline.run import nothing_to_do
        from stages import STAGES

        options = {field.name: getattr(self, field.name) for field in fields(self)}
        request = request_of(**{name: value for name, value in options.items() if name not in ("json", "verbose")})
        run = driver_run(request)
        _, out = avatar_and_place(request)
        account = None
        if run is None or nothing_to_do(run, STAGES) is not None:
            plan = check_reenact(request)
            account = None if request.force else plan.finished()
        if account is None:
            from flows.reenact import reenact_flow

            account = start_flow(reenact_flow, request)
        else:
            sys.stderr.write(f"{out}: fresh, nothing to do.\n")
        return account, str(out), 0

    def resume_command(self) -> str:
        words = ["headcast", "reenact"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return shlex.join(words)
