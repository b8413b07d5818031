"""The stage contract: keys, manifests, freshness, resumable work folders and atomic publication.

A stage is a plain function from finished inputs to files. Its *key* is a hash of its name, its declared code version,
its config section and the digests of its inputs. It is *fresh* when its manifest carries this key and every listed
output is there with its size and hash. It works in `.work/STAGE-KEY/`, which survives a crash and is resumed from, and
appears by one rename. `docs/dataset.md` is the specification.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline import __version__
from pipeline.config import Config, Section
from pipeline.dataset import (
    Subject,
    canonical_json,
    fsync_path,
    fsync_tree,
    refuse_newer,
    seal_fits,
    sealed,
    sha256_file,
    write_json,
)
from pipeline.errors import HeadcastError, Interrupted, LeaseLost, StageError, Unavailable
from pipeline.logs import event
from pipeline.progress import RecordingReporter, Reporter, SilentReporter

SCHEMA = 1
MANIFEST = "stage.json"
SCRATCH = "scratch"
FAILURE = "failure.json"
BOOT = ".boot"
_PASSING = (errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ETXTBSY, errno.EHOSTDOWN)
"""Storage errors that may be gone the next time: a locked file, a file server that stumbles."""

Level = Literal["good", "fair", "poor"]
StateName = Literal["fresh", "stale", "missing", "partial", "failed", "running", "waiting"]
SectionT = TypeVar("SectionT", bound=Section)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """A stage's own judgement in plain words with its numbers, e.g. `Tracking: good. 612 of 620 frames, ...`."""

    level: Level
    text: str
    picture: str = ""
    """Path of a picture inside the stage's folder."""


@dataclass(frozen=True)
class Result:
    """What a stage's function returns; its files lie in the work folder."""

    verdict: Verdict
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageRun:
    """What a stage's function gets: finished inputs, its settings, and a folder to write to."""

    subject: Subject
    work: Path
    """Write outputs here, under final names, each by temporary file and rename where it must resume."""
    config: Config
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 2
    reporter: Reporter = field(default_factory=SilentReporter)
    stop_requested: Callable[[], bool] = lambda: False

    @property
    def scratch(self) -> Path:
        """A folder inside the work folder for checkpoints; it survives a crash and is removed before publication."""
        path = self.work / SCRATCH
        path.mkdir(exist_ok=True)
        return path

    def input(self, stage: str, name: str) -> Path:
        """A file of a finished input stage."""
        return self.subject.stage(stage) / name

    def check_stop(self) -> None:
        """Leave the stage here if a stop was asked for. Call it between frames and steps, after saving.

        Raises:
            Interrupted: a stop was asked for.
        """
        if self.stop_requested():
            raise Interrupted("Stopped as asked; what is done is kept.")


@dataclass(frozen=True)
class Stage:
    """A stage's declaration."""

    name: str
    version: int
    """Raise it when the stage's code, or library code it rests on, would write different bytes."""
    inputs: tuple[str, ...]
    """Stages whose finished files this one reads; empty for the one that reads the source."""
    run: Callable[[StageRun], Result]
    reads: tuple[str, ...] = ()
    """Further config fields, as `section.field`, that this stage's work depends on."""
    assets: Callable[[Config], tuple[str, ...]] = lambda config: ()
    """Assets (`pipeline.assets`) that must be there before the stage works; nothing is fetched while it does."""
    description: str = ""
    needs: Literal["cpu", "gpu"] = "cpu"
    """The kind of machine it gains from: what sends it to another work pool (`RunRequest.routes`)."""
    durable: tuple[str, ...] = ()
    """Patterns of the files in the work folder that the stage brings to disk one by one (`write_atomic`), such as its
    checkpoints: what a power cut leaves whole. Other files of an unfinished attempt are thrown away after one."""
    data: Callable[[Config], dict[str, str]] = lambda config: {}
    """What this stage reads beside its inputs and settings, such as a head model: name -> digest; part of its key."""


@dataclass(frozen=True)
class State:
    """What a stage's folder is worth now, and why."""

    stage: str
    name: StateName
    why: str
    key: str | None = None
    manifest: dict[str, Any] | None = None
    fix: str = ""
    """What to do next, as the stage said when it failed."""
    failed_at: str | None = None
    """When it failed, ISO 8601."""


@dataclass(frozen=True)
class Attempt:
    """An attempt at a stage that was not finished, as its work folder tells."""

    name: Literal["failed", "running", "partial"]
    why: str
    fix: str = ""
    failed_at: str | None = None


def section_of(stage: Stage, config: Config) -> dict[str, Any]:
    """The plain data of the settings a stage depends on."""
    data: dict[str, Any] = getattr(config, stage.name).keyed()
    for name in stage.reads:
        section, _, fieldname = name.partition(".")
        data[name] = getattr(getattr(config, section), fieldname)
    return data


def stage_key(stage: Stage, section: dict[str, Any], inputs: dict[str, str]) -> str:
    """Key of a stage's result: 64 hex digits."""
    parts = {"stage": stage.name, "version": stage.version, "config": section, "inputs": inputs}
    return hashlib.sha256(canonical_json(parts).encode(errors="surrogatepass")).hexdigest()


def outputs_digest(outputs: list[dict[str, Any]]) -> str:
    """Digest of a stage's files; what later stages' keys rest on, so that equal bytes keep them fresh."""
    listing = sorted((entry["path"], entry["size"], entry["sha256"]) for entry in outputs)
    return hashlib.sha256(canonical_json(listing).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A finished stage's manifest, or None where there is none that can be read.

    Raises:
        UserError: a newer headcast wrote it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        refuse_newer(manifest, SCHEMA, folder / MANIFEST)
        complete = manifest["schema"] == SCHEMA and all(
            isinstance(entry["path"], str) and type(entry["size"]) is int for entry in manifest["outputs"]
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return manifest if complete and isinstance(manifest["outputs"], list) else None


def source_digest(subject: Subject) -> str | None:
    """The source's digest as registered in `source.json`."""
    try:
        record = json.loads((subject.source / "source.json").read_bytes())
        return str(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def damaged_output(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first listed output that is missing or differs, in words; None when all are as listed."""
    for entry in manifest["outputs"]:
        path = folder / str(entry["path"])
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{entry['path']} lies outside the stage's folder"
        try:
            size = path.stat().st_size
        except OSError:
            return f"{entry['path']} is missing"
        if size != entry["size"]:
            return f"{entry['path']} has {size} bytes, not {entry['size']}"
        if sha256_file(path) != entry.get("sha256"):
            return f"{entry['path']} was changed"
    return None if seal_fits(manifest) else f"{MANIFEST} was changed"


def inspect_stages(subject: Subject, stages: Sequence[Stage], config: Config, *, verify: bool = True) -> list[State]:
    """The state of each stage, in order; a stage after one that is not fresh is judged by what is known.

    Args:
        subject: whose stages.
        stages: in the order in which they run.
        config: the settings that the files are held against.
        verify: read and hash every output. Without it the manifests are taken at their word.
    """
    running = subject.running()
    states = []
    for stage, state in zip(stages, published_states(subject, stages, config, verify=verify), strict=True):
        attempt = attempt_at(subject, stage, state.key, running) if state.name != "fresh" else None
        states.append(replace(state, **vars(attempt)) if attempt else state)
    return states


def published_states(subject: Subject, stages: Sequence[Stage], config: Config, *, verify: bool) -> list[State]:
    """As `inspect_stages`, but by the finished files alone: attempts in the work folders are not looked at."""
    states: dict[str, State] = {}
    for stage in stages:
        unfresh = [name for name in stage.inputs if states[name].name != "fresh"]
        manifest = read_manifest(subject.stage(stage.name))
        if unfresh:
            name: StateName = "waiting" if manifest is None else "stale"
            states[stage.name] = State(stage.name, name, f"{unfresh[0]} is not fresh", None, manifest)
            continue
        key = stage_key(stage, section_of(stage, config), _input_digests(subject, stage, states, config))
        states[stage.name] = _judge(subject, stage, config, key, manifest, verify)
    return list(states.values())


def _input_digests(subject: Subject, stage: Stage, states: dict[str, State], config: Config) -> dict[str, str]:
    digests = {name: str((states[name].manifest or {}).get("digest")) for name in stage.inputs}
    return {**(digests or {"source": str(source_digest(subject))}), **stage.data(config)}


def _judge(
    subject: Subject, stage: Stage, config: Config, key: str, manifest: dict[str, Any] | None, verify: bool
) -> State:
    if manifest is None:
        return State(stage.name, "missing", "not run yet", key, None)
    if manifest.get("key") != key:
        return State(stage.name, "stale", _why_stale(stage, config, manifest), key, manifest)
    damage = damaged_output(subject.stage(stage.name), manifest) if verify else None
    return State(stage.name, "stale" if damage else "fresh", damage or "", key, manifest)


def attempt_at(subject: Subject, stage: Stage, key: str | None, running: bool) -> Attempt | None:
    """The attempt at a stage with this key that is going on, failed or was cut short; None where there is none.

    Args:
        subject: whose stage.
        stage: which.
        key: None where the stage's inputs are not fresh, so that nothing can have been begun.
        running: whether a run holds the subject.
    """
    if key is None or not (work := work_folder(subject, stage, key)).is_dir():
        return None
    if (work / FAILURE).is_file():
        try:
            record = json.loads((work / FAILURE).read_bytes())
            return Attempt("failed", str(record["what"]), str(record.get("fix", "")), str(record.get("at", "")) or None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return Attempt("failed", "it failed; its record cannot be read")
    if running:
        return Attempt("running", "at work now")
    return Attempt("partial", "begun and not finished; a run resumes it")


def _why_stale(stage: Stage, config: Config, manifest: dict[str, Any]) -> str:
    if manifest.get("version") != stage.version:
        return f"the stage's code is version {stage.version}, its files are of version {manifest.get('version')}"
    old, new = manifest.get("config") or {}, json.loads(canonical_json(section_of(stage, config)))
    for name in sorted(set(old) | set(new)):
        if old.get(name) != new.get(name):
            full = name if "." in name else f"{stage.name}.{name}"
            return f"{full} changed from {old.get(name)} to {new.get(name)}"
    return "what it was made from changed"


def work_folder(subject: Subject, stage: Stage, key: str) -> Path:
    """Where a stage works until it is finished."""
    return subject.work / f"{stage.name}-{key[:16]}"


def run_stage(
    subject: Subject,
    stage: Stage,
    stages: Sequence[Stage],
    config: Config,
    *,
    force: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 2,
    reporter: Reporter | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    still_held: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Bring one stage up to date and return its manifest. The caller holds the subject's lock.

    A fresh stage is left alone unless `force` is set; a half-done one is resumed; a work folder that was finished but
    not published by a process that died is published. `still_held` raises LeaseLost where the subject may be another
    run's by now; nothing is published or recorded then.

    Raises:
        StageError: an input stage is not fresh, or the stage cannot do its work.
        Interrupted: a stop was asked for; the work folder stays.
        LeaseLost: another run may have taken the subject over; the work folder stays.
    """
    before = stages[: [s.name for s in stages].index(stage.name) + 1]
    *inputs, state = inspect_stages(subject, before, config)
    for other in inputs:
        if other.stage in stage.inputs and other.name != "fresh":
            raise StageError(
                f"Stage '{stage.name}' of '{subject.name}' needs '{other.stage}', which is {other.name}: {other.why}.",
                f"run: headcast rerun {subject.name} --from {other.stage}",
            )
    if state.name == "fresh" and not force:
        assert state.manifest is not None
        return state.manifest
    assert state.key is not None
    work = work_folder(subject, stage, state.key)
    finished = read_manifest(work)
    if (
        not force
        and finished is not None
        and finished.get("key") == state.key
        and damaged_output(work, finished) is None
    ):
        publish(subject, stage.name, work, still_held)
        return finished
    resumed = work.is_dir()
    work.mkdir(parents=True, exist_ok=True)
    _forget_what_cannot_be_trusted(work, stage)
    (work / FAILURE).unlink(missing_ok=True)
    (work / MANIFEST).unlink(missing_ok=True)
    recorder = RecordingReporter(reporter or SilentReporter(), subject.progress, stage.name)
    run = StageRun(subject, work, config, device, threads, recorder, stop_requested)
    named = {"subject": subject.name, "stage": stage.name}
    log.info("%s of %s begins", stage.name, subject.name, extra=event("stage-begin", **named, resumed=resumed))
    started, clock = datetime.now(UTC), time.monotonic()
    _reset_peak_memory()
    try:
        try:
            result = stage.run(run)
        except BaseException:
            still_held()  # when it is not, that is the reason which counts
            raise
    except (Interrupted, LeaseLost, KeyboardInterrupt):
        raise
    except OSError as error:
        raise _record_failure(work, _storage_error(stage, subject, error)) from error
    except HeadcastError as error:
        raise _record_failure(work, error) from error
    except Exception as error:
        log.debug("stage %s failed", stage.name, exc_info=True)
        failure = StageError(
            f"Stage '{stage.name}' of '{subject.name}' failed: {type(error).__name__}: {error}.",
            "this is a defect of headcast; run again with --verbose for the traceback and report it",
        )
        raise _record_failure(work, failure) from error
    finally:
        recorder.close()
    try:
        shutil.rmtree(work / SCRATCH, ignore_errors=True)
        outputs = _list_outputs(work)
        by_name = {other.stage: other for other in inputs}
        manifest = {
            "schema": SCHEMA,
            "stage": stage.name,
            "key": state.key,
            "version": stage.version,
            "headcast": __version__,
            "config": section_of(stage, config),
            "preset": config.preset,
            "inputs": _input_digests(subject, stage, by_name, config),
            "outputs": outputs,
            "digest": outputs_digest(outputs),
            "started": started.isoformat(timespec="milliseconds"),
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(time.monotonic() - clock, 3),
            "resumed": resumed,
            "peak_memory_mb": _peak_memory_mb(),
            "machine": {"system": platform.system(), "arch": platform.machine(), "cores": os.cpu_count()},
            "verdict": asdict(result.verdict),
            "metrics": result.metrics,
        }
        write_json(work / MANIFEST, sealed(manifest))
        publish(subject, stage.name, work, still_held)
    except OSError as error:
        raise _record_failure(work, _storage_error(stage, subject, error)) from error
    told = {**named, "seconds": manifest["seconds"], "verdict": result.verdict.level}
    log.info("%s", result.verdict.text, extra=event("stage-end", **told))
    return manifest


def note_failure(subject: Subject, stage: Stage, stages: Sequence[Stage], config: Config, error: HeadcastError) -> None:
    """Leave for `status` why a stage failed that could not say so itself, its process having been ended."""
    state = inspect_stages(subject, stages[: [s.name for s in stages].index(stage.name) + 1], config)[-1]
    if state.key is not None and (work := work_folder(subject, stage, state.key)).is_dir():
        _record_failure(work, error)


def publish(subject: Subject, name: str, work: Path, still_held: Callable[[], None] = lambda: None) -> None:
    """Put a finished work folder in its place by rename, and clear what other attempts of the stage left.

    Files, names and the manifest are on disk before the rename, the rename before anything is removed: whenever the
    power fails, the old files or the new ones are there in full.
    """
    fsync_tree(work)
    still_held()
    target = subject.stage(name)
    old = subject.work / f"{name}-replaced"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(work, target)
    for folder in (subject.root, subject.work):
        fsync_path(folder)
    for leftover in subject.work.glob(f"{name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _forget_what_cannot_be_trusted(work: Path, stage: Stage) -> None:
    """Drop damaged archives of an attempt; of one begun before the machine was started also what was not flushed.

    Files of single frames are not flushed one by one, which would take longer than to make them. After a power cut
    they may be there by name, empty or torn, and would be taken for finished.
    """
    boot, mark = _boot(), work / BOOT
    try:
        same = mark.read_text() == boot
    except (OSError, ValueError):
        same = False
    durable = {path for pattern in stage.durable for path in work.glob(pattern)}
    for path in sorted(work.rglob("*")):
        if not path.is_dir() and ((not same and path not in durable) or (path.suffix == ".npz" and not _is_zip(path))):
            path.unlink()
    if not same:
        mark.write_text(boot)


def _is_zip(path: Path) -> bool:
    """Whether every member of an archive has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False


def _boot() -> str:
    """Which start of the machine this is; the same always where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return "unknown"


def _list_outputs(work: Path) -> list[dict[str, Any]]:
    """Every file of the work folder by relative path, size and hash; half-written temporary files are removed."""
    outputs = []
    for path in sorted(work.rglob("*")):
        if path.is_dir():
            continue
        if path.name.startswith("."):
            path.unlink()
            continue
        name = path.relative_to(work).as_posix()
        if name not in (MANIFEST, FAILURE):
            outputs.append({"path": name, "size": path.stat().st_size, "sha256": sha256_file(path)})
    return outputs


def _record_failure(work: Path, error: HeadcastError) -> HeadcastError:
    """Leave the reason beside the unfinished work for `status`; a full disk must not hide the error itself."""
    named = {"subject": work.parent.parent.name, "stage": work.name.rpartition("-")[0]}
    log.info("%s", error.what, extra=event("stage-failed", level="error", **named, fix=error.fix))
    try:
        record = {"what": error.what, "fix": error.fix, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(work / FAILURE, record)
    except OSError as failure:
        log.warning("could not record the failure in %s: %s", work, failure)
    return error


def _storage_error(stage: Stage, subject: Subject, error: OSError) -> StageError:
    kind = Unavailable if error.errno in _PASSING else StageError
    where = f" at '{error.filename}'" if error.filename else ""
    return kind(
        f"Stage '{stage.name}' of '{subject.name}' could not read or write{where}: {error.strerror or error}.",
        storage_fix(error),
    )


def storage_fix(error: OSError) -> str:
    """What to do about storage that cannot be read or written."""
    fixes = {
        errno.ENOSPC: "free some space and run the same command again: what is finished is kept",
        errno.EDQUOT: "raise the quota or free some space, then run the same command again",
        errno.EROFS: "make the data folder writable or choose another with --data",
        errno.EACCES: "make the data folder writable or choose another with --data",
    }
    return fixes.get(error.errno or 0, "look at the path (space, permissions, kind) and run the same command again")


def _reset_peak_memory() -> None:
    """Let the kernel's high-water mark start anew (Linux; elsewhere the figure is the process's whole peak)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        log.debug("the peak-memory mark cannot be reset here")


def _peak_memory_mb() -> float:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    except OSError:
        log.debug("no /proc here")
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
