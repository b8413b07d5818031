"""What is made of a subject's finished stages on request: videos, exports, comparisons; a file or a folder.

Finished stages appear by rename, so no subject is locked: the keys of what is read are compared before and after. A
product has an account, JSON that says what it was made from; one whose account still fits is fresh and left alone, any
other is replaced only when that was asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.dataset import Subject, canonical_json, fsync_tree, sha256_file, write_json
from pipeline.errors import StageError, SubjectBusy, UserError
from pipeline.stage import read_manifest

SCHEMA = 1
ACCOUNT = "account.json"
"""The account's name in a product that is a folder; that of a file lies beside it with the ending `.json`."""
LACKING = {"train": "no trained avatar", "export": "no exported avatar", "evaluate": "no evaluated avatar"}


@dataclass(frozen=True)
class Sources:
    """Subjects whose finished stages a product is made of.

    Attributes:
        subjects: by the part they play, such as "avatar".
        keys: part -> stage -> key of that stage's files.
    """

    subjects: dict[str, Subject]
    keys: dict[str, dict[str, str]]

    @staticmethod
    def of(**parts: tuple[Subject, Sequence[str]]) -> Sources:
        """The stages named of each subject, which must be finished and belong together.

        Raises:
            UserError: which stage is not finished, or was made from another one than is there now.
        """
        keys = {part: _keys(subject, stages) for part, (subject, stages) in parts.items()}
        return Sources({part: subject for part, (subject, _) in parts.items()}, keys)

    def check_unchanged(self) -> None:
        """Refuse to go on with files of which it is not known what they were made from.

        Raises:
            SubjectBusy: a stage was replaced since its key was read.
        """
        for part, subject in self.subjects.items():
            for stage, key in self.keys[part].items():
                if (read_manifest(subject.stage(stage)) or {}).get("key") != key:
                    raise SubjectBusy(
                        f"Stage '{stage}' of '{subject.name}' was replaced while it was read.",
                        "run the same command again once that subject's run has ended",
                    )


def _keys(subject: Subject, stages: Sequence[str]) -> dict[str, str]:
    lacking = next((LACKING[stage] for stage in reversed(stages) if stage in LACKING), "no fit to drive with")
    manifests = {stage: read_manifest(subject.stage(stage)) for stage in stages}
    for stage, manifest in manifests.items():
        if manifest is None or "key" not in manifest:
            raise UserError(
                f"Subject '{subject.name}' has {lacking}: stage '{stage}' is not finished.",
                f"finish it with: headcast rerun {subject.name}",
            )
    digests = {stage: (manifest or {}).get("digest") for stage, manifest in manifests.items()}
    for stage, manifest in manifests.items():
        for used, digest in ((manifest or {}).get("inputs") or {}).items():
            if digests.get(used, digest) != digest:
                raise UserError(
                    f"Stage '{stage}' of '{subject.name}' was made from another '{used}' than is there now.",
                    f"bring it up to date with: headcast rerun {subject.name}",
                )
    return {stage: str((manifest or {})["key"]) for stage, manifest in manifests.items()}


@dataclass(frozen=True)
class Product:
    """A file, or a folder, that is made on request.

    Attributes:
        path: where it shall be.
        sources: what it is made of.
        settings: plain data, all that it depends on beside its sources.
        version: of the code that makes it; raise it when the same request would give something else.
        folder: whether it is a folder.
        force: replace what is there.
    """

    path: Path
    sources: Sources
    settings: dict[str, Any]
    version: int = 1
    folder: bool = False
    force: bool = False

    @property
    def account(self) -> Path:
        """The document that says what it was made from."""
        return self.path / ACCOUNT if self.folder else self.path.with_suffix(".json")

    def key(self) -> str:
        """64 hex digits; equal keys mean equal products."""
        parts = {"version": self.version, "keys": self.sources.keys, "settings": self.settings}
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    def finished(self) -> dict[str, Any] | None:
        """The account of this very product where it is there and undamaged."""
        try:
            account = json.loads(self.account.read_bytes())
            same = account["schema"] == SCHEMA and account["key"] == self.key()
            return account if same and self._hashes(self.path) == account["sha256"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def check_free(self) -> None:
        """Refuse to write over something else.

        Raises:
            UserError: something is there that is not this very product, and `force` was not given.
        """
        if os.path.lexists(self.path) and not self.force and self.finished() is None:
            raise UserError(
                f"'{self.path}' is there already.", "give --force to replace it, or name another with --out"
            )
        if self.path.exists() and self.path.is_dir() != self.folder:
            kind = "a folder" if self.path.is_dir() else "a file"
            raise UserError(f"'{self.path}' is {kind}.", "name another with --out")
        if not self.folder and self.account.exists() and not _is_account(self.account):
            raise UserError(
                f"'{self.account}' is in the way, where the account would lie.", "move it, or name another with --out"
            )
        if self.folder and self.path.exists() and any(self.path.iterdir()) and not self.account.is_file():
            raise UserError(f"'{self.path}' is a folder that headcast did not write.", "name another with --out")

    def make(self, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Have it written beside its place and moved there; returns its account.

        Args:
            write: given a path, it writes the file, or into the folder, and returns what its account shall tell.

        Raises:
            StageError: the disk is full, or the place cannot be written.
            SubjectBusy: a source was replaced meanwhile.
        """
        self.sources.check_unchanged()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _hidden_beside(self.path) as hidden:
                made = hidden / self.path.name
                if self.folder:
                    made.mkdir()
                account = self._account(made, write(made))
                self.sources.check_unchanged()
                write_json(made / ACCOUNT if self.folder else made.with_suffix(".json"), account)
                fsync_tree(hidden)
                self._publish(made, hidden)
        except OSError as error:
            raise StageError(
                f"'{self.path}' could not be written: {error.strerror or error}.",
                "free some space or name another place: --out",
            ) from error
        return account

    def _account(self, made: Path, told: dict[str, Any]) -> dict[str, Any]:
        known = {"schema": SCHEMA, "headcast": __version__, "key": self.key(), "sha256": self._hashes(made)}
        return known | told | {"settings": self.settings, "keys": self.sources.keys}

    def _hashes(self, path: Path) -> str | dict[str, str]:
        """Of the file, or of each file in the folder but the account."""
        if not self.folder:
            return sha256_file(path)
        files = sorted(file for file in path.rglob("*") if file.is_file() and file != path / ACCOUNT)
        return {file.relative_to(path).as_posix(): sha256_file(file) for file in files}

    def _publish(self, made: Path, hidden: Path) -> None:
        if self.folder:
            if self.path.exists():
                os.replace(self.path, hidden / "replaced")  # a folder that is not empty cannot be renamed over
            os.replace(made, self.path)
            return
        # An account without its file is not fresh, a file without its account is in the way.
        os.replace(made.with_suffix(".json"), self.account)
        os.replace(made, self.path)


def _is_account(path: Path) -> bool:
    try:
        return {"schema", "key", "sha256"} <= set(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return False


@contextlib.contextmanager
def _hidden_beside(path: Path) -> Iterator[Path]:
    """A hidden folder to write into, locked while it lives; those that a killed process left are removed first."""
    prefix = f".{path.name}."
    for left in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        if left.is_dir() and not left.is_symlink():
            with _locked(left) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as name, _locked(Path(name)):
        yield Path(name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock where it is free; gives whether it was."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(handle)


def place_for(subject: Subject, folder: str, name: str, out: Path | None, ending: str = "") -> Path:
    """Where a product goes: `SUBJECT/folder/name`, or where the user said, but never among a dataset's own files.

    Args:
        subject: whose product.
        folder: of the subject, for products of this kind.
        name: of the file or folder in it.
        out: what the user said; None takes the default.
        ending: that the name must have, such as `.mp4`; empty for any.

    Raises:
        UserError: the place is a link, has another ending, no folder to be in, or belongs to the dataset.
    """
    path = out or subject.root / folder / name
    root = subject.root.parent.resolve()
    if out is None and path.parent.resolve() != subject.root.resolve() / folder:
        raise UserError(
            f"'{path.parent}' is a link; nothing is written through it.", "remove it, or name a path: --out"
        )
    if ending and path.suffix.lower() != ending:
        raise UserError(
            f"'{path}' does not end in {ending}.", f"name {'an' if ending == '.mp4' else 'a'} {ending} file"
        )
    if out is not None and not path.parent.is_dir():
        raise UserError(
            f"'{path}' cannot be written: there is no folder '{path.parent}'.", "name a file in a folder that is there"
        )
    if path.parent.resolve().is_relative_to(root) and path.parent.resolve().name != folder:
        raise UserError(
            f"'{path}' lies among the dataset's own files.",
            f"leave --out away, or name a path outside '{subject.root.parent}'",
        )
    return path
