"""`headcast render`: an avatar from any side, as pictures and videos."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.cli.common import Answer, Common, split_settings
from pipeline.errors import UserError


@dataclass(frozen=True)
class Render(Common):
    """Show a subject's avatar from any side: a picture, numbered pictures, or a video, also with alpha.

    orbit: the camera sways before the face by --yaw and --pitch degrees. turntable: all round, or over an arc of --yaw
    degrees. front: it stands still, in front or at --yaw and --pitch. clip: where the clip's camera was.
    """

    subject: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUBJECT")] = tyro.MISSING
    """Whose avatar; trained."""
    path: Annotated[str, tyro.conf.arg(metavar="PATH")] = "orbit"
    """orbit, turntable, front, clip, or a .json file of cameras (docs/render.md)."""
    drive: Annotated[str, tyro.conf.arg(metavar="DRIVE")] = "rest"
    """What the avatar does: rest, clip for its own performance, or a .json file of one (docs/render.md)."""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A coefficient at rest, such as jawOpen=0.5; may be given several times."""
    first_frame: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """First frame of the clip's performance, as numbered in the report."""
    last_frame: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Last frame of it, inclusive."""
    yaw: Annotated[float | None, tyro.conf.arg(metavar="DEGREES")] = None
    """To the subject's left; 10 for orbit, 360 for turntable, 0 for front."""
    pitch: Annotated[float | None, tyro.conf.arg(metavar="DEGREES")] = None
    """Upwards; 4 for orbit, 0 otherwise."""
    zoom: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """How many times nearer than where the head fills the picture."""
    seconds: Annotated[float | None, tyro.conf.arg(metavar="S")] = None
    """Length; by default 4, or that of the performance."""
    fps: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """Frames a second; by default 30, or the clip's own."""
    size: Annotated[str, tyro.conf.arg(metavar="WxH")] = "512x512"
    """Width and height of the picture."""
    background: Annotated[str, tyro.conf.arg(metavar="COLOUR")] = "white"
    """transparent, white, black, grey, green, or six hexadecimal digits RRGGBB."""
    format: Literal["png", "frames", "mp4", "webm"] | None = None
    """One picture, a folder of pictures, H.264, or VP9 with alpha; by default what --out ends in, or what suits."""
    edge: Literal["soft", "cut"] = "soft"
    """Whether the avatar fades out where its clip cut it off, or ends there."""
    baked: bool = False
    """The baked avatar, which players use, instead of the trained one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to render; auto takes a GPU where there is one."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """What to write; by default DATA/SUBJECT/renders/NAME."""
    force: bool = False
    """Replace what is there, also what is fresh."""

    def answer(self) -> Answer:
        from pipeline.progress import default_reporter
        from pipeline.rendering import RenderRequest, check_render, render
        from pipeline.run import stop_signals

        request = RenderRequest(
            data=self.data,
            subject=self.subject,
            path=self.path,
            drive=self.drive,
            expression=_coefficients(self.set),
            first_frame=self.first_frame,
            last_frame=self.last_frame,
            yaw=self.yaw,
            pitch=self.pitch,
            zoom=self.zoom,
            seconds=self.seconds,
            fps=self.fps,
            size=_size(self.size),
            background=self.background,
            format=self.format,
            edge=self.edge,
            baked=self.baked,
            device=self.device,
            out=self.out,
            force=self.force,
        )
        with stop_signals() as stop_requested:
            plan = check_render(request, default_reporter(), stop_requested)
            if not self.force and (account := plan.product.finished()) is not None:
                sys.stderr.write(f"{plan.product.path}: fresh, nothing to do.\n")
            else:
                account = render(plan)
        return account, str(plan.product.path), 0


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not cross or not width.isdecimal() or not height.isdecimal() or len(text) > 20:
        raise UserError(f"'{text}' is no size.", "give width and height in pixels, such as --size 1280x720")
    return int(width), int(height)


def _coefficients(settings: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for name, value in split_settings(settings).items():
        try:
            found[name] = float(value)
        except ValueError:
            raise UserError(f"'{value}' is no number for {name}.", "give one in [0, 1], such as jawOpen=0.5") from None
    return found
