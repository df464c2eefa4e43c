import itertools

import pytest
import torch

from ldm.diffusion.chain import marginal
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import TIMESTEPS, hybrid_loss, simple_loss, vlb_loss
from ldm.diffusion.objective import LOSSES, DenoisingBatch, Objective
from ldm.diffusion.schedule import linear, rectified_flow


def network(z_t, timesteps, condition):
    return torch.cat([z_t.sin(), z_t.cos()], 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_objective_computes_the_named_loss(loss, randn):
    denoiser = Denoiser(linear(20), network, "v", learned_variance=True)
    z_0, eps, t = randn(3, 2, 4), randn(3, 2, 4), torch.tensor([1, 7, 20])
    batch = DenoisingBatch.run(denoiser, z_0, eps, t)
    assert batch.z_t.equal(marginal(denoiser.schedule, z_0, t, eps))
    output, v = denoiser.output(batch.z_t, t)
    expected = {
        "simple": lambda: simple_loss(denoiser.schedule, output, z_0, eps, t, "v"),
        "min_snr": lambda: simple_loss(denoiser.schedule, output, z_0, eps, t, "v", weighting="min_snr", gamma=2.0),
        "hybrid": lambda: hybrid_loss(denoiser.schedule, output, v, z_0, batch.z_t, eps, t, "v"),
        "vlb": lambda: vlb_loss(denoiser.schedule, denoiser(batch.z_t, t), z_0, t, "learned_range"),
    }[loss]()
    result = Objective(loss, gamma=2.0).loss_per_sample(denoiser.schedule, batch, "learned_range")
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def check(loss, variance, timesteps, prediction, alpha_bar):
    Objective(loss, prediction, timesteps).check(variance, alpha_bar)


VALID_COMBINATIONS = {
    *(
        (o, v, t)
        for o in ("simple", "min_snr")
        for v in ("fixed_small", "fixed_large")
        for t in ("uniform", "logit_normal")
    ),
    ("hybrid", "learned_range", "uniform"),
    *(("vlb", v, t) for v in ("fixed_small", "fixed_large", "learned_range") for t in ("uniform", "importance")),
}


def test_only_valid_combinations_are_accepted():
    alpha_bar = linear(10).alpha_bar
    variances = ["fixed_small", "fixed_large", "learned_range", "optimal"]
    for choice in itertools.product(LOSSES, variances, TIMESTEPS):
        if choice in VALID_COMBINATIONS:
            check(*choice, "eps", alpha_bar)
        else:
            with pytest.raises(ValueError, match="choose "):
                check(*choice, "eps", alpha_bar)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("simple", "learned_range", "uniform"), "simple.*learned.*choose hybrid or vlb"),
        (("min_snr", "learned_range", "uniform"), "min_snr.*learned.*choose hybrid or vlb"),
        (("hybrid", "fixed_small", "uniform"), "hybrid.*fixed_small.*choose variance learned_range"),
        (("vlb", "optimal", "uniform"), "variance 'optimal'.*train with fixed_small"),
        (("hybrid", "learned_range", "importance"), "importance.*hybrid.*choose timesteps uniform"),
        (("simple", "fixed_small", "importance"), "importance.*simple.*choose timesteps uniform"),
        (("hybrid", "learned_range", "logit_normal"), "hybrid.*logit_normal.*choose timesteps uniform$"),
        (("vlb", "learned_range", "logit_normal"), "vlb.*logit_normal.*choose timesteps uniform or importance$"),
        (("elbo", "fixed_small", "uniform"), "objective.*'elbo'.*simple, min_snr, hybrid, vlb"),
        (("vlb", "learned", "uniform"), "variance.*'learned'.*fixed_small"),
        (("vlb", "fixed_small", "cosine"), "timesteps.*'cosine'.*uniform, logit_normal, importance"),
    ],
)
def test_invalid_choices_are_explained(choice, message):
    with pytest.raises(ValueError, match=message):
        check(*choice, "v", linear(10).alpha_bar)
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        check("simple", "fixed_small", "uniform", "eps", rectified_flow(10).alpha_bar)
