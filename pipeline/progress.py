"""Progress with an estimate of the time left, for terminals, logs and whoever looks at a run from outside."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from pipeline.dataset import write_atomic
from pipeline.logs import json_line, json_wanted

log = logging.getLogger(__name__)


@dataclass
class Task:
    """One counted piece of work. `advance` is cheap enough for every frame or step."""

    label: str
    total: int
    unit: str
    done: int = 0
    note: str = ""
    started: float = field(default_factory=time.monotonic)
    first: int = 0
    begun: float | None = None
    begun_at: int = 0
    on_change: Callable[[Task], None] = lambda task: None

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count finished work; `note` is a short live figure such as `PSNR 31.2 dB`."""
        if self.begun is None:
            self.begun, self.begun_at = time.monotonic(), self.done + count
        self.done += count
        if note is not None:
            self.note = note
        self.on_change(self)

    def eta_seconds(self) -> float | None:
        """Time left at the mean rate of this run; None before there is one.

        The first piece of work does not count: it often waits for a compiler or a model.
        """
        fresh = self.done - self.begun_at
        if self.begun is None or fresh <= 0:
            return None
        return (time.monotonic() - self.begun) / fresh * (self.total - self.done)

    def line(self) -> str:
        """`track: 120/216 frames (56 %), 3 s left, note`."""
        return progress_line(self.label, self.done, self.total, self.unit, self.eta_seconds(), self.note)


def progress_line(label: str, done: int, total: int, unit: str, eta_seconds: float | None, note: str) -> str:
    """`track: 120/216 frames (56 %), 3 s left, note`."""
    share = f" ({100 * done // total} %)" if total else ""
    left = f", {eta_seconds:.0f} s left" if eta_seconds is not None and done < total else ""
    return f"{label}: {done}/{total} {unit}{share}{left}{f', {note}' if note else ''}"


class Reporter(Protocol):
    """Where progress and plain messages go."""

    def task(self, label: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]: ...

    def message(self, text: str) -> None: ...


class SilentReporter:
    """Says nothing."""

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """A counted piece of work."""
        yield Task(label, total, unit, done, first=done)

    def message(self, text: str) -> None:
        """Drop the text."""


class PlainReporter:
    """Lines for logs and pipes: a line at the start, every `every_seconds`, and at the end."""

    def __init__(self, stream: TextIO | None = None, every_seconds: float = 5.0) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._every = every_seconds

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """A counted piece of work."""
        last = time.monotonic()

        def show(task: Task) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= self._every:
                last = now
                self.message(task.line())

        task = Task(label, total, unit, done, first=done, on_change=show)
        yield task
        self.message(f"{task.line()}, {time.monotonic() - task.started:.1f} s")

    def message(self, text: str) -> None:
        """Write a line."""
        self._stream.write(text + "\n")
        self._stream.flush()


class JsonReporter:
    """A JSON object a line (`pipeline.logs`): messages, and progress every `every_seconds`.

    Args:
        stream: where to write; standard error by default.
        every_seconds: between two lines of progress.
        subject: whose work it is, named in every line.
    """

    def __init__(self, stream: TextIO | None = None, every_seconds: float = 5.0, subject: str | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._every, self._subject = every_seconds, subject

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """A counted piece of work."""
        last = time.monotonic()

        def show(task: Task) -> None:
            nonlocal last
            if time.monotonic() - last >= self._every:
                last = time.monotonic()
                self._progress(task, "progress", eta_seconds=task.eta_seconds())

        task = Task(label, total, unit, done, first=done, on_change=show)
        yield task
        self._progress(task, "task-end", seconds=round(time.monotonic() - task.started, 3))

    def message(self, text: str) -> None:
        """Write a message."""
        self._write("message", text)

    def _progress(self, task: Task, event: str, **fields: float | None) -> None:
        counted = {"task": task.label, "done": int(task.done), "total": int(task.total), "unit": task.unit}
        self._write(event, task.line(), **counted, **fields)

    def _write(self, event: str, text: str, **fields: Any) -> None:
        self._stream.write(json_line("info", event, text, subject=self._subject, **fields))
        self._stream.flush()


class RichReporter:
    """A live bar in a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """A counted piece of work."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            handle = bar.add_task(label, total=total, completed=done, note="")
            yield Task(
                label,
                total,
                unit,
                done,
                first=done,
                on_change=lambda task: bar.update(handle, completed=task.done, note=task.note),
            )

    def message(self, text: str) -> None:
        """Write a line above the bar; the text is never read as markup."""
        self._console.print(text, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Progress:
    """How far a running stage is, as its process wrote it down; to be believed only while the subject is held."""

    stage: str
    label: str = ""
    """What is counted now; empty before the stage counts anything."""
    done: int = 0
    total: int = 0
    unit: str = ""
    note: str = ""
    eta_seconds: float | None = None
    updated: int = 0
    """Counts the writes of this attempt: an observer sees by it that work goes on, whatever the clocks say."""
    pid: int = 0

    def line(self) -> str:
        """As `Task.line`."""
        if not self.label:
            return f"{self.stage}: begun"
        label = self.label if self.label == self.stage else f"{self.stage}, {self.label}"
        return progress_line(label, self.done, self.total, self.unit, self.eta_seconds, self.note)


def read_progress(path: Path) -> Progress | None:
    """What `RecordingReporter` wrote last; None where there is nothing that can be read."""
    try:
        record = json.loads(path.read_bytes())
        progress = Progress(**record)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (progress.stage, progress.label, progress.unit, progress.note)
    counts = (progress.done, progress.total, progress.updated, progress.pid)
    eta = progress.eta_seconds
    sound = all(isinstance(text, str) for text in texts) and all(type(count) is int for count in counts)
    sound &= eta is None or (isinstance(eta, int | float) and math.isfinite(eta))
    return progress if sound else None


class RecordingReporter:
    """Passes everything on and keeps a file for those outside: the begin of each task, then once a second at most.

    Args:
        inner: where progress and messages go.
        path: the file to keep; what is there from an earlier attempt is replaced at once.
        stage: whose progress it is.
        every_seconds: between two writes.
    """

    def __init__(self, inner: Reporter, path: Path, stage: str, every_seconds: float = 1.0) -> None:
        self._inner, self._path, self._stage, self._every = inner, path, stage, every_seconds
        self._updated, self._last = 0, 0.0
        self._write(None)

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """A counted piece of work."""
        with self._inner.task(label, total, unit, done) as task:
            show = task.on_change

            def record(task: Task) -> None:
                show(task)
                if time.monotonic() - self._last >= self._every:
                    self._write(task)

            task.on_change = record
            self._write(task)
            yield task

    def message(self, text: str) -> None:
        """Pass a message on."""
        self._inner.message(text)

    def close(self) -> None:
        """Take the file away: the attempt is over."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self, task: Task | None) -> None:
        self._last = time.monotonic()
        self._updated += 1
        state = Progress(self._stage, updated=self._updated, pid=os.getpid())
        if task is not None:
            eta = task.eta_seconds()
            state = replace(
                state,
                label=task.label,
                done=int(task.done),  # a stage may count with numpy's integers
                total=int(task.total),
                unit=task.unit,
                note=task.note,
                eta_seconds=None if eta is None else round(eta, 1),
            )
        try:
            write_atomic(self._path, json.dumps(asdict(state)).encode(), sync=False)
        except OSError as error:  # a full disk is the stage's to report; its progress is not worth failing for
            log.debug("progress cannot be written to %s: %s", self._path, error)


_chosen: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Make this the default reporter of what is called here, in this thread."""
    token = _chosen.set(reporter)
    try:
        yield
    finally:
        _chosen.reset(token)


def default_reporter(subject: str | None = None) -> Reporter:
    """The reporter that `reporting` has set; else JSON lines where HEADCAST_LOG=json asks for them, bars or lines.

    Args:
        subject: whose work it is, for lines that name it.

    Raises:
        UserError: HEADCAST_LOG asks for what there is not.
    """
    if (chosen := _chosen.get()) is not None:
        return chosen
    if json_wanted():
        return JsonReporter(subject=subject)
    return RichReporter() if sys.stderr.isatty() else PlainReporter()
