"""Track of an imported dataset: its head's landmarks in its cameras, checked against what MediaPipe sees."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.assets import FACE_LANDMARKER, asset_path
from pipeline.dataset import write_atomic
from pipeline.errors import StageError
from pipeline.faces import FACE_OVAL, Detector
from pipeline.frames import FrameSet, contact_sheet, counted, evenly, save_image
from pipeline.geometry import project_points
from pipeline.heads.stored import FILE as HEAD_FILE
from pipeline.heads.stored import save_head
from pipeline.interchange.head import WRONG_CONVENTION, ImportedHead, imported_head, looks_needed
from pipeline.interchange.recording import FILE, Recording, load_recording
from pipeline.stage import Level, Result, StageRun, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MOTION = "motion.npz"
"""What fit takes over: camera, poses, coefficients and eyes as the dataset has them, in headcast's terms."""
DATASET = "dataset"
"""The dataset's folder in the subject's source."""
SHOWN = 8
GOOD_SHARE, WRONG_SHARE = 0.04, 0.12
"""Median distance of a detected landmark from the imported head's, in widths of the face: up to which it fits well, and
from which the cameras are not what they were taken for. Trackers differ by 0.02 among themselves."""
OFF_FRAME_SHARE = 0.05


def fill(run: StageRun) -> Result:
    """Write `track.npz`, `head.npz`, `motion.npz` and a contact sheet.

    Raises:
        StageError: the head is behind the camera or nowhere near the face, or no head can be made.
        UserError: FLAME is needed and is not there.
    """
    frames = FrameSet.load(run.subject.stage("decode"))
    recording = load_recording(run.input("decode", FILE))
    if len(recording) != len(frames):
        raise StageError(
            f"The dataset has {len(recording)} frames, decoded are {len(frames)}.",
            f"run: headcast rerun {run.subject.name} --from decode",
        )
    Ks = intrinsics(recording, frames)
    looks = _look(run, frames, looks_needed(recording))
    imported = imported_head(
        recording,
        run.subject.source / DATASET,
        Ks,
        {i: landmarks[:, :2].astype(np.float64) for i, landmarks in looks.items()},
        run.reporter.message,
    )
    in_camera = imported.landmarks_cam()
    depth = in_camera[..., 2]
    if (depth <= 0).any():
        frame = int((depth <= 0).any(1).argmax())
        raise StageError(
            f"The head lies behind the camera in frame {frame} (number {recording.numbers[frame]}).",
            WRONG_CONVENTION,
        )
    pixels = project_points(in_camera, Ks)
    share = _apart(recording, pixels, looks)
    arrays = _arrays(frames, pixels, depth, imported, looks)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(run.work / "track.npz", buffer.getvalue())
    save_head(run.work / HEAD_FILE, imported.stored)
    _write_motion(run.work / MOTION, imported, Ks)
    _draw(run.work / "overlay.jpg", frames, arrays)
    return _result(recording, imported, arrays, share)


def intrinsics(recording: Recording, frames: FrameSet) -> Floats:
    """[T,3,3] of the decoded frames, which may be smaller than the dataset's pictures."""
    Ks = recording.Ks.copy()
    Ks[:, :2] *= (np.array(frames.window(0).size) / recording.size)[:, None]
    return Ks


def _look(run: StageRun, frames: FrameSet, count: int) -> dict[int, NDArray[np.float32]]:
    """MediaPipe's landmarks [478,3] of evenly spread frames, of the largest face in each."""
    found = {}
    rows = evenly(len(frames), count)
    with (
        Detector(asset_path(FACE_LANDMARKER, fetch=False), run.config.track.max_faces) as detector,
        run.reporter.task("track: looking", len(rows), "frames") as task,
    ):
        for row in rows:
            run.check_stop()
            if faces := detector.detect(frames.picture(row)):
                found[row] = max(faces, key=lambda face: float(np.prod(face.box[2:] - face.box[:2]))).landmarks
            task.advance()
    return found


def _apart(recording: Recording, pixels: Floats, looks: dict[int, NDArray[np.float32]]) -> float | None:
    """Median distance of detected landmarks from the head's, in widths of the face; None where none was detected.

    Raises:
        StageError: too far.
    """
    if not looks:
        return None
    distances = {row: np.linalg.norm(seen[:, :2] - pixels[row], axis=1) for row, seen in looks.items()}
    widths = {row: float(np.ptp(seen[:, 0])) for row, seen in looks.items()}
    share = float(np.median([np.median(distances[row]) / widths[row] for row in looks]))
    if not share <= WRONG_SHARE:
        worst = max(looks, key=lambda row: float(np.median(distances[row])))
        raise StageError(
            f"The dataset's head lies {np.median(distances[worst]):.0f} px away from the face that frame {worst} "
            f"(number {recording.numbers[worst]}) shows, {share:.2f} of the face's width over "
            f"{counted(len(looks), 'frame')}.",
            WRONG_CONVENTION,
        )
    return share


def _arrays(
    frames: FrameSet, pixels: Floats, depth: Floats, imported: ImportedHead, looks: dict[int, NDArray[np.float32]]
) -> dict[str, Any]:
    """The arrays of `track.npz`."""
    count, landmarks = pixels.shape[:2]
    # As MediaPipe's: in pixels at the face's distance, smaller is nearer.
    middle = depth.mean(1, keepdims=True)
    width = np.ptp(pixels[..., 0], 1)[:, None]
    reach = np.ptp(imported.landmarks_cam()[..., 0], 1)[:, None]
    z = (depth - middle) * width / np.maximum(reach, 1e-9)
    all_points = np.concatenate([pixels, z[..., None]], 2).astype(np.float32)
    raw = np.full_like(all_points, np.nan)
    for row, seen in looks.items():
        raw[row] = seen
    oval = pixels[:, FACE_OVAL]
    outside = ((oval < 0) | (oval > frames.contents[:, None])).any(2).mean(1)
    off_frame = outside > OFF_FRAME_SHARE
    return {
        "landmarks": all_points,
        "landmarks_raw": raw,
        # The dataset has no scores of MediaPipe's expressions, and its own coefficients are not those.
        "blendshapes": np.zeros((count, 0), np.float32),
        "blendshape_names": np.zeros(0, "U32"),
        "Ts_cam_face": imported.Ts_cam_head.astype(np.float32),
        "detected": np.ones(count, bool),
        "boxes": np.concatenate([pixels.min(1), pixels.max(1)], 1).astype(np.float32),
        "shots": frames.shots,
        "clips": frames.clips,
        "others": np.zeros((count, 0, 4), np.float32),
        "hands": np.zeros((count, 0, 21, 2), np.float32),
        "covered": np.zeros((count, landmarks), bool),
        "occluded": np.zeros(count, bool),
        "off_frame": off_frame,
        "blurred": np.zeros(count, bool),
        "usable": ~off_frame,
        "confidence": (1 - outside).astype(np.float32),
    }


def _write_motion(path: Path, imported: ImportedHead, Ks: Floats) -> None:
    arrays: dict[str, Any] = {
        "Ks": Ks,
        "Ts_cam_head": imported.Ts_cam_head,
        "expression": imported.coefficients,
        "eyes": imported.eyes,
        "about": np.array(imported.about),
    }
    if imported.Ts_cam_torso is not None:
        arrays["Ts_cam_torso"] = imported.Ts_cam_torso
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def _draw(path: Path, frames: FrameSet, arrays: dict[str, Any]) -> None:
    """A contact sheet with the imported head's landmarks in green and the detected ones in red."""
    import cv2

    looked = np.flatnonzero(np.isfinite(arrays["landmarks_raw"]).all((1, 2)))
    rows = looked if len(looked) else np.arange(len(frames))
    images, labels = [], []
    for row in rows[evenly(len(rows), SHOWN)].tolist():
        image = frames.image(row)
        radius = max(1, round(max(image.shape) / 500))
        for name, colour in (("landmarks_raw", (255, 40, 40)), ("landmarks", (0, 255, 0))):
            points = arrays[name][row]
            for x, y, _ in points[np.isfinite(points).all(1)]:
                cv2.circle(image, (int(x), int(y)), radius, colour, -1, cv2.LINE_AA)
        images.append(image)
        labels.append(f"{row} {'off-frame' if arrays['off_frame'][row] else ''}".strip())
    save_image(path, contact_sheet(images, labels), 90)


def _result(recording: Recording, imported: ImportedHead, arrays: dict[str, Any], share: float | None) -> Result:
    count, usable = len(recording), int(arrays["usable"].sum())
    width = float(np.median(arrays["boxes"][:, 2] - arrays["boxes"][:, 0]))
    looks = int(np.isfinite(arrays["landmarks_raw"]).all((1, 2)).sum())
    level: Level = "fair"
    parts = [f"imported from {recording.format}: {imported.about}", f"face {width:.0f} px wide"]
    if share is None:
        parts.append("no face is found in any frame looked at: the cameras are not checked, look at the picture")
    else:
        level = "good" if share <= GOOD_SHARE else "fair"
        how = "though it was made from them" if imported.from_looks else "which MediaPipe sees by itself"
        parts.append(
            f"{share * width:.1f} px ({100 * share:.1f} % of that) from the landmarks of {counted(looks, 'frame')}, "
            f"{how}"
        )
    if usable < count:
        parts.append(f"{usable} of {count} frames usable")
        level = "fair" if level == "good" and usable < 0.9 * count else level
    metrics = {
        "frames": count,
        "usable": usable,
        "detected": count,
        "off_frame": int(arrays["off_frame"].sum()),
        "looked_at": looks,
        "face_width_px": round(width, 1),
        "misfit_share": None if share is None else round(share, 4),
        "imported_from": recording.format,
        "basis": recording.basis,
    }
    return Result(Verdict(level, f"Tracking: {level}. {'; '.join(parts)}.", "overlay.jpg"), metrics)
