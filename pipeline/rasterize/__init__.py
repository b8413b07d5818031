"""One differentiable rasteriser of 3D Gaussians, three backends with the same mathematics.

Conventions are gsplat's "classic" mode to the letter: 2D blur 0.3 px^2, near plane 0.01, far plane 1e10, alpha at most
0.999 and at least 1/255, a pixel finished before its transmittance falls to 1e-4, pixel centres at +0.5, quaternions
wxyz. Camera axes are OpenCV's.

A backend is a module of this package with a function `rasterize` like that of `pipeline.rasterize.reference`: one
camera, arguments of the right shapes, `Outputs` for an answer. It is found by its module's name. docs/rasterizer.md has
the rest.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np

Backend = Literal["auto", "cpu", "gsplat", "reference"] | str
"""The backends that are here; any other module of this package that defines `rasterize` is one too."""

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""What a backend returns: the fields of `Render` for one camera, in their order.

means2d has to be the very tensor that the image was made from, so that its gradient can be retained; it may be [1,N,2].
"""

ENVIRONMENT = "HEADCAST_RASTERIZER"
"""The environment variable that says which backend "auto" is."""

MAX_SH_DEGREE = 3


@dataclass(frozen=True)
class Render:
    """A rendered view, or B views, with B leading in every shape.

    Attributes:
        image: [H,W,C], composited over the background if one was given, else premultiplied by alpha.
        alpha: [H,W], 1 minus the transmittance left behind the last Gaussian.
        means2d: [N,2] projected centres in pixels, in the autograd graph. After `render.means2d.retain_grad()` a
            backward pass leaves their gradient in `render.means2d.grad`, as density control wants it, for one view and
            for B. Take it after each backward pass: a second one may replace it or add to it.
        radii: [N] int32, half-size in pixels of the Gaussian's box in its longer direction, 0 where culled.
        depths: [N] along the camera's z axis, in world units.
        depth: [H,W] expected depth along the camera's z axis, in world units: the Gaussians' depths weighted as their
            colours are, divided by alpha; 0 where alpha is 0. None if it was not asked for.
    """

    image: Tensor
    alpha: Tensor
    means2d: Tensor
    radii: Tensor
    depths: Tensor
    depth: Tensor | None = None


def rasterize(
    means: Tensor,  # [N,3]
    quats: Tensor,  # [N,4]
    scales: Tensor,  # [N,3]
    opacities: Tensor,  # [N]
    colors: Tensor,  # [N,C] or [N,(d+1)^2,3]
    viewmat: Tensor,  # [4,4] or [B,4,4]
    K: Tensor,  # [3,3] or [B,3,3]
    width: int,
    height: int,
    *,
    background: Tensor | None = None,  # [C]
    sh_degree: int | None = None,
    depth: bool = False,
    backend: Backend = "auto",
    threads: int | None = None,
) -> Render:
    """Render 3D Gaussians into one view or B views, differentiably.

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
        depth: also render the expected depth (gsplat's render mode "RGB+ED").
        backend: the name of a backend. "auto" is what the environment variable HEADCAST_RASTERIZER says, else gsplat on
            CUDA and cpu elsewhere. "cpu" and "gsplat" are float32 only, "reference" takes any dtype.
        threads: for the cpu backend; None takes torch.get_num_threads().

    Returns:
        The render; of B cameras, they are rendered one after another, each with all threads. Gradients reach means,
        quats, scales, opacities, colors, background and viewmat, from every floating field; those of the Gaussians and
        the background are sums over cameras. Gradients of the cpu backend do not depend on the number of threads.

    Raises:
        ValueError: a shape, size, degree, name or value (NaN, infinity) that makes no sense; the message has it.
        TypeError: a dtype that the backend does not take, or an argument of the wrong type.
        UserError: HEADCAST_RASTERIZER names no backend.
    """
    _check(means, quats, scales, opacities, colors, viewmat, K, width, height, background, sh_degree, depth, threads)
    run = _chosen(backend, means.is_cuda)
    batched = viewmat.dim() == 3
    if batched and not viewmat.is_cuda:
        check_finite(viewmat=viewmat, K=K)  # a backend would name the place in the camera, but not the camera
    views = [
        run(
            means, quats, scales, opacities, colors, T_cam_world.to(means), intrinsics.to(means), width, height,
            background=background, sh_degree=sh_degree, depth=depth, threads=threads,
        )
        for T_cam_world, intrinsics in (zip(viewmat, K, strict=True) if batched else [(viewmat, K)])
    ]  # fmt: skip
    image, alpha, means2d, radii, depths, expected_depth = (
        [field for field in fields if field is not None] for fields in zip(*views, strict=True)
    )
    join = torch.stack if batched else _only
    return Render(
        join(image),
        join(alpha),
        _join_centres(means2d, (*viewmat.shape[:-2], len(means), 2)),
        join(radii),
        join(depths),
        join(expected_depth) if depth else None,
    )


def _only(tensors: list[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _join_centres(centres: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The backend's projected centres of each view as one tensor of `shape`, which can retain its gradient.

    The images were made from `centres`: autograd alone would retain nothing for a tensor made of them.
    """
    if centres[0].shape == shape:
        return centres[0]
    joined = torch.stack(centres).view(shape)
    views, living = len(centres), weakref.ref(joined)  # a hook that held the tensors would keep them alive

    def pass_on(index: int, gradient: Tensor) -> None:
        joined = living()
        if joined is None or not joined.retains_grad:
            return
        if joined.grad is None:
            joined.grad = torch.zeros_like(joined)
        joined.grad.view(views, *gradient.shape)[index] = gradient

    for index, tensor in enumerate(centres):
        if tensor.requires_grad:
            tensor.register_hook(functools.partial(pass_on, index))
    return joined


def backends() -> list[str]:
    """The names of all backends."""
    return [module.name for module in pkgutil.iter_modules(__path__) if _backend(module.name)]


@functools.cache
def _backend(name: str) -> Callable[..., Outputs] | None:
    """The function `rasterize` of a module of this package; None if there is no such module or function."""
    if name not in {module.name for module in pkgutil.iter_modules(__path__)}:
        return None
    return getattr(importlib.import_module(f"{__name__}.{name}"), "rasterize", None)


def _chosen(name: Backend, cuda: bool) -> Callable[..., Outputs]:
    """The backend of a name; "auto" is what the environment says, or what suits the device."""
    if name != "auto":
        run = _backend(name)
        if run is None:
            raise ValueError(f"backend is {name!r}; expected 'auto' or one of {backends()}")
        return run
    name = os.environ.get(ENVIRONMENT, "") or "auto"
    run = _backend(("gsplat" if cuda else "cpu") if name == "auto" else name)
    if run is None:
        raise UserError(
            f"The environment variable {ENVIRONMENT} is '{name}', which is no rasteriser.",
            f"unset it, or set it to one of: {', '.join(backends())}",
        )
    return run


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
    """Render without gradients to 8-bit RGB [H,W,3], of B cameras [B,H,W,3].

    Arguments are those of `rasterize`, with three colour channels.
    """
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
    depth: bool,
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
    if channels == 0:
        raise ValueError(f"colors has shape {list(colors.shape)}; expected at least one channel")
    if background is not None:
        shapes["background"] = (channels,)
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            wanted = ", ".join(str(size) if size >= 0 else "NC"[i] for i, size in enumerate(shape))
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}; expected [{wanted}]")
    cameras = viewmat.shape[:1] if viewmat.dim() == 3 else ()
    if viewmat.shape != (*cameras, 4, 4) or K.shape != (*cameras, 3, 3) or 0 in cameras:
        raise ValueError(
            f"viewmat has shape {list(viewmat.shape)} and K {list(K.shape)}; expected [4, 4] and [3, 3] for one camera,"
            " [B, 4, 4] and [B, 3, 3] for B of them, at least one"
        )
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
    if not isinstance(depth, bool):
        raise TypeError(f"depth is {depth!r}; expected True or False")


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
