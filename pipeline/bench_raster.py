"""Benchmark of the CPU rasteriser: forward, backward, loss, rendering alone, and a whole training step.

On the three standard scenes the rasteriser and the photometric loss run against their torch references, beside the time
that arithmetic alone would take at a given peak. Runs of all contestants are interleaved and medians taken, so that a
busy machine disturbs them alike: the ratios hold where the milliseconds do not. Times are noisy even so; on a machine
that does anything else, a parallel region of a millisecond can take ten. `headcast bench raster`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pipeline.losses import photometric_loss
from pipeline.rasterize import Backend, Render, rasterize, render_uint8
from pipeline.rasterize.cpu import warm_up

if TYPE_CHECKING:
    from pipeline.avatars import TrainingData

SCENES = (("10k-256", 10_000, 256), ("20k-256", 20_000, 256), ("50k-512", 50_000, 512))
"""Name, Gaussians, image side in pixels."""
RENDERS = (("10k-256", 10_000, 256), ("10k-512", 10_000, 512))
"""Scenes that are rendered without gradients."""
STEP = (10_000, 256)
"""Gaussians and image side of the training step."""
WARM_STEPS, TIMED_STEPS = 5, 40
WARM_RUNS = 3
"""Uncounted runs of the fast code after another contestant."""
STEP_FRAMES = 6

FLOP_PER_PAIR = {"forward": 33, "backward": 60}
"""Arithmetic of one Gaussian at one pixel that it contributes to."""
PEAK_GFLOPS = 456.0
"""float32 arithmetic per second of two AMD Zen 5 cores."""


@dataclass(frozen=True)
class Scene:
    """Gaussians in front of a camera."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor
    viewmat: Tensor
    K: Tensor
    size: int

    def render(self, backend: Backend, threads: int | None = None) -> Render:
        """Render over white."""
        return rasterize(
            self.means, self.quats, self.scales, self.opacities, self.colors, self.viewmat, self.K,
            self.size, self.size, background=torch.ones(3), backend=backend, threads=threads,
        )  # fmt: skip

    def with_gradients(self) -> Scene:
        """The scene with every Gaussian tensor wanting its gradient."""
        names = ("means", "quats", "scales", "opacities", "colors")
        return replace(self, **{name: getattr(self, name).detach().clone().requires_grad_() for name in names})


def standard_scene(gaussians: int, size: int, seed: int = 0) -> Scene:
    """Gaussians on an ellipsoid shell that fills about 60 % of a square image.

    They are anisotropic, 4 to 8 px across at two sigma, with opacities from 0.3 to 0.95.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(gaussians, 3, generator=generator), dim=-1)
    distance = 1.2
    focal = 3.85 * size * distance  # the shell's half-width of 0.1 becomes 0.385 of the image
    pixel = distance / focal
    return Scene(
        means=directions * torch.tensor([0.10, 0.127, 0.11]),
        quats=torch.randn(gaussians, 4, generator=generator),
        scales=(1 + torch.rand(gaussians, 3, generator=generator)) * pixel,
        opacities=0.3 + 0.65 * torch.rand(gaussians, generator=generator),
        colors=torch.rand(gaussians, 3, generator=generator),
        viewmat=torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, distance], [0, 0, 0, 1]], dtype=torch.float32),
        K=torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], dtype=torch.float32),
        size=size,
    )


@njit(nogil=True)
def _count_pairs(
    rows: np.ndarray, entry_rows: np.ndarray, entry_masks: np.ndarray, offsets: np.ndarray, tiles_x: int
) -> tuple[int, int]:
    evaluated, contributing = 0, 0
    for tile in range(offsets.size - 1):
        trans = np.ones((16, 16))
        for e in range(offsets[tile], offsets[tile + 1]):
            u, v, root_xx, root_xy, root_yy, log2_opacity = rows[entry_rows[e] : entry_rows[e] + 6]
            for block in range(16):
                if (entry_masks[e] >> block) & 1 == 0:
                    continue
                evaluated += 16
                for lane in range(16):
                    dx = u - ((tile % tiles_x) * 16 + 4 * (block % 4) + lane % 4 + 0.5)
                    dy = v - ((tile // tiles_x) * 16 + 4 * (block // 4) + lane // 4 + 0.5)
                    p, q = root_xx * dx + root_xy * dy, root_yy * dy
                    alpha = min(0.999, 2.0 ** (log2_opacity - p * p - q * q))
                    after = trans[block, lane] * (1 - alpha)
                    if alpha < 1 / 255 or trans[block, lane] < 0:
                        continue
                    if after <= 1e-4:
                        trans[block, lane] = -1.0  # finished
                        continue
                    trans[block, lane] = after
                    contributing += 1
    return evaluated, contributing


def count_pairs(scene: Scene) -> dict[str, int]:
    """How many pixel-Gaussian pairs the CPU backend evaluates, and how many of them reach the image."""
    context: Any = scene.with_gradients().render("cpu").image.grad_fn
    rows, _, entry_rows, _, entry_masks = (values.numpy() for values in context.entries)
    tiles_x = math.ceil(scene.size / 16)
    evaluated, contributing = _count_pairs(rows, entry_rows, entry_masks, context.scene.offsets.numpy(), tiles_x)
    return {"evaluated": evaluated, "contributing": contributing}


def _share_cores(backend: Backend, threads: int) -> None:
    """Give torch all threads for the reference, and one where kernels have their own.

    Torch's threads stay awake after their work and would contend with the kernels'; the train stage does the same.
    """
    torch.set_num_threads(1 if backend == "cpu" else threads)


def _forward_and_backward(scene: Scene, backend: Backend, threads: int) -> tuple[float, float]:
    """Milliseconds of one forward and one backward pass with gradients for every Gaussian tensor."""
    _share_cores(backend, threads)
    scene = scene.with_gradients()
    v_image = torch.linspace(-1, 1, 3 * scene.size**2).view(scene.size, scene.size, 3)
    start = time.perf_counter()
    render = scene.render(backend, threads)
    middle = time.perf_counter()
    torch.autograd.backward([render.image], [v_image])
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def _loss(scene: Scene, backend: Literal["cpu", "reference"], threads: int) -> tuple[float, float]:
    """Milliseconds of the photometric loss and its gradient."""
    _share_cores(backend, threads)
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(scene.size, scene.size, 3, generator=generator)
    image = torch.rand(scene.size, scene.size, 3, generator=generator).requires_grad_()
    start = time.perf_counter()
    loss = photometric_loss(image, target, backend=backend, threads=threads)
    middle = time.perf_counter()
    loss.backward()
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def _render(scene: Scene, threads: int) -> float:
    """Milliseconds of one 8-bit render without gradients."""
    start = time.perf_counter()
    render_uint8(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.colors, scene.viewmat, scene.K,
        scene.size, scene.size, background=torch.ones(3), threads=threads,
    )  # fmt: skip
    return 1e3 * (time.perf_counter() - start)


def bench(
    scenes: tuple[tuple[str, int, int], ...] = SCENES,
    renders: tuple[tuple[str, int, int], ...] = RENDERS,
    step: tuple[int, int] | None = STEP,
    *,
    rounds: int = 7,
    repeats: int = 9,
    threads: int | None = None,
    peak_gflops: float = PEAK_GFLOPS,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the rasteriser on this machine; times are noisy, the ratios of one run less so.

    Args:
        scenes: name, number of Gaussians and image side of each scene that runs against the reference.
        renders: the same of each scene that is rendered without gradients.
        step: number of Gaussians and image side of the training step; none leaves it out.
        rounds: interleaved rounds; each runs the reference once and then the fast code `repeats` times, as a training
            loop does; a few runs before them, which wake its threads and find cold caches, do not count.
        threads: for the kernels, and for torch while the reference runs; None takes torch's setting.
        peak_gflops: float32 arithmetic per second that `limit_ms` supposes, in 1e9.
        report: receives a line of text as each measurement starts.

    Returns:
        Plain data, times in milliseconds as medians:

        - `threads`, `peak_gflops`;
        - `scenes`, each with `name, gaussians, size, reference_ms` (forward plus backward), `cpu_ms {forward,
          backward}, ratio` (median over rounds of the round's own), `limit_ms {forward, backward}` (the arithmetic of
          the contributing pairs at the peak), `pairs {evaluated, contributing}` and the photometric `loss
          {reference_ms, cpu_ms {..}, ratio}`;
        - `renders`, each with `name, gaussians, size, ms, fps`: to 8-bit images, without gradients;
        - `train_step` with `avatar, gaussians, size, step_ms`: an optimisation step of the `rigged` avatar on a
          synthetic clip, from the choice of the frame to the changed weights; None if left out.
    """
    warm_up(report)
    before = torch.get_num_threads()
    threads = before if threads is None else threads
    try:
        return {
            "threads": threads,
            "peak_gflops": peak_gflops,
            "scenes": [_bench_scene(*scene, rounds, repeats, threads, peak_gflops, report) for scene in scenes],
            "renders": [_bench_render(*scene, rounds * repeats, threads, report) for scene in renders],
            "train_step": None if step is None else _bench_step(*step, threads, report),
        }
    finally:
        torch.set_num_threads(before)


def _bench_scene(
    name: str,
    gaussians: int,
    size: int,
    rounds: int,
    repeats: int,
    threads: int,
    peak_gflops: float,
    report: Callable[[str], None],
) -> dict[str, Any]:
    report(f"{name}: {gaussians:,} Gaussians, {size} x {size}, {rounds} rounds")
    scene = standard_scene(gaussians, size)
    contestants: dict[str, tuple[Callable[[], tuple[float, float]], int]] = {
        "raster_reference": (lambda: _forward_and_backward(scene, "reference", threads), 1),
        "raster": (lambda: _forward_and_backward(scene, "cpu", threads), repeats),
        "loss_reference": (lambda: _loss(scene, "reference", threads), 1),
        "loss": (lambda: _loss(scene, "cpu", threads), repeats),
    }
    for run, _ in contestants.values():
        run()  # compiles, and warms caches
    times: dict[str, list[np.ndarray]] = {key: [] for key in contestants}
    for _ in range(rounds):
        for key, (run, count) in contestants.items():
            runs = [run() for _ in range(count + (WARM_RUNS if count > 1 else 0))]
            times[key].append(np.median(runs[-count:], axis=0))
    medians = {key: np.median(values, axis=0) for key, values in times.items()}

    def ratio(slow: str, fast: str) -> float:
        return float(np.median([a.sum() / b.sum() for a, b in zip(times[slow], times[fast], strict=True)]))

    def split(key: str) -> dict[str, float]:
        return {"forward": float(medians[key][0]), "backward": float(medians[key][1])}

    pairs = count_pairs(scene)
    return {
        "name": name,
        "gaussians": gaussians,
        "size": size,
        "reference_ms": float(medians["raster_reference"].sum()),
        "cpu_ms": split("raster"),
        "ratio": ratio("raster_reference", "raster"),
        "limit_ms": {
            part: 1e3 * pairs["contributing"] * flop / (1e9 * peak_gflops) for part, flop in FLOP_PER_PAIR.items()
        },
        "pairs": pairs,
        "loss": {
            "reference_ms": float(medians["loss_reference"].sum()),
            "cpu_ms": split("loss"),
            "ratio": ratio("loss_reference", "loss"),
        },
    }


def _bench_render(
    name: str, gaussians: int, size: int, count: int, threads: int, report: Callable[[str], None]
) -> dict[str, Any]:
    report(f"{name}: {count} renders")
    scene = standard_scene(gaussians, size)
    _share_cores("cpu", threads)
    _render(scene, threads)
    milliseconds = float(np.median([_render(scene, threads) for _ in range(count)]))
    return {"name": name, "gaussians": gaussians, "size": size, "ms": milliseconds, "fps": 1e3 / milliseconds}


def _bench_step(gaussians: int, size: int, threads: int, report: Callable[[str], None]) -> dict[str, Any]:
    from pipeline.config import TrainConfig
    from pipeline.training import Trainer

    report(f"rigged avatar: {TIMED_STEPS} training steps, {gaussians:,} Gaussians, {size} x {size}")
    config = TrainConfig(avatar="rigged", gaussians=gaussians, resolution=size, coarse_share=0)  # no step is smaller
    _share_cores("cpu", threads)
    trainer = Trainer(_training_data(size), config, threads=threads)
    times = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        trainer.step()
        times.append(1e3 * (time.perf_counter() - start))
    step_ms = float(np.median(times[WARM_STEPS:]))
    return {"avatar": "rigged", "gaussians": gaussians, "size": size, "step_ms": step_ms}


def _training_data(size: int) -> TrainingData:
    """A few frames of a synthetic subject, whose torso keeps still relative to the head."""
    from pipeline.avatars import Condition, TrainingData
    from pipeline.synthetic import make_clip

    clip = make_clip(STEP_FRAMES, size, size, seed=0, background="plain", supersample=1)
    over_white = clip.images + (1 - clip.alpha[..., None]) * 255 * (1 - clip.background)
    heads, bend = clip.Ts_cam_head, np.zeros((STEP_FRAMES, 0))
    arrays = (clip.expression, heads, heads, 0 * clip.neck, clip.eyes, bend, heads)
    return TrainingData(
        images=over_white.round().clip(0, 255).astype(np.uint8),
        alphas=(clip.alpha * 255).round().astype(np.uint8),
        conditions=Condition(*(torch.as_tensor(array, dtype=torch.float32) for array in arrays)),
        Ks=clip.K[None],
        head=clip.head,
        identity=clip.identity,
    )


def table(result: dict[str, Any]) -> str:
    """The result of `bench` as aligned text."""
    lines = [
        f"Medians in ms, {result['threads']} threads. Times are noisy; ratios are to torch in the same run.",
        f"The limit is the arithmetic of the contributing pairs at {result['peak_gflops']:g} GFLOP/s.",
        "",
        f"{'scene':>8} {'reference':>10} {'forward':>8} {'limit':>6} {'backward':>9} {'limit':>6} {'ratio':>6}"
        f" {'evaluated/contributing pairs':>29} {'loss':>13} {'ratio':>6}",
    ]
    for scene in result["scenes"]:
        cpu, limit, pairs, loss = scene["cpu_ms"], scene["limit_ms"], scene["pairs"], scene["loss"]
        evaluated, contributing = pairs["evaluated"] / 1e6, pairs["contributing"] / 1e6
        share = f"{evaluated:.2f}M / {contributing:.2f}M = {evaluated / max(contributing, 1e-9):.2f}"
        loss_ms = f"{loss['cpu_ms']['forward']:.2f} + {loss['cpu_ms']['backward']:.2f}"
        lines.append(
            f"{scene['name']:>8} {scene['reference_ms']:>10.1f} {cpu['forward']:>8.2f} {limit['forward']:>6.2f}"
            f" {cpu['backward']:>9.2f} {limit['backward']:>6.2f} {scene['ratio']:>6.0f} {share:>29}"
            f" {loss_ms:>13} {loss['ratio']:>6.0f}"
        )
    lines.append("")
    for render in result["renders"]:
        lines.append(f"{render['name']:>8} rendering alone, 8-bit: {render['ms']:.2f}, {render['fps']:.0f} a second")
    if result["train_step"]:
        step = result["train_step"]
        lines.append(
            f"A training step of the {step['avatar']} avatar, {step['gaussians']:,} Gaussians,"
            f" {step['size']} x {step['size']}: {step['step_ms']:.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or JSON with `--json`."""
    as_json = "--json" in sys.argv[1:]
    result = bench(report=lambda line: print(line, file=sys.stderr))  # noqa: T201
    print(json.dumps(result) if as_json else table(result))  # noqa: T201


if __name__ == "__main__":
    main()
