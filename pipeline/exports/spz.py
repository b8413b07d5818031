"""The avatar at rest as one SPZ file (`pipeline.spz`): a sixteenth of a PLY."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pipeline.exports import Export, number

VERSION = 1
OPTIONS = {"version": "of SPZ: 3, or 2 for older readers, whose rotations are coarser"}


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write `avatar.spz`.

    Raises:
        UserError: the avatar cannot be read, or an option is at fault.
    """
    from pipeline.exports.rest import write_rest
    from pipeline.spz import read_spz, write_spz

    version = number(export, "version", 3, 2, 3)
    about = (
        "Lost: colours have steps of 1/136, opacities of 1/255, sizes of 6 %, rotations of "
        f"{'0.2 degrees' if version == 3 else '1 degree, of 10 where w is near 0'}."
    )
    write_version = functools.partial(write_spz, version=version)
    return write_rest(export, folder / "avatar.spz", write_version, read_spz, about)
