"""Dumps of MediaPipe's face landmarks, in the layouts that people write, as faces in a video's decoded frames.

JSON (a list of frames, or an object with `frames`), JSON lines, `.npz` and `.npy` arrays [T,478,3], and CSV, a row a
frame (`x0 y0 z0 ...`) or a row a landmark. What is wrong is refused with the file, the frame and the key.
"""

from __future__ import annotations

import csv
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.interchange.checking import (
    FIX,
    MAX_ARRAY_BYTES,
    MAX_FRAMES,
    MAX_JSON_BYTES,
    Folder,
    check_rotation,
    numbers,
)
from pipeline.interchange.tracking import Tracked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.faces import Face
    from pipeline.frames import FrameSet

    Floats = NDArray[np.float64]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".npz", ".npy", ".csv", ".tsv")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
LANDMARKS, WITHOUT_IRISES = 478, 468
MAX_FACES = 16
# What others call the same; compared without capitals and underscores.
INDEX = ("index", "frame", "frameindex", "frameid", "framenumber", "framenum", "frameidx")
SECONDS = ("time", "times", "timesec", "timeseconds", "timestamp", "timestampsec", "timestamps", "seconds", "t")
MILLISECONDS = ("timems", "timestampms", "ms", "timestampmilliseconds")
POINTS = ("landmarks", "facelandmarks", "multifacelandmarks", "landmarksnormalized", "faces", "points")
SCORES = ("blendshapes", "faceblendshapes", "blendshapescores", "scores")
SCORE_NAMES = ("blendshapenames", "names", "scorenames")
MATRICES = (
    *("facialtransformationmatrix", "facialtransformationmatrixes", "facialtransformationmatrices"),
    *("transformationmatrix", "matrix", "matrices", "transforms"),
)
WIDE = re.compile(r"(?:[a-z]+_?)?(?:(?P<n>\d+)_?(?P<a>[xyz])|(?P<b>[xyz])_?(?P<m>\d+))", re.IGNORECASE)
IN_UNITS = 2.0
"""Coordinates up to so much are shares of the picture, larger ones pixels."""
FAR_OUTSIDE = 1.0
"""Faces may reach over the picture's edge by so many pictures."""
RIGHT_EYE, LEFT_EYE, FOREHEAD, CHIN = 33, 263, 10, 152
"""Landmarks that tell left from right and up from down in a picture."""
WRONG_SHARE = 0.12
"""Median distance from what MediaPipe sees itself, in widths of the face, from which a dump is another picture's."""


@dataclass(frozen=True)
class Seen:
    """A face of a frame as the file has it."""

    points: Floats
    """[478,3]."""
    scores: dict[str, float] | None
    matrix: Floats | None
    """[4,4] MediaPipe's canonical face (cm) to a camera with y up that looks along -z."""


@dataclass(frozen=True)
class Dump:
    """A file's frames.

    Attributes:
        name: of the file.
        frames: the faces of each, none where no face was found.
        numbers: [T] of the frames in the video, from 0; None where the file has times only.
        times: [T] seconds; None where it has no times, or numbers.
        counted: whether the frames were only counted, without a number of their own.
        notes: sentences on what was taken for granted.
    """

    name: str
    frames: list[list[Seen]]
    numbers: NDArray[np.int64] | None
    times: Floats | None
    counted: bool
    notes: tuple[str, ...] = ()

    def points(self) -> Floats:
        """[N,478,3] of all faces."""
        return np.stack([face.points for frame in self.frames for face in frame])

    @property
    def in_pixels(self) -> bool:
        """Whether coordinates are pixels, not shares of the picture."""
        return bool(np.abs(self.points()[..., :2]).max() > IN_UNITS)

    @property
    def whole(self) -> bool:
        """Whether every face has scores and a matrix."""
        return all(face.scores is not None and face.matrix is not None for frame in self.frames for face in frame)

    def check_video(self, size: tuple[int, int], frames: int, seconds: float) -> None:
        """See that it can be of this video.

        Args:
            size: width and height of its upright pictures. frames: that it has as tagged; 0 where it does not tell.
            seconds: that it lasts.

        Raises:
            UserError: it has other frames, or pictures of another size.
        """
        most = np.array(size if self.in_pixels else (1, 1))
        low, high = self.points()[..., :2].min((0, 1)), self.points()[..., :2].max((0, 1))
        if (low < -FAR_OUTSIDE * most).any() or (high > (1 + FAR_OUTSIDE) * most).any():
            raise UserError(
                f"'{self.name}' has landmarks from {_pair(low)} to {_pair(high)}, the video is {size[0]}x{size[1]}.",
                "it was made of another video, or of resized frames: give it normalised to [0, 1]",
            )
        if frames and self.counted and abs(len(self.frames) - frames) > 1:
            raise UserError(
                f"'{self.name}' has {len(self.frames)} frames, the video {frames}.",
                "give each frame its number ('index', from 0) or its 'time', or make the dump of this video",
            )
        # A number as high as the count is the last of those that begin with 1.
        if frames and self.numbers is not None and self.numbers.max() > frames:
            raise UserError(
                f"'{self.name}' has a frame {self.numbers.max()}, the video only {frames}.",
                "make the dump of this video",
            )
        if self.times is not None and self.times.min() > seconds:
            raise UserError(
                f"'{self.name}' begins at {self.times.min():g} s, when the video of {seconds:g} s is over.",
                "times are seconds from the video's first frame",
            )

    def faces(self, frames: FrameSet, names: tuple[str, ...]) -> tuple[list[list[Face]], list[str]]:
        """The faces of each decoded frame, and what was taken for granted.

        Faces without scores or matrix have NaN there.

        Args:
            frames: of the video.
            names: order of the scores, as `Detector.names`.

        Raises:
            UserError: it is upside down, or has no face in any of these frames.
        """
        from pipeline.faces import Face
        from pipeline.frames import Window

        about = frames.record["clips"][0]
        window = Window(tuple(about["source_size"]), tuple(about["bars"]), float(about["scale"]))
        (width, height), (rows, columns) = window.size, window.inside
        unit = np.array([window.scale] * 3) if self.in_pixels else np.array([width, height, width], float)
        corner = np.array([columns.start, rows.start, 0], float)
        extent = np.array([width, height], float)
        mirrored, y_up = self._sense()
        told = list(self.notes)
        told.append(f"its coordinates are {'pixels' if self.in_pixels else 'normalised to [0, 1]'}")
        if mirrored:
            told.append("left and right were exchanged in it: turned back")
        if y_up:
            told.append("y was up in it: turned round")
        found: list[list[Face]] = []
        for place in self._places(frames):
            faces = []
            for face in self.frames[place] if place is not None else ():
                points = face.points * unit
                if mirrored:
                    points[:, 0] = extent[0] - points[:, 0]
                if y_up:
                    points[:, 1] = extent[1] - points[:, 1]
                scores = [math.nan if face.scores is None else face.scores.get(name, 0.0) for name in names]
                matrix = np.full((4, 4), np.nan) if face.matrix is None else face.matrix
                faces.append(
                    Face((points - corner).astype(np.float32), np.array(scores, np.float32), matrix.astype(np.float32))
                )
            found.append(faces)
        if not any(found):
            raise UserError(
                f"'{self.name}' has a face in none of the frames that were decoded.", "make the dump of this video"
            )
        return found, told

    def _places(self, frames: FrameSet) -> list[int | None]:
        """Which of the file's frames each decoded one is."""
        if self.numbers is not None:
            numbers = self.numbers
            about = frames.record["clips"][0]
            last = int(max(end for _, end in about["shots"])) if about.get("shots") else int(frames.source_frames[-1])
            if not self.counted and (numbers.min(), numbers.max()) == (1, last + 1):
                numbers = numbers - 1
            place_of = {int(number): place for place, number in enumerate(numbers)}
            return [place_of.get(int(number)) for number in frames.source_frames]
        assert self.times is not None
        nearest = np.abs(self.times[None] - frames.times[:, None])
        half = 0.5 / float(frames.fps)
        return [int(row.argmin()) if row.min() <= half else None for row in nearest]

    def _sense(self) -> tuple[bool, bool]:
        """Whether left and right are exchanged, and whether y is up, by most faces.

        Raises:
            UserError: both, as in a picture that is upside down.
        """
        points = self.points()
        mirrored = float(np.median(points[:, LEFT_EYE, 0] - points[:, RIGHT_EYE, 0])) < 0
        y_up = float(np.median(points[:, CHIN, 1] - points[:, FOREHEAD, 1])) < 0
        if mirrored and y_up:
            raise UserError(
                f"The faces of '{self.name}' are upside down.",
                "it was made of frames that were not turned upright: make it again from upright ones",
            )
        return mirrored, y_up


def completed(
    dumped: list[list[Face]], seen: list[list[Face]], name: str, width: int
) -> tuple[list[list[Face]], list[str], float | None]:
    """Faces of a dump, completed from the faces seen in the frames, and how well both fit.

    Args:
        dumped: the dump's faces of each frame, NaN where it lacks scores or pose.
        seen: those that MediaPipe sees in the frames itself.
        name: of the dump, for messages.
        width: of the frames in pixels.

    Returns:
        The faces, sentences on what was taken, and the median distance in widths of the face (None: none to compare).

    Raises:
        UserError: the dump's faces are elsewhere than those in the frames.
    """
    pairs = []
    for frame, (mine, others) in enumerate(zip(dumped, seen, strict=True)):
        for face in mine if others else ():
            apart = [_distance(face.landmarks, other.landmarks) for other in others]
            pairs.append((frame, face, others[int(np.argmin(apart))]))
    misfit = None
    if pairs:
        shares = np.array([_distance(face.landmarks, other.landmarks) for _, face, other in pairs])
        misfit = float(np.median(shares))
        if misfit > WRONG_SHARE:
            mirrored = [
                _centres_apart(face.landmarks * (-1, 1, 1) + (width, 0, 0), o.landmarks) for _, face, o in pairs
            ]
            is_mirror = float(np.median(mirrored)) < WRONG_SHARE
            raise UserError(
                f"The faces of '{name}' lie {misfit:.2f} of their width away from those in the frames, most in frame "
                f"{pairs[int(shares.argmax())][0]}" + (": it was made of the mirrored video." if is_mirror else "."),
                "make it again from this very video"
                if is_mirror
                else "see that it is of this video, and its numbering",
            )
    partner = {id(face): other for _, face, other in pairs}
    faces: list[list[Face]] = []
    lacking, dropped = 0, 0
    for mine in dumped:
        kept = []
        for face in mine:
            other = partner.get(id(face))
            lacks = [what for what in ("scores", "pose") if not np.isfinite(getattr(face, what)).all()]
            if not lacks:
                kept.append(face)
            elif other is None or _distance(face.landmarks, other.landmarks) > WRONG_SHARE:
                dropped += 1
            else:
                lacking += 1
                kept.append(replace(face, **{what: getattr(other, what) for what in lacks}))
        faces.append(kept)
    notes = []
    if lacking:
        notes.append("what it lacks of blendshapes and poses is what MediaPipe sees in the frames")
    if dropped:
        notes.append(f"{dropped} of its faces, seen nowhere in the frames, count as not detected")
    return faces, notes, misfit


def _distance(points: NDArray[np.floating], others: NDArray[np.floating]) -> float:
    """Median distance of landmarks, in widths of the other face."""
    return float(np.median(np.linalg.norm(points[:, :2] - others[:, :2], axis=1)) / np.ptp(others[:, 0]))


def _centres_apart(points: NDArray[np.floating], others: NDArray[np.floating]) -> float:
    """How far the middles of two faces are apart, in widths of the other one."""
    return float(np.linalg.norm((points - others)[:, :2].mean(0)) / np.ptp(others[:, 0]))


def find_dump(folder: Path) -> Tracked | None:
    """The dump in a folder, and the video or the images beside it; None where there is no dump or no video.

    Raises:
        UserError: there are several of either.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    dumps = [path for path in files if path.suffix.lower() in SUFFIXES and _looks_like_dump(path)]
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        videos = [path for path in (folder / "images", folder / "frames") if path.is_dir()] or _images_in(folder)
    if not dumps or not videos:
        return None
    for what, found in (("dumps", dumps), ("videos", videos)):
        if len(found) > 1:
            names = ", ".join(f"'{path.name}'" for path in found[:3])
            raise UserError(
                f"'{folder}' has several {what}: {names}.", "name which: headcast run VIDEO --tracking FILE"
            )
    return Tracked("mediapipe", videos[0], dumps[0], notes=(f"Its landmarks are those of '{dumps[0].name}'.",))


def _images_in(folder: Path) -> list[Path]:
    from pipeline.video import IMAGE_SUFFIXES

    return [folder] if sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir()) > 1 else []


def _looks_like_dump(path: Path) -> bool:
    """By the name of an array or a key near the file's beginning; cheap, and never raises."""
    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                return any(_plain(Path(name).stem) in POINTS for name in archive.namelist())
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return array.ndim == 3 and array.shape[1] in (WITHOUT_IRISES, LANDMARKS)
        with path.open("rb") as file:
            start = file.read(65536).decode("utf-8-sig", "replace")
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile):
        return False
    if path.suffix.lower() in (".csv", ".tsv"):
        header = [cell.strip().lower() for cell in re.split(r"[,;\t]", start.partition("\n")[0])]
        return sum(WIDE.fullmatch(cell) is not None for cell in header) > 100 or {"x", "y", "landmark"} <= set(header)
    return any(_plain(key) in POINTS for key in re.findall(r'"([A-Za-z_]+)"\s*:', start))


def read_dump(path: Path) -> Dump:
    """Read and check a dump.

    Raises:
        UserError: what is wrong in it, and where.
    """
    if not path.is_file():
        raise UserError(f"There is no file '{path}'.", "check the path")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"'{path.name}' is no dump of landmarks.", f"its name ends in one of: {', '.join(SUFFIXES)}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"'{path.name}' has more than {MAX_JSON_BYTES >> 20} MB.", "write it as .npz")
    suffix = path.suffix.lower()
    if suffix in (".npz", ".npy"):
        entries = _arrays(path)
    elif suffix in (".csv", ".tsv"):
        entries = _rows(path)
    else:
        entries = _objects(path)
    return _dump(path.name, entries)


@dataclass(frozen=True)
class _Entry:
    """A frame as the file has it."""

    where: str
    number: int | None
    time: float | None
    """Seconds."""
    faces: list[Seen]


def _dump(name: str, entries: list[_Entry]) -> Dump:
    if not any(entry.faces for entry in entries):
        raise UserError(f"'{name}' has a face in no frame.", "see that the landmarks were written")
    numbered, timed = ([entry for entry in entries if getattr(entry, what) is not None] for what in ("number", "time"))
    for found, what in ((numbered, "number"), (timed, "time")):
        if found and len(found) < len(entries) and len(numbered) != len(entries):
            lacking = next(entry for entry in entries if getattr(entry, what) is None)
            raise UserError(f"{lacking.where} has no {what}, others have.", "give every frame one, or none")
    notes = []
    numbers: NDArray[np.int64] | None = None
    times: Floats | None = None
    if len(numbered) == len(entries):
        numbers = np.array([entry.number for entry in entries], np.int64)
    elif timed:
        times = np.array([entry.time for entry in entries], float)
    else:
        numbers = np.arange(len(entries))
        notes.append("its frames have no numbers: they are counted")
    values: Any = numbers if numbers is not None else times
    unsorted = np.flatnonzero(np.diff(np.sort(values)) <= 0)
    if len(unsorted):
        twice = np.sort(values)[unsorted[0]]
        raise UserError(f"'{name}' has {'frame' if numbers is not None else 'time'} {twice:g} twice.", FIX)
    return Dump(name, [entry.faces for entry in entries], numbers, times, not numbered and not timed, tuple(notes))


def _objects(path: Path) -> list[_Entry]:
    """Frames of JSON or JSON lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = path.suffix.lower() in (".jsonl", ".ndjson")
        found = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path.name}' is no JSON: {str(error)[:120]}.", FIX) from None
    if isinstance(found, dict):
        found = next((found[key] for key in found if _plain(key) in ("frames", "data", "results")), found)
    if isinstance(found, dict) and found and all(str(key).isdecimal() for key in found):
        items = [{"index": int(key), **_as_object(value)} for key, value in found.items()]
    elif isinstance(found, list):
        items = [_as_object(value) for value in found]
    else:
        raise UserError(f"'{path.name}' has no list of frames.", 'write a list, or {"frames": [...]}')
    if not items or len(items) > MAX_FRAMES:
        raise UserError(f"'{path.name}' has {len(items)} frames.", f"at least one and at most {MAX_FRAMES:,} are read")
    return [_entry(item, f"'{path.name}', frame [{place}]") for place, item in enumerate(items)]


def _as_object(value: Any) -> dict[str, Any]:
    """A frame as an object; a bare list is its landmarks, null is a frame without a face."""
    return value if isinstance(value, dict) else {"landmarks": value}


def _plain(key: str) -> str:
    return str(key).lower().replace("_", "").replace(" ", "").replace("-", "")


def _get(item: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((value for key, value in item.items() if _plain(key) in names and value is not None), None)


def _entry(item: Mapping[str, Any], where: str) -> _Entry:
    number, time, milliseconds = (_get(item, names) for names in (INDEX, SECONDS, MILLISECONDS))
    if number is not None and (type(number) not in (int, float) or number != round(number)):
        raise UserError(f"{where}: its number is '{str(number)[:40]}', expected a whole number.", FIX)
    if time is None and milliseconds is not None:
        time = float(numbers(milliseconds, (), f"{where}: its time")) / 1000
    elif time is not None:
        time = float(numbers(time, (), f"{where}: its time"))
    if (number or 0) < 0 or (time or 0) < 0:
        raise UserError(f"{where}: its number or time lies before 0.", FIX)
    points, scores, matrices = (_get(item, names) for names in (POINTS, SCORES, MATRICES))
    if points is None and not any(_plain(key) in POINTS for key in item) and number is None and time is None:
        raise UserError(
            f"{where} has no key 'landmarks'.", "give each frame its landmarks, null where there is no face"
        )
    faces = []
    for place, face in enumerate(_faces_of(points)):
        at = f"{where}: landmarks" + (f" of face {place}" if place else "")
        found = _points(face, at)
        if found is not None:
            score = _scores(_of_face(scores, place, _is_scores), where)
            faces.append(Seen(found, score, _matrix(_of_face(matrices, place, _is_matrix), where)))
    if len(faces) > MAX_FACES:
        raise UserError(f"{where} has {len(faces)} faces; at most {MAX_FACES} are read.", FIX)
    return _Entry(where, None if number is None else int(number), time, faces)


def _faces_of(value: Any) -> list[Any]:
    """The faces in a value that is one's landmarks, or a list of them."""
    if value is None or value == []:
        return []
    if isinstance(value, dict):  # one as protobuf writes it
        return [_get(value, ("landmark", "landmarks"))]
    first = value[0] if isinstance(value, list) else None
    if isinstance(first, dict) and _get(first, ("landmark", "landmarks")) is not None:
        return [_get(face, ("landmark", "landmarks")) for face in value if isinstance(face, dict)]
    nested = isinstance(first, list) and first and isinstance(first[0], list | dict)
    return list(value) if nested else [value]


def _of_face(value: Any, place: int, is_one: Callable[[Any], bool]) -> Any:
    """Of a value that is one face's, or a list of each face's, that of one."""
    if value is None or is_one(value):
        return value if place == 0 else None
    return value[place] if isinstance(value, list) and place < len(value) else None


def _is_scores(value: Any) -> bool:
    if isinstance(value, dict):
        return True
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "categories" not in value[0]


def _is_matrix(value: Any) -> bool:
    if isinstance(value, dict):
        return True
    return isinstance(value, list) and len(value) in (4, 16) and np.ndim(value[0]) < 2


def _points(value: Any, where: str) -> Floats | None:
    """[478,3] of one face; None where all is missing."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        try:
            value = [[point["x"], point["y"], point.get("z", math.nan)] for point in value]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{where}: a point is no object with x, y and z.", FIX) from None
    if isinstance(value, list) and value and not isinstance(value[0], list) and len(value) % 3 == 0:
        value = [value[start : start + 3] for start in range(0, len(value), 3)]
    try:
        points = np.asarray(value, np.float64)
    except (ValueError, TypeError):
        raise UserError(f"{where} are ragged or no numbers, expected {LANDMARKS} of x, y, z.", FIX) from None
    return _checked_points(points, where)


def _checked_points(points: Floats, where: str) -> Floats | None:
    if points.ndim == 2 and points.shape[0] == WITHOUT_IRISES:
        raise UserError(
            f"{where} are {WITHOUT_IRISES}, without the irises by which gaze is told.",
            "dump all 478: FaceLandmarker gives them, FaceMesh with refine_landmarks=True",
        )
    if points.shape != (LANDMARKS, 3):
        shape = " x ".join(map(str, points.shape)) or "none"
        raise UserError(f"{where} have shape {shape}, expected {LANDMARKS} x 3.", FIX)
    if np.isnan(points).all() or not points.any():
        return None
    if not np.isfinite(points).all():
        raise UserError(
            f"{where}: some are no numbers (NaN or infinite).", "leave out frames without a face, or write null there"
        )
    return points


def _scores(value: Any, where: str) -> dict[str, float] | None:
    """Scores by name, from an object, or from MediaPipe's categories."""
    if value is None or value in ([], {}):
        return None
    if isinstance(value, dict) and "categories" in value:
        value = value["categories"]
    if isinstance(value, list):
        try:
            value = {
                str(_get(category, ("categoryname", "displayname", "name"))): category["score"] for category in value
            }
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{where}: 'blendshapes' is neither an object nor a list of category_name and score.", FIX
            ) from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: 'blendshapes' is neither an object nor a list of categories.", FIX)
    found = {name: float(numbers(score, (), f"{where}: blendshape '{name}'")) for name, score in value.items()}
    return _known_scores(found, where)


def _known_scores(found: dict[str, float], where: str) -> dict[str, float]:
    from pipeline.heads import EXPRESSIONS

    foreign = sorted(set(found) - set(EXPRESSIONS) - {"_neutral"})
    if foreign:
        raise UserError(f"{where}: '{foreign[0]}' is none of MediaPipe's blendshapes.", "leave others out of the dump")
    wrong = next((name for name, score in found.items() if not -1e-3 <= score <= 1.001), None)
    if wrong is not None:
        raise UserError(f"{where}: blendshape '{wrong}' is {found[wrong]:g}, not within 0 and 1.", FIX)
    return found


def _matrix(value: Any, where: str) -> Floats | None:
    """[4,4] from four rows, sixteen numbers, or MediaPipe's object for browsers, by rows or by columns."""
    if value is None or value == []:
        return None
    if isinstance(value, dict):
        value = value.get("data")
    at = f"{where}: 'facial_transformation_matrix'"
    flat = isinstance(value, list) and len(value) == 16
    matrix = numbers(value, (16,) if flat else (4, 4), at).reshape(4, 4)
    return _checked_matrix(matrix, at)


def _checked_matrix(matrix: Floats, where: str) -> Floats:
    last = np.array([0, 0, 0, 1.0])
    if np.abs(matrix[3] - last).max() > 1e-4 and np.abs(matrix[:, 3] - last).max() <= 1e-4:
        matrix = matrix.T
    if np.abs(matrix[3] - last).max() > 1e-4:
        raise UserError(f"{where} has the last row {matrix[3].tolist()}, expected [0, 0, 0, 1].", FIX)
    scale = np.cbrt(max(np.linalg.det(matrix[:3, :3]), 1e-12))
    check_rotation(matrix[:3, :3] / scale if 0.5 < scale < 2 else matrix[:3, :3], where)
    return matrix


def _arrays(path: Path) -> list[_Entry]:
    """Frames of `.npz` or `.npy`."""
    if path.suffix.lower() == ".npy":
        try:
            values: Mapping[str, Any] = {"landmarks": _small(np.load(path, mmap_mode="r", allow_pickle=False))}
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"'{path.name}' cannot be read: {error}.", FIX) from None
    else:
        values = Folder(path.parent).npz(path.name).values
    points = _get(values, POINTS)
    if points is None:
        raise UserError(
            f"'{path.name}' has no array 'landmarks': {', '.join(list(values)[:6])}.", "name it landmarks, [T,478,3]"
        )
    if points.dtype.kind not in "fiu" or points.ndim != 3:
        shape = " x ".join(map(str, points.shape))
        raise UserError(f"'{path.name}': 'landmarks' is {shape} of {points.dtype}, expected numbers T x 478 x 3.", FIX)
    count = len(points)

    def column(names: Sequence[str], shape: tuple[int | None, ...], what: str) -> Any:
        value = _get(values, names)
        if value is None:
            return None
        if value.ndim != len(shape) + 1 or len(value) != count:
            raise UserError(
                f"'{path.name}': {what} are {' x '.join(map(str, value.shape))}, its landmarks have {count} rows.",
                FIX,
            )
        return value

    index, times, ms = column(INDEX, (), "numbers"), column(SECONDS, (), "times"), column(MILLISECONDS, (), "times")
    scores, matrices, names = (
        column(SCORES, (None,), "blendshapes"),
        column(MATRICES, (4, 4), "matrices"),
        _get(values, SCORE_NAMES),
    )
    if scores is not None and (names is None or len(names) != scores.shape[1]):
        raise UserError(
            f"'{path.name}' has blendshapes without their names.", "write them as 'blendshape_names', one a column"
        )
    entries = []
    for row in range(count):
        where = f"'{path.name}', row {row}"
        item: dict[str, Any] = {"index": None if index is None else index[row].item()}
        item["time"] = None if times is None else times[row].item()
        item["time_ms"] = None if ms is None else ms[row].item()
        entry = _entry({**item, "landmarks": None}, where)
        found = _checked_points(np.asarray(points[row], np.float64), f"{where}: landmarks")
        if found is not None:
            score = None
            if scores is not None and np.isfinite(scores[row]).all():
                score = _known_scores(dict(zip(map(str, names), map(float, scores[row]), strict=True)), where)
            matrix = None
            if matrices is not None and np.isfinite(matrices[row]).all():
                matrix = _checked_matrix(
                    np.asarray(matrices[row], np.float64), f"{where}: 'facial_transformation_matrix'"
                )
            entry = replace(entry, faces=[Seen(found, score, matrix)])
        entries.append(entry)
    return entries


def _small(array: NDArray[Any]) -> NDArray[Any]:
    if array.nbytes > MAX_ARRAY_BYTES:
        raise ValueError(f"it has more than {MAX_ARRAY_BYTES >> 20} MB")
    return np.asarray(array)


def _rows(path: Path) -> list[_Entry]:
    """Frames of a CSV file: a row a frame, or a row a landmark."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"'{path.name}' is not text in UTF-8.", "save it as CSV (UTF-8)") from None
    first = text.partition("\n")[0]
    table = csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count))
    header = [cell.strip() for cell in next(table, [])]
    places = {}
    for column, name in enumerate(header):
        if (match := WIDE.fullmatch(name)) is not None:
            number, axis = match["n"] or match["m"], match["a"] or match["b"]
            places[int(number), "xyz".index(axis.lower())] = column
    return list(_wide(path.name, header, table, places) if len(places) > 3 else _long(path.name, header, table))


def _wide(name: str, header: list[str], table: Any, places: dict[tuple[int, int], int]) -> Iterator[_Entry]:
    from pipeline.heads import EXPRESSIONS

    count = max(number for number, _ in places) + 1
    first = min(number for number, _ in places)  # some count from 1
    scored = {column: title for column, title in enumerate(header) if title in EXPRESSIONS}
    for line, row in enumerate(table, 2):
        if not any(cell.strip() for cell in row):
            continue
        where = f"'{name}', line {line}"
        if len(row) != len(header):
            raise UserError(f"{where}, has {len(row)} cells, its header {len(header)}.", "it may be cut off")
        points = np.full((count - first, 3), np.nan)
        for (number, axis), column in places.items():
            points[number - first, axis] = _number(row[column], where, header[column])
        entry = _entry({**_cells(header, row, where), "landmarks": None}, where)
        found = _checked_points(points, f"{where}: landmarks")
        if found is not None:
            score = {title: _number(row[column], where, title) for column, title in scored.items()}
            known = _known_scores(score, where) if score and np.isfinite(list(score.values())).all() else None
            entry = replace(entry, faces=[Seen(found, known, None)])
        yield entry


def _long(name: str, header: list[str], table: Any) -> Iterator[_Entry]:
    plain = [_plain(title) for title in header]
    which = next((column for column, title in enumerate(plain) if title.startswith(("landmark", "point", "id"))), None)
    lacking = [axis for axis in "xyz" if axis not in plain]
    if which is None or lacking or not any(title in (*INDEX, *SECONDS, *MILLISECONDS) for title in plain):
        raise UserError(
            f"'{name}' has neither columns x0, y0, z0, ... nor frame, landmark, x, y, z: '{','.join(header)[:80]}'.",
            "write a row a frame, or a row a landmark",
        )
    axes = [plain.index(axis) for axis in "xyz"]
    frames: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    items: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line, row in enumerate(table, 2):
        if not any(cell.strip() for cell in row):
            continue
        where = f"'{name}', line {line}"
        if len(row) != len(header):
            raise UserError(f"{where}, has {len(row)} cells, its header {len(header)}.", "it may be cut off")
        item = _cells(header, row, where)
        key = tuple(item.values())
        if len(frames) >= MAX_FRAMES:
            raise UserError(f"'{name}' has more than {MAX_FRAMES:,} frames.", "write it as .npz")
        number = _number(row[which], where, header[which])
        if not number >= 0 or number != int(number) or int(number) in frames.setdefault(key, {}):
            raise UserError(f"{where}: landmark '{row[which]}' is no number of one, or comes twice in its frame.", FIX)
        items[key] = item
        frames[key][int(number)] = [_number(row[column], where, header[column]) for column in axes]
    for key, points in frames.items():
        where = f"'{name}', frame {key[0]:g}"
        lacks = next((number for number in range(max(points) + 1) if number not in points), None)
        if lacks is not None:
            raise UserError(f"{where} has no landmark {lacks}.", FIX)
        found = _checked_points(np.array([points[number] for number in range(len(points))]), f"{where}: landmarks")
        entry = _entry({**items[key], "landmarks": None}, where)
        yield replace(entry, faces=[] if found is None else [Seen(found, None, None)])


def _cells(header: list[str], row: list[str], where: str) -> dict[str, float]:
    """The row's frame and time."""
    return {
        title: _number(row[column], where, title)
        for column, title in enumerate(header)
        if _plain(title) in (*INDEX, *SECONDS, *MILLISECONDS) and row[column].strip()
    }


def _number(text: str, where: str, column: str) -> float:
    """A cell's number; NaN where it is empty.

    Raises:
        UserError: it is none.
    """
    if not text.strip():
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}, column '{column}': '{text[:40]}' is no number.", FIX) from None


def _pair(values: Floats) -> str:
    return f"({values[0]:.3g}, {values[1]:.3g})"
