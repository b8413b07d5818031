"""What every command has: its common options, and what it answers with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

Answer = tuple[dict[str, Any], str, int]
"""A command's answer: the document that `--json` prints, the text that is printed otherwise, the exit code."""

Data = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Json = Annotated[bool, tyro.conf.arg(name="json")]
Settings = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="SECTION.FIELD=VALUE")
]


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
