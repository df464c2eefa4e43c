"""Tests of duplicates, density, coverage and diversity against brute force, hand-computed cases and closed forms."""

import math

import numpy as np
import pytest
import torch

from ldm.evaluation.data.report import caption_statistics, class_balance
from ldm.metrics import neighbours
from ldm.metrics.duplicates import LEVEL, DuplicateIndex, dhash, near_duplicate_pairs, thumbnails
from ldm.metrics.kernel import vendi_score
from ldm.metrics.neighbours import density_coverage, expected_coverage, nearest_distances


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_images(count: int, seed: int = 0) -> torch.Tensor:
    """Return images [n, 3, 32, 32] with large patches of colour."""
    coarse = normal(count, 3, 4, 4, seed=seed).clamp(-1, 1)
    return torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(-1, 1)


def find_pairs(images: torch.Tensor, **options) -> set[tuple[int, int]]:
    options = {"max_bits": 4, "max_levels": 4, **options}
    chunks = near_duplicate_pairs(dhash(images), thumbnails(images), **options)
    return {tuple(pair) for pairs, _, _ in chunks for pair in pairs.tolist()}


# Duplicates


def test_hash_compares_neighbours_from_left_to_right():
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert dhash(ramp).all() and not dhash(-ramp).any() and not dhash(ramp.mT).any()
    one_cell = torch.full((1, 3, 8, 9), -0.5)
    one_cell[0, :, 2, 4] = 0.5
    assert dhash(one_cell).nonzero().tolist() == [[0, 2 * 8 + 3]]


def test_hash_ignores_noise_in_flat_regions():
    """The cell means vary by a third of a level, about as much as under compression noise."""
    flat = torch.zeros(20, 3, 32, 32)
    noisy = flat + 2 * LEVEL * normal(20, 3, 32, 32)
    assert not dhash(noisy).any() and dhash(noisy, margin=0.0).float().mean() > 0.3


def test_only_slightly_changed_images_are_near_duplicates():
    images = smooth_images(40)
    changed = images[3].add(0.02 * normal(3, 32, 32)).add(0.01).clamp(-1, 1)
    shrunk = torch.nn.functional.interpolate(images[5:6], size=24, mode="bilinear", antialias=True)
    resampled = torch.nn.functional.interpolate(shrunk, size=32, mode="bilinear")
    all_images = torch.cat([images, changed[None], resampled])
    assert find_pairs(all_images) == {(3, 40), (5, 41)}


def test_colours_distinguish_images_with_equal_hashes():
    """The images are two flags with the same grey values."""
    red, green = torch.zeros(3, 32, 32), torch.zeros(3, 32, 32)
    red[0, :, 10:20], green[1, :, 10:20] = 0.587, 0.299
    images = torch.stack([red, green])
    assert torch.equal(dhash(red[None]), dhash(green[None]))
    assert find_pairs(images) == set() and find_pairs(images, max_levels=255) == {(0, 1)}


@pytest.mark.parametrize("max_pairs", [350, 2**24], ids=["many chunks", "one chunk"])
def test_near_duplicate_pairs_equal_brute_force(monkeypatch, max_pairs):
    monkeypatch.setattr(neighbours, "MAX_PAIRS", max_pairs)
    hashes, colours = normal(50, 64) > 0, 0.03 * normal(50, 12, seed=1)
    expected = {}
    for i in range(50):
        for j in range(i + 1, 50):
            bits = (hashes[i] != hashes[j]).sum().item()
            levels = (colours[i] - colours[j]).double().square().mean().sqrt().item() * 127.5
            if bits <= 30 and levels <= 5.5:
                expected[i, j] = (bits, pytest.approx(levels, abs=1e-3))
    assert 50 < len(expected) < 1000
    chunks = near_duplicate_pairs(hashes, colours, max_bits=30, max_levels=5.5)
    pairs, bits, levels = map(torch.cat, zip(*chunks, strict=True))
    differences = zip(bits.tolist(), levels.tolist(), strict=True)
    assert dict(zip(map(tuple, pairs.tolist()), differences, strict=True)) == expected
    assert len(pairs) == len(expected), "each pair is listed once"


def test_duplicates_within_and_across_the_splits():
    """Image a is in the training split twice, b in both splits, c in the validation split twice, and d in training."""
    digests = [b"a", b"b", b"a", b"c", b"b", b"c", b"d"]
    duplicates = DuplicateIndex(digests, train=np.array([0, 1, 2, 6]), val=np.array([3, 4, 5]))
    assert duplicates.first_copy.tolist() == [0, 1, 0, 3, 1, 3, 6]
    assert duplicates.distinct_indices.tolist() == [0, 1, 3, 6]
    assert duplicates.copy_groups() == [[4, 1], [0, 2], [3, 5]]
    b_and_d, a_and_d = torch.tensor([[1, 3]]), torch.tensor([[0, 3]])  # rows of `distinct_indices`
    duplicates.add(b_and_d, torch.tensor([2]), torch.tensor([1.5]), max_stored=10)
    duplicates.add(a_and_d, torch.tensor([1]), torch.tensor([0.5]), max_stored=10)
    assert duplicates.closest_pairs() == [(4, 6, 2, 1.5), (0, 6, 1, 0.5)], "the pair across the splits comes first"
    train_near, val_near = duplicates.has_near_duplicate[:, duplicates.first_copy]
    assert train_near.tolist() == [True, True, True, False, True, False, True]
    assert val_near.tolist() == [False, False, False, False, False, False, True]
    duplicates.add(torch.tensor([[0, 1]]), torch.tensor([0]), torch.tensor([0.0]), max_stored=1)
    assert duplicates.closest_pairs() == [(4, 0, 0, 0.0)], "only `max_stored` pairs are stored"
    assert duplicates.num_pairs == 3, "all pairs are counted"


# Features


def brute_density_coverage(real, fake, k):
    real, fake = real.double().numpy(), fake.double().numpy()
    hits = np.zeros((len(real), len(fake)))
    for i, x in enumerate(real):
        radius = np.sort([np.linalg.norm(x - y) for j, y in enumerate(real) if j != i])[k - 1]
        hits[i] = [np.linalg.norm(x - y) < radius for y in fake]
    return hits.sum() / (k * len(fake)), hits.any(axis=1).mean()


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_equal_brute_force(monkeypatch, k):
    monkeypatch.setattr(neighbours, "MAX_PAIRS", 500)
    real, fake = normal(60, 8) + 3, 1.2 * normal(75, 8, seed=1) + 3.2
    assert density_coverage(real, fake, k=k) == pytest.approx(brute_density_coverage(real, fake, k), rel=1e-6)


def test_identical_sets_are_covered_and_distant_sets_are_not():
    real = normal(1500, 16)
    assert density_coverage(real, real) == (1.0, 1.0)
    assert density_coverage(real, real + 1000) == (0.0, 0.0)


def test_density_and_coverage_match_expected_values_for_identical_distributions():
    values = [density_coverage(normal(40, 3, seed=i), normal(60, 3, seed=1000 + i)) for i in range(200)]
    mean, error = np.mean(values, axis=0), np.std(values, axis=0) / 200**0.5
    expected = np.array([1.0, expected_coverage(40, 60)])
    print(f"density, coverage: {mean} +- {error}, expected {expected}")
    assert (abs(mean - expected) < 4 * error).all() and (error < 0.02).all()


def test_samples_from_one_of_two_modes_are_dense_and_cover_half():
    real = torch.cat([normal(100, 4), normal(100, 4, seed=1) + 50])
    density, coverage = density_coverage(real, normal(200, 4, seed=2))
    assert density == pytest.approx(1, abs=0.3) and coverage == pytest.approx(0.5, abs=0.05)


def test_nearest_distances_equal_brute_force(monkeypatch):
    monkeypatch.setattr(neighbours, "MAX_PAIRS", 200)
    gallery, rows = normal(90, 6) + 10, torch.tensor([4, 80, 33, 2, 7])
    expected = torch.cdist(gallery[rows].double(), gallery.double()).sort(dim=1).values.float()
    torch.testing.assert_close(nearest_distances(gallery[rows], gallery, k=3, self_rows=rows), expected[:, 1:4])
    moved = nearest_distances(gallery[rows] + 0.01, gallery)[:, 0]
    torch.testing.assert_close(moved, torch.full((5,), 0.01 * 6**0.5), atol=0, rtol=1e-2)


def test_vendi_score_counts_distinct_images():
    basis = torch.eye(16)
    assert vendi_score(basis[:6]) == pytest.approx(6)
    assert vendi_score(3 * basis[:1].repeat(50, 1)) == pytest.approx(1)
    assert vendi_score(basis[:4].repeat(25, 1)) == pytest.approx(4), "more images than dimensions"
    unequal = vendi_score(basis[[0] * 9 + [1]])
    assert unequal == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)))


def test_vendi_score_is_the_same_from_either_kernel_matrix():
    features = normal(40, 30).abs()
    unit = (features / features.norm(dim=1, keepdim=True)).double()
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / 40).clamp(min=1e-300)
    expected = math.exp(-(eigenvalues * eigenvalues.log()).sum())
    assert vendi_score(features) == pytest.approx(expected, rel=1e-5)
    padded = torch.cat([features, torch.zeros(40, 30)], dim=1)
    assert vendi_score(padded) == pytest.approx(expected, rel=1e-5)


# Classes and captions


def test_class_balance_counts_classes_and_computes_entropy():
    even = class_balance([0, 1, 2, 3] * 5, ["a", "b", "c", "d"])
    assert even["entropy_bits"] == pytest.approx(2) and even["effective_classes"] == pytest.approx(4)
    uneven = class_balance([1] * 3 + [0] + [None] * 2, ["few", "many", "none"])
    assert uneven["counts"] == {"many": 3, "few": 1, "none": 0} and list(uneven["counts"])[0] == "many"
    assert uneven["entropy_bits"] == pytest.approx(-0.75 * math.log2(0.75) + 0.25 * 2) and uneven["num_missing"] == 2
    assert class_balance([7, 7], None)["counts"] == {"7": 2} and str(class_balance([7], None)["entropy_bits"]) == "0.0"


def test_caption_statistics_count_captions_and_words():
    captions = ["A red heart", "a red heart", "", None, "  ", "women’s room", "a red heart"]
    statistics = caption_statistics(captions, num_most_frequent=2)
    assert (statistics["num_captions"], statistics["num_missing"], statistics["num_distinct"]) == (4, 3, 3)
    assert (statistics["fewest_words"], statistics["median_words"], statistics["most_words"]) == (2, 3, 3)
    assert statistics["lengths"] == {2: 1, 3: 3} and statistics["most_frequent"] == {"a red heart": 2, "A red heart": 1}
    assert statistics["most_frequent_words"] == {"a": 3, "red": 3}
    assert caption_statistics([None, ""])["num_captions"] == 0
