"""Track from another tracker's file: a dump of our own landmarks gives our own track, a take its coefficients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.assets import ensure_assets
from pipeline.config import Config, TrackConfig
from pipeline.dataset import Dataset, Subject, read_json, sha256_file
from pipeline.exports.csv_table import write_live_link
from pipeline.heads import EXPRESSIONS
from pipeline.interchange.tracking import check_tracking, kind_of
from pipeline.run import RunRequest, carry_out
from stages import decode, track

STAGES = [decode.STAGE, track.STAGE]
SPAN = ("decode.start_seconds=0", "decode.end_seconds=1", "track.smooth_seconds=0")


@pytest.fixture(scope="module")
def own(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A second of a real clip, tracked as any."""
    ensure_assets(track.STAGE.assets(Config()))
    return carried_out(tmp_path_factory.mktemp("own"), clips / "d0.mp4")


def carried_out(data: Path, video: Path, tracking: Path | None = None, *settings: str) -> Subject:
    if tracking is not None:
        check_tracking(tracking, [video])
    carry(data, video, tracking, *settings)
    return Dataset(data).existing("ada")


def carry(data: Path, video: Path, tracking: Path | None, *settings: str) -> list[str]:
    from pipeline.progress import SilentReporter

    request = RunRequest(
        data=data, subject="ada", videos=(video,), tracking=tracking, settings=(*SPAN, *settings), last="track"
    )
    return carry_out(request, STAGES, SilentReporter())


def arrays_of(subject: Subject) -> dict[str, Any]:
    with np.load(subject.stage("track") / "track.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("pixels", [False, True])
def test_a_dump_of_our_own_track_gives_it_again(own: Subject, clips: Path, tmp_path: Path, pixels: bool) -> None:
    arrays, about = arrays_of(own), read_json(own.stage("decode") / "frames.json")
    width, height = about["clips"][0]["source_size"]
    matrices = arrays["Ts_cam_face"].astype(float)
    matrices[:, 1:3] *= -1
    matrices[:, :3, 3] *= 100
    points = arrays["landmarks_raw"].astype(float) / (1 if pixels else (width, height, width))
    items = [
        {
            "index": frame["source_frame"],
            "landmarks": points[i].tolist(),
            # Without them, both are what is seen in the frames.
            **({} if pixels else {"facial_transformation_matrix": matrices[i].tolist()}),
            **(
                {}
                if pixels
                else {"blendshapes": dict(zip(EXPRESSIONS, arrays["blendshapes"][i].tolist(), strict=True))}
            ),
        }
        for i, frame in enumerate(about["frames"])
    ]
    dump = tmp_path / "dump.json"
    dump.write_text(json.dumps(items))
    again = carried_out(tmp_path / "data", clips / "d0.mp4", dump)
    for name, value in arrays_of(again).items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value, arrays[name], atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(value, arrays[name], err_msg=name)
    entry = read_json(again.source / "source.json")["tracking"]
    assert (entry["kind"], entry["name"], entry["sha256"]) == ("mediapipe", "dump.json", sha256_file(dump))
    assert carry(tmp_path / "data", clips / "d0.mp4", dump) == []  # fresh
    (again.source / entry["file"]).unlink()
    assert carry(tmp_path / "data", clips / "d0.mp4", dump) == []  # given again


def test_a_takes_coefficients_are_the_scores(own: Subject, clips: Path, tmp_path: Path) -> None:
    arrays, times = arrays_of(own), [f["time"] for f in read_json(own.stage("decode") / "frames.json")["frames"]]
    values = arrays["blendshapes"].astype(float)
    table = write_live_link(tmp_path / "take.csv", EXPRESSIONS, values, times=np.array(times))
    assert kind_of(table) == "livelink"
    taken = carried_out(tmp_path / "data", clips / "d0.mp4", table, "track.offset_seconds=0.08")
    found = arrays_of(taken)
    np.testing.assert_array_equal(found["landmarks_raw"], arrays["landmarks_raw"])
    np.testing.assert_allclose(found["blendshapes"][2:], values[:-2], atol=2e-3)
    np.testing.assert_array_equal(found["blendshapes"][:2], arrays["blendshapes"][:2])
    text = read_json(taken.stage("track") / "stage.json")["verdict"]["text"]
    assert "Coefficients are those of 'take.csv': it begins 0.080 s after the video (as told)" in text


def test_subjects_without_such_a_file_keep_their_keys() -> None:
    plain = TrackConfig().keyed()
    assert not {"given", "offset_seconds"} & set(plain)
    assert plain.keys() < TrackConfig(given="0" * 64).keyed().keys()


def test_it_can_be_left_out_again(own: Subject, clips: Path, tmp_path: Path) -> None:
    arrays = arrays_of(own)
    np.savez(tmp_path / "a.npz", landmarks=arrays["landmarks_raw"], time=np.arange(len(arrays["boxes"])) / 25)
    subject = carried_out(tmp_path / "data", clips / "d0.mp4", tmp_path / "a.npz")
    assert carry(tmp_path / "data", clips / "d0.mp4", None) == ["track"]
    assert "given" not in read_json(subject.stage("track") / "stage.json")["metrics"]
