"""CUDA backend: gsplat's own kernels, float32."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.rasterize import Outputs, reference


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    *,
    background: Tensor | None,
    sh_degree: int | None,
    depth: bool,
    threads: int | None,
) -> Outputs:
    """`pipeline.rasterize.rasterize` for one camera.

    `threads` has no meaning on a GPU. Values are not checked for NaN: that would wait for the device.

    Raises:
        ValueError: the tensors are not on a CUDA device.
        TypeError: the tensors are not float32.
    """
    check_kind(means)
    if len(means) == 0:  # gsplat's kernels cannot be launched on nothing
        return reference.rasterize(
            means, quats, scales, opacities, colors, viewmat, K, width, height,
            background=background, sh_degree=sh_degree, depth=depth, threads=threads,
        )  # fmt: skip
    from gsplat import rasterization

    images, alphas, meta = rasterization(
        means, quats, scales, opacities, colors, viewmat[None], K[None], width, height,
        near_plane=reference.NEAR_PLANE, far_plane=reference.FAR_PLANE, eps2d=reference.EPS_2D, sh_degree=sh_degree,
        packed=False, backgrounds=None if background is None else background[None],
        render_mode="RGB+ED" if depth else "RGB", rasterize_mode="classic",
    )  # fmt: skip
    image, expected_depth = (images[0, ..., :-1], images[0, ..., -1]) if depth else (images[0], None)
    radii = meta["radii"][0].amax(dim=-1)
    return image, alphas[0, ..., 0], meta["means2d"], radii, meta["depths"][0], expected_depth


def check_kind(means: Tensor) -> None:
    """Raise where gsplat's kernels do not run: off CUDA, or in another dtype than float32."""
    if not means.is_cuda:
        raise ValueError(f"means is on {means.device}; the gsplat backend wants a CUDA device")
    if means.dtype != torch.float32:
        raise TypeError(f"means is {means.dtype}; the gsplat backend wants float32")
