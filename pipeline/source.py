"""The source of a subject: its clips as given, kept in the dataset with what they say of themselves.

A clip is a video or a folder of images. `source.json` carries the hash over all of them that the first stage's key
rests on, so that another clip, or another order, makes the stages stale.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import DecodeConfig
from pipeline.dataset import (
    Subject,
    canonical_json,
    link_or_copy,
    sha256_file,
    subject_name_for,
    write_atomic,
    write_json,
)
from pipeline.errors import UserError
from pipeline.video import IMAGE_SUFFIXES, VideoInfo, image_files, probe

SCHEMA = 2
MIN_SIDE_PX = 64
"""Smaller pictures cannot show a face that could be tracked."""


@dataclass(frozen=True)
class _Given:
    """A clip as it was named: its kind, its files, and their sizes, times of change and inodes."""

    path: Path
    kind: str
    files: list[Path]
    stamp: list[list[int]]


def register_source(subject: Subject, paths: Sequence[Path], like: Path | None = None) -> dict[str, Any]:
    """Take clips, and a photograph of the person, into `source/` and return `source.json`. The caller holds the lock.

    Files are hard-linked where the file system can, else copied. Clips that are there already, in this order, are left
    alone; they are told by size, time of change and inode before their bytes are read again. Others replace the old
    ones in one step.

    Args:
        subject: whose source.
        paths: videos or folders of images, in order.
        like: a photograph of the person to track, already found good (`pipeline.recognition.check_photo`).

    Raises:
        UserError: a path is missing, empty, no video, has no images, is too small to show a face, or comes twice.
    """
    given = [_look_at(path) for path in paths]
    record = _registered(subject)
    if record is None or not _same_clips(record, given):
        check_sources(paths)
        record = _take(subject, given, record)
    return record if like is None else register_photo(subject, like)


def register_photo(subject: Subject, path: Path) -> dict[str, Any]:
    """Copy a photograph of the person to track into `source/`, in place of an earlier one; return `source.json`.

    Raises:
        UserError: the subject has no source, or the photograph cannot be read.
    """
    record = _known(subject)
    data = read_photo_bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    if has_photo(subject, digest):
        return record
    before = record.get("like") or {}
    photo = {"name": path.name, "file": f"like-{digest[:12]}{path.suffix.lower()}", "sha256": digest}
    write_atomic(subject.source / photo["file"], data)
    record = {**record, "like": photo}
    write_json(subject.source / "source.json", record)
    if before and before["file"] != photo["file"]:
        (subject.source / before["file"]).unlink(missing_ok=True)
    return record


def check_sources(paths: Sequence[Path]) -> list[VideoInfo]:
    """What each clip says of itself. Reads only.

    Raises:
        UserError: as `register_source`.
    """
    if not paths:
        raise UserError("No video is named.", "for example: headcast run my_video.mp4")
    given = [_look_at(path) for path in paths]
    _refuse_twice(given)
    return [check_source(path) for path in paths]


def check_source(path: Path) -> VideoInfo:
    """What one video or folder of images says of itself. Reads only.

    Raises:
        UserError: it is missing, empty, no video, a single image, or too small to show a face.
    """
    clip = _look_at(path)
    one_image = clip.kind == "images" and len(clip.files) == 1
    if one_image or (path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES):
        raise UserError(
            f"'{path}' is a single image; an avatar needs a head that moves.",
            "name a video, or a folder with the images of one; to say who is meant in a video: --like PHOTO",
        )
    information = probe(path)
    if min(information.width, information.height) < MIN_SIDE_PX:
        raise UserError(
            f"'{path}' is {information.width}x{information.height} pixels, too small to show a face.",
            f"give a picture of at least {MIN_SIDE_PX} pixels each way; 256 and more make a useful avatar",
        )
    return information


def check_span(config: DecodeConfig, clips: int) -> None:
    """Refuse a span of time where it is not plain which clip it means.

    Raises:
        UserError: a span is named and there are several clips.
    """
    if clips > 1 and (config.start_seconds is not None or config.end_seconds is not None):
        raise UserError(
            f"decode.start_seconds and decode.end_seconds name a span of one clip; {clips} clips are given.",
            "leave them out, or cut the clips beforehand",
        )


def is_registered(subject: Subject, paths: Sequence[Path]) -> bool:
    """Whether these files, told by size and time of change, are the subject's source already. Reads only.

    Raises:
        UserError: a path is missing, or a folder without images.
    """
    record = _registered(subject)
    given = [_look_at(path) for path in paths]
    return record is not None and _same_clips(record, given)


def source_paths(subject: Subject) -> list[Path]:
    """The clips inside the dataset, in order: each a video or a folder of images.

    Raises:
        UserError: no source is registered, or a clip is gone.
    """
    return [subject.source / str(entry["file"]) for entry in _known(subject)["clips"]]


def source_names(subject: Subject) -> list[str]:
    """The clips' names as given, in order.

    Raises:
        UserError: as `source_paths`.
    """
    return [str(entry["name"]) for entry in _known(subject)["clips"]]


def photo_path(subject: Subject, sha256: str) -> Path:
    """The photograph of the person to track that has these bytes, inside the dataset.

    Raises:
        UserError: it is not there.
    """
    if not has_photo(subject, sha256):
        raise UserError(
            f"The photograph that tells which person of '{subject.name}' is meant is missing or was changed.",
            "give it again: headcast run VIDEO --like PHOTO; or choose with --person, or --set track.like=",
        )
    return subject.source / str(_known(subject)["like"]["file"])


def has_photo(subject: Subject, sha256: str) -> bool:
    """Whether the photograph with these bytes is part of the source."""
    record = (_registered(subject) or {}).get("like") or {}
    path = subject.source / str(record.get("file", ""))
    return record.get("sha256") == sha256 and path.is_file() and sha256_file(path) == sha256


def read_photo_bytes(path: Path) -> bytes:
    """The bytes of a photograph.

    Raises:
        UserError: it is missing, empty or may not be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The photograph '{path}' cannot be read: {error.strerror}.", "check --like") from None
    if not data:
        raise UserError(f"The photograph '{path}' is empty (0 bytes).", "copy it again, or name another with --like")
    return data


def _look_at(path: Path) -> _Given:
    if not path.exists():
        raise UserError(f"There is no file '{path}'.", "check the path")
    files = image_files(path) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    stamp = [[s.st_size, s.st_mtime_ns, s.st_ino] for s in stats]
    return _Given(path, "images" if path.is_dir() else "video", files, stamp)


def _refuse_twice(given: Sequence[_Given]) -> None:
    """Refuse a clip that comes twice, under one name or two; bytes are read only where the sizes are equal."""
    for number, clip in enumerate(given):
        for before in given[:number]:
            sizes = [[size for size, _, _ in each.stamp] for each in (before, clip)]
            if sizes[0] == sizes[1] and (before.stamp == clip.stamp or _digest(before) == _digest(clip)):
                same = f"'{clip.path}'" if clip.path == before.path else f"'{before.path}' and '{clip.path}'"
                raise UserError(
                    f"{same} is given twice." if clip.path == before.path else f"{same} are the same clip.",
                    "name each clip once",
                )


def _digest(clip: _Given) -> str:
    """Hash of a video's bytes, or over the names and bytes of a folder's images."""
    hashes = [sha256_file(file) for file in clip.files]
    if clip.kind == "video":
        return hashes[0]
    names = [f"{number:06d}{file.suffix.lower()}" for number, file in enumerate(clip.files)]
    return hashlib.sha256(canonical_json([names, hashes]).encode()).hexdigest()


def _same_clips(record: dict[str, Any], given: Sequence[_Given]) -> bool:
    entries = record["clips"]
    return [(e["kind"], e["stamp"]) for e in entries] == [(clip.kind, clip.stamp) for clip in given]


def _take(subject: Subject, given: Sequence[_Given], known: dict[str, Any] | None) -> dict[str, Any]:
    """Put the clips in place of what was there; files with the bytes of the old ones only renew the stamps."""
    old = known["clips"] if known is not None else []
    by_stamp = {canonical_json(entry["stamp"]): entry["sha256"] for entry in old}
    digests = [by_stamp.get(canonical_json(clip.stamp)) or _digest(clip) for clip in given]
    same = [(entry["kind"], entry["sha256"]) for entry in old] == [
        (clip.kind, digest) for clip, digest in zip(given, digests, strict=True)
    ]
    if known is not None and same:
        clips = [{**entry, "stamp": clip.stamp} for entry, clip in zip(old, given, strict=True)]
        record = {**known, "clips": clips}
        write_json(subject.source / "source.json", record)
        return record
    incoming = subject.work / "source-incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    entries = []
    for clip, digest in zip(given, digests, strict=True):
        target = _place(clip, incoming)
        entries.append(
            {
                "name": clip.path.name,
                "kind": clip.kind,
                "file": target.name,
                "sha256": digest,
                "size": sum(size for size, _, _ in clip.stamp),
                "stamp": clip.stamp,
                "probe": probe(clip.path).as_json(),
            }
        )
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(canonical_json(digests).encode()).hexdigest()
    record = {"schema": SCHEMA, "sha256": whole, "clips": entries}
    photo = known.get("like") if known is not None else None
    if photo and has_photo(subject, photo["sha256"]):
        link_or_copy(subject.source / photo["file"], incoming / photo["file"])
        record["like"] = photo
    write_json(incoming / "source.json", record)
    replaced = subject.work / "source-replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if subject.source.exists():
        os.rename(subject.source, replaced)
    os.rename(incoming, subject.source)
    shutil.rmtree(replaced, ignore_errors=True)
    return record


def _place(clip: _Given, folder: Path) -> Path:
    """Link or copy a clip into a folder under a safe name that is free there."""
    stem, suffix = ("images", "") if clip.kind == "images" else (subject_name_for(clip.path), clip.path.suffix.lower())
    target, number = folder / (stem + suffix), 1
    while target.exists():
        number += 1
        target = folder / f"{stem}-{number}{suffix}"
    if clip.kind == "video":
        link_or_copy(clip.path.resolve(), target)
        return target
    target.mkdir()
    for index, file in enumerate(clip.files):
        link_or_copy(file.resolve(), target / f"{index:06d}{file.suffix.lower()}")
    return target


def _known(subject: Subject) -> dict[str, Any]:
    """`source.json`.

    Raises:
        UserError: it is missing or damaged, or a clip is gone.
    """
    record = _registered(subject)
    if record is None:
        raise UserError(
            f"The source of '{subject.name}' is missing or damaged.",
            f"give the video again: headcast run VIDEO --subject {subject.name}",
        )
    return record


def _registered(subject: Subject) -> dict[str, Any] | None:
    """`source.json`, or None where it is missing, damaged, or names what is not there in full.

    Schema 1, written when a source was one clip, is read as one clip.
    """
    import json

    try:
        record = json.loads((subject.source / "source.json").read_bytes())
        if record["schema"] == 1:
            clip = {name: value for name, value in record.items() if name != "schema"}
            record = {"schema": SCHEMA, "sha256": record["sha256"], "clips": [clip]}
        complete = record["schema"] == SCHEMA and record["sha256"] and record["clips"]
        for entry in [*record["clips"], *([record["like"]] if record.get("like") else [])]:
            complete = complete and Path(entry["file"]).name == entry["file"] and entry["sha256"]
        for entry in record["clips"]:
            target = subject.source / str(entry["file"])
            files = sorted(target.iterdir()) if entry["kind"] == "images" else [target]
            complete = complete and sum(file.stat().st_size for file in files) == entry["size"] and entry["stamp"]
        return record if complete else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
