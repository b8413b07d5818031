"""Fit: the head model to the tracked landmarks of the whole clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import StageError
from pipeline.head_data import head_data
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.fitted import Fitted
    from pipeline.fitting import FitState
    from pipeline.heads import HeadModel

CHECKPOINT = "state.npz"
MIN_FRAMES = 3
GOOD_FRAMES = 30
# Median and 95th percentile of the landmark error, as shares of the face's width, up to which a fit is good or fair.
GOOD_ERROR, FAIR_ERROR = (0.003, 0.012), (0.008, 0.03)
# What the tracker flags, and the words for it.
FLAGS = {"occluded": "occluded", "off_frame": "off-frame", "blurred": "blurred"}
# A face that is never turned less than this from the camera hides its other half.
PROFILE_DEGREES = 35.0


@dataclass(frozen=True)
class _Track:
    """What fit reads of `track.npz`."""

    landmarks: NDArray[np.float64]
    scores: NDArray[np.float64]
    detected: NDArray[np.bool_]
    usable: NDArray[np.bool_]
    flags: dict[str, NDArray[np.bool_]]
    """Why a frame is trusted less, by the words for it."""
    covered: NDArray[np.bool_]
    """[T, L] landmarks that something lies over."""

    @property
    def clear(self) -> NDArray[np.bool_]:
        """[T] usable frames that are sharp; all usable ones where hardly any is sharp."""
        sharp = self.usable & ~self.flags["blurred"]
        return sharp if sharp.sum() >= MIN_FRAMES else self.usable


def fit(run: StageRun) -> Result:
    """Fit camera, identity, poses and expressions; write `fit.npz`, `cameras.json`, the neutral head and pictures.

    Raises:
        StageError: fewer than three frames can be used.
    """
    import time

    import numpy as np

    from pipeline.fitted import Fitted, draw, first_frames, training_crops, with_torso_and_skull, write_fit
    from pipeline.fitting import (
        STEPS,
        FitState,
        Observations,
        fit_head,
        reduce_to_landmarks,
        reprojection_errors,
        torso_motion,
    )
    from pipeline.frames import FrameSet
    from pipeline.geometry import make_rigid
    from pipeline.heads import load_head
    from pipeline.interchange.recording import has_recording
    from pipeline.personal import personalise
    from pipeline.skull import Skull
    from pipeline.torso import Torso

    if has_recording(run):
        from pipeline.interchange import fill_fit

        return fill_fit.fill(run)
    settings = run.config.fit
    frames = FrameSet.load(run.subject.stage("decode"))
    head = load_head(settings.head, run.reporter.message)
    track = _read_track(run, head, len(frames))
    if track.usable.sum() < MIN_FRAMES:
        why = _reasons(track)
        raise StageError(
            f"Only {track.usable.sum()} of the {len(frames)} frames of '{run.subject.name}' show the face well enough; "
            f"fitting needs {MIN_FRAMES}.{f' Not usable: {why}.' if why else ''}",
            "film the face from the front, lit evenly, unhidden and inside the picture for some seconds",
        )
    observations = Observations.of(
        frames.times,
        track.landmarks,
        track.scores,
        head.expression_names,
        track.detected,
        track.clear,
        frames.contents[first_frames(frames)],
        settings.focal_prior,
        frames.shots,
        np.unique(frames.clips, return_inverse=True)[1],
        track.covered,
    )
    landmark_head = reduce_to_landmarks(head)
    checkpoint = run.scratch / CHECKPOINT
    state = FitState.load(checkpoint) if checkpoint.exists() else None
    seconds = {}
    started = time.monotonic()
    with run.reporter.task("fit", STEPS, "steps", done=state.step if state else 0) as task:

        def keep(state: FitState) -> None:
            state.save(checkpoint)
            errors = reprojection_errors(landmark_head, observations, state)[track.usable]
            task.advance(note=f"landmark error {np.median(errors):.2f} px")
            run.check_stop()

        state = fit_head(landmark_head, observations, state=state, on_iteration=keep)
    seconds["solve"] = round(time.monotonic() - started, 2)

    errors = reprojection_errors(landmark_head, observations, state)
    started = time.monotonic()
    own_head = personalise(head, state.offsets[0], state.offsets[1:])
    rotations = torso_motion(frames.times, state.rotations, observations.weights, frames.shots)[0]
    guess = Torso.unseen(make_rigid(rotations, state.translations))
    unmoved = Skull(state.Ts_cam_head, np.zeros(len(frames)))
    fitted = Fitted(
        own_head,
        frames,
        state.intrinsics(observations),
        state.Ts_cam_head,
        state.identity,
        state.expression,
        state.eyes,
        track.landmarks[..., :2],
        track.detected,
        track.usable,
        errors,
        guess,
        unmoved,
        state.offsets,
    )
    crops = training_crops(fitted, settings.crop_margin)
    fitted = with_torso_and_skull(run, fitted, crops)
    seconds["torso"] = round(time.monotonic() - started, 2)
    started = time.monotonic()
    write_fit(run, fitted, crops)
    seconds["files"] = round(time.monotonic() - started, 2)
    started = time.monotonic()
    draw(run, fitted)
    seconds["pictures"] = round(time.monotonic() - started, 2)
    return _result(fitted, track, state, crops, seconds)


def _read_track(run: StageRun, head: HeadModel, count: int) -> _Track:
    """The tracker's arrays with scores in the head's order; rows that are not finite count as not detected.

    Raises:
        StageError: the file is damaged or does not belong to the frames.
    """
    import zipfile

    import numpy as np

    path = run.input("track", "track.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["blendshape_names"]]
            landmarks, scores = file["landmarks_raw"].astype(np.float64), file["blendshapes"].astype(np.float64)
            detected, usable = file["detected"].astype(bool), file["usable"].astype(bool)
            flags = {name: file[name].astype(bool) for name in FLAGS if name in file}
            covered = file["covered"].astype(bool)
        fits = landmarks.shape == (count, len(head.landmark_faces), 3) and scores.shape == (count, len(names))
        fits = fits and covered.shape == landmarks.shape[:2]
        if not fits or any(flag.shape != (count,) for flag in (detected, usable, *flags.values())):
            raise ValueError("its arrays do not have the shapes of this clip")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        fix = f"run: headcast rerun {run.subject.name} --from track"
        raise StageError(f"'{path}' cannot be used: {error}.", fix) from error
    detected &= np.isfinite(landmarks).all((1, 2)) & np.isfinite(scores).all(1)
    ordered = [scores[:, names.index(n)] if n in names else np.zeros(count) for n in head.expression_names]
    usable &= detected
    reasons = {words: flags.get(name, np.zeros(count, bool)) & detected for name, words in FLAGS.items()}
    known = np.any(list(reasons.values()), axis=0)
    reasons = {"no face": ~detected, **reasons, "not trusted": detected & ~usable & ~known}
    return _Track(landmarks, np.stack(ordered, 1), detected, usable, reasons, covered)


def _reasons(track: _Track) -> str:
    """The frames that count less, each listed under what is wrong with it."""
    from pipeline.frames import ranges_text

    return "; ".join(f"{words}: {ranges_text(flag)}" for words, flag in track.flags.items() if flag.any())


def _result(
    fitted: Fitted, track: _Track, state: FitState, crops: list[tuple[int, int, int]], seconds: dict[str, float]
) -> Result:
    """The stage's figures and its judgement of them."""
    import numpy as np

    from pipeline.fitted import first_frames
    from pipeline.fitting import head_angles
    from pipeline.frames import ranges_text

    frames = fitted.frames
    usable, total = int(track.usable.sum()), len(frames)
    errors, x = fitted.errors[track.usable[:, None] & ~track.covered], track.landmarks[track.usable, :, 0]
    median, p95 = (round(float(np.percentile(errors, q)), 3) for q in (50, 95))
    width = float(np.median(x.max(1) - x.min(1)))

    def within(limits: tuple[float, float]) -> bool:
        return median <= limits[0] * width and p95 <= limits[1] * width

    level: Level = "good" if within(GOOD_ERROR) else "fair" if within(FAIR_ERROR) else "poor"
    parts = [
        f"Median landmark error {median:.2f} px (95 %: {p95:.1f}) on a face {width:.0f} px wide",
        f"{usable} of {total} frames",
    ]
    shots = len(np.unique(frames.shots))
    if shots > 1:
        clips = len(crops)
        parts[-1] += f" of {shots} shots" + (f" of {clips} clips" if clips > 1 else "")
    if (partly := track.usable & track.covered.any(1)).any():
        parts.append(f"landmarks that something covers count little: {ranges_text(partly)}")
    if reasons := _reasons(track):
        parts.append(f"down-weighted and carried through by their neighbours: {reasons}")
    least_yaw = float(np.degrees(np.abs(head_angles(state.rotations[track.usable])[:, 0]).min()))
    if least_yaw > PROFILE_DEGREES:
        level = "poor"
        parts.append(
            f"the head is turned away by {least_yaw:.0f} degrees or more in every frame and half of the face is "
            "guessed: film it from the front too"
        )
    followed = fitted.torso.confidence > 0
    if not followed.any():
        parts.append("no torso in sight: how it moves is a guess from the head")
    elif not followed.all():
        parts.append(f"torso followed in {100 * followed.mean():.0f} % of the frames, elsewhere filled in")
    identity = _plausibility(fitted)
    parts.append(
        f"neutral head plausible: {100 * identity['inside']:.0f} % of its coefficients inside their box, "
        f"rms {identity['rms_half_ranges']:.2f} of half its width"
    )
    if usable < GOOD_FRAMES:
        level = "fair" if level == "good" else level
        parts.append(f"under {GOOD_FRAMES} frames the head's shape is hardly determined")
    metrics = {
        "reprojection_px": {"median": median, "p95": p95},
        "face_width_px": round(width, 1),
        "focal_ratio": [round(float(r), 3) for r in state.focals_px / frames.contents[first_frames(frames)].max(1)],
        "frames": {"total": total, "usable": usable, "detected": int(track.detected.sum())},
        "identity": identity,
        "least_yaw_degrees": round(least_yaw, 1),
        "offset_mm": round(1e3 * float(np.median(np.linalg.norm(state.offsets[0], axis=1))), 2),
        "crops": [list(crop) for crop in crops],
        "skull_followed": round(float((fitted.skull.confidence > 0).mean()), 3),
        "torso_followed": round(float(followed.mean()), 3),
        "part_seconds": seconds,
    }
    return Result(Verdict(level, f"Fit: {level}. {'; '.join(parts)}.", "overlay.jpg"), metrics)


def _plausibility(fitted: Fitted) -> dict[str, float]:
    """Where the identity lies in the model's box: share of coefficients strictly inside, and how far out they are.

    The rms over coefficients in half ranges is a Mahalanobis distance, per root coefficient, of a model that takes half
    a range for a standard deviation: about 1 for a head as unusual as the box allows, 0 for the average head.
    """
    import numpy as np

    head, identity = fitted.head, fitted.identity
    low, high = head.identity_low.astype(np.float64), head.identity_high.astype(np.float64)
    inside = (identity > low + 1e-6) & (identity < high - 1e-6)
    reach = np.abs(identity) / ((high - low) / 2)
    return {
        "inside": round(float(inside.mean()), 3),
        "rms_half_ranges": round(float(np.sqrt(np.mean(reach**2))), 3),
        "largest_half_ranges": round(float(reach.max()), 3),
    }


STAGE = Stage(
    "fit",
    10,
    ("decode", "track", "matte"),
    fit,
    durable=(f"scratch/{CHECKPOINT}",),
    description="camera, head shape, poses and expressions",
    data=lambda config: {"head": head_data(config.fit.head)},
)
