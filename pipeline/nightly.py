"""What a night has to do: what is new, stale, begun or failed in a dataset, oldest first, within a budget of time.

Manifests are believed (`pipeline.summary`), so that a thousand finished subjects are passed over in a few seconds.
`flows/nightly.py` carries the plan out with the machinery of the batch.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.batch import Outcome, Pool, batch_document, read_subjects
from pipeline.dataset import Dataset, canonical_json, read_json, write_json
from pipeline.errors import UserError
from pipeline.frames import counted
from pipeline.run import RunRequest
from pipeline.source import is_registered
from pipeline.stage import Stage
from pipeline.store import open_store
from pipeline.summary import Summary, stored_summaries, summaries, summarize

SCHEMA = 1
MEMORY = ".nightly.json"
SETTLED_SECONDS = 60.0
"""A video that was written to later than so long ago may still be arriving."""
LONG_AGO = datetime.min.replace(tzinfo=UTC)

Reason = Literal["new", "stale", "failed", "partial"]
_REASONS: dict[str, Reason] = {
    "missing": "new",
    "stale": "stale",
    "partial": "partial",
    "failed": "failed",
    "unreadable": "failed",
}


class NightlyRequest(Pool):
    """What a night may do, as typed on the command line or given to a deployment."""

    inbox: Path | None = None
    """A folder in which new videos arrive; it is read as a batch reads a folder."""
    budget_hours: float = Field(8.0, gt=0)
    """Nothing is begun that is not expected to end within so many hours."""
    hard: bool = False
    """Stop what is still at work when the budget is over; by default it may end."""
    max_failures: int = Field(3, ge=1)
    """A subject that failed in so many nights in a row is left alone until its video or its settings change."""
    verify: bool = False
    """Read every file of finished subjects to see that it is whole; by default the manifests are believed."""


@dataclass(frozen=True)
class Candidate:
    """A subject that is not up to date."""

    subject: str
    reason: Reason
    why: str
    waiting_since: datetime | None
    seconds: float | None
    """How long it is expected to take, from what its manifests or those of others tell; None where none does."""
    key: str
    """Stands for what is to be done; a failure is the same one where this is the same."""
    run: RunRequest
    left: str = ""
    """Why it is left alone this night; empty where it is to be done."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the run."""
        since = self.waiting_since.isoformat(timespec="seconds") if self.waiting_since else None
        return {
            "subject": self.subject,
            "reason": self.reason,
            "why": self.why,
            "waiting_since": since,
            "seconds": self.seconds,
            "left": self.left or None,
        }


@dataclass(frozen=True)
class Plan:
    """What a night has to do, the one that waits longest first, and what of the inbox cannot be used."""

    candidates: tuple[Candidate, ...]
    faults: tuple[str, ...] = ()

    @property
    def due(self) -> list[Candidate]:
        """The candidates that are not left alone."""
        return [candidate for candidate in self.candidates if not candidate.left]


def plan(request: NightlyRequest, stages: Sequence[Stage]) -> Plan:
    """Find what is new, stale, begun or failed. Reads only.

    Raises:
        UserError: the inbox is no folder, or the store none.
        Unavailable: the store does not answer.
    """
    dataset = Dataset(request.data)
    standing = _standings(request, stages)
    durations = _Durations(standing.values())
    memory = _Memory(request.data)
    found = []
    for summary in standing.values():
        if (candidate := _known_subject(request, dataset, summary, durations)) is not None:
            found.append(candidate)
    arrived, faults = _inbox(request, dataset, stages, durations)
    by_name = {candidate.subject: candidate for candidate in (*found, *arrived)}
    ready = [_unless_hopeless(candidate, memory, request.max_failures) for candidate in by_name.values()]
    ready.sort(key=lambda candidate: (candidate.waiting_since or LONG_AGO, candidate.subject))
    return Plan(tuple(ready), tuple(faults))


def _standings(request: NightlyRequest, stages: Sequence[Stage]) -> dict[str, Summary]:
    """How each subject stands, in the dataset and on its object store if it has one.

    What is fresh there is done. What is not counts as it stands here, where failures are known; where it is fresh here
    it only has to be taken there.
    """
    here = {summary.subject: summary for summary in summaries(Dataset(request.data), stages, verify=request.verify)}
    if request.store is None:
        return here
    store = open_store(request.store)
    store.check()
    there = {summary.subject: summary for summary in stored_summaries(store, stages)}
    ahead = f"finished here, not in '{store.url}' yet"
    known = {
        name: replace(told, standing="partial", why=ahead, stages=()) if told.standing == "fresh" else told
        for name, told in here.items()
    }
    done = {name: told for name, told in there.items() if told.standing == "fresh"}
    return {**there, **known, **done}


def _known_subject(
    request: NightlyRequest, dataset: Dataset, summary: Summary, durations: _Durations
) -> Candidate | None:
    """What there is to do for a subject of the dataset; None where it is fresh or at work."""
    if summary.standing in ("fresh", "running"):
        return None
    subject = dataset.subject(summary.subject)
    unreadable = summary.standing == "unreadable"
    todo = [stage.stage for stage in summary.stages if stage.state != "fresh"]
    return Candidate(
        subject.name,
        _REASONS[summary.standing],
        summary.why,
        summary.failed_at or summary.last_finished or _changed_at([subject.source / "source.json"]),
        None if unreadable else durations.expected(summary.preset, summary.avatar, todo, summary),
        _key_of(summary),
        RunRequest(**request.run_options(), subject=subject.name),
        left=summary.fix if unreadable else "",
    )


def _inbox(
    request: NightlyRequest, dataset: Dataset, stages: Sequence[Stage], durations: _Durations
) -> tuple[list[Candidate], list[str]]:
    """What has arrived and is not in the dataset as it is, and what cannot be used."""
    if request.inbox is None:
        return [], []
    if not request.inbox.is_dir():
        raise UserError(f"The inbox '{request.inbox}' is no folder.", "name the folder in which videos arrive")
    if not any(not path.name.startswith(".") for path in request.inbox.iterdir()):
        return [], []
    reading = read_subjects(request, [str(request.inbox)])
    found = []
    for run in reading.runs:
        subject = run.target()
        if is_registered(subject, run.videos):
            continue
        known = subject.source.is_dir()
        since = _changed_at(run.videos)
        age = time.time() - since.timestamp() if since else None
        found.append(
            Candidate(
                subject.name,
                "stale" if known else "new",
                "its video was changed" if known else "not in the dataset yet",
                since,
                durations.expected(run.preset, request.avatar, [stage.name for stage in stages]),
                _digest([_stamps(run.videos), run.settings, run.preset]),
                run,
                left="it is still arriving" if age is not None and 0 <= age < SETTLED_SECONDS else "",
            )
        )
    return found, [str(fault) for fault in reading.faults]


def _unless_hopeless(candidate: Candidate, memory: _Memory, max_failures: int) -> Candidate:
    """The candidate, left alone where it has failed too often without anything being changed."""
    failures = memory.failures(candidate.subject, candidate.key)
    if failures < max_failures or candidate.left:
        return candidate
    nights = counted(failures, "night")
    return replace(candidate, left=f"failed in {nights} in a row; change its video or settings, or run it by hand")


class _Durations:
    """How long stages took, by preset and avatar model."""

    def __init__(self, known: Iterable[Summary]) -> None:
        self._took: dict[tuple[str | None, str | None, str], list[float]] = {}
        for summary in known:
            for stage in summary.stages:
                if stage.seconds is not None and stage.seconds >= 0:
                    self._took.setdefault((summary.preset, summary.avatar, stage.stage), []).append(stage.seconds)

    def expected(
        self, preset: str | None, avatar: str | None, stages: Sequence[str], own: Summary | None = None
    ) -> float | None:
        """Seconds that these stages take: as in the subject's own manifests, else in the middle of others like it."""
        before = {stage.stage: stage.seconds for stage in own.stages} if own is not None else {}
        total = 0.0
        for name in stages:
            others = self._took.get((preset, avatar, name))
            seconds = before.get(name)
            if seconds is None and others:
                seconds = statistics.median(others)
            if seconds is None:
                return None
            total += seconds
        return round(total, 1)


class _Memory:
    """Which subjects failed in the last nights, how often, at what; kept in `DATA/.nightly.json`."""

    def __init__(self, data: Path) -> None:
        self._path = data / MEMORY
        try:
            entries = read_json(self._path)["failures"]
            self._failures = {str(name): (str(e["key"]), int(e["nights"])) for name, e in entries.items()}
        except (UserError, ValueError, KeyError, TypeError, AttributeError):
            self._failures = {}

    def failures(self, subject: str, key: str) -> int:
        """Nights in a row in which the subject failed at this."""
        known, nights = self._failures.get(subject, ("", 0))
        return nights if known == key else 0

    def remember(self, subject: str, key: str | None) -> None:
        """Note a night: at what the subject failed, or None where it did not."""
        if key is None:
            self._failures.pop(subject, None)
        else:
            self._failures[subject] = (key, self.failures(subject, key) + 1)

    def save(self) -> None:
        entries = {name: {"key": key, "nights": nights} for name, (key, nights) in sorted(self._failures.items())}
        write_json(self._path, {"schema": SCHEMA, "failures": entries})


def remember_night(
    request: NightlyRequest, candidates: Sequence[Candidate], outcomes: Sequence[Outcome], stages: Sequence[Stage]
) -> None:
    """Keep for the next night who failed at what."""
    memory, dataset = _Memory(request.data), Dataset(request.data)
    keys = {candidate.subject: candidate.key for candidate in candidates}
    for outcome in outcomes:
        if outcome.outcome == "stopped":
            continue
        key = None
        if outcome.outcome == "failed":
            subject = dataset.subject(outcome.subject)
            # At what it failed is known better now; a video that was refused has left no subject.
            key = _key_of(summarize(subject, stages)) if outcome.stage else keys[outcome.subject]
        memory.remember(outcome.subject, key)
    memory.save()


def _key_of(summary: Summary) -> str:
    """Key of the stage that has failed, or else of the first that is not fresh."""
    states = [stage for stage in summary.stages if stage.state != "fresh"]
    first = next((stage for stage in states if stage.state == "failed"), states[0] if states else None)
    return (first.key or first.stage) if first is not None else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _stamps(paths: Sequence[Path]) -> list[list[Any]]:
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in _files(paths)]


def _changed_at(paths: Sequence[Path]) -> datetime | None:
    """When the last of these files was written to; None where one is gone."""
    try:
        return datetime.fromtimestamp(max(file.stat().st_mtime for file in _files(paths)), UTC)
    except (OSError, ValueError, OverflowError):
        return None


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(path.iterdir()) if path.is_dir() else (path,)


@dataclass(frozen=True)
class Night:
    """The account of a night."""

    outcomes: tuple[Outcome, ...]
    left: tuple[tuple[str, str], ...]
    """Subjects that were not begun, and why."""
    faults: tuple[str, ...]
    """What of the inbox cannot be used."""
    hours: float
    budget_hours: float
    interrupted: bool = False
    """Whether it was stopped before its budget was over."""

    @staticmethod
    def idle(planned: Plan, request: NightlyRequest) -> Night:
        """A night in which there is nothing to do."""
        left = tuple((candidate.subject, candidate.left) for candidate in planned.candidates)
        return Night((), left, planned.faults, 0.0, request.budget_hours)

    def to_json(self) -> dict[str, Any]:
        """Plain data, a batch's account with what a night has besides."""
        return {
            **batch_document(self.outcomes),
            "left": [{"subject": subject, "why": why} for subject, why in self.left],
            "faults": list(self.faults),
            "hours": round(self.hours, 3),
            "budget_hours": self.budget_hours,
            "interrupted": self.interrupted,
            "summary": self.markdown(),
        }

    def markdown(self) -> str:
        """A page to read in the morning."""
        ended = [outcome for outcome in self.outcomes if outcome.outcome in ("done", "fresh")]
        failed = [outcome for outcome in self.outcomes if outcome.outcome == "failed"]
        stopped = [outcome.subject for outcome in self.outcomes if outcome.outcome == "stopped"]
        left = [*self.left, *((subject, "stopped; it goes on where it was") for subject in stopped)]
        lines = [f"{self.hours:.1f} of {self.budget_hours:g} hours used: {len(ended)} done, {len(failed)} failed, "]
        lines[0] += f"{len(left)} left."
        for title, entries in (
            ("Done", [outcome.line() for outcome in ended]),
            ("Failed", [outcome.line() for outcome in failed]),
            ("Left for another night", [f"{subject}: {why}" for subject, why in left]),
            ("In the inbox and of no use", list(self.faults)),
        ):
            if entries:
                lines += ["", f"## {title}", "", *(f"- {_plain(entry)}" for entry in entries)]
        return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text whose marks Markdown leaves alone, on one line."""
    escaped = "".join(f"\\{mark}" if mark in "\\`*_[]<>#|" else mark for mark in text)
    return " ".join(escaped.split())


def plan_document(planned: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    candidates = [candidate.to_json() for candidate in planned.candidates]
    return {"schema": SCHEMA, "candidates": candidates, "faults": list(planned.faults)}


def plan_table(planned: Plan, request: NightlyRequest) -> str:
    """The plan in lines: what would be done in which order and why, and what would be left."""
    lines = []
    remaining = 3600 * request.budget_hours * request.subjects_at_a_time()
    for number, candidate in enumerate(planned.due, 1):
        since = f"since {candidate.waiting_since:%Y-%m-%d %H:%M}" if candidate.waiting_since else ""
        takes = "takes an unknown time"
        if candidate.seconds is not None:
            takes = f"takes about {_duration(candidate.seconds)}"
            remaining -= candidate.seconds
        late = "; more than the budget may hold" if remaining < 0 else ""
        parts = (candidate.reason, since, takes + late)
        lines.append(f"{number}. {candidate.subject}: {', '.join(part for part in parts if part)} ({candidate.why})")
    lines += [f"-  {c.subject}: {c.reason}, left alone: {c.left}" for c in planned.candidates if c.left]
    lines += [f"-  {fault}" for fault in planned.faults]
    known = [candidate.seconds for candidate in planned.due if candidate.seconds is not None]
    lines.append(f"{counted(len(planned.due), 'subject')} to do, about {_duration(sum(known))} of work known.")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
