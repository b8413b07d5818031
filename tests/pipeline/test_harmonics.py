"""The kernel for spherical harmonics against the reference, gsplat and finite differences."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.rasterize import harmonics, reference

Inputs = tuple[Tensor, Tensor, Tensor]  # means, coefficients, viewmat


def make_inputs(n: int, bases: int = 16, seed: int = 0) -> Inputs:
    """Gaussians around a tilted camera, float32; some of their colours are clamped."""
    g = torch.Generator().manual_seed(seed)
    viewmat = torch.eye(4)
    viewmat[:3, :3] = reference.quat_to_rotmat(torch.tensor([[0.9, 0.2, -0.3, 0.1]]))[0]
    viewmat[:3, 3] = torch.tensor([0.2, -0.3, 0.7])
    coefficients = 0.4 * torch.randn(n, bases, 3, generator=g)
    coefficients[:, 0] *= 4
    return torch.randn(n, 3, generator=g), coefficients, viewmat


def with_gradients(
    shade: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Colours, and the gradients of their weighted sum (by default with random weights) for each of the inputs."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    colors = shade(*leaves)
    if weights is None:
        weights = torch.randn(colors.shape, generator=torch.Generator().manual_seed(1))
    return colors.detach(), *torch.autograd.grad((colors * weights).sum(), leaves, materialize_grads=True)


def kernel(degree: int, threads: int = 2) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda means, coefficients, viewmat: harmonics.sh_to_colors(degree, means, coefficients, viewmat, threads)


def in_double(degree: int, inputs: Inputs) -> tuple[Tensor, ...]:
    """What `with_gradients` should return."""
    means, coefficients, viewmat = inputs
    shade = functools.partial(reference.sh_to_colors, degree)
    return with_gradients(shade, (means.double(), coefficients.double(), viewmat.double()))


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Values within 1e-6, gradients within 1e-4 of their norm."""
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=1e-6)
    for mine, other in zip(found[1:], expected[1:], strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("degree", range(4))
@pytest.mark.parametrize("n", [0, 1, 17, 1000])
@pytest.mark.parametrize("more", [0, 2])
def test_kernel_is_the_reference(degree: int, n: int, more: int) -> None:
    used = (degree + 1) ** 2
    inputs = make_inputs(n, used + more)
    found = with_gradients(kernel(degree), inputs)
    assert_close(found, in_double(degree, inputs))
    assert (found[2][:, used:] == 0).all()
    if n == 1000:
        assert (found[0] == 0).any() and (found[0] > 1).any()
        assert degree == 0 or all(gradient.abs().max() > 0.1 for gradient in found[1:])


@pytest.mark.parametrize("degree", range(4))
def test_kernel_is_gsplats(degree: int) -> None:
    from gsplat.cuda._torch_impl import _spherical_harmonics

    def shade(means: Tensor, coefficients: Tensor, viewmat: Tensor) -> Tensor:
        center = -viewmat[:3, :3].T @ viewmat[:3, 3]
        return (_spherical_harmonics(degree, means - center, coefficients) + 0.5).clamp_min(0)

    means, coefficients, viewmat = make_inputs(200)
    found = with_gradients(kernel(degree), (means, coefficients, viewmat))
    expected = with_gradients(shade, (means.double(), coefficients.double(), viewmat.double()))
    assert_close(found, expected)


def test_gradients_are_finite_differences() -> None:
    means, coefficients, viewmat = make_inputs(40)
    means = 5 * means / means.norm(dim=1, keepdim=True)  # far enough from the camera for colours to change smoothly
    coefficients[:, 0] += 20  # far from the clamp
    inputs, weights, step = (means, coefficients, viewmat), torch.linspace(1, 2, 120).view(40, 3), 1e-2
    gradients = with_gradients(kernel(3), inputs, weights)[1:]
    for k, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(k))
        ahead, behind = (
            (kernel(3)(*(v + sign * direction if i == k else v for i, v in enumerate(inputs))) * weights).double().sum()
            for sign in (step, -step)
        )
        slope = (gradient * direction).double().sum().item()
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx(slope, rel=1e-2)


def test_clamped_colors_pass_no_gradient() -> None:
    # Straight along y the first two bases are these; two coefficients take 0.5 to below 0, exactly 0, and above.
    basis, other_basis = 0.5 / math.sqrt(math.pi), -0.5 * math.sqrt(3 / math.pi)
    coefficients = torch.zeros(3, 4, 3)
    coefficients[:, 0] = (-0.5 - other_basis) / basis + torch.tensor([-1e-3, 0.0, 1e-3])[:, None]
    coefficients[:, 1] = 1
    inputs = torch.tensor([[0.0, 1.0, 0.0]]).expand(3, 3), coefficients, torch.eye(4)
    weights = torch.ones(3, 3)
    found = with_gradients(kernel(1), inputs, weights)
    for mine, other in zip(
        found, with_gradients(functools.partial(reference.sh_to_colors, 1), inputs, weights), strict=True
    ):
        torch.testing.assert_close(mine, other)
    assert (found[0][:2] == 0).all() and (found[0][2] > 0).all()
    assert (found[2][0] == 0).all() and (found[2][1:, 0] > 0).all()


def test_any_strides() -> None:
    means, coefficients, viewmat = make_inputs(50)
    strided = (
        means.repeat_interleave(2, dim=1)[:, ::2],
        coefficients.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        viewmat.T.contiguous().T,
    )
    assert not any(value.is_contiguous() for value in strided)
    weights = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).T
    for found, expected in zip(
        with_gradients(kernel(3), strided, weights),
        with_gradients(kernel(3), (means, coefficients, viewmat), weights.contiguous()),
        strict=True,
    ):
        # Torch's own sums round in another order on other processors, where terms of about 1 cancel.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=4e-6)


def test_results_do_not_depend_on_threads() -> None:
    inputs = make_inputs(5000)
    expected = with_gradients(kernel(3, threads=1), inputs)
    for threads in (2, 3):
        for found, other in zip(with_gradients(kernel(3, threads), inputs), expected, strict=True):
            assert torch.equal(found, other)


def test_gradients_that_nobody_wants_change_no_others() -> None:
    means, coefficients, viewmat = make_inputs(100)
    expected = with_gradients(kernel(3), (means, coefficients, viewmat), torch.ones(100, 3))
    coefficients.requires_grad_()
    colors = kernel(3)(means, coefficients, viewmat)
    colors.sum().backward()
    assert means.grad is None and viewmat.grad is None
    assert coefficients.grad is not None and torch.equal(coefficients.grad, expected[2])


@pytest.mark.parametrize("offset", [0.0, 1e-13, 1e-6])
def test_gaussian_at_the_camera(offset: float) -> None:
    _, coefficients, _ = make_inputs(20)
    means = torch.zeros(20, 3)
    means[:, 1] = offset
    inputs = means, coefficients, torch.eye(4)  # the camera's centre is exactly 0
    found = with_gradients(kernel(3), inputs)
    assert all(torch.isfinite(value).all() for value in found)
    assert_close(found, in_double(3, inputs))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (17, 3, 1), (18, 15, 2)])
def test_a_coefficient_that_is_not_finite_is_named(bad: float, place: tuple[int, int, int]) -> None:
    means, coefficients, viewmat = make_inputs(19)
    coefficients[place] = bad
    with pytest.raises(ValueError, match=rf"colors\[{place[0]}, {place[1]}, {place[2]}\] is {bad}; expected finite"):
        kernel(1)(means, coefficients, viewmat)
