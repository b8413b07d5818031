"""The source of a subject: its clips as given, kept in the dataset with what they say of themselves.

A clip is a video, a folder of images, or another project's dataset (`pipeline.interchange`), which comes alone.
`source.json` carries the hash over all of them that the first stage's key rests on, so that another clip, or another
order, makes the stages stale.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.config import DecodeConfig
from pipeline.dataset import (
    Subject,
    canonical_json,
    fsync_path,
    fsync_tree,
    link_or_copy,
    refuse_newer,
    seal_fits,
    sealed,
    sha256_file,
    subject_name_for,
    write_atomic,
    write_json,
)
from pipeline.errors import UserError
from pipeline.frames import counted
from pipeline.video import IMAGE_SUFFIXES, VideoInfo, image_files, probe

if TYPE_CHECKING:
    from pipeline.interchange.recording import Recording

SCHEMA = 2
DATASET = "dataset"
"""The kind of a clip that is another project's dataset, and the name of its folder in `source/`."""
MIN_SIDE_PX = 64
"""Smaller pictures cannot show a face that could be tracked."""

_read: dict[str, str] = {}
"""Hashes that this process has computed, by path and stamp."""


@dataclass(frozen=True)
class _Given:
    """A clip, or its alphas, as it was named: its kind, its files, and their sizes, times of change and inodes."""

    path: Path
    kind: str
    files: list[Path]
    stamp: list[list[int]]
    reading: tuple[str, ...] = ()
    """Of a dataset: format, frames a second and FLAME that it is read with, and a hash of its files' names."""

    def names(self) -> list[str]:
        """What the files are called inside the dataset, relative to the clip's folder there; a video has none."""
        if self.kind == DATASET:
            return [file.relative_to(self.path).as_posix() for file in self.files]
        return [f"{number:06d}{file.suffix.lower()}" for number, file in enumerate(self.files)]


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


def register_dataset(subject: Subject, folder: Path, recording: Recording) -> dict[str, Any]:
    """Take another project's dataset into `source/dataset/` and return `source.json`. The caller holds the lock.

    Its files keep their places; those that no part of the recording are left out. They are hard-linked where the file
    system can, else copied, and replace an earlier source in one step; a dataset that is there already is left alone.

    Args:
        subject: whose source.
        folder: the dataset.
        recording: what was read from it, and so found good (`pipeline.interchange.read`).

    Raises:
        UserError: a file went away, or has a name that cannot be kept.
    """
    given, record = _look_at_dataset(folder, recording.files, _reading(recording)), _registered(subject)
    if record is not None and _same_clips(record, [given]):
        return record
    width, height = recording.size
    told = VideoInfo(
        kind=DATASET,
        codec=recording.format,
        width=width,
        height=height,
        fps=str(recording.fps),
        frames=len(recording),
        seconds=round(float((recording.numbers[-1] - recording.numbers[0] + 1) / recording.fps), 6),
        orientation="upright",
        colour="",
        warnings=recording.notes,
    )
    provenance = {
        "format": recording.format,
        "folder": given.path.name,
        "fps": str(recording.fps),
        "flame": recording.flame.version if recording.flame is not None else None,
        "basis": recording.basis,
        "alpha": recording.alpha,
        "notes": list(recording.notes),
        "headcast": __version__,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return _take(subject, [given], record, told, provenance)


def is_registered_dataset(subject: Subject, folder: Path, recording: Recording) -> bool:
    """Whether this dataset, told by its files' sizes and times of change, is the subject's source already. Reads only.

    Raises:
        UserError: as `register_dataset`.
    """
    record = _registered(subject)
    given = _look_at_dataset(folder, recording.files, _reading(recording))
    if record is None:
        return False
    return _same_clips(record, [given]) or record["clips"][0]["sha256"] == _digest(given)


def imported(subject: Subject) -> dict[str, Any] | None:
    """Where a subject was imported from; None for one that was filmed, or that has no source.

    Returns:
        `format`, `folder` (name), `fps` (text), `flame` (version or None), `basis`, `alpha` (kind, as of a
        `Recording`), `notes`, `headcast` (version that imported it), `when` (ISO 8601).
    """
    record = _registered(subject) or {}
    told: dict[str, Any] | None = record.get("imported")
    return told


def read_dataset(subject: Subject) -> Recording:
    """What an imported subject's dataset holds, read again from `source/dataset/` as it was read when it was imported.

    Raises:
        UserError: the source is missing, damaged or no dataset.
    """
    from fractions import Fraction

    from pipeline.interchange import ReadOptions, read

    told = _known(subject).get("imported")
    if told is None:
        raise UserError(f"'{subject.name}' was not imported.", "headcast import FOLDER")
    recording = read(subject.source / DATASET, told["format"], ReadOptions(Fraction(told["fps"]), told["flame"]))
    return replace(recording, notes=tuple(told["notes"]))  # what was taken for granted then is told now


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
    write_json(subject.source / "source.json", sealed(record))
    if before and before["file"] != photo["file"]:
        (subject.source / before["file"]).unlink(missing_ok=True)
    return record


def register_tracking(subject: Subject, path: Path, kind: str) -> dict[str, Any]:
    """Copy another tracker's file into `source/`, in place of an earlier one; return `source.json`.

    Args:
        subject: whose source.
        path: the file, already found good (`pipeline.interchange.tracking.check_tracking`).
        kind: what wrote it, a key of `pipeline.interchange.tracking.KINDS`.

    Raises:
        UserError: the subject has no source, or the file cannot be read.
    """
    record = _known(subject)
    digest = sha256_file(path)
    if has_tracking(subject, digest):
        return record
    before = record.get("tracking") or {}
    entry = {"kind": kind, "name": path.name, "file": f"tracking-{digest[:12]}{path.suffix.lower()}", "sha256": digest}
    write_atomic(subject.source / entry["file"], path.read_bytes())
    record = {**record, "tracking": entry}
    write_json(subject.source / "source.json", sealed(record))
    if before and before["file"] != entry["file"]:
        (subject.source / before["file"]).unlink(missing_ok=True)
    return record


def has_tracking(subject: Subject, sha256: str) -> bool:
    """Whether another tracker's file with these bytes is part of the source."""
    record = (_registered(subject) or {}).get("tracking") or {}
    path = subject.source / str(record.get("file", ""))
    return record.get("sha256") == sha256 and path.is_file() and sha256_file(path) == sha256


def tracking_file(subject: Subject, sha256: str) -> tuple[Path, str, str]:
    """Another tracker's file with these bytes inside the dataset, its kind, and its name as given.

    Raises:
        UserError: it is not there.
    """
    if not has_tracking(subject, sha256):
        raise UserError(
            f"The tracking that was given for '{subject.name}' is missing or was changed.",
            "give it again: headcast run VIDEO --tracking FILE; or do without: --set track.given=",
        )
    entry = _known(subject)["tracking"]
    return subject.source / str(entry["file"]), str(entry["kind"]), str(entry["name"])


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


def check_alpha_count(alphas: int, clips: int) -> None:
    """Refuse alphas of which it is not plain which clip each is for.

    Raises:
        UserError: there are not as many as clips.
    """
    if alphas != clips:
        raise UserError(
            f"--alpha is given {counted(alphas, 'time')} for {counted(clips, 'clip')}.",
            "give --alpha once for every clip, in the order of the clips",
        )


def alphas_digest(subject: Subject, paths: Sequence[Path]) -> str:
    """Hash over the alphas given for the clips, in order; those registered are told without reading them.

    Raises:
        UserError: a path is missing, or a folder without images.
    """
    digests = _digests([_look_at(path) for path in paths], (_registered(subject) or {}).get("alphas", []))
    return _whole(digests)


def has_alphas(subject: Subject, paths: Sequence[Path]) -> bool:
    """Whether these alphas, told by size and time of change, are part of the source already. Reads only.

    Raises:
        UserError: a path is missing, or a folder without images.
    """
    given = [_look_at(path) for path in paths]
    entries = (_registered(subject) or {}).get("alphas", [])
    same = [(e["kind"], e["stamp"]) for e in entries] == [(alpha.kind, alpha.stamp) for alpha in given]
    return same and all(_is_whole(subject, entry) for entry in entries)


def register_alphas(subject: Subject, paths: Sequence[Path]) -> dict[str, Any]:
    """Take the clips' alphas into `source/`, in place of earlier ones; return `source.json`. The caller holds the lock.

    Args:
        subject: whose source.
        paths: a video or folder of images for each clip, already found good (`pipeline.matting.given.check_alphas`).

    Raises:
        UserError: the subject has no source, or a path is missing.
    """
    record = _known(subject)
    given, before = [_look_at(path) for path in paths], record.get("alphas", [])
    entries = []
    for alpha, digest in zip(given, _digests(given, before), strict=True):
        name = f"alpha-{digest[:12]}" + (alpha.path.suffix.lower() if alpha.kind == "video" else "")
        entry, target = _entry(alpha, name, digest), subject.source / name
        if not _is_whole(subject, entry) or _digest(_look_at(target)) != digest:
            incoming = subject.work / "alpha-incoming"
            _remove(incoming)
            _put(alpha, incoming)
            fsync_tree(incoming)
            _remove(target)
            os.rename(incoming, target)
            fsync_path(subject.source)
        entries.append(entry)
    if entries == before:
        return record
    record = {**record, "alphas": entries}
    write_json(subject.source / "source.json", sealed(record))
    for name in {entry["file"] for entry in before} - {entry["file"] for entry in entries}:
        _remove(subject.source / name)
    return record


def alpha_paths(subject: Subject, sha256: str) -> list[Path]:
    """The alphas of the clips that together have this hash, inside the dataset: each a video or a folder of images.

    Raises:
        UserError: they are not there, or were changed.
    """
    record = _known(subject)
    paths = [subject.source / str(entry["file"]) for entry in record.get("alphas", [])]
    whole = all(_is_whole(subject, entry) for entry in record.get("alphas", []))
    if len(paths) != len(record["clips"]) or not whole or _whole([_digest(_look_at(path)) for path in paths]) != sha256:
        raise UserError(
            f"The alphas that were given for '{subject.name}' are missing or were changed.",
            "give them again: headcast run VIDEO --alpha FOLDER_OR_VIDEO; or do without: --set matte.alpha=",
        )
    return paths


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


def source_entries(subject: Subject) -> list[dict[str, Any]]:
    """What `source/` keeps: an entry with `kind`, `file` and `sha256` for each clip, alphas, photograph, tracking.

    Raises:
        UserError: the source is missing or damaged.
    """
    record = _known(subject)
    photo = [{**record["like"], "kind": "photo"}] if record.get("like") else []
    tracking = [record["tracking"]] if record.get("tracking") else []
    return [*record["clips"], *record.get("alphas", []), *photo, *tracking]


def source_files(subject: Subject) -> list[Path]:
    """Every file that `source/` keeps beside `source.json`; all of them are read and found unchanged.

    Raises:
        UserError: the source is missing, damaged or was changed.
    """
    files = []
    for entry in source_entries(subject):
        given = _look_at_kept(subject, entry)
        if _digest(given) != entry["sha256"]:
            raise UserError(f"'{given.path}' was changed since it was taken in.", _give_again(subject))
        files += given.files
    return files


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


def _look_at_dataset(folder: Path, names: Sequence[str], reading: tuple[str, ...]) -> _Given:
    """Files of a dataset, sorted by name.

    Raises:
        UserError: one is not there, or has a name that another machine might not keep.
    """
    folder = folder.absolute()
    ordered = sorted(set(names))
    _check_names(folder, ordered)
    files = [folder / name for name in ordered]
    try:
        stats = [file.stat() for file in files]
    except OSError as error:
        raise UserError(f"'{error.filename}' cannot be read: {error.strerror}.", "complete the dataset") from None
    return _Given(folder, DATASET, files, [[s.st_size, s.st_mtime_ns, s.st_ino] for s in stats], reading)


def _check_names(folder: Path, names: Sequence[str]) -> None:
    """Refuse names that leave the folder, hide, or are one on file systems that do not tell capitals."""
    seen: dict[str, str] = {}
    for name in names:
        pieces = name.split("/")
        if not name.isprintable() or "\\" in name or any(p.startswith(".") or not p for p in pieces):
            raise UserError(
                f"A file of '{folder}' has a name that cannot be kept: {name[:120]!r}.",
                "name files and folders without leading dots, backslashes and control characters",
            )
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise UserError(f"'{other}' and '{name}' of '{folder}' differ in capitals only.", "rename one of them")


def _look_at_kept(subject: Subject, entry: dict[str, Any]) -> _Given:
    """A clip, its alphas or the photograph as `source/` has them."""
    path = subject.source / str(entry["file"])
    if entry["kind"] != DATASET:
        return _look_at(path)
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    return _look_at_dataset(path, names, tuple(entry["reading"]))


def _reading(recording: Recording) -> tuple[str, ...]:
    flame = recording.flame.version if recording.flame is not None else ""
    names = hashlib.sha256(canonical_json(sorted(recording.files)).encode()).hexdigest()
    return recording.format, str(recording.fps), flame, names


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
    """Hash of a video's bytes, or over the names and bytes of a folder's files, read once a process."""
    place = canonical_json([str(clip.path.absolute()), clip.kind, clip.reading, clip.stamp])
    if place not in _read:
        hashes = [sha256_file(file) for file in clip.files]
        told = [clip.names(), hashes, *([clip.reading] if clip.reading else [])]
        over_all = hashlib.sha256(canonical_json(told).encode()).hexdigest()
        _read[place] = hashes[0] if clip.kind == "video" else over_all
    return _read[place]


def _digests(given: Sequence[_Given], known: Sequence[dict[str, Any]]) -> list[str]:
    """Hash of each clip; one that has the stamp of a known entry is not read."""
    by_stamp = {canonical_json(entry["stamp"]): str(entry["sha256"]) for entry in known if entry["kind"] != DATASET}
    return [by_stamp.get(canonical_json(clip.stamp)) or _digest(clip) for clip in given]


def _whole(digests: list[str]) -> str:
    """Hash over several clips in their order; for a single one its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(canonical_json(digests).encode()).hexdigest()


def _same_clips(record: dict[str, Any], given: Sequence[_Given]) -> bool:
    known = [(entry["kind"], entry["stamp"], tuple(entry.get("reading", ()))) for entry in record["clips"]]
    return known == [(clip.kind, clip.stamp, clip.reading) for clip in given]


def _take(
    subject: Subject,
    given: Sequence[_Given],
    known: dict[str, Any] | None,
    told: VideoInfo | None = None,
    provenance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Put the clips in place of what was there; files with the bytes of the old ones only renew the stamps.

    Args:
        subject: whose source.
        given: the clips.
        known: `source.json`, or None where there is none yet.
        told: of a dataset, what it is as a clip; videos are asked themselves.
        provenance: of a dataset, what `imported` tells.
    """
    old = known["clips"] if known is not None else []
    digests = _digests(given, old)
    same = [(entry["kind"], entry["sha256"]) for entry in old] == [
        (clip.kind, digest) for clip, digest in zip(given, digests, strict=True)
    ]
    if known is not None and same:
        clips = [{**entry, "stamp": clip.stamp} for entry, clip in zip(old, given, strict=True)]
        record = {**known, "clips": clips}
        write_json(subject.source / "source.json", sealed(record))
        return record
    incoming = subject.work / "source-incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    entries = []
    for clip, digest in zip(given, digests, strict=True):
        target = _place(clip, incoming)
        entries.append({**_entry(clip, target.name, digest), "probe": (told or probe(clip.path)).as_json()})
    record = {"schema": SCHEMA, "sha256": _whole(digests), "clips": entries}
    if provenance is not None:
        record["imported"] = provenance
    photo = known.get("like") if known is not None and provenance is None else None
    if photo and has_photo(subject, photo["sha256"]):
        link_or_copy(subject.source / photo["file"], incoming / photo["file"])
        record["like"] = photo
    write_json(incoming / "source.json", sealed(record))
    fsync_tree(incoming)
    replaced = subject.work / "source-replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if subject.source.exists():
        os.rename(subject.source, replaced)
    os.rename(incoming, subject.source)
    fsync_path(subject.root)
    shutil.rmtree(replaced, ignore_errors=True)
    return record


def _place(clip: _Given, folder: Path) -> Path:
    """Link or copy a clip into a folder under a safe name that is free there."""
    if clip.kind == "video":
        stem, suffix = subject_name_for(clip.path), clip.path.suffix.lower()
    else:
        stem, suffix = clip.kind, ""
    target, number = folder / (stem + suffix), 1
    while target.exists():
        number += 1
        target = folder / f"{stem}-{number}{suffix}"
    _put(clip, target)
    return target


def _put(clip: _Given, target: Path) -> None:
    """Link or copy a video to a path, or a folder's files into a new folder there: images numbered in their order."""
    if clip.kind == "video":
        link_or_copy(clip.path.resolve(), target)
        return
    target.mkdir()
    for name, file in zip(clip.names(), clip.files, strict=True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(file.resolve(), target / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _entry(clip: _Given, file: str, digest: str) -> dict[str, Any]:
    """What `source.json` says of a clip or its alphas, taken in under this name."""
    return {
        "name": clip.path.name,
        "kind": clip.kind,
        "file": file,
        "sha256": digest,
        "size": sum(size for size, _, _ in clip.stamp),
        "stamp": clip.stamp,
        **({"reading": list(clip.reading)} if clip.reading else {}),
    }


def _is_whole(subject: Subject, entry: dict[str, Any]) -> bool:
    """Whether an entry's file or folder is there with its size."""
    target = subject.source / str(entry["file"])
    try:
        files = [target] if entry["kind"] == "video" else target.rglob("*")
        return sum(file.stat().st_size for file in files if not file.is_dir()) == int(entry["size"])
    except OSError:
        return False


def _known(subject: Subject) -> dict[str, Any]:
    """`source.json`.

    Raises:
        UserError: it is missing or damaged, or a clip is gone.
    """
    record = _registered(subject)
    if record is None:
        raise UserError(f"The source of '{subject.name}' is missing or damaged.", _give_again(subject))
    return record


def _give_again(subject: Subject) -> str:
    """What to type for a source that is not whole."""
    if (subject.source / DATASET).is_dir():
        return f"import the dataset again: headcast import FOLDER --subject {subject.name} --force"
    return f"give the video again: headcast run VIDEO --subject {subject.name}"


def _registered(subject: Subject) -> dict[str, Any] | None:
    """`source.json`, or None where it is missing, damaged, or names what is not there in full.

    Schema 1, written when a source was one clip, is read as one clip.
    """
    import json

    try:
        record = json.loads((subject.source / "source.json").read_bytes())
        refuse_newer(record, SCHEMA, subject.source / "source.json")
        if not seal_fits(record):
            return None
        record.pop("seal", None)
        if record["schema"] == 1:
            clip = {name: value for name, value in record.items() if name != "schema"}
            record = {"schema": SCHEMA, "sha256": record["sha256"], "clips": [clip]}
        complete = record["schema"] == SCHEMA and record["sha256"] and record["clips"]
        alphas = record.get("alphas", [])
        single = [record[name] for name in ("like", "tracking") if record.get(name)]
        for entry in [*record["clips"], *alphas, *single]:
            complete = complete and Path(entry["file"]).name == entry["file"] != ".." and entry["sha256"]
        for entry in [*record["clips"], *alphas]:
            complete = complete and entry["stamp"] and entry["kind"] and entry["size"]
        complete = complete and all(_is_whole(subject, entry) for entry in record["clips"])
        return record if complete else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
