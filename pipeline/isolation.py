"""Stages in a process of their own, which a time limit can end and whose death the run survives.

A stage that hangs in native code hears no stop, and one that runs out of memory takes its process with it.
`StageProcess` keeps one child (`python -m stages`) that carries out a subject's stages one after another, so that
libraries are loaded once. Requests go to its standard input, answers come back on a pipe of their own, both as JSON
lines; the child ends when its input does, so it never outlives the run, and it holds the run's lock while it lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pipeline import errors
from pipeline.config import Config
from pipeline.dataset import Subject
from pipeline.errors import HeadcastError, Interrupted, StageDied, StageError, StageTimeout
from pipeline.lease import Held, Ticket
from pipeline.progress import Reporter, Task
from pipeline.stage import Stage, note_failure, run_stage

STOP_SECONDS = 60.0
"""How long a stage may take to leave after a stop was asked for."""
TELL_SECONDS = 0.2
"""Progress is passed on at most this often."""


class StageProcess:
    """A child process that runs a subject's stages under a time limit. A context manager; not for several threads.

    Args:
        subject: whose stages; the caller holds its lock.
        stages: in order, as the child knows them too.
        limit_seconds: a stage that works longer is ended.
        held: the subject as it is held; the child keeps its lock open.
    """

    def __init__(self, subject: Subject, stages: Sequence[Stage], limit_seconds: float, held: Held) -> None:
        self._subject, self._stages, self._limit, self._held = subject, stages, limit_seconds, held
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: _Lines | None = None

    def __enter__(self) -> StageProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def run(
        self,
        stage: Stage,
        config: Config,
        *,
        force: bool,
        device: Literal["auto", "cpu", "cuda"],
        threads: int,
        reporter: Reporter,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """As `pipeline.stage.run_stage`, in the child.

        Raises:
            StageTimeout: its time was up.
            StageDied: its process was killed, or ended by itself.
            StageError, Interrupted: as `run_stage`.
        """
        process, answers = self._started()
        request = {
            "folder": str(self._subject.root.absolute()),
            "stage": stage.name,
            "config": config.model_dump(mode="json"),
            "force": force,
            "device": device,
            "threads": threads,
            "ticket": self._held.ticket,
        }
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died meanwhile, which the answer tells
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        end = time.monotonic() + self._limit
        stopping = False
        with contextlib.ExitStack() as tasks:
            shown: Task | None = None
            while True:
                line = answers.next(0.2)
                if line is None:
                    error: HeadcastError
                    code = self._end(grace=5.0)
                    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                    if stopping:
                        raise Interrupted("Stopped as asked; what is done is kept.")
                    error = StageDied(
                        f"The process of stage '{stage.name}' of '{self._subject.name}' {how}.",
                        "run the same command again, what is done is kept; signal 9 often means that memory ran out",
                    )
                    note_failure(self._subject, stage, self._stages, config, error)
                    raise error
                for kind, value in line.items():
                    if kind == "task":
                        tasks.close()
                        shown = tasks.enter_context(reporter.task(**value))
                    elif kind == "advance" and shown is not None:
                        shown.advance(value["done"] - shown.done, value["note"])
                    elif kind == "message":
                        reporter.message(value)
                    elif kind == "manifest":
                        manifest: dict[str, Any] = value
                        return manifest
                    elif kind == "error":
                        raise getattr(errors, value["kind"])(value["what"], value["fix"])
                if stop_requested() and not stopping:
                    stopping, end = True, time.monotonic() + STOP_SECONDS
                    process.terminate()
                if time.monotonic() > end:
                    self._end()
                    if stopping:
                        raise Interrupted("Stopped; the stage did not leave by itself and was ended.")
                    error = StageTimeout(
                        f"Stage '{stage.name}' of '{self._subject.name}' was still at work after "
                        f"{self._limit / 60:g} minutes and was ended.",
                        "what is done is kept; if it was not hanging, give it more time with --stage-minutes",
                    )
                    note_failure(self._subject, stage, self._stages, config, error)
                    raise error

    def _started(self) -> tuple[subprocess.Popen[bytes], _Lines]:
        if self._process is None or self._answers is None:
            read, write = os.pipe()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stages", str(write)],
                stdin=subprocess.PIPE,
                stdout=2,  # what libraries print is not an answer
                pass_fds=(write, self._held.fileno()),
                start_new_session=True,  # Ctrl+C is for the run, which passes it on
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            os.close(write)
            self._answers = _Lines(os.fdopen(read, "rb", buffering=0))
        return self._process, self._answers

    def _end(self, grace: float = 0.0) -> int:
        """End the child with all that it started, and tell its exit code."""
        process, self._process, answers, self._answers = self._process, None, self._answers, None
        if process is None or answers is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        answers.close()
        return process.wait()


class _Lines:
    """JSON lines from a pipe, waited for at most so long."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._rest = stream, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(stream, selectors.EVENT_READ)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next line; nothing in it when none came in time; None when the other end was closed."""
        while b"\n" not in self._rest:
            if not self._selector.select(seconds):
                return {}
            data = self._stream.read(65536)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        content: dict[str, Any] = json.loads(line)
        return content

    def close(self) -> None:
        self._selector.close()
        self._stream.close()


def serve(stages: Sequence[Stage], answers: int) -> None:
    """The child's side: carry out requests from standard input until it is closed.

    Args:
        stages: in order.
        answers: file descriptor of the pipe that answers go to.
    """
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    threading.Thread(target=_listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    reporter = _PipeReporter(answers)
    while True:
        request = requests.get()
        subject = Subject(Path(request["folder"]))
        ticket = Ticket(subject.work, request["ticket"], f"Subject '{subject.name}'")

        def stop_requested(ticket: Ticket = ticket) -> bool:
            return stopped.is_set() or ticket.lost()

        try:
            manifest = run_stage(
                subject,
                next(stage for stage in stages if stage.name == request["stage"]),
                stages,
                Config.model_validate(request["config"]),
                force=request["force"],
                device=request["device"],
                threads=request["threads"],
                reporter=reporter,
                stop_requested=stop_requested,
                still_held=ticket.check,
            )
        except HeadcastError as error:
            kind = type(error).__name__ if hasattr(errors, type(error).__name__) else StageError.__name__
            reporter.tell(error={"kind": kind, "what": error.what, "fix": error.fix})
        else:
            reporter.tell(manifest=manifest)


def _listen(stream: BinaryIO, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in stream:
        requests.put(json.loads(line))
    os._exit(0)  # the run has ended or died; nobody waits for what the stage is doing


class _PipeReporter:
    """Passes progress to the run."""

    def __init__(self, descriptor: int) -> None:
        self._stream = os.fdopen(descriptor, "wb", buffering=0)

    def tell(self, **content: Any) -> None:
        """Write one line."""
        self._stream.write(json.dumps(content).encode() + b"\n")

    def task(self, label: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        """A counted piece of work."""
        return self._task(label, total, unit, done)

    @contextmanager
    def _task(self, label: str, total: int, unit: str, done: int) -> Iterator[Task]:
        last = 0.0

        def show(task: Task) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= TELL_SECONDS or task.done >= task.total:
                last = now
                self.tell(advance={"done": task.done, "note": task.note})

        self.tell(task={"label": label, "total": total, "unit": unit, "done": done})
        yield Task(label, total, unit, done, first=done, on_change=show)

    def message(self, text: str) -> None:
        """Pass a line on."""
        self.tell(message=text)
