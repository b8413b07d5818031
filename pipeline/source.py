"""The source of a subject: the video or folder of images as given, kept in the dataset with what it says of itself.

`source.json` carries the sha256 that the first stage's key rests on, so that another file makes the stages stale.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.dataset import Subject, canonical_json, link_or_copy, sha256_file, subject_name_for, write_json
from pipeline.errors import UserError
from pipeline.video import VideoInfo, image_files, probe

SCHEMA = 1
MIN_SIDE_PX = 64
"""Smaller pictures cannot show a face that could be tracked."""


def register_source(subject: Subject, path: Path) -> dict[str, Any]:
    """Take a video or a folder of images into `source/` and return `source.json`. The caller holds the subject's lock.

    Files are hard-linked where the file system can, else copied. The file that is there already is left alone; it is
    told by size, time of change and inode before its bytes are read again. Another file replaces the old in one step.

    Raises:
        UserError: the path is missing, empty, no video, has no images, or is too small to show a face.
    """
    kind, files, stamp = _look_at(path)
    known = _registered(subject)
    if known is not None and known.get("stamp") == stamp and known["kind"] == kind:
        return known
    information = check_source(path)
    names = [f"{number:06d}{file.suffix.lower()}" for number, file in enumerate(files)]
    hashes = [sha256_file(file) for file in files]
    digest = hashes[0]
    if kind == "images":
        digest = hashlib.sha256(canonical_json([names, hashes]).encode()).hexdigest()
    if known is not None and known["sha256"] == digest and known["kind"] == kind:
        record = {**known, "stamp": stamp}
        write_json(subject.source / "source.json", record)
        return record
    incoming = subject.work / "source-incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    if kind == "images":
        target = incoming / "images"
        target.mkdir()
        for file, name in zip(files, names, strict=True):
            link_or_copy(file.resolve(), target / name)
    else:
        target = incoming / (subject_name_for(path) + path.suffix.lower())
        link_or_copy(path.resolve(), target)
    record = {
        "schema": SCHEMA,
        "name": path.name,
        "kind": kind,
        "file": target.name,
        "sha256": digest,
        "size": sum(size for size, _, _ in stamp),
        "stamp": stamp,
        "probe": information.as_json(),
    }
    write_json(incoming / "source.json", record)
    replaced = subject.work / "source-replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if subject.source.exists():
        os.rename(subject.source, replaced)
    os.rename(incoming, subject.source)
    shutil.rmtree(replaced, ignore_errors=True)
    return record


def check_source(path: Path) -> VideoInfo:
    """What a video or a folder of images says of itself. Reads only.

    Raises:
        UserError: as `register_source`.
    """
    _look_at(path)
    information = probe(path)
    if min(information.width, information.height) < MIN_SIDE_PX:
        raise UserError(
            f"'{path}' is {information.width}x{information.height} pixels, too small to show a face.",
            f"give a picture of at least {MIN_SIDE_PX} pixels each way; 256 and more make a useful avatar",
        )
    return information


def is_registered(subject: Subject, path: Path) -> bool:
    """Whether this file, told by size and time of change, is the subject's source already. Reads only.

    Raises:
        UserError: the path is missing, or a folder without images.
    """
    kind, _, stamp = _look_at(path)
    known = _registered(subject)
    return known is not None and known.get("stamp") == stamp and known["kind"] == kind


def source_path(subject: Subject) -> Path:
    """The video or the folder of images inside the dataset.

    Raises:
        UserError: no source is registered, or it is gone.
    """
    record = _registered(subject)
    if record is None:
        raise UserError(
            f"The source of '{subject.name}' is missing or damaged.",
            f"give the video again: headcast run VIDEO --subject {subject.name}",
        )
    return subject.source / str(record["file"])


def _look_at(path: Path) -> tuple[str, list[Path], list[list[int]]]:
    """Kind of the source, its files, and their sizes and times of change."""
    if not path.exists():
        raise UserError(f"There is no file '{path}'.", "check the path")
    files = image_files(path) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    return "images" if path.is_dir() else "video", files, [[s.st_size, s.st_mtime_ns, s.st_ino] for s in stats]


def _registered(subject: Subject) -> dict[str, Any] | None:
    """`source.json`, or None where it is missing, damaged, or names what is not there in full."""
    import json

    try:
        record = json.loads((subject.source / "source.json").read_bytes())
        target = subject.source / str(record["file"])
        files = sorted(target.iterdir()) if record["kind"] == "images" else [target]
        complete = record["schema"] == SCHEMA and Path(record["file"]).name == record["file"]
        size = sum(file.stat().st_size for file in files)
        return record if complete and size == record["size"] and record["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
