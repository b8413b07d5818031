"""The split, the crops and the checked reading of a finished subject."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.clip import load_clip, load_crops, split
from pipeline.dataset import Subject
from pipeline.errors import StageError


def write_subject(
    root: Path,
    *,
    count: int = 6,
    size: tuple[int, int] = (48, 32),
    crop: tuple[float, float, float] = (-4, -6, 40),
    two_takes: bool = False,
) -> Subject:
    """A subject with random mattes of (width, height) and the fit of a head that stands still.

    The second of two takes has another focal length and a crop that is moved and grown by 2 px.
    """
    generator = np.random.default_rng(5)
    subject = Subject(root)
    for folder in ("decode", "matte/alpha", "matte/foreground", "matte/confidence", "fit"):
        (root / folder).mkdir(parents=True)
    width, height = size
    entries = []
    for i in range(count):
        frame = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        alpha, confidence = generator.integers(0, 256, (2, height, width), dtype=np.uint8)
        # PNG under the documented name: the reader goes by content, and the test needs exact pixels.
        cv2.imencode(".png", frame[..., ::-1])[1].tofile(root / f"matte/foreground/{i:06d}.jpg")
        cv2.imwrite(str(root / f"matte/alpha/{i:06d}.png"), alpha)
        cv2.imwrite(str(root / f"matte/confidence/{i:06d}.png"), confidence)
        entries.append({"index": i, "file": f"frames/{i:06d}.jpg", "time": i / 25, "source_frame": i})
    listing = {"schema": 1, "width": width, "height": height, "count": count, "frames": entries}
    (root / "decode/frames.json").write_text(json.dumps(listing))
    pose = np.tile(np.eye(4), (count, 1, 1))
    pose[:, 2, 3] = 0.6
    takes = np.arange(count) // (count // 2) if two_takes else np.zeros(count, np.int64)
    Ks = np.tile([[60.0, 0, 25], [0, 55, 14], [0, 0, 1]], (count, 1, 1))
    Ks[takes == 1, :2] *= 1.5
    np.savez(
        root / "fit/fit.npz",
        Ks=Ks,
        image_size=np.array(size),
        Ts_cam_head=pose,
        Ts_cam_skull=pose,
        Ts_cam_torso=pose,
        neck=np.zeros((count, 3), np.float32),
        eyes=np.zeros((count, 2, 3), np.float32),
        identity=np.zeros(4, np.float32),
        expression=np.zeros((count, 2), np.float32),
        expression_names=np.array(["jawOpen", "browInnerUp"]),
        landmark_offsets=np.zeros((478, 3), np.float32),
        expression_offsets=np.zeros((2, 478, 3), np.float32),
        usable=np.ones(count, bool),
        head=np.array("anny"),
        crops=np.tile(np.array(crop, np.float64), (count, 1)) + 2.0 * takes[:, None],
        clips=takes,
    )
    return subject


@pytest.mark.parametrize(
    ("count", "holdout", "least", "train", "test"),
    [
        (216, 0.1, 10, 195, 21),
        (78, 0.1, 10, 68, 10),
        (448, 0.1, 10, 404, 44),
        (5, 0.1, 10, 1, 4),
        (100, 0.29, 1, 71, 29),
    ],
)
def test_split_holds_out_the_end(count: int, holdout: float, least: int, train: int, test: int) -> None:
    first, last = split(count, holdout, least)
    assert (len(first), len(last)) == (train, test)
    assert [*first, *last] == list(range(count))


def test_a_single_frame_cannot_be_split() -> None:
    with pytest.raises(StageError, match="1 frame"):
        split(1, 0.1, 10)


def test_crops_are_composited_over_white_and_padded_outside(tmp_path: Path) -> None:
    clip = load_clip(write_subject(tmp_path / "s"), resolution=40)
    crops = load_crops(clip, [3, 1], threads=2)
    frame = cv2.imread(str(clip.foregrounds[1]), cv2.IMREAD_COLOR_RGB).astype(float)
    alpha = cv2.imread(str(clip.alphas[1]), cv2.IMREAD_GRAYSCALE).astype(float)
    white = 255 + alpha[..., None] / 255 * (frame - 255)
    inside = crops.images[1][6:38, 4:].astype(float)
    assert np.abs(inside - white[:, :36]).max() <= 0.51
    assert np.array_equal(crops.alphas[1][6:38, 4:], alpha[:, :36])
    assert (crops.images[1][:6] == 255).all() and (crops.alphas[1][:6] == 0).all()
    assert (crops.images[1][:, :4] == 255).all() and (crops.images[1][38:] == 255).all()


def test_crops_carry_how_sure_the_alphas_are(tmp_path: Path) -> None:
    clip = load_clip(write_subject(tmp_path / "s"), resolution=40)
    sure = load_crops(clip, [3, 1], threads=2).confidences
    written = cv2.imread(str(clip.confidences[1]), cv2.IMREAD_GRAYSCALE)
    assert sure.shape == (2, 40, 40) and sure.dtype == np.uint8
    assert np.array_equal(sure[1][6:38, 4:], written[:, :36])
    outside = load_clip(Subject(tmp_path / "s"), 40).inside()[0] == 0
    assert (sure[:, outside] == 255).all()
    small = load_crops(load_clip(Subject(tmp_path / "s"), 20), [3]).confidences[0].astype(float)
    mean = sure[0].astype(float).reshape(20, 2, 20, 2).mean((1, 3))
    assert np.abs(small - mean).max() <= 1


@pytest.mark.parametrize("name", ["foregrounds", "confidences"])
def test_a_matte_whose_images_differ_in_size_is_refused(tmp_path: Path, name: str) -> None:
    clip = load_clip(write_subject(tmp_path / "s"), resolution=16)
    path = getattr(clip, name)[2]
    cv2.imencode(".png", np.zeros((31, 48, 3), np.uint8))[1].tofile(path)
    load_crops(clip, [1])
    with pytest.raises(StageError, match=rf"{path.name}' has \(48, 31\) pixels, its alpha \(48, 32\)"):
        load_crops(clip, [2])


def test_inside_is_what_the_frame_shows_of_the_crop(tmp_path: Path) -> None:
    # 48 x 32 pixels seen through a square of 40 from (-4, -6): columns 4 to 40, rows 6 to 38.
    expected = np.zeros((40, 40))
    expected[6:38, 4:] = 1
    assert np.array_equal(load_clip(write_subject(tmp_path / "s"), 40).inside(), expected[None])
    halved = load_clip(Subject(tmp_path / "s"), 20).inside()
    assert np.allclose(halved[0], expected.reshape(20, 2, 20, 2).mean((1, 3)))
    assert (load_clip(write_subject(tmp_path / "t", crop=(4, 2, 24)), 24).inside() == 1).all()


def test_crops_reduce_by_averaging(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "s", crop=(4, 2, 24))
    large = load_crops(load_clip(subject, 24), [0])
    small = load_crops(load_clip(subject, 8), [0])
    mean = large.images[0].astype(float).reshape(8, 3, 8, 3, 3).mean((1, 3))
    assert np.abs(small.images[0] - mean).max() <= 1.0


def test_intrinsics_follow_the_crop(tmp_path: Path) -> None:
    clip = load_clip(write_subject(tmp_path / "s"), resolution=20)
    point = np.array([0.05, -0.02, 0.6])
    in_frame = np.array([60 * point[0] / 0.6 + 25, 55 * point[1] / 0.6 + 14])
    in_crop = clip.Ks[0] @ point
    (corner, side) = clip.crops[0][:2], clip.crops[0][2]
    expected = (in_frame - np.array(corner)) * 20 / side
    assert np.allclose(in_crop[:2] / in_crop[2], expected)


def test_another_crop_shows_the_same_things_in_other_places(tmp_path: Path) -> None:
    clip = load_clip(write_subject(tmp_path / "s"), resolution=40)
    ((x0, y0, side),) = clip.crops
    moved, half = clip.recropped([(x0 + 5, y0 + 3, side)]), clip.recropped([(x0 + 10, y0 + 10, side // 2)])
    whole, part = (load_crops(each, [1]).images[0] for each in (clip, moved))
    assert np.array_equal(part[:-3, :-5], whole[3:, 5:])
    point = np.array([0.01, -0.02, 0.6])
    places = [(each.Ks[0] @ point)[:2] / point[2] for each in (clip, moved, half)]
    np.testing.assert_allclose(places[1], places[0] - [5, 3])
    np.testing.assert_allclose(places[2], 2 * (places[0] - 10))


def test_every_take_has_its_own_camera(tmp_path: Path) -> None:
    clip = load_clip(write_subject(tmp_path / "s", two_takes=True), resolution=20)
    one = load_clip(write_subject(tmp_path / "t"), resolution=20)
    half = len(clip) // 2
    assert clip.cameras.tolist() == [0] * half + [1] * (len(clip) - half)
    assert len(clip.Ks) == len(clip.crops) == len(clip.inside()) == 2
    x0, y0, side = one.crops[0]
    assert clip.crops == ((x0, y0, side), (x0 + 2, y0 + 2, side + 2))
    np.testing.assert_allclose(clip.Ks[0], one.Ks[0])
    assert clip.Ks[1][0, 0] == pytest.approx(1.5 * 60 * 20 / (side + 2))
    ours, same = load_crops(clip, [0, half]), load_crops(one, [0, half])
    assert np.array_equal(ours.images[0], same.images[0])
    assert not np.array_equal(ours.images[1], same.images[1])


def test_only_the_frames_asked_for_are_opened(tmp_path: Path) -> None:
    clip = load_clip(write_subject(tmp_path / "s"), resolution=16)
    clip.foregrounds[4].unlink()
    clip.alphas[5].write_bytes(b"not a picture")
    clip.confidences[4].unlink()
    clip.confidences[5].write_bytes(b"neither")
    load_crops(clip, range(4))
    with pytest.raises(StageError, match=r"000004\.jpg"):
        load_crops(clip, [4])
    with pytest.raises(StageError, match=r"000005\.png"):
        load_crops(clip, [5])


def test_damaged_fits_are_refused_with_the_array_named(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "s")
    path = subject.stage("fit") / "fit.npz"
    good = dict(np.load(path))
    for name, value, says in (
        ("neck", good["neck"][:-1], r"'neck' has shape \[5, 3\], not \[6, 3\]"),
        ("Ts_cam_skull", None, "no 'Ts_cam_skull'"),
        ("expression", np.full_like(good["expression"], np.nan), "'expression' holds values that are not finite"),
        ("eyes", None, "no 'eyes'"),
        ("crops", np.zeros((6, 3)), "sides of 0 px"),
    ):
        arrays = {key: array for key, array in {**good, name: value}.items() if array is not None}
        np.savez(path, **arrays)
        with pytest.raises(StageError, match=says):
            load_clip(subject, 16)
    path.write_bytes(b"PK")
    with pytest.raises(StageError, match="cannot be read"):
        load_clip(subject, 16)
