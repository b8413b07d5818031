"""The avatar at rest as one SOG file (`pipeline.sog`), the small format of PlayCanvas and SuperSplat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.exports import Export

VERSION = 1
OPTIONS: dict[str, str] = {}
ABOUT = "Lost: rotations have steps of 0.6 degrees, opacities of 1/255; sizes and colours are 256 values each."


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write `avatar.sog`.

    Raises:
        UserError: the avatar cannot be read.
    """
    from pipeline.exports.rest import write_rest
    from pipeline.sog import read_sog, write_sog

    return write_rest(export, folder / "avatar.sog", write_sog, read_sog, ABOUT)
