"""Export: the avatar as files that other tools open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from pipeline.stage import Level, Result, Stage, StageRun, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.avatars import AvatarModel
    from pipeline.avatars.baked import BakedAvatar
    from pipeline.clip import Clip
    from pipeline.export import HeldOut

PICTURE_PX = 512
BAKED = "baked"
NOVEL_VIEWS = "novel_views.jpg"
SHOWN_FRAMES = 4
BAKE_LIMIT_DB = 0.5
"""A baked avatar that loses more than this on the held-out frames is judged fair at best."""


def run(run: StageRun) -> Result:
    """Write the avatar compactly, baked, and at rest as a 3DGS PLY; what compactness and baking cost is measured.

    Raises:
        UserError: the avatar cannot be read.
        StageError: no training or no held-out frame can be used.
        Interrupted: a stop was asked for; a baked avatar that is finished is kept.
    """
    import torch

    from pipeline.avatars import load_avatar
    from pipeline.clip import load_clip
    from pipeline.evaluation import ClipRenderer
    from pipeline.export import HeldOut, neutral_splats, portrait
    from pipeline.frames import save_image
    from pipeline.ply import read_ply, write_ply
    from pipeline.training import compile_kernels, resolve_device

    config, device = run.config.export, resolve_device(run.device)
    avatar = load_avatar(run.subject.stage("train"), device)
    # As in training: torch's own threads only wait for each other at this size.
    torch.set_num_threads(1)
    compile_kernels("cpu", run.reporter.message)
    splats = neutral_splats(avatar)
    metrics: dict[str, Any] = {"gaussians": len(splats)}
    clip = load_clip(run.subject, run.config.train.resolution)
    train, test = _usable(run, clip)
    held_out = HeldOut.of(ClipRenderer.of(avatar, clip, run.threads, device), clip, test.tolist())
    metrics["compact"], text = _write_compact(run, held_out)
    level: Level = "good"
    texts, picture = [text], "neutral.jpg"
    if config.bake:
        metrics["baked"], text = _write_baked(run, clip, train, held_out)
        texts.append(text)
        level = "good" if metrics["baked"]["loss_db"] <= BAKE_LIMIT_DB else "fair"
        picture = f"{BAKED}.jpg"
    if config.ply:
        write_ply(run.work / "avatar.ply", splats)
        splats = read_ply(run.work / "avatar.ply")
        texts.append(
            f"avatar.ply, {_megabytes(run.work / 'avatar.ply')}: {len(splats):,} Gaussians of the face at rest, "
            "for any viewer of 3DGS files"
        )
    metrics["seen_from"] = _write_novel_views(run, avatar, clip, train)
    neutral = portrait(splats, avatar.neutral.T_cam_head.double().cpu().numpy(), PICTURE_PX, run.threads)
    save_image(run.work / "neutral.jpg", neutral)
    files = sorted(path for path in run.work.rglob("*") if path.suffix in (".safetensors", ".json", ".ply"))
    metrics["bytes"] = {path.relative_to(run.work).as_posix(): path.stat().st_size for path in files}
    return Result(Verdict(level, f"Export: {level}. {'; '.join(texts)}.", picture), metrics)


def _usable(run: StageRun, clip: Clip) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The training and the held-out frames that can be used."""
    from pipeline.clip import split

    parts = split(len(clip), run.config.evaluate.holdout, run.config.evaluate.min_holdout_frames)
    train, test = (frames[clip.usable[frames]] for frames in parts)
    if not len(train) or not len(test):
        raise StageError(
            f"None of the {'held-out' if len(train) else 'training'} frames of '{run.subject.name}' can be used.",
            "take another span with --set decode.start_seconds=... decode.end_seconds=..., or film again",
        )
    return train, test


def _write_compact(run: StageRun, held_out: HeldOut) -> tuple[dict[str, Any], str]:
    """Write the avatar's own files; their figures, and in words what they cost."""
    import shutil

    from pipeline.avatars import DESCRIPTION, WEIGHTS, save_avatar
    from pipeline.compact import choose_quantised
    from pipeline.dataset import read_json

    config, trained = run.config.export, run.subject.stage("train")
    figures: dict[str, Any] = {"form": config.compact, "loss_db": 0.0, "quantised": [], "refused": []}
    if config.compact == "half":
        for name in (WEIGHTS, DESCRIPTION):
            shutil.copyfile(trained / name, run.work / name)
        cost = "as training left them: it ends in the half precision of the file, which costs nothing further"
    else:
        avatar = held_out.renderer.avatar
        choice = choose_quantised(avatar, held_out.loss_db, config.max_loss_db)
        save_avatar(avatar, run.work, read_json(trained / DESCRIPTION)["training"], choice.names)
        figures |= {"loss_db": round(choice.loss_db, 4), "quantised": choice.names, "refused": choice.refused}
        cost = f"8 bits a value: {_loss(choice.loss_db)} on the held-out frames"
        if choice.refused:
            cost += (
                f"; {', '.join(choice.refused)} stayed as training left them, to lose no more than "
                f"{config.max_loss_db:g} dB"
            )
    return figures, f"{WEIGHTS} and {DESCRIPTION}, {_megabytes(run.work / WEIGHTS, run.work / DESCRIPTION)}, {cost}"


def _write_baked(run: StageRun, clip: Clip, train: NDArray[np.int64], held_out: HeldOut) -> tuple[dict[str, Any], str]:
    """Bake the avatar, or take what an interrupted run baked; its figures, and in words what it costs."""
    import gzip
    from dataclasses import replace

    from pipeline.avatars import DESCRIPTION, WEIGHTS
    from pipeline.export import mean_psnr
    from pipeline.expressions import basis_of, is_arkit
    from pipeline.gaze import looking

    baked, seconds = _baked(run, clip, train, held_out)
    driven = held_out.renderer.conditions
    coefficients = looking(driven.expression, baked.expression_names, driven.eyes)
    tracked = baked.follow_face(coefficients, driven.T_cam_head)
    pictures = {
        "full": held_out.full,
        "baked": held_out.shown(baked),
        "full_by_face": held_out.shown(held_out.renderer.avatar, tracked),
        "baked_by_face": held_out.shown(baked, tracked),
    }
    psnr = {name: held_out.psnr(shown) for name, shown in pictures.items()}
    loss, loss_by_face = psnr["full"] - psnr["baked"], psnr["full_by_face"] - psnr["baked_by_face"]
    packed = len(gzip.compress((run.work / BAKED / WEIGHTS).read_bytes(), mtime=0))
    figures = {
        "loss_db": round(loss, 4),
        "loss_by_face_db": round(loss_by_face, 4),
        "psnr": {name: round(value, 4) for name, value in psnr.items()},
        # One after the other, so that they can be compared.
        "render_fps": {
            name: round(replace(held_out.renderer, avatar=avatar).fps(held_out.frames), 1)
            for name, avatar in (("full", held_out.renderer.avatar), ("baked", baked))
        },
        "psnr_against_full": round(mean_psnr(pictures["full"], pictures["baked"]), 4),
        "shapes": len(baked.offset),
        "bytes_packed": packed,
        "seconds": seconds,
    }
    _draw(run, held_out, pictures["baked"])
    size = _megabytes(*(run.work / BAKED / name for name in (WEIGHTS, DESCRIPTION)))
    names = baked.expression_names
    driver = "for any ARKit or MediaPipe face tracker" if is_arkit(names) else f"driven by {basis_of(names)}"
    return figures, (
        f"{BAKED}/, {size} ({packed / 1e6:.1f} packed), {len(baked.offset)} linear shapes "
        f"{driver}: the held-out frames come out at {psnr['baked']:.1f} dB instead of "
        f"{psnr['full']:.1f} ({_loss(loss)}), driven by coefficients and head pose alone at "
        f"{psnr['baked_by_face']:.1f} instead of {psnr['full_by_face']:.1f} ({_loss(loss_by_face)})"
    )


def _baked(run: StageRun, clip: Clip, train: NDArray[np.int64], held_out: HeldOut) -> tuple[BakedAvatar, float | None]:
    """The baked avatar as its file gives it, and the seconds that took; None where the file was there."""
    import time

    import torch

    from pipeline.avatars import DESCRIPTION, Condition, load_avatar, save_avatar
    from pipeline.avatars.baked import BakedAvatar
    from pipeline.bake import bake, sample_rows

    folder, renderer, seconds = run.work / BAKED, held_out.renderer, None
    folder.mkdir(exist_ok=True)
    if not (folder / DESCRIPTION).is_file():
        started = time.monotonic()
        conditions = Condition(*(value[torch.from_numpy(train)] for value in renderer.conditions))
        Ks = torch.from_numpy(clip.Ks[clip.cameras[train]]).float()
        with run.reporter.task("bake", sum(sample_rows(renderer.avatar, len(train))), "samples") as task:

            def on_sample() -> None:
                task.advance()
                run.check_stop()

            found = bake(renderer.avatar, conditions, Ks, clip.resolution, threads=run.threads, on_sample=on_sample)
        save_avatar(found, folder, {"baked_from": renderer.avatar.name, "frames": len(train)})
        seconds = round(time.monotonic() - started, 2)
    avatar = load_avatar(folder, renderer.Ks.device)
    assert isinstance(avatar, BakedAvatar)
    return avatar, seconds


def _write_novel_views(run: StageRun, avatar: AvatarModel, clip: Clip, train: NDArray[np.int64]) -> dict[str, Any]:
    """Draw the avatar from where its clip never saw it; returns, also in words, from where the clip did."""
    from pipeline.api import Avatar
    from pipeline.frames import save_image
    from pipeline.novel_views import angles_seen, seen_text, soft_edge, strip

    save_image(run.work / NOVEL_VIEWS, strip(Avatar(avatar, run.threads, soft_edge(avatar, clip))), quality=90)
    seen = angles_seen(clip, train, avatar)
    return {**seen, "text": seen_text(seen)}


def _draw(run: StageRun, held_out: HeldOut, baked: list[NDArray[np.float32]]) -> None:
    """Full, baked and difference side by side: the frame that differs most, and others spread over the span."""
    import numpy as np

    from pipeline.evaluation_figures import side_by_side, write_sheet
    from pipeline.frames import evenly
    from pipeline.metrics import flip_map, psnr

    against = [psnr(a, b) for a, b in zip(held_out.full, baked, strict=True)]
    worst = int(np.argmin(against))
    rows = []
    for i in [worst, *(i for i in evenly(len(baked), SHOWN_FRAMES) if i != worst)][:SHOWN_FRAMES]:
        run.check_stop()
        full, other = held_out.full[i], baked[i]
        first, second = ((picture * 255 + 0.5).astype(np.uint8) for picture in (full, other))
        title = f"frame {held_out.frames[i]}, full avatar{' (differs most)' if i == worst else ''}"
        figure = f"baked, {against[i]:.1f} dB from it"
        rows.append(side_by_side(first, second, flip_map(full, other), title, figure))
    half = (len(rows) + 1) // 2
    write_sheet(run.work / f"{BAKED}.jpg", [rows[:half], rows[half:]])


def _loss(loss_db: float) -> str:
    return f"a loss of {loss_db:.2f} dB" if loss_db > 0.005 else "nothing lost"


def _megabytes(*paths: Path) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.1f} MB"


STAGE = Stage(
    name="export",
    version=4,
    inputs=("decode", "matte", "fit", "train"),
    run=run,
    reads=("train.resolution", "evaluate.holdout", "evaluate.min_holdout_frames"),
    description="the avatar as files that other tools open",
)
