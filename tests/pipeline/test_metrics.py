"""Image metrics against independent statements of their formulas and what must hold for any pair of images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import metrics


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """A smooth non-square picture and a disturbed copy."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:182, 0:211].astype(np.float32) / 40
    truth = np.stack([0.5 + 0.4 * np.sin(x), 0.5 + 0.4 * np.cos(y), 0.5 + 0.3 * np.sin(x + y)], -1)
    image = np.clip(truth + 0.05 * rng.standard_normal(truth.shape), 0, 1)
    return truth.astype(np.float32), image.astype(np.float32)


def torch_ssim_terms(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Wang et al. 2004, equations 5, 6 and 13, as plain convolutions; mean SSIM and mean contrast-structure."""
    taps = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2).expand(3, 1, 11, 11)

    def window(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, kernel, groups=3)

    ma, mb = window(a), window(b)
    va, vb, cov = window(a * a) - ma**2, window(b * b) - mb**2, window(a * b) - ma * mb
    cs = (2 * cov + 0.03**2) / (va + vb + 0.03**2)
    return ((2 * ma * mb + 0.01**2) / (ma**2 + mb**2 + 0.01**2) * cs).mean(), cs.mean()


def to_torch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None]


def test_ssim_matches_its_formula(pair: tuple[np.ndarray, np.ndarray]) -> None:
    expected, _ = torch_ssim_terms(*map(to_torch, pair))
    assert metrics.ssim(*pair) == pytest.approx(float(expected), abs=1e-6)


def test_ssim_matches_scikit_image(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference = pytest.importorskip("skimage.metrics", reason="scikit-image is not a dependency").structural_similarity
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    assert metrics.ssim(*pair) == pytest.approx(reference(*pair, channel_axis=2, **options), abs=1e-4)


def test_ms_ssim_matches_its_formula() -> None:
    rng = np.random.default_rng(2)
    truth = rng.random((176, 192, 3)).astype(np.float32)
    image = np.clip(0.8 * truth + 0.1 + 0.1 * rng.random(truth.shape), 0, 1).astype(np.float32)
    a, b = to_torch(truth), to_torch(image)
    expected = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        similarity, contrast = torch_ssim_terms(a, b)
        expected *= float(similarity if scale == 4 else contrast) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    assert metrics.ms_ssim(truth, image) == pytest.approx(expected, abs=1e-6)


def test_ms_ssim_starts_at_161_pixels() -> None:
    fits, short = np.zeros((161, 200, 3), np.float32), np.zeros((160, 200, 3), np.float32)
    assert metrics.ms_ssim(fits, fits) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 161"):
        metrics.ms_ssim(short, short)


def test_equal_images_are_perfect(pair: tuple[np.ndarray, np.ndarray]) -> None:
    truth, _ = pair
    assert metrics.psnr(truth, truth) == metrics.PSNR_CAP_DB
    assert metrics.l1(truth, truth) == 0
    assert metrics.ssim(truth, truth) == pytest.approx(1)
    assert metrics.flip_map(truth, truth).max() == 0


def test_flip_is_of_the_images_shape_and_grows_with_the_error(pair: tuple[np.ndarray, np.ndarray]) -> None:
    truth, image = pair
    worse = np.clip(truth + 3 * (image - truth), 0, 1)
    near, far = metrics.flip_map(truth, image), metrics.flip_map(truth, worse)
    assert near.shape == truth.shape[:2]
    assert 0 < near.mean() < far.mean() < 1


@given(error=st.floats(1e-4, 0.5))
@settings(max_examples=20, deadline=None)
def test_psnr_of_an_even_error(error: float) -> None:
    truth = np.full((4, 6, 3), 0.5)
    assert metrics.psnr(truth, truth + error) == pytest.approx(-20 * math.log10(error), abs=1e-9)


def test_masked_psnr_sees_the_mask_only() -> None:
    truth = np.zeros((8, 10, 3))
    image = truth.copy()
    image[:2] = 0.1
    image[2:] = 0.9
    mask = np.zeros((8, 10), bool)
    mask[:2] = True
    assert metrics.psnr(truth, image, mask) == pytest.approx(20)
    with pytest.raises(ValueError, match="empty"):
        metrics.psnr(truth, image, np.zeros((8, 10), bool))


def test_integer_images_are_refused() -> None:
    eight_bit = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="expected floats"):
        metrics.psnr(eight_bit, eight_bit)


def test_a_subject_is_what_either_image_shows() -> None:
    truth, image = np.zeros((2, 3)), np.zeros((2, 3))
    truth[0, 0], image[1, 2], image[0, 1] = 1, 0.5, 0.01
    assert metrics.subject_mask(truth, image).tolist() == [[True, False, False], [False, False, True]]


def test_a_head_grows_by_a_share_of_its_height() -> None:
    silhouette = np.zeros((200, 160), bool)
    silhouette[60:140, 50:110] = True  # 80 px high: grows by 12
    grown = metrics.head_mask(silhouette)
    assert np.flatnonzero(grown.any(1))[[0, -1]].tolist() == [48, 151]
    assert np.flatnonzero(grown.any(0))[[0, -1]].tolist() == [38, 121]
    assert not grown[48, 38], "growth is round at the corners"
    assert not metrics.head_mask(np.zeros((5, 5), bool)).any()
