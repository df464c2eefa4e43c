"""ldm.data.order: the order of training samples is a pure function of seed and step."""

from itertools import islice, product

import pytest
import torch

from ldm.data.order import StepBatches, batch_at, draws_of_epoch, part_rows, visits_at
from ldm.diffusion.loss import sample_timesteps
from ldm.errors import UserError
from ldm.runtime.random import Draws, derive_seed


def take(batches: StepBatches, count: int) -> list[list[tuple[int, int]]]:
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


def test_a_visit_is_an_epoch_and_a_position():
    visits = [visit for step in range(9) for visit in visits_at(step, size=7, batch_size=5, seed=3)]
    assert [epoch for epoch, _ in visits] == [i // 7 for i in range(45)]
    assert [position for _, position in visits[5:10]] == batch_at(1, size=7, batch_size=5, seed=3)


def test_draws_of_an_epoch_depend_on_seed_and_epoch_alone():
    draws = [draws_of_epoch(1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(((part >= 0) & (part < 1)).all() and 0.45 < part.mean() < 0.55 for part in draws)
    assert len({tuple(part.tolist()) for part in draws}) == 3
    draws_of_epoch.cache_clear()
    assert torch.equal(draws_of_epoch(1000, 0, 1), draws[1])


def test_iterating_twice_begins_again():
    batches = StepBatches(10, 4, seed=3, start=2)
    assert take(batches, 3) == take(batches, 3)


@pytest.mark.parametrize(("accumulate", "num_ranks"), [(1, 1), (1, 2), (1, 4), (2, 1), (8, 1), (2, 2)])
def test_micro_batches_and_ranks_share_the_batch_of_a_step(accumulate, num_ranks):
    """In the order of `part_rows`, so that draws and samples are of the same rows."""
    parts = {"accumulate": accumulate, "num_ranks": num_ranks}
    ranks = [take(StepBatches(30, 8, seed=0, rank=rank, **parts), 9 * accumulate) for rank in range(num_ranks)]
    count = 8 // (accumulate * num_ranks)
    for step in range(9):
        whole, found = visits_at(step, size=30, batch_size=8, seed=0), [(-1, -1)] * 8
        for rank, micro_batch in product(range(num_ranks), range(accumulate)):
            rows = part_rows(micro_batch, rank, num_ranks, count)
            found[rows.start : rows.stop] = ranks[rank][step * accumulate + micro_batch]
        assert found == whole


def test_a_batch_that_does_not_part_evenly_is_refused():
    rule = "batch_size=12 must be a multiple of 8: 4 processes times trainer.accumulate_grad_batches=2"
    with pytest.raises(UserError, match=rule):
        StepBatches(30, 12, seed=0, accumulate=2, num_ranks=4)


DRAWS = [
    lambda draws, count: draws.randn((count, 3, 5)),
    lambda draws, count: draws.rand((count, 1)),
    lambda draws, count: draws.randint(0, 1000),
    lambda draws, count: draws.randn((count, 4, 8, 8)),
    lambda draws, count: draws.draw(lambda n, generator: sample_timesteps(1000, n, "logit_normal", generator)),
]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 16, 20, 40])
def test_a_part_of_a_step_draws_bit_for_bit_its_rows_of_the_whole(count):
    """Whatever its size, one row, fewer than share a generator, or more."""
    whole = Draws(3, 7, range(80))
    parts = [Draws(3, 7, range(first, first + count)) for first in range(0, 80, count)]
    for draw in DRAWS:
        expected = draw(whole, 80)
        found = torch.cat([draw(part, count) for part in parts])
        assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_rows_steps_seeds_and_draws_differ():
    """And are N(0, 1) over all of them: no block repeats another."""
    drawn = [Draws(seed, step, range(64)) for seed, step in product(range(3), range(4))]
    values = torch.stack([part.randn((64, 50)) for part in drawn for _ in range(2)])
    assert values.unique().numel() > 0.999 * values.numel()
    assert values.mean().abs() < 0.01 and (values.std() - 1).abs() < 0.01
    correlation = torch.corrcoef(values.flatten(0, 1)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.95, "of 50 values in 1536 rows, where chance reaches 0.75"


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
