"""IMavatar's layout, written and read: the same pixels by our reader and by what its programs do with the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import oracle_imavatar as oracle
import pytest
import recordings
import torch

from pipeline.heads.flame import Flame, load_flame
from pipeline.interchange import ReadOptions, imavatar
from pipeline.interchange.recording import FlameTrack, Recording
from pipeline.interchange.sidecar import Sidecar

SIDE = 64
CENTRED = np.array([[118.0, 0, 32], [0, 118.0, 32], [0, 0, 1]])
NAMES = tuple(f"flame2020-expression-50/{index:03d}" for index in range(50))


@pytest.fixture(scope="module")
def flame(tmp_path_factory: pytest.TempPathFactory) -> Flame:
    folder = tmp_path_factory.mktemp("heads")
    recordings.flame_file(folder, "flame2020")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_HEADS", str(folder))
        loaded = load_flame("flame2020")
    # Joints that follow the expression, as the real ones do a little and the synthetic file's do not.
    near = torch.exp(-200 * torch.cdist(loaded.regressor @ loaded.template, loaded.template))
    return replace(loaded, regressor=near / near.sum(1, keepdim=True))


def example(intrinsics: np.ndarray = recordings.K, **changes: Any) -> Recording:
    """A head that turns in a camera that turns, both about three axes."""
    track = recordings.flame_track("flame2020", 3, moving=True, expressions=50)
    track = replace(track, shape=track.shape[:100])
    return recordings.recording("vhap", flame=track, size=(SIDE, SIDE), intrinsics=intrinsics, **changes)


def write(recording: Recording, folder: Path, flame: Flame | None, **changes: Any) -> list[str]:
    sidecar = Sidecar("imavatar", "anna", str(recording.fps), tuple(recording.numbers.tolist()), "", (), **changes)
    return imavatar.write(
        recording, lambda row: recordings.picture(row, (SIDE, SIDE)), folder, flame=flame, sidecar=sidecar
    )


def posed(track: FlameTrack, flame: Flame) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [T,V,3] in the world and the root joint [T,3]."""
    names = ("shape", "expression", "rotation", "neck", "jaw", "eyes", "translation")
    parts = [torch.from_numpy(np.ascontiguousarray(getattr(track, name))) for name in names]
    return flame.vertices(*parts).numpy(), flame.joints(parts[0], parts[1])[:, 0].numpy()


def seen(recording: Recording, flame: Flame) -> np.ndarray:
    """Pixels [T,V,2] of FLAME's vertices."""
    assert recording.flame is not None
    still = replace(
        recording, flame=replace(recording.flame, rotation=0 * recording.flame.rotation, translation=np.zeros((3, 3)))
    )
    return recordings.pixels(still, posed(recording.flame, flame)[0])


def test_what_is_written_is_read_as_it_was(tmp_path: Path, flame: Flame) -> None:
    before = example(splits={"train": (0, 2), "test": (1,)})
    assert write(before, tmp_path / "out", flame) == []
    assert imavatar.detect(tmp_path / "out")
    after = imavatar.read(tmp_path / "out", ReadOptions())
    assert before.flame is not None
    assert after.flame is not None
    np.testing.assert_allclose(seen(after, flame), seen(before, flame), atol=1e-8)
    roots = posed(before.flame, flame)[1]
    np.testing.assert_allclose(after.Ts_cam_head(roots), before.Ts_cam_head(roots), rtol=1e-9, atol=1e-12)
    for name in ("shape", "expression", "neck", "jaw", "eyes"):
        np.testing.assert_array_equal(getattr(after.flame, name), getattr(before.flame, name))
    assert (after.fps, after.flame.version, after.basis) == (Fraction(30000, 1001), "flame2020", before.basis)
    assert after.coefficient_names == NAMES
    assert after.numbers.tolist() == [3, 4, 9]
    assert after.splits == {"train": (0, 2), "test": (1,)}
    assert after.notes == ()


READERS: dict[str, Callable[..., np.ndarray]] = {
    "imavatar": oracle.imavatar,
    "pointavatar": oracle.pointavatar,
    "splattingavatar": oracle.splattingavatar,
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_see_the_head_where_it_is(tmp_path: Path, flame: Flame, reader: str) -> None:
    before = example()
    write(before, tmp_path, flame)
    data = oracle.load(tmp_path / "anna" / "anna" / "anna_train")
    for frame, expected in zip(data["frames"], seen(before, flame), strict=True):
        np.testing.assert_allclose(
            READERS[reader](data, frame, oracle.vertices(flame, data, frame)), expected, atol=1e-6
        )


def test_fateavatar_sees_it_too_in_rectified_pictures(tmp_path: Path, flame: Flame) -> None:
    before = example(CENTRED)
    write(before, tmp_path, flame)
    data = oracle.load(tmp_path / "anna" / "anna" / "anna_train")
    for frame, expected in zip(data["frames"], seen(before, flame), strict=True):
        points = oracle.vertices(flame, data, frame, scale=1)
        np.testing.assert_allclose(oracle.fateavatar(data, frame, points), expected, atol=1e-6)


def test_read_with_options_of_its_own(tmp_path: Path, flame: Flame) -> None:
    write(example(), tmp_path, flame)
    (tmp_path / "headcast.json").unlink()
    video = tmp_path / "anna" / "anna" / "anna_train"
    assert imavatar.read(video, ReadOptions()).fps == Fraction(30000, 1001)
    (video / "headcast.json").unlink()
    found = imavatar.read(tmp_path, ReadOptions(fps=Fraction(50), flame="flame2023"))
    assert found.fps == 50
    assert found.flame is not None
    assert (found.flame.version, found.basis) == ("flame2023", "flame2023-expression-50")
    assert len(imavatar.read(tmp_path, ReadOptions()).notes) == 2
