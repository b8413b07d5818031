"""Fit: the head model to the tracked landmarks of the whole clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.errors import StageError
from pipeline.head_data import head_data
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.fitting import FitState, Observations
    from pipeline.frames import FrameSet
    from pipeline.heads import HeadModel
    from pipeline.skull import Skull
    from pipeline.torso import Torso

SCHEMA = 2
CHECKPOINT = "state.npz"
MIN_FRAMES = 3
GOOD_FRAMES = 30
# Median and 95th percentile of the landmark error, as shares of the face's width, up to which a fit is good or fair.
GOOD_ERROR, FAIR_ERROR = (0.003, 0.012), (0.008, 0.03)
VIDEO_FRAMES, VIDEO_SIDE_PX, SHEET_SIDE_PX = 600, 320, 400
# What the tracker flags, and the words for it.
FLAGS = {"occluded": "occluded", "off_frame": "off-frame", "blurred": "blurred"}
# A face that is never turned less than this from the camera hides its other half.
PROFILE_DEGREES = 35.0
CURVES = ("jawOpen", "mouthSmileLeft", "eyeBlinkLeft", "eyeBlinkRight")
CHUNK = 64


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
    from pipeline.personal import personalise
    from pipeline.skull import Skull
    from pipeline.torso import Torso

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
        frames.contents[_first_frames(frames)],
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
    fitted = _Fitted(head, own_head, frames, track, observations, state, errors, guess, unmoved)
    crops = _training_crops(run, fitted)
    fitted = _with_torso_and_skull(run, fitted, crops)
    seconds["torso"] = round(time.monotonic() - started, 2)
    started = time.monotonic()
    _write_files(run, fitted, crops)
    seconds["files"] = round(time.monotonic() - started, 2)
    started = time.monotonic()
    _draw(run, fitted)
    seconds["pictures"] = round(time.monotonic() - started, 2)
    return _result(fitted, crops, seconds)


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


@dataclass(frozen=True)
class _Fitted:
    """The finished fit and what it rests on."""

    head: HeadModel
    own_head: HeadModel
    """The head model with what was found at the landmarks built in."""
    frames: FrameSet
    track: _Track
    observations: Observations
    state: FitState
    errors: NDArray[np.float64]
    """[T, L] pixels; NaN where no face was detected."""
    torso: Torso
    skull: Skull
    """As the frames show it; before it was looked for, a guess from the head's motion."""

    @cached_property
    def Ks(self) -> NDArray[np.float64]:
        """[T, 3, 3]."""
        return self.state.intrinsics(self.observations)

    @cached_property
    def neck(self) -> NDArray[np.float64]:
        """[T, 3] rotation vectors of the head relative to the torso."""
        import numpy as np

        from pipeline.geometry import matrix_to_rotvec

        return matrix_to_rotvec(np.swapaxes(self.torso.poses[:, :3, :3], 1, 2) @ self.state.rotations)

    @cached_property
    def head_faces(self) -> NDArray[np.int32]:
        """[F, 3] faces without the torso's."""
        on_head = self.head.regions["head"]
        return self.head.faces[on_head[self.head.faces].all(1)]

    @cached_property
    def neutral(self) -> NDArray[np.float32]:
        """[V, 3] the person's neutral head."""
        import numpy as np

        identity = self.state.identity.astype(np.float32)
        return self.own_head.template + np.tensordot(identity, self.head.identity_basis, 1)

    def vertices_cam(self, indices: Sequence[int]) -> Iterator[NDArray[np.float64]]:
        """Fitted vertices [V, 3] in camera space of each of these frames."""
        import numpy as np
        import torch

        from pipeline.geometry import transform_points

        state, neck = self.state, self.neck
        identity = torch.from_numpy(state.identity.astype(np.float32))
        for start in range(0, len(indices), CHUNK):
            rows = list(indices[start : start + CHUNK])
            parts = (state.expression[rows], neck[rows], state.eyes[rows])
            with torch.no_grad():
                posed = self.own_head.vertices(identity, *(torch.from_numpy(p.astype(np.float32)) for p in parts))
            yield from transform_points(state.Ts_cam_head[rows], posed.numpy().astype(np.float64))


def _training_crops(run: StageRun, fitted: _Fitted) -> list[tuple[int, int, int]]:
    """The square around the head over each clip."""
    import numpy as np

    from pipeline.fitting import training_crop
    from pipeline.geometry import project_points

    on_head, seen = fitted.head.regions["head"], fitted.observations
    crops = []
    for clip, (width, height) in enumerate(seen.sizes.astype(int).tolist()):
        here = seen.clips == clip
        # A clip without a frame to trust still needs a square.
        rows = np.flatnonzero(here & fitted.track.usable if (here & fitted.track.usable).any() else here)
        boxes = []
        for K, vertices in zip(fitted.Ks[rows], fitted.vertices_cam(rows.tolist()), strict=True):
            pixels = project_points(vertices[on_head], K)
            boxes.append([*pixels.min(0), *pixels.max(0)])
        crops.append(training_crop(np.array(boxes), width, height, run.config.fit.crop_margin))
    return crops


def _with_torso_and_skull(run: StageRun, fitted: _Fitted, crops: list[tuple[int, int, int]]) -> _Fitted:
    """The fit with torso and skull where the frames show them; the guess stays where one is out of sight."""
    from dataclasses import replace

    import numpy as np

    from pipeline.skull import follow_skull
    from pipeline.torso import Views, follow_torso, typical_frame

    frames, seen, on_head = fitted.frames, fitted.observations, fitted.head.regions["head"]

    def picture(index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        width, height = frames.contents[index]
        matte = run.subject.stage("matte")
        return frames.foreground(index, matte)[:height, :width], frames.alpha(index, matte)[:height, :width]

    with run.reporter.task("torso and skull", 4 * len(frames), "looks") as task:

        def on_frame() -> None:
            task.advance()
            run.check_stop()

        def heads() -> Iterator[NDArray[np.float64]]:
            for vertices in fitted.vertices_cam(range(len(frames))):
                on_frame()
                yield vertices[on_head]

        views = Views.load(picture, heads(), fitted.Ks, np.array(crops)[seen.clips], run.threads)
        torso = follow_torso(
            views, fitted.state.Ts_cam_head, fitted.torso.poses, fitted.track.usable, frames.shots, on_frame
        )
        reference = typical_frame(fitted.state.Ts_cam_head, fitted.track.usable)
        x0, y0, side = crops[seen.clips[reference]]
        skull = follow_skull(
            views,
            fitted.state.Ts_cam_head,
            reference,
            next(fitted.vertices_cam([reference])),
            fitted.head_faces,
            (fitted.track.landmarks[reference, :, :2] - (x0, y0)) * (views.pictures.shape[1] / side),
            frames.shots,
            run.threads,
            on_frame,
        )
    return replace(fitted, torso=torso, skull=skull)


def _write_files(run: StageRun, fitted: _Fitted, crops: list[tuple[int, int, int]]) -> None:
    """Write `fit.npz`, `cameras.json` and `neutral.obj`."""
    import numpy as np

    from pipeline.dataset import write_json
    from pipeline.obj import write_obj

    state, frames, usable, head = fitted.state, fitted.frames, fitted.track.usable, fitted.head
    offsets = state.offsets.astype(np.float32)
    np.savez(
        run.work / "fit.npz",
        Ks=fitted.Ks,
        image_size=np.array([frames.width, frames.height]),
        Ts_cam_head=state.Ts_cam_head,
        Ts_cam_skull=fitted.skull.poses,
        skull_confidence=fitted.skull.confidence.astype(np.float32),
        Ts_cam_torso=fitted.torso.poses,
        torso_shape=fitted.torso.shape.astype(np.float32),
        torso_confidence=fitted.torso.confidence.astype(np.float32),
        neck=fitted.neck.astype(np.float32),
        eyes=state.eyes.astype(np.float32),
        identity=state.identity.astype(np.float32),
        expression=state.expression.astype(np.float32),
        expression_names=np.array(head.expression_names),
        landmark_offsets=offsets[0],
        expression_offsets=offsets[1:],
        usable=usable,
        residual_px=np.median(fitted.errors, 1).astype(np.float32),
        head=np.array(head.name),
        crops=np.array(crops, np.float64)[fitted.observations.clips],
        shots=frames.shots,
        clips=frames.clips,
    )
    cameras = {
        "schema": SCHEMA,
        "width": frames.width,
        "height": frames.height,
        "clips": [
            {"name": name, "K": fitted.Ks[first].tolist(), "crop": list(crop)}
            for name, first, crop in zip(_clip_names(frames), _first_frames(frames), crops, strict=True)
        ],
        "frames": [
            {
                "index": i,
                "time": float(frames.times[i]),
                "clip": int(fitted.observations.clips[i]),
                "shot": int(frames.shots[i]),
                "usable": bool(usable[i]),
                "T_cam_head": T_cam_head.tolist(),
            }
            for i, T_cam_head in enumerate(state.Ts_cam_head)
        ],
    }
    write_json(run.work / "cameras.json", cameras)
    write_obj(run.work / "neutral.obj", fitted.neutral, head.faces)


def _first_frames(frames: FrameSet) -> NDArray[np.int64]:
    """The first frame of each clip that has any."""
    import numpy as np

    return np.unique(frames.clips, return_index=True)[1]


def _clip_names(frames: FrameSet) -> list[str]:
    names = frames.clip_names
    return [names[clip] if clip < len(names) else "" for clip in frames.clips[_first_frames(frames)]]


def _draw(run: StageRun, fitted: _Fitted) -> None:
    """Write the pictures a person judges the fit by."""
    from concurrent.futures import ThreadPoolExecutor

    import cv2
    import numpy as np

    from pipeline.fitting import head_angles
    from pipeline.frames import contact_sheet, evenly, save_image
    from pipeline.overlay import draw_torso, front_and_side, overlay, plot_curves
    from pipeline.torso import head_cover, torso_mask
    from pipeline.video import write_video

    state, frames, errors, torso = fitted.state, fitted.frames, fitted.errors, fitted.torso
    on_head, matte = fitted.head.regions["head"], run.subject.stage("matte")
    save_image(run.work / "neutral.jpg", front_and_side(fitted.neutral, fitted.head_faces), 90)

    def overlays(indices: Sequence[int], side: int) -> Iterator[NDArray[np.uint8]]:
        shrink = min(1.0, side / max(frames.width, frames.height))
        size = (round(frames.width * shrink), round(frames.height * shrink))
        scale = np.array(size) / (frames.width, frames.height)

        def draw(index: int, vertices: NDArray[np.float64]) -> NDArray[np.uint8]:
            K = np.diag([*scale, 1]) @ fitted.Ks[index]
            image = cv2.resize(frames.image(index), size, interpolation=cv2.INTER_AREA)
            alpha = cv2.resize(frames.alpha(index, matte), size, interpolation=cv2.INTER_AREA) / 255
            where = torso_mask(alpha, head_cover(vertices[on_head], K, *size), torso.poses[index], K)
            image = draw_torso(np.asarray(image, np.uint8), torso.poses[index], K, where, torso.confidence[index])
            seen = fitted.track.landmarks[index, :, :2] * scale
            return overlay(image, vertices, fitted.head_faces, K, seen)

        with ThreadPoolExecutor(max(1, run.threads)) as pool:
            for start in range(0, len(indices), CHUNK):
                run.check_stop()
                rows = indices[start : start + CHUNK]
                yield from pool.map(draw, rows, fitted.vertices_cam(rows))

    several = frames.shots[-1] > frames.shots[0]

    def label(index: int) -> str:
        shot = f"shot {frames.shots[index]}  " if several else ""
        error = f"{np.median(errors[index]):.2f} px" if fitted.track.detected[index] else "no face"
        return f"{shot}{index}  {error}{'' if fitted.track.usable[index] else '  not usable'}"

    T = len(frames)
    shown = evenly(T, 8)
    pictures = list(overlays(shown, SHEET_SIDE_PX))
    sheet = contact_sheet(pictures, [label(i) for i in shown], width=pictures[0].shape[1])
    save_image(run.work / "overlay.jpg", sheet, 90)

    in_video = evenly(T, VIDEO_FRAMES)
    seconds = float(frames.times[-1] - frames.times[0]) + 1 / float(frames.fps)
    with run.reporter.task("draw", len(in_video), "frames") as task:

        def counted() -> Iterator[NDArray[np.uint8]]:
            for index, picture in zip(in_video, overlays(in_video, VIDEO_SIDE_PX), strict=True):
                yield contact_sheet([picture], [label(index)], columns=1, width=picture.shape[1])
                task.advance()

        write_video(run.work / "overlay.mp4", counted(), round(len(in_video) / seconds, 2), crf=26)

    curves = {name: state.expression[:, fitted.head.expression_names.index(name)] for name in CURVES}
    shifts = torso.poses[:, :3, 3] - np.median(torso.poses[:, :3, 3], 0)
    angles, gaze = np.degrees(head_angles(state.rotations)).T, np.degrees(state.gaze)
    panels = [
        ("expression", curves),
        ("head, degrees", dict(zip(("yaw", "pitch", "roll"), angles, strict=True))),
        ("gaze, degrees", {"left pitch": gaze[:, 0, 0], "left yaw": gaze[:, 0, 1], "right yaw": gaze[:, 1, 1]}),
        ("torso, mm", dict(zip(("right", "down", "away"), 1e3 * shifts.T, strict=True))),
        ("error, px", {"median": np.median(errors, 1), "95 %": np.percentile(errors, 95, axis=1)}),
    ]
    plot_curves(run.work / "curves.png", frames.times, panels, ~fitted.track.usable, frames.shots)


def _result(fitted: _Fitted, crops: list[tuple[int, int, int]], seconds: dict[str, float]) -> Result:
    """The stage's figures and its judgement of them."""
    import numpy as np

    from pipeline.fitting import head_angles
    from pipeline.frames import ranges_text

    frames, track, state = fitted.frames, fitted.track, fitted.state
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
        clips = len(fitted.observations.sizes)
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
        "focal_ratio": [round(float(r), 3) for r in state.focals_px / fitted.observations.sizes.max(1)],
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


def _plausibility(fitted: _Fitted) -> dict[str, float]:
    """Where the identity lies in the model's box: share of coefficients strictly inside, and how far out they are.

    The rms over coefficients in half ranges is a Mahalanobis distance, per root coefficient, of a model that takes half
    a range for a standard deviation: about 1 for a head as unusual as the box allows, 0 for the average head.
    """
    import numpy as np

    head, identity = fitted.head, fitted.state.identity
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
