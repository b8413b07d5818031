"""Fit of an imported dataset: its head and motion as it has them, torso and skull followed in its frames."""

from __future__ import annotations

import shutil
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError
from pipeline.fitted import Fitted, draw, training_crops, with_torso_and_skull, write_fit
from pipeline.fitting import torso_motion
from pipeline.frames import FrameSet, counted
from pipeline.geometry import make_rigid
from pipeline.heads.stored import FILE as HEAD_FILE
from pipeline.heads.stored import StoredHead, load_stored
from pipeline.interchange.fill_track import GOOD_SHARE, MOTION
from pipeline.interchange.recording import FILE, load_recording
from pipeline.skull import Skull
from pipeline.stage import Level, Result, StageRun, Verdict
from pipeline.torso import Torso

VIDEO_FRAMES = 100
"""Enough to see whether the head stays on the face: most of the time that a fit here takes goes into its pictures."""

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fill(run: StageRun) -> Result:
    """Write `fit.npz`, `head.npz`, `cameras.json`, the neutral head and pictures.

    Raises:
        StageError: what the track stage wrote is damaged, or no frame can be used.
    """
    started = time.monotonic()
    frames = FrameSet.load(run.subject.stage("decode"))
    recording = load_recording(run.input("decode", FILE))
    stored = load_stored(run.input("track", HEAD_FILE))
    track, motion = _read(run, stored, len(frames))
    usable = track["usable"].astype(bool)
    if not usable.any():
        raise StageError(
            f"The face lies outside the picture in all frames of '{run.subject.name}'.",
            "look at the track stage's overlay.jpg, and name the format: headcast import FOLDER --format NAME",
        )
    Ts_cam_head = motion["Ts_cam_head"]
    if "Ts_cam_torso" in motion:
        guess = motion["Ts_cam_torso"]
    else:
        rotations = torso_motion(frames.times, Ts_cam_head[:, :3, :3], usable.astype(float), frames.shots)[0]
        guess = make_rigid(rotations, Ts_cam_head[:, :3, 3])
    raw = track["landmarks_raw"][..., :2].astype(np.float64)
    seen = np.all(np.isfinite(raw), axis=(1, 2))
    fitted = Fitted(
        stored.model,
        frames,
        motion["Ks"],
        Ts_cam_head,
        np.zeros(0),
        motion["expression"].astype(np.float64),
        motion["eyes"],
        np.where(seen[:, np.newaxis, np.newaxis], raw, track["landmarks"][..., :2]),
        np.ones(len(frames), bool),
        usable,
        np.linalg.norm(raw - track["landmarks"][..., :2], axis=2),
        Torso.unseen(guess),
        Skull(Ts_cam_head, np.zeros(len(frames))),
    )
    crops = training_crops(fitted, run.config.fit.crop_margin)
    seconds = {"read": time.monotonic() - started}
    fitted = with_torso_and_skull(run, fitted, crops)
    seconds["torso"] = time.monotonic() - started - sum(seconds.values())
    write_fit(run, fitted, crops)
    shutil.copyfile(run.input("track", HEAD_FILE), run.work / HEAD_FILE)
    seconds["files"] = time.monotonic() - started - sum(seconds.values())
    draw(run, fitted, VIDEO_FRAMES)
    seconds["pictures"] = time.monotonic() - started - sum(seconds.values())
    return _result(fitted, recording.format, str(motion["about"]), crops, seconds)


def _read(run: StageRun, stored: StoredHead, count: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """What the track stage wrote of a dataset of `count` frames.

    Raises:
        StageError: it is damaged, or is not of this dataset.
    """
    landmarks, expressions = len(stored.model.landmark_faces), len(stored.model.expression_names)
    expected: dict[str, dict[str, tuple[int, ...]]] = {
        "track.npz": {"landmarks": (count, landmarks, 3), "landmarks_raw": (count, landmarks, 3), "usable": (count,)},
        MOTION: {
            "Ks": (count, 3, 3),
            "Ts_cam_head": (count, 4, 4),
            "expression": (count, expressions),
            "eyes": (count, 2, 3),
            "about": (),
        },
    }
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for name, shapes in expected.items():
        path: Path = run.input("track", name)
        try:
            with np.load(path, allow_pickle=False) as file:
                found[name] = {key: file[key] for key in file.files}
            for key, shape in shapes.items():
                if found[name][key].shape != shape:
                    raise ValueError(f"'{key}' has shape {found[name][key].shape}, expected {shape}")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            fix = f"run: headcast rerun {run.subject.name} --from track"
            raise StageError(f"'{path}' cannot be used: {error}.", fix) from error
    return found["track.npz"], found[MOTION]


def _result(
    fitted: Fitted, format_name: str, about: str, crops: list[tuple[int, int, int]], seconds: dict[str, float]
) -> Result:
    usable, total = int(fitted.usable.sum()), len(fitted.frames)
    looked = fitted.usable & np.isfinite(fitted.errors).all(1)
    x = fitted.landmarks[fitted.usable, :, 0]
    width = float(np.median(np.ptp(x, 1)))
    level: Level = "fair"
    parts = [f"Imported from {format_name}: {about}", f"{usable} of {total} frames"]
    reprojection = None
    if looked.any():
        median, p95 = (round(float(np.percentile(fitted.errors[looked], q)), 3) for q in (50, 95))
        reprojection = {"median": median, "p95": p95}
        level = "good" if median <= GOOD_SHARE * width else "fair"
        parts.insert(
            1,
            f"its landmarks lie {median:.2f} px (95 %: {p95:.1f}) from those detected in "
            f"{counted(int(looked.sum()), 'frame')}, on a face {width:.0f} px wide",
        )
    else:
        parts.append("not checked, for no face is found in its frames")
    followed = fitted.torso.confidence > 0
    if not followed.any():
        parts.append("no torso in sight: how it moves is a guess from the head")
    elif not followed.all():
        parts.append(f"torso followed in {100 * followed.mean():.0f} % of the frames, elsewhere filled in")
    metrics = {
        "reprojection_px": reprojection,
        "face_width_px": round(width, 1),
        "frames": {"total": total, "usable": usable, "detected": total},
        "crops": [list(crop) for crop in crops],
        "skull_followed": round(float((fitted.skull.confidence > 0).mean()), 3),
        "torso_followed": round(float(followed.mean()), 3),
        "imported_from": format_name,
        "part_seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    return Result(Verdict(level, f"Fit: {level}. {'; '.join(parts)}.", "overlay.jpg"), metrics)
