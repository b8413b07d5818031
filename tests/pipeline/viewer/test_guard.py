"""Only the viewer's own page is served, and only to who asks for it by this server's own name: told by raw sockets."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
import rich
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from pipeline.errors import UserError
from pipeline.viewer.guard import Guard, GuardedServer, listen

VERSION = "viser-v1.1.1"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with contextlib.closing(listen("127.0.0.1", 0, "")) as listening:
        number = listening.getsockname()[1]
        server = GuardedServer(listening, Guard("127.0.0.1", number))
        try:
            yield number
        finally:
            server.stop()


def ask(port: int, path: str = "/", *headers: str) -> tuple[int, str]:
    """Status, and head and body, of a request with just these headers."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        lines = [f"GET {path} HTTP/1.1", *headers, "Connection: close", "", ""]
        connection.sendall("\r\n".join(lines).encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    text = answer.decode(errors="replace")
    return int(text.split(" ", 2)[1]), text


def test_the_page_is_there_by_its_own_names_and_loads_nothing_from_elsewhere(port: int) -> None:
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"127.8.9.10:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
        status, text = ask(port, "/", f"Host: {host}")
        assert status == 200 and "<html" in text, host
        assert "default-src 'none'" in text and "frame-ancestors 'none'" in text
    assert ask(port, "/index.html?x=1", f"Host: localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    "hosts",
    [
        ["evil.example"],
        ["evil.example:{port}"],
        ["localhost"],
        ["localhost:1"],
        ["localhost.evil.example:{port}"],
        ["localhost:{port}@evil.example"],
        ["evil.example@localhost:{port}"],
        ["192.168.1.5:{port}"],
        ["127.0.0.1.nip.io:{port}"],
        ["0x7f000001:{port}"],
        [""],
        [],
        ["localhost:{port}", "evil.example"],
    ],
)
def test_other_names_are_refused_for_the_page_and_the_socket(port: int, hosts: list[str]) -> None:
    lines = [f"Host: {host.format(port=port)}" for host in hosts]
    status, text = ask(port, "/", *lines)
    assert status in (400, 403) and "<html" not in text
    upgrade = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    assert ask(port, "/", *lines, *upgrade)[0] in (400, 403)


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/../../_viser.py",
        "/%2e%2e/%2e%2e/_viser.py",
        "/..%2f..%2f_viser.py",
        "/%252e%252e/_viser.py",
        "/..\\..\\_viser.py",
        "//etc/passwd",
        "/./index.html",
        "/index.html/..",
        "/etc/passwd",
        "/index.html%00.js",
    ],
)
def test_nothing_but_the_page_is_served(port: int, path: str) -> None:
    status, text = ask(port, path, f"Host: localhost:{port}")
    assert status in (400, 404)
    assert "root:" not in text and "class ViserServer" not in text and "<html" not in text


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://localhost:1",
        "http://127.0.0.1:{port}",
        "file://",
        None,
        "http://localhost",
    ],
)
def test_a_socket_is_for_the_page_alone(port: int, origin: str | None) -> None:
    """Even an origin on this machine is another site's when it is not the one that the page came from."""
    given = None if origin is None else origin.format(port=port)
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(f"ws://localhost:{port}", origin=given, subprotocols=[VERSION]),
    ):
        pass
    assert refused.value.response.status_code == 403


def test_the_page_itself_may_connect(port: int) -> None:
    with connect(f"ws://localhost:{port}", origin=f"http://localhost:{port}", subprotocols=[VERSION]) as connection:
        assert connection.subprotocol == VERSION


def test_on_all_addresses_any_address_will_do_and_no_strange_name() -> None:
    guard = Guard("0.0.0.0", 80)
    assert guard.knows("192.168.1.5") and guard.knows("192.168.1.5:80") and guard.knows(socket.gethostname())
    assert not guard.knows("evil.example") and not guard.knows("192.168.1.5:81")
    assert Guard("studio.lan", 8080).knows("Studio.LAN:8080")


def test_nobody_shares_it_and_the_terminal_is_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = rich.get_console().quiet
    with contextlib.closing(listen("127.0.0.1", 0, "")) as listening:
        server = GuardedServer(listening, Guard("127.0.0.1", listening.getsockname()[1]))
        try:
            assert rich.get_console().quiet
            assert server.request_share_url() is None
        finally:
            server.stop()
    assert capsys.readouterr() == ("", "")
    assert rich.get_console().quiet == before


def test_a_busy_port_is_named_with_what_to_type() -> None:
    with contextlib.closing(listen("127.0.0.1", 0, "")) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} is busy") as refused:
            listen("127.0.0.1", port, "headcast view anna --port")
    free = int(refused.value.fix.removeprefix("headcast view anna --port "))
    assert 0 < free != port


@pytest.mark.parametrize(
    ("host", "port"), [("no.such.machine.invalid", 0), ("192.0.2.1", 0), ("", 0), ("127.0.0.1", 70000)]
)
def test_an_address_that_cannot_be_listened_on_is_refused(host: str, port: int) -> None:
    with pytest.raises(UserError, match="no address of this machine" if port == 0 else "--port is 70000"):
        listen(host, port, "")
