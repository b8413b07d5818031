"""Benchmark of what orchestration costs, with stages that do next to nothing (`stages/noop.py`) in real processes.

Stages' own time is taken off by the same stages without Prefect. Subjects that only stand in the dataset are made up
(`pipeline.bench_status`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.bench_faults import Site, until
from pipeline.bench_status import FRAMES, make_finished_subject
from pipeline.dataset import Dataset, Subject
from pipeline.errors import StageError
from pipeline.nightly import NightlyRequest, plan
from pipeline.stage import Stage, read_manifest

ROUNDS = 3
BATCH = 20
WORKERS = 2


def bench(stages: Sequence[Stage], counts: Sequence[int], report: Callable[[str], None]) -> dict[str, Any]:
    """Measure.

    Args:
        stages: in order.
        counts: how many finished subjects the datasets hold that `status` and the nightly's decision are timed on.
        report: takes a line before each part.

    Raises:
        StageError: a command fails.
    """
    names = [stage.name for stage in stages]
    with tempfile.TemporaryDirectory(prefix="headcast-orchestration-") as folder:
        standing = [_standing(Path(folder, str(count)), stages, count, report) for count in counts]
        site = Site(Path(folder), names)
        try:
            report("a flow's stages without Prefect and on the embedded server")
            overhead = {"none": _per_stage(site, "none", None), "embedded": _per_stage(site, "embedded", None)}
            report(f"a batch of {BATCH}")
            batch = {"threads": _batch(site)}
            with site.service(0.0, "--limit", str(WORKERS)) as (service, url):
                report("a flow's stages on a running server")
                overhead["server"] = _per_stage(site, "server", url)
                report(f"{BATCH} submitted subjects")
                batch["service"] = _submitted(site, service)
            report("a killed worker")
            picked_up = _pick_up(site)
        finally:
            site.end_all()
    return {
        "schema": 1,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "milliseconds_per_stage": overhead,
        "standing": standing,
        "batch_seconds": batch,
        "pick_up_seconds": picked_up,
    }


def _per_stage(site: Site, name: str, server: str | None) -> float:
    """Milliseconds from the end of one stage to the end of the next in one run, the least of some runs."""
    best = float("inf")
    for number in range(ROUNDS):
        subject = site.subject(f"{name}-{number}")
        _succeed(site, site.start(site.run(subject.name, None, name != "none"), 0.0, server))
        ends = [datetime.fromisoformat((read_manifest(subject.stage(s)) or {})["finished"]) for s in site.stages]
        best = min(best, (ends[-1] - ends[0]).total_seconds() / (len(ends) - 1))
    return round(1000 * best, 1)


def _succeed(site: Site, process: subprocess.Popen[bytes]) -> None:
    if site.wait(process) != 0:
        raise StageError("A command of the bench fails.", f"its log: {site.log()}")


def _clips(site: Site, name: str) -> Path:
    """A folder with the clips of so many subjects."""
    folder = site.clip.with_name(name)
    folder.mkdir()
    for number in range(BATCH):
        clip = folder / f"{name}-{number:02d}.mp4"
        shutil.copy(site.clip, clip)
        with open(clip, "ab") as file:  # the same clip under two names would be one
            file.write(b"\0" * (number + 1))
    return folder


def _batch(site: Site) -> float:
    """Seconds of `headcast batch` on so many new subjects, start included."""
    options = [str(_clips(site, "batch")), "--data", str(site.data), "--no-check", "--workers", str(WORKERS)]
    started = time.monotonic()
    _succeed(site, site.start(["-m", "pipeline.cli", "batch", *options], 0.0))
    return round(time.monotonic() - started, 1)


def _submitted(site: Site, service: subprocess.Popen[bytes]) -> float:
    """Seconds from the submission of so many new subjects until the service has finished all."""
    clips, last = _clips(site, "submitted"), site.stages[-1]
    started = time.monotonic()
    options = ["--batch", str(clips), "--no-check", "--data", str(site.data)]
    _succeed(site, site.start(["-m", "pipeline.cli", "submit", *options], 0.0))
    subjects = [site.subject(clip.stem) for clip in clips.iterdir()]
    until(site, service, lambda: all(read_manifest(subject.stage(last)) for subject in subjects))
    return round(time.monotonic() - started, 1)


def _pick_up(site: Site) -> float:
    """Seconds from the death of a worker and its run until the subject gets on."""
    subject, pace = site.subject("picked-up"), 2.0
    with site.service(pace) as (service, _):
        options = ["--subject", subject.name, "--no-check", "--data", str(site.data)]
        _succeed(site, site.start(["-m", "pipeline.cli", "submit", str(site.clip), *options], pace))
        until(site, service, lambda: _finished(site, subject) >= 1)
        before = _finished(site, subject)
        site.kill(lambda command: not any(word in command for word in (" server start", " serve ")))
        killed = time.monotonic()
        until(site, service, lambda: _finished(site, subject) > before)
    return round(time.monotonic() - killed - pace, 1)


def _finished(site: Site, subject: Subject) -> int:
    return sum(read_manifest(subject.stage(stage)) is not None for stage in site.stages)


def _standing(folder: Path, stages: Sequence[Stage], count: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of `headcast status` and of the nightly's decision on so many finished subjects, caches made before."""
    report(f"making {count} subjects")
    dataset = Dataset(folder)
    for number in range(count):
        make_finished_subject(dataset.subject(f"subject-{number:06d}"), stages, FRAMES)
    request = NightlyRequest(data=folder)
    report(f"status and nightly of {count} subjects")
    cold = _seconds(lambda: plan(request, stages))
    nightly = min(_seconds(lambda: plan(request, stages)) for _ in range(ROUNDS))
    assert not plan(request, stages).candidates, "all of them are finished"
    command = [sys.executable, "-m", "pipeline.cli", "status", "--data", str(folder)]
    status = min(
        _seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)) for _ in range(ROUNDS)
    )
    shutil.rmtree(folder)
    return {
        "subjects": count,
        "nightly_first": round(cold, 2),
        "nightly": round(nightly, 2),
        "status": round(status, 2),
    }


def _seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def table(document: dict[str, Any]) -> str:
    """The figures as Markdown."""
    ms, batch = document["milliseconds_per_stage"], document["batch_seconds"]
    lines = [
        "| what | figure |",
        "|---|---|",
        f"| from a stage's end to the next one's, without Prefect | {ms['none']:.0f} ms |",
        f"| the same in a flow, embedded server | {ms['embedded']:.0f} ms |",
        f"| the same in a flow, running server | {ms['server']:.0f} ms |",
        f"| overhead per stage, running server | {ms['server'] - ms['none']:.0f} ms |",
        f"| batch of {BATCH}, {WORKERS} at a time, start included | {batch['threads']:.0f} s |",
        f"| {BATCH} submitted to a service, {WORKERS} at a time | {batch['service']:.0f} s |",
        f"| killed worker: its subject gets on after | {document['pick_up_seconds']:.0f} s |",
    ]
    for row in document["standing"]:
        lines.append(
            f"| {row['subjects']} finished subjects: status, nightly decides (the first time) "
            f"| {row['status']:.1f} s, {row['nightly']:.1f} s ({row['nightly_first']:.1f} s) |"
        )
    lines.append(f"\n{document['cores']} cores, load {document['load']}.")
    return "\n".join(lines)
