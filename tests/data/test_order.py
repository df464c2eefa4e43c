"""ldm.data.order: the order of training samples is a pure function of seed and step."""

from itertools import islice, product

import pytest

from ldm.data.order import StepBatches, batch_at, derive_seed


def take(batches: StepBatches, count: int) -> list[list[int]]:
    return list(islice(batches, count))


@pytest.mark.parametrize(("size", "batch_size"), [(10, 5), (10, 3), (7, 7), (5, 8)])
def test_every_epoch_is_a_permutation(size, batch_size):
    """Over as many steps as make whole epochs, also where batches pass over their ends."""
    drawn = [i for step in range(3 * size) for i in batch_at(step, size=size, batch_size=batch_size, seed=1)]
    epochs = [drawn[start : start + size] for start in range(0, len(drawn), size)]
    assert len(epochs) == 3 * batch_size
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


def test_a_batch_that_passes_over_an_epoch_ends_one_and_begins_the_next():
    drawn = [i for step in range(4) for i in batch_at(step, size=6, batch_size=4, seed=0)]
    assert batch_at(1, size=6, batch_size=4, seed=0) == drawn[4:8]
    assert sorted(drawn[:6]) == sorted(drawn[6:12]) == list(range(6))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [batch_at(epoch, size=50, batch_size=50, seed=seed) for epoch, seed in product(range(5), range(5))]
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("start", [1, 4, 11])
def test_a_start_at_k_equals_skipping_k(start):
    whole = take(StepBatches(10, 4, seed=3), start + 6)
    assert take(StepBatches(10, 4, seed=3, start=start), 6) == whole[start:]


def test_iterating_twice_begins_again():
    batches = StepBatches(10, 4, seed=3, start=2)
    assert take(batches, 3) == take(batches, 3)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_the_global_batch(num_ranks):
    ranks = [take(StepBatches(30, 8, seed=0, rank=rank, num_ranks=num_ranks), 9) for rank in range(num_ranks)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        whole = batch_at(step, size=30, batch_size=8, seed=0)
        assert {len(part) for part in parts} == {8 // num_ranks}
        assert sorted(i for part in parts for i in part) == sorted(whole)


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch_size=6 must be a multiple of the 4 processes"):
        StepBatches(30, 6, seed=0, num_ranks=4)


def test_seeds_do_not_collide_on_a_grid():
    """Small integers are what seeds, steps and ranks are; sums or products of them would collide at once."""
    grid = list(product(range(8), range(2000), range(8)))
    seeds = {derive_seed(*parts) for parts in grid}
    assert len(seeds) == len(grid)
    assert seeds.isdisjoint({derive_seed(*parts) for parts in product(range(100), range(100))})
    assert all(0 <= seed < 2**63 for seed in seeds), "torch's generators take 63 bits"


def test_the_order_of_the_parts_matters():
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(0) != derive_seed(0, 0)
