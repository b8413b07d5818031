"""The fit stage: its files, its words, its refusals, and that it resumes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.cameras import make_intrinsics
from pipeline.clip import load_clip
from pipeline.config import Config
from pipeline.dataset import Subject
from pipeline.errors import Interrupted, StageError
from pipeline.stage import Result, StageRun
from pipeline.synthetic import SyntheticClip, make_clip
from stages import fit

FRAMES, WIDTH, HEIGHT = 36, 160, 120
OUTPUTS = {
    "fit.npz",
    "cameras.json",
    "neutral.obj",
    "overlay.mp4",
    "overlay.jpg",
    "neutral.jpg",
    "curves.png",
}


@functools.cache
def clip() -> SyntheticClip:
    K = make_intrinsics(1.4 * WIDTH, WIDTH, HEIGHT)
    return make_clip(FRAMES, WIDTH, HEIGHT, seed=5, K=K, supersample=1, background="plain")


def write_subject(root: Path, **changes: np.ndarray) -> Subject:
    """Decode and track files of a synthetic clip; `changes` replace arrays of `track.npz`."""
    made = clip()
    (root / "decode/frames").mkdir(parents=True)
    (root / "track").mkdir()
    entries = []
    for i, image in enumerate(made.images):
        cv2.imwrite(str(root / f"decode/frames/{i:06d}.jpg"), image[..., ::-1])
        entries.append(
            {"index": i, "file": f"frames/{i:06d}.jpg", "time": i / 25, "source_frame": i, "sharpness": 50.0}
        )
    listing = {"schema": 1, "width": WIDTH, "height": HEIGHT, "fps": "25/1", "count": FRAMES, "frames": entries}
    (root / "decode/frames.json").write_text(json.dumps(listing))
    names = made.head.expression_names[:-1]
    generator = np.random.default_rng(0)
    landmarks = (made.landmarks + generator.normal(0, 0.05, made.landmarks.shape)).astype(np.float32)
    track = {
        "landmarks": landmarks,
        "landmarks_raw": landmarks,
        # As MediaPipe lists them: a neutral score first, no tongue.
        "blendshapes": np.concatenate([np.zeros((FRAMES, 1), np.float32), made.expression[:, :-1]], 1),
        "blendshape_names": np.array(["_neutral", *names]),
        "detected": np.ones(FRAMES, bool),
        "usable": np.ones(FRAMES, bool),
    }
    np.savez(root / "track/track.npz", **{**track, **changes})
    return Subject(root)


def run_fit(subject: Subject, work: Path, **changes: object) -> Result:
    work.mkdir(exist_ok=True)
    return fit.STAGE.run(StageRun(subject, work, Config(), "cpu", 1, **changes))


def load(work: Path) -> dict[str, np.ndarray]:
    with np.load(work / "fit.npz", allow_pickle=False) as file:
        return dict(file)


def test_files_are_what_the_layout_promises(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "ada")
    result = run_fit(subject, tmp_path / "ada/fit")
    work = tmp_path / "ada/fit"
    assert {p.name for p in work.iterdir() if p.name != "scratch"} == OUTPUTS
    arrays = load(work)
    E, S = len(clip().head.expression_names), len(clip().identity)
    shapes = {
        "Ks": (FRAMES, 3, 3),
        "image_size": (2,),
        "Ts_cam_head": (FRAMES, 4, 4),
        "Ts_cam_torso": (FRAMES, 4, 4),
        "neck": (FRAMES, 3),
        "eyes": (FRAMES, 2, 3),
        "identity": (S,),
        "expression": (FRAMES, E),
        "expression_names": (E,),
        "landmark_offsets": (478, 3),
        "expression_offsets": (E, 478, 3),
        "usable": (FRAMES,),
        "residual_px": (FRAMES,),
        "head": (),
        "crops": (FRAMES, 3),
        "shots": (FRAMES,),
        "clips": (FRAMES,),
    }
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f")
    assert arrays["Ts_cam_head"].dtype == arrays["Ks"].dtype == np.float64
    assert arrays["expression"].dtype == np.float32
    cameras = json.loads((work / "cameras.json").read_text())
    assert (cameras["width"], cameras["height"], len(cameras["frames"])) == (WIDTH, HEIGHT, FRAMES)
    np.testing.assert_allclose(cameras["frames"][7]["T_cam_head"], arrays["Ts_cam_head"][7])

    assert result.verdict.level == "good"
    assert result.verdict.text.startswith("Fit: good. Median landmark error 0.")
    assert result.verdict.picture == "overlay.jpg"
    assert set(result.metrics) >= {"reprojection_px", "face_width_px"}
    assert 0 < result.metrics["reprojection_px"]["median"] < result.metrics["reprojection_px"]["p95"] < 1
    json.dumps(result.metrics)

    (tmp_path / "ada/matte").mkdir()
    loaded = load_clip(subject, 64)
    assert loaded.crops == (tuple(arrays["crops"][0]),)


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "ada")
    for name in ("one", "two"):
        run_fit(subject, tmp_path / name)
    for name in sorted(OUTPUTS - {"overlay.mp4"}):  # the encoder answers for its bytes
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_stopped_fit_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "ada")
    run_fit(subject, tmp_path / "whole")
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        run_fit(subject, tmp_path / "work", stop_requested=lambda: next(calls) == 5)
    assert (tmp_path / "work/scratch/state.npz").is_file()
    run_fit(subject, tmp_path / "work")
    for name in sorted(OUTPUTS - {"overlay.mp4"}):  # the encoder answers for its bytes
        assert (tmp_path / "work" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_distrusted_frames_are_named_and_nan_is_no_face(tmp_path: Path) -> None:
    usable, detected = np.ones(FRAMES, bool), np.ones(FRAMES, bool)
    usable[10:14] = False
    detected[20:22] = usable[20:22] = False
    landmarks = clip().landmarks.astype(np.float32)
    landmarks[20:22] = np.nan
    landmarks[30, 5] = np.nan
    subject = write_subject(tmp_path / "ada", usable=usable, detected=detected, landmarks_raw=landmarks)
    result = run_fit(subject, tmp_path / "work")
    assert "frames 10-13, 20-21, 30" in result.verdict.text
    arrays = load(tmp_path / "work")
    np.testing.assert_array_equal(np.flatnonzero(~arrays["usable"]), [10, 11, 12, 13, 20, 21, 30])
    assert np.isfinite(arrays["Ts_cam_head"]).all()
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(arrays["residual_px"])), [20, 21, 30])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_frames_are_refused_with_words(tmp_path: Path, count: int) -> None:
    usable = np.arange(FRAMES) < count
    subject = write_subject(tmp_path / "ada", usable=usable)
    with pytest.raises(StageError) as caught:
        run_fit(subject, tmp_path / "work")
    assert caught.value.what == (
        f"Only {count} of the {FRAMES} frames of 'ada' show the face well enough; fitting needs 3."
    )
    assert caught.value.fix.startswith("film the face")


def test_few_frames_are_warned_about(tmp_path: Path) -> None:
    result = run_fit(write_subject(tmp_path / "ada", usable=np.arange(FRAMES) < 3), tmp_path / "work")
    assert result.verdict.level != "good"
    assert "under 30 frames" in result.verdict.text


@pytest.mark.parametrize("damage", ["cut", "shape", "missing"])
def test_damaged_track_is_named(tmp_path: Path, damage: str) -> None:
    subject = write_subject(tmp_path / "ada")
    path = tmp_path / "ada/track/track.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "missing":
        path.unlink()
    else:
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **{**arrays, "landmarks_raw": arrays["landmarks_raw"][:-1]})
    with pytest.raises(StageError, match=r"track\.npz' cannot be used"):
        run_fit(subject, tmp_path / "work")
