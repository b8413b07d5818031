"""The viewer's pictures are those of the avatar, the film and the mesh."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from reenact_data import change_fit, read_fit, write_dataset

import pipeline
from pipeline.errors import HeadcastError, UserError
from pipeline.novel_views import soft_edge
from pipeline.viewer.picture import Painter, png
from pipeline.viewer.scene import Scene, camera_of, fitted

BLUE = (20, 40, 200)


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Painter:
    return Painter.of(write_dataset(tmp_path_factory.mktemp("picture")).existing("anna"), 1)


@pytest.fixture(scope="module")
def camera(painter: Painter) -> pipeline.Camera:
    start = painter.opening
    found = camera_of(np.array([1.0, 0, 0.05, 0]), np.array([0.02, 0, 0]), start.fov, 120, 90)
    assert found is not None
    return found


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("drive", ["clip", "sliders"])
def test_splats_are_what_the_avatar_renders(
    painter: Painter, camera: pipeline.Camera, drive: str, transparent: bool
) -> None:
    pose = pipeline.Pose(yaw=8)
    scene = Scene(drive=drive, frame=5, expression={"jawOpen": 0.4}, pose=pose, background=BLUE)
    shown = painter.paint(scene, camera, transparent)
    avatar = painter.subject.avatar()
    avatar.threads, avatar.fade = 1, soft_edge(avatar.model, painter.subject.clip)
    driven = painter.subject.condition(5) if drive == "clip" else avatar.condition({"jawOpen": 0.4}, pose)
    behind = None if transparent else np.array(BLUE) / 255
    np.testing.assert_array_equal(shown, avatar.render(driven, camera=camera, background=behind))


def test_a_picture_changes_with_what_is_shown(painter: Painter, camera: pipeline.Camera) -> None:
    scenes = {
        "splats": Scene(),
        "frame": Scene(frame=9),
        "points": Scene(show="points"),
        "mesh": Scene(show="mesh"),
        "edges": Scene(overlay="mesh edges"),
        "landmarks": Scene(overlay="landmarks"),
        "locked": Scene(locked=True),
        "beside": Scene(beside=True),
    }
    pictures = {name: painter.paint(scene, camera) for name, scene in scenes.items()}
    for name, picture in pictures.items():
        assert picture.shape == (90, 120, 3), name
        assert name == "splats" or np.abs(picture.astype(int) - pictures["splats"]).max() > 20, name
    assert (pictures["mesh"] != 255).any(2).mean() > 0.05
    np.testing.assert_array_equal(painter.paint(Scene(), camera), pictures["splats"])


def test_beside_a_film_of_its_own_size_is_the_film(painter: Painter) -> None:
    side = painter.subject.clip.resolution
    camera = fitted(painter.subject.camera(3), 2 * side, side)
    for scene in (Scene(frame=3, beside=True, locked=True), Scene(frame=3, beside=True)):
        np.testing.assert_array_equal(painter.paint(scene, camera)[:, :side], painter.subject.picture(3))
    over = painter.paint(Scene(frame=3, beside=True, locked=True, background=BLUE), camera)
    np.testing.assert_array_equal(over[0, 0], BLUE)
    avatar = painter.paint(Scene(frame=3, locked=True), fitted(painter.subject.camera(3), side, side))
    np.testing.assert_array_equal(painter.paint(Scene(frame=3, beside=True, locked=True), camera)[:, side:], avatar)


def test_a_locked_scene_takes_no_notice_of_the_camera(painter: Painter, camera: pipeline.Camera) -> None:
    far = camera_of(np.array([1.0, 0, 0, 0]), np.array([3.0, 0, 0]), 0.5, 120, 90)
    assert far is not None
    scene = Scene(locked=True)
    np.testing.assert_array_equal(painter.paint(scene, camera), painter.paint(scene, far))
    assert painter.seen(scene, far) and not painter.seen(Scene(), far)


def test_a_transparent_mesh_is_clear_beside_it(painter: Painter, camera: pipeline.Camera) -> None:
    clear = painter.paint(Scene(show="mesh", background=BLUE), camera, transparent=True)
    opaque = painter.paint(Scene(show="mesh", background=BLUE), camera)
    seen = clear[..., 3] == 255
    np.testing.assert_array_equal(clear[seen][:, :3], opaque[seen])
    assert (opaque[~seen] == BLUE).all() and not seen.all()
    decoded = cv2.imdecode(np.frombuffer(png(clear), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(cv2.cvtColor(decoded, cv2.COLOR_BGRA2RGBA), clear)


def test_without_a_baked_avatar_it_says_why(painter: Painter, camera: pipeline.Camera) -> None:
    assert isinstance(painter.baked, HeadcastError)
    with pytest.raises(UserError, match="no exported avatar"):
        painter.paint(Scene(baked=True), camera)


def test_an_avatar_of_another_fit_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    names = read_fit(dataset.existing("anna"))["expression_names"]
    change_fit(dataset.existing("anna"), expression_names=names[::-1])
    with pytest.raises(UserError, match="other coefficients"):
        Painter.of(dataset.existing("anna"), 1)
