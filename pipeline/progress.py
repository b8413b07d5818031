"""Progress with an estimate of the time left, for terminals, plain logs and the orchestrator."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO


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
        share = f" ({100 * self.done // self.total} %)" if self.total else ""
        eta = self.eta_seconds()
        left = f", {eta:.0f} s left" if eta is not None and self.done < self.total else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.label}: {self.done}/{self.total} {self.unit}{share}{left}{note}"


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


def default_reporter() -> Reporter:
    """Bars where standard error is a terminal, lines elsewhere."""
    return RichReporter() if sys.stderr.isatty() else PlainReporter()
