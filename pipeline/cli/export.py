"""`headcast export`: an avatar as files for other tools."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.cli.common import Answer, Common, split_settings


@dataclass(frozen=True)
class Export(Common):
    """Write a subject's avatar as files for other tools, read them back and say what was lost.

    ply: the avatar at rest as a standard 3DGS PLY, for any splat viewer.
    web: a page that plays and drives the avatar in any browser; a folder for a web server, and a single file.
    """

    subject: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUBJECT")] = tyro.MISSING
    """Whose avatar; trained."""
    to: Annotated[str, tyro.conf.arg(metavar="TARGET")] = tyro.MISSING
    """What to write; see above."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """The folder to write; by default DATA/SUBJECT/exported/TARGET."""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An option of the target; may be given several times."""
    force: bool = False
    """Replace what is there, also what is fresh."""

    def answer(self) -> Answer:
        from pipeline.exports import check_export, export
        from pipeline.progress import default_reporter
        from pipeline.run import stop_signals

        with stop_signals() as stop_requested:
            plan = check_export(
                self.data,
                self.subject,
                self.to,
                out=self.out,
                options=split_settings(self.set),
                force=self.force,
                reporter=default_reporter(),
                stop_requested=stop_requested,
            )
            if not self.force and (account := plan.product.finished()) is not None:
                sys.stderr.write(f"{plan.product.path}: fresh, nothing to do.\n")
            else:
                account = export(plan)
        return account, str(plan.product.path), 0
