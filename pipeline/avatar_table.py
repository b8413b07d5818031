"""The table of avatars beside the baselines, as Markdown: what `bench avatars` and `compare --markdown` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

REGIONS = {"psnr": "whole crop", "psnr_subject": "subject", "psnr_head": "head", "psnr_torso": "torso"}
LIKENESS = {"ssim": ("SSIM", 3), "flip": ("FLIP", 3), "l1": ("L1", 4), "lpips": ("LPIPS", 3)}
"""Title and digits of the other figures."""
BEST = "nearest_train_frame"
BASELINES = {BEST: "best training frame", "nearest_by_parameters": "nearest by parameters", "mean_frame": "mean frame"}
COSTS = ("PSNR training frames", "training", "Gaussians", "on disk", "render")


def gain(test: Mapping[str, float | None], best: Mapping[str, float | None]) -> dict[str, float | None]:
    """By region, how far an avatar's PSNR is above the best training frame's, in dB."""
    return {name: difference(test[name], best[name]) for name in REGIONS}


def difference(value: float | None, other: float | None) -> float | None:
    """One figure less another, where both are known."""
    return None if value is None or other is None else round(value - other, 3)


def table_lines(
    title: str, rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, Mapping[str, float | None]]
) -> list[str]:
    """The table of one clip; a figure that no row has gets no column.

    Args:
        title: stands at the top left.
        rows: `name`, `error` ({what, fix} or None) and, where there is none, `test`, `gain`, `train`, `avatar` and
            `speed` as in the evaluation's `metrics.json`.
        baselines: figures as those in `test`, by the baseline's name.
    """
    tested = [row["test"] for row in rows if row["error"] is None]
    known = [name for name in (*REGIONS, *LIKENESS) if any(test.get(name) is not None for test in tested)]
    titles = [f"PSNR {REGIONS[name]}" if name in REGIONS else LIKENESS[name][0] for name in known]
    columns = [title, *titles, *COSTS]
    lines = [_line(columns), "|---" * len(columns) + "|"]
    for row in rows:
        if row["error"] is not None:
            cells = [f"failed: {row['error']['what']}"]
        else:
            cells = [*_likeness(known, row["test"], row["gain"]), *_costs(row)]
        lines.append(_line([row["name"], *cells], len(columns)))
    for name, figures in baselines.items():
        lines.append(_line([BASELINES[name], *_likeness(known, figures)], len(columns)))
    return lines


def _likeness(
    known: Sequence[str], figures: Mapping[str, float | None], gains: Mapping[str, float | None] | None = None
) -> list[str]:
    cells = []
    for name in known:
        digits = 1 if name in REGIONS else LIKENESS[name][1]
        above = (gains or {}).get(name)
        lead = "" if above is None else f" ({above:+.1f})"
        cells.append(number(figures.get(name), f".{digits}f") + lead)
    return cells


def _costs(row: Mapping[str, Any]) -> list[str]:
    avatar, speed = row["avatar"], row["speed"]
    return [
        number(row["train"]["psnr"], ".1f"),
        f"{number(speed['train_seconds'], '.0f')} s",
        f"{avatar['gaussians']:,}",
        f"{avatar['bytes'] / 1e6:.1f} MB",
        f"{speed['render_fps']:.0f} / s",
    ]


def number(value: float | None, form: str) -> str:
    """A number in this form, or a dash."""
    return "-" if value is None else format(value, form)


def _line(cells: Sequence[str], width: int = 0) -> str:
    """One line; nothing in a cell may end it, or become markup where the table is shown."""
    filled = [*cells, *[""] * (width - len(cells))]
    return "| " + " | ".join(_cell(cell) for cell in filled) + " |"


def _cell(text: str) -> str:
    plain = " ".join(text.split()).replace("|", "/")
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
