"""Benchmark of the whole product: `headcast run` on clips from nothing to the report, and again with nothing to do.

Each run is a process of its own in an empty dataset, as a user would start it; models are fetched beforehand.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.dataset import subject_name_for
from pipeline.errors import StageError


def bench_runs(videos: Sequence[Path], preset: str) -> dict[str, Any]:
    """Run each video twice and collect times, memory and likeness.

    Raises:
        StageError: a run fails, with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="headcast-bench-") as folder:
        return {"schema": 1, "preset": preset, "clips": [_bench_clip(video, preset, Path(folder)) for video in videos]}


def _bench_clip(video: Path, preset: str, data: Path) -> dict[str, Any]:
    command = ["run", str(video), "--data", str(data), "--preset", preset, "--json"]
    first_seconds, peak_mb, document = timed(command)
    second_seconds, _, _ = timed(command)
    folder = data / subject_name_for(video)
    metrics = json.loads((folder / "evaluate" / "metrics.json").read_text())
    fit = json.loads((folder / "fit" / "stage.json").read_text())["metrics"]
    return {
        "clip": video.name,
        "seconds": round(first_seconds, 1),
        "seconds_nothing_to_do": round(second_seconds, 2),
        "peak_memory_mb": round(peak_mb),
        "stage_seconds": {stage["stage"]: stage["seconds"] for stage in document["stages"]},
        "reprojection_px": fit["reprojection_px"],
        "test": metrics["test"],
        "baselines": metrics["baselines"],
        "split": metrics["split"],
        "speed": metrics["speed"],
    }


def timed(arguments: list[str]) -> tuple[float, float, dict[str, Any]]:
    """Seconds, peak resident memory in MB and JSON answer of a headcast process; progress goes to standard error.

    Raises:
        StageError: it fails, with what it said.
    """
    started, command = time.monotonic(), f"headcast {shlex.join(arguments)}"
    process = subprocess.Popen([sys.executable, "-m", "pipeline.cli", *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        answer = process.stdout.read()
    except KeyboardInterrupt:
        process.wait()  # it was interrupted too, and saves what it has
        raise
    _, status, usage = os.wait4(process.pid, 0)
    seconds, code = time.monotonic() - started, os.waitstatus_to_exitcode(status)
    try:
        document = json.loads(answer)
    except ValueError:
        raise StageError(f"The process ended without an answer (exit code {code}).", f"it was: {command}") from None
    if code != 0:
        raise StageError(document["error"]["what"], f"{document['error']['fix']} (it was: {command})")
    return seconds, usage.ru_maxrss / 1024, document


def table(document: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"| clip ({document['preset']}) | s, from nothing | s, nothing to do | peak MB | fit px median / 95 % "
        "| PSNR | best training frame | head | best training frame | train s | render / s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for clip in document["clips"]:
        test, best = clip["test"], clip["baselines"]["nearest_train_frame"]
        error, speed = clip["reprojection_px"], clip["speed"]
        lines.append(
            f"| {clip['clip']} | {clip['seconds']:.0f} | {clip['seconds_nothing_to_do']:.1f} "
            f"| {clip['peak_memory_mb']} "
            f"| {error['median']:.2f} / {error['p95']:.2f} | {test['psnr']:.1f} | {best['psnr']:.1f} "
            f"| {test['psnr_head']:.1f} | {best['psnr_head']:.1f} "
            f"| {speed['train_seconds']:.0f} | {speed['render_fps']:.0f} |"
        )
    return "\n".join(lines)
