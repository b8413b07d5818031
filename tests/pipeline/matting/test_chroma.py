"""Chroma key: screens of known colour before which a subject of known alpha was put, and what is no screen."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.matting.chroma import Backdrop, despill, find_backdrop, key
from pipeline.matting.metrics import iou, mad
from pipeline.synthetic import make_clip
from pipeline.video import read_frames, write_video

SIZE, FRAMES = 256, 4
GREEN, DULL_GREEN, BLUE = (20, 190, 60), (70, 155, 105), (30, 60, 200)


@pytest.fixture(scope="module")
def subject() -> tuple[np.ndarray, np.ndarray]:
    """Frames of a subject with loose hair, times their alpha, and the alpha."""
    clip = make_clip(FRAMES, SIZE, SIZE, seed=7, background="plain", hair=150, supersample=4)
    alpha = clip.alpha.astype(np.float64)
    return clip.images - 255 * (1 - alpha[..., None]) * clip.background, alpha


def screen(colour: tuple[int, int, int]) -> np.ndarray:
    """Lit from the upper left."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    return np.array(colour) * (1.1 - 0.3 * x - 0.15 * (y - 0.2) ** 2)[..., None]


def filmed(subject: tuple[np.ndarray, np.ndarray], ground: np.ndarray, folder: Path | None = None) -> list[np.ndarray]:
    """The subject before a ground, with the sensor's noise; through a video file where there is a folder."""
    colours, alpha = subject
    noise = np.random.default_rng(0).normal(0, 2, colours.shape)
    frames = (colours + (1 - alpha[..., None]) * ground + noise).clip(0, 255).round().astype(np.uint8)
    if folder is None:
        return list(frames)
    write_video(folder / "clip.mp4", frames, 25, crf=23)
    return [frame.rgb() for frame in read_frames(folder / "clip.mp4")]


def found(frames: list[np.ndarray]) -> Backdrop:
    backdrop = find_backdrop(frames)
    assert backdrop is not None
    return backdrop


@pytest.mark.parametrize(("colour", "name"), [(GREEN, "green"), (DULL_GREEN, "green"), (BLUE, "blue")])
def test_the_screen_is_found_with_its_light(
    subject: tuple[np.ndarray, np.ndarray], colour: tuple[int, int, int], name: str
) -> None:
    backdrop = found(filmed(subject, screen(colour)))
    assert backdrop.name == name
    assert backdrop.colour.shape == (SIZE, SIZE, 3)
    assert np.abs(backdrop.colour - screen(colour))[subject[1].max(0) == 0].mean() < 1.5
    assert 0.5 < backdrop.noise < 3


@pytest.mark.parametrize(("colour", "limit"), [(GREEN, 0.01), (DULL_GREEN, 0.01), (BLUE, 0.012)])
def test_alpha_comes_back_from_a_compressed_film(
    subject: tuple[np.ndarray, np.ndarray], colour: tuple[int, int, int], limit: float, tmp_path: Path
) -> None:
    frames = filmed(subject, screen(colour), tmp_path)
    backdrop = found(frames)
    alpha = np.stack([key(frame, backdrop) for frame in frames])
    truth = subject[1]
    assert alpha.dtype == np.float32
    assert alpha.min() >= 0
    assert alpha.max() <= 1
    assert mad(truth, alpha) < limit
    assert iou(truth, alpha) > 0.97
    inside = np.stack([cv2.erode((frame == 1).astype(np.uint8), np.ones((7, 7))) > 0 for frame in truth])
    outside = np.stack([cv2.dilate((frame > 0).astype(np.uint8), np.ones((7, 7))) == 0 for frame in truth])
    assert alpha[inside].mean() > 0.995
    assert alpha[outside].mean() < 2e-3


def test_the_screen_leaves_the_colours(subject: tuple[np.ndarray, np.ndarray]) -> None:
    """Over white the cut-out looks as the true one does, and nowhere greener than it may."""
    frames = filmed(subject, screen(DULL_GREEN))
    backdrop = found(frames)
    truth = subject[1][0][..., None]
    wanted = subject[0][0] + 255 * (1 - truth)
    alpha = key(frames[0], backdrop)
    own = despill(frames[0], alpha, backdrop)
    assert own.dtype == np.uint8
    assert (own[..., 1] <= own[..., [0, 2]].max(-1)).all()
    edge = (truth[..., 0] > 0.05) & (truth[..., 0] < 0.95)

    def error(colours: np.ndarray) -> float:
        over_white = colours * alpha[..., None] + 255 * (1 - alpha[..., None])
        return float((over_white - wanted)[edge].mean(0) @ [-0.5, 1, -0.5])

    assert error(frames[0]) > 8
    assert abs(error(own)) < 3


def test_yellow_cloth_stays_yellow_away_from_the_edge() -> None:
    image = np.full((120, 160, 3), GREEN, np.uint8)
    image[30:, 40:120] = (230, 210, 40)
    backdrop = found([image])
    own = despill(image, key(image, backdrop), backdrop)
    assert np.abs(own[70:, 70:90].astype(int) - (230, 210, 40)).max() <= 2


@pytest.mark.parametrize("ground", ["grey", "bluish", "red", "foliage", "stripes", "ends"])
def test_what_is_no_screen_is_not_taken_for_one(subject: tuple[np.ndarray, np.ndarray], ground: str) -> None:
    rng = np.random.default_rng(5)
    rough = cv2.resize(rng.uniform(0.2, 1.3, (40, 40)), (SIZE, SIZE))[..., None]
    grounds = {
        "grey": screen((160, 165, 162)),
        "bluish": screen((150, 155, 180)),
        "red": screen((200, 40, 40)),
        "foliage": np.array((60, 130, 50)) * rough,
        "stripes": np.where(np.arange(SIZE)[None, :, None] % 32 < 16, screen(GREEN), screen(BLUE)),
        "ends": np.where(np.arange(SIZE)[None, :, None] < 0.95 * SIZE, screen(GREEN), screen((150, 150, 150))),
    }
    assert find_backdrop(filmed(subject, grounds[ground])) is None


def test_a_head_may_reach_over_the_upper_border(subject: tuple[np.ndarray, np.ndarray]) -> None:
    frames = [frame[80:240, 40:200] for frame in filmed(subject, screen(GREEN))]
    truth = subject[1][:, 80:240, 40:200]
    assert truth[:, 0].max() == 1
    backdrop = found(frames)
    assert mad(truth, np.stack([key(frame, backdrop) for frame in frames])) < 0.015


def test_a_screen_that_comes_or_goes_or_covers_the_face_is_none(subject: tuple[np.ndarray, np.ndarray]) -> None:
    frames = filmed(subject, screen(GREEN))
    room = filmed(subject, screen((150, 150, 150)))
    assert find_backdrop([*frames[:3], room[3]]) is None
    face = np.zeros((SIZE, SIZE), bool)
    face[100:130, 110:140] = True
    assert find_backdrop(frames, [face] * FRAMES) is not None
    face[:20] = True
    assert find_backdrop(frames, [face] * FRAMES) is None
    assert find_backdrop([]) is None


def test_a_plain_picture_is_all_screen() -> None:
    image = np.full((64, 64, 3), GREEN, np.uint8)
    backdrop = found([image])
    assert key(image, backdrop).max() < 1e-3
