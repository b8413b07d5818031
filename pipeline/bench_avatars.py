"""Benchmark of avatar models: each is trained and measured on each clip, beside baselines that need no avatar.

A clip is prepared once, by a run of its own up to the fit. Each row of its table is a subject in the clip's `bench/`
folder that has these stages by links and trains and evaluates for itself, in a process of its own, as a user would
start it. What is finished is not done again. The ablation is the same with other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median_low
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.bench_run import timed
from pipeline.config import configure
from pipeline.dataset import Dataset, Subject, read_json, subject_name_for
from pipeline.errors import HeadcastError
from pipeline.source import check_sources

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FOLDER = "bench"
SHARED = ("source", "decode", "track", "matte", "fit")
REGIONS = {"psnr": "whole crop", "psnr_subject": "subject", "psnr_head": "head"}
BEST = "nearest_train_frame"
BASELINES = {BEST: "best training frame", "nearest_by_parameters": "nearest by parameters", "mean_frame": "mean frame"}


class Row(NamedTuple):
    """What is trained: an avatar model with changes to its preset."""

    avatar: str
    settings: tuple[str, ...] = ()
    """Each `section.field=value`."""


ABLATION = {
    "gaussianhead": Row("gaussianhead"),
    "no derivation": Row("gaussianhead", ("train.gaussianhead.derivations=0",)),
    "no deformation field": Row("gaussianhead", ("train.gaussianhead.field_layers=0",)),
    "no tri-plane": Row("gaussianhead", ("train.gaussianhead.plane_size=0",)),
    "random start": Row("gaussianhead", ("train.gaussianhead.start=random",)),
    "no rig": Row("gaussianhead", ("train.gaussianhead.rig=false",)),
}
"""What the parts of the paper's model are worth: each left out by itself."""


def bench(
    videos: Sequence[Path],
    rows: Mapping[str, Row],
    picture: str,
    preset: str,
    data: Path,
    settings: Sequence[str] = (),
    *,
    threads: int = 1,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train and measure every row on every clip; what fails is told in its place and stops nothing else.

    Args:
        videos: the clips, one avatar each.
        rows: what to train, by name.
        picture: name, without suffix, of each clip's picture: truth and renders of one held-out frame.
        preset: the budget.
        data: the dataset directory; clips that are prepared there already are not prepared again.
        settings: changes to the preset for the clips' preparation and for every row.
        threads: for the baselines and the picture.
        report: is told what comes next.

    Raises:
        UserError: a clip is missing, is no video, or comes twice; a model or a setting is none.
    """
    check_sources(videos)
    for row in rows.values():
        configure(preset, [f"train.avatar={row.avatar}", *settings, *row.settings])
    clips: list[dict[str, Any]] = []
    for video in videos:
        report(f"Preparing {video.name}")
        options = ["--preset", preset, "--no-check", "--json", *_options(settings)]
        subject = Dataset(data).subject(subject_name_for(video))
        clip: dict[str, Any] = {"clip": video.name, "error": None, "baselines": {}, "rows": [], "picture": None}
        clips.append(clip)
        try:
            timed(["run", str(video), "--data", str(data), "--to", SHARED[-1], *options])
        except HeadcastError as error:
            clip["error"] = {"what": error.what, "fix": error.fix}
            continue
        folders = {}
        for number, (name, row) in enumerate(rows.items(), 1):
            report(f"{video.name}, {number} of {len(rows)}: {name}")
            folders[name] = Subject(subject.root / FOLDER / subject_name_for(Path(name)))
            clip["rows"].append({"name": name, "settings": row.settings, **_row(video, folders[name], row, options)})
        done = [row for row in clip["rows"] if row["error"] is None]
        if done:
            report(f"{video.name}: baselines and picture")
            clip |= _baselines(folders[done[0]["name"]], threads)
            path = subject.root / FOLDER / f"{picture}.jpg"
            _draw(path, {row["name"]: folders[row["name"]] for row in done}, threads)
            clip["picture"] = path.relative_to(data).as_posix()
    complete = all(each["error"] is None for clip in clips for each in (clip, *clip["rows"]))
    document = {"schema": 1, "preset": preset, "settings": list(settings), "complete": complete, "clips": clips}
    return {**document, "gains": {name: _gains(name, next(iter(rows)), clips) for name in rows}}


def _row(video: Path, subject: Subject, row: Row, options: Sequence[str]) -> dict[str, Any]:
    """Bring a row's subject up to date and collect what its stages say, or why it failed."""
    subject.root.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        link = subject.stage(name)
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", name))
    place = ["--data", str(subject.root.parent), "--subject", subject.name]
    command = ["run", str(video), *place, "--to", "evaluate", "--avatar", row.avatar, *options]
    try:
        timed([*command, *_options(row.settings)])
    except HeadcastError as error:
        return {"error": {"what": error.what, "fix": error.fix}}
    metrics = _metrics(subject)
    best = metrics["baselines"][BEST]
    return {
        "error": None,
        **{name: metrics[name] for name in ("resolution", "test", "train")},
        "gain": {name: _difference(metrics["test"][name], best[name]) for name in REGIONS},
        **{name: metrics[name] for name in ("avatar", "speed")},
    }


def _options(settings: Sequence[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def _metrics(subject: Subject) -> dict[str, Any]:
    metrics: dict[str, Any] = read_json(subject.stage("evaluate") / "metrics.json")
    return metrics


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else round(value - other, 3)


def _gains(name: str, first: str, clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the clips that a row finished: its gain over the best training frame, and how far it is from the first."""
    finished = [{row["name"]: row for row in clip["rows"] if row["error"] is None} for clip in clips]
    finished = [rows for rows in finished if name in rows]

    def over(values: Sequence[float | None]) -> dict[str, float] | None:
        known = [value for value in values if value is not None]
        return {"mean": round(mean(known), 3), "min": min(known)} if known else None

    beside = [_difference(r[name]["test"]["psnr"], r[first]["test"]["psnr"]) for r in finished if first in r]
    return {
        "clips": len(finished),
        **{region: over([rows[name]["gain"][region] for rows in finished]) for region in REGIONS},
        "beside_first": over(beside),
    }


def _baselines(subject: Subject, threads: int) -> dict[str, Any]:
    """The clip's baselines as evaluation measured them, with SSIM and FLIP of those that are frames of the clip."""
    from pipeline.clip import load_clip, load_crops
    from pipeline.metrics import flip_map, ssim

    metrics = _metrics(subject)
    clip, frames = load_clip(subject, metrics["resolution"][0]), metrics["per_frame"]["frame"]
    truths = load_crops(clip, frames, threads=threads).images
    baselines = {}
    for name, figures in metrics["baselines"].items():
        picks = metrics["per_frame"]["baselines"][name]["frame"]
        similarity, error = [], []
        if None not in picks:
            for truth, pick in zip(truths, load_crops(clip, picks, threads=threads).images, strict=True):
                similarity.append(ssim(truth / 255, pick / 255))
                error.append(float(flip_map(truth / 255, pick / 255).mean()))
        means = {key: round(mean(each), 5) if each else None for key, each in (("ssim", similarity), ("flip", error))}
        baselines[name] = {**figures, **means}
    return {"held_out": len(frames), "baselines": baselines}


def _draw(path: Path, subjects: Mapping[str, Subject], threads: int) -> None:
    """Write truth and renders, side by side, of the held-out frame that is of middling likeness in the first row."""
    import numpy as np

    from pipeline.avatars import load_avatar
    from pipeline.clip import load_clip, load_crops
    from pipeline.evaluation import ClipRenderer
    from pipeline.evaluation_figures import titled
    from pipeline.frames import save_image

    panels: dict[str, NDArray[np.uint8]] = {}
    frame = None
    for name, subject in subjects.items():
        metrics = _metrics(subject)
        clip, scores = load_clip(subject, metrics["resolution"][0]), metrics["per_frame"]["psnr"]
        place = scores.index(median_low(scores)) if frame is None else metrics["per_frame"]["frame"].index(frame)
        if frame is None:
            frame = metrics["per_frame"]["frame"][place]
            panels[f"frame {frame}"] = load_crops(clip, [frame]).images[0]
        image = ClipRenderer.of(load_avatar(subject.stage("train")), clip, threads).render(frame).image
        panels[f"{name}, {scores[place]:.1f} dB"] = (image * 255 + 0.5).astype(np.uint8)
    save_image(path, titled(panels), quality=90)


def table(document: dict[str, Any]) -> str:
    """The figures as Markdown: a table for each clip, and one of the gains over all of them."""
    lines = []
    for clip in document["clips"]:
        lines += [*_clip_lines(clip, document["preset"]), ""]
    first = next(iter(document["gains"]))
    regions = " | ".join(f"{label}: mean | least" for label in REGIONS.values())
    lines += [f"| gain over the best training frame, dB | clips | {regions} | beside {first}: mean | least |"]
    lines += ["|---" * (4 + 2 * len(REGIONS)) + "|"]
    for name, gains in document["gains"].items():
        cells = [
            _number(gains[key] and gains[key][kind], "+.2f")
            for key in (*REGIONS, "beside_first")
            for kind in ("mean", "min")
        ]
        lines.append(f"| {name} | {gains['clips']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _clip_lines(clip: dict[str, Any], preset: str) -> list[str]:
    sizes = {row["resolution"][0] for row in clip["rows"] if row["error"] is None}
    about = [preset, *(f"{size} x {size}" for size in sorted(sizes))]
    if sizes:
        about.append(f"{clip['held_out']} held-out frames")
    regions = " | ".join(f"PSNR {label}" for label in REGIONS.values())
    lines = [
        f"| {clip['clip']} ({', '.join(about)}) | {regions} | SSIM | FLIP "
        "| PSNR training frames | training | Gaussians | on disk | render |",
        "|---" * (len(REGIONS) + 8) + "|",
    ]
    for row in clip["rows"] or [{"name": "preparation", "error": clip["error"]}]:
        if row["error"] is not None:
            lines.append(
                f"| {row['name']} | failed: {row['error']['what'].replace('|', '/')} " + "| " * (len(REGIONS) + 6) + "|"
            )
            continue
        avatar, speed = row["avatar"], row["speed"]
        lines.append(
            f"| {row['name']} {_likeness(row['test'])} | {_number(row['train']['psnr'], '.1f')} "
            f"| {_number(speed['train_seconds'], '.0f')} s | {avatar['gaussians']:,} | {avatar['bytes'] / 1e6:.1f} MB "
            f"| {speed['render_fps']:.0f} / s |"
        )
    lines += [f"| {BASELINES[name]} {_likeness(figures)} | | | | | |" for name, figures in clip["baselines"].items()]
    return lines


def _likeness(figures: dict[str, float | None]) -> str:
    numbers = [
        *(_number(figures[name], ".1f") for name in REGIONS),
        *(_number(figures[n], ".3f") for n in ("ssim", "flip")),
    ]
    return "| " + " | ".join(numbers)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
