"""Pictures and videos of an avatar from any side: `headcast render`, and the same frames for notebooks.

import pipeline
from pipeline.rendering import turntable

frames = list(turntable(pipeline.load_avatar("anna"), arc=60, expression={"mouthSmileLeft": 0.6}))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.camera_path import MAX_PITCH, MAX_YAW, MAX_ZOOM, MIN_ZOOM, CameraPath, PathFile, still
from pipeline.camera_path import sway as sway_path
from pipeline.camera_path import turntable as turntable_path
from pipeline.colours import check_colour, colour_of
from pipeline.dataset import Dataset
from pipeline.errors import Interrupted, UserError
from pipeline.keyframes import (
    MAX_KEYFRAMES,
    MAX_SECONDS,
    KeyframeFile,
    Strict,
    Time,
    between,
    check_times,
    read_keyframes,
)
from pipeline.products import Product, Sources, place_for
from pipeline.progress import Reporter, SilentReporter
from pipeline.run import usable_cores
from pipeline.viewpoint import ROOM, Camera

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.api import Avatar, LoadedSubject
    from pipeline.avatars import Condition

VERSION = 1
"""Raise it when the same request would give other pictures."""
FOLDER = "renders"
ENDINGS = {"png": ".png", "frames": "", "mp4": ".mp4", "webm": ".webm"}
MIN_SIDE, MAX_SIDE, MAX_FRAMES = 16, 4096, 20_000
SECONDS, FPS, SIZE = 4.0, 30.0, (512, 512)
YAW, PITCH = 10.0, 4.0
"""Degrees that an orbit goes to either side, up and down: as far as most avatars hold (docs/render.md)."""
WHITE = (1.0, 1.0, 1.0)

Drive = Callable[[float], "Condition"]
"""What the avatar does at a moment, in seconds from the start."""


def film(
    avatar: Avatar,
    path: CameraPath,
    drive: Drive,
    count: int,
    fps: Fraction | float = FPS,
    background: Sequence[float] | None = WHITE,
) -> Iterator[NDArray[np.uint8]]:
    """Frames of an avatar, [H,W,3] uint8, or [H,W,4] with straight alpha where `background` is None.

    Args:
        avatar: whom.
        path: where the camera is.
        drive: what the avatar does.
        count: how many frames.
        fps: frames a second.
        background: sRGB in [0,1].
    """
    for frame in range(count):
        seconds = float(frame / fps)
        yield avatar.render(drive(seconds), camera=path(seconds, frame / count), background=background)


def turntable(
    avatar: Avatar,
    arc: float = 360.0,
    pitch: float = 0.0,
    zoom: float = ROOM,
    *,
    expression: Mapping[str, float] | None = None,
    seconds: float = SECONDS,
    fps: float = FPS,
    size: int | tuple[int, int] = SIZE,
    background: Sequence[float] | None = WHITE,
) -> Iterator[NDArray[np.uint8]]:
    """Frames [H,W,3 or 4] of a camera that goes all round an avatar, or over an arc and back; see `film`.

    Args:
        avatar: whom.
        arc, pitch: degrees.
        zoom: how many times nearer.
        expression: coefficients by name, the others at rest.
        seconds, fps, size, background: of the frames.
    """
    path = turntable_path(avatar.viewpoints(size), arc, pitch, zoom)
    return film(avatar, path, _held(avatar, expression), _count(seconds, fps), fps, background)


def sway(
    avatar: Avatar,
    yaw: float = YAW,
    pitch: float = PITCH,
    zoom: float = ROOM,
    *,
    expression: Mapping[str, float] | None = None,
    seconds: float = SECONDS,
    fps: float = FPS,
    size: int | tuple[int, int] = SIZE,
    background: Sequence[float] | None = WHITE,
) -> Iterator[NDArray[np.uint8]]:
    """Frames [H,W,3 or 4] of a camera that sways before an avatar by these degrees to either side; see `turntable`."""
    path = sway_path(avatar.viewpoints(size), yaw, pitch, zoom)
    return film(avatar, path, _held(avatar, expression), _count(seconds, fps), fps, background)


def _held(avatar: Avatar, expression: Mapping[str, float] | None) -> Drive:
    condition = avatar.condition(expression or None)
    return lambda seconds: condition


def _count(seconds: float, fps: Fraction | float) -> int:
    return max(1, round(seconds * fps))


class PoseKey(Strict):
    """How the head is held at a keyframe, as `pipeline.Pose`: degrees, metres, and the gaze in degrees."""

    pitch: float = Field(0.0, ge=-60, le=60)
    yaw: float = Field(0.0, ge=-60, le=60)
    roll: float = Field(0.0, ge=-60, le=60)
    right: float = Field(0.0, ge=-1, le=1)
    down: float = Field(0.0, ge=-1, le=1)
    away: float = Field(0.0, ge=-1, le=1)


class DriveKey(Strict):
    """What an avatar does at a moment; what is not told is at rest."""

    time: Time
    expression: dict[str, float] = Field(default_factory=dict)
    pose: PoseKey = PoseKey()


class DriveFile(KeyframeFile):
    """A small performance (docs/render.md)."""

    keyframes: list[DriveKey] = Field(min_length=1, max_length=MAX_KEYFRAMES)

    @model_validator(mode="after")
    def _in_order(self) -> DriveFile:
        check_times([key.time for key in self.keyframes])
        for key in self.keyframes:
            _check_coefficients(key.expression)
        return self

    @property
    def seconds(self) -> float:
        """When the last keyframe comes."""
        return self.keyframes[-1].time

    def drive(self, avatar: Avatar) -> Drive:
        """What it makes an avatar do.

        Raises:
            UserError: the avatar has no such coefficient.
        """
        from pipeline.api import Pose

        names = sorted({name for key in self.keyframes for name in key.expression})
        avatar.expression(dict.fromkeys(names, 0.0))
        values = np.array([[key.expression.get(name, 0.0) for name in names] for key in self.keyframes])
        poses = np.array([list(key.pose.model_dump().values()) for key in self.keyframes])
        times = [key.time for key in self.keyframes]

        def at(seconds: float) -> Condition:
            before, after, way = between(times, seconds)
            way = self.share(way)
            value, pose = ((1 - way) * table[before] + way * table[after] for table in (values, poses))
            held = Pose(**dict(zip(PoseKey.model_fields, pose.tolist(), strict=True)))
            return avatar.condition(dict(zip(names, value.tolist(), strict=True)), held)

        return at


def _check_coefficients(given: Mapping[str, float]) -> None:
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value:g}, not in [0, 1]")


class RenderRequest(BaseModel):
    """One render, as typed on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    data: Path = Path("data")
    """The dataset directory."""
    subject: str
    """Whose avatar."""
    path: str = "orbit"
    """orbit, turntable, front, clip, or a JSON file of cameras."""
    drive: str = "rest"
    """rest, clip, or a JSON file of a performance."""
    expression: dict[str, float] = {}
    """Coefficients at rest, by name."""
    first_frame: int | None = Field(None, ge=0)
    """First frame of the clip's performance."""
    last_frame: int | None = Field(None, ge=0)
    """Last frame of the clip's performance, inclusive."""
    yaw: float | None = Field(None, ge=-MAX_YAW, le=MAX_YAW)
    """Degrees."""
    pitch: float | None = Field(None, ge=-MAX_PITCH, le=MAX_PITCH)
    """Degrees."""
    zoom: float | None = Field(None, ge=MIN_ZOOM, le=MAX_ZOOM)
    """How many times nearer."""
    seconds: float | None = Field(None, gt=0, le=MAX_SECONDS)
    """Length."""
    fps: float | None = Field(None, ge=1, le=240)
    """Frames a second."""
    size: tuple[int, int] = SIZE
    """Width and height in pixels."""
    background: str = "white"
    """transparent, white, black, grey, green, or six hexadecimal digits RRGGBB."""
    format: Literal["png", "frames", "mp4", "webm"] | None = None
    """What is written."""
    edge: Literal["soft", "cut"] = "soft"
    """Whether the avatar fades out where its clip cut it off."""
    baked: bool = False
    """The baked avatar."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to render."""
    threads: int = Field(default_factory=usable_cores, ge=1)
    """CPU threads to use."""
    out: Path | None = None
    """What to write."""
    force: bool = False
    """Replace what is there."""

    @field_validator("background")
    @classmethod
    def _is_colour(cls, value: str) -> str:
        return check_colour(value, "transparent")

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not all(MIN_SIDE <= side <= MAX_SIDE for side in value):
            raise ValueError(f"a side has {MIN_SIDE} to {MAX_SIDE} pixels")
        return value

    @field_validator("expression")
    @classmethod
    def _are_coefficients(cls, value: dict[str, float]) -> dict[str, float]:
        _check_coefficients(value)
        return value

    @property
    def colour(self) -> tuple[float, ...] | None:
        """The background as sRGB in [0, 1]; None for a transparent one."""
        return None if self.background == "transparent" else colour_of(self.background)


@dataclass(frozen=True)
class RenderPlan:
    """A request found good.

    Attributes:
        subject: whose avatar, with its clip.
        cameras: the path's file, where it is one. performance: the drive's file, where it is one.
        times: [T] seconds of the clip's frames.
        span: first and last frame of the clip that drives; None where it does not.
        format: what is written.
        count, fps: of the frames.
    """

    request: RenderRequest
    subject: LoadedSubject
    product: Product
    cameras: PathFile | None
    performance: DriveFile | None
    times: NDArray[np.float64]
    span: tuple[int, int] | None
    format: str
    count: int
    fps: Fraction
    reporter: Reporter
    stop_requested: Callable[[], bool]


def check_render(
    request: RenderRequest,
    reporter: Reporter | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> RenderPlan:
    """Check a request against the dataset. Reads only.

    Raises:
        UserError: the subject, a file, an option or the place is at fault.
        StageError: the subject's files are damaged or do not belong together.
    """
    from pipeline.api import STAGES, LoadedSubject
    from pipeline.frames import FrameSet
    from pipeline.video import simple_rate

    _check_options(request)
    found = Dataset(request.data).existing(request.subject)
    stages = (*STAGES, "export") if request.baked else STAGES
    sources = Sources.of(avatar=(found, stages))
    subject, frames = LoadedSubject(found), FrameSet.load(found.stage("decode"))
    cameras = read_keyframes(Path(request.path), PathFile) if request.path.endswith(".json") else None
    performance = read_keyframes(Path(request.drive), DriveFile) if request.drive.endswith(".json") else None
    span = _span(request, subject) if request.drive == "clip" else None
    kind = _format(request)
    fps = simple_rate(request.fps) if request.fps else frames.fps if span else Fraction(FPS)
    seconds = _seconds(request, cameras, performance, None if span is None else frames.times[list(span)], fps)
    count = 1 if kind == "png" else _count(seconds, fps)
    if count > MAX_FRAMES:
        raise UserError(f"{count:,} frames are too many.", f"at most {MAX_FRAMES:,}: give fewer --seconds or --fps")
    odd = kind in ("mp4", "webm") and (request.size[0] % 2 or request.size[1] % 2)
    if odd:
        raise UserError(
            f"A video cannot have {request.size[0]}x{request.size[1]} pixels.", "give a --size of even numbers"
        )
    settings = {
        **request.model_dump(mode="json", exclude={"data", "subject", "device", "threads", "out", "force", "format"}),
        **({"path": cameras.model_dump(mode="json")} if cameras else {}),
        **({"drive": performance.model_dump(mode="json")} if performance else {}),
        **{"format": kind, "span": span, "count": count, "fps": str(fps)},
    }
    place = place_for(found, FOLDER, _name(request, kind), request.out, ENDINGS[kind])
    folder = kind == "frames"
    product = Product(place, sources, settings, version=VERSION, folder=folder, force=request.force)
    product.check_free()
    return RenderPlan(
        *(request, subject, product, cameras, performance, frames.times, span, kind, count, fps),
        reporter or SilentReporter(),
        stop_requested,
    )


def _check_options(request: RenderRequest) -> None:
    """Refuse names that are unknown, and options that would do nothing."""
    for option, known in (("path", ("orbit", "turntable", "front", "clip")), ("drive", ("rest", "clip"))):
        value = getattr(request, option)
        if value not in known and not value.endswith(".json"):
            raise UserError(f"There is no {option} '{value}'.", f"choose {', '.join(known)}, or name a .json file")
    places = [name for name in ("yaw", "pitch", "zoom") if getattr(request, name) is not None]
    if places and (request.path == "clip" or request.path.endswith(".json")):
        raise UserError(f"--{places[0]} means nothing with --path {request.path}.", "leave it away")
    if request.expression and request.drive != "rest":
        raise UserError(f"--set means nothing with --drive {request.drive}.", "leave it away, or take --drive rest")
    if request.drive != "clip" and (request.first_frame is not None or request.last_frame is not None):
        raise UserError("--first-frame and --last-frame are of the clip.", "leave them away, or take --drive clip")


def _format(request: RenderRequest) -> str:
    """What is written: as told, as the name's ending says, or what suits best."""
    told: str | None = request.format
    if request.out is not None:
        ending = request.out.suffix.lower()
        named = next((kind for kind, suffix in ENDINGS.items() if suffix == ending), None)
        if named is None or told not in (None, named):
            wanted = f"a {told} file" if told in ("png", "mp4", "webm") else "a folder" if told else "anything known"
            raise UserError(f"'{request.out}' does not name {wanted}.", "end it in .png, .mp4, .webm, or in nothing")
        told = named
    moves = [
        *([f"--path {request.path}"] if request.path not in ("front", "clip") else []),
        *([f"--drive {request.drive}"] if request.drive.endswith(".json") else []),
        *(["--seconds"] if request.seconds is not None else []),
        *(["--fps"] if request.fps is not None else []),
        *(["--last-frame"] if request.last_frame is not None else []),
    ]
    if told is None:
        still_life = not moves and request.drive == "rest"
        told = "png" if still_life else "webm" if request.colour is None else "mp4"
    if told == "png" and moves:
        raise UserError(
            f"One picture cannot show {moves[0]}.",
            "take --path front or clip, where --yaw and --pitch turn the view, or --format frames for many pictures",
        )
    if told == "mp4" and request.colour is None:
        raise UserError("An .mp4 cannot be transparent.", "take --format webm or frames, or a colour")
    return told


def _name(request: RenderRequest, kind: str) -> str:
    """`orbit.mp4`, `front-transparent.png`, `orbit-clip-frames`: another for whatever can stand beside it."""
    still_life = request.path in ("front", "clip") and request.drive == "rest"
    usual = "png" if still_life else "webm" if request.colour is None else "mp4"
    parts = [Path(request.path).stem, *([] if request.drive == "rest" else [Path(request.drive).stem])]
    parts += ["baked"] if request.baked else []
    parts += ["transparent"] if request.colour is None else []
    # An account goes by the name without its ending.
    parts += [kind] if kind != usual else []
    return "-".join(parts) + ENDINGS[kind]


def _span(request: RenderRequest, subject: LoadedSubject) -> tuple[int, int]:
    """First and last frame of the clip that drives."""
    usable = np.flatnonzero(subject.clip.usable)
    first = int(usable[0]) if request.first_frame is None and len(usable) else request.first_frame or 0
    last = len(subject) - 1 if request.last_frame is None else request.last_frame
    if not first <= last < len(subject) or not subject.clip.usable[first : last + 1].any():
        wrong = "hold none that can be used" if first <= last < len(subject) else "are not all there"
        raise UserError(
            f"Frames {first} to {last} of '{subject.name}' {wrong}; it has 0 to {len(subject) - 1}.",
            "choose others with --first-frame and --last-frame",
        )
    return first, last


def _seconds(
    request: RenderRequest,
    cameras: PathFile | None,
    performance: DriveFile | None,
    played: NDArray[np.float64] | None,
    fps: Fraction,
) -> float:
    """How long it takes: as told, or as long as the files and the clip's performance last."""
    whole = None if played is None else float(played[1] - played[0] + 1 / fps)
    if request.seconds is not None:
        if whole is not None and request.seconds > whole + 0.5 / float(fps):
            raise UserError(
                f"The performance lasts {whole:.2f} s, not {request.seconds:g}.", "give fewer --seconds, or none"
            )
        return request.seconds
    if whole is not None:
        return whole
    lengths = [file.seconds for file in (cameras, performance) if file is not None]
    return max(lengths) + float(1 / fps) if lengths else SECONDS


def render(plan: RenderPlan) -> dict[str, Any]:
    """Write it, unless this very render is there; returns its account.

    Raises:
        UserError: the avatar cannot be read, or has no such coefficient.
        StageError: the disk is full, the place cannot be written, or the device is not there.
        SubjectBusy: the subject was worked on meanwhile.
        Interrupted: a stop was asked for; nothing is left behind.
    """
    finished = None if plan.request.force else plan.product.finished()
    if finished is not None:
        plan.reporter.message(f"{plan.product.path}: fresh, left as it is")
        return finished
    avatar = _avatar(plan)
    path, drive = _path(plan, avatar), _drive(plan, avatar)
    account = plan.product.make(lambda place: _write(plan, avatar, path, drive, place))
    plan.reporter.message(account["text"])
    return account


def _avatar(plan: RenderPlan) -> Avatar:
    import torch

    from pipeline.avatars import DESCRIPTION
    from pipeline.novel_views import soft_edge
    from pipeline.training import compile_kernels, resolve_device

    request, subject = plan.request, plan.subject
    if request.baked and not (subject.subject.stage("export") / "baked" / DESCRIPTION).is_file():
        raise UserError(
            f"'{subject.name}' has no baked avatar: it was exported with export.bake=false.",
            f"run its video again without that; what is fresh stays: headcast run VIDEO --subject {subject.name}",
        )
    device = resolve_device(request.device)
    avatar = subject.avatar(baked=request.baked, device=str(device))
    # As in training: torch's own threads only wait for each other at this size.
    torch.set_num_threads(1)
    compile_kernels(device, plan.reporter.message)
    avatar.threads = avatar.model.threads = request.threads
    if request.edge == "soft":
        avatar.fade = soft_edge(avatar.model, subject.clip)
    return avatar


def _path(plan: RenderPlan, avatar: Avatar) -> CameraPath:
    """Where the camera goes."""
    request, clip = plan.request, plan.subject.clip
    (width, height), look = request.size, avatar.viewpoints(request.size)

    def filmed(seconds: float, share: float) -> Camera:
        frame = _frame_at(plan, seconds) if plan.span else int(np.flatnonzero(clip.usable)[0])
        return plan.subject.camera(frame).resized(width, height)

    if plan.cameras is not None:
        return plan.cameras.path(look, width, height)
    yaw, pitch, zoom = request.yaw, request.pitch, request.zoom
    if request.path == "orbit":
        return sway_path(look, _told(yaw, YAW), _told(pitch, PITCH), _told(zoom, ROOM))
    if request.path == "turntable":
        return turntable_path(look, _told(yaw, 360.0), _told(pitch, 0.0), _told(zoom, ROOM))
    if request.path == "front":
        return still(look(_told(yaw, 0.0), _told(pitch, 0.0), _told(zoom, 1.0)))
    return filmed


def _told(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _drive(plan: RenderPlan, avatar: Avatar) -> Drive:
    """What the avatar does."""
    if plan.performance is not None:
        return plan.performance.drive(avatar)
    if plan.span is None:
        return _held(avatar, plan.request.expression)
    device = avatar.model.neutral.T_cam_head.device

    def performed(seconds: float) -> Condition:
        condition = plan.subject.condition(_frame_at(plan, seconds))
        return type(condition)(*(value.to(device) for value in condition))

    return performed


def _frame_at(plan: RenderPlan, seconds: float) -> int:
    """The frame of the clip's performance that is seen at a time; where it cannot be used, the last one that can."""
    assert plan.span is not None
    first, last = plan.span
    usable = first + np.flatnonzero(plan.subject.clip.usable[first : last + 1])
    # Times in frames.json are rounded.
    place = np.searchsorted(plan.times[usable], plan.times[first] + seconds + 0.25 / float(plan.fps), side="right")
    return int(usable[max(place - 1, 0)])


def _write(plan: RenderPlan, avatar: Avatar, path: CameraPath, drive: Drive, place: Path) -> dict[str, Any]:
    """Render to a file or into a folder, and say what it is."""
    from pipeline.frames import save_image
    from pipeline.video import write_video, write_webm

    def frames() -> Iterator[NDArray[np.uint8]]:
        with plan.reporter.task("render", plan.count, "frames") as task:
            for frame in film(avatar, path, drive, plan.count, plan.fps, plan.request.colour):
                if plan.stop_requested():
                    raise Interrupted("Stopped as asked; nothing was written.")
                yield frame
                task.advance()

    sound = _sound(plan)
    if plan.format == "mp4":
        write_video(place, frames(), plan.fps, sound=sound)
    elif plan.format == "webm":
        write_webm(place, (_with_alpha(frame) for frame in frames()), plan.fps)
    else:
        for number, frame in enumerate(frames()):
            save_image(place / f"{number:06d}.png" if plan.format == "frames" else place, frame)
    account = {
        "subject": plan.subject.name,
        "file": plan.product.path.name,
        "size": list(plan.request.size),
        "frames": plan.count,
        "fps": str(plan.fps),
        "seconds": round(float(plan.count / plan.fps), 6),
        "sound": sound is not None,
        "seen_from": _seen(plan, avatar),
        "looked_from": _looked(plan, avatar, path),
    }
    return account | {"text": _text(plan, account)}


def _sound(plan: RenderPlan) -> Iterator[NDArray[np.int16]] | None:
    """The clip's own, where its performance becomes a film that can have sound."""
    from pipeline.drivers import SubjectDriver

    if plan.span is None or plan.format != "mp4":
        return None
    clip = SubjectDriver.of(plan.subject.subject, plan.subject.clip.resolution)
    return clip.sound(plan.span, float(plan.times[plan.span[0]]), float(plan.count / plan.fps), plan.reporter)


def _with_alpha(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return frame if frame.shape[2] == 4 else np.pad(frame, ((0, 0), (0, 0), (0, 1)), constant_values=255)


def _seen(plan: RenderPlan, avatar: Avatar) -> dict[str, list[float]]:
    """From where training saw the head, degrees from the view at rest."""
    from pipeline.novel_views import angles_seen

    return angles_seen(plan.subject.clip, plan.subject.train_frames, avatar.model)


def _looked(plan: RenderPlan, avatar: Avatar, path: CameraPath) -> dict[str, list[float]]:
    """From where the camera looked at the head at rest, likewise."""
    from pipeline.viewpoint import angles_of

    T_cam_head = avatar.model.neutral.T_cam_head.double().cpu().numpy()
    moments = [(float(frame / plan.fps), frame / plan.count) for frame in range(plan.count)]
    Ts_cam_head = np.stack([path(*moment).T_cam_world @ T_cam_head for moment in moments])
    angles = angles_of(Ts_cam_head) - angles_of(T_cam_head)
    angles[:, 0] = (angles[:, 0] + 180) % 360 - 180
    ends = np.stack([angles.min(0), angles.max(0)], 1).round(1)
    return {"yaw": ends[0].tolist(), "pitch": ends[1].tolist()}


def _text(plan: RenderPlan, account: dict[str, Any]) -> str:
    """An account in a few sentences."""
    from pipeline.novel_views import HOLDS_DEG

    width, height = account["size"]
    over = plan.request.background
    what = f"{account['file']}: {plan.subject.name}, {width}x{height}, {over}"
    if plan.count > 1:
        what += f", {plan.count} frames, {account['seconds']:.1f} s at {float(plan.fps):.5g} a second"
    seen, looked = account["seen_from"], account["looked_from"]
    beyond = max(max(seen[name][0] - looked[name][0], looked[name][1] - seen[name][1]) for name in ("yaw", "pitch"))
    if beyond > HOLDS_DEG:
        what += (
            f". It looks {beyond:.0f} degrees farther round than the clip did: what shows there was never seen, and "
            "has holes"
        )
    return what + "."
