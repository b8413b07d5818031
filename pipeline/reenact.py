"""Driving one subject's avatar with another's performance: the request, its checks, the video and its account.

`pipeline.drivers` says who can drive, `pipeline.retarget` what is carried over, `pipeline.products` how it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.colours import check_colour, colour_of
from pipeline.dataset import Dataset, Subject, read_json, sha256_file, write_json
from pipeline.drivers import (
    TABLE_SUFFIXES,
    Driver,
    SubjectDriver,
    TableDriver,
    driver_name,
    find_driver,
    run_for_driver,
)
from pipeline.errors import Interrupted, StageError, UserError
from pipeline.products import Product, Sources, place_for
from pipeline.progress import Reporter, SilentReporter
from pipeline.run import RunRequest, usable_cores
from pipeline.sound import check_sound, read_sound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.avatars import AvatarModel
    from pipeline.clip import Clip
    from pipeline.evaluation import ClipRenderer
    from pipeline.retarget import Performance

VERSION = 1
"""Raise it when the same request would give another video."""
FOLDER = "reenact"
AVATAR_STAGES, DRIVE_STAGES = ("decode", "fit", "train"), ("decode", "fit")
"""Finished stages that are read of either subject; their keys are the video's provenance."""
MIN_RESOLUTION, MAX_RESOLUTION = 16, 4096


class ReenactRequest(BaseModel):
    """One reenactment, as typed on the command line or given to a deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    data: Path = Path("data")
    """The dataset directory."""
    avatar: str
    """The subject whose avatar is driven."""
    drive: str
    """The subject who drives it, or a video of a person, or a CSV file of ARKit coefficients."""
    first_frame: int | None = Field(None, ge=0)
    """First frame of the driver, as numbered by its decode stage, or row of its table from 0; by default its first."""
    last_frame: int | None = Field(None, ge=0)
    """Last frame of the driver, inclusive; by default its last."""
    resolution: int | None = Field(None, ge=MIN_RESOLUTION, le=MAX_RESOLUTION)
    """Width and height of the picture in pixels; by default those the avatar was trained at."""
    background: str = "white"
    """white, black, grey, green, or six hexadecimal digits RRGGBB."""
    overshoot: float = Field(1.0, ge=0, le=10)
    """How far the driver may take the avatar beyond what its clip showed: 0 not at all, 1 as far as looks right."""
    neutral_frame: int | None = Field(None, ge=0)
    """A frame in which the driver is at rest; by default rest is what the driver's low values and mean pose show."""
    fps: float | None = Field(None, ge=1, le=240)
    """Rows a second of a CSV file, whatever its times say; needed where it has none."""
    sound: Path | None = None
    """A file whose sound goes with the driver's first frame, instead of the driver's own."""
    beside: bool = False
    """Show the driver's frame at the left of the avatar."""
    metrics: bool = False
    """Track the video again and say how well it does what was asked."""
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
        return check_colour(value)

    @model_validator(mode="after")
    def _in_order(self) -> ReenactRequest:
        if self.first_frame is not None and self.last_frame is not None and self.first_frame > self.last_frame:
            raise ValueError(f"first_frame {self.first_frame} comes after last_frame {self.last_frame}")
        return self

    def colour(self) -> tuple[float, ...]:
        """The background as sRGB in [0, 1]."""
        return colour_of(self.background)


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
        avatar: the subject who is shown.
        clip: the clip that the avatar was made from, at the picture's resolution.
        driver: who drives.
        span: first and last frame of the driver, inclusive.
        product: the video, and what it is made of.
    """

    request: ReenactRequest
    avatar: Subject
    clip: Clip
    driver: Driver
    span: tuple[int, int]
    product: Product

    @property
    def out(self) -> Path:
        """The video's path."""
        return self.product.path

    def finished(self) -> dict[str, Any] | None:
        """The account of this very video where nothing of it is left to do."""
        account = self.product.finished()
        return None if account and self.request.metrics and "metrics" not in account else account


def check_reenact(request: ReenactRequest) -> Plan:
    """Check a request against the dataset. Reads only.

    Raises:
        UserError: a subject, a file, a frame range or the output is at fault.
        StageError: a subject's files are damaged or do not belong together.
        SubjectBusy: a subject was worked on while it was read.
    """
    from pipeline.clip import load_clip
    from pipeline.retarget import check_names

    avatar, path = avatar_and_place(request)
    drive = find_driver(request.drive, Dataset(request.data))
    if isinstance(drive, Path) and not _is_table(drive):
        run = run_for_driver(drive, request.data, request.device, request.threads)
        if run.videos:
            raise UserError(f"'{drive}' is not tracked yet.", f"run: headcast run {drive} --to fit")
        drive = run.target()
    if request.fps is not None and isinstance(drive, Subject):
        raise UserError("--fps says how many rows a second a CSV file has.", "leave it out: a video has its own rate")
    filmed = {"drive": (drive, DRIVE_STAGES)} if isinstance(drive, Subject) else {}
    sources = Sources.of(avatar=(avatar, AVATAR_STAGES), **filmed)
    names, trained_at = _trained(avatar)
    clip = load_clip(avatar, request.resolution or trained_at)
    check_names(clip.expression_names, names)
    driver = SubjectDriver.of(drive, trained_at) if isinstance(drive, Subject) else TableDriver.of(drive, request.fps)
    driver.performance(names)
    span = _checked_span(request, driver)
    if request.beside and driver.picture(span[0], clip.resolution) is None:
        raise UserError(f"There is no picture of '{driver.name}' to show beside.", "leave --beside out")
    settings = _settings(request, driver, span, clip.resolution)
    product = Product(path, sources, settings, VERSION, force=request.force)
    sources.check_unchanged()
    product.check_free()
    return Plan(request, avatar, clip, driver, span, product)


def driver_run(request: ReenactRequest) -> RunRequest | None:
    """The run that has to come first where a video drives: up to its fit. None where none does.

    Raises:
        UserError: the avatar, the output or the video is at fault; all that can be told before the run.
    """
    avatar, path = avatar_and_place(request)
    drive = find_driver(request.drive, Dataset(request.data))
    if isinstance(drive, Subject) or _is_table(drive):
        return None
    sources = Sources.of(avatar=(avatar, AVATAR_STAGES))
    _trained(avatar)
    run = run_for_driver(drive, request.data, request.device, request.threads)
    if run.videos:  # whatever is there was made by somebody else
        Product(path, sources, {}, VERSION, force=request.force).check_free()
    return run


def avatar_and_place(request: ReenactRequest) -> tuple[Subject, Path]:
    """Whose avatar, and the video's path.

    Raises:
        UserError: there is no such subject, or nothing can be written there.
    """
    avatar = Dataset(request.data).existing(request.avatar)
    return avatar, place_for(avatar, FOLDER, f"{driver_name(request.drive)}.mp4", request.out, ".mp4")


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLE_SUFFIXES


def _settings(request: ReenactRequest, driver: Driver, span: tuple[int, int], resolution: int) -> dict[str, Any]:
    """All that the video depends on beside its subjects."""
    settings = {
        "first_frame": span[0],
        "last_frame": span[1],
        "resolution": resolution,
        "background": [round(255 * value) for value in request.colour()],
        "overshoot": request.overshoot,
        "beside": request.beside,
        **driver.settings,
    }
    if request.neutral_frame is not None:
        settings["neutral_frame"] = request.neutral_frame
    if request.sound is not None:
        check_sound(request.sound)
        settings["sound"] = sha256_file(request.sound)
    return settings


def _trained(avatar: Subject) -> tuple[list[str], int]:
    """What drives a trained avatar, and the resolution it was trained at."""
    from pipeline.avatars import DESCRIPTION, check_schema

    path = avatar.stage("train") / DESCRIPTION
    description = read_json(path)
    try:
        names, resolution = (
            [str(name) for name in description["expression_names"]],
            description["training"]["resolution"],
        )
        if not isinstance(resolution, int) or not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
            raise ValueError(f"a resolution of {resolution}")
        check_schema(description["schema"], path)
    except (KeyError, TypeError, ValueError) as error:
        raise StageError(
            f"'{path}' is not what training writes: {type(error).__name__} {error}.",
            f"train it again: headcast rerun {path.parent.parent.name} --from train",
        ) from None
    return names, resolution


def _checked_span(request: ReenactRequest, driver: Driver) -> tuple[int, int]:
    """First and last frame of the driver."""
    count = len(driver.times)
    first = 0 if request.first_frame is None else request.first_frame
    last = count - 1 if request.last_frame is None else request.last_frame
    if not first <= last < count:
        raise UserError(
            f"Frames {first} to {last} of '{driver.name}' are not all there: it has frames 0 to {count - 1}.",
            "choose others with --first-frame and --last-frame",
        )
    if not driver.usable[first : last + 1].any():
        raise UserError(
            f"None of the frames {first} to {last} of '{driver.name}' can be used: the face is not seen.",
            "choose others with --first-frame and --last-frame; its report shows which can",
        )
    rest = request.neutral_frame
    if rest is not None and not (rest < count and driver.usable[rest]):
        why = "the face is not seen in it" if rest < count else f"it has frames 0 to {count - 1}"
        raise UserError(f"Frame {rest} of '{driver.name}' cannot be its rest: {why}.", "choose another --neutral-frame")
    return first, last


def reenact(
    plan: Plan, reporter: Reporter | None = None, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Write the video and its account, unless this very video is there; returns the account.

    Raises:
        UserError: the avatar cannot be read, or the device is not there.
        StageError: the disk is full, or the video cannot be written.
        SubjectBusy: a subject was worked on meanwhile.
        Interrupted: a stop was asked for; no half video is left behind.
    """
    reporter, product = reporter or SilentReporter(), plan.product
    account = None if plan.request.force else product.finished()
    if account is not None and plan.finished() is not None:
        reporter.message(f"{plan.out}: fresh, left as it is")
        return account
    scene = Scene.of(plan, reporter)
    if account is None:
        account = product.make(lambda video: _write(plan, scene, video, reporter, stop_requested))
    if plan.request.metrics and "metrics" not in account:
        from pipeline.retracking import measure, metrics_text

        metrics = measure(plan, scene, reporter, stop_requested)
        account |= {"metrics": metrics, "text": f"{account['text']} {metrics_text(metrics)}"}
        write_json(product.account, account)
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
        own: what the avatar's own clip shows.
        wanted: [n,D] what was asked of the avatar, in the columns of `own`, before it was eased to the limits.
        limits: `pipeline.retarget.limits_hit`.
        renderer: what draws the frames, and for which camera.
    """

    ticks: NDArray[np.float64]
    fps: Fraction
    shown: NDArray[np.int64]
    held: NDArray[np.bool_]
    own: Performance
    wanted: NDArray[np.float64]
    limits: dict[str, dict[str, Any]]
    renderer: ClipRenderer

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
        own, driver = Performance.of(plan.clip), plan.driver.performance(plan.clip.expression_names)
        if plan.request.neutral_frame is not None:
            driver = driver.resting_at(plan.request.neutral_frame)
        times, fps = plan.driver.times, plan.driver.fps
        first, last = plan.span
        ticks = times[first] + np.arange(round((times[last] - times[first]) * fps) + 1) / float(fps)
        values, held = driver.at(ticks, times, plan.driver.shots)
        done = transfer(values, driver, own, plan.request.overshoot)
        camera = plan.clip.main_camera
        conditions = conditions_for(avatar, done.values, own, camera)
        filmed = ClipRenderer.of(avatar, plan.clip, plan.request.threads, device)
        cameras = np.full(len(ticks), camera)
        renderer = ClipRenderer(
            avatar, conditions, filmed.Ks, cameras, filmed.resolution, plan.request.threads, filmed.inside
        )
        # Times in frames.json are rounded.
        shown = np.searchsorted(times, ticks + 0.25 / float(fps), side="right") - 1
        limits = limits_hit(done, own)
        return Scene(ticks, fps, shown.clip(first, last), held, own, done.wanted, limits, renderer)

    def __len__(self) -> int:
        return len(self.ticks)

    def picture(self, tick: int, colour: tuple[float, ...]) -> NDArray[np.uint8]:
        """[R,R,3] the avatar at a tick over a colour, sRGB in [0, 1]."""
        picture = self.renderer.render(tick)
        over = picture.image + (1 - picture.alpha[..., None]) * (np.array(colour, np.float32) - 1)
        return np.asarray(over.clip(0, 1) * 255 + 0.5, np.uint8)


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
                    beside = plan.driver.picture(int(scene.shown[tick]), plan.clip.resolution)
                    picture = np.concatenate([beside, picture], 1)
                yield picture
                task.advance()

    seconds = float(len(scene) / scene.fps)
    sound = _sound(plan, scene, seconds, reporter)
    write_video(video, pictures(), scene.fps, sound=sound)
    side = plan.clip.resolution
    account = {
        "avatar": plan.avatar.name,
        "drive": plan.driver.name,
        "video": plan.out.name,
        "size": [side * (2 if plan.request.beside else 1), side],
        "frames": len(scene),
        "fps": str(scene.fps),
        "seconds": round(seconds, 6),
        "held_frames": int(scene.held.sum()),
        "sound": sound is not None,
        "limits": scene.limits,
        "notes": list(plan.driver.notes),
    }
    return account | {"text": verdict_text(account)}


def _sound(plan: Plan, scene: Scene, seconds: float, reporter: Reporter) -> Iterator[NDArray[np.int16]] | None:
    """The sound of the whole video: of the file that was named, else the driver's own; None where there is none."""
    begin = float(scene.ticks[0])
    if plan.request.sound is not None:
        return read_sound(plan.request.sound, begin - float(plan.driver.times[0]), seconds)
    return plan.driver.sound(plan.span, begin, seconds, reporter)


def verdict_text(account: dict[str, Any]) -> str:
    """An account in a few sentences."""
    from pipeline.frames import counted

    text = (
        f"{account['drive']} drives {account['avatar']}: {counted(account['frames'], 'frame')}, "
        f"{account['seconds']:.1f} s at {float(Fraction(account['fps'])):.5g} a second, "
        f"{'with sound' if account['sound'] else 'no sound'}."
    )
    if account["held_frames"]:
        text += f" In {counted(account['held_frames'], 'frame')} the driver's face is not seen; the last pose is held."
    limits = account["limits"]
    if limits:
        worst = [f"{name} in {counted(row['frames'], 'frame')}" for name, row in list(limits.items())[:3]]
        more = f" and {len(limits) - len(worst)} more" if len(limits) > len(worst) else ""
        text += f" What the avatar's clip never showed is guessed, and eased: {', '.join(worst)}{more}."
    return " ".join([text, *account["notes"]])
