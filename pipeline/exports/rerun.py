"""A recording for the rerun viewer of all that was found: frames, landmarks, alpha, head, Gaussians, curves.

Everything lies on two time lines, `frame` and `time` (seconds), in the axes of the clip's camera. Nothing is sent
anywhere: the recording is a file, and no viewer or server is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Interrupted, StageError, UserError
from pipeline.exports import Export, check_export, export, number, span

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.api import LoadedSubject
    from pipeline.splats import Splats

VERSION = 1
OPTIONS = {
    "first": "number of the first frame; 0",
    "last": "number of the last frame; the clip's last",
    "every": "take every so many frames; 1",
    "splats": "Gaussians of every so many of these frames; 10, or 0 for none",
}
FILE = "recording.rrd"
APPLICATION = "headcast"
CAMERA, IMAGE = "world/camera", "world/camera/image"
PLOTTED = ("jawOpen", "mouthSmileLeft", "mouthSmileRight", "eyeBlinkLeft", "eyeBlinkRight", "browInnerUp")
"""Curves that are shown at once; the others are there to choose."""
SKIN = (196, 200, 208)


def require() -> Any:
    """The package `rerun`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import rerun
    except ImportError as error:
        raise UserError(
            f"Recordings need the package rerun-sdk: {error}.", "install it with: pip install 'headcast[rerun]'"
        ) from error
    return rerun


def record(data: Path, name: str, **how: Any) -> Path:
    """Bring a subject's recording up to date where `headcast export` puts it; returns its file.

    Args:
        data: the dataset directory.
        name: of the subject.
        how: as for `check_export`.

    Raises:
        HeadcastError: why it cannot be written; what was there stays.
    """
    plan = check_export(data, name, "rerun", force=True, **how)
    if plan.product.finished() is None:
        export(plan)
    return plan.product.path / FILE


def write(plan: Export, folder: Path) -> dict[str, Any]:
    """Write `recording.rrd` and read it back.

    Raises:
        UserError: rerun is not installed or switched off, the avatar cannot be read, or an option is at fault.
        StageError: the recording does not read back whole.
        Interrupted: it was asked to stop.
    """
    rr = require()
    from pipeline.api import LoadedSubject

    subject = LoadedSubject(plan.subject)
    frames = span(plan, len(subject))
    splats = number(plan, "splats", 10, 0, len(subject))
    rr.set_strict_mode(True)  # else what is wrong is left out with a warning
    stream = rr.RecordingStream(APPLICATION, recording_id=plan.product.key()[:32])
    if not rr.is_enabled(stream):
        raise UserError("Recordings are switched off by the environment variable RERUN.", "unset RERUN")
    with stream:
        stream.save(folder / FILE, default_blueprint=_layout(rr))
        stream.send_recording_name(plan.subject.name)
        _write_curves(rr, stream, subject, frames)
        _write_frames(rr, stream, plan, subject, frames, frames[::splats] if splats else ())
    entities = read_back(folder / FILE)
    if entities.get(IMAGE) != len(frames):
        raise StageError(
            f"The recording has {entities.get(IMAGE, 0)} of {len(frames)} frames.", "run the same command again"
        )
    size = (folder / FILE).stat().st_size
    return {
        "frames": len(frames),
        "entities": entities,
        "text": f"{FILE}: {len(frames)} frames, {size / 1e6:.1f} MB; open it with: rerun {plan.product.path / FILE}",
    }


def read_back(path: Path) -> dict[str, int]:
    """Entity -> rows that a recording has of it; what does not change over time counts as 0."""
    rr = require()
    rows: dict[str, int] = {}
    for chunk in rr.chunk.RrdReader(path).stream().to_chunks():
        name = chunk.entity_path.lstrip("/")
        rows[name] = rows.get(name, 0) + (0 if chunk.is_static else chunk.num_rows)
    return {name: count for name, count in sorted(rows.items()) if not name.startswith("__")}


def _write_curves(rr: Any, stream: Any, subject: LoadedSubject, frames: range) -> None:
    """What changes over time and is a number: coefficients, angles, what each frame is worth."""
    import numpy as np

    from pipeline.advice import stage_arrays
    from pipeline.coverage import angles_deg

    clip, rows = subject.clip, np.array(frames)
    curves: dict[str, NDArray[Any]] = {
        f"expression/{name}": clip.expression[rows, i] for i, name in enumerate(clip.expression_names)
    }
    for name, values in angles_deg(clip.Ts_cam_head, clip.eyes).items():
        curves[f"degrees/{name.replace(' ', '_')}"] = values[rows]
    curves["frame/usable"] = clip.usable[rows].astype(np.float64)
    fit = stage_arrays(subject.subject, "fit", "fit.npz")
    for name in ("residual_px", "torso_confidence", "skull_confidence"):
        if name in fit:
            curves[f"frame/{name}"] = fit[name][rows].astype(np.float64)
    times = [
        rr.TimeColumn("frame", sequence=rows),
        rr.TimeColumn("time", duration=np.asarray(clip.times[rows], np.float64)),
    ]
    for name, values in curves.items():
        stream.send_columns(name, times, rr.Scalars.columns(scalars=values.astype(np.float64)))


def _write_frames(
    rr: Any, stream: Any, plan: Export, subject: LoadedSubject, frames: range, with_splats: range | tuple[()]
) -> None:
    """What each frame shows: picture, alpha, landmarks, camera, head, Gaussians."""
    import numpy as np
    import torch

    from pipeline.advice import stage_arrays
    from pipeline.export import splats_of
    from pipeline.frames import FrameSet, alpha_file

    clip, root = subject.clip, subject.subject
    listing = FrameSet.load(root.stage("decode"))
    track, fit = stage_arrays(root, "track", "track.npz"), stage_arrays(root, "fit", "fit.npz")
    head, avatar = clip.personal_head(), subject.avatar().model
    identity = torch.from_numpy(clip.identity)
    stream.log("world", rr.ViewCoordinates.RDF, static=True)
    stream.log("world/head", rr.Mesh3D.from_fields(triangle_indices=head.faces, albedo_factor=SKIN), static=True)
    camera = -1
    with plan.reporter.task("Frames", len(frames), "frames") as task, torch.no_grad():
        for frame in frames:
            if plan.stop_requested():
                raise Interrupted("Stopped; nothing was written.", "run the same command again")
            stream.set_time("frame", sequence=frame)
            stream.set_time("time", duration=float(clip.times[frame]))
            if clip.cameras[frame] != camera:  # one a clip
                camera = int(clip.cameras[frame])
                size = int(fit["image_size"][0]), int(fit["image_size"][1])
                stream.log(CAMERA, rr.Pinhole(image_from_camera=fit["Ks"][frame], resolution=size))
            stream.log(IMAGE, rr.EncodedImage(path=root.stage("decode") / listing.files[frame]))
            alpha = rr.EncodedImage(path=root.stage("matte") / alpha_file(frame), opacity=0.5, draw_order=1.0)
            stream.log(f"{IMAGE}/alpha", alpha)
            if "landmarks" in track:
                points = rr.Points2D(track["landmarks"][frame, :, :2], radii=1.0, colors=(80, 220, 120), draw_order=2.0)
                stream.log(f"{IMAGE}/landmarks", points)
            rows = (torch.from_numpy(array[frame : frame + 1]) for array in (clip.expression, clip.neck, clip.eyes))
            vertices = head.vertices(identity, *rows)[0].double().numpy()
            T_cam_head = clip.Ts_cam_head[frame]
            moved = vertices @ T_cam_head[:3, :3].T + T_cam_head[:3, 3]
            stream.log("world/head", rr.Mesh3D.from_fields(vertex_positions=moved.astype(np.float32)))
            if frame in with_splats:
                shown = splats_of(avatar.gaussians(subject.condition(frame)), torch.eye(4))
                stream.log("world/avatar", _gaussians(rr, shown))
            task.advance()


def _gaussians(rr: Any, splats: Splats) -> Any:
    """Splats as rerun has them: colour and opacity in 8 bits, quaternions with w last."""
    import numpy as np

    from pipeline.splats import SH_C0

    colours = np.clip(0.5 + SH_C0 * splats.sh[:, 0], 0, 1)
    rgba = np.concatenate([colours, splats.opacities.reshape(-1, 1)], 1)
    return rr.GaussianSplats3D(
        splats.means,
        scales=splats.scales,
        quaternions=np.roll(splats.quats, -1, axis=1),
        colors=(rgba * 255 + 0.5).astype(np.uint8),
    )


def _layout(rr: Any) -> Any:
    """What the viewer shows at first: the scene, the frame, and a few curves."""
    import rerun.blueprint as rrb

    curves = rrb.TimeSeriesView(origin="/", contents=[f"+ /expression/{name}" for name in PLOTTED], name="Expression")
    return rrb.Blueprint(
        rrb.Horizontal(
            rrb.Spatial3DView(origin="/world", name="Scene"),
            rrb.Vertical(rrb.Spatial2DView(origin=f"/{IMAGE}", name="Frame"), curves),
        ),
        collapse_panels=True,
    )
