"""What limited an avatar's quality, in words and ranked, from the figures that the stages measured.

Nothing is told that was not measured. Where a figure says how many decibels are at stake, it ranks by them; the others
rank by the plain weights here. Light that changes and hair that blows are not measured as such: they show as error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.advice import HOW, MAX_BLURRED, MAX_FLICKER_PX, MIN_USABLE_FRAMES

if TYPE_CHECKING:
    from pipeline.coverage import Coverage

MAX_TOLD = 5
MIN_GAP_DB = 3.0
"""Between training and held-out frames; smaller ones are usual."""
MIN_TRAIN_PSNR = 34.0
"""On training frames; below it the avatar does not even show what it was trained on."""
MIN_PART_SHARE, MIN_PART_DENSITY = 0.1, 3.0
"""A part of the picture is told of from this share of the squared error on, where that is so many times its area ..."""
LARGE_PART_SHARE = 0.4
"""... or from this share on, whatever its area."""
MIN_DOUBT_DB = 1.0
"""What weighing pixels by the matte's confidence adds to PSNR."""
MAX_UNUSABLE, MIN_FOLLOWED = 0.2, 0.8
"""Share of training frames that cannot be used; share of frames in which skull and torso were followed."""
MAX_RESIDUAL = 0.004
"""Median distance of fitted and detected landmarks, as a share of the face's width."""
TREND = -0.6
"""Correlation of held-out PSNR with distance from training from which on one is said to follow the other."""
TREND_FRAMES = 8
PLAIN_WEIGHT_DB = 1.5
"""Rank of what has no figure in decibels."""

PARTS = {
    "outline": ("the half-transparent outline", "background"),
    "mouth": ("the mouth", "mouth"),
    "eyes": ("the eyes", "eyes"),
    "face": ("the skin of the face", "light"),
    "hair": ("hair, ears and neck", "hair"),
    "torso": ("the torso", "torso"),
}
"""Part of `error_parts` -> what it is called, and what to do (of `REMEDIES` or `advice.HOW`)."""
REMEDIES = {
    "hair": "keep hair tied or still, and turn the head so that its sides are seen",
    "torso": "keep the shoulders in view and still, or film nearer so that less of them shows",
    "steps": "train longer: --preset standard, or --set train.steps=... train.gaussians=...",
    "matte": "look at the matte's pictures; give alphas of your own with --alpha, or film before a plain background",
    "fit": "look at the fit's overlay; film the face larger, sharper and more from the front",
    "usable": "look at the track's overlay: keep hands off the face and the whole head in the picture",
    "followed": "keep hair and shoulders in view, and let clothes have some pattern",
}


@dataclass(frozen=True)
class Limit:
    """One thing that limited quality."""

    title: str
    text: str
    remedy: str
    weight_db: float
    """What it ranks by."""


def limits(
    metrics: Mapping[str, Any], manifests: Mapping[str, Mapping[str, Any]], coverage: Coverage | None = None
) -> list[Limit]:
    """What limited quality, what weighs most first; at most `MAX_TOLD`.

    Args:
        metrics: contents of `metrics.json`; figures that are missing or null tell nothing.
        manifests: the finished stages' manifests by name.
        coverage: of the clip, where it is known.
    """
    figures = {name: manifest.get("metrics") or {} for name, manifest in manifests.items()}
    found = [
        *_gap(metrics, coverage),
        *_training(metrics),
        *_parts(metrics),
        *_doubtful(metrics),
        *_frames(metrics),
        *_track(figures.get("track", {})),
        *_fit(figures.get("fit", {})),
        *_matte(figures.get("matte", {})),
    ]
    return sorted(found, key=lambda limit: -limit.weight_db)[:MAX_TOLD]


def _gap(metrics: Mapping[str, Any], coverage: Coverage | None) -> Iterator[Limit]:
    train, test = _number(metrics, "train", "psnr"), _number(metrics, "test", "psnr")
    if train is None or test is None or train - test < MIN_GAP_DB:
        return
    text = f"Training frames come out at {train:.1f} dB, held-out ones at {test:.1f}: what was not seen is the limit."
    if coverage is not None:
        beyond = len(coverage.beyond())
        if beyond:
            text += (
                f" {beyond} of {len(coverage.test)} held-out frames have an expression, pose or gaze beyond all that "
                "training showed."
            )
        if _follows_distance(metrics, coverage):
            text += " The further a frame is from all training frames, the worse it comes out."
    yield Limit("What training did not see", text, f"{HOW['length']}; {HOW['yaw'].partition(':')[0]}", train - test)


def _follows_distance(metrics: Mapping[str, Any], coverage: Coverage) -> bool:
    """Whether held-out PSNR falls with the distance from training."""
    import numpy as np

    rows = metrics.get("per_frame") or {}
    scores = dict(zip(rows.get("frame") or [], rows.get("psnr") or [], strict=False))
    pairs = [
        (distance, scores[frame])
        for frame, distance in zip(coverage.test.tolist(), coverage.novelty()[0], strict=True)
        if isinstance(scores.get(frame), int | float)
    ]
    if len(pairs) < TREND_FRAMES:
        return False
    distances, values = np.array(pairs).T
    return bool(distances.std() > 0 and values.std() > 0 and np.corrcoef(distances, values)[0, 1] < TREND)


def _training(metrics: Mapping[str, Any]) -> Iterator[Limit]:
    train = _number(metrics, "train", "psnr")
    if train is not None and train < MIN_TRAIN_PSNR:
        text = f"Even frames it was trained on come out at {train:.1f} dB: the avatar does not hold all that they show."
        yield Limit("Training itself", text, REMEDIES["steps"], MIN_TRAIN_PSNR - train)


def _parts(metrics: Mapping[str, Any]) -> Iterator[Limit]:
    for part, (name, remedy) in PARTS.items():
        share, area = (_number(metrics, "error_parts", part, of) for of in ("error", "area"))
        if part == "outline" and share is None:
            share, area = _number(metrics, "error_share_partial_alpha"), None
        if share is None or share < MIN_PART_SHARE:
            continue
        dense = area is not None and area > 0 and share / area >= MIN_PART_DENSITY
        if not dense and share < LARGE_PART_SHARE:
            continue
        gain = -10 * math.log10(max(1 - share, 1e-3))
        text = f"{share:.0%} of the squared error on held-out frames lies in {name}"
        text += f", {area:.0%} of the picture" if area is not None else ""
        text += f". Without it their error would be {gain:.1f} dB lower."
        yield Limit(f"{name[0].upper()}{name[1:]}", text, REMEDIES.get(remedy) or HOW[remedy], gain)


def _doubtful(metrics: Mapping[str, Any]) -> Iterator[Limit]:
    psnr, sure = _number(metrics, "test", "psnr"), _number(metrics, "test", "psnr_sure")
    if psnr is not None and sure is not None and sure - psnr >= MIN_DOUBT_DB:
        text = f"Weighed by how sure the matte is, held-out frames reach {sure:.1f} dB instead of {psnr:.1f}."
        yield Limit("Pixels whose matte is doubtful", text, REMEDIES["matte"], sure - psnr)


def _frames(metrics: Mapping[str, Any]) -> Iterator[Limit]:
    every, usable = _number(metrics, "counts", "train"), _number(metrics, "counts", "train_usable")
    if every and usable is not None and 1 - usable / every > MAX_UNUSABLE:
        text = f"{every - usable:.0f} of {every:.0f} training frames cannot be used."
        yield Limit("Frames that cannot be used", text, REMEDIES["usable"], PLAIN_WEIGHT_DB)
    if usable is not None and usable < MIN_USABLE_FRAMES:
        text = f"There are {usable:.0f} usable training frames; from {MIN_USABLE_FRAMES} on there is some variety."
        yield Limit("Few frames", text, HOW["length"], PLAIN_WEIGHT_DB)


def _track(track: Mapping[str, Any]) -> Iterator[Limit]:
    frames, blurred = _number(track, "frames"), _number(track, "blurred")
    if frames and blurred is not None and blurred / frames > MAX_BLURRED:
        text = f"{blurred / frames:.0%} of the frames are blurred by motion."
        yield Limit("Blur", text, HOW["sharp"], PLAIN_WEIGHT_DB)


def _fit(fit: Mapping[str, Any]) -> Iterator[Limit]:
    median, width = _number(fit, "reprojection_px", "median"), _number(fit, "face_width_px")
    if median is not None and width and median / width > MAX_RESIDUAL:
        text = f"Fitted and detected landmarks lie {median:.1f} px apart on a face {width:.0f} px wide (median)."
        yield Limit("The fit", text, REMEDIES["fit"], PLAIN_WEIGHT_DB)
    for name, what in (("torso_followed", "The torso"), ("skull_followed", "Hair and skull")):
        share = _number(fit, name)
        if share is not None and share < MIN_FOLLOWED:
            text = f"{what} could be followed in {share:.0%} of the frames; elsewhere their motion is a guess."
            yield Limit(f"{what}'s motion", text, REMEDIES["followed"], PLAIN_WEIGHT_DB)


def _matte(matte: Mapping[str, Any]) -> Iterator[Limit]:
    flicker = _number(matte, "flicker_px")
    if flicker is not None and flicker > MAX_FLICKER_PX:
        text = f"The matte's outline flickers by {flicker:.1f} px."
        yield Limit("An outline that flickers", text, HOW["background"], PLAIN_WEIGHT_DB)


def _number(record: Any, *names: str) -> float | None:
    """A figure by its path in a record; None where it is missing, null or no finite number."""
    for name in names:
        record = record.get(name) if isinstance(record, Mapping) else None
    plain = isinstance(record, int | float) and not isinstance(record, bool) and math.isfinite(record)
    return float(record) if plain and record is not None else None
