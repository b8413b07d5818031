"""Track and fit of imported datasets: complete files, their check against what is seen, refusals in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import imported_subjects as made
import numpy as np
import pytest
import torch

from pipeline.avatars import conditions_of
from pipeline.clip import load_clip
from pipeline.config import Config
from pipeline.dataset import Subject
from pipeline.errors import StageError
from pipeline.heads import EXPRESSIONS
from pipeline.heads.stored import load_stored
from pipeline.interchange import fill_track
from pipeline.interchange.recording import Recording
from pipeline.stage import Result, StageRun
from stages import fit, track


class Finder:
    """Stands for MediaPipe: finds what was rendered, in the order of the frames that are looked at."""

    scale, blind = 1.0, False

    def __init__(self, model: Path, max_faces: int = 1) -> None:
        from pipeline.frames import evenly

        self.rows = iter(evenly(made.FRAMES, 96 if self.many else 24))

    many = True

    def __enter__(self) -> Finder:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def detect(self, image: np.ndarray) -> list[Any]:
        row = next(self.rows)
        return [] if self.blind else made.seen(row, self.scale)


@pytest.fixture
def finder(monkeypatch: pytest.MonkeyPatch) -> type[Finder]:
    class Own(Finder):
        pass

    monkeypatch.setattr(fill_track, "Detector", Own)
    monkeypatch.setattr(fill_track, "asset_path", lambda name, fetch: Path(name))
    return Own


def run(subject: Subject, stage: Any) -> Result:
    work = subject.stage(stage.name)
    work.mkdir(exist_ok=True)
    result: Result = stage.run(StageRun(subject, work, Config()))
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, dict[str, Result]]:
    """An imported subject without geometry, tracked and fitted."""
    subject = made.write_subject(tmp_path_factory.mktemp("imported") / "one", made.nerfblendshape())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill_track, "Detector", Finder)
        patch.setattr(fill_track, "asset_path", lambda name, fetch: Path(name))
        results = {stage.name: run(subject, stage) for stage in (track.STAGE, fit.STAGE)}
    return subject, results


def test_track_is_complete_and_checked(finished: tuple[Subject, dict[str, Result]]) -> None:
    subject, results = finished
    with np.load(subject.stage("track") / "track.npz") as file:
        arrays = dict(file)
    assert set(arrays) == {
        *("landmarks", "landmarks_raw", "blendshapes", "blendshape_names", "Ts_cam_face", "detected", "boxes"),
        *("shots", "clips", "others", "hands", "covered", "occluded", "off_frame", "blurred", "usable", "confidence"),
    }
    assert np.median(np.linalg.norm((arrays["landmarks"] - made.clip().landmarks)[..., :2], axis=2)) < 0.5
    # Nobody's scores: the dataset's coefficients are none of ARKit's.
    assert arrays["blendshapes"].shape == (made.FRAMES, 0)
    assert arrays["usable"].all()
    verdict = results["track"].verdict
    assert verdict.level == "good"
    assert "imported from nerfblendshape" in verdict.text
    assert results["track"].metrics["misfit_share"] < 0.02
    assert (subject.stage("track") / "overlay.jpg").is_file()


def test_fit_is_complete(finished: tuple[Subject, dict[str, Result]]) -> None:
    subject, results = finished
    names = {path.name for path in subject.stage("fit").iterdir()}
    assert names >= {"fit.npz", "head.npz", "cameras.json", "neutral.obj", "overlay.jpg", "overlay.mp4", "curves.png"}
    clip = load_clip(subject, 64)
    assert clip.expression_names == made.nerfblendshape().coefficient_names
    np.testing.assert_allclose(clip.expression, made.coefficients(6), rtol=1e-6)
    head = clip.personal_head()
    assert head.name == clip.head == "imported-anny"
    assert not set(head.expression_names) & set(EXPRESSIONS)
    rows = conditions_of(clip)
    with torch.no_grad():
        posed = head.vertices(torch.from_numpy(clip.identity), rows.expression, rows.neck, rows.eyes)
    assert torch.isfinite(posed).all()
    assert "Imported from nerfblendshape" in results["fit"].verdict.text
    cameras = json.loads((subject.stage("fit") / "cameras.json").read_text())
    np.testing.assert_allclose(cameras["clips"][0]["K"], made.K)


def test_frames_that_decode_made_smaller_have_smaller_cameras(tmp_path: Path, finder: type[Finder]) -> None:
    finder.scale = 0.5
    subject = made.write_subject(tmp_path / "half", made.nerfblendshape(), scale=0.5)
    result = run(subject, track.STAGE)
    assert result.metrics["misfit_share"] < 0.02
    with np.load(subject.stage("track") / "motion.npz") as file:
        np.testing.assert_allclose(file["Ks"][0], np.diag([0.5, 0.5, 1]) @ made.K)


def meshes_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("pipeline.interchange.insta")
    module.read_meshes = lambda root, names: made.meshes()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipeline.interchange.insta", module)


def test_meshes_are_tracked(tmp_path: Path, finder: type[Finder], monkeypatch: pytest.MonkeyPatch) -> None:
    meshes_of(monkeypatch)
    finder.many = False
    subject = made.write_subject(tmp_path / "meshes", made.insta())
    assert run(subject, track.STAGE).verdict.level == "good"
    stored = load_stored(subject.stage("track") / "head.npz")
    assert stored.model.name == "imported-mesh"
    assert not stored.may_be_passed_on


def shifted(recording: Recording) -> Recording:
    """Meshes beside where they are seen, as far as a principal point measured from the other side moves them."""
    Ts = recording.Ts_cam_world.copy()
    Ts[:, 0, 3] += 0.015
    return replace(recording, Ts_cam_world=Ts)


def behind(recording: Recording) -> Recording:
    Ts = recording.Ts_cam_world.copy()
    Ts[:, 2, 3] *= -1
    return replace(recording, Ts_cam_world=Ts)


@pytest.mark.parametrize(("change", "words"), [(shifted, "eyes of the dataset's meshes"), (behind, "behind")])
def test_wrong_cameras_are_refused(
    tmp_path: Path, finder: type[Finder], monkeypatch: pytest.MonkeyPatch, change: Any, words: str
) -> None:
    meshes_of(monkeypatch)
    finder.many = False
    subject = made.write_subject(tmp_path / "wrong", change(made.insta()))
    with pytest.raises(StageError, match=words):
        run(subject, track.STAGE)
    assert not (subject.stage("track") / "track.npz").exists()


def test_a_dataset_of_other_frames_is_refused(tmp_path: Path, finder: type[Finder]) -> None:
    recording = made.nerfblendshape()
    short = replace(recording, **{name: getattr(recording, name)[:-1] for name in ("numbers", "Ks", "Ts_cam_world")})
    subject = made.write_subject(tmp_path / "short", short)
    with pytest.raises(StageError, match="has 23 frames, decoded are 24"):
        run(subject, track.STAGE)


def test_no_face_without_geometry_is_refused(tmp_path: Path, finder: type[Finder]) -> None:
    finder.blind = True
    subject = made.write_subject(tmp_path / "blind", made.nerfblendshape())
    with pytest.raises(StageError, match="A face is found in 0 of"):
        run(subject, track.STAGE)


def test_a_damaged_track_is_refused_by_fit(finished: tuple[Subject, dict[str, Result]], tmp_path: Path) -> None:
    import shutil

    subject = Subject(shutil.copytree(finished[0].root, tmp_path / "copy"))
    motion = subject.stage("track") / "motion.npz"
    with np.load(motion) as file:
        arrays = {**file, "expression": file["expression"][:, :-1]}
    np.savez(motion, **arrays)
    with pytest.raises(StageError, match=r"'expression' has shape \(24, 5\), expected \(24, 6\)"):
        run(subject, fit.STAGE)
