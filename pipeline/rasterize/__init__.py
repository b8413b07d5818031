"""One differentiable rasteriser of 3D Gaussians, three backends with the same mathematics.

Conventions are gsplat's "classic" mode to the letter: 2D blur 0.3 px^2, near plane 0.01, far plane 1e10, alpha at most
0.999 and at least 1/255, a pixel finished before its transmittance falls to 1e-4, pixel centres at +0.5, quaternions
wxyz. Camera axes are OpenCV's.

A backend is a module with one function of the signature of `pipeline.rasterize.reference.rasterize`; adding one is a
file and a line in `BACKENDS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

Backend = Literal["auto", "cpu", "gsplat", "reference"]

BACKENDS = {
    "cpu": "pipeline.rasterize.cpu",
    "gsplat": "pipeline.rasterize.gsplat",
    "reference": "pipeline.rasterize.reference",
}

MAX_SH_DEGREE = 3


@dataclass(frozen=True)
class Render:
    """A rendered view.

    Attributes:
        image: [H,W,C], composited over the background if one was given, else premultiplied by alpha.
        alpha: [H,W], 1 minus the transmittance left behind the last Gaussian.
        means2d: [N,2] projected centres in pixels, in the autograd graph: `render.means2d.retain_grad()` before the
            backward pass makes their gradient available, as density control wants it.
        radii: [N] int32, half-size in pixels of the Gaussian's box in its longer direction, 0 where culled.
        depths: [N] along the camera's z axis.
    """

    image: Tensor
    alpha: Tensor
    means2d: Tensor
    radii: Tensor
    depths: Tensor


def rasterize(
    means: Tensor,  # [N,3]
    quats: Tensor,  # [N,4]
    scales: Tensor,  # [N,3]
    opacities: Tensor,  # [N]
    colors: Tensor,  # [N,C] or [N,(d+1)^2,3]
    viewmat: Tensor,  # [4,4]
    K: Tensor,  # [3,3]
    width: int,
    height: int,
    *,
    background: Tensor | None = None,  # [C]
    sh_degree: int | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
) -> Render:
    """Render 3D Gaussians into one view, differentiably.

    Args:
        means: centres in world coordinates.
        quats: orientations, wxyz; normalised here.
        scales: standard deviations along the axes, in world units (linear, not log).
        opacities: in [0, 1]; below 1/255 a Gaussian is invisible.
        colors: any number of channels per Gaussian, or SH coefficients [N,>=(sh_degree+1)^2,3] with `sh_degree`.
        viewmat: `T_cam_world`, any floating dtype.
        K: intrinsics in pixels, any floating dtype; skew is ignored.
        width, height: image size in pixels, any positive integers.
        background: colour behind everything; none leaves the image premultiplied.
        sh_degree: 0 to 3 to evaluate SH towards each Gaussian (colours are max(SH + 0.5, 0)); None for plain colours.
        backend: "auto" takes gsplat on CUDA and cpu elsewhere. "cpu" is float32 only, "reference" takes any dtype.
        threads: for the cpu backend; None takes torch.get_num_threads().

    Returns:
        The render. Gradients reach means, quats, scales, opacities, colors, background and viewmat, from image and
        alpha. Gradients of the cpu backend do not depend on the number of threads.

    Raises:
        ValueError: a shape, size, degree or value (NaN, infinity) that makes no sense.
        TypeError: a dtype that the backend does not take, or an argument that is not a tensor.
    """
    _check(means, quats, scales, opacities, colors, viewmat, K, width, height, background, sh_degree, threads)
    name = ("gsplat" if means.is_cuda else "cpu") if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected 'auto' or one of {sorted(BACKENDS)}")
    run = importlib.import_module(BACKENDS[name]).rasterize
    image, alpha, means2d, radii, depths = run(
        means, quats, scales, opacities, colors, viewmat.to(means), K.to(means), width, height,
        background=background, sh_degree=sh_degree, threads=threads,
    )  # fmt: skip
    return Render(image, alpha, means2d, radii, depths)


def render_uint8(
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
    background: Tensor | None = None,
    sh_degree: int | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
) -> np.ndarray:
    """Render without gradients to 8-bit RGB [H,W,3]; arguments as for `rasterize`, with three colour channels."""
    with torch.no_grad():
        image = rasterize(
            means, quats, scales, opacities, colors, viewmat, K, width, height,
            background=background, sh_degree=sh_degree, backend=backend, threads=threads,
        ).image  # fmt: skip
    if image.shape[-1] != 3:
        raise ValueError(f"an 8-bit image wants 3 colour channels, colors has shape {list(colors.shape)}")
    return image.mul(255.0).add_(0.5).clamp_(0.0, 255.0).to(torch.uint8).cpu().numpy()


def _check(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    background: Tensor | None,
    sh_degree: int | None,
    threads: int | None,
) -> None:
    """Raise on arguments of the wrong type, shape, dtype or device. Values are the backend's to check."""
    tensors = {"means": means, "quats": quats, "scales": scales, "opacities": opacities, "colors": colors}
    if background is not None:
        tensors["background"] = background
    for name, value in {**tensors, "viewmat": viewmat, "K": K}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a torch tensor")
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}; expected a floating dtype")
    n = means.shape[0] if means.dim() else -1
    shapes: dict[str, tuple[int, ...]] = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,)}
    if sh_degree is None:
        shapes["colors"] = (n, colors.shape[-1] if colors.dim() == 2 else -1)
        channels = shapes["colors"][1]
    else:
        if not isinstance(sh_degree, int) or not 0 <= sh_degree <= MAX_SH_DEGREE:
            raise ValueError(f"sh_degree is {sh_degree!r}; expected None or 0 to {MAX_SH_DEGREE}")
        needed = (sh_degree + 1) ** 2
        shapes["colors"] = (n, max(needed, colors.shape[1] if colors.dim() == 3 else 0), 3)
        channels = 3
    if background is not None:
        shapes["background"] = (channels,)
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            wanted = ", ".join(str(size) if size >= 0 else "NC"[i] for i, size in enumerate(shape))
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}; expected [{wanted}]")
    for name, value, size in (("viewmat", viewmat, 4), ("K", K, 3)):
        if tuple(value.shape) != (size, size):
            raise ValueError(f"{name} has shape {list(value.shape)}; expected [{size}, {size}]")
    for name, value in tensors.items():
        if value.dtype != means.dtype:
            raise TypeError(f"{name} is {value.dtype} but means is {means.dtype}")
        if value.device != means.device:
            raise ValueError(f"{name} is on {value.device} but means is on {means.device}")
    for name, number in (("width", width), ("height", height), ("threads", 1 if threads is None else threads)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} is {number!r}; expected an integer")
        if number < 1:
            raise ValueError(f"{name} is {number}; expected at least 1")


def check_camera(viewmat: Tensor, K: Tensor) -> None:
    """Raise a ValueError on a camera that is not finite or whose focal lengths are not positive."""
    check_finite(viewmat=viewmat, K=K)
    if not (K[0, 0] > 0 and K[1, 1] > 0):
        raise ValueError(f"K has focal lengths {K[0, 0].item()} and {K[1, 1].item()}; expected both above 0")


def check_finite(**tensors: Tensor | None) -> None:
    """Raise a ValueError that names the first tensor with a NaN or an infinity, and where it stands."""
    for name, value in tensors.items():
        if value is None:
            continue
        bad = ~torch.isfinite(value.detach())
        if bad.any():
            index = torch.nonzero(bad)[0].tolist()
            raise ValueError(f"{name}{index} is {value[tuple(index)].item()}; expected finite values")
