"""What a head model's data are, told without loading them: part of the key of what is fitted with it."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from pipeline.dataset import sha256_file

BUNDLED = Path(__file__).parent / "heads"


def head_data(name: str) -> str:
    """Digest of a head model's files; `missing` where they are not here, which is for the fit itself to say."""
    if name == "anny":
        return _digest(BUNDLED / "anny.npz", BUNDLED / "anny_landmarks.npz")
    from pipeline.errors import UserError
    from pipeline.heads import head_file
    from pipeline.heads.external import EXTRACTION_VERSION

    try:
        file = head_file(name)
        status = file.path.stat()
    except (UserError, OSError):
        return "missing"
    return f"{EXTRACTION_VERSION}-{_sha256(file.path, status.st_size, status.st_mtime_ns)}"


@functools.cache
def _digest(*files: Path) -> str:
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def _sha256(path: Path, size: int, modified: int) -> str:
    """The file's hash; size and time of change tell when it has to be read again."""
    return sha256_file(path)
