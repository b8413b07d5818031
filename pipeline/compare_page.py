"""What a comparison shows: the video, stills with heat maps, and compare.html, which opens offline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median_low
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import __version__
from pipeline.avatar_table import BASELINES, BEST, LIKENESS, REGIONS
from pipeline.charts import Chart, Line, chart
from pipeline.compare import Scored, score_frames
from pipeline.dataset import write_atomic
from pipeline.evaluation_figures import ERROR_TITLE, FLIP_FULL_SCALE, heat_map, titled
from pipeline.frames import save_image
from pipeline.report import VIDEO_LIMIT_BYTES, Media, data_uri, page_environment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.clip import Clip
    from pipeline.compare import Lineup

PAGE = "compare.html"
VIDEO = "compare.mp4"
BEST_COLOUR = 7
"""Of the page's colours, after those of the runs."""


def panels(scored: Scored) -> dict[str, NDArray[np.uint8]]:
    """Truth and renders [R,R,3] of a frame by their titles, which tell each run's PSNR."""
    told = {name: f"{name}, {figures['psnr']:.1f} dB" for name, figures in scored.figures.items()}
    return {f"frame {scored.frame}": scored.truth, **{told[name]: image for name, image in scored.renders.items()}}


def write_video_of(frames: Iterator[Scored], path: Path, clip: Clip) -> None:
    """Write truth and renders of frames side by side, as fast as the clip runs."""
    from pipeline.video import write_video

    write_video(path, (titled(panels(scored)) for scored in frames), 1 / float(np.median(np.diff(clip.times))))


def telling_frames(per_frame: Mapping[str, Any]) -> dict[int, str]:
    """Frames worth a look, and why: the worst of all runs, the one they differ most in, and a typical one."""
    frames = per_frame["frame"]
    columns = list(zip(*(figures["psnr"] for figures in per_frame["runs"].values()), strict=True))
    means = [mean(column) for column in columns]
    spreads = [max(column) - min(column) for column in columns]
    found = {
        "the worst frame": means.index(min(means)),
        "where the runs differ most": spreads.index(max(spreads)),
        "a typical frame": means.index(median_low(means)),
    }
    told: dict[int, str] = {}
    for why, place in found.items():
        known = told.get(frames[place])
        told[frames[place]] = f"{known}, {why}" if known else why
    return told


def write_stills(folder: Path, lineup: Lineup, per_frame: Mapping[str, Any]) -> dict[str, str]:
    """Write renders over their heat maps for the telling frames; returns the files' names and titles."""
    told, stills = telling_frames(per_frame), {}
    for scored in score_frames(lineup, None, list(told)):
        name = f"frame-{scored.frame:06d}.jpg"
        save_image(folder / name, still(scored), quality=88)
        stills[name] = f"Frame {scored.frame}: {told[scored.frame]}"
    return stills


def psnr_chart(per_frame: Mapping[str, Any]) -> Chart | None:
    """Every run's PSNR over the held-out frames, and that of the best training frame."""
    frames = per_frame["frame"]
    curves = [(name, figures["psnr"]) for name, figures in per_frame["runs"].items()]
    lines = [
        Line(name, list(zip(frames, values, strict=True)), colour) for colour, (name, values) in enumerate(curves, 1)
    ]
    best = list(zip(frames, per_frame["baselines"][BEST]["psnr"], strict=True))
    lines.append(Line(BASELINES[BEST], best, BEST_COLOUR, dashed=True))
    about = "Every held-out frame; the best training frame was picked by looking at the answer."
    return chart("PSNR frame by frame", about, lines, "frame", "PSNR (dB)")


def still(scored: Scored) -> NDArray[np.uint8]:
    """Truth and renders of a frame, below them the colours' scale and each run's FLIP."""
    ramp = np.linspace(0, FLIP_FULL_SCALE, len(scored.truth), dtype=np.float32)
    scale = heat_map(np.tile(ramp, (len(ramp), 1)))
    errors = {f"{name}, FLIP {flip.mean():.3f}": heat_map(flip) for name, flip in scored.flips.items()}
    return np.concatenate([titled(panels(scored)), titled({ERROR_TITLE: scale, **errors})])


def write_page(folder: Path, document: Mapping[str, Any], stills: Mapping[str, str]) -> None:
    """Write compare.html in one piece; whatever names say is escaped.

    Args:
        folder: with the video and the stills.
        document: the contents of compare.json.
        stills: file name -> title.
    """
    video = folder / VIDEO
    small = video.stat().st_size <= VIDEO_LIMIT_BYTES
    figures = [name for name in LIKENESS if any(row["test"].get(name) is not None for row in document["runs"])]
    page = (
        page_environment()
        .get_template("compare.html")
        .render(
            **document,
            names=[row["name"] for row in document["runs"]],
            regions=REGIONS,
            likeness={name: LIKENESS[name] for name in figures},
            baseline_titles=BASELINES,
            leads=_leads(document),
            settings_rows=_settings_rows(document["settings"]),
            video=Media("video", data_uri("video/mp4", video.read_bytes()), "Truth and every run") if small else None,
            video_file=VIDEO,
            stills=[
                (title, Media("image", data_uri("image/jpeg", (folder / name).read_bytes()), title))
                for name, title in stills.items()
            ],
            curves=psnr_chart(document["per_frame"]),
            version=__version__,
        )
    )
    write_atomic(folder / PAGE, page.encode())


def _leads(document: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(other run, region's title, difference) of the best run above the others."""
    return [
        (name, REGIONS[region], found)
        for name, beside in document["beside_best"].items()
        for region, found in beside.items()
    ]


def _settings_rows(settings: Mapping[str, Sequence[Any]]) -> list[tuple[str, list[str]]]:
    return [(name, [json.dumps(value) for value in values]) for name, values in settings.items()]
