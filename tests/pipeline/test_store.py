"""A dataset on an object store: round trips, deaths on the way, damage, hostile manifests, and what users are told."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, KEYS, s3_environment, s3_server, set_source, tree

from pipeline.config import preset_config
from pipeline.dataset import Dataset, Subject, write_atomic
from pipeline.errors import StageError, StoreDamaged, Unavailable, UserError
from pipeline.stage import Result, Stage, StageRun, Verdict, outputs_digest, published_states, run_stage
from pipeline.store import DatasetStore, open_store

ROOT = Path(__file__).resolve().parents[2]
CONFIG = preset_config("quick")


def decode(run: StageRun) -> Result:
    text = (run.subject.source / "clip.mp4").read_text()
    for number, letter in enumerate(text):
        path = run.work / "frames" / f"{number:03d}"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, letter.encode() * 100)
    write_atomic(run.work / "frames.json", json.dumps(len(text)).encode())
    return Result(Verdict("good", "Decoded."), {"frames": len(text), "share": 0.1})


DECODE = Stage("decode", 1, (), decode)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(server: str) -> DatasetStore:
    """An empty store on the S3 server."""
    return open_store(f"s3://{BUCKET}/{secrets.token_hex(4)}")


@pytest.fixture
def store() -> DatasetStore:
    """An empty store in memory."""
    return open_store(f"memory://{secrets.token_hex(4)}")


@pytest.fixture
def here(tmp_path: Path) -> Subject:
    """A subject with a finished stage on this machine."""
    subject = Dataset(tmp_path / "here").subject("anna")
    set_source(subject, "abcd")
    run_stage(subject, DECODE, (DECODE,), CONFIG)
    return subject


@pytest.fixture
def there(tmp_path: Path) -> Subject:
    """The same subject on another machine, where nothing is yet."""
    return Dataset(tmp_path / "there").subject("anna")


def push(store: DatasetStore, subject: Subject) -> list[int]:
    return [store.push_source(subject), store.push(subject, "decode")]


def objects(store: DatasetStore) -> dict[str, int]:
    found = store.fs.find(store.root, detail=True)
    return {path.removeprefix(f"{store.root}/"): info["size"] for path, info in found.items()}


def object_named(store: DatasetStore, end: str) -> str:
    (name,) = (name for name in objects(store) if name.endswith(end))
    return f"{store.root}/{name}"


@pytest.mark.parametrize("kind", ["bucket", "store"])
def test_round_trip_is_the_same_byte_for_byte(
    request: pytest.FixtureRequest, kind: str, here: Subject, there: Subject
) -> None:
    store = request.getfixturevalue(kind)
    store.check()
    assert store.subjects() == []
    assert store.pull(there, "source", "decode") == []
    assert push(store, here) == [1, 5]
    assert store.subjects() == ["anna"]
    assert store.pull(there, "source", "decode", "track") == ["source", "decode"]
    store.pull_run_record(there)
    assert tree(there.root) == tree(here.root)
    assert not list(there.work.glob("*incoming*"))


@pytest.mark.parametrize("kind", ["bucket", "store"])
def test_nothing_is_transferred_twice(
    request: pytest.FixtureRequest, kind: str, here: Subject, there: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = request.getfixturevalue(kind)
    push(store, here)
    store.pull(there, "source", "decode")
    moved: list[str] = []
    monkeypatch.setattr(DatasetStore, "_transfer", lambda self, move, label, sources, *rest: moved.extend(sources))
    assert push(store, here) == [0, 0]
    assert push(store, there) == [0, 0]
    assert store.pull(there, "source", "decode") == []
    assert moved == []


def test_a_source_told_by_other_stamps_is_the_same_source(store: DatasetStore, here: Subject, there: Subject) -> None:
    push(store, here)
    set_source(there, "abcd")
    assert (there.source / "source.json").read_bytes() != (here.source / "source.json").read_bytes()
    assert store.pull(there, "source") == []
    assert store.push_source(there) == 0


def test_manifests_tell_the_standing_without_any_file(store: DatasetStore, here: Subject) -> None:
    push(store, here)
    manifests = store.manifests("anna")
    assert list(manifests) == ["decode", "source"]
    expected = json.loads((here.stage("decode") / "stage.json").read_bytes())
    del expected["outputs"]
    assert manifests["decode"] == expected == store.manifest("anna", "decode")
    assert store.manifest("anna", "track") is None
    assert store.manifests("bert") == {}


def test_outline_tells_the_standing_of_all_subjects(store: DatasetStore, here: Subject, tmp_path: Path) -> None:
    push(store, here)
    bert = Dataset(here.root.parent).subject("bert")
    set_source(bert, "wxyz")
    store.push_source(bert)
    store.fs.pipe_file(f"{store.root}/bert/decode.json", b"{}")
    store.outline(tmp_path / "outline")
    subjects = Dataset(tmp_path / "outline").subjects()
    assert [subject.name for subject in subjects] == ["anna", "bert"]
    states = [published_states(subject, (DECODE,), CONFIG, verify=False)[0] for subject in subjects]
    assert [state.name for state in states] == ["fresh", "missing"]
    assert sum(o["size"] for o in (states[0].manifest or {})["outputs"]) == 401
    assert (subjects[0].root / "run.json").read_bytes() == (here.root / "run.json").read_bytes()


def test_only_what_differs_is_transferred_and_what_is_replaced_goes(
    store: DatasetStore, here: Subject, there: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(store, here)
    store.pull(there, "source", "decode")
    set_source(here, "abcde")
    run_stage(here, DECODE, (DECODE,), CONFIG)
    push(store, here)
    assert len([name for name in objects(store) if "/decode/" in name]) == 7, "6 files and the manifest"
    moved: list[str] = []
    real = DatasetStore._transfer

    def count(self: DatasetStore, move: Any, label: str, sources: list[str], *rest: Any) -> None:
        moved.extend(Path(source).name for source in sources)
        real(self, move, label, sources, *rest)

    monkeypatch.setattr(DatasetStore, "_transfer", count)
    store.pull(there, "source", "decode")
    assert moved == ["clip.mp4", "004", "frames.json"]
    assert (there.source / "clip.mp4").read_text() == "abcde"
    assert tree(there.stage("decode")) == tree(here.stage("decode"))


def test_equal_files_of_another_run_are_not_sent_again(store: DatasetStore, here: Subject, there: Subject) -> None:
    push(store, here)
    store.pull(there, "source")
    run_stage(there, DECODE, (DECODE,), CONFIG)
    assert store.push(there, "decode") == 0
    entry = store.manifest("anna", "decode")
    assert entry is not None
    assert entry["started"] == json.loads((here.stage("decode") / "stage.json").read_bytes())["started"]


def test_report_is_stored(bucket: DatasetStore, here: Subject) -> None:
    here.report.write_text("<html>")
    bucket.push_report(here)
    assert bucket.fs.info(f"{bucket.root}/anna/report.html")["ContentType"] == "text/html"


PUSH = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from pipeline.dataset import Subject
    from pipeline.store import open_store

    print(open_store(sys.argv[1]).push(Subject(Path(sys.argv[2])), "decode"))
    """
)


def test_push_killed_half_way_leaves_the_old_generation_whole(
    bucket: DatasetStore, here: Subject, there: Subject
) -> None:
    push(bucket, here)
    before, stored = tree(here.root), len(objects(bucket))
    set_source(here, "x" * 60)
    run_stage(here, DECODE, (DECODE,), CONFIG)
    command = [sys.executable, "-c", PUSH, bucket.url, str(here.root)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while len(objects(bucket)) < 20:
            assert process.poll() is None, "the push must not end before it is killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    sent = len(objects(bucket)) - stored
    assert 0 < sent < 61, "the push must really have been killed on its way"
    assert bucket.pull(there, "source", "decode") == ["source", "decode"]
    bucket.pull_run_record(there)
    assert tree(there.root) == before
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) <= 61 - sent, "what was sent is not sent again"
    assert bucket.pull(there, "decode") == ["decode"]
    assert tree(there.stage("decode")) == tree(here.stage("decode"))
    assert len(objects(bucket)) == 4 + 2 + 61, "nothing of the old generation is left"


def test_pull_killed_half_way_shows_nothing_and_goes_on(bucket: DatasetStore, here: Subject, there: Subject) -> None:
    set_source(here, "x" * 60)
    run_stage(here, DECODE, (DECODE,), CONFIG)
    push(bucket, here)
    command = [sys.executable, "-c", PUSH.replace(".push(", ".pull("), bucket.url, str(there.root)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while len(list(there.work.rglob("frames/*"))) < 20:
            assert process.poll() is None, "the pull must not end before it is killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not there.stage("decode").exists()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert tree(there.stage("decode")) == tree(here.stage("decode"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damage_is_named_and_replaced_by_the_next_push(
    store: DatasetStore, here: Subject, there: Subject, damage: str
) -> None:
    push(store, here)
    path = object_named(store, "frames/002")
    data = store.fs.cat_file(path)
    match damage:
        case "flip":
            store.fs.pipe_file(path, bytes([data[0] ^ 1]) + data[1:])
        case "truncate":
            store.fs.pipe_file(path, data[:50])
        case "delete":
            store.fs.rm(path)
        case "manifest":
            (path,) = store.fs.glob(f"{store.root}/anna/decode/*.json")
            store.fs.pipe_file(path, store.fs.cat_file(path).replace(b"0", b"1", 1))
    named = "its manifest is damaged" if damage == "manifest" else "'frames/002'"
    with pytest.raises(StoreDamaged, match=f"'decode' of 'anna' in 'memory://.*' is damaged: {named}") as caught:
        store.pull(there, "decode")
    assert not there.stage("decode").exists()
    store.set_aside(caught.value)
    assert store.push(here, "decode") == (0 if damage == "manifest" else 1)
    assert store.pull(there, "decode") == ["decode"]
    assert tree(there.stage("decode")) == tree(here.stage("decode"))
    assert not [name for name in objects(store) if name.endswith(".damaged")]


def test_damaged_local_files_are_never_stored(store: DatasetStore, here: Subject) -> None:
    (here.stage("decode") / "frames" / "002").write_text("other")
    with pytest.raises(StageError, match=r"'decode' of 'anna' cannot be stored: frames/002 has 5 bytes"):
        store.push(here, "decode")
    (here.source / "clip.mp4").write_text("abcX")
    with pytest.raises(UserError, match="was changed"):
        store.push_source(here)
    assert objects(store) == {}


def test_damaged_local_files_are_mended_from_the_store(store: DatasetStore, here: Subject) -> None:
    push(store, here)
    whole = tree(here.root)
    (here.stage("decode") / "frames" / "002").write_text("c" * 99 + "d")
    (here.source / "clip.mp4").unlink()
    assert store.pull(here, "source", "decode") == ["source", "decode"]
    assert tree(here.root) == whole


def publish(store: DatasetStore, part: str, outputs: Any, **changes: Any) -> None:
    """Publish a part with this list of files in the store, everything but the list as it should be."""
    try:
        digest = outputs_digest(outputs)
    except (TypeError, KeyError, UnicodeError):
        digest = "0" * 64
    manifest = {"schema": 1, "stage": part, "key": "1" * 64, "digest": digest, **changes}
    data = json.dumps({**manifest, "outputs": outputs}).encode()
    sha256 = hashlib.sha256(data).hexdigest()
    store.fs.pipe_file(f"{store.root}/anna/{part}/{sha256[:16]}.json", data)
    record = {"schema": 1, "sha256": sha256, "size": 4, "manifest": manifest}
    store.fs.pipe_file(f"{store.root}/anna/{part}.json", json.dumps(record).encode())


EVIL = {"size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}


def test_a_list_of_plain_names_is_taken(store: DatasetStore, there: Subject) -> None:
    """What the tests below put wrong is all that is wrong there."""
    outputs = [{"path": "a/b", **EVIL}, {"path": "c", **EVIL}]
    publish(store, "decode", outputs)
    for output in outputs:
        store.fs.pipe_file(f"{store.root}/anna/decode/{outputs_digest(outputs)[:16]}/{output['path']}", b"evil")
    assert store.pull(there, "decode") == ["decode"]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "../run.json", "a/../../run.json", "..", ".", "", "a//b", "a/", ".hidden", "a/.b", "a\\b",
        "C:\\x", "a\nb", "a\0b", "\ud800", "stage.json", "source.json", "x" * 256,
    ],
)  # fmt: skip
def test_hostile_names_are_refused(store: DatasetStore, there: Subject, tmp_path: Path, path: str) -> None:
    publish(store, "decode", [{"path": path, **EVIL}])
    with pytest.raises(StoreDamaged, match="no place inside the part"):
        store.pull(there, "decode")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        ([{"path": "a", **EVIL}, {"path": "a", **EVIL}], "one place twice"),
        ([{"path": "a", **EVIL}, {"path": "A", **EVIL}], "one place twice"),
        ([{"path": "a", **EVIL}, {"path": "a/b", **EVIL}], "one place twice"),
        ([{"path": "a", "size": -1, "sha256": EVIL["sha256"]}], "is not one"),
        ([{"path": "a", "size": True, "sha256": EVIL["sha256"]}], "is not one"),
        ([{"path": "a", "size": 4, "sha256": "../x"}], "is not one"),
        (["a"], "is not one"),
        ({"path": "a"}, "is not one"),
        (None, "is not one"),
    ],
)
def test_hostile_lists_are_refused(store: DatasetStore, there: Subject, outputs: Any, why: str) -> None:
    publish(store, "decode", outputs)
    with pytest.raises(StoreDamaged, match=why):
        store.pull(there, "decode")
    assert not there.stage("decode").exists()


@pytest.mark.parametrize(
    "entry",
    [
        b"", b"[]", b"{", b"[" * 100_000,
        {"schema": "1"}, {"schema": 0}, {"sha256": 7}, {"sha256": "../../x"}, {"size": -1}, {"size": None},
        {"manifest": None}, {"manifest": []}, {"manifest": {}},
        {"manifest": {"stage": "track", "key": "1" * 64, "digest": "1" * 64}},
        {"manifest": {"stage": "decode", "key": "1" * 64, "digest": "../../../x"}},
    ],
)  # fmt: skip
def test_hostile_entries_are_refused(store: DatasetStore, there: Subject, entry: Any) -> None:
    gist = {"stage": "decode", "key": "1" * 64, "digest": "1" * 64}
    sound = {"schema": 1, "sha256": "1" * 64, "size": 4, "manifest": gist}
    data = entry if isinstance(entry, bytes) else json.dumps({**sound, **entry}).encode()
    store.fs.pipe_file(f"{store.root}/anna/decode.json", data)
    with pytest.raises(StoreDamaged, match="its entry is not what headcast writes"):
        store.pull(there, "decode")
    if data:  # an empty object counts as none
        with pytest.raises(StoreDamaged):
            store.manifests("anna")


def test_a_hostile_source_cannot_name_what_lies_outside(store: DatasetStore, there: Subject) -> None:
    clip = {"name": "x", "kind": "images", "file": "..", "sha256": "1" * 64, "size": 4, "stamp": [[1, 1, 1]]}
    record = {"schema": 2, "sha256": "1" * 64, "clips": [clip]}
    outputs = [{"path": "clip.mp4", **EVIL}]
    publish(store, "source", outputs, source=record)
    store.fs.pipe_file(f"{store.root}/anna/source/{outputs_digest(outputs)[:16]}/clip.mp4", b"evil")
    store.pull(there, "source")
    with pytest.raises(UserError, match="missing or damaged"):
        store.push_source(there)


def test_a_newer_layout_is_refused_and_not_overwritten(store: DatasetStore, here: Subject) -> None:
    push(store, here)
    place = f"{store.root}/anna/decode.json"
    newer = json.dumps({**json.loads(store.fs.cat_file(place)), "schema": 2}).encode()
    store.fs.pipe_file(place, newer)
    with pytest.raises(UserError, match="stored by a newer headcast") as caught:
        store.push(here, "decode")
    assert caught.value.fix == "update headcast on this machine"
    assert store.fs.cat_file(place) == newer


@pytest.mark.parametrize("name", ["../x", "a/b", ".results", ""])
def test_hostile_subject_names_never_reach_the_store(store: DatasetStore, name: str) -> None:
    with pytest.raises(UserError, match="cannot be a subject name"):
        store.manifests(name)


def test_what_is_no_subject_is_not_listed(store: DatasetStore, here: Subject) -> None:
    push(store, here)
    store.fs.pipe_file(f"{store.root}/.results/1.json", b"{}")
    store.fs.pipe_file(f"{store.root}/readme.txt", b"")
    store.fs.pipe_file(f"{store.root}/anna/.work/lease-00000001.json", b"")
    assert store.subjects() == ["anna"]
    push(store, here)
    assert f"{store.root}/anna/.work/lease-00000001.json" in store.fs.find(store.root), "leases are left alone"


def test_a_part_published_anew_during_a_pull_is_pulled_anew(
    store: DatasetStore, here: Subject, there: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(store, here)
    real, done = DatasetStore._transfer, []

    def publish_first(self: DatasetStore, move: Any, label: str, *rest: Any) -> None:
        if label == "get decode" and not done:
            done.append(label)
            set_source(here, "wxyz")
            run_stage(here, DECODE, (DECODE,), CONFIG)
            push(store, here)
        real(self, move, label, *rest)

    monkeypatch.setattr(DatasetStore, "_transfer", publish_first)
    assert store.pull(there, "decode") == ["decode"]
    assert done
    assert tree(there.stage("decode")) == tree(here.stage("decode"))


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("data", "'data' is no URL of a store"),
        ("s3://", "'s3://' is no URL of a store"),
        ("s3://bucket/*", "is no URL of a store"),
        ("simplecache::s3://bucket/x", "is no URL of a store"),
        ("ftpx://host/x", "is of an unknown kind, 'ftpx'"),
        ("s3://key:secret@bucket/x", r"The store's URL 's3://\.\.\.@bucket/x' holds a password"),
        ("gs://bucket/x", "needs a package that is not installed"),
    ],
)
def test_bad_urls_are_refused_without_showing_passwords(url: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_missing_s3fs_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['s3fs'] = None; from pipeline.store import open_store; open_store('s3://bucket/x')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert "UserError: The store 's3://bucket/x' needs a package that is not installed." in done.stderr
    assert done.stderr.strip().endswith("-> pip install 'headcast[store]'")


def test_missing_bucket_is_named(server: str, here: Subject) -> None:
    store = open_store("s3://nobody-has-this/x")
    for ask in (store.check, lambda: store.push(here, "decode"), lambda: store.pull(here, "decode")):
        with pytest.raises(UserError, match="no bucket for the store 's3://nobody-has-this/x'") as caught:
            ask()
        assert not caught.value.retryable


def test_missing_credentials_are_told(server: str, here: Subject) -> None:
    with s3_environment(AWS_ENDPOINT_URL=server):
        store = open_store(f"s3://{BUCKET}/x")
        for ask in (store.check, lambda: store.push(here, "decode")):
            with pytest.raises(Unavailable, match="no credentials for the store") as caught:
                ask()
            assert "AWS_ACCESS_KEY_ID" in caught.value.fix
            assert caught.value.retryable


def test_a_server_that_is_down_may_be_asked_again() -> None:
    with s3_environment(AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1", **KEYS):
        store = open_store(f"s3://{BUCKET}/x")
        with pytest.raises(Unavailable, match=f"'s3://{BUCKET}/x' does not answer: .*127.0.0.1:9") as caught:
            store.check()
        assert caught.value.retryable
        assert "AWS_ENDPOINT_URL" in caught.value.fix


def test_a_store_that_refuses_us_says_so(server: str, here: Subject) -> None:
    def refuse_after(requests: str) -> None:
        headers = {"Content-Type": "text/plain"}
        ask = urllib.request.Request(f"{server}/moto-api/reset-auth", requests.encode(), headers)
        urllib.request.urlopen(ask).close()

    store = open_store(f"s3://{BUCKET}/x")
    refuse_after("0")
    try:
        for ask in (store.check, lambda: store.push(here, "decode")):
            with pytest.raises(UserError, match="refuses these credentials"):
                ask()
    finally:
        refuse_after("inf")


def test_a_full_local_disk_is_no_fault_of_the_store(
    store: DatasetStore, here: Subject, there: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(store, here)
    full = OSError(28, os.strerror(28), "frames/000")
    monkeypatch.setattr(store.fs, "get", lambda *a, **k: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        store.pull(there, "decode")


def test_images_and_a_photograph_travel(store: DatasetStore, tmp_path: Path, there: Subject) -> None:
    import cv2
    import numpy as np

    from pipeline.source import register_photo, register_source, source_paths

    given = tmp_path / "given"
    given.mkdir()
    for number in range(3):
        cv2.imwrite(str(given / f"{number}.png"), np.full((80, 64, 3), 40 * number, np.uint8))
    subject = Dataset(tmp_path / "here").subject("anna")
    register_source(subject, [given])
    register_photo(subject, given / "1.png")
    assert store.push_source(subject) == 4
    store.pull(there, "source")
    assert tree(there.root) == tree(subject.root)
    assert [path.name for path in source_paths(there)] == ["images"]


def test_how_many_requests_it_takes(
    bucket: DatasetStore, here: Subject, there: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of docs/dataset.md: requests cost money, and each waits for the network."""
    import s3fs

    asked: list[str] = []
    real = s3fs.S3FileSystem._call_s3

    async def count(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        asked.append(method)
        return await real(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", count)

    def requests(work: Callable[[], Any]) -> tuple[int, int, int]:
        """How many lists, gets (and looks without getting), and puts."""
        asked.clear()
        work()
        kinds = {"list_objects_v2": "list", "get_object": "get", "head_object": "get", "put_object": "put"}
        told = [kinds[method] for method in asked]
        return told.count("list"), told.count("get"), told.count("put")

    files = 5
    bucket.push_source(here)
    assert requests(lambda: bucket.push(here, "decode")) == (2, 2, files + 2)
    assert requests(lambda: bucket.push(here, "decode")) == (1, 1, 0)
    assert requests(lambda: bucket.pull(there, "decode")) == (1, files + 2, 0)
    assert requests(lambda: bucket.pull(there, "decode")) == (0, 1, 0)
    assert requests(bucket.subjects) == (1, 0, 0)
    parts, run_record = 2, 1
    assert requests(lambda: bucket.manifests("anna")) == (1, parts + run_record, 0)
