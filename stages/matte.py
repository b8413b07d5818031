"""Matte: foreground alpha of every frame in which the tracked person is, and the person's own colours.

Where the alpha comes from, the first of these that is there: alphas of the user's own, the clip's alpha channel, a
green or blue screen behind the person, a network. A network sees each frame for itself, coarsely, and knows nobody. So
its answers are taken together with those of the frames around, moved by the picture's motion; their outline is found
anew in the colours on both sides of it, with the empty scene behind where the camera stands still; and what does not
hang together with the tracked person goes.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.assets import SELFIE_SEGMENTATION, matting_asset
from pipeline.dataset import write_json
from pipeline.errors import StageError, UserError
from pipeline.frames import (
    FrameSet,
    alpha_file,
    confidence_file,
    contact_sheet,
    evenly,
    foreground_file,
    ranges_text,
    save_image,
)
from pipeline.matting.flow import boundary_length, carry, single_threaded_opencv
from pipeline.matting.given import GivenAlpha, given_alpha
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    from pipeline.config import MatteConfig
    from pipeline.matting.chroma import Backdrop
    from pipeline.matting.refine import Plate

    Image = NDArray[np.uint8]

PROBES = 4
"""Places of the clip at which the ways of showing a frame to the network are compared, three frames each."""
SCREEN_FRAMES = 12
"""Frames in which a green or blue screen is looked for."""
FACE_SHARE = 0.5
"""Below this mean alpha inside the face the person is lost."""
CARRY_LIMIT_PX = 2.0
"""Alphas carried from both sides that differ by more along the boundary are not trusted."""
KEY_EVERY = 3
"""A network that is slow sees every n-th frame only."""
FLICKER_PLACES = 60
"""Places of the clip at which the finished alpha's flicker is measured."""
CHUNK = 48
"""Frames of 512 x 512 that are worked on together; fewer of larger ones, for memory."""
GOOD_FLICKER, POOR_FLICKER = 0.5, 1.5
"""Pixels of the boundary's jitter against the motion, at the frame's own size."""
GOOD_PARTIAL, POOR_PARTIAL = 0.15, 0.3


@dataclass(frozen=True)
class Cut:
    """The subject of one frame, cut out."""

    alpha: Image
    """[H, W]."""
    foreground: Image
    """[H, W, 3] the subject's own colours."""
    confidence: Image
    """[H, W] 255 where the alpha is sure."""


@dataclass(frozen=True)
class Chunk:
    """Frames of one shot in a row that are worked on together, and what stands behind the subject there."""

    frames: range
    plate: Plate | None


class Clip:
    """The frames, who is in them, and where the alphas come from."""

    def __init__(self, run: StageRun) -> None:
        self.run, self.config = run, run.config.matte
        self.frames = FrameSet.load(run.subject.stage("decode"))
        names = ("landmarks", "detected", "others", "covered", "hands")
        with np.load(run.input("track", "track.npz"), allow_pickle=False) as track:
            landmarks, detected, self.others, self.covered, self.hands = (track[name] for name in names)
        if any(
            len(array) != len(self.frames) for array in (landmarks, detected, self.others, self.covered, self.hands)
        ):
            raise StageError(
                f"The track has {len(landmarks)} frames, the clip {len(self.frames)}.",
                f"headcast rerun {run.subject.name} --from track",
            )
        self.landmarks: NDArray[np.float32] = landmarks[:, :, :2]
        self.present: NDArray[np.bool_] = detected.astype(bool) & np.isfinite(landmarks).all((1, 2))
        self.wanted: list[int] = np.flatnonzero(self.present).tolist()

    def side_by_side(
        self, work: Callable[[Any], Any], todo: Iterable[Any], advance: Callable[[int], None] = lambda count: None
    ) -> list[Any]:
        """Work on several things at once, each with one thread; a stop is heeded between them."""
        results: list[Any] = []
        remaining = iter(todo)
        with single_threaded_opencv(), ThreadPoolExecutor(self.run.threads) as pool:
            while part := list(itertools.islice(remaining, self.run.threads)):
                self.run.check_stop()
                results += pool.map(work, part)
                advance(len(part))
        return results

    def runs(self) -> list[range]:
        """Stretches of frames with the person in them, cut at cuts."""
        apart = (np.diff(self.wanted) > 1) | (np.diff(self.frames.shots[self.wanted]) != 0)
        parts = np.split(np.array(self.wanted), np.flatnonzero(apart) + 1)
        return [range(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]


def run(run: StageRun) -> Result:
    """Write `alpha/`, `foreground/` and `confidence/`, one image a frame each, and `matte.json`.

    Raises:
        StageError: the model is not on this machine, or it finds the person in no frame.
        UserError: alphas that were given do not fit.
    """
    clip = Clip(run)
    for name in ("alpha", "foreground", "confidence"):
        (run.work / name).mkdir(exist_ok=True)
    started, here = time.monotonic(), _finished(clip)
    given = given_alpha(run.subject, clip.config.alpha, clip.frames, run.threads)
    backdrop = None if given or clip.config.source == "network" else _find_screen(clip)
    if given is None and backdrop is None and clip.config.source == "chroma":
        raise StageError(
            f"There is no even green or blue screen behind '{run.subject.name}'.",
            "leave matte.source at auto, or film before a screen that is lit evenly",
        )
    if given is not None:
        origin, about = given.origin, _cut_given(clip, given)
    elif backdrop is not None:
        origin, about = f"the {backdrop.name} screen", _cut_from_screen(clip, backdrop)
    else:
        origin, about = f"the network {clip.config.model}", _cut_with_network(clip)
    made = len(clip.wanted) - len(here)
    speed = round((time.monotonic() - started) / made * 1000, 1) if made else None
    figures, lost = _measure(clip)
    if lost[clip.present].all():
        raise _nobody(clip, origin, given is not None)
    write_json(run.work / "matte.json", {"schema": 2, "origin": origin, **about, **figures})
    _write_contact_sheet(clip)
    return Result(_verdict(clip, origin, about, figures, lost), {**figures, **about, "ms_per_frame": speed})


def _cut_given(clip: Clip, given: GivenAlpha) -> dict[str, Any]:
    """Take alphas as they are given, for every frame."""
    from pipeline.matting.refine import foreground

    def cut(index: int, alpha: Image) -> None:
        image = clip.frames.image(index)
        _save(clip, index, Cut(alpha, foreground(image, _share(alpha)), np.full_like(alpha, 255)))

    todo = [index for index in range(len(clip.frames)) if not _is_cut(clip.run, index)]
    done = len(clip.frames) - len(todo)
    with clip.run.reporter.task("matte", len(clip.frames), "frames", done) as task:
        # Alphas are read here, one after the other, and used by several threads.
        clip.side_by_side(lambda one: cut(*one), ((index, given(index)) for index in todo), task.advance)
    return {}


def _find_screen(clip: Clip) -> Backdrop | None:
    """The even screen that all of the clip was filmed before, if there is one."""
    from pipeline.matting.chroma import find_backdrop

    chosen = [clip.wanted[i] for i in evenly(len(clip.wanted), SCREEN_FRAMES)]
    if not chosen:
        return None
    faces = [_face_hull(clip.landmarks[i], _shape(clip.frames)) > 0 for i in chosen]
    return find_backdrop([clip.frames.image(i) for i in chosen], faces)


def _cut_from_screen(clip: Clip, backdrop: Backdrop) -> dict[str, Any]:
    """Key every frame against its screen."""
    from pipeline.matting.chroma import despill, key

    def cut(index: int) -> None:
        image = clip.frames.image(index)
        alpha = _owned(clip, index, image, np.round(255 * key(image, backdrop)).astype(np.uint8))
        colours = despill(image, _share(alpha), backdrop)
        _save(clip, index, Cut(alpha, colours, np.full_like(alpha, 255)))

    _in_frames(clip, cut)
    return {"screen": backdrop.name}


def _in_frames(clip: Clip, cut: Callable[[int], None]) -> None:
    """Cut every frame with the person that is not cut yet; the others show nobody."""
    todo = [i for i in clip.wanted if not _is_cut(clip.run, i)]
    with clip.run.reporter.task("matte", len(clip.wanted), "frames", len(clip.wanted) - len(todo)) as task:
        clip.side_by_side(cut, todo, task.advance)
    _write_empty(clip)


def _cut_with_network(clip: Clip) -> dict[str, Any]:
    """Ask the network, then find the outline in the picture."""
    from pipeline.matting.network import open_network

    with open_network(clip.config.model) as predict:
        network = Network(clip, predict)
        padding = _choose_padding(clip, network)
        network.fill(padding)
    chunks, plates = _chunks(clip, network, padding)
    todo = [chunk for chunk in chunks if not all(_is_cut(clip.run, i) for i in chunk.frames)]
    done = sum(len(chunk.frames) for chunk in chunks) - sum(len(chunk.frames) for chunk in todo)
    with clip.run.reporter.task("matte: edges", len(clip.wanted), "frames", done) as task:
        clip.side_by_side(partial(_cut_chunk, clip, network, padding, on_frame=task.advance), todo)
    _write_empty(clip)
    return {"model": clip.config.model, "padding": padding, "still_camera": plates}


class Network:
    """The network's answers over the clip's frames; every one is kept as a file, so that a killed run resumes."""

    def __init__(self, clip: Clip, predict: Callable[[Image], Image]) -> None:
        self._clip, self._frames, self._predict = clip, clip.frames, predict

    def alpha(self, index: int, padding: float) -> Image:
        """The network's alpha [H, W] of a frame shown with this much border."""
        path = self._file(index, padding)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            save_image(path, self._seen(index, padding))
        return _read_grey(path)

    def ask(self, wanted: list[tuple[int, float]]) -> None:
        """Have the network's answers for these frames and borders ready."""
        missing = [one for one in wanted if not self._file(*one).is_file()]
        self._clip.side_by_side(lambda one: self.alpha(*one), missing)

    def fill(self, padding: float) -> None:
        """Have an alpha ready for every frame with the person: the network's at key frames, between them flow's."""
        clip = self._clip
        keys = key_frames(clip.present, clip.frames.shots, key_distance(clip.config))
        between = sorted(set(clip.wanted) - set(keys))
        missing = [[i for i in group if not self._file(i, padding).is_file()] for group in (keys, between)]
        count, left = len(clip.wanted), sum(map(len, missing))
        with clip.run.reporter.task("matte: network", count, "frames", count - left) as task:
            clip.side_by_side(partial(self.alpha, padding=padding), missing[0], task.advance)
            clip.side_by_side(partial(self._carried, padding=padding, keys=keys), missing[1], task.advance)

    def _carried(self, index: int, padding: float, keys: list[int]) -> None:
        """Write the alpha of a frame between two key frames; the network's where the two sides disagree."""
        after = bisect.bisect(keys, index)
        sides = keys[after - 1], keys[after]
        image = self._frames.image(index)
        alphas = [
            carry(self._frames.image(side), image, self.alpha(side, padding)).astype(np.float32) for side in sides
        ]
        if np.abs(alphas[0] - alphas[1]).sum() > CARRY_LIMIT_PX * boundary_length(alphas[0]):
            self.alpha(index, padding)
            return
        share = (index - sides[0]) / (sides[1] - sides[0])
        mixed = (1 - share) * alphas[0] + share * alphas[1]
        save_image(self._file(index, padding), mixed.round().astype(np.uint8))

    def _file(self, index: int, padding: float) -> Path:
        return self._clip.run.scratch / f"raw-{padding:.3f}" / f"{index:06d}.png"

    def _seen(self, index: int, padding: float) -> Image:
        """The network's answer for the part of a frame that is picture; a smaller clip's frames are black beside it."""
        image = self._frames.image(index)
        width, height = self._frames.contents[index]
        alpha = np.zeros(image.shape[:2], np.uint8)
        alpha[:height, :width] = self._shown(image[:height, :width], padding)
        return alpha

    def _shown(self, image: Image, padding: float) -> Image:
        """A face that fills the frame confuses networks; a replicated border above and beside it can help."""
        import cv2

        height, width = image.shape[:2]
        top, side = round(padding * height), round(padding * width)
        shown = cv2.copyMakeBorder(image, top, 0, side, side, cv2.BORDER_REPLICATE)
        return np.ascontiguousarray(self._predict(shown)[top:, side : side + width])


def key_distance(config: MatteConfig) -> int:
    """The network sees every n-th frame."""
    return config.key_every or (1 if config.model == SELFIE_SEGMENTATION else KEY_EVERY)


def key_frames(present: NDArray[np.bool_], shots: NDArray[np.int64], every: int) -> list[int]:
    """The frames that the network sees: every few of each run of frames with the person in them, ends included.

    A cut ends a run: `shots` [T] numbers the shots.
    """
    keys: list[int] = []
    frames = np.flatnonzero(present)
    for stretch in np.split(frames, np.flatnonzero((np.diff(frames) > 1) | (np.diff(shots[frames]) != 0)) + 1):
        if len(stretch):
            keys += sorted({*stretch[::every].tolist(), int(stretch[-1])})
    return keys


def _choose_padding(clip: Clip, network: Network) -> float:
    """The border that flickers less on a few places of this clip: the configured one or none."""
    from pipeline.matting.metrics import Flicker

    padding, present, shots = clip.config.padding, clip.present, clip.frames.shots
    middles = np.flatnonzero(present[1:-1] & present[:-2] & present[2:] & (shots[:-2] == shots[2:])) + 1
    if padding == 0 or not len(middles):
        return padding
    places = [int(middles[place]) for place in evenly(len(middles), PROBES)]
    network.ask([(i + step, candidate) for candidate in (padding, 0.0) for i in places for step in (-1, 0, 1)])

    def flicker(candidate: float) -> float:
        values = []
        for place in places:
            jitter = Flicker()
            for index in range(place - 1, place + 2):
                jitter.add(clip.frames.image(index), network.alpha(index, candidate))
            values.append(jitter.mean())
        return float(np.median(values))

    return padding if flicker(padding) < 0.8 * flicker(0.0) else 0.0


def _chunks(clip: Clip, network: Network, padding: float) -> tuple[list[Chunk], bool | None]:
    """The clip in pieces, each with its shot's plate; and whether the camera stands still (None: not asked)."""
    from pipeline.matting.plate import estimate_plate

    size = max(12, CHUNK * 512 * 512 // (clip.frames.width * clip.frames.height))
    chunks, still = [], []
    for stretch in clip.runs():
        plate = None
        if clip.config.plate:
            clip.run.check_stop()
            plate = estimate_plate(clip.frames.image, lambda i: network.alpha(i, padding), stretch)
            still.append(plate is not None)
        chunks += [Chunk(stretch[first : first + size], plate) for first in range(0, len(stretch), size)]
    return chunks, all(still) if still else None


def _cut_chunk(clip: Clip, network: Network, padding: float, chunk: Chunk, on_frame: Callable[[int], None]) -> None:
    """Fuse a chunk's answers with their neighbours', find their outlines, and write what comes of it."""
    from pipeline.matting.fusion import REACH, Motion, fuse, middle_of_three
    from pipeline.matting.refine import refine

    shot = next(stretch for stretch in clip.runs() if chunk.frames[0] in stretch)
    near = range(max(chunk.frames[0] - REACH, shot[0]), min(chunk.frames[-1] + REACH, shot[-1]) + 1)
    images = [clip.frames.image(i) for i in near]
    motion = Motion(images)
    coarse = [network.alpha(i, padding) for i in near]
    if clip.config.fuse:
        coarse = fuse(coarse, motion)
    cuts: dict[int, Cut] = {}

    def cut(index: int) -> Cut | None:
        """One frame by itself; those on either side of the chunk are needed for the median."""
        if index not in near:
            return None
        if index not in cuts:
            place = index - near[0]
            fine = refine(images[place], _share(coarse[place]), chunk.plate)
            cuts[index] = Cut(_bytes(fine.alpha), fine.foreground, _bytes(fine.certainty))
        return cuts[index]

    for index in chunk.frames:
        this, before, after = cut(index), cut(index - 1), cut(index + 1)
        assert this is not None
        place = index - near[0]
        came = motion.from_before(place, before.alpha) if before else None
        goes = motion.from_after(place, after.alpha) if after else None
        alpha = middle_of_three(came, this.alpha, goes) if clip.config.fuse else this.alpha
        confidence = this.confidence
        if came is not None and goes is not None:
            confidence = np.minimum(confidence, 255 - np.maximum(came, goes) + np.minimum(came, goes))
        owned = _owned(clip, index, images[place], alpha)
        _save(clip, index, Cut(owned, this.foreground, confidence))
        cuts.pop(index - 1, None)
        on_frame(1)


def _owned(clip: Clip, index: int, image: Image, alpha: Image) -> Image:
    """What of an alpha is the tracked person's, the face without holes."""
    from pipeline.matting.people import keep_subject

    hull = _face_hull(clip.landmarks[index], alpha.shape)
    inside = alpha[hull > 0]
    if len(inside) == 0 or inside.mean() < FACE_SHARE * 255:
        return alpha
    kept = keep_subject(np.maximum(alpha, hull), image, hull, clip.others[index])
    if kept.touched:
        _touch_mark(clip.run, index).touch()
    return kept.alpha


def _touch_mark(run: StageRun, index: int) -> Path:
    """Stands for a frame in which another person had to be split off; a resumed run tells of it too."""
    return run.scratch / f"touched-{index:06d}"


def _face_hull(landmarks: NDArray[np.float32], shape: tuple[int, ...]) -> Image:
    """255 inside the face, a little inside its outline so that the edge is still found."""
    import cv2

    centre = landmarks.mean(0)
    points = cv2.convexHull(((landmarks - centre) * 0.9 + centre).astype(np.float32)).round().astype(np.int32)
    hull = np.zeros(shape, np.uint8)
    cv2.fillConvexPoly(hull, points, 255)
    return hull


def _shape(frames: FrameSet) -> tuple[int, int]:
    return frames.height, frames.width


def _share(alpha: Image) -> NDArray[np.float32]:
    """An 8-bit alpha in [0, 1]."""
    return np.asarray(alpha, np.float32) / np.float32(255)


def _bytes(values: NDArray[np.float32]) -> Image:
    return (255 * values + 0.5).astype(np.uint8)


def _is_cut(run: StageRun, index: int) -> bool:
    """Whether a frame is finished; the alpha is written last."""
    return (run.work / alpha_file(index)).is_file()


def _finished(clip: Clip) -> list[int]:
    return [i for i in clip.wanted if _is_cut(clip.run, i)]


def _save(clip: Clip, index: int, cut: Cut) -> None:
    """Write a frame's files; what covers the face is nothing to learn it from."""
    from pipeline.matting.occluders import covered_pixels, hand_pixels

    work, confidence = clip.run.work, cut.confidence
    if clip.covered[index].any():
        confidence = confidence & ~covered_pixels(clip.landmarks[index], clip.covered[index], confidence.shape)
    if np.isfinite(clip.hands[index]).any():
        confidence = confidence & ~hand_pixels(clip.hands[index], confidence.shape)
    save_image(work / foreground_file(index), cut.foreground)
    save_image(work / confidence_file(index), confidence)
    save_image(work / alpha_file(index), cut.alpha)


def _write_empty(clip: Clip) -> None:
    """Frames without the person are empty."""
    nothing = np.zeros(_shape(clip.frames), np.uint8)
    for index in np.flatnonzero(~clip.present).tolist():
        if not _is_cut(clip.run, index):
            _save(clip, index, Cut(nothing, clip.frames.image(index), np.full_like(nothing, 255)))


def _measure(clip: Clip) -> tuple[dict[str, Any], NDArray[np.bool_]]:
    """The figures of the finished alphas, and the frames [T] in which the person is lost."""
    from pipeline.matting.metrics import Flicker, partial_alpha_share

    lost = np.zeros(len(clip.frames), bool)

    def share(index: int) -> float:
        alpha = _read_grey(clip.run.work / alpha_file(index))
        inside = alpha[_face_hull(clip.landmarks[index], alpha.shape) > 0]
        lost[index] = len(inside) > 0 and inside.mean() < FACE_SHARE * 255
        return partial_alpha_share(_share(alpha))

    def flicker(middle: int) -> float:
        jitter = Flicker()
        for index in range(middle - 1, middle + 2):
            jitter.add(clip.frames.image(index), _read_grey(clip.run.work / alpha_file(index)))
        return jitter.mean()

    middles = [index for stretch in clip.runs() for index in stretch[1:-1]]
    flickers = clip.side_by_side(flicker, [middles[i] for i in evenly(len(middles), FLICKER_PLACES)])
    shares = clip.side_by_side(share, clip.wanted)
    figures = {
        "flicker_px": round(float(np.mean(flickers)) if flickers else 0.0, 3),
        "partial_alpha_share": round(float(np.mean(shares or [0])), 4),
        "frames": len(clip.wanted),
        "lost_frames": int(lost.sum()),
    }
    return figures, lost


def _nobody(clip: Clip, origin: str, given: bool) -> Exception:
    count = len(clip.wanted)
    if given:
        return UserError(
            f"The tracked face is in none of {count} frames by {origin}.",
            "see that white is the subject and that they are of this video; --person names whom to track",
        )
    return StageError(
        f"The tracked person is in none of {count} frames by {origin}.",
        "film against a plainer background, name another network (--set matte.model=u2netp) or give --alpha",
    )


def _verdict(
    clip: Clip, origin: str, about: dict[str, Any], figures: dict[str, Any], lost: NDArray[np.bool_]
) -> Verdict:
    from pipeline.matting.people import touch_words

    flicker, partial_share = figures["flicker_px"], figures["partial_alpha_share"]
    level: Level = "good"
    if lost.any() or flicker > GOOD_FLICKER or partial_share > GOOD_PARTIAL:
        level = "fair"
    if lost.sum() > 0.1 * figures["frames"] or flicker > POOR_FLICKER or partial_share > POOR_PARTIAL:
        level = "poor"
    text = (
        f"Matte: {level}. {figures['frames']} of {len(clip.frames)} frames from {origin}, "
        f"edge jitter {flicker:.2f} px, {100 * partial_share:.0f} % of the subject half transparent"
    )
    if about.get("still_camera") is False:
        text += "; no clean plate of what is behind: the camera or the background moves, or too little of it is seen"
    touched = np.array([_touch_mark(clip.run, index).exists() for index in range(len(clip.frames))])
    text = "; ".join([text, *touch_words(touched)])
    if lost.any():
        text += f"; the person is lost in {ranges_text(lost)}, where only what is seen of them is kept"
    return Verdict(level, f"{text}.", "contact.jpg")


def _write_contact_sheet(clip: Clip) -> None:
    """Eight frames over white."""
    chosen = [clip.wanted[i] for i in evenly(len(clip.wanted), 8)]
    tiles = []
    for index in chosen:
        alpha = _read_grey(clip.run.work / alpha_file(index))[..., None].astype(np.float32) / 255
        colours = clip.frames.foreground(index, clip.run.work)
        tiles.append((colours * alpha + 255 * (1 - alpha)).round().astype(np.uint8))
    save_image(clip.run.work / "contact.jpg", contact_sheet(tiles, [f"frame {i}" for i in chosen]), 88)


def _read_grey(path: Path) -> Image:
    import cv2

    return np.asarray(cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)


STAGE = Stage(
    name="matte",
    version=2,
    inputs=("decode", "track"),
    run=run,
    assets=lambda config: () if config.matte.alpha else (matting_asset(config.matte.model),),
    description="foreground alpha and colours, steady over time, kept to the tracked person",
)
