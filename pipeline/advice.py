"""What to film differently next time, read off what tracking, fitting and matting saw.

Each piece of advice names the figure that it rests on. Thresholds are wide on purpose: advice that always comes is not
read. They and the words of the remedies stand here for the capture check too, which judges before any tracking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.dataset import Subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MIN_SECONDS, MIN_USABLE_FRAMES = 8.0, 150
MIN_FACE_HEIGHT_PX = 180
"""From the forehead's top to the chin, as the landmarks have it."""
MIN_YAW_RANGE_DEG, MIN_PITCH_RANGE_DEG = 25.0, 12.0
MAX_FRONT_YAW_DEG = 45.0
"""A face that is always turned further is never seen from the front."""
MAX_BLURRED, MAX_OFF_FRAME, MAX_OCCLUDED, MAX_LOST, MAX_OTHERS = 0.08, 0.03, 0.03, 0.05, 0.03
"""Shares of the frames."""
BLUR_SHARE = 0.4
"""A face with less than this share of the clip's usual detail is blurred."""
MIN_SHARP_SHARE = 0.7
"""Share of its height in pixels, or of `MIN_FACE_HEIGHT_PX` where it is higher, that a sharp face has detail for."""
MIN_FACE_LUMA, MAX_BURNT, MAX_LIGHT_STOPS = 50, 0.05, 0.7
"""Median grey value of the face, share of it that is burnt out, and change of its light over the clip."""
MIN_JAW_OPEN, MIN_BLINK, MIN_SMILE = 0.25, 0.4, 0.3
MIN_CHANGE = 0.3
"""Of the expression score that changes most, 5th to 95th percentile: above 0.8 in seconds of a quiet face, below 0.2
where a photograph is filmed."""
MAX_FLAT = 0.5
"""Share of a face in flat colours: at most 0.11 in films, soft ones too, and 0.76 in a drawing."""
MAX_FLICKER_PX = 1.0

# Beyond these the outcome is poor, whatever else is right.
POOR_SECONDS, POOR_FACE_HEIGHT_PX, POOR_LOST = 2.0, 90, 0.5

HOW = {
    "length": "film 20 to 60 s, or give several clips of the same person",
    "view": "film one person from the front, who stays in view",
    "alone": "film one person alone, or say whom to take with --person or --like",
    "near": "go nearer, or film in more pixels",
    "sharp": "more light lets the camera expose shorter; move slowly, rest the camera",
    "focus": "focus on the face, wipe the lens, give the camera's own file rather than a copy",
    "light": "light the face evenly from the front, and lock the camera's exposure",
    "room": "leave a hand's breadth of room on every side of the head",
    "clear": "keep hands and hair off the face",
    "yaw": "turn the head slowly about 30 degrees to the left and to the right: what was never seen is guessed",
    "pitch": "look slowly up and down once or twice",
    "mouth": "speak, and open the mouth wide once",
    "eyes": "close both eyes slowly once",
    "smile": "smile with closed lips and with open ones",
    "background": "choose a plain background, in another colour than hair and clothes and some way behind",
}
"""How to film what was found missing."""


@dataclass(frozen=True)
class Advice:
    """One thing to do differently, and why."""

    title: str
    text: str


def advise(subject: Subject, manifests: Mapping[str, Mapping[str, Any]]) -> list[Advice]:
    """What to film differently, the most telling first; empty where nothing stands out.

    Args:
        subject: whose finished stages are read; what is missing gives no advice.
        manifests: the finished stages' manifests by name.
    """
    found: list[Advice] = []
    track = stage_arrays(subject, "track", "track.npz")
    fit = stage_arrays(subject, "fit", "fit.npz")
    found += _length(subject, track)
    found += _flags(track)
    found += _face_size(track)
    found += _pose(fit)
    found += _expressions(track)
    found += _matte(manifests.get("matte", {}))
    return found


def _length(subject: Subject, track: Mapping[str, NDArray[Any]]) -> list[Advice]:
    from pipeline.errors import UserError
    from pipeline.frames import FrameSet

    try:
        times = FrameSet.load(subject.stage("decode")).times
    except UserError:
        return []
    seconds = float(times[-1] - times[0])
    usable = int(track["usable"].sum()) if "usable" in track else len(times)
    if seconds >= MIN_SECONDS and usable >= MIN_USABLE_FRAMES:
        return []
    return [Advice("Film longer", f"There are {usable} usable frames in {seconds:.1f} s. {_how('length')}")]


def _flags(track: Mapping[str, NDArray[Any]]) -> list[Advice]:
    from pipeline.frames import ranges_text

    advice = {
        "blurred": (
            MAX_BLURRED,
            "Sharper frames",
            f"are blurred by motion. {_how('sharp')}",
        ),
        "off_frame": (
            MAX_OFF_FRAME,
            "Keep the whole head in the picture",
            f"have the head over the edge. {_how('room')}",
        ),
        "occluded": (
            MAX_OCCLUDED,
            "Keep hands and hair off the face",
            f"have something before the face. {_how('clear')}",
        ),
    }
    found = []
    for name, (limit, title, text) in advice.items():
        flags = track.get(name)
        if flags is not None and flags.any() and flags.mean() > limit:
            found.append(Advice(title, f"{flags.mean():.0%} of the frames {text} These: {_some(ranges_text(flags))}."))
    detected = track.get("detected")
    if detected is not None and 1 - detected.mean() > MAX_LOST:
        where = _some(ranges_text(~detected.astype(bool)))
        text = f"No face was found in {1 - detected.mean():.0%} of the frames: {where}. {_how('view')}"
        found.append(Advice("Stay in view", text))
    return found


def _face_size(track: Mapping[str, NDArray[Any]]) -> list[Advice]:
    import numpy as np

    boxes, detected = track.get("boxes"), track.get("detected")
    if boxes is None or detected is None or not detected.any():
        return []
    height = float(np.median(boxes[detected, 3] - boxes[detected, 1]))
    if height >= MIN_FACE_HEIGHT_PX:
        return []
    text = f"The face is {height:.0f} px high; from {MIN_FACE_HEIGHT_PX} px on there is detail to learn. {_how('near')}"
    return [Advice("Come closer", text)]


def _pose(fit: Mapping[str, NDArray[Any]]) -> list[Advice]:
    if "Ts_cam_head" not in fit or "usable" not in fit or not fit["usable"].any():
        return []
    yaw, pitch = head_angles_deg(fit["Ts_cam_head"][fit["usable"]])
    found = []
    if _spread(yaw) < MIN_YAW_RANGE_DEG:
        text = f"The head turns by {_spread(yaw):.0f} degrees from side to side. {_how('yaw')}"
        found.append(Advice("Show both sides", text))
    if _spread(pitch) < MIN_PITCH_RANGE_DEG:
        text = f"The head nods by {_spread(pitch):.0f} degrees. {_how('pitch')}"
        found.append(Advice("Look up and down", text))
    return found


def _expressions(track: Mapping[str, NDArray[Any]]) -> list[Advice]:
    import numpy as np

    if not {"blendshapes", "blendshape_names", "usable"} <= set(track) or not track["usable"].any():
        return []
    scores = track["blendshapes"][track["usable"].astype(bool)]
    names = [str(name) for name in track["blendshape_names"]]

    def peak(*wanted: str) -> float:
        there = [scores[:, names.index(name)] for name in wanted if name in names]
        return float(np.percentile(np.mean(there, 0), 98)) if there else 1.0

    blink, smile = peak("eyeBlinkLeft", "eyeBlinkRight"), peak("mouthSmileLeft", "mouthSmileRight")
    checks = (
        (peak("jawOpen"), MIN_JAW_OPEN, "Open the mouth", f"The mouth hardly opens. {_how('mouth')}"),
        (blink, MIN_BLINK, "Close the eyes", f"The eyes are never seen closed. {_how('eyes')}"),
        (smile, MIN_SMILE, "Smile", f"There is no smile. {_how('smile')}"),
    )
    return [
        Advice(title, f"{text} (Highest score: {value:.2f} of 1.)")
        for value, limit, title, text in checks
        if value < limit
    ]


def _matte(manifest: Mapping[str, Any]) -> list[Advice]:
    flicker = (manifest.get("metrics") or {}).get("flicker_px")
    if not isinstance(flicker, int | float) or flicker <= MAX_FLICKER_PX:
        return []
    return [Advice("A plainer background", f"The outline flickers by {flicker:.1f} px. {_how('background')}")]


def head_angles_deg(Ts_cam_head: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Yaw and pitch [T] in degrees of where faces look, 0 into the camera's axis, from their poses [T,4,4]."""
    import numpy as np

    x, y, z = np.moveaxis(np.asarray(Ts_cam_head, np.float64)[:, :3, 2], -1, 0)
    return np.degrees(np.arctan2(x, -z)), np.degrees(np.arctan2(y, np.hypot(x, z)))


def _how(name: str) -> str:
    """A remedy as a sentence."""
    return f"{HOW[name][0].upper()}{HOW[name][1:]}."


def _spread(values: NDArray[np.float64]) -> float:
    """Range without the outermost hundredths."""
    import numpy as np

    low, high = np.percentile(values, [1, 99])
    return float(high - low)


def _some(text: str, limit: int = 90) -> str:
    """A list cut at a comma where it grows long."""
    return text if len(text) <= limit else f"{text[:limit].rpartition(',')[0]} and more"


def stage_arrays(subject: Subject, stage: str, name: str) -> dict[str, NDArray[Any]]:
    """A stage's arrays; none where the file is missing or damaged, which is the stage's own concern."""
    import zipfile

    import numpy as np

    try:
        with np.load(subject.stage(stage) / name, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
