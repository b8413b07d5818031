"""The dataset directory: where a subject's files lie, which names are safe, and who may write.

The layout is documented in `docs/dataset.md`. All paths kept in files are relative, so that a dataset can be moved.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.lease import TIMES, Held, Times, hold_folder, is_held, lease_store_for

SUBJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
WORK = ".work"
RUN_RECORD = "run.json"
"""The settings of a subject's last run."""


@dataclass(frozen=True)
class Subject:
    """One person's folder in a dataset: `DATA/SUBJECT`."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def work(self) -> Path:
        return self.root / WORK

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def progress(self) -> Path:
        """How far the stage is that is at work; to be believed only while `running()`."""
        return self.work / "progress.json"

    def stage(self, name: str) -> Path:
        """Folder of a finished stage."""
        return self.root / name

    def lock(self, store: str | None = None, times: Times = TIMES) -> AbstractContextManager[Held]:
        """Hold the subject for one run, also against other machines (`pipeline.lease`).

        Args:
            store: URL of an object store that holds the dataset; the subject is held there too.
            times: of the lease.

        Raises:
            SubjectBusy: another run holds it.
        """
        remote = lease_store_for(f"{store.rstrip('/')}/{self.name}/{WORK}") if store else None
        return hold_folder(self.work, f"Subject '{self.name}'", remote, times)

    def running(self) -> bool:
        """Whether a run holds the subject now, as far as one look tells."""
        return is_held(self.work)


@dataclass(frozen=True)
class Dataset:
    """A folder of subjects."""

    root: Path

    def subject(self, name: str) -> Subject:
        """The subject of this name, whether or not it exists yet.

        Raises:
            UserError: the name could leave the dataset folder or break a tool.
        """
        if not SUBJECT_NAME.fullmatch(name):
            raise UserError(
                f"'{name}' cannot be a subject name.",
                "use 1 to 64 letters, digits, '-' and '_', beginning with a letter or digit",
            )
        root = self.root / name
        if root.is_symlink():
            raise UserError(f"'{root}' is a link; a subject must be a real folder.", "name another subject")
        return Subject(root)

    def existing(self, name: str) -> Subject:
        """The subject of this name.

        Raises:
            UserError: there is none.
        """
        subject = self.subject(name)
        if not (subject.source / "source.json").is_file():
            known = ", ".join(s.name for s in self.subjects()) or "none"
            raise UserError(
                f"No subject '{name}' in '{self.root}' (there: {known}).",
                "check the name and --data, or make it with: headcast run VIDEO --subject NAME",
            )
        return subject

    def subjects(self) -> list[Subject]:
        """Every subject in the dataset, by name."""
        if not self.root.is_dir():
            return []
        return [
            Subject(path)
            for path in sorted(self.root.iterdir())
            if SUBJECT_NAME.fullmatch(path.name) and (path / "source" / "source.json").is_file()
        ]


def subject_name_for(video: Path) -> str:
    """A safe subject name made from a file's name: `My clip (2).mp4` becomes `My-clip-2`."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", video.stem or video.name).strip("-_")[:64].rstrip("-_")
    return name or "subject"


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with a hash over itself, `seal`, by which `seal_fits` sees a flipped bit."""
    plain = json.loads(json.dumps({name: value for name, value in record.items() if name != "seal"}))
    return {**record, "seal": hashlib.sha256(canonical_json(plain).encode()).hexdigest()}


def seal_fits(record: dict[str, Any]) -> bool:
    """Whether a record is as it was sealed; one of an earlier version has no seal and is believed."""
    try:
        return "seal" not in record or record["seal"] == sealed(record)["seal"]
    except (ValueError, RecursionError):  # numbers and texts that JSON has no place for
        return False


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON so that a reader sees the old file or the new one, never a part."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_atomic(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a file by temporary file, fsync and rename; `sync=False` for what a power cut may take."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # writing and flushing tell none
        raise


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read '{path}': {error}.", "rerun the stage that writes it") from None


def fsync_path(path: Path) -> None:
    """Bring a file's bytes, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_newer(record: Any, known: int, path: Path) -> None:
    """Leave alone what a newer headcast wrote: this one would misread it, or write over it.

    Args:
        record: what was read, of whatever kind.
        known: the newest schema that this code knows.
        path: where it was read.

    Raises:
        UserError: its schema is newer.
    """
    schema = record.get("schema") if isinstance(record, dict) else None
    if type(schema) is int and schema > known and seal_fits(record):  # else a bit was flipped
        raise UserError(
            f"'{path}' was made by a newer headcast: its schema is {schema}, and this one knows {known}.",
            "update headcast to the version that made it, or choose another dataset with --data",
        )


def fsync_tree(folder: Path) -> None:
    """Bring a folder's files and names to disk, so that a rename after it never publishes empty files."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            fsync_path(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file into the dataset, or copy it where a link cannot be made."""
    try:
        os.link(source, target)
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.filename, error.filename2 = str(target), None  # not the file that was to be copied
            raise
