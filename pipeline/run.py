"""What one run of a subject is: the request, the settings it means, and the account of how it went.

Both the command line and the flows start here, so that `headcast run` and a deployment understand a request alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import Config, Preset, configure, differences, flat, preset_config
from pipeline.dataset import (
    RUN_RECORD,
    Dataset,
    Subject,
    fsync_path,
    refuse_newer,
    seal_fits,
    sealed,
    sha256_file,
    subject_name_for,
    write_json,
)
from pipeline.errors import Interrupted, StageError, SubjectBusy, UserError
from pipeline.interchange.tracking import check_tracking, kind_of, tracking_digest
from pipeline.lease import Held, remove_traces
from pipeline.mirror import Mirror, in_step, open_mirror
from pipeline.progress import Reporter
from pipeline.source import (
    alphas_digest,
    check_alpha_count,
    check_sources,
    check_span,
    has_alphas,
    has_photo,
    has_tracking,
    imported,
    is_registered,
    is_registered_dataset,
    read_photo_bytes,
    register_alphas,
    register_dataset,
    register_photo,
    register_source,
    register_tracking,
    source_paths,
)
from pipeline.stage import Stage, State, inspect_stages, read_manifest, run_stage, storage_fix

if TYPE_CHECKING:
    from pipeline.interchange.recording import Recording

RUN_SCHEMA = 1
LOCK_RETRY_SECONDS = 5.0
STAGE_MINUTES = 120.0
"""Time limit of a stage where nobody watches: in batches, nights and services."""
NOT_OF_IMPORTED = ("decode.", "track.", "fit.", "matte.alpha")
OF_IMPORTED = ("decode.max_side_px", "track.max_faces", "fit.crop_margin")
"""Settings so named say nothing to a subject that was imported, but for these."""
_stop_asked = threading.Event()


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Threads of a run that is not told: its share of the cores (HEADCAST_THREADS), or all of them."""
    told = os.environ.get("HEADCAST_THREADS", "")
    return int(told) if told.isdecimal() and int(told) else usable_cores()


class Import(BaseModel):
    """Another project's dataset that becomes a subject, and how it is read (`pipeline.interchange`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folder: Path
    """The dataset."""
    format: str = "auto"
    """One of `pipeline.interchange.FORMATS`, or auto."""
    fps: Fraction | None = Field(None, gt=0, le=1000)
    """Frames a second, where the dataset does not tell."""
    flame: str | None = None
    """The FLAME that its numbers belong to, where it does not tell."""
    force: bool = False
    """Whether it may take the place of a subject's other source."""

    def read(self) -> Recording:
        """The dataset, checked but for its pixels.

        Raises:
            UserError: what is wrong with it, or FLAME is needed and not on this machine.
        """
        from pipeline.interchange import ReadOptions, read

        known = _read_imports.get(self)
        if known is not None and known[1] == _stamps(self.folder, known[0]):
            return known[0]
        recording = read(self.folder, self.format, ReadOptions(self.fps, self.flame))
        if recording.flame is not None and not recording.meshes:  # as `pipeline.interchange.head` needs it
            from pipeline.heads.flame import load_flame

            load_flame(recording.flame.version)
        _read_imports[self] = recording, _stamps(self.folder, recording)
        return recording


_read_imports: dict[Import, tuple[Recording, list[tuple[int, ...]]]] = {}
"""Datasets that this process has read and found good, with the sizes and times of change that their files had."""


def _stamps(folder: Path, recording: Recording) -> list[tuple[int, ...]]:
    """Of the files of a dataset; zeros where one is gone."""
    found: list[tuple[int, ...]] = []
    for name in recording.files:
        try:
            about = (folder / name).stat()
            found.append((about.st_size, about.st_mtime_ns, about.st_ino))
        except OSError:
            found.append((0, 0, 0))
    return found


class RunRequest(BaseModel):
    """One run of one subject, as typed on the command line or given to a deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Path = Path("data")
    """The dataset directory."""
    subject: str | None = None
    """The subject's name; by default made from the first video's file name."""
    videos: tuple[Path, ...] = ()
    """The videos, or folders of images, of one person; none for a subject that is there already."""
    imports: Import | None = None
    """In place of videos: another project's dataset."""
    like: Path | None = None
    """A photograph of the person who is meant, where several are in view; it is kept with the videos."""
    alpha: tuple[Path, ...] = ()
    """Alphas of the user's own, a video or a folder of images for each clip in order; they are kept with the videos."""
    tracking: Path | None = None
    """Another tracker's file of the video, such as a Live Link Face table; it is kept with the video."""
    check: bool = True
    """Look at new videos before anything is done with them, and say what to film again."""
    preset: Preset | None = None
    """Budget of the run; None means the subject's last, or quick."""
    settings: tuple[str, ...] = ()
    """Changes to the preset, each `section.field=value`."""
    first: str | None = None
    """Run this stage again even if it is fresh, and what follows as needed."""
    last: str | None = None
    """Stop after this stage."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train and render."""
    threads: int = Field(default_factory=default_threads, ge=1)
    """CPU threads to use."""
    store: str | None = None
    """URL of an object store that holds the dataset, such as s3://bucket/folder; `data` is then this machine's copy."""
    wait_minutes: float = Field(0.0, ge=0)
    """How long to wait for a subject that another run holds."""
    stage_minutes: float | None = Field(None, gt=0)
    """Time limit of each stage; stages then work in a process of their own, which the limit ends."""
    routes: dict[Literal["cpu", "gpu"], str] = Field(default_factory=dict)
    """Where stages of a kind are run: the deployment, as FLOW/NAME, that another work pool serves."""

    @property
    def new_source(self) -> bool:
        """Whether a source is given; else the subject has to be there."""
        return bool(self.videos) or self.imports is not None

    def target(self) -> Subject:
        """The subject's folder, named but not made.

        Raises:
            UserError: the name is not safe, or neither a name nor a source is given.
        """
        given = self.videos[0] if self.videos else self.imports.folder.absolute() if self.imports else None
        if self.subject is None and given is None:
            raise UserError("Neither a video nor a subject is named.", "for example: headcast run my_video.mp4")
        return Dataset(self.data).subject(self.subject or subject_name_for(given or Path()))


def resolve_config(request: RunRequest, subject: Subject) -> Config:
    """The settings a request means: its preset and changes; without a new source or preset, those of the last run.

    Raises:
        UserError: a setting or the record of the last run does not fit, or a photograph or alphas cannot be read.
    """
    settings = list(request.settings)
    if request.alpha:
        check_alpha_count(len(request.alpha), len(request.videos or source_paths(subject)))
        settings.append(f"matte.alpha={alphas_digest(subject, request.alpha)}")
    if request.tracking is not None:
        settings.append(f"track.given={tracking_digest(request.tracking)}")
    if request.like is not None:
        settings.append(f"track.like={hashlib.sha256(read_photo_bytes(request.like)).hexdigest()}")
    if request.preset is None and not request.videos and (request.imports is None or imported(subject) is not None):
        last = last_config(subject)
        kept = {"train.avatar": last.train.avatar, **{name: value for name, (_, value) in differences(last).items()}}
        config = configure(last.preset, [*(f"{name}={json.dumps(value)}" for name, value in kept.items()), *settings])
    else:
        config = configure(request.preset or "quick", settings)
    if config.track.person is not None and config.track.like:
        raise UserError(
            "Both a person's number and a photograph are named.", "choose the person with --person or with --like"
        )
    return config


def last_config(subject: Subject) -> Config:
    """The settings of the subject's last run; the quick preset's where there is no record.

    Raises:
        UserError: the record was written by another version and does not fit.
    """
    record = subject.root / RUN_RECORD
    if not record.exists():
        return preset_config("quick")
    try:
        content = json.loads(record.read_bytes())
        refuse_newer(content, RUN_SCHEMA, record)
        if not seal_fits(content):
            raise ValueError("a bit was flipped")
        return Config.model_validate(content["config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"'{record}' cannot be read as this version's settings.", "name a preset: headcast run VIDEO --preset quick"
        ) from None


def used_settings(subject: Subject) -> dict[str, Any]:
    """`section.field` -> value that a subject's avatar was made with, as the stages recorded it.

    What no stage tells is taken from the settings of the last run.
    """
    settings = dict(flat(last_config(subject).model_dump()))
    for stage in ("decode", "track", "matte", "fit", "train"):
        config = (read_manifest(subject.stage(stage)) or {}).get("config") or {}
        # What a stage reads of another section carries that section's name already.
        settings |= {name if name in settings else f"{stage}.{name}": value for name, value in flat(config)}
    return settings


def prepare(request: RunRequest, stages: Sequence[Stage]) -> tuple[Subject, Config, list[Stage]]:
    """Check a request and make it concrete: the subject's folder, the settings, the stages to bring up to date.

    Nothing is written.

    Raises:
        UserError: a name, setting, stage or path is at fault.
    """
    subject = request.target()
    if not request.new_source:
        Dataset(request.data).existing(subject.name)
    if request.imports is not None or (not request.videos and imported(subject) is not None):
        refuse_settings(request, subject)
    with contextlib.suppress(OSError, ValueError):
        refuse_newer(json.loads((subject.root / RUN_RECORD).read_bytes()), RUN_SCHEMA, subject.root / RUN_RECORD)
    config = resolve_config(request, subject)
    check_span(config.decode, len(request.videos))
    names = [stage.name for stage in stages]
    for asked in (request.first, request.last):
        if asked is not None and asked not in names:
            raise UserError(f"There is no stage '{asked}'.", f"choose one of: {', '.join(names)}")
    for stage in stages:
        stage.assets(config)  # refuses a model that is not one
    end = names.index(request.last) if request.last else len(names) - 1
    if request.first and names.index(request.first) > end:
        raise UserError(f"Stage '{request.first}' comes after '{request.last}'.", f"the order is: {', '.join(names)}")
    return subject, config, list(stages[: end + 1])


def check_writable(data: Path) -> None:
    """Refuse a data folder that cannot be made or written, before anything is started for it.

    Raises:
        UserError: it lies on a read-only file system, belongs to somebody else, or a file is in its place.
    """
    folder = next(path for path in (data.absolute(), *data.absolute().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "is no folder" if not folder.is_dir() else "cannot be written"
        raise UserError(
            f"The data folder '{data}' cannot be used: '{folder}' {what}.",
            "make it writable or choose another with --data",
        )


def open_subject(request: RunRequest, subject: Subject, config: Config) -> None:
    """Make the subject's folder, register its source and record the settings. The caller holds the lock.

    Raises:
        UserError: a video is missing or none, a dataset is not good, or the data folder cannot be written.
    """
    if request.imports is not None:
        register_dataset(subject, request.imports.folder, request.imports.read())
    elif request.videos:
        register_source(subject, request.videos, request.like)
    elif request.like is not None:
        register_photo(subject, request.like)
    if request.alpha:
        register_alphas(subject, request.alpha)
    if request.tracking is not None:
        register_tracking(subject, request.tracking, kind_of(request.tracking))
    write_json(subject.root / RUN_RECORD, sealed({"schema": RUN_SCHEMA, "config": config.model_dump(mode="json")}))
    for folder in (subject.root, subject.root.parent):  # before anything is published in them
        fsync_path(folder)


@contextlib.contextmanager
def hold(subject: Subject, wait_minutes: float = 0.0, store: str | None = None) -> Iterator[Held]:
    """Make the subject's folder if need be and hold it, in the dataset and in its object store if it has one.

    Raises:
        UserError: the data folder cannot be written; another run holds the subject.
    """
    new = not subject.root.exists()
    try:
        with contextlib.ExitStack() as stack:
            held = _locked(subject, wait_minutes, store, stack)
            try:
                yield held
            finally:
                if new:
                    _remove_if_empty(subject)
    except PermissionError as error:
        raise UserError(
            f"The data folder cannot be written: '{error.filename}'.", "make it writable or choose another with --data"
        ) from None
    except OSError as error:
        raise StageError(
            f"Subject '{subject.name}': {error.strerror or error} ('{error.filename or subject.root}').",
            storage_fix(error),
        ) from None


def _locked(subject: Subject, wait_minutes: float, store: str | None, stack: contextlib.ExitStack) -> Held:
    """Take the lock, waiting for another run to let go of it."""
    end = time.monotonic() + 60 * wait_minutes
    while True:
        try:
            return stack.enter_context(subject.lock(store))
        except SubjectBusy:
            if time.monotonic() >= end:
                raise
            time.sleep(min(LOCK_RETRY_SECONDS, max(end - time.monotonic(), 0.0)))


def _remove_if_empty(subject: Subject) -> None:
    """Leave no empty folder behind for a subject whose source was refused. The caller holds the lock."""
    if not (subject.source / "source.json").exists():
        with contextlib.suppress(OSError):
            remove_traces(subject.work)
            for folder in (subject.work, subject.source, subject.root):
                if folder.is_dir():
                    folder.rmdir()


def nothing_to_do(request: RunRequest, stages: Sequence[Stage]) -> list[State] | None:
    """The stages' states when the whole request is already fulfilled, else None. Reads only.

    It also refuses a bad source, and a store that is none, before anything is started or made for it.

    Raises:
        UserError: as `prepare`, `check_input` and `open_store`.
        Unavailable: the store does not answer.
    """
    if request.store is not None and not in_step(request.store, request.target(), request.new_source):
        return None
    subject, config, wanted = prepare(request, stages)
    if not check_input(request, subject):
        return None
    if request.first is not None or not subject.report.is_file() or subject.running():
        return None
    states = inspect_stages(subject, wanted, config)
    return states if all(state.name == "fresh" for state in states) else None


def check_input(request: RunRequest, subject: Subject) -> bool:
    """Refuse bad videos, a bad dataset, alphas and photograph; whether all are part of the subject already. Reads only.

    Raises:
        UserError: a video, the dataset, alphas or the photograph is at fault, no face recognition model is there for
            it, or a dataset would take the place of a source that it may not replace.
    """
    if request.imports is not None:
        return _check_import(request.imports, subject)
    known = not request.videos or is_registered(subject, request.videos)
    if not known:
        check_sources(request.videos)
    fulfilled = known
    if request.alpha and not (known and has_alphas(subject, request.alpha)):
        from pipeline.matting.given import check_alphas

        decoded = subject.stage("decode") if known else None
        max_side_px = resolve_config(request, subject).decode.max_side_px
        check_alphas(request.videos or source_paths(subject), request.alpha, max_side_px, decoded, request.threads)
        fulfilled = False
    if request.tracking is not None and not (known and has_tracking(subject, sha256_file(request.tracking))):
        check_tracking(request.tracking, request.videos or source_paths(subject))
        fulfilled = False
    if request.like is not None and not (known and has_photo(subject, sha256_file(request.like))):
        from pipeline.recognition import check_photo

        check_photo(request.like)
        fulfilled = False
    return fulfilled


def _check_import(imports: Import, subject: Subject) -> bool:
    recording = imports.read()
    if is_registered_dataset(subject, imports.folder, recording):
        return True
    if (subject.source / "source.json").is_file() and not imports.force:
        told = imported(subject)
        made = f"imported from '{told['folder']}' as {told['format']}" if told else "made from something else"
        raise UserError(
            f"'{imports.folder}' would become the subject '{subject.name}', which was {made}.",
            "name another with --subject, or put the dataset in its place with --force",
        )
    return False


def refuse_settings(request: RunRequest, subject: Subject) -> None:
    """Refuse what is asked of an imported subject and cannot be done: its tracking and head are the dataset's own.

    Raises:
        UserError: a setting says nothing to it.
    """
    options = [
        ("--like", request.like is not None),
        ("--alpha", bool(request.alpha)),
        ("--tracking", request.tracking is not None),
    ]
    found = [option for option, given in options if given]
    names = [setting.partition("=")[0].strip() for setting in request.settings]
    found += [name for name in names if name.startswith(NOT_OF_IMPORTED) and name not in OF_IMPORTED]
    if found:
        raise UserError(
            f"{found[0]} says nothing to '{subject.name}': its frames, tracking, alphas and head are imported.",
            f"leave it away; what counts are {', '.join(OF_IMPORTED)}, and what train, evaluate and export have",
        )


def needed_assets(subject: Subject, config: Config, stages: Sequence[Stage]) -> set[str]:
    """The assets without which these stages of a subject cannot work; alphas that were imported need no network."""
    told = imported(subject)
    given = told is not None and told["alpha"] != "none"
    return {name for stage in stages if not (given and stage.name == "matte") for name in stage.assets(config)}


def check_captures_first(request: RunRequest, subject: Subject, reporter: Reporter) -> None:
    """Judge videos that are new to the subject before anything is done with them: say what to film again.

    Raises:
        UserError: no avatar can come of them; `RunRequest.check` switches the whole check off.
    """
    if not request.check or not request.videos or is_registered(subject, request.videos):
        return
    from pipeline.capture_check import capture_verdict, check_captures

    started = time.monotonic()
    findings = list(check_captures(request.videos))
    reporter.message(f"capture check: {time.monotonic() - started:.1f} s. {capture_verdict(findings)}")
    for finding in findings:
        if finding.level == "blocked":
            raise UserError(
                f"The capture check says: {finding.what}.", f"{finding.fix}; to run all the same: --no-check"
            )


def ask_to_stop() -> None:
    """Ask whatever is at work in this process to stop, as Ctrl+C does; to be called inside `stop_signals`."""
    _stop_asked.set()


@contextlib.contextmanager
def stop_signals(lost: Callable[[], bool] = lambda: False) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl+C or SIGTERM into a request that stages obey between two steps; a second one interrupts.

    A subject that is `lost` to another run asks for a stop as well. Only the main thread can catch signals; other
    threads hear what it has caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: _stop_asked.is_set() or lost()
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if _stop_asked.is_set():
            raise KeyboardInterrupt
        _stop_asked.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: _stop_asked.is_set() or lost()
    finally:
        _stop_asked.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


Worker = Callable[[Stage], dict[str, Any] | None]


@contextlib.contextmanager
def stage_worker(
    request: RunRequest,
    subject: Subject,
    stages: Sequence[Stage],
    config: Config,
    held: Held,
    mirror: Mirror,
    reporter: Reporter,
) -> Iterator[Worker]:
    """Give the function that brings one stage up to date: its manifest, or None when it was fresh already.

    The caller holds the subject. With a time limit the stages work in one child process.
    What the mirror's store has is brought from there, and each stage is taken there once it is finished.
    """
    with contextlib.ExitStack() as stack:
        child = None
        if request.stage_minutes is not None:
            from pipeline.isolation import StageProcess

            child = stack.enter_context(StageProcess(subject, stages, 60 * request.stage_minutes, held))

        def bring_up_to_date(stage: Stage) -> dict[str, Any] | None:
            force = request.first == stage.name
            until = list(stages).index(stage) + (0 if force else 1)
            states = mirror.fetch(lambda: inspect_stages(subject, stages[:until], config))
            if not force and states[-1].name == "fresh":
                mirror.publish(stage.name)
                return None
            with stop_signals(held.lost) as stop_requested:
                how: dict[str, Any] = {
                    "force": force,
                    "device": request.device,
                    "threads": request.threads,
                    "reporter": reporter,
                    "stop_requested": stop_requested,
                }
                if child is not None:
                    try:
                        manifest = child.run(stage, config, **how)
                    except Interrupted:
                        held.check()  # when it is lost, that is why the child was stopped
                        raise
                else:
                    manifest = run_stage(subject, stage, stages, config, still_held=held.check, **how)
            mirror.publish(stage.name)
            return manifest

        yield bring_up_to_date


def carry_out(request: RunRequest, stages: Sequence[Stage], reporter: Reporter) -> list[str]:
    """Bring a subject up to date in this process, without an orchestrator: nothing is tried again, no report written.

    Returns the stages that worked; `reporter` is told how each went.

    Raises:
        HeadcastError: the request is at fault, or a stage failed.
    """
    from pipeline.assets import ensure_assets

    subject = request.target()
    mirror = open_mirror(request.store, subject, reporter)
    if request.store is None:  # with a store, the subject may not be here yet
        prepare(request, stages)
    with hold(subject, request.wait_minutes, request.store) as held:
        mirror.still_held = held.check
        mirror.pull_source(not request.new_source)
        _, config, wanted = prepare(request, stages)
        open_subject(request, subject, config)
        mirror.push_source()
        ensure_assets(needed_assets(subject, config, wanted), reporter)
        worked = []
        with stage_worker(request, subject, stages, config, held, mirror, reporter) as work:
            for number, stage in enumerate(wanted, 1):
                manifest = work(stage)
                how = "fresh, left as it is"
                if manifest is not None:
                    worked.append(stage.name)
                    how = f"{manifest['seconds']:.1f} s. {manifest['verdict']['text']}"
                reporter.message(f"[{number}/{len(wanted)}] {stage.name}: {how}")
        return worked


def segments(request: RunRequest, stages: Sequence[Stage]) -> list[tuple[str | None, list[Stage]]]:
    """Neighbouring stages that run in one place: with the deployment they are sent to, or None for here."""
    parts = itertools.groupby(stages, key=lambda stage: request.routes.get(stage.needs))
    return [(route, list(part)) for route, part in parts]


def routed(request: RunRequest, subject: Subject, stages: Sequence[Stage]) -> RunRequest:
    """What another machine is asked for: these stages of a subject that is there, all of them in place."""
    forced = request.first if request.first in [stage.name for stage in stages] else None
    return RunRequest(
        data=request.data,
        store=request.store,
        subject=subject.name,
        first=forced,
        last=stages[-1].name,
        device=request.device,
        wait_minutes=max(request.wait_minutes, 10.0),
        stage_minutes=request.stage_minutes,
    )


def account(subject: Subject, states: Sequence[State], ran: Sequence[str] = ()) -> dict[str, Any]:
    """How a subject stands, as plain data: what `--json` prints."""
    stages = []
    for state in states:
        manifest = state.manifest or {}
        stages.append(
            {
                "stage": state.stage,
                "state": state.name,
                "why": state.why,
                "ran": state.stage in ran,
                "key": state.key,
                "seconds": manifest.get("seconds"),
                "finished": manifest.get("finished"),
                "verdict": manifest.get("verdict"),
                "metrics": manifest.get("metrics"),
            }
        )
    return {
        "schema": 1,
        "subject": subject.name,
        "folder": str(subject.root),
        "report": str(subject.report) if subject.report.is_file() else None,
        "fresh": all(state.name == "fresh" for state in states),
        "stages": stages,
    }
