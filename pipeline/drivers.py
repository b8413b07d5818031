"""Who drives an avatar: a fitted subject, a video that is made one first, or a CSV file of ARKit coefficients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.dataset import Dataset, Subject, sha256_file, subject_name_for
from pipeline.errors import UserError
from pipeline.progress import Reporter
from pipeline.run import RunRequest
from pipeline.source import check_sources, is_registered, source_paths

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.clip import Clip
    from pipeline.coefficients import Coefficients
    from pipeline.frames import FrameSet
    from pipeline.retarget import Performance

TABLE_SUFFIXES = (".csv", ".tsv")
KINDS = "--drive takes a subject's name, a video of a person, or a CSV file of ARKit coefficients (.csv, .tsv)"


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A performance in time.

    Attributes:
        name: for people.
        times: [T] seconds of its frames, rising.
        fps: frames a second.
        shots: [T] numbers of their shots; nothing is blended across a cut.
        usable: [T] whether a frame's numbers can be relied on.
        settings: what of it is not told by the keys of a subject's stages.
        notes: sentences on what was taken for granted.
    """

    name: str
    times: NDArray[np.float64]
    fps: Fraction
    shots: NDArray[np.int64]
    usable: NDArray[np.bool_]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    def performance(self, expression_names: Sequence[str]) -> Performance:
        """What it does, for an avatar with these coefficients.

        Raises:
            UserError: its coefficients are not the avatar's.
        """
        raise NotImplementedError

    def picture(self, frame: int, side: int) -> NDArray[np.uint8] | None:
        """[side,side,3] what a frame looks like, where there are pictures."""
        raise NotImplementedError

    def sound(self, span: tuple[int, int], begin: float, seconds: float, reporter: Reporter) -> Iterator[Any] | None:
        """Some seconds of the sound of the frames from `span[0]` to `span[1]`; None where there is none."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SubjectDriver(Driver):
    """A fitted subject, its fit, and its decoded frames."""

    subject: Subject
    clip: Clip
    frames: FrameSet

    @staticmethod
    def of(subject: Subject, resolution: int) -> SubjectDriver:
        """Read its decode and fit stages.

        Raises:
            UserError: a file is missing.
            StageError: a file is damaged.
        """
        from pipeline.clip import load_clip
        from pipeline.frames import FrameSet

        clip, frames = load_clip(subject, resolution), FrameSet.load(subject.stage("decode"))
        return SubjectDriver(
            name=subject.name,
            times=frames.times,
            fps=frames.fps,
            shots=frames.shots,
            usable=clip.usable,
            settings={},
            subject=subject,
            clip=clip,
            frames=frames,
        )

    def performance(self, expression_names: Sequence[str]) -> Performance:
        from pipeline.retarget import Performance, check_names

        check_names(self.clip.expression_names, expression_names)
        return Performance.of(self.clip)

    def picture(self, frame: int, side: int) -> NDArray[np.uint8]:
        """[side,side,3] a frame, cut as its training crop is; white beyond the frame's edge."""
        import cv2

        x0, y0, size = self.clip.crops[self.clip.cameras[frame]]
        image = self.frames.picture(frame)
        height, width = image.shape[:2]
        canvas = np.full((size, size, 3), 255, np.uint8)
        left, top, right, bottom = max(x0, 0), max(y0, 0), min(x0 + size, width), min(y0 + size, height)
        canvas[top - y0 : bottom - y0, left - x0 : right - x0] = image[top:bottom, left:right]
        how = cv2.INTER_AREA if size >= side else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(canvas, (side, side), interpolation=how), np.uint8)

    def sound(self, span: tuple[int, int], begin: float, seconds: float, reporter: Reporter) -> Iterator[Any] | None:
        """Of all its clips in the span; a clip's sound ends where the next clip begins."""
        from pipeline.sound import has_sound, read_sound

        chosen = np.unique(self.frames.clips[span[0] : span[1] + 1])
        try:
            paths = [source_paths(self.subject)[clip] for clip in chosen]
            heard = [has_sound(path) for path in paths]
        except (UserError, IndexError) as error:
            reporter.message(f"The sound of '{self.name}' cannot be had: {error}")
            return None
        if not any(heard):
            return None
        starts = [_clip_start(self.frames, int(clip)) for clip in chosen]
        edges = [begin, *starts[1:], begin + seconds]

        def pieces() -> Iterator[NDArray[np.int16]]:
            for path, start, since, until in zip(paths, starts, edges[:-1], edges[1:], strict=True):
                yield from read_sound(path, since - start, until - since)

        return pieces()


def _clip_start(frames: FrameSet, clip: int) -> float:
    """When a clip's first picture is shown; exact where that picture was kept or the rate is constant."""
    first = int(np.flatnonzero(frames.clips == clip)[0])
    fps = Fraction((frames.record.get("clips") or [{}] * (clip + 1))[clip].get("fps", str(frames.fps)))
    return float(frames.times[first] - frames.source_frames[first] / fps)


@dataclass(frozen=True, kw_only=True)
class TableDriver(Driver):
    """A table of coefficients: neither picture nor sound."""

    table: Coefficients

    @staticmethod
    def of(path: Path, fps: float | None = None) -> TableDriver:
        """Read a CSV file.

        Args:
            path: the file.
            fps: rows a second, whatever its times say.

        Raises:
            UserError: what is wrong in it, and where.
        """
        from pipeline.coefficients import read_coefficients

        table = read_coefficients(path, fps)
        return TableDriver(
            name=subject_name_for(path),
            times=table.times,
            fps=table.fps,
            shots=np.zeros(len(table), np.int64),
            usable=table.usable,
            settings={"coefficients": {"file": path.name, "sha256": table.sha256, "fps": str(table.fps)}},
            notes=table.notes,
            table=table,
        )

    def performance(self, expression_names: Sequence[str]) -> Performance:
        from pipeline.retarget import Performance

        return Performance.of_table(self.table, expression_names)

    def picture(self, frame: int, side: int) -> None:
        """There is none."""
        return

    def sound(self, span: tuple[int, int], begin: float, seconds: float, reporter: Reporter) -> None:
        """There is none."""
        return


def find_driver(drive: str, dataset: Dataset) -> Subject | Path:
    """What is meant by `--drive`: a subject of the dataset, or the path of a file or a folder of images.

    Raises:
        UserError: it is neither.
    """
    path = Path(drive)
    if path.name == drive and not path.suffix:
        subject = dataset.subject(drive)
        if (subject.source / "source.json").is_file() or not path.exists():
            try:
                return dataset.existing(drive)
            except UserError as error:
                raise UserError(error.what, f"check the name and --data; {KINDS}") from None
    if not path.exists():
        raise UserError(f"'{drive}' cannot be a subject name, and there is no such file.", KINDS)
    return path


def driver_name(drive: str) -> str:
    """What a driver's video is called: a subject's own name, or one made from the file's."""
    return drive if Path(drive).name == drive and not Path(drive).suffix else subject_name_for(Path(drive))


def _same_file(path: Path, subject: Subject) -> bool:
    """Whether a video has the bytes of a subject's only clip, such as a copy of it."""
    paths = source_paths(subject) if (subject.source / "source.json").is_file() else []
    if len(paths) != 1 or not (path.is_file() and paths[0].is_file()):
        return False
    return path.stat().st_size == paths[0].stat().st_size and sha256_file(path) == sha256_file(paths[0])


def run_for_driver(path: Path, data: Path, device: str, threads: int) -> RunRequest:
    """The run that makes a fitted subject of a driver's video, or brings the one of its name up to date.

    A subject that is there keeps the settings of its last run.

    Raises:
        UserError: it is no video, or a subject of its name was made from something else.
    """
    subject = Dataset(data).subject(subject_name_for(path))
    how: dict[str, Any] = {"data": data, "subject": subject.name, "last": "fit", "device": device, "threads": threads}
    try:
        check_sources([path])
        registered = is_registered(subject, [path]) or _same_file(path, subject)
    except UserError as error:
        raise UserError(error.what, KINDS) from None
    if registered:
        return RunRequest(**how)
    if (subject.source / "source.json").is_file():
        raise UserError(
            f"'{path}' would become the subject '{subject.name}', who was made from another video.",
            f"drive by that one with --drive {subject.name}, or rename the file",
        )
    # Whether an avatar could come of it does not matter for somebody who only drives.
    return RunRequest(**how, videos=(path,), check=False)
