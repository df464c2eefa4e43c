"""ldm.training.callbacks.speed: operation counts equal formulas, utilisation, and logged metrics."""

import contextlib
import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from ldm.autoencoder.autoencoder import weights_sha256
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.callbacks.speed import (
    Speed,
    count_flops,
    estimate_duration,
    measure_speed,
    peak_flops,
)
from ldm.training.modules.adversary import Adversary
from ldm.training.optim.budget import Budget
from tests.small_training import RecordingLogger, make_vae_training

EAGER = contextlib.nullcontext


def flops_by_mode(module, batch) -> dict[bool, float]:
    """Count the operations of a step on a batch, without (False) and with (True) a discriminator."""
    return module.measure_each_mode(lambda: count_flops(lambda: module.trial_step(batch, EAGER)))


def test_a_multiply_add_counts_as_two_operations():
    """A layer needs b n m multiply-adds for its output and for each of two gradients. The input x needs no gradient."""
    b, n, m, k = 5, 7, 11, 3
    network = torch.nn.Sequential(torch.nn.Linear(n, m), torch.nn.Linear(m, k))
    x = torch.randn(b, n)
    assert count_flops(lambda: network(x)) == 2 * b * m * (n + k)
    assert count_flops(lambda: network(x).sum().backward()) == 2 * b * m * (2 * n + 3 * k)


def test_attention_is_counted_regardless_of_the_kernel():
    """Each head needs two products of [n, d] x [d, n] per image. Torch does not count its fused CPU kernel."""
    b, heads, n, d = 2, 3, 16, 8
    q, k, v = (torch.randn(b, heads, n, d, requires_grad=True) for _ in range(3))
    forward = 2 * (2 * b * heads * n * n * d)
    assert count_flops(lambda: functional.scaled_dot_product_attention(q, k, v)) == forward
    assert count_flops(lambda: functional.scaled_dot_product_attention(q, k, v).sum().backward()) == 3 * forward


def test_counting_preserves_weights_and_random_state(make_module):
    module = make_module()
    weight, rng_state = module.trained.weight.detach().clone(), torch.get_rng_state()
    assert flops_by_mode(module, torch.ones(4, 2)) == {False: 2 * 4 * 2 * 2 * 2}
    assert torch.equal(module.trained.weight, weight) and module.trained.weight.grad is None
    assert torch.equal(torch.get_rng_state(), rng_state)


def test_compiled_network_has_the_same_count(make_module):
    module, compiled = make_module(), make_module()
    compiled.trained.compile(backend="eager")
    assert flops_by_mode(module, torch.ones(4, 2)) == flops_by_mode(compiled, torch.ones(4, 2))


def test_counting_includes_the_discriminator_and_preserves_state():
    module = make_vae_training(adversary=partial(Adversary, channels=8, layers=1))
    model, adversary = module.trained, module.adversary
    digests = [weights_sha256(network) for network in (model, adversary.discriminator)]
    optimizer = copy.deepcopy(adversary.optimizer.state_dict())
    flops = flops_by_mode(module, torch.rand(2, 3, 16, 16))
    assert flops[True] > flops[False] > 0 and not module.adversarial_on
    assert digests == [weights_sha256(network) for network in (model, adversary.discriminator)]
    assert adversary.optimizer.state_dict() == optimizer
    assert all(p.grad is None for network in (model, adversary.discriminator) for p in network.parameters())


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peak_flops_requires_an_exact_gpu_model(gpu, peak):
    assert peak_flops(gpu) == pytest.approx(peak) if peak else peak_flops(gpu) is None


def test_utilisation_is_a_fraction_of_the_peak():
    speed = Speed({False: 2e9, True: 3e9}, peak=1e13)
    assert speed.metrics(1000.0) == {"tflops_per_s": 2.0, "mfu": 0.2}
    assert speed.metrics(1000.0, adversarial_on=True) == pytest.approx({"tflops_per_s": 3.0, "mfu": 0.3})
    assert Speed({False: 2e9}, None).metrics(1000.0) == {"tflops_per_s": 2.0}
    assert Speed({False: 0.0}, None).metrics(1000.0) == {}


def test_speed_counts_operations_per_image_and_the_peak_of_all_gpus(make_module, monkeypatch):
    monkeypatch.setattr("ldm.training.callbacks.speed.peak_flops", lambda gpu: 1e12)
    module = make_module()
    stage = SimpleNamespace(
        module=module, fetch=lambda indices: torch.ones(len(indices), 2), images=SimpleNamespace(train_indices=range(9))
    )
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision_plugin=SimpleNamespace(forward_context=EAGER),
        world_size=4,
    )
    module._trainer = None
    assert measure_speed(trainer, stage) == Speed({False: 2 * 2 * 2 * 2}, 4e12)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(100), "about 48 seconds, without validation"),
        (Budget(max_time_s=420.0), "7 minutes, for up to about 840 steps"),
        (Budget(100, 30.0), "about 30 seconds, without validation"),
    ],
)
def test_duration_or_number_of_steps_is_estimated_from_a_trial_step(make_module, budget, text):
    module = make_module()
    module.measure_step = lambda batch, autocast: 0.25
    module.transfer_batch_to_device = lambda batch, device, index: batch
    stage = SimpleNamespace(module=module, fetch=lambda rows: rows, images=SimpleNamespace(train_indices=[0, 1]))
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision_plugin=SimpleNamespace(forward_context=EAGER),
        accumulate_grad_batches=2,
    )
    assert estimate_duration(trainer, stage, budget, batch_size=2, step=4) == text


@pytest.mark.parametrize("clip", [None, 0.5])
def test_each_row_logs_speed_and_gradient_norm(fit, make_module, clip):
    module, logger, budget = make_module(lr=0.1), RecordingLogger(), Budget(6)
    module.log_every = 2
    bar = ProgressBar(budget, 4, 2, "line")
    bar.speed = Speed({False: 1e6}, peak=1e12)
    fit(module, [budget, bar], max_steps=6, logger=logger, log_every_n_steps=2, gradient_clip_val=clip)
    assert list(logger.by_step) == [1, 3, 5]
    for row in logger.by_step.values():
        assert row["train/mfu"] == pytest.approx(row["train/images_per_s"] * 1e6 / 1e12)
        assert row["train/tflops_per_s"] == pytest.approx(1e12 * row["train/mfu"] / 1e12)
        assert row["train/gradient_norm"] > 0 and row["train/peak_memory_gb"] > 0.1


def test_speed_excludes_validation(fit, make_module, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("ldm.training.callbacks.progress.time.perf_counter", lambda: clock.now)

    class Slow(type(make_module())):
        def training_step(self, *batch):
            clock.now += 0.5
            return super().training_step(*batch)

        def validation_step(self, x, batch_idx):
            clock.now += 1000.0

    module, logger, budget = Slow(lr=0.1), RecordingLogger(), Budget(4)
    options = {"max_steps": 4, "log_every_n_steps": 1, "val_check_interval": 2}
    fit(module, [budget, ProgressBar(budget, 4, 1, "line")], logger=logger, **options)
    assert list(logger.metric("train/images_per_s").values()) == [8.0] * 4
