"""The rasteriser: the reference against gsplat's torch code, the CPU backend against the reference."""

from __future__ import annotations

import math
import multiprocessing
import sys
import threading
import types
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.rasterize import Render, rasterize, reference, render_uint8

GRADIENTS = ("means", "quats", "scales", "opacities", "colors", "viewmat", "background", "means2d")


@dataclass(frozen=True)
class Scene:
    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor
    viewmat: Tensor
    K: Tensor
    width: int
    height: int
    background: Tensor
    sh_degree: int | None = None

    def to(self, dtype: torch.dtype) -> Scene:
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def render(self, backend: str, threads: int | None = 2, background: bool = True) -> Render:
        return rasterize(
            self.means, self.quats, self.scales, self.opacities, self.colors, self.viewmat, self.K,
            self.width, self.height, background=self.background if background else None, sh_degree=self.sh_degree,
            backend=backend, threads=threads,
        )  # fmt: skip


def make_scene(
    n: int = 400, width: int = 53, height: int = 38, channels: int = 3, sh_degree: int | None = None, seed: int = 0
) -> Scene:
    """A blob of Gaussians seen at an angle by a camera with fx != fy and an off-centre principal point; values are
    float32 numbers held in float64."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    rotation = reference.quat_to_rotmat(torch.tensor([[0.9, 0.2, -0.3, 0.1]], dtype=torch.float64))[0]
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3], viewmat[:3, 3] = rotation, torch.tensor([0.02, -0.03, 1.0])
    K = torch.tensor([[1.5 * width, 0, 0.45 * width], [0, 1.2 * width, 0.6 * height], [0, 0, 1]], dtype=torch.float64)
    colors = rand(n, channels) if sh_degree is None else 0.4 * randn(n, (sh_degree + 1) ** 2, 3)
    scene = Scene(
        means=0.15 * randn(n, 3),
        quats=randn(n, 4),
        scales=torch.exp(-4.5 + 0.7 * randn(n, 3)),
        opacities=0.05 + 0.9 * rand(n),
        colors=colors,
        viewmat=viewmat,
        K=K,
        width=width,
        height=height,
        background=rand(channels),
        sh_degree=sh_degree,
    )
    return scene.to(torch.float32).to(torch.float64)


def gradients(scene: Scene, backend: str, threads: int | None = 2) -> tuple[Render, dict[str, Tensor]]:
    """Render and the gradients of a random linear function of image and alpha."""
    tensors = {n: getattr(scene, n).clone().requires_grad_() for n in GRADIENTS if n != "means2d"}
    render = replace(scene, **tensors).render(backend, threads)
    render.means2d.retain_grad()
    g = torch.Generator().manual_seed(7)
    v_image = torch.randn(render.image.shape, generator=g, dtype=torch.float64).to(render.image)
    v_alpha = torch.randn(render.alpha.shape, generator=g, dtype=torch.float64).to(render.image)
    ((render.image * v_image).sum() + (render.alpha * v_alpha).sum()).backward()
    render = Render(**{name: value.detach() for name, value in vars(render).items()} | {"means2d": render.means2d})
    return render, {n: render.means2d.grad if n == "means2d" else tensors[n].grad for n in GRADIENTS}


def near_threshold(scene: Scene, tolerance: float = 1e-4) -> Tensor:
    """Pixels [H,W] where rounding may flip the 1/255 test or the 1e-4 stop of some Gaussian."""
    means2d, conics, depths, radii = reference.project(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.viewmat, scene.K, scene.width, scene.height
    )
    order = torch.argsort(depths, stable=True)
    order = order[radii[order] > 0]
    v, u = torch.meshgrid(torch.arange(scene.height) + 0.5, torch.arange(scene.width) + 0.5, indexing="ij")
    dx, dy = u - means2d[order, 0, None, None], v - means2d[order, 1, None, None]
    a, b, c = conics[order].unbind(-1)
    a, b, c = a[:, None, None], b[:, None, None], c[:, None, None]
    raw = scene.opacities[order, None, None] * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
    near = ((raw * 255 - 1).abs() < tolerance).any(dim=0)
    after = torch.cumprod(1 - torch.where(raw >= reference.ALPHA_MIN, raw.clamp_max(reference.ALPHA_MAX), 0.0), dim=0)
    return near | ((after / reference.TRANSMITTANCE_MIN - 1).abs() < 100 * tolerance).any(dim=0)


# The reference against gsplat's own torch code.


def test_reference_projects_like_gsplat() -> None:
    from gsplat.cuda import _torch_impl as theirs

    scene = make_scene(n=300)
    # Some behind the camera, some far to the side, where the Jacobian is clamped.
    means = torch.cat([scene.means, scene.means * 8])
    quats, scales = scene.quats.repeat(2, 1), scene.scales.repeat(2, 1)
    tensors = [t.clone().requires_grad_() for t in (means, quats, scales)]
    ones = torch.ones(len(means), dtype=torch.float64)
    ours = reference.project(*tensors, ones, scene.viewmat, scene.K, scene.width, scene.height)
    covars, _ = theirs._quat_scale_to_covar_preci(tensors[1], tensors[2], compute_preci=False)
    radii, means2d, depths, conics, _ = theirs._fully_fused_projection(
        tensors[0], covars, scene.viewmat[None], scene.K[None], scene.width, scene.height
    )
    expected_radii = radii[0].amax(dim=-1)
    visible = expected_radii > 0
    assert 0 < int(visible.sum()) < len(means)
    assert torch.equal(ours[3], expected_radii)
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

    scene = make_scene(n=50, sh_degree=3)
    center = torch.inverse(scene.viewmat)[:3, 3]
    expected = (_spherical_harmonics(degree, scene.means - center, scene.colors) + 0.5).clamp_min(0)
    torch.testing.assert_close(reference.sh_to_colors(degree, scene.means, scene.colors, scene.viewmat), expected)


def test_reference_composites_like_gsplat(monkeypatch: pytest.MonkeyPatch) -> None:
    """gsplat's `accumulate` on the pairs that its CUDA kernel would visit, with stand-ins for nerfacc's two sums."""
    from gsplat.cuda._torch_impl import accumulate

    def weights(alphas: Tensor, *, ray_indices: Tensor, n_rays: int) -> tuple[Tensor, Tensor]:
        trans = torch.ones_like(alphas)
        for ray in torch.unique(ray_indices):
            mine = torch.nonzero(ray_indices == ray)[:, 0]
            trans[mine[1:]] = torch.cumprod(1 - alphas[mine], dim=0)[:-1]
        return alphas * trans, trans

    def sums(weights: Tensor, values: Tensor | None, *, ray_indices: Tensor, n_rays: int) -> Tensor:
        values = weights[:, None] if values is None else weights[:, None] * values
        return torch.zeros(n_rays, values.shape[1], dtype=values.dtype).index_add(0, ray_indices, values)

    nerfacc = types.ModuleType("nerfacc")
    nerfacc.render_weight_from_alpha, nerfacc.accumulate_along_rays = weights, sums  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nerfacc", nerfacc)

    scene = make_scene(n=150, width=21, height=18)
    scene = replace(scene, scales=scene.scales * 3, opacities=scene.opacities * 1.04)  # opaque enough to stop pixels
    means2d, conics, depths, radii = reference.project(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.viewmat, scene.K, scene.width, scene.height
    )
    gaussians, pixels, stopped = [], [], 0
    order = [int(i) for i in torch.argsort(depths, stable=True) if radii[i] > 0]
    for pixel in range(scene.width * scene.height):
        trans = 1.0
        for i in order:  # the loop of RasterizeToPixels3DGSFwd.cu
            dx, dy = (means2d[i] - torch.tensor([pixel % scene.width + 0.5, pixel // scene.width + 0.5])).tolist()
            a, b, c = conics[i].tolist()
            sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
            alpha = min(0.999, float(scene.opacities[i]) * math.exp(-sigma))
            if sigma < 0 or alpha < 1 / 255:
                continue
            if trans * (1 - alpha) <= 1e-4:
                stopped += 1
                break
            trans *= 1 - alpha
            gaussians.append(i)
            pixels.append(pixel)
    assert stopped > 10
    image, alpha = accumulate(
        means2d[None], conics[None], scene.opacities[None], scene.colors[None],
        torch.tensor(gaussians), torch.tensor(pixels), torch.zeros(len(pixels), dtype=torch.long),
        scene.width, scene.height,
    )  # fmt: skip
    render = scene.render("reference")
    torch.testing.assert_close(render.alpha, alpha[0, ..., 0])
    torch.testing.assert_close(render.image, image[0] + (1 - alpha[0]) * scene.background)


# The CPU backend against the reference in float64.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 1200, "width": 101, "height": 67, "seed": 1},
        {"width": 16, "height": 16, "channels": 1},
        {"width": 7, "height": 3, "channels": 5},
        {"n": 15, "width": 64, "height": 33, "channels": 4},
        *({"sh_degree": degree, "seed": degree} for degree in range(4)),
    ],
    ids=str,
)
def test_cpu_matches_reference(options: dict[str, int]) -> None:
    scene = make_scene(**options)
    exact, exact_grads = gradients(scene, "reference")
    render, grads = gradients(scene.to(torch.float32), "cpu")
    safe = ~near_threshold(scene)
    assert safe.double().mean() > 0.8
    error = torch.maximum((render.image - exact.image).abs().amax(dim=-1), (render.alpha - exact.alpha).abs())
    assert float(torch.quantile(error[safe], 0.999)) < 1e-5
    assert (render.radii != exact.radii).sum() <= 1  # a ceil may flip
    torch.testing.assert_close(render.depths.double(), exact.depths, rtol=1e-5, atol=1e-5)
    for name in GRADIENTS:
        scale = exact_grads[name].abs().max()
        assert float((grads[name] - exact_grads[name]).abs().max() / scale) < 1e-3, name
        assert grads[name].abs().max() > 0, name


def test_without_background_colors_are_premultiplied() -> None:
    scene = make_scene()
    bare, over = scene.render("reference", background=False), scene.render("reference")
    torch.testing.assert_close(over.image, bare.image + (1 - bare.alpha)[..., None] * scene.background)
    fast = scene.to(torch.float32).render("cpu", background=False)
    torch.testing.assert_close(fast.image.double(), bare.image, rtol=0, atol=2e-5)


def test_opaque_gaussians_are_capped_and_stop() -> None:
    scene = make_scene(n=600)
    scene = replace(scene, opacities=torch.ones(600, dtype=torch.float64), scales=scene.scales * 2)
    exact, exact_grads = gradients(scene, "reference")
    render, grads = gradients(scene.to(torch.float32), "cpu")
    assert exact.alpha.max() > 0.99
    safe = ~near_threshold(scene)
    assert float(torch.quantile((render.image - exact.image).abs().amax(-1)[safe], 0.999)) < 1e-5
    for name in ("means", "scales", "opacities", "colors"):
        assert float((grads[name] - exact_grads[name]).norm() / exact_grads[name].norm()) < 1e-2, name


def test_depth_is_differentiable() -> None:
    scene = make_scene().to(torch.float32)
    means = scene.means.clone().requires_grad_()
    replace(scene, means=means).render("cpu").depths.sum().backward()
    visible = scene.render("cpu").radii > 0
    torch.testing.assert_close(means.grad[visible], scene.viewmat[2, :3].expand(int(visible.sum()), 3))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_gaussians_give_the_background(backend: str) -> None:
    scene = make_scene(n=0).to(torch.float32)
    render, grads = gradients(scene, backend)
    torch.testing.assert_close(render.image, scene.background.expand_as(render.image))
    assert not render.alpha.any()
    assert render.means2d.shape == (0, 2) and render.radii.shape == (0,)
    assert grads["means"].shape == (0, 3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_invisible_gaussians_change_nothing(backend: str) -> None:
    scene = make_scene(n=4).to(torch.float32)
    camera = torch.inverse(scene.viewmat)
    points = torch.tensor([[0, 0, -1.0], [0, 0, 0.005], [100.0, 0, 1.0], [0, 0, 1.0]])
    means = points @ camera[:3, :3].T + camera[:3, 3]
    scene = replace(scene, means=means, opacities=torch.tensor([1.0, 1.0, 1.0, 0.003]))
    render, grads = gradients(scene, backend)
    assert not render.radii.any() and not render.alpha.any()
    for name in ("means", "quats", "scales", "opacities", "colors"):
        assert not grads[name].any(), name


def test_result_does_not_depend_on_threads() -> None:
    scene = make_scene(n=3000, width=97, height=81).to(torch.float32)
    first, first_grads = gradients(scene, "cpu", threads=1)
    for threads in (1, 2, 3, None):
        render, grads = gradients(scene, "cpu", threads=threads)
        assert torch.equal(render.image, first.image)
        for name in ("means", "quats", "scales", "opacities", "colors", "viewmat", "means2d"):
            assert torch.equal(grads[name], first_grads[name]), (name, threads)


def test_several_python_threads_render_at_once() -> None:
    scene = make_scene(n=2000, width=97, height=81).to(torch.float32)
    expected, expected_grads = gradients(scene, "cpu", threads=1)
    failures: list[int] = []

    def work(worker: int) -> None:
        for _ in range(10):
            render, grads = gradients(scene, "cpu", threads=2)
            if not torch.equal(render.image, expected.image) or not torch.equal(
                grads["means"], expected_grads["means"]
            ):
                failures.append(worker)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert not failures


def _render_in_child(scene: Scene, queue: multiprocessing.SimpleQueue[float]) -> None:
    torch.set_num_threads(1)  # torch's own pool does not survive a fork
    queue.put(float(gradients(scene, "cpu", threads=2)[1]["means"].double().sum()))


def _render_and_fork(answers: multiprocessing.SimpleQueue[tuple[int | None, bool]]) -> None:
    scene = make_scene(n=500).to(torch.float32)
    expected = float(gradients(scene, "cpu", threads=2)[1]["means"].double().sum())
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_render_in_child, args=(scene, queue))
    child.start()
    child.join(60)
    answers.put((child.exitcode, child.exitcode == 0 and queue.get() == expected))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_renders() -> None:
    # In a process of its own: torch's autograd refuses to work after a fork once it has run in several threads.
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    parent = context.Process(target=_render_and_fork, args=(answers,))
    parent.start()
    parent.join(200)
    assert parent.exitcode == 0
    assert answers.get() == (0, True)


def test_render_uint8_is_the_rounded_image() -> None:
    scene = make_scene().to(torch.float32)
    args = (scene.means, scene.quats, scene.scales, scene.opacities, scene.colors, scene.viewmat, scene.K)
    image = render_uint8(*args, scene.width, scene.height, background=scene.background)
    expected = (scene.render("cpu").image.numpy() * 255 + 0.5).clip(0, 255).astype(np.uint8)
    assert image.dtype == np.uint8 and image.shape == (scene.height, scene.width, 3)
    np.testing.assert_array_equal(image, expected)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 60),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    log_scale=st.sampled_from([-30.0, -5.0, -2.0, 3.0]),
    opacity=st.sampled_from([0.0, 1.0, None]),
    distance=st.sampled_from([-0.5, 0.0, 0.05, 1.0, 50.0]),
)
def test_never_nan(
    seed: int, n: int, width: int, height: int, spread: float, log_scale: float, opacity: float | None, distance: float
) -> None:
    """Cameras inside the head, degenerate scales, zero quaternions, opacities 0 and 1, everything off-screen."""
    g = torch.Generator().manual_seed(seed)
    scene = make_scene(n=n, width=width, height=height, seed=seed).to(torch.float32)
    viewmat = scene.viewmat.clone()
    viewmat[2, 3] = distance
    quats = scene.quats.clone()
    quats[: n // 8] = 0
    scene = replace(
        scene,
        means=torch.randn(n, 3, generator=g) * spread,
        quats=quats,
        scales=torch.exp(log_scale + 2 * torch.randn(n, 3, generator=g)),
        opacities=torch.rand(n, generator=g) if opacity is None else torch.full((n,), opacity),
        viewmat=viewmat,
    )
    render, grads = gradients(scene, "cpu")
    for value in (render.image, render.alpha, render.means2d, render.depths, *grads.values()):
        assert torch.isfinite(value).all()
    assert render.alpha.min() >= 0 and render.alpha.max() <= 1
    assert (render.radii >= 0).all()


def test_bad_arguments_are_named_with_their_value() -> None:
    scene = make_scene(n=5).to(torch.float32)

    def fails(error: type[Exception], message: str, backend: str = "cpu", **changes: object) -> None:
        with pytest.raises(error, match=message):
            replace(scene, **changes).render(backend)  # type: ignore[arg-type]

    fails(ValueError, r"means has shape \[5, 2\]; expected \[5, 3\]", means=torch.zeros(5, 2))
    fails(ValueError, r"quats has shape \[4, 4\]", quats=torch.ones(4, 4))
    fails(ValueError, r"opacities has shape \[5, 1\]", opacities=torch.ones(5, 1))
    fails(ValueError, r"colors has shape \[5\]; expected \[5, C\]", colors=torch.ones(5))
    fails(ValueError, r"colors has shape \[5, 3\]; expected \[5, 4, 3\]", sh_degree=1)
    fails(ValueError, r"sh_degree is 4", sh_degree=4)
    fails(ValueError, r"background has shape \[4\]; expected \[3\]", background=torch.ones(4))
    fails(ValueError, r"viewmat has shape \[3, 4\]", viewmat=torch.ones(3, 4))
    fails(ValueError, r"K has focal lengths 0", K=torch.zeros(3, 3))
    fails(ValueError, r"width is 0", width=0)
    fails(TypeError, r"height is 3.5", height=3.5)
    fails(TypeError, r"scales is a list", scales=[1.0])
    fails(TypeError, r"scales is torch.int64", scales=torch.ones(5, 3, dtype=torch.int64))
    fails(TypeError, r"scales is torch.float64 but means is torch.float32", scales=torch.ones(5, 3).double())
    fails(ValueError, r"backend is 'metal'", backend="metal")
    fails(ValueError, r"means is on cpu; the gsplat backend wants a CUDA device", backend="gsplat")
    with pytest.raises(TypeError, match=r"means is torch.float64; the cpu backend wants float32"):
        scene.to(torch.float64).render("cpu")
    with pytest.raises(ValueError, match=r"threads is 0"):
        scene.render("cpu", threads=0)
    for backend in ("cpu", "reference"):
        for name in ("means", "quats", "scales", "opacities", "colors", "background", "viewmat"):
            for bad in (math.nan, math.inf):
                broken = getattr(scene, name).clone()
                broken[(1,) * broken.dim()] = bad
                fails(ValueError, rf"{name}\[1.*\] is {bad}; expected finite", backend=backend, **{name: broken})


@pytest.mark.gpu
@pytest.mark.parametrize("sh_degree", [None, 3])
def test_gsplat_matches_reference(sh_degree: int | None) -> None:
    scene = make_scene(sh_degree=sh_degree)
    exact, exact_grads = gradients(scene, "reference")
    moved = {n: v.cuda() for n, v in vars(scene.to(torch.float32)).items() if isinstance(v, Tensor)}
    render, grads = gradients(replace(scene, **moved), "gsplat")
    safe = ~near_threshold(scene)
    assert float(torch.quantile((render.image.cpu() - exact.image).abs().amax(dim=-1)[safe], 0.999)) < 1e-4
    for name in GRADIENTS:
        error = (grads[name].cpu() - exact_grads[name]).abs().max() / exact_grads[name].abs().max()
        assert float(error) < 1e-2, name
