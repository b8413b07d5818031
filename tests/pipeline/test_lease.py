"""Leases: one holder at a time, on one machine, across machines and in an object store, and what ends a lease."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import lease as lease_module
from pipeline.config import preset_config
from pipeline.dataset import Subject
from pipeline.errors import LeaseLost, StageError, SubjectBusy, Unavailable, UserError
from pipeline.lease import (
    LOCK,
    RECORD_BYTES,
    BucketLeases,
    FolderLeases,
    Lease,
    LeaseRecord,
    LeaseStore,
    Ticket,
    Times,
    hold_folder,
    is_held,
    lease_store_for,
    take_lease,
)
from pipeline.run import hold
from pipeline.stage import read_manifest

QUICK = Times(renew=0.2, period=2.0)
WHAT = "Subject 'anna'"
CONFIG = preset_config("quick")


def record(**changes: Any) -> LeaseRecord:
    """A lease of a process on another machine."""
    given = {"host": "render-7", "process": 4711, "token": "0" * 32, "kernel_lock": "elsewhere:1:2", "period": 45.0}
    return LeaseRecord.model_validate({**given, **changes})


def lay(store: LeaseStore, epoch: int, data: bytes) -> None:
    assert store.create(f"lease-{epoch:08d}.json", data)


def read(store: LeaseStore, epoch: int) -> dict[str, Any]:
    data = store.read(f"lease-{epoch:08d}.json")
    assert data is not None
    assert len(data) == RECORD_BYTES
    return json.loads(data)


@dataclass
class Clock:
    """A clock that only sleeping moves; `during` is called at each sleep."""

    now: float = 1000.0
    slept: float = 0.0
    during: Any = lambda clock: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.during(self)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module, "boot_seconds", lambda: clock.now)
    monkeypatch.setattr(lease_module.time, "sleep", clock.sleep)
    monkeypatch.setattr(lease_module, "_stillness", lease_module._Stillness())
    return clock


@contextmanager
def machine(name: str) -> Iterator[None]:
    """Act as another machine, whose kernel knows nothing of this one's locks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module, "_flock", lambda handle, kind: True)
        patch.setattr(lease_module, "_identity", lambda handle: f"{name}:1:2")
        patch.setattr(socket, "gethostname", lambda: name)
        yield


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of a bucket on an S3 server of its own, which makes objects exclusively as the real one does."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    one_at_a_time, put = threading.Lock(), S3Response.put_object

    def put_object(self: S3Response) -> Any:
        with one_at_a_time:  # moto looks and then writes; S3 does both at once
            return put(self)

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_object)
        server.start()
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("dataset")
        yield "s3://dataset"
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where leases lie: a folder, or a URL."""
    if request.param == "folder":
        (tmp_path / ".work").mkdir()
        return str(tmp_path / ".work")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}/.work"


@pytest.fixture
def store(place: str) -> LeaseStore:
    return lease_store_for(place)


# What a store does


def test_a_store_makes_a_file_once_and_writes_over_what_is_there_only(store: LeaseStore) -> None:
    assert store.names() == []
    assert store.read("a") is None
    with pytest.raises(FileNotFoundError):
        store.write("a", b"late")
    assert store.names() == []
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert store.read("a") == b"first"
    store.write("a", b"longer than before")
    store.write("a", b"short")
    assert store.read("a") == b"short"
    assert store.names() == ["a"]
    store.remove("a")
    store.remove("a")
    assert store.names() == []
    assert store.create("a", b"")
    assert store.read("a") == b""


def test_a_huge_file_is_not_read_whole(store: LeaseStore) -> None:
    assert store.create("a", b"")
    store.write("a", b"x" * 3_000_000)
    assert len(store.read("a") or b"") <= lease_module.READ_BYTES


def test_a_folder_is_named_by_path_or_url(tmp_path: Path) -> None:
    for place in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        store = lease_store_for(place)
        assert isinstance(store, FolderLeases)
        assert store.folder == tmp_path
    assert lease_store_for(f"file://{tmp_path}/new/.work").create("a", b""), "the folder is made"
    assert isinstance(lease_store_for("memory://anna"), BucketLeases)


def test_a_store_that_cannot_be_exclusive_is_refused_by_its_kind() -> None:
    for url in ("ftp://host/data", "http://host/data", "nonsense://host"):
        with pytest.raises(UserError, match="nothing can be held on a store of kind"):
            lease_store_for(url)


def test_a_store_that_writes_over_all_the_same_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    store = lease_store_for("memory://careless/.work")
    assert isinstance(store, BucketLeases)
    put = type(store.files).pipe_file
    monkeypatch.setattr(type(store.files), "pipe_file", lambda self, path, data, mode="": put(self, path, data))
    with pytest.raises(UserError, match="writes over what is there where an exclusive write is asked for"):
        take_lease(store, WHAT, times=QUICK)


def test_a_request_whose_answer_was_lost_is_not_taken_for_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sends the write again and is told that the object, its own, is there."""
    store = lease_store_for("memory://lost-answer/.work")
    assert isinstance(store, BucketLeases)
    put = type(store.files).pipe_file

    def twice(self: Any, path: str, data: bytes, mode: str = "overwrite") -> None:
        put(self, path, data, mode=mode)
        if mode == "create":
            put(self, path, data, mode=mode)

    monkeypatch.setattr(type(store.files), "pipe_file", twice)
    lease = take_lease(store, WHAT, times=QUICK)
    lease.check()
    lease.release()


# One lease after another


def test_a_lease_that_was_given_back_is_followed_at_once(store: LeaseStore, clock: Clock) -> None:
    for epoch in (1, 2, 3):
        lease = take_lease(store, WHAT, times=QUICK)
        assert lease.epoch == epoch
        assert not lease.lost()
        lease.check()
        assert not read(store, epoch)["released"]
        lease.release()
        assert read(store, epoch)["released"]
        assert store.names() == [f"lease-{epoch:08d}.json"], "the highest number stays, the others go"
    assert clock.slept == 0


def test_a_lease_that_stands_still_is_taken_after_its_period(store: LeaseStore, clock: Clock) -> None:
    lay(store, 7, record(period=60.0).encode())
    lease = take_lease(store, WHAT)
    assert lease.epoch == 8
    assert 60 <= clock.slept < 61, "the longer of both periods"
    lease.release()


def test_a_lease_that_moves_is_refused_as_soon_as_it_moves(store: LeaseStore, clock: Clock) -> None:
    lay(store, 7, record().encode())

    def renew(clock: Clock) -> None:
        if clock.slept > 4:
            store.write("lease-00000007.json", record(counter=1).encode())

    clock.during = renew
    with pytest.raises(
        SubjectBusy, match=r"Subject 'anna' is in use by another run \(process 4711 on 'render-7'\)"
    ) as e:
        take_lease(store, WHAT)
    assert e.value.retryable
    assert clock.slept < 6
    assert store.names() == ["lease-00000007.json"]


def test_a_lease_given_back_while_it_is_watched_is_followed(store: LeaseStore, clock: Clock) -> None:
    lay(store, 7, record().encode())
    clock.during = lambda clock: store.write("lease-00000007.json", record(released=True).encode())
    lease = take_lease(store, WHAT)
    assert lease.epoch == 8
    assert clock.slept < 5
    lease.release()


def test_what_was_seen_to_stand_still_before_need_not_be_watched_again(tmp_path: Path, clock: Clock) -> None:
    store = FolderLeases(tmp_path)
    lay(store, 1, record().encode())
    assert is_held(tmp_path)
    clock.now += 30
    assert is_held(tmp_path)
    clock.now += 30
    assert not is_held(tmp_path)
    lease = take_lease(store, WHAT)
    assert clock.slept == 0
    lease.release()
    lay(store, 5, record().encode())
    assert is_held(tmp_path)
    clock.now += 100
    store.write("lease-00000005.json", record(counter=9).encode())
    assert is_held(tmp_path), "it moved since"


def test_the_lease_of_a_lock_that_the_taker_holds_is_over(store: LeaseStore, clock: Clock) -> None:
    lay(store, 7, record(kernel_lock="boot:1:2").encode())
    lease = take_lease(store, WHAT, kernel_lock="boot:1:2")
    assert clock.slept == 0
    lease.release()


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\0" * RECORD_BYTES,
        b"garbage \xff\xfe",
        b"null",
        b"[" * 4000,
        record().encode()[:100],
        record().encode().replace(b'"schema": 1', b'"schema": 2'),
        record().encode().replace(b"render-7", rb"\u001b[2J"),
        record().encode().replace(b"45.0", b"1e99"),
        record().encode().replace(b'"counter": 0', b'"counter": -1'),
        b'{"released": true}',
    ],
)
def test_a_damaged_lease_is_watched_and_then_taken(
    tmp_path: Path, clock: Clock, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = FolderLeases(tmp_path)
    lay(store, 3, damaged)
    lease = take_lease(store, WHAT)
    assert lease.epoch == 4
    assert clock.slept >= 45
    assert "was left by a run whose lease cannot be read; looking for up to 45 s" in caplog.text
    lease.release()


def test_a_damaged_lease_that_moves_is_refused(tmp_path: Path, clock: Clock) -> None:
    """As of a newer version, or of a process that has just made its lease and not yet filled it."""
    store = FolderLeases(tmp_path)
    lay(store, 3, b"")
    clock.during = lambda clock: store.write("lease-00000003.json", b"something")
    with pytest.raises(SubjectBusy, match="another run \\(which does not say its name\\)"):
        take_lease(store, WHAT)


def test_numbers_go_on_from_whatever_is_there(tmp_path: Path, clock: Clock) -> None:
    store = FolderLeases(tmp_path)
    for name in ("lease-1.json", "lease-000000001.json", "lease-9999999999999999.json", "lease-0000000x.json", "x"):
        (tmp_path / name).write_text("not a lease")
    lay(store, 12, record(released=True).encode())
    lay(store, 99999999, record(released=True).encode())
    lease = take_lease(store, WHAT)
    assert lease.epoch == 100000000
    assert "lease-00000012.json" not in store.names()
    lease.check()
    lease.release()
    (tmp_path / "lease-999999999999999.json").touch()
    with pytest.raises(UserError, match="has a number that no run ever reaches") as caught:
        take_lease(store, WHAT)
    assert caught.value.fix == "when nothing works on it, remove this file"


@pytest.mark.parametrize("there", [(3, 4, 5), (4, 5), (5,)])
def test_an_old_list_of_files_keeps_nobody_out(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, there: tuple[int, ...]
) -> None:
    """As sshfs and NFS answer from their caches."""
    store = FolderLeases(tmp_path)
    for epoch in there:
        lay(store, epoch, record(released=True).encode())
    names, answers = FolderLeases.names, iter([["lease-00000003.json"]])
    monkeypatch.setattr(FolderLeases, "names", lambda self: next(answers, None) or names(self))
    lease = take_lease(store, WHAT)
    assert lease.epoch == 6
    assert store.names() == ["lease-00000006.json"]
    lease.release()
    assert clock.slept == 0


def test_an_old_list_of_files_hides_no_holder(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder was removed and made anew since, and its numbers began again."""
    store = FolderLeases(tmp_path)
    lay(store, 1, record().encode())
    names, answers = FolderLeases.names, iter([["lease-00000005.json"]])
    monkeypatch.setattr(FolderLeases, "names", lambda self: next(answers, None) or names(self))
    clock.during = lambda clock: store.write("lease-00000001.json", record(counter=1).encode())
    with pytest.raises(SubjectBusy, match="render-7"):
        take_lease(store, WHAT)
    assert store.names() == ["lease-00000001.json"]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("/etc/hostname")])
def test_what_is_no_file_is_named(tmp_path: Path, make: Any) -> None:
    subject = Subject(tmp_path / "anna")
    subject.work.mkdir(parents=True)
    make(subject.work / "lease-00000001.json")
    assert subject.running(), "it cannot be told"
    with pytest.raises(StageError, match=r"lease-00000001\.json"), hold(subject):
        pass


# Losing a lease


def test_a_holder_that_was_stopped_for_long_goes_on_if_nobody_came(store: LeaseStore, clock: Clock) -> None:
    """A closed laptop: making the next number proves that nobody had it."""
    lease = take_lease(store, WHAT)
    ticket = lease.ticket
    for epoch in (2, 3):
        clock.now += 3600
        assert not lease.lost()
        lease.check()
        assert store.names() == [f"lease-{epoch:08d}.json"]
    if isinstance(store, FolderLeases):
        Ticket(store.folder, ticket, WHAT).check()
    lease._renew()
    assert read(store, 3)["counter"] == 1
    lease.release()
    assert read(store, 3)["released"]


def test_a_holder_that_was_stopped_for_long_ends_if_somebody_came(store: LeaseStore, clock: Clock) -> None:
    lease = take_lease(store, WHAT)
    clock.now += 36
    lay(store, 2, record().encode())
    assert lease.lost()
    clock.now -= 30
    assert lease.lost(), "once lost is lost"
    before = read(store, 1)
    lease._renew()
    assert read(store, 1) == before, "it is not renewed any more"
    lease.release()
    assert read(store, 1) == before


def test_a_holder_whose_storage_was_silent_for_long_knows(
    store: LeaseStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = take_lease(store, WHAT)

    def silent(*args: object) -> Any:
        raise OSError("no answer")

    with monkeypatch.context() as outage:
        outage.setattr(type(store), "names", silent)
        clock.now += 34
        assert not lease.lost()
        lease.check()
        clock.now += 2
        with pytest.raises(LeaseLost, match="no longer held by this run: its lease was not renewed for 36 s") as caught:
            lease.check()
    assert caught.value.retryable
    lease.release()
    assert read(store, 1)["released"], "nobody took it: the next need not wait"


def test_a_higher_number_ends_a_lease(store: LeaseStore) -> None:
    lease = take_lease(store, WHAT)
    lay(store, 2, record().encode())
    with pytest.raises(LeaseLost, match=r"another run took over \(process 4711 on 'render-7'\)"):
        lease.check()
    assert lease.lost()
    lease.release()
    assert json.loads(store.read("lease-00000002.json") or b"")["token"] == "0" * 32


def test_a_lease_removed_by_hand_is_lost(store: LeaseStore) -> None:
    lease = take_lease(store, WHAT, times=QUICK)
    store.remove("lease-00000001.json")
    until(lease.lost)
    with pytest.raises(LeaseLost, match="its lease was removed or written over"):
        lease.check()
    lease.release()
    assert store.names() == [], "and not made anew"


def test_storage_that_is_silent_for_a_while_does_not_end_a_lease(
    store: LeaseStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = take_lease(store, WHAT)

    def silent(*args: object) -> Any:
        raise OSError("no answer")

    with monkeypatch.context() as outage:
        for name in ("read", "write", "names"):
            outage.setattr(type(store), name, silent)
        clock.now += 30
        lease.check()
        assert not lease.lost()
    lease._renew()
    clock.now += 30
    assert not lease.lost()
    assert lease.epoch == 1
    lease.release()


def test_a_slow_write_counts_from_when_it_began(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = take_lease(FolderLeases(tmp_path), WHAT)
    write = FolderLeases.write

    def slow(self: FolderLeases, name: str, data: bytes) -> None:
        clock.now += 30
        write(self, name, data)

    monkeypatch.setattr(FolderLeases, "write", slow)
    lease._renew()
    assert not lease.lost()
    assert lease.epoch == 1
    clock.now += 6
    assert not lease.lost()
    assert lease.epoch == 2, "it had to make sure"
    lease.release()


def test_the_wall_clock_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for jump in (-4e8, 0.0, 4e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump)
        with hold_folder(tmp_path, WHAT, times=QUICK) as held:
            lease = held.leases[0]
            until(lambda lease=lease: read(lease.store, lease.epoch)["counter"] > 1)
            monkeypatch.setattr(time, "time", lambda jump=jump: -jump)
            held.check()
            with machine("other"), pytest.raises(SubjectBusy), hold_folder(tmp_path, WHAT, times=QUICK):
                pass
            held.check()


def test_times_that_do_not_fit_are_refused() -> None:
    for renew, period in ((5.0, 10.0), (0.0, 45.0), (-1.0, 45.0), (5.0, 601.0)):
        with pytest.raises(ValueError, match="does not fit"):
            Times(renew, period)


# Folders: the kernel's lock and the lease together


def test_a_held_folder_is_refused_at_once_on_this_machine(tmp_path: Path, clock: Clock) -> None:
    with hold_folder(tmp_path, WHAT) as held:
        assert is_held(tmp_path)
        with pytest.raises(SubjectBusy, match=f"process {os.getpid()} on"), hold_folder(tmp_path, WHAT):
            pass
        held.check()
        ticket = Ticket(tmp_path, held.ticket, WHAT)
        ticket.check()
        assert not ticket.lost()
    assert not is_held(tmp_path)
    assert clock.slept < 1
    with hold_folder(tmp_path, WHAT):
        assert not ticket.lost(), "it has looked a moment ago"
        with pytest.raises(LeaseLost, match="another run took over"):
            ticket.check()
    assert ticket.lost()


def test_a_child_sees_that_its_holder_stands_still(tmp_path: Path, clock: Clock) -> None:
    with hold_folder(tmp_path, WHAT) as held:
        ticket = Ticket(tmp_path, held.ticket, WHAT)
        for _ in range(10):
            held.leases[0]._renew()
            assert not ticket.lost()
            clock.now += 6
        clock.now += 20
        assert not ticket.lost()
        clock.now += 6
        assert ticket.lost(), "before anybody may take over"
        assert not held.lost()
        with pytest.raises(LeaseLost, match="not renewed for 32 s"):
            ticket.check()


def test_looking_never_keeps_a_run_out(tmp_path: Path) -> None:
    with hold_folder(tmp_path, WHAT) as held:
        left = read(FolderLeases(tmp_path), held.leases[0].epoch)
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            is_held(tmp_path)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(100):
            with hold_folder(tmp_path, WHAT) as held:
                epoch = held.leases[0].epoch
            # As after `kill -9`: the lease is not given back.
            FolderLeases(tmp_path).write(f"lease-{epoch:08d}.json", LeaseRecord(**{**left, "released": False}).encode())
    finally:
        done.set()
        looker.join()


def test_a_lock_file_that_was_removed_keeps_others_out_by_its_lease(tmp_path: Path) -> None:
    with hold_folder(tmp_path, WHAT, times=QUICK) as held:
        (tmp_path / LOCK).unlink()
        with pytest.raises(SubjectBusy, match=f"process {os.getpid()}"), hold_folder(tmp_path, WHAT, times=QUICK):
            pass
        assert is_held(tmp_path)
        held.check()


def test_without_locks_the_lease_alone_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def none(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with hold_folder(tmp_path, WHAT, times=QUICK):
        assert is_held(tmp_path)
        with pytest.raises(SubjectBusy), hold_folder(tmp_path, WHAT, times=QUICK):
            pass
    with hold_folder(tmp_path, WHAT, times=QUICK) as held:
        assert held.leases[0].epoch == 2


def test_a_lock_that_a_server_keeps_for_a_dead_machine_does_not_last(tmp_path: Path, clock: Clock) -> None:
    """NFS version 3 lets go of a machine's locks when it comes back, version 4 after a while."""
    import fcntl

    store = FolderLeases(tmp_path)
    lay(store, 1, record(kernel_lock="another-boot:1:2").encode())
    with open(tmp_path / LOCK, "w") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        assert is_held(tmp_path)
        moved = record(kernel_lock="another-boot:1:2")
        clock.during = lambda clock: store.write(
            "lease-00000001.json", moved.model_copy(update={"counter": int(100 * clock.slept)}).encode()
        )
        with pytest.raises(SubjectBusy, match="process 4711 on 'render-7'"), hold_folder(tmp_path, WHAT):
            pass
        clock.during = lambda clock: None
        with hold_folder(tmp_path, WHAT) as held:
            assert held.leases[0].epoch == 2
            with pytest.raises(SubjectBusy, match=f"process {os.getpid()}"), hold_folder(tmp_path, WHAT):
                pass
        assert not is_held(tmp_path)


def test_a_refused_subject_leaves_nothing(tmp_path: Path) -> None:
    subject = Subject(tmp_path / "data" / "anna")
    with pytest.raises(UserError, match="no video"), hold(subject):
        raise UserError("no video")
    assert not subject.root.exists()
    subject.source.mkdir(parents=True)
    (subject.source / "source.json").touch()
    with pytest.raises(UserError), hold(subject):
        raise UserError("no video")
    assert (subject.work / LOCK).exists()


def test_a_full_disk_does_not_end_a_lease(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with hold_folder(tmp_path, WHAT) as held:
            with pytest.raises(OSError, match="No space left"), open(tmp_path / "full", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            lease = held.leases[0]
            lease._renew()
            assert read(FolderLeases(tmp_path), lease.epoch)["counter"] == 1
        assert read(FolderLeases(tmp_path), lease.epoch)["released"]
        with pytest.raises(OSError, match="No space left"), hold_folder(tmp_path, WHAT):
            pass
        assert FolderLeases(tmp_path).names().count("lease-00000002.json") == 0
        (tmp_path / "full").unlink()
        with hold_folder(tmp_path, WHAT):
            pass
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_subject_is_held_in_its_object_store_too(tmp_path: Path, bucket: str) -> None:
    ours, theirs = Subject(tmp_path / "one" / "anna"), Subject(tmp_path / "two" / "anna")
    remote = lease_store_for(f"{bucket}/anna/.work")
    with ours.lock(bucket, QUICK) as held:
        assert not read(remote, 1)["released"]
        with pytest.raises(SubjectBusy), theirs.lock(bucket, QUICK):
            pass
        assert not theirs.running()
        held.check()
        remote.remove("lease-00000001.json")
        until(held.lost)
        with pytest.raises(LeaseLost):
            held.check()
    assert not ours.running()
    with theirs.lock(bucket + "/", QUICK):
        pass
    assert read(remote, 1)["released"]


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path, bucket: str) -> None:
    subject = Subject(tmp_path / "anna")
    with pytest.raises(Unavailable) as caught, subject.lock("s3://no-such-bucket"):
        pass
    assert caught.value.what.startswith("Subject 'anna' cannot be held in 's3://no-such-bucket/anna/.work': ")
    assert caught.value.retryable
    assert not subject.running()


def test_a_killed_run_frees_its_store_at_once_on_its_own_machine(tmp_path: Path, bucket: str) -> None:
    subject, url = Subject(tmp_path / "anna"), f"{bucket}/{tmp_path.name}"
    with Holder(subject.root, store=url) as holder:
        holder.process.send_signal(signal.SIGKILL)
    assert not read(lease_store_for(f"{url}/anna/.work"), 1)["released"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module.time, "sleep", lambda seconds: pytest.fail("it waited"))
        lock = subject.lock(url, QUICK)
        lock.__enter__()
    with machine("other"), pytest.raises(SubjectBusy):
        take_lease(lease_store_for(f"{url}/anna/.work"), WHAT, kernel_lock="other:1:2", times=QUICK)
    lock.__exit__(None, None, None)


# Real processes

CHILD = """
import socket, sys
from pathlib import Path
from pipeline import lease
from pipeline.config import preset_config
from pipeline.dataset import Subject, write_atomic
from pipeline.errors import HeadcastError
from pipeline.run import stop_signals
from pipeline.stage import Result, Stage, Verdict, run_stage

def act_as(machine):
    lease._flock = lambda handle, kind: True
    lease._identity = lambda handle: f"{machine}:1:2"
    socket.gethostname = lambda: machine

def say(word):
    print(word, flush=True)
"""


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@dataclass
class Holder:
    """A process that holds a subject, as a machine of its own if it is given one, and does what it is told."""

    root: Path
    machine: str = ""
    store: str | None = None
    body: str = "sys.stdin.read()"
    process: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> Holder:
        act = f"act_as({self.machine!r})\n" if self.machine else ""
        script = f"{CHILD}{act}subject = Subject(Path({str(self.root)!r}))\n"
        script += f"with subject.lock({self.store!r}, lease.Times({QUICK.renew}, {QUICK.period})) as held:\n"
        script += "    say('held')\n" + "".join(f"    {line}\n" for line in self.body.splitlines())
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.hear() == "held"
        return self

    def hear(self) -> str:
        return hear(self.process)

    def __exit__(self, *raised: object) -> None:
        self.process.kill() if raised[0] else None
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def until(true: Any) -> None:
    """Wait for something that another thread or process does; the suite's time limit ends it."""
    while not true():
        threading.Event().wait(0.02)


def test_kill_9_frees_a_subject_at_once_on_its_machine(tmp_path: Path, clock: Clock) -> None:
    subject = Subject(tmp_path / "anna")
    for epoch in (1, 2):
        with Holder(subject.root) as holder:
            assert subject.running()
            with pytest.raises(SubjectBusy, match=f"process {holder.process.pid} on"), subject.lock():
                pass
            holder.process.send_signal(signal.SIGKILL)
        assert not read(FolderLeases(subject.work), epoch)["released"]
        assert not subject.running()
    clock.slept = 0
    with subject.lock() as held:
        assert held.leases[0].epoch == 3
    assert clock.slept == 0


def test_a_child_that_inherits_the_lock_keeps_the_subject_held(tmp_path: Path) -> None:
    subject = Subject(tmp_path / "anna")
    body = "import subprocess\nchild = subprocess.Popen(['sleep', '60'], pass_fds=[held.fileno()], stdout=-3)\n"
    with Holder(subject.root, body=body + "say(child.pid)\nsys.stdin.read()") as holder:
        child = int(holder.hear())
        holder.process.send_signal(signal.SIGKILL)
    assert subject.running()
    with pytest.raises(SubjectBusy), subject.lock():
        pass
    os.kill(child, signal.SIGKILL)
    until(lambda: not subject.running())
    with subject.lock():
        pass


def test_another_machines_run_is_refused_while_it_works_and_followed_when_it_died(tmp_path: Path) -> None:
    subject = Subject(tmp_path / "anna")
    with machine("b"):
        with Holder(subject.root, machine="a") as holder:
            with pytest.raises(SubjectBusy, match=f"process {holder.process.pid} on 'a'"), subject.lock(times=QUICK):
                pass
            assert subject.running()
            holder.process.send_signal(signal.SIGKILL)
            holder.process.wait()
            with subject.lock(times=QUICK) as held:
                assert held.leases[0].epoch == 2
        with Holder(subject.root, machine="a"):
            pass
        with subject.lock() as held:
            assert held.leases[0].epoch == 4, "it was given back: no wait"


STAGE = """
def work(run):
    say('at work')
    sys.stdin.readline()
    if {obedient}:
        while True:
            run.check_stop()
    write_atomic(run.work / 'file', b'of the old holder')
    return Result(Verdict('good', 'done'))
stage = Stage('decode', 1, (), work)
with stop_signals(held.lost) as stop:
    try:
        run_stage(subject, stage, [stage], preset_config('quick'), stop_requested=stop, still_held=held.check)
    except HeadcastError as error:
        say(type(error).__name__ + ': ' + error.what)
    else:
        say('published')
"""


@pytest.mark.parametrize("obedient", [True, False])
def test_a_stopped_holder_finds_that_it_was_followed_and_publishes_nothing(tmp_path: Path, obedient: bool) -> None:
    from pipeline.dataset import write_atomic
    from pipeline.stage import Result, Stage, StageRun, Verdict, run_stage

    def work(run: StageRun) -> Result:
        write_atomic(run.work / "file", b"of the new holder")
        return Result(Verdict("good", "done"))

    subject = Subject(tmp_path / "anna")
    subject.source.mkdir(parents=True)
    (subject.source / "source.json").write_text(json.dumps({"schema": 2, "sha256": "0" * 64}))
    stage = Stage("decode", 1, (), work)
    with Holder(subject.root, machine="a", body=STAGE.format(obedient=obedient)) as old:
        assert old.hear() == "at work"
        old.process.send_signal(signal.SIGSTOP)
        with machine("b"), subject.lock(times=QUICK) as held:
            assert held.leases[0].epoch == 2
            run_stage(subject, stage, [stage], CONFIG, still_held=held.check)
            old.process.send_signal(signal.SIGCONT)
            print("go on", file=old.process.stdin, flush=True)
            said = old.hear()
            assert said.startswith("LeaseLost: Subject 'anna' is no longer held by this run: ")
            held.check()
    assert (subject.stage("decode") / "file").read_bytes() == b"of the new holder"
    assert read_manifest(subject.stage("decode")) is not None
    assert not list(subject.work.rglob("failure.json"))


RIVAL = f"""
import time
from pipeline.errors import SubjectBusy
won = None
say('ready')
for line in sys.stdin:
    moment, place = line.split()
    if won:
        won = won.release()
    while time.monotonic() < float(moment):
        pass
    try:
        won = lease.take_lease(lease.lease_store_for(place), 'It', times=lease.Times({QUICK.renew}, {QUICK.period}))
        say('won')
    except SubjectBusy:
        say('busy')
"""


def race(places: list[str], rounds: int) -> None:
    """Let four processes take the same folders at the same moments, each by one of the given paths to it."""
    with ExitStack() as stack:
        rivals = []
        for _ in range(4):
            command = [sys.executable, "-c", CHILD + RIVAL]
            rival = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(rival.wait)
            stack.callback(rival.kill)
            rivals.append(rival)
        assert {hear(rival) for rival in rivals} == {"ready"}
        for number in range(rounds):
            one = places[0].format(number)
            if "://" not in one:
                Path(one).mkdir()
            if number % 2:
                lay(lease_store_for(one), 41, record(released=True).encode())
            moment = time.monotonic() + 0.1
            for rival, place in zip(rivals, places * 4, strict=False):
                print(moment, place.format(number), file=rival.stdin, flush=True)
            assert sorted(map(hear, rivals)) == ["busy", "busy", "busy", "won"]


def test_of_many_takers_at_once_exactly_one_wins(place: str) -> None:
    race([place + "/{}"], rounds=5 if "://" in place else 15)


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[list[Path]]:
    """One folder mounted twice by sshfs: the kernel's locks do not pass from one mount to the other."""
    for program in ("sshd", "sshfs", "fusermount3", "ssh-keygen"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"no {program} here")
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("nothing can be mounted here")
    folders = [tmp_path / name for name in ("data", "one", "two")]
    for folder in folders:
        folder.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "user.pub",
        "StrictModes": "no",
        "PidFile": "none",
        "PermitRootLogin": "yes",
        "Subsystem": "sftp internal-sftp",
    }
    with ExitStack() as stack:
        given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", "/dev/null", *given], stderr=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        client = f"IdentityFile={tmp_path}/user,StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null"
        for mount in folders[1:]:
            command = ["sshfs", "-p", str(port), "-o", client, f"root@127.0.0.1:{folders[0]}", mount]
            for _ in range(50):  # the server may not listen yet
                if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                    break
                time.sleep(0.1)
            else:
                pytest.skip("sshfs cannot mount here")
            stack.callback(subprocess.run, ["fusermount3", "-u", mount], check=True)
        yield folders[1:]


def test_two_mounts_of_one_folder_are_held_by_one_run(mounts: list[Path]) -> None:
    import fcntl

    one, two = (Subject(mount / "anna") for mount in mounts)
    with Holder(one.root, body="sys.stdin.readline()\nsay(held.lost())") as holder:
        with open(two.work / LOCK, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock alone would let two in
        with pytest.raises(SubjectBusy, match=f"process {holder.process.pid}"), two.lock(times=QUICK):
            pass
        holder.process.send_signal(signal.SIGSTOP)
        with two.lock(times=QUICK) as held:
            assert held.leases[0].epoch == 2
            holder.process.send_signal(signal.SIGCONT)
            print("go on", file=holder.process.stdin, flush=True)
            assert holder.hear() == "True"
            held.check()
    with one.lock() as held:
        assert held.leases[0].epoch == 3, "it was given back: no wait, although this mount's list of files is old"
    race([f"{mount}/{{}}" for mount in mounts], rounds=6)


# Many machines, in simulated time


Step = tuple[float, str, int, float, int]
"""Seconds after the step before, what, which machine, seconds of delay, requests to the store before it."""


class World:
    """Machines that take, renew, give back and forget leases in one store, each by a clock of its own.

    Time passes only where somebody sleeps or waits for the store, and then the others go on: whatever a holder or a
    taker does can be held up anywhere, for any time.
    """

    place = "simulated"

    def __init__(self, plan: list[Step]) -> None:
        self.now = 0.0
        moments = accumulate(step[0] for step in plan)
        self.plan = [(moment, *step[1:]) for moment, step in zip(moments, plan, strict=True)]
        self.files: dict[str, bytes] = {}
        self.machines = [Machine(offset) for offset in (0.0, 1e6, 17.0, 3.5)]
        self.acting = self.machines[-1]

    def boot_seconds(self) -> float:
        return self.now + self.acting.offset

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while (act := self._next(end)) is not None:
            act()
            self.check()
        self.now = max(self.now, end)
        self.check()

    def _next(self, end: float) -> Any:
        free = [machine for machine in self.machines if machine.lease is not None and not machine.busy]
        due = min(free, key=lambda machine: machine.renews_at, default=None)
        planned = next((step for step in self.plan if not self.machines[step[2]].busy), None)
        if due is not None and due.renews_at <= end and (planned is None or due.renews_at <= planned[0]):
            self.now = max(self.now, due.renews_at)
            return lambda: self._as(due, self._renew)
        if planned is not None and planned[0] <= end:
            self.plan.remove(planned)
            self.now = max(self.now, planned[0])
            _, kind, number, seconds, requests = planned
            return lambda: self._as(self.machines[number], getattr(self, f"_{kind}"), seconds, requests)
        return None

    def _as(self, machine: Machine, act: Any, *given: Any) -> None:
        before, stillness = self.acting, lease_module._stillness
        self.acting, machine.busy = machine, True
        lease_module._stillness = machine.stillness
        try:
            act(machine, *given)
        finally:
            self.acting, machine.busy = before, False
            lease_module._stillness = stillness

    def _renew(self, machine: Machine) -> None:
        assert machine.lease is not None
        machine.renews_at = self.now + lease_module.TIMES.renew
        if not machine.lease.lost():
            with suppress(FileNotFoundError):
                machine.lease._renew()

    def _take(self, machine: Machine, seconds: float, requests: int) -> None:
        if machine.lease is not None:
            return
        self._slow(machine, seconds, requests)
        try:
            machine.lease = take_lease(self, WHAT)
        except SubjectBusy:
            return
        machine.renews_at = self.now + lease_module.TIMES.renew

    def _stall(self, machine: Machine, seconds: float, requests: int) -> None:
        machine.renews_at = max(machine.renews_at, self.now + seconds)

    def _slow(self, machine: Machine, seconds: float, requests: int) -> None:
        machine.delays = [0.0] * requests + [seconds]

    def _release(self, machine: Machine, seconds: float, requests: int) -> None:
        if machine.lease is not None:
            lease, machine.lease = machine.lease, None
            lease.release()

    def _die(self, machine: Machine, seconds: float, requests: int) -> None:
        machine.lease = None

    def check(self) -> None:
        """Never do two machines rely on their leases."""
        sure = [machine for machine in self.machines if machine.relies(self.now)]
        assert len(sure) <= 1, [machine.lease.epoch for machine in sure if machine.lease]

    def _wait(self) -> None:
        """What a request to the store takes, before it is done."""
        self.advance(self.acting.delays.pop(0) if self.acting.delays else 0.0)

    def create(self, name: str, data: bytes) -> bool:
        self._wait()
        return self.files.setdefault(name, data) is data

    def read(self, name: str) -> bytes | None:
        self._wait()
        return self.files.get(name)

    def write(self, name: str, data: bytes) -> None:
        self._wait()
        if name not in self.files:
            raise FileNotFoundError(name)
        self.files[name] = data

    def names(self) -> list[str]:
        self._wait()
        return list(self.files)

    def remove(self, name: str) -> None:
        self._wait()
        self.files.pop(name, None)


@dataclass
class Machine:
    offset: float
    lease: Lease | None = None
    renews_at: float = 0.0
    delays: list[float] = field(default_factory=list)
    busy: bool = False
    stillness: Any = field(default_factory=lease_module._Stillness)

    def relies(self, now: float) -> bool:
        lease = self.lease
        return lease is not None and not lease._why and now + self.offset - lease._renewed <= lease.times.trust


class NoThread:
    def __init__(self, **given: object) -> None:
        pass

    start = join = __init__


STEPS = st.tuples(
    st.floats(0, 30),
    st.sampled_from(["take", "take", "stall", "slow", "release", "die"]),
    st.integers(0, 2),
    st.floats(0, 120),
    st.integers(0, 6),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(STEPS, min_size=2, max_size=30))
# A taker is held up before it makes its number; meanwhile that number is made, given back and removed.
@example(
    [
        (0.0, "take", 0, 20.0, 1),
        (1.0, "take", 1, 0.0, 0),
        (1.0, "release", 1, 0.0, 0),
        (1.0, "take", 2, 0.0, 0),
    ]
)
# A holder is stopped for long.
@example([(0.0, "take", 0, 0.0, 0), (1.0, "stall", 0, 120.0, 0), (1.0, "take", 1, 0.0, 0)])
# A holder that was stopped goes on, and is held up again before it knows that it may.
@example(
    [
        (0.0, "take", 0, 0.0, 0),
        (1.0, "stall", 0, 40.0, 0),
        (1.0, "slow", 0, 100.0, 4),
        (41.0, "take", 1, 0.0, 0),
    ]
)
def test_two_machines_never_rely_on_a_lease_at_once(plan: list[Step]) -> None:
    world = World(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module, "boot_seconds", world.boot_seconds)
        patch.setattr(lease_module.time, "sleep", world.advance)
        patch.setattr(lease_module.threading, "Thread", NoThread)
        world.advance(1500)
        for machine in world.machines:
            machine.lease = None
        last = world.machines[-1]
        world._as(last, world._take, 0.0, 0)
        assert last.lease is not None, "a dead holder keeps nobody out"
