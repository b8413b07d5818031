"""report.html: everything about a subject on one page that opens offline and asks nothing of the network.

It reads the manifests and files that are there, so a run that stopped half way has a report too. Whatever comes from
files is escaped by the template; pictures are decoded and encoded anew, so that only pictures get in.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipeline import __version__
from pipeline.advice import Advice, advise
from pipeline.config import Config, differences
from pipeline.dataset import Subject, write_atomic
from pipeline.stage import Stage, State, inspect_stages

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"
METRICS_SCHEMA = 1
VIDEO_LIMIT_BYTES = 3_000_000
PICTURE_WIDTH_PX, PLOT_WIDTH_PX = 1280, 1440
PICTURE_QUALITY = 82
LIBRARIES = ("torch", "numpy", "numba", "mediapipe", "rembg", "anny", "av")
RIVALS = {
    "nearest_train_frame": ("Best training frame", "picked by looking at the answer"),
    "nearest_by_parameters": ("Nearest training frame", "by expression and pose"),
    "mean_frame": ("Mean training frame", ""),
}
REGIONS = {"psnr": "Whole crop", "psnr_subject": "Subject", "psnr_head": "Head", "psnr_torso": "Torso"}
_VERDICT_OPENING = re.compile(r"^[A-Z][\w ]{0,30}: (good|fair|poor)\. ")


@dataclass(frozen=True)
class Media:
    """A picture or video inside the page."""

    kind: str
    """`image` or `video`."""
    uri: str
    alt: str


@dataclass(frozen=True)
class StageView:
    """What the page shows of a stage."""

    name: str
    description: str
    badge: str
    """`good`, `fair`, `poor`, or the state of a stage that is not done."""
    text: str
    note: str
    """Why its files are not those of the present settings; empty where they are."""
    fix: str
    media: Media | None
    seconds: float | None
    peak_memory_mb: float | None
    resumed: bool
    files: tuple[tuple[str, str, int], ...]
    """(name, link, bytes) of the files that are not one of a series."""
    file_count: int
    size: int


def build_report(subject: Subject, stages: Sequence[Stage], config: Config) -> Path:
    """Write the subject's report.html in one piece and return its path.

    Args:
        subject: whose report.
        stages: in order; those that are not done are shown as such.
        config: the settings that the report is about.
    """
    page = page_environment().get_template("report.html").render(**_contents(subject, stages, config))
    write_atomic(subject.report, page.encode())
    return subject.report


def page_environment() -> jinja2.Environment:
    """Templates in which whatever is filled in is escaped, with filters for figures."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": bytes_text, "seconds": seconds_text, "figure": figure_text, "lead": lead_text}
    return environment


def bytes_text(size: float) -> str:
    """`812 B`, `35 kB`, `2.4 MB`."""
    if size < 1000:
        return f"{size:.0f} B"
    return f"{size / 1000:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def seconds_text(seconds: float | None) -> str:
    """`0.4 s`, `48 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def figure_text(value: Any, digits: int = 1) -> str:
    """A number with so many digits, or a dash where there is none."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "–"


def lead_text(difference: float) -> str:
    """A difference with its sign, `+1.4` or `−0.6`, zero without."""
    rounded = round(difference, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def _contents(subject: Subject, stages: Sequence[Stage], config: Config) -> dict[str, Any]:
    """What the template is filled with."""
    states = inspect_stages(subject, stages, config)
    views = [_view(subject, stage, state) for stage, state in zip(stages, states, strict=True)]
    metrics = _evaluation(subject)
    times = [view.seconds for view in views if view.seconds is not None]
    peaks = [view.peak_memory_mb for view in views if view.peak_memory_mb is not None]
    manifests = [state.manifest for state in states if state.manifest]
    return {
        "subject": subject.name,
        "headline": _headline(subject, views),
        "hero": _hero(subject, views),
        "stages": views,
        "metrics": metrics,
        "comparison": _comparison(metrics) if metrics else [],
        "regions": REGIONS,
        "curves": _picture(subject.stage("evaluate"), "curves.png", "PSNR of every held-out frame, and of training"),
        "fitted": _fitted(subject),
        "novel_views": _novel_views(subject, states),
        "advice": _advice(subject, states),
        "total_seconds": sum(times) if times else None,
        "longest_seconds": max(times, default=0.0),
        "peak_memory_mb": max(peaks, default=None),
        "machine": manifests[-1].get("machine") if manifests else None,
        "preset": config.preset,
        "differences": [
            (name, json.dumps(preset), json.dumps(value)) for name, (preset, value) in differences(config).items()
        ],
        "versions": [("headcast", __version__), *_library_versions()],
        "clips": _clips(subject),
        "finished": max((str(manifest.get("finished", "")) for manifest in manifests), default=""),
    }


def _view(subject: Subject, stage: Stage, state: State) -> StageView:
    manifest = state.manifest or {}
    verdict = manifest.get("verdict") or {}
    text, badge, note, fix = str(verdict.get("text", "")), str(verdict.get("level", "")), "", ""
    if state.name == "failed":
        text, fix, badge = state.why, state.fix, "failed"
        note = "The files shown are of an earlier run." if manifest else ""
    elif state.name in ("partial", "running"):
        text, badge = "Begun and not finished. What is done is kept; the same command goes on from there.", "unfinished"
    elif not manifest:
        text, badge = "Not run yet.", "missing"
    elif state.name != "fresh":
        note = f"Of an earlier run: {state.why}."
    folder = subject.stage(stage.name)
    outputs = manifest.get("outputs") or []
    singles = [entry for entry in outputs if "/" not in str(entry["path"])]
    return StageView(
        name=stage.name,
        description=stage.description,
        badge=badge if badge in ("good", "fair", "poor", "failed", "unfinished") else "missing",
        text=_VERDICT_OPENING.sub("", text),
        note=note,
        fix=fix,
        media=_picture(folder, str(verdict.get("picture", "")), f"{stage.name}: picture of the result"),
        seconds=manifest.get("seconds"),
        peak_memory_mb=manifest.get("peak_memory_mb"),
        resumed=bool(manifest.get("resumed")),
        files=tuple(
            (str(entry["path"]), f"{stage.name}/{quote(str(entry['path']), safe='')}", int(entry["size"]))
            for entry in singles
        ),
        file_count=len(outputs),
        size=sum(int(entry["size"]) for entry in outputs),
    )


def _headline(subject: Subject, views: Sequence[StageView]) -> tuple[str, str]:
    """Badge and sentence for the whole subject."""
    for view in views:
        if view.badge == "failed":
            return "failed", f"Stopped at {view.name}. {view.text}" + (f" What to do: {view.fix}." if view.fix else "")
    undone = [view.name for view in views if view.badge in ("missing", "unfinished")]
    done = [view for view in views if view.badge in ("good", "fair", "poor")]
    if undone:
        at = f"Finished as far as {done[-1].name}" if done else "Nothing is finished yet"
        return "unfinished", f"{at}; go on with: headcast rerun {subject.name} --from {undone[0]}"
    told = {view.name: view for view in views}
    last = told.get("evaluate", views[-1])
    return last.badge, last.text


def _hero(subject: Subject, views: Sequence[StageView]) -> Media | None:
    """The comparison as a video where it is small enough, else the best picture there is."""
    folder, alt = subject.stage("evaluate"), "Truth, render and error side by side"
    if not (folder / "comparison.mp4").is_file():
        # No evaluation yet: the stages' pictures say how far it came.
        return next((view.media for view in reversed(views) if view.media), None)
    return _video(folder / "comparison.mp4", alt) or _picture(folder, "comparison.jpg", alt)


def _fitted(subject: Subject) -> list[tuple[str, Media]]:
    """Heading and picture of what a person judges the fit by, as far as it is there."""
    folder = subject.stage("fit")
    media = (
        ("Fitted head and detected landmarks", _video(folder / "overlay.mp4", "The fitted head over the clip")),
        ("Neutral head", _picture(folder, "neutral.jpg", "The neutral head from the front and from the side")),
        ("Over time", _picture(folder, "curves.png", "Expression, pose, gaze and landmark error of every frame")),
    )
    return [(title, item) for title, item in media if item is not None]


def _novel_views(subject: Subject, states: Sequence[State]) -> tuple[Media, str] | None:
    """The strip of views that the clip never had, and in words from where the clip saw the head."""
    manifest = next((state.manifest for state in states if state.stage == "export"), None) or {}
    told = manifest.get("metrics", {}).get("seen_from")
    strip = _picture(subject.stage("export"), "novel_views.jpg", "The avatar from the sides, above and below")
    return (strip, str(told["text"])) if strip and told else None


def _video(path: Path, alt: str) -> Media | None:
    """A video small enough for a page; None where it is not, or not there."""
    try:
        fits = 0 < path.stat().st_size <= VIDEO_LIMIT_BYTES
        return Media("video", data_uri("video/mp4", path.read_bytes()), alt) if fits else None
    except OSError:
        return None


def _picture(folder: Path, name: str, alt: str) -> Media | None:
    """A picture of a stage's folder, at a size fit for a page; None where it is no picture or lies elsewhere."""
    path = folder / name
    if not name or not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        return None
    import cv2
    import numpy as np

    data = np.fromfile(path, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        return None
    plot = path.suffix == ".png"
    scale = (PLOT_WIDTH_PX if plot else PICTURE_WIDTH_PX) / image.shape[1]
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    if plot:
        _, encoded = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    else:
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, PICTURE_QUALITY])
    return Media("image", data_uri("image/png" if plot else "image/jpeg", encoded.tobytes()), alt)


def data_uri(kind: str, data: bytes) -> str:
    """Bytes of a MIME type as an address that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _evaluation(subject: Subject) -> dict[str, Any] | None:
    """`metrics.json`, where it is there and has what the page shows."""
    record = _read(subject.stage("evaluate") / "metrics.json")
    wanted = ("split", "counts", "test", "train", "baselines", "avatar", "speed")
    if not isinstance(record, dict) or record.get("schema") != METRICS_SCHEMA:
        return None
    return record if all(isinstance(record.get(name), dict) for name in wanted) else None


def _comparison(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: the avatar and its rivals, with their differences from the avatar."""
    ours = metrics["test"]
    rows = [{"title": "This avatar", "note": "", "ours": True, "cells": [(ours.get(name), None) for name in REGIONS]}]
    for key, (title, note) in RIVALS.items():
        theirs = metrics["baselines"].get(key) or {}
        cells = [
            (theirs.get(name), ours[name] - theirs[name] if None not in (ours.get(name), theirs.get(name)) else None)
            for name in REGIONS
        ]
        rows.append({"title": title, "note": note, "ours": False, "cells": cells})
    return rows


def _advice(subject: Subject, states: Sequence[State]) -> list[Advice] | None:
    """What to film differently; None before anything is known about the frames."""
    manifests = {state.stage: state.manifest for state in states if state.manifest}
    return advise(subject, manifests) if "track" in manifests else None


def _clips(subject: Subject) -> list[dict[str, Any]]:
    """The clips that `source.json` names."""
    record = _read(subject.source / "source.json")
    clips = record.get("clips") if isinstance(record, dict) else None
    return [clip for clip in clips if isinstance(clip, dict)] if isinstance(clips, list) else []


def _library_versions() -> list[tuple[str, str]]:
    """The libraries that results rest on, as installed where this page was written."""
    found = []
    for name in LIBRARIES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read(path: Path) -> Any:
    """A JSON file's contents; None where it is missing or damaged, which a report has to live with."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
