"""Whose alpha it is: other people and furniture go, hair and hats stay, a mirrored copy is told."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from face_clips import Image, face_frames
from numpy.typing import NDArray

from pipeline.assets import FACE_LANDMARKER, asset_path
from pipeline.faces import Detector, Face
from pipeline.matting import people
from pipeline.matting.people import keep_subject, mirror_likeness, touch_words
from pipeline.video import read_frames

SIDE = 384
NOBODY = np.zeros((0, 4), np.float32)


def person(x: int, y: int, width: int = 70, shape: tuple[int, int] = (SIDE, SIDE)) -> tuple[Image, Image, np.ndarray]:
    """Alpha of a head with shoulders around a face at a place, the face's hull, and its box."""
    alpha, hull = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    height = round(1.3 * width)
    cv2.ellipse(alpha, (x, y - width // 8), (round(0.65 * width), round(0.95 * width)), 0, 0, 360, 255, -1)
    cv2.rectangle(alpha, (x - width // 3, y), (x + width // 3, y + width), 255, -1)
    cv2.ellipse(alpha, (x, y + 3 * width), (round(1.3 * width), 2 * width), 0, 0, 360, 255, -1)
    cv2.ellipse(hull, (x, y), (width // 2, height // 2), 0, 0, 360, 255, -1)
    box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2], np.float32)
    return cv2.GaussianBlur(alpha, (5, 5), 0), hull, box


def painted(alphas: list[Image], colours: list[tuple[int, int, int]]) -> tuple[Image, Image, list[Image]]:
    """Image and alpha of things before each other, the first in front, and what each shows of itself."""
    image, rest, shown = np.full((*alphas[0].shape, 3), 128.0), np.ones(alphas[0].shape), []
    for alpha, colour in zip(alphas, colours, strict=True):
        part = alpha / 255 * rest
        image = image * (1 - part[..., None]) + part[..., None] * colour
        shown.append((255 * part).round().astype(np.uint8))
        rest = rest - part
    return image.astype(np.uint8), (255 * (1 - rest)).round().astype(np.uint8), shown


def share(kept: Image, of: Image) -> float:
    """How much of one alpha is left in another."""
    return float(np.minimum(kept, of).sum(dtype=float) / of.sum(dtype=float))


def grey(alpha: Image) -> Image:
    return np.full((*alpha.shape, 3), 128, np.uint8)


def test_a_person_alone_is_left_as_it_is() -> None:
    alpha, hull, _ = person(190, 150)
    kept = keep_subject(alpha, grey(alpha), hull, NOBODY)
    np.testing.assert_array_equal(kept.alpha, alpha)
    assert not kept.touched


def test_without_alpha_in_the_face_nothing_is_the_subjects() -> None:
    alpha, hull, _ = person(190, 150)
    kept = keep_subject(np.where(cv2.dilate(hull, None) > 0, 0, alpha).astype(np.uint8), grey(alpha), hull, NOBODY)
    assert not kept.alpha.any()


def test_what_stands_apart_goes() -> None:
    alpha, hull, _ = person(150, 150)
    lamp = np.zeros_like(alpha)
    cv2.rectangle(lamp, (330, 30), (370, 200), 255, -1)
    kept = keep_subject(np.maximum(alpha, lamp), grey(alpha), hull, NOBODY)
    np.testing.assert_array_equal(kept.alpha, alpha)


@pytest.mark.parametrize("subject", [0, 1])
@pytest.mark.parametrize("widths", [(70, 70), (80, 50)])
def test_a_second_person_who_touches_is_split_off(subject: int, widths: tuple[int, int]) -> None:
    people_there = [person(120, 150, widths[0]), person(275, 160, widths[1])]
    image, alpha, shown = painted([one[0] for one in people_there], [(200, 150, 120), (60, 70, 140)])
    other = people_there[1 - subject][2][None]
    kept = keep_subject(alpha, image, people_there[subject][1], np.concatenate([other, np.full((1, 4), np.nan)]))
    assert kept.touched
    assert share(kept.alpha, shown[subject]) > 0.97
    assert share(kept.alpha, shown[1 - subject]) < 0.03


def test_a_second_person_apart_does_not_touch() -> None:
    mine, other = person(110, 150, 50), person(300, 150, 50)
    kept = keep_subject(np.maximum(mine[0], other[0]), grey(mine[0]), mine[1], other[2][None])
    np.testing.assert_array_equal(kept.alpha, mine[0])
    assert not kept.touched


@pytest.mark.parametrize("strength", [255, 90])
def test_furniture_that_hangs_on_by_a_neck_goes(strength: int) -> None:
    alpha, hull, _ = person(110, 190, 50)
    shelf = np.zeros_like(alpha)
    cv2.rectangle(shelf, (290, 60), (383, 300), strength, -1)
    cv2.line(shelf, (150, 250), (290, 250), strength, 7)
    kept = keep_subject(np.maximum(alpha, shelf), grey(alpha), hull, NOBODY)
    assert share(kept.alpha, alpha) > 0.99
    assert share(kept.alpha, np.where(alpha > 0, 0, shelf).astype(np.uint8)) < 0.25


def test_hair_hat_and_raised_hand_stay() -> None:
    alpha, hull, _ = person(190, 190)
    extra = np.zeros_like(alpha)
    for x in range(150, 231, 10):  # single hairs that stand off
        cv2.line(extra, (x, 130), (2 * x - 190, 60), 120, 1, cv2.LINE_AA)
    cv2.rectangle(extra, (130, 95), (250, 125), 255, -1)
    cv2.rectangle(extra, (160, 60), (220, 95), 255, -1)
    cv2.line(extra, (290, 380), (300, 200), 255, 30)
    cv2.circle(extra, (300, 190), 26, 255, -1)
    whole = np.maximum(alpha, extra)
    kept = keep_subject(whole, grey(alpha), hull, NOBODY)
    assert share(kept.alpha, whole) > 0.995


def test_touching_is_told_by_frames() -> None:
    flags = np.zeros(60, bool)
    assert touch_words(flags) == []
    flags[10:41] = True
    assert touch_words(flags) == ["a second person touches the subject in frames 10-40: split at the seam"]


@pytest.mark.parametrize(("behind", "step"), [("d20", 250), ("d10", 230)])
def test_real_people_before_each_other_are_told_apart(clips: Path, behind: str, step: int) -> None:
    """The man in front against a bright wall gives his own alpha; the other's is her or his shape beside it."""
    asset_path(FACE_LANDMARKER)
    with Detector(asset_path(FACE_LANDMARKER, fetch=False)) as detector:
        cut, faces = [], []
        for name in ("d18", behind):
            frame = next(itertools.islice(read_frames(clips / f"{name}.mp4"), 20, None)).rgb()
            side = min(frame.shape[:2])
            square = frame[:side, (frame.shape[1] - side) // 2 :][:, :side]
            cut.append(np.asarray(cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8))
            faces.append(detector.detect(cut[-1])[0])
    alphas = [matted(image, face) for image, face in zip(cut, faces, strict=True)]
    wide = (SIDE, SIDE + step)
    placed = [np.zeros(wide, np.uint8), np.zeros(wide, np.uint8)]
    image = np.full((*wide, 3), 128, np.uint8)
    for number in (1, 0):
        left = number * step
        placed[number][:, left : left + SIDE] = alphas[number]
        part = placed[number][..., None] / 255
        full = np.zeros((*wide, 3))
        full[:, left : left + SIDE] = cut[number]
        image = (full * part + image * (1 - part)).astype(np.uint8)
    shown = [placed[0], np.where(placed[0] > 0, 0, placed[1]).astype(np.uint8)]
    union = np.maximum(*placed)
    boxes = [face.box + [number * step, 0] * 2 for number, face in enumerate(faces)]
    for number in (0, 1):
        hull = np.zeros(wide, np.uint8)
        x0, y0, x1, y1 = boxes[number]
        middle, half = (round((x0 + x1) / 2), round((y0 + y1) / 2)), (round((x1 - x0) / 2.3), round((y1 - y0) / 2.3))
        cv2.ellipse(hull, middle, half, 0, 0, 360, 255, -1)
        kept = keep_subject(union, image, hull, boxes[1 - number][None])
        assert kept.touched
        assert share(kept.alpha, shown[number]) > 0.93
        assert share(kept.alpha, shown[1 - number]) < 0.08


def matted(image: Image, face: Face) -> Image:
    """A hard alpha of the person by GrabCut, begun with the shape that is expected of one."""
    away = people.person_distance(face.box, image.shape[:2])
    labels = np.where(away < 0.6, cv2.GC_FGD, np.where(away < 1.1, cv2.GC_PR_FGD, cv2.GC_PR_BGD)).astype(np.uint8)
    labels[away > 1.6] = cv2.GC_BGD
    cv2.setRNGSeed(0)
    cv2.grabCut(image, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 2, cv2.GC_INIT_WITH_MASK)
    return np.where(np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)), 255, 0).astype(np.uint8)


def motions(images: list[Image], detector: Detector) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    faces = [detector.detect(np.ascontiguousarray(image))[0] for image in images]
    return np.stack([face.scores for face in faces]), np.stack([face.pose[:3, :3] for face in faces])


def test_a_mirrored_copy_is_told_from_another_moment_of_the_same_face() -> None:
    asset_path(FACE_LANDMARKER)
    images = list(face_frames()[:60])
    with Detector(asset_path(FACE_LANDMARKER, fetch=False)) as detector:
        mine = motions(images, detector)
        mirrored = motions([image[:, ::-1] for image in images], detector)
        names = detector.names
    later = tuple(np.roll(values, 23, axis=0) for values in mine)
    assert mirror_likeness(*mine, *mirrored, names) > people.MIRROR_LIKENESS
    assert mirror_likeness(*mine, *later, names) < 0.5
    assert mirror_likeness(*(values[:10] for values in (*mine, *mirrored)), names) == 0
