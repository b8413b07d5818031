"""What a viewer is asked to show: one frozen value, made by the controls, and what it means for an avatar."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pipeline.api import Avatar, LoadedSubject, Pose
from pipeline.geometry import (
    invert_rigid,
    make_rigid,
    matrix_to_rotvec,
    quaternion_to_matrix,
    rotvec_to_matrix,
    transform_points,
)
from pipeline.retarget import EYES, MOVE, OVERSHOOT, TURN, Performance, soft_limit
from pipeline.viewpoint import FRAMED_SHARE, HEAD_MIDDLE, Camera

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.avatars import Condition

    Floats = NDArray[np.float64]

Drive = Literal["clip", "sliders"]
Show = Literal["splats", "points", "mesh"]
Overlay = Literal["none", "mesh edges", "landmarks"]

MOST_PIXELS = 2048
"""Of a picture's longer side, however large the window is."""
OPENING_MARGIN = 1.25
"""How much farther than from the head's middle to its top the first view reaches."""


@dataclass(frozen=True)
class Scene:
    """All that decides a picture beside the camera.

    Attributes:
        drive: what moves the avatar: a frame of the clip, or `expression` and `pose`.
        frame: number of the clip's frame that drives, and that is shown beside.
        expression: coefficients that are not 0, by name.
        pose: of the head, from rest.
        baked: whether the baked avatar is shown, not the full one.
        show: Gaussians as they are, their centres, or the fitted head's mesh.
        overlay: what is drawn over it.
        beside: the clip's frame at the left, the avatar at the right.
        locked: seen by the clip's own camera, whatever the mouse does.
        background: sRGB, 0 to 255.
    """

    drive: Drive = "clip"
    frame: int = 0
    expression: Mapping[str, float] = field(default_factory=dict)
    pose: Pose = field(default_factory=Pose)
    baked: bool = False
    show: Show = "splats"
    overlay: Overlay = "none"
    beside: bool = False
    locked: bool = False
    background: tuple[int, int, int] = (255, 255, 255)

    def condition(self, subject: LoadedSubject, avatar: Avatar) -> Condition:
        """What drives the avatar."""
        if self.drive == "clip":
            return subject.condition(self.frame)
        return avatar.condition(self.expression or None, self.pose)


def _both(**coefficients: float) -> dict[str, float]:
    return {f"{name}{side}": value for name, value in coefficients.items() for side in ("Left", "Right")}


PRESETS: dict[str, dict[str, float]] = {
    "Rest": {},
    "Smile": _both(mouthSmile=0.65, cheekSquint=0.35, eyeSquint=0.2, mouthDimple=0.15),
    "Laugh": {"jawOpen": 0.3, **_both(mouthSmile=0.75, mouthUpperUp=0.3, cheekSquint=0.5, eyeSquint=0.35)},
    "Surprise": {"browInnerUp": 0.8, "jawOpen": 0.4, **_both(browOuterUp=0.7, eyeWide=0.7)},
    "Anger": {
        "jawForward": 0.15,
        **_both(browDown=0.85, eyeSquint=0.35, noseSneer=0.4, mouthFrown=0.3, mouthPress=0.35),
    },
    "Sadness": {"browInnerUp": 0.8, "mouthShrugLower": 0.4, **_both(mouthFrown=0.6, eyeSquint=0.2, browDown=0.15)},
    "Disgust": _both(
        noseSneer=0.75, mouthUpperUp=0.45, browDown=0.45, cheekSquint=0.4, eyeSquint=0.35, mouthFrown=0.25
    ),
    "Fear": {"browInnerUp": 0.8, "jawOpen": 0.15, **_both(browOuterUp=0.3, eyeWide=0.7, mouthStretch=0.45)},
    "Doubt": {"browOuterUpLeft": 0.8, "browDownRight": 0.5, "mouthLeft": 0.2, "mouthPressLeft": 0.3},
    "Kiss": {"mouthPucker": 0.8, "mouthFunnel": 0.2},
    "Wink": {"eyeBlinkLeft": 1.0, "cheekSquintLeft": 0.5, "mouthSmileLeft": 0.35},
    "Blink": _both(eyeBlink=1.0),
    "Aah": {"jawOpen": 0.6},
}
"""Coefficients of expressions that people know by name."""

FOLDERS = {
    "Brows": ("brow",),
    "Eyes": ("eye",),
    "Jaw": ("jaw",),
    "Mouth": ("mouth",),
    "Cheeks, nose, tongue": ("cheek", "nose", "tongue"),
}
OTHERS = "Others"
"""The folder of coefficients whose names begin otherwise."""
# They move the whole jaw or mouth to one side: no pair that moves together.
_ONE_SIDED = ("jawLeft", "jawRight", "mouthLeft", "mouthRight")


def in_folders(names: Sequence[str]) -> dict[str, list[str]]:
    """Names of coefficients by the folder that their sliders are in; those of a dataset's own basis are in its."""
    found: dict[str, list[str]] = {folder: [] for folder in (*FOLDERS, OTHERS)}
    for name in names:
        own = re.match(r"([\w-]+)/", name)
        known = next((folder for folder, begins in FOLDERS.items() if name.startswith(begins)), OTHERS)
        found.setdefault(own[1] if own else known, []).append(name)
    return {folder: inside for folder, inside in found.items() if inside}


def label_of(name: str, folder: str) -> str:
    """`Smile left` for mouthSmileLeft among the mouth's; where a folder has several parts, theirs comes first."""
    if name.startswith(f"{folder}/"):
        return name[len(folder) + 1 :]
    begins = FOLDERS.get(folder, ())
    rest = name[len(begins[0]) :] if len(begins) == 1 else name
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", rest).lower()
    return words[:1].upper() + words[1:]


def partner_of(name: str, names: Sequence[str]) -> str | None:
    """The coefficient of the other side that moves with this one when both sides do the same."""
    if name in _ONE_SIDED:
        return None
    for side, other in (("Left", "Right"), ("Right", "Left")):
        if name.endswith(side):
            twin = name.removesuffix(side) + other
            if name.startswith("eyeLookIn"):  # both eyes look to one side
                twin = twin.replace("eyeLookIn", "eyeLookOut")
            elif name.startswith("eyeLookOut"):
                twin = twin.replace("eyeLookOut", "eyeLookIn")
            return twin if twin in names else None
    return None


def taken_over(subject: LoadedSubject, avatar: Avatar, frame: int) -> tuple[dict[str, float], Pose]:
    """Coefficients and pose that show a frame of the clip; torso and skull follow the head, both eyes look one way."""
    condition = subject.condition(frame)
    pitch, yaw = np.degrees(condition.eyes.double().cpu().numpy()[:, :2].mean(0)).tolist()
    return subject.expression(frame), pose_of(avatar, condition.T_cam_head.double().cpu().numpy(), (pitch, yaw))


class Opening(NamedTuple):
    """Where a viewer's camera begins, in the clip's world."""

    position: Floats
    """[3]."""
    look_at: Floats
    """[3] the middle of the head, which the mouse goes round."""
    up: Floats
    """[3]."""
    fov: float
    """Radians, from the picture's top to its bottom."""


def opening(avatar: Avatar, Ts_cam_head: Floats) -> Opening:
    """The clip's camera, turned to the middle of where the head was, as near as shows all of it.

    Args:
        avatar: at rest it says how high the head is.
        Ts_cam_head: [T,4,4] of the clip's usable frames.
    """
    middles = transform_points(Ts_cam_head, np.array(HEAD_MIDDLE)[None])[:, 0]
    pivot = np.median(middles, 0)
    moves = np.percentile(np.abs(middles[:, 1] - pivot[1]), FRAMED_SHARE[1])
    top = avatar.pivot[1] - np.percentile(avatar.rest_points[:, 1], FRAMED_SHARE[0])
    reach = OPENING_MARGIN * float(top) + float(moves)
    up = np.array([0.0, -1.0, 0.0])
    return Opening(np.zeros(3), pivot, up, 2 * math.atan(reach / float(np.linalg.norm(pivot))))


def camera_of(wxyz: Floats, position: Floats, fov: float, width: int, height: int) -> Camera | None:
    """Viser's camera as ours, which has the same axes; None where a browser sends what is no camera.

    Args:
        wxyz: [4] and position: [3], of the camera in the world.
        fov: radians, from the picture's top to its bottom.
        width, height: of the window in pixels.
    """
    numbers = np.concatenate([np.asarray(wxyz, np.float64), np.asarray(position, np.float64), [fov]])
    if not np.isfinite(numbers).all() or not np.linalg.norm(wxyz) > 0 or not 0 < fov < math.pi:
        return None
    if width < 1 or height < 1:
        return None
    focal = height / 2 / math.tan(fov / 2)
    T_world_cam = make_rigid(quaternion_to_matrix(np.asarray(wxyz, np.float64)), np.asarray(position, np.float64))
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Camera(K, width, height, invert_rigid(T_world_cam))


def size_within(width: int, height: int, shorter: int | None = None) -> tuple[int, int]:
    """A picture's size for a window: as large, or with a side of at most `shorter`, and never beyond `MOST_PIXELS`."""
    scale = min(1.0, MOST_PIXELS / max(width, height))
    if shorter is not None:
        scale = min(scale, shorter / min(width, height))
    return max(1, round(scale * width)), max(1, round(scale * height))


def fitted(camera: Camera, width: int, height: int) -> Camera:
    """All that a camera sees, in the middle of a picture of another shape."""
    scale = min(width / camera.width, height / camera.height)
    K = np.diag([scale, scale, 1.0]) @ camera.K
    K[:2, 2] += (np.array([width, height]) - scale * np.array([camera.width, camera.height])) / 2
    return Camera(K, width, height, camera.T_cam_world)


def eased(
    expression: Mapping[str, float], pose: Pose, avatar: Avatar, seen: Performance
) -> tuple[dict[str, float], Pose, list[str]]:
    """Coefficients and pose held near what the clip showed, and the names of those that were changed.

    Args:
        expression, pose: as asked for.
        avatar: whose clip it was.
        seen: the clip's performance.
    """
    T_cam_rest, T_cam_head = seen.Ts_cam_rest[0], avatar.head_of(pose).double().cpu().numpy()
    turn = matrix_to_rotvec(T_cam_rest[:3, :3].T @ T_cam_head[:3, :3])
    names = dict(zip(seen.names, seen.neutral.tolist(), strict=True))
    names |= {name: float(expression.get(name, 0)) for name in avatar.expression_names}
    if pose.gaze is not None:
        names |= dict(zip(EYES, np.radians([*pose.gaze, *pose.gaze]).tolist(), strict=True))
    names |= dict(zip((*TURN, *MOVE), [*turn, *(T_cam_head - T_cam_rest)[:3, 3]], strict=True))
    wanted = np.array([names[name] for name in seen.names])
    room = np.array([OVERSHOOT.get(name, OVERSHOOT["expression"]) for name in seen.names])
    # Rest itself is never taken away, even where the clip never showed it.
    low = np.where(np.isin(seen.names, avatar.expression_names), np.minimum(seen.low, 0), seen.low)
    held = soft_limit(wanted[None], low, seen.high, room)[0]
    if np.array_equal(wanted, held):
        return dict(expression), pose, []
    changed = [name for name, a, b in zip(seen.names, wanted, held, strict=True) if abs(a - b) > 0.02]
    value = dict(zip(seen.names, held.tolist(), strict=True))
    T_cam_held = T_cam_rest @ make_rigid(rotvec_to_matrix(np.array([value[name] for name in TURN])), np.zeros(3))
    T_cam_held[:3, 3] = T_cam_rest[:3, 3] + [value[name] for name in MOVE]
    gaze = pose.gaze and (
        float(np.degrees(np.mean([value["eyePitchLeft"], value["eyePitchRight"]]))),
        float(np.degrees(np.mean([value["eyeYawLeft"], value["eyeYawRight"]]))),
    )
    kept = {name: value[name] for name, given in expression.items() if given}
    return kept, pose_of(avatar, T_cam_held, gaze, pose.body_follows), changed


def pose_of(
    avatar: Avatar, T_cam_head: Floats, gaze: tuple[float, float] | None = None, body_follows: bool = True
) -> Pose:
    """The pose from rest that puts a head where `T_cam_head` [4,4] says; `gaze` in degrees."""
    T_cam_rest = avatar.rest.T_cam_head.double().cpu().numpy()
    pitch, yaw, roll = np.degrees(matrix_to_rotvec(T_cam_rest[:3, :3].T @ T_cam_head[:3, :3])).tolist()
    right, down, away = (T_cam_head[:3, 3] - T_cam_rest[:3, 3]).tolist()
    return Pose(pitch, yaw, roll, right, down, away, gaze, body_follows)
