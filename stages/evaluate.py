"""Evaluate: render the held-out frames, measure them beside the baselines, and show them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import StageError
from pipeline.stage import Result, Stage, StageRun, Verdict, read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.clip import Clip
    from pipeline.evaluation import ClipRenderer, Measure, TrainingScan

SCHEMA = 1
SHEET_FRAMES = 6
WORST_FRAMES = 3
APART_SHARE = 0.2
"""Frames shown as the worst are so far apart at least, as a share of the held-out span: neighbours show the same."""


class Span(NamedTuple):
    """A part of the clip: all its frames, and those of them that can be used."""

    frames: NDArray[np.int64]
    usable: NDArray[np.int64]


class Measured(NamedTuple):
    """One held-out frame, measured."""

    figures: dict[str, float | None]
    image: NDArray[np.uint8]
    """[R,R,3] the render."""
    head: NDArray[np.bool_]
    """[R,R] the head's pixels."""
    flip: NDArray[np.floating[Any]]
    """[R,R] FLIP's error."""


def run(run: StageRun) -> Result:
    """Measure the avatar on the frames that training never saw.

    Raises:
        StageError: no held-out or no training frame can be used.
    """
    import torch

    from pipeline.avatars import load_avatar
    from pipeline.clip import load_clip
    from pipeline.dataset import write_json
    from pipeline.evaluation import ClipRenderer, judge, lpips_or_reason, train_psnr, verdict_text
    from pipeline.training import compile_kernels, resolve_device

    clip = load_clip(run.subject, run.config.train.resolution)
    train, test = _spans(run, clip)
    # As in training: torch's own threads only wait for each other at this size; the rasteriser keeps its own.
    torch.set_num_threads(1)
    device = resolve_device(run.device)
    compile_kernels(device, run.reporter.message)
    renderer = ClipRenderer.of(load_avatar(run.subject.stage("train"), device), clip, run.threads, device)
    lpips, lpips_reason = lpips_or_reason(run.config.evaluate.lpips, clip.resolution)
    _measure_frames(run, clip, test.usable, renderer, lpips)
    scan = _scan(run, clip, train, test)
    baselines = _measure_baselines(run, clip, train, test, scan)
    # The training log has no clock, so that equal training gives equal files; the manifest has.
    trained = (read_manifest(run.subject.stage("train")) or {}).get("metrics", {})
    result = {
        "schema": SCHEMA,
        "subject": run.subject.name,
        "resolution": [clip.resolution, clip.resolution],
        "split": {name: [int(s.frames[0]), int(s.frames[-1])] for name, s in (("train", train), ("test", test))},
        "counts": {
            **{"train": len(train.frames), "train_usable": len(train.usable)},
            **{"test": len(test.frames), "test_usable": len(test.usable)},
        },
        **_test_figures(run, clip, test, baselines),
        "lpips_reason": lpips_reason,
        "train": {"psnr": train_psnr(clip, train.usable, renderer.render, run.check_stop)},
        "avatar": {
            "model": renderer.avatar.name,
            "gaussians": renderer.avatar.count,
            "bytes": sum(run.input("train", name).stat().st_size for name in ("avatar.safetensors", "avatar.json")),
        },
        "speed": {
            "render_fps": round(renderer.fps(test.usable.tolist()), 1),
            "train_seconds": trained.get("train_seconds"),
            "train_steps": trained.get("steps"),
        },
    }
    _draw(run, clip, test, result)
    write_json(run.work / "metrics.json", result)
    level = judge(result["test"]["psnr"], {name: row["psnr"] for name, row in result["baselines"].items()})
    summary = {name: value for name, value in result.items() if name not in ("schema", "subject", "per_frame")}
    return Result(Verdict(level, verdict_text(result, level), "comparison.jpg"), summary)


def _spans(run: StageRun, clip: Clip) -> tuple[Span, Span]:
    """The training and the held-out part."""
    from pipeline.clip import split

    config = run.config.evaluate
    parts = split(len(clip), config.holdout, config.min_holdout_frames)
    train, test = (Span(frames, frames[clip.usable[frames]]) for frames in parts)
    for name, span in (("training", train), ("held-out", test)):
        if not len(span.usable):
            raise StageError(
                f"None of the {name} frames {span.frames[0]}-{span.frames[-1]} of '{run.subject.name}' can be used: "
                "the face is missing, occluded or off-frame in all of them.",
                "take another span with --set decode.start_seconds=... decode.end_seconds=..., or film again",
            )
    return train, test


def _measure_frames(
    run: StageRun, clip: Clip, frames: NDArray[np.int64], renderer: ClipRenderer, lpips: Measure | None
) -> None:
    """Render and score every held-out frame; each is kept as soon as it is done."""
    import numpy as np

    from pipeline.clip import load_crops
    from pipeline.evaluation import Picture, regions_of, score
    from pipeline.metrics import flip_map

    missing = [int(frame) for frame in frames if not _scratch(run, int(frame)).is_file()]
    regions = regions_of(clip, clip.head_model(), missing)
    with run.reporter.task("evaluate", len(frames), "frames", len(frames) - len(missing)) as task:
        for frame, region in zip(missing, regions, strict=True):
            run.check_stop()
            crops = load_crops(clip, [frame])
            truth, picture = Picture.of(crops, 0), renderer.render(frame)
            flip = flip_map(truth.image, picture.image)
            figures = score(truth, picture, region, flip, lpips, crops.confidences[0])
            _store(run, frame, Measured(figures, picture.rgb(), region.head, flip.astype(np.float16)))
            task.advance(note=f"PSNR {figures['psnr']:.1f} dB")


def _scan(run: StageRun, clip: Clip, train: Span, test: Span) -> TrainingScan:
    from pipeline.evaluation import scan_length, scan_training

    with run.reporter.task("baselines", scan_length(clip, train.usable, test.usable), "frames") as task:

        def on_frames(count: int) -> None:
            task.advance(count)
            run.check_stop()

        return scan_training(clip, train.usable, test.usable, threads=run.threads, on_frames=on_frames)


def _measure_baselines(
    run: StageRun, clip: Clip, train: Span, test: Span, scan: TrainingScan
) -> dict[str, list[dict[str, Any]]]:
    """For each baseline and held-out frame its PSNRs, and the training frame that stood in."""
    from pipeline.evaluation import BASELINES, regional_psnr, stand_ins

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in BASELINES}
    for frame, truth, pictures in stand_ins(clip, train.usable, test.usable, scan):
        run.check_stop()
        head = _load(run, frame).head
        for name, (picture, pick) in pictures.items():
            rows[name].append({"frame": pick, **regional_psnr(truth, picture, head)})
    return rows


def _test_figures(
    run: StageRun, clip: Clip, test: Span, baselines: Mapping[str, Sequence[dict[str, Any]]]
) -> dict[str, Any]:
    """The held-out part of `metrics.json`: means, then the figures of every frame."""
    from pipeline.evaluation import FIGURES, REGIONS, mean_of, rounded
    from pipeline.metrics import MS_SSIM_MIN_SIDE

    frames = [_load(run, int(frame)).figures for frame in test.usable]
    error, partial = (sum(f[key] or 0 for f in frames) for key in ("squared_error", "squared_error_partial_alpha"))
    too_small = clip.resolution < MS_SSIM_MIN_SIDE
    return {
        "test": {name: mean_of(frames, name) for name in FIGURES},
        "ms_ssim_reason": f"it needs sides of at least {MS_SSIM_MIN_SIDE} px" if too_small else None,
        "error_share_partial_alpha": round(partial / error, 4) if error > 0 else None,
        "error_parts": _error_parts(frames),
        "baselines": {name: {region: mean_of(rows, region) for region in REGIONS} for name, rows in baselines.items()},
        "per_frame": {
            "frame": test.usable.tolist(),
            "time": [round(float(clip.times[frame]), 4) for frame in test.usable],
            **{name: [rounded(figures[name]) for figures in frames] for name in FIGURES},
            "baselines": {
                name: {"frame": [row["frame"] for row in rows], "psnr": [rounded(row["psnr"]) for row in rows]}
                for name, rows in baselines.items()
            },
        },
    }


def _error_parts(frames: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float]] | None:
    """Of each part of the picture its share of the squared error and of the pixels; None where there is no error."""
    from pipeline.evaluation import PARTS

    sums = {
        kind: {part: sum(f[f"{kind}_{part}"] or 0 for f in frames) for part in PARTS} for kind in ("error", "pixels")
    }
    error, pixels = (sum(of.values()) for of in sums.values())
    if error <= 0:
        return None
    return {
        part: {"error": round(sums["error"][part] / error, 4), "area": round(sums["pixels"][part] / pixels, 4)}
        for part in PARTS
    }


def _draw(run: StageRun, clip: Clip, test: Span, result: dict[str, Any]) -> None:
    """Write the comparison's video and sheet, the frames that tell most, and where the error is on the whole.

    `result` gets the numbers of those frames as `shown`.
    """
    import numpy as np

    from pipeline.clip import load_crops
    from pipeline.evaluation_figures import laid_over, mean_error, side_by_side, write_sheet
    from pipeline.frames import evenly, save_image, shown_file
    from pipeline.video import write_video

    figures = result["per_frame"]
    scores = dict(zip(figures["frame"], figures["psnr"], strict=True))

    def compare(frame: int) -> NDArray[np.uint8]:
        run.check_stop()
        truth, measured = load_crops(clip, [frame]).images[0], _load(run, frame)
        titles = f"frame {frame}", f"render, {scores[frame]:.1f} dB"
        return side_by_side(truth, measured.image, measured.flip, *titles)

    def all_frames() -> Iterator[NDArray[np.uint8]]:
        with run.reporter.task("comparison", len(scores), "frames") as task:
            for frame in scores:
                yield compare(frame)
                task.advance()

    write_video(run.work / "comparison.mp4", all_frames(), 1 / float(np.median(np.diff(clip.times))))
    frames = list(scores)
    rows = [compare(frames[i]) for i in evenly(len(frames), SHEET_FRAMES)]
    write_sheet(run.work / "comparison.jpg", [rows[: (len(rows) + 1) // 2], rows[(len(rows) + 1) // 2 :]])
    result["shown"] = telling_frames(scores)
    (run.work / "shown").mkdir(exist_ok=True)
    for entry in result["shown"]:
        save_image(run.work / shown_file(entry["frame"]), compare(entry["frame"]), quality=90)
    middle = result["shown"][-1]["frame"]
    pairs = ((load_crops(clip, [frame]).images[0], _load(run, frame).flip) for frame in frames)
    on_each_other = (laid_over(clip, frame, middle, *pair) for frame, pair in zip(frames, pairs, strict=True))
    save_image(run.work / "mean_error.jpg", mean_error(on_each_other), quality=90)


def telling_frames(scores: Mapping[int, float]) -> list[dict[str, Any]]:
    """Of frames with their PSNR those that tell most: a few of the worst, some way apart, and the median one."""
    apart = max(1, round(APART_SHARE * (max(scores) - min(scores) + 1)))
    worst: list[int] = []
    for frame in sorted(scores, key=lambda frame: scores[frame]):
        if len(worst) < WORST_FRAMES and all(abs(frame - other) >= apart for other in worst):
            worst.append(frame)
    others = sorted((frame for frame in scores if frame not in worst), key=lambda frame: scores[frame])
    chosen = [(frame, "worst") for frame in worst] + [(frame, "typical") for frame in others[len(others) // 2 :][:1]]
    return [{"frame": frame, "kind": kind} for frame, kind in chosen]


def _scratch(run: StageRun, frame: int) -> Path:
    return run.scratch / f"{frame:06d}.npz"


def _store(run: StageRun, frame: int, measured: Measured) -> None:
    import numpy as np

    path = _scratch(run, frame)
    temporary = path.with_name(f".{path.name}")
    arrays: dict[str, Any] = {name: np.nan if value is None else value for name, value in measured.figures.items()}
    arrays |= {"image": measured.image, "head": measured.head, "flip_map": measured.flip}
    np.savez(temporary, **arrays)
    temporary.replace(path)


def _load(run: StageRun, frame: int) -> Measured:
    import numpy as np

    with np.load(_scratch(run, frame), allow_pickle=False) as file:
        figures = {name: float(file[name]) for name in file.files if file[name].ndim == 0}
        known = {name: None if np.isnan(value) else value for name, value in figures.items()}
        return Measured(known, file["image"], file["head"], file["flip_map"])


STAGE = Stage(
    name="evaluate",
    version=4,
    inputs=("decode", "matte", "fit", "train"),
    run=run,
    reads=("train.resolution",),
    description="render the held-out frames and measure them beside the baselines",
)
