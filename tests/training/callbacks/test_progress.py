"""Logged losses, validation with averaged weights, gradient clipping, progress lines and weight decay groups."""

import contextlib

import pytest
import torch

from ldm.training.callbacks.progress import ProgressBar
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from ldm.training.optim.factory import OptimizerFactory
from tests.small_training import RecordingLogger


def test_each_row_logs_the_loss_of_its_own_step(fit, make_module):
    module, logger, losses = make_module(lr=0.3), RecordingLogger(), []
    module.log_every = 3
    train = module.losses
    module.losses = lambda *batch: losses.append(train(*batch)) or losses[-1]
    fit(module, [Budget(7)], max_steps=7, logger=logger, log_every_n_steps=3)
    assert logger.metric("train/loss") == {k: losses[k]["loss"].item() for k in (2, 5)}


def test_timing_a_step_does_not_change_the_weights(make_module):
    module = make_module()
    weight = module.trained.weight.detach().clone()
    assert module.measure_step(torch.ones(4, 2), contextlib.nullcontext) > 0
    assert torch.equal(module.trained.weight, weight) and module.trained.weight.grad is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_uses_averaged_weights_and_training_is_unaffected(fit, make_module, accumulate):
    module, plain = make_module(lr=0.3), make_module(lr=0.3)
    options = {"max_steps": 8, "accumulate_grad_batches": accumulate, "val_check_interval": 4 * accumulate}
    ema = EMACallback(0.9)
    fit(module, [Budget(8), ema], **options)
    fit(plain, [Budget(8)], **options)
    assert ema.ema.num_updates == 8
    assert torch.equal(module.trained.weight, plain.trained.weight), "averaging must not affect training"
    assert len(module.validated_weights) == 2
    assert not torch.equal(module.validated_weights[1], plain.validated_weights[1])


def test_gradient_norm_is_clipped(fit, make_module):
    module = make_module(lr=1.0)
    start = torch.cat([p.detach().flatten() for p in module.trained.parameters()])
    fit(module, max_steps=1, gradient_clip_val=0.01)
    change = torch.cat([p.detach().flatten() for p in module.trained.parameters()]) - start
    torch.testing.assert_close(change.norm(), torch.tensor(0.01), rtol=1e-3, atol=0)


def test_progress_without_a_terminal_is_printed_as_lines(fit, make_module, capsys, monkeypatch):
    monkeypatch.setattr(ProgressBar, "LINE_INTERVAL_S", 0.0)
    budget = Budget(4)
    fit(make_module(), [budget, ProgressBar(budget, 4, 2, "stage line")], max_steps=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage line")]
    assert [line.split(",")[0] for line in lines] == [
        f"stage line: {percent:>4}" for percent in ("25%", "50%", "75%", "100%")
    ]
    assert "step 4, loss " in lines[-1] and "images/s" in lines[-1]
    assert not any("nan" in line for line in lines)


def test_biases_and_norms_get_no_weight_decay():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.GroupNorm(2, 4), torch.nn.Linear(4, 4))
    network[2].requires_grad_(False)
    optimizer = OptimizerFactory(lambda groups: torch.optim.AdamW(groups, weight_decay=0.1))(network)
    shapes = {group["weight_decay"]: [tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups}
    assert shapes == {0.1: [(4, 3, 1, 1)], 0.0: [(4,), (4,), (4,)]}
