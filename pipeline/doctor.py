"""Everything the stages will need, checked before any work, with the command that mends what is missing."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from pipeline.errors import HeadcastError
from pipeline.finding import Finding, Level, worst

# Distributions whose version matters, and the one that constraints.txt pins.
_PINNED = {
    "torch": "2.13.0",
    "mediapipe": "0.10.33",
    "prefect": "3.8.8",
    "rembg": "2.0.86",
    "numba": "0.68.1",
    "onnxruntime": "1.23.2",
}
_MEMORY_GB = 3.0
_DISK_GB = 2.0


def examine(data: Path, needed: Collection[str], videos: Sequence[Path] = ()) -> list[Finding]:
    """Look at the machine, the installation, the `needed` assets, the data folder, and one subject's videos if named.

    What is said of the videos comes last, and the verdict on them at its end.
    """
    findings = [
        *_packages(),
        *_system_libraries(),
        *_machine(),
        *_assets(needed),
        *_head_models(),
        _webcam(),
        _rasteriser(),
        _data_folder(data),
    ]
    return [*findings, *_videos(videos)] if videos else findings


def _packages() -> Iterator[Finding]:
    for name, pinned in _PINNED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("blocked", f"{name} is not installed", "make setup")
            continue
        if version.partition("+")[0] == pinned:
            yield Finding("fine", f"{name} {version}")
        else:
            yield Finding("degraded", f"{name} {version}; headcast is tested with {pinned}", "make setup")
    fastapi = importlib.metadata.version("fastapi")
    if tuple(int(part) for part in fastapi.split(".")[:2]) >= (0, 151):
        yield Finding("blocked", f"fastapi {fastapi} breaks Prefect's embedded server", "pip install 'fastapi<0.151'")


def _system_libraries() -> Iterator[Finding]:
    for library, package in (("libEGL.so.1", "libegl1"), ("libGLESv2.so.2", "libgles2")):
        try:
            ctypes.CDLL(library)
        except OSError:
            yield Finding("blocked", f"{library} is missing; the tracker needs it", f"sudo apt-get install {package}")
        else:
            yield Finding("fine", f"{library} is there")


def _machine() -> Iterator[Finding]:
    from pipeline.run import usable_cores

    cores = usable_cores()
    yield Finding("fine" if cores > 1 else "degraded", f"{cores} CPU core{'s' if cores > 1 else ''}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    level: Level = "fine" if memory >= _MEMORY_GB else "degraded"
    yield Finding(level, f"{memory:.1f} GB of memory (a run needs about {_MEMORY_GB:.0f})")
    import torch

    if torch.cuda.is_available():
        yield Finding("fine", f"GPU: {torch.cuda.get_device_name(0)}")
    else:
        yield Finding("fine", "no CUDA device: training runs on the CPU, which presets quick and standard are made for")


def _assets(needed: Collection[str]) -> Iterator[Finding]:
    from pipeline.assets import list_assets

    for asset in list_assets():
        if asset["name"] not in needed:
            continue
        if asset["state"] == "ready":
            yield Finding("fine", f"asset {asset['name']} is there, its hash is right")
        elif asset["state"] == "missing":
            yield Finding(
                "degraded",
                f"asset {asset['name']} is not on this machine; it is fetched at first need",
                f"headcast assets fetch {asset['name']}",
            )
        else:
            yield Finding(
                "blocked",
                f"asset {asset['name']} has wrong bytes: '{asset['path']}'",
                f"delete that file, then run: headcast assets fetch {asset['name']}",
            )


def _head_models() -> Iterator[Finding]:
    """The embedded head model, and those that need a file of the user's."""
    from pipeline.heads import list_heads, load_head

    try:
        head = load_head("anny")
    except (HeadcastError, OSError, ValueError) as error:
        yield Finding("blocked", f"the head model cannot be loaded: {error}", "make setup")
    else:
        yield Finding("fine", f"head model {head.name} {head.version}: {len(head.template)} vertices")
    for known in list_heads():
        named = f"head model {known['name']} ({known['about']})"
        if known["state"] == "ready":
            yield Finding("fine", f"{named} is there: '{known['path']}'")
        else:
            fix = f"if you want it: {known['page']}, to '{known['path']}' ({known['licence']})"
            yield Finding("fine", f"{named} is not there; nothing needs it", fix)


def _webcam() -> Finding:
    """What lets an exported player be driven from a webcam; no stage needs it."""
    from pipeline.assets import VISION_FILES, asset_state, find_asset

    if all(asset_state(find_asset(name)) == "ready" for name in VISION_FILES):
        return Finding("fine", "MediaPipe for browsers is there, for the webcam of exported players")
    fix = f"headcast assets fetch {VISION_FILES[0]}" if shutil.which("npm") else "install npm, if you want it"
    return Finding("fine", "MediaPipe for browsers is not there; only the webcam of exported players needs it", fix)


def _rasteriser() -> Finding:
    import torch

    from pipeline.rasterize import rasterize

    points = torch.tensor([[0.0, 0.0, 1.0]])
    K = torch.tensor([[32.0, 0.0, 16.0], [0.0, 32.0, 16.0], [0.0, 0.0, 1.0]])
    quats, scales = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.full((1, 3), 0.1)
    one = rasterize(points, quats, scales, torch.ones(1), torch.ones(1, 3), torch.eye(4), K, 32, 32, backend="cpu")
    if float(one.alpha.max()) < 0.9:
        return Finding("blocked", "the CPU rasteriser draws nothing", "make setup, then report this")
    return Finding("fine", "the CPU rasteriser works")


def _data_folder(data: Path) -> Finding:
    folder = data
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    fix = "make it writable or choose another with --data"
    if not folder.is_dir():
        return Finding("blocked", f"the data folder '{data}' cannot be made: '{folder}' is no folder", fix)
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("blocked", f"the data folder '{data}' cannot be written: {error.strerror}", fix)
    free = shutil.disk_usage(folder).free / 1e9
    if free < _DISK_GB:
        return Finding("degraded", f"{free:.1f} GB free for the data folder '{data}'", "free some space")
    return Finding("fine", f"the data folder '{data}' can be written, {free:.0f} GB free")


def _videos(videos: Sequence[Path]) -> Iterator[Finding]:
    from pipeline.capture_check import capture_verdict, check_captures

    found: list[Finding] = []
    try:
        for finding in check_captures(videos):
            found.append(finding)
            yield finding
    except HeadcastError as error:
        yield Finding("blocked", error.what, error.fix)
        return
    what = f"{'these videos are' if len(videos) > 1 else 'this video is'} {capture_verdict(found)}"
    yield Finding(worst(found), what)
