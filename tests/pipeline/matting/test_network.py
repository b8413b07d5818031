"""The networks behind one small interface: their answers, threads, and models that are not there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from face_clips import empty_room, face_frames

from pipeline.assets import SELFIE_SEGMENTATION, U2NETP, asset_path
from pipeline.errors import StageError, UserError
from pipeline.faces import Detector
from pipeline.matting.network import SelfieSegmentation, open_network


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    """The models, fetched before they are opened, as a run does."""
    asset_path(SELFIE_SEGMENTATION)
    asset_path(U2NETP)
    asset_path("face_landmarker")


def test_u2netp_gives_what_rembg_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    import rembg
    from PIL import Image as Pillow

    monkeypatch.setenv("U2NET_HOME", str(asset_path(U2NETP).parent))
    session = rembg.new_session("u2netp", providers=["CPUExecutionProvider"])
    image = face_frames()[0]
    theirs = np.asarray(session.predict(Pillow.fromarray(image))[0])
    with open_network(U2NETP) as predict:
        ours = predict(image)
    assert np.abs(ours.astype(float) - theirs).mean() < 1.5
    assert ((ours > 127) != (theirs > 127)).mean() < 0.002


@pytest.mark.parametrize("model", [SELFIE_SEGMENTATION, U2NETP])
def test_the_person_is_found(model: str) -> None:
    image = face_frames()[0]
    with Detector(asset_path("face_landmarker")) as detector:
        x0, y0, x1, y1 = detector.detect(image)[0].box.astype(int)
    with open_network(model) as predict:
        alpha = predict(image)
        assert predict(image[:, :321]).shape == (360, 321)
    assert alpha.shape == image.shape[:2] and alpha.dtype == np.uint8
    face = alpha[(3 * y0 + y1) // 4 : (y0 + 3 * y1) // 4, (3 * x0 + x1) // 4 : (x0 + 3 * x1) // 4]
    assert face.min() > 127 and face.mean() > 240
    assert alpha[:60, :100].max() < 30 and alpha[:60, -100:].max() < 30


def test_people_are_told_from_rooms() -> None:
    with open_network(SELFIE_SEGMENTATION) as predict:
        assert (predict(empty_room()) > 127).mean() < 0.02


@pytest.mark.parametrize("model", [SELFIE_SEGMENTATION, U2NETP])
def test_threads_give_the_same_answers(model: str) -> None:
    images = [np.ascontiguousarray(cv2.resize(image, (320, 180))) for image in face_frames()[:12:3]]
    with open_network(model) as predict:
        alone = [predict(image) for image in images]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(predict, images * 2))
    assert all(np.array_equal(a, b) for a, b in zip(alone * 2, together, strict=True))


def test_closing_ends_the_interpreters_of_all_threads() -> None:
    network = SelfieSegmentation()
    image = face_frames()[0]
    with ThreadPoolExecutor(2) as pool:
        first = list(pool.map(network, [image] * 4))
    assert 1 <= len(network._opened) <= 2
    network.close()
    assert not network._opened
    network.close()
    np.testing.assert_array_equal(network(image), first[0])
    network.close()


@pytest.mark.parametrize("model", [U2NETP, SELFIE_SEGMENTATION])
def test_a_missing_or_damaged_model_is_said(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = asset_path(model).name
    monkeypatch.setenv("HEADCAST_CACHE", str(tmp_path))
    with pytest.raises(StageError, match="is not on this machine") as missing, open_network(model):
        pass
    assert missing.value.fix == f"run: headcast assets fetch {model}"
    (tmp_path / name).write_bytes(b"not the network")
    with pytest.raises(UserError, match="has sha256") as wrong, open_network(model):
        pass
    assert wrong.value.fix == f"delete that file, then run: headcast assets fetch {model}"


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UserError, match="'nonsense' cannot be the matting model"), open_network("nonsense"):
        pass
