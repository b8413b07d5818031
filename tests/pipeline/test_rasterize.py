"""The rasteriser: the reference against gsplat's torch code, the CPU backend against the reference, the interface."""

from __future__ import annotations

import math
import multiprocessing
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pipeline.rasterize
from pipeline.errors import UserError
from pipeline.rasterize import Render, rasterize, reference, render_uint8

INPUTS = ("means", "quats", "scales", "opacities", "colors", "viewmat", "background")
OUTPUTS = ("image", "alpha", "depth")


@dataclass(frozen=True)
class Scene:
    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor
    viewmat: Tensor
    K: Tensor
    background: Tensor | None
    width: int
    height: int
    sh_degree: int | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Scene:
        """The scene with every tensor changed."""
        return replace(self, **{n: change(v) for n, v in vars(self).items() if isinstance(v, Tensor)})

    def float(self) -> Scene:
        return self.map(Tensor.float)

    def double(self) -> Scene:
        return self.map(Tensor.double)

    def render(self, backend: str, threads: int | None = 2, depth: bool = True) -> Render:
        return rasterize(
            self.means, self.quats, self.scales, self.opacities, self.colors, self.viewmat, self.K,
            self.width, self.height, background=self.background, sh_degree=self.sh_degree, depth=depth,
            backend=backend, threads=threads,
        )  # fmt: skip


def make_scene(
    n: int = 400,
    width: int = 53,
    height: int = 38,
    channels: int = 3,
    sh_degree: int | None = None,
    seed: int = 0,
    *,
    distance: float = 1.0,
    spread: float = 0.15,
    log_scale: float = -4.5,
    extreme_share: float = 0.0,
) -> Scene:
    """A blob of Gaussians seen at an angle by a camera with fx != fy and an off-centre principal point.

    Values are float32 numbers. No two Gaussians are at the same depth, as such a pair may be drawn in either order.

    Args:
        distance: of the camera from the blob's centre; 0 puts it inside.
        spread: standard deviation of the Gaussians' centres.
        log_scale: typical logarithm of the Gaussians' scales: -18 is far below a pixel, 0 a metre.
        extreme_share: how many Gaussians have an opacity of exactly 1, and how many of exactly 0.
    """
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3] = reference.quat_to_rotmat(torch.tensor([[0.9, 0.2, -0.3, 0.1]], dtype=torch.float64))[0]
    viewmat[:3, 3] = torch.tensor([0.02, -0.03, distance])
    focal = 1.5 * max(width, height)
    K = torch.tensor([[focal, 0, 0.45 * width], [0, 0.8 * focal, 0.6 * height], [0, 0, 1]], dtype=torch.float64)
    points = spread * randn(n, 3)  # in camera axes
    shares = (torch.randperm(n, generator=g) + 0.25 + 0.5 * rand(n)) / max(n, 1)
    points[:, 2] = distance + spread * torch.special.ndtri(shares)
    opacities, scales = 0.05 + 0.9 * rand(n), torch.exp(log_scale + 0.7 * randn(n, 3))
    opacities[torch.rand(n, generator=g) < extreme_share] = 1.0
    opacities[torch.rand(n, generator=g) < extreme_share] = 0.0
    return Scene(
        means=(points - viewmat[:3, 3]) @ viewmat[:3, :3],
        quats=randn(n, 4),
        scales=scales,
        opacities=opacities,
        colors=rand(n, channels) if sh_degree is None else 0.4 * randn(n, (sh_degree + 1) ** 2, 3),
        viewmat=viewmat,
        K=K,
        background=rand(channels),
        width=width,
        height=height,
        sh_degree=sh_degree,
    ).float()


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Random scenes: odd image sizes, cameras before and inside the blob, none to many Gaussians, of extreme sizes."""
    width, height = draw(st.sampled_from([(1, 1), (17, 3), (33, 65), (53, 38)]))
    sh_degree = draw(st.sampled_from([None, 0, 1, 2, 3]))
    log_scale = draw(st.sampled_from([-18.0, -4.5, -3.0, 0.0]))
    return make_scene(
        n=draw(st.sampled_from([0, 1, 2, 40, 300])),
        width=width,
        height=height,
        channels=draw(st.sampled_from([1, 2, 3, 4, 7])) if sh_degree is None else 3,
        sh_degree=sh_degree,
        seed=draw(st.integers(0, 2**31)),
        distance=draw(st.sampled_from([0.0, 0.1, 1.0])),
        spread=draw(st.sampled_from([0.15, 1.0])),
        log_scale=log_scale,
        # An opaque Gaussian of a metre hides all others: nothing but rounding would be left of their gradients.
        extreme_share=draw(st.sampled_from([0.0, 0.15])) if log_scale < 0 else 0.0,
    )


def gradients(
    scene: Scene, backend: str, threads: int | None = 2, where: Tensor | None = None
) -> tuple[Render, dict[str, Tensor]]:
    """A render, and the gradients of a random weighted sum of each output, as "output/input".

    Only pixels `where` [H,W] take part. The weights are positive: those of both signs would cancel over the pixels of a
    large Gaussian.
    """
    leaves = scene.map(lambda t: t.clone().requires_grad_())
    render = leaves.render(backend, threads)
    render.means2d.retain_grad()
    wanted = {name: getattr(leaves, name) for name in INPUTS} | {"means2d": render.means2d}
    g = torch.Generator().manual_seed(7)
    found = {}
    for output in OUTPUTS:
        value = getattr(render, output)
        weight = torch.rand(value.shape, generator=g, dtype=torch.float64).to(value)
        if output == "depth":
            weight *= render.alpha.detach().square()  # depth is a quotient by alpha
        if where is not None:
            weight *= where.view(*where.shape, *[1] * (value.dim() - 2)).to(value)
        for tensor in wanted.values():
            tensor.grad = None
        # Without a Gaussian, alpha and depth depend on nothing: the zero term gives them a graph.
        ((value * weight).sum() + 0 * leaves.viewmat.sum()).backward(retain_graph=True)
        found |= {
            f"{output}/{name}": torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            for name, tensor in wanted.items()
        }
    return Render(*(getattr(render, name).detach() for name in vars(render))), found


def away_from_thresholds(scene: Scene, tolerance: float = 1e-4) -> Tensor:
    """Pixels [H,W] where rounding can flip no Gaussian's 1/255 test, 0.999 cap or 1e-4 stop.

    At the test and the stop the image itself jumps, at the cap its gradient: float32 and float64 may fall on either
    side, and either is right.
    """
    means2d, conics, depths, radii = reference.project(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.viewmat, scene.K, scene.width, scene.height
    )
    order = torch.argsort(depths, stable=True)
    order = order[radii[order] > 0]
    v, u = torch.meshgrid(torch.arange(scene.height) + 0.5, torch.arange(scene.width) + 0.5, indexing="ij")
    dx, dy = u - means2d[order, 0, None, None], v - means2d[order, 1, None, None]
    a, b, c = conics[order, :, None, None].unbind(1)
    raw = scene.opacities[order, None, None] * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
    alpha = torch.where(raw >= reference.ALPHA_MIN, raw.clamp_max(reference.ALPHA_MAX), 0.0)
    after = torch.cumprod(1 - alpha, dim=0)
    near = torch.zeros(scene.height, scene.width, dtype=torch.bool)
    for value, threshold, room in (
        (raw, reference.ALPHA_MIN, tolerance),
        (raw, reference.ALPHA_MAX, tolerance),
        (after, reference.TRANSMITTANCE_MIN, 100 * tolerance),  # the product of many roundings
    ):
        near |= ((value / threshold - 1).abs() < room).any(dim=0)
    return ~near


# The reference, and with it every backend, against gsplat's own torch code.


def test_reference_projects_like_gsplat() -> None:
    from gsplat.cuda import _torch_impl as theirs

    scene = make_scene(n=300).double()
    # Some behind the camera, some far to the side, where the Jacobian is clamped.
    means = torch.cat([scene.means, scene.means * 8])
    quats, scales = scene.quats.repeat(2, 1), scene.scales.repeat(2, 1)
    tensors = [t.clone().requires_grad_() for t in (means, quats, scales, scene.viewmat)]
    # Opacities that let the radius reach its cap of 3.33 sigma, which is all that gsplat's torch code knows.
    opaque = torch.full((len(means),), 2.0, dtype=torch.float64)
    ours = reference.project(*tensors[:3], opaque, tensors[3], scene.K, scene.width, scene.height)
    covars, _ = theirs._quat_scale_to_covar_preci(tensors[1], tensors[2], compute_preci=False)
    radii, means2d, depths, conics, _ = theirs._fully_fused_projection(
        tensors[0], covars, tensors[3][None], scene.K[None], scene.width, scene.height
    )
    expected_radii = radii[0].amax(dim=-1)
    visible = expected_radii > 0
    assert 0 < int(visible.sum()) < len(means)
    assert torch.equal(ours[3], expected_radii)
    # Conics are the inverse 2D covariances.
    for mine, other in zip(ours[:3], (means2d[0], conics[0], depths[0]), strict=True):
        torch.testing.assert_close(mine[visible], other[visible])

    def gradient(*outputs: Tensor) -> tuple[Tensor, ...]:
        loss = sum((o[visible] * torch.linspace(-1, 1, o[visible].numel()).view_as(o[visible])).sum() for o in outputs)
        return torch.autograd.grad(loss, tensors)

    for mine, other in zip(gradient(*ours[:3]), gradient(means2d[0], conics[0], depths[0]), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("degree", range(4))
def test_reference_harmonics_are_gsplats(degree: int) -> None:
    from gsplat.cuda._torch_impl import _spherical_harmonics

    scene = make_scene(n=50, sh_degree=3).double()
    leaves = [t.clone().requires_grad_() for t in (scene.means, scene.colors)]
    center = torch.inverse(scene.viewmat)[:3, 3]
    expected = (_spherical_harmonics(degree, leaves[0] - center, leaves[1]) + 0.5).clamp_min(0)
    found = reference.sh_to_colors(degree, *leaves, scene.viewmat)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    mine, others = (
        torch.autograd.grad((colors * weights).sum(), leaves, materialize_grads=True) for colors in (found, expected)
    )
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other)


def _indices_in_range(
    start: int, stop: int, trans: Tensor, means2d: Tensor, conics: Tensor, opacities: Tensor,
    width: int, height: int, tile: int, offsets: Tensor, flatten_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loop of gsplat's RasterizeToIndices3DGS.cu, which has no torch twin, for one image."""
    assert start == 0 and stop * tile * tile >= len(flatten_ids)
    trans, means2d, conics, opacities = (t.detach() for t in (trans, means2d, conics, opacities))
    gaussians, pixels = [], []
    bounds = [*offsets.flatten().tolist(), len(flatten_ids)]
    for pixel in range(width * height):
        x, y = pixel % width, pixel // width
        t, cell = float(trans[0, y, x]), y // tile * offsets.shape[-1] + x // tile
        for i in flatten_ids[bounds[cell] : bounds[cell + 1]].tolist():
            dx, dy = float(means2d[0, i, 0]) - (x + 0.5), float(means2d[0, i, 1]) - (y + 0.5)
            a, b, c = conics[0, i].tolist()
            sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
            alpha = min(0.999, float(opacities[0, i]) * math.exp(-sigma))
            if sigma < 0 or alpha < 1 / 255:
                continue
            if t * (1 - alpha) <= 1e-4:
                break
            t *= 1 - alpha
            gaussians.append(i)
            pixels.append(pixel)
    return torch.tensor(gaussians), torch.tensor(pixels), torch.zeros(len(pixels), dtype=torch.long)


@pytest.fixture
def gsplat_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gsplat backend run gsplat's own torch code, anywhere and in any dtype.

    gsplat has torch twins of nearly all of its kernels; stand-ins are needed for one loop and two sums of nerfacc.
    """
    import gsplat
    from gsplat import rendering
    from gsplat.cuda import _torch_impl, _wrapper

    from pipeline.rasterize import gsplat as backend

    def weights(alphas: Tensor, *, ray_indices: Tensor, n_rays: int) -> tuple[Tensor, Tensor]:
        trans = torch.ones_like(alphas)
        for ray in torch.unique(ray_indices):
            mine = torch.nonzero(ray_indices == ray)[:, 0]
            trans = trans.index_put((mine[1:],), torch.cumprod(1 - alphas[mine], dim=0)[:-1])
        return alphas * trans, trans

    def sums(weights: Tensor, values: Tensor | None, *, ray_indices: Tensor, n_rays: int) -> Tensor:
        values = weights[:, None] if values is None else weights[:, None] * values
        return torch.zeros(n_rays, values.shape[1], dtype=values.dtype).index_add(0, ray_indices, values)

    nerfacc = types.ModuleType("nerfacc")
    nerfacc.render_weight_from_alpha, nerfacc.accumulate_along_rays = weights, sums  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nerfacc", nerfacc)
    monkeypatch.setattr(_wrapper, "rasterize_to_indices_in_range", _indices_in_range)
    monkeypatch.setattr(rendering, "isect_tiles", lambda *args, **_: _torch_impl._isect_tiles(*args))
    monkeypatch.setattr(rendering, "isect_offset_encode", _torch_impl._isect_offset_encode)
    monkeypatch.setattr(
        rendering,
        "spherical_harmonics",
        lambda degree, dirs, coeffs, masks: _torch_impl._spherical_harmonics(degree, dirs, coeffs),
    )
    monkeypatch.setattr(gsplat, "rasterization", lambda *args, packed, **kw: rendering._rasterization(*args, **kw))
    monkeypatch.setattr(backend, "check_kind", lambda means: None)


@pytest.mark.usefixtures("gsplat_without_cuda")
@pytest.mark.parametrize("options", [{"channels": 4}, {"sh_degree": 3}], ids=str)
def test_reference_renders_like_gsplat(options: dict[str, int]) -> None:
    # Opaque enough for pixels to be finished before the last Gaussian, small enough to leave others empty.
    scene = make_scene(n=250, width=21, height=18, spread=0.1, extreme_share=0.3, **options).double()  # type: ignore[arg-type]
    expected, expected_gradients = gradients(scene, "gsplat")
    found, found_gradients = gradients(scene, "reference")
    assert expected.alpha.max() > 0.999 and (expected.alpha == 0).any()
    for output in OUTPUTS:
        torch.testing.assert_close(getattr(found, output), getattr(expected, output))
    seen = found.radii > 0
    torch.testing.assert_close(found.means2d[seen], expected.means2d[seen])
    torch.testing.assert_close(found.depths[seen], expected.depths[seen])
    for name, gradient in expected_gradients.items():
        mine = found_gradients[name]
        if name.endswith("viewmat"):
            # gsplat takes the camera's place from the inverse of viewmat, we from its transpose: the same for rigid
            # motions, so only the gradient along those is compared.
            mine, gradient = (_along_rigid_motions(g, scene.viewmat) for g in (mine, gradient))
        torch.testing.assert_close(mine, gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()), msg=name)


def _along_rigid_motions(gradient: Tensor, viewmat: Tensor) -> Tensor:
    """The gradient [4,4] with respect to small rotations (3) and shifts (3) of the camera."""
    turn = gradient[:3, :] @ viewmat[:3, :].T
    skew = turn - turn.T
    return torch.cat([torch.stack([skew[2, 1], skew[0, 2], skew[1, 0]]), gradient[:3, 3]])


# The CPU backend against the reference in float64.


@settings(max_examples=80, deadline=None)
@given(scenes())
def test_cpu_matches_reference(scene: Scene) -> None:
    safe = away_from_thresholds(scene.double())
    exact, exact_gradients = gradients(scene.double(), "reference", where=safe)
    found, found_gradients = gradients(scene, "cpu", where=safe)
    for output in OUTPUTS:
        error = (getattr(found, output) - getattr(exact, output)).abs()[safe]
        if output == "depth":  # a quotient by alpha, in metres
            error = error * exact.alpha[safe] / (1 + exact.depth[safe])
        assert not error.numel() or float(error.quantile(0.999)) < 1e-5, output
    assert (found.radii != exact.radii).sum() <= 1  # a ceil may flip
    torch.testing.assert_close(found.depths.double(), exact.depths, rtol=1e-5, atol=1e-5)
    for name in (*INPUTS, "means2d"):
        expected = torch.stack([exact_gradients[f"{output}/{name}"] for output in OUTPUTS])
        error = (torch.stack([found_gradients[f"{output}/{name}"] for output in OUTPUTS]) - expected).abs()
        _assert_small(error.flatten(1), expected.abs().flatten(1), name)


def _assert_small(error: Tensor, expected: Tensor, name: str) -> None:
    """Errors of the gradients [3,M] of one input through the three outputs: 1e-3 of the norm, and of 99 % of elements.

    A gradient may be a small difference of large terms (the depth of a lone Gaussian does not depend on its opacity,
    though both its sum and its weight do), so a hundredth of what the input's largest gradient may err is added.
    """
    if not error.numel():
        return
    norms, peaks = expected.norm(dim=1), expected.amax(dim=1)
    assert (error.norm(dim=1) <= 1e-3 * (norms + 0.01 * norms.max())).all(), name
    if error.shape[1] >= 100:
        room = expected + 0.01 * (peaks[:, None] + peaks.max())
        assert float((error / room.clamp_min(1e-300)).quantile(0.99)) <= 1e-3, name


def test_without_background_colors_are_premultiplied() -> None:
    scene = make_scene().double()
    bare, over = replace(scene, background=None).render("reference"), scene.render("reference")
    torch.testing.assert_close(over.image, bare.image + (1 - bare.alpha)[..., None] * scene.background)
    assert torch.equal(over.depth, bare.depth)  # type: ignore[arg-type]
    fast = replace(scene, background=None).float().render("cpu")
    torch.testing.assert_close(fast.image.double(), bare.image, rtol=0, atol=2e-5)


def test_opaque_gaussians_are_capped_and_stop() -> None:
    scene = make_scene(n=600, log_scale=-3.6)
    scene = replace(scene, opacities=torch.ones(600))
    safe = away_from_thresholds(scene.double())
    exact, exact_gradients = gradients(scene.double(), "reference", where=safe)
    found, found_gradients = gradients(scene, "cpu", where=safe)
    assert exact.alpha.max() > 0.9998 and safe.double().mean() > 0.8
    assert float((found.image - exact.image).abs().amax(dim=-1)[safe].quantile(0.999)) < 1e-5
    for name in ("means", "scales", "opacities", "colors"):
        expected = exact_gradients[f"image/{name}"]
        assert float((found_gradients[f"image/{name}"] - expected).norm() / expected.norm()) < 1e-3, name


def test_depths_of_gaussians_are_differentiable() -> None:
    scene = make_scene()
    means = scene.means.clone().requires_grad_()
    render = replace(scene, means=means).render("cpu")
    (gradient,) = torch.autograd.grad(render.depths.sum(), means)
    seen = render.radii > 0
    torch.testing.assert_close(gradient[seen], scene.viewmat[2, :3].expand(int(seen.sum()), 3))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_depth_of_a_plane_is_its_distance(backend: str) -> None:
    scene = make_scene(n=60, width=40, height=24)
    means = torch.cat(
        [0.4 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), torch.full((60, 1), 2.5)], 1
    )
    render = replace(scene, means=means, viewmat=torch.eye(4)).render(backend)
    covered = render.alpha > 0
    assert render.depth is not None and covered.any() and not covered.all()
    torch.testing.assert_close(render.depth[covered], torch.full((int(covered.sum()),), 2.5), rtol=2e-5, atol=0)
    assert not render.depth[~covered].any()
    assert scene.render(backend, depth=False).depth is None


# Nothing to see, and what must not disturb.


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_gaussians_give_the_background(backend: str) -> None:
    scene = make_scene(n=0)
    render, found = gradients(scene, backend)
    assert torch.equal(render.image, scene.background.expand_as(render.image))  # type: ignore[union-attr]
    assert not render.alpha.any() and render.depth is not None and not render.depth.any()
    assert render.means2d.shape == (0, 2) and render.radii.shape == (0,)
    assert found["image/means"].shape == (0, 3) and found["image/background"].all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_invisible_gaussians_change_nothing(backend: str) -> None:
    """Behind the camera, before the near plane, off-screen, and too faint."""
    scene = make_scene(n=6)
    camera = torch.inverse(scene.viewmat)
    points = torch.tensor([[0, 0, -1.0], [0, 0, 0.005], [0, 0, 0], [100.0, 0, 1.0], [0, 0, 1.0], [0, 0, 1.0]])
    opacities = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.003, 0.0])
    scene = replace(scene, means=points @ camera[:3, :3].T + camera[:3, 3], opacities=opacities)
    render, found = gradients(scene, backend)
    assert not render.radii.any() and not render.alpha.any()
    for name, gradient in found.items():
        assert name == "image/background" or not gradient.any(), name


@settings(max_examples=60, deadline=None)
@given(
    scene=scenes(),
    spread=st.sampled_from([0.0, 1.0, 300.0]),
    stretch=st.sampled_from([0.0, 1.0, 5.0]),
    opacity=st.sampled_from([0.0, 1.0, None]),
    distance=st.sampled_from([-0.5, 0.01, 50.0, None]),
)
def test_never_nan(scene: Scene, spread: float, stretch: float, opacity: float | None, distance: float | None) -> None:
    """Needles and points, zero quaternions, opacities 0 and 1, all in one place, off-screen or behind the camera."""
    n = len(scene.means)
    viewmat, quats = scene.viewmat.clone(), scene.quats.clone()
    if distance is not None:
        viewmat[2, 3] = distance
    quats[: n // 8] = 0
    scene = replace(
        scene,
        means=scene.means * spread,
        quats=quats,
        scales=scene.scales**stretch,
        opacities=scene.opacities if opacity is None else torch.full((n,), opacity),
        viewmat=viewmat,
    )
    render, found = gradients(scene, "cpu")
    for name, value in (vars(render) | found).items():
        assert torch.isfinite(value).all(), name
    assert render.alpha.min() >= 0 and render.alpha.max() <= 1
    assert (render.radii >= 0).all()


# The same numbers, however they are computed.


def _assert_equal(one: tuple[Render, dict[str, Tensor]], other: tuple[Render, dict[str, Tensor]]) -> None:
    for name, value in vars(one[0]).items():
        assert torch.equal(value, getattr(other[0], name)), name
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


@settings(max_examples=10, deadline=None)
@given(scenes())
def test_result_does_not_depend_on_threads_or_repetition(scene: Scene) -> None:
    first = gradients(scene, "cpu", threads=1)
    for threads in (1, 2, 3, None):
        _assert_equal(gradients(scene, "cpu", threads=threads), first)


def test_many_tiles_and_chunks_do_not_depend_on_threads() -> None:
    scene = make_scene(n=3000, width=197, height=161)
    first = gradients(scene, "cpu", threads=1)
    for threads in (1, 2, 3, None):
        _assert_equal(gradients(scene, "cpu", threads=threads), first)


def test_several_python_threads_render_at_once() -> None:
    scene = make_scene(n=2000, width=97, height=81)
    expected = gradients(scene, "cpu", threads=1)
    finished: list[int] = []

    def work(worker: int) -> None:
        for _ in range(5):
            _assert_equal(gradients(scene, "cpu", threads=2), expected)
        finished.append(worker)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(finished) == [0, 1, 2, 3]


def _sum_of_gradients(threads: int) -> float:
    found = gradients(make_scene(n=500), "cpu", threads=threads)[1]
    return float(sum(gradient.double().sum() for gradient in found.values()))


def _render_in_child(queue: multiprocessing.SimpleQueue[float]) -> None:
    torch.set_num_threads(1)  # torch's own pool does not survive a fork
    queue.put(_sum_of_gradients(threads=2))


def _render_and_fork(together: threading.Barrier, answers: multiprocessing.SimpleQueue[list[float]]) -> None:
    found = []
    together.wait(200)  # both processes have everything imported
    found.append(_sum_of_gradients(threads=2))
    if "fork" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_render_in_child, args=(queue,))
        child.start()
        child.join(60)
        found.append(queue.get() if child.exitcode == 0 else math.nan)
    answers.put(found)


def test_two_processes_and_their_forked_children_render() -> None:
    # In processes of their own: torch's autograd refuses to work after a fork once it has run in several threads.
    context = multiprocessing.get_context("spawn")
    answers, together = context.SimpleQueue(), context.Barrier(2)
    processes = [context.Process(target=_render_and_fork, args=(together, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    expected = _sum_of_gradients(threads=1)
    for _ in processes:
        # Torch sums in another order with another number of threads, on some processors.
        assert answers.get() == pytest.approx([expected] * 2, rel=1e-6)


# The interface.


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("count", [1, 3])
def test_batch_is_its_cameras_one_by_one(backend: str, count: int) -> None:
    scene = make_scene(n=80, sh_degree=1)
    viewmats, Ks = scene.viewmat.repeat(count, 1, 1), scene.K.repeat(count, 1, 1)
    viewmats[:, :3, 3] += 0.05 * torch.randn(count, 3, generator=torch.Generator().manual_seed(1))
    Ks[:, 0, 0] *= torch.linspace(1, 1.5, count)
    cameras = [replace(scene, viewmat=viewmat, K=K) for viewmat, K in zip(viewmats, Ks, strict=True)]

    def backward(scene: Scene, index: slice | int) -> tuple[Render, Scene]:
        leaves = scene.map(lambda t: t.clone().requires_grad_())
        render = leaves.render(backend)
        render.means2d.retain_grad()
        g = torch.Generator().manual_seed(3)
        loss = torch.zeros(())
        for output in OUTPUTS:
            value = getattr(render, output)
            weights = torch.randn(count, *value.shape[-3 if output == "image" else -2 :], generator=g)
            loss = loss + (value * weights[index]).sum()
        (loss + render.means2d.square().sum()).backward()
        return render, leaves

    batch, leaves = backward(replace(scene, viewmat=viewmats, K=Ks), slice(None))
    singles = [backward(camera, index) for index, camera in enumerate(cameras)]
    for name, value in vars(batch).items():
        assert torch.equal(value, torch.stack([getattr(render, name) for render, _ in singles])), name
    assert torch.equal(leaves.viewmat.grad, torch.stack([single.viewmat.grad for _, single in singles]))
    assert torch.equal(batch.means2d.grad, torch.stack([render.means2d.grad for render, _ in singles]))
    for name in ("means", "quats", "scales", "opacities", "colors", "background"):
        expected = torch.stack([getattr(single, name).grad for _, single in singles]).sum(dim=0)
        torch.testing.assert_close(getattr(leaves, name).grad, expected, msg=name)


def test_render_uint8_is_the_rounded_image() -> None:
    scene = make_scene()
    args = (scene.means, scene.quats, scene.scales, scene.opacities, scene.colors)
    image = render_uint8(*args, scene.viewmat, scene.K, scene.width, scene.height, background=scene.background)
    expected = (scene.render("cpu").image.numpy() * 255 + 0.5).clip(0, 255).astype(np.uint8)
    assert image.dtype == np.uint8 and image.shape == (scene.height, scene.width, 3)
    np.testing.assert_array_equal(image, expected)
    two = render_uint8(*args, *(t.expand(2, -1, -1) for t in (scene.viewmat, scene.K)), scene.width, scene.height)
    assert two.shape == (2, scene.height, scene.width, 3)


def test_a_backend_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mirror.py").write_text(
        "from pipeline.rasterize import reference\n\n\n"
        "def rasterize(*args, **options):\n"
        "    image, *rest = reference.rasterize(*args, **options)\n"
        "    return image.flip(1), *rest\n"
    )
    monkeypatch.setattr(pipeline.rasterize, "__path__", [*pipeline.rasterize.__path__, str(tmp_path)])
    scene = make_scene(n=20)
    assert torch.equal(scene.render("mirror").image, scene.render("reference").image.flip(1))
    assert pipeline.rasterize.backends() == ["cpu", "gsplat", "reference", "mirror"]


def test_the_environment_says_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_scene(n=20)
    for unset in (None, "", "auto"):
        if unset is not None:
            monkeypatch.setenv("HEADCAST_RASTERIZER", unset)
        assert torch.equal(scene.render("auto").image, scene.render("cpu").image)
    monkeypatch.setenv("HEADCAST_RASTERIZER", "reference")
    assert scene.double().render("auto").image.dtype == torch.float64
    with pytest.raises(TypeError, match="the cpu backend wants float32"):
        scene.double().render("cpu")
    for name in ("metal", "kernels"):
        monkeypatch.setenv("HEADCAST_RASTERIZER", name)
        with pytest.raises(UserError, match=rf"HEADCAST_RASTERIZER is '{name}'(.|\n)*cpu, gsplat, reference"):
            scene.render("auto")
        scene.render("cpu")


def test_bad_arguments_are_named_with_their_value() -> None:
    scene = make_scene(n=5)

    def fails(error: type[Exception], message: str, backend: str = "cpu", **changes: object) -> None:
        with pytest.raises(error, match=message):
            replace(scene, **changes).render(backend)  # type: ignore[arg-type]

    fails(ValueError, r"means has shape \[5, 2\]; expected \[5, 3\]", means=torch.zeros(5, 2))
    fails(ValueError, r"means has shape \[\]; expected \[N, 3\]", means=torch.zeros(()))
    fails(ValueError, r"quats has shape \[4, 4\]", quats=torch.ones(4, 4))
    fails(ValueError, r"opacities has shape \[5, 1\]", opacities=torch.ones(5, 1))
    fails(ValueError, r"colors has shape \[5\]; expected \[5, C\]", colors=torch.ones(5))
    fails(ValueError, r"colors has shape \[5, 0\]; expected at least one channel", colors=torch.ones(5, 0))
    fails(ValueError, r"colors has shape \[5, 3\]; expected \[5, 4, 3\]", sh_degree=1)
    fails(ValueError, r"sh_degree is 4", sh_degree=4)
    fails(ValueError, r"background has shape \[4\]; expected \[3\]", background=torch.ones(4))
    fails(ValueError, r"viewmat has shape \[3, 4\] and K \[3, 3\]; expected", viewmat=torch.ones(3, 4))
    fails(ValueError, r"viewmat has shape \[2, 4, 4\] and K \[3, 3\]", viewmat=torch.eye(4).expand(2, 4, 4))
    fails(ValueError, r"viewmat has shape \[4, 4\] and K \[2, 3, 3\]", K=scene.K.expand(2, 3, 3))
    two = {"viewmat": torch.eye(4).repeat(2, 1, 1), "K": scene.K.repeat(2, 1, 1)}
    fails(ValueError, r"viewmat has shape \[2, 4, 4\] and K \[3, 3, 3\]", **two | {"K": scene.K.expand(3, 3, 3)})
    fails(ValueError, r"viewmat has shape \[0, 4, 4\] and K \[0, 3, 3\]", **{n: v[:0] for n, v in two.items()})
    two["viewmat"][1, 2, 3] = math.nan
    fails(ValueError, r"viewmat\[1, 2, 3\] is nan; expected finite", **two)
    fails(ValueError, r"K has focal lengths 0", K=torch.zeros(3, 3))
    fails(ValueError, r"width is 0", width=0)
    fails(TypeError, r"height is 3.5", height=3.5)
    fails(TypeError, r"scales is a list", scales=[1.0])
    fails(TypeError, r"scales is torch.int64", scales=torch.ones(5, 3, dtype=torch.int64))
    fails(TypeError, r"scales is torch.float64 but means is torch.float32", scales=torch.ones(5, 3).double())
    fails(ValueError, r"scales is on meta but means is on cpu", scales=torch.ones(5, 3, device="meta"))
    fails(
        ValueError, r"backend is 'metal'; expected 'auto' or one of \['cpu', 'gsplat', 'reference'\]", backend="metal"
    )
    fails(ValueError, r"backend is 'kernels'", backend="kernels")
    fails(ValueError, r"means is on cpu; the gsplat backend wants a CUDA device", backend="gsplat")
    with pytest.raises(TypeError, match=r"means is torch.float64; the cpu backend wants float32"):
        scene.double().render("cpu")
    with pytest.raises(ValueError, match=r"threads is 0"):
        scene.render("cpu", threads=0)
    with pytest.raises(TypeError, match=r"depth is 1; expected True or False"):
        scene.render("cpu", depth=1)  # type: ignore[arg-type]
    for backend in ("cpu", "reference"):
        for name in ("means", "quats", "scales", "opacities", "colors", "background", "viewmat"):
            for bad in (math.nan, math.inf):
                broken = getattr(scene, name).clone()
                broken[(1,) * broken.dim()] = bad
                fails(ValueError, rf"{name}\[1.*\] is {bad}; expected finite", backend=backend, **{name: broken})


# gsplat's own kernels.


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"sh_degree": 3}, {"channels": 7, "width": 17, "height": 3}, {"n": 0}, {"distance": 0.0}], ids=str
)
def test_gsplat_matches_reference(options: dict[str, int]) -> None:
    scene = make_scene(**options)  # type: ignore[arg-type]
    safe = away_from_thresholds(scene.double())
    exact, exact_gradients = gradients(scene.double(), "reference", where=safe)
    found, found_gradients = gradients(scene.map(Tensor.cuda), "gsplat", where=safe.cuda())
    for output in OUTPUTS:
        error = (getattr(found, output).cpu() - getattr(exact, output)).abs()[safe]
        if output == "depth":
            error = error * exact.alpha[safe]
        assert float(error.quantile(0.999)) < 1e-4, output
    assert (found.radii.cpu() != exact.radii).sum() <= 1
    for name, expected in exact_gradients.items():
        gradient = found_gradients[name].cpu().double()
        if name.endswith("viewmat"):
            gradient, expected = (_along_rigid_motions(g, scene.double().viewmat) for g in (gradient, expected))
        assert float((gradient - expected).norm()) <= 1e-2 * float(expected.norm()), name


@pytest.mark.gpu
def test_gsplat_renders_a_batch() -> None:
    scene = make_scene().map(Tensor.cuda)
    viewmats = scene.viewmat.repeat(2, 1, 1)
    viewmats[1, 0, 3] += 0.1
    batch = replace(scene, viewmat=viewmats, K=scene.K.repeat(2, 1, 1)).map(lambda t: t.clone().requires_grad_())
    render = batch.render("auto")
    render.means2d.retain_grad()
    (render.image.sum() + render.alpha.sum()).backward()
    for index in range(2):
        single = replace(scene, viewmat=viewmats[index]).render("gsplat")
        torch.testing.assert_close(render.image[index], single.image)
        torch.testing.assert_close(render.depth[index], single.depth)  # type: ignore[index]
        assert batch.viewmat.grad[index].any() and render.means2d.grad[index].any()
