"""Matte: foreground alpha of every frame in which the tracked person is, steady over time.

A salient-object network (rembg) sees each frame for itself and knows no person. So its answers are kept to what
belongs to the tracked face, filled inside it, and steadied by a median over time. Which of two ways of showing the
frame to the network flickers less is measured on the clip itself. The network is by far the slowest part, and it
jitters more than optical flow errs from a frame to the next: it sees every few frames only, and the alphas of the
frames between are carried over from both sides, unless the two disagree.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.assets import U2NETP, asset_path, matting_asset, rembg_home
from pipeline.dataset import write_json
from pipeline.errors import StageError, UserError
from pipeline.frames import FrameSet, alpha_file, contact_sheet, evenly, ranges_text, save_image
from pipeline.matting.given import GivenAlpha, given_alpha
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    Image = NDArray[np.uint8]

PROBES = 4
"""Places of the clip at which both ways are compared, three frames each."""
FACE_SHARE = 0.5
"""Below this mean alpha inside the face the network has lost the person."""
FAINT = 26
"""Alpha (of 255) from which a pixel counts when connecting what belongs together: wisps of hair do."""
CARRY_LIMIT_PX = 2.0
"""Alphas carried from both sides that differ by more along the boundary are not trusted."""
GOOD_FLICKER, POOR_FLICKER = 0.6, 2.0
"""Pixels of the boundary's jitter, at the frame's own size."""
GOOD_PARTIAL, POOR_PARTIAL = 0.2, 0.4


def run(run: StageRun) -> Result:
    """Write `alpha/`, one image a frame, and `matte.json`.

    Raises:
        StageError: the model is not on this machine, or it finds the person in no frame.
        UserError: alphas that were given do not fit.
    """
    frames = FrameSet.load(run.subject.stage("decode"))
    landmarks, present = _faces(run, len(frames))
    given = given_alpha(run.subject, run.config.matte.alpha, frames, run.threads)
    if given is not None:
        return _run_given(run, frames, given, landmarks, present)
    network = Network(run, frames)
    padding = _choose_padding(run, network, present, frames.shots)
    started = time.monotonic()
    wanted = [int(i) for i in np.flatnonzero(present)]
    fresh = sum(not network.known(i, padding) for i in wanted)
    network.fill(present, padding)
    per_frame = (time.monotonic() - started) / fresh * 1000 if fresh else None
    (run.work / "alpha").mkdir(exist_ok=True)
    jitter = Jitter()
    shares, lost = [], np.zeros(len(frames), bool)
    for index, steady in enumerate(_steadied(run, network, padding, present, frames)):
        alpha = steady
        if index and frames.shots[index] != frames.shots[index - 1]:
            jitter.add(None)
        if present[index]:
            hull = _face_hull(landmarks[index], steady.shape)
            inside = steady[hull > 0]
            lost[index] = len(inside) > 0 and inside.mean() < FACE_SHARE * 255
            alpha = belonging(np.maximum(steady, hull), hull)
            solid, edge = int((alpha >= 242).sum()), int(((alpha > 13) & (alpha < 242)).sum())
            shares.append(edge / max(solid + edge, 1))
        jitter.add(alpha if present[index] else None)
        save_image(run.work / alpha_file(index), alpha)
        run.check_stop()
    if lost[present].all():
        raise StageError(
            f"The matting model '{run.config.matte.model}' finds the tracked person in none of {len(wanted)} frames.",
            "film against a plainer background, or name another model: --set matte.model=NAME",
        )
    figures: dict[str, Any] = {
        "flicker_px": round(jitter.mean(), 3),
        "partial_alpha_share": round(float(np.mean(shares)), 4),
        "padding": padding,
        "frames": len(wanted),
        "lost_frames": int(lost.sum()),
    }
    write_json(run.work / "matte.json", {"schema": 1, "model": run.config.matte.model, **figures})
    _write_contact_sheet(run, frames, wanted)
    speed = None if per_frame is None else round(per_frame, 1)
    return Result(_verdict(figures, present, lost), {**figures, "ms_per_frame": speed})


def _run_given(
    run: StageRun,
    frames: FrameSet,
    given: GivenAlpha,
    landmarks: NDArray[np.float32],
    present: NDArray[np.bool_],
) -> Result:
    """Write alphas as they were given, in every frame; measure them, and see that the tracked face is in them."""
    (run.work / "alpha").mkdir(exist_ok=True)
    jitter, shares, missing = Jitter(), [], np.zeros(len(frames), bool)
    with run.reporter.task("matte", len(frames), "frames") as task:
        for index in range(len(frames)):
            run.check_stop()
            path = run.work / alpha_file(index)
            if not path.is_file():
                save_image(path, given(index))
            alpha = _read_grey(path)
            if index and frames.shots[index] != frames.shots[index - 1]:
                jitter.add(None)
            jitter.add(alpha)
            if present[index]:
                inside = alpha[_face_hull(landmarks[index], alpha.shape) > 0]
                missing[index] = len(inside) > 0 and inside.mean() < FACE_SHARE * 255
                solid, edge = int((alpha >= 242).sum()), int(((alpha > 13) & (alpha < 242)).sum())
                shares.append(edge / max(solid + edge, 1))
            task.advance()
    wanted = [int(i) for i in np.flatnonzero(present)]
    if missing[present].all():
        raise UserError(
            f"The tracked face is in none of {len(wanted)} frames by {given.origin}.",
            "see that white is the subject and that they are of this video; --person names whom to track",
        )
    figures: dict[str, Any] = {
        "flicker_px": round(jitter.mean(), 3),
        "partial_alpha_share": round(float(np.mean(shares)), 4),
        "frames": len(wanted),
        "lost_frames": int(missing.sum()),
    }
    write_json(run.work / "matte.json", {"schema": 1, "model": None, "given": given.origin, **figures})
    _write_contact_sheet(run, frames, wanted)
    text = f"{len(frames)} frames from {given.origin}, edge jitter {figures['flicker_px']:.2f} px"
    level: Level = "good"
    if missing.any():
        level = "poor" if missing.sum() > 0.1 * len(wanted) else "fair"
        text += f"; the face is left out in {ranges_text(missing)}"
    return Result(Verdict(level, f"Matte: {level}. {text}.", "contact.jpg"), {**figures, "ms_per_frame": None})


class Network:
    """The matting network over the clip's frames; every answer is kept as a file, so that a killed run resumes."""

    def __init__(self, run: StageRun, frames: FrameSet) -> None:
        self._run, self._frames = run, frames
        self._predict: Callable[[Image], Image] | None = None
        self._opening = threading.Lock()

    def known(self, index: int, padding: float) -> bool:
        """Whether the answer for a frame is there already."""
        return self._file(index, padding).is_file()

    def alpha(self, index: int, padding: float) -> Image:
        """The network's alpha [H, W] of a frame shown with this much border."""
        path = self._file(index, padding)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            save_image(path, self._seen(index, padding))
        return _read_grey(path)

    def ask(self, wanted: list[tuple[int, float]]) -> None:
        """Have the network's answers for these frames and borders ready."""
        self._side_by_side(lambda one: self.alpha(*one), [one for one in wanted if not self.known(*one)])

    def fill(self, present: NDArray[np.bool_], padding: float) -> None:
        """Have an alpha ready for every frame with the person: the network's at key frames, between them flow's."""
        keys = key_frames(present, self._frames.shots, self._run.config.matte.key_every)
        between = sorted(set(np.flatnonzero(present).tolist()) - set(keys))
        missing = [[i for i in group if not self.known(i, padding)] for group in (keys, between)]
        count, left = len(keys) + len(between), sum(map(len, missing))
        with self._run.reporter.task("matte", count, "frames", count - left) as task:
            self._side_by_side(partial(self.alpha, padding=padding), missing[0], task.advance)
            self._side_by_side(partial(self._carried, padding=padding, keys=keys), missing[1], task.advance)

    def _side_by_side(
        self, work: Callable[[Any], Any], todo: list[Any], advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Work on several frames at once, each with one thread: that takes less time than many threads for a frame."""
        with single_threaded_opencv(), ThreadPoolExecutor(self._run.threads) as pool:
            for first in range(0, len(todo), self._run.threads):
                self._run.check_stop()
                advance(len(list(pool.map(work, todo[first : first + self._run.threads]))))

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
        return self._run.scratch / f"raw-{padding:.3f}" / f"{index:06d}.png"

    def _seen(self, index: int, padding: float) -> Image:
        """The network's answer for the part of a frame that is picture; a smaller clip's frames are black beside it."""
        image = self._frames.image(index)
        width, height = self._frames.contents[index]
        alpha = np.zeros(image.shape[:2], np.uint8)
        alpha[:height, :width] = self._shown(image[:height, :width], padding)
        return alpha

    def _shown(self, image: Image, padding: float) -> Image:
        """A face that fills the frame confuses the network; a replicated border above and beside it helps."""
        import cv2

        height, width = image.shape[:2]
        top, side = round(padding * height), round(padding * width)
        shown = cv2.copyMakeBorder(image, top, 0, side, side, cv2.BORDER_REPLICATE)
        with self._opening:
            self._predict = self._predict or open_model(self._run.config.matte.model)
        return np.ascontiguousarray(self._predict(shown)[top:, side : side + width])


def open_model(model: str) -> Callable[[Image], Image]:
    """The network as a function from an image [H, W, 3] to its alpha [H, W], on one CPU thread.

    u2netp runs without rembg, whose import alone takes seconds; the others are rembg's by name.

    Raises:
        UserError: there is no such model, or its file has wrong bytes.
        StageError: the model's file is not on this machine.
    """
    file = asset_path(matting_asset(model), fetch=False)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if model == U2NETP:
        return partial(_u2net, onnxruntime.InferenceSession(str(file), options, providers=providers))
    import rembg
    from PIL import Image as Pillow

    with rembg_home():
        session = rembg.new_session(model, sess_opts=options, providers=providers)
    return lambda image: np.asarray(session.predict(Pillow.fromarray(image))[0].convert("L"), np.uint8)


def _u2net(session: Any, image: Image) -> Image:
    """U2-Net as rembg runs it: 320 x 320, ImageNet's mean and deviation, the answer stretched to [0, 1]."""
    import cv2

    small = cv2.resize(image, (320, 320), interpolation=cv2.INTER_AREA).astype(np.float32)
    even = (small / max(float(small.max()), 1e-6) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    tensor = even.transpose(2, 0, 1)[None].astype(np.float32)
    answer = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: tensor})[0][0, 0]
    answer = (answer - answer.min()) / max(float(answer.max() - answer.min()), 1e-6)
    size = (image.shape[1], image.shape[0])
    return np.asarray(np.clip(cv2.resize(answer, size, interpolation=cv2.INTER_CUBIC), 0, 1) * 255 + 0.5, np.uint8)


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


def carry(source: Image, target: Image, alpha: Image) -> Image:
    """A frame's alpha [H, W] moved to another frame by dense optical flow (DIS, Kroeger et al. 2016) at half size."""
    import cv2

    height, width = alpha.shape
    half = (max(width // 2, 32), max(height // 2, 32))
    to, origin = (
        cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), half, interpolation=cv2.INTER_AREA)
        for image in (target, source)
    )
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(to, origin, None)
    flow = cv2.resize(flow, (width, height)) * np.array([width / half[0], height / half[1]], np.float32)
    at = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32) + flow
    return np.asarray(cv2.remap(alpha, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def boundary_length(alpha: NDArray[np.floating[Any]]) -> float:
    """Length in pixels of an alpha's boundary, soft or hard: the sum of its gradient's length, for alpha in [0, 1]."""
    down, right = np.gradient(alpha)
    return float(np.hypot(down, right).sum())


@contextlib.contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """Keep OpenCV to one thread meanwhile: its optical flow gives other numbers with other thread counts."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


class Jitter:
    """How far the boundary jumps to and fro between frames, in pixels.

    The second difference over time of the alpha over the length of the boundary: slow steady motion cancels, of motion
    by more than the edge's own softness a part counts.
    """

    def __init__(self) -> None:
        self._last: list[NDArray[Any]] = []
        self._values: list[float] = []

    def add(self, alpha: Image | None) -> None:
        """The next frame's alpha; None breaks the sequence."""
        if alpha is None:
            self._last = []
            return
        self._last = [*self._last[-2:], alpha.astype(np.float32) / 255]
        if len(self._last) == 3:
            before, this, after = self._last
            length = boundary_length(this)
            if length > 0:
                self._values.append(float(np.abs(this - (before + after) / 2).sum()) / length)

    def mean(self) -> float:
        """Mean over the frames that have two neighbours; 0 where none has."""
        return float(np.mean(self._values)) if self._values else 0.0


def belonging(alpha: Image, face: Image) -> Image:
    """The part of an alpha [H, W] that hangs together with the face (255 inside its hull); the rest becomes 0."""
    import cv2

    _, labels = cv2.connectedComponents((alpha >= FAINT).astype(np.uint8), connectivity=8)
    counts = np.bincount(labels[(face > 0) & (labels > 0)], minlength=1)
    if not counts.any():
        return np.zeros_like(alpha)
    body = (labels == counts.argmax()).astype(np.uint8)
    near = cv2.dilate(body, np.ones((5, 5), np.uint8))
    return np.asarray(alpha * near, np.uint8)


def _faces(run: StageRun, count: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Landmarks in pixels [T, 468, 2], and the frames [T] in which the face was found."""
    with np.load(run.input("track", "track.npz"), allow_pickle=False) as track:
        landmarks, present = track["landmarks"][:, :468, :2], track["detected"].astype(bool)
    if len(landmarks) != count or len(present) != count:
        raise StageError(
            f"The track has {len(landmarks)} frames, the clip {count}.",
            f"headcast rerun {run.subject.name} --from track",
        )
    return landmarks, present & np.isfinite(landmarks).all((1, 2))


def _face_hull(landmarks: NDArray[np.float32], shape: tuple[int, ...]) -> Image:
    """255 inside the face, a little inside its outline so that the network still draws the edge."""
    import cv2

    centre = landmarks.mean(0)
    points = cv2.convexHull(((landmarks - centre) * 0.9 + centre).astype(np.float32)).round().astype(np.int32)
    hull = np.zeros(shape, np.uint8)
    cv2.fillConvexPoly(hull, points, 255)
    return hull


def _choose_padding(run: StageRun, network: Network, present: NDArray[np.bool_], shots: NDArray[np.int64]) -> float:
    """The border that flickers less on a few places of this clip: the configured one or none."""
    padding = run.config.matte.padding
    middles = np.flatnonzero(present[1:-1] & present[:-2] & present[2:] & (shots[:-2] == shots[2:])) + 1
    if padding == 0 or not len(middles):
        return padding
    places = [int(middles[place]) for place in evenly(len(middles), PROBES)]
    network.ask([(i + step, candidate) for candidate in (padding, 0.0) for i in places for step in (-1, 0, 1)])
    scores = {}
    for candidate in (padding, 0.0):
        values = []
        for place in places:
            jitter = Jitter()
            for index in range(place - 1, place + 2):
                jitter.add(network.alpha(index, candidate))
            values.append(jitter.mean())
        scores[candidate] = float(np.median(values))
    return 0.0 if scores[0.0] < 0.8 * scores[padding] else padding


def _steadied(
    run: StageRun, network: Network, padding: float, present: NDArray[np.bool_], frames: FrameSet
) -> Iterator[Image]:
    """Alpha of every frame as the median over its neighbours in its shot; 0 where the person is not found.

    A median keeps an edge that moves steadily where it is, and drops what is there for a moment only.
    """
    half = run.config.matte.steady_frames // 2
    window: dict[int, Image] = {}
    for index in range(len(present)):
        if not present[index]:
            yield np.zeros((frames.height, frames.width), np.uint8)
            continue
        reach = 0
        while reach < half and index - reach > 0 and index + reach + 1 < len(present):
            before, after = index - reach - 1, index + reach + 1
            if not (present[before] and present[after] and frames.shots[before] == frames.shots[after]):
                break
            reach += 1
        near = range(index - reach, index + reach + 1)
        window = {i: window[i] if i in window else network.alpha(i, padding) for i in near}
        yield np.median(np.stack(list(window.values())), axis=0).astype(np.uint8)


def _verdict(figures: dict[str, Any], present: NDArray[np.bool_], lost: NDArray[np.bool_]) -> Verdict:
    flicker, partial = figures["flicker_px"], figures["partial_alpha_share"]
    level: Level = "good"
    if lost.any() or flicker > GOOD_FLICKER or partial > GOOD_PARTIAL:
        level = "fair"
    if lost.sum() > 0.1 * figures["frames"] or flicker > POOR_FLICKER or partial > POOR_PARTIAL:
        level = "poor"
    text = (
        f"Matte: {level}. {figures['frames']} of {len(present)} frames, edge jitter {flicker:.2f} px, "
        f"{100 * partial:.0f} % of the subject half transparent"
    )
    if lost.any():
        text += f"; the network lost the person in {ranges_text(lost)}, where only the face is kept for sure"
    return Verdict(level, f"{text}.", "contact.jpg")


def _write_contact_sheet(run: StageRun, frames: FrameSet, wanted: list[int]) -> None:
    """Eight frames over white."""
    chosen = [wanted[i] for i in evenly(len(wanted), 8)]
    tiles = []
    for index in chosen:
        alpha = _read_grey(run.work / alpha_file(index))[..., None].astype(np.float32) / 255
        tiles.append((frames.image(index) * alpha + 255 * (1 - alpha)).round().astype(np.uint8))
    save_image(run.work / "contact.jpg", contact_sheet(tiles, [f"frame {i}" for i in chosen]), 88)


def _read_grey(path: Path) -> Image:
    import cv2

    return np.asarray(cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)


STAGE = Stage(
    name="matte",
    version=1,
    inputs=("decode", "track"),
    run=run,
    assets=lambda config: () if config.matte.alpha else (matting_asset(config.matte.model),),
    description="foreground alpha with rembg, steady over time, kept to the tracked person",
)
