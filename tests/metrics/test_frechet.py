"""ldm.metrics.frechet against numpy, brute force and torchmetrics."""

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


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    images = draw(4, 3, 16, 16).mul(0.4).clamp(-1, 1)
    errors = draw(4, 3, 16, 16, seed=1) * torch.tensor([0.01, 0.1, 0.3, 1.0])[:, None, None, None]
    return images, (images + errors).clamp(-1, 1)


def test_psnr_is_that_of_8_bit_pictures(pair):
    """Mapped to 0..255, where the peak is 255."""
    first, second = ((x.double().numpy() + 1) * 127.5 for x in pair)
    expected = 10 * np.log10(255**2 / ((first - second) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(psnr(*pair).numpy(), expected, rtol=1e-4)
    torch.testing.assert_close(psnr(pair[0], pair[0]), torch.full((4,), 106.0206), rtol=0, atol=1e-3)


def test_ssim_against_its_formula(pair):
    """Wang et al. 2004 on 8-bit pictures, 11 x 11 Gaussian window of 1.5 pixels, edges mirrored."""
    t = np.arange(11) - 5
    window = np.exp(-(t**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def blur(x):
        padded = np.pad(x, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect")
        views = np.lib.stride_tricks.sliding_window_view(padded, (11, 11), axis=(2, 3))
        return (views * window).sum(axis=(-1, -2))

    x, y = ((part.double().numpy() + 1) * 127.5 for part in pair)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    np.testing.assert_allclose(ssim(*pair).numpy(), values.mean(axis=(1, 2, 3)), atol=1e-4)
    torch.testing.assert_close(ssim(pair[0], pair[0]), torch.ones(4))


def test_ssim_is_the_same_where_a_validation_runs_in_bfloat16(pair):
    expected = ssim(*pair)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim(*pair), expected)


@pytest.mark.parametrize(("factor", "channels"), [(2, 3), (4, 10), (2, 12)])
def test_pca_against_a_singular_value_decomposition(factor, channels):
    train, images = draw(60, 3, 8, 8).mul(0.2), draw(5, 3, 8, 8, seed=1).mul(0.2)
    train[:, 0] += train[:, 1]

    def patches(x):
        side = 8 // factor
        parts = x.double().numpy().reshape(len(x), 3, side, factor, side, factor)
        return parts.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * factor**2)

    mean = patches(train).mean(0)
    _, _, basis = np.linalg.svd(patches(train) - mean, full_matrices=False)
    basis = basis[:channels]
    expected = (patches(images) - mean) @ basis.T @ basis + mean
    found = pca_reconstruction(train, images, factor=factor, channels=channels)
    np.testing.assert_allclose(patches(found), expected.clip(-1, 1), atol=1e-5)


def test_mmd_of_two_features_by_hand():
    """Each feature's kernel with itself is left out: k(1, 2) = (1 * 2 + 1)^3 and so on, for d = 1."""
    within_samples, within_reference = (1 * 2 + 1) ** 3, (0 * 1 + 1) ** 3
    across = ((1 * 0 + 1) ** 3 + (1 * 1 + 1) ** 3 + (2 * 0 + 1) ** 3 + (2 * 1 + 1) ** 3) / 4
    found = _mmd2(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
    assert found.item() == pytest.approx(within_samples + within_reference - 2 * across)


def test_mmd_equals_torchmetrics_on_whole_sets():
    samples, reference = draw(40, 8).double(), draw(40, 8, seed=1).double() * 1.2 + 0.1
    torch.testing.assert_close(_mmd2(samples, reference), poly_mmd(samples, reference), rtol=1e-9, atol=1e-12)


def test_kernel_distance_averages_disjoint_subsets():
    samples, reference = draw(43, 8).double(), draw(50, 8, seed=1).double() + 0.3
    generator = torch.Generator().manual_seed(7)
    parts = [x[torch.randperm(len(x), generator=generator)[:40]].split(10) for x in (samples, reference)]
    values = [poly_mmd(a, b).item() for a, b in zip(*parts, strict=True)]
    mean, error = kernel_distance(samples, reference, seed=7)
    assert mean == pytest.approx(np.mean(values), rel=1e-9)
    assert error == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Between sets of one distribution it is zero on average, not positive as distances are."""
    means, errors = np.transpose(
        [kernel_distance(draw(64, 4, seed=2 * i), draw(64, 4, seed=2 * i + 1), seed=i) for i in range(150)]
    )
    assert abs(means.mean()) < 3 * means.std(ddof=1) / np.sqrt(150)
    assert (means < 0).mean() > 0.3
    assert errors.mean() == pytest.approx(means.std(ddof=1), rel=0.3), "the error that it states is the one it makes"


def test_kernel_distance_of_pairs_against_a_sum_over_them():
    """Gretton et al. 2012, eq. 4: h(i, j) = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) over i != j."""
    x, y = draw(8, 3).double(), draw(8, 3, seed=1).double()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    values = []
    for part in order.split(4):
        pairs = [(i, j) for i in part for j in part if i != j]
        values.append(np.mean([k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs]))
    mean, error = kernel_distance(x, y, num_subsets=2, seed=5, paired=True)
    assert mean == pytest.approx(np.mean(values), rel=1e-9)
    assert error == pytest.approx(np.std(values, ddof=1) / 2**0.5, rel=1e-9)
    assert kernel_distance(x, x, paired=True)[0] == pytest.approx(0, abs=1e-12)


def test_kernel_distance_of_dependent_pairs_is_unbiased():
    """y = -x has the distribution of x: the distance is zero on average with every pair in one subset."""
    means = [kernel_distance(x := draw(16, 2, seed=i), -x, num_subsets=2, paired=True)[0] for i in range(400)]
    assert abs(np.mean(means)) < 3 * np.std(means, ddof=1) / 20


def with_moments(mean: torch.Tensor, std: torch.Tensor, num: int, seed: int) -> torch.Tensor:
    """A set whose sample mean is `mean` and whose sample covariance is diag(std^2), exactly."""
    x = draw(num, len(mean), seed=seed).double()
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return whitened * std + mean


def test_frechet_distance_of_gaussians_with_diagonal_covariance():
    """|m_1 - m_2|^2 + sum (s_1 - s_2)^2."""
    means, stds = draw(2, 5).double(), draw(2, 5, seed=1).double().abs() + 0.1
    first, second = (with_moments(m, s, n, n) for m, s, n in zip(means, stds, (40, 70), strict=True))
    expected = (means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)
    one = frechet_distance(first[:, :1], second[:, :1])
    assert one == pytest.approx(((means[0] - means[1])[0] ** 2 + (stds[0] - stds[1])[0] ** 2).item(), rel=1e-9)


@pytest.mark.parametrize("dim", [2, 16])
def test_frechet_distance_against_scipy(dim):
    samples, reference = draw(50, dim), draw(80, dim, seed=1) @ draw(dim, dim, seed=2) + 0.3
    x, y = samples.double().numpy(), reference.double().numpy()
    c_1, c_2 = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(c_1 @ c_2).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c_1 + c_2 - 2 * root)
    assert frechet_distance(samples, reference) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(reference, samples) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_equal_sets():
    """Also where features are constant or repeat each other, whose covariance has no full rank."""
    features = draw(64, 32)
    features[:, 5] = 0
    features[:, 6] = features[:, 7]
    scale = torch.cov(features.T).trace().item()
    assert 0 <= frechet_distance(features, features) < 1e-9 * scale
    assert 0 <= frechet_distance(features, features.flip(0)) < 1e-9 * scale


@pytest.mark.parametrize("sizes", [(63, 100), (100, 63)])
def test_too_few_features_for_a_frechet_distance(sizes):
    first, second = (draw(size, 32) for size in sizes)
    with pytest.raises(ValueError, match="needs 64 of each at least. Use its PCA form"):
        frechet_distance(first, second)


def test_feature_components_against_a_singular_value_decomposition():
    train = draw(50, 6) @ draw(6, 6, seed=1) + 3
    mean, basis = feature_components(train, 2)
    _, _, expected = np.linalg.svd(train.double().numpy() - mean.numpy(), full_matrices=False)
    np.testing.assert_allclose(mean, train.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(basis @ basis.T, expected[:2].T @ expected[:2], atol=1e-9)


def test_a_frechet_distance_in_every_component_is_that_without():
    train, samples, reference = draw(50, 6), draw(30, 6, seed=1), 2 * draw(40, 6, seed=2)
    mean, basis = feature_components(train, 6)
    projected = ((x.double() - mean) @ basis for x in (samples, reference))
    assert frechet_distance(*projected) == pytest.approx(frechet_distance(samples, reference), rel=1e-9)


@pytest.mark.parametrize("most", [2**24, 200], ids=["one part", "many parts"])
def test_retrieval_ranks_against_brute_force(monkeypatch, most):
    monkeypatch.setattr(neighbours, "MOST_PAIRS", most)
    gallery = draw(30, 5)
    queries = gallery[torch.arange(12) * 2] + 0.8 * draw(12, 5, seed=1)
    own = torch.arange(12) * 2
    expected = []
    for query, i in zip(queries.numpy(), own.tolist(), strict=True):
        cosines = gallery.numpy() @ query / np.linalg.norm(gallery.numpy(), axis=1) / np.linalg.norm(query)
        expected.append(int((cosines > cosines[i]).sum()))
    found = retrieval_ranks(queries, gallery, own)
    assert found.tolist() == expected
    assert 0 in expected and max(expected) > 1
    assert retrieval_ranks(3 * gallery, gallery, torch.arange(30)).tolist() == [0] * 30, "whatever its length"
