"""Track: where the face is in each frame, its expression scores, and which frames to trust.

MediaPipe looks at each frame for itself (its video mode lags behind fast motion); smoothing is done here, over time and
in both directions. "Detected" says nothing of hands or of the frame's edge, so both are told separately.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.assets import FACE_LANDMARKER, asset_path
from pipeline.config import TrackConfig
from pipeline.dataset import write_atomic
from pipeline.errors import StageError
from pipeline.faces import Detector, Face
from pipeline.frames import FrameSet, contact_sheet, counted, evenly, ranges_text, save_image
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

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
BLUR_SHARE = 0.4
"""A face with less than this share of the clip's usual detail is blurred."""
SMALL_FACE_PX = 100
FACE_OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176),
    *(149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)


@dataclass
class Track:
    """One face through the frames."""

    faces: dict[int, Face] = field(default_factory=dict)
    last: int = -1


def track(run: StageRun) -> Result:
    """Write `track.npz` and a contact sheet.

    Raises:
        StageError: no face is seen long enough, or the tracker cannot start.
    """
    config = run.config.track
    frames = FrameSet.load(run.subject.stage("decode"))
    model = asset_path(FACE_LANDMARKER, fetch=False)
    with Detector(model, config.max_faces, config.min_confidence) as detector:
        seen = _detect_all(run, frames, detector)
        names = detector.names
    tracks = [t for t in link_faces(seen) if longest_run(np.array(sorted(t.faces))) >= config.min_run_frames]
    if not tracks:
        raise _no_face(run, frames, sum(bool(faces) for faces in seen))
    subject = _with_returns(max(tracks, key=lambda t: len(t.faces)), tracks)
    arrays = _arrays(frames, subject, names, config)
    _judge(run, frames, arrays)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(run.work / "track.npz", buffer.getvalue())
    _write_overlay(run.work / "overlay.jpg", frames, arrays)
    return _result(frames, arrays, len(tracks) if len(tracks) > 1 else max(len(faces) for faces in seen))


def link_faces(seen: list[list[Face]]) -> list[Track]:
    """Join the faces of successive frames into tracks: nearest first, within half a face's size and a short gap.

    Args:
        seen: the faces of each frame.
    """
    tracks: list[Track] = []
    for index, faces in enumerate(seen):
        pairs = []
        for number, known in enumerate(tracks):
            gap = index - known.last
            if gap > LINK_GAP_FRAMES:
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
                chunk = [detector.detect(frames.image(i)) for i in range(first, min(first + CHUNK, len(frames)))]
                _save_faces(file, chunk, detector.names)
            seen += chunk
            task.advance(len(chunk))
    if all(seen):
        return seen
    if not any(seen):
        _search_tiles(run, frames, detector, seen)
    order = list(range(1, len(frames)))
    for step, indices in ((1, order), (-1, order[::-1])):
        for index in indices:
            at, beside = (index, index - 1) if step > 0 else (index - 1, index)
            if not seen[at] and seen[beside]:
                run.check_stop()
                seen[at] = _look_near(frames.image(at), seen[beside], detector)
    return seen


def _search_tiles(run: StageRun, frames: FrameSet, detector: Detector, seen: list[list[Face]]) -> None:
    """Look for a face too small for the whole frame in overlapping halves and thirds of some frames."""
    with run.reporter.task("track: small faces", len(evenly(len(frames), 24)), "frames") as task:
        for index in evenly(len(frames), 24):
            run.check_stop()
            image = frames.image(index)
            for share in (2, 3):
                side = math.ceil(max(frames.width, frames.height) / share)
                tops = range(0, max(1, frames.height - side // 2), side // 2)
                lefts = range(0, max(1, frames.width - side // 2), side // 2)
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


def _with_returns(subject: Track, tracks: list[Track]) -> Track:
    """Add the tracks that look like the same face back again: never beside it in a frame, near its place and size."""
    whole = Track(dict(subject.faces))
    for other in sorted(tracks, key=lambda t: -len(t.faces)):
        if other is subject or set(other.faces) & set(whole.faces):
            continue
        first = min(other.faces)
        nearest = min(whole.faces, key=lambda index: abs(index - first))
        distance, ratio = _apart(whole.faces[nearest].box, other.faces[first].box)
        if distance < 1.0 and ratio < 1.4:
            whole.faces.update(other.faces)
    return whole


def _apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """How far two boxes' centres are apart in units of the larger one, and the ratio of their sizes."""
    sizes = [float((box[2:] - box[:2]).max()) for box in (a, b)]
    centres = [(box[2:] + box[:2]) / 2 for box in (a, b)]
    return float(np.linalg.norm(centres[0] - centres[1])) / max(*sizes, 1e-6), max(sizes) / max(min(sizes), 1e-6)


def _arrays(frames: FrameSet, subject: Track, names: tuple[str, ...], config: TrackConfig) -> dict[str, Any]:
    """The arrays of `track.npz` but for the flags: raw, smoothed, gaps filled."""
    count = len(frames)
    detected = np.zeros(count, bool)
    detected[list(subject.faces)] = True
    detected &= ~short_runs(detected, config.min_run_frames)
    raw = np.full((count, LANDMARKS, 3), np.nan, np.float32)
    scores = np.zeros((count, SCORES), np.float32)
    poses = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
    for index in np.flatnonzero(detected):
        face = subject.faces[int(index)]
        raw[index], scores[index], poses[index] = face.landmarks, face.scores, face.pose
    # To OpenCV's camera axes and metres: y and z of MediaPipe's camera turn round, the face's own axes are ours.
    poses[:, 1:3] *= -1
    poses[:, :3, 3] *= CANONICAL_CM
    known, times = np.flatnonzero(detected), frames.times
    smoothed = smooth(raw, times, detected, config.smooth_seconds)
    even_scores = np.clip(smooth(scores, times, detected, config.smooth_seconds), 0, 1)
    before = np.clip(np.searchsorted(known, np.arange(count), side="right") - 1, 0, len(known) - 1)
    after = np.clip(np.searchsorted(known, np.arange(count)), 0, len(known) - 1)
    low, high = known[before], known[after]
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
        "blendshapes": filled(even_scores),
        "blendshape_names": np.array(names, "U32"),
        "Ts_cam_face": poses[nearest],
        "detected": detected,
        "boxes": np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1),
    }


def _judge(run: StageRun, frames: FrameSet, arrays: dict[str, Any]) -> None:
    """Add the flags: occluded, off-frame, blurred, usable; and the confidence."""
    import cv2

    from pipeline.occlusion import covered_share, flat_face, sample_face

    detected, landmarks = arrays["detected"], arrays["landmarks"]
    oval = landmarks[:, FACE_OVAL, :2]
    outside = ((oval < 0) | (oval > [frames.width, frames.height])).any(axis=2).mean(axis=1)
    rotations = arrays["Ts_cam_face"][:, :3, :3].astype(np.float64)
    centred = landmarks - landmarks.mean(axis=1, keepdims=True)
    # The face's axes have y up and z forward, the picture's y down and z away.
    to_front = rotations * np.array([1.0, -1.0, -1.0])
    frontal = np.einsum("tji,tlj->tli", to_front, centred)
    frontal /= np.linalg.norm(frontal, axis=(1, 2), keepdims=True)
    layout = flat_face(np.median(frontal[detected], axis=0))
    values = np.zeros((len(frames), len(layout.texels)), np.float32)
    visible = np.zeros(values.shape, bool)
    detail = np.zeros(len(frames))
    for index in np.flatnonzero(detected):
        run.check_stop()
        grey = cv2.cvtColor(frames.image(int(index)), cv2.COLOR_RGB2GRAY)
        values[index], visible[index] = sample_face(grey, landmarks[index], layout)
        detail[index] = _detail(grey, arrays["boxes"][index])
    covered = np.zeros(len(frames))
    covered[detected] = covered_share(
        values[detected], visible[detected], layout, arrays["blendshapes"][detected], rotations[detected]
    )
    # A few odd frames are not an occlusion, and one clear frame does not end it.
    steady = np.array([np.median(covered[max(0, i - 2) : i + 3]) for i in range(len(covered))])
    occluded = detected & hysteresis(steady, COVERED_ENTER, COVERED_LEAVE)
    arrays["occluded"] = occluded & ~short_runs(occluded, run.config.track.min_run_frames)
    arrays["off_frame"] = detected & (outside > OFF_FRAME_SHARE)
    clear = detected & ~arrays["occluded"] & ~arrays["off_frame"]
    usual = np.median(detail[clear if clear.any() else detected])
    arrays["blurred"] = detected & (detail < BLUR_SHARE * usual)
    arrays["usable"] = clear
    arrays["confidence"] = np.where(detected, (1 - covered) * (1 - outside), 0).astype(np.float32)


def _detail(grey: NDArray[np.uint8], box: NDArray[np.floating]) -> float:
    """Mean square of the Laplacian over the face, brought to one size so that distance does not count."""
    import cv2

    x0, y0 = np.maximum(box[:2], 0).astype(int)
    x1, y1 = np.ceil(box[2:]).astype(int)
    face = grey[y0 : max(y1, y0), x0 : max(x1, x0)]
    if min(face.shape) < 2:
        return 0.0
    even = cv2.resize(face, (128, 128), interpolation=cv2.INTER_AREA)
    return float((cv2.Laplacian(even, cv2.CV_32F) ** 2).mean())


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Half-open ranges of set flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(first), int(last)) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def _no_face(run: StageRun, frames: FrameSet, seen: int) -> StageError:
    first, last = frames.times[0], frames.times[-1]
    where = f"the {len(frames)} frames of '{run.subject.name}' ({first:.1f} to {last:.1f} s of the video)"
    least = run.config.track.min_run_frames
    what = f"A face is seen in only {seen} of {where}, never in {least} in a row." if seen else f"No face in {where}."
    numbers = (frames.source_frames[0], frames.source_frames[-1])
    others = [
        seconds
        for (start, end), seconds in zip(frames.record["shots"], frames.record["shot_seconds"], strict=True)
        if end < numbers[0] or start > numbers[1]
    ]
    if others:
        start, end = max(others, key=lambda seconds: seconds[1] - seconds[0])
        return StageError(
            what,
            f"the video has {counted(len(others), 'other shot')}; take the longest of them with "
            f"--set decode.start_seconds={start:g} --set decode.end_seconds={end:g}",
        )
    return StageError(
        what, "film one person who faces the camera, in good light, the face at least 100 pixels wide, and run that"
    )


def _write_overlay(path: Path, frames: FrameSet, arrays: dict[str, Any]) -> None:
    """A contact sheet with the landmarks drawn: green where usable, red where not."""
    import cv2

    detected = np.flatnonzero(arrays["detected"])
    shown = [int(detected[place]) for place in evenly(len(detected), 8)]
    images, labels = [], []
    for index in shown:
        image = frames.image(index)
        colour = (0, 255, 0) if arrays["usable"][index] else (255, 40, 40)
        radius = max(1, round(max(image.shape) / 500))
        for x, y, _ in arrays["landmarks"][index]:
            cv2.circle(image, (int(x), int(y)), radius, colour, -1, cv2.LINE_AA)
        images.append(image)
        flags = [name for name in ("occluded", "off_frame", "blurred") if arrays[name][index]]
        labels.append(f"{index} {' '.join(flags)}".replace("_", "-").strip())
    save_image(path, contact_sheet(images, labels), 90)


def _result(frames: FrameSet, arrays: dict[str, Any], faces: int) -> Result:
    count, usable = len(frames), int(arrays["usable"].sum())
    width = float(np.median((arrays["boxes"][:, 2] - arrays["boxes"][:, 0])[arrays["detected"]]))
    raw, even = arrays["landmarks_raw"][arrays["detected"]], arrays["landmarks"][arrays["detected"]]
    jitter = float(np.median(np.linalg.norm((raw - even)[..., :2], axis=-1)))
    share = usable / count
    level: Level = "good" if share >= 0.9 and width >= SMALL_FACE_PX else "fair" if share >= 0.4 else "poor"
    parts = [f"{usable} of {count} frames usable, face {width:.0f} px wide, jitter {jitter:.2f} px"]
    missing = ~arrays["detected"]
    for name, flags in (
        ("no face", missing),
        ("occluded", arrays["occluded"]),
        ("off-frame", arrays["off_frame"]),
        ("blurred", arrays["blurred"]),
    ):
        if flags.any():
            parts.append(f"{name}: {ranges_text(flags)}")
    if faces > 1:
        parts.append(f"{faces} faces were seen, the one that is there longest was taken")
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
        "face_width_px": round(width, 1),
        "jitter_px": round(jitter, 3),
    }
    return Result(Verdict(level, f"Tracking: {level}. {'; '.join(parts)}.", "overlay.jpg"), metrics)


STAGE = Stage(
    "track", 1, ("decode",), track, assets=(FACE_LANDMARKER,), description="landmarks, expression scores and flags"
)
