"""How well a reenactment does what was asked, without a truth to compare with: its video is tracked again.

What the landmarker sees in the video is compared with what it sees in the driver's frames, each as departures from its
own rest; where the driver has no pictures, with the coefficients that were asked for. Every number stands beside what
the avatar's own clip, rendered again, gets by the same measure, and an avatar that does not move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import Interrupted
from pipeline.expressions import is_arkit
from pipeline.faces import Detector, Face
from pipeline.frames import evenly
from pipeline.geometry import matrix_to_rotvec, rotvec_to_matrix
from pipeline.progress import Reporter
from pipeline.retarget import NEUTRAL_PERCENTILE, TURN
from pipeline.torso import mean_pose

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.recognition import Recognizer
    from pipeline.reenact import Plan, Scene

    Floats = NDArray[np.float64]
    Image = NDArray[np.uint8]

MAIN = {
    "jaw": ("jawOpen",),
    "smile": ("mouthSmileLeft", "mouthSmileRight"),
    "pucker": ("mouthPucker", "mouthFunnel"),
    "blinks": ("eyeBlinkLeft", "eyeBlinkRight"),
    "brows": ("browInnerUp", "browOuterUpLeft", "browOuterUpRight"),
}
"""What people look at: the mean of some coefficients each."""
NOT_SCORED = ("tongueOut",)
"""The landmarker gives no score for these."""
STILL = 0.05
"""A coefficient that varies less than this (standard deviation) has nothing to correlate with."""
OWN_FRAMES, PORTRAIT_FRAMES = 100, 24
"""Frames of the avatar's own clip that are rendered again, and from which faces are recognised."""


class Seen(NamedTuple):
    """What the landmarker sees in n pictures."""

    found: NDArray[np.bool_]
    """[n] whether there is a face."""
    scores: Floats
    """[n,E] its expression scores; zeros where there is none."""
    rotations: Floats
    """[n,3,3] the face's axes in a camera's; the identity where there is none."""
    portraits: list[tuple[Image, Face]]
    """Some of the pictures, spread over all, with the face in each."""


def look(pictures: Iterable[Image], count: int, detector: Detector) -> Seen:
    """Look for a face in each of `count` pictures [H,W,3]; of several, the largest is taken."""
    kept = set(evenly(count, PORTRAIT_FRAMES))
    found, faces, portraits = np.zeros(count, bool), {}, []
    for number, picture in enumerate(pictures):
        seen = detector.detect(picture)
        if seen:
            faces[number] = max(seen, key=lambda face: float(np.prod(face.box[2:] - face.box[:2])))
            if number in kept:
                portraits.append((picture, faces[number]))
    found[list(faces)] = True
    scores, rotations = np.zeros((count, len(detector.names))), np.tile(np.eye(3), (count, 1, 1))
    for number, face in faces.items():
        scores[number], rotations[number] = face.scores, face.pose[:3, :3]
    return Seen(found, scores, rotations, portraits)


def expression_error(seen: Floats, asked: Floats, names: tuple[str, ...]) -> dict[str, Any]:
    """How far scores [n,E] depart from their rest otherwise than was asked for [n,E].

    Returns:
        `error`, the mean absolute difference; `at_rest`, what it were without any motion; `correlation` of each of
        `MAIN`, None where hardly anything was asked for.
    """
    mine, wanted = (values - np.percentile(values, NEUTRAL_PERCENTILE, 0) for values in (seen, asked))
    scored = [place for place, name in enumerate(names) if name not in NOT_SCORED]
    correlations = {}
    for what, parts in MAIN.items():
        columns = [names.index(name) for name in parts]
        correlations[what] = _correlation(mine[:, columns].mean(1), wanted[:, columns].mean(1))
    return {
        "error": round(float(np.abs(mine - wanted)[:, scored].mean()), 4),
        "at_rest": round(float(np.abs(wanted)[:, scored].mean()), 4),
        "correlation": correlations,
    }


def _correlation(seen: Floats, asked: Floats) -> float | None:
    if asked.std() < STILL:
        return None
    if seen.std() < 1e-6:
        return 0.0
    return round(float(np.corrcoef(seen, asked)[0, 1]), 3)


def pose_error(rotations: Floats, asked: Floats) -> dict[str, float]:
    """How far heads [n,3,3] are turned otherwise than was asked for, as rotation vectors [n,3] from any rest; degrees.

    Returns:
        `error_degrees`, the mean angle between both, each from its own mean; `at_rest_degrees`, what it were without
        any motion.
    """
    mine, wanted = _from_mean(rotations), _from_mean(rotvec_to_matrix(np.ascontiguousarray(asked)))
    return {
        "error_degrees": _mean_degrees(wanted.swapaxes(1, 2) @ mine),
        "at_rest_degrees": _mean_degrees(wanted),
    }


def _from_mean(rotations: Floats) -> Floats:
    poses = np.tile(np.eye(4), (len(rotations), 1, 1))
    poses[:, :3, :3] = rotations
    mean = mean_pose(poses, np.full(len(poses), 1 / len(poses)))
    return np.ascontiguousarray(mean[:3, :3].T @ rotations)


def _mean_degrees(rotations: Floats) -> float:
    angles = np.linalg.norm(matrix_to_rotvec(np.ascontiguousarray(rotations)), axis=1)
    return round(float(np.degrees(angles).mean()), 2)


def likeness(recognizer: Recognizer, shown: Seen, own: Seen, rendered: Seen, driver: Seen | None) -> dict[str, Any]:
    """Whose face the video shows: mean cosine between its faces' embeddings and those of the avatar's own clip.

    Returns:
        `result`; beside it `clip`, one half of the clip with the other; `rendered`, the clip rendered again; `driver`,
        the driver, None without pictures. Each is None where too few faces were found.
    """
    clip = _embeddings(recognizer, own)
    return {
        "model": recognizer.name,
        "result": _mean_cosine(_embeddings(recognizer, shown), clip),
        "clip": _mean_cosine(clip[::2], clip[1::2]),
        "rendered": _mean_cosine(_embeddings(recognizer, rendered), clip),
        "driver": None if driver is None else _mean_cosine(_embeddings(recognizer, driver), clip),
    }


def _embeddings(recognizer: Recognizer, seen: Seen) -> list[Floats]:
    return [recognizer.embed(picture, face) for picture, face in seen.portraits]


def _mean_cosine(a: list[Floats], b: list[Floats]) -> float | None:
    return round(float((np.stack(a) @ np.stack(b).T).mean()), 3) if a and b else None


def measure(
    plan: Plan, scene: Scene, reporter: Reporter, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Track a finished video again, and say how well it does what was asked.

    Returns:
        `frames` that were compared, `found` (share of the video's frames in which a face is seen), `expression` and
        `pose` as `expression_error` and `pose_error`, `own` (the same two for the avatar's own clip), `identity` as
        `likeness`, or `identity_lacks`, why it was not measured.

    Raises:
        StageError: the tracker cannot start, or the recognition model cannot be used.
        Interrupted: a stop was asked for.
    """
    from pipeline.assets import FACE_LANDMARKER, asset_path
    from pipeline.recognition import find_recognizer, models_folder

    side, count = plan.clip.resolution, len(scene)
    frames, places = np.unique(scene.shown, return_inverse=True)
    filmed = plan.driver.picture(int(frames[0]), side) is not None
    own = np.flatnonzero(plan.clip.usable)
    own = own[evenly(len(own), OWN_FRAMES)]
    total = count + 2 * len(own) + (len(frames) if filmed else 0)
    with (
        Detector(asset_path(FACE_LANDMARKER, reporter=reporter)) as detector,
        reporter.task("metrics", total, "looks") as task,
    ):

        def watched(pictures: Iterable[Image]) -> Iterator[Image]:
            for picture in pictures:
                if stop_requested():
                    raise Interrupted("Stopped as asked; the video is there, its metrics are not.")
                yield picture
                task.advance()

        shown = look(watched(_written(plan, side)), count, detector)
        driver = None
        if filmed:
            driver = look(watched(_driver_pictures(plan, frames.tolist(), side)), len(frames), detector)
        rendered, clip = (look(watched(pictures), len(own), detector) for pictures in _own_pictures(plan, scene, own))
        names = detector.names
    turns = [scene.own.names.index(name) for name in TURN]
    compared = shown.found & ~scene.held
    if driver is not None:
        compared &= driver.found[places]
        asked = driver.scores[places]
    else:
        asked = _by_names(scene.wanted, scene.own.names, names)
    result: dict[str, Any] = {"frames": int(compared.sum()), "found": round(float(shown.found.mean()), 4)}
    if result["frames"] > 1:
        # A table of a dataset's own coefficients asks for nothing that MediaPipe scores.
        if driver is not None or is_arkit(scene.own.names):
            result["expression"] = expression_error(shown.scores[compared], asked[compared], names)
        result["pose"] = pose_error(shown.rotations[compared], scene.wanted[compared][:, turns])
    both = rendered.found & clip.found
    if both.sum() > 1:
        result["own"] = {
            "frames": int(both.sum()),
            "expression": expression_error(rendered.scores[both], clip.scores[both], names),
            "pose": pose_error(rendered.rotations[both], scene.own.values[own[both]][:, turns]),
        }
    recognizer = find_recognizer()
    if recognizer is None:
        result["identity_lacks"] = f"there is no face recognition model of InsightFace in '{models_folder()}'"
    else:
        result["identity"] = likeness(recognizer, shown, clip, rendered, driver)
    return result


def _by_names(values: Floats, have: tuple[str, ...], want: tuple[str, ...]) -> Floats:
    columns = [values[:, have.index(name)] if name in have else np.zeros(len(values)) for name in want]
    return np.stack(columns, 1)


def _written(plan: Plan, side: int) -> Iterator[Image]:
    """The video's frames without what stands at the left of them."""
    from pipeline.video import read_frames

    for frame in read_frames(plan.out):
        yield np.ascontiguousarray(frame.rgb()[:, -side:])


def _driver_pictures(plan: Plan, frames: list[int], side: int) -> Iterator[Image]:
    for frame in frames:
        picture = plan.driver.picture(frame, side)
        assert picture is not None
        yield picture


def _own_pictures(plan: Plan, scene: Scene, frames: NDArray[np.int64]) -> tuple[Iterator[Image], Iterator[Image]]:
    """Frames of the avatar's own clip, rendered again and as they were."""
    from pipeline.clip import load_crops
    from pipeline.evaluation import ClipRenderer

    own = scene.renderer
    renderer = ClipRenderer.of(own.avatar, plan.clip, own.threads, own.Ks.device)

    def rendered() -> Iterator[Image]:
        for frame in frames.tolist():
            yield np.asarray(renderer.render(frame).image * 255 + 0.5, np.uint8)

    def filmed() -> Iterator[Image]:
        for frame in frames.tolist():
            yield load_crops(plan.clip, [frame]).images[0]

    return rendered(), filmed()


def metrics_text(metrics: dict[str, Any]) -> str:
    """Metrics in a few sentences."""
    text = f"Tracked again, a face is found in {100 * metrics['found']:.0f} % of the frames."
    own = metrics.get("own", {})
    if "expression" in metrics:
        expression, pose = metrics["expression"], metrics["pose"]
        beside = f"; {own['expression']['error']:.3f} for its own clip" if own else ""
        text += (
            f" Expressions differ by {expression['error']:.3f} from what was asked "
            f"({expression['at_rest']:.3f} if nothing moved{beside})"
        )
        known = {what: value for what, value in expression["correlation"].items() if value is not None}
        text += f", correlation {', '.join(f'{what} {value:.2f}' for what, value in known.items())}." if known else "."
        beside = f"; {own['pose']['error_degrees']:.1f} for its own clip" if own else ""
        off, still = pose["error_degrees"], pose["at_rest_degrees"]
        text += f" The head is {off:.1f} degrees off ({still:.1f} if nothing moved{beside})."
    if "identity_lacks" in metrics:
        return f"{text} Whom it shows was not measured: {metrics['identity_lacks']}."
    told = {what: metrics["identity"][what] for what in ("result", "clip", "rendered", "driver")}
    cosines = ", ".join(f"{what} {value:.2f}" for what, value in told.items() if value is not None)
    return f"{text} Likeness to its clip (cosine by {metrics['identity']['model']}): {cosines}."
