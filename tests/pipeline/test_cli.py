"""The command line as a user meets it: help, exit codes, errors without tracebacks, JSON alone on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def headcast(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, where no Prefect server and no terminal is."""
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(cwd / "prefect"), "COLUMNS": "100", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=250, check=False)


def video(path: Path, width: int = 96, height: int = 96, frames: int = 12) -> Path:
    """A small video of coloured noise with nobody in it."""
    from pipeline.video import write_video

    generator = np.random.default_rng(0)
    shape = (height // 8, width // 8, 3)
    write_video(
        path,
        (np.kron(generator.integers(0, 255, shape), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(frames)),
        25,
    )
    return path


def test_help_teaches_every_command(tmp_path: Path) -> None:
    done = headcast("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in (
        "run",
        "import",
        "batch",
        "nightly",
        "status",
        "page",
        "rerun",
        "doctor",
        "assets",
        "demo",
        "bench",
        "view",
        "reenact",
        "render",
    ):
        assert command in done.stdout
        page = headcast(command, "--help", cwd=tmp_path)
        assert page.returncode == 0
        assert "--data" in page.stdout


def test_run_without_a_video_is_a_usage_error(tmp_path: Path) -> None:
    done = headcast("run", cwd=tmp_path)
    assert done.returncode == 2
    assert "No video is named" in done.stderr
    assert "headcast run --help" in done.stderr


def test_reenact_refuses_bad_requests_in_one_message(tmp_path: Path) -> None:
    done = headcast("reenact", "--avatar", "anna", "--drive", "bert", "--background", "teal", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: background 'teal' does not fit: choose white, black, grey, green")
    done = headcast("reenact", "--avatar", "anna", "--drive", "bert", cwd=tmp_path)
    assert done.returncode == 2
    assert "No subject 'anna' in 'data' (there: none)." in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "missing.mp4", "There is no file"),
        (lambda p: _write(p / "text.mp4", b"this is no video\n" * 50), "text.mp4"),
        (lambda p: _write(p / "zero.mp4", b""), "zero.mp4"),
        (lambda p: _folder(p / "empty"), "empty"),
        (lambda p: video(p / "tiny.mp4", 16, 16), "too small"),
    ],
    ids=["missing", "text", "zero", "folder", "tiny"],
)
def test_bad_sources_are_refused_with_words(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    source = make(tmp_path)
    done = headcast("run", source, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "->" in done.stderr, "the next step is named"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "data").exists(), "nothing is made for a source that is refused"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--subject", "../x"], "'../x' cannot be a subject name"),
        (["--subject", "a.b"], "'a.b' cannot be a subject name"),
        (["--set", "train.stpes=3"], "no field 'stpes'"),
        (["--set", "train.steps=-3"], "train.steps=-3 does not fit"),
        (["--from", "trian"], "There is no stage 'trian'"),
        (["--from", "fit", "--to", "decode"], "Stage 'fit' comes after 'decode'"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path: Path, options: list[str], message: str) -> None:
    done = headcast("run", video(tmp_path / "clip.mp4"), *options, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "data").exists()


def test_bad_sets_of_clips_are_refused_before_any_work(tmp_path: Path) -> None:
    clip, other = video(tmp_path / "clip.mp4"), video(tmp_path / "other.mp4", frames=14)
    photo = _write(tmp_path / "photo.jpg", b"no photograph")
    for arguments, message in (
        ([clip, clip], "clip.mp4' is given twice"),
        ([clip, tmp_path / "gone.mp4"], "There is no file"),
        ([clip, other, "--set", "decode.end_seconds=1"], "name a span of one clip; 2 clips are given"),
        ([clip, "--person", "0"], "track.person=0 does not fit"),
        ([clip, "--like", tmp_path / "gone.jpg"], "gone.jpg' cannot be read"),
        ([clip, "--like", photo], "buffalo_l/w600k_r50.onnx"),
        ([photo], "is a single image"),
    ):
        done = headcast("run", *arguments, cwd=tmp_path, INSIGHTFACE_HOME=str(tmp_path))
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_bench_refuses_what_it_cannot_use_before_any_work(tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.mp4")
    for arguments, message in (
        (["run", clip, "--set", "train.steps=5"], "--set says nothing to bench run"),
        (["ablation", clip, "--avatar", "rigged"], "--avatar says nothing to bench ablation"),
        (["avatars", clip, "--avatar", "cube"], "no avatar model 'cube'"),
        (["avatars", clip, "--set", "train.stpes=3"], "no field 'stpes'"),
        (["avatars", clip, tmp_path / "gone.mp4"], "There is no file"),
    ):
        done = headcast("bench", *arguments, cwd=tmp_path)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "data").exists()


def test_json_error_is_one_document(tmp_path: Path) -> None:
    done = headcast("run", "missing.mp4", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["what"] == "There is no file 'missing.mp4'."


def test_status_of_nothing_and_of_an_unknown_subject(tmp_path: Path) -> None:
    assert headcast("status", cwd=tmp_path).stdout == "No subjects in 'data'.\n"
    done = headcast("status", "anna", cwd=tmp_path)
    assert (done.returncode, "No subject 'anna'" in done.stderr) == (2, True)
    assert headcast("rerun", "anna", cwd=tmp_path).returncode == 2


def test_data_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file, not a folder")
    clip = video(tmp_path / "clip.mp4")
    done = headcast("run", clip, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: The data folder 'data' cannot be used")


def test_asset_commands(tmp_path: Path) -> None:
    done = headcast("assets", "list", "--json", cwd=tmp_path)
    names = {asset["name"] for asset in json.loads(done.stdout)["assets"]}
    assert {"face_landmarker", "u2netp", "sample_clip"} <= names
    done = headcast("assets", "fetch", "nothing", cwd=tmp_path)
    assert (done.returncode, "no asset 'nothing'" in done.stderr) == (2, True)


def test_asset_with_a_wrong_hash_blocks_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "selfie_segmentation.tflite").write_bytes(b"not a model")
    done = headcast("doctor", "--json", cwd=tmp_path, HEADCAST_CACHE=str(tmp_path / "cache"))
    document = json.loads(done.stdout)
    assert (done.returncode, document["level"]) == (2, "blocked")
    assert [f["fix"] for f in document["findings"] if "selfie_segmentation has wrong bytes" in f["what"]]


@pytest.mark.prefect
def test_nobody_in_view_fails_the_track_stage_and_keeps_the_rest(tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.mp4")
    done = headcast("run", clip, cwd=tmp_path)
    assert (done.returncode, "error: The capture check says: " in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "data" / "clip").exists()
    done = headcast("run", clip, "--no-check", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "face" in json.loads(done.stdout)["error"]["what"]
    assert "Traceback" not in done.stderr
    states = {
        s["stage"]: s["state"] for s in json.loads(headcast("status", "clip", "--json", cwd=tmp_path).stdout)["stages"]
    }
    assert (states["decode"], states["track"], states["train"]) == ("fresh", "failed", "waiting")
    assert (tmp_path / "data" / "clip" / "report.html").is_file(), "the report tells of the failure"


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "notes.txt").write_text("no images here")
    return path
