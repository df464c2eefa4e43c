"""Tests of the two-stage bound on Gaussian data, where the bound is known exactly, and of the likelihood report.

Setting: x = W z_raw + noise, z = (z_raw - mean) / std and z ~ N(0, c). The encoder is the exact posterior, and the
denoiser is exact. Given x, the bound is quadratic in the noise of the chain. With a continuous decoder, the decoder
term is quadratic in the noise that is added to sample z_raw. Gauss-Hermite quadrature is therefore exact: the tests
pass generators that return quadrature nodes instead of random numbers to the unmodified `two_stage_bound`.
"""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics
from ldm.autoencoder.identity import IdentityAutoencoder
from ldm.autoencoder.patch import PatchAutoencoderKL, PatchVQModel
from ldm.cli.main import main
from ldm.data.images import ImageData, prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.diffusion.bound import fit_z_0_mse, variational_bound
from ldm.diffusion.chain import log_variance, marginal, posterior
from ldm.diffusion.schedule import NoiseSchedule, cosine
from ldm.errors import UserError
from ldm.latents.contract import LatentContract
from ldm.likelihood import optimal_variance, two_stage
from ldm.likelihood.report import BOUND_ROWS
from ldm.likelihood.two_stage import Terms, mean_metric, two_stage_bound, vae_bound
from ldm.networks.conditioning import ClassCondition, NoCondition
from ldm.networks.dit import DiT
from ldm.runs.run import Run
from ldm.runtime.random import derive_seed, sample_generators
from ldm.sampling.pipeline import VARIANCE_FILE, LatentDiffusion, load_z_0_mse
from tests.finished_run import finished_run

C = 0.1  # variance of z
SQRT_3 = 3**0.5
NODES, WEIGHTS = (-SQRT_3, 0.0, SQRT_3), torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
ONE_CHANNEL = {"gain": [[0.3]], "noise": [0.08], "mean": [0.2], "std": [1.6]}
ROTATED = {"gain": [[0.26, -0.15], [0.15, 0.26]], "noise": [0.08, 0.08], "mean": [0.2, -0.3], "std": [1.6, 1.8]}


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def vp_schedule(num_steps: int) -> NoiseSchedule:
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return NoiseSchedule("vp", torch.exp(-(0.1 * u + 9.95 * u**2)))


def exact_mse(schedule: NoiseSchedule, c: float = C) -> torch.Tensor:
    a = schedule.alpha_bar
    return c * (1 - a) / (a * c + 1 - a)


class LinearGaussian(Autoencoder):
    """x = W z_raw + noise at every location, z_raw ~ N(mean, c std^2); q(z_raw | x) is the exact posterior.

    The columns of W are orthogonal in the metric of the noise, so the posterior covariance is diagonal. `widen` scales
    the encoder's variance, and `shift` moves the encoder's mean by this number of posterior standard deviations.
    """

    has_density = True

    def __init__(self, gain, noise, mean, std, *, widen: float = 1.0, shift: float = 0.0) -> None:
        super().__init__(nn.Identity(), LatentStatistics(mean, std, noise, "images", "weights"))
        self.gain, self.noise, self.mean, self.std = (float64(values) for values in (gain, noise, mean, std))
        self.widen, self.shift = widen, shift
        information = self.gain.T / self.noise.square()
        precision = information @ self.gain + torch.diag(1 / (C * self.std.square()))
        assert (precision - precision.diag().diag()).abs().max() < 1e-9
        self.variance, self.information = 1 / precision.diag(), information

    def encode(self, images):
        prior = self.mean / (C * self.std.square())
        linear = torch.einsum("cx,nxhw->nchw", self.information, images) + prior[:, None, None]
        variance = self.variance[:, None, None].expand_as(linear)
        return variance * linear + self.shift * variance.sqrt(), (self.widen * variance).log()

    def decode(self, z_raw):
        return torch.einsum("xc,nchw->nxhw", self.gain, z_raw)


class GaussianNetwork(nn.Module):
    """A network that predicts z_0 = gain E[z_0 | z_t] for data N(0, c), also at real-valued t."""

    def __init__(self, schedule: NoiseSchedule, c: float = C, gain: float = 1.0) -> None:
        super().__init__()
        self.schedule, self.c = schedule, c
        self.gain = nn.Parameter(float64(gain))

    def forward(self, z_t, timestep):
        a = self.schedule.at(timestep + 1, z_t)
        return (self.gain * a.sqrt() * self.c / (a * self.c + 1 - a)).to(z_t) * z_t


def gaussian_pipeline(autoencoder, schedule, *, c=C, gain=1.0, variance="optimal", shape=(1, 1, 1)):
    return LatentDiffusion(
        network=GaussianNetwork(schedule, c, gain),
        autoencoder=autoencoder,
        schedule=schedule,
        prediction="z_0",
        conditioning=NoCondition(),
        contract=LatentContract("weights", "images", 1, 1, shape[0], 0.05, False),
        latent_shape=shape,
        variance=variance,
        z_0_mse=exact_mse(schedule, c),
    )


class NodeGenerator(torch.Generator):
    """A generator of quadrature nodes: first `latent`, to sample z_raw, and then always `chain`."""

    latent: torch.Tensor | None
    chain: float


@pytest.fixture
def quadrature(monkeypatch):
    """Return a function quadrature(bound, x, nodes, node_weights), which computes the expected terms of a bound, [n].

    The function calls `bound` with one copy of each image in x per combination of quadrature nodes. It uses `nodes` for
    z_raw and NODES for the chain.
    """
    original_randn = torch.randn

    def randn(*shape, generator=None, **options):
        if not isinstance(generator, NodeGenerator):
            return original_randn(*shape, generator=generator, **options)
        node, generator.latent = generator.latent, None
        value = float64(generator.chain) if node is None else node[:, None, None]
        return value.expand(*shape)

    monkeypatch.setattr(torch, "randn", randn)

    def quadrature(bound, x, nodes=NODES, node_weights=WEIGHTS):
        channels = x.shape[1]
        latents = torch.cartesian_prod(*[float64(nodes)] * channels).reshape(-1, channels)
        weights = torch.cartesian_prod(*[node_weights] * channels).reshape(-1, channels).prod(1)
        grid = [(latent, chain) for latent in latents for chain in NODES]

        def generators(seed, indices):
            result = []
            for i in indices:
                generator = NodeGenerator()
                generator.latent, generator.chain = grid[i % len(grid)]
                result.append(generator)
            return result

        monkeypatch.setattr(two_stage, "sample_generators", generators)
        terms = bound(x.repeat_interleave(len(grid), 0))
        grid_weights = torch.outer(weights, WEIGHTS).flatten()
        return {name: values.reshape(len(x), -1) @ grid_weights for name, values in terms.parts.items()}

    return quadrature


@pytest.fixture
def continuous_decoder(monkeypatch):
    """Replace the discretised decoder likelihood with a Gaussian density."""

    def nll(x, mean, scale, *_, **__):
        return -torch.distributions.Normal(mean, scale).log_prob(x)

    monkeypatch.setattr(two_stage, "discretised_nll", nll)


def chain_bound(pipeline):
    return lambda images: two_stage_bound(pipeline, images, {}, batch_size=100_000).chain


@pytest.mark.parametrize("num_steps", [1, 2, 16, 64])
def test_bound_equals_the_nll_for_exact_models(quadrature, continuous_decoder, num_steps):
    """E[bound] = E[-log p(x)] + KL(q(z_T) || N(0, I)), for two channels of 2 x 3 latents with different std.

    The dimensions are independent, so each term is a sum over dimensions, and all dimensions can share the same nodes.
    """
    schedule, shape = vp_schedule(num_steps), (2, 2, 3)
    model = LinearGaussian([[0.3, 0], [0, -0.7]], [0.08, 0.5], [0.2, -3.0], [1.6, 4.0])
    location = (model.gain @ model.mean)[:, None, None]
    spread = (model.gain.square() @ (C * model.std.square()) + model.noise.square())[:, None, None]
    x = torch.stack([(location + spread.sqrt() * node).expand(shape) for node in NODES])
    parts = quadrature(chain_bound(gaussian_pipeline(model, schedule, shape=shape)), x)
    bound = sum(parts.values()) @ WEIGHTS
    nll = 0.5 * (2 * math.pi * math.e * spread).log().expand(shape).sum()
    end_variance = schedule.alpha_bar[-1] * C + 1 - schedule.alpha_bar[-1]
    kl_at_T = 12 * 0.5 * (end_variance - 1 - end_variance.log())
    print(f"\nT = {num_steps}: E[bound] {bound:.9f}, minus (-log p(x) + KL): {bound - nll - kl_at_T:+.1e}")
    assert bound.item() == pytest.approx((nll + kl_at_T).item(), abs=1e-6)
    volume = 6 * (math.log(1.6) + math.log(4.0))
    torch.testing.assert_close(parts["volume"], float64([volume] * 3))
    assert volume > 1, "large enough for the test to fail if this term were missing or had the wrong sign"


def prior_variance(pipeline) -> float:
    """Return Var z_0 for the pipeline's reverse chain, started from N(0, 1). Every step is linear and Gaussian."""
    schedule, one, variance = pipeline.schedule, torch.ones(1, 1, dtype=torch.float64), 1.0
    for t in range(schedule.num_steps, 0, -1):
        predicted = pipeline.denoiser()(one, t).z_0.detach()
        mean, _ = posterior(schedule, predicted, one, t - 1, t)
        sigma = log_variance(schedule, t - 1, t, pipeline.variance, like=one, z_0_mse=pipeline.z_0_mse).exp()
        variance = mean.item() ** 2 * variance + sigma.item()
    return variance


def exact_nll(pipeline, x, width: float) -> torch.Tensor:
    """Return -log p(x) for one-pixel images, by the trapezoid rule over z with bin masses from scipy.stats.norm."""
    model, variance = pipeline.autoencoder, prior_variance(pipeline)
    channels, points = x.shape[1], 4001 if x.shape[1] == 1 else 321
    line = torch.linspace(-12, 12, points, dtype=torch.float64)
    z = variance**0.5 * torch.cartesian_prod(*[line] * channels).reshape(-1, channels)
    prior = -0.5 * (z.square() / variance).sum(1) - channels / 2 * math.log(2 * math.pi)
    decoded = scipy.stats.norm(((z * model.std + model.mean) @ model.gain.T).numpy(), model.noise.numpy())
    nll = []
    for image in x.flatten(1).numpy():
        low = np.where(image <= -1 + width / 2, -np.inf, image - width / 2)
        high = np.where(image >= 1 - width / 2, np.inf, image + width / 2)
        mass = torch.from_numpy(decoded.cdf(high) - decoded.cdf(low)).prod(1)
        nll.append(-((prior.exp() * mass).sum() * (24 / (points - 1)) ** channels).log())
    return torch.stack(nll)


def hermite_rule(count: int) -> tuple[list[float], torch.Tensor]:
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes.tolist(), torch.from_numpy(node_weights / node_weights.sum())


CASES = {1: (ONE_CHANNEL, [[-0.5], [-0.25], [0.0], [0.5]], 40), 2: (ROTATED, [[0.0, 0.0], [-0.25, 0.25]], 12)}


@pytest.mark.parametrize("dimensions", [1, 2])
def test_discretised_bound_has_a_fourth_order_gap_in_bin_width(quadrature, monkeypatch, dimensions):
    """With everything else exact, the gap is KL(q(z | x) || p(z | x)), where q is the posterior at the bin's centre.

    Averaging over the bin changes p(z | x) to second order in the bin width. The KL divergence is quadratic in this
    change.
    """
    options, points, count = CASES[dimensions]
    pipeline = gaussian_pipeline(LinearGaussian(**options), vp_schedule(4), shape=(dimensions, 1, 1))
    x, rule = float64(points)[..., None, None], hermite_rule(count)
    print(f"\n{dimensions}-D, gap = E[bound] + log p(x) in nats: bins, width, gap for each x")
    widths, gaps = [2 / bins for bins in (8, 16, 32, 64, 128)], []
    for width in widths:
        monkeypatch.setattr(two_stage, "BIN_WIDTH", width)
        bound = sum(quadrature(chain_bound(pipeline), x, *rule).values())
        gaps.append(bound - exact_nll(pipeline, x, width))
        print(f"{2 / width:5.0f}  {width:.5f}  {'  '.join(f'{gap:+.2e}' for gap in gaps[-1].tolist())}")
    assert torch.stack(gaps).min() > -1e-8
    assert (torch.stack(gaps).diff(dim=0)[:3] < 0).all()
    means = torch.stack(gaps).mean(1)
    fit = scipy.stats.linregress(np.log(widths[1:4]), means[1:4].log())
    print(f"slope in log width: {fit.slope:.2f}")
    assert fit.slope == pytest.approx(4, abs=0.4)
    assert means[-1] < 1e-4


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "optimal"])
def test_bound_exceeds_the_nll_for_inexact_models(quadrature, monkeypatch, dimensions, variance):
    """The encoder is too wide and biased, the denoiser shrinks its output, and some x are in the open outer bins."""
    options, points, count = CASES[dimensions]
    model = LinearGaussian(**options, widen=1.7, shift=0.5)
    pipeline = gaussian_pipeline(model, vp_schedule(4), gain=0.8, variance=variance, shape=(dimensions, 1, 1))
    x = torch.cat([float64(points), float64([[-1.0] * dimensions, [1.0] * dimensions])])[..., None, None]
    for width in (0.5, 2 / 64):
        monkeypatch.setattr(two_stage, "BIN_WIDTH", width)
        bound = sum(quadrature(chain_bound(pipeline), x, *hermite_rule(count)).values())
        gap = bound - exact_nll(pipeline, x, width)
        print(f"\n{dimensions}-D, {variance}, width {width:.3f}: {'  '.join(f'{value:.3f}' for value in gap.tolist())}")
        assert gap.min() > 0.05


def test_vae_bound_equals_its_analytic_value(quadrature):
    """KL(q || N(0, 1)) has a closed form, and the trapezoid rule averages the decoder term over q."""
    model, x = LinearGaussian(**ONE_CHANNEL), (float64([0, 100, 128, 255]) / 127.5 - 1)[:, None, None, None]
    parts = quadrature(lambda images: vae_bound(model, images, batch_size=1000), x, *hermite_rule(60))
    mean, log_var = (moment[:, 0, 0] for moment in model.encode(x))
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten()
    torch.testing.assert_close(parts["encoder"] + parts["N(0, I) prior"], kl)
    for i, pixel in enumerate([0, 100, 128, 255]):
        z = q.mean[i] + q.stddev[i] * torch.linspace(-9, 9, 4001, dtype=torch.float64)
        decoded = scipy.stats.norm(model.gain.item() * z.numpy(), model.noise.item())
        edges = [-np.inf, *(np.arange(1, 256) - 0.5), np.inf]
        low, high = (edge / 127.5 - 1 for edge in edges[pixel : pixel + 2])
        in_upper_tail = low > decoded.mean()
        lower, upper = decoded.cdf(high) - decoded.cdf(low), decoded.sf(low) - decoded.sf(high)
        log_mass = np.log(np.where(in_upper_tail, upper, lower))
        density = torch.distributions.Normal(q.mean[i], q.stddev[i]).log_prob(z).exp().numpy()
        assert parts["decoder"][i].item() == pytest.approx(-np.trapezoid(density * log_mass, z.numpy()), rel=1e-6)


def test_ode_term_equals_the_analytic_density():
    """With the exact denoiser for N(0, c), the ODE maps N(0, 1) at T to N(0, Var z_1 / Var z_T) at t = 1."""
    schedule, shape = cosine(100), (2, 3, 3)
    model = LinearGaussian(**ROTATED)
    pipeline = gaussian_pipeline(model, schedule, variance="fixed_large", shape=shape)
    x = 0.2 * torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    without_ode = two_stage_bound(pipeline, x, {}, steps=8)
    bounds = two_stage_bound(pipeline, x, {}, steps=8, ode={"rtol": 1e-6, "atol": 1e-6, "probes": 2}, batch_size=2)
    assert_same_terms(bounds.chain, without_ode.chain)
    assert without_ode.ode is None and without_ode.num_ode_evaluations == 0 and bounds.num_ode_evaluations > 3 * 20
    # the Jacobian is a multiple of the identity, for which a single probe gives the exact trace
    assert bounds.ode_probe_variance.shape == (5,) and bounds.ode_probe_variance.max() < 1e-9

    generators = [torch.Generator().manual_seed(derive_seed(0, 4, i)) for i in range(5)]
    eps = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    noise = [torch.randn(shape, generator=generator) for generator in two_stage.sample_generators(0, range(5))]
    mean, log_var = model.encode(x)
    z_0 = model.standardise(mean + (0.5 * log_var).exp() * torch.stack(noise))
    z_1, (a_1, a_T) = marginal(schedule, z_0, 1, eps), schedule.alpha_bar[[1, -1]].tolist()
    spread = [a * C + 1 - a for a in (a_1, a_T)]
    p = torch.distributions.Normal(0.0, (spread[0] / spread[1]) ** 0.5)
    entropy = 0.5 * 18 * math.log(2 * math.pi * math.e * (1 - a_1))
    expected = -p.log_prob(z_1).flatten(1).sum(1) - entropy
    torch.testing.assert_close(bounds.ode.parts["ODE, z_1"], expected, atol=1e-3, rtol=0)
    for name in ("decoder", "encoder", "volume", "L_0"):
        assert torch.equal(bounds.ode.parts[name], bounds.chain.parts[name])


def assert_same_terms(terms: Terms, expected: Terms, **tolerance) -> None:
    assert list(terms.parts) == list(expected.parts)
    for name, values in expected.parts.items():
        torch.testing.assert_close(terms.parts[name], values, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture
def pixels():
    """Random 8-bit images, [6, 3, 8, 8], scaled to [-1, 1]."""
    levels = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return levels.float() / 127.5 - 1


def tiny_pipeline(conditioning=None, **options) -> LatentDiffusion:
    """Return an untrained pipeline for 8 x 8 images, with weights large enough that every input has an effect."""
    conditioning = conditioning or NoCondition()
    torch.manual_seed(0)
    model = PatchAutoencoderKL(patch=2, latent_channels=3, block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    autoencoder = Autoencoder(model.eval())
    autoencoder.statistics = LatentStatistics(
        [0.1, 0.0, -0.2], [1.5, 0.5, 1.0], [0.3, 0.4, 0.5], "images", autoencoder.weights_sha256()
    )
    sizes = {"sample_size": 4, "in_channels": 3, "out_channels": 3, **conditioning.network_options()}
    network = DiT(patch_size=1, hidden_dim=16, depth=1, head_dim=8, **sizes).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return LatentDiffusion(
        network=network,
        autoencoder=autoencoder,
        schedule=cosine(12),
        prediction="v",
        conditioning=conditioning,
        contract=LatentContract(autoencoder.weights_sha256(), "images", 8, 2, 3, 0.2, False),
        latent_shape=(3, 4, 4),
        **options,
    )


def test_terms_add_up_and_convert_to_bits_per_dim(pixels):
    bounds = two_stage_bound(tiny_pipeline(), pixels, {}, steps=4, ode={"rtol": 1e-2, "atol": 1e-2})
    names = ["decoder", "encoder", "volume", "L_T", "sum of L_t-1", "L_0"]
    assert list(bounds.chain.parts) == names
    assert list(bounds.vae.parts) == ["decoder", "encoder", "N(0, I) prior"]
    assert list(bounds.ode.parts) == ["decoder", "encoder", "volume", "ODE, z_1", "L_0"]
    for terms in (bounds.chain, bounds.vae, bounds.ode):
        torch.testing.assert_close(terms.total, sum(terms.parts.values()))
        metrics = terms.metrics()
        assert set(metrics) == {*terms.parts, "total"}
        bits = terms.total / (3 * 8 * 8 * math.log(2))
        torch.testing.assert_close(terms.bits_per_dim(terms.total), bits)
        assert metrics["total"].value == pytest.approx(bits.mean().item())
        assert metrics["total"].value == pytest.approx(sum(metrics[name].value for name in terms.parts))
        assert metrics["total"].standard_error == pytest.approx(scipy.stats.sem(bits.numpy()))
        for name in ("decoder", "encoder"):
            assert torch.equal(terms.parts[name], bounds.vae.parts[name]), "all priors use the same sample of z_raw"
    error = bounds.chain.monte_carlo_variance.sum().sqrt().item() / 6 / (192 * math.log(2))
    assert bounds.chain.monte_carlo_error == pytest.approx(error) and bounds.vae.monte_carlo_error is None
    volume = 16 * math.log(1.5 * 0.5 * 1.0)
    assert bounds.chain.parts["volume"].tolist() == pytest.approx([volume] * 6)
    assert bounds.chain.total.dtype == torch.float64
    assert_same_terms(vae_bound(tiny_pipeline().autoencoder, pixels), bounds.vae)
    assert math.isnan(mean_metric(torch.ones(1)).standard_error)


@pytest.mark.parametrize("steps", [None, 6])
def test_bound_for_an_image_depends_only_on_seed_and_index(pixels, steps):
    pipeline = tiny_pipeline(ClassCondition(["cat", "dog", "owl"]))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def bound(count=6, labels=labels, **options):
        condition = {"label": labels[:count]}
        return two_stage_bound(pipeline, pixels[:count], condition, steps=steps, **options).chain

    expected = bound()
    assert_same_terms(bound(), expected)
    for batch_size in (1, 4, 1000):
        assert_same_terms(bound(batch_size=batch_size), expected, rtol=1e-4, atol=1e-3)
    for name, values in bound(3).parts.items():
        torch.testing.assert_close(values, expected.parts[name][:3], rtol=1e-4, atol=1e-3)
    assert (bound(seed=1).total != expected.total).all()
    relabelled_total = bound(labels=torch.tensor([0, 1, 2, 0, 2, 2])).total
    has_changed = (relabelled_total - expected.total).abs() > 1e-3
    assert has_changed.tolist() == [False, False, False, False, True, False], "only image 4 has a different condition"


def test_ode_uses_the_condition_of_each_image(pixels):
    pipeline, ode = tiny_pipeline(ClassCondition(["cat", "dog", "owl"])), {"rtol": 1e-3, "atol": 1e-3}
    totals, relabelled_totals = (
        two_stage_bound(pipeline, pixels, {"label": torch.tensor(labels)}, steps=4, batch_size=4, ode=ode).ode.total
        for labels in ([0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 2, 2])
    )
    assert ((relabelled_totals - totals).abs() > 0.05).tolist() == [False, False, False, False, True, False]


def test_ode_bound_is_independent_of_the_batch_size_within_tolerance(pixels):
    pipeline = tiny_pipeline()
    calls = []

    def bound(images=pixels, probes=2, **options):
        ode = {"rtol": 1e-3, "atol": 1e-3, "probes": probes}
        return two_stage_bound(pipeline, images, {}, steps=4, ode=ode, **options)

    bounds = bound(on_progress=lambda *call: calls.append(call))
    assert calls[-2:] == [("ODE", 0, 6), ("ODE", 6, 6)] and calls[0][0] == "chain"
    small_batches = bound(pixels[:4], batch_size=2)
    torch.testing.assert_close(small_batches.ode.total, bounds.ode.total[:4], rtol=0, atol=0.05)
    exact, estimated = bound(probes=None), bound(probes=16)
    assert bound(probes=1).ode_probe_variance is None and exact.ode_probe_variance is None
    z_score = (estimated.ode.total - exact.ode.total) / estimated.ode_probe_variance.sqrt()
    print(f"\n16 probes minus the exact trace, in standard errors: {z_score.numpy().round(2)}")
    assert z_score.abs().max() < 4 and 0.1 < z_score.square().mean() < 3


def test_nan_from_the_autoencoder_is_reported(pixels, monkeypatch):
    pipeline = tiny_pipeline()
    encode, bad_image = pipeline.autoencoder.encode, pixels[4]

    def encode_with_nan(images):
        mean, log_variance = encode(images)
        mean[(images == bad_image).flatten(1).all(1)] = math.nan
        return mean, log_variance

    monkeypatch.setattr(pipeline.autoencoder, "encode", encode_with_nan)
    with pytest.raises(UserError, match=r"autoencoder.*image 4 .*not finite.*optimizer\.lr"):
        two_stage_bound(pipeline, pixels, {}, batch_size=3)


class NaNNetwork(nn.Module):
    """A network whose output is NaN for label 1, or at real-valued t."""

    def __init__(self, network, at_real_t=False):
        super().__init__()
        self.network, self.at_real_t = network, at_real_t

    def forward(self, z_t, timestep, label=None):
        output = self.network(z_t, timestep, **({} if label is None else {"label": label}))
        is_nan = timestep.is_floating_point() if self.at_real_t else (label == 1)[:, None, None, None]
        return torch.where(torch.as_tensor(is_nan), math.nan, output)


def test_nan_from_the_network_is_reported(pixels):
    pipeline = tiny_pipeline(ClassCondition(["cat", "dog"]))
    pipeline.network = NaNNetwork(pipeline.network)
    with pytest.raises(UserError, match=r"image 3 at t = 1 is nan.*optimizer\.lr"):
        two_stage_bound(pipeline, pixels, {"label": torch.tensor([0, 0, 0, 1, 0, 1])})


def test_nan_in_the_ode_is_reported(pixels):
    pipeline = tiny_pipeline()
    pipeline.network = NaNNetwork(pipeline.network, at_real_t=True)
    with pytest.raises(UserError, match=r"ODE.*images 0 to 3: .*not finite.*rtol=.*ode="):
        two_stage_bound(pipeline, pixels, {}, batch_size=4, ode={})


VQ = PatchVQModel(patch=1, block_out_channels=(8,), norm_num_groups=4)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model": VQ}, {}, "PatchVQModel has no density.*stage=vae regulariser=kl"),
        ({"statistics": None}, {}, r"no latent statistics.*latents\.json"),
        ({}, {"variance": "huge"}, "variance=huge is unknown.*fixed_small, fixed_large, learned_range, optimal"),
        ({}, {"variance": "learned_range"}, "variance=learned_range needs a network that learned Sigma.*fixed_small"),
        ({}, {"variance": "optimal"}, r"not been fitted for this model yet.*tools/likelihood\.py .* variance=optimal"),
        (
            {"z_0_mse": torch.ones(12, dtype=torch.float64)},
            {"variance": "optimal"},
            r"z_0_mse.*T \+ 1 = 13.*got 12.*Delete",
        ),
        ({}, {"steps": 5}, "steps=5 must be.* even .*4 to T = 12.* 'all'"),
        ({}, {"steps": "abc"}, "steps=abc must be.* even"),
        ({}, {"ode": {"probes": 0}}, "probes=0 must be 1 or more"),
        ({}, {"ode": {"rtol": "fine"}}, "rtol=fine must be a number"),
        ({}, {"ode": {"rtol": 0.0, "atol": 0.0}}, "rtol and atol must be at least 1e-12; got rtol = 0.0"),
        (
            {"schedule": cosine(1)},
            {"variance": "fixed_large", "ode": {}},
            "ODE.* one step.* ode=",
        ),
    ],
)
def test_invalid_options_are_rejected_before_any_computation(pixels, monkeypatch, changes, options, message):
    pipeline = tiny_pipeline()
    for name, value in changes.items():
        setattr(pipeline if hasattr(pipeline, name) else pipeline.autoencoder, name, value)
    monkeypatch.setattr(two_stage, "_encode_images", lambda *_: pytest.fail("computation started"))
    with pytest.raises(UserError, match=message) as error:
        two_stage_bound(pipeline, pixels, {}, **options)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory) -> ImageData:
    """Sixty 8 x 8 images in two classes."""
    folder = tmp_path_factory.mktemp("likelihood")
    make_images(folder / "pets/cat", 30, size=8)
    make_images(folder / "pets/dog", 30, size=8, seed=1)
    return prepare(ImageFolder(folder / "pets"), resolution=8, cache_dir=folder, val_fraction=0.2, progress=False)


@pytest.fixture(scope="module")
def finished_runs(images, tmp_path_factory) -> Path:
    """A folder with a finished VAE run and a finished diffusion run on `images`."""
    folder = tmp_path_factory.mktemp("finished")
    pipeline = tiny_pipeline(ClassCondition(["cat", "dog"]))
    vae = finished_run(folder / "runs/vae/first", "vae", images)
    pipeline.autoencoder.save(vae.autoencoder_folder)
    diffusion = finished_run(folder / "runs/diffusion/first", "diffusion", images, chain_sha256=pipeline.chain_sha256)
    pipeline.save(diffusion.path / "pipeline")
    return folder


@pytest.fixture
def runs(finished_runs, tmp_path, monkeypatch) -> tuple[Run, Run]:
    """Copies of both finished runs: the VAE run and the diffusion run."""
    shutil.copytree(finished_runs / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Run.open("runs/vae/first"), Run.open("runs/diffusion/first")


@pytest.fixture
def measure(call, runs):
    """Return a function that runs `ldm likelihood` and returns the output and the content of likelihood.json."""

    def measure(run: Run, *arguments: str) -> tuple[str, dict]:
        result = call(main, "likelihood", f"run={run.path}", "device=cpu", *arguments)
        assert result.code == 0, result
        return result.out, json.loads((run.path / "likelihood.json").read_text())

    return measure


@pytest.fixture
def error_message(call, runs):
    """Return a function that runs `ldm likelihood` and returns the error message, which must be a single line."""

    def error_message(*arguments: str) -> str:
        result = call(main, "likelihood", "device=cpu", *arguments)
        assert result.code == 2 and result.err.startswith("error: ") and result.err.count("\n") == 1, result
        return result.err

    return error_message


def test_likelihood_report_for_a_diffusion_run(runs, measure, images):
    _, run = runs
    output, content = measure(run, "steps=all", "ode=true", "probes=2", "num_images=8")
    for column, keys in {
        "chain": ("decoder", "encoder", "volume", "L_T", "sum of L_t-1", "L_0", "monte_carlo_error"),
        "ODE": ("decoder", "encoder", "volume", "ODE, z_1", "L_0"),
        "VAE": ("decoder", "encoder", "N(0, I) prior"),
    }.items():
        assert set(content[column]) == {*keys, "total", "standard_error"}
        assert np.mean(content["per_image"][column]) == pytest.approx(content[column]["total"])
        assert f"{content[column]['total']:.4f}" in output
    assert all(label in output for label in BOUND_ROWS.values()), output
    assert content["images"] == f"{images.name}/val@{images.fingerprint[:8]}" and content["num_dims"] == 192
    assert set(content["per_image"]["index"]) <= set(images.val_indices.tolist())
    assert content["condition"] == "class" and content["variance"] == "fixed_small"
    assert content["steps"] == "all" and content["num_steps"] == 12
    assert content["curve"]["t"] == list(range(1, 13)) and set(content["curve"]["width"]) == {1.0}
    curve = content["curve"]["bits_per_dim_of_one_t"]
    assert curve[0] == pytest.approx(content["chain"]["L_0"])
    assert sum(curve[1:]) == pytest.approx(content["chain"]["sum of L_t-1"])
    differences = np.subtract(content["per_image"]["ODE"], content["per_image"]["chain"])
    assert_matches(content["ode_minus_chain"], differences)
    assert re.search(rf"ODE minus chain.* {re.escape(f'{differences.mean():+.4f}')}", output)
    assert content["ode_options"]["evaluations"] > 20 and content["ode_options"]["probe_error"] > 0

    _, subset = measure(run, "steps=4", "num_images=4", "split=train", "batch_size=3")
    assert subset["steps"] == 4 and subset["curve"]["width"] == [1.0, 11.0] and "ODE" not in subset
    assert set(subset["per_image"]["index"]) <= set(images.train_indices.tolist())
    assert (run.path / "likelihood.png").stat().st_size > 10_000


def assert_matches(difference: dict, per_image: np.ndarray) -> None:
    assert difference["mean"] == pytest.approx(per_image.mean())
    assert difference["standard_error"] == pytest.approx(scipy.stats.sem(per_image))


def test_optimal_sigma_is_fitted_once_and_saved_for_sampling(runs, measure, images):
    _, run = runs
    options = ["num_images=6", "steps=all"]
    against = f"against={run.path}"
    output, content = measure(run, "variance=optimal", against, "against_variance=fixed_small", *options)
    saved = json.loads((run.path / "pipeline" / VARIANCE_FILE).read_text())
    assert saved["data"] == images.fingerprint and saved["images"] == len(images.train_indices)
    assert content["variance"] == "optimal" and content["difference"]["against"]["variance"] == "fixed_small"
    differences = np.subtract(content["per_image"]["chain"], content["difference"]["against"]["per_image"]["chain"])
    assert_matches(content["difference"], differences)
    assert differences.mean() < 0
    assert f"minus {run.path} fixed_small" in output and f"{differences.mean():+.4f}" in output
    for term in ("decoder", "encoder", "volume", "L_T"):
        assert content["chain"][term] == content["difference"]["against"]["chain"][term], "the same random numbers"

    table = load_z_0_mse(run.path / "pipeline")
    assert table.tolist() == saved["z_0_mse"] and len(table) == 13
    measure(run, "variance=optimal", *options)
    assert json.loads((run.path / "pipeline" / VARIANCE_FILE).read_text()) == saved, "fitted only once"
    pipeline = Run.open(run.path).pipeline()
    assert torch.equal(pipeline.z_0_mse, table), "available for sampling"


def test_optimal_sigma_is_fitted_on_the_training_split_for_any_batch_size(runs, measure, images, monkeypatch):
    _, run = runs
    tables, calls = [], []

    def record_call(denoiser, z_0, condition, **options):
        calls.append((z_0, condition["label"]))
        return fit_z_0_mse(denoiser, z_0, condition, **options)

    monkeypatch.setattr(optimal_variance, "fit_z_0_mse", record_call)
    for size in (5, 64):
        measure(run, "variance=optimal", "num_images=2", "steps=4", f"batch_size={size}")
        file = run.path / "pipeline" / VARIANCE_FILE
        tables.append(load_z_0_mse(run.path / "pipeline"))
        file.unlink()
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-5, atol=0)
    (z_0, labels), (z_0_large_batch, _) = calls
    torch.testing.assert_close(z_0, z_0_large_batch, rtol=0, atol=1e-4)
    autoencoder = run.pipeline().autoencoder
    mean, log_var = autoencoder.encode(images.batch(images.train_indices))
    noise_variance = (log_var.exp().mean((0, 2, 3)) / torch.tensor([1.5, 0.5, 1.0]).square()).double()
    means = autoencoder.standardise(mean).flatten(1)
    nearest = torch.cdist(z_0.flatten(1), means).argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(images.train_indices))), "each training image once"
    assert labels.tolist() == [images.labels[i] for i in images.train_indices[nearest.numpy()]]
    noise = z_0 - means[nearest].reshape(z_0.shape)
    torch.testing.assert_close(noise.double().var((0, 2, 3)), noise_variance, rtol=0.2, atol=0)


def test_likelihood_report_for_a_vae_run(runs, measure):
    run, diffusion = runs
    output, content = measure(run, "num_images=5")
    assert list(content["per_image"]) == ["VAE", "index"] and "variance" not in content
    assert all(BOUND_ROWS[key] in output for key in ("decoder", "encoder", "N(0, I) prior"))
    assert (run.path / "likelihood.png").stat().st_size > 10_000
    output, diffusion_content = measure(diffusion, "num_images=5", "steps=4", f"against={run.path}")
    assert diffusion_content["VAE"] == pytest.approx(content["VAE"]), "the same autoencoder on the same images"
    differences = np.subtract(diffusion_content["per_image"]["chain"], content["per_image"]["VAE"])
    assert_matches(diffusion_content["difference"], differences)
    assert f"minus {run.path}" in output and f"{differences.mean():+.4f}" in output


VAE = "run=runs/vae/first"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch_size=0"], "batch_size=0 must be 1 or more"),
        ([], "steps=64 must be.* even .*4 to T = 12"),
        (["steps=4", "against_variance=optimal"], "against_variance=optimal .*needs against="),
        (["steps=4", "against=nowhere"], "against=nowhere does not exist"),
        (["steps=4", "against=runs/vae/first", "against_variance=optimal"], "variance=optimal .*vae/first.*VAE run"),
        ([VAE, "ode=true"], "ode=true .*runs/vae/first.*VAE run"),
        ([VAE, "variance=optimal"], "variance=optimal .*runs/vae/first.*VAE run"),
    ],
)
def test_invalid_command_line_options_are_rejected(error_message, runs, monkeypatch, arguments, message):
    monkeypatch.setattr(two_stage, "_encode_images", lambda *_: pytest.fail("computation started"))
    assert re.search(message, error_message(*([] if VAE in arguments else [f"run={runs[1].path}"]), *arguments))


def test_split_with_one_image_is_rejected(error_message, runs):
    _, run = runs
    run.update(val_fraction=0.0)
    assert (
        "split=val has 1 image" in (message := error_message(f"run={run.path}", "steps=4")) and "split=train" in message
    )


def test_comparison_with_a_run_on_different_images_is_rejected(error_message, runs, monkeypatch):
    vae, run = runs
    vae.update(val_fraction=0.4)
    monkeypatch.setattr(two_stage, "_encode_images", lambda *_: pytest.fail("computation started"))
    message = error_message(f"run={run.path}", "steps=4", f"against={vae.path}")
    assert "not trained and validated on the same images" in message and "data.val_fraction" in message


def test_edited_noise_schedule_is_rejected(error_message, runs):
    _, run = runs
    file = run.path / "pipeline/model_index.json"
    index = json.loads(file.read_text())
    index["settings"]["schedule"]["alpha_bar"][5] *= 0.99
    file.write_text(json.dumps(index))
    message = error_message(f"run={run.path}", "steps=4")
    assert re.search(r"pipeline/model_index\.json .*T = 12.* training.* [0-9a-f]{12}\b", message)


def test_failed_fit_of_sigma_is_reported(error_message, runs, monkeypatch):
    _, run = runs
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda *args, **options: forward(*args, **options) * math.nan)
    message = error_message(f"run={run.path}", "steps=4", "variance=optimal")
    assert re.search("variance=optimal cannot be fitted: .*image", message)
    assert not (run.path / "pipeline" / VARIANCE_FILE).exists()


def test_pixel_chain_uses_the_probability_mass_of_8_bit_bins():
    """If p(z_0 | z_1) is much wider than a bin, the probability mass of a bin is the density times the bin width."""
    statistics = LatentStatistics([0.1, -0.1, 0.0], [0.8, 1.0, 1.2], [0.0] * 3, "", "")
    autoencoder = Autoencoder(IdentityAutoencoder(), statistics)
    pipeline = gaussian_pipeline(autoencoder, vp_schedule(16), shape=(3, 2, 2))
    levels = torch.randint(40, 210, (5, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    images = levels / 127.5 - 1
    bounds = two_stage_bound(pipeline, images, {})
    assert bounds.vae is None and list(bounds.chain.parts) == ["L_T", "sum of L_t-1", "L_0"]
    generators = sample_generators(0, range(5))
    density = variational_bound(
        pipeline.denoiser(),
        autoencoder.standardise(images),
        generators=generators,
        variance="optimal",
        z_0_mse=pipeline.z_0_mse,
    )
    bins = 4 * (two_stage.BIN_WIDTH / float64([0.8, 1.0, 1.2])).log().sum()
    torch.testing.assert_close(bounds.chain.total, density.total - bins, rtol=0, atol=5e-3)
    assert bounds.chain.total.min() > 0, "-log p is positive for discrete values"
