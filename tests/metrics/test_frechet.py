"""Tests of PSNR, SSIM, PCA, kernel and Fréchet distances and retrieval against numpy, scipy and torchmetrics."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.kid import poly_mmd

from ldm.metrics import neighbours
from ldm.metrics.frechet import feature_components, frechet_distance
from ldm.metrics.image import pca_reconstruction, psnr, ssim
from ldm.metrics.kernel import _mmd2, kernel_distance
from ldm.metrics.neighbours import retrieval_ranks


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    images = normal(4, 3, 16, 16).mul(0.4).clamp(-1, 1)
    errors = normal(4, 3, 16, 16, seed=1) * torch.tensor([0.01, 0.1, 0.3, 1.0])[:, None, None, None]
    return images, (images + errors).clamp(-1, 1)


def test_psnr_equals_psnr_of_8_bit_images(pair):
    """Images are mapped to 0..255, where the peak is 255."""
    x, y = ((image.double().numpy() + 1) * 127.5 for image in pair)
    expected = 10 * np.log10(255**2 / ((x - y) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(psnr(*pair).numpy(), expected, rtol=1e-4)
    torch.testing.assert_close(psnr(pair[0], pair[0]), torch.full((4,), 106.0206), rtol=0, atol=1e-3)


def test_ssim_equals_its_formula(pair):
    """The formula is from Wang et al. 2004: 8-bit images, an 11 x 11 Gaussian window (sigma 1.5) and mirrored edges."""
    t = np.arange(11) - 5
    window = np.exp(-(t**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def blur(x):
        padded = np.pad(x, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect")
        views = np.lib.stride_tricks.sliding_window_view(padded, (11, 11), axis=(2, 3))
        return (views * window).sum(axis=(-1, -2))

    x, y = ((image.double().numpy() + 1) * 127.5 for image in pair)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    np.testing.assert_allclose(ssim(*pair).numpy(), values.mean(axis=(1, 2, 3)), atol=1e-4)
    torch.testing.assert_close(ssim(pair[0], pair[0]), torch.ones(4))


def test_ssim_does_not_change_under_bfloat16_autocast(pair):
    expected = ssim(*pair)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim(*pair), expected)


@pytest.mark.parametrize(("factor", "channels"), [(2, 3), (4, 10), (2, 12)])
def test_pca_reconstruction_equals_singular_value_decomposition(factor, channels):
    train, images = normal(60, 3, 8, 8).mul(0.2), normal(5, 3, 8, 8, seed=1).mul(0.2)
    train[:, 0] += train[:, 1]

    def patches(x):
        side = 8 // factor
        cells = x.double().numpy().reshape(len(x), 3, side, factor, side, factor)
        return cells.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * factor**2)

    mean = patches(train).mean(0)
    _, _, basis = np.linalg.svd(patches(train) - mean, full_matrices=False)
    basis = basis[:channels]
    expected = (patches(images) - mean) @ basis.T @ basis + mean
    reconstruction = pca_reconstruction(train, images, factor=factor, channels=channels)
    np.testing.assert_allclose(patches(reconstruction), expected.clip(-1, 1), atol=1e-5)


def test_mmd_of_two_features_equals_hand_calculation():
    """For d = 1, k(x, y) = (x y + 1)^3. The kernel of a feature with itself is excluded."""
    within_samples, within_reference = (1 * 2 + 1) ** 3, (0 * 1 + 1) ** 3
    across = ((1 * 0 + 1) ** 3 + (1 * 1 + 1) ** 3 + (2 * 0 + 1) ** 3 + (2 * 1 + 1) ** 3) / 4
    mmd2 = _mmd2(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
    assert mmd2.item() == pytest.approx(within_samples + within_reference - 2 * across)


def test_mmd_equals_torchmetrics():
    samples, reference = normal(40, 8).double(), normal(40, 8, seed=1).double() * 1.2 + 0.1
    torch.testing.assert_close(_mmd2(samples, reference), poly_mmd(samples, reference), rtol=1e-9, atol=1e-12)


def test_kernel_distance_averages_disjoint_subsets():
    samples, reference = normal(43, 8).double(), normal(50, 8, seed=1).double() + 0.3
    generator = torch.Generator().manual_seed(7)
    subsets = [x[torch.randperm(len(x), generator=generator)[:40]].split(10) for x in (samples, reference)]
    values = [poly_mmd(a, b).item() for a, b in zip(*subsets, strict=True)]
    mean, error = kernel_distance(samples, reference, seed=7)
    assert mean == pytest.approx(np.mean(values), rel=1e-9)
    assert error == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-9)


def test_kernel_distance_is_unbiased():
    """For two sets from one distribution, the distance is zero on average and often negative."""
    means, errors = np.transpose(
        [kernel_distance(normal(64, 4, seed=2 * i), normal(64, 4, seed=2 * i + 1), seed=i) for i in range(150)]
    )
    assert abs(means.mean()) < 3 * means.std(ddof=1) / np.sqrt(150)
    assert (means < 0).mean() > 0.3
    assert errors.mean() == pytest.approx(means.std(ddof=1), rel=0.3), "standard errors match the actual spread"


def test_paired_kernel_distance_equals_sum_over_pairs():
    """Gretton et al. 2012, eq. 4: h(i, j) = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) over i != j."""
    x, y = normal(8, 3).double(), normal(8, 3, seed=1).double()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    values = []
    for subset in order.split(4):
        pairs = [(i, j) for i in subset for j in subset if i != j]
        values.append(np.mean([k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs]))
    mean, error = kernel_distance(x, y, num_subsets=2, seed=5, paired=True)
    assert mean == pytest.approx(np.mean(values), rel=1e-9)
    assert error == pytest.approx(np.std(values, ddof=1) / 2**0.5, rel=1e-9)
    assert kernel_distance(x, x, paired=True)[0] == pytest.approx(0, abs=1e-12)


def test_paired_kernel_distance_is_unbiased_for_dependent_pairs():
    """y = -x has the same distribution as x, so the distance is 0 on average if subsets keep pairs together."""
    means = [kernel_distance(x := normal(16, 2, seed=i), -x, num_subsets=2, paired=True)[0] for i in range(400)]
    assert abs(np.mean(means)) < 3 * np.std(means, ddof=1) / 20


def with_moments(mean: torch.Tensor, std: torch.Tensor, num: int, seed: int) -> torch.Tensor:
    """Return a set whose sample mean is exactly `mean` and whose sample covariance is exactly diag(std^2)."""
    x = normal(num, len(mean), seed=seed).double()
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return whitened * std + mean


def test_frechet_distance_of_diagonal_gaussians_equals_closed_form():
    """The closed form is |m_1 - m_2|^2 + sum (s_1 - s_2)^2."""
    means, stds = normal(2, 5).double(), normal(2, 5, seed=1).double().abs() + 0.1
    samples, reference = (with_moments(m, s, n, n) for m, s, n in zip(means, stds, (40, 70), strict=True))
    expected = (means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()
    assert frechet_distance(samples, reference) == pytest.approx(expected.item(), rel=1e-9)
    expected = (means[0] - means[1])[0] ** 2 + (stds[0] - stds[1])[0] ** 2
    assert frechet_distance(samples[:, :1], reference[:, :1]) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("dim", [2, 16])
def test_frechet_distance_equals_scipy(dim):
    samples, reference = normal(50, dim), normal(80, dim, seed=1) @ normal(dim, dim, seed=2) + 0.3
    x, y = samples.double().numpy(), reference.double().numpy()
    c_1, c_2 = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(c_1 @ c_2).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c_1 + c_2 - 2 * root)
    assert frechet_distance(samples, reference) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(reference, samples) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_equal_sets_is_zero():
    """Constant and identical features make the covariance rank-deficient."""
    features = normal(64, 32)
    features[:, 5] = 0
    features[:, 6] = features[:, 7]
    scale = torch.cov(features.T).trace().item()
    assert 0 <= frechet_distance(features, features) < 1e-9 * scale
    assert 0 <= frechet_distance(features, features.flip(0)) < 1e-9 * scale


@pytest.mark.parametrize("sizes", [(63, 100), (100, 63)])
def test_frechet_distance_rejects_too_few_features(sizes):
    samples, reference = (normal(size, 32) for size in sizes)
    with pytest.raises(ValueError, match=rf"at least 64 .*{sizes[0]} and {sizes[1]}.*feature_components"):
        frechet_distance(samples, reference)


def test_feature_components_equal_singular_value_decomposition():
    train = normal(50, 6) @ normal(6, 6, seed=1) + 3
    mean, basis = feature_components(train, 2)
    _, _, expected = np.linalg.svd(train.double().numpy() - mean.numpy(), full_matrices=False)
    np.testing.assert_allclose(mean, train.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(basis @ basis.T, expected[:2].T @ expected[:2], atol=1e-9)


def test_frechet_distance_is_invariant_under_projection_onto_all_components():
    train, samples, reference = normal(50, 6), normal(30, 6, seed=1), 2 * normal(40, 6, seed=2)
    mean, basis = feature_components(train, 6)
    projected = ((x.double() - mean) @ basis for x in (samples, reference))
    assert frechet_distance(*projected) == pytest.approx(frechet_distance(samples, reference), rel=1e-9)


@pytest.mark.parametrize("max_pairs", [2**24, 200], ids=["one chunk", "many chunks"])
def test_retrieval_ranks_equal_brute_force(monkeypatch, max_pairs):
    monkeypatch.setattr(neighbours, "MAX_PAIRS", max_pairs)
    gallery = normal(30, 5)
    queries = gallery[torch.arange(12) * 2] + 0.8 * normal(12, 5, seed=1)
    targets = torch.arange(12) * 2
    expected = []
    for query, i in zip(queries.numpy(), targets.tolist(), strict=True):
        cosines = gallery.numpy() @ query / np.linalg.norm(gallery.numpy(), axis=1) / np.linalg.norm(query)
        expected.append(int((cosines > cosines[i]).sum()))
    assert retrieval_ranks(queries, gallery, targets).tolist() == expected
    assert 0 in expected and max(expected) > 1
    assert retrieval_ranks(3 * gallery, gallery, torch.arange(30)).tolist() == [0] * 30, "only the direction matters"
