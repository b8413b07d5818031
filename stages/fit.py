"""Fit: the head model to the tracked landmarks of the whole clip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.fitting import FitState, Observations
    from pipeline.frames import FrameSet
    from pipeline.heads import HeadModel

SCHEMA = 1
CHECKPOINT = "state.npz"
MIN_FRAMES = 3
GOOD_FRAMES = 30
# Median and 95th percentile of the landmark error, as shares of the face's width, up to which a fit is good or fair.
GOOD_ERROR, FAIR_ERROR = (0.003, 0.012), (0.008, 0.03)
VIDEO_FRAMES = 600
VIDEO_SIDE_PX = 360


@dataclass(frozen=True)
class _Track:
    """What fit reads of `track.npz`."""

    landmarks: NDArray[np.float64]
    scores: NDArray[np.float64]
    detected: NDArray[np.bool_]
    usable: NDArray[np.bool_]


def fit(run: StageRun) -> Result:
    """Fit camera, identity, poses and expressions; write `fit.npz`, `cameras.json`, the neutral head and pictures.

    Raises:
        StageError: fewer than three frames can be used.
    """
    import time

    import numpy as np

    from pipeline.fitting import STEPS, FitState, Observations, fit_head, reduce_to_landmarks, reprojection_errors
    from pipeline.frames import FrameSet
    from pipeline.heads import load_head

    settings = run.config.fit
    frames = FrameSet.load(run.subject.stage("decode"))
    head = load_head(settings.head)
    track = _read_track(run, head, len(frames))
    if track.usable.sum() < MIN_FRAMES:
        raise StageError(
            f"Only {track.usable.sum()} of the {len(frames)} frames of '{run.subject.name}' show the face well enough; "
            f"fitting needs {MIN_FRAMES}.",
            "film the face from the front, lit evenly, unhidden and inside the picture for some seconds",
        )
    observations = Observations.of(
        frames.times,
        track.landmarks,
        track.scores,
        head.expression_names,
        track.detected,
        track.usable,
        (frames.width, frames.height),
        settings.focal_prior,
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
    crop = _write_fit(run, head, frames, track, observations, state, errors)
    seconds["write"] = round(time.monotonic() - started, 2)
    oval = observations.landmarks[track.usable, :, 0]
    width_px = float(np.median(oval.max(1) - oval.min(1)))
    metrics = {
        "reprojection_px": {
            "median": round(float(np.median(errors[track.usable])), 3),
            "p95": round(float(np.percentile(errors[track.usable], 95)), 3),
        },
        "face_width_px": round(width_px, 1),
        "focal_ratio": round(state.focal_px / max(frames.width, frames.height), 3),
        "frames": {"total": len(frames), "usable": int(track.usable.sum()), "detected": int(track.detected.sum())},
        "identity_rms": round(float(np.sqrt(np.mean(state.identity**2))), 3),
        "offset_mm": round(1e3 * float(np.median(np.linalg.norm(state.offsets[0], axis=1))), 2),
        "crop": list(crop),
        "solve_steps_seconds": seconds,
    }
    return Result(_verdict(metrics, track), metrics)


def _read_track(run: StageRun, head: HeadModel, count: int) -> _Track:
    """The tracker's arrays with scores in the head's order; rows that are not finite count as not detected.

    Raises:
        StageError: the file is damaged or does not belong to the frames.
    """
    import numpy as np

    path = run.input("track", "track.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["blendshape_names"]]
            landmarks, scores = file["landmarks_raw"].astype(np.float64), file["blendshapes"].astype(np.float64)
            detected, usable = file["detected"].astype(bool), file["usable"].astype(bool)
        fits = landmarks.shape == (count, len(head.landmark_faces), 3) and scores.shape == (count, len(names))
        if not fits or detected.shape != (count,) or usable.shape != (count,):
            raise ValueError("its arrays do not have the shapes of this clip")
    except (OSError, ValueError, KeyError) as error:
        fix = f"run: headcast rerun {run.subject.name} --from track"
        raise StageError(f"'{path}' cannot be used: {error}.", fix) from error
    detected &= np.isfinite(landmarks).all((1, 2)) & np.isfinite(scores).all(1)
    ordered = [scores[:, names.index(n)] if n in names else np.zeros(count) for n in head.expression_names]
    return _Track(landmarks, np.stack(ordered, 1), detected, usable & detected)


def _write_fit(
    run: StageRun,
    head: HeadModel,
    frames: FrameSet,
    track: _Track,
    observations: Observations,
    state: FitState,
    errors: NDArray[np.float64],
) -> tuple[int, int, int]:
    """Write every file of the stage; returns the training crop."""
    import numpy as np
    import torch

    from pipeline.dataset import write_json
    from pipeline.fitting import head_angles, torso_motion, training_crop
    from pipeline.frames import contact_sheet, evenly, save_image
    from pipeline.geometry import make_rigid, project_points, transform_points
    from pipeline.overlay import front_and_side, overlay, plot_curves
    from pipeline.personal import personalise
    from pipeline.video import write_video

    K, T = state.intrinsics(observations), len(frames)
    R_torso, neck = torso_motion(frames.times, state.rotations, observations.weights)
    Ts_cam_head = state.Ts_cam_head
    offsets = state.offsets.astype(np.float32)
    own = personalise(head, offsets[0], offsets[1:])
    on_head = head.regions["head"]
    head_faces = head.faces[on_head[head.faces].all(1)]

    def vertices_cam(indices: NDArray[np.int64]) -> NDArray[np.float64]:
        with torch.no_grad():
            posed = own.vertices(
                torch.from_numpy(state.identity.astype(np.float32)),
                torch.from_numpy(state.expression[indices].astype(np.float32)),
                torch.from_numpy(neck[indices].astype(np.float32)),
                torch.from_numpy(state.eyes[indices].astype(np.float32)),
            )
        return transform_points(Ts_cam_head[indices], posed.numpy().astype(np.float64))

    boxes = np.empty((T, 4))
    for chunk in np.array_split(np.arange(T), -(-T // 64)):
        pixels = project_points(vertices_cam(chunk)[:, on_head], K)
        boxes[chunk] = np.concatenate([pixels.min(1), pixels.max(1)], 1)
    crop = training_crop(boxes[track.usable], frames.width, frames.height, run.config.fit.crop_margin)

    np.savez(
        run.work / "fit.npz",
        K=K,
        image_size=np.array([frames.width, frames.height]),
        Ts_cam_head=Ts_cam_head,
        Ts_cam_torso=make_rigid(R_torso, state.translations),
        neck=neck.astype(np.float32),
        eyes=state.eyes.astype(np.float32),
        identity=state.identity.astype(np.float32),
        expression=state.expression.astype(np.float32),
        expression_names=np.array(head.expression_names),
        landmark_offsets=offsets[0],
        expression_offsets=offsets[1:],
        usable=track.usable,
        residual_px=np.median(errors, 1).astype(np.float32),
        head=np.array(head.name),
        crop=np.array(crop, np.float64),
    )
    cameras = {
        "schema": SCHEMA,
        "width": frames.width,
        "height": frames.height,
        "K": K.tolist(),
        "crop": list(crop),
        "frames": [
            {"index": i, "time": float(frames.times[i]), "usable": bool(track.usable[i]), "T_cam_head": T_.tolist()}
            for i, T_ in enumerate(Ts_cam_head)
        ],
    }
    write_json(run.work / "cameras.json", cameras)
    identity = state.identity.astype(np.float32)
    neutral = own.template + np.tensordot(identity, head.identity_basis, 1)
    _write_obj(run.work / "neutral.obj", neutral, head.faces)
    save_image(run.work / "neutral.jpg", front_and_side(neutral, head_faces), 90)

    reduce = min(1.0, VIDEO_SIDE_PX / max(frames.width, frames.height))
    size = round(frames.width * reduce), round(frames.height * reduce)
    small_K = np.diag([size[0] / frames.width, size[1] / frames.height, 1]) @ K

    def drawn(index: int, scale_K: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint8]:
        import cv2

        image = cv2.resize(frames.image(index), size, interpolation=cv2.INTER_AREA)
        pixels = track.landmarks[index, :, :2] * (np.array(size) / (frames.width, frames.height))
        return overlay(image, vertices_cam(np.array([index]))[0], head_faces, scale_K, pixels)

    full = (frames.width, frames.height)
    shown = evenly(T, 8)
    sheet = contact_sheet([drawn(i, K, full) for i in shown], [f"{i}  {np.median(errors[i]):.2f} px" for i in shown])
    save_image(run.work / "overlay.jpg", sheet, 90)
    in_video = evenly(T, VIDEO_FRAMES)
    rate = len(in_video) / (frames.times[-1] - frames.times[0] + 1 / float(frames.fps))
    with run.reporter.task("draw", len(in_video), "frames") as task:

        def pictures() -> Any:
            for index in in_video:
                run.check_stop()
                yield drawn(index, small_K, size)
                task.advance()

        write_video(run.work / "overlay.mp4", pictures(), float(round(rate, 2)), crf=26)

    names = list(head.expression_names)
    curves = {
        n: state.expression[:, names.index(n)] for n in ("jawOpen", "mouthSmileLeft", "eyeBlinkLeft", "eyeBlinkRight")
    }
    angles = np.degrees(head_angles(state.rotations))
    gaze = np.degrees(state.gaze)
    plot_curves(
        run.work / "curves.png",
        frames.times,
        [
            ("expression", curves),
            ("head, degrees", dict(zip(("yaw", "pitch", "roll"), angles.T, strict=True))),
            ("gaze, degrees", {"left pitch": gaze[:, 0, 0], "left yaw": gaze[:, 0, 1], "right yaw": gaze[:, 1, 1]}),
            ("error, px", {"median": np.median(errors, 1), "95 %": np.percentile(errors, 95, axis=1)}),
        ],
        ~track.usable,
    )
    return crop


def _write_obj(path: Path, vertices: NDArray[np.float32], faces: NDArray[np.int32]) -> None:
    """A Wavefront OBJ, metres, faces counted from 1."""
    from pipeline.dataset import write_atomic

    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices.tolist()]
    lines += [f"f {a} {b} {c}" for a, b, c in (faces + 1).tolist()]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def _verdict(metrics: dict[str, Any], track: _Track) -> Verdict:
    from pipeline.frames import ranges_text

    error, width = metrics["reprojection_px"], metrics["face_width_px"]
    usable, total = int(track.usable.sum()), len(track.usable)

    def within(limits: tuple[float, float]) -> bool:
        return bool(error["median"] <= limits[0] * width and error["p95"] <= limits[1] * width)

    level: Level = "good" if within(GOOD_ERROR) else "fair" if within(FAIR_ERROR) else "poor"
    parts = [
        f"Median landmark error {error['median']:.2f} px (95 %: {error['p95']:.1f}) on a face {width:.0f} px wide",
        f"{usable} of {total} frames",
    ]
    if usable < total:
        parts.append(f"carried through by their neighbours: {ranges_text(~track.usable)}")
    if usable < GOOD_FRAMES:
        level = "fair" if level == "good" else level
        parts.append(f"under {GOOD_FRAMES} frames the head's shape is hardly determined")
    return Verdict(level, f"Fit: {level}. {'; '.join(parts)}.", "overlay.jpg")


STAGE = Stage("fit", 2, ("decode", "track"), fit, description="camera, head shape, poses and expressions")
