"""The viewer at work: a picture for each browser whenever something changed, saved pictures and videos."""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import HeadcastError, StageError
from pipeline.products import Product, Sources, place_for
from pipeline.viewer.controls import IN_BROWSER, Controls
from pipeline.viewer.picture import JPEG_QUALITY, Painter, png
from pipeline.viewer.recording import Recording
from pipeline.viewer.scene import Scene, camera_of, size_within

if TYPE_CHECKING:
    from pipeline.viewpoint import Camera

FOLDER = "recordings"
STAGES = ("decode", "fit", "train")
SETTLED_SECONDS = 0.2
"""After the last change until the picture at its full size follows, where those in motion are smaller."""
MOTION_SECONDS = 1 / 30
MOTION_SIDES = (1440, 1080, 900, 720, 512, 384)
"""Shorter sides of pictures in motion: the largest that comes in `MOTION_SECONDS`, at least the last."""
TICK_SECONDS = 0.01
TOLD_SECONDS = 0.25

Target = tuple[Scene, tuple[float, ...], tuple[int, int]]
"""What a browser shows: the scene, the numbers of viser's camera, the picture's size."""


@dataclass(eq=False)
class Watcher:
    """A browser that looks."""

    client: Any
    view: tuple[float, ...] = ()
    """wxyz, position, field of view."""
    window: tuple[int, int] = (1, 1)
    moved: float = 0.0
    """When the view changed."""
    shown: Target | None = None
    recording: Recording | None = None
    arrivals: deque[float] = field(default_factory=lambda: deque(maxlen=240))

    def look(self, now: float) -> None:
        """Take the browser's camera."""
        camera = self.client.camera
        self.view = (*map(float, camera.wxyz), *map(float, camera.position), float(camera.fov))
        self.window, self.moved = (int(camera.image_width), int(camera.image_height)), now

    def camera(self, size: tuple[int, int]) -> Camera | None:
        """The camera of a picture of that size."""
        return camera_of(np.array(self.view[:4]), np.array(self.view[4:7]), self.view[7], *size)


class Page:
    """A subject's page on a viser server.

    Args:
        server: viser's.
        painter: of the subject.
    """

    def __init__(self, server: Any, painter: Painter) -> None:
        self.painter, self.pictures = painter, 0
        self.failure: BaseException | None = None
        """What ended the loop, where something did."""
        self._name = painter.subject.name
        self._watchers: dict[int, Watcher] = {}
        self._writers: list[threading.Thread] = []
        self._wake = threading.Condition()
        self._dirty, self._changed_at, self._stopping = True, 0.0, False
        self._seconds_per_pixel, self._last_seconds, self._told = 0.0, 0.0, (0.0, "")
        self._scene, self._guessed = Scene(), False
        self.controls = Controls(server.gui, self._name, painter, self._changed)
        self.controls.photograph.on_click(lambda event: self._guarded(event.client, self._photograph))
        self.controls.record.on_click(lambda event: self._guarded(event.client, self._record))
        self.controls.centre.on_click(lambda event: self._centre(event.client))
        self._opening = painter.opening
        start = server.initial_camera
        start.position, start.look_at, start.up = self._opening.position, self._opening.look_at, self._opening.up
        start.fov = self._opening.fov
        server.scene.set_up_direction(self._opening.up)
        server.on_client_connect(self._welcome)
        server.on_client_disconnect(self._goodbye)
        self._thread = threading.Thread(target=self._run, name="viewer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop; recordings are written first."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._thread.join()
        for watcher in list(self._watchers.values()):
            self._finish(watcher, time.monotonic())
        for writer in self._writers:
            writer.join()

    async def _welcome(self, client: Any) -> None:
        watcher = Watcher(client)
        watcher.look(time.monotonic())

        async def moved(_: Any) -> None:
            with self._wake:
                watcher.look(time.monotonic())
                self._wake.notify_all()

        client.camera.on_update(moved)
        with self._wake:
            self._watchers[client.client_id] = watcher
            self._wake.notify_all()

    async def _goodbye(self, client: Any) -> None:
        with self._wake:
            gone = self._watchers.pop(client.client_id, None)
        if gone is not None and gone.recording is not None:
            self._finish(gone, time.monotonic())
            self.controls.recording(False)

    def _changed(self) -> None:
        with self._wake:
            self._dirty, self._changed_at = True, time.monotonic()
            self._wake.notify_all()

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not self._turn(time.monotonic()):
                    with self._wake:
                        if not self._stopping:
                            self._wake.wait(TICK_SECONDS if self._busy(time.monotonic()) else None)
        except Exception as error:  # noqa: BLE001 - raised by the thread that waits
            self.failure = error

    def _busy(self, now: float) -> bool:
        """Whether something may be due without anybody's doing. The lock is held."""
        last = max([self._changed_at, *(watcher.moved for watcher in self._watchers.values())])
        return self._dirty or self.controls.playing or now - last < 2 + SETTLED_SECONDS

    def _turn(self, now: float) -> bool:
        """Show what is due; whether anything was."""
        self.controls.advance()
        with self._wake:
            dirty, self._dirty = self._dirty, False
            watchers = list(self._watchers.values())
        if dirty or self.controls.playing:
            self._scene = self.controls.scene()
            self.controls.tell_frame()
        due = [(watcher, target) for watcher in watchers if (target := self._target(watcher, now)) != watcher.shown]
        for watcher, target in due:
            self._show(watcher, target)
        self._tell(time.monotonic())
        return bool(due)

    def _target(self, watcher: Watcher, now: float) -> Target:
        if watcher.recording is not None:
            return self._scene, watcher.view, watcher.recording.size
        full = size_within(*watcher.window)
        if self.controls.playing or now - max(self._changed_at, watcher.moved) < SETTLED_SECONDS:
            pixels = MOTION_SECONDS / self._seconds_per_pixel if self._seconds_per_pixel else math.inf
            sides = (side for side in MOTION_SIDES if full[0] * full[1] * (side / min(full)) ** 2 <= pixels)
            if full[0] * full[1] > pixels:
                full = size_within(*full, shorter=next(sides, MOTION_SIDES[-1]))
        return self._scene, watcher.view, full

    def _show(self, watcher: Watcher, target: Target) -> None:
        scene, _, size = target
        camera = watcher.camera(size)
        watcher.shown = target
        if camera is None:
            return
        begun = time.perf_counter()
        try:
            picture = self.painter.paint(scene, camera)
        except HeadcastError as error:
            self.controls.plain()
            _notify(watcher.client, "This cannot be shown", error)
            self._changed()
            return
        self._guessed = not self.painter.seen(scene, camera)
        watcher.client.scene.set_background_image(picture, format="jpeg", jpeg_quality=JPEG_QUALITY)
        watcher.client.flush()
        self._last_seconds = time.perf_counter() - begun
        share = self._last_seconds / (size[0] * size[1])
        self._seconds_per_pixel += (0.3 if self._seconds_per_pixel else 1.0) * (share - self._seconds_per_pixel)
        self.pictures += 1
        now = time.monotonic()
        watcher.arrivals.append(now)
        recording = watcher.recording
        if recording is not None and size == recording.size:
            recording.add(picture, now)
            if recording.full(now):
                self._guarded(watcher.client, self._record)

    def _tell(self, now: float) -> None:
        """How fast pictures come, now and then."""
        if now - self._told[0] < TOLD_SECONDS or not self._watchers:
            return
        with self._wake:
            watchers = list(self._watchers.values())
        rates = [sum(now - arrival < 1 for arrival in watcher.arrivals) for watcher in watchers]
        sizes = [watcher.shown[2] for watcher in watchers if watcher.shown is not None]
        size = " × ".join(map(str, sizes[-1])) if sizes else ""
        rate = max(rates, default=0)
        pace = f"{rate} pictures a second" if rate > 1 else "still"
        text = f"{pace} · {1000 * self._last_seconds:.0f} ms a picture · {size}"
        if self._guessed:
            text += "\nThe clip never showed this side: what is seen is a guess."
        if text != self._told[1]:
            self.controls.tell(text)
        self._told = (now, text)

    def _centre(self, client: Any) -> None:
        if client is not None:
            client.camera.up_direction = self._opening.up
            client.camera.position = self._opening.position
            client.camera.look_at = self._opening.look_at

    def _guarded(self, client: Any, work: Any) -> None:
        """Do something for a browser; what goes wrong is told there."""
        watcher = None if client is None else self._watchers.get(client.client_id)
        if watcher is None:
            return
        try:
            work(watcher)
        except HeadcastError as error:
            _notify(client, "This did not work", error)

    def _photograph(self, watcher: Watcher) -> None:
        camera = watcher.camera(size_within(*watcher.window))
        if camera is not None:
            scene = self.controls.scene()
            picture = self.painter.paint(scene, camera, transparent=bool(self.controls.transparent.value))
            name = f"{self._name}-{time.strftime('%Y%m%d-%H%M%S')}.png"
            watcher.client.send_file_download(name, png(picture), save_immediately=True)

    def _record(self, watcher: Watcher) -> None:
        """Begin a recording, or end it and keep it."""
        now = time.monotonic()
        if watcher.recording is None:
            self._check_place()
            with self._wake:
                watcher.recording = Recording(size_within(*watcher.window, shorter=720), now)
                watcher.shown = None
                self._wake.notify_all()
            self.controls.recording(True)
            return
        self._finish(watcher, now)
        self.controls.recording(False)
        self._changed()

    def _finish(self, watcher: Watcher, now: float) -> None:
        """Have a recording written, beside all else."""
        recording, watcher.recording = watcher.recording, None
        if recording is not None and len(recording):
            self._writers = [writer for writer in self._writers if writer.is_alive()]
            self._writers.append(threading.Thread(target=self._keep, args=(watcher.client, recording, now)))
            self._writers[-1].start()

    def _product(self, stem: str) -> Product:
        subject = self.painter.subject.subject
        sources = Sources.of(avatar=(subject, STAGES))
        return Product(place_for(subject, FOLDER, f"{stem}.mp4", None, ".mp4"), sources, {"recorded": stem})

    def _check_place(self) -> None:
        """Refuse to record what could not be kept afterwards.

        Raises:
            HeadcastError: the folder for recordings cannot be written.
        """
        if self.controls.downloads:
            return
        folder = self._product("recording").path.parent
        try:
            folder.mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise StageError(
                f"Videos cannot be kept in '{folder}': {error.strerror or error}.",
                f"have them go to {IN_BROWSER}, or free that place",
            ) from error

    def _keep(self, client: Any, recording: Recording, ended: float) -> None:
        """Write a recording and give it to the subject's folder, or to the browser if that fails or was chosen."""
        stem = time.strftime("%Y-%m-%d-%H-%M-%S")
        busy = client.add_notification("Writing the video", "It may take some seconds.", loading=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recording.mp4"
            account = recording.write(path, ended)
            downloads = self.controls.downloads
            if not downloads:
                try:
                    product = self._product(stem)
                    product.make(lambda place: (shutil.copyfile(path, place), account)[1])
                    client.add_notification("Video kept", f"In {product.path}", auto_close_seconds=10, color="green")
                except HeadcastError as error:
                    _notify(client, "The video goes to your browser", error)
                    downloads = True
            if downloads:
                client.send_file_download(f"{self._name}-{stem}.mp4", path.read_bytes(), save_immediately=True)
        busy.remove()


def _notify(client: Any, title: str, error: HeadcastError) -> None:
    client.add_notification(title, f"{error.what} {error.fix}", color="red")
