"""ldm.data.loaders: each batch is fetched in one call, in the order defined by ldm.data.order."""

from itertools import islice

import numpy as np
import pytest
import torch

from ldm.data.loaders import train_loader, val_loader
from ldm.data.order import batch_at

INDICES = np.array([5, 7, 11, 13, 17, 19, 23])


def fetch(indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    return {"index": torch.from_numpy(indices), "square": torch.from_numpy(indices**2)}


@pytest.mark.parametrize("start", [0, 5])
def test_training_batches_follow_batch_at(start):
    batches = list(islice(train_loader(fetch, INDICES, batch_size=4, seed=2, start=start), 6))
    for step, batch in enumerate(batches, start=start):
        expected = INDICES[batch_at(step, size=len(INDICES), batch_size=4, seed=2)]
        assert batch["index"].tolist() == expected.tolist()
        assert batch["square"].tolist() == (expected**2).tolist()


def test_batch_is_fetched_in_one_call():
    """Collating samples one by one would take longer than reading them."""
    calls = []
    loader = train_loader(lambda indices, epochs: calls.append(len(indices)), INDICES, batch_size=3, seed=0)
    list(islice(loader, 4))
    assert calls == [3, 3, 3, 3]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_keep_the_order(num_workers):
    options = {"batch_size": 4, "seed": 2, "accumulate": 2}
    without_workers = list(islice(train_loader(fetch, INDICES, **options), 7))
    with_workers = list(islice(train_loader(fetch, INDICES, num_workers=num_workers, **options), 7))
    assert [b["index"].tolist() for b in with_workers] == [b["index"].tolist() for b in without_workers]


def test_validation_loader_reads_all_samples_once_in_order():
    batches = list(val_loader(fetch, INDICES, batch_size=3))
    assert [len(batch["index"]) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == INDICES.tolist()


def test_training_loader_passes_the_epoch_of_each_sample():
    epochs = list(islice(train_loader(lambda indices, epochs: epochs.tolist(), INDICES, batch_size=5, seed=2), 3))
    assert epochs == [[0] * 5, [0, 0, 1, 1, 1], [1, 1, 1, 1, 2]]
