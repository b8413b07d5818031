"""How long `headcast import` takes beyond copying: synthetic datasets, each imported by a process of its own."""

from __future__ import annotations

import importlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bench_run import timed
from pipeline.errors import UserError
from pipeline.interchange import FORMATS
from pipeline.interchange.recording import FlameTrack, Recording
from pipeline.interchange.sidecar import Sidecar

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads.flame import Flame
    from pipeline.synthetic import SyntheticClip

SIZE_PX = 512
RENDERED = 25
"""Frames that are rendered; a dataset shows them there and back again until it has enough."""
FPS = Fraction(30000, 1001)
FLAME_OF = {"insta": "flame2020", "vhap": "flame2023", "imavatar": "flame2020"}
COEFFICIENTS = {"nerfblendshape": 46, "insta": 100, "vhap": 100, "imavatar": 50}
"""Of the formats that headcast can write."""
SHAPES = {"imavatar": 100}
"""Of FLAME; the other formats hold 300."""
TARGET_SECONDS = 20.0
"""Beyond copying, for 500 frames."""


def bench(formats: Sequence[str], frames: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Write, copy and import a dataset of each format.

    Args:
        formats: of `COEFFICIENTS`.
        frames: of each dataset.
        report: is told what is measured.

    Returns:
        For each format `frames`, `megabytes`, `copy_seconds`, `seconds` (of the whole process), `beyond_copying` and
        `stage_seconds`; or `skipped` with the reason, where FLAME is needed and not there.

    Raises:
        HeadcastError: an import failed.
    """
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="headcast-bench-") as folder:
        for name in formats:
            dataset = Path(folder) / name
            report(f"{name}: writing {frames} frames")
            try:
                synthetic_dataset(name, dataset, frames)
            except UserError as error:
                rows[name] = {"skipped": str(error.what)}
                continue
            report(f"{name}: importing")
            rows[name] = _measured(name, dataset, Path(folder) / "data")
            shutil.rmtree(dataset)
    return {"schema": 1, "size": SIZE_PX, "frames": frames, "rows": rows}


def _measured(name: str, dataset: Path, data: Path) -> dict[str, Any]:
    files = [path for path in dataset.rglob("*") if path.is_file()]
    copy = dataset.with_name("copy")
    started = time.monotonic()
    shutil.copytree(dataset, copy)
    copying = time.monotonic() - started
    shutil.rmtree(copy)
    seconds, peak_mb, document = timed(["import", str(dataset), "--format", name, "--data", str(data), "--json"])
    return {
        "megabytes": round(sum(path.stat().st_size for path in files) / 2**20, 1),
        "files": len(files),
        "copy_seconds": round(copying, 2),
        "seconds": round(seconds, 1),
        "beyond_copying": round(seconds - copying, 1),
        "stage_seconds": {each["stage"]: each["seconds"] for each in document["stages"]},
        "peak_memory_mb": round(peak_mb),
    }


def synthetic_dataset(format_name: str, folder: Path, frames: int, size: int = SIZE_PX) -> Recording:
    """Write a talking synthetic head as a dataset of a format; the recording that was written.

    Args:
        format_name: of `COEFFICIENTS`.
        folder: an empty one, or one that is not there yet.
        frames: how many.
        size: of the pictures in pixels.

    Raises:
        UserError: the format needs FLAME, which is not on this machine.
    """
    flame, clip = _performer(format_name, min(frames, RENDERED), size)
    forth = list(range(len(clip.images)))
    order = np.resize([*forth, *forth[-2:0:-1]], frames)
    version = flame.name if flame is not None else "nerfblendshape"
    count = COEFFICIENTS[format_name]
    basis = f"{version}-expression-{count}" if flame is not None else f"{version}-{count}"
    names = tuple(f"{basis}/{index:03d}" for index in range(count))
    coefficients = (clip.expression @ np.random.default_rng(0).normal(0, 0.3, (clip.expression.shape[1], count)))[order]
    track, Ts_cam_world = None, clip.Ts_cam_head[order]
    if flame is not None:
        track, Ts_cam_world = _flame_track(flame, SHAPES.get(format_name, 300), coefficients, Ts_cam_world)
    recording = Recording(
        format=format_name,
        size=(size, size),
        fps=FPS,
        numbers=np.arange(frames),
        Ks=np.repeat(clip.K[None], frames, 0),
        Ts_cam_world=Ts_cam_world,
        images=(),
        alpha="none",
        masks=(),
        basis=basis,
        coefficient_names=names,
        coefficients=coefficients if track is None else track.expression,
        flame=track,
    )
    alphas = np.round(255 * clip.alpha).astype(np.uint8)

    def pictures(row: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return clip.images[order[row]], alphas[order[row]]

    told = flame.name if flame is not None else ""
    sidecar = Sidecar(format_name, "synthetic", str(FPS), tuple(range(frames)), basis, names, flame=told)
    module = importlib.import_module(FORMATS[format_name].module)
    module.write(recording, pictures, folder, flame=flame, sidecar=sidecar)
    return recording


def _performer(format_name: str, frames: int, size: int) -> tuple[Flame | None, SyntheticClip]:
    """Who is filmed: FLAME's average head where the format has FLAME, else anny."""
    from pipeline.heads import load_head
    from pipeline.heads.flame import load_flame
    from pipeline.synthetic import make_clip

    K = np.array([[1.4 * size, 0, size / 2], [0, 1.4 * size, size / 2], [0, 0, 1]])
    version = FLAME_OF.get(format_name)
    flame = load_flame(version) if version else None
    head = load_head(version or "anny")
    return flame, make_clip(frames, size, size, 1, head=head, K=K, identity_scale=0.0 if version else 0.3)


def _flame_track(
    flame: Flame, shapes: int, expression: NDArray[np.float64], Ts_cam_head: NDArray[np.float64]
) -> tuple[FlameTrack, NDArray[np.float64]]:
    """FLAME's parameters with all motion in the camera, and the poses of its own frame, whose origin is not the neck's
    pivot.
    """
    import torch

    from pipeline.geometry import make_rigid
    from pipeline.heads.flame import NECK

    count = len(expression)
    still = np.zeros((count, 3))
    track = FlameTrack(
        version=flame.name,
        shape=np.zeros(shapes),
        expression=0.1 * expression,
        rotation=still,
        translation=still.copy(),
        neck=still.copy(),
        jaw=still.copy(),
        eyes=np.zeros((count, 2, 3)),
    )
    rest = flame.joints(torch.zeros(0, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.float64))[0, NECK].numpy()
    return track, Ts_cam_head @ make_rigid(np.eye(3), -rest)


def table(document: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"| {document['frames']} frames, {document['size']} px | files | MB | copying s | import s | beyond copying s "
        "| decode | track | matte | fit | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in document["rows"].items():
        if "skipped" in row:
            lines.append(f"| {name} | {row['skipped']} |" + " |" * 9)
            continue
        stages = " | ".join(f"{row['stage_seconds'][stage]:.1f}" for stage in ("decode", "track", "matte", "fit"))
        lines.append(
            f"| {name} | {row['files']} | {row['megabytes']:.0f} | {row['copy_seconds']:.1f} | {row['seconds']:.1f} "
            f"| {row['beyond_copying']:.1f} | {stages} | {row['peak_memory_mb']} |"
        )
    return "\n".join(lines)
