"""Log lines on standard error: plain ones, or with HEADCAST_LOG=json one JSON object a line for a log collector.

Every object has `time` (UTC, ISO 8601), `level`, `event` and `text`; what else it has depends on the event:
`stage-begin`, `stage-end` and `stage-failed` name `subject` and `stage`, and the end `seconds` and `verdict`.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import UserError

VARIABLE = "HEADCAST_LOG"
OURS = ("pipeline", "stages", "flows")


def json_wanted() -> bool:
    """Whether log lines are to be JSON.

    Raises:
        UserError: HEADCAST_LOG asks for something else.
    """
    wanted = os.environ.get(VARIABLE, "plain")
    if wanted not in ("plain", "json", ""):
        raise UserError(f"{VARIABLE} is '{wanted}'.", "leave it unset, or say plain or json")
    return wanted == "json"


def json_line(level: str, event: str, text: str, **fields: Any) -> str:
    """One log line with its line end; fields that are None are left out."""
    told = {name: value for name, value in fields.items() if value is not None}
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "level": level, "event": event, "text": text, **told}, default=str) + "\n"


def event(name: str, **fields: Any) -> dict[str, Any]:
    """What `logging` takes as `extra`, so that a message becomes an event with these fields."""
    return {"headcast": {"event": name, **fields}}


class JsonFormatter(logging.Formatter):
    """A log record as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The object, without a line end."""
        told = {
            "event": "log",
            "level": record.levelname.lower(),
            "logger": record.name,
            "traceback": self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else None,
            **getattr(record, "headcast", {}),
        }
        return json_line(text=record.getMessage(), **told).rstrip("\n")


def set_up_logging(verbose: bool = False) -> None:
    """Warnings on standard error; the orchestrator's own lines only when asked for. As JSON, our events too.

    Raises:
        UserError: HEADCAST_LOG asks for what there is not.
    """
    handler = logging.StreamHandler()
    if not verbose:
        handler.addFilter(lambda record: record.name.partition(".")[0] in OURS)
    level = logging.INFO if verbose else logging.WARNING
    if not json_wanted():
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logging.basicConfig(level=level, handlers=[handler])
        return
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    # The orchestrator sets up the root logger anew; our own loggers it leaves alone.
    for name in OURS:
        logger = logging.getLogger(name)
        if not any(isinstance(other.formatter, JsonFormatter) for other in logger.handlers):
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
