"""The fit stage: its files, its words, its refusals, and that it resumes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pipeline.cameras import make_intrinsics
from pipeline.clip import load_clip
from pipeline.config import Config
from pipeline.dataset import Subject
from pipeline.errors import Interrupted, StageError
from pipeline.geometry import project_points, rotvec_to_matrix, transform_points
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
    for folder in ("track", "matte/alpha", "matte/foreground"):
        (root / folder).mkdir(parents=True)
    entries = []
    for i, image in enumerate(made.images):
        cv2.imwrite(str(root / f"matte/alpha/{i:06d}.png"), (255 * made.alpha[i]).round().astype(np.uint8))
        for folder in ("decode/frames", "matte/foreground"):
            cv2.imwrite(str(root / f"{folder}/{i:06d}.jpg"), image[..., ::-1])
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
        "covered": np.zeros((FRAMES, 478), bool),
    }
    np.savez(root / "track/track.npz", **{**track, **changes})
    return Subject(root)


def run_fit(subject: Subject, work: Path, **changes: object) -> Result:
    work.mkdir(exist_ok=True)
    return fit.STAGE.run(StageRun(subject, work, Config(), "cpu", 1, **changes))


def load(work: Path) -> dict[str, np.ndarray]:
    with np.load(work / "fit.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Result]:
    """A subject with a finished fit."""
    subject = write_subject(tmp_path_factory.mktemp("fitted") / "ada")
    return subject, run_fit(subject, subject.root / "fit")


def test_files_are_what_the_layout_promises(finished: tuple[Subject, Result]) -> None:
    subject, result = finished
    work = subject.root / "fit"
    assert {p.name for p in work.iterdir() if p.name != "scratch"} == OUTPUTS
    arrays = load(work)
    E, S = len(clip().head.expression_names), len(clip().identity)
    shapes = {
        "Ks": (FRAMES, 3, 3),
        "image_size": (2,),
        "Ts_cam_head": (FRAMES, 4, 4),
        "Ts_cam_skull": (FRAMES, 4, 4),
        "skull_confidence": (FRAMES,),
        "Ts_cam_torso": (FRAMES, 4, 4),
        "torso_shape": (FRAMES, 4),
        "torso_confidence": (FRAMES,),
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
    assert 0.9 < result.metrics["identity"]["inside"] <= 1
    assert 0 < result.metrics["identity"]["rms_half_ranges"] < 0.5
    assert "neutral head plausible" in result.verdict.text
    assert 0 < result.metrics["reprojection_px"]["median"] < result.metrics["reprojection_px"]["p95"] < 1
    json.dumps(result.metrics)

    loaded = load_clip(subject, 64)
    assert loaded.crops == (tuple(arrays["crops"][0]),)


def test_stopped_fit_resumes_to_the_same_bytes(tmp_path: Path, finished: tuple[Subject, Result]) -> None:
    subject, _ = finished
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        run_fit(subject, tmp_path / "work", stop_requested=lambda: next(calls) == 5)
    assert (tmp_path / "work/scratch/state.npz").is_file()
    run_fit(subject, tmp_path / "work")
    for name in sorted(OUTPUTS - {"overlay.mp4"}):  # the encoder answers for its bytes
        assert (tmp_path / "work" / name).read_bytes() == (subject.root / "fit" / name).read_bytes(), name


def test_distrusted_frames_are_named_and_nan_is_no_face(tmp_path: Path) -> None:
    """A face that is hidden, leaves for nearly half a second and returns, is blurred, and a landmark that is NaN."""
    usable, detected = np.ones(FRAMES, bool), np.ones(FRAMES, bool)
    occluded, blurred = np.zeros(FRAMES, bool), np.zeros(FRAMES, bool)
    usable[10:12], occluded[10:12], blurred[33] = False, True, True
    detected[15:25] = usable[15:25] = False
    landmarks = clip().landmarks.astype(np.float32)
    landmarks[15:25] = np.nan
    landmarks[30, 5] = np.nan
    flags = {"occluded": occluded, "off_frame": np.zeros(FRAMES, bool), "blurred": blurred}
    subject = write_subject(tmp_path / "ada", usable=usable, detected=detected, landmarks_raw=landmarks, **flags)
    result = run_fit(subject, tmp_path / "work")
    assert "no face: frames 15-24, 30; occluded: frames 10-11; blurred: frame 33" in result.verdict.text
    arrays = load(tmp_path / "work")
    np.testing.assert_array_equal(np.flatnonzero(~arrays["usable"]), [10, 11, *range(15, 25), 30])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(arrays["residual_px"])), [*range(15, 25), 30])
    truth, found = clip().Ts_cam_head, arrays["Ts_cam_head"]
    turn = np.swapaxes(truth[:, :3, :3], 1, 2) @ found[:, :3, :3]
    angle = np.degrees(np.arccos(((np.trace(turn, axis1=1, axis2=2) - 1) / 2).clip(-1, 1)))
    assert angle.max() < 8, "carried through the gap"
    assert angle[[10, 11, 30, 33]].max() < 2


def test_clips_and_shots_reach_the_files(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "ada")
    path = tmp_path / "ada/decode/frames.json"
    listing = json.loads(path.read_text())
    for i, frame in enumerate(listing["frames"]):
        frame["clip"], frame["shot"] = int(i >= 24), int(i >= 12) + int(i >= 24)
        frame["time"] += float(i >= 24)
    size = {"scale": 1.0, "content": [WIDTH, HEIGHT]}
    listing["clips"] = [{"name": "a.mp4", **size}, {"name": "b.mp4", **size}]
    path.write_text(json.dumps(listing))
    result = run_fit(subject, tmp_path / "ada/fit")
    assert "36 of 36 frames of 3 shots of 2 clips" in result.verdict.text
    arrays = load(tmp_path / "ada/fit")
    np.testing.assert_array_equal(arrays["clips"], np.repeat([0, 1], [24, 12]))
    np.testing.assert_array_equal(arrays["shots"], np.repeat([0, 1, 2], 12))
    assert len(np.unique(arrays["Ks"][:, 0, 0])) == 2, "a focal length for each clip"
    cameras = json.loads((tmp_path / "ada/fit/cameras.json").read_text())
    assert [entry["name"] for entry in cameras["clips"]] == ["a.mp4", "b.mp4"]
    np.testing.assert_array_equal(cameras["clips"][1]["K"], arrays["Ks"][30])
    assert (cameras["frames"][30]["clip"], cameras["frames"][30]["shot"]) == (1, 2)
    assert len(result.metrics["focal_ratio"]) == len(result.metrics["crops"]) == 2


def test_a_profile_only_clip_is_told(tmp_path: Path) -> None:
    K = make_intrinsics(1.4 * WIDTH, WIDTH, HEIGHT)
    turned = clip().Ts_cam_head.copy()
    turned[:, :3, :3] = turned[:, :3, :3] @ rotvec_to_matrix(np.array([0, 1.0, 0]))
    points = transform_points(turned, transform_points(np.linalg.inv(clip().Ts_cam_head), _landmarks_cam()))
    pixels = project_points(points, K)
    depth = K[0, 0] * (points[..., 2] / points[..., 2].mean(1, keepdims=True) - 1)
    landmarks = np.concatenate([pixels, depth[..., None]], 2).astype(np.float32)
    result = run_fit(write_subject(tmp_path / "ada", landmarks_raw=landmarks), tmp_path / "work")
    assert result.verdict.level == "poor"
    assert "in every frame and half of the face is guessed" in result.verdict.text


def _landmarks_cam() -> np.ndarray:
    made = clip()
    parts = (made.identity, made.expression, made.neck, made.eyes)
    with torch.no_grad():
        points = made.head.landmarks(made.head.vertices(*(torch.from_numpy(part) for part in parts)))
    return transform_points(made.Ts_cam_head, points.numpy().astype(np.float64))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_frames_are_refused_with_words(tmp_path: Path, count: int) -> None:
    usable = np.arange(FRAMES) < count
    subject = write_subject(tmp_path / "ada", usable=usable)
    with pytest.raises(StageError) as caught:
        run_fit(subject, tmp_path / "work")
    assert caught.value.what.startswith(
        f"Only {count} of the {FRAMES} frames of 'ada' show the face well enough; fitting needs 3. Not usable: "
    )
    assert f"not trusted: frames {count}-{FRAMES - 1}" in caught.value.what
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
