"""Tests of feature metrics, their standard errors, memorisation and class metrics against brute force."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ldm.evaluation.classifier import Classifier, class_accuracy, class_shift, predict_classes
from ldm.evaluation.samples.memorisation import nearest_by_cosine, nearest_training
from ldm.metrics import neighbours
from ldm.metrics.frechet import frechet_distance, frechet_replicates
from ldm.metrics.kernel import cmmd
from ldm.metrics.neighbours import precision_recall
from ldm.metrics.subsets import jackknife_error, mean_over_subsets


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frechet_with_error(*sets: torch.Tensor, **options) -> tuple[float, float]:
    value, replicates = frechet_replicates(*sets, **options)
    return value, jackknife_error(replicates)


@pytest.fixture(params=[2**24, 500], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch) -> None:
    """Run a test with one chunk of pairs and with many."""
    monkeypatch.setattr(neighbours, "MAX_PAIRS", request.param)


def test_precision_and_recall_equal_brute_force(chunks):
    samples, reference, k = 0.8 * normal(70, 3) + 0.5, normal(90, 3, seed=1), 3

    def fraction(points, manifold):
        radii = [np.sort(np.linalg.norm(manifold - x, axis=1))[k] for x in manifold]  # [0] is the distance to itself
        return np.mean([any(np.linalg.norm(y - x) <= r for x, r in zip(manifold, radii, strict=True)) for y in points])

    x, y = reference.double().numpy(), samples.double().numpy()
    precision, recall = precision_recall(samples, reference, k=k)
    assert precision == pytest.approx(fraction(y, x)) and recall == pytest.approx(fraction(x, y))
    assert 0.2 < recall < precision < 1


def test_precision_without_recall_and_recall_without_precision():
    """Samples from one of two modes are precise but miss half of the images. Distant samples reduce only precision."""
    images = torch.cat([normal(100, 4), normal(100, 4, seed=1) + 50])
    precision, recall = precision_recall(normal(100, 4, seed=2), images)
    assert precision > 0.85 and recall == pytest.approx(0.5, abs=0.1)
    precision, recall = precision_recall(torch.cat([images, images + 500]), images)
    assert precision == pytest.approx(0.5) and recall == 1
    assert precision_recall(images, images) == (1, 1)


def test_cmmd_equals_brute_force(chunks):
    samples, reference = normal(30, 6) + 0.3, normal(40, 6, seed=1)
    x, y = (
        f.double().numpy() / np.linalg.norm(f.double().numpy(), axis=1, keepdims=True) for f in (samples, reference)
    )

    def mean_kernel(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 10**2)).mean()

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(samples, reference) == pytest.approx(expected, rel=1e-8)
    assert cmmd(5 * samples, reference) == pytest.approx(expected, rel=1e-6), "independent of the features' lengths"
    assert cmmd(samples, samples) == pytest.approx(0, abs=1e-9)


def test_cmmd_has_the_documented_bias():
    """The test uses many dimensions, where random unit vectors are nearly orthogonal."""
    n, m = 50, 80
    mean = np.mean([cmmd(normal(n, 200, seed=2 * i), normal(m, 200, seed=2 * i + 1)) for i in range(20)])
    assert mean == pytest.approx(1000 * (1 / n + 1 / m) * (1 - math.exp(-2 / 200)), rel=0.02)


def test_jackknife_error_of_a_mean_is_its_standard_error():
    values = normal(20).double()
    replicates = torch.stack([values[torch.arange(20) != i].mean() for i in range(20)])
    assert jackknife_error(replicates) == pytest.approx((values.std() / 20**0.5).item(), rel=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_frechet_error_equals_its_formula(paired):
    """The jackknife removes paired rows together."""
    samples, reference = normal(83, 5), 1.5 * normal(83 if paired else 60, 5, seed=1) + 0.2
    value, error = frechet_with_error(samples, reference, num_groups=7, paired=paired)
    assert value == frechet_distance(samples, reference)
    subsets = [torch.arange(83) % 7 != i for i in range(7)]
    replicates = [frechet_distance(samples[rows], reference[rows] if paired else reference) for rows in subsets]
    assert error == pytest.approx(np.sqrt(6 / 7 * ((replicates - np.mean(replicates)) ** 2).sum()), rel=1e-4)


def test_frechet_error_equals_the_spread_over_draws():
    """The mean reported error equals the standard deviation of the distance over many draws of the samples."""
    reference = normal(400, 4)
    results = [frechet_with_error(normal(200, 4, seed=i) + 0.5, reference) for i in range(1, 80)]
    values, errors = np.transpose(results)
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(ddof=1), rel=0.2)


def test_paired_frechet_error_equals_the_spread_over_draws():
    """An image and its reconstruction are drawn together, so their errors largely cancel."""
    results = []
    for i in range(60):
        images = normal(200, 4, seed=i)
        results.append(frechet_with_error(0.7 * images + 0.3, images, paired=True))
    values, errors = np.transpose(results)
    spread = values.std(ddof=1)
    assert np.sqrt((errors**2).mean()) == pytest.approx(spread, rel=0.25)
    unpaired_error = frechet_with_error(0.7 * images + 0.3, images)[1]
    assert unpaired_error > 2 * spread, "the unpaired error treats the sets as independent"


def test_subsets_are_disjoint_and_equally_sized():
    calls = []

    def metric(a, b):
        assert a.dtype == b.dtype == torch.float64
        calls.append((a.flatten().tolist(), b.flatten().tolist()))
        return a.mean().item(), b.sum().item()

    samples, reference = torch.arange(43.0)[:, None], torch.arange(100.0, 150.0)[:, None]
    (mean, error), (total, _) = mean_over_subsets(metric, samples, reference, seed=3)
    for side, features in ((0, samples), (1, reference)):
        subsets = [pair[side] for pair in calls]
        assert [len(subset) for subset in subsets] == [10] * 4 and len({x for subset in subsets for x in subset}) == 40
        assert {x for subset in subsets for x in subset} <= set(features.flatten().tolist())
    means = [np.mean(pair[0]) for pair in calls]
    assert mean == pytest.approx(np.mean(means)) and error == pytest.approx(np.std(means, ddof=1) / 2)
    assert total == pytest.approx(np.mean([sum(pair[1]) for pair in calls]))


def test_nearest_by_cosine_equals_brute_force(chunks):
    queries, gallery = normal(25, 4), normal(130, 4, seed=1)
    distances, nearest = nearest_by_cosine(queries, gallery)
    x, y = (f.double().numpy() / np.linalg.norm(f.double().numpy(), axis=1, keepdims=True) for f in (queries, gallery))
    np.testing.assert_allclose(distances, (1 - x @ y.T).min(1), atol=1e-12)
    assert nearest.tolist() == (1 - x @ y.T).argmin(1).tolist()


def test_memorisation_flags_copies_but_not_new_images():
    train, validation = normal(2000, 8), normal(3000, 8, seed=1)
    samples = torch.cat([normal(180, 8, seed=2), 3 * train[40:60]])
    result = nearest_training(samples, train, validation)
    assert result.nearest_rows[180:].tolist() == list(range(40, 60)) and result.distances[180:].max() < 1e-9
    assert len(result.closest_samples) == 12
    assert set(result.closest_samples.tolist()) <= set(range(180, 200))
    assert result.threshold == pytest.approx(np.quantile(result.validation_distances.numpy(), 0.01))
    assert result.close_share == pytest.approx(0.1, abs=0.03)
    assert result.close_share_standard_error == pytest.approx(
        math.sqrt(result.close_share * (1 - result.close_share) * (1 / 200 + 1 / 3000))
    )
    clean = nearest_training(normal(4000, 8, seed=3), train, normal(4000, 8, seed=4))
    assert clean.close_share == pytest.approx(0.01, abs=3 * clean.close_share_standard_error)


def test_error_of_close_share_includes_threshold_error():
    """With few held-out images, the threshold error dominates: the threshold is one of the smallest distances."""
    train = normal(400, 4)
    sets = [(normal(400, 4, seed=2 * i), normal(150, 4, seed=2 * i + 1)) for i in range(1, 81)]
    results = [nearest_training(samples, train, validation) for samples, validation in sets]
    shares = np.array([result.close_share for result in results])
    smallest_error = math.sqrt(0.01 * 0.99 * (1 / 400 + 1 / 150))
    reported = np.array([result.close_share_standard_error for result in results])
    assert (reported >= smallest_error - 1e-12).all()
    assert np.sqrt((reported**2).mean()) == pytest.approx(shares.std(ddof=1), rel=0.35)
    sampling_error = np.sqrt((shares.clip(0.01) * (1 - shares.clip(0.01)) / 400).mean())
    assert sampling_error < 0.7 * shares.std(ddof=1)


def test_class_accuracy_counts_correct_predictions():
    classifier = Classifier(2).eval()
    torch.nn.init.zeros_(classifier.head.bias)
    classifier.head.weight.data = torch.zeros(2, Classifier.dim)
    classifier.head.weight.data[1, 0] = 1
    labels = torch.tensor([0, 1] * 50)
    features = torch.nn.functional.pad((2.0 * labels - 1)[:, None], (0, Classifier.dim - 1))
    features[:7] *= -1
    accuracy, error = class_accuracy(predict_classes(classifier, features), labels)
    assert accuracy == pytest.approx(0.93) and error == pytest.approx(math.sqrt(0.93 * 0.07 / 100))


def test_class_shift_of_known_distributions():
    reference = torch.arange(1000) % 10
    assert class_shift(reference.flip(0), reference)[0] == pytest.approx(0, abs=1e-12)
    without_class_3 = reference[reference != 3]
    shift, error = class_shift(without_class_3, reference)
    assert shift == pytest.approx(0.1) and error < 0.01
    assert class_shift(torch.full((100,), 12), reference)[0] == pytest.approx(1)


def test_class_shift_error_equals_the_spread_over_draws():
    """If two classes have probabilities p > 1/2 and 1 - p, the class shift is p - 1/2 with the standard error of p."""
    reference = torch.arange(1000) % 2
    generator = torch.Generator().manual_seed(0)
    results = [class_shift((torch.rand(400, generator=generator) < 0.8).long(), reference) for _ in range(60)]
    values, errors = np.transpose(results)
    assert np.sqrt((errors**2).mean()) == pytest.approx(math.sqrt(0.8 * 0.2 / 400), rel=0.15)
    assert abs(values.mean() - 0.3) < norm.ppf(0.999) * math.sqrt(0.8 * 0.2 / 400 / 60)
