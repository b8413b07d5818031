"""Benchmark of avatar models: each is trained and measured on each clip, beside baselines that need no avatar.

A clip is prepared once, by a run of its own up to the fit. Each row of its table is a subject in the clip's `bench/`
folder that has these stages by links and trains and evaluates for itself, in a process of its own, as a user would
start it. What is finished is not done again. The ablation is the same with other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median_low
from typing import Any, NamedTuple

from pipeline.avatar_table import BEST, REGIONS, difference, gain, number, table_lines
from pipeline.bench_run import timed
from pipeline.compare import BENCH, Lineup, Run, means, measure_baselines, score_frames
from pipeline.config import configure
from pipeline.dataset import Dataset, Subject, read_json, subject_name_for
from pipeline.errors import HeadcastError
from pipeline.source import check_sources

SHARED = ("source", "decode", "track", "matte", "fit")


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
        for place, (name, row) in enumerate(rows.items(), 1):
            report(f"{video.name}, {place} of {len(rows)}: {name}")
            folders[name] = Subject(subject.root / BENCH / subject_name_for(Path(name)))
            clip["rows"].append({"name": name, "settings": row.settings, **_row(video, folders[name], row, options)})
        done = [Run(row["name"], folders[row["name"]]) for row in clip["rows"] if row["error"] is None]
        if done:
            report(f"{video.name}: baselines and picture")
            lineup = Lineup.of(done, threads)
            baselines = {name: means(frames) for name, frames in measure_baselines(lineup).items()}
            path = subject.root / BENCH / f"{picture}.jpg"
            _draw(path, lineup, _metrics(done[0].subject)["per_frame"])
            clip |= {"held_out": len(lineup.test), "baselines": baselines, "picture": path.relative_to(data).as_posix()}
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
    return {
        "error": None,
        **{name: metrics[name] for name in ("resolution", "test", "train")},
        "gain": gain(metrics["test"], metrics["baselines"][BEST]),
        **{name: metrics[name] for name in ("avatar", "speed")},
    }


def _options(settings: Sequence[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def _metrics(subject: Subject) -> dict[str, Any]:
    metrics: dict[str, Any] = read_json(subject.stage("evaluate") / "metrics.json")
    return metrics


def _gains(name: str, first: str, clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the clips that a row finished: its gain over the best training frame, and how far it is from the first."""
    finished = [{row["name"]: row for row in clip["rows"] if row["error"] is None} for clip in clips]
    finished = [rows for rows in finished if name in rows]

    def over(values: Sequence[float | None]) -> dict[str, float] | None:
        known = [value for value in values if value is not None]
        return {"mean": round(mean(known), 3), "min": min(known)} if known else None

    beside = [difference(r[name]["test"]["psnr"], r[first]["test"]["psnr"]) for r in finished if first in r]
    return {
        "clips": len(finished),
        **{region: over([rows[name]["gain"][region] for rows in finished]) for region in REGIONS},
        "beside_first": over(beside),
    }


def _draw(path: Path, lineup: Lineup, per_frame: Mapping[str, Any]) -> None:
    """Write truth and renders, side by side, of the held-out frame that is of middling likeness in the first row."""
    from pipeline.compare_page import panels
    from pipeline.evaluation_figures import titled
    from pipeline.frames import save_image

    scores = dict(zip(per_frame["psnr"], per_frame["frame"], strict=True))
    (scored,) = score_frames(lineup, None, [scores[median_low(scores)]])
    save_image(path, titled(panels(scored)), quality=90)


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
            number(gains[key] and gains[key][kind], "+.2f")
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
    rows = clip["rows"] or [{"name": "preparation", "error": clip["error"]}]
    return table_lines(f"{clip['clip']} ({', '.join(about)})", rows, clip["baselines"])
