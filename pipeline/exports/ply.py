"""The avatar at rest as one 3DGS PLY file (`pipeline.ply`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.exports import Export

VERSION = 2
OPTIONS: dict[str, str] = {}
"""Name -> what it says, of what `--set` may give."""


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write `avatar.ply`.

    Raises:
        UserError: the avatar cannot be read.
    """
    from pipeline.exports.rest import write_rest
    from pipeline.ply import read_ply, write_ply

    return write_rest(export, folder / "avatar.ply", write_ply, read_ply)
