"""`headcast status` and `headcast page`: how the subjects stand."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from pipeline.cli.common import Answer, Common, Store
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.summary import Summary


@dataclass(frozen=True)
class Status(Common):
    """Show what is fresh, stale, failed or running, and why.

    One subject's files are read and hashed; of all subjects the manifests are believed, which tells a thousand in a
    second.
    """

    subject: tyro.conf.Positional[str | None] = None
    """One subject in detail; by default all of them, a line each."""
    store: Store = None
    """How the subjects stand on an object store, such as s3://bucket/folder, by its manifests; no file is brought."""
    verify: bool = False
    """Read and hash the files of all subjects too."""
    watch: bool = False
    """Keep showing it, with the progress of running stages, until Ctrl+C. Nothing is hashed."""
    every: float = 2.0
    """Seconds between two looks while watching."""

    def answer(self) -> Answer:
        from pipeline.dataset import Dataset
        from pipeline.run import account, last_config
        from pipeline.stage import inspect_stages
        from pipeline.summary import summaries
        from stages import STAGES

        if self.store is not None:
            return self._stored(self.store)
        dataset = Dataset(self.data)
        subject = dataset.existing(self.subject) if self.subject else None
        if self.watch:
            return self._watch()
        if subject is not None:
            document = account(subject, inspect_stages(subject, STAGES, last_config(subject)))
            return document, _detail(document), 0
        told = summaries(dataset, STAGES, verify=self.verify)
        return {"schema": 1, "subjects": [account_of(s, dataset.root) for s in told]}, _table(told, self.data), 0

    def _stored(self, url: str) -> Answer:
        from pipeline.store import open_store
        from pipeline.summary import stored_summaries
        from stages import STAGES

        if self.watch or self.verify:
            raise UserError(
                f"--store does not go with --{'watch' if self.watch else 'verify'}.", "leave one of them out"
            )
        store = open_store(url)
        store.check()
        told = stored_summaries(store, STAGES, [self.subject] if self.subject else None)
        documents = [account_of(summary, self.data) for summary in told]
        for document in documents:
            document["folder"] = f"{store.url}/{document['subject']}"
            document["report"] = document["report"] and f"{document['folder']}/{Path(document['report']).name}"
        if self.subject is None:
            return {"schema": 1, "subjects": documents}, _table(told, store.url), 0
        if not documents:
            raise UserError(f"No subject '{self.subject}' in '{store.url}'.", f"headcast status --store {store.url}")
        return documents[0], _detail(documents[0]), 0

    def _watch(self) -> Answer:
        from pipeline.dataset import Dataset
        from pipeline.summary import summaries, summarize
        from stages import STAGES

        if self.json or self.verify:
            raise UserError(f"--watch does not go with --{'json' if self.json else 'verify'}.", "leave one of them out")
        if not 0.1 <= self.every <= 86_400:
            raise UserError(f"--every is {self.every:g}.", "give seconds from 0.1 to 86400")
        dataset = Dataset(self.data)

        def look() -> str:
            if self.subject is None:
                told = summaries(dataset, STAGES)
                return _table(sorted(told, key=lambda s: s.standing in ("fresh", "missing", "stale")), self.data)
            summary = summarize(dataset.existing(self.subject), STAGES)
            return "\n".join(filter(None, (_detail(account_of(summary, dataset.root)), _progress(summary))))

        show = _redraw if sys.stdout.isatty() else _print_changes
        return {}, show(look, self.every), 0


@dataclass(frozen=True)
class Page(Common):
    """Write the dataset's page, DATA/index.html, and its figures for Prometheus, DATA/metrics.prom."""

    def answer(self) -> Answer:
        from pipeline.dataset import Dataset
        from pipeline.dataset_page import METRICS, write_dataset_page
        from pipeline.run import check_writable
        from stages import STAGES

        dataset = Dataset(self.data)
        if not dataset.root.is_dir():
            raise UserError(f"There is no data folder '{self.data}'.", "name it with --data")
        check_writable(self.data)
        page = write_dataset_page(dataset, STAGES)
        return {"schema": 1, "page": str(page), "metrics": str(dataset.root / METRICS)}, str(page), 0


def account_of(summary: Summary, data: Path) -> dict[str, Any]:
    """A summary with the keys of `pipeline.run.account`; a stage's metrics are null, more is told of the subject."""
    folder = data / summary.subject
    stages = [
        {
            "stage": stage.stage,
            "state": stage.state,
            "why": stage.why,
            "ran": False,
            "key": stage.key,
            "seconds": stage.seconds,
            "finished": stage.finished,
            "verdict": {"level": stage.level, "text": stage.text, "picture": stage.picture} if stage.level else None,
            "metrics": None,
        }
        for stage in summary.stages
    ]
    plain = summary.to_json()
    more = ("standing", "why", "fix", "preset", "avatar", "psnr", "psnr_baseline", "progress")
    return {
        "schema": 1,
        "subject": summary.subject,
        "folder": str(folder),
        "report": str(folder / summary.report) if summary.report else None,
        "fresh": bool(stages) and all(stage["state"] == "fresh" for stage in stages),
        "stages": stages,
        **{name: plain[name] for name in more},
        "level": summary.level,
        "bytes": summary.bytes,
    }


def _detail(document: dict[str, Any]) -> str:
    """A line for each stage of one subject."""
    lines = [f"{document['subject']}  ({document['folder']})"]
    for stage in document["stages"]:
        verdict = (stage["verdict"] or {}).get("text", "")
        tail = stage["why"] if stage["state"] != "fresh" else verdict
        lines.append(f"  {stage['stage']:<9}{stage['state']:<9}{_plain(tail)}")
    if document.get("standing") == "unreadable":
        lines.append(f"  {_plain(document['why'])}\n  -> {_plain(document['fix'])}")
    if document["report"]:
        lines.append(f"  report   {document['report']}")
    return "\n".join(lines)


def _progress(summary: Summary) -> str:
    return f"  now      {_plain(summary.progress.line())}" if summary.progress else ""


def _table(told: Sequence[Summary], data: Path | str) -> str:
    """A line for each subject, and how many stand how; `data` is where they are."""
    from pipeline.report import bytes_text
    from pipeline.summary import STANDINGS

    if not told:
        return f"No subjects in '{data}'."
    now = datetime.now(UTC)
    titles: tuple[str, ...] = ("subject", "standing", "verdict", "dB (best baseline)", "age", "why")
    rows = [titles, *(_row(summary, now, Path(data)) for summary in told)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join([*map(str.ljust, row[:5], widths), row[5]]).rstrip() for row in rows]
    counts = {name: sum(summary.standing == name for summary in told) for name in STANDINGS}
    standing = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    size = bytes_text(sum(summary.bytes for summary in told))
    return "\n".join([*lines, f"{len(told)} subject{'s' * (len(told) != 1)}: {standing}; {size}."])


def _row(summary: Summary, now: datetime, data: Path) -> tuple[str, ...]:
    from pipeline.report import figure_text
    from pipeline.summary import age_text, mending_command

    psnr = "" if summary.psnr is None else f"{figure_text(summary.psnr)} ({figure_text(summary.psnr_baseline)})"
    when = summary.failed_at if summary.standing == "failed" else summary.last_finished
    todo = mending_command(summary, data) if summary.standing == "failed" else summary.fix
    why = _plain(f"{summary.why} -> {todo}" if todo else summary.why)
    return summary.subject, summary.standing, summary.level or "", psnr, age_text(when, now), why


def _plain(text: str) -> str:
    """Text from a file on one line, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _redraw(look: Callable[[], str], every_seconds: float) -> str:
    """Redraw in a terminal until Ctrl+C; gives what was seen last."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    text, console = look(), Console(highlight=False)
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                seen = _fitted(text.splitlines(), console.height - 1)
                live.update(Text("\n".join(seen), no_wrap=True, overflow="ellipsis"), refresh=True)
                time.sleep(every_seconds)
                text = look()
    except KeyboardInterrupt:
        return text


def _fitted(lines: list[str], height: int) -> list[str]:
    """As many lines as there is room for; the last one, which counts, is kept."""
    if len(lines) <= max(height, 3):
        return lines
    return [*lines[: height - 2], f"({len(lines) - height + 1} more)", lines[-1]]


def _print_changes(look: Callable[[], str], every_seconds: float) -> str:
    """Print the lines that are new at each look until Ctrl+C; gives the last look's last line."""
    seen: set[str] = set()
    lines: list[str] = []
    try:
        while True:
            lines = look().splitlines()
            sys.stdout.writelines(f"{line}\n" for line in lines if line not in seen)
            sys.stdout.flush()
            seen = set(lines)
            time.sleep(every_seconds)
    except KeyboardInterrupt:
        return lines[-1] if lines else ""
