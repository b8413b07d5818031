"""Viser's server for one listening socket, closed to other sites' pages and to whatever is not its own page.

A page of another site can make a browser talk to a server on this machine: by a name that it lets point here (DNS
rebinding), or by a web socket, which no same-origin rule holds back. So the Host and Origin headers must name this
server. Viser itself has no hook for that: the function by which it starts to serve is replaced while it does.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any
from unittest import mock

import rich
import viser
import websockets.asyncio.server
from websockets import Headers
from websockets.http11 import Request, Response

from pipeline.errors import StageError, UserError

WILDCARDS = ("0.0.0.0", "::")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::([0-9]{1,5}))?")
_PAGES = ("/", "/index.html")
# Viser's page is one file: scripts and styles in it, workers and pictures by blob: and data: addresses.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' blob: data:; style-src 'unsafe-inline';"
    " img-src data: blob:; font-src data:; media-src data: blob:; worker-src blob: data:;"
    " connect-src 'self' ws://{host} data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_starting = threading.Lock()


class GuardedServer(viser.ViserServer):
    """A viser server behind `Guard`, on a socket that listens already, silent on the terminal.

    Args:
        listening: see `listen`.
        guard: who may talk to it.

    Raises:
        StageError: this version of viser cannot be guarded.
    """

    def __init__(self, listening: socket.socket, guard: Guard) -> None:
        host, port = listening.getsockname()[:2]
        self._console = mock.patch.object(rich.get_console(), "quiet", True)  # its banner names no ssh line
        self._console.start()
        with _serving_through(listening, guard):
            super().__init__(host=host, port=port, verbose=False)

    def request_share_url(self, verbose: bool = True) -> str | None:
        """Never: what is shown leaves this machine by nobody but the user."""
        return None

    def stop(self) -> None:
        """Stop serving and close all connections."""
        super().stop()
        self._console.stop()


class Guard:
    """Which requests are answered.

    Args:
        host: the address or name that was asked for to listen on.
        port: the port.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host.lower(), port
        self._names = {"localhost", self.host}
        if self.host in WILDCARDS:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server: localhost, a loopback address or the host asked for, and the port.

        Where it listens on all addresses any address will do, and this machine's name: no name of a stranger is one.
        """
        found = _HOST.fullmatch(host.lower())
        if found is None or int(found[3] or 80) != self.port:
            return False
        name = found[1] or found[2]
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self.host in WILDCARDS

    def refusal(self, request: Request) -> Response | None:
        """The answer to a request that is not for this server's page, or None."""
        hosts, origins = request.headers.get_all("Host"), request.headers.get_all("Origin")
        if len(hosts) != 1 or not self.knows(hosts[0]):
            return _text(
                HTTPStatus.FORBIDDEN, f"This is not the address of this viewer; it listens on port {self.port}."
            )
        if request.headers.get("Upgrade", "").lower() == "websocket":
            if len(origins) != 1 or origins[0].lower() not in (
                f"http://{hosts[0]}".lower(),
                f"https://{hosts[0]}".lower(),
            ):
                return _text(HTTPStatus.FORBIDDEN, "Only the viewer's own page may connect.")
            return None
        if request.path.partition("?")[0] not in _PAGES:
            return _text(HTTPStatus.NOT_FOUND, "There is nothing here.")
        return None

    def answer(
        self, connection: Any, request: Request, serve: Callable[[Any, Request], Response | None]
    ) -> Response | None:
        """Refuse, or let viser answer, and tell the browser to load nothing from elsewhere."""
        try:
            response = self.refusal(request) or serve(connection, request)
        except LookupError:  # a header that may be given once was given twice
            response = _text(HTTPStatus.BAD_REQUEST, "This request makes no sense.")
        if response is not None:
            response.headers["Content-Security-Policy"] = _POLICY.format(
                host=request.headers.get_all("Host")[0] if response.status_code == HTTPStatus.OK else "localhost"
            )
            response.headers["X-Content-Type-Options"] = "nosniff"
            response.headers["Referrer-Policy"] = "no-referrer"
            response.headers["Cache-Control"] = "no-store"
        return response


def _text(status: HTTPStatus, words: str) -> Response:
    body = f"{words}\n".encode()
    headers = Headers(
        {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), "Connection": "close"}
    )
    return Response(status, status.phrase, headers, body)


@contextlib.contextmanager
def _serving_through(listening: socket.socket, guard: Guard) -> Iterator[None]:
    """Have viser serve on this socket, and ask the guard first."""
    served = []
    original = websockets.asyncio.server.serve

    def serve(handler: Any, host: str, port: int, *, process_request: Any, **options: Any) -> Any:
        served.append(guard)

        def guarded(connection: Any, request: Request) -> Response | None:
            return guard.answer(connection, request, process_request)

        return original(handler, sock=listening, process_request=guarded, **options)

    with _starting, mock.patch.object(websockets.asyncio.server, "serve", serve):
        yield
    if not served:
        raise StageError("This version of viser cannot be guarded.", "install the one that headcast asks for")


def listen(host: str, port: int, again: str) -> socket.socket:
    """A socket that listens on an address.

    Args:
        host: an address or a name of this machine.
        port: 0 takes a free one.
        again: the command to type with another port, up to its number.

    Raises:
        UserError: the port is busy or not allowed, or the host is not this machine.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}.", "give 1 to 65535, or 0 for any free port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if not host:
            raise OSError(errno.EADDRNOTAVAIL, "no host")
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host '{host}' is no address of this machine.", "leave it away for this machine alone"
        ) from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"Port {port} is busy: another program listens there.", f"{again} {_free_port(host)}"
            ) from error
        if error.errno == errno.EACCES:
            raise UserError(f"Port {port} is not allowed to you.", f"{again} 8080") from error
        raise UserError(
            f"--host '{host}' is no address of this machine.", "leave it away for this machine alone"
        ) from error
    return listening


def _free_port(host: str) -> int:
    with contextlib.closing(
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    ) as free:
        return int(free.getsockname()[1])
