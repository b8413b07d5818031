"""report.html: everything about a subject on one page that opens offline and asks nothing of the network.

It reads the manifests and files that are there, so a run that stopped half way has a report too. Whatever comes from
files is escaped by the template; pictures are decoded and encoded anew, so that only pictures get in.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipeline import __version__, tensorboard
from pipeline.advice import advise, stage_arrays
from pipeline.charts import Chart, Level, Line, Mark, chart
from pipeline.config import Config, differences
from pipeline.dataset import Subject, write_atomic
from pipeline.expressions import basis_of, is_arkit
from pipeline.frames import shown_file
from pipeline.limits import PARTS, limits
from pipeline.products import ACCOUNT
from pipeline.stage import Stage, State, inspect_stages

if TYPE_CHECKING:
    import jinja2

    from pipeline.coverage import Coverage, Range

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
CURVES = {
    "nearest_train_frame": ("Best training frame (knows the answer)", 2, False),
    "nearest_by_parameters": ("Nearest training frame by expression and pose", 3, True),
}
"""Baseline -> its label, colour and whether it is dashed, beside the avatar in the chart of held-out frames."""
GROUPS = {
    "Mouth": ("mouth",),
    "Eyes": ("eye",),
    "Jaw, brows, cheeks and nose": ("jaw", "brow", "cheek", "nose", "tongue"),
}
"""Coefficients by what their names begin with."""
LIVELIEST, IN_A_CHART = 24, 8
"""So many of a dataset's own coefficients are shown, those with the widest ranges, and so many in a chart."""
EXPORTED = "exported"
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
    coverage = _coverage(subject, metrics)
    finished = {state.stage: state.manifest for state in states if state.manifest}
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
        "limits": limits(metrics, finished, coverage) if metrics else None,
        "training": _training_charts(subject, finished.get("train", {}), metrics),
        "tensorboard": (subject.root / tensorboard.FOLDER).is_dir(),
        "held_out": _held_out_chart(metrics) if metrics else None,
        "shown": _shown(subject, metrics, coverage) if metrics else [],
        "mean_error": _picture(subject.stage("evaluate"), "mean_error.jpg", "Where on the face the mean error lies"),
        "parts": _parts(metrics) if metrics else [],
        "coverage": coverage,
        "expressions": _by_group(coverage) if coverage else {},
        "own_basis": basis_of(coverage.names) if coverage and not is_arkit(coverage.names) else "",
        "poses": _pose_charts(coverage) if coverage else [],
        "speed": _speed(finished, metrics),
        "sizes": _sizes(subject),
        "fitted": _fitted(subject),
        "novel_views": _novel_views(subject, states),
        "advice": advise(subject, finished) if "track" in finished else None,
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
        "imported": _imported(subject),
        "commands": _commands(subject, states),
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
    if not all(isinstance(record.get(name), dict) for name in wanted):
        return None
    rows = record.get("per_frame")
    lists = [rows.get(name) for name in ("frame", "psnr")] if isinstance(rows, dict) else []
    sound = [values for values in lists if isinstance(values, list) and all(_plain(v) is not None for v in values)]
    if len(sound) != 2 or len(sound[0]) != len(sound[1]):
        rows = {"frame": [], "psnr": []}
    return {**record, "per_frame": rows}


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


def _coverage(subject: Subject, metrics: dict[str, Any] | None) -> Coverage | None:
    """What the clip shows; None before it is evaluated, or where the fit does not tell."""
    from pipeline.coverage import Coverage

    if metrics is None:
        return None
    try:
        return Coverage.of(stage_arrays(subject, "fit", "fit.npz"), metrics["split"])
    except (KeyError, TypeError, ValueError):
        return None


def _training_charts(subject: Subject, manifest: dict[str, Any], metrics: dict[str, Any] | None) -> list[Chart]:
    """PSNR and loss by step from `log.json`; none where it is not there or damaged."""
    log = _read(subject.stage("train") / "log.json")
    rows = [row for row in log if isinstance(row, dict)] if isinstance(log, list) else []

    def points(name: str) -> list[tuple[float, float | None]]:
        return [(row["step"], _plain(row.get(name))) for row in rows if _plain(row.get("step")) is not None]

    lines = [Line("Training frames", points("psnr_train"), 1), Line("Frames kept back at first", points("psnr_val"), 2)]
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    test = _plain(metrics["test"].get("psnr")) if metrics else None
    levels = [Level(test, f"held-out frames {test:.1f}")] if test is not None else []
    about = "PSNR on a few training frames rises with the steps"
    if rows and (last := _plain(rows[-1].get("psnr_train"))) is not None:
        about += f" to {last:.1f} dB"
    about += f"; held-out frames reach {test:.1f} dB." if test is not None else "."
    share = _plain((manifest.get("config") or {}).get("coarse_share"))
    coarse = f" The first {share:.0%} of the steps are at half the resolution." if share else ""
    found = [
        chart("PSNR by training step", about, lines, "step", "PSNR in dB", levels=levels),
        chart(
            "Loss by training step",
            f"The mean over the steps since the point before.{coarse}",
            [Line("Loss", points("loss"), 3)],
            "step",
            "loss",
            up=(0, 0),
        ),
    ]
    return [one for one in found if one is not None]


def _held_out_chart(metrics: dict[str, Any]) -> Chart | None:
    """PSNR of every held-out frame, whole and head, beside the training frames that stand in."""
    rows = metrics["per_frame"]
    scores = dict(zip(rows["frame"], rows["psnr"], strict=True))

    def points(values: Any) -> list[tuple[float, float | None]]:
        known = values if isinstance(values, list) else []
        return [(frame, _plain(y)) for frame, y in zip(scores, known, strict=False)]

    lines = [Line("Avatar, whole crop", list(scores.items()), 1)]
    lines.append(Line("Avatar, head", points(rows.get("psnr_head")), 4))
    others = rows.get("baselines") if isinstance(rows.get("baselines"), dict) else {}
    for name, (label, colour, dashed) in CURVES.items():
        lines.append(Line(label, points((others.get(name) or {}).get("psnr")), colour, dashed))
    worst = [entry["frame"] for entry in _told(metrics) if entry["kind"] == "worst"]
    marks = [
        Mark(frame, scores[frame], f"{frame:.0f}") for frame in worst or sorted(scores, key=scores.__getitem__)[:1]
    ]
    about = f"The worst is frame {marks[0].text} with {marks[0].y:.1f} dB." if marks else ""
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    return chart("PSNR of every held-out frame", about, lines, "frame", "PSNR in dB", marks=marks)


def _told(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The frames that tell most, as the evaluation chose them, with what of their entries is sound."""
    listed = metrics.get("shown")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    known = metrics["per_frame"]["frame"]
    return [entry for entry in entries if entry.get("frame") in known and entry.get("kind") in ("worst", "typical")]


def _shown(subject: Subject, metrics: dict[str, Any], coverage: Coverage | None) -> list[dict[str, Any]]:
    """Truth, render and error of the frames that tell most, and what they have that training lacked."""
    distances = {}
    if coverage is not None:
        pairs = zip(*coverage.novelty(), strict=True)
        distances = dict(zip(coverage.test.tolist(), pairs, strict=True))
    rows, found = metrics["per_frame"], []
    scores = dict(zip(rows["frame"], rows["psnr"], strict=True))
    for entry in _told(metrics):
        frame = entry["frame"]
        alt = f"Frame {frame}: truth, render, and where they differ"
        media = _picture(subject.stage("evaluate"), shown_file(frame), alt)
        if media is not None:
            distance, nearest = distances.get(frame, (None, None))
            lacking = coverage.lacking(frame) if coverage is not None and frame in distances else []
            found.append(
                {**entry, "media": media, "psnr": scores.get(frame), "distance": distance, "nearest": nearest}
                | {"lacking": lacking}
            )
    return found


def _parts(metrics: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Parts of the picture with their shares of the squared error and of the area, most error first."""
    parts = metrics.get("error_parts")
    if not isinstance(parts, dict):
        return []
    names = {**{part: name.removeprefix("the ") for part, (name, _) in PARTS.items()}, "background": "background"}
    known = [
        (names[part], _plain(of.get("error")), _plain(of.get("area")))
        for part, of in parts.items()
        if part in names and isinstance(of, dict)
    ]
    rows = [(name, error, area) for name, error, area in known if error is not None and area is not None]
    return sorted(rows, key=lambda row: -row[1])


def _by_group(coverage: Coverage) -> dict[str, list[Range]]:
    """What was seen of every coefficient, by part of the face."""
    ranges = coverage.ranges()
    groups = {title: [found for found in ranges if found.name.startswith(begin)] for title, begin in GROUPS.items()}
    own = [found for found in ranges if "/" in found.name]
    liveliest = sorted(own, key=lambda found: found.train[0] - found.train[1])[:LIVELIEST]
    for basis in dict.fromkeys(found.name.partition("/")[0] for found in liveliest):
        rows = [found for found in liveliest if found.name.startswith(f"{basis}/")]
        for first in range(0, len(rows), IN_A_CHART):
            groups[basis if first == 0 else f"{basis}, from the {first + 1}th"] = rows[first : first + IN_A_CHART]
    return groups


def _pose_charts(coverage: Coverage) -> list[Chart]:
    """Where head and eyes turned, in training and in the held-out frames."""
    charts = []
    kinds = (
        ("Where the head turned", "yaw", "pitch", (-30.0, 30.0), (-20.0, 20.0)),
        ("Where the eyes turned in the head", "gaze yaw", "gaze pitch", (-20.0, 20.0), (-15.0, 15.0)),
    )
    for title, turn, nod, across, up in kinds:
        # As in the picture: the subject's left at the right, down below.
        x, y = coverage.angles[turn], coverage.angles[nod]
        clouds = [
            Line(label, list(zip(x[frames].tolist(), y[frames].tolist(), strict=True)), colour, dots=True)
            for label, frames, colour in (("Training frames", coverage.train, 1), ("Held-out frames", coverage.test, 2))
        ]
        about = f"In training: {coverage.span(turn)}, {coverage.span(nod)}."
        axes = "degrees to the subject's right (−) and left (+)", "degrees up (−) and down (+)"
        charts.append(chart(title, about, clouds, *axes, across=across, up=up, turned=True))
    return [one for one in charts if one is not None]


def _speed(manifests: dict[str, dict[str, Any]], metrics: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Rates that were measured, as figure and what it is of."""
    trained = manifests.get("train", {}).get("metrics") or {}
    baked = (manifests.get("export", {}).get("metrics") or {}).get("baked") or {}
    per_second = _plain(trained.get("steps_per_second"))
    rates = [
        (_plain(metrics["speed"].get("render_fps")) if metrics else None, "/ s", "frames rendered, by evaluate"),
        (1000 / per_second if per_second else None, "ms", "a training step"),
    ]
    both = baked.get("render_fps")
    if isinstance(both, dict) and (full := _plain(both.get("full"))) is not None:
        rates.append((_plain(both.get("baked")), "/ s", f"by the baked avatar; the full one beside it {full:.0f}"))
    return [(f"{value:.0f} {unit}", what) for value, unit, what in rates if value is not None]


def _sizes(subject: Subject) -> list[tuple[str, str, int]]:
    """What there is to give away: (what, link, bytes) of files and of folders that were exported."""
    places = {
        "Avatar": ("export/avatar.safetensors", "export/avatar.json"),
        "Baked avatar": ("export/baked/avatar.safetensors", "export/baked/avatar.json"),
        "PLY at rest": ("export/avatar.ply",),
    }
    found = []
    for title, names in places.items():
        paths = [subject.root / name for name in names]
        if all(path.is_file() for path in paths):
            found.append((title, names[0], sum(path.stat().st_size for path in paths)))
    folder = subject.root / EXPORTED
    for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []:
        if path.is_dir() and (path / ACCOUNT).is_file():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != ACCOUNT)
            found.append((f"Export {path.name}", f"{EXPORTED}/{quote(path.name, safe='')}/", size))
    return found


def _plain(value: Any) -> float | None:
    """A finite number as it is; None for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if plain else None


def _clips(subject: Subject) -> list[dict[str, Any]]:
    """The clips that `source.json` names."""
    record = _read(subject.source / "source.json")
    clips = record.get("clips") if isinstance(record, dict) else None
    return [clip for clip in clips if isinstance(clip, dict)] if isinstance(clips, list) else []


def _imported(subject: Subject) -> dict[str, Any]:
    """Where the subject was imported from, as `source.json` tells; empty where it was filmed."""
    record = _read(subject.source / "source.json")
    told = record.get("imported") if isinstance(record, dict) else None
    return told if isinstance(told, dict) else {}


def _commands(subject: Subject, states: Sequence[State]) -> list[tuple[str, str]]:
    """What can be done with a finished avatar, and what to type for it; empty before there is one."""
    if not any(state.stage == "export" and state.manifest for state in states):
        return []
    return [(what, shlex.join(["headcast", *words])) for what, words in next_steps(subject).items()]


def next_steps(subject: Subject) -> dict[str, list[str]]:
    """What people do with a finished avatar: the words behind `headcast`."""
    name, data = subject.name, [] if subject.root.parent == Path("data") else ["--data", str(subject.root.parent)]
    return {
        "Look at it and drive it": ["view", name, *data],
        "Take it along, for any browser": ["export", name, "--to", "web", *data],
        "Have somebody drive it": ["reenact", "--avatar", name, "--drive", "VIDEO_OR_CSV", *data],
        "Film it from other sides": ["render", name, *data],
    }


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
