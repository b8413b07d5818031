"""What another tracker wrote beside a video: a Live Link Face take's table, or a dump of MediaPipe's landmarks.

Such a subject's video is decoded, matted and fitted like any other; stage track takes from the file what the file has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset import sha256_file
from pipeline.errors import UserError
from pipeline.frames import counted

KINDS = {
    "livelink": "a take of the Live Link Face app: a folder with a .mov and the .csv of the same name",
    "mediapipe": "a video, or images, and one dump of MediaPipe's face landmarks (.json, .jsonl, .npz, .npy, .csv)",
}


@dataclass(frozen=True)
class Tracked:
    """A video and what another tracker wrote beside it."""

    kind: str
    """A key of `KINDS`."""
    video: Path
    """Or a folder of images."""
    file: Path
    settings: tuple[str, ...] = ()
    """What the folder tells beside them, as settings of the run."""
    notes: tuple[str, ...] = ()
    """What was chosen, in sentences."""


def kind_of(path: Path) -> str:
    """The kind of a file: a table with the app's column Timecode, else a dump."""
    from pipeline.interchange.livelink import is_table

    return "livelink" if is_table(path) else "mediapipe"


def find_tracked(folder: Path, kind: str = "auto") -> Tracked | None:
    """The video and the tracker's file in a folder; None where it is no such folder.

    Raises:
        UserError: it is one, but which files are meant is not plain; or it is not what `kind` says.
    """
    from pipeline.interchange.livelink import find_take
    from pipeline.interchange.mediapipe_dump import find_dump

    if not folder.is_dir():
        return None
    finders = {"livelink": find_take, "mediapipe": find_dump}
    for name, find in finders.items():
        if kind in ("auto", name) and (found := find(folder)) is not None:
            return found
    if kind in finders:
        raise UserError(f"'{folder}' is not {KINDS[kind]}.", "name such a folder, or another --format")
    return None


def tracking_digest(path: Path) -> str:
    """sha256 of a file that is given.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sha256_file(path)
    except OSError as error:
        raise UserError(f"The tracking '{path}' cannot be read: {error.strerror}.", "check --tracking") from None


def check_tracking(path: Path, videos: Sequence[Path]) -> None:
    """See that a tracker's file can be used for a video. Reads only.

    Args:
        path: the file.
        videos: the subject's clips.

    Raises:
        UserError: the file is at fault, belongs to another video, or there are several videos.
    """
    from pipeline.interchange.livelink import read_table
    from pipeline.interchange.mediapipe_dump import read_dump
    from pipeline.video import probe

    if len(videos) != 1:
        raise UserError(
            f"--tracking tells of one video; {counted(len(videos), 'clip')} are given.", "give one, or leave it away"
        )
    if kind_of(path) == "livelink":
        read_table(path)
    else:
        told = probe(videos[0])
        read_dump(path).check_video((told.width, told.height), told.frames, told.seconds)
