"""Benchmark of the CPU rasteriser against its torch reference, on the three standard scenes.

Runs of all contestants are interleaved and medians taken, so that a busy machine disturbs them alike: the ratios hold
where the milliseconds do not. `python -m pipeline.bench_raster [--json]`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pipeline.losses import photometric_loss
from pipeline.rasterize import Backend, Render, rasterize, render_uint8

SCENES = (("10k-256", 10_000, 256), ("20k-256", 20_000, 256), ("50k-512", 50_000, 512))
"""Name, Gaussians, image side in pixels."""


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
            u, v, a, b, c, log2_opacity = rows[entry_rows[e] : entry_rows[e] + 6]
            for block in range(16):
                if (entry_masks[e] >> block) & 1 == 0:
                    continue
                evaluated += 16
                for lane in range(16):
                    dx = u - ((tile % tiles_x) * 16 + 4 * (block % 4) + lane % 4 + 0.5)
                    dy = v - ((tile // tiles_x) * 16 + 4 * (block // 4) + lane // 4 + 0.5)
                    alpha = min(0.999, 2.0 ** (log2_opacity - (a * dx * dx + b * dx * dy + c * dy * dy)))
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
    _, rows, entry_rows, _, entry_masks = context.entries
    tiles_x = math.ceil(scene.size / 16)
    evaluated, contributing = _count_pairs(rows, entry_rows, entry_masks, context.bins.offsets, tiles_x)
    return {"evaluated": evaluated, "contributing": contributing}


def _forward_and_backward(scene: Scene, backend: Backend, threads: int | None) -> tuple[float, float]:
    """Milliseconds of one forward and one backward pass with gradients for every Gaussian tensor."""
    scene = scene.with_gradients()
    v_image = torch.linspace(-1, 1, 3 * scene.size**2).view(scene.size, scene.size, 3)
    start = time.perf_counter()
    render = scene.render(backend, threads)
    middle = time.perf_counter()
    torch.autograd.backward([render.image], [v_image])
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def _loss(scene: Scene, backend: Literal["cpu", "reference"], threads: int | None) -> tuple[float, float]:
    """Milliseconds of the photometric loss and its gradient."""
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(scene.size, scene.size, 3, generator=generator)
    image = torch.rand(scene.size, scene.size, 3, generator=generator).requires_grad_()
    start = time.perf_counter()
    loss = photometric_loss(image, target, backend=backend, threads=threads)
    middle = time.perf_counter()
    loss.backward()
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def _render(scene: Scene, threads: int | None) -> tuple[float, float]:
    """Milliseconds of one 8-bit render."""
    start = time.perf_counter()
    render_uint8(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.colors, scene.viewmat, scene.K,
        scene.size, scene.size, background=torch.ones(3), threads=threads,
    )  # fmt: skip
    return 1e3 * (time.perf_counter() - start), 0.0


def bench(
    scenes: tuple[tuple[str, int, int], ...] = SCENES,
    *,
    rounds: int = 7,
    repeats: int = 5,
    threads: int | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time rasteriser and loss against their references.

    Args:
        scenes: name, number of Gaussians and image side of each scene.
        rounds: interleaved rounds; each runs the reference once and the fast code `repeats` times.
        threads: for everything, torch included; None leaves torch's setting.
        report: receives a line of text as each scene starts.

    Returns:
        Plain data: `threads` and `scenes`, each with `name, gaussians, size, reference_ms` (forward plus backward),
        `cpu_ms {forward, backward}, ratio, pairs {evaluated, contributing}, loss {reference_ms, cpu_ms {..}, ratio}`
        and `render_fps`. Milliseconds are medians; `ratio` is the median over rounds of the round's own ratio.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return {
            "threads": torch.get_num_threads(),
            "scenes": [_bench_scene(*scene, rounds, repeats, threads, report) for scene in scenes],
        }
    finally:
        torch.set_num_threads(before)


def _bench_scene(
    name: str,
    gaussians: int,
    size: int,
    rounds: int,
    repeats: int,
    threads: int | None,
    report: Callable[[str], None] | None,
) -> dict[str, Any]:
    if report is not None:
        report(f"{name}: {gaussians:,} Gaussians, {size} x {size}, {rounds} rounds")
    scene = standard_scene(gaussians, size)
    contestants: dict[str, tuple[Callable[[], tuple[float, float]], int]] = {
        "raster_reference": (lambda: _forward_and_backward(scene, "reference", threads), 1),
        "raster": (lambda: _forward_and_backward(scene, "cpu", threads), repeats),
        "loss_reference": (lambda: _loss(scene, "reference", threads), 1),
        "loss": (lambda: _loss(scene, "cpu", threads), repeats),
        "render": (lambda: _render(scene, threads), repeats),
    }
    for run, _ in contestants.values():
        run()  # compiles, and warms caches
    times: dict[str, list[np.ndarray]] = {key: [] for key in contestants}
    for _ in range(rounds):
        for key, (run, count) in contestants.items():
            times[key].append(np.median([run() for _ in range(count)], axis=0))
    medians = {key: np.median(values, axis=0) for key, values in times.items()}

    def ratio(slow: str, fast: str) -> float:
        return float(np.median([a.sum() / b.sum() for a, b in zip(times[slow], times[fast], strict=True)]))

    def split(key: str) -> dict[str, float]:
        return {"forward": float(medians[key][0]), "backward": float(medians[key][1])}

    return {
        "name": name,
        "gaussians": gaussians,
        "size": size,
        "reference_ms": float(medians["raster_reference"].sum()),
        "cpu_ms": split("raster"),
        "ratio": ratio("raster_reference", "raster"),
        "pairs": count_pairs(scene),
        "loss": {
            "reference_ms": float(medians["loss_reference"].sum()),
            "cpu_ms": split("loss"),
            "ratio": ratio("loss_reference", "loss"),
        },
        "render_fps": float(1e3 / medians["render"][0]),
    }


def table(result: dict[str, Any]) -> str:
    """The result of `bench` as aligned text."""
    lines = [
        f"{'scene':>8} {'reference':>10} {'forward':>8} {'backward':>9} {'ratio':>6} {'evaluated/contributing':>23}"
        f" {'loss':>13} {'ratio':>6} {'render':>10}   (ms, {result['threads']} threads)"
    ]
    for scene in result["scenes"]:
        pairs, loss = scene["pairs"], scene["loss"]
        share = f"{pairs['evaluated'] / 1e6:.2f}M / {pairs['contributing'] / 1e6:.2f}M"
        times = f"{loss['cpu_ms']['forward']:.2f} + {loss['cpu_ms']['backward']:.2f}"
        lines.append(
            f"{scene['name']:>8} {scene['reference_ms']:>10.1f} {scene['cpu_ms']['forward']:>8.2f}"
            f" {scene['cpu_ms']['backward']:>9.2f} {scene['ratio']:>6.0f} {share:>23} {times:>13} {loss['ratio']:>6.0f}"
            f" {scene['render_fps']:>6.0f} fps"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or JSON with `--json`."""
    as_json = "--json" in sys.argv[1:]
    result = bench(report=lambda line: print(line, file=sys.stderr))  # noqa: T201
    print(json.dumps(result) if as_json else table(result))  # noqa: T201


if __name__ == "__main__":
    main()
