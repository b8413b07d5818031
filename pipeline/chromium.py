"""Debian's Chromium, driven by Playwright, to try pages in: what a page complains of, and what it reaches for.

    with serve(folder) as url, chromium(profile) as opened, opened.visit(url) as visit:
        visit.page.click("#play")
    assert visit.errors == visit.outside == []

Every name but loopback's fails to resolve in it, so that a request to the outside fails, and is told.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page, Request

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    # Mesa's software renderer; SwiftShader is slower.
    "--use-gl=angle",
    "--use-angle=gl-egl",
    "--ignore-gpu-blocklist",
    "--disable-gpu-sandbox",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
)
CAMERA_FLAGS = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
INSIDE_SCHEMES = ("file", "blob", "data", "about")
INSIDE_HOSTS = ("127.0.0.1", "localhost")


@dataclass
class Visit:
    """A page that was opened, and what went wrong in it.

    Attributes:
        page: Playwright's.
        errors: of the console, and exceptions that nothing caught.
        outside: URLs asked for that are not of this machine.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def note_request(self, request: Request | Any) -> None:
        """Keep its URL where it is not of this machine."""
        parts = urlsplit(request.url)
        if parts.scheme not in INSIDE_SCHEMES and parts.hostname not in INSIDE_HOSTS:
            self.outside.append(request.url)


@dataclass(frozen=True)
class Chromium:
    """A running Chromium."""

    context: BrowserContext

    @contextlib.contextmanager
    def visit(self, url: str, *, width: int = 800, height: int = 600, **media: Any) -> Iterator[Visit]:
        """A tab of its own with this page loaded; `media` as `Page.emulate_media` takes it."""
        page = self.context.new_page()
        try:
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(**media)
            visit = Visit(page)
            page.on("console", lambda message: visit.errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: visit.errors.append(f"{error.message}\n{error.stack}"))
            page.on("request", visit.note_request)
            page.on("websocket", visit.note_request)
            page.goto(url)
            yield visit
        finally:
            page.close()


@contextlib.contextmanager
def chromium(profile: Path, *, camera: Path | None = None) -> Iterator[Chromium]:
    """Chromium with a profile folder of its own.

    Args:
        profile: an empty folder, or none yet.
        camera: a film (.mjpeg or .y4m) that plays over and over in place of a camera, which pages may use unasked.

    Raises:
        UserError: Chromium or Playwright is not here.
    """
    if not CHROMIUM.is_file():
        raise UserError(f"There is no {CHROMIUM} to open pages with.", "apt-get install chromium")
    try:
        from playwright import sync_api
    except ImportError as error:
        raise UserError("Playwright is not here, which drives Chromium.", "pip install playwright") from error

    flags = [*FLAGS, *CAMERA_FLAGS, f"--use-file-for-fake-video-capture={camera}"] if camera else list(FLAGS)
    with sync_api.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=flags, headless=True, permissions=["camera"] if camera else None
        )
        try:
            yield Chromium(context)
        finally:
            context.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder's files on a free port of loopback; gives the URL, with a slash at its end."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
