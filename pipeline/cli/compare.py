"""`headcast compare`: several avatars of one clip side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.cli.common import Answer, Common


@dataclass(frozen=True)
class Compare(Common):
    """Put avatars of one clip side by side: a page with a table, a video, heat maps and curves, and which is best.

    All are rendered anew and measured by the same code on the frames that none was trained on. They must be made from
    the same clip with the same frames held out; presets, models and any setting of the training may differ.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    """Two to six: names of subjects, paths to subjects, or SUBJECT/bench for all that headcast bench trained."""
    markdown: bool = False
    """Print the table as Markdown."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to render; auto takes a GPU where there is one."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """The folder to write; by default DATA/SUBJECT/compare/NAMES of the first."""
    force: bool = False
    """Replace what is there, also what is fresh."""

    def answer(self) -> Answer:
        from pipeline.compare import check_compare, compare, markdown
        from pipeline.progress import default_reporter
        from pipeline.run import stop_signals

        with stop_signals() as stop_requested:
            plan = check_compare(
                self.data,
                self.runs,
                out=self.out,
                force=self.force,
                device=self.device,
                reporter=default_reporter(),
                stop_requested=stop_requested,
            )
            document = compare(plan)
        text = markdown(document) if self.markdown else str(plan.product.path / "compare.html")
        return document, text, 0
