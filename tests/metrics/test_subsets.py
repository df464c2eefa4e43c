"""ldm.metrics.subsets and memorisation against brute force, scipy and known cases."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ldm.evaluation.classifier import Classifier, class_accuracy, class_shift, named_classes
from ldm.evaluation.samples.memorisation import nearest_by_cosine, nearest_training
from ldm.metrics import neighbours
from ldm.metrics.frechet import frechet_distance, frechet_replicates
from ldm.metrics.kernel import cmmd
from ldm.metrics.neighbours import precision_recall
from ldm.metrics.subsets import jackknife_error, over_subsets


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frechet_interval(*sets: torch.Tensor, **options) -> tuple[float, float]:
    value, without = frechet_replicates(*sets, **options)
    return value, jackknife_error(without)


@pytest.fixture(params=[2**24, 500], ids=["one part", "many parts"])
def parts(request, monkeypatch) -> None:
    monkeypatch.setattr(neighbours, "MOST_PAIRS", request.param)


def test_precision_and_recall_are_those_of_brute_force(parts):
    samples, reference, k = 0.8 * draw(70, 3) + 0.5, draw(90, 3, seed=1), 3

    def share(points, ground):
        radii = [np.sort(np.linalg.norm(ground - x, axis=1))[k] for x in ground]  # [0] is the distance to itself
        return np.mean([any(np.linalg.norm(y - x) <= r for x, r in zip(ground, radii, strict=True)) for y in points])

    x, y = reference.double().numpy(), samples.double().numpy()
    precision, recall = precision_recall(samples, reference, k=k)
    assert precision == pytest.approx(share(y, x)) and recall == pytest.approx(share(x, y))
    assert 0.2 < recall < precision < 1


def test_precision_without_recall_and_the_other_way_round():
    """Samples of one half of the images are all good and miss the other half; samples far off are the reverse."""
    images = torch.cat([draw(100, 4), draw(100, 4, seed=1) + 50])
    precision, recall = precision_recall(draw(100, 4, seed=2), images)
    assert precision > 0.85 and recall == pytest.approx(0.5, abs=0.1)
    precision, recall = precision_recall(torch.cat([images, images + 500]), images)
    assert precision == pytest.approx(0.5) and recall == 1
    assert precision_recall(images, images) == (1, 1)


def test_cmmd_is_that_of_brute_force(parts):
    samples, reference = draw(30, 6) + 0.3, draw(40, 6, seed=1)
    x, y = (
        f.double().numpy() / np.linalg.norm(f.double().numpy(), axis=1, keepdims=True) for f in (samples, reference)
    )

    def mean_kernel(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 10**2)).mean()

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(samples, reference) == pytest.approx(expected, rel=1e-8)
    assert cmmd(5 * samples, reference) == pytest.approx(expected, rel=1e-6), "lengths do not count"
    assert cmmd(samples, samples) == pytest.approx(0, abs=1e-9)


def test_cmmd_is_above_0_by_what_its_docstring_says():
    """The V-statistic of n and m of one distribution, in many dimensions, where unit vectors are at a right angle."""
    n, m = 50, 80
    found = np.mean([cmmd(draw(n, 200, seed=2 * i), draw(m, 200, seed=2 * i + 1)) for i in range(20)])
    assert found == pytest.approx(1000 * (1 / n + 1 / m) * (1 - math.exp(-2 / 200)), rel=0.02)


def test_jackknife_error_of_a_mean_is_the_standard_error():
    values = draw(20).double()
    without = torch.stack([values[torch.arange(20) != i].mean() for i in range(20)])
    assert jackknife_error(without) == pytest.approx((values.std() / 20**0.5).item(), rel=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_frechet_interval_against_its_formula(paired):
    """Pairs are left out together."""
    samples, reference = draw(83, 5), 1.5 * draw(83 if paired else 60, 5, seed=1) + 0.2
    value, error = frechet_interval(samples, reference, num_groups=7, paired=paired)
    assert value == frechet_distance(samples, reference)
    kept = [torch.arange(83) % 7 != i for i in range(7)]
    without = np.array([frechet_distance(samples[rows], reference[rows] if paired else reference) for rows in kept])
    assert error == pytest.approx(np.sqrt(6 / 7 * ((without - without.mean()) ** 2).sum()), rel=1e-4)


def test_frechet_interval_states_the_error_that_is_made():
    """Over many draws of samples the spread of the distance is what each draw says of itself."""
    reference = draw(400, 4)
    found = np.array([frechet_interval(draw(200, 4, seed=i) + 0.5, reference) for i in range(1, 80)])
    assert np.sqrt((found[:, 1] ** 2).mean()) == pytest.approx(found[:, 0].std(ddof=1), rel=0.2)


def test_the_error_of_pairs_is_the_error_that_is_made():
    """A blurred image stays beside its original: what one side moves by, both do."""
    found = []
    for i in range(60):
        images = draw(200, 4, seed=i)
        found.append(frechet_interval(0.7 * images + 0.3, images, paired=True))
    found = np.array(found)
    spread = found[:, 0].std(ddof=1)
    assert np.sqrt((found[:, 1] ** 2).mean()) == pytest.approx(spread, rel=0.25)
    alone = frechet_interval(0.7 * images + 0.3, images)[1]
    assert alone > 2 * spread, "as if the images were drawn anew"


def test_over_subsets_are_disjoint_and_of_one_size():
    seen = []

    def metric(a, b):
        assert a.dtype == b.dtype == torch.float64
        seen.append((a.flatten().tolist(), b.flatten().tolist()))
        return a.mean().item(), b.sum().item()

    samples, reference = torch.arange(43.0)[:, None], torch.arange(100.0, 150.0)[:, None]
    (first, error), (second, _) = over_subsets(metric, samples, reference, seed=3)
    for side, whole in ((0, samples), (1, reference)):
        parts = [part[side] for part in seen]
        assert [len(part) for part in parts] == [10] * 4 and len({x for part in parts for x in part}) == 40
        assert {x for part in parts for x in part} <= set(whole.flatten().tolist())
    means = [np.mean(part[0]) for part in seen]
    assert first == pytest.approx(np.mean(means)) and error == pytest.approx(np.std(means, ddof=1) / 2)
    assert second == pytest.approx(np.mean([sum(part[1]) for part in seen]))


def test_nearest_by_cosine_is_that_of_brute_force(parts):
    queries, gallery = draw(25, 4), draw(130, 4, seed=1)
    distances, nearest = nearest_by_cosine(queries, gallery)
    x, y = (f.double().numpy() / np.linalg.norm(f.double().numpy(), axis=1, keepdims=True) for f in (queries, gallery))
    np.testing.assert_allclose(distances, (1 - x @ y.T).min(1), atol=1e-12)
    assert nearest.tolist() == (1 - x @ y.T).argmin(1).tolist()


def test_copies_are_found_and_new_images_are_not():
    train, validation = draw(2000, 8), draw(3000, 8, seed=1)
    samples = torch.cat([draw(180, 8, seed=2), 3 * train[40:60]])
    found = nearest_training(samples, train, validation)
    assert found.nearest[180:].tolist() == list(range(40, 60)) and found.distances[180:].max() < 1e-9
    assert len(found.closest) == 12
    assert set(found.closest.tolist()) <= set(range(180, 200))
    assert found.threshold == pytest.approx(np.quantile(found.validation_distances.numpy(), 0.01))
    assert found.close_share == pytest.approx(0.1, abs=0.03)
    assert found.close_share_standard_error == pytest.approx(
        math.sqrt(found.close_share * (1 - found.close_share) * (1 / 200 + 1 / 3000))
    )
    clean = nearest_training(draw(4000, 8, seed=3), train, draw(4000, 8, seed=4))
    assert clean.close_share == pytest.approx(0.01, abs=3 * clean.close_share_standard_error)


def test_the_error_of_what_is_close_holds_that_of_the_threshold():
    """With few held-out images most of it: their 1st percentile is one of the first distances."""
    train = draw(400, 4)
    found = [nearest_training(draw(400, 4, seed=2 * i), train, draw(150, 4, seed=2 * i + 1)) for i in range(1, 81)]
    shares = np.array([one.close_share for one in found])
    errors = np.array([math.sqrt(0.01 * 0.99 * (1 / 400 + 1 / 150)) for _ in found])
    stated = np.array([one.close_share_standard_error for one in found])
    assert (stated >= errors - 1e-12).all()
    assert np.sqrt((stated**2).mean()) == pytest.approx(shares.std(ddof=1), rel=0.35)
    of_samples_alone = np.sqrt((shares.clip(0.01) * (1 - shares.clip(0.01)) / 400).mean())
    assert of_samples_alone < 0.7 * shares.std(ddof=1)


def test_class_accuracy_counts_what_is_right():
    classifier = Classifier(2).eval()
    torch.nn.init.zeros_(classifier.head.bias)
    classifier.head.weight.data = torch.zeros(2, Classifier.dim)
    classifier.head.weight.data[1, 0] = 1
    labels = torch.tensor([0, 1] * 50)
    features = torch.nn.functional.pad((2.0 * labels - 1)[:, None], (0, Classifier.dim - 1))
    features[:7] *= -1
    share, error = class_accuracy(named_classes(classifier, features), labels)
    assert share == pytest.approx(0.93) and error == pytest.approx(math.sqrt(0.93 * 0.07 / 100))


def test_class_shift_of_known_shares():
    reference = torch.arange(1000) % 10
    assert class_shift(reference.flip(0), reference)[0] == pytest.approx(0, abs=1e-12)
    without = reference[reference != 3]
    shift, error = class_shift(without, reference)
    assert shift == pytest.approx(0.1) and error < 0.01
    assert class_shift(torch.full((100,), 12), reference)[0] == pytest.approx(1)


def test_class_shift_states_the_error_that_is_made():
    """Two classes, far from equal shares: TV is p - 1/2, and its error that of counting p."""
    reference = torch.arange(1000) % 2
    generator = torch.Generator().manual_seed(0)
    found = [class_shift((torch.rand(400, generator=generator) < 0.8).long(), reference) for _ in range(60)]
    values, errors = np.transpose(found)
    assert np.sqrt((errors**2).mean()) == pytest.approx(math.sqrt(0.8 * 0.2 / 400), rel=0.15)
    assert abs(values.mean() - 0.3) < norm.ppf(0.999) * math.sqrt(0.8 * 0.2 / 400 / 60)
