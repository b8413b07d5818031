"""`headcast view`: an avatar in the browser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.cli.common import Answer, Common


@dataclass(frozen=True)
class View(Common):
    """Look at a subject's avatar in the browser: go round it, play its clip, drive it by sliders, save what is seen.

    The page is served to this machine alone unless --host says otherwise; Ctrl+C ends it.
    """

    subject: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUBJECT")] = tyro.MISSING
    """Whose avatar; trained."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 lets every machine of the network look and drive."""
    port: int = 8080
    """The port to listen on; 0 takes a free one."""
    open: bool = True
    """Open the page in a browser; --no-open only prints where it is."""
    threads: int | None = None
    """Threads of the rasteriser; by default all cores."""

    def answer(self) -> Answer:
        from pipeline.progress import default_reporter
        from pipeline.run import stop_signals
        from pipeline.viewer.session import view

        with stop_signals() as stop_requested:
            document = view(
                self.data,
                self.subject,
                host=self.host,
                port=self.port,
                open_browser=self.open,
                threads=self.threads,
                report=default_reporter().message,
                stop_requested=stop_requested,
            )
        return document, f"Closed after {document['pictures']} pictures.", 0
