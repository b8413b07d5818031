"""What every command has: its common options, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from pipeline.errors import HeadcastError, UserError

ResultT = TypeVar("ResultT")

Answer = tuple[dict[str, Any], str, int]
"""A command's answer: the document that `--json` prints, the text that is printed otherwise, the exit code."""

Data = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Json = Annotated[bool, tyro.conf.arg(name="json")]
Settings = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="SECTION.FIELD=VALUE")
]

Store = Annotated[str | None, tyro.conf.arg(metavar="URL")]


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    data: Data = Path("data")
    """The dataset directory, a folder of subjects."""
    json: Json = False
    """Print one JSON document on standard output and nothing else there."""
    verbose: bool = False
    """Show what happens inside, and tracebacks of defects."""

    def answer(self) -> Answer:
        """Do what the command is for.

        Raises:
            HeadcastError: what went wrong, in words for the user.
        """
        raise NotImplementedError

    def resume_command(self) -> str | None:
        """What to type to go on after a stop, where there is such a thing."""
        return None


def split_settings(settings: Sequence[str]) -> dict[str, str]:
    """What `--set NAME=VALUE` gave, by name.

    Raises:
        UserError: one has no `=` or no name, or a name is given twice.
    """
    found: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name or name in found:
            raise UserError(f"'{setting}' is not NAME=VALUE{', given once' if name in found else ''}.", "see --help")
        found[name] = value
    return found


def start_flow(flow: Callable[[Any], ResultT], request: Any) -> ResultT:
    """Run a flow in this process.

    Raises:
        HeadcastError: the flow's own, or what the orchestrator met.
    """
    try:
        return flow(request)
    except (HeadcastError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever Prefect meets while it starts or talks to its server
        raise HeadcastError(
            f"The orchestrator failed: {type(error).__name__}: {error}.",
            "run the same command again, with --verbose for its log; what is finished is kept",
        ) from error
