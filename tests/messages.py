"""Error messages held against those that were looked at and committed, so that a change of one shows in review."""

from __future__ import annotations

import json
import os
from pathlib import Path

FOLDER = Path(__file__).parent / "messages"
UPDATE = "HEADCAST_UPDATE_MESSAGES"


def check_messages(name: str, found: dict[str, str]) -> None:
    """Compare with `tests/messages/NAME.json`; with `HEADCAST_UPDATE_MESSAGES=1` write that file, to be read over.

    Args:
        name: of the file.
        found: case -> message, machine paths taken out.
    """
    path = FOLDER / f"{name}.json"
    if os.environ.get(UPDATE) == "1":
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    expected = json.loads(path.read_text())
    assert set(found) == set(expected), "cases were added or removed: look them over with " + UPDATE
    different = {case: (expected[case], text) for case, text in found.items() if text != expected[case]}
    assert not different
