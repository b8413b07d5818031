"""For tests of a dataset on an object store: a local S3 server (moto, on loopback), and subjects to keep there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from pipeline.config import preset_config
from pipeline.dataset import Dataset, Subject, write_json
from pipeline.store import DatasetStore

BUCKET = "studio"
NOWHERE = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""No credentials of the machine's own are found or looked for."""
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_environment(**changes: str) -> Iterator[None]:
    """Exactly these settings for S3, none of the machine's own; clients of other settings are forgotten."""
    import s3fs

    rest = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
    with mock.patch.dict(os.environ, {**rest, **NOWHERE, **changes}, clear=True):
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server with the bucket `BUCKET`; the environment names it meanwhile. Gives its address."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    try:
        with s3_environment(AWS_ENDPOINT_URL=address, **KEYS):
            fsspec.filesystem("s3").makedirs(BUCKET, exist_ok=True)
            yield address
    finally:
        server.stop()


def set_source(subject: Subject, text: str) -> None:
    """Register a clip of these bytes, and the quick preset as the last run's settings."""
    subject.source.mkdir(parents=True, exist_ok=True)
    clip = subject.source / "clip.mp4"
    clip.write_text(text)
    stat, digest = clip.stat(), hashlib.sha256(text.encode()).hexdigest()
    entry = {"name": "Clip.MP4", "kind": "video", "file": clip.name, "sha256": digest, "size": stat.st_size}
    entry["stamp"] = [[stat.st_size, stat.st_mtime_ns, stat.st_ino]]
    write_json(subject.source / "source.json", {"schema": 2, "sha256": digest, "clips": [entry]})
    write_json(subject.root / "run.json", {"schema": 1, "config": preset_config("quick").model_dump(mode="json")})


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a subject but those at work."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in names.items() if not name.startswith(".work/")}


def publish_manifests(store: DatasetStore, dataset: Dataset) -> None:
    """Publish a dataset's subjects in a store, but none of their files."""
    for subject in dataset.subjects():
        place = f"{store.root}/{subject.name}"
        manifests = {path.parent.name: json.loads(path.read_bytes()) for path in subject.root.glob("*/stage.json")}
        source = json.loads((subject.source / "source.json").read_bytes())
        manifests["source"] = {"stage": "source", "key": "1" * 64, "digest": "1" * 64, "source": source, "outputs": []}
        for part, manifest in manifests.items():
            size = sum(output["size"] for output in manifest.pop("outputs"))
            entry = {"schema": 1, "sha256": "1" * 64, "size": size, "manifest": manifest}
            store.fs.pipe_file(f"{place}/{part}.json", json.dumps(entry).encode())
        for path in (subject.root / "run.json", subject.report):
            if path.is_file():
                store.fs.pipe_file(f"{place}/{path.name}", path.read_bytes())
