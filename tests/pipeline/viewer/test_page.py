"""The page at work: in Chromium, and told by a client of its web socket; and what it says where it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import browser
import cv2
import numpy as np
import pytest
from reenact_data import change_fit, write_dataset

from pipeline.api import Pose
from pipeline.cli.view import View
from pipeline.dataset import Dataset
from pipeline.errors import HeadcastError, StageError, UserError
from pipeline.video import probe
from pipeline.viewer import session
from pipeline.viewer.controls import IN_BROWSER, IN_FOLDER
from pipeline.viewer.picture import Painter
from pipeline.viewer.session import Served, served, ssh_line, view

HOSTILE = "<img src=x onerror=document.title='taken'>"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset in which a coefficient and the head model have names that are HTML."""
    dataset = write_dataset(tmp_path_factory.mktemp("page"))
    anna = dataset.existing("anna")
    path = anna.stage("train") / "avatar.json"
    description = json.loads(path.read_bytes())
    names = [HOSTILE if name == "tongueOut" else name for name in description["expression_names"]]
    description |= {"expression_names": names, "head": HOSTILE}
    description["settings"] |= {"expression_names": names, "head": HOSTILE}
    path.write_text(json.dumps(description))
    change_fit(anna, expression_names=np.array(names))
    return dataset


@pytest.fixture(scope="module")
def at(data: Dataset) -> Iterator[Served]:
    with served(data.root, "anna", threads=1) as page:
        yield page


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def test_the_page_shows_what_is_asked_for(at: Served, tmp_path: Path) -> None:
    controls = at.page.controls
    with browser.chromium(tmp_path / "profile") as opened:
        with opened.visit(at.url) as visit:
            visit.page.get_by_text("Film beside").wait_for()
            until(lambda: at.page.pictures > 0 and not at.page._busy(time.monotonic()))

            def canvas() -> bytes:
                # The panel is at the right and changes as well.
                return visit.page.screenshot(clip={"x": 0, "y": 200, "width": 380, "height": 380})

            until(lambda: canvas() == canvas())
            before, painted = canvas(), at.page.pictures
            visit.page.get_by_text("Face", exact=True).click()
            visit.page.get_by_text("Jaw", exact=True).click()
            until(lambda: visit.page.get_by_text("Open", exact=True).is_visible())
            field = visit.page.locator(f"[id='{controls._coefficients['jawOpen']._impl.uuid}']")
            field.locator("xpath=following-sibling::*//input").fill("1")
            until(lambda: controls.scene().expression.get("jawOpen", 0) > 0)
            until(lambda: controls.scene().drive == "sliders")
            until(lambda: at.page.pictures > painted)
            until(lambda: canvas() != before)
            # What has such a name is shown as text, not obeyed.
            visit.page.get_by_text(HOSTILE).first.wait_for()
            visit.page.get_by_text("Others", exact=True).click()
            assert visit.page.title() != "taken"
            assert visit.page.locator("img[src='x']").count() == 0
        browser.check_clean(visit)
    until(lambda: not at.page._watchers)
    assert at.page.failure is None


def test_presets_and_frames_move_the_sliders(at: Served) -> None:
    controls = at.page.controls
    controls.put({"jawOpen": 0.5, "eyeBlinkLeft": 2.0})
    assert controls._coefficients["jawOpen"].value == 0.5 and controls._coefficients["eyeBlinkLeft"].value == 1.0
    controls._within.value = False
    assert controls.scene().expression == {"jawOpen": 0.5, "eyeBlinkLeft": 1.0}
    controls._take(7)
    subject = at.page.painter.subject
    shown = controls.scene().condition(subject, at.page.painter.full)
    np.testing.assert_allclose(shown.T_cam_head, subject.condition(7).T_cam_head, atol=2e-3)
    controls.put({})
    assert controls.scene().expression == {} and controls._presets.value == "Rest"
    controls._within.value = True


def test_what_no_page_would_send_is_brought_into_range(at: Served) -> None:
    controls, sent = at.page.controls, ("_frame", "_show", "_overlay", "_background", "_speed")
    before = {name: getattr(controls, name).value for name in sent}
    jaw = controls._coefficients["jawOpen"]
    controls._frame.value, controls._show.value, controls._overlay.value = 10**9, "x", "<b>"
    controls._background.value, controls._speed.value, jaw.value = (900, -3, 4), "1e9", float("nan")
    scene = controls.scene()
    assert (scene.frame, scene.show, scene.overlay) == (len(at.page.painter.subject) - 1, "splats", "none")
    assert scene.background == (255, 0, 4) and scene.expression == {}
    controls._toggle()
    controls.advance()
    controls._toggle()
    jaw.value = 0.0
    for name, value in before.items():
        getattr(controls, name).value = value


def test_the_clip_plays_by_its_own_times_and_begins_anew(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    controls, clock = at.page.controls, [100.0]
    monkeypatch.setattr(controls, "_clock", lambda: clock[0])
    controls._frame.value = 0
    controls._toggle()
    times = at.page.painter.subject.clip.times
    clock[0] += float(times[5] - times[0]) + 1e-4
    controls.advance()
    assert controls._frame.value == 5 and controls.scene().drive == "clip"
    clock[0] += float(times[-1] - times[0]) + 1e-3
    controls.advance()
    assert controls._frame.value == 4
    controls._toggle()
    clock[0] += 10
    controls.advance()
    assert controls._frame.value == 4


def test_held_out_frames_are_told_in_words(at: Served) -> None:
    controls, subject = at.page.controls, at.page.painter.subject
    for frame, words in ((0, "training saw it"), (int(subject.test_frames[0]), "held out")):
        controls._frame.value = frame
        controls.tell_frame()
        assert words in controls._about_frame.content


class FakeClient:
    """What the page uses of a browser that viser is connected to."""

    client_id = 10**6

    def __init__(self, at: Served) -> None:
        start = at.page.painter.opening
        self.camera = SimpleNamespace(
            wxyz=np.array([1.0, 0, 0, 0]), position=start.position, fov=start.fov, image_width=65, image_height=48,
            on_update=lambda function: None,
        )  # fmt: skip
        self.scene, self.pictures = self, []
        self.downloads: dict[str, bytes] = {}
        self.told: list[str] = []

    def set_background_image(self, picture: np.ndarray, **_: object) -> None:
        self.pictures.append(picture)

    def flush(self) -> None:
        pass

    def add_notification(self, title: str, body: str, **_: object) -> SimpleNamespace:
        self.told.append(f"{title}: {body}")
        return SimpleNamespace(remove=lambda: None)

    def send_file_download(self, name: str, content: bytes, **_: object) -> None:
        self.downloads[name] = content


@pytest.fixture
def client(at: Served) -> Iterator[FakeClient]:
    found = FakeClient(at)
    asyncio.run(at.page._welcome(found))
    until(lambda: found.pictures)
    yield found
    asyncio.run(at.page._goodbye(found))


@pytest.mark.parametrize("how", ["folder", "browser", "folder in the way", "browser gone"])
def test_a_video_of_what_is_seen_is_kept(at: Served, client: FakeClient, tmp_path: Path, how: str) -> None:
    page, folder = at.page, at.page.painter.subject.subject.root / "recordings"
    watcher = page._watchers[client.client_id]
    page.controls._keep_in.value = IN_BROWSER if how == "browser" else IN_FOLDER
    page._guarded(client, page._record)
    until(lambda: watcher.recording is not None and len(watcher.recording))
    if how == "folder in the way":
        folder.rmdir()
        folder.write_text("in the way")
    if how == "browser gone":
        asyncio.run(page._goodbye(client))
    else:
        page._guarded(client, page._record)
    for writer in page._writers:
        writer.join()
    if how in ("browser", "folder in the way"):
        ((name, content),) = client.downloads.items()
        assert name.startswith("anna-") and name.endswith(".mp4")
        film = tmp_path / name
        film.write_bytes(content)
        assert any("folder" in told or "written" in told for told in client.told) == (how == "folder in the way")
    else:
        (film,) = folder.glob("*.mp4")
        assert json.loads(film.with_suffix(".json").read_bytes())["keys"]["avatar"].keys() == {"decode", "fit", "train"}
        assert not client.downloads
    assert (probe(film).width, probe(film).height) == (66, 48)
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def test_a_saved_picture_is_as_large_as_the_window_and_clear_on_request(at: Served, client: FakeClient) -> None:
    page = at.page
    for transparent, channels in ((False, 3), (True, 4)):
        page.controls.transparent.value = transparent
        page._guarded(client, page._photograph)
        name, content = client.downloads.popitem()
        assert name.endswith(".png")
        assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED).shape == (48, 65, channels)
    page.controls.transparent.value = False


def test_nothing_is_painted_while_nothing_changes_and_newest_wins(at: Served, client: FakeClient) -> None:
    page = at.page
    until(lambda: not page._busy(time.monotonic()))
    painted = page.pictures
    time.sleep(0.3)
    assert page.pictures == painted
    before = client.pictures[-1]
    page.controls.put({"jawOpen": 1.0}, Pose(yaw=5))
    until(lambda: not page._busy(time.monotonic()))
    camera = page._watchers[client.client_id].camera((65, 48))
    assert camera is not None
    np.testing.assert_array_equal(client.pictures[-1], page.painter.paint(page.controls.scene(), camera))
    assert (client.pictures[-1] != before).any()
    page.controls.put({})


def test_what_cannot_be_shown_is_told_and_the_avatar_comes_back(
    at: Served, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: object) -> None:
        raise UserError("The file of the head model is missing.", "fetch it")

    page = at.page
    monkeypatch.setattr(Painter, "head", property(missing))
    page.controls._show.value = "mesh"
    page._changed()
    until(lambda: client.told)
    assert client.told == ["This cannot be shown: The file of the head model is missing. fetch it"]
    assert page.controls._show.value == "splats"
    assert page.failure is None


def test_recordings_that_cannot_be_written_are_refused_before(at: Served) -> None:
    page, folder = at.page, at.page.painter.subject.subject.root / "recordings"
    folder.write_text("in the way")
    try:
        with pytest.raises(HeadcastError) as refused:
            page._check_place()
        assert isinstance(refused.value, StageError) and "this browser" in refused.value.fix
    finally:
        folder.unlink()
    page._check_place()
    assert list(folder.iterdir()) == []


def test_the_command_says_where_it_is_and_ends_when_asked(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(variable, raising=False)
    said: list[str] = []
    options = {"host": "127.0.0.1", "port": 0, "threads": 1, "report": said.append, "stop_requested": lambda: True}
    document = view(data.root, "anna", open_browser=True, **options)
    port = int(document["url"].rpartition(":")[2])
    assert document["url"] == f"http://localhost:{port}"
    text = "\n".join(said)
    assert document["url"] in text and f"ssh -L {port}:127.0.0.1:{port} " in text
    assert "There is no browser here" in text


def test_a_browser_is_opened_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Browser:
        def open(self, url: str) -> bool:
            opened.append(url)
            return True

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(session.webbrowser, "get", Browser)
    assert "opens" in session._open("http://localhost:1") and opened == ["http://localhost:1"]
    monkeypatch.setattr(session.webbrowser, "get", lambda: (_ for _ in ()).throw(session.webbrowser.Error()))
    assert "no browser" in session._open("http://localhost:1")


@pytest.mark.parametrize("fault", ["no such subject", "no trained avatar", "of another schema", "busy port", "threads"])
def test_what_cannot_be_viewed_is_told(data: Dataset, tmp_path: Path, fault: str) -> None:
    options, words = {"subject": "anna", "port": 0}, fault
    with contextlib.ExitStack() as stack:
        if fault == "no such subject":
            options["subject"], words = "nobody", "nobody"
        elif fault == "no trained avatar":
            options["subject"] = "bert"
        elif fault == "of another schema":
            path = data.existing("anna").stage("train") / "avatar.json"
            stack.callback(path.write_bytes, path.read_bytes())
            path.write_text(json.dumps({**json.loads(path.read_bytes()), "schema": 99}))
            words = "has schema 99"
        elif fault == "busy port":
            taken = stack.enter_context(contextlib.closing(session.listen("127.0.0.1", 0, "")))
            options["port"] = taken.getsockname()[1]
            words = f"Port {options['port']} is busy"
        else:
            options["threads"], words = 0, "--threads is 0"
        with pytest.raises(UserError, match=words) as refused:
            View(data=data.root, **options).answer()
        assert refused.value.fix


def test_the_ssh_line_goes_to_where_it_listens(at: Served) -> None:
    assert f"{at.port}:127.0.0.1:{at.port}" in ssh_line(at)
    assert "192.0.2.7:8080" in ssh_line(Served(at.page, at.server, "192.0.2.7", 8080))
