"""The avatar at rest as one 3DGS PLY file (`pipeline.ply`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.exports import Export

VERSION = 1
OPTIONS: dict[str, str] = {}
"""Name -> what it says, of what `--set` may give."""


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write `avatar.ply`.

    Raises:
        UserError: the avatar cannot be read.
    """
    from pipeline.avatars import load_avatar
    from pipeline.export import neutral_splats
    from pipeline.ply import write_ply

    splats = neutral_splats(load_avatar(export.subject.stage("train")))
    write_ply(folder / "avatar.ply", splats)
    return {"gaussians": len(splats), "text": f"avatar.ply: {len(splats):,} Gaussians of the face at rest."}
