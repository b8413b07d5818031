"""Processes that are kept alive: started again when they die, and never left behind. Linux does the latter best."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Unavailable, UserError

LONGEST_PAUSE = 30.0
YOUNG_SECONDS = 60.0
"""A child that lived longer than this is started again at once."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None

Say = Callable[[str], None]


@dataclass
class Child:
    """A process that is kept alive, with a pause that doubles while it dies young."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = 1.0
    again_at: float = 0.0

    def start(self) -> None:
        """Start it; its output goes to its log."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl+C is for the supervisor, which stops them in order
                preexec_fn=end_with_parent,
            )
        self.started = time.monotonic()

    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def ask_to_stop(self) -> None:
        """Send it SIGTERM, without waiting."""
        if self.process is not None:
            self.process.terminate()

    def check(self, say: Say) -> bool:
        """Start it again if it died and its pause is over; whether it runs."""
        if self.alive():
            return True
        now = time.monotonic()
        if self.process is not None:
            code, self.process = self.process.returncode, None
            self.pause = 1.0 if now - self.started > YOUNG_SECONDS else min(2 * self.pause, LONGEST_PAUSE)
            self.again_at = now + self.pause
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            say(f"The {self.name} {how}; it is started again in {self.pause:.0f} s (its log: {self.log}).")
        if now >= self.again_at:
            self.start()
        return False

    def finish(self, seconds: float) -> None:
        """Wait until it has ended, which it has for certain when the time is up."""
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def end_with_parent() -> None:
    """Have this process told to end (SIGTERM) when the one that started it dies, however that dies (Linux)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def environments() -> Iterator[tuple[int, dict[str, str]]]:
    """This user's processes and what they were started with (Linux; elsewhere none)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            content = (folder / "environ").read_bytes().decode(errors="surrogateescape")
        except OSError:  # another user's process, or one that ended meanwhile
            continue
        if content:  # a process that has ended and waits for its parent has none
            yield int(folder.name), dict(entry.partition("=")[::2] for entry in content.split("\0"))


def end_marked(mark: str, value: str, seconds: float) -> None:
    """End processes that were started with a mark in their environment: politely, then for certain."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + seconds
        left = marked(mark, value)
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        while left and time.monotonic() < end:
            time.sleep(0.1)
            left = marked(mark, value)


def marked(mark: str, value: str) -> list[int]:
    """Other processes that were started with this value of an environment variable."""
    return [
        process for process, environment in environments() if environment.get(mark) == value and process != os.getpid()
    ]


@contextlib.contextmanager
def stop_asked() -> Iterator[threading.Event]:
    """An event that Ctrl+C, SIGTERM and a closed terminal set."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, lambda *received: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def free_port(host: str, ports: Sequence[int]) -> int:
    """The first port of a host that nobody listens on.

    Raises:
        UserError: the host is none of this machine, or the only port asked for is taken.
        Unavailable: all are taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    why = ""
    for port in ports:
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            why = error.strerror or str(error)
            continue
        return port
    fix = "name another with --port"
    if len(ports) == 1:
        raise UserError(f"Port {ports[0]} of '{host}' cannot be used: {why}.", fix)
    raise Unavailable(f"No port from {ports[0]} to {ports[-1]} of '{host}' can be used: {why}.", fix)
