"""Charts: every point inside the box, gaps stay gaps, round ticks."""

from __future__ import annotations

import math
import re

import pytest

from pipeline.charts import Level, Line, Mark, chart


def draw(*lines: Line, **how: object):  # type: ignore[no-untyped-def]
    return chart("Title", "What it shows.", lines, "frame", "dB", **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 37.0, 1e6])
@pytest.mark.parametrize("offset", [-5.0, 0.0, 1e3])
def test_every_point_lies_in_the_box_and_ticks_around_it(scale: float, offset: float) -> None:
    values = [offset + scale * math.sin(i) for i in range(30)]
    found = draw(Line("a", list(enumerate(values)), 1), marks=[Mark(3, values[3], "3")], levels=[Level(offset, "mid")])
    left, top, right, bottom = found.box
    places = [tuple(map(float, pair)) for pair in re.findall(r"[ML](\S+) (\S+)", found.paths[0][0])]
    assert len(places) == 30
    assert all(left <= x <= right and top <= y <= bottom for x, y in [*places, found.marks[0][:2]])
    assert 2 <= len(found.y_ticks) <= 8 and len({text for _, text in found.y_ticks}) == len(found.y_ticks)
    heights = [y for y, _ in found.y_ticks]
    assert heights == sorted(heights, reverse=True) and heights[0] == bottom and heights[-1] == top
    # Higher values are drawn higher.
    assert places[values.index(max(values))][1] == min(y for _, y in places)


def test_what_is_missing_leaves_a_gap() -> None:
    found = draw(Line("a", [(0, 1.0), (1, None), (2, 2.0), (3, math.nan), (4, 1.0), (5, 3.0)], 1))
    assert found.paths[0][0].count("M") == 3 and found.paths[0][0].count("L") == 1
    assert draw(Line("a", [(0, None), (1, math.nan)], 1)) is None and draw() is None


def test_one_point_and_equal_values_have_axes_too() -> None:
    for points in ([(5, 30.0)], [(5, 30.0), (6, 30.0)], [(0, 0.0)]):
        found = draw(Line("a", points, 1, dots=True))
        assert len(found.dots) == len(points) and len(found.y_ticks) >= 2


def test_axes_hold_what_they_are_told_to_and_can_be_turned() -> None:
    found = draw(Line("a", [(0, 1.0), (1, 2.0)], 1, dots=True), across=(-30, 30), up=(-20, 20), turned=True)
    assert {"−20", "20"} <= {text for _, text in found.x_ticks} | {text for _, text in found.y_ticks}
    assert found.dots[0][1] < found.dots[1][1]
