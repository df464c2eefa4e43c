"""ldm.data.order: the order of training samples is a pure function of seed and step."""

from itertools import islice, product

import pytest
import torch

from ldm.data.order import StepBatches, batch_at, epoch_draws, micro_batch_rows, visits_at
from ldm.diffusion.loss import sample_timesteps
from ldm.errors import UserError
from ldm.runtime.random import Draws, derive_seed


def take(batches: StepBatches, count: int) -> list[list[tuple[int, int]]]:
    return list(islice(batches, count))


@pytest.mark.parametrize(("size", "batch_size"), [(10, 5), (10, 3), (7, 7), (5, 8)])
def test_every_epoch_is_a_permutation(size, batch_size):
    """The batches cover several complete epochs, and some batches span two epochs."""
    positions = [i for step in range(3 * size) for i in batch_at(step, size=size, batch_size=batch_size, seed=1)]
    epochs = [positions[start : start + size] for start in range(0, len(positions), size)]
    assert len(epochs) == 3 * batch_size
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


def test_batch_can_span_two_epochs():
    positions = [i for step in range(4) for i in batch_at(step, size=6, batch_size=4, seed=0)]
    assert batch_at(1, size=6, batch_size=4, seed=0) == positions[4:8]
    assert sorted(positions[:6]) == sorted(positions[6:12]) == list(range(6))


def test_order_differs_between_epochs_and_seeds():
    orders = [batch_at(epoch, size=50, batch_size=50, seed=seed) for epoch, seed in product(range(5), range(5))]
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("start", [1, 4, 11])
def test_starting_at_step_k_equals_skipping_k_steps(start):
    batches = take(StepBatches(10, 4, seed=3), start + 6)
    assert take(StepBatches(10, 4, seed=3, start=start), 6) == batches[start:]


def test_visits_are_epochs_and_positions():
    visits = [visit for step in range(9) for visit in visits_at(step, size=7, batch_size=5, seed=3)]
    assert [epoch for epoch, _ in visits] == [i // 7 for i in range(45)]
    assert [position for _, position in visits[5:10]] == batch_at(1, size=7, batch_size=5, seed=3)


def test_epoch_draws_depend_only_on_seed_and_epoch():
    draws = [epoch_draws(1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(((draw >= 0) & (draw < 1)).all() and 0.45 < draw.mean() < 0.55 for draw in draws)
    assert len({tuple(draw.tolist()) for draw in draws}) == 3
    epoch_draws.cache_clear()
    assert torch.equal(epoch_draws(1000, 0, 1), draws[1])


def test_each_iteration_starts_from_the_first_step():
    batches = StepBatches(10, 4, seed=3, start=2)
    assert take(batches, 3) == take(batches, 3)


@pytest.mark.parametrize(("accumulate", "num_ranks"), [(1, 1), (1, 2), (1, 4), (2, 1), (8, 1), (2, 2)])
def test_micro_batches_and_ranks_divide_the_batch_of_a_step(accumulate, num_ranks):
    """The division follows `micro_batch_rows`, so that random draws are assigned to the same samples."""
    options = {"accumulate": accumulate, "num_ranks": num_ranks}
    ranks = [take(StepBatches(30, 8, seed=0, rank=rank, **options), 9 * accumulate) for rank in range(num_ranks)]
    count = 8 // (accumulate * num_ranks)
    for step in range(9):
        batch = [(-1, -1)] * 8
        for rank, micro_batch in product(range(num_ranks), range(accumulate)):
            rows = micro_batch_rows(micro_batch, rank, num_ranks, count)
            batch[rows.start : rows.stop] = ranks[rank][step * accumulate + micro_batch]
        assert batch == visits_at(step, size=30, batch_size=8, seed=0)


def test_indivisible_batch_size_is_refused():
    message = r"batch_size=12 .*multiple of 8.*4.*trainer\.accumulate_grad_batches=2"
    with pytest.raises(UserError, match=message):
        StepBatches(30, 12, seed=0, accumulate=2, num_ranks=4)


DRAWS = [
    lambda draws, count: draws.randn((count, 3, 5)),
    lambda draws, count: draws.rand((count, 1)),
    lambda draws, count: draws.randint(0, 1000),
    lambda draws, count: draws.randn((count, 4, 8, 8)),
    lambda draws, count: draws.draw(lambda n, generator: sample_timesteps(1000, n, "logit_normal", generator)),
]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 16, 20, 40])
def test_micro_batch_draws_are_bit_identical_to_its_rows_of_the_full_batch(count):
    """The counts include a single row, and fewer and more rows than share a generator."""
    full_batch = Draws(3, 7, range(80))
    micro_batches = [Draws(3, 7, range(start, start + count)) for start in range(0, 80, count)]
    for draw in DRAWS:
        expected = draw(full_batch, 80)
        result = torch.cat([draw(micro_batch, count) for micro_batch in micro_batches])
        assert torch.equal(result, expected) and result.dtype == expected.dtype


def test_draws_differ_between_rows_steps_and_seeds():
    """All draws together follow N(0, 1), and no two rows are correlated."""
    steps = [Draws(seed, step, range(64)) for seed, step in product(range(3), range(4))]
    values = torch.stack([draws.randn((64, 50)) for draws in steps for _ in range(2)])
    assert values.unique().numel() > 0.999 * values.numel()
    assert values.mean().abs() < 0.01 and (values.std() - 1).abs() < 0.01
    correlation = torch.corrcoef(values.flatten(0, 1)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.95, "1536 independent rows of 50 values reach 0.75"


def test_seeds_do_not_collide_on_a_grid():
    """Seeds, steps and ranks are small integers, so sums or products would collide immediately."""
    grid = list(product(range(8), range(2000), range(8)))
    seeds = {derive_seed(*parts) for parts in grid}
    assert len(seeds) == len(grid)
    assert seeds.isdisjoint({derive_seed(*parts) for parts in product(range(100), range(100))})
    assert all(0 <= seed < 2**63 for seed in seeds), "torch generators accept 63 bits"


def test_derived_seed_depends_on_argument_order():
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(0) != derive_seed(0, 0)
