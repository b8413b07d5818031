"""CUDA backend: gsplat's own kernels."""

from __future__ import annotations

from torch import Tensor


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
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image, alpha, means2d, radii and depths of the arguments of `pipeline.rasterize.rasterize`.

    `threads` has no meaning on a GPU. Values are not checked for NaN: that would wait for the device.

    Raises:
        ValueError: the tensors are not on a CUDA device.
        TypeError: the tensors are not float32.
    """
    if not means.is_cuda:
        raise ValueError(f"means is on {means.device}; the gsplat backend wants a CUDA device")
    if str(means.dtype) != "torch.float32":
        raise TypeError(f"means is {means.dtype}; the gsplat backend wants float32")
    if len(means) == 0:
        from pipeline.rasterize import reference

        return reference.rasterize(
            means, quats, scales, opacities, colors, viewmat, K, width, height,
            background=background, sh_degree=sh_degree, threads=None,
        )  # fmt: skip
    from gsplat import rasterization

    images, alphas, meta = rasterization(
        means, quats, scales, opacities, colors, viewmat[None], K[None], width, height,
        near_plane=0.01, far_plane=1e10, eps2d=0.3, sh_degree=sh_degree, packed=False, rasterize_mode="classic",
        backgrounds=None if background is None else background[None],
    )  # fmt: skip
    radii = meta["radii"][0].amax(dim=-1)
    return images[0], alphas[0, ..., 0], meta["means2d"][0], radii, meta["depths"][0]
