"""From a subject's name to a page that is served until somebody stops it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import socket
import sys
import time
import warnings
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset import Dataset
from pipeline.errors import UserError
from pipeline.rasterize.cpu import warm_up
from pipeline.run import usable_cores
from pipeline.viewer.guard import WILDCARDS, Guard, GuardedServer, listen
from pipeline.viewer.page import Page
from pipeline.viewer.picture import Painter

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Served:
    """A page that is there."""

    page: Page
    server: GuardedServer
    host: str
    port: int

    @property
    def url(self) -> str:
        """The address to open on this machine."""
        name = "localhost" if self.host in (*WILDCARDS, LOOPBACK, "::1", "localhost") else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}"


@contextlib.contextmanager
def served(
    data: Path,
    subject: str,
    host: str = LOOPBACK,
    port: int = 0,
    threads: int | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Iterator[Served]:
    """A subject's page, as long as the block lasts.

    Args:
        data: the dataset.
        subject: a name in it.
        host, port: to listen on; port 0 takes a free one.
        threads: of the rasteriser; None takes all cores.
        report: is told what takes a while.

    Raises:
        UserError: no such subject, no trained avatar, one of another schema, a busy port, a host that is not ours.
        StageError: files are damaged.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}.", "give at least 1")
    found = Dataset(data).existing(subject)
    again = shlex.join(["headcast", "view", subject, "--data", str(data), "--port"])
    with (
        contextlib.closing(listen(host, port, again)) as listening,
        one_tensor_thread(),
        warnings.catch_warnings(),
    ):
        painter = Painter.of(found, threads or usable_cores())
        warm_up(report)
        bound = int(listening.getsockname()[1])
        server = GuardedServer(listening, Guard(host, bound))
        # A browser may leave while a picture for it is made.
        warnings.filterwarnings("ignore", "Queued a .* on a closed connection")
        try:
            page = Page(server, painter)
            try:
                yield Served(page, server, host, bound)
            finally:
                page.stop()
        finally:
            server.stop()


def view(
    data: Path,
    subject: str,
    *,
    host: str,
    port: int,
    open_browser: bool,
    threads: int | None,
    report: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> dict[str, Any]:
    """Serve a subject's page until a stop is requested; arguments as in `served`.

    Args:
        open_browser: open it in a browser where there is one.
        stop_requested: asked several times a second.

    Raises:
        HeadcastError: as in `served`.
    """
    with served(data, subject, host, port, threads, report) as at:
        report(f"'{subject}' is at {at.url}")
        if host in WILDCARDS:
            report("Every machine that reaches this one can look, drive and save videos here.")
        else:
            report(f"From another machine: {ssh_line(at)}  then open {at.url} there.")
        report(_open(at.url) if open_browser else "Open that address in a browser.")
        report("Ctrl+C ends it.")
        while not stop_requested() and at.page.failure is None:
            time.sleep(POLL_SECONDS)
        if at.page.failure is not None:
            raise at.page.failure
        return {"schema": 1, "subject": subject, "url": at.url, "pictures": at.page.pictures}


@contextlib.contextmanager
def one_tensor_thread() -> Iterator[None]:
    """Have tensors worked on in one thread each: they are small, and on busy cores a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ssh_line(at: Served) -> str:
    """What to type on another machine so that the same address shows the page there."""
    target = at.host if at.host not in ("localhost", "::1") else LOOPBACK
    return f"ssh -L {at.port}:{target}:{at.port} {getpass.getuser()}@{socket.gethostname()}"


def _open(url: str) -> str:
    """Open a browser where there is one; what came of it, in words."""
    # Without a screen the first that is found may be a text browser, which would take this terminal.
    screen = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))
    with contextlib.suppress(webbrowser.Error):
        if screen and webbrowser.get().open(url):
            return "It opens in your browser."
    return "There is no browser here: open that address in one."
