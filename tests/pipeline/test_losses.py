"""The photometric loss: its torch form against plain definitions, the fused kernel against its torch form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.losses import C1, C2, TAPS, photometric_loss, ssim_map


def _images(height: int, width: int, channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(height, width, channels, generator=g)
    image = (target + 0.1 * torch.randn(height, width, channels, generator=g)).clamp(0, 1)
    return image, target, torch.rand(height, width, generator=g)


def test_ssim_is_its_definition_at_one_pixel() -> None:
    image, target, _ = (t.double().numpy() for t in _images(20, 23))
    window = np.outer(TAPS, TAPS).astype(np.float64)
    for y, x in ((9, 12), (0, 3)):  # inside, and at the border, where zeros surround the image
        patches = []
        for picture in (image, target):
            padded = np.pad(picture[..., 1], 5)
            patches.append(padded[y : y + 11, x : x + 11])
        a, b = patches
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
        cov = (window * a * b).sum() - mean_a * mean_b
        expected = (2 * mean_a * mean_b + C1) * (2 * cov + C2)
        expected /= (mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2)
        value = ssim_map(torch.from_numpy(image), torch.from_numpy(target))[y, x, 1]
        assert float(value) == pytest.approx(expected, rel=1e-6)


def test_equal_images_have_no_loss() -> None:
    image, _, weight = _images(31, 18)
    image.requires_grad_()
    loss = photometric_loss(image, image.detach(), weight=weight)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert image.grad is not None and image.grad.abs().max() < 1e-7


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(37, 53, 3), (5, 4, 3), (1, 1, 3), (64, 16, 1), (12, 30, 7)], ids=str)
def test_kernel_matches_reference(shape: tuple[int, int, int], weighted: bool) -> None:
    image, target, weight = _images(*shape)
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        x = image.to(dtype).clone().requires_grad_()
        loss = photometric_loss(
            x, target.to(dtype), l1=0.7, ssim=0.4, weight=weight.to(dtype) if weighted else None, backend=backend
        )
        (3.0 * loss).backward()
        results.append((loss.item(), x.grad))
    (value, gradient), (exact, exact_gradient) = results
    assert value == pytest.approx(exact, rel=1e-5)
    assert float((gradient - exact_gradient).abs().max() / exact_gradient.abs().max()) < 1e-3


def test_zero_weight_hides_a_pixels_own_loss() -> None:
    image, target, _ = _images(30, 30)
    weight = torch.ones(30, 30)
    weight[10:20, 10:20] = 0
    for l1, ssim in ((1.0, 0.0), (0.0, 1.0)):
        per_pixel = (l1 * (image - target).abs() + ssim * (1 - ssim_map(image, target))).mean(dim=-1)
        expected = (per_pixel * weight).mean().item()
        assert photometric_loss(image, target, l1=l1, ssim=ssim, weight=weight).item() == pytest.approx(
            expected, rel=1e-4
        )


def test_result_does_not_depend_on_threads() -> None:
    image, target, weight = _images(61, 47)
    results = []
    for threads in (1, 2, 4):
        x = image.clone().requires_grad_()
        loss = photometric_loss(x, target, weight=weight, threads=threads)
        loss.backward()
        results.append((loss.item(), x.grad))
    for loss, gradient in results[1:]:
        assert loss == results[0][0] and torch.equal(gradient, results[0][1])


def test_auto_takes_any_dtype_and_cpu_says_no() -> None:
    image, target, _ = _images(8, 9)
    exact = photometric_loss(image.double(), target.double())
    assert exact.dtype == torch.float64
    assert photometric_loss(image, target).item() == pytest.approx(exact.item(), rel=1e-5)
    with pytest.raises(TypeError, match=r"image is torch.float64"):
        photometric_loss(image.double(), target.double(), backend="cpu")


def test_bad_shapes_are_named() -> None:
    image, target, weight = _images(8, 9)
    with pytest.raises(ValueError, match=r"image has shape \[8, 9, 3\] and target \[7, 9, 3\]"):
        photometric_loss(image, target[1:])
    with pytest.raises(ValueError, match=r"weight has shape \[9, 8\]; expected \[8, 9\]"):
        photometric_loss(image, target, weight=weight.T)
    with pytest.raises(ValueError, match=r"backend is 'fast'"):
        photometric_loss(image, target, backend="fast")  # type: ignore[arg-type]
