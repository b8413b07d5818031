"""DATA/index.html and DATA/metrics.prom: how all subjects stand, for people and for Prometheus.

The page opens offline, asks nothing of the network and links to the subjects' own files by relative paths, so that it
moves with the dataset. Whatever comes from files is escaped by the template; the one script is named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.dataset import Dataset, write_atomic
from pipeline.prometheus import prometheus_text
from pipeline.report import TEMPLATES, page_environment
from pipeline.stage import Stage
from pipeline.summary import STANDINGS, Summary, mending_command, summaries

PAGE = "index.html"
METRICS = "metrics.prom"
URGENCY = ("failed", "unreadable", "running", "partial", "stale", "missing", "fresh")
"""The order in which subjects stand at first."""


def write_dataset_page(dataset: Dataset, stages: Sequence[Stage]) -> Path:
    """Write the page and the metrics of a dataset, each in one piece, and return the page's path.

    Args:
        dataset: whose folder exists.
        stages: in the order in which they run.

    Raises:
        OSError: the dataset's folder cannot be written.
    """
    told = summaries(dataset, stages)
    write_atomic(dataset.root / METRICS, prometheus_text(told).encode())
    script = (TEMPLATES / "dataset.js").read_text()
    page = (
        page_environment()
        .get_template("dataset.html")
        .render(
            **_contents(dataset, told),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    write_atomic(dataset.root / PAGE, page.encode())
    return dataset.root / PAGE


def _contents(dataset: Dataset, told: Sequence[Summary]) -> dict[str, Any]:
    """What the template is filled with."""
    figures = [summary.psnr for summary in told if summary.psnr is not None]
    counts = {name: sum(summary.standing == name for summary in told) for name in STANDINGS}
    return {
        "name": dataset.root.resolve().name,
        "version": __version__,
        "written": datetime.now(UTC),
        "subjects": [
            {"told": summary, "command": mending_command(summary, dataset.root)}
            for summary in sorted(told, key=lambda summary: URGENCY.index(summary.standing))
        ],
        "counts": {name: count for name, count in counts.items() if count},
        "median_psnr": statistics.median(figures) if figures else None,
        "evaluated": len(figures),
        "bytes": sum(summary.bytes for summary in told),
        "seconds": sum(summary.seconds for summary in told),
    }
