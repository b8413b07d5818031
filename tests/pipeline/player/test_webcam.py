"""A camera drives the avatar in the page: a film of a face in place of the viewer's, and all that may be refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import avatar_data
import browser
import numpy as np
import pytest

from pipeline.assets import FACE_LANDMARKER, asset_path
from pipeline.bench_player import READY
from pipeline.clip import load_clip
from pipeline.errors import StageError
from pipeline.exports import webcam
from pipeline.exports.packing import Performance, pack
from pipeline.exports.web import AVATAR, SINGLE, write_page
from pipeline.faces import Detector
from pipeline.frames import save_image

JAW = "player.drive.expression[player.names.indexOf('jawOpen')]"
OPENED = f"""(() => {{
  const {{ pixels }} = player.picture(player.drive, camera);
  return [{JAW}, pixels.filter((value, i) => Math.abs(value - before[i]) > 20).length];
}})()"""
ONE_DETECTION = """async ({ picture }) => {
  const { asset } = await import("./assets.js"), { readTensors } = await import("./safetensors.js");
  const { arrays: { worker, ...parts } } = await readTensors(await asset("webcam.bin"));
  const tracker = new Worker(URL.createObjectURL(new Blob([worker])));
  const answer = () => new Promise((resolve) => (tracker.onmessage = ({ data }) => resolve(data)));
  tracker.postMessage(parts);
  await answer();
  const frame = await createImageBitmap(await (await fetch(picture)).blob());
  tracker.postMessage({ frame, milliseconds: 1 });
  const { face } = await answer();
  const { headPose } = await import("./retarget.js");
  tracker.terminate();
  return { ...face, pose: [...headPose(face.matrix)] };
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a synthetic avatar, which the webcam can drive."""
    clip = load_clip(avatar_data.write_subject(tmp_path_factory.mktemp("data") / "anna"), avatar_data.SIZE)
    jaw = clip.expression_names.index("jawOpen")
    clip.expression[:3, jaw] = 1  # it has shown an open mouth
    avatar = avatar_data.linear_avatar()
    avatar.linear[:, jaw] = 20  # it shows
    packed = pack(avatar, Performance(avatar_data.conditions(avatar_data.clip()), clip.times))
    try:
        driven = webcam.pack(clip)
    except StageError as error:
        pytest.skip(f"MediaPipe for browsers is not here: {error.what}")
    folder = tmp_path_factory.mktemp("site")
    write_page(folder, "anna", {AVATAR: packed.data, webcam.FILE: driven})
    return folder


@pytest.fixture(scope="module")
def frames(clips: Path) -> list[Any]:
    with av.open(clips / "d18.mp4") as film:
        return list(film.decode(video=0))


@pytest.fixture(scope="module")
def camera(frames: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Chromium]:
    """A Chromium with a camera that sees a man who opens his mouth wide."""
    film = tmp_path_factory.mktemp("film") / "film.mjpeg"
    with av.open(film, "w", format="mjpeg") as written:
        stream = written.add_stream("mjpeg", 30, options={"qscale": "3"})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuvj420p"
        for frame in frames:
            written.mux(stream.encode(frame.reformat(format="yuvj420p")))
        written.mux(stream.encode())
    with browser.chromium(tmp_path_factory.mktemp("profile"), camera=film) as opened:
        yield opened


def wait(page: Any, script: str, holds: Callable[[Any], bool], seconds: float = 60) -> Any:
    """What a script gives once that holds; Playwright's own waiting is forbidden by the page's policy."""
    for _ in range(round(seconds * 10)):
        found = page.evaluate(script)
        if holds(found):
            return found
        page.wait_for_timeout(100)
    raise AssertionError(f"{script}: {found}")


@pytest.mark.parametrize("place", ["folder", "single"])
def test_the_mouth_before_the_camera_opens_that_of_the_avatar(place: str, site: Path, camera: browser.Chromium) -> None:
    with (
        browser.serve(site) as url,
        camera.visit(url if place == "folder" else (site / SINGLE).as_uri(), width=640, height=400) as visit,
    ):
        page = visit.page
        page.locator(READY).wait_for()
        page.get_by_label("Drive with the camera").click()
        page.locator("#driver-webcam video").wait_for()
        shut = wait(page, JAW, lambda jaw: jaw < 0.3)
        page.evaluate("window.camera = player.camera(); window.before = player.picture(player.drive, camera).pixels")
        page.get_by_text("Hide my picture").click()
        opened, changed = wait(page, OPENED, lambda found: found[0] > shut + 0.4)
        assert changed > 100
        wait(page, JAW, lambda jaw: jaw < opened - 0.3)
        tracks = "document.querySelector('#driver-webcam video').srcObject.getTracks()"
        page.evaluate(f"window.track = {tracks}[0]")
        page.get_by_label("Drive with the camera").click()
        assert page.evaluate("[player.driver, track.readyState]") == ["sliders", "ended"]
        assert page.locator("#driver-webcam *").count() == 0
    browser.check_clean(visit)


def test_the_page_sees_what_the_tracker_sees(site: Path, frames: list[Any], camera: browser.Chromium) -> None:
    image = frames[20].to_ndarray(format="rgb24")
    save_image(site / "face.png", image)
    with browser.serve(site) as url, camera.visit(url) as visit:
        visit.page.locator(READY).wait_for()
        seen = visit.page.evaluate(ONE_DETECTION, {"picture": "face.png"})
    with Detector(asset_path(FACE_LANDMARKER)) as detector:
        (face,) = detector.detect(image)
        names = detector.names
    np.testing.assert_allclose(np.reshape(seen["matrix"], (4, 4)).T, face.pose, atol=0.05)
    scores = [seen["coefficients"].get(name, 0.0) for name in names]
    np.testing.assert_allclose(scores, face.scores, atol=0.03)
    # The head's joint lies behind and below the middle of the canonical face; y and z are turned over.
    joint = np.diag([1, -1, -1]) @ (face.pose @ [0, -1.35, -6.0, 1])[:3] / 100
    np.testing.assert_allclose(np.reshape(seen["pose"], (4, 4))[:3, 3], joint, atol=1e-3)
    browser.check_clean(visit)


REFUSALS = (
    ("new DOMException('', 'NotAllowedError')", "does not let this page use the camera: allow it"),
    ("new DOMException('', 'NotFoundError')", "There is no camera here."),
    ("new DOMException('', 'NotReadableError')", "another program may hold it"),
    ("new TypeError('<b>odd</b>')", "The camera does not start: <b>odd</b>."),
    (None, "Browsers give a camera only to pages from https://, from localhost or from the disk."),
)


def test_a_refusal_is_told_in_words(site: Path, camera: browser.Chromium) -> None:
    with browser.serve(site) as url, camera.visit(url) as visit:
        page = visit.page
        page.locator(READY).wait_for()
        for refusal, words in REFUSALS:
            refuse = f"{{ getUserMedia: async () => {{ throw {refusal}; }} }}" if refusal else "undefined"
            page.evaluate(
                f"Object.defineProperty(navigator, 'mediaDevices', {{ value: {refuse}, configurable: true }})"
            )
            page.get_by_label("Drive with the camera").click()
            page.get_by_text(words).wait_for()
            assert page.evaluate("player.driver") is None
            assert page.locator("#driver-webcam *").count() == 0
    browser.check_clean(visit)


def test_a_damaged_file_is_told_in_words_and_may_be_mended(
    site: Path, camera: browser.Chromium, tmp_path: Path
) -> None:
    shutil.copytree(site, tmp_path, dirs_exist_ok=True)
    whole = (site / webcam.FILE).read_bytes()
    (tmp_path / webcam.FILE).write_bytes(whole[:-100])
    with browser.serve(tmp_path) as url, camera.visit(url) as visit:
        visit.page.locator(READY).wait_for()
        visit.page.get_by_label("Drive with the camera").click()
        visit.page.get_by_text("A file of this page is damaged: it does not unpack.").wait_for()
        (tmp_path / webcam.FILE).write_bytes(whole)
        visit.page.get_by_label("Drive with the camera").click()
        visit.page.locator("#driver-webcam video").wait_for()
    browser.check_clean(visit)
