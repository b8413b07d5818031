"""The rasteriser's benchmark: the form of what it returns, and its counts; no test looks at the times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import bench_raster
from pipeline.rasterize import reference

ROOT = Path(__file__).resolve().parents[2]
TINY = (("tiny", 60, 40),)


def test_result_has_its_form() -> None:
    lines: list[str] = []
    before = torch.get_num_threads()
    result = bench_raster.bench(
        TINY, TINY, (60, 32), rounds=1, repeats=1, threads=1, peak_gflops=100.0, report=lines.append
    )
    assert torch.get_num_threads() == before
    assert json.loads(json.dumps(result)) == result
    assert (result["threads"], result["peak_gflops"]) == (1, 100.0)
    (scene,) = result["scenes"]
    assert (scene["name"], scene["gaussians"], scene["size"]) == TINY[0]
    for part in ("forward", "backward"):
        assert scene["cpu_ms"][part] > 0 and scene["loss"]["cpu_ms"][part] > 0
    assert scene["reference_ms"] > 0 and scene["ratio"] > 0 and scene["loss"]["ratio"] > 0
    contributing = scene["pairs"]["contributing"]
    assert 0 < contributing <= scene["pairs"]["evaluated"]
    # 33 and 60 FLOP a pair at 100 GFLOP/s.
    assert scene["limit_ms"] == pytest.approx({"forward": 33e-8 * contributing, "backward": 60e-8 * contributing})
    (render,) = result["renders"]
    assert render["fps"] == pytest.approx(1e3 / render["ms"])
    assert result["train_step"].items() >= {"avatar": "rigged", "gaussians": 60, "size": 32}.items()
    assert result["train_step"]["step_ms"] > 0
    assert [line.partition(":")[0] for line in lines[-3:]] == ["tiny", "tiny", "rigged avatar"]
    text = bench_raster.table(result)
    assert "100 GFLOP/s" in text and "tiny" in text and "training step" in text


def test_contributing_pairs_are_those_of_the_reference() -> None:
    scene = bench_raster.standard_scene(400, 40)
    means2d, conics, depths, radii = reference.project(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.viewmat, scene.K, scene.size, scene.size
    )
    order = torch.argsort(depths)
    order = order[radii[order] > 0]
    v, u = torch.meshgrid(torch.arange(scene.size) + 0.5, torch.arange(scene.size) + 0.5, indexing="ij")
    dx, dy = u - means2d[order, 0, None, None], v - means2d[order, 1, None, None]
    a, b, c = conics[order, :, None, None].unbind(1)
    alpha = scene.opacities[order, None, None] * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
    alpha = torch.where(alpha >= reference.ALPHA_MIN, alpha.clamp_max(reference.ALPHA_MAX), 0.0)
    kept = (alpha > 0) & (torch.cumprod(1 - alpha, dim=0) > reference.TRANSMITTANCE_MIN)
    counted = bench_raster.count_pairs(scene)["contributing"]
    assert counted == pytest.approx(int(kept.sum()), rel=1e-3)


@pytest.mark.parametrize("option", ["--peak-gflops", "--threads"])
def test_the_command_refuses_nonsense(option: str) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "bench", "raster", option, "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.startswith(f"error: {option} is 0")) == (2, True), done.stderr
