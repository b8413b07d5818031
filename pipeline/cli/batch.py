"""`headcast batch`: many subjects brought up to date in one command."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from pipeline.cli.common import Answer, Common, Settings, Store
from pipeline.errors import HeadcastError, UserError


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
        from pipeline.batch import BatchRequest, batch_document, outcome_of, read_batch
        from pipeline.run import nothing_to_do
        from stages import STAGES

        if not self.what:
            raise UserError(
                "Nothing is named.", "for example: headcast batch videos/; headcast batch --help tells more"
            )
        request = BatchRequest(what=self.what, **self.pool_options())
        runs = read_batch(request)
        if all(nothing_to_do(run, STAGES) is not None for run in runs):
            return self.told(batch_document([outcome_of(run.target(), STAGES, "fresh") for run in runs]))
        from flows.batch import batch_flow

        return self.told(carry_out(batch_flow, request))

    def told(self, document: dict[str, Any]) -> Answer:
        """The answer to an account of subjects; after a stop the command to go on with is said."""
        from pipeline.batch import exit_code, outcomes_in, table

        outcomes = outcomes_in(document)
        code = exit_code(outcomes)
        if code == 130:
            sys.stderr.write(f"Stopped. What is finished is kept.\nTo go on: {self.resume_command()}\n")
        return document, table(outcomes), code


def carry_out(flow: Any, request: Any) -> dict[str, Any]:
    """The document that a flow returns, be its run failed or not.

    Raises:
        HeadcastError: it has none.
    """
    try:
        document = flow(request, return_state=True).result(raise_on_failure=False)
        if isinstance(document, BaseException):
            raise document
    except (HeadcastError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever Prefect meets while it starts or talks to its server
        raise HeadcastError(
            f"The orchestrator failed: {type(error).__name__}: {error}.",
            "run the same command again, with --verbose for its log; what is finished is kept",
        ) from error
    assert isinstance(document, dict)
    return document
