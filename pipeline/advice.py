"""What to film differently next time, read off what tracking, fitting and matting saw.

Each piece of advice names the figure that it rests on. Thresholds are wide on purpose: advice that always comes is not
read.
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
MIN_FACE_WIDTH_PX = 140
MIN_YAW_RANGE_DEG, MIN_PITCH_RANGE_DEG = 25.0, 12.0
MAX_BLURRED, MAX_OFF_FRAME, MAX_OCCLUDED, MAX_LOST = 0.08, 0.03, 0.03, 0.05
MIN_JAW_OPEN, MIN_BLINK, MIN_SMILE = 0.25, 0.4, 0.3
MAX_FLICKER_PX = 1.0


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
    track = _arrays(subject, "track", "track.npz")
    fit = _arrays(subject, "fit", "fit.npz")
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
    text = f"There are {usable} usable frames in {seconds:.1f} s. Film 20 to 60 s in one take, without cuts."
    return [Advice("Film longer", text)]


def _flags(track: Mapping[str, NDArray[Any]]) -> list[Advice]:
    from pipeline.frames import ranges_text

    advice = {
        "blurred": (
            MAX_BLURRED,
            "Sharper frames",
            "are blurred by motion. More light lets the camera expose shorter; move slowly, rest the camera.",
        ),
        "off_frame": (
            MAX_OFF_FRAME,
            "Keep the whole head in the picture",
            "have the head over the edge. Leave a hand's breadth of room on every side.",
        ),
        "occluded": (
            MAX_OCCLUDED,
            "Keep hands and hair off the face",
            "have something before the face.",
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
        text = f"No face was found in {1 - detected.mean():.0%} of the frames: {where}. Film one person from the front."
        found.append(Advice("Stay in view", text))
    return found


def _face_size(track: Mapping[str, NDArray[Any]]) -> list[Advice]:
    import numpy as np

    boxes, detected = track.get("boxes"), track.get("detected")
    if boxes is None or detected is None or not detected.any():
        return []
    width = float(np.median(boxes[detected, 2] - boxes[detected, 0]))
    if width >= MIN_FACE_WIDTH_PX:
        return []
    text = (
        f"The face is {width:.0f} px wide; from 200 px on there is detail to learn. Go nearer, or film in more pixels."
    )
    return [Advice("Come closer", text)]


def _pose(fit: Mapping[str, NDArray[Any]]) -> list[Advice]:
    if "Ts_cam_head" not in fit or "usable" not in fit or not fit["usable"].any():
        return []
    yaw, pitch = head_angles_deg(fit["Ts_cam_head"][fit["usable"]])
    found = []
    if _spread(yaw) < MIN_YAW_RANGE_DEG:
        text = (
            f"The head turns by {_spread(yaw):.0f} degrees from side to side. Turn it slowly about 30 degrees to the "
            "left and to the right: what was never seen is guessed."
        )
        found.append(Advice("Show both sides", text))
    if _spread(pitch) < MIN_PITCH_RANGE_DEG:
        text = f"The head nods by {_spread(pitch):.0f} degrees. Look slowly up and down once or twice."
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
        (peak("jawOpen"), MIN_JAW_OPEN, "Open the mouth", "The mouth hardly opens. Speak, and open it once."),
        (blink, MIN_BLINK, "Close the eyes", "The eyes are never seen closed. Blink slowly."),
        (smile, MIN_SMILE, "Smile", "There is no smile. Smile with closed lips and with open ones."),
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
    text = (
        f"The outline flickers by {flicker:.1f} px. A plain background, in another colour than hair and clothes and "
        "some way behind, makes it steady."
    )
    return [Advice("A plainer background", text)]


def head_angles_deg(Ts_cam_head: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Yaw and pitch [T] in degrees of where faces look, 0 into the camera's axis, from their poses [T,4,4]."""
    import numpy as np

    x, y, z = np.moveaxis(np.asarray(Ts_cam_head, np.float64)[:, :3, 2], -1, 0)
    return np.degrees(np.arctan2(x, -z)), np.degrees(np.arctan2(y, np.hypot(x, z)))


def _spread(values: NDArray[np.float64]) -> float:
    """Range without the outermost hundredths."""
    import numpy as np

    low, high = np.percentile(values, [1, 99])
    return float(high - low)


def _some(text: str, limit: int = 90) -> str:
    """A list cut at a comma where it grows long."""
    return text if len(text) <= limit else f"{text[:limit].rpartition(',')[0]} and more"


def _arrays(subject: Subject, stage: str, name: str) -> dict[str, NDArray[Any]]:
    """A stage's arrays; none where the file is missing or damaged, which is the stage's own concern."""
    import zipfile

    import numpy as np

    try:
        with np.load(subject.stage(stage) / name, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
