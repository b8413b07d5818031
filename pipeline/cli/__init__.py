"""The command line. Light at the top: `headcast --help` must not wait for torch or Prefect."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import tyro

from pipeline import __version__
from pipeline.cli.assets import Assets
from pipeline.cli.batch import Batch, Nightly
from pipeline.cli.bench import Bench
from pipeline.cli.common import Common
from pipeline.cli.compare import Compare
from pipeline.cli.doctor import Doctor
from pipeline.cli.export import Export
from pipeline.cli.importing import Import
from pipeline.cli.reenact import Reenact
from pipeline.cli.render import Render
from pipeline.cli.run import Demo, Rerun, Run
from pipeline.cli.service import Cancel, Queue, Serve, Submit
from pipeline.cli.status import Page, Status
from pipeline.cli.view import View
from pipeline.errors import HeadcastError, Interrupted, UserError
from pipeline.logs import VARIABLE, json_line, set_up_logging
from pipeline.threads import one_blas_thread

COMMANDS: dict[str, Callable[..., Common]] = {
    "run": Run,
    "import": Import,
    "batch": Batch,
    "nightly": Nightly,
    "status": Status,
    "page": Page,
    "rerun": Rerun,
    "serve": Serve,
    "submit": Submit,
    "queue": Queue,
    "cancel": Cancel,
    "doctor": Doctor,
    "assets": Assets,
    "demo": Demo,
    "view": View,
    "reenact": Reenact,
    "render": Render,
    "export": Export,
    "compare": Compare,
    "bench": Bench,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: parse, run, print errors bare, exit with the promised code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["version"]):
        sys.stdout.write(f"headcast {__version__}\n")
        return
    one_blas_thread()
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="headcast",
        description="From a video of one person to a head avatar that can be driven. Start with: headcast demo",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    sys.exit(execute(command))


def execute(command: Common) -> int:
    """Run a parsed command and return its exit code."""
    with _stdout_kept_clean(command.json) as answer:
        try:
            set_up_logging(command.verbose)
            document, text, code = command.answer()
        except (HeadcastError, KeyboardInterrupt) as error:
            return _report_error(command, error, answer)
        except ValueError as error:
            if (refused := _refused_option(error)) is None:
                raise
            return _report_error(command, refused, answer)
        answer(json.dumps(document, indent=2, ensure_ascii=False) if command.json else text)
        return code


def _refused_option(error: ValueError) -> UserError | None:
    """What a request that refuses an option says of it, or None for any other error."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return None
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]).replace("_", "-")
    return UserError(f"'{first['input']}' cannot be the {name}: {first['msg']}.", "see headcast COMMAND --help")


@contextlib.contextmanager
def _stdout_kept_clean(as_json: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that prints the answer; with `--json`, whatever else is printed goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    if as_json:
        os.dup2(2, 1)
    try:
        with open(kept, "w", closefd=False) as stream:

            def answer(text: str) -> None:
                stream.write(text + "\n")
                stream.flush()

            yield answer
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _report_error(command: Common, error: BaseException, answer: Callable[[str], None]) -> int:
    """Print an error for a person, and as JSON when asked; after a stop, the command that resumes comes last."""
    if command.verbose:
        logging.getLogger(__name__).debug("traceback", exc_info=error)
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    failure = error if isinstance(error, HeadcastError) else Interrupted("Stopped. What is finished is kept.")
    resume = command.resume_command() if stopped else None
    if os.environ.get(VARIABLE) == "json":
        kind = ("info", "stopped") if stopped else ("error", "error")
        sys.stderr.write(json_line(*kind, failure.what, fix=failure.fix or None, resume=resume))
    else:
        sys.stderr.write(f"{'' if stopped else 'error: '}{failure}\n")
        if resume:
            sys.stderr.write(f"To go on: {resume}\n")
    if command.json:
        error_data = {"what": failure.what, "fix": failure.fix, "resume": resume}
        answer(json.dumps({"schema": 1, "error": error_data}, indent=2, ensure_ascii=False))
    return failure.exit_code
