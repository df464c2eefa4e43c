"""ldm.metrics.duplicates against brute force, counting by hand, and what is known in closed form."""

import math

import numpy as np
import pytest
import torch

from ldm.evaluation.data.report import caption_statistics, class_balance
from ldm.metrics import neighbours
from ldm.metrics.duplicates import LEVEL, Copies, dhash, near_pairs, thumbnails
from ldm.metrics.kernel import vendi_score
from ldm.metrics.neighbours import density_coverage, expected_coverage, nearest_distances


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(count: int, seed: int = 0) -> torch.Tensor:
    """Images [n, 3, 32, 32] with large patches of colour."""
    return torch.nn.functional.interpolate(draw(count, 3, 4, 4, seed=seed).clamp(-1, 1), size=32, mode="bicubic").clamp(
        -1, 1
    )


def pairs_of(images: torch.Tensor, **options) -> set[tuple[int, int]]:
    options = {"max_bits": 4, "max_levels": 4, **options}
    found = near_pairs(dhash(images), thumbnails(images), **options)
    return {tuple(pair) for pairs, _, _ in found for pair in pairs.tolist()}


# Copies


def test_the_hash_compares_neighbours_from_left_to_right():
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert dhash(ramp).all() and not dhash(-ramp).any() and not dhash(ramp.mT).any()
    one_cell = torch.full((1, 3, 8, 9), -0.5)
    one_cell[0, :, 2, 4] = 0.5
    assert dhash(one_cell).nonzero().tolist() == [[0, 2 * 8 + 3]]


def test_noise_on_flat_ground_leaves_the_hash_alone():
    """A third of a level, about what compression leaves in the mean of a cell."""
    flat = torch.zeros(20, 3, 32, 32)
    noisy = flat + 2 * LEVEL * draw(20, 3, 32, 32)
    assert not dhash(noisy).any() and dhash(noisy, margin=0.0).float().mean() > 0.3


def test_a_slightly_changed_image_is_found_and_no_other():
    images = smooth(40)
    changed = images[3].add(0.02 * draw(3, 32, 32)).add(0.01).clamp(-1, 1)
    shrunk = torch.nn.functional.interpolate(images[5:6], size=24, mode="bilinear", antialias=True)
    resampled = torch.nn.functional.interpolate(shrunk, size=32, mode="bilinear")
    everything = torch.cat([images, changed[None], resampled])
    assert pairs_of(everything) == {(3, 40), (5, 41)}


def test_colours_tell_apart_what_has_the_same_hash():
    """Two flags of the same grey."""
    red, green = torch.zeros(3, 32, 32), torch.zeros(3, 32, 32)
    red[0, :, 10:20], green[1, :, 10:20] = 0.587, 0.299
    images = torch.stack([red, green])
    assert torch.equal(dhash(red[None]), dhash(green[None]))
    assert pairs_of(images) == set() and pairs_of(images, max_levels=255) == {(0, 1)}


@pytest.mark.parametrize("most", [350, 2**24], ids=["many parts", "one part"])
def test_near_pairs_are_those_of_brute_force(monkeypatch, most):
    monkeypatch.setattr(neighbours, "MOST_PAIRS", most)
    hashes, colours = draw(50, 64) > 0, 0.03 * draw(50, 12, seed=1)
    brute = {}
    for i in range(50):
        for j in range(i + 1, 50):
            bits = (hashes[i] != hashes[j]).sum().item()
            levels = (colours[i] - colours[j]).double().square().mean().sqrt().item() * 127.5
            if bits <= 30 and levels <= 5.5:
                brute[i, j] = (bits, pytest.approx(levels, abs=1e-3))
    assert 50 < len(brute) < 1000
    pairs, bits, levels = map(torch.cat, zip(*near_pairs(hashes, colours, max_bits=30, max_levels=5.5), strict=True))
    found = zip(bits.tolist(), levels.tolist(), strict=True)
    assert dict(zip(map(tuple, pairs.tolist()), found, strict=True)) == brute and len(pairs) == len(brute)


def test_copies_within_and_between_the_splits():
    """a in training twice, b in both, c in validation twice, d alone and near to b."""
    digests = [b"a", b"b", b"a", b"c", b"b", b"c", b"d"]
    copies = Copies(digests, train=np.array([0, 1, 2, 6]), val=np.array([3, 4, 5]))
    assert copies.first.tolist() == [0, 1, 0, 3, 1, 3, 6] and copies.distinct.tolist() == [0, 1, 3, 6]
    assert copies.groups() == [[4, 1], [0, 2], [3, 5]]
    copies.add(torch.tensor([[1, 3]]), torch.tensor([2]), torch.tensor([1.5]), keep=10)  # rows of distinct: b and d
    copies.add(torch.tensor([[0, 3]]), torch.tensor([1]), torch.tensor([0.5]), keep=10)  # a and d, both in training
    assert copies.near() == [(4, 6, 2, 1.5), (0, 6, 1, 0.5)], "across the splits first, validation in front"
    train_near, val_near = copies.is_near[:, copies.first]
    assert train_near.tolist() == [True, True, True, False, True, False, True]
    assert val_near.tolist() == [False, False, False, False, False, False, True]
    copies.add(torch.tensor([[0, 1]]), torch.tensor([0]), torch.tensor([0.0]), keep=1)
    assert copies.near() == [(4, 0, 0, 0.0)] and copies.num_pairs == 3, "few are kept, all are counted"


# Features


def brute_density_coverage(real, fake, k):
    real, fake = real.double().numpy(), fake.double().numpy()
    hits = np.zeros((len(real), len(fake)))
    for i, x in enumerate(real):
        radius = np.sort([np.linalg.norm(x - other) for j, other in enumerate(real) if j != i])[k - 1]
        hits[i] = [np.linalg.norm(x - y) < radius for y in fake]
    return hits.sum() / (k * len(fake)), hits.any(axis=1).mean()


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_are_those_of_brute_force(monkeypatch, k):
    monkeypatch.setattr(neighbours, "MOST_PAIRS", 500)
    real, fake = draw(60, 8) + 3, 1.2 * draw(75, 8, seed=1) + 3.2
    assert density_coverage(real, fake, k=k) == pytest.approx(brute_density_coverage(real, fake, k), rel=1e-6)


def test_identical_sets_cover_each_other_and_disjoint_ones_do_not():
    real = draw(1500, 16)
    assert density_coverage(real, real) == (1.0, 1.0)
    assert density_coverage(real, real + 1000) == (0.0, 0.0)


def test_they_have_their_expectation_where_both_are_from_one_distribution():
    draws = [density_coverage(draw(40, 3, seed=i), draw(60, 3, seed=1000 + i)) for i in range(200)]
    mean, error = np.mean(draws, axis=0), np.std(draws, axis=0) / 200**0.5
    expected = np.array([1.0, expected_coverage(40, 60)])
    print(f"density, coverage: {mean} +- {error}, expected {expected}")
    assert (abs(mean - expected) < 4 * error).all() and (error < 0.02).all()


def test_one_of_two_modes_is_dense_and_covers_half():
    real = torch.cat([draw(100, 4), draw(100, 4, seed=1) + 50])
    density, coverage = density_coverage(real, draw(200, 4, seed=2))
    assert density == pytest.approx(1, abs=0.3) and coverage == pytest.approx(0.5, abs=0.05)


def test_nearest_distances_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr(neighbours, "MOST_PAIRS", 200)
    gallery, rows = draw(90, 6) + 10, torch.tensor([4, 80, 33, 2, 7])
    expected = torch.cdist(gallery[rows].double(), gallery.double()).sort(dim=1).values.float()
    torch.testing.assert_close(nearest_distances(gallery[rows], gallery, k=3, own=rows), expected[:, 1:4])
    moved = nearest_distances(gallery[rows] + 0.01, gallery)[:, 0]
    torch.testing.assert_close(moved, torch.full((5,), 0.01 * 6**0.5), atol=0, rtol=1e-2)


def test_the_vendi_score_counts_what_differs():
    basis = torch.eye(16)
    assert vendi_score(basis[:6]) == pytest.approx(6)
    assert vendi_score(3 * basis[:1].repeat(50, 1)) == pytest.approx(1)
    assert vendi_score(basis[:4].repeat(25, 1)) == pytest.approx(4), "more images than dimensions, and no more of them"
    unequal = vendi_score(basis[[0] * 9 + [1]])
    assert unequal == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)))


def test_the_vendi_score_is_the_same_by_images_and_by_dimensions():
    features = draw(40, 30).abs()
    unit = (features / features.norm(dim=1, keepdim=True)).double()
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / 40).clamp(min=1e-300)
    expected = math.exp(-(eigenvalues * eigenvalues.log()).sum())
    assert vendi_score(features) == pytest.approx(expected, rel=1e-5)
    padded = torch.cat([features, torch.zeros(40, 30)], dim=1)
    assert vendi_score(padded) == pytest.approx(expected, rel=1e-5)


# Classes and captions


def test_balance_of_classes():
    even = class_balance([0, 1, 2, 3] * 5, ["a", "b", "c", "d"])
    assert even["entropy_bits"] == pytest.approx(2) and even["effective_classes"] == pytest.approx(4)
    uneven = class_balance([1] * 3 + [0] + [None] * 2, ["few", "many", "none"])
    assert uneven["counts"] == {"many": 3, "few": 1, "none": 0} and list(uneven["counts"])[0] == "many"
    assert uneven["entropy_bits"] == pytest.approx(-0.75 * math.log2(0.75) + 0.25 * 2) and uneven["num_missing"] == 2
    assert class_balance([7, 7], None)["counts"] == {"7": 2} and str(class_balance([7], None)["entropy_bits"]) == "0.0"


def test_statistics_of_captions():
    found = caption_statistics(["A red heart", "a red heart", "", None, "  ", "women’s room", "a red heart"], most=2)
    assert (found["num_captions"], found["num_missing"], found["num_distinct"]) == (4, 3, 3)
    assert (found["fewest_words"], found["median_words"], found["most_words"]) == (2, 3, 3)
    assert found["lengths"] == {2: 1, 3: 3} and found["most_frequent"] == {"a red heart": 2, "A red heart": 1}
    assert found["most_frequent_words"] == {"a": 3, "red": 3}
    assert caption_statistics([None, ""])["num_captions"] == 0
