"""Which runs a batch means, what is refused before anything starts, and the account of how it went."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.batch import (
    SHOWN_FAULTS,
    BatchRequest,
    Outcome,
    batch_document,
    exit_code,
    outcomes_in,
    read_batch,
    table,
    tally,
)
from pipeline.errors import UserError
from pipeline.run import RunRequest, resolve_config
from pipeline.video import write_video


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes small videos, each of another shade, below the working directory."""
    monkeypatch.chdir(tmp_path)
    shades = iter(range(20, 250))

    def make(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, [np.full((64, 64, 3), next(shades), np.uint8)] * 3, 25)
        return path

    return make


def read(*what: object, **options: object) -> dict[str, RunRequest]:
    """The runs of a batch by subject, in order."""
    request = BatchRequest(what=tuple(map(str, what)), **options)  # type: ignore[arg-type]
    return {run.target().name: run for run in read_batch(request)}


def refusal(*what: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        read(*what, **options)
    assert not Path("data").exists(), "nothing is made for a batch that is refused"
    return str(caught.value)


def csv(text: str | bytes, name: str = "people.csv") -> Path:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def names(run: RunRequest) -> list[str]:
    return [path.name for path in run.videos]


def test_each_video_and_each_folder_in_a_folder_is_a_subject(clip: Callable[..., Path]) -> None:
    for name in ("take 10.mp4", "take 2.MOV", "dora/10.mp4", "dora/9.mp4", ".hidden.mp4", ".cache/x.mp4"):
        clip(f"shots/{name}")
    Path("shots/notes.txt").write_text("not a video")
    Path("shots/emil").mkdir()
    for number in range(3):
        cv2.imwrite(f"shots/emil/{number}.png", np.full((64, 64, 3), 9, np.uint8))
    runs = read("shots")
    assert {name: names(run) for name, run in runs.items()} == {
        "dora": ["9.mp4", "10.mp4"],
        "emil": ["emil"],
        "take-2": ["take 2.MOV"],
        "take-10": ["take 10.mp4"],
    }
    assert list(runs) == ["dora", "emil", "take-2", "take-10"]
    assert all(path.is_absolute() for run in runs.values() for path in (run.data, *run.videos))


def test_the_dataset_is_no_subject_where_it_lies_among_the_videos(clip: Callable[..., Path]) -> None:
    clip("anna.mp4")
    clip("data/bert/source/00.mp4")
    assert list(read(".")) == ["anna"]


def test_a_pattern_is_read_like_a_folder_and_several_things_are_joined(clip: Callable[..., Path]) -> None:
    for name in ("a/anna.mp4", "b/bert.mp4", "b/carl/1.mp4", "b/carl/2.mp4"):
        clip(name)
    clip("odd.mp4").rename("odd name.dat")
    assert list(read("[ab]/*.mp4")) == ["anna", "bert"]
    assert {name: names(run) for name, run in read("b/*").items()} == {"bert": ["bert.mp4"], "carl": ["1.mp4", "2.mp4"]}
    assert list(read("a", "odd name.dat")) == ["anna", "odd-name"], "a file that is named may be called anything"


def test_a_table_says_what_is_special_of_each(clip: Callable[..., Path]) -> None:
    for name in ("anna 1", "anna 2", "bert"):
        clip(f"in/{name}.mp4")
    path = csv(
        "\ufeffvideo, subject,preset,person,avatar,head,settings\r\n"
        '"anna 1.mp4; anna 2.mp4",anna,best,2,gaussianhead,gnm,train.steps=7;decode.max_fps=10\r\n'
        "\r\n"
        "bert.mp4,,,,,\r\n",
        "in/people.csv",
    )
    runs = read(path, settings=("train.steps=5", "fit.focal_prior=2"), workers=2, threads=1)
    anna, bert = (resolve_config(run, run.target()) for run in runs.values())
    assert list(runs) == ["anna", "bert"]
    assert names(runs["anna"]) == ["anna 1.mp4", "anna 2.mp4"]
    assert (anna.preset, anna.track.person, anna.train.avatar, anna.fit.head) == ("best", 2, "gaussianhead", "gnm")
    assert (anna.train.steps, anna.decode.max_fps, anna.fit.focal_prior) == (7, 10, 2)
    assert (bert.preset, bert.track.person, bert.train.avatar, bert.train.steps) == ("quick", None, "rigged", 5)
    assert {run.threads for run in runs.values()} == {1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the table is empty"),
        (b"\xef\xbb\xbf\n", "the table is empty"),
        (b"video\n", "there is no row below the header"),
        (b"video,colour\nanna.mp4,red\n", "there is no column 'colour'"),
        (b"video;subject\nanna.mp4;anna\n", "separated by commas"),
        (b"subject\nanna\n", "there is no column 'video'"),
        (b"video,video\nanna.mp4,anna.mp4\n", "a column comes twice"),
        (b"video\nanna.mp4\nb\xe4rbel.mp4\n", "row 3 is not UTF-8"),
        ("video\nanna.mp4\n".encode("utf-16"), "is not UTF-8"),
        (b"video\nan\0na.mp4\n", "row 2: There is no file"),
        (b'video\n"anna.mp4\n', "cannot be read as CSV after row 1"),
        (b"video,subject\nanna.mp4,anna,x\n", "row 2: there are more fields than columns"),
        (b"video,subject\n,anna\n", "row 2: no video is named"),
        (b"video\ngone.mp4\n", "row 2: There is no file"),
        (b"video\nno-video.mp4\n", "row 2: "),
        (b"video,preset\nanna.mp4,fast\n", "row 2: 'fast' cannot be the preset"),
        (b"video,subject\nanna.mp4,../x\n", "row 2: '../x' cannot be a subject name"),
        (b"video,person\nanna.mp4,first\n", "row 2: Setting track.person='first' does not fit"),
        (b"video,settings\nanna.mp4,train.stpes=3\n", "no field 'stpes'"),
        (b"video,avatar\nanna.mp4,cube\n", "row 2: Setting train.avatar='cube' does not fit"),
        (b"video,like\nanna.mp4,gone.jpg\n", "gone.jpg' cannot be read"),
        (b"video,alpha\nanna.mp4,a;b\n", "--alpha is given 2 times for 1 clip"),
        (
            b"video,subject\nanna.mp4,anna\nbert.mp4,anna\n",
            "row 3: subject 'anna' is named before, by people.csv row 2",
        ),
        (b"video\nanna.mp4\nsub/anna.mp4\n", "row 3: subject 'anna' is named before"),
        (b"video\nanna.mp4;anna.mp4\n", "is given twice"),
    ],
)
def test_a_table_with_faults_is_refused(clip: Callable[..., Path], content: bytes, message: str) -> None:
    for name in ("anna", "bert", "sub/anna"):
        clip(f"{name}.mp4")
    Path("no-video.mp4").write_text("text\n" * 99)
    said = refusal(csv(content))
    assert message in said
    assert "nothing was started" in said


def test_all_faults_are_told_at_once(clip: Callable[..., Path]) -> None:
    clip("anna.mp4")
    clip("twice/anna.mov")
    Path("empty").mkdir()
    Path("hollow/bert").mkdir(parents=True)
    Path("text.mp4").write_text("text")
    said = refusal("anna.mp4", "twice", "empty", "hollow", "gone.mp4", "*.xyz", "text.mp4")
    assert said.startswith("6 subjects of the batch cannot be used:\n")
    for part in (
        "anna.mov: subject 'anna' is named before, by anna.mp4",
        "empty: there is no video in it",
        "hollow/bert: there is neither a video nor an image",
        "gone.mp4: There is no file",
        "*.xyz: there is no video in it",
        "text.mp4",
    ):
        assert part in said
    rows = "".join(f"gone-{number}.mp4\n" for number in range(2, 27))
    said = refusal(csv("video\n" + rows))
    assert said.startswith("25 subjects")
    assert "gone-21.mp4" in said
    assert "gone-22.mp4" not in said
    assert f"and {25 - SHOWN_FAULTS} more" in said


def test_a_request_is_refused_as_it_is_submitted() -> None:
    for fields, message in (
        ({"what": ()}, "at least 1 item"),
        ({"what": ("x",), "workers": 0}, "greater than or equal to 1"),
        ({"what": ("x",), "cluster": "tcp://h:1"}, "threads have no cluster"),
        ({"what": ("x",), "runner": "slurm"}, "'threads', 'dask' or 'ray'"),
        ({"what": ("x",), "stage_minutes": 0}, "greater than 0"),
        ({"what": ("x",), "colour": 1}, "Extra inputs are not permitted"),
    ):
        with pytest.raises(ValidationError, match=message):
            BatchRequest.model_validate(fields)
    whole = BatchRequest(what=("a", "b"), runner="dask", cluster="tcp://h:1", workers=3)
    assert BatchRequest.model_validate_json(whole.model_dump_json()) == whole
    assert all(field["description"] for field in BatchRequest.model_json_schema()["properties"].values())


def test_a_runner_that_is_not_installed_names_the_extra(
    clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    clip("anna.mp4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "install it with: pip install 'headcast[ray]'" in refusal("anna.mp4", runner="ray")
    assert list(read("anna.mp4")) == ["anna"]


def test_the_account_of_a_batch() -> None:
    done = Outcome("anna", "done", 61.2, 34.71, report="data/anna/report.html")
    failed = Outcome("bert", "failed", 3.0, stage="track", what="No face in any of 12 frames.", fix="film the face")
    fresh, stopped = Outcome("carl", "fresh"), Outcome("dora", "stopped")
    assert done.line() == "anna: done in 61 s, 34.7 dB"
    assert failed.line() == "bert: failed in track: No face in any of 12 frames. -> film the face"
    assert fresh.line() == "carl: fresh"
    document = batch_document([done, failed, fresh])
    assert document["subjects"][1]["error"] == {"stage": "track", "what": failed.what, "fix": failed.fix}
    assert document["subjects"][0]["error"] is None
    assert outcomes_in(json.loads(json.dumps(document))) == [done, failed, fresh]
    assert [exit_code(ended) for ended in ([done], [done, failed], [failed, stopped], [])] == [0, 1, 130, 0]
    assert tally([done, failed, fresh]) == "1 done, 1 fresh, 1 failed of 3 subjects"
    assert table([done, failed]).splitlines() == [
        "anna  done        61 s   34.7 dB  data/anna/report.html",
        "bert  failed       3 s            track: No face in any of 12 frames.",
        "1 done, 1 failed of 2 subjects",
    ]
