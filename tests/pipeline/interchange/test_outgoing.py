"""What leaves a finished subject: the fit's own numbers, the frames that can be relied on, one clip."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import recordings
from reenact_data import FPS, change_fit, finish, read_fit, write_dataset

from pipeline.dataset import Dataset, Subject
from pipeline.errors import UserError
from pipeline.exports import check_export, export
from pipeline.geometry import project_points, transform_points
from pipeline.heads import EXPRESSIONS
from pipeline.interchange import ReadOptions, read
from pipeline.interchange.outgoing import Wanted, outgoing

POINTS = np.random.default_rng(0).uniform(-0.1, 0.1, (20, 3))


@pytest.fixture(autouse=True)
def no_flame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADCAST_HEADS", str(tmp_path / "heads"))
    (tmp_path / "heads").mkdir()
    return tmp_path / "heads"


@pytest.fixture
def anna(tmp_path: Path) -> Iterator[Subject]:
    dataset: Dataset = write_dataset(tmp_path / "data")
    subject = dataset.existing("anna")
    finish(subject, "matte")
    yield subject


def pixels(Ks: np.ndarray, Ts_cam_head: np.ndarray) -> np.ndarray:
    return project_points(transform_points(Ts_cam_head, POINTS), Ks)


def test_a_fit_goes_out_and_is_read_back(anna: Subject) -> None:
    usable = np.ones(24, bool)
    usable[[0, 5, 6]] = False
    change_fit(anna, usable=usable)
    fit = read_fit(anna)
    plan = check_export(anna.root.parent, "anna", "nerfblendshape", options={"coefficients": "0"})
    account = export(plan)
    assert account["frames"] == 21
    assert account["basis"] == "arkit-52"
    found = read(plan.product.path, "nerfblendshape", ReadOptions())
    assert found.fps == FPS
    np.testing.assert_array_equal(found.numbers, np.flatnonzero(usable))
    assert found.coefficient_names == tuple(f"arkit-52/{name}" for name in EXPRESSIONS)
    np.testing.assert_allclose(found.coefficients, fit["expression"][usable], atol=1e-6)
    np.testing.assert_allclose(found.Ts_cam_world, fit["Ts_cam_head"][usable], rtol=1e-6, atol=1e-9)
    expected = pixels(found.Ks, fit["Ts_cam_head"][usable])
    np.testing.assert_allclose(pixels(found.Ks, found.Ts_cam_world), expected, atol=1e-4)


def test_pictures_are_the_subjects_own(anna: Subject) -> None:
    from pipeline.frames import FrameSet

    frames = FrameSet.load(anna.stage("decode"))
    found = outgoing(anna, Wanted())
    rgb, alpha = found.pictures(3)
    np.testing.assert_array_equal(rgb, frames.foreground(3))
    np.testing.assert_array_equal(alpha, frames.alpha(3))
    assert found.recording.size == (frames.width, frames.height)
    square = outgoing(anna, Wanted(square=True))
    rgb, alpha = square.pictures(3)
    assert rgb.shape[:2] == alpha.shape == square.recording.size[::-1]
    assert square.recording.size[0] == square.recording.size[1]
    points = pixels(found.recording.Ks[3:4], found.recording.Ts_cam_world[3:4])
    shifted = pixels(square.recording.Ks[3:4], square.recording.Ts_cam_world[3:4])
    offset = points - shifted
    np.testing.assert_allclose(offset, np.broadcast_to(offset[:, :1], offset.shape), atol=1e-9)


def test_of_several_clips_one_is_chosen(anna: Subject) -> None:
    path = anna.stage("decode") / "frames.json"
    listing = json.loads(path.read_text())
    size = [listing["width"], listing["height"]]
    listing["clips"] = [{"name": "a", "content": size, "fps": "25"}, {"name": "b", "content": size, "fps": "30"}]
    for entry in listing["frames"][12:]:
        entry |= {"clip": 1, "shot": 1}
    path.write_text(json.dumps(listing))
    clips = np.repeat([0, 1], 12)
    change_fit(anna, clips=clips, shots=clips)
    with pytest.raises(UserError, match=r"filmed in 2 clips.*\n.*--set clip=0"):
        outgoing(anna, Wanted())
    with pytest.raises(UserError, match="no clip 7"):
        outgoing(anna, Wanted(), clip=7)
    found = outgoing(anna, Wanted(), clip=1)
    assert len(found.recording) == 12
    assert found.recording.fps == Fraction(30)


@pytest.mark.parametrize("target", ["insta", "vhap", "imavatar"])
def test_without_flame_one_clear_word(anna: Subject, no_flame: Path, target: str) -> None:
    plan = check_export(anna.root.parent, "anna", target, options={"licence": "mine"})
    with pytest.raises(UserError, match="which is not on this machine") as error:
        export(plan)
    assert str(no_flame) in str(error.value)
    assert "--set flame=" not in str(error.value)
    assert not plan.product.path.exists()
    recordings.flame_file(no_flame, "flame2020" if target == "vhap" else "flame2023")
    with pytest.raises(UserError, match=r"--set flame=20") as error:
        export(plan)
    assert not plan.product.path.exists()


@pytest.mark.parametrize(
    ("target", "option", "what"),
    [
        ("nerfblendshape", {"flame": "2020"}, "has no option 'flame'"),
        ("vhap", {"coefficients": "46"}, "has no option 'coefficients'"),
        ("vhap", {"flame": "2019"}, "flame=2019"),
        ("insta", {}, "may not be passed on"),
        ("nerfblendshape", {"coefficients": "many"}, "coefficients=many"),
    ],
)
def test_options_that_do_not_fit(anna: Subject, target: str, option: dict[str, str], what: str, no_flame: Path) -> None:
    (no_flame / "generic_model.pkl").touch()
    plan = check_export(anna.root.parent, "anna", target, options=option)
    with pytest.raises(UserError, match=what):
        export(plan)
    assert not plan.product.path.exists()
