"""The errors a user sees: what went wrong, where, and what to do next. The command line prints them bare."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadcastError(Exception):
    """An error with a message for the user and, where one is known, the next step.

    Args:
        what: what is wrong and where, one sentence, with the offending value.
        fix: what to do next, one sentence; printed on its own line.
    """

    exit_code = 1
    retryable = False
    """Whether doing the same again can help: with a lock, a network or a storage; not with a video without a face."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  -> {self.fix}" if self.fix else self.what

    def __reduce__(self) -> tuple[type[HeadcastError], tuple[str, str]]:
        return type(self), (self.what, self.fix)


class UserError(HeadcastError):
    """The user's input is at fault: a bad path, name, option or file. Exit code 2."""

    exit_code = 2


class StageError(HeadcastError):
    """A stage cannot do its work on this input or this machine. Exit code 1; what was finished stays."""


class Unavailable(StageError):
    """Something outside that comes back did not answer: a network, a server, a storage."""

    retryable = True


class StageTimeout(StageError):
    """A stage was still at work when its time was up, and was ended."""


class StageDied(StageError):
    """The process that a stage worked in ended without an answer: killed, or out of memory."""

    retryable = True


class SubjectBusy(UserError):
    """Another run holds this subject's lock."""

    retryable = True


class LeaseLost(HeadcastError):
    """This run no longer holds its subject: it was stopped for too long, and another run may have taken over."""

    retryable = True


class Interrupted(HeadcastError):
    """Ctrl+C or SIGTERM reached a stage, which left a resumable state. Exit code 130, as shells expect."""

    exit_code = 130


class StoreDamaged(HeadcastError):
    """What an object store holds is not what its manifest says. Exit code 1; nothing of it was taken."""

    path: str | None = None
    """The object that is at fault, where it is one."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean jawOpen, jawLeft?` with the names that come near, or nothing; the start of a `fix`."""
    near = difflib.get_close_matches(name, list(known), 3)
    return f"did you mean {', '.join(near)}?" if near else ""
