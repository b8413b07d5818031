"""A disk that forgets: what is left of a folder when the power fails at any moment, by what was flushed until then.

`Recorder` notes every change of names that this process makes under a folder (audit events) and every `os.fsync`.
`states` gives what a disk may hold after a cut at each moment: bytes of a file only as they were when it was flushed
last, and of the changes of names those that were flushed for sure (a flush of a folder), all of them, or some.
"""

from __future__ import annotations

import os
import random
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kept = Literal["flushed", "some", "all"]


@dataclass(frozen=True)
class Change:
    """A change of names: what each (folder, name) means from then on, None for nothing; one is whole or not at all."""

    names: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Flush:
    """A file or folder brought to disk."""

    node: int
    content: bytes | None
    """None for a folder."""


@dataclass(frozen=True)
class Mark:
    """Something that the test wants to know of."""

    what: str


@dataclass(frozen=True)
class Cut:
    """What a disk holds after a cut."""

    number: int
    """Of how many events before it."""
    kept: Kept
    files: dict[str, bytes | None]
    """Content by path; None for a folder."""
    marks: tuple[str, ...]

    def lay_out(self, folder: Path) -> None:
        """Make the folder hold this."""
        for name, content in sorted(self.files.items()):
            path = folder / name
            if content is None:
                path.mkdir(parents=True)
            else:
                path.write_bytes(content)


@dataclass
class Recorder:
    """Notes what happens under a folder."""

    root: Path
    events: list[Change | Flush | Mark] = field(default_factory=list)
    names: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    """Names in each folder, by its number; that of the root is 0."""
    contents: dict[int, bytes] = field(default_factory=dict)
    """Bytes of the files that were there before."""
    count: int = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note what happens from here on; what is there already is on disk."""
        if not _recorders:
            sys.addaudithook(_hear)
        self._take_in(self.root, 0)
        self.before = {node: dict(names) for node, names in self.names.items()}
        flush = os.fsync

        def fsync(handle: int) -> None:
            self._flushed(handle)
            flush(handle)

        _recorders[:] = [self]
        os.fsync = fsync  # type: ignore[assignment]
        try:
            yield
        finally:
            os.fsync = flush
            _recorders[:] = [None]

    def mark(self, what: str) -> None:
        """Note that something is finished."""
        self.events.append(Mark(what))

    def states(self, rng: random.Random) -> Iterator[Cut]:
        """What the disk may hold after a cut at each moment, each different state once."""
        seen = set()
        for number in range(len(self.events) + 1):
            kinds: tuple[Kept, ...] = ("flushed", "some", "all")
            for kept in kinds:
                cut = self._after_cut(number, kept, rng)
                shape = (tuple(sorted(cut.files.items())), cut.marks)
                if shape not in seen:
                    seen.add(shape)
                    yield cut

    def _after_cut(self, number: int, kept: Kept, rng: random.Random) -> Cut:
        past = self.events[:number]
        contents, sure = dict(self.contents), set()
        for index, event in enumerate(past):
            if isinstance(event, Flush) and event.content is not None:
                contents[event.node] = event.content
            elif isinstance(event, Flush):
                sure |= {
                    i
                    for i, change in enumerate(past[:index])
                    if isinstance(change, Change) and event.node in [folder for folder, _, _ in change.names]
                }
        names = {node: dict(entries) for node, entries in self.before.items()}
        for index, event in enumerate(past):
            if isinstance(event, Change) and (
                index in sure or kept == "all" or (kept == "some" and rng.random() < 0.5)
            ):
                for folder, name, node in event.names:
                    entries = names.setdefault(folder, {})
                    if node is None:
                        entries.pop(name, None)
                    else:
                        entries[name] = node
        files: dict[str, bytes | None] = {}
        self._walk(names, contents, 0, "", files)
        return Cut(number, kept, files, tuple(event.what for event in past if isinstance(event, Mark)))

    def _walk(
        self,
        names: dict[int, dict[str, int]],
        contents: dict[int, bytes],
        folder: int,
        path: str,
        files: dict[str, bytes | None],
    ) -> None:
        for name, node in names.get(folder, {}).items():
            place = f"{path}{name}"
            if node in self.names:  # a folder
                files[place] = None
                self._walk(names, contents, node, f"{place}/", files)
            else:
                files[place] = contents.get(node, b"")

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take in an audit event; it comes before what it tells of."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | os.PathLike) and flags & os.O_CREAT and not os.path.lexists(path):
                self._make(self._place(path, -1), is_folder=False)
        elif event == "os.mkdir":
            if not os.path.lexists(arguments[0]):
                self._make(self._place(arguments[0], arguments[2]), is_folder=True)
        elif event in ("os.remove", "os.rmdir"):
            place = self._place(*arguments)
            if place is not None and place[1] in self.names[place[0]]:
                del self.names[place[0]][place[1]]
                self.events.append(Change(((*place, None),)))
        elif event == "os.rename":
            self._rename(self._place(arguments[0], arguments[2]), self._place(arguments[1], arguments[3]))
        elif event == "os.link":
            self._link(Path(arguments[0]), self._place(arguments[1], arguments[3]))

    def _place(self, path: Any, folder: int) -> tuple[int, str] | None:
        """Number of the folder and the name in it; None for what lies elsewhere."""
        base = _name(folder) if folder >= 0 else Path.cwd()
        full = Path(os.path.normpath(base / os.fsdecode(path)))
        parts = full.relative_to(self.root).parts if full.is_relative_to(self.root) else ()
        node = 0
        for part in parts[:-1]:
            if part not in self.names[node]:
                return None
            node = self.names[node][part]
        return (node, parts[-1]) if parts else None

    def _make(self, place: tuple[int, str] | None, *, is_folder: bool) -> None:
        if place is None:
            return
        self.count += 1
        if is_folder:
            self.names[self.count] = {}
        self.names[place[0]][place[1]] = self.count
        self.events.append(Change(((*place, self.count),)))

    def _rename(self, source: tuple[int, str] | None, target: tuple[int, str] | None) -> None:
        if source is None or target is None or source[1] not in self.names[source[0]]:
            return
        node = self.names[source[0]].pop(source[1])
        self.names[target[0]][target[1]] = node
        self.events.append(Change(((*source, None), (*target, node))))

    def _link(self, source: Path, target: tuple[int, str] | None) -> None:
        """A link to a file from outside, whose bytes may not be on disk yet."""
        if target is not None and source.stat().st_dev == self.root.stat().st_dev:
            self._make(target, is_folder=False)

    def _flushed(self, handle: int) -> None:
        place = self._place(_name(handle), -1)
        if place is None:
            if _name(handle) == self.root:
                self.events.append(Flush(0, None))
            return
        node = self.names[place[0]].get(place[1])
        if node is None:  # a file without a name
            return
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            self.events.append(Flush(node, None))
        else:
            self.events.append(Flush(node, Path(f"/proc/self/fd/{handle}").read_bytes()))

    def _take_in(self, folder: Path, node: int) -> None:
        for path in folder.iterdir():
            self.count += 1
            child = self.names[node][path.name] = self.count
            if path.is_dir():
                self.names[child] = {}
                self._take_in(path, child)
            else:
                self.contents[child] = path.read_bytes()


def _name(handle: int) -> Path:
    """What an open file is called."""
    return Path(f"/proc/self/fd/{handle}").readlink()


_recorders: list[Recorder | None] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if (event == "open" or event.startswith("os.")) and _recorders and _recorders[0] is not None:
        _recorders[0].hear(event, arguments)
