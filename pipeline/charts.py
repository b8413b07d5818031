"""Line and dot charts as plain numbers, which `templates/charts.html` writes as SVG in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 40
TICKS = 5

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """One curve, or one cloud of dots."""

    label: str
    points: Sequence[Point]
    """(x, y); None leaves a gap."""
    colour: int
    """Which of the page's colours, from 1: the style sheet has 4, a page may have more."""
    dashed: bool = False
    dots: bool = False
    """Dots alone, without a line."""


@dataclass(frozen=True)
class Mark:
    """A ring around a point, with a word."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Level:
    """A line across the whole chart, with a word."""

    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    """What the template draws; all places in its pixels."""

    title: str
    about: str
    """What the chart shows in words, for those who do not see it."""
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[str, int, bool]]
    """(SVG path, colour, dashed)."""
    dots: list[tuple[float, float, int]]
    marks: list[tuple[float, float, str, bool]]
    """(x, y, text, whether the text stands to the left)."""
    levels: list[tuple[float, str]]
    legend: list[tuple[str, int, bool, bool]]
    """(label, colour, dashed, dots)."""
    width: int = WIDTH
    height: int = HEIGHT
    box: tuple[int, int, int, int] = field(default=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM))


def chart(
    title: str,
    about: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    marks: Sequence[Mark] = (),
    levels: Sequence[Level] = (),
    across: tuple[float, float] | None = None,
    up: tuple[float, float] | None = None,
    turned: bool = False,
) -> Chart | None:
    """A chart whose axes hold every point; None where there is no point.

    Args:
        title, about: its heading, and what it shows in words.
        lines: curves and clouds; points that are not finite are left out.
        x_label, y_label: quantity and unit of the axes.
        marks, levels: points and heights to name.
        across, up: what the horizontal and the vertical axis hold at least.
        turned: the vertical axis rises downwards, as pitch does.
    """
    known = [(x, y) for line in lines for x, y in line.points if y is not None and math.isfinite(x + y)]
    if not known:
        return None
    heights = [y for _, y in known] + [level.y for level in levels] + list(up or ())
    widths = [x for x, _ in known] + list(across or ())
    x_low, x_high = min(widths), max(max(widths), min(widths) + 1e-6)
    x_ticks = [x for x in _ticks(widths) if x_low - 1e-9 <= x <= x_high + 1e-9] or [x_low]
    y_ticks = _ticks(heights)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        high = (y - y_low) / (y_high - y_low)
        down = high if turned else 1 - high
        right = (x - x_low) / (x_high - x_low)
        return round(LEFT + right * (WIDTH - LEFT - RIGHT), 1), round(TOP + down * (HEIGHT - TOP - BOTTOM), 1)

    paths, dots = [], []
    for line in lines:
        if line.dots:
            dots += [(*place(x, y), line.colour) for x, y in line.points if y is not None and math.isfinite(x + y)]
        else:
            paths.append((_path(line.points, place), line.colour, line.dashed))
    return Chart(
        title,
        about,
        x_label,
        y_label,
        [(place(x, y_low)[0], _number(x, x_ticks)) for x in x_ticks],
        [(place(x_low, y)[1], _number(y, y_ticks)) for y in y_ticks],
        paths,
        dots,
        [(*place(m.x, m.y), m.text, place(m.x, m.y)[0] > WIDTH / 2) for m in marks],
        [(place(x_low, level.y)[1], level.text) for level in levels],
        [(line.label, line.colour, line.dashed, line.dots) for line in lines],
    )


def _path(points: Sequence[Point], place: Callable[[float, float], tuple[float, float]]) -> str:
    """An SVG path that is broken where there is no value."""
    parts, down = [], False
    for x, y in points:
        if y is None or not math.isfinite(x + y):
            down = False
            continue
        across, height = place(x, y)
        parts.append(f"{'L' if down else 'M'}{across:g} {height:g}")
        down = True
    return " ".join(parts)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around values, about `TICKS` of them, the outermost beyond the outermost values."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    raw = span / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _number(value: float, ticks: Sequence[float]) -> str:
    """With as many digits as the step has."""
    if len(ticks) < 2:
        return f"{value:g}".replace("-", "−")
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{value + 0.0:.{digits}f}".replace("-", "−")
