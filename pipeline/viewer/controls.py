"""The viewer's panel: what every control is, and the scene that they make together."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.api import Pose
from pipeline.errors import HeadcastError
from pipeline.expressions import is_arkit
from pipeline.retarget import Performance
from pipeline.viewer.picture import Painter
from pipeline.viewer.scene import PRESETS, Drive, Scene, eased, in_folders, label_of, partner_of, taken_over

CLIP, SLIDERS = "the clip", "the sliders"
FULL, BAKED = "full", "baked"
IN_FOLDER, IN_BROWSER = "the subject's folder", "this browser"
SPEEDS = {"¼": 0.25, "½": 0.5, "1": 1.0, "2": 2.0}
# Half the range of each slider of the head: degrees, then centimetres.
HEAD_SLIDERS = {
    "Turn left": ("yaw", 45.0, "degrees, to the subject's left"),
    "Nod": ("pitch", 35.0, "degrees, down"),
    "Tilt": ("roll", 35.0, "degrees, left ear up"),
    "Right": ("right", 10.0, "centimetres, as the camera sees it"),
    "Down": ("down", 10.0, "centimetres"),
    "Away": ("away", 20.0, "centimetres from the camera"),
}
GAZE_SLIDERS = {"Look down": ("pitch", 20.0), "Look left": ("yaw", 25.0)}
_NO_MARKS: tuple[float, ...] = ()
_REST = Pose()


class Controls:
    """The panel. Whatever is changed there, `changed` is called, and `scene()` says what is to be seen now.

    Args:
        gui: viser's, shared by all who look.
        name: of the subject.
        painter: of the subject.
        changed: called in any thread.
        clock: seconds, for playing.
    """

    def __init__(
        self,
        gui: Any,
        name: str,
        painter: Painter,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gui, self._painter, self._changed, self._clock = gui, painter, changed, clock
        self._subject = painter.subject
        self._held_out = set(self._subject.test_frames.tolist())
        self._started: tuple[float, float] | None = None
        """While it plays: the clock's seconds and the clip's at the start."""
        self.eased: list[str] = []
        gui.configure_theme(dark_mode=True, show_logo=False, show_share_button=False, brand_color=(64, 156, 255))
        gui.set_panel_label(f"headcast · {name}")
        gui.main_panel.dock_right()
        gui.main_panel.set_width(340)
        self._status = gui.add_html("")
        self._drive = gui.add_dropdown("Driven by", (CLIP, SLIDERS), CLIP, hint="What moves the avatar")
        tabs = gui.add_tab_group()
        with tabs.add_tab("Clip"):
            self._add_clip()
        with tabs.add_tab("Face"):
            self._add_face()
        with tabs.add_tab("Look"):
            self._add_look()
        with tabs.add_tab("Save"):
            self._add_save()
        for handle in (
            *(self._drive, self._beside, self._locked, self._within, self._follows, self._show, self._overlay),
            *(self._avatar, self._background),
        ):
            handle.on_update(lambda event: self._react(event))
        self.tell_frame()

    def _add_clip(self) -> None:
        gui, last = self._gui, len(self._subject) - 1
        first_held_out = min(self._held_out, default=None)
        marks = _NO_MARKS if first_held_out is None else ((first_held_out, "held out"),)
        self._frame = gui.add_slider("Frame", 0, max(last, 1), 1, 0, marks=marks)
        self._about_frame = gui.add_html("")
        self._play = gui.add_button("Play", icon="player-play", hint="Play the clip from this frame on")
        self._speed = gui.add_dropdown("Speed", tuple(SPEEDS), "1")
        self._beside = gui.add_checkbox(
            "Film beside", False, hint="Left the clip's frame as training saw it, right the avatar"
        )
        self._locked = gui.add_checkbox(
            "Clip's camera", False, hint="Look through the camera that filmed the clip; the mouse has no effect"
        )
        self._take_over = gui.add_button(
            "Take over this frame", icon="adjustments", hint="Set the sliders to what this frame shows"
        )
        self._frame.on_update(lambda event: self._react(event, drive=CLIP))
        self._speed.on_update(lambda event: self._react(event))
        self._beside.on_update(self._film)
        self._play.on_click(lambda event: self._toggle())
        self._take_over.on_click(lambda event: self._take(self.frame))

    def _add_face(self) -> None:
        gui, names = self._gui, self._painter.full.expression_names
        known = tuple(PRESETS) if is_arkit(names) else ("Rest",)
        self._presets = gui.add_dropdown("Expression", known, "Rest", hint="Set the sliders to one that is known")
        self._presets.on_update(self._choose)
        self._reset = gui.add_button("Reset all", icon="rotate", hint="Face, eyes and head at rest")
        self._reset.on_click(lambda event: self.put({}))
        self._within = gui.add_checkbox(
            "Keep to what the clip showed",
            True,
            hint="Ease what goes far beyond the clip: no skin was ever seen there. Untick it to go on",
        )
        self._about_face = gui.add_html("")
        self._both = gui.add_checkbox("Both sides together", True, hint="Left and right sliders move as one")
        with gui.add_folder("Gaze", expand_by_default=False):
            self._gaze = {
                part: self._slider(label, -reach, reach, 0.5, "degrees; both at 0: as the expression says")
                for label, (part, reach) in GAZE_SLIDERS.items()
            }
        with gui.add_folder("Head and neck", expand_by_default=False):
            self._head = {
                part: self._slider(label, -reach, reach, 0.5, hint)
                for label, (part, reach, hint) in HEAD_SLIDERS.items()
            }
            self._follows = gui.add_checkbox(
                "Body follows", True, hint="The body moves with the head as it did in the clip; else the neck bends"
            )
        self._coefficients: dict[str, Any] = {}
        for folder, inside in in_folders(names).items():
            with gui.add_folder(folder, expand_by_default=False):
                for name in inside:
                    low, high = self._range(name)
                    step = 0.01 * (high - low)
                    self._coefficients[name] = self._slider(label_of(name, folder), low, high, step, name)
        for name, handle in self._coefficients.items():
            handle.on_update(lambda event, name=name: self._move(event, name))
        for handle in (*self._gaze.values(), *self._head.values()):
            handle.on_update(lambda event: self._react(event, drive=SLIDERS))

    def _range(self, name: str) -> tuple[float, float]:
        """From where to where a coefficient's slider goes: an imported dataset's own, as far as the clip and rest."""
        if "/" not in name:
            return 0.0, 1.0
        column = self._seen.names.index(name)
        low, high = min(float(self._seen.low[column]), 0.0), max(float(self._seen.high[column]), 0.0)
        return low, max(high, low + 1e-6)

    def _slider(self, label: str, low: float, high: float, step: float, hint: str) -> Any:
        return self._gui.add_slider(label, low, high, step, 0.0, marks=_NO_MARKS, hint=hint)

    def _add_look(self) -> None:
        gui = self._gui
        self._show = gui.add_dropdown(
            "Show", ("splats", "points", "mesh"), "splats", hint="Gaussians, their centres, or the fitted head"
        )
        self._overlay = gui.add_dropdown(
            "Draw over it", ("none", "mesh edges", "landmarks"), "none", hint="Of the fitted head; on the film as well"
        )
        baked = self._painter.baked
        missing = isinstance(baked, HeadcastError)
        self._avatar = gui.add_dropdown(
            "Avatar",
            (FULL,) if missing else (FULL, BAKED),
            FULL,
            disabled=missing,
            hint=str(baked) if missing else "As trained, or as the linear blendshapes that players use",
        )
        self._background = gui.add_rgb("Background", (38, 41, 46))
        self.centre = gui.add_button("Centre the view", icon="focus-centered", hint="Back to where the camera began")

    def _add_save(self) -> None:
        gui = self._gui
        self.transparent = gui.add_checkbox("Transparent", False, hint="Pictures without a background")
        self.photograph = gui.add_button("Save a picture", icon="camera", hint="A PNG as large as this window")
        self._keep_in = gui.add_dropdown("Videos go to", (IN_FOLDER, IN_BROWSER), IN_FOLDER)
        self.record = gui.add_button("Record a video", icon="video", hint="What is seen from now on, as MP4")

    def scene(self) -> Scene:
        """What is to be seen now."""
        drive: Drive = "clip" if self._drive.value == CLIP else "sliders"
        expression, pose = self._sliders()
        if self._within.value and drive == "sliders":
            expression, pose, self.eased = eased(expression, pose, self._painter.full, self._seen)
        else:
            self.eased = []
        return Scene(
            drive=drive,
            frame=self.frame,
            expression=expression,
            pose=pose,
            baked=self._avatar.value == BAKED,
            show=_chosen(self._show),
            overlay=_chosen(self._overlay),
            beside=bool(self._beside.value),
            locked=bool(self._locked.value),
            background=_colour(self._background.value),
        )

    @property
    def frame(self) -> int:
        """Number of the clip's frame that is chosen."""
        return min(max(int(self._frame.value), 0), len(self._subject) - 1)

    def _sliders(self) -> tuple[dict[str, float], Pose]:
        head = {part: _number(handle) for part, handle in self._head.items()}
        looks = (_number(self._gaze["pitch"]), _number(self._gaze["yaw"]))
        metres = {part: head.pop(part) / 100 for part in ("right", "down", "away")}
        pose = Pose(**head, **metres, gaze=looks if any(looks) else None, body_follows=bool(self._follows.value))
        coefficients = {name: _number(handle) for name, handle in self._coefficients.items()}
        return {name: value for name, value in coefficients.items() if value}, pose

    @cached_property
    def _seen(self) -> Performance:
        return Performance.of(self._subject.clip)

    @property
    def downloads(self) -> bool:
        """Whether videos go to the browser, not into the subject's folder."""
        return bool(self._keep_in.value == IN_BROWSER)

    @property
    def playing(self) -> bool:
        """Whether the clip plays."""
        return self._started is not None

    def advance(self) -> None:
        """Go to the frame that is due while the clip plays; it begins anew after the last."""
        if self._started is None:
            return
        times = self._subject.clip.times
        began, origin = self._started
        length = float(times[-1] - times[0]) + float(np.median(np.diff(times)))
        seconds = (origin + SPEEDS[_chosen(self._speed)] * (self._clock() - began) - times[0]) % length + times[0]
        frame = int(np.searchsorted(times, seconds, side="right")) - 1
        if frame != self._frame.value:
            self._frame.value = max(0, frame)

    def _restart(self) -> None:
        if self._started is not None:
            self._started = (self._clock(), float(self._subject.clip.times[self.frame]))

    def _toggle(self) -> None:
        self._started = None if self.playing else (0.0, 0.0)
        self._restart()
        self._play.label, self._play.icon = ("Pause", "player-pause") if self.playing else ("Play", "player-play")
        if self.playing:
            self._drive.value = CLIP
        self._changed()

    def _react(self, event: Any, drive: str | None = None) -> None:
        """Somebody moved a control: the clip plays on from there, and what was touched drives."""
        if event.client is None:  # moved by this program
            return
        if drive is not None:
            self._drive.value = drive
        self._restart()
        self._changed()

    def _film(self, event: Any) -> None:
        if event.client is not None and self._beside.value:
            self._locked.value = True

    def _move(self, event: Any, name: str) -> None:
        if event.client is None:
            return
        partner = partner_of(name, tuple(self._coefficients)) if self._both.value else None
        if partner is not None:
            self._coefficients[partner].value = self._coefficients[name].value
        self._react(event, drive=SLIDERS)

    def _choose(self, event: Any) -> None:
        if event.client is not None:
            _, pose = self._sliders()
            self.put(PRESETS[_chosen(self._presets)], pose)

    def _take(self, frame: int) -> None:
        self.put(*taken_over(self._subject, self._painter.full, frame))

    def put(self, expression: Mapping[str, float], pose: Pose = _REST) -> None:
        """Put the sliders where these are, and have them drive."""
        for name, handle in self._coefficients.items():
            handle.value = float(np.clip(expression.get(name, 0.0), handle.min, handle.max))
        places = {part: getattr(pose, part) for part in self._head}
        places |= {part: 100 * places[part] for part in ("right", "down", "away")}
        for part, handle in self._head.items():
            handle.value = float(np.clip(places[part], handle.min, handle.max))
        for handle, degrees in zip(self._gaze.values(), pose.gaze or (0.0, 0.0), strict=True):
            handle.value = float(np.clip(degrees, handle.min, handle.max))
        if not expression:
            self._presets.value = "Rest"
        self._started = None
        self._play.label, self._play.icon = "Play", "player-play"
        self._drive.value = SLIDERS
        self._changed()

    def plain(self) -> None:
        """Show the full avatar alone: what was asked for cannot be had."""
        self._show.value, self._overlay.value, self._avatar.value, self._beside.value = "splats", "none", FULL, False

    def recording(self, running: bool) -> None:
        """Say whether a recording runs."""
        self.record.label = "Stop the recording" if running else "Record a video"
        self.record.icon = "player-stop" if running else "video"
        self.record.color = "red" if running else None

    def tell(self, text: str) -> None:
        """The lines at the top: how fast pictures come, and what is to be known of them."""
        model = self._painter.full.model
        about = f"{model.name} · {model.count:,} Gaussians · {model.head}"
        self._status.content = _lines(html.escape(about), *html.escape(text).splitlines())

    def tell_frame(self) -> None:
        """Say what the frame is, and what of the sliders was eased."""
        frame = self.frame
        if not self._subject.clip.usable[frame]:
            kind = "not used: the face could not be followed here"
        elif frame in self._held_out:
            kind = "<b>held out</b>: training never saw it"
        else:
            kind = "training saw it"
        times = self._subject.clip.times - self._subject.clip.times[0]
        self._about_frame.content = _lines(f"{times[frame]:.2f} of {times[-1]:.2f} s · {kind}")
        names = [html.escape(name) for name in self.eased]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        self._about_face.content = _lines(f"Eased: {', '.join(names[:3])}{more}") if names else ""


# A browser may send what its page never would: what is out of a control's range is brought into it.
def _number(slider: Any) -> float:
    value = float(slider.value)
    return min(max(value, slider.min), slider.max) if math.isfinite(value) else 0.0


def _chosen(dropdown: Any) -> Any:
    return dropdown.value if dropdown.value in dropdown.options else dropdown.options[0]


def _colour(value: Sequence[float]) -> tuple[int, int, int]:
    red, green, blue = (*(min(max(int(part), 0), 255) for part in value), 0, 0, 0)[:3]
    return red, green, blue


def _lines(*lines: str) -> str:
    """Small text; the lines are HTML."""
    inside = "<br>".join(lines)
    return f'<div style="font-size:0.8em;opacity:0.75;padding:0.2em 0.6em 0.5em;line-height:1.5">{inside}</div>'
