"""Benchmark of matting: composites with known alpha, clips before a screen against their key, and what real clips show.

The composites are a synthetic subject with loose hair over footage of the registered clips, with sensor noise and
H.264; decode, track and matte run on them in a process of their own, as a user would start them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.assets import asset_path
from pipeline.bench_run import timed
from pipeline.dataset import subject_name_for
from pipeline.frames import FrameSet
from pipeline.matting.chroma import find_backdrop, key
from pipeline.matting.metrics import Flicker, dtssd, gradient_error, iou, mad, mse, partial_alpha_share, sad
from pipeline.video import read_frames, write_video

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ground = Callable[[int], NDArray[np.floating[Any]]]
    """The background [H, W, 3] in 0 to 255 of a frame by its number."""

SIDE_PX, FRAMES, FPS, CRF = 448, 40, 25, 23
STRANDS = 900
SENSOR_NOISE = 2.5
"""Standard deviation in 8-bit levels."""
GROUND_CLIPS = ("face_noface", "no_face")
"""Assets that the backgrounds are cut from: the room beside a man, and a moving sky with a title."""
FIGURES = {"sad": sad, "mse": mse, "mad": mad, "gradient": gradient_error, "iou": iou}
"""Of one frame; those of frames in a row come on top."""


def bench(
    videos: Sequence[Path], preset: str, data: Path, *, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Matte the composites and compare with truth; run each video in `data` and collect what it says of its matte.

    Raises:
        UserError, StageError: a run fails, with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="headcast-bench-") as folder:
        scratch = Path(folder)
        return {
            "schema": 1,
            "preset": preset,
            "composites": list(bench_composites(scratch, report=report)),
            "clips": [_bench_clip(video, preset, data, scratch, report) for video in videos],
        }


def bench_composites(
    folder: Path, frames: int = FRAMES, side: int = SIDE_PX, *, report: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, Any]]:
    """The figures of one scene after the other; the videos and their datasets are left in `folder`."""
    from pipeline.synthetic import make_clip

    report(f"Drawing the subject, {frames} frames of {side} x {side}")
    subject = make_clip(frames, side, side, seed=7, background="plain", hair=STRANDS, supersample=4)
    colours = subject.images - 255 * (1 - subject.alpha[..., None]) * subject.background
    for scene, ground in _grounds(frames, side).items():
        report(f"Matting the scene {scene}")
        video = folder / f"{scene}.mp4"
        write_video(video, composite(colours, subject.alpha, ground), FPS, crf=CRF)
        matte, metrics = _matte(video, folder)
        decoded = FrameSet.load(matte.parent / "decode")
        truths = truth_on_frames(decoded, subject.alpha)
        yield {"scene": scene, **compare(decoded, matte, truths), "ms_per_frame": metrics["ms_per_frame"]}


def composite(
    colours: NDArray[np.floating[Any]], alpha: NDArray[np.floating[Any]], ground: Ground
) -> Iterator[NDArray[np.uint8]]:
    """Frames [H, W, 3] of a subject, its colours [T, H, W, 3] times its alpha [T, H, W], over a ground, with noise."""
    noise = np.random.default_rng(0)
    for index, (own, share) in enumerate(zip(colours, alpha, strict=True)):
        picture = own + (1 - share[..., None]) * ground(index)
        yield (picture + noise.normal(0, SENSOR_NOISE, own.shape)).clip(0, 255).round().astype(np.uint8)


def truth_on_frames(frames: FrameSet, truth: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """The true alpha of each decoded frame of a dataset's only clip, from those [T, H, W] of its source frames."""
    import cv2

    clip = frames.record["clips"][0]
    left, top, right, bottom = clip["bars"]
    height, width = truth.shape[1:]
    for number in frames.source_frames:
        cut = np.ascontiguousarray(truth[number, top : height - bottom, left : width - right])
        yield np.asarray(cv2.resize(cut, (frames.width, frames.height), interpolation=cv2.INTER_AREA), np.float32)


def compare(frames: FrameSet, matte: Path, truths: Iterable[NDArray[np.float32]]) -> dict[str, Any]:
    """The field's figures of a matte folder against the true alpha [H, W] of every frame, means over the frames."""
    values: dict[str, list[float]] = {name: [] for name in (*FIGURES, "dtssd", "partial", "partial_true")}
    flicker, true_flicker = Flicker(), Flicker()
    last: tuple[NDArray[Any], NDArray[Any]] | None = None
    for index, truth in enumerate(truths):
        image, alpha = frames.image(index), frames.alpha(index, matte).astype(np.float32) / 255
        if index and frames.shots[index] != frames.shots[index - 1]:
            last = None
            flicker.add(None, None)
            true_flicker.add(None, None)
        for name, figure in FIGURES.items():
            values[name].append(figure(truth, alpha))
        values["partial"].append(partial_alpha_share(alpha))
        values["partial_true"].append(partial_alpha_share(truth))
        if last is not None:
            values["dtssd"].append(dtssd(np.stack([last[0], truth]), np.stack([last[1], alpha])))
        last = truth, alpha
        flicker.add(image, alpha)
        true_flicker.add(image, truth)
    means = {name: float(np.mean(numbers)) if numbers else 0.0 for name, numbers in values.items()}
    return {
        "frames": len(frames),
        **{name: round(means[name], 5) for name in (*FIGURES, "dtssd")},
        "flicker_px": round(flicker.mean(), 3),
        "flicker_px_truth": round(true_flicker.mean(), 3),
        "partial_alpha_share": round(means["partial"], 4),
        "partial_alpha_share_truth": round(means["partial_true"], 4),
    }


def _bench_clip(video: Path, preset: str, data: Path, scratch: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """What a whole run says of a clip's matte; before a screen, the network's alpha against the key."""
    report(f"Running {video.name}")
    timed(["run", str(video), "--data", str(data), "--preset", preset, "--no-check", "--json"])
    folder = data / subject_name_for(video)
    matte = json.loads((folder / "matte" / "stage.json").read_text())["metrics"]
    metrics = json.loads((folder / "evaluate" / "metrics.json").read_text())
    gains = {
        name: round(metrics["test"][name] - metrics["baselines"]["nearest_train_frame"][name], 2)
        for name in ("psnr", "psnr_head")
    }
    return {
        "clip": video.name,
        **{name: matte[name] for name in ("flicker_px", "partial_alpha_share", "ms_per_frame")},
        "error_share_partial_alpha": metrics["error_share_partial_alpha"],
        "gain_over_best_training_frame": gains,
        "network_against_key": _network_against_key(video, FrameSet.load(folder / "decode"), scratch, report),
    }


def _network_against_key(
    video: Path, frames: FrameSet, scratch: Path, report: Callable[[str], None]
) -> dict[str, Any] | None:
    from pipeline.frames import evenly

    backdrop = find_backdrop([frames.image(index) for index in evenly(len(frames), 12)])
    if backdrop is None:
        return None
    report(f"Matting {video.name}, filmed before a {backdrop.name} screen, with the network")
    matte, _ = _matte(video, scratch, "--set", "matte.source=network")
    return compare(frames, matte, (key(frames.image(index), backdrop) for index in range(len(frames))))


def _matte(video: Path, data: Path, *options: str) -> tuple[Path, dict[str, Any]]:
    """Run a video up to its matte: the stage's folder and metrics."""
    timed(["run", str(video), "--data", str(data), "--to", "matte", "--no-check", "--json", *options])
    folder = data / subject_name_for(video) / "matte"
    return folder, json.loads((folder / "stage.json").read_text())["metrics"]


def _grounds(count: int, side: int) -> dict[str, Ground]:
    """The scenes' backgrounds: a camera that stands or pans, something that moves behind, a plain wall, a screen."""
    import cv2

    y, x = np.mgrid[:side, :side] / side
    light = (1.08 - 0.25 * x - 0.1 * (y - 0.3) ** 2)[..., None]
    wall, screen = (np.array(colour) * light for colour in ((186, 184, 178), (70, 155, 105)))
    room_clip, moving_clip = (asset_path(name, fetch=False) for name in GROUND_CLIPS)
    room = next(iter(read_frames(room_clip))).rgb()
    # From its blank first second on, as many frames as there are, then the last again.
    moving = [frame.rgb() for frame, _ in zip(read_frames(moving_clip), range(count + 20), strict=False)][20:]

    def window(image: NDArray[np.uint8], left: float, top: float, size: int) -> NDArray[np.uint8]:
        scale = side / size
        shift = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
        return np.asarray(cv2.warpAffine(image, shift, (side, side), flags=cv2.INTER_CUBIC), np.uint8)

    still = window(room, 715, 0, 230)
    return {
        "still": lambda index: still,
        "pan": lambda index: window(room, 711 + 0.4 * index, 0.1 * index, 230),
        "moving": lambda index: window(moving[min(index, len(moving) - 1)], 150 + 1.5 * index, 20, 500),
        "wall": lambda index: wall,
        "screen": lambda index: screen,
    }


def table(document: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| composite | SAD | MSE x1000 | MAD x1000 | Grad | dtSSD x100 | IoU | flicker px (of the truth) "
        "| half transparent (of the truth) | ms a frame |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scene in document["composites"]:
        lines.append(f"| {scene['scene']} {_figures(scene)} | {_number(scene['ms_per_frame'], 0)} |")
    if document["clips"]:
        lines += [
            "",
            f"| clip ({document['preset']}) | flicker px | half transparent | ms a frame | held-out error there "
            "| gain over the best training frame | head |",
            "|---|---|---|---|---|---|---|",
        ]
    for clip in document["clips"]:
        share, gains = clip["error_share_partial_alpha"], clip["gain_over_best_training_frame"]
        lines.append(
            f"| {clip['clip']} | {clip['flicker_px']:.2f} | {100 * clip['partial_alpha_share']:.1f} % "
            f"| {_number(clip['ms_per_frame'], 0)} | {'-' if share is None else f'{100 * share:.0f} %'} "
            f"| {gains['psnr']:+.1f} dB | {gains['psnr_head']:+.1f} dB |"
        )
    keyed = [clip for clip in document["clips"] if clip["network_against_key"]]
    if keyed:
        lines += ["", lines[0].replace("composite", "network against key").replace(" | ms a frame", ""), lines[1][:-4]]
    lines += [f"| {clip['clip']} {_figures(clip['network_against_key'])} |" for clip in keyed]
    return "\n".join(lines)


def _figures(figures: dict[str, Any]) -> str:
    return (
        f"| {figures['sad']:.2f} | {1000 * figures['mse']:.2f} | {1000 * figures['mad']:.2f} "
        f"| {figures['gradient']:.2f} | {100 * figures['dtssd']:.2f} | {figures['iou']:.4f} "
        f"| {figures['flicker_px']:.2f} ({figures['flicker_px_truth']:.2f}) "
        f"| {100 * figures['partial_alpha_share']:.1f} % ({100 * figures['partial_alpha_share_truth']:.1f} %)"
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
