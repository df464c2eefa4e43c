"""ldm.training.optim.muon: Muon for the matrices in transformer blocks and AdamW for the rest, as one optimizer."""

import copy
import math

import pytest
import torch
from torch.optim import AdamW, Muon

from ldm.networks.dit import DiT
from ldm.training.optim.factory import OptimizerFactory
from ldm.training.optim.muon import MuonAdamW
from tests.small_training import states_equal


def build() -> DiT:
    torch.manual_seed(0)
    network = DiT(sample_size=2, in_channels=2, out_channels=2, patch_size=1, hidden_dim=16, depth=2, head_dim=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture
def network() -> DiT:
    return build()


def make(network, **options) -> MuonAdamW:
    return OptimizerFactory(lambda groups: MuonAdamW(groups, lr=1e-2, **options))(network)


def train(network, optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        z = torch.randn(3, 2, 2, 2, generator=generator)
        (network(z, torch.tensor([1, 2, 3])) - z).square().mean().backward()
        optimizer.step()


def test_block_matrices_go_to_muon_and_the_rest_to_adamw(network):
    muon, adamw = make(network).optimizers
    assert isinstance(muon, Muon) and isinstance(adamw, AdamW)
    names = {id(p): name for name, p in network.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    remaining = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert hidden | remaining == set(names.values()) and not hidden & remaining
    assert hidden == {
        f"blocks.{i}.{name}.weight"
        for i in range(2)
        for name in ("attention.to_q", "attention.to_kv", "attention.to_out", "mlp.gate_and_value", "mlp.out")
    }


def test_steps_match_separate_optimizers(network):
    reference, optimizer = copy.deepcopy(network), make(network)
    hidden = [p for name, p in reference.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    hidden = [p for p in hidden if p.shape[0] != 6 * 16]  # adaLN's modulation
    hidden_ids = {id(p) for p in hidden}
    remaining = [p for p in reference.parameters() if id(p) not in hidden_ids]
    groups = [
        {"params": [p for p in remaining if p.ndim > 1]},
        {"params": [p for p in remaining if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [
        Muon(hidden, lr=1e-2, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        AdamW(groups, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01),
    ]

    class Separate:
        def zero_grad(self):
            reference.zero_grad()

        def step(self):
            for inner in optimizers:
                inner.step()

    train(network, optimizer, 3)
    train(reference, Separate(), 3)
    for (name, combined), separate in zip(network.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(combined, separate, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("resumed", [False, True])
def test_learning_rate_change_reaches_both_optimizers(network, resumed):
    optimizer = make(network)
    if resumed:
        train(network, optimizer, 1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    initial = [p.detach().clone() for p in network.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(network, optimizer, 1)
    assert all(torch.equal(p, p_0) for p, p_0 in zip(network.parameters(), initial, strict=True))


def test_training_continues_from_a_restored_state(network):
    optimizer = make(network)
    train(network, optimizer, 3)
    restored = build()
    restored.load_state_dict(network.state_dict())
    restored_optimizer = make(restored)
    restored_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(network, optimizer, 2, seed=1)
    train(restored, restored_optimizer, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), restored.parameters(), strict=True))


def test_network_without_blocks_uses_adamw_only():
    optimizer = make(torch.nn.Linear(3, 3))
    assert [type(inner) for inner in optimizer.optimizers] == [AdamW]


def test_found_inf_skips_a_step(network):
    """found_inf=1 leaves weights, moments and step counts unchanged, even on the first step. 0 has no effect."""
    guarded = copy.deepcopy(network)
    plain, skipping = make(network), make(guarded)
    for k, skip in enumerate([1, 0, 1, 0, 0, 1]):
        skipping.found_inf = torch.tensor(float(skip))
        if skip:
            for parameter in guarded.parameters():
                parameter.grad = torch.full_like(parameter, math.nan)
            skipping.step()
        else:
            train(network, plain, 1, seed=k)
            train(guarded, skipping, 1, seed=k)
    assert states_equal(list(network.parameters()), list(guarded.parameters()))
    states = [[list(inner.state.values()) for inner in optimizer.optimizers] for optimizer in (plain, skipping)]
    assert states_equal(*states)
