"""Several avatars of one clip side by side: which of them fit together, how like the clip each is, and which is best.

Nothing is taken from earlier evaluations: all are rendered anew by the same code, in the part of the picture that all
were trained on, at the resolution of the coarsest, and measured against the same truth, that of the first run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.avatar_table import BEST, gain, table_lines
from pipeline.dataset import Dataset, Subject, read_json, subject_name_for, write_json
from pipeline.errors import Interrupted, StageError, UserError
from pipeline.paired import PairedDifference, paired_difference
from pipeline.products import Product, Sources, place_for
from pipeline.progress import Reporter, SilentReporter
from pipeline.run import usable_cores, used_settings
from pipeline.stage import read_manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.clip import Clip
    from pipeline.evaluation import ClipRenderer, Measure, Picture

FOLDER = "compare"
BENCH = "bench"
"""The folder of a subject in which `headcast bench` keeps a subject for each of its rows."""
VERSION = 1
SCHEMA = 1
STAGES = ("decode", "matte", "fit", "train")
MAX_RUNS = 6
"""More do not fit beside each other in a video."""
MIN_SIDE_PX = 32
NAME_LENGTH = 80


class Run(NamedTuple):
    """One of those that are compared."""

    name: str
    subject: Subject


@dataclass(frozen=True)
class Plan:
    """A comparison found good.

    Attributes:
        runs: in the order given; the first lends the truth.
        notes: what a reader has to know, in words: where runs differ in what they were trained on.
        stop_requested: asked between frames.
    """

    runs: tuple[Run, ...]
    product: Product
    notes: tuple[str, ...]
    reporter: Reporter = field(default_factory=SilentReporter)
    threads: int = field(default_factory=usable_cores)
    device: str = "auto"
    stop_requested: Callable[[], bool] = lambda: False

    def check_stop(self) -> None:
        """Stop here if that was asked for.

        Raises:
            Interrupted: it was.
        """
        if self.stop_requested():
            raise Interrupted("Stopped. Nothing was written.")


def check_compare(
    data: Path, given: Sequence[str], *, out: Path | None = None, force: bool = False, **how: Any
) -> Plan:
    """Check a request against the dataset. Reads only.

    Args:
        data: the dataset directory.
        given: two or more of: a subject's name; a path to a subject, from here or from `data`; a subject's `bench`
            folder for all that is trained in it.
        out: the folder to write; by default `SUBJECT/compare/NAMES` of the first.
        force: replace what is there.
        how: fields of `Plan` that change nothing of what is written.

    Raises:
        UserError: a run is unknown, named twice, not trained or of another clip; too few or too many; the place is bad.
    """
    runs = _find_runs(data, given)
    sources = Sources.of(**{f"run_{place}": (run.subject, STAGES) for place, run in enumerate(runs, 1)})
    _refuse_misfits(runs)
    names = [run.name for run in runs]
    place = place_for(_owner(runs[0].subject), FOLDER, _folder_name(names), out)
    product = Product(place, sources, {"runs": names}, version=VERSION, folder=True, force=force)
    product.check_free()
    return Plan(tuple(runs), product, tuple(_notes(runs)), **how)


def _find_runs(data: Path, given: Sequence[str]) -> list[Run]:
    subjects: list[Subject] = []
    for text in given:
        subjects += _subjects_meant(data, text)
    places = [subject.root.resolve() for subject in subjects]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise UserError(f"'{twice}' is named twice.", "name each run once")
    if len(subjects) < 2:
        raise UserError(
            "A comparison needs two runs at least.",
            "name another subject made from the same clip: headcast run VIDEO --subject NAME --set ...",
        )
    if len(subjects) > MAX_RUNS:
        raise UserError(
            f"{len(subjects)} runs are too many to see side by side.", f"name {MAX_RUNS} at most, the first again"
        )
    return [Run(name, subject) for name, subject in zip(_told_apart(places), subjects, strict=True)]


def _told_apart(places: Sequence[Path]) -> list[str]:
    """The last parts of these paths, as many as it takes to tell them from each other."""
    for depth in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _subjects_meant(data: Path, text: str) -> list[Subject]:
    """The subjects of one word of the command."""
    if "/" not in text:
        return [Dataset(data).existing(text)]
    path = data / text if (data / text).is_dir() else Path(text)
    folders = sorted(path.iterdir()) if path.is_dir() and path.resolve().name == BENCH else [path]
    found = [Dataset(folder.parent).subject(folder.resolve().name) for folder in folders if _is_subject(folder)]
    if not found:
        raise UserError(f"'{path}' is no subject of a dataset.", "name a subject, or a path such as DATA/SUBJECT")
    return found


def _is_subject(folder: Path) -> bool:
    return (folder / "source" / "source.json").is_file()


def _owner(subject: Subject) -> Subject:
    """The subject of the dataset that a row of `headcast bench` belongs to; any other belongs to itself."""
    above = subject.root.parent
    return Subject(above.parent) if above.name == BENCH and _is_subject(above.parent) else subject


def _folder_name(names: Sequence[str]) -> str:
    return "-vs-".join(subject_name_for(Path(name)) for name in names)[:NAME_LENGTH].rstrip("-")


def _refuse_misfits(runs: Sequence[Run]) -> None:
    """Refuse runs that are not of the first one's clip, frames and split, each with its reason."""
    first, *others = runs
    told = [(run.name, reason) for run in others if (reason := _misfit(first.subject, run.subject)) is not None]
    if told:
        raise UserError(
            f"Not all can be compared with '{first.name}': " + "; ".join(f"'{n}' {reason}" for n, reason in told) + ".",
            "compare avatars made from one clip with the same settings of decode.* and evaluate.holdout",
        )


def _misfit(first: Subject, other: Subject) -> str | None:
    """Why a subject cannot be compared with the first."""
    if _source(first) != _source(other):
        return "was made from another clip"
    ours, theirs = _frames(first), _frames(other)
    if ours["size"] != theirs["size"]:
        sizes = [" x ".join(map(str, frames["size"])) for frames in (theirs, ours)]
        return f"has frames of {sizes[0]} px, not {sizes[1]} (decode.max_side_px)"
    if ours["frames"] != theirs["frames"]:
        return f"keeps other frames of the clip ({len(theirs['frames'])}, not {len(ours['frames'])}; decode.*)"
    (train, test), (other_train, other_test) = (_split(subject, len(ours["frames"])) for subject in (first, other))
    if len(train) != len(other_train):
        spans = [f"{span[0]}-{span[-1]}" for span in (other_test, test)]
        return f"was not trained on frames {spans[0]}, the other on all but {spans[1]} (evaluate.holdout)"
    return None


def _source(subject: Subject) -> str:
    return str(((read_manifest(subject.stage("decode")) or {}).get("inputs") or {}).get("source"))


def _frames(subject: Subject) -> dict[str, Any]:
    """Which frames of the clip a subject keeps, and their size."""
    path = subject.stage("decode") / "frames.json"
    listing = read_json(path)
    try:
        frames = [(frame.get("clip", 0), frame["source_frame"]) for frame in listing["frames"]]
        return {"size": [int(listing["width"]), int(listing["height"])], "frames": frames}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StageError(f"'{path}' is damaged: {error}.", "run: headcast rerun SUBJECT --from decode") from error


def _split(subject: Subject, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and held-out frames, as training was told."""
    from pipeline.clip import split

    settings = used_settings(subject)
    return split(count, settings["evaluate.holdout"], settings["evaluate.min_holdout_frames"])


def settings_that_differ(subjects: Sequence[Subject]) -> dict[str, list[Any]]:
    """`section.field` -> each subject's value, where they are not all the same and the avatar depends on it."""
    told = [used_settings(subject) for subject in subjects]
    rows = {name: [one.get(name) for one in told] for name in dict.fromkeys(name for one in told for name in one)}
    return {
        name: values
        for name, values in rows.items()
        if any(value != values[0] for value in values) and not name.startswith(("export.", "evaluate.lpips"))
    }


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """Where runs do not rest on the first one's matte or fit."""
    for stage, what in (("matte", "alpha and colours"), ("fit", "fit")):
        digests = [(read_manifest(run.subject.stage(stage)) or {}).get("digest") for run in runs]
        others = [run.name for run, digest in zip(runs, digests, strict=True) if digest != digests[0]]
        if others:
            yield f"{', '.join(others)}: trained with another {what} than {runs[0].name}."


@dataclass(frozen=True)
class Lineup:
    """Runs ready to render the frames that they share.

    Attributes:
        clip: of the first run, in the common crop and resolution: the truth.
        train, test: numbers of the frames that are usable in every run.
        renderers: by the run's name, each at the resolution its avatar was trained at.
        threads: files decoded at a time.
        recropped: names of the runs whose own crop is another one.
    """

    clip: Clip
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    renderers: dict[str, ClipRenderer]
    threads: int
    recropped: tuple[str, ...]

    @staticmethod
    def of(runs: Sequence[Run], threads: int, device: str = "auto") -> Lineup:
        """Load the runs, which fit together.

        Raises:
            UserError: an avatar cannot be read; crops have nothing in common.
            StageError: files are damaged, or no frame is usable in all of them.
        """
        import torch

        from pipeline.avatars import load_avatar, trained_resolution
        from pipeline.clip import load_clip
        from pipeline.evaluation import ClipRenderer
        from pipeline.training import compile_kernels, resolve_device

        # Torch's own threads only wait for each other at this size; the rasteriser keeps its own.
        torch.set_num_threads(1)
        where = resolve_device(device)
        compile_kernels(where, lambda text: None)
        avatars = {run.name: load_avatar(run.subject.stage("train"), where) for run in runs}
        sizes = {run.name: trained_resolution(run.subject.stage("train")) for run in runs}
        clips = {run.name: load_clip(run.subject, sizes[run.name]) for run in runs}
        crops = [common_crop(each) for each in zip(*(clip.crops for clip in clips.values()), strict=True)]
        train, test = _split(runs[0].subject, len(clips[runs[0].name]))
        train, test = (span[[all(clip.usable[f] for clip in clips.values()) for f in span]] for span in (train, test))
        if not len(train) or not len(test):
            raise StageError(
                f"No {'training' if not len(train) else 'held-out'} frame is usable in every run.",
                "leave out the run with the fewest usable frames; headcast status tells",
            )
        return Lineup(
            clip=load_clip(runs[0].subject, min(sizes.values())).recropped(crops),
            train=train,
            test=test,
            renderers={
                name: ClipRenderer.of(avatars[name], clip.recropped(crops), threads, where)
                for name, clip in clips.items()
            },
            threads=threads,
            recropped=tuple(name for name, clip in clips.items() if list(clip.crops) != crops),
        )

    def render(self, name: str, frame: int) -> Picture:
        """A run's render of a frame, in the common crop and resolution.

        It is rendered as finely as it was trained and then reduced: rendered coarsely at once, its Gaussians would be
        widened to pixels of another size.
        """
        import cv2

        from pipeline.evaluation import Picture

        picture, size = self.renderers[name].render(frame), (self.clip.resolution,) * 2
        if picture.alpha.shape == size:
            return picture
        image, alpha = (cv2.resize(a, size, interpolation=cv2.INTER_AREA) for a in (picture.image, picture.alpha))
        return Picture(image, alpha)


def common_crop(crops: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """The largest square inside all of these (x0, y0, side), in the middle of what they share.

    Raises:
        UserError: they share less than `MIN_SIDE_PX`.
    """
    left, top = max(x0 for x0, _, _ in crops), max(y0 for _, y0, _ in crops)
    right, bottom = min(x0 + side for x0, _, side in crops), min(y0 + side for _, y0, side in crops)
    side = min(right - left, bottom - top)
    if side < MIN_SIDE_PX:
        raise UserError("The crops of these runs have nothing in common.", "make the fits of the same person")
    return left + (right - left - side) // 2, top + (bottom - top - side) // 2, side


def measure_baselines(lineup: Lineup, check_stop: Callable[[], None] = lambda: None) -> dict[str, list[dict[str, Any]]]:
    """By baseline, which needs no avatar: PSNRs, SSIM, FLIP and L1 of every held-out frame."""
    from pipeline import metrics
    from pipeline.evaluation import BASELINES, regional_psnr, regions_of, scan_training, stand_ins

    clip, train, test = lineup.clip, lineup.train, lineup.test
    scan = scan_training(clip, train, test, threads=lineup.threads, on_frames=lambda count: check_stop())
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in BASELINES}
    regions = regions_of(clip, clip.head_model(), test.tolist())
    for region, (_, truth, pictures) in zip(regions, stand_ins(clip, train, test, scan), strict=True):
        check_stop()
        for name, (picture, _) in pictures.items():
            others = {
                "ssim": metrics.ssim(truth.image, picture.image),
                "flip": float(metrics.flip_map(truth.image, picture.image).mean()),
                "l1": metrics.l1(truth.image, picture.image),
            }
            rows[name].append({**regional_psnr(truth, picture, region.head), **others})
    return rows


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean of every figure over frames."""
    from pipeline.evaluation import mean_of

    return {name: mean_of(rows, name) for name in rows[0]}


class Scored(NamedTuple):
    """One frame of every run."""

    frame: int
    truth: NDArray[np.uint8]
    renders: dict[str, NDArray[np.uint8]]
    figures: dict[str, dict[str, float | None]]
    flips: dict[str, NDArray[np.floating[Any]]]


def score_frames(lineup: Lineup, lpips: Measure | None, frames: Sequence[int]) -> Iterator[Scored]:
    """Render and score frames, one after another."""
    from pipeline.clip import load_crops
    from pipeline.evaluation import Picture, regions_of, score
    from pipeline.metrics import flip_map

    regions = regions_of(lineup.clip, lineup.clip.head_model(), frames)
    for frame, region in zip(frames, regions, strict=True):
        crops = load_crops(lineup.clip, [frame])
        truth = Picture.of(crops, 0)
        pictures = {name: lineup.render(name, frame) for name in lineup.renderers}
        flips = {name: flip_map(truth.image, picture.image) for name, picture in pictures.items()}
        figures = {
            name: score(truth, picture, region, flips[name], lpips, crops.confidences[0])
            for name, picture in pictures.items()
        }
        yield Scored(frame, crops.images[0], {name: p.rgb() for name, p in pictures.items()}, figures, flips)


def compare(plan: Plan) -> dict[str, Any]:
    """Write the comparison, unless this very one is there; returns its document, `compare.json`.

    Raises:
        HeadcastError: what went wrong; nothing was written then.
    """
    if plan.product.force or plan.product.finished() is None:
        account = plan.product.make(lambda folder: _write(plan, folder))
        plan.reporter.message(account["text"])
    else:
        plan.reporter.message(f"{plan.product.path}: fresh, nothing to do.")
    document: dict[str, Any] = json.loads((plan.product.path / "compare.json").read_bytes())
    return document


def _write(plan: Plan, folder: Path) -> dict[str, Any]:
    from pipeline.compare_page import write_page, write_stills, write_video_of
    from pipeline.evaluation import lpips_or_reason

    lineup = Lineup.of(plan.runs, plan.threads, plan.device)
    lpips, lpips_reason = lpips_or_reason(True, lineup.clip.resolution)
    rows: dict[str, list[dict[str, float | None]]] = {run.name: [] for run in plan.runs}

    def each_frame() -> Iterator[Scored]:
        with plan.reporter.task("compare", len(lineup.test), "frames") as task:
            for scored in score_frames(lineup, lpips, lineup.test.tolist()):
                plan.check_stop()
                for name, figures in scored.figures.items():
                    rows[name].append(figures)
                yield scored
                task.advance()

    write_video_of(each_frame(), folder / "compare.mp4", lineup.clip)
    plan.reporter.message("Measuring the baselines")
    document = {
        "schema": SCHEMA,
        **_figures(plan, lineup, rows, measure_baselines(lineup, plan.check_stop)),
        "lpips_reason": lpips_reason,
        "settings": settings_that_differ([run.subject for run in plan.runs]),
        "notes": [*plan.notes, *_crop_notes(lineup)],
    }
    document["verdict"] = verdict_text(document)
    write_json(folder / "compare.json", document)
    stills = write_stills(folder, lineup, document["per_frame"])
    write_page(folder, document, stills)
    return {"text": document["verdict"]}


def _figures(
    plan: Plan,
    lineup: Lineup,
    rows: Mapping[str, Sequence[Mapping[str, float | None]]],
    baselines: Mapping[str, Sequence[Mapping[str, float | None]]],
) -> dict[str, Any]:
    """The measured part of `compare.json`."""
    from pipeline.evaluation import FIGURES, mean_of, rounded

    others = {name: means(each) for name, each in baselines.items()}
    runs = [_run_figures(plan, lineup, run, {n: mean_of(rows[run.name], n) for n in FIGURES}) for run in plan.runs]
    for row in runs:
        row["gain"] = gain(row["test"], others[BEST])
    best = max(runs, key=lambda row: row["test"]["psnr"])["name"]
    frames = {name: {n: [rounded(row[n]) for row in each] for n in FIGURES} for name, each in rows.items()}
    return {
        "resolution": [lineup.clip.resolution] * 2,
        "crops": lineup.clip.crops,
        "frames": {"train": len(lineup.train), "test": len(lineup.test)},
        "held_out": [int(lineup.test[0]), int(lineup.test[-1])],
        "runs": runs,
        "baselines": others,
        "best": best,
        "beside_best": {run.name: _beside(frames[best], frames[run.name]) for run in plan.runs if run.name != best},
        "per_frame": {
            "frame": lineup.test.tolist(),
            "time": [round(float(lineup.clip.times[frame]), 4) for frame in lineup.test],
            "runs": frames,
            "baselines": {name: {"psnr": [rounded(row["psnr"]) for row in each]} for name, each in baselines.items()},
        },
    }


def _run_figures(plan: Plan, lineup: Lineup, run: Run, test: dict[str, float | None]) -> dict[str, Any]:
    from pipeline.avatars import DESCRIPTION, WEIGHTS
    from pipeline.evaluation import train_psnr

    renderer, folder = lineup.renderers[run.name], run.subject.stage("train")
    trained = (read_manifest(folder) or {}).get("metrics") or {}
    return {
        "name": run.name,
        "error": None,
        "resolution": [renderer.resolution] * 2,
        "test": test,
        "train": {
            "psnr": train_psnr(lineup.clip, lineup.train, lambda frame: lineup.render(run.name, frame), plan.check_stop)
        },
        "avatar": {
            "model": renderer.avatar.name,
            "gaussians": renderer.avatar.count,
            "bytes": sum((folder / name).stat().st_size for name in (WEIGHTS, DESCRIPTION)),
        },
        "speed": {
            "render_fps": round(renderer.fps(lineup.test.tolist()), 1),
            "train_seconds": trained.get("train_seconds"),
            "train_steps": trained.get("steps"),
        },
    }


def _beside(best: Mapping[str, Sequence[Any]], other: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """By region, how far the best is above another over the same frames."""
    known = [name for name in ("psnr", "psnr_head") if None not in (*best[name], *other[name])]
    return {name: paired_difference(best[name], other[name])._asdict() for name in known}


def _crop_notes(lineup: Lineup) -> Iterator[str]:
    """Where what is compared is not what each run was trained on."""
    sizes = {name: renderer.resolution for name, renderer in lineup.renderers.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size} px" for name, size in sizes.items())
        yield f"Rendered as trained ({told}) and reduced to {lineup.clip.resolution} px."
    if lineup.recropped:
        yield f"{', '.join(lineup.recropped)}: trained on another crop; measured in the part that all share."


def verdict_text(document: Mapping[str, Any]) -> str:
    """Which is best, by how much, and whether frames alone could make the difference."""
    psnr = {row["name"]: row["test"]["psnr"] for row in document["runs"]}
    best, (first, last) = document["best"], document["held_out"]
    count = document["frames"]["test"]
    parts = [f"{best} is most like the {count} held-out frames {first}-{last}: {psnr[best]:.1f} dB."]
    for name, beside in document["beside_best"].items():
        found = PairedDifference(**beside["psnr"])
        text = f"It is {found.mean:.2f} dB above {name}"
        if found.low is None or found.high is None:
            parts.append(f"{text}; {count} frames are too few to tell what that is worth.")
            continue
        interval = f"95 % interval {found.low:+.2f} to {found.high:+.2f} dB, {found.blocks} blocks of neighbours"
        if found.told_apart:
            parts.append(f"{text}, more than the spread over frames explains ({interval}).")
        else:
            parts.append(f"{text}, within the spread over frames: they cannot be told apart ({interval}).")
    heads = {row["name"]: row["test"]["psnr_head"] for row in document["runs"] if row["test"]["psnr_head"] is not None}
    if heads and (on_head := max(heads, key=lambda name: heads[name])) != best:
        parts.append(f"On the head alone {on_head} is ahead: {heads[on_head]:.1f} dB.")
    return " ".join(parts)


def markdown(document: Mapping[str, Any]) -> str:
    """The comparison's table as Markdown, for documentation."""
    (size, _), count = document["resolution"], document["frames"]["test"]
    title = f"{size} x {size}, {count} held-out frames"
    return "\n".join(table_lines(title, document["runs"], document["baselines"]))
