"""Matte: foreground alpha of every frame in which the tracked person is, steady over time.

A salient-object network (rembg) sees each frame for itself and knows no person. So its answers are kept to what
belongs to the tracked face, filled inside it, and steadied by a median over time. Which of two ways of showing the
frame to the network flickers less is measured on the clip itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.assets import U2NETP, asset_path, fetch_rembg_model, rembg_home
from pipeline.dataset import write_json
from pipeline.errors import StageError
from pipeline.frames import FrameSet, alpha_file, contact_sheet, evenly, ranges_text, save_image
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    Image = NDArray[np.uint8]

PROBES = 4
"""Places of the clip at which both ways are compared, three frames each."""
FACE_SHARE = 0.5
"""Below this mean alpha inside the face the network has lost the person."""
FAINT = 26
"""Alpha (of 255) from which a pixel counts when connecting what belongs together: wisps of hair do."""
GOOD_FLICKER, POOR_FLICKER = 0.6, 2.0
"""Pixels of the boundary's jitter, at the frame's own size."""
GOOD_PARTIAL, POOR_PARTIAL = 0.2, 0.4


def run(run: StageRun) -> Result:
    """Write `alpha/`, one image a frame, and `matte.json`.

    Raises:
        StageError: the model is not on this machine, or it finds the person in no frame.
    """
    frames = FrameSet.load(run.subject.stage("decode"))
    landmarks, present = _faces(run, len(frames))
    network = Network(run, frames)
    padding = _choose_padding(run, network, present)
    started, fresh = time.monotonic(), 0
    wanted = [int(i) for i in np.flatnonzero(present)]
    done = [i for i in wanted if network.known(i, padding)]
    with run.reporter.task("matte", len(wanted), "frames", len(done)) as task:
        for index in wanted:
            if network.known(index, padding):
                continue
            network.alpha(index, padding)
            fresh += 1
            task.advance()
            run.check_stop()
    per_frame = (time.monotonic() - started) / fresh * 1000 if fresh else None
    (run.work / "alpha").mkdir(exist_ok=True)
    jitter = Jitter()
    partial, lost = [], np.zeros(len(frames), bool)
    for index, steady in enumerate(_steadied(run, network, padding, present, (frames.height, frames.width))):
        alpha = steady
        if present[index]:
            hull = _face_hull(landmarks[index], steady.shape)
            inside = steady[hull > 0]
            lost[index] = len(inside) > 0 and inside.mean() < FACE_SHARE * 255
            alpha = belonging(np.maximum(steady, hull), hull)
            solid, edge = int((alpha >= 242).sum()), int(((alpha > 13) & (alpha < 242)).sum())
            partial.append(edge / max(solid + edge, 1))
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
        "partial_alpha_share": round(float(np.mean(partial)), 4),
        "padding": padding,
        "frames": len(wanted),
        "lost_frames": int(lost.sum()),
    }
    write_json(run.work / "matte.json", {"schema": 1, "model": run.config.matte.model, **figures})
    _write_contact_sheet(run, frames, wanted)
    speed = None if per_frame is None else round(per_frame, 1)
    return Result(_verdict(figures, present, lost), {**figures, "ms_per_frame": speed})


class Network:
    """The matting network over the clip's frames; every answer is kept as a file, so that a killed run resumes."""

    def __init__(self, run: StageRun, frames: FrameSet) -> None:
        self._run, self._frames = run, frames
        self._session: Any = None

    def known(self, index: int, padding: float) -> bool:
        """Whether the answer for a frame is there already."""
        return self._file(index, padding).is_file()

    def alpha(self, index: int, padding: float) -> Image:
        """The network's alpha [H, W] of a frame shown with this much border."""
        path = self._file(index, padding)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            save_image(path, self._predict(self._frames.image(index), padding))
        return _read_grey(path)

    def _file(self, index: int, padding: float) -> Path:
        return self._run.scratch / f"raw-{padding:.3f}" / f"{index:06d}.png"

    def _predict(self, image: Image, padding: float) -> Image:
        """A face that fills the frame confuses the network; a replicated border above and beside it helps."""
        import cv2
        from PIL import Image as Pillow

        height, width = image.shape[:2]
        top, side = round(padding * height), round(padding * width)
        shown = cv2.copyMakeBorder(image, top, 0, side, side, cv2.BORDER_REPLICATE)
        mask = self._open().predict(Pillow.fromarray(shown))[0]
        return np.ascontiguousarray(np.asarray(mask.convert("L"), np.uint8)[top:, side : side + width])

    def _open(self) -> Any:
        if self._session is None:
            self._session = open_session(self._run.config.matte.model, self._run.threads)
        return self._session


def open_session(model: str, threads: int) -> Any:
    """A rembg session on the CPU. The model's file is verified, or was fetched before any stage worked.

    Raises:
        UserError: rembg knows no such model, or u2netp's file has wrong bytes.
        StageError: the model's file is not on this machine.
    """
    if model == U2NETP:
        asset_path(U2NETP, fetch=False)
    else:
        fetch_rembg_model(model)
    import onnxruntime
    import rembg

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with rembg_home():
        return rembg.new_session(model, sess_opts=options, providers=["CPUExecutionProvider"])


class Jitter:
    """How far the boundary jumps to and fro between frames, in pixels.

    The second difference over time of the alpha, whose steady motion cancels, over the length of the boundary.
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
            down, right = np.gradient(this)
            length = float(np.hypot(down, right).sum())
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


def _choose_padding(run: StageRun, network: Network, present: NDArray[np.bool_]) -> float:
    """The border that flickers less on a few places of this clip: the configured one or none."""
    padding = run.config.matte.padding
    middles = np.flatnonzero(present[1:-1] & present[:-2] & present[2:]) + 1
    if padding == 0 or not len(middles):
        return padding
    scores = {}
    for candidate in (padding, 0.0):
        values = []
        for place in evenly(len(middles), PROBES):
            jitter = Jitter()
            for index in range(middles[place] - 1, middles[place] + 2):
                jitter.add(network.alpha(int(index), candidate))
                run.check_stop()
            values.append(jitter.mean())
        scores[candidate] = float(np.median(values))
    return 0.0 if scores[0.0] < 0.8 * scores[padding] else padding


def _steadied(
    run: StageRun, network: Network, padding: float, present: NDArray[np.bool_], shape: tuple[int, int]
) -> Iterator[Image]:
    """Alpha of every frame as the median over its neighbours; 0 where the person is not found.

    A median keeps an edge that moves steadily where it is, and drops what is there for a moment only.
    """
    half = run.config.matte.steady_frames // 2
    window: dict[int, Image] = {}
    for index in range(len(present)):
        if not present[index]:
            yield np.zeros(shape, np.uint8)
            continue
        reach = 0
        while reach < half and index - reach > 0 and index + reach + 1 < len(present):
            if not (present[index - reach - 1] and present[index + reach + 1]):
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
    assets=(U2NETP,),
    description="foreground alpha with rembg, steady over time, kept to the tracked person",
)
