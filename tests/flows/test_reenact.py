"""The reenact flow: its parameters are checked at submission, and it does what the request says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from reenact_data import FRAMES, write_dataset

from pipeline.errors import UserError
from pipeline.reenact import ReenactRequest
from pipeline.run import RunRequest


def test_parameters_are_checked_at_submission() -> None:
    from prefect.exceptions import ParameterTypeError

    from flows.reenact import reenact_flow  # sets the quiet environment before Prefect is imported

    request = {"avatar": "anna", "drive": "bert", "last_frame": 3}
    checked = reenact_flow.validate_parameters({"request": request})["request"]
    assert checked == ReenactRequest(avatar="anna", drive="bert", last_frame=3, threads=checked.threads)
    for spoilt, message in (
        ({"avatar": "anna"}, "request.drive: Field required"),
        ({**request, "first_frame": 9}, "first_frame 9 comes after last_frame 3"),
        ({**request, "speed": 25}, "request.speed: Extra inputs are not permitted"),
    ):
        with pytest.raises(ParameterTypeError, match=message):
            reenact_flow.validate_parameters({"request": spoilt})


@pytest.mark.prefect
def test_it_writes_the_video_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    from prefect.testing.utilities import prefect_test_harness

    from flows.reenact import reenact_flow

    data = write_dataset(tmp_path / "data").root
    with prefect_test_harness(server_startup_timeout=180):
        account = reenact_flow(ReenactRequest(data=data, avatar="anna", drive="bert", threads=1))
        video = data / "anna/reenact/bert.mp4"
        assert (account["frames"], account["avatar"], account["drive"]) == (FRAMES, "anna", "bert")
        stamp = video.stat().st_mtime_ns
        assert reenact_flow(ReenactRequest(data=data, avatar="anna", drive="bert", threads=1)) == account
        assert video.stat().st_mtime_ns == stamp
        with pytest.raises(UserError, match="'bert' has no trained avatar"):
            reenact_flow(ReenactRequest(data=data, avatar="bert", drive="anna"))
        # A video becomes a subject by the subject flow, which is tested where it is; here it is done by hand.
        new = Path(shutil.copy(data / "bert/source/bert.mp4", tmp_path / "carl.mp4"))
        asked: list[RunRequest] = []

        def make_subject(run: RunRequest) -> None:
            asked.append(run)
            if run.videos:
                shutil.copytree(data / "bert", run.target().root)

        monkeypatch.setattr("flows.reenact.subject_flow", make_subject)
        account = reenact_flow(ReenactRequest(data=data, avatar="anna", drive=str(new), threads=1, last_frame=2))
        assert (account["drive"], account["video"]) == ("carl", "carl.mp4")
        again = reenact_flow(ReenactRequest(data=data, avatar="anna", drive=str(new), threads=1, last_frame=2))
        assert again == account
        assert [(run.videos, run.subject, run.last) for run in asked] == [((new,), "carl", "fit"), ((), "carl", "fit")]
