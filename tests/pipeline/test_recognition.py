"""Telling people apart, with a recognition model and without one, and photographs that cannot say who is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from face_clips import Image, empty_room, face_frames, person_frames, write_recognition_model

from pipeline.assets import asset_path
from pipeline.errors import StageError, UserError
from pipeline.faces import Detector, Face
from pipeline.recognition import (
    ARCFACE_LANDMARKS,
    ARCFACE_POINTS,
    MODELS,
    Portrait,
    Recognizer,
    check_photo,
    different,
    find_recognizer,
    likeness,
    models_folder,
    portrait,
    shapes_apart,
    surely_same,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An InsightFace home without models."""
    monkeypatch.setenv("INSIGHTFACE_HOME", str(tmp_path / "insightface"))
    return tmp_path / "insightface"


@pytest.fixture
def recognizer(home: Path) -> Recognizer:
    return Recognizer(write_recognition_model(home / "models/buffalo_l" / MODELS["buffalo_l"]))


@pytest.fixture(scope="module")
def seen() -> list[list[tuple[Image, Face]]]:
    """Some frames of each of three people, with the face in each."""
    with Detector(asset_path("face_landmarker")) as detector:
        return [[(image, detector.detect(image)[0]) for image in person_frames(number)[::4]] for number in range(3)]


def photo(path: Path, image: Image) -> Path:
    cv2.imwrite(str(path), image[..., ::-1])
    return path


def test_colours_and_proportions_tell_people_apart(seen: list[list[tuple[Image, Face]]]) -> None:
    early, late = ([portrait(frames[part], None) for frames in seen] for part in (slice(0, 3), slice(3, 6)))
    for number, (a, b) in enumerate(zip(early, late, strict=True)):
        assert surely_same(a, b)
        assert not different(a, b, one_clip=True)
        others = [likeness(a, late[other]) for other in range(3) if other != number]
        assert likeness(a, b) > max(others) + 0.3
        assert likeness(a, b) == pytest.approx(likeness(b, a), abs=1e-9)
        assert not any(surely_same(a, late[other]) for other in range(3) if other != number)


def test_proportions_do_not_depend_on_where_and_how_the_head_is_turned(seen: list[list[tuple[Image, Face]]]) -> None:
    face = seen[0][0][1]
    turn, _ = cv2.Rodrigues(np.array([0.2, -0.4, 0.1]))
    landmarks = (face.landmarks @ turn.T * 1.7 + [300, -20, 4]).astype(np.float32)
    moved = Face(landmarks, face.scores, face.pose)
    image = np.zeros((64, 64, 3), np.uint8)
    assert shapes_apart(portrait([(image, face)], None), portrait([(image, moved)], None)) < 1e-6


def test_what_the_picture_does_not_show_is_not_compared(seen: list[list[tuple[Image, Face]]]) -> None:
    image, face = seen[0][0]
    bottom = int(face.box[3])
    cut = portrait([(image[:bottom], face)], None)
    assert cut.colours[2] is None
    assert surely_same(cut, portrait(seen[0][1:], None))


def test_embeddings_decide_where_there_are_some() -> None:
    def of(x: float, y: float, shape: float) -> Portrait:
        return Portrait(np.full((4, 3), shape), (np.ones(4) / 4,), np.array([x, y]))

    assert not different(of(1, 0, 0), of(0.6, 0.8, 9), one_clip=True)
    assert surely_same(of(1, 0, 0), of(0.6, 0.8, 9))
    assert different(of(1, 0, 0), of(0, 1, 0), one_clip=False)
    assert likeness(of(1, 0, 0), of(0.6, 0.8, 9)) == pytest.approx(0.6)


def test_a_network_of_the_users_sees_the_face_upright(
    recognizer: Recognizer, seen: list[list[tuple[Image, Face]]]
) -> None:
    image, face = seen[0][0]
    embedding = recognizer.embed(image, face)
    assert embedding.shape == (147,)
    assert np.linalg.norm(embedding) == pytest.approx(1)
    turned = cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE)
    points = face.landmarks.copy()
    points[:, 0], points[:, 1] = image.shape[0] - face.landmarks[:, 1], face.landmarks[:, 0]
    assert embedding @ recognizer.embed(turned, Face(points, face.scores, face.pose)) > 0.99
    assert len(ARCFACE_POINTS) == len(ARCFACE_LANDMARKS) == 5


def test_the_best_model_that_is_there_is_taken(home: Path) -> None:
    assert find_recognizer() is None
    write_recognition_model(home / "models/buffalo_s" / MODELS["buffalo_s"])
    found = find_recognizer()
    assert found is not None
    assert found.name == "buffalo_s/w600k_mbf.onnx"
    write_recognition_model(home / "models/antelopev2" / MODELS["antelopev2"])
    found = find_recognizer()
    assert found is not None
    assert found.name == "antelopev2/glintr100.onnx"


def test_models_are_looked_for_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("INSIGHTFACE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".insightface" / "models"


def test_a_file_that_is_no_network_is_named(home: Path) -> None:
    file = home / "models/buffalo_l" / MODELS["buffalo_l"]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"this is no network")
    with pytest.raises(StageError, match=r"w600k_r50\.onnx' cannot be used: ") as caught:
        find_recognizer()
    assert caught.value.fix == "put the right file there, or remove it"


def test_without_a_model_a_photograph_is_refused_with_files_and_licence(tmp_path: Path, home: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_photo(photo(tmp_path / "anna.png", face_frames()[0]))
    assert f"'{home / 'models'}' has none of: buffalo_l/w600k_r50.onnx, antelopev2/glintr100.onnx" in caught.value.what
    assert "choose with --person N" in caught.value.fix
    assert "for non-commercial research only" in caught.value.fix
    assert str(home / "models" / "buffalo_l") in caught.value.fix
    assert "INSIGHTFACE_HOME" in caught.value.fix


def _two(path: Path) -> Path:
    return photo(path, np.concatenate([face_frames()[0], face_frames()[0][:, ::-1]], axis=1))


def _text(path: Path) -> Path:
    path.write_text("no photograph")
    return path


def _nothing(path: Path) -> Path:
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: photo(path, empty_room()), "The photograph '{path}' shows no face."),
        (_two, "The photograph '{path}' shows 2 faces."),
        (_text, "'{path}' is not a photograph that can be read."),
        (_nothing, "The photograph '{path}' is empty (0 bytes)."),
        (lambda path: path, "The photograph '{path}' cannot be read: No such file or directory."),
    ],
    ids=["no face", "two faces", "text", "empty", "missing"],
)
def test_photographs_that_cannot_tell_are_refused(
    tmp_path: Path, recognizer: Recognizer, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path / "photo.png")
    with pytest.raises(UserError) as caught:
        check_photo(path)
    assert caught.value.what == message.format(path=path)
    assert caught.value.fix


def test_a_face_that_fills_the_photograph_is_found(
    tmp_path: Path, recognizer: Recognizer, seen: list[list[tuple[Image, Face]]]
) -> None:
    image, face = seen[0][0]
    x0, y0, x1, y1 = face.box.astype(int)
    path = photo(tmp_path / "close.png", cv2.resize(image[y0 - 4 : y1 + 4, x0 - 4 : x1 + 4], None, fx=4, fy=4))
    check_photo(path)
