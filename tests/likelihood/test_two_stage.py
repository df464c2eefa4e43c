"""The two-stage bound where everything is Gaussian, and what is refused, reported and drawn of it.

Setting: x = W z_raw + noise with the exact posterior as encoder, z = (z_raw - mean) / std, z ~ N(0, c) and its exact
denoiser. Given x, the bound is a polynomial of degree two in the noise of the chain, and so is the decoder's term in
the noise of z_raw where the decoder is continuous: Gauss-Hermite rules give expectations without error, and generators
that draw their nodes carry them through `two_stage_bound` as it is.
"""

import json
import math
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
from ldm.likelihood import optimal_variance
from ldm.likelihood import two_stage as likelihood
from ldm.likelihood.report import BOUND_ROWS
from ldm.likelihood.two_stage import Terms, mean_metric, two_stage_bound, vae_bound
from ldm.networks.conditioning import ClassCondition, NoCondition
from ldm.networks.dit import DiT
from ldm.runs.run import Run
from ldm.runtime.random import derive_seed, sample_generators
from ldm.sampling.pipeline import VARIANCE_FILE, LatentDiffusionPipeline, load_z_0_mse
from tests.finished_run import finished_run

C = 0.1
SQRT_3 = 3**0.5
NODES, SHARES = (-SQRT_3, 0.0, SQRT_3), torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
ONE_CHANNEL = {"gain": [[0.3]], "noise": [0.08], "mean": [0.2], "std": [1.6]}
TURNED = {"gain": [[0.26, -0.15], [0.15, 0.26]], "noise": [0.08, 0.08], "mean": [0.2, -0.3], "std": [1.6, 1.8]}


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def vp(num_steps: int) -> NoiseSchedule:
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return NoiseSchedule("vp", torch.exp(-(0.1 * u + 9.95 * u**2)))


def exact_mse(schedule: NoiseSchedule, c: float = C) -> torch.Tensor:
    a = schedule.alpha_bar
    return c * (1 - a) / (a * c + 1 - a)


class LinearGaussian(Autoencoder):
    """x = W z_raw + noise at every location, z_raw ~ N(mean, c std^2); q(z_raw | x) is the exact posterior.

    Its columns are orthogonal in the noise's metric, so that the posterior is diagonal. `widen` and `shift` spoil it.
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
    """z_0 = gain E[z_0 | z_t] for data N(0, c); at a real t as well."""

    def __init__(self, schedule: NoiseSchedule, c: float = C, gain: float = 1.0) -> None:
        super().__init__()
        self.schedule, self.c = schedule, c
        self.gain = nn.Parameter(float64(gain))

    def forward(self, z_t, timestep):
        a = self.schedule.at(timestep + 1, z_t)
        return (self.gain * a.sqrt() * self.c / (a * self.c + 1 - a)).to(z_t) * z_t


def gaussian_pipeline(autoencoder, schedule, *, c=C, gain=1.0, variance="optimal", shape=(1, 1, 1)):
    return LatentDiffusionPipeline(
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


class Nodes(torch.Generator):
    """Draws one node of a quadrature for z_raw, then another for all noise in the chain."""

    latent: torch.Tensor | None
    chain: float


@pytest.fixture
def quadrature(monkeypatch):
    """quadrature(bound, x, nodes=NODES, shares=SHARES): parts of bound(images), in expectation over all noise, [n].

    `bound` sees every image of x once per combination of nodes; the chain has NODES, z_raw those that are given.
    """
    drawn = torch.randn

    def randn(*shape, generator=None, **options):
        if not isinstance(generator, Nodes):
            return drawn(*shape, generator=generator, **options)
        node, generator.latent = generator.latent, None
        value = float64(generator.chain) if node is None else node[:, None, None]
        return value.expand(*shape)

    monkeypatch.setattr(torch, "randn", randn)

    def quadrature(bound, x, nodes=NODES, shares=SHARES):
        channels = x.shape[1]
        latents = torch.cartesian_prod(*[float64(nodes)] * channels).reshape(-1, channels)
        weights = torch.cartesian_prod(*[shares] * channels).reshape(-1, channels).prod(1)
        grid = [(latent, chain) for latent in latents for chain in NODES]

        def generators(seed, indices):
            found = []
            for i in indices:
                own = Nodes()
                own.latent, own.chain = grid[i % len(grid)]
                found.append(own)
            return found

        monkeypatch.setattr(likelihood, "sample_generators", generators)
        terms = bound(x.repeat_interleave(len(grid), 0))
        over = torch.outer(weights, SHARES).flatten()
        return {name: values.reshape(len(x), -1) @ over for name, values in terms.parts.items()}

    return quadrature


@pytest.fixture
def any_pixel(monkeypatch):
    """Images of any values."""


@pytest.fixture
def continuous(monkeypatch, any_pixel):
    """A continuous Gaussian decoder in place of the discretised one."""

    def nll(x, mean, scale, *_, **__):
        return -torch.distributions.Normal(mean, scale).log_prob(x)

    monkeypatch.setattr(likelihood, "discretised_nll", nll)


def chain_of(pipeline):
    return lambda images: two_stage_bound(pipeline, images, {}, batch_size=100_000).chain


@pytest.mark.parametrize("num_steps", [1, 2, 16, 64])
def test_continuous_and_exact_it_is_the_likelihood(quadrature, continuous, num_steps):
    """E[bound] = E[-log p(x)] + KL(q(z_T) || N(0, I)), for two channels of 2 x 3 latents with a std of their own each.

    Terms add up over dimensions, which are independent and share their nodes.
    """
    schedule, shape = vp(num_steps), (2, 2, 3)
    model = LinearGaussian([[0.3, 0], [0, -0.7]], [0.08, 0.5], [0.2, -3.0], [1.6, 4.0])
    location = (model.gain @ model.mean)[:, None, None]
    spread = (model.gain.square() @ (C * model.std.square()) + model.noise.square())[:, None, None]
    x = torch.stack([(location + spread.sqrt() * node).expand(shape) for node in NODES])
    parts = quadrature(chain_of(gaussian_pipeline(model, schedule, shape=shape)), x)
    bound = sum(parts.values()) @ SHARES
    nll = 0.5 * (2 * math.pi * math.e * spread).log().expand(shape).sum()
    end = schedule.alpha_bar[-1] * C + 1 - schedule.alpha_bar[-1]
    kl_of_the_end = 12 * 0.5 * (end - 1 - end.log())
    print(f"\nT = {num_steps}: E[bound] {bound:.9f}, minus -log p(x) + KL: {bound - nll - kl_of_the_end:+.1e}")
    assert bound.item() == pytest.approx((nll + kl_of_the_end).item(), abs=1e-6)
    volume = 6 * (math.log(1.6) + math.log(4.0))
    torch.testing.assert_close(parts["volume"], float64([volume] * 3))
    assert volume > 1, "without it, or with its sign turned, the bound would be off by nats"


def prior_variance(pipeline) -> float:
    """Var z_0 where the pipeline's own chain starts from N(0, 1): every step is linear and Gaussian."""
    schedule, one, variance = pipeline.schedule, torch.ones(1, 1, dtype=torch.float64), 1.0
    for t in range(schedule.num_steps, 0, -1):
        predicted = pipeline.denoiser()(one, t).z_0.detach()
        mean, _ = posterior(schedule, predicted, one, t - 1, t)
        sigma = log_variance(schedule, t - 1, t, pipeline.variance, like=one, z_0_mse=pipeline.z_0_mse).exp()
        variance = mean.item() ** 2 * variance + sigma.item()
    return variance


def discretised(pipeline, x, width: float) -> torch.Tensor:
    """-log p(x) of every image of one location, by the trapezoid rule over z, with masses from scipy's normal."""
    model, variance = pipeline.autoencoder, prior_variance(pipeline)
    channels, points = x.shape[1], 4001 if x.shape[1] == 1 else 321
    line = torch.linspace(-12, 12, points, dtype=torch.float64)
    z = variance**0.5 * torch.cartesian_prod(*[line] * channels).reshape(-1, channels)
    prior = -0.5 * (z.square() / variance).sum(1) - channels / 2 * math.log(2 * math.pi)
    decoded = scipy.stats.norm(((z * model.std + model.mean) @ model.gain.T).numpy(), model.noise.numpy())
    found = []
    for image in x.flatten(1).numpy():
        below = np.where(image <= -1 + width / 2, -np.inf, image - width / 2)
        above = np.where(image >= 1 - width / 2, np.inf, image + width / 2)
        mass = torch.from_numpy(decoded.cdf(above) - decoded.cdf(below)).prod(1)
        found.append(-((prior.exp() * mass).sum() * (24 / (points - 1)) ** channels).log())
    return torch.stack(found)


def hermite(count: int) -> tuple[list[float], torch.Tensor]:
    nodes, shares = np.polynomial.hermite_e.hermegauss(count)
    return nodes.tolist(), torch.from_numpy(shares / shares.sum())


CASES = {1: (ONE_CHANNEL, [[-0.5], [-0.25], [0.0], [0.5]], 40), 2: (TURNED, [[0.0, 0.0], [-0.25, 0.25]], 12)}


@pytest.mark.parametrize("dimensions", [1, 2])
def test_discretised_it_closes_on_the_likelihood_with_the_bin_width(quadrature, any_pixel, monkeypatch, dimensions):
    """With everything else exact the gap is KL(q(z | x) || p(z | x)), q being the posterior for the middle of the bin.

    The mean over a bin moves p(z | x) in second order of the width, and the KL is of the square of that: the fourth.
    """
    options, points, count = CASES[dimensions]
    pipeline = gaussian_pipeline(LinearGaussian(**options), vp(4), shape=(dimensions, 1, 1))
    x, rule = float64(points)[..., None, None], hermite(count)
    print(f"\n{dimensions}-D, gap = E[bound] + log p(x) in nats: bins, width, gap of every x")
    widths, gaps = [2 / bins for bins in (8, 16, 32, 64, 128)], []
    for width in widths:
        monkeypatch.setattr(likelihood, "BIN", width)
        bound = sum(quadrature(chain_of(pipeline), x, *rule).values())
        gaps.append(bound - discretised(pipeline, x, width))
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
def test_it_is_never_below_whatever_is_wrong(quadrature, any_pixel, monkeypatch, dimensions, variance):
    """An encoder that is too wide and off by half its width, a denoiser that shrinks, and x in the open outer bins."""
    options, points, count = CASES[dimensions]
    model = LinearGaussian(**options, widen=1.7, shift=0.5)
    pipeline = gaussian_pipeline(model, vp(4), gain=0.8, variance=variance, shape=(dimensions, 1, 1))
    x = torch.cat([float64(points), float64([[-1.0] * dimensions, [1.0] * dimensions])])[..., None, None]
    for width in (0.5, 2 / 64):
        monkeypatch.setattr(likelihood, "BIN", width)
        bound = sum(quadrature(chain_of(pipeline), x, *hermite(count)).values())
        gap = bound - discretised(pipeline, x, width)
        print(f"\n{dimensions}-D, {variance}, width {width:.3f}: {'  '.join(f'{value:.3f}' for value in gap.tolist())}")
        assert gap.min() > 0.05


def test_the_autoencoder_alone_has_its_analytic_value(quadrature, any_pixel):
    """KL(q || N(0, 1)) in closed form, and the decoder's mean over q by the trapezoid rule."""
    model, x = LinearGaussian(**ONE_CHANNEL), (float64([0, 100, 128, 255]) / 127.5 - 1)[:, None, None, None]
    parts = quadrature(lambda images: vae_bound(model, images, batch_size=1000), x, *hermite(60))
    mean, log_var = (moment[:, 0, 0] for moment in model.encode(x))
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten()
    torch.testing.assert_close(parts["encoder"] + parts["N(0, I) prior"], kl)
    for i, pixel in enumerate([0, 100, 128, 255]):
        z = q.mean[i] + q.stddev[i] * torch.linspace(-9, 9, 4001, dtype=torch.float64)
        decoded = scipy.stats.norm(model.gain.item() * z.numpy(), model.noise.item())
        edges = [-np.inf, *(np.arange(1, 256) - 0.5), np.inf]
        low, high = (edge / 127.5 - 1 for edge in edges[pixel : pixel + 2])
        upper = low > decoded.mean()
        log_mass = np.log(np.where(upper, decoded.sf(low) - decoded.sf(high), decoded.cdf(high) - decoded.cdf(low)))
        log_q = torch.distributions.Normal(q.mean[i], q.stddev[i]).log_prob(z).exp().numpy()
        assert parts["decoder"][i].item() == pytest.approx(-np.trapezoid(log_q * log_mass, z.numpy()), rel=1e-6)


def test_the_ode_has_the_density_of_the_flow(any_pixel):
    """Of N(0, 1) at T carried to t = 1 by an exact denoiser of N(0, c): N(0, spread_1 / spread_T)."""
    schedule, shape = cosine(100), (2, 3, 3)
    model = LinearGaussian(**TURNED)
    pipeline = gaussian_pipeline(model, schedule, variance="fixed_large", shape=shape)
    x = 0.2 * torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = two_stage_bound(pipeline, x, {}, steps=8)
    found = two_stage_bound(pipeline, x, {}, steps=8, ode={"rtol": 1e-6, "atol": 1e-6, "probes": 2}, batch_size=2)
    same_terms(found.chain, plain.chain)
    assert plain.ode is None and plain.ode_evaluations == 0 and found.ode_evaluations > 3 * 20
    # The Jacobian is a multiple of the identity, of which a probe is exact.
    assert found.ode_probe_variance.shape == (5,) and found.ode_probe_variance.max() < 1e-9

    generators = [torch.Generator().manual_seed(derive_seed(0, 4, i)) for i in range(5)]
    eps = torch.stack([torch.randn(shape, generator=own) for own in generators])
    draws = [torch.randn(shape, generator=own) for own in likelihood.sample_generators(0, range(5))]
    mean, log_var = model.encode(x)
    z_0 = model.standardise(mean + (0.5 * log_var).exp() * torch.stack(draws))
    z_1, (first, last) = marginal(schedule, z_0, 1, eps), schedule.alpha_bar[[1, -1]].tolist()
    spread = [a * C + 1 - a for a in (first, last)]
    p = torch.distributions.Normal(0.0, (spread[0] / spread[1]) ** 0.5)
    entropy = 0.5 * 18 * math.log(2 * math.pi * math.e * (1 - first))
    expected = -p.log_prob(z_1).flatten(1).sum(1) - entropy
    torch.testing.assert_close(found.ode.parts["ODE, z_1"], expected, atol=1e-3, rtol=0)
    for name in ("decoder", "encoder", "volume", "L_0"):
        assert torch.equal(found.ode.parts[name], found.chain.parts[name])


def same_terms(found: Terms, expected: Terms, **tolerance) -> None:
    assert list(found.parts) == list(expected.parts)
    for name, values in expected.parts.items():
        torch.testing.assert_close(found.parts[name], values, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture
def eight_bit():
    """Random images [6, 3, 8, 8] of 8-bit values."""
    pixels = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return pixels.float() / 127.5 - 1


def tiny(conditioning=None, **options) -> LatentDiffusionPipeline:
    """An untrained pipeline for images of 8 pixels, with weights large enough that everything matters."""
    conditioning = conditioning or NoCondition()
    torch.manual_seed(0)
    model = PatchAutoencoderKL(patch=2, latent_channels=3, block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    parts = Autoencoder(model.eval())
    parts.statistics = LatentStatistics(
        [0.1, 0.0, -0.2], [1.5, 0.5, 1.0], [0.3, 0.4, 0.5], "images", parts.weights_sha256()
    )
    sizes = {"sample_size": 4, "in_channels": 3, "out_channels": 3, **conditioning.network_options()}
    network = DiT(patch_size=1, hidden_dim=16, depth=1, head_dim=8, **sizes).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return LatentDiffusionPipeline(
        network=network,
        autoencoder=parts,
        schedule=cosine(12),
        prediction="v",
        conditioning=conditioning,
        contract=LatentContract(parts.weights_sha256(), "images", 8, 2, 3, 0.2, False),
        latent_shape=(3, 4, 4),
        **options,
    )


def test_the_terms_add_up_and_have_units(eight_bit):
    found = two_stage_bound(tiny(), eight_bit, {}, steps=4, ode={"rtol": 1e-2, "atol": 1e-2})
    names = ["decoder", "encoder", "volume", "L_T", "sum of L_t-1", "L_0"]
    assert list(found.chain.parts) == names
    assert list(found.vae.parts) == ["decoder", "encoder", "N(0, I) prior"]
    assert list(found.ode.parts) == ["decoder", "encoder", "volume", "ODE, z_1", "L_0"]
    for terms in (found.chain, found.vae, found.ode):
        torch.testing.assert_close(terms.total, sum(terms.parts.values()))
        metrics = terms.metrics()
        assert set(metrics) == {*terms.parts, "total"}
        in_bits = terms.total / (3 * 8 * 8 * math.log(2))
        torch.testing.assert_close(terms.bits_per_dim(terms.total), in_bits)
        assert metrics["total"].value == pytest.approx(in_bits.mean().item())
        assert metrics["total"].value == pytest.approx(sum(metrics[name].value for name in terms.parts))
        assert metrics["total"].standard_error == pytest.approx(scipy.stats.sem(in_bits.numpy()))
        for name in ("decoder", "encoder"):
            assert torch.equal(terms.parts[name], found.vae.parts[name]), "priors share the draw of z_raw"
    error = found.chain.monte_carlo_variance.sum().sqrt().item() / 6 / (192 * math.log(2))
    assert found.chain.monte_carlo_error == pytest.approx(error) and found.vae.monte_carlo_error is None
    volume = 16 * math.log(1.5 * 0.5 * 1.0)
    assert found.chain.parts["volume"].tolist() == pytest.approx([volume] * 6)
    assert found.chain.total.dtype == torch.float64
    same_terms(vae_bound(tiny().autoencoder, eight_bit), found.vae)
    assert math.isnan(mean_metric(torch.ones(1)).standard_error)


@pytest.mark.parametrize("steps", [None, 6])
def test_an_image_depends_on_its_seed_and_place_alone(eight_bit, steps):
    pipeline = tiny(ClassCondition(["cat", "dog", "owl"]))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def bound(count=6, labels=labels, **options):
        condition = {"label": labels[:count]}
        return two_stage_bound(pipeline, eight_bit[:count], condition, steps=steps, **options).chain

    together = bound()
    same_terms(bound(), together)
    for batch_size in (1, 4, 1000):
        same_terms(bound(batch_size=batch_size), together, rtol=1e-4, atol=1e-3)
    few = bound(3)
    for name, values in few.parts.items():
        torch.testing.assert_close(values, together.parts[name][:3], rtol=1e-4, atol=1e-3)
    assert (bound(seed=1).total != together.total).all()
    other = bound(labels=torch.tensor([0, 1, 2, 0, 2, 2])).total
    changed = (other - together.total).abs() > 1e-3
    assert changed.tolist() == [False, False, False, False, True, False], "each image has the condition of its row"


def test_the_ode_gives_each_image_the_condition_of_its_row(eight_bit):
    pipeline, ode = tiny(ClassCondition(["cat", "dog", "owl"])), {"rtol": 1e-3, "atol": 1e-3}
    one, two = (
        two_stage_bound(pipeline, eight_bit, {"label": torch.tensor(labels)}, steps=4, batch_size=4, ode=ode).ode.total
        for labels in ([0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 2, 2])
    )
    assert ((two - one).abs() > 0.05).tolist() == [False, False, False, False, True, False]


def test_the_ode_is_paired_and_depends_on_the_batch_within_its_tolerance(eight_bit):
    pipeline = tiny()
    calls = []

    def bound(images=eight_bit, probes=2, **options):
        ode = {"rtol": 1e-3, "atol": 1e-3, "probes": probes}
        return two_stage_bound(pipeline, images, {}, steps=4, ode=ode, **options)

    found = bound(on_progress=lambda *call: calls.append(call))
    assert calls[-2:] == [("ODE", 0, 6), ("ODE", 6, 6)] and calls[0][0] == "chain"
    apart = bound(eight_bit[:4], batch_size=2)
    torch.testing.assert_close(apart.ode.total, found.ode.total[:4], rtol=0, atol=0.05)
    exact, many = bound(probes=None), bound(probes=16)
    assert bound(probes=1).ode_probe_variance is None and exact.ode_probe_variance is None
    score = (many.ode.total - exact.ode.total) / many.ode_probe_variance.sqrt()
    print(f"\n16 probes minus the exact trace, in standard errors of their own: {score.numpy().round(2)}")
    assert score.abs().max() < 4 and 0.1 < score.square().mean() < 3


def test_an_autoencoder_that_answers_nan(eight_bit, monkeypatch):
    pipeline = tiny()
    encode, broken = pipeline.autoencoder.encode, eight_bit[4]

    def spoilt(images):
        mean, log_variance = encode(images)
        mean[(images == broken).flatten(1).all(1)] = math.nan
        return mean, log_variance

    monkeypatch.setattr(pipeline.autoencoder, "encode", spoilt)
    with pytest.raises(UserError, match=r"answer to image 4 is not finite: its training diverged.*optimizer\.lr"):
        two_stage_bound(pipeline, eight_bit, {}, batch_size=3)


class Spoiled(nn.Module):
    """A network whose answer is NaN for label 1, or at a real t."""

    def __init__(self, network, at_real_t=False):
        super().__init__()
        self.network, self.at_real_t = network, at_real_t

    def forward(self, z_t, timestep, label=None):
        output = self.network(z_t, timestep, **({} if label is None else {"label": label}))
        spoiled = timestep.is_floating_point() if self.at_real_t else (label == 1)[:, None, None, None]
        return torch.where(torch.as_tensor(spoiled), math.nan, output)


def test_a_network_that_answers_nan(eight_bit):
    pipeline = tiny(ClassCondition(["cat", "dog"]))
    pipeline.network = Spoiled(pipeline.network)
    with pytest.raises(UserError, match=r"the bound of image 3 at t = 1 is nan.*train it again, with a lower"):
        two_stage_bound(pipeline, eight_bit, {"label": torch.tensor([0, 0, 0, 1, 0, 1])})


def test_an_ode_that_cannot_be_solved(eight_bit):
    pipeline = tiny()
    pipeline.network = Spoiled(pipeline.network, at_real_t=True)
    with pytest.raises(UserError, match=r"no density for images 0 to 3: the ODE is not finite.*leave ode= out"):
        two_stage_bound(pipeline, eight_bit, {}, batch_size=4, ode={})


VQ = PatchVQModel(patch=1, block_out_channels=(8,), norm_num_groups=4)


@pytest.mark.parametrize(
    ("spoilt", "options", "said"),
    [
        ({"model": VQ}, {}, "The autoencoder PatchVQModel has no density.*stage=vae regulariser=kl"),
        ({"statistics": None}, {}, r"was not measured on its training split.*latents\.json"),
        ({}, {"variance": "huge"}, "variance=huge is unknown.*fixed_small, fixed_large, learned_range, optimal"),
        ({}, {"variance": "learned_range"}, "variance=learned_range needs a network that learned Sigma.*fixed_small"),
        ({}, {"variance": "optimal"}, r"not fitted for this model yet.*tools/likelihood\.py .* variance=optimal"),
        (
            {"z_0_mse": torch.ones(12, dtype=torch.float64)},
            {"variance": "optimal"},
            r"does not fit.*T \+ 1 = 13.*Delete",
        ),
        ({}, {"steps": 5}, "steps=5 must be an even number from 4 to T = 12, or all"),
        ({}, {"steps": "abc"}, "steps=abc must be an even number"),
        ({}, {"ode": {"probes": 0}}, "probes=0 must be 1 or more"),
        ({}, {"ode": {"rtol": "fine"}}, "rtol=fine must be a number"),
        ({}, {"ode": {"rtol": 0.0, "atol": 0.0}}, "rtol and atol must be at least 1e-12; got rtol = 0.0"),
        (
            {"schedule": cosine(1)},
            {"variance": "fixed_large", "ode": {}},
            "The ODE has no density here: .* one step",
        ),
    ],
)
def test_what_a_chain_cannot_answer_is_refused_before_anything_is_computed(
    eight_bit, monkeypatch, spoilt, options, said
):
    pipeline = tiny()
    for name, value in spoilt.items():
        setattr(pipeline if hasattr(pipeline, name) else pipeline.autoencoder, name, value)
    monkeypatch.setattr(likelihood, "_encode_images", lambda *_: pytest.fail("computed first"))
    with pytest.raises(UserError, match=said) as refused:
        two_stage_bound(pipeline, eight_bit, {}, **options)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory) -> ImageData:
    """Sixty images of 8 pixels in two classes."""
    place = tmp_path_factory.mktemp("likelihood")
    make_images(place / "pets/cat", 30, size=8)
    make_images(place / "pets/dog", 30, size=8, seed=1)
    return prepare(ImageFolder(place / "pets"), resolution=8, cache_dir=place, val_fraction=0.2, progress=False)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """Where a run of each stage lies as training leaves it, on those images."""
    place = tmp_path_factory.mktemp("trained")
    pipeline = tiny(ClassCondition(["cat", "dog"]))
    vae = finished_run(place / "runs/vae/first", "vae", images)
    pipeline.autoencoder.save(vae.autoencoder_folder)
    diffusion = finished_run(place / "runs/diffusion/first", "diffusion", images, chain_sha256=pipeline.chain_sha256)
    pipeline.save(diffusion.path / "pipeline")
    return place


@pytest.fixture
def runs(trained, tmp_path, monkeypatch) -> tuple[Run, Run]:
    """A copy of those runs: vae, diffusion."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Run.open("runs/vae/first"), Run.open("runs/diffusion/first")


@pytest.fixture
def tool(call, runs):
    """tool(run, *arguments) -> what the command printed, and likelihood.json."""

    def tool(run: Run, *arguments: str) -> tuple[str, dict]:
        ended = call(main, "likelihood", f"run={run.path}", "device=cpu", *arguments)
        assert ended.code == 0, ended
        return ended.out, json.loads((run.path / "likelihood.json").read_text())

    return tool


@pytest.fixture
def fails(call, runs):
    """fails(*arguments) -> the one paragraph in which the command refuses them."""

    def fails(*arguments: str) -> str:
        ended = call(main, "likelihood", "device=cpu", *arguments)
        assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
        return ended.err

    return fails


def test_a_diffusion_run(runs, tool, images):
    _, run = runs
    printed, found = tool(run, "steps=all", "ode=true", "probes=2", "num_images=8")
    for column, keys in {
        "chain": ("decoder", "encoder", "volume", "L_T", "sum of L_t-1", "L_0", "monte_carlo_error"),
        "ODE": ("decoder", "encoder", "volume", "ODE, z_1", "L_0"),
        "VAE": ("decoder", "encoder", "N(0, I) prior"),
    }.items():
        assert set(found[column]) == {*keys, "total", "standard_error"}
        assert np.mean(found["per_image"][column]) == pytest.approx(found[column]["total"])
        assert f"{found[column]['total']:.4f}" in printed
    assert all(label in printed for label in BOUND_ROWS.values()), printed
    assert found["images"] == f"{images.name}/val@{images.fingerprint[:8]}" and found["num_dims"] == 192
    assert set(found["per_image"]["index"]) <= set(images.val_indices.tolist())
    assert found["condition"] == "class" and found["variance"] == "fixed_small"
    assert found["steps"] == "all" and found["num_steps"] == 12
    assert found["curve"]["t"] == list(range(1, 13)) and set(found["curve"]["width"]) == {1.0}
    curve = found["curve"]["bits_per_dim_of_one_t"]
    assert curve[0] == pytest.approx(found["chain"]["L_0"])
    assert sum(curve[1:]) == pytest.approx(found["chain"]["sum of L_t-1"])
    paired = np.subtract(found["per_image"]["ODE"], found["per_image"]["chain"])
    is_paired(found["ode_minus_chain"], paired)
    assert f"ODE minus chain, paired over the images: {paired.mean():+.4f}" in printed
    assert found["ode_options"]["evaluations"] > 20 and found["ode_options"]["probe_error"] > 0

    _, fewer = tool(run, "steps=4", "num_images=4", "split=train", "batch_size=3")
    assert fewer["steps"] == 4 and fewer["curve"]["width"] == [1.0, 11.0] and "ODE" not in fewer
    assert set(fewer["per_image"]["index"]) <= set(images.train_indices.tolist())
    assert (run.path / "likelihood.png").stat().st_size > 10_000


def is_paired(difference: dict, per_image: np.ndarray) -> None:
    assert difference["mean"] == pytest.approx(per_image.mean())
    assert difference["standard_error"] == pytest.approx(scipy.stats.sem(per_image))


def test_optimal_sigma_is_fitted_once_and_kept_for_sampling(runs, tool, images):
    _, run = runs
    options = ["num_images=6", "steps=all"]
    own = f"against={run.path}"
    printed, found = tool(run, "variance=optimal", own, "against_variance=fixed_small", *options)
    kept = json.loads((run.path / "pipeline" / VARIANCE_FILE).read_text())
    assert kept["data"] == images.fingerprint and kept["images"] == len(images.train_indices)
    assert found["variance"] == "optimal" and found["difference"]["against"]["variance"] == "fixed_small"
    paired = np.subtract(found["per_image"]["chain"], found["difference"]["against"]["per_image"]["chain"])
    is_paired(found["difference"], paired)
    assert paired.mean() < 0
    assert f"this minus {run.path} fixed_small, paired over the images: {paired.mean():+.4f}" in printed
    for term in ("decoder", "encoder", "volume", "L_T"):
        assert found["chain"][term] == found["difference"]["against"]["chain"][term], "the same draws"

    table = load_z_0_mse(run.path / "pipeline")
    assert table.tolist() == kept["z_0_mse"] and len(table) == 13
    tool(run, "variance=optimal", *options)
    assert json.loads((run.path / "pipeline" / VARIANCE_FILE).read_text()) == kept, "fitted once"
    pipeline = Run.open(run.path).pipeline()
    assert torch.equal(pipeline.z_0_mse, table), "kept for sampling"


def test_sigma_is_fitted_on_draws_of_the_training_split_whatever_the_batch(runs, tool, images, monkeypatch):
    _, run = runs
    tables, seen = [], []

    def watched(denoiser, z_0, condition, **options):
        seen.append((z_0, condition["label"]))
        return fit_z_0_mse(denoiser, z_0, condition, **options)

    monkeypatch.setattr(optimal_variance, "fit_z_0_mse", watched)
    for size in (5, 64):
        tool(run, "variance=optimal", "num_images=2", "steps=4", f"batch_size={size}")
        file = run.path / "pipeline" / VARIANCE_FILE
        tables.append(load_z_0_mse(run.path / "pipeline"))
        file.unlink()
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-5, atol=0)
    (z_0, labels), (again, _) = seen
    torch.testing.assert_close(z_0, again, rtol=0, atol=1e-4)
    autoencoder = run.pipeline().autoencoder
    mean, log_var = autoencoder.encode(images.batch(images.train_indices))
    noise_variance = (log_var.exp().mean((0, 2, 3)) / torch.tensor([1.5, 0.5, 1.0]).square()).double()
    ours = autoencoder.standardise(mean).flatten(1)
    nearest = torch.cdist(z_0.flatten(1), ours).argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(images.train_indices))), "each training image once"
    assert labels.tolist() == [images.labels[i] for i in images.train_indices[nearest.numpy()]]
    noise = z_0 - ours[nearest].reshape(z_0.shape)
    torch.testing.assert_close(noise.double().var((0, 2, 3)), noise_variance, rtol=0.2, atol=0)


def test_an_autoencoders_run(runs, tool):
    run, diffusion = runs
    printed, found = tool(run, "num_images=5")
    assert list(found["per_image"]) == ["VAE", "index"] and "variance" not in found
    assert all(BOUND_ROWS[key] in printed for key in ("decoder", "encoder", "N(0, I) prior"))
    assert (run.path / "likelihood.png").stat().st_size > 10_000
    printed, both = tool(diffusion, "num_images=5", "steps=4", f"against={run.path}")
    assert both["VAE"] == pytest.approx(found["VAE"]), "the same autoencoder on the same images"
    paired = np.subtract(both["per_image"]["chain"], found["per_image"]["VAE"])
    is_paired(both["difference"], paired)
    assert f"this minus {run.path}, paired over the images: {paired.mean():+.4f}" in printed


VAE = "run=runs/vae/first"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["batch_size=0"], "batch_size=0 must be 1 or more"),
        ([], "steps=64 must be an even number from 4 to T = 12"),
        (["steps=4", "against_variance=optimal"], "against_variance=optimal needs against="),
        (["steps=4", "against=nowhere"], "against=nowhere does not exist"),
        (["steps=4", "against=runs/vae/first", "against_variance=optimal"], "variance=optimal is about the chain"),
        ([VAE, "ode=true"], "ode=true is about the chain, but runs/vae/first"),
        ([VAE, "variance=optimal"], "variance=optimal is about the chain, but runs/vae/first"),
    ],
)
def test_mistakes_on_the_command_line(fails, runs, monkeypatch, arguments, said):
    monkeypatch.setattr(likelihood, "_encode_images", lambda *_: pytest.fail("computed first"))
    assert said in fails(*([] if VAE in arguments else [f"run={runs[1].path}"]), *arguments)


def test_a_split_of_one_image(fails, runs):
    _, run = runs
    run.update(val_fraction=0.0)
    assert "holds 1 image" in (message := fails(f"run={run.path}", "steps=4")) and "split=train" in message


def test_a_run_on_other_images_is_no_comparison(fails, runs, monkeypatch):
    vae, run = runs
    vae.update(val_fraction=0.4)
    monkeypatch.setattr(likelihood, "_encode_images", lambda *_: pytest.fail("measured first"))
    message = fails(f"run={run.path}", "steps=4", f"against={vae.path}")
    assert "not trained and validated on the same images" in message and "data.val_fraction" in message


def test_a_chain_that_was_edited_is_refused(fails, runs):
    _, run = runs
    file = run.path / "pipeline/model_index.json"
    index = json.loads(file.read_text())
    index["schedule"]["alpha_bar"][5] *= 0.99
    file.write_text(json.dumps(index))
    assert "was not trained on" in fails(f"run={run.path}", "steps=4")


def test_a_sigma_that_cannot_be_fitted(fails, runs, monkeypatch):
    _, run = runs
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda *given, **options: forward(*given, **options) * math.nan)
    message = fails(f"run={run.path}", "steps=4", "variance=optimal")
    assert "variance=optimal cannot be fitted: the squared error of image" in message
    assert not (run.path / "pipeline" / VARIANCE_FILE).exists()


def test_a_chain_on_pixels_has_the_mass_of_8_bit_values():
    """Where p(z_0 | z_1) is much wider than a bin, the mass is the density times the bin's width."""
    parts = Autoencoder(IdentityAutoencoder(), LatentStatistics([0.1, -0.1, 0.0], [0.8, 1.0, 1.2], [0.0] * 3, "", ""))
    pipeline = gaussian_pipeline(parts, vp(16), shape=(3, 2, 2))
    levels = torch.randint(40, 210, (5, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    images = levels / 127.5 - 1
    found = two_stage_bound(pipeline, images, {})
    assert found.vae is None and list(found.chain.parts) == ["L_T", "sum of L_t-1", "L_0"]
    generators = sample_generators(0, range(5))
    density = variational_bound(
        pipeline.denoiser(),
        parts.standardise(images),
        generators=generators,
        variance="optimal",
        z_0_mse=pipeline.z_0_mse,
    )
    bins = 4 * (likelihood.BIN / float64([0.8, 1.0, 1.2])).log().sum()
    torch.testing.assert_close(found.chain.total, density.total - bins, rtol=0, atol=5e-3)
    assert found.chain.total.min() > 0, "bits of discrete values are never negative"
