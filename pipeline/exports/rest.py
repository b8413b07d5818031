"""What the exports of the face at rest share: one file of Gaussians, read back and compared with the avatar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.exports import Export
    from pipeline.splats import Splats


def write_rest(
    export: Export, path: Path, write: Callable[[Path, Splats], None], read: Callable[[Path], Splats], about: str = ""
) -> dict[str, Any]:
    """Write the avatar at rest; returns what its account shall tell.

    Args:
        export: whose avatar.
        path: of the file.
        write, read: of the file's format.
        about: what people should know of it, a sentence.

    Raises:
        UserError: the avatar cannot be read.
    """
    from pipeline.avatars import load_avatar
    from pipeline.export import neutral_splats
    from pipeline.exports.loss import rest_loss

    avatar = load_avatar(export.subject.stage("train"))
    splats = neutral_splats(avatar)
    write(path, splats)
    loss, size = rest_loss(avatar, read(path), export.threads), path.stat().st_size
    text = f"{path.name}: {len(splats):,} Gaussians of the face at rest, {size / 1e6:.2f} MB. {loss}"
    told = {"gaussians": len(splats), "degree": splats.degree(), "bytes": size, **loss.account()}
    return {**told, "text": f"{text} {about}".strip()}
