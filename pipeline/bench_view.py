"""How fast `headcast view` makes pictures: from what a browser asks for to the JPEG that viser is given."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipeline.dataset import Dataset
from pipeline.errors import HeadcastError
from pipeline.rasterize.cpu import warm_up
from pipeline.run import usable_cores
from pipeline.viewer.controls import Controls
from pipeline.viewer.guard import Guard, GuardedServer, listen
from pipeline.viewer.picture import JPEG_QUALITY, Painter
from pipeline.viewer.scene import Scene, camera_of
from pipeline.viewer.session import LOOPBACK, one_tensor_thread
from pipeline.viewpoint import orbit, up_of

SIZE_PX = 512
TARGET_FPS = 24
WARM_UP, TIMED = 5, 60
COLUMNS = (("scene", 8), ("picture", 9), ("jpeg", 7), ("whole", 8), ("cores", 8))

# What is shown; in all of them the camera goes round, and clip or sliders move.
CASES: dict[str, dict[str, Any]] = {
    "clip, full avatar": {},
    "clip, baked avatar": {"baked": True},
    "sliders, full avatar": {"drive": "sliders"},
    "sliders, baked avatar": {"drive": "sliders", "baked": True},
    "clip, points": {"show": "points"},
    "clip, mesh": {"show": "mesh"},
    "clip, mesh edges over it": {"overlay": "mesh edges"},
    "clip, landmarks over it": {"overlay": "landmarks"},
    "clip, film beside": {"beside": True, "locked": True},
}


def bench(data: Path, subject: str, threads: int | None, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure every case.

    Args:
        data: the dataset.
        subject: a name in it; trained.
        threads: of the rasteriser; None takes all cores.
        report: is told what is measured.

    Raises:
        HeadcastError: the subject cannot be shown.
    """
    threads = threads or usable_cores()
    painter = Painter.of(Dataset(data).existing(subject), threads)
    warm_up(report)
    rows: dict[str, Any] = {}
    with contextlib.closing(listen(LOOPBACK, 0, "")) as listening, one_tensor_thread():
        server = GuardedServer(listening, Guard(LOOPBACK, listening.getsockname()[1]))
        try:
            controls = Controls(server.gui, subject, painter, lambda: None)
            for name, fields in CASES.items():
                report(name)
                try:
                    rows[name] = _measure(server, painter, controls, fields)
                except HeadcastError as error:
                    rows[name] = {"error": error.what}
        finally:
            server.stop()
    return {
        "schema": 1,
        "subject": subject,
        "size": SIZE_PX,
        "threads": threads,
        "target_fps": TARGET_FPS,
        "rows": rows,
    }


def _measure(server: Any, painter: Painter, controls: Controls, fields: dict[str, Any]) -> dict[str, float]:
    start = painter.opening
    level = camera_of(np.array([1.0, 0, 0, 0]), start.position, start.fov, SIZE_PX, SIZE_PX)
    if level is None:
        raise ValueError(f"the first view of a subject is no camera: {start}")
    up = up_of(painter.full.rest.T_cam_head.numpy())
    begun = 0.0
    parts: dict[str, list[float]] = {"scene": [], "picture": [], "jpeg": [], "whole": []}
    for turn in range(WARM_UP + TIMED):
        if turn == WARM_UP:
            begun = time.process_time()
        camera = orbit(level, start.look_at, up, 0.3 * np.sin(turn / 5), 0.0)
        moments = [time.perf_counter()]
        scene = _scene(painter, controls, fields, turn)
        moments.append(time.perf_counter())
        picture = painter.paint(scene, camera)
        moments.append(time.perf_counter())
        server.scene.set_background_image(picture, format="jpeg", jpeg_quality=JPEG_QUALITY)
        moments.append(time.perf_counter())
        for part, seconds in zip(parts, [*np.diff(moments), moments[-1] - moments[0]], strict=True):
            parts[part].append(1000 * float(seconds))
    cores = 1000 * (time.process_time() - begun) / TIMED
    medians = {f"{part}_ms": round(median(values[WARM_UP:]), 2) for part, values in parts.items()}
    return {**medians, "cores_ms": round(cores, 2), "fps": round(1000 / median(parts["whole"][WARM_UP:]), 1)}


def _scene(painter: Painter, controls: Controls, fields: dict[str, Any], turn: int) -> Scene:
    """The scene of one turn: the next frame, or sliders at other places."""
    if fields.get("drive") != "sliders":
        return Scene(frame=turn % len(painter.subject), **fields)
    controls.put({"jawOpen": 0.3 + 0.2 * np.sin(turn)} if "jawOpen" in painter.full.expression_names else {})
    asked = controls.scene()
    return Scene(expression=asked.expression, pose=asked.pose, **fields)


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    side, threads = result["size"], result["threads"]
    lines = [
        f"{result['subject']}: {side} x {side}, {threads} thread(s), milliseconds (median), and of all cores together",
        f"{'':<28}{'scene':>8}{'picture':>9}{'JPEG':>7}{'whole':>8}{'cores':>8}{'a second':>10}",
    ]
    for name, row in result["rows"].items():
        if "error" in row:
            lines.append(f"{name:<28}{row['error']}")
            continue
        numbers = "".join(f"{row[f'{part}_ms']:>{wide}.1f}" for part, wide in COLUMNS)
        short = "" if row["fps"] >= result["target_fps"] else f"  below {result['target_fps']}"
        lines.append(f"{name:<28}{numbers}{row['fps']:>10.0f}{short}")
    return "\n".join(lines)
