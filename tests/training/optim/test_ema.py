"""ldm.training.optim.ema: the average equals its formula and can be applied to the module."""

import pytest
import torch
from torch import nn

from ldm.errors import InputError
from ldm.rules import apply_rules
from ldm.training.fit import TrainerOptions
from ldm.training.optim.ema import EMA


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def step(module: nn.Module, k: int) -> None:
    """Change every trainable parameter by a different amount."""
    with torch.no_grad():
        for i, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
            parameter.add_(torch.full_like(parameter, 0.1 * (i + 1) * (-1) ** k + 0.05))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_average_matches_its_formula(decay):
    """ema <- d ema + (1 - d) theta with d_k = min(decay, (1 + k) / (10 + k))."""
    module = build()
    ema = EMA(module, decay)
    expected = [p.detach().double().clone() for p in module.parameters()]
    for k in range(40):
        step(module, k)
        ema.update()
        d = min(decay, (1 + k) / (10 + k))
        expected = [d * e + (1 - d) * p.detach().double() for e, p in zip(expected, module.parameters(), strict=True)]
    for average, reference in zip(ema.shadow, expected, strict=True):
        torch.testing.assert_close(average.double(), reference, rtol=1e-5, atol=1e-6)


def test_only_trainable_parameters_are_averaged():
    module = build()
    module[0].requires_grad_(False)
    ema = EMA(module, 0.9)
    assert list(ema.state_dict()["shadow"]) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    frozen, running = module[0].weight.detach().clone(), module[1].running_mean.clone()
    step(module, 0)
    ema.update()
    with ema.average_parameters():
        assert torch.equal(module[0].weight, frozen) and torch.equal(module[1].running_mean, running)
        assert torch.equal(module[2].weight, ema.shadow[2])


def test_averaged_weights_can_be_applied_in_inference_mode():
    """Lightning validates in inference mode, and the weights must still be trainable afterwards."""
    module = build()
    ema = EMA(module, 0.9)
    step(module, 0)
    with torch.inference_mode(), ema.average_parameters():
        assert torch.equal(module[0].weight, ema.shadow[0])
    module(torch.randn(5, 3)).sum().backward()
    step(module, 1)
    ema.update()


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_ema_decay_out_of_range_is_rejected(decay):
    with pytest.raises(InputError, match=f"ema_decay={decay} must be .*{int(decay >= 1)}"):
        apply_rules(TrainerOptions, {"ema_decay": decay})
