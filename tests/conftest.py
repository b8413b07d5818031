"""Shared fixtures: real clips where they are, and a cache of assets that is shared by the whole session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.threads import one_blas_thread

# As the command does: on busy cores a second thread only waits.
one_blas_thread()


@pytest.fixture(scope="session")
def clips() -> Path:
    """Folder of the real test clips, named by HEADCAST_CLIPS."""
    folder = os.environ.get("HEADCAST_CLIPS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("HEADCAST_CLIPS names no folder of test clips")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none, and what is slow unless asked for, and say so."""
    for item in items:
        if item.get_closest_marker("slow") and not os.environ.get("HEADCAST_SLOW"):
            item.add_marker(pytest.mark.skip(reason="slow: set HEADCAST_SLOW=1 to run it"))
        if item.get_closest_marker("gpu") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())
