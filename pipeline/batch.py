"""Many subjects in one command: which runs a folder, a table or a pattern means, and the account of how they went.

`flows/batch.py` carries the runs out; what is decided before and told after stands here, and is shared with the nights
(`pipeline/nightly.py`).
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from pipeline.config import Avatar, Head, Preset
from pipeline.dataset import Subject, subject_name_for
from pipeline.errors import HeadcastError, UserError
from pipeline.frames import counted
from pipeline.run import STAGE_MINUTES, RunRequest, check_input, default_threads, resolve_config
from pipeline.source import check_span
from pipeline.stage import Stage
from pipeline.summary import summarize
from pipeline.video import IMAGE_SUFFIXES, natural_order

SCHEMA = 1
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".mxf", ".wmv")
"""What is taken for a video where a folder is looked through; a file that is named may be called anything."""
COLUMNS = ("video", "subject", "preset", "person", "avatar", "head", "settings", "like", "alpha")
MAX_TABLE_BYTES = 16 << 20
SHOWN_FAULTS = 20

Runner = Literal["threads", "dask", "ray"]


class Pool(BaseModel):
    """How several subjects are worked on at a time; what a batch and a night have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Path = Path("data")
    """The dataset directory."""
    store: str | None = None
    """URL of an object store that holds the dataset, such as s3://bucket/folder; `data` is then this machine's copy."""
    preset: Preset | None = None
    """Budget of new subjects, quick by default."""
    settings: tuple[str, ...] = ()
    """Changes to the preset of new subjects, each `section.field=value`."""
    avatar: Avatar = "rigged"
    """The avatar model of new subjects."""
    head: Head = "anny"
    """The head model of new subjects."""
    check: bool = True
    """Look at new videos before anything is done with them, and say what to film again."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train and render."""
    runner: Runner = "threads"
    """What carries the subjects out: threads of this process, or a Dask or Ray cluster."""
    cluster: str | None = None
    """Address of a Dask or Ray cluster that is running; by default one is started here and ended afterwards."""
    workers: int | None = Field(None, ge=1)
    """Subjects at a time; by default one for every two cores, or as many as a running cluster has workers."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each subject; by default the workers share the cores."""
    stage_minutes: float = Field(STAGE_MINUTES, gt=0)
    """Time limit of each stage, which works in a process of its own."""
    wait_minutes: float = Field(1.0, ge=0)
    """How long to wait for a subject that another run holds."""
    routes: dict[Literal["cpu", "gpu"], str] = Field(default_factory=dict)
    """Where stages of a kind are run: the deployment, as FLOW/NAME, that another work pool serves."""

    @field_validator("cluster")
    @classmethod
    def _cluster_of_a_kind(cls, cluster: str | None, info: ValidationInfo) -> str | None:
        if cluster is not None and info.data.get("runner") == "threads":
            raise ValueError("threads have no cluster; name the runner, dask or ray")
        return cluster

    def subjects_at_a_time(self) -> int:
        """Workers of a pool that is started here."""
        return self.workers or max(default_threads() // 2, 1)

    def check_runner(self) -> None:
        """Refuse a runner that is not installed.

        Raises:
            UserError: it is not.
        """
        import importlib.util

        if self.runner != "threads" and importlib.util.find_spec(f"prefect_{self.runner}") is None:
            raise UserError(
                f"The runner '{self.runner}' is not installed.",
                f"install it with: pip install 'headcast[{self.runner}]'",
            )

    def run_options(self) -> dict[str, Any]:
        """What `RunRequest` takes over. Paths are absolute: a worker may have another working directory."""
        return {
            "data": self.data.absolute(),
            "store": self.store,
            "check": self.check,
            "device": self.device,
            "threads": self.threads or max(default_threads() // self.subjects_at_a_time(), 1),
            "stage_minutes": self.stage_minutes,
            "wait_minutes": self.wait_minutes,
            "routes": self.routes,
        }

    def new_subject(self, videos: Sequence[Path], row: dict[str, str] | None = None) -> RunRequest:
        """The run that makes a subject of these videos.

        Args:
            videos: clips of one person, in order.
            row: what a table says of this subject besides, by column; what it leaves out is as in the pool.

        Raises:
            UserError: a value does not fit.
        """
        row = row or {}
        settings = [
            f"train.avatar={row.get('avatar', self.avatar)}",
            f"fit.head={row.get('head', self.head)}",
            *self.settings,
            *_parts(row.get("settings", "")),
            *([f"track.person={row['person']}"] if "person" in row else []),
        ]
        given: dict[str, Any] = {
            "videos": [path.absolute() for path in videos],
            "preset": row.get("preset", self.preset or "quick"),
            "settings": settings,
            "subject": row.get("subject"),
            "like": row.get("like"),
            "alpha": _parts(row.get("alpha", "")),
        }
        try:
            return RunRequest(**self.run_options(), **given)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise UserError(f"'{first['input']}' cannot be the {name}: {first['msg']}.") from None


class BatchRequest(Pool):
    """Many subjects in one run, as typed on the command line or given to a deployment."""

    what: tuple[str, ...] = Field(min_length=1)
    """Videos, folders of them, a pattern such as `shots/*.mp4`, or a table in CSV; `read_batch` says how each is read.
    """


@dataclass(frozen=True)
class Fault:
    """Something given that cannot be used: where it stands and what is wrong with it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


@dataclass
class Reading:
    """What was read so far: the runs, where each was named, and what cannot be used."""

    runs: list[RunRequest] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _named: dict[str, str] = field(default_factory=dict)

    def take(self, where: str, make: Callable[..., RunRequest], *arguments: Any) -> None:
        """Keep a run that is sound and of a subject that comes for the first time; else note what is wrong."""
        with self.noting(where):
            run = make(*arguments)
            subject = run.target()
            if subject.name in self._named:
                raise UserError(f"subject '{subject.name}' is named before, by {self._named[subject.name]}")
            self._named[subject.name] = where
            check_span(resolve_config(run, subject).decode, len(run.videos))
            check_input(run, subject)
            self.runs.append(run)

    @contextlib.contextmanager
    def noting(self, where: str) -> Iterator[None]:
        """Note an error of the input and go on after it."""
        try:
            yield
        except UserError as error:
            self.faults.append(Fault(where, error.what.rstrip(".")))
        except OSError as error:
            self.faults.append(Fault(where, f"'{error.filename}' cannot be read: {error.strerror}"))


def read_batch(request: BatchRequest) -> list[RunRequest]:
    """The runs that a batch means, in natural order. Reads only; nothing is started or made.

    A file is one subject. In a folder, each video is a subject and so is each folder in it: its videos, or else its
    images, are the clips of one person. A pattern matches files and folders that are read like those in a folder. A
    table has a header with `video` (several separated by ';') and any of the other `COLUMNS`; an empty field means the
    batch's own value, and paths are relative to the table.

    Raises:
        UserError: anything of it cannot be used; all that is wrong is told at once, up to `SHOWN_FAULTS`.
    """
    request.check_runner()
    reading = read_subjects(request, request.what)
    if reading.faults:
        shown = [f"  {fault}" for fault in reading.faults[:SHOWN_FAULTS]]
        more = len(reading.faults) - len(shown)
        raise UserError(
            "\n".join(
                [
                    f"{counted(len(reading.faults), 'subject')} of the batch cannot be used:",
                    *shown,
                    *([f"  and {more} more"] if more else []),
                ]
            ),
            "nothing was started; put these right and give the same command again",
        )
    return reading.runs


def read_subjects(pool: Pool, what: Sequence[str]) -> Reading:
    """As `read_batch`, with what cannot be used noted beside what can."""
    reading = Reading()
    for named in what:
        path = Path(named)
        count = len(reading.runs) + len(reading.faults)
        with reading.noting(named):
            if path.is_dir():
                _read_entries(pool, sorted(path.iterdir(), key=natural_order), reading)
            elif path.suffix.lower() == ".csv":
                _read_table(pool, path, reading)
            elif path.exists() or not glob.has_magic(named):
                reading.take(named, pool.new_subject, [path])
            else:
                matches = [Path(match) for match in glob.glob(named, recursive=True)]  # noqa: PTH207
                _read_entries(pool, sorted(matches, key=natural_order), reading)
            if len(reading.runs) + len(reading.faults) == count:
                endings = ", ".join(VIDEO_SUFFIXES)
                raise UserError(f"there is no video in it (a file that ends in {endings}; or a folder of images)")
    return reading


def _read_entries(pool: Pool, entries: Sequence[Path], reading: Reading) -> None:
    """Take each video, and each folder with its clips, for a subject; other files and hidden ones are passed over."""
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.resolve() == pool.data.resolve():
                continue
            reading.take(str(entry), _folder_run, pool, entry)
        elif entry.suffix.lower() in VIDEO_SUFFIXES:
            reading.take(str(entry), pool.new_subject, [entry])


def _folder_run(pool: Pool, folder: Path) -> RunRequest:
    return pool.new_subject(_clips_in(folder), {"subject": subject_name_for(folder)})


def _clips_in(folder: Path) -> list[Path]:
    """The clips of one person in a folder: its videos in natural order, or else the folder itself with its images.

    Raises:
        UserError: it has neither.
    """
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    if videos:
        return sorted(videos, key=natural_order)
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        return [folder]
    raise UserError("there is neither a video nor an image in this folder")


def _read_table(pool: Pool, path: Path, reading: Reading) -> None:
    """Take each row of a CSV for a subject."""
    rows = csv.DictReader(io.StringIO(_table_text(path), newline=""), strict=True)
    try:
        columns = [name.strip() for name in rows.fieldnames or ()]
        _check_columns(path, columns)
        rows.fieldnames = columns
        found = False
        for row in rows:
            found = True
            reading.take(f"{path} row {rows.line_num}", _row_run, pool, path.parent, row)
    except csv.Error as error:
        raise UserError(f"it cannot be read as CSV after row {rows.line_num}: {error}") from None
    if not found:
        raise UserError("there is no row below the header")


def _table_text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"There is no file '{path}'")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise UserError(f"a table of more than {MAX_TABLE_BYTES >> 20} MB is not read")
    data = path.read_bytes()
    if not data.removeprefix(codecs.BOM_UTF8).strip():
        raise UserError("the table is empty")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"row {line} is not UTF-8; save the table as CSV in UTF-8") from None


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"there is no column '{name}'; known are {', '.join(COLUMNS)}, separated by commas")
    if "video" not in columns:
        raise UserError("there is no column 'video'")
    if len(set(columns)) < len(columns):
        raise UserError("a column comes twice")


def _row_run(pool: Pool, folder: Path, row: dict[str | None, Any]) -> RunRequest:
    if None in row:
        raise UserError("there are more fields than columns; put a field with a comma in quotes")
    given = {str(name): value.strip() for name, value in row.items() if value is not None and value.strip()}
    videos = [folder / part for part in _parts(given.pop("video", ""))]
    if not videos:
        raise UserError("no video is named")
    for name in ("like", "alpha"):
        if name in given:
            given[name] = ";".join(str((folder / part).absolute()) for part in _parts(given[name]))
    return pool.new_subject(videos, given)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


@dataclass(frozen=True)
class Outcome:
    """How it went with one subject."""

    subject: str
    outcome: Literal["done", "fresh", "failed", "stopped"]
    seconds: float = 0.0
    psnr: float | None = None
    """dB on held-out frames, as evaluated."""
    stage: str | None = None
    """Where it failed; None before the first stage."""
    what: str | None = None
    """What went wrong, and what to do about it."""
    fix: str | None = None
    report: str | None = None
    """Path of the report, where there is one."""

    def line(self) -> str:
        """`anna: done in 61 s, 34.7 dB` or `bert: failed in track: No face ... -> film the face`."""
        if self.outcome == "failed":
            where = f" in {self.stage}" if self.stage else ""
            return f"{self.subject}: failed{where}: {self.what}" + (f" -> {self.fix}" if self.fix else "")
        took = f" in {self.seconds:.0f} s" if self.outcome == "done" else ""
        quality = f", {self.psnr:.1f} dB" if self.psnr is not None else ""
        return f"{self.subject}: {self.outcome}{took}{quality}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; `error` is None or says `stage`, `what` and `fix`."""
        plain = asdict(self)
        error = {name: plain.pop(name) for name in ("stage", "what", "fix")}
        return {**plain, "error": error if self.outcome == "failed" else None}

    @staticmethod
    def from_json(plain: dict[str, Any]) -> Outcome:
        """The outcome that `to_json` gave."""
        rest = dict(plain)
        return Outcome(**(rest.pop("error") or {}), **rest)


def outcome_of(
    subject: Subject,
    stages: Sequence[Stage],
    outcome: Literal["done", "fresh", "failed", "stopped"],
    seconds: float = 0.0,
    error: HeadcastError | None = None,
) -> Outcome:
    """How it went with a subject, with what its files tell of it.

    Args:
        subject: it need not exist yet.
        stages: in order.
        outcome: how its run ended.
        seconds: how long that took.
        error: why it failed.
    """
    told = summarize(subject, stages)
    # An earlier failure may be on record that has nothing to do with this one.
    where = [stage.stage for stage in told.stages if stage.state == "failed" and error and stage.why == error.what]
    return Outcome(
        subject.name,
        outcome,
        round(seconds, 1),
        told.psnr,
        where[0] if where else None,
        error.what if error is not None else None,
        error.fix if error is not None else None,
        str(subject.report) if subject.report.is_file() else None,
    )


def batch_document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The account of a batch as plain data: what `--json` prints and the flow returns."""
    return {"schema": SCHEMA, "subjects": [outcome.to_json() for outcome in outcomes]}


def outcomes_in(document: dict[str, Any]) -> list[Outcome]:
    """The outcomes that `batch_document` was given."""
    return [Outcome.from_json(plain) for plain in document["subjects"]]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """130 after a stop, else 1 where a subject failed, else 0."""
    ended = {outcome.outcome for outcome in outcomes}
    return 130 if "stopped" in ended else int("failed" in ended)


def tally(outcomes: Sequence[Outcome]) -> str:
    """`18 done, 1 fresh, 1 failed of 20 subjects`."""
    kinds = ("done", "fresh", "failed", "stopped")
    counts = [(sum(outcome.outcome == kind for outcome in outcomes), kind) for kind in kinds]
    told = ", ".join(f"{count} {kind}" for count, kind in counts if count)
    return f"{told or 'nothing'} of {counted(len(outcomes), 'subject')}"


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a subject, in columns, and the tally below."""
    width = max((len(outcome.subject) for outcome in outcomes), default=0)
    lines = []
    for outcome in outcomes:
        quality = f"{outcome.psnr:.1f} dB" if outcome.psnr is not None else ""
        tail = outcome.report or ""
        if outcome.outcome == "failed":
            tail = f"{outcome.stage + ': ' if outcome.stage else ''}{outcome.what}"
        took = f"{outcome.seconds:.0f} s" if outcome.seconds else ""
        row = f"{outcome.subject:<{width}}  {outcome.outcome:<8}{took:>8}  {quality:>8}  {tail}"
        lines.append(row.rstrip())
    return "\n".join([*lines, tally(outcomes)])
