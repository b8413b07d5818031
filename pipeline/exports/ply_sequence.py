"""The avatar as its clip moves it: one 3DGS PLY a frame, numbered, and what camera saw them (`sequence.json`).

`axes=world` (the default): the axes of the head at rest, which stay while the head moves in them; the camera stands
still. `axes=head`: those of the head in each frame, which therefore stands still; the camera goes round it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import Interrupted
from pipeline.exports import Export, choice, span

VERSION = 1
OPTIONS = {
    "first": "number of the first frame; 0",
    "last": "number of the last frame; the clip's last",
    "every": "take every so many frames; 1",
    "axes": "world: the head moves, the camera stands still; head: the other way round",
    "columns": "all: the standard's 62; used: no columns for harmonics that the avatar has not, a quarter of the size",
}
SCHEMA = 1
COMPARED = 4
"""So many frames are read back and compared."""
Y_DOWN = np.diag([1.0, -1.0, -1.0, 1.0])
"""Between the head's axes and those of the files."""


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write `000000.ply` ... and `sequence.json`.

    Raises:
        UserError: the avatar cannot be read, or an option is at fault.
        Interrupted: it was asked to stop.
    """
    import torch

    from pipeline.api import LoadedSubject
    from pipeline.dataset import read_json, write_json
    from pipeline.export import gaussians_of, splats_of
    from pipeline.exports.loss import cameras_of, loss_of
    from pipeline.frames import evenly
    from pipeline.geometry import invert_rigid
    from pipeline.ply import read_ply, write_ply

    subject = LoadedSubject(export.subject)
    frames = span(export, len(subject))
    world = choice(export, "axes", "world", "head") == "world"
    columns = choice(export, "columns", "all", "used")
    avatar = subject.avatar().model
    rest, usable = avatar.neutral.T_cam_head, subject.clip.usable
    entries = []
    with export.reporter.task("Frames", len(frames), "frames") as task, torch.no_grad():
        for place, frame in enumerate(frames):
            if export.stop_requested():
                raise Interrupted("Stopped; nothing was written.", "run the same command again")
            condition = subject.condition(frame)
            T_cam_axes = rest if world else condition.T_cam_head
            splats = splats_of(avatar.gaussians(condition), invert_rigid(T_cam_axes))
            name = f"{place:06d}.ply"
            write_ply(folder / name, splats, 3 if columns == "all" else splats.degree())
            entries.append(
                {
                    "file": name,
                    "frame": frame,
                    "time": float(subject.clip.times[frame]),
                    "usable": bool(usable[frame]),
                    "camera": int(subject.clip.cameras[frame]),
                    "T_cam_ply": (T_cam_axes.double().numpy() @ Y_DOWN).tolist(),
                }
            )
            task.advance()
        compared = [entries[i] for i in evenly(len(entries), COMPARED)]
        pairs = (
            (
                avatar.gaussians(subject.condition(entry["frame"])),
                gaussians_of(read_ply(folder / entry["file"]), torch.from_numpy(np.array(entry["T_cam_ply"]) @ Y_DOWN)),
            )
            for entry in compared
        )
        loss = loss_of(pairs, cameras_of(avatar), export.threads)
    size_px = subject.clip.resolution
    cameras = [{"K": K.tolist(), "width": size_px, "height": size_px} for K in subject.clip.Ks]
    about = {
        "schema": SCHEMA,
        "axes": "world" if world else "head",
        "fps": read_json(export.subject.stage("decode") / "frames.json")["fps"],
        "every": frames.step,
        "cameras": cameras,
        "frames": entries,
    }
    write_json(folder / "sequence.json", about)
    size = sum((folder / entry["file"]).stat().st_size for entry in entries)
    moves = "the head moves, the camera stands still" if world else "the head stands still, the camera moves"
    text = f"{len(entries)} PLY files, {size / 1e6:.0f} MB, and sequence.json: {moves}. {loss}"
    return {"frames": len(entries), "gaussians": avatar.count, "bytes": size, **loss.account(), "text": text}
