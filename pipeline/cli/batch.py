"""`headcast batch` and `nightly`: many subjects brought up to date in one command."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.cli.common import Answer, Common, Settings, Store, start_flow
from pipeline.errors import Interrupted, UserError


@dataclass(frozen=True)
class Pool(Common):
    """Options of commands that work on many subjects."""

    store: Store = None
    """An object store that holds the dataset, such as s3://bucket/folder; --data is then this machine's copy."""
    no_check: bool = False
    """Do not look at new videos beforehand and say what to film again."""
    preset: Literal["quick", "standard", "best"] | None = None
    """Budget of new subjects, as in `headcast run`; quick by default."""
    avatar: Literal["rigged", "gaussianhead", "gaussianhead-plus"] = "rigged"
    """The avatar model."""
    head: Literal["anny", "flame", "flame2023open", "flame2023", "flame2020", "gnm"] = "anny"
    """The head model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train and render; auto takes a GPU where there is one."""
    set: Settings = ()
    """Change a setting, for example --set train.steps=500; may be given several times (docs/settings.md lists all)."""
    runner: Literal["threads", "dask", "ray"] = "threads"
    """What carries the subjects out: threads of this process, or a Dask or Ray cluster."""
    cluster: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS")] = None
    """A Dask or Ray cluster that is running, tcp://... or ray://...; by default one is started here."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Subjects at a time; by default one for every two cores, or as many as a running cluster has workers."""
    stage_minutes: Annotated[float, tyro.conf.arg(metavar="MINUTES")] = 120.0
    """Time limit of each stage, which works in a process of its own."""
    wait_minutes: Annotated[float, tyro.conf.arg(metavar="MINUTES")] = 1.0
    """How long to wait for a subject that another run holds."""

    def pool_options(self) -> dict[str, Any]:
        """What `pipeline.batch.Pool` takes of them."""
        same = ("data", "store", "preset", "avatar", "head", "device", "runner", "cluster", "workers")
        options = {name: getattr(self, name) for name in (*same, "stage_minutes", "wait_minutes")}
        return {**options, "check": not self.no_check, "settings": self.set}

    def resume_command(self) -> str | None:
        return shlex.join(["headcast", *sys.argv[1:]])

    def say_how_to_go_on(self, code: int) -> None:
        """After a stop, which still has an account to give: the command to go on with."""
        if code == Interrupted.exit_code:
            sys.stderr.write(f"Stopped. What is finished is kept.\nTo go on: {self.resume_command()}\n")


@dataclass(frozen=True)
class Batch(Pool):
    """Make avatars of many people, one after another or several at a time; one that fails stops no other.

    A file is one subject. In a folder each video is a subject, and so is each folder in it with the clips of one
    person. A pattern, in quotes, matches such files and folders. A CSV has a header: video (several separated by ';')
    and, as needed, subject, preset, person, avatar, head, settings, like, alpha.
    """

    what: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER|CSV|PATTERN|VIDEO...")] = ()
    """What to make avatars of."""

    def answer(self) -> Answer:
        from pipeline.batch import (
            BatchRequest,
            batch_document,
            exit_code,
            outcome_of,
            outcomes_in,
            read_batch,
            table,
        )
        from pipeline.run import nothing_to_do
        from stages import STAGES

        if not self.what:
            raise UserError(
                "Nothing is named.", "for example: headcast batch videos/; headcast batch --help tells more"
            )
        request = BatchRequest(what=self.what, **self.pool_options())
        runs = read_batch(request)
        if all(nothing_to_do(run, STAGES) is not None for run in runs):
            document = batch_document([outcome_of(run.target(), STAGES, "fresh") for run in runs])
        else:
            from flows.batch import batch_flow

            document = carry_out(batch_flow, request)
        outcomes = outcomes_in(document)
        code = exit_code(outcomes)
        self.say_how_to_go_on(code)
        return document, table(outcomes), code


@dataclass(frozen=True)
class Nightly(Pool):
    """Train what is new, stale, begun or failed in the dataset, the one that waits longest first, within a budget.

    For cron, or as a scheduled deployment. Subjects that are there keep the settings of their last run.
    """

    inbox: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A folder in which new videos arrive; it is read as a batch reads a folder."""
    budget_hours: Annotated[float, tyro.conf.arg(metavar="HOURS")] = 8.0
    """Nothing is begun that is not expected to end within so many hours."""
    hard: bool = False
    """Stop what is still at work when the budget is over; by default it may end."""
    max_failures: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """A subject that failed in so many nights in a row is left alone until its video or its settings change."""
    verify: bool = False
    """Read every file of finished subjects to see that it is whole; by default the manifests are believed."""
    dry_run: bool = False
    """Show what would be done in which order and why, and do nothing."""

    def answer(self) -> Answer:
        from pipeline.nightly import Night, NightlyRequest, plan, plan_document, plan_table
        from stages import STAGES

        names = ("inbox", "budget_hours", "hard", "max_failures", "verify")
        request = NightlyRequest(**self.pool_options(), **{name: getattr(self, name) for name in names})
        request.check_runner()
        planned = plan(request, STAGES)
        if self.dry_run:
            return plan_document(planned), plan_table(planned, request), 0
        if not planned.due:
            night = Night.idle(planned, request)
            return night.to_json(), night.markdown(), 0
        from flows.nightly import nightly_flow

        document = carry_out(nightly_flow, request)
        failed = any(subject["error"] for subject in document["subjects"])
        code = Interrupted.exit_code if document["interrupted"] else int(failed)
        self.say_how_to_go_on(code)
        return document, document["summary"], code


def carry_out(flow: Any, request: Any) -> dict[str, Any]:
    """The document that a flow returns, be its run failed or not.

    Raises:
        HeadcastError: it has none.
    """

    def run(request: Any) -> dict[str, Any]:
        document = flow(request, return_state=True).result(raise_on_failure=False)
        if isinstance(document, BaseException):
            raise document
        assert isinstance(document, dict)
        return document

    return start_flow(run, request)
