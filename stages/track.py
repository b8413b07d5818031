"""Track: where the face is in each frame, its expression scores, and which frames to trust.

MediaPipe looks at each frame for itself (its video mode lags behind fast motion); smoothing is done here, over time and
in both directions. "Detected" says nothing of hands or of the frame's edge, so both are told separately. Each shot is
tracked for itself; which of its faces is the subject is told by `pipeline.recognition`.
"""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.advice import BLUR_SHARE
from pipeline.assets import FACE_LANDMARKER, HAND_LANDMARK, PALM_DETECTION, asset_path
from pipeline.config import TrackConfig
from pipeline.dataset import write_atomic
from pipeline.errors import StageError
from pipeline.faces import FACE_OVAL, Detector, Face
from pipeline.frames import FrameSet, contact_sheet, counted, evenly, ranges_text, save_image
from pipeline.heads import EXPRESSIONS
from pipeline.interchange.recording import has_recording
from pipeline.picture_quality import face_detail
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    from pipeline.coefficients import Coefficients
    from pipeline.interchange.mediapipe_dump import Dump
    from pipeline.recognition import Portrait, Recognizer

CHUNK = 64
"""Frames whose detections are kept together for a resumed run."""
LANDMARKS, SCORES = 478, 52
CANONICAL_CM = 0.01
"""MediaPipe's canonical face is in centimetres."""
LINK_GAP_FRAMES = 15
"""A face that is gone for longer starts a new track."""
OFF_FRAME_SHARE = 0.05
"""Share of the face's outline outside the picture from which a frame counts as off-frame."""
COVERED_ENTER, COVERED_LEAVE = 0.1, 0.08
"""Share of the face that must look wrong for an occlusion to begin, and to go on."""
SMALL_FACE_PX = 100


LOOKS = 8
"""Frames in which a dump of landmarks is held against what is seen."""
PORTRAIT_FRAMES = 5
"""Frames from which a face is described."""
How = Literal["longest", "number", "photograph"]


@dataclass
class Track:
    """One face through the frames of a shot."""

    faces: dict[int, Face] = field(default_factory=dict)
    last: int = -1


@dataclass
class Subject:
    """The person who is tracked, over all shots, and how this one was told."""

    faces: dict[int, Face]
    how: How
    people: list[Face]
    """The faces in the frame where most are seen at once, from the left: their numbers count from 1."""
    counted_in: int
    """That frame."""
    person: int
    """Number of the subject among them; 0 where it is not there."""
    recognizer: str
    """The face recognition model that compared faces; empty where none did."""
    ranked: list[int] = field(default_factory=list)
    """Shots with several faces, of which the one most alike was taken."""
    others: list[int] = field(default_factory=list)
    """Shots that show faces, but not the subject's."""
    doubted: list[int] = field(default_factory=list)
    """Shots in which the face that was taken may be somebody else's."""
    mirrored: list[int] = field(default_factory=list)
    """Frames that show another face which copies the subject's, as a mirror does."""


def track(run: StageRun) -> Result:
    """Write `track.npz` and a contact sheet.

    Raises:
        StageError: no face is seen long enough, the person asked for is not there, or the tracker cannot start.
        UserError: the photograph of the person, or a model to compare it with, is missing.
    """
    if has_recording(run):
        from pipeline.interchange import fill_track

        return fill_track.fill(run)
    config = run.config.track
    frames = FrameSet.load(run.subject.stage("decode"))
    model = asset_path(FACE_LANDMARKER, fetch=False)
    with Detector(model, config.max_faces, config.min_confidence) as detector:
        given = Given.read(run, frames) if config.given else None
        if given is not None and given.dump is not None:
            seen = given.faces(run, frames, detector)
        else:
            seen = _detect_all(run, frames, detector)
        names = detector.names or EXPRESSIONS
    lengths = np.bincount(frames.shots)
    tracks = [
        one
        for one in link_faces(seen, frames.shots)
        if longest_run(np.array(sorted(one.faces))) >= min(config.min_run_frames, lengths[frames.shots[one.last]])
    ]
    if not tracks:
        raise _no_face(run, frames, sum(bool(faces) for faces in seen))
    subject = _find_subject(run, frames, tracks)
    subject.mirrored = mirrored_frames(subject.faces, tracks, names)
    arrays = _arrays(frames, subject.faces, names, config)
    arrays["others"] = other_boxes(seen, subject.faces, tracks)
    arrays["hands"] = _find_hands(run, frames, arrays)
    _judge(run, frames, arrays)
    if given is not None and given.table is not None:
        given.put_scores(run, frames, arrays)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(run.work / "track.npz", buffer.getvalue())
    _write_overlay(run.work / "overlay.jpg", frames, arrays, subject)
    result = _result(frames, arrays, subject, max(len(faces) for faces in seen))
    return result if given is None else given.told(result)


@dataclass
class Given:
    """What another tracker's file of the video says: a take's table, or a dump of landmarks."""

    name: str
    table: Coefficients | None = None
    dump: Dump | None = None
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(run: StageRun, frames: FrameSet) -> Given:
        """Read it from the source.

        Raises:
            UserError: it is missing, or at fault.
            StageError: the subject has several clips.
        """
        from pipeline.interchange.livelink import read_table
        from pipeline.interchange.mediapipe_dump import read_dump
        from pipeline.source import tracking_file

        if len(frames.record["clips"]) > 1:
            raise StageError(
                f"The tracking that was given tells of one video; '{run.subject.name}' has several.",
                "do without: --set track.given=",
            )
        path, kind, name = tracking_file(run.subject, run.config.track.given)
        if kind == "livelink":
            return Given(name, table=read_table(path))
        return Given(name, dump=replace(read_dump(path), name=name))

    def faces(self, run: StageRun, frames: FrameSet, detector: Detector) -> list[list[Face]]:
        """The dump's faces of each frame, checked against what is seen in a few, or all where it lacks scores or poses.

        Raises:
            UserError: its faces are elsewhere than those in the frames.
        """
        from pipeline.interchange.mediapipe_dump import completed

        assert self.dump is not None
        dumped, notes = self.dump.faces(frames, EXPRESSIONS)
        if self.dump.whole:
            looks = set(evenly(len(frames), LOOKS))
            seen = [detector.detect(frames.picture(i)) if i in looks else [] for i in range(len(frames))]
        else:
            seen = _detect_all(run, frames, detector)
        if detector.names not in ((), EXPRESSIONS):
            raise StageError("MediaPipe's scores come in another order than ARKit's names.", "report it as a bug")
        faces, more, misfit = completed(dumped, seen, self.dump.name, int(frames.contents[0, 0]))
        self.notes += [*notes, *more]
        self.metrics["misfit_share"] = None if misfit is None else round(misfit, 4)
        return faces

    def put_scores(self, run: StageRun, frames: FrameSet, arrays: dict[str, Any]) -> None:
        """Take the table's coefficients for the scores of the frames that it has.

        Raises:
            UserError: it has none of them.
        """
        from pipeline.interchange.livelink import on_frames
        from pipeline.source import source_paths

        assert self.table is not None
        names = tuple(str(name) for name in arrays["blendshape_names"])
        seen, detected = arrays["blendshapes"].astype(np.float64), arrays["detected"]
        offset = run.config.track.offset_seconds
        taken = on_frames(self.table, names, frames.times, seen, detected, source_paths(run.subject)[0], offset)
        arrays["blendshapes"][taken.there] = taken.scores[taken.there]
        self.notes.append(f"it begins {taken.offset:.3f} s after the video ({taken.how})")
        if not taken.there.all():
            self.notes.append(f"it has nothing of {ranges_text(~taken.there)}, where MediaPipe's scores stay")
        self.metrics |= {"given_offset_seconds": round(taken.offset, 4), "given_frames": int(taken.there.sum())}
        both = taken.there & detected
        if taken.turned and both.any():
            apart = taken.turns_apart(arrays["Ts_cam_face"][:, :3, :3], both)
            self.notes.append(f"its head's turns are {apart:.1f} degrees from the video's")
            self.metrics["given_turn_degrees"] = round(apart, 2)

    def told(self, result: Result) -> Result:
        """The stage's result with what came from the file."""
        what = "Coefficients" if self.table is not None else "Landmarks"
        text = f"{result.verdict.text} {what} are those of '{self.name}': {'; '.join(self.notes)}."
        verdict = replace(result.verdict, text=text)
        return replace(result, verdict=verdict, metrics={**result.metrics, "given": self.name, **self.metrics})


def link_faces(seen: list[list[Face]], shots: NDArray[np.int64]) -> list[Track]:
    """Join the faces of successive frames into tracks: nearest first, within half a face's size and a short gap.

    Args:
        seen: the faces of each frame.
        shots: [T] number of each frame's shot; no track crosses a cut.
    """
    tracks: list[Track] = []
    for index, faces in enumerate(seen):
        pairs = []
        for number, known in enumerate(tracks):
            gap = index - known.last
            if gap > LINK_GAP_FRAMES or shots[known.last] != shots[index]:
                continue
            old = known.faces[known.last].box
            for which, face in enumerate(faces):
                distance, ratio = _apart(old, face.box)
                if distance < 0.5 + 0.1 * (gap - 1) and ratio < 1.5:
                    pairs.append((distance, number, which))
        taken: set[int] = set()
        for _, number, which in sorted(pairs):
            if which not in taken and tracks[number].last < index:
                tracks[number].faces[index], tracks[number].last = faces[which], index
                taken.add(which)
        for which, face in enumerate(faces):
            if which not in taken:
                tracks.append(Track({index: face}, index))
    return tracks


class Portraits:
    """Descriptions of the tracks' faces, each made when it is first asked for."""

    def __init__(self, frames: FrameSet, recognizer: Recognizer | None) -> None:
        self._frames, self.recognizer = frames, recognizer
        self._made: dict[int, Portrait] = {}

    def of(self, track: Track) -> Portrait:
        """The description of a track's face, from frames that show it most from the front."""
        from pipeline.recognition import portrait

        if id(track) not in self._made:
            indices = sorted(track.faces)
            spread = [indices[place] for place in evenly(len(indices), 2 * PORTRAIT_FRAMES)]
            frontal = sorted(spread, key=lambda index: -float(track.faces[index].pose[2, 2]))[:PORTRAIT_FRAMES]
            samples = [(self._frames.picture(index), track.faces[index]) for index in sorted(frontal)]
            self._made[id(track)] = portrait(samples, self.recognizer)
        return self._made[id(track)]


def _find_subject(run: StageRun, frames: FrameSet, tracks: list[Track]) -> Subject:
    """Choose the person who is meant, and find this person in every shot.

    Raises:
        StageError: the person asked for is not there.
        UserError: the photograph, or a model to compare it with, is missing.
    """
    from pipeline.recognition import different, find_recognizer, likeness, need_recognizer, surely_same

    config = run.config.track
    by_shot = [[one for one in tracks if frames.shots[one.last] == shot] for shot in range(frames.shots[-1] + 1)]
    in_view = np.bincount(np.concatenate([list(one.faces) for one in tracks]), minlength=len(frames))
    counted_in = int(in_view.argmax())
    present = sorted(
        (t for t in tracks if counted_in in t.faces), key=lambda t: float(t.faces[counted_in].box[[0, 2]].sum())
    )
    needed = len(tracks) > 1 or config.like
    recognizer = need_recognizer() if config.like else find_recognizer() if needed else None
    portraits = Portraits(frames, recognizer)
    how: How
    if config.like:
        how, chosen = "photograph", _most_like_photo(run, tracks, portraits)
    elif config.person is not None:
        if config.person > len(present):
            raise _no_such_person(config, counted_in, len(present))
        how, chosen = "number", present[config.person - 1]
    else:
        how, chosen = "longest", max(tracks, key=lambda one: (_presence(one, tracks, portraits), len(one.faces)))
    subject = Subject(
        {}, how, [one.faces[counted_in] for one in present], counted_in, 0, recognizer.name if recognizer else ""
    )
    home = int(frames.shots[chosen.last])
    for shot, there in enumerate(by_shot):
        if not there:
            continue
        first = chosen
        if shot != home:
            reference = portraits.of(chosen)
            first = max(there, key=lambda one: likeness(reference, portraits.of(one)))
            same_clip = frames.clips[first.last] == frames.clips[chosen.last]
            if different(reference, portraits.of(first), one_clip=bool(same_clip)):
                # A clip that is given is meant to show the subject; only a recognition model says for sure it does not.
                if same_clip or recognizer is not None:
                    subject.others.append(shot)
                    continue
                subject.doubted.append(shot)
            elif same_clip and not surely_same(reference, portraits.of(first)):
                subject.doubted.append(shot)
            if len(there) > 1:
                subject.ranked.append(shot)
        subject.faces.update(_with_returns(first, there, portraits).faces)
    taken = subject.faces.get(counted_in)
    subject.person = next((number for number, face in enumerate(subject.people, 1) if face is taken), 0)
    return subject


def _presence(one: Track, tracks: list[Track], portraits: Portraits) -> int:
    """Number of frames, of all shots, that surely show a track's face."""
    from pipeline.recognition import surely_same

    beside = [t for t in tracks if t is not one and not set(t.faces) & set(one.faces)]
    mine = [t for t in beside if surely_same(portraits.of(one), portraits.of(t))]
    return len(one.faces) + sum(len(t.faces) for t in mine)


def _most_like_photo(run: StageRun, tracks: list[Track], portraits: Portraits) -> Track:
    """The track whose face is most like the photograph's.

    Raises:
        StageError: none is like it.
    """
    from pipeline.recognition import SAME_EMBEDDING, photo_embedding
    from pipeline.source import photo_path

    assert portraits.recognizer is not None
    wanted = photo_embedding(photo_path(run.subject, run.config.track.like), portraits.recognizer)
    cosines = [float(wanted @ embedding) for one in tracks if (embedding := portraits.of(one).embedding) is not None]
    best = int(np.argmax(cosines))
    if cosines[best] < SAME_EMBEDDING:
        raise StageError(
            f"Nobody in '{run.subject.name}' looks like the photograph: the most alike of "
            f"{counted(len(tracks), 'face')} reaches {cosines[best]:.2f}, {SAME_EMBEDDING} is needed.",
            "give another photograph with --like, or choose with --person",
        )
    return tracks[best]


def _no_such_person(config: TrackConfig, frame: int, people: int) -> StageError:
    more = "" if people < config.max_faces else f"; to look for more faces: --set track.max_faces={2 * people}"
    choices = "leave --person out" if people == 1 else f"choose from --person 1 to {people}, numbered from the left"
    return StageError(
        f"There is no person {config.person}: at most {counted(people, 'face')} at a time can be seen, first in frame "
        f"{frame}.",
        choices + more,
    )


def longest_run(indices: NDArray[np.int64]) -> int:
    """Length of the longest run of consecutive numbers in an increasing list."""
    if not len(indices):
        return 0
    breaks = np.flatnonzero(np.diff(indices) > 1)
    return int(np.diff(np.concatenate([[-1], breaks, [len(indices) - 1]])).max())


def short_runs(flags: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """Flags that belong to runs shorter than `length`."""
    short = np.zeros_like(flags)
    for first, last in _runs(flags):
        if last - first < length:
            short[first:last] = True
    return short


def smooth(
    values: NDArray[np.floating], times: NDArray[np.float64], valid: NDArray[np.bool_], seconds: float
) -> NDArray[np.float64]:
    """Smooth over time without delay: at each time, a parabola fitted to the neighbours with Gaussian weights.

    The parabola keeps peaks such as blinks that a plain average cuts (Savitzky and Golay 1964, for uneven times).

    Args:
        values: [T, ...] at `times`; rows that are not valid are neither used nor changed.
        times: [T] seconds.
        valid: [T] which rows count; a gap separates what is before from what is after.
        seconds: standard deviation of the weights; 0 changes nothing.
    """
    flat = values.reshape(len(values), -1).astype(np.float64)
    result = flat.copy()
    if seconds > 0:
        for first, last in _runs(valid):
            for index in range(first, last):
                near = np.flatnonzero(np.abs(times[first:last] - times[index]) <= 3 * seconds) + first
                offset = (times[near] - times[index]) / seconds
                degree = min(2, len(near) - 1)
                # Squared, the weights of a least-squares row are its Gaussian.
                weight = np.exp(-(offset**2) / 4)
                rows = np.linalg.pinv(weight[:, None] * np.vander(offset, degree + 1, increasing=True))
                result[index] = (rows[0] * weight) @ flat[near]
    return result.reshape(values.shape)


def hysteresis(values: NDArray[np.float64], enter: float, leave: float) -> NDArray[np.bool_]:
    """Runs above `leave` that rise above `enter` somewhere."""
    flags = values > leave
    for first, last in _runs(flags):
        if values[first:last].max() <= enter:
            flags[first:last] = False
    return flags


def _detect_all(run: StageRun, frames: FrameSet, detector: Detector) -> list[list[Face]]:
    """Faces of every frame: on whole frames in chunks that survive a crash, then on crops where there was none."""
    seen: list[list[Face]] = []
    with run.reporter.task("track", len(frames), "frames") as task:
        for first in range(0, len(frames), CHUNK):
            run.check_stop()
            file = run.scratch / f"faces-{first:06d}.npz"
            if file.exists():
                chunk, detector.names = _load_faces(file)
            else:
                chunk = [detector.detect(frames.picture(i)) for i in range(first, min(first + CHUNK, len(frames)))]
                _save_faces(file, chunk, detector.names)
            seen += chunk
            task.advance(len(chunk))
    if all(seen):
        return seen
    for first, last in _ranges(frames.clips):
        if not any(seen[first:last]):
            _search_tiles(run, frames, detector, seen, range(first, last))
    for first, last in _ranges(frames.shots):
        order = range(first + 1, last)
        for step, indices in ((1, order), (-1, order[::-1])):
            for index in indices:
                at, beside = (index, index - 1) if step > 0 else (index - 1, index)
                if not seen[at] and seen[beside]:
                    run.check_stop()
                    seen[at] = _look_near(frames.picture(at), seen[beside], detector)
    return seen


def _search_tiles(run: StageRun, frames: FrameSet, detector: Detector, seen: list[list[Face]], clip: range) -> None:
    """Look for a face too small for the whole frame in overlapping halves and thirds of some frames of a clip."""
    chosen = [clip[place] for place in evenly(len(clip), 24)]
    with run.reporter.task("track: small faces", len(chosen), "frames") as task:
        for index in chosen:
            run.check_stop()
            image = frames.picture(index)
            height, width = image.shape[:2]
            for share in (2, 3):
                side = math.ceil(max(width, height) / share)
                tops = range(0, max(1, height - side // 2), side // 2)
                lefts = range(0, max(1, width - side // 2), side // 2)
                tiles = [(left, top) for top in tops for left in lefts]
                for left, top in tiles:
                    seen[index] = detector.detect(image[top : top + side, left : left + side], (left, top))
                    if seen[index]:
                        break
                if seen[index]:
                    break
            task.advance()


def _look_near(image: NDArray[np.uint8], faces: list[Face], detector: Detector) -> list[Face]:
    """Look again in a crop around where a face was in the frame beside, black where the crop leaves the frame."""
    import cv2

    largest = max((face.box for face in faces), key=lambda box: box[2] - box[0])
    side = max(64, int(3 * (largest[2:] - largest[:2]).max()))
    left, top = ((largest[:2] + largest[2:]) / 2 - side / 2).astype(int)
    height, width = image.shape[:2]
    inside = image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    if not inside.size:
        return []
    right, bottom = max(0, left + side - width), max(0, top + side - height)
    crop = cv2.copyMakeBorder(inside, max(0, -top), bottom, max(0, -left), right, cv2.BORDER_CONSTANT)
    return detector.detect(crop, (int(left), int(top)))


def _save_faces(file: Path, chunk: list[list[Face]], names: tuple[str, ...]) -> None:
    faces = [face for frame in chunk for face in frame]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        counts=np.array([len(frame) for frame in chunk]),
        landmarks=np.array([face.landmarks for face in faces], np.float32).reshape(-1, LANDMARKS, 3),
        scores=np.array([face.scores for face in faces], np.float32).reshape(-1, SCORES),
        poses=np.array([face.pose for face in faces], np.float32).reshape(-1, 4, 4),
        names=np.array(names, "U32"),
    )
    write_atomic(file, buffer.getvalue())


def _load_faces(file: Path) -> tuple[list[list[Face]], tuple[str, ...]]:
    with np.load(file, allow_pickle=False) as data:
        faces = iter([Face(*parts) for parts in zip(data["landmarks"], data["scores"], data["poses"], strict=True)])
        chunk = [[next(faces) for _ in range(count)] for count in data["counts"]]
        return chunk, tuple(str(name) for name in data["names"])


def _with_returns(subject: Track, tracks: list[Track], portraits: Portraits) -> Track:
    """Add the tracks of the same shot that are the same face back again, whether after a moment or after a while.

    A face that is seen beside the subject is a rival: somebody else. Without rivals, what comes back near the place
    it left is the subject, and elsewhere unless it is told to be somebody else. With rivals it must look like the
    subject, and more so than like any of them.
    """
    from pipeline.recognition import different, likeness, surely_same

    whole = Track(dict(subject.faces), subject.last)
    rivals = [one for one in tracks if one is not subject and set(one.faces) & set(subject.faces)]
    for other in sorted(tracks, key=lambda t: -len(t.faces)):
        if other is subject or set(other.faces) & set(whole.faces):
            continue
        first = min(other.faces)
        nearest = min(whole.faces, key=lambda index: abs(index - first))
        distance, ratio = _apart(whole.faces[nearest].box, other.faces[first].box)
        same = distance < 1.0 and ratio < 1.4
        if rivals:
            mine, its = portraits.of(subject), portraits.of(other)
            closest = max(likeness(its, portraits.of(rival)) for rival in rivals)
            same = (same or surely_same(mine, its)) and likeness(mine, its) > closest
        elif not same:
            same = not different(portraits.of(subject), portraits.of(other), one_clip=True)
        if same:
            whole.faces.update(other.faces)
    return whole


def _apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """How far two boxes' centres are apart in units of the larger one, and the ratio of their sizes."""
    sizes = [float((box[2:] - box[:2]).max()) for box in (a, b)]
    centres = [(box[2:] + box[:2]) / 2 for box in (a, b)]
    return float(np.linalg.norm(centres[0] - centres[1])) / max(*sizes, 1e-6), max(sizes) / max(min(sizes), 1e-6)


def _arrays(frames: FrameSet, faces: dict[int, Face], names: tuple[str, ...], config: TrackConfig) -> dict[str, Any]:
    """The arrays of `track.npz` but for the flags: raw, smoothed within each shot, gaps filled."""
    count, times = len(frames), frames.times
    detected = np.zeros(count, bool)
    detected[list(faces)] = True
    shots = _ranges(frames.shots)
    for first, last in shots:
        detected[first:last] &= ~short_runs(detected[first:last], min(config.min_run_frames, last - first))
    raw = np.full((count, LANDMARKS, 3), np.nan, np.float32)
    scores = np.zeros((count, SCORES), np.float32)
    poses = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
    for index in np.flatnonzero(detected):
        face = faces[int(index)]
        raw[index], scores[index], poses[index] = face.landmarks, face.scores, face.pose
    # To OpenCV's camera axes and metres: y and z of MediaPipe's camera turn round, the face's own axes are ours.
    poses[:, 1:3] *= -1
    poses[:, :3, 3] *= CANONICAL_CM
    smoothed, even_scores = raw.astype(np.float64), scores.astype(np.float64)
    known = np.flatnonzero(detected)
    low, high = np.empty(count, np.int64), np.empty(count, np.int64)
    for first, last in shots:
        rows = slice(first, last)
        smoothed[rows] = smooth(raw[rows], times[rows], detected[rows], config.smooth_seconds)
        even_scores[rows] = smooth(scores[rows], times[rows], detected[rows], config.smooth_seconds)
        # A shot without the subject takes the nearest face of the shots around, so that every row holds numbers.
        own = known[(known >= first) & (known < last)]
        near = own if len(own) else known
        at = np.arange(first, last)
        low[rows] = near[np.clip(np.searchsorted(near, at, side="right") - 1, 0, len(near) - 1)]
        high[rows] = near[np.clip(np.searchsorted(near, at), 0, len(near) - 1)]
    part = np.clip((times - times[low]) / np.maximum(times[high] - times[low], 1e-9), 0, 1)
    nearest = np.where(part < 0.5, low, high)

    def filled(values: NDArray[np.float64]) -> NDArray[np.float32]:
        share = part.reshape(-1, *[1] * (values.ndim - 1))
        return ((1 - share) * values[low] + share * values[high]).astype(np.float32)

    landmarks = filled(smoothed)
    points = landmarks[..., :2]
    return {
        "landmarks": landmarks,
        "landmarks_raw": raw,
        "blendshapes": filled(np.clip(even_scores, 0, 1)),
        "blendshape_names": np.array(names, "U32"),
        "Ts_cam_face": poses[nearest],
        "detected": detected,
        "boxes": np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1),
        "shots": frames.shots,
        "clips": frames.clips,
    }


def mirrored_frames(subject: dict[int, Face], tracks: list[Track], names: tuple[str, ...]) -> list[int]:
    """Frames, in order, with a face beside the subject's that moves as the subject does, left and right exchanged."""
    from pipeline.matting.people import MIRROR_LIKENESS, mirror_likeness

    frames: set[int] = set()
    for one in tracks:
        both = sorted(index for index, face in one.faces.items() if subject.get(index, face) is not face)
        if not both:
            continue
        scores = [np.stack([faces[index].scores for index in both]) for faces in (subject, one.faces)]
        turns = [np.stack([faces[index].pose[:3, :3] for index in both]) for faces in (subject, one.faces)]
        if mirror_likeness(scores[0], turns[0], scores[1], turns[1], names) > MIRROR_LIKENESS:
            frames.update(both)
    return sorted(frames)


def other_boxes(seen: list[list[Face]], subject: dict[int, Face], tracks: list[Track]) -> NDArray[np.float32]:
    """Boxes [T, P, 4] (x0, y0, x1, y1) of the faces that are not the subject's; NaN where there are fewer than P.

    Args:
        seen: the faces of each frame.
        subject: the subject's by frame.
        tracks: the faces that are there long enough; a glimpse of one is none.
    """
    kept = {id(face) for one in tracks for face in one.faces.values()}
    others = [
        [face.box for face in faces if face is not subject.get(index) and id(face) in kept]
        for index, faces in enumerate(seen)
    ]
    boxes = np.full((len(seen), max(map(len, others)), 4), np.nan, np.float32)
    for index, found in enumerate(others):
        for number, box in enumerate(found):
            boxes[index, number] = box
    return boxes


def _find_hands(run: StageRun, frames: FrameSet, arrays: dict[str, Any]) -> NDArray[np.float32]:
    """Hands near the face [T, N, 21, 2], looked for in every few frames and carried to those between."""
    from pipeline.hands import LOOK_EVERY, HandFinder, bridge_hands, joined

    detected, boxes = arrays["detected"], arrays["boxes"]
    models = (asset_path(name, fetch=False) for name in (PALM_DETECTION, HAND_LANDMARK))
    parts = []
    with (
        HandFinder(*models) as finder,
        run.reporter.task("track: hands", len(frames), "frames") as task,
    ):
        for first, last in _ranges(frames.shots):
            looks = {}
            for index in range(first, last):
                if detected[index] and (index - first) % LOOK_EVERY == 0:
                    run.check_stop()
                    looks[index - first] = finder.find(frames.picture(index), boxes[index])
            parts.append(bridge_hands(looks, frames.times[first:last], detected[first:last]))
            task.advance(last - first)
    return joined(parts)


def _judge(run: StageRun, frames: FrameSet, arrays: dict[str, Any]) -> None:
    """Add what is covered, the flags (occluded, off-frame, blurred, usable) and the confidence."""
    import cv2

    from pipeline.matting.occluders import hand_pixels
    from pipeline.occlusion import (
        covered_landmarks,
        covered_share,
        departures,
        flat_face,
        sample_face,
        shown_in,
        texel_places,
    )

    detected, landmarks = arrays["detected"], arrays["landmarks"]
    oval = landmarks[:, FACE_OVAL, :2]
    outside = ((oval < 0) | (oval > frames.contents[:, None])).any(axis=2).mean(axis=1)
    rotations = arrays["Ts_cam_face"][:, :3, :3].astype(np.float64)
    centred = landmarks - landmarks.mean(axis=1, keepdims=True)
    # The face's axes have y up and z forward, the picture's y down and z away.
    to_front = rotations * np.array([1.0, -1.0, -1.0])
    frontal = np.einsum("tji,tlj->tli", to_front, centred)
    frontal /= np.linalg.norm(frontal, axis=(1, 2), keepdims=True)
    layout = flat_face(np.median(frontal[detected], axis=0))
    values = np.zeros((len(frames), len(layout.texels)), np.float32)
    visible, in_hand = np.zeros(values.shape, bool), np.zeros(values.shape, bool)
    behind = np.zeros((len(frames), LANDMARKS), bool)
    detail = np.zeros(len(frames))
    for index in np.flatnonzero(detected):
        run.check_stop()
        grey = cv2.cvtColor(frames.picture(int(index)), cv2.COLOR_RGB2GRAY)
        values[index], visible[index] = sample_face(grey, landmarks[index], layout)
        detail[index] = face_detail(grey, arrays["boxes"][index])
        hands = hand_pixels(arrays["hands"][index], grey.shape)
        in_hand[index] = shown_in(hands, texel_places(landmarks[index], layout)) & visible[index]
        behind[index] = shown_in(hands, landmarks[index, :, :2])
    arrays["covered"] = behind
    covered = np.zeros(len(frames))
    occluded = np.zeros(len(frames), bool)
    for first, last in _ranges(frames.shots):
        # Light and framing change at a cut, so that each shot is judged by itself.
        seen = first + np.flatnonzero(detected[first:last])
        if not len(seen):
            continue
        odd = departures(values[seen], visible[seen], layout, arrays["blendshapes"][seen], rotations[seen])
        covered[seen] = covered_share(odd | in_hand[seen], visible[seen])
        behind[seen] |= covered_landmarks(odd | in_hand[seen], layout)
        shot = covered[first:last]
        # A few odd frames are not an occlusion, and one clear frame does not end it.
        steady = np.array([np.median(shot[max(0, i - 2) : i + 3]) for i in range(len(shot))])
        flags = detected[first:last] & hysteresis(steady, COVERED_ENTER, COVERED_LEAVE)
        occluded[first:last] = flags & ~short_runs(flags, run.config.track.min_run_frames)
    arrays["occluded"] = occluded
    arrays["off_frame"] = detected & (outside > OFF_FRAME_SHARE)
    clear = detected & ~arrays["occluded"] & ~arrays["off_frame"]
    arrays["blurred"] = np.zeros(len(frames), bool)
    for first, last in _ranges(frames.clips):
        there = detected[first:last]
        if there.any():
            plain = clear[first:last]
            usual = np.median(detail[first:last][plain if plain.any() else there])
            arrays["blurred"][first:last] = there & (detail[first:last] < BLUR_SHARE * usual)
    arrays["usable"] = clear
    arrays["confidence"] = np.where(detected, (1 - covered) * (1 - outside), 0).astype(np.float32)


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Half-open ranges of set flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(first), int(last)) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def _ranges(numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Half-open ranges of equal numbers, in order: the frames of each shot or clip."""
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return list(itertools.pairwise(edges))


def _no_face(run: StageRun, frames: FrameSet, seen: int) -> StageError:
    first, last = frames.times[0], frames.times[-1]
    where = f"the {len(frames)} frames of '{run.subject.name}' ({first:.1f} to {last:.1f} s of the video)"
    least = run.config.track.min_run_frames
    what = f"A face is seen in only {seen} of {where}, never in {least} in a row." if seen else f"No face in {where}."
    return StageError(
        what, "film one person who faces the camera, in good light, the face at least 100 pixels wide, and run that"
    )


def _write_overlay(path: Path, frames: FrameSet, arrays: dict[str, Any], subject: Subject) -> None:
    """A contact sheet with the landmarks drawn: green where usable, red where not; first the people's numbers."""
    import cv2

    images, labels = [], []
    if len(subject.people) > 1:
        images.append(_numbered(frames.image(subject.counted_in), subject))
        labels.append(f"{subject.counted_in} numbers for --person")
    detected = np.flatnonzero(arrays["detected"])
    for index in detected[evenly(len(detected), 8 - len(images))].tolist():
        image = frames.image(index)
        colour = (0, 255, 0) if arrays["usable"][index] else (255, 40, 40)
        radius = max(1, round(max(image.shape) / 500))
        for x, y, _ in arrays["landmarks"][index]:
            cv2.circle(image, (int(x), int(y)), radius, colour, -1, cv2.LINE_AA)
        images.append(image)
        flags = [name for name in ("occluded", "off_frame", "blurred") if arrays[name][index]]
        labels.append(f"{index} {' '.join(flags)}".replace("_", "-").strip())
    save_image(path, contact_sheet(images, labels), 90)


def _numbered(image: NDArray[np.uint8], subject: Subject) -> NDArray[np.uint8]:
    """A frame with a box and its number on every face, the subject's in green."""
    import cv2

    line = max(2, round(max(image.shape) / 250))
    for number, face in enumerate(subject.people, 1):
        colour = (0, 255, 0) if number == subject.person else (255, 200, 0)
        x0, y0, x1, y1 = (round(float(edge)) for edge in face.box)
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, line)
        size = max(0.6, (y1 - y0) / 60)
        cv2.putText(image, str(number), (x0 + line, y1 - line), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 2 * line)
    return image


def _result(frames: FrameSet, arrays: dict[str, Any], subject: Subject, faces: int) -> Result:
    count, usable = len(frames), int(arrays["usable"].sum())
    width = float(np.median((arrays["boxes"][:, 2] - arrays["boxes"][:, 0])[arrays["detected"]]))
    raw, even = arrays["landmarks_raw"][arrays["detected"]], arrays["landmarks"][arrays["detected"]]
    jitter = float(np.median(np.linalg.norm((raw - even)[..., :2], axis=-1)))
    shots = int(frames.shots[-1]) + 1
    shown = np.unique(frames.shots[arrays["detected"]])
    in_shown = np.isin(frames.shots, shown)
    share = usable / int(in_shown.sum())
    level: Level = "good" if share >= 0.9 and width >= SMALL_FACE_PX else "fair" if share >= 0.4 else "poor"
    parts = [f"{usable} of {count} frames usable, face {width:.0f} px wide, jitter {jitter:.2f} px"]
    for name, flags in (
        ("no face", in_shown & ~arrays["detected"]),
        ("occluded", arrays["occluded"]),
        ("off-frame", arrays["off_frame"]),
        ("blurred", arrays["blurred"]),
    ):
        if flags.any():
            parts.append(f"{name}: {ranges_text(flags)}")
    if len(shown) < shots:
        elsewhere = ranges_text(~in_shown)
        parts.append(f"the subject is in {len(shown)} of {shots} shots, not in {elsewhere}")
    parts += _told(frames, subject)
    if subject.doubted and level == "good":
        level = "fair"
    if width < SMALL_FACE_PX:
        parts.append(f"under {SMALL_FACE_PX} px a face shows little detail, film closer")
    metrics = {
        "frames": count,
        "usable": usable,
        "detected": int(arrays["detected"].sum()),
        "occluded": int(arrays["occluded"].sum()),
        "off_frame": int(arrays["off_frame"].sum()),
        "blurred": int(arrays["blurred"].sum()),
        "faces": faces,
        "person": subject.person,
        "people": len(subject.people),
        "chosen_by": subject.how,
        "recognition": subject.recognizer or None,
        "mirrored": len(subject.mirrored),
        "hands": int(np.isfinite(arrays["hands"]).any(axis=(1, 2, 3)).sum()),
        "shots": shots,
        "shots_with_subject": len(shown),
        "face_width_px": round(width, 1),
        "jitter_px": round(jitter, 3),
    }
    return Result(Verdict(level, f"Tracking: {level}. {'; '.join(parts)}.", "overlay.jpg"), metrics)


def _told(frames: FrameSet, subject: Subject) -> list[str]:
    """How the subject was told from others, in words; nothing where nobody else is seen."""
    parts = []
    people = len(subject.people)
    how = {
        "longest": "who is there longest",
        "number": "as asked for",
        "photograph": "by the photograph",
    }[subject.how]
    if people > 1:
        taken = f"person {subject.person} was taken" if subject.person else "the one taken is none of them"
        numbered = f"{people} faces are in view, numbered from the left in frame {subject.counted_in}"
        parts.append(f"{numbered}: {taken}, {how}" + ("; choose with --person" if subject.how == "longest" else ""))
    elif subject.how == "photograph":
        parts.append("the person was told by the photograph")
    if subject.mirrored:
        flags = np.isin(np.arange(len(frames)), subject.mirrored)
        parts.append(f"a mirror? a face copies the subject's in {ranges_text(flags)}; it counts as another person")
    by = f"by {subject.recognizer}" if subject.recognizer else "by colours and proportions alone"
    if subject.ranked:
        parts.append(f"of several faces in {counted(len(subject.ranked), 'shot')} the one most alike was taken, {by}")
    if subject.others:
        parts.append(f"{counted(len(subject.others), 'shot')} with somebody else left out, told {by}")
    if subject.doubted:
        flags = np.isin(frames.shots, subject.doubted)
        where = ranges_text(flags)
        if len(frames.clip_names) > 1:
            names = [f"'{frames.clip_names[clip]}'" for clip in np.unique(frames.clips[flags])]
            where += f" of {' and '.join(names)}"
        parts.append(f"{where} may show another person, told {by}; look at the picture, they are used all the same")
    return parts


STAGE = Stage(
    "track",
    3,
    ("decode",),
    track,
    assets=lambda config: (FACE_LANDMARKER, PALM_DETECTION, HAND_LANDMARK),
    durable=("scratch/faces-*.npz",),
    description="landmarks, expression scores and flags",
)
