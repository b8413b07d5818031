"""A quick look at a video before a run: can it be read, is there one face, large enough, turning and speaking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.advice import (
    MIN_BLINK,
    MIN_FACE_WIDTH_PX,
    MIN_JAW_OPEN,
    MIN_PITCH_RANGE_DEG,
    MIN_SECONDS,
    MIN_YAW_RANGE_DEG,
)
from pipeline.assets import FACE_LANDMARKER, asset_path
from pipeline.faces import Detector, Face
from pipeline.finding import Finding
from pipeline.heads import EXPRESSIONS
from pipeline.source import check_source
from pipeline.video import read_frames

JAW_OPEN = EXPRESSIONS.index("jawOpen")
BLINK = [EXPRESSIONS.index("eyeBlinkLeft"), EXPRESSIONS.index("eyeBlinkRight")]
SAMPLES = 40
SECONDS = 60
"""Only so much of a long clip is looked at."""
FEW_FACES = 0.5


def check_capture(video: Path) -> Iterator[Finding]:
    """Judge a video or folder of images by a few frames.

    Raises:
        UserError: it cannot be read or is too small.
        StageError: the face tracker's model or libraries are missing.
    """
    info = check_source(video)
    yield Finding("fine", f"'{video}': {info.width}x{info.height}, {info.codec}, {info.seconds:.1f} s, {info.colour}")
    for warning in info.warnings:
        yield Finding("fine", warning)
    seen = _look(video, info.frames or round(info.seconds * 30))
    faces = [max(found, key=_width) for found in seen if found]
    if not faces:
        yield Finding("blocked", f"no face in any of {len(seen)} frames looked at", "film the face, large and lit")
        return
    share = len(faces) / len(seen)
    yield Finding(
        "fine" if share > FEW_FACES else "degraded",
        f"a face in {len(faces)} of {len(seen)} frames looked at",
        "" if share > FEW_FACES else "name the span with the face: --set decode.start_seconds=...",
    )
    if any(len(found) > 1 for found in seen):
        yield Finding("degraded", "more than one face is in view", "the one seen longest is taken; film one person")
    width = float(np.median([_width(face) for face in faces]))
    small = width < MIN_FACE_WIDTH_PX
    yield Finding("degraded" if small else "fine", f"face {width:.0f} px wide", "go nearer" if small else "")
    yield from _advice(faces, info.seconds)


def _look(video: Path, frames: int) -> list[list[Face]]:
    """The faces in frames spread over the beginning of the clip."""
    stride = max(1, min(frames, SECONDS * 30) // SAMPLES)
    seen = []
    with Detector(asset_path(FACE_LANDMARKER), max_faces=4) as detector:
        for frame in read_frames(video):
            if frame.index % stride == 0:
                seen.append(detector.detect(frame.rgb()))
            if len(seen) >= SAMPLES:
                break
    return seen


def _advice(faces: list[Face], seconds: float) -> Iterator[Finding]:
    """What the clip does not show; nothing of it stops a run."""
    turn = np.stack([face.pose[:3, 2] for face in faces])
    yaw = float(np.ptp(np.degrees(np.arctan2(turn[:, 0], turn[:, 2]))))
    pitch = float(np.ptp(np.degrees(np.arcsin(np.clip(turn[:, 1], -1, 1)))))
    scores = np.stack([face.scores for face in faces])
    jaw, blink = float(scores[:, JAW_OPEN].max()), float(scores[:, BLINK].min(axis=1).max())
    for enough, what, fix in (
        (seconds >= MIN_SECONDS, f"{seconds:.1f} s long", "film 20 to 60 s"),
        (yaw >= MIN_YAW_RANGE_DEG, f"the head turns by {yaw:.0f} degrees", "turn slowly left and right"),
        (pitch >= MIN_PITCH_RANGE_DEG, f"the head nods by {pitch:.0f} degrees", "look up and down once"),
        (jaw >= MIN_JAW_OPEN, f"the mouth opens to {jaw:.1f} of 1", "speak, and open the mouth wide once"),
        (blink >= MIN_BLINK, f"the eyes close to {blink:.1f} of 1", "close both eyes slowly once"),
    ):
        yield Finding("fine", what, "" if enough else f"for a better avatar: {fix}")


def _width(face: Face) -> float:
    return float(face.box[2] - face.box[0])
