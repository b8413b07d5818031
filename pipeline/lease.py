"""Who holds a folder: the kernel's lock among the processes of one machine, a numbered lease across machines.

A lease is a small file `lease-NUMBER.json`. Whoever takes the folder makes the file of the next number exclusively, so
that one of several takers wins, and from then on raises a counter in it every few seconds. A lease whose counter stood
still for a period is over and the next number may be taken. Its old holder finds the higher number and stops; or it
finds that its own last renewal is too long ago, and goes on only if it can still make the next number itself. Every
process measures with its own clock, which runs on while the machine sleeps; no clocks are compared. The file of the
highest number is never removed, so numbers only rise.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import LeaseLost, SubjectBusy, Unavailable, UserError

LOCK = "lock"
LEASE_NAME = re.compile(r"lease-(\d{8,15})\.json")
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What `flock` fails with on file systems that do not have it."""
LAST_EPOCH = 10**15 - 1
RECORD_BYTES = 512
"""Every record has this size and is written in place: a renewal then needs no space on a full disk."""
READ_BYTES = 4096
"""No more of a lease file is read, whatever lies there."""
STORES = ("s3", "s3a", "gs", "gcs", "memory")
"""Protocols of fsspec whose `pipe_file(mode="create")` is one exclusive request, not a look followed by a write."""

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
log = logging.getLogger(__name__)


def boot_seconds() -> float:
    """Seconds since this machine started, sleep included; setting the wall clock does not change them."""
    return time.clock_gettime(_CLOCK)


@dataclass(frozen=True)
class Times:
    """How often a lease is renewed, and how long its counter must stand still until others may take over."""

    renew: float = 5.0
    """Seconds."""
    period: float = 45.0
    """Seconds; more than three renewals."""

    def __post_init__(self) -> None:
        if not 0 < 3 * self.renew < self.period <= 600:
            raise ValueError(f"a period of {self.period} s does not fit renewals every {self.renew} s")

    @property
    def trust(self) -> float:
        """Seconds a holder trusts its last renewal: two renewals less than others wait, as clocks and caches differ."""
        return self.period - 2 * self.renew


TIMES = Times()


class LeaseStore(Protocol):
    """A folder that holds leases. Every method may raise OSError."""

    place: str
    """The folder's path or URL."""

    def create(self, name: str, data: bytes) -> bool:
        """Make a file unless there is one of this name; whether this call made it. One of several callers wins."""

    def read(self, name: str) -> bytes | None:
        """The first `READ_BYTES` of a file, None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write over a file that is there. Raises FileNotFoundError where there is none."""

    def names(self) -> list[str]:
        """The names of all files."""

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""


class FolderLeases:
    """Leases in a folder, on this machine or on a file system that several machines share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = str(folder.absolute())

    def create(self, name: str, data: bytes) -> bool:
        path = self.folder / name
        try:
            # O_EXCL is exclusive on NFS too, from version 3 on.
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except FileExistsError:
            return False
        except OSError:
            if path.is_symlink() or path.exists():  # sshfs has no error of its own for it
                return False
            raise
        try:
            _write_all(handle, data, path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    def read(self, name: str) -> bytes | None:
        path = self.folder / name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with _open_handle(handle, path):
            return os.read(handle, READ_BYTES)

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        _write_all(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK), data, path)

    def names(self) -> list[str]:
        try:
            return [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


def _write_all(handle: int, data: bytes, path: Path) -> None:
    """Write a whole small file from its beginning, bring it to disk or server, and close it."""
    with _open_handle(handle, path):
        os.ftruncate(handle, len(data))
        if os.pwrite(handle, data, 0) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle)


@contextlib.contextmanager
def _open_handle(handle: int, path: Path) -> Iterator[None]:
    """Close a file in the end; its errors name it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(handle)


class BucketLeases:
    """Leases in an object store, through fsspec.

    Args:
        files: a file system of fsspec whose `pipe_file(mode="create")` is exclusive.
        folder: path in it.
    """

    def __init__(self, files: Any, folder: str) -> None:
        self.files = files
        self.folder = folder.rstrip("/")
        self.place = str(files.unstrip_protocol(self.folder))

    def create(self, name: str, data: bytes) -> bool:
        self._put_new(name, data)
        # What is there tells who won: a request whose answer was lost is sent again, and then finds its own object.
        if self.read(name) != data:
            return False
        if self._put_new(name, data):
            raise UserError(
                f"'{self.place}' writes over what is there where an exclusive write is asked for, so nothing can be "
                "held in it.",
                "use a store with conditional writes (If-None-Match), such as Amazon S3, or a shared file system",
            )
        return True

    def _put_new(self, name: str, data: bytes) -> bool:
        try:
            with _storage_errors():
                self.files.pipe_file(f"{self.folder}/{name}", data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # 412 and 409 from a store that does not say which condition failed.
            if error.errno in (errno.EINVAL, errno.EBUSY):
                return False
            raise
        return True

    def read(self, name: str) -> bytes | None:
        try:
            with _storage_errors():
                # A range is never answered from a cached listing.
                return bytes(self.files.cat_file(f"{self.folder}/{name}", start=0, end=READ_BYTES))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:  # an empty object has no range
                return b""
            raise

    def write(self, name: str, data: bytes) -> None:
        if self.read(name) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.place}/{name}")
        with _storage_errors():
            self.files.pipe_file(f"{self.folder}/{name}", data)

    def names(self) -> list[str]:
        try:
            with _storage_errors():
                self.files.invalidate_cache(self.folder)
                return [str(path).rsplit("/", 1)[-1] for path in self.files.ls(self.folder, detail=False)]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), _storage_errors():
            self.files.rm_file(f"{self.folder}/{name}")


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Every failure of a store's client as OSError: some let the errors of their HTTP library through."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def lease_store_for(place: str | Path) -> LeaseStore:
    """The leases of a folder, or of a URL in an object store such as `s3://bucket/anna/.work`.

    Raises:
        UserError: the store is of a kind that cannot make a file exclusively, or its package is missing.
    """
    protocol, separator, path = str(place).partition("://")
    if not separator:
        return FolderLeases(Path(place))
    if protocol in ("file", "local"):
        Path(path).mkdir(parents=True, exist_ok=True)
        return FolderLeases(Path(path))
    if protocol not in STORES:
        raise UserError(
            f"'{place}': nothing can be held on a store of kind '{protocol}'.", f"use one of: {', '.join(STORES[:-1])}"
        )
    from fsspec.core import url_to_fs

    try:
        return BucketLeases(*url_to_fs(str(place)))
    except ImportError as error:
        raise UserError(
            f"'{place}' cannot be opened: {error}.", "install it with: pip install 'headcast[store]'"
        ) from None


class LeaseRecord(BaseModel):
    """What stands in a lease file."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    host: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    process: int = Field(ge=0)
    token: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Random; tells the holder's own lease from every other."""
    kernel_lock: str = Field(pattern=r"^[A-Za-z0-9:-]{0,128}$")
    """The kernel's lock that the holder holds as well, `BOOT:DEVICE:INODE`; empty where there is none."""
    period: float = Field(gt=0, le=600)
    """Seconds that the counter must stand still."""
    released: bool = False
    counter: int = Field(default=0, ge=0)

    @property
    def holder(self) -> str:
        return f"process {self.process} on '{self.host}'"

    def encode(self) -> bytes:
        return json.dumps(self.model_dump(by_alias=True)).ljust(RECORD_BYTES - 1).encode() + b"\n"


def _parse(data: bytes | None) -> LeaseRecord | None:
    """The record in a lease file, None where it is empty, damaged or of another version."""
    try:
        return LeaseRecord.model_validate_json(data or b"")
    except ValidationError:
        return None


def _name(epoch: int) -> str:
    return f"lease-{epoch:08d}.json"


def _epochs(store: LeaseStore) -> list[int]:
    """The numbers of all leases, rising."""
    found = (LEASE_NAME.fullmatch(name) for name in store.names())
    return sorted(int(match[1]) for match in found if match and match[0] == _name(int(match[1])))


def _busy(what: str, record: LeaseRecord | None) -> SubjectBusy:
    return SubjectBusy(
        f"{what} is in use by another run ({record.holder if record else 'which does not say its name'}).",
        "wait for that run to end, or stop it; what it holds is free when its process is gone",
    )


class _Stillness:
    """Since when each folder's lease has had the bytes that it has now, by this machine's own clock."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, bytes, float]] = {}

    def since(self, store: LeaseStore, name: str, data: bytes) -> float:
        """When these very bytes were first seen there, in `boot_seconds`."""
        known = self._seen.get(store.place)
        if known is None or known[:2] != (name, data):
            known = self._seen[store.place] = (name, data, boot_seconds())
        return known[2]


_stillness = _Stillness()


def _wait_for_end(store: LeaseStore, epoch: int, what: str, kernel_lock: str, times: Times) -> None:
    """Return when a lease is over; where its holder may be alive on another machine, watch its counter.

    Raises:
        SubjectBusy: the counter moved.
    """
    name = _name(epoch)
    data = store.read(name)
    record = _parse(data)
    if data is None or _is_over(record, kernel_lock):
        return
    end = _stillness.since(store, name, data) + max(times.period, record.period if record else 0)
    if (left := end - boot_seconds()) > 0:
        holder = record.holder if record else "a run whose lease cannot be read"
        log.warning("%s was left by %s; looking for up to %.0f s whether that still works", what, holder, left)
    while (left := end - boot_seconds()) > 0:
        time.sleep(min(left, times.renew / 5))
        now = store.read(name)
        if now == data:
            continue
        record = _parse(now)
        if now is None or _is_over(record, kernel_lock):
            return
        raise _busy(what, record)


def _is_over(record: LeaseRecord | None, kernel_lock: str) -> bool:
    """Whether one look at a lease shows that it is over: given back, or of a process whose kernel lock is now ours."""
    return record is not None and (record.released or (kernel_lock != "" and record.kernel_lock == kernel_lock))


def _usurper(store: LeaseStore, epoch: int, token: str) -> str | None:
    """Why the last lease is no longer this holder's, in words; None while it is."""
    newest = max(_epochs(store), default=epoch)
    data = store.read(_name(newest)) or b""
    # The token stands there even while its holder is writing: only the counter behind it changes.
    if token.encode() in data:
        return None
    if newest <= epoch:
        return "its lease was removed or written over"
    record = _parse(data)
    return f"another run took over ({record.holder if record else 'which does not say its name'})"


def _lost(what: str, why: str) -> LeaseLost:
    return LeaseLost(
        f"{what} is no longer held by this run: {why}.",
        "what was finished is kept; run the same command again to go on",
    )


class Lease:
    """A lease that is held, renewed by a thread of its own until `release`. Made by `take_lease`."""

    def __init__(
        self, store: LeaseStore, what: str, epoch: int, record: LeaseRecord, times: Times, taken: float
    ) -> None:
        self.store = store
        self.what = what
        self.epoch = epoch
        self.times = times
        self._record = record
        self._renewed = taken
        self._why = ""
        self._files = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease of {what}", daemon=True)
        self._thread.start()

    @property
    def ticket(self) -> str:
        """What a child process needs for a `Ticket`."""
        return f"{self.epoch}:{self._record.token}"

    def lost(self) -> bool:
        """Whether the lease can no longer be relied on; once true it stays true.

        Cheap: reads a clock. Only after a time without renewals it goes to the store, to see whether anybody came.
        """
        while not self._why and self._idle() > self.times.trust:
            self._take_again()
        return bool(self._why)

    def _idle(self) -> float:
        return boot_seconds() - self._renewed

    def _take_again(self) -> None:
        """Go on after a time without renewals if nobody came in between, which making the next number proves."""
        with self._files:
            started, idle = boot_seconds(), self._idle()
            if self._why or idle <= self.times.trust:  # another thread was here first
                return
            why = None
            try:
                why = _usurper(self.store, self.epoch, self._record.token)
                if why is None and not _make_next(self.store, self.epoch, self._record):
                    self.epoch, self._renewed = self.epoch + 1, started
                    return
                why = why or _usurper(self.store, self.epoch, self._record.token)
            except OSError as error:
                log.info("the lease of %s could not be taken again: %s", self.what, error)
            self._why = why or f"its lease was not renewed for {idle:.0f} s (it was stopped, or its storage was silent)"

    def check(self) -> None:
        """Look whether the lease is still this one's. Call it right before what only the holder may do.

        Raises:
            LeaseLost: it is not.
        """
        if not self.lost():
            # Storage that does not answer proves nothing; `lost` tells when it was silent for too long.
            with contextlib.suppress(OSError):
                self._look()
        if self.lost():
            raise _lost(self.what, self._why)

    def release(self) -> None:
        """Give the lease back, so that nobody has to wait for it."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _usurper(self.store, self.epoch, self._record.token) is None:
                self.store.write(_name(self.epoch), self._record.model_copy(update={"released": True}).encode())

    def _keep(self) -> None:
        while not self._ended.wait(self.times.renew) and not self.lost():
            try:
                self._renew()
            except OSError as error:
                log.info("the lease of %s could not be renewed: %s", self.what, error)

    def _renew(self) -> None:
        started = boot_seconds()
        self._look()
        if self.lost():
            return
        with self._files:
            self._record = self._record.model_copy(update={"counter": self._record.counter + 1})
            self.store.write(_name(self.epoch), self._record.encode())
        if not self.lost():
            self._renewed = started

    def _look(self) -> None:
        with self._files:
            why = _usurper(self.store, self.epoch, self._record.token)
        self._why = self._why or why or ""


def take_lease(store: LeaseStore, what: str, *, kernel_lock: str = "", times: Times = TIMES) -> Lease:
    """Take the next lease of a folder, after watching the last one where its holder may be alive.

    Args:
        what: what is held, for messages, such as `Subject 'anna'`.
        kernel_lock: a kernel lock that the caller holds; a lease left by its former holder is over at once.

    Raises:
        SubjectBusy: somebody else holds it.
        UserError: the store cannot hold leases, or a number is there that nothing can follow.
        OSError: the store does not answer.
    """
    record = LeaseRecord(
        host=re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64] or "unknown",
        process=os.getpid(),
        token=secrets.token_hex(16),
        kernel_lock=kernel_lock,
        period=times.period,
    )
    last = max(_epochs(store), default=0)
    while True:
        if last == LAST_EPOCH:
            raise UserError(
                f"The lease '{_name(last)}' in '{store.place}' has a number that no run ever reaches.",
                "when nothing works on it, remove this file",
            )
        if last:
            _wait_for_end(store, last, what, kernel_lock, times)
        taken = boot_seconds()
        rival = _make_next(store, last, record)
        if not rival:
            return Lease(store, what, last + 1, record, times, taken)
        last = rival


def _make_next(store: LeaseStore, last: int, record: LeaseRecord) -> int:
    """Make the lease that follows one that was looked at; returns the number that stands instead, 0 when it is made."""
    epoch = last + 1
    if not store.create(_name(epoch), record.encode()):
        return epoch
    # The list may have been old, as from a cache of the file system, or this taker slow, so that others came and went
    # in the meantime. The new file makes the list anew: only the lease that was looked at may be there.
    others = [other for other in _epochs(store) if other != epoch]
    if others[-1:] not in ([], [last]):
        store.remove(_name(epoch))
        return others[-1]
    for old in others:
        store.remove(_name(old))
    return 0


class Ticket:
    """A holder's lease as a child process sees it that works for it: lost when followed, or not renewed for long.

    Args:
        folder: what is held.
        ticket: `Held.ticket` of the holder.
        what: what is held, for messages.
    """

    def __init__(self, folder: Path, ticket: str, what: str, times: Times = TIMES) -> None:
        epoch, _, self._token = ticket.partition(":")
        self._epoch = int(epoch)
        self._store = FolderLeases(folder)
        self._what = what
        self._times = times
        self._looked = self._moved = -math.inf
        self._data = b""
        self._why = ""

    def lost(self) -> bool:
        """Whether the holder can no longer rely on its lease. Cheap: looks once in the time of a renewal."""
        if boot_seconds() - self._looked > self._times.renew:
            with contextlib.suppress(LeaseLost):
                self.check()
        return bool(self._why)

    def check(self) -> None:
        """Look whether the lease is still the holder's.

        Raises:
            LeaseLost: it is not.
        """
        with contextlib.suppress(OSError):
            self._why = self._why or _usurper(self._store, self._epoch, self._token) or self._standstill()
        if self._why:
            raise _lost(self._what, self._why)

    def _standstill(self) -> str:
        """That the holder seems to stand still, in words. A renewal is seen up to one renewal after it was made."""
        now, patience = boot_seconds(), self._times.trust - self._times.renew
        data = self._store.read(_name(max(_epochs(self._store), default=0))) or b""
        if data != self._data or now - self._looked > patience:  # who was stopped itself has to look anew
            self._data, self._moved = data, now
        self._looked = now
        idle = now - self._moved
        return f"its lease was not renewed for {idle:.0f} s" if idle > patience else ""


@dataclass(frozen=True)
class KernelLock:
    """A `flock` that is held: it ends with the last process that has the file open, whatever happens."""

    handle: int
    identity: str
    """`BOOT:DEVICE:INODE`, the same for all that this lock keeps apart; empty where the lease alone counts."""


@dataclass(frozen=True)
class Held:
    """A folder that is held: its kernel lock, its lease, and its lease in an object store if there is one."""

    kernel: KernelLock
    leases: Sequence[Lease]

    def fileno(self) -> int:
        """The lock's file: a child that inherits it keeps the folder held, on this machine, as long as it lives."""
        return self.kernel.handle

    @property
    def ticket(self) -> str:
        """What a child process needs for a `Ticket`."""
        return self.leases[0].ticket

    def lost(self) -> bool:
        """Whether the folder may be another run's by now. Cheap enough for every step."""
        return any(lease.lost() for lease in self.leases)

    def check(self) -> None:
        """Call it right before what only the holder may do.

        Raises:
            LeaseLost: the folder is another run's, or may be.
        """
        for lease in self.leases:
            lease.check()


@contextlib.contextmanager
def hold_folder(folder: Path, what: str, store: LeaseStore | None = None, times: Times = TIMES) -> Iterator[Held]:
    """Make a folder if need be and hold it: on this machine, across machines, and in an object store if one is given.

    Raises:
        SubjectBusy: another run holds it.
        Unavailable: the store does not answer.
        OSError: the folder cannot be made or written.
    """
    kernel = _take_kernel_lock(folder, what)
    leases: list[Lease] = []
    try:
        leases.append(take_lease(FolderLeases(folder), what, kernel_lock=kernel.identity, times=times))
        if store is not None:
            try:
                leases.append(take_lease(store, what, kernel_lock=kernel.identity, times=times))
            except OSError as error:
                raise Unavailable(
                    f"{what} cannot be held in '{store.place}': {error}.",
                    "check the network and the store's credentials, and run the same command again",
                ) from error
        yield Held(kernel, leases)
    finally:
        for lease in reversed(leases):
            lease.release()
        os.close(kernel.handle)


def remove_traces(folder: Path) -> None:
    """Remove lock and leases from a folder that is given up, so that it can be removed. The caller holds it."""
    store = FolderLeases(folder)
    for name in (*map(_name, _epochs(store)), LOCK):
        store.remove(name)


def is_held(folder: Path) -> bool:
    """Whether a run holds the folder now, as far as one look tells. Reads only.

    A lease of another machine counts as held until this process has seen it stand still for its period.
    """
    store = FolderLeases(folder)
    try:
        name = _name(max(_epochs(store), default=0))
        data = store.read(name)
        record = _parse(data)
        if data is None or _is_over(record, ""):
            return False
        kernel_lock, free = _look_at_lock(folder)
    except OSError:
        return True
    if free and _is_over(record, kernel_lock):
        return False
    if not free and not _is_elsewhere(record, kernel_lock):
        return True
    return boot_seconds() < _stillness.since(store, name, data) + (record.period if record else TIMES.period)


def _look_at_lock(folder: Path) -> tuple[str, bool]:
    """The identity of a folder's kernel lock, and whether it is free."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return "", True
    try:
        return _identity(handle), _flock(handle, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return "", True
    finally:
        os.close(handle)


def _take_kernel_lock(folder: Path, what: str) -> KernelLock:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the run before has just removed the folder
            continue
        try:
            kernel = KernelLock(handle, _lock_or_refuse(handle, folder, what))
            # The run before may have removed the file after it was opened here; that lock would keep nobody out.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                return kernel
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock_or_refuse(handle: int, folder: Path, what: str) -> str:
    """Lock the open file; returns the lock's identity, or nothing where the lease alone counts."""
    try:
        for attempt in range(5):  # `is_held` of another process has the lock for a moment
            if _flock(handle, fcntl.LOCK_EX):
                return _identity(handle)
            time.sleep(0.01 * attempt)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        log.info("'%s' lies on a file system without locks (%s); its lease alone counts", folder, error.strerror)
        return ""
    store = FolderLeases(folder)
    record = _parse(store.read(_name(max(_epochs(store), default=0))))
    if _is_elsewhere(record, _identity(handle)):
        return ""
    raise _busy(what, record if record and not record.released else None)


def _is_elsewhere(record: LeaseRecord | None, identity: str) -> bool:
    """Whether a lock that is taken belongs to another machine, by its lease. A file server may keep the locks of a
    machine that is gone for minutes, or until it comes back; its lease tells sooner."""
    own, other = identity.partition(":")[0], (record.kernel_lock if record else "").partition(":")[0]
    return record is not None and not record.released and own != "" and other not in ("", own)


def _flock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _identity(handle: int) -> str:
    """Which lock of which kernel this is; empty where the kernel does not say when it was started."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    stat = os.fstat(handle)
    return f"{boot}:{stat.st_dev}:{stat.st_ino}"
