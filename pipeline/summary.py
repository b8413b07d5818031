"""How a subject stands, told in a millisecond: its manifests are believed and their gist is cached.

Nothing is hashed; `headcast status SUBJECT` does that. The cache, `SUBJECT/.work/summary.json`, is sealed over what it
was made from: the stamps of source and manifests, the settings, and what the stages declare. A summary whose seal does
not fit is made anew, so that a stale or damaged cache is never believed. Runs and attempts, which change without the
manifests, are looked at each time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pipeline import __version__
from pipeline.config import Config
from pipeline.dataset import Dataset, Subject, canonical_json, write_atomic
from pipeline.errors import UserError
from pipeline.progress import Progress, read_progress
from pipeline.run import last_config
from pipeline.stage import MANIFEST, Level, Stage, State, StateName, attempt_at, published_states

if TYPE_CHECKING:
    from pipeline.store import DatasetStore

SCHEMA = 1
CACHE = "summary.json"
LEVELS: tuple[Level, ...] = get_args(Level)
THUMBNAILS = (("export", "neutral.jpg"), ("train", "preview.jpg"), ("fit", "neutral.jpg"), ("decode", "contact.jpg"))
"""Pictures to know a subject by, the best first."""

Standing = Literal["fresh", "stale", "missing", "partial", "failed", "running", "unreadable"]
STANDINGS: tuple[Standing, ...] = get_args(Standing)


@dataclass(frozen=True)
class StageSummary:
    """How one stage stands."""

    stage: str
    state: StateName
    why: str = ""
    """Why it is not fresh; the error where it failed."""
    fix: str = ""
    """What a failed stage said to do next."""
    failed_at: str | None = None
    key: str | None = None
    level: Level | None = None
    """The verdict of the finished files, be they fresh or not."""
    text: str = ""
    picture: str = ""
    seconds: float | None = None
    finished: str | None = None
    """When its files were finished, ISO 8601."""
    bytes: int = 0
    """Size of its finished files, as the manifest lists them."""


@dataclass(frozen=True)
class Summary:
    """How one subject stands."""

    subject: str
    standing: Standing
    """`running` where a run holds it, else `failed` where a stage is, else the state of the first that is not fresh."""
    why: str = ""
    """Why it is not fresh, with the stage's name."""
    fix: str = ""
    stages: tuple[StageSummary, ...] = ()
    """In the order in which they run; none where the record of the last run cannot be read."""
    preset: str | None = None
    avatar: str | None = None
    """The avatar model that is trained, or is to be."""
    psnr: float | None = None
    """dB on held-out frames, as evaluated."""
    psnr_baseline: float | None = None
    """dB of the best baseline."""
    thumbnail: str | None = None
    """Path of a picture, relative to the subject's folder."""
    report: str | None = None
    """Path of the report, relative to the subject's folder; None where there is none."""
    progress: Progress | None = None
    """How far a running stage is."""

    @property
    def level(self) -> Level | None:
        """The worst verdict."""
        return max((stage.level for stage in self.stages if stage.level), key=LEVELS.index, default=None)

    @property
    def verdict(self) -> str:
        """The text of the worst verdict, of the last stage that gave it."""
        return next((stage.text for stage in reversed(self.stages) if stage.level == self.level), "")

    @property
    def bytes(self) -> int:
        """Size of all finished files."""
        return sum(stage.bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Time that the finished stages took."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def first_finished(self) -> datetime | None:
        """When the first of the stages' files were finished."""
        return min(self._times("finished"), default=None)

    @property
    def last_finished(self) -> datetime | None:
        """When the last of the stages' files were finished."""
        return max(self._times("finished"), default=None)

    @property
    def failed_at(self) -> datetime | None:
        """When a stage that has failed did so last."""
        return max(self._times("failed_at"), default=None)

    def _times(self, name: str) -> list[datetime]:
        times = [_time(getattr(stage, name)) for stage in self.stages]
        return [time for time in times if time is not None]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return plain

    @staticmethod
    def from_json(data: Any) -> Summary:
        """The summary that `to_json` gave.

        Raises:
            ValueError: it gave no such thing.
        """
        summary: Summary = _adapter().validate_python(data)
        return summary


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Summary)


def summarize(subject: Subject, stages: Sequence[Stage], *, verify: bool = False) -> Summary:
    """How a subject stands by its manifests.

    Args:
        subject: one that exists.
        stages: in the order in which they run.
        verify: read and hash every output, too; otherwise none is looked at.
    """
    return _Summarizer(stages, verify).summarize(subject)


def summaries(dataset: Dataset, stages: Sequence[Stage], *, verify: bool = False) -> list[Summary]:
    """How every subject of a dataset stands, by name."""
    summarizer = _Summarizer(stages, verify)
    return [summarizer.summarize(subject) for subject in dataset.subjects()]


def stored_summaries(store: DatasetStore, stages: Sequence[Stage], names: Sequence[str] | None = None) -> list[Summary]:
    """How subjects stand on an object store by its manifests, by name; none of their files is brought.

    Args:
        store: where the dataset is.
        stages: in the order in which they run.
        names: the subjects; by default all.
    """
    with tempfile.TemporaryDirectory(prefix="headcast-") as folder:
        store.outline(Path(folder), names)
        return summaries(Dataset(Path(folder)), stages)


def age_text(when: datetime | None, now: datetime) -> str:
    """`just now`, `5 min`, `3 h`, `12 days`; empty where there is no time."""
    if when is None:
        return ""
    minutes = (now - when).total_seconds() // 60
    if minutes < 1:
        return "just now"
    hours = minutes // 60
    return f"{minutes:.0f} min" if minutes < 60 else f"{hours:.0f} h" if hours < 48 else f"{hours // 24:.0f} days"


def mending_command(summary: Summary, data: Path) -> str | None:
    """What to type to bring the subject up to date; None where nothing is to be done, or a run is at it, or more is
    needed (`Summary.fix`)."""
    import shlex

    if summary.standing in ("fresh", "running", "unreadable"):
        return None
    where = [] if data == Path("data") else ["--data", str(data)]
    return shlex.join(["headcast", "rerun", summary.subject, *where])


class _Summarizer:
    """Summarises subjects; what depends on the settings alone is worked out once for all that share them."""

    def __init__(self, stages: Sequence[Stage], verify: bool) -> None:
        self._stages, self._verify = stages, verify
        self._recipes: dict[Config, str] = {}

    def summarize(self, subject: Subject) -> Summary:
        try:
            config = last_config(subject)
            if self._verify:
                summary = _digest(subject, self._stages, config, verify=True)
            else:
                summary = self._cached(subject, config) or self._remember(subject, config)
        except UserError as error:
            summary = Summary(subject.name, "unreadable", error.what, error.fix)
        return self._at_present(subject, summary)

    def _cached(self, subject: Subject, config: Config) -> Summary | None:
        try:
            record = json.loads((subject.work / CACHE).read_bytes())
            if record["seal"] == self._seal(_stamps(subject, self._stages), config, record["summary"]):
                summary = Summary.from_json(record["summary"])
                return summary if summary.subject == subject.name else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        return None

    def _remember(self, subject: Subject, config: Config) -> Summary:
        """Make the summary, and keep it where that can be done and is safe."""
        began = _file_system_time(subject.work)
        stamps = _stamps(subject, self._stages)
        summary = _digest(subject, self._stages, config, verify=False)
        # A file changed in this very tick of the file system's clock could change once more under the same stamp.
        if began is not None and all(stamp is None or max(stamp[:2]) < began for stamp in stamps):
            plain = summary.to_json()
            record = {"seal": self._seal(stamps, config, plain), "summary": plain}
            with contextlib.suppress(OSError):
                write_atomic(subject.work / CACHE, json.dumps(record, ensure_ascii=False).encode(), sync=False)
        return summary

    def _seal(self, stamps: list[list[int] | None], config: Config, summary: Any) -> str:
        """Digest of a summary's contents and of all that it was made from."""
        if config not in self._recipes:
            declared = [[s.name, s.version, s.inputs, s.reads, s.data(config)] for s in self._stages]
            self._recipes[config] = canonical_json([SCHEMA, __version__, config.model_dump(mode="json"), declared])
        return hashlib.sha256((self._recipes[config] + canonical_json([stamps, summary])).encode()).hexdigest()

    def _at_present(self, subject: Subject, summary: Summary) -> Summary:
        """Add what changes without the manifests: runs, attempts, the report."""
        running = subject.running()
        stages = []
        for stage, told in zip(self._stages, summary.stages, strict=False):
            attempt = attempt_at(subject, stage, told.key, running) if told.state != "fresh" else None
            if attempt is not None:
                told = replace(told, state=attempt.name, why=attempt.why, fix=attempt.fix, failed_at=attempt.failed_at)
            stages.append(told)
        progress = read_progress(subject.progress) if running else None
        report = subject.report.name if subject.report.is_file() else None
        summary = replace(summary, stages=tuple(stages), progress=progress, report=report)
        failed = next((stage for stage in stages if stage.state == "failed"), None)
        first = failed or next((stage for stage in stages if stage.state != "fresh"), None)
        if running:
            return replace(summary, standing="running", why=progress.line() if progress else "a run holds it")
        if first is None or first.state == "waiting":  # a stage waits for an earlier one, which is the first
            return summary
        return replace(summary, standing=first.state, why=f"{first.stage}: {first.why}", fix=first.fix)


def _stamps(subject: Subject, stages: Sequence[Stage]) -> list[list[int] | None]:
    """What tells whether source and manifests changed without reading them; None for what is not there.

    The time of the last change of the file itself, which nobody can set, stands beside the mtime.
    """
    stamps: list[list[int] | None] = []
    for path in ("source/source.json", *(f"{stage.name}/{MANIFEST}" for stage in stages)):
        try:
            status = os.stat(f"{subject.root}/{path}")  # noqa: PTH116  a Path costs more than the look at it
        except OSError:
            stamps.append(None)
        else:
            stamps.append([status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino])
    return stamps


def _file_system_time(folder: Path) -> int | None:
    """What the file system that holds a folder would stamp a change with now, in ns; None where it takes none."""
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _digest(subject: Subject, stages: Sequence[Stage], config: Config, *, verify: bool) -> Summary:
    """What the manifests say of a subject. They come from outside: what does not fit is left out."""
    states = published_states(subject, stages, config, verify=verify)
    manifests = {state.stage: state.manifest or {} for state in states}
    metrics, trained = _part(manifests.get("evaluate"), "metrics"), manifests.get("train") or {}
    baselines = _part(metrics, "baselines")
    rivals = [_number(_part(baselines, name).get("psnr")) for name in baselines]
    return Summary(
        subject=subject.name,
        standing="fresh",
        stages=tuple(_stage_summary(state) for state in states),
        preset=_text(trained.get("preset")) or config.preset,
        avatar=_text(_part(trained, "config").get("avatar")) or config.train.avatar,
        psnr=_number(_part(metrics, "test").get("psnr")),
        psnr_baseline=max((rival for rival in rivals if rival is not None), default=None),
        thumbnail=next((f"{name}/{file}" for name, file in THUMBNAILS if _lists(manifests.get(name), file)), None),
    )


def _stage_summary(state: State) -> StageSummary:
    manifest = state.manifest or {}
    verdict = _part(manifest, "verdict")
    level = verdict.get("level")
    finished = manifest.get("finished")
    return StageSummary(
        stage=state.stage,
        state=state.name,
        why=_text(state.why),
        key=state.key,
        level=level if level in LEVELS else None,
        text=_text(verdict.get("text")),
        picture=_text(verdict.get("picture")),
        seconds=_number(manifest.get("seconds")),
        finished=finished if _time(finished) else None,
        bytes=sum(entry["size"] for entry in manifest.get("outputs", [])),
    )


def _part(record: Any, name: str) -> dict[str, Any]:
    part = record.get(name) if isinstance(record, dict) else None
    return part if isinstance(part, dict) else {}


def _lists(manifest: dict[str, Any] | None, path: str) -> bool:
    return any(entry["path"] == path for entry in (manifest or {}).get("outputs", []))


def _text(value: Any) -> str:
    """A text that can be written; half a surrogate pair, which JSON can smuggle in, cannot."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None


def _time(text: Any) -> datetime | None:
    """A time with its zone; None where the text is none."""
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else None
