"""Every setting of every stage, as plain typed data, with the presets and the `--set section.field=value` overrides.

A section belongs to one stage and enters that stage's key: changing a field makes that stage stale, and the later ones
if its outputs change. What only says how to run (device, threads, terminal) is not here, for it must not.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from pipeline.errors import UserError

Preset = Literal["quick", "standard", "best"]
Avatar = Literal["rigged", "gaussianhead", "gaussianhead-plus"]
Head = Literal["anny", "flame", "flame2023open", "flame2023", "flame2020", "gnm"]
PRESETS: tuple[Preset, ...] = typing.get_args(Preset)
AVATARS: tuple[Avatar, ...] = typing.get_args(Avatar)


class Section(BaseModel):
    """Settings of one stage: frozen, checked, no unknown fields; the text under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    beside: ClassVar[frozenset[str]] = frozenset()
    """Fields that change nothing of what the stage writes."""

    def keyed(self) -> dict[str, Any]:
        """Plain data of all that the stage's files depend on."""
        return self.model_dump(exclude=set(self.beside))


class DecodeConfig(Section):
    """From the clips of the source to the frames of their shots."""

    max_fps: float = Field(60.0, gt=0)
    """Frames a second to keep at most; a faster clip is thinned."""
    max_frames: int = Field(1800, ge=1)
    """Frames to keep at most, of all clips together; more are thinned evenly over the whole length."""
    max_side_px: int = Field(1024, ge=32)
    """Longer side of the frames at most; larger ones are reduced."""
    min_shot_seconds: float = Field(1.0, ge=0)
    """Shots between two cuts that last at least so long are kept; where none does, the longest of the clip."""
    start_seconds: float | None = Field(None, ge=0)
    """Begin of the span to use, where one clip is given; what lies in the span is kept, short shots too."""
    end_seconds: float | None = Field(None, gt=0)
    """End of the span to use, where one clip is given."""
    drop_repeated: bool = True
    """Leave out frames that repeat the one before (frame-rate conversion makes them)."""


class TrackConfig(Section):
    """From frames to landmarks, expression scores and flags."""

    smooth_seconds: float = Field(0.05, ge=0)
    """Width of the zero-phase smoother over time; 0 switches it off."""
    min_run_frames: int = Field(5, ge=1)
    """Shorter runs of detections are taken for false ones."""
    min_confidence: float = Field(0.5, ge=0, le=1)
    """The detector's threshold."""
    max_faces: int = Field(4, ge=1)
    """Faces looked for in a frame."""
    person: int | None = Field(None, ge=1)
    """Which of several people: their number from the left where the most are seen; by default the one seen longest."""
    like: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """Which of several people: sha256 of a photograph of the one that is meant; `--like PHOTO` sets it."""
    given: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """Another tracker's file beside the video: sha256 of a take's table or a dump; `--tracking FILE` sets it."""
    offset_seconds: float | None = Field(None, ge=-3600, le=3600)
    """When that file begins, from the video's first frame; by default as timecodes tell, else as motion shows."""

    def keyed(self) -> dict[str, Any]:
        """Plain data of all that the stage's files depend on; without such a file, what says nothing is left out."""
        data = super().keyed()
        return data if self.given else {name: data[name] for name in data if name not in ("given", "offset_seconds")}


class MatteConfig(Section):
    """From frames to foreground alpha."""

    source: Literal["auto", "network", "chroma"] = "auto"
    """Where alphas come from: auto keys an even green or blue screen where there is one, else asks the network."""
    model: str = Field("selfie_segmentation", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """The network: selfie_segmentation knows people and is fast; `headcast assets list` tells the others."""
    padding: float = Field(0.25, ge=0, le=1)
    """Replicated border to try before inference, as a share of the frame's sides; kept where it flickers less."""
    key_every: int | None = Field(None, ge=1, le=8)
    """The network sees every n-th frame, optical flow carries the alphas between; by default 1, and 3 for slow ones."""
    fuse: bool = True
    """Take each frame's alpha together with those of the frames around it."""
    plate: bool = True
    """Estimate the empty scene behind the person where the camera stands still."""
    alpha: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """Alphas of your own in place of the network's: sha256 over them; `--alpha FOLDER_OR_VIDEO` sets it."""


class FitConfig(Section):
    """From landmarks to a fitted head: camera, identity, poses and expressions of the whole clip."""

    head: Head = "anny"
    """The head model; all but anny need a file of yours, flame takes the most recent FLAME that is there."""
    focal_prior: float = Field(1.4, gt=0.3, lt=10)
    """Expected focal length in units of the frame's longer side; a talking head hardly shows it."""
    crop_margin: float = Field(0.35, ge=0, le=2)
    """Room around the tracked head in the training crop, as a share of the head's height."""


class DensityConfig(Section):
    """Where Gaussians are added and taken away while training (`pipeline.density`)."""

    every: int = Field(0, ge=0)
    """Steps from one change to the next; 0 leaves the Gaussians as they start."""
    first: int = Field(500, ge=0)
    """The first step that may change them."""
    last: int = Field(15_000, ge=0)
    """The last step that may."""
    gradient: float = Field(2e-4, gt=0)
    """Mean gradient of a Gaussian's place on the screen, in units of half the picture, from which it is doubled."""
    dense_share: float = Field(0.01, gt=0, lt=1)
    """Larger ones are split, smaller ones cloned: share of the avatar's extent."""
    min_opacity: float = Field(0.005, ge=0, lt=1)
    """Fainter ones are taken away."""
    max_size_share: float = Field(0.1, gt=0)
    """Larger ones are taken away once opacities were reset: share of the avatar's extent."""
    reset_every: int = Field(3000, ge=0)
    """Steps between two resets of the opacities; 0 never resets."""
    reset_opacity: float = Field(0.01, gt=0, lt=1)
    """What opacities are reset to at most."""
    max_gaussians: int = Field(100_000, ge=16)
    """No more are made than this."""


def _shared_evenly(what: str, count: int, parts: int, among: str) -> None:
    if count % parts:
        raise ValueError(f"{count} {what} cannot be shared evenly by {parts} {among}")


class GaussianHeadConfig(Section):
    """The avatar models gaussianhead and gaussianhead-plus; numbers are the paper's (arXiv 2312.01632)."""

    rig: bool = True
    """Gaussians ride on the fitted head and its joints; off, all hang on the head and expression alone moves them."""
    start: Literal["head", "random"] = "head"
    """Where Gaussians start: on the fitted head and in its hair, or at random around there as in the paper."""
    derivations: int = Field(4, ge=0, le=16)
    """Learned rotations of each Gaussian, and groups of channels; 0 reads all channels at the Gaussian itself."""
    field_layers: int = Field(8, ge=0, le=16)
    """Layers of the motion deformation field; 0 leaves it out."""
    field_width: int = Field(256, ge=1, le=1024)
    """Width of the field."""
    frequencies: int = Field(10, ge=0, le=16)
    """Octaves of positional encoding on the canonical means."""
    warmup_steps: int = Field(3000, ge=0)
    """Steps before the field is switched on."""
    plane_size: int = Field(64, ge=0, le=1024)
    """Side of the tri-plane's grids; 0 gives each Gaussian a learned vector of features instead."""
    plane_channels: int = Field(32, ge=1, le=256)
    """Channels of each plane, over all groups."""
    hash_levels: int = Field(4, ge=1, le=16)
    """Resolutions of gaussianhead-plus' hash grids, which share the channels of a group."""
    hash_coarsest: int = Field(16, ge=2, le=1024)
    """Side of the coarsest of them."""
    hash_finest: int = Field(128, ge=2, le=2048)
    """Side of the finest."""
    hash_entries: int = Field(4096, ge=16)
    """Entries that each of them keeps at most."""
    decoder_width: int = Field(64, ge=1, le=512)
    """Width of the decoders' hidden layers."""
    color_width: int = Field(48, ge=1, le=512)
    """Width of the layer before the spherical harmonics."""
    sh_degree: int = Field(3, ge=1, le=3)
    """Highest degree of the spherical harmonics."""
    sh_every: int = Field(1000, ge=1)
    """Steps from one degree to the next."""
    mean_rate: float = Field(8e-4, gt=0)
    """Learning rate of the means at the start, as a share of the avatar's extent (1.6e-4 times 5)."""
    mean_final_rate: float = Field(1.6e-6, gt=0)
    """The same at the end."""
    plane_rate: float = Field(1e-3, gt=0)
    """Learning rate of the planes."""
    scale_rate: float = Field(5e-3, gt=0)
    """Learning rate of the scales' logarithms."""
    rotation_rate: float = Field(1e-3, gt=0)
    """Learning rate of the canonical rotations."""
    derivation_rate: float = Field(1e-3, gt=0)
    """Learning rate of the derivation's rotations."""
    field_rate: float = Field(1e-3, gt=0)
    """Learning rate of the motion deformation field."""
    geometry_rate: float = Field(1e-4, gt=0)
    """Learning rate of the opacity network."""
    opacity_rate: float = Field(0.05, gt=0)
    """Learning rate of the opacity logit that each Gaussian adds to the network's answer."""
    sh_rate: float = Field(1e-3, gt=0)
    """Learning rate of the colour network."""
    sh_rest_divisor: float = Field(20.0, gt=0)
    """The harmonics above degree 0 learn so many times more slowly."""
    joint_rate: float = Field(0.02, gt=0)
    """Learning rate of the shares of head, torso and skull."""
    bend_rate: float = Field(2e-3, gt=0)
    """Learning rate of how the torso's modes bend it, in units of 5 mm."""
    color_rate: float = Field(0.0, ge=0)
    """Learning rate of a colour that each Gaussian adds to the network's answer; 0 keeps it as it starts."""
    final_share: float = Field(1.0, gt=0, le=1)
    """What is left of all other rates at the end."""

    @field_validator("plane_channels")
    @classmethod
    def _shared_by_groups(cls, channels: int, info: ValidationInfo) -> int:
        if groups := info.data.get("derivations"):
            _shared_evenly("channels", channels, groups, "derivations")
        return channels

    @field_validator("hash_levels")
    @classmethod
    def _share_a_group(cls, levels: int, info: ValidationInfo) -> int:
        if channels := info.data.get("plane_channels"):
            _shared_evenly("channels of a group", channels // max(info.data.get("derivations", 1), 1), levels, "levels")
        return levels


class TrainConfig(Section):
    """The Gaussian avatar."""

    beside = frozenset({"tensorboard"})
    avatar: Avatar = "rigged"
    """The avatar model; `--avatar` sets it with the numbers that the preset has for it."""
    resolution: int = Field(256, ge=32, le=2048)
    """Width and height of the training crop in pixels."""
    steps: int = Field(2000, ge=1)
    """Optimisation steps."""
    gaussians: int = Field(10_000, ge=16)
    """Number of Gaussians."""
    basis: int = Field(12, ge=0, le=64)
    """Learned basis vectors of `rigged` on top of what the head model knows."""
    hidden: int = Field(32, ge=1, le=512)
    """Width of the network that weights them."""
    coarse_share: float = Field(0.25, ge=0, lt=1)
    """Share of the steps, at the start, done at half the resolution."""
    random_background: float = Field(0.25, ge=0, le=1)
    """Share of the steps over a random colour instead of white, which teaches the alpha."""
    max_frames: int = Field(600, ge=1)
    """Training frames at most, spread evenly over the clip."""
    perceptual: float = Field(0.0, ge=0)
    """Weight of the perceptual loss; without the weights of VGG16 (asset vgg16) training says so and does without."""
    density: DensityConfig = DensityConfig()
    """Density control."""
    gaussianhead: GaussianHeadConfig = GaussianHeadConfig()
    """The numbers of the avatar models `gaussianhead` and `gaussianhead-plus`."""
    seed: int = 0
    """Seed of every random choice."""
    tensorboard: bool = True
    """Keep event files for TensorBoard beside the stages, in `tensorboard/`; what is trained does not depend on it."""


class EvaluateConfig(Section):
    """Held-out quality."""

    holdout: float = Field(0.1, gt=0, lt=0.9)
    """Share of the clip, at its end, that training never sees."""
    min_holdout_frames: int = Field(10, ge=1)
    """Held-out frames at least."""
    lpips: bool = True
    """Measure LPIPS where its weights are there; else it is null with the reason."""


class ExportConfig(Section):
    """Files for other tools."""

    ply: bool = True
    """Write the neutral avatar as a standard 3DGS PLY."""
    bake: bool = True
    """Bake the avatar to linear blendshapes, which any ARKit or MediaPipe face tracker can drive."""
    compact: Literal["half", "quantised"] = "half"
    """How the avatar's weights are kept: in half precision as training leaves them, or in 8 bits a value."""
    max_loss_db: float = Field(0.1, ge=0)
    """PSNR that the held-out frames may lose to 8 bits; weights that would cost more stay in half precision."""


class Config(Section):
    """All sections, and the preset they started from."""

    preset: Preset = "quick"
    """The preset the sections started from."""
    decode: DecodeConfig = DecodeConfig()
    track: TrackConfig = TrackConfig()
    matte: MatteConfig = MatteConfig()
    fit: FitConfig = FitConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()


_PRESET_CHANGES: dict[Preset, dict[str, Any]] = {
    "quick": {},
    "standard": {"train.resolution": 512, "train.steps": 4000, "train.gaussians": 20_000},
    "best": {
        **{"train.resolution": 512, "train.steps": 80_000, "train.gaussians": 50_000, "train.max_frames": 1800},
    },
}
# The paper's model scaled down to what two cores train in a minute and in five; `best` is the paper's.
_SMALL_GAUSSIANHEAD = {
    "train.gaussianhead.field_layers": 4,
    "train.gaussianhead.field_width": 128,
    "train.gaussianhead.warmup_steps": 100,
    "train.gaussianhead.sh_every": 300,
    "train.gaussianhead.rotation_rate": 4e-3,
    "train.gaussianhead.scale_rate": 1e-2,
    "train.gaussianhead.geometry_rate": 1e-3,
    "train.gaussianhead.field_rate": 3e-3,
    "train.gaussianhead.color_rate": 5e-3,
    "train.gaussianhead.mean_final_rate": 8e-5,
    "train.gaussianhead.final_share": 0.1,
}
_GAUSSIANHEAD_CHANGES: dict[Preset, dict[str, Any]] = {
    "quick": {**_SMALL_GAUSSIANHEAD, "train.steps": 1500},
    "standard": {**_SMALL_GAUSSIANHEAD, "train.gaussians": 10_000, "train.steps": 2500},
    "best": {"train.gaussians": 10_000, "train.density.every": 100, "train.perceptual": 0.01},
}
# What a preset changes further where the avatar is not `rigged`.
_AVATAR_CHANGES: dict[Avatar, dict[Preset, dict[str, Any]]] = {
    "rigged": {},
    "gaussianhead": _GAUSSIANHEAD_CHANGES,
    "gaussianhead-plus": {
        **_GAUSSIANHEAD_CHANGES,
        # As many as 4.5 MB hold.
        "best": {**_GAUSSIANHEAD_CHANGES["best"], "train.density.max_gaussians": 16_000},
    },
}


def preset_config(preset: str, avatar: Avatar = "rigged") -> Config:
    """The settings of a preset for an avatar model.

    Raises:
        UserError: there is no such preset.
    """
    if preset not in PRESETS:
        raise UserError(f"There is no preset '{preset}'.", f"choose one of: {', '.join(PRESETS)}")
    plain = Config(preset=preset).model_dump()
    changes = {**_PRESET_CHANGES[preset], **_AVATAR_CHANGES[avatar].get(preset, {}), "train.avatar": avatar}
    for name, value in changes.items():
        section, field = _place(plain, name)
        section[field] = value
    return Config.model_validate(plain)


def configure(preset: str, settings: list[str]) -> Config:
    """A preset with `section.field=value` settings; its numbers are those for the avatar they name.

    Raises:
        UserError: as `preset_config` and `override`.
    """
    named = override(preset_config(preset), settings).train.avatar
    return override(preset_config(preset, named), settings)


def override(config: Config, settings: list[str]) -> Config:
    """Apply `section.field=value` settings (or `section.part.field=value`); values are read by the field's type.

    Raises:
        UserError: a setting is malformed, names nothing that exists, or its value does not fit.
    """
    plain = config.model_dump()
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or "." not in name:
            raise UserError(
                f"'--set {setting}' is not of the form section.field=value.", "for example --set train.steps=500"
            )
        try:
            section, field = _place(plain, name.strip())
        except KeyError as error:
            what, known = error.args
            raise UserError(f"'--set {setting}': {what}.", f"choose one of: {', '.join(known)}") from None
        section[field] = _read_value(text.strip())
    try:
        return Config.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"Setting {where}={first['input']!r} does not fit: {first['msg']}.", "see docs/settings.md"
        ) from None


def _place(plain: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Where in a configuration's plain data `section.field` stands: the dictionary and the key.

    Raises:
        KeyError: nowhere; its arguments are what is wrong and what there is.
    """
    *sections, field = name.split(".")
    here, path = plain, ""
    for section in sections:
        known = [key for key, value in here.items() if isinstance(value, dict)]
        if section not in known:
            where = f"section '{path}' has" if path else "there is"
            raise KeyError(f"{where} no section '{section}'", known)
        here, path = here[section], f"{path}.{section}".lstrip(".")
    known = [key for key, value in here.items() if not isinstance(value, dict)]
    if field not in known:
        raise KeyError(f"section '{path}' has no field '{field}'", known)
    return here, field


def _read_value(text: str) -> Any:
    """JSON where it is JSON (numbers, true, null), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"none": None, "True": True, "False": False, "None": None}.get(text, text)


def differences(config: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ from the preset's: `section.field -> (preset's, this)`."""
    base = dict(flat(preset_config(config.preset, config.train.avatar).model_dump()))
    return {name: (base[name], value) for name, value in flat(config.model_dump()) if base[name] != value}


def flat(plain: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """`section.field` and value of all fields."""
    for key, value in plain.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield path + key, value


def describe(section: type[Section] = Config, path: str = "") -> list[tuple[str, str, str]]:
    """Every setting as (name, type, help), for the documentation."""
    rows = []
    for field, details in section.model_fields.items():
        kind = details.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            rows += describe(kind, f"{path}{field}.")
        elif path:
            name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            rows.append((path + field, name, details.description or ""))
    return rows
