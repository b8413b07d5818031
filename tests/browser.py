"""Pages in Chromium (`pipeline.chromium`) for tests, which are skipped where there is none.

with browser.serve(folder) as url, browser.chromium(tmp_path / "profile") as opened:
    with opened.visit(url + "index.html") as visit:
        visit.page.click("#play")
    browser.check_clean(visit)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline.chromium
from pipeline.chromium import CHROMIUM, Chromium, Visit, serve

__all__ = ["Chromium", "check_clean", "chromium", "serve"]


@contextlib.contextmanager
def chromium(profile: Path, *, camera: Path | None = None) -> Iterator[Chromium]:
    """Chromium; skips the test, with the reason, where there is none."""
    if not CHROMIUM.is_file():
        pytest.skip(f"no {CHROMIUM} here to open pages with")
    pytest.importorskip("playwright", reason="no playwright here to open pages with")
    with pipeline.chromium.chromium(profile, camera=camera) as opened:
        yield opened


def check_clean(visit: Visit) -> None:
    """Fail where the page complained or reached outside."""
    assert visit.errors == []
    assert visit.outside == []
