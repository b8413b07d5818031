"""How long it takes to tell how many finished subjects stand: `headcast bench status`."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.config import Config
from pipeline.dataset import RUN_RECORD, Dataset, Subject, canonical_json, write_atomic
from pipeline.dataset_page import PAGE
from pipeline.stage import MANIFEST, SCHEMA, Level, Stage, Verdict, outputs_digest, section_of, stage_key
from pipeline.summary import CACHE, summaries

SERIES = {"decode": ("frames",), "matte": ("alpha", "foreground", "confidence")}
"""What each stage writes a file a frame of."""
SINGLES = ("neutral.jpg", "figures.json", "result.npz")


FRAMES = 200


def bench(stages: Sequence[Stage], subjects: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Time summaries of a made-up dataset, without and with their caches, and the commands themselves.

    Args:
        stages: in the order in which they run.
        subjects: how many are made, all finished, of 200 frames, four outputs a frame.
        report: takes a line before each part.
    """
    with tempfile.TemporaryDirectory(prefix="headcast-bench-") as folder:
        dataset = Dataset(Path(folder))
        report(f"making {subjects} subjects")
        for number in range(subjects):
            make_finished_subject(dataset.subject(f"subject-{number:06d}"), stages, FRAMES)
        report("timing")
        seconds = {
            "without_caches": _seconds(lambda: summaries(dataset, stages), times=1),
            "with_caches": _seconds(lambda: summaries(dataset, stages)),
            "status": _seconds(lambda: _command("status", folder)),
            "page": _seconds(lambda: _command("page", folder)),
            "nightly": _seconds(lambda: _command("nightly", folder, "--dry-run")),
        }
        standings = {summary.standing for summary in summaries(dataset, stages)}
        assert standings == {"fresh"}, standings
        first = dataset.subjects()[0]
        return {
            "schema": 1,
            "subjects": subjects,
            "outputs": sum(FRAMES * len(SERIES.get(stage.name, ())) + len(SINGLES) for stage in stages),
            "manifest_bytes": sum((first.stage(stage.name) / MANIFEST).stat().st_size for stage in stages),
            "cache_bytes": (first.work / CACHE).stat().st_size,
            "page_bytes": (dataset.root / PAGE).stat().st_size,
            "seconds": {name: wall for name, (wall, _) in seconds.items()},
            "cpu_seconds": {name: cpu for name, (_, cpu) in seconds.items()},
        }


def _command(name: str, folder: str, *options: str) -> None:
    command = [sys.executable, "-m", "pipeline.cli", name, "--data", folder, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def table(document: dict[str, Any]) -> str:
    """The figures of `bench` as text."""
    titles = {
        "without_caches": "summaries without caches",
        "with_caches": "summaries with caches",
        "status": "headcast status",
        "page": f"headcast page, {document['page_bytes'] / 1e6:.1f} MB",
        "nightly": "headcast nightly --dry-run",
    }
    rows = [
        f"{document['subjects']} finished subjects; each {document['outputs']} outputs, "
        f"{document['manifest_bytes'] / 1e3:.0f} kB of manifests, {document['cache_bytes'] / 1e3:.1f} kB of cache"
    ]
    for name, title in titles.items():
        wall, cpu = document["seconds"][name], document["cpu_seconds"][name]
        rows.append(f"{title:<26}{wall:>7.2f} s, {cpu:.2f} s of a core")
    return "\n".join(rows)


def make_finished_subject(subject: Subject, stages: Sequence[Stage], frames: int) -> None:
    """Write the manifests of a subject whose stages are all finished; the outputs they list are not made."""
    config = Config()
    digest = hashlib.sha256(subject.name.encode()).hexdigest()
    for folder in (subject.source, subject.work, *(subject.stage(stage.name) for stage in stages)):
        folder.mkdir(parents=True, exist_ok=True)
    _write(subject.source / "source.json", {"schema": 2, "sha256": digest, "clips": []})
    _write(subject.root / RUN_RECORD, {"schema": 1, "config": config.model_dump(mode="json")})
    digests: dict[str, str] = {}
    for number, stage in enumerate(stages):
        names = [f"{part}/{i:06d}.jpg" for part in SERIES.get(stage.name, ()) for i in range(frames)]
        outputs = [
            {
                "path": name,
                "size": 40_000 + i,
                "sha256": hashlib.sha256(f"{digest}{stage.name}{i}".encode()).hexdigest(),
            }
            for i, name in enumerate([*names, *SINGLES])
        ]
        digests[stage.name] = outputs_digest(outputs)
        inputs = {name: digests[name] for name in stage.inputs} or {"source": digest}
        section = section_of(stage, config)
        level: Level = "fair" if digest[number] in "01" else "good"
        psnr = 28 + int(digest[:4], 16) / 8192
        manifest = {
            "schema": SCHEMA,
            "stage": stage.name,
            "key": stage_key(stage, section, {**inputs, **stage.data(config)}),
            "version": stage.version,
            "headcast": __version__,
            "config": section,
            "preset": config.preset,
            "inputs": {**inputs, **stage.data(config)},
            "outputs": outputs,
            "digest": digests[stage.name],
            "started": f"2026-01-01T00:{number:02d}:00.000+00:00",
            "finished": f"2026-01-01T00:{number:02d}:30.000+00:00",
            "seconds": 30.0,
            "resumed": False,
            "peak_memory_mb": 900.0,
            "machine": {"system": "Linux", "arch": "x86_64", "cores": 2},
            "verdict": asdict(Verdict(level, f"{stage.name.capitalize()}: {level}. {frames} of {frames} frames.")),
            "metrics": {"test": {"psnr": psnr}, "baselines": {"nearest_train_frame": {"psnr": psnr - 3}}},
        }
        _write(subject.stage(stage.name) / MANIFEST, manifest)


def _write(path: Path, value: Any) -> None:
    write_atomic(path, canonical_json(value).encode(), sync=False)


def _seconds(work: Callable[[], object], times: int = 3) -> tuple[float, float]:
    """Wall time and CPU time, children's included, each the least of so many runs."""
    walls, cpus = [], []
    for _ in range(times):
        before = os.times()
        work()
        after = os.times()
        walls.append(after.elapsed - before.elapsed)
        cpus.append(sum(after[:4]) - sum(before[:4]))
    return round(min(walls), 2), round(min(cpus), 2)
