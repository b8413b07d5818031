"""A dataset on an object store: finished parts of a subject brought from it and taken to it, each whole or not at all.

A *part* is the source or a stage. Its files lie in a folder named after their digest, and one small object, the part's
*entry*, says which folder counts: putting it is what publishes the part. `docs/dataset.md` has the layout. Anything
that fsspec knows will do; it finds settings and credentials in the environment (`AWS_*`, `FSSPEC_*`) by itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.dataset import (
    RUN_RECORD,
    SUBJECT_NAME,
    Subject,
    canonical_json,
    fsync_tree,
    link_or_copy,
    sealed,
    sha256_file,
    write_atomic,
    write_json,
)
from pipeline.errors import HeadcastError, StageError, StoreDamaged, Unavailable, UserError
from pipeline.progress import Reporter, SilentReporter
from pipeline.source import source_entries, source_files
from pipeline.stage import MANIFEST, SCHEMA, damaged_output, outputs_digest, publish, read_manifest

log = logging.getLogger(__name__)

SOURCE = "source"
SOURCE_RECORD = "source.json"
ENTRY_SCHEMA = 1
MAX_ENTRY_BYTES = 4 << 20
MAX_MANIFEST_BYTES = 256 << 20
FILES_AT_ONCE = 16
"""Transfers at a time; s3fs may hold 100 MB of a large file in memory for each."""

_HEX = re.compile(r"[0-9a-f]{64}")
_PART_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENAMETOOLONG}


def _always() -> None:
    """Nobody else writes here."""


@dataclass(frozen=True)
class Entry:
    """What publishes a part: its manifest without the list of its files, and the hash of the whole manifest."""

    manifest: dict[str, Any]
    sha256: str
    size: int
    """Bytes of its files."""

    @property
    def folder(self) -> str:
        """The folder of the part's files, beside those of other generations."""
        return str(self.manifest["digest"])[:16]

    @property
    def listing(self) -> str:
        """The object that holds the whole manifest."""
        return f"{self.sha256[:16]}.json"

    def same_files(self, manifest: dict[str, Any]) -> bool:
        """Whether a manifest stands for the same files made from the same things, whoever made them."""
        return all(self.manifest[name] == manifest.get(name) for name in ("key", "digest"))


@dataclass(frozen=True)
class DatasetStore:
    """A dataset on an object store; make one with `open_store`."""

    url: str
    fs: Any
    """An fsspec file system."""
    root: str
    """The dataset's place in it."""

    def check(self) -> None:
        """Ask the store for its list of subjects.

        Raises:
            UserError: there is no such bucket, or the store refuses us.
            Unavailable: it does not answer, or there are no credentials.
        """
        self._list(self.root)

    def subjects(self) -> list[str]:
        """Names of the subjects that something was stored of, in order; one request."""
        found = (PurePosixPath(path).name for path, info in self._list(self.root).items() if info["type"] != "file")
        return sorted(name for name in found if SUBJECT_NAME.fullmatch(name))

    def manifests(self, name: str) -> dict[str, dict[str, Any]]:
        """The manifest of each part of a subject, without its list of files; one small object a part is read.

        Raises:
            StoreDamaged: an entry cannot be read.
        """
        found = self._documents(name, self._list(self._place(name)))
        return {part: self._parse_entry(name, part, found[part]).manifest for part in sorted(set(found) - {"run"})}

    def manifest(self, name: str, part: str) -> dict[str, Any] | None:
        """The manifest of one part of a subject, as `manifests` gives it; None where the part is not in the store."""
        entry = self._entry(name, part)
        return None if entry is None else entry.manifest

    def run_record(self, name: str) -> bytes | None:
        """`run.json` of a subject: the settings of its last run, wherever that was."""
        return self._read(f"{self._place(name)}/{RUN_RECORD}", MAX_ENTRY_BYTES)

    def outline(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """Write into an empty dataset folder what tells how subjects stand: records of sources, settings, manifests.

        In place of a stage's list of files stands one line with their size, and an empty file for a report; nothing can
        be read or run there.

        Args:
            folder: for the dataset.
            names: the subjects; by default all.
        """
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
            for _ in threads.map(lambda name: self._outline(Subject(folder / name)), names or self.subjects()):
                pass

    def _outline(self, subject: Subject) -> None:
        listed = self._list(self._place(subject.name))
        documents = self._documents(subject.name, listed)
        subject.root.mkdir(parents=True, exist_ok=True)
        if f"{self._place(subject.name)}/{subject.report.name}" in listed:
            subject.report.touch()
        if "run" in documents:
            (subject.root / RUN_RECORD).write_bytes(documents.pop("run"))
        for part, data in documents.items():
            try:
                entry = self._parse_entry(subject.name, part, data)
            except StoreDamaged as damage:  # the part counts as missing
                log.warning("%s", damage.what)
                continue
            subject.stage(part).mkdir(exist_ok=True)
            if part == SOURCE:
                write_json(subject.source / SOURCE_RECORD, entry.manifest["source"])
            else:
                outputs = [{"path": "", "size": entry.size, "sha256": ""}]
                write_json(subject.stage(part) / MANIFEST, sealed({**entry.manifest, "outputs": outputs}))

    def pull(self, subject: Subject, *parts: str, reporter: Reporter | None = None) -> list[str]:
        """Bring parts that differ from those in the local dataset; the caller holds the subject's local lock.

        Files that are here already are not transferred again, nor those of a pull that was stopped. A part appears by
        one rename when all its hashes are right.

        Returns:
            The parts that were brought; one that the store does not have is left out.

        Raises:
            StoreDamaged: a part's files are not what its manifest says, or its manifest is not to be trusted.
        """
        return [part for part in parts if self._pull(subject, part, reporter)]

    def pull_run_record(self, subject: Subject) -> None:
        """Take over the settings of the subject's last run from the store, where there are any."""
        data = self.run_record(subject.name)
        if data is not None:
            subject.root.mkdir(parents=True, exist_ok=True)
            write_atomic(subject.root / RUN_RECORD, data)

    def push(
        self, subject: Subject, stage: str, reporter: Reporter | None = None, still_held: Callable[[], None] = _always
    ) -> int:
        """Take a finished stage to the store; the caller holds the subject there.

        Only files that are not there are transferred; then the entry publishes them, and what it replaces is removed.

        Args:
            subject: whose stage.
            stage: its name.
            reporter: gets the progress.
            still_held: asked before the entry is put; raises when the subject is no longer the caller's.

        Returns:
            How many files were transferred.

        Raises:
            StageError: the stage is not finished, or its files are damaged.
        """
        folder = subject.stage(stage)
        manifest = read_manifest(folder)
        damage = "it is not finished" if manifest is None else damaged_output(folder, manifest)
        if manifest is None or damage is not None:
            raise StageError(
                f"Stage '{stage}' of '{subject.name}' cannot be stored: {damage}.",
                f"run: headcast rerun {subject.name} --from {stage}",
            )
        return self._push(subject, stage, manifest, (folder / MANIFEST).read_bytes(), reporter, still_held)

    def push_source(
        self, subject: Subject, reporter: Reporter | None = None, still_held: Callable[[], None] = _always
    ) -> int:
        """Take a subject's source and the settings of its run to the store, as `push` does.

        Raises:
            UserError: the source is missing or damaged.
        """
        record = json.loads((subject.source / SOURCE_RECORD).read_bytes())
        files = source_files(subject)
        names = [path.relative_to(subject.source).as_posix() for path in files]
        outputs = [
            {"path": name, "size": path.stat().st_size, "sha256": sha256_file(path)}
            for name, path in zip(names, files, strict=True)
        ]
        manifest = {
            "schema": SCHEMA,
            "stage": SOURCE,
            "key": source_key(subject),
            "outputs": outputs,
            "digest": outputs_digest(outputs),
            "source": record,
        }
        count = self._push(subject, SOURCE, manifest, _json(manifest), reporter, still_held)
        run_record = subject.root / RUN_RECORD
        if run_record.is_file():
            self._write(f"{self._place(subject.name)}/{RUN_RECORD}", run_record.read_bytes())
        return count

    def push_report(self, subject: Subject) -> None:
        """Take a subject's report to the store."""
        with self._talking():
            self.fs.put_file(str(subject.report), f"{self._place(subject.name)}/{subject.report.name}")

    def set_aside(self, damage: StoreDamaged) -> None:
        """Rename the damaged object that a pull found, so that the next push of its part brings a whole one."""
        if damage.path is not None:
            with contextlib.suppress(FileNotFoundError), self._talking():
                self.fs.mv(damage.path, f"{damage.path}.damaged")

    def _place(self, name: str) -> str:
        if not SUBJECT_NAME.fullmatch(name):
            raise UserError(f"'{name}' cannot be a subject name.", "use 1 to 64 letters, digits, '-' and '_'")
        return f"{self.root}/{name}"

    def _push(
        self,
        subject: Subject,
        part: str,
        manifest: dict[str, Any],
        data: bytes,
        reporter: Reporter | None,
        still_held: Callable[[], None],
    ) -> int:
        place = f"{self._place(subject.name)}/{part}"
        gist = {name: value for name, value in manifest.items() if name != "outputs"}
        entry = Entry(gist, _sha256(data), sum(output["size"] for output in manifest["outputs"]))
        before = None
        with contextlib.suppress(StoreDamaged):  # it is replaced
            before = self._entry(subject.name, part)
        there = self._find(place)
        if before is not None and before.same_files(manifest) and f"{place}/{before.listing}" in there:
            entry = before
        content = f"{place}/{entry.folder}"
        wanted = {f"{content}/{output['path']}": output for output in manifest["outputs"]}
        lacking = {path: output for path, output in wanted.items() if there.get(path) != output["size"]}
        files = [str(subject.root / part / str(output["path"])) for output in lacking.values()]
        self._transfer(self.fs.put, f"store {part}", files, list(lacking), reporter)
        still_held()
        if entry is not before:
            self._write(f"{place}/{entry.listing}", data)
            self._write(f"{place}.json", _json({"schema": ENTRY_SCHEMA, **asdict(entry)}))
        self._remove([path for path in there if path not in wanted and path != f"{place}/{entry.listing}"])
        return len(lacking)

    def _remove(self, paths: Sequence[str]) -> None:
        """Clear away what no entry names any more; where that may not be done, it only takes space."""
        try:
            with contextlib.suppress(FileNotFoundError), self._talking():
                if paths:
                    self.fs.rm(list(paths))
        except HeadcastError as error:
            log.warning("what was replaced stays in the store: %s", error.what)

    def _pull(self, subject: Subject, part: str, reporter: Reporter | None) -> bool:
        while (entry := self._entry(subject.name, part)) is not None:
            try:
                return self._bring(subject, part, entry, reporter)
            except StoreDamaged:
                if self._entry(subject.name, part) == entry:
                    raise
                log.info("%s of %s was published anew meanwhile", part, subject.name)
        return False

    def _bring(self, subject: Subject, part: str, entry: Entry, reporter: Reporter | None) -> bool:
        place = f"{self._place(subject.name)}/{part}"
        if _is_here(subject, part, entry):
            return False
        data = self._read(f"{place}/{entry.listing}", MAX_MANIFEST_BYTES) or b""
        outputs = self._outputs(subject.name, part, entry, data)
        content = f"{place}/{entry.folder}"
        there = self._find(content)
        for output in outputs:
            path = f"{content}/{output['path']}"
            if there.get(path) != output["size"]:
                what = f"has {there[path]} bytes, not {output['size']}" if path in there else "is missing"
                raise self._damage(subject.name, part, f"'{output['path']}' {what}", path)
        incoming = subject.work / f"{part}-incoming-{entry.folder}"
        incoming.mkdir(parents=True, exist_ok=True)
        lacking = _reuse(outputs, incoming, subject.root / part)
        paths, files = [f"{content}/{o['path']}" for o in lacking], [incoming / o["path"] for o in lacking]
        try:
            self._transfer(self.fs.get, f"get {part}", paths, list(map(str, files)), reporter)
        except FileNotFoundError as error:
            raise self._damage(subject.name, part, f"'{error}' went away", None) from None
        for output, path, file in zip(lacking, paths, files, strict=True):
            if not _is(file, output):
                raise self._damage(subject.name, part, f"'{output['path']}' was changed", path)
        if part == SOURCE:
            write_json(incoming / SOURCE_RECORD, entry.manifest["source"])
        else:
            write_atomic(incoming / MANIFEST, data)
        fsync_tree(incoming)
        publish(subject, part, incoming)
        return True

    def _outputs(self, name: str, part: str, entry: Entry, data: bytes) -> list[dict[str, Any]]:
        """The files of a manifest from outside, found to be those that the entry means and safe to write."""
        path = f"{self._place(name)}/{part}/{entry.listing}"
        if _sha256(data) != entry.sha256:
            raise self._damage(name, part, f"its manifest is {'damaged' if data else 'missing'}", path)
        try:
            manifest = json.loads(data)
            outputs = manifest.pop("outputs")
            if manifest != entry.manifest or not all(_is_output(output) for output in outputs):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damage(name, part, "its manifest is not one", path) from None
        places = [str(output["path"]) for output in outputs]
        unsafe = next((place for place in places if not _is_safe(place)), None)
        if unsafe is not None:
            raise self._damage(name, part, f"its manifest names {unsafe!r}, which is no place inside the part", path)
        folders = {str(parent) for place in places for parent in PurePosixPath(place).parents}
        if len({place.casefold() for place in places}) != len(places) or folders & set(places):
            raise self._damage(name, part, "its manifest names one place twice", path)
        if outputs_digest(outputs) != entry.manifest["digest"]:
            raise self._damage(name, part, "its manifest's digest is not that of its files", path)
        return list(outputs)

    def _damage(self, name: str, part: str, what: str, path: str | None) -> StoreDamaged:
        again = f"headcast run VIDEO --subject {name}" if part == SOURCE else f"headcast rerun {name}"
        error = StoreDamaged(
            f"'{part}' of '{name}' in '{self.url}' is damaged: {what}.",
            f"the same command makes a stage anew; a source has to be given again: {again} --store URL",
        )
        error.path = path
        return error

    def _entry(self, name: str, part: str) -> Entry | None:
        data = self._read(f"{self._place(name)}/{part}.json", MAX_ENTRY_BYTES)
        return None if data is None else self._parse_entry(name, part, data)

    def _parse_entry(self, name: str, part: str, data: bytes) -> Entry:
        try:
            record = json.loads(data)
            schema, manifest = record["schema"], record["manifest"]
            if type(schema) is int and schema > ENTRY_SCHEMA:
                raise UserError(
                    f"'{part}' of '{name}' in '{self.url}' was stored by a newer headcast (layout {schema}).",
                    "update headcast on this machine",
                )
            digests = [record["sha256"], manifest["key"], manifest["digest"]]
            valid = schema == ENTRY_SCHEMA and manifest["stage"] == part and "outputs" not in manifest
            valid = valid and all(_HEX.fullmatch(digest) for digest in digests)
            valid = valid and type(record["size"]) is int and record["size"] >= 0
            valid = valid and (part != SOURCE or isinstance(manifest["source"], dict))
        except (ValueError, KeyError, TypeError, RecursionError):
            valid = False
        if not valid:
            raise self._damage(name, part, "its entry is not what headcast writes", f"{self._place(name)}/{part}.json")
        return Entry(manifest, record["sha256"], record["size"])

    def _documents(self, name: str, listed: dict[str, dict[str, Any]]) -> dict[str, bytes]:
        """The small objects among those listed of a subject: part -> entry, and `run` -> settings."""
        sizes = {PurePosixPath(path): info["size"] for path, info in listed.items() if info["type"] == "file"}
        small = {
            path: size
            for path, size in sizes.items()
            if 0 < size <= MAX_ENTRY_BYTES and path.suffix == ".json" and _PART_NAME.fullmatch(path.stem)
        }
        with self._talking():
            # With a range s3fs does not ask for the size first.
            answers = self.fs.cat_ranges(list(map(str, small)), 0, list(small.values()), on_error="return")
            for answer in answers:
                # One that goes meanwhile is left out like one that was never there; every other error counts.
                if isinstance(answer, Exception) and not isinstance(answer, FileNotFoundError):
                    raise answer
        return {path.stem: data for path, data in zip(small, answers, strict=True) if isinstance(data, bytes)}

    def _list(self, place: str) -> dict[str, dict[str, Any]]:
        """What lies directly under a place: path -> name, type and size."""
        with contextlib.suppress(FileNotFoundError), self._talking():
            return {info["name"]: info for info in self.fs.ls(place, detail=True) if info["name"] != place}
        return {}

    def _find(self, place: str) -> dict[str, int]:
        """Every object under a place: path -> size in bytes."""
        with contextlib.suppress(FileNotFoundError), self._talking():
            return {path: info["size"] for path, info in self.fs.find(place, detail=True).items()}
        return {}

    def _read(self, path: str, limit: int) -> bytes | None:
        """An object's bytes; None where there is none, or one that is larger than any that headcast writes."""
        with contextlib.suppress(FileNotFoundError), self._talking():
            try:
                data = bytes(self.fs.cat_file(path, start=0, end=limit + 1))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return b""  # an empty object has no range
            return data if len(data) <= limit else None
        return None

    def _write(self, path: str, data: bytes) -> None:
        with self._talking():
            self.fs.pipe_file(path, data)

    def _transfer(
        self, move: Any, label: str, sources: Sequence[str], targets: Sequence[str], reporter: Reporter | None
    ) -> None:
        """Put or get files, several at a time, with progress."""
        if not sources:
            return
        from fsspec.callbacks import Callback

        at_once = {"batch_size": FILES_AT_ONCE} if self.fs.async_impl else {}
        with (reporter or SilentReporter()).task(label, len(sources), "files") as task:

            def count(size: int, value: int, **_: Any) -> None:
                task.advance(value - task.done)

            with self._talking():
                move(list(sources), list(targets), callback=Callback(hooks={"count": count}), **at_once)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn what a file system of fsspec raises into errors for users; only FileNotFoundError passes through.

        s3fs has tried a request that failed again for some seconds by then, with growing pauses.
        """
        try:
            yield
        except HeadcastError:
            raise
        except Exception as error:  # every implementation has errors of its own
            explained = self._explain(error)
            if explained is error:
                raise
            raise explained from error

    def _explain(self, error: Exception) -> Exception:
        kind = type(error).__name__
        code = str(getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", ""))
        if code == "NoSuchBucket" or kind == "ParamValidationError":
            return UserError(f"There is no bucket for the store '{self.url}'.", "make it, or check --store")
        if isinstance(error, FileNotFoundError):
            return error
        if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS and error.__cause__ is None:
            return error
        if isinstance(error, PermissionError):
            return UserError(
                f"The store '{self.url}' refuses these credentials ({error}).",
                "check the credentials in the environment (AWS_ACCESS_KEY_ID ...) and what they may do",
            )
        if isinstance(error, NotImplementedError):
            return UserError(f"The store '{self.url}' cannot be written.", "name another, such as s3://BUCKET/FOLDER")
        if "Credential" in kind or "Token" in kind:
            return Unavailable(
                f"There are no credentials for the store '{self.url}'.",
                "put them in the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            )
        return Unavailable(
            f"The store '{self.url}' does not answer: {kind}: {error}.",
            "check the network and AWS_ENDPOINT_URL, and run the same command again: what is finished is kept",
        )


def open_store(url: str) -> DatasetStore:
    """The dataset store at a URL such as `s3://bucket/folder`. Nothing is asked of it yet (`DatasetStore.check`).

    Raises:
        UserError: the URL is none, carries a password, or needs a package that is not here.
    """
    protocol, colon, rest = url.partition("://")
    shown = re.sub(r"://[^/]*@", "://...@", url)
    example = "for example: --store s3://bucket/folder; for a shared folder --data alone will do"
    if not colon or not rest.strip("/") or "::" in url or re.search(r"[*?\[\]\s]", url):
        raise UserError(f"'{shown}' is no URL of a store.", example)
    if ":" in rest.partition("/")[0].rpartition("@")[0]:
        raise UserError(
            f"The store's URL '{shown}' holds a password.",
            "leave it out and put it in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    import fsspec

    if protocol not in fsspec.available_protocols():
        raise UserError(f"The store '{shown}' is of an unknown kind, '{protocol}'.", example)
    try:
        local = {"auto_mkdir": True} if protocol in ("file", "local") else {}
        # Without a cache of listings: other machines write here too.
        fs, root = fsspec.url_to_fs(url, use_listings_cache=False, **local)
    except ImportError as error:
        needed = "pip install 'headcast[store]'" if importlib.util.find_spec("s3fs") is None else f"({error})"
        raise UserError(f"The store '{shown}' needs a package that is not installed.", needed) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"The store '{shown}' cannot be opened: {error}.", example) from None
    return DatasetStore(shown.rstrip("/"), fs, root.rstrip("/"))


def source_key(subject: Subject) -> str:
    """What tells a subject's source from another: its clips, alphas and photograph by hash, and their places.

    Raises:
        UserError: the source is missing or damaged.
    """
    kept = [[entry["kind"], entry["file"], entry["sha256"]] for entry in source_entries(subject)]
    return _sha256(canonical_json(kept).encode())


def _is_here(subject: Subject, part: str, entry: Entry) -> bool:
    """Whether the local dataset has the part with the same key and files, undamaged."""
    if part == SOURCE:
        try:
            return source_key(subject) == entry.manifest["key"] and bool(source_files(subject))
        except UserError:
            return False
    folder = subject.stage(part)
    manifest = read_manifest(folder)
    return manifest is not None and entry.same_files(manifest) and damaged_output(folder, manifest) is None


def _reuse(outputs: Sequence[dict[str, Any]], incoming: Path, present: Path) -> list[dict[str, Any]]:
    """Fill a folder with the files that a stopped pull or the present folder has; return those still lacking."""
    manifest = read_manifest(present) or {"outputs": []}
    known = {str(entry["sha256"]): present / str(entry["path"]) for entry in manifest["outputs"]}
    lacking = []
    for output in outputs:
        target = incoming / output["path"]
        if _is(target, output):
            continue
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        at_hand = known.get(output["sha256"], present / output["path"])
        if _is(at_hand, output):
            link_or_copy(at_hand, target)
        else:
            lacking.append(output)
    return lacking


def _is(path: Path, output: dict[str, Any]) -> bool:
    """Whether a file has the size and hash of an output."""
    try:
        return path.stat().st_size == output["size"] and sha256_file(path) == output["sha256"]
    except OSError:
        return False


def _is_output(output: Any) -> bool:
    fields = [type(output.get(name)) for name in ("path", "size", "sha256")] if isinstance(output, dict) else []
    return fields == [str, int, str] and output["size"] >= 0 and _HEX.fullmatch(output["sha256"]) is not None


def _is_safe(path: str) -> bool:
    """Whether a name from outside is a plain relative path that stays inside its folder and shadows nothing there."""
    printable = path.isprintable() and "\\" not in path and path not in (MANIFEST, SOURCE_RECORD)
    pieces = path.split("/") if printable else [""]
    return all(piece and not piece.startswith(".") and len(piece.encode()) < 256 for piece in pieces)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
