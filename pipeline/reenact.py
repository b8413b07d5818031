"""Driving one subject's avatar with another subject's performance: the request, its checks, the video and its account.

`pipeline.retarget` says what is carried over. Finished stages appear by rename, so none of the two subjects is locked:
their keys are compared before and after they were read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline import __version__
from pipeline.dataset import Dataset, Subject, canonical_json, fsync_tree, read_json, sha256_file, write_json
from pipeline.errors import Interrupted, StageError, SubjectBusy, UserError
from pipeline.progress import Reporter, SilentReporter
from pipeline.run import usable_cores
from pipeline.stage import read_manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.avatars import AvatarModel
    from pipeline.clip import Clip
    from pipeline.frames import FrameSet

SCHEMA = 1
VERSION = 1
"""Raise it when the same request would give another video."""
FOLDER = "reenact"
AVATAR_STAGES, DRIVE_STAGES = ("decode", "fit", "train"), ("decode", "fit")
"""Finished stages that are read of either subject; their keys are the video's provenance."""
COLOURS = {"white": "ffffff", "black": "000000", "grey": "808080", "green": "00b140"}
MIN_RESOLUTION, MAX_RESOLUTION = 16, 4096


class ReenactRequest(BaseModel):
    """One reenactment, as typed on the command line or given to a deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    data: Path = Path("data")
    """The dataset directory."""
    avatar: str
    """The subject whose avatar is driven."""
    drive: str
    """The subject who drives it."""
    first_frame: int | None = Field(None, ge=0)
    """First frame of the driver, as numbered by its decode stage; by default its first."""
    last_frame: int | None = Field(None, ge=0)
    """Last frame of the driver, inclusive; by default its last."""
    resolution: int | None = Field(None, ge=MIN_RESOLUTION, le=MAX_RESOLUTION)
    """Width and height of the picture in pixels; by default those the avatar was trained at."""
    background: str = "white"
    """white, black, grey, green, or six hexadecimal digits RRGGBB."""
    overshoot: float = Field(1.0, ge=0, le=10)
    """How far the driver may take the avatar beyond what its clip showed: 0 not at all, 1 as far as looks right."""
    beside: bool = False
    """Show the driver's frame at the left of the avatar."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to render."""
    threads: int = Field(default_factory=usable_cores, ge=1)
    """CPU threads to use."""
    out: Path | None = None
    """The video to write; by default DATA/AVATAR/reenact/DRIVE.mp4."""
    force: bool = False
    """Replace a video that is there."""

    @field_validator("background")
    @classmethod
    def _is_colour(cls, value: str) -> str:
        if value not in COLOURS and not re.fullmatch(r"#?[0-9a-fA-F]{6}", value):
            raise ValueError(f"choose {', '.join(COLOURS)}, or give six hexadecimal digits such as 20242c")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> ReenactRequest:
        if self.first_frame is not None and self.last_frame is not None and self.first_frame > self.last_frame:
            raise ValueError(f"first_frame {self.first_frame} comes after last_frame {self.last_frame}")
        return self

    def colour(self) -> tuple[float, ...]:
        """The background as sRGB in [0, 1]."""
        digits = COLOURS.get(self.background, self.background).removeprefix("#")
        return tuple(byte / 255 for byte in bytes.fromhex(digits))

    def target(self) -> Path:
        """The video's path."""
        return self.out or self.data / self.avatar / FOLDER / f"{self.drive}.mp4"


def request_of(**fields: Any) -> ReenactRequest:
    """A request from what was typed.

    Raises:
        UserError: which field does not fit, and why.
    """
    try:
        return ReenactRequest(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        value = f" {first['input']!r}" if where else ""
        raise UserError(
            f"{where}{value} does not fit: {first['msg'].removeprefix('Value error, ')}.".lstrip(),
            "see headcast reenact --help",
        ) from None


@dataclass(frozen=True)
class Plan:
    """A request found good, with what it means.

    Attributes:
        keys: of the stages that are read, by subject's part and stage.
        clips: the clip that the avatar was made from, at the picture's resolution, and the driver's.
        frames: the driver's decoded frames.
        span: first and last frame of the driver, inclusive.
        out: the video's path; its account lies beside it with the ending `.json`.
    """

    request: ReenactRequest
    avatar: Subject
    drive: Subject
    keys: dict[str, dict[str, str]]
    clips: tuple[Clip, Clip]
    frames: FrameSet
    span: tuple[int, int]
    out: Path

    @property
    def account(self) -> Path:
        """The document beside the video."""
        return self.out.with_suffix(".json")

    def settings(self) -> dict[str, Any]:
        """All that the video depends on beside the two subjects."""
        return {
            "first_frame": self.span[0],
            "last_frame": self.span[1],
            "resolution": self.clips[0].resolution,
            "background": [round(255 * value) for value in self.request.colour()],
            "overshoot": self.request.overshoot,
            "beside": self.request.beside,
        }

    def key(self) -> str:
        """64 hex digits; equal keys mean equal videos."""
        parts = {"version": VERSION, "keys": self.keys, "settings": self.settings()}
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    def finished(self) -> dict[str, Any] | None:
        """The account of this very video where it is there and undamaged."""
        try:
            account = json.loads(self.account.read_bytes())
            same = account["schema"] == SCHEMA and account["key"] == self.key()
            return account if same and sha256_file(self.out) == account["sha256"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def check_unchanged(self) -> None:
        """Refuse to go on with files of which it is not known what they were made from.

        Raises:
            SubjectBusy: a stage of either subject was replaced since the plan was made.
        """
        for part, subject in (("avatar", self.avatar), ("drive", self.drive)):
            for stage, key in self.keys[part].items():
                if (read_manifest(subject.stage(stage)) or {}).get("key") != key:
                    raise SubjectBusy(
                        f"Stage '{stage}' of '{subject.name}' was replaced while it was read.",
                        "run the same command again once that subject's run has ended",
                    )


def check_reenact(request: ReenactRequest) -> Plan:
    """Check a request against the dataset. Reads only.

    Raises:
        UserError: a subject, a frame range or the output is at fault.
        StageError: a subject's files are damaged or do not belong together.
        SubjectBusy: a subject was worked on while it was read.
    """
    from pipeline.avatars import DESCRIPTION
    from pipeline.clip import load_clip
    from pipeline.frames import FrameSet
    from pipeline.retarget import check_names

    dataset = Dataset(request.data)
    avatar, drive = dataset.existing(request.avatar), dataset.existing(request.drive)
    keys = {"avatar": _keys(avatar, AVATAR_STAGES), "drive": _keys(drive, DRIVE_STAGES)}
    names, trained_at = _trained(avatar.stage("train") / DESCRIPTION)
    clips = load_clip(avatar, request.resolution or trained_at), load_clip(drive, trained_at)
    for clip in clips:
        check_names(clip.expression_names, names)
    frames = FrameSet.load(drive.stage("decode"))
    plan = Plan(request, avatar, drive, keys, clips, frames, _span(request, clips[1]), _checked_target(request))
    plan.check_unchanged()
    if plan.out.exists() and not request.force and plan.finished() is None:
        raise UserError(f"'{plan.out}' is there already.", "give --force to replace it, or name another with --out")
    return plan


def _keys(subject: Subject, stages: tuple[str, ...]) -> dict[str, str]:
    """The keys of a subject's finished stages, which belong together."""
    lacking = "no trained avatar" if "train" in stages else "no fit to drive with"
    manifests = {stage: read_manifest(subject.stage(stage)) for stage in stages}
    for stage, manifest in manifests.items():
        if manifest is None or "key" not in manifest:
            raise UserError(
                f"Subject '{subject.name}' has {lacking}: stage '{stage}' is not finished.",
                f"finish it with: headcast rerun {subject.name}",
            )
    digests = {stage: (manifest or {}).get("digest") for stage, manifest in manifests.items()}
    for stage, manifest in manifests.items():
        for used, digest in ((manifest or {}).get("inputs") or {}).items():
            if digests.get(used, digest) != digest:
                raise UserError(
                    f"Stage '{stage}' of '{subject.name}' was made from another '{used}' than is there now.",
                    f"bring it up to date with: headcast rerun {subject.name}",
                )
    return {stage: str((manifest or {})["key"]) for stage, manifest in manifests.items()}


def _trained(path: Path) -> tuple[list[str], int]:
    """What drives a trained avatar, and the resolution it was trained at."""
    description = read_json(path)
    try:
        names, resolution = (
            [str(name) for name in description["expression_names"]],
            description["training"]["resolution"],
        )
        if not isinstance(resolution, int) or not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
            raise ValueError(f"a resolution of {resolution}")
    except (KeyError, TypeError, ValueError) as error:
        raise StageError(
            f"'{path}' is not what training writes: {type(error).__name__} {error}.",
            f"train it again: headcast rerun {path.parent.parent.name} --from train",
        ) from None
    return names, resolution


def _span(request: ReenactRequest, drive: Clip) -> tuple[int, int]:
    """First and last frame of the driver."""
    first = 0 if request.first_frame is None else request.first_frame
    last = len(drive) - 1 if request.last_frame is None else request.last_frame
    if not first <= last < len(drive):
        raise UserError(
            f"Frames {first} to {last} of '{request.drive}' are not all there: it has frames 0 to {len(drive) - 1}.",
            "choose others with --first-frame and --last-frame",
        )
    if not drive.usable[first : last + 1].any():
        raise UserError(
            f"None of the frames {first} to {last} of '{request.drive}' can be used: the face is not seen.",
            "choose others with --first-frame and --last-frame; its report shows which can",
        )
    return first, last


def _checked_target(request: ReenactRequest) -> Path:
    """The video's path, which lies in the dataset's place for it or where the user said."""
    out = request.target()
    root, place = request.data.resolve(), (request.data / request.avatar).resolve() / FOLDER
    if request.out is None and out.parent.resolve() != place:
        raise UserError(f"'{out.parent}' is a link; nothing is written through it.", "remove it, or name a path: --out")
    if out.suffix.lower() != ".mp4":
        raise UserError(f"'{out}' does not end in .mp4.", "name an .mp4 file")
    if out.is_dir() or (request.out is not None and not out.parent.is_dir()):
        wrong = "is a folder" if out.is_dir() else f"cannot be written: there is no folder '{out.parent}'"
        raise UserError(f"'{out}' {wrong}.", "name a file in a folder that is there")
    if out.parent.resolve().is_relative_to(root) and out.parent.resolve().name != FOLDER:
        raise UserError(
            f"'{out}' lies among the dataset's own files.", f"leave --out away, or name a path outside '{request.data}'"
        )
    return out


def reenact(
    plan: Plan, reporter: Reporter | None = None, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Write the video and its account, unless this very video is there; returns the account.

    Raises:
        UserError: the avatar cannot be read, or the device is not there.
        StageError: the disk is full, or the video cannot be written.
        SubjectBusy: a subject was worked on meanwhile.
        Interrupted: a stop was asked for; nothing is left behind.
    """
    reporter, request, out = reporter or SilentReporter(), plan.request, plan.out
    finished = None if request.force else plan.finished()
    if finished is not None:
        reporter.message(f"{out}: fresh, left as it is")
        return finished
    scene = Scene.of(plan, reporter)
    plan.check_unchanged()
    try:
        out.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.stem}.", dir=out.parent) as folder:
            video = Path(folder) / out.name
            account = _write(plan, scene, video, reporter, stop_requested)
            if request.beside:
                plan.check_unchanged()  # the driver's frames were read all the while
            write_json(Path(folder) / plan.account.name, account)
            fsync_tree(Path(folder))
            # An account without its video is not fresh, a video without its account is in the way.
            os.replace(Path(folder) / plan.account.name, plan.account)
            os.replace(video, out)
    except OSError as error:
        raise StageError(
            f"'{out}' could not be written: {error.strerror or error}.", "free some space or name another place: --out"
        ) from error
    reporter.message(account["text"])
    return account


@dataclass(frozen=True)
class Scene:
    """The avatar ready to perform, frame by frame.

    Attributes:
        ticks: [n] seconds of the driver's clip at which a frame is shown.
        fps: frames a second, the driver's own rate.
        shown: [n] number of the driver's frame that is seen at that time.
        held: [n] whether no usable frame of the driver is near.
        limits: `pipeline.retarget.limits_hit`.
        renderer: what draws the frames, a `pipeline.evaluation.ClipRenderer`.
    """

    ticks: NDArray[np.float64]
    fps: Fraction
    shown: NDArray[np.int64]
    held: NDArray[np.bool_]
    limits: dict[str, dict[str, Any]]
    renderer: Any

    @staticmethod
    def of(plan: Plan, reporter: Reporter) -> Scene:
        """Load the avatar and carry the driver's performance over."""
        import torch

        from pipeline.avatars import load_avatar
        from pipeline.evaluation import ClipRenderer
        from pipeline.retarget import Performance, conditions_for, limits_hit, transfer
        from pipeline.training import compile_kernels, resolve_device

        device = resolve_device(plan.request.device)
        avatar: AvatarModel = load_avatar(plan.avatar.stage("train"), device)
        # As in training: torch's own threads only wait for each other at this size.
        torch.set_num_threads(1)
        compile_kernels(device, reporter.message)
        own, driver = (Performance.of(clip) for clip in plan.clips)
        times, fps = plan.frames.times, plan.frames.fps
        first, last = plan.span
        ticks = times[first] + np.arange(round((times[last] - times[first]) * fps) + 1) / float(fps)
        values, held = driver.at(ticks, times, plan.frames.shots)
        done = transfer(values, driver, own, plan.request.overshoot)
        camera = int(np.bincount(plan.clips[0].cameras[plan.clips[0].usable]).argmax())
        conditions = conditions_for(avatar, done.values, own, camera)
        filmed = ClipRenderer.of(avatar, plan.clips[0], plan.request.threads, device)
        cameras = np.full(len(ticks), camera)
        renderer = ClipRenderer(
            avatar, conditions, filmed.Ks, cameras, filmed.resolution, plan.request.threads, filmed.inside
        )
        # Times in frames.json are rounded.
        shown = np.searchsorted(times, ticks + 0.25 / float(fps), side="right") - 1
        return Scene(ticks, fps, shown.clip(first, last), held, limits_hit(done, own), renderer)

    def __len__(self) -> int:
        return len(self.ticks)

    def picture(self, tick: int, colour: tuple[float, ...]) -> NDArray[np.uint8]:
        """[R,R,3] the avatar at a tick over a colour, sRGB in [0, 1]."""
        picture = self.renderer.render(tick)
        over = picture.image + (1 - picture.alpha[..., None]) * (np.array(colour, np.float32) - 1)
        return np.asarray(over.clip(0, 1) * 255 + 0.5, np.uint8)


def driver_picture(plan: Plan, frame: int) -> NDArray[np.uint8]:
    """[R,R,3] a frame of the driver, cut as its training crop is; white beyond the frame's edge."""
    import cv2

    drive, side = plan.clips[1], plan.clips[0].resolution
    x0, y0, size = drive.crops[drive.cameras[frame]]
    image = plan.frames.picture(frame)
    height, width = image.shape[:2]
    canvas = np.full((size, size, 3), 255, np.uint8)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x0 + size, width), min(y0 + size, height)
    canvas[top - y0 : bottom - y0, left - x0 : right - x0] = image[top:bottom, left:right]
    how = cv2.INTER_AREA if size >= side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(canvas, (side, side), interpolation=how), np.uint8)


def _write(
    plan: Plan, scene: Scene, video: Path, reporter: Reporter, stop_requested: Callable[[], bool]
) -> dict[str, Any]:
    """Render to a file and say what it is."""
    from pipeline.video import write_video

    colour = plan.request.colour()

    def pictures() -> Iterator[NDArray[np.uint8]]:
        with reporter.task("reenact", len(scene), "frames") as task:
            for tick in range(len(scene)):
                if stop_requested():
                    raise Interrupted("Stopped as asked; nothing was written.")
                picture = scene.picture(tick, colour)
                if plan.request.beside:
                    picture = np.concatenate([driver_picture(plan, int(scene.shown[tick])), picture], 1)
                yield picture
                task.advance()

    sound = _sound(plan, scene, reporter)
    write_video(video, pictures(), scene.fps, sound=sound)
    side = plan.clips[0].resolution
    account = {
        "schema": SCHEMA,
        "headcast": __version__,
        "key": plan.key(),
        "avatar": plan.avatar.name,
        "drive": plan.drive.name,
        "video": plan.out.name,
        "sha256": sha256_file(video),
        "size": [side * (2 if plan.request.beside else 1), side],
        "frames": len(scene),
        "fps": str(scene.fps),
        "seconds": round(float(len(scene) / scene.fps), 6),
        "held_frames": int(scene.held.sum()),
        "sound": sound is not None,
        "limits": scene.limits,
        "settings": plan.settings(),
        "keys": plan.keys,
    }
    return account | {"text": verdict_text(account)}


def _sound(plan: Plan, scene: Scene, reporter: Reporter) -> Iterator[NDArray[np.int16]] | None:
    """The driver's sound of the whole video; None where none of its clips has any."""
    from pipeline.sound import has_sound, read_sound
    from pipeline.source import source_paths

    chosen = np.unique(plan.frames.clips[plan.span[0] : plan.span[1] + 1])
    try:
        paths = [source_paths(plan.drive)[clip] for clip in chosen]
        heard = [has_sound(path) for path in paths]
    except (UserError, IndexError) as error:
        reporter.message(f"The sound of '{plan.drive.name}' cannot be had: {error}")
        return None
    if not any(heard):
        return None
    begin = float(scene.ticks[0])
    end = begin + float(len(scene) / scene.fps)
    starts = [_clip_start(plan.frames, int(clip)) for clip in chosen]
    # A clip's sound ends where the next clip begins.
    edges = [begin, *starts[1:], end]

    def pieces() -> Iterator[NDArray[np.int16]]:
        for path, start, since, until in zip(paths, starts, edges[:-1], edges[1:], strict=True):
            yield from read_sound(path, since - start, until - since)

    return pieces()


def _clip_start(frames: FrameSet, clip: int) -> float:
    """When a clip's first picture is shown; exact where that picture was kept or the rate is constant."""
    first = int(np.flatnonzero(frames.clips == clip)[0])
    fps = Fraction((frames.record.get("clips") or [{}] * (clip + 1))[clip].get("fps", str(frames.fps)))
    return float(frames.times[first] - frames.source_frames[first] / fps)


def verdict_text(account: dict[str, Any]) -> str:
    """An account in a few sentences."""
    from pipeline.frames import counted

    text = (
        f"{account['drive']} drives {account['avatar']}: {counted(account['frames'], 'frame')}, "
        f"{account['seconds']:.1f} s at {float(Fraction(account['fps'])):.5g} a second, "
        f"{'with its sound' if account['sound'] else 'no sound'}."
    )
    if account["held_frames"]:
        text += f" In {counted(account['held_frames'], 'frame')} the driver's face is not seen; the last pose is held."
    limits = account["limits"]
    if limits:
        worst = [f"{name} in {counted(row['frames'], 'frame')}" for name, row in list(limits.items())[:3]]
        more = f" and {len(limits) - len(worst)} more" if len(limits) > len(worst) else ""
        text += f" What the avatar's clip never showed is guessed, and eased: {', '.join(worst)}{more}."
    return text
