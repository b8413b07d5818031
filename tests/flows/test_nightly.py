"""Nights with stages that do next to nothing: budgets, failures and the summary that is posted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.dataset import write_json
from pipeline.nightly import NightlyRequest
from pipeline.run import RunRequest, hold, open_subject, resolve_config
from pipeline.video import write_video
from stages import noop

pytestmark = [pytest.mark.prefect, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home and an embedded server of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("HEADCAST_STAGES", "noop")
        patch.setenv("PYTHONPATH", str(ROOT))
        from prefect.testing.utilities import prefect_test_harness

        import flows.batch
        import flows.nightly
        import flows.subject

        for module in (flows.batch, flows.nightly, flows.subject):
            patch.setattr(module, "STAGES", noop.STAGES)
        with prefect_test_harness(server_startup_timeout=180):
            yield


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset of two people whose source is there and nothing else."""
    for shade, name in ((50, "anna"), (90, "bert")):
        video = tmp_path / f"{name}.mp4"
        write_video(video, [np.full((64, 64, 3), shade, np.uint8)] * 3, 25)
        request = RunRequest(data=tmp_path / "data", videos=(video,))
        subject = request.target()
        with hold(subject):
            open_subject(request, subject, resolve_config(request, subject))
    return tmp_path / "data"


def night(data: Path, monkeypatch: pytest.MonkeyPatch, noop: dict[str, Any], **options: Any) -> dict[str, Any]:
    from flows.nightly import nightly_flow

    monkeypatch.setenv("HEADCAST_NOOP", json.dumps(noop))
    document: dict[str, Any] = nightly_flow(NightlyRequest(data=data, check=False, workers=1, **options))
    return document


def outcomes(document: dict[str, Any]) -> dict[str, str]:
    return {entry["subject"]: entry["outcome"] for entry in document["subjects"]}


def posted() -> str:
    """The newest summary."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["nightly"])))
    return str(max(found, key=lambda artifact: artifact.created).data)


def test_a_night_does_what_waits_and_tells_what_failed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = night(data, monkeypatch, {"fail": {"bert": "track"}}, max_failures=1)
    assert outcomes(document) == {"anna": "done", "bert": "failed"}
    assert posted() == document["summary"]
    assert "- bert: failed in track: No face in any of 12 frames. -\\> film the face" in posted()
    assert (data / "index.html").is_file(), "the dataset's page shows it"
    document = night(data, monkeypatch, {})
    assert outcomes(document) == {"bert": "done"}, "what is fresh is passed over"


def test_what_does_not_fit_into_the_budget_is_not_begun(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcomes(night(data, monkeypatch, {})) == {"anna": "done", "bert": "done"}
    for name, seconds in (("anna", 7000.0), ("bert", 1.0)):
        manifest = data / name / "train" / "stage.json"
        changes = {"key": "0" * 64, "version": 0, "seconds": seconds}
        write_json(manifest, json.loads(manifest.read_bytes()) | changes)
    document = night(data, monkeypatch, {}, budget_hours=1.0)
    assert outcomes(document) == {"bert": "done"}, "the next one that fits takes the place"
    (left,) = document["left"]
    assert left["subject"] == "anna"
    assert left["why"].startswith("takes about 700")
    assert left["why"].endswith(" s of the budget were left")
    assert not document["interrupted"]


def test_a_hard_budget_stops_what_is_at_work(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"seconds": 300, "steps": 3000}
    document = night(data, monkeypatch, slow, budget_hours=8 / 3600, hard=True)
    assert set(outcomes(document).values()) == {"stopped"}
    assert not document["interrupted"], "that was as planned"
    assert "stopped; it goes on where it was" in document["summary"]
    assert outcomes(night(data, monkeypatch, {})) == {"anna": "done", "bert": "done"}
