"""A quick look at the clips before a run: is there one face, large, sharp and well lit, and does it show what it takes.

About 60 frames a clip are looked at, reached by seeking, so that it takes seconds however long the clip is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.advice import (
    BLUR_SHARE,
    HOW,
    MAX_BLURRED,
    MAX_BURNT,
    MAX_FLAT,
    MAX_FRONT_YAW_DEG,
    MAX_LIGHT_STOPS,
    MAX_LOST,
    MAX_OCCLUDED,
    MAX_OFF_FRAME,
    MAX_OTHERS,
    MIN_BLINK,
    MIN_CHANGE,
    MIN_FACE_HEIGHT_PX,
    MIN_FACE_LUMA,
    MIN_JAW_OPEN,
    MIN_PITCH_RANGE_DEG,
    MIN_SECONDS,
    MIN_SHARP_SHARE,
    MIN_YAW_RANGE_DEG,
    POOR_FACE_HEIGHT_PX,
    POOR_LOST,
    POOR_SECONDS,
    head_angles_deg,
)
from pipeline.assets import FACE_LANDMARKER, asset_path
from pipeline.faces import Detector, Face
from pipeline.finding import Finding
from pipeline.frames import counted
from pipeline.heads import EXPRESSIONS
from pipeline.occlusion import covered_share, departures, flat_face, sample_face
from pipeline.picture_quality import (
    BLACK_LUMA,
    CUT_CHANGE,
    colour_histogram,
    crop,
    face_detail,
    face_light,
    flat_share,
    head_circle,
    histogram_change,
    lost_octaves,
)
from pipeline.source import check_sources
from pipeline.video import Frame, VideoInfo, sample_frames

SAMPLES = 60
MAX_FACES = 4
DETECTION_SIDE = 1280
"""Larger frames are reduced to it before the detector looks, which itself reduces them much further."""
SAME_POSE_DEG = 10.0
"""Light is compared between frames in which the head is turned about alike."""
MIN_PATCH_PX, PATCH_PX = 8, 256
"""Smallest side of a face that can be measured, and height of the pictures of it that are compared with each other."""
SAME_FACE = 0.3
"""Two faces in one frame that are no further apart, in units of the larger one, are one that was found twice."""
COVERED_SHARE, COVERED_FRAMES = 0.1, 12
"""Share of the face that must look otherwise than in the other frames, of which there must be so many."""
BLINK_SECONDS = 0.2
"""How long a blink lasts: frames that are further apart may miss it."""
STILL_FRAMES = 5
"""Fewer do not tell whether a face moves."""
VERDICT_ITEMS = 3
"""How many findings a verdict names."""


@dataclass(frozen=True)
class View:
    """One face in one frame, measured; pixels are those of the whole picture."""

    face: Face
    detail: float
    """Comparable between the frames of a clip."""
    lost_octaves: float
    luma: float
    """Median grey value."""
    light: float
    """Mean linear light, 0 to 1."""
    burnt: float
    flat: float
    """Shares of the face that are burnt out, and of one flat colour."""
    edges: tuple[str, ...]
    """The picture's edges that head or hair reach."""
    patch: NDArray[np.uint8]
    """Grey values [h, w] of the face's box, at most `PATCH_PX` high."""
    points: NDArray[np.float64]
    """[478, 2] the landmarks in the patch's pixels."""

    @property
    def height(self) -> float:
        """From the forehead's top to the chin, in pixels."""
        return float(self.face.box[3] - self.face.box[1])


@dataclass
class Look:
    """What the sampled frames of a clip show."""

    info: VideoInfo
    times: list[float] = field(default_factory=list)
    """Seconds, one a frame."""
    views: list[View | None] = field(default_factory=list)
    """The subject, one a frame."""
    faces: list[int] = field(default_factory=list)
    """How many faces, one a frame."""
    black: int = 0
    cuts: int = 0

    @property
    def seen(self) -> list[View]:
        """The subject where it is seen."""
        return [view for view in self.views if view is not None]

    @property
    def seconds(self) -> float:
        """The clip's length, as far as is known."""
        return self.info.seconds or (self.times[-1] if self.times else 0.0)


def check_capture(video: Path) -> Iterator[Finding]:
    """Judge a video or a folder of images by about 60 of its frames.

    Raises:
        UserError: it cannot be read or is too small.
        StageError: the face tracker's model or libraries are missing.
    """
    return check_captures([video])


def check_captures(videos: Sequence[Path]) -> Iterator[Finding]:
    """Judge several clips of one subject: each for itself, and what they show of the head all together.

    Raises:
        UserError: one cannot be read or is too small.
        StageError: the face tracker's model or libraries are missing.
    """
    infos = check_sources(videos)
    looks = []
    with Detector(asset_path(FACE_LANDMARKER), max_faces=MAX_FACES) as detector:
        for video, info in zip(videos, infos, strict=True):
            name = f"'{video.name}': " if len(videos) > 1 else ""
            yield Finding("fine", f"'{video}': {_described(info)}")
            for warning in info.warnings:
                yield Finding("fine", warning)
            look = _look(video, info, detector)
            looks.append(look)
            for finding in _judge_clip(look):
                yield Finding(finding.level, f"{name}{finding.what}", finding.fix, finding.severe)
    if any(look.seen for look in looks):
        yield from _judge_ranges(looks)


def capture_verdict(findings: Iterable[Finding]) -> str:
    """One line: `good`, `fair: ...` or `poor: ...` with what was found wanting, gravest first, and what to do about it.

    Args:
        findings: of `check_capture` or `check_captures`.
    """
    wanting = [finding for finding in findings if finding.level != "fine"]
    wanting.sort(key=lambda finding: (finding.level != "blocked", not finding.severe))
    if not wanting:
        return "good"
    word = "poor" if wanting[0].level == "blocked" or wanting[0].severe else "fair"
    named = [f"{f.what} -> {f.fix}" if f.fix else f.what for f in wanting[:VERDICT_ITEMS]]
    more = len(wanting) - len(named)
    return f"{word}: " + "; ".join([*named, f"and {more} more"] if more else named)


def _described(info: VideoInfo) -> str:
    return f"{info.width}x{info.height}, {info.codec}, {info.seconds:.1f} s, {info.colour}"


def _look(video: Path, info: VideoInfo, detector: Detector) -> Look:
    look = _sampled(video, info, detector, None)
    if look.faces and not any(look.faces) and look.black < len(look.faces):
        region = _small_face(video, detector)
        if region is not None:
            look = _sampled(video, info, detector, region)
    return look


def _sampled(video: Path, info: VideoInfo, detector: Detector, region: tuple[int, int, int] | None) -> Look:
    """Look at frames spread over the clip, for faces in the square `region` (x0, y0, side) or everywhere."""
    import cv2

    look = Look(info)
    before: NDArray[np.float64] | None = None
    last: View | None = None
    for frame in sample_frames(video, SAMPLES):
        scale = min(1.0, DETECTION_SIDE / max(frame.width, frame.height)) if region is None else 1.0
        image = frame.rgb(round(frame.width * scale), round(frame.height * scale))
        thumbnail = np.asarray(cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA), np.uint8)
        look.times.append(frame.time)
        if thumbnail.max() <= BLACK_LUMA:
            look.black += 1
            look.faces.append(0)
            look.views.append(None)
            continue
        histogram = colour_histogram(thumbnail)
        look.cuts += before is not None and histogram_change(histogram, before) > CUT_CHANGE
        before = histogram
        views = _views(frame, _detected(image, scale, detector, region))
        look.faces.append(len(views))
        look.views.append(_same_person(views, last))
        last = look.views[-1] or last
    return look


def _detected(
    image: NDArray[np.uint8], scale: float, detector: Detector, region: tuple[int, int, int] | None
) -> list[Face]:
    """The faces in a frame that was reduced to `scale`, in the pixels of the whole one."""
    if region is not None:
        x0, y0, side = region
        return detector.detect(image[y0 : y0 + side, x0 : x0 + side], (x0, y0))
    found = detector.detect(image)
    return [Face(face.landmarks / np.float32(scale), face.scores, face.pose) for face in found]


def _views(frame: Frame, found: list[Face]) -> list[View]:
    """The faces in a frame, largest first, measured; a face that was found twice counts once."""
    if not found:
        return []
    grey = frame.luma()
    faces: list[Face] = []
    for face in sorted(found, key=lambda face: -float(np.ptp(face.box[1::2]))):
        in_picture = min(crop(grey, face.box).shape) >= MIN_PATCH_PX
        if in_picture and all(_apart(face, other) > SAME_FACE for other in faces):
            faces.append(face)
    return [_measured(grey, face) for face in faces]


def _measured(grey: NDArray[np.uint8], face: Face) -> View:
    import cv2

    luma, light, burnt = face_light(grey, face)
    x, y, radius = head_circle(face)
    height, width = grey.shape
    patch = crop(grey, face.box)
    scale = min(1.0, PATCH_PX / max(1, patch.shape[0]))
    small = np.asarray(cv2.resize(patch, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    points = (face.landmarks[:, :2] - np.maximum(face.box[:2], 0).astype(int)) * scale
    reach = {"upper": radius - y, "left": radius - x, "right": x + radius - width, "lower": face.box[3] - height}
    return View(
        face,
        face_detail(grey, face.box),
        lost_octaves(patch),
        luma,
        light,
        burnt,
        flat_share(small),
        tuple(edge for edge, over in reach.items() if over > 0),
        small,
        points.astype(np.float64),
    )


def _apart(a: Face, b: Face) -> float:
    """Distance of two faces in units of the larger one."""
    sizes = [float((face.box[2:] - face.box[:2]).max()) for face in (a, b)]
    centres = [(face.box[2:] + face.box[:2]) / 2 for face in (a, b)]
    return float(np.linalg.norm(centres[0] - centres[1])) / max(*sizes, 1e-6)


def _same_person(views: list[View], last: View | None) -> View | None:
    """The face nearest to where the subject was last, if it is near and about as large, else the largest."""
    if last is not None:
        near = [v for v in views if _apart(v.face, last.face) < 1.5 and 0.5 < v.height / max(last.height, 1) < 2]
        if near:
            return min(near, key=lambda view: _apart(view.face, last.face))
    return views[0] if views else None


def _small_face(video: Path, detector: Detector) -> tuple[int, int, int] | None:
    """The square (x0, y0, side) in which a face shows that is too small for the whole frame, looked for in few."""
    for frame in sample_frames(video, 4):
        image = frame.rgb()
        for share in (2, 3):
            side = math.ceil(max(frame.width, frame.height) / share)
            for top in range(0, max(1, frame.height - side // 2), side // 2):
                for left in range(0, max(1, frame.width - side // 2), side // 2):
                    if detector.detect(image[top : top + side, left : left + side]):
                        return left, top, side
    return None


def _judge_clip(look: Look) -> Iterator[Finding]:
    """What is to be said of one clip."""
    count, seen = len(look.times), look.seen
    looked = f"{count} frames looked at"
    if count == 1:
        yield Finding(
            "blocked",
            "one picture cannot become an avatar: it shows one side and one expression only",
            HOW["length"],
        )
        return
    if look.black == count:
        yield Finding("blocked", f"every one of the {looked} is black", "choose another video")
        return
    if not seen:
        yield Finding("blocked", f"no face in any of the {looked}", f"{HOW['view']}; profiles and drawings are missed")
        return
    yield _presence(look)
    others = sum(number > 1 for number in look.faces)
    if others:
        most = max(look.faces)
        several = f"{most} or more" if most == MAX_FACES else f"{most}"
        what = f"{several} faces are in view at once, in {others} of the {looked} more than one"
        yield Finding("degraded" if others / count > MAX_OTHERS else "fine", what, HOW["alone"])
    if look.cuts:
        yield Finding("degraded", f"about {counted(look.cuts, 'cut')}", HOW["length"])
    yield _size(seen)
    yield from _sharpness(seen)
    yield from _light(seen)
    yield from _room(seen)
    yield from _cover(seen)
    yield from _alive(seen)


def _presence(look: Look) -> Finding:
    """In how many frames the face is, and when it is away for longest."""
    there = [view is not None for view in look.views]
    lost = 1 - np.mean(there)
    what = f"a face in {sum(there)} of {len(there)} frames looked at"
    if lost <= MAX_LOST:
        return Finding("fine", what)
    edges = np.flatnonzero(np.diff([True, *there, True]))
    first, after = max(zip(edges[::2], edges[1::2], strict=True), key=lambda gap: gap[1] - gap[0])
    start = look.times[first] if first else 0.0
    end = look.times[after] if after < len(there) else look.seconds
    what += f"; it is away for {max(0.0, end - start):.1f} s from {start:.1f} s on"
    return Finding("degraded", what, HOW["view"], severe=bool(lost > POOR_LOST))


def _size(seen: list[View]) -> Finding:
    height = float(np.median([view.height for view in seen]))
    what = f"face {height:.0f} px high"
    if height >= MIN_FACE_HEIGHT_PX:
        return Finding("fine", what)
    return Finding(
        "degraded",
        f"{what}; from {MIN_FACE_HEIGHT_PX} px on there is detail to learn",
        HOW["near"],
        severe=height < POOR_FACE_HEIGHT_PX,
    )


def _sharpness(seen: list[View]) -> Iterator[Finding]:
    """Sharpness against what the face's size allows, and against the rest of the clip."""
    height = float(np.median([view.height for view in seen]))
    sharp = float(np.median([view.height / 2**view.lost_octaves for view in seen]))
    soft = sharp < MIN_SHARP_SHARE * min(height, MIN_FACE_HEIGHT_PX)
    what = f"the face is as sharp as one {sharp:.0f} px high can be"
    yield Finding("degraded" if soft else "fine", what, HOW["focus"] if soft else "")
    detail = np.array([view.detail for view in seen])
    blurred = int((detail < BLUR_SHARE * np.median(detail)).sum())
    if blurred:
        many = blurred / len(seen) > MAX_BLURRED
        what = f"{blurred} of {len(seen)} faces are blurred beside the others"
        yield Finding("degraded" if many else "fine", what, HOW["sharp"] if many else "")


def _light(seen: list[View]) -> Iterator[Finding]:
    luma = float(np.median([view.luma for view in seen]))
    burnt = float(np.median([view.burnt for view in seen]))
    dark = luma < MIN_FACE_LUMA
    what = f"the face's brightness is {luma:.0f} of 255" + (", too dark" if dark else "")
    if burnt > MAX_BURNT:
        what += f"; {burnt:.0%} of it is burnt out"
    wrong = dark or burnt > MAX_BURNT
    yield Finding("degraded" if wrong else "fine", what, HOW["light"] if wrong else "")
    yaw, pitch = _angles([view.face for view in seen])
    alike = np.hypot(yaw - np.median(yaw), pitch - np.median(pitch)) < SAME_POSE_DEG
    stops = np.log2(np.maximum([view.light for view in seen], 1e-4))[alike]
    drift = float(np.ptp(np.percentile(stops, [5, 95]))) if len(stops) else 0.0
    drifts = drift > MAX_LIGHT_STOPS
    what = f"the light on the face changes by {drift:.1f} stops over the clip"
    yield Finding("degraded" if drifts else "fine", what, HOW["light"] if drifts else "")


def _room(seen: list[View]) -> Iterator[Finding]:
    """Frames in which the head leaves the picture, if an average head with some hair is behind the face."""
    reached = [edge for view in seen for edge in view.edges]
    if not reached:
        return
    edge = max(set(reached), key=reached.count)
    many = sum(bool(view.edges) for view in seen)
    what = (
        f"head or hair reach the picture's edge, mostly the {edge} one, in {many} of {len(seen)} frames "
        "(estimated: an average head behind the face)"
    )
    off = many / len(seen) > MAX_OFF_FRAME
    yield Finding("degraded" if off else "fine", what, HOW["room"] if off else "")


def _cover(seen: list[View]) -> Iterator[Finding]:
    """Frames in which something lies over the lower face."""
    if len(seen) < COVERED_FRAMES:
        return
    landmarks = np.stack([view.face.landmarks for view in seen]).astype(np.float64)
    rotations = np.stack([view.face.pose[:3, :3] for view in seen]).astype(np.float64)
    # Landmarks have y down and z away, MediaPipe's camera and the face's own axes y up and z towards it.
    flip = np.array([1.0, -1.0, -1.0])
    frontal = np.einsum("tji,tlj->tli", rotations, (landmarks - landmarks.mean(axis=1, keepdims=True)) * flip) * flip
    frontal /= np.linalg.norm(frontal, axis=(1, 2), keepdims=True)
    layout = flat_face(np.median(frontal, axis=0))
    values, visible = map(np.stack, zip(*(sample_face(view.patch, view.points, layout) for view in seen), strict=True))
    scores = np.stack([view.face.scores for view in seen])
    share = covered_share(departures(values, visible, layout, scores, rotations), visible)
    covered = int((share > COVERED_SHARE).sum())
    if covered:
        many = covered / len(seen) > MAX_OCCLUDED
        what = f"something lies over the lower face in {covered} of {len(seen)} frames"
        yield Finding("degraded" if many else "fine", what, HOW["clear"] if many else "")


def _alive(seen: list[View]) -> Iterator[Finding]:
    """Whether this is a drawing, or a photograph that was filmed."""
    flat = float(np.median([view.flat for view in seen]))
    if flat > MAX_FLAT:
        what = f"{flat:.0%} of the face is of flat colours: it seems to be drawn, and drawings are followed badly"
        yield Finding("degraded", what, HOW["view"], severe=True)
    scores = np.stack([view.face.scores for view in seen])
    change = float(np.ptp(np.percentile(scores, [5, 95], axis=0), axis=0).max())
    if len(seen) >= STILL_FRAMES and change < MIN_CHANGE:
        what = f"no expression changes by more than {change:.2f} of 1: a still picture cannot become an avatar"
        yield Finding("degraded", what, HOW["length"], severe=True)


def _judge_ranges(looks: Sequence[Look]) -> Iterator[Finding]:
    """What the clips show of the head, all together."""
    seconds = sum(look.seconds for look in looks)
    faces = [view.face for look in looks for view in look.seen]
    length = f"{seconds:.1f} s in all" if len(looks) > 1 else f"{seconds:.1f} s long"
    if len(looks) == 1 and looks[0].info.kind == "images":
        length = f"{looks[0].info.frames} images, which last {seconds:.1f} s"
    if seconds < MIN_SECONDS:
        yield Finding("degraded", length, HOW["length"], severe=seconds < POOR_SECONDS)
    else:
        yield Finding("fine", length)
    yaw, pitch = _angles(faces)
    if np.abs(yaw).min() > MAX_FRONT_YAW_DEG:
        what = f"the face is never seen from the front, it is turned by {np.abs(yaw).min():.0f} degrees and more"
        yield Finding("degraded", what, HOW["view"], severe=True)
    scores = np.stack([face.scores for face in faces])
    jaw = float(scores[:, EXPRESSIONS.index("jawOpen")].max())
    lids = [EXPRESSIONS.index("eyeBlinkLeft"), EXPRESSIONS.index("eyeBlinkRight")]
    blink = float(scores[:, lids].min(axis=1).max())
    for enough, what, how in (
        (np.ptp(yaw) >= MIN_YAW_RANGE_DEG, f"the head turns by {np.ptp(yaw):.0f} degrees ({_ends(yaw)})", "yaw"),
        (np.ptp(pitch) >= MIN_PITCH_RANGE_DEG, f"the head nods by {np.ptp(pitch):.0f} degrees", "pitch"),
        (jaw >= MIN_JAW_OPEN, f"the mouth opens to {jaw:.2f} of 1", "mouth"),
    ):
        yield Finding("fine", what) if enough else Finding("degraded", what, HOW[how])
    closed = f"the eyes close to {blink:.2f} of 1 in the frames looked at"
    if blink >= MIN_BLINK:
        yield Finding("fine", closed)
    elif all(look.seconds / len(look.times) <= BLINK_SECONDS for look in looks):
        yield Finding("degraded", closed, HOW["eyes"])
    else:
        yield Finding("fine", f"{closed}; a blink between them may be missed", HOW["eyes"])


def _ends(yaw: NDArray[np.float64]) -> str:
    """The ends of a range of turns in words, as seen in the picture: `20 left to 5 right`."""
    return " to ".join(f"{abs(end):.0f} {'left' if end < 0 else 'right'}" for end in (yaw.min(), yaw.max()))


def _angles(faces: Sequence[Face]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Yaw and pitch [T] in degrees, 0 where the face looks along the camera's axis."""
    poses = np.stack([face.pose for face in faces]).astype(np.float64)
    poses[:, 1:3] *= -1  # MediaPipe's camera has y up and looks along -z
    return head_angles_deg(poses)
