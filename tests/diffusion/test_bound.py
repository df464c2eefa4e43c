"""Tests of the variational bound against closed forms, for an exact denoiser on Gaussian data.

For data N(0, c), the mean squared error of the exact denoiser is mse(t) = c (1 - a_t) / (a_t c + 1 - a_t)
= c / (1 + c snr_t). Each term of the bound is quadratic in z_0 and eps, so a three-node Gauss-Hermite rule computes the
expectation of each term exactly.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from ldm.diffusion.bound import fit_z_0_mse, variational_bound
from ldm.diffusion.bound_terms import bound_term, discretised_nll, prior_kl
from ldm.diffusion.chain import marginal
from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.schedule import NoiseSchedule, cosine, linear, rectified_flow

C = 0.1  # variance of the data
NODES = torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=torch.float64)
QUADRATURE_WEIGHTS = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
CHAIN_LENGTHS = [32, 64, 128, 256, 512, 1024]
NLL = 0.5 * math.log(2 * math.pi * math.e * C)  # expected -log p(z_0) of the data
VARIANCES = ["fixed_small", "fixed_large", "optimal"]


def vp(num_steps):
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return NoiseSchedule("vp", torch.exp(-(0.1 * u + 9.95 * u**2)))


def exact_mse(schedule, c=C):
    a = schedule.alpha_bar
    return c * (1 - a) / (a * c + 1 - a)


def prior_kl_of_gaussian(schedule, c=C):
    """Return KL(q(z_T) || N(0, 1)) for data N(0, c)."""
    variance = schedule.alpha_bar[-1] * c + 1 - schedule.alpha_bar[-1]
    return 0.5 * (variance - 1 - variance.log()).item()


def expected_terms(exact, z_0, variance, z_0_mse=None):
    """Return the expectation of L_{t-1} over eps, given z_0, as a tensor [T, b].

    Terms are sums over dimensions, so all dimensions can share the same quadrature node.
    """
    schedule, b = exact.schedule, len(z_0)
    t = torch.arange(1, schedule.num_steps + 1).repeat_interleave(b)
    clean = z_0.repeat(schedule.num_steps, *(1,) * (z_0.ndim - 1))
    terms = 0
    for node, weight in zip(NODES, QUADRATURE_WEIGHTS, strict=True):
        z_t = marginal(schedule, clean, t, node.expand_as(clean))
        term = bound_term(schedule, exact(z_t, t), clean, t - 1, t, variance=variance, z_0_mse=z_0_mse)
        terms = terms + weight * term
    return terms.reshape(-1, b)


def expected_bound(exact, variance, z_0_mse=None):
    """Return the expectation of the bound over z_0 ~ N(0, c) and eps, by quadrature of `bound_term` and `prior_kl`."""
    z_0 = C**0.5 * NODES[:, None]
    per_image = expected_terms(exact, z_0, variance, z_0_mse).sum(0) + prior_kl(exact.schedule, z_0)
    return (per_image @ QUADRATURE_WEIGHTS).item()


def rngs(count, start=0):
    return [torch.Generator().manual_seed(start + i) for i in range(count)]


def test_fixed_large_gap_to_likelihood_shrinks_as_one_over_T(exact_gaussian):
    gaps = [expected_bound(exact_gaussian(vp(T), 0.0, C), "fixed_large") - NLL for T in CHAIN_LENGTHS]
    gaps_at_end = [gap - prior_kl_of_gaussian(vp(T)) for gap, T in zip(gaps, CHAIN_LENGTHS, strict=True)]
    fit = scipy.stats.linregress(np.log(CHAIN_LENGTHS), np.log(gaps))
    print("\nfixed_large, gap = E[bound] - NLL in nats: T, gap, gap - KL(q(z_T) || N(0, 1))")
    for row in zip(CHAIN_LENGTHS, gaps, gaps_at_end, strict=True):
        print("{:5d}  {:.6f}  {:.6f}".format(*row))
    print(f"slope in log T: {fit.slope:.4f} +- {fit.stderr:.4f}")
    assert fit.slope == pytest.approx(-1, abs=0.1)
    assert min(gaps_at_end) > 0


def test_optimal_bound_matches_likelihood_at_every_T(exact_gaussian):
    # With the exact mean and variance, only the prior at T contributes to the gap.
    print("\noptimal: T, E[bound], E[bound] - NLL - KL(q(z_T) || N(0, 1))")
    for T in [1, 2, 3, *CHAIN_LENGTHS]:
        schedule = vp(T)
        bound = expected_bound(exact_gaussian(schedule, 0.0, C), "optimal", exact_mse(schedule))
        error = bound - NLL - prior_kl_of_gaussian(schedule)
        print(f"{T:5d}  {bound:.9f}  {error:+.1e}")
        assert abs(error) < 1e-6


def test_fixed_small_gap_converges_to_closed_form_floor(exact_gaussian):
    """For Sigma = bt, c_0^2 / bt = snr_s - snr_t. With r_t = 1 + (snr_{t-1} - snr_t) mse(t), the bound exceeds the
    bound for the optimal Sigma by

        sum_{t=2}^T 1/2 (r_t - 1 - log r_t)  +  1/2 (mse(1) / bt_2 - 1 - log(mse(1) / bt_2))

    nats per dimension, where bt_2 is bt for the step from 2 to 1. Most of this gap comes from the first few steps. For
    these, beta_t is a constant beta, snr_t = 1 / (beta t) and mse(t) = 1 / snr_t. Hence r_t = t / (t - 1) for any T,
    and the sum is 1/2 sum(1/k - log(1 + 1/k)) = gamma / 2 with Euler's gamma. In L_0, mse(1) = beta and
    bt_2 = beta / 2, which adds (1 - log 2) / 2. As T grows, the gap therefore converges to a floor of
    (gamma + 1 - log 2) / 2 = 0.442 nats per dimension.
    """
    floor = (np.euler_gamma + 1 - math.log(2)) / 2
    print(f"\nfixed_small, gap = E[bound] - NLL - KL(q(z_T) || N(0, 1)) in nats: T, gap, gap - floor {floor:.6f}")
    excess = []
    for T in [*CHAIN_LENGTHS, 16_384, 262_144]:
        schedule = vp(T)
        gap = expected_bound(exact_gaussian(schedule, 0.0, C), "fixed_small") - NLL - prior_kl_of_gaussian(schedule)
        snr, mse = schedule.snr(torch.arange(1, T + 1)), exact_mse(schedule)[1:]
        r = 1 + (snr[:-1] - snr[1:]) * mse[1:]
        a_1, a_2 = schedule.alpha_bar[1:3]
        last = mse[0] / ((1 - a_2 / a_1) * (1 - a_1) / (1 - a_2))
        closed_form = 0.5 * (r - 1 - r.log()).sum() + 0.5 * (last - 1 - last.log())
        assert gap == pytest.approx(closed_form.item(), abs=1e-8)
        excess.append(gap - floor)
        print(f"{T:7d}  {gap:.6f}  {excess[-1]:+.6f}")
    assert abs(excess[-1]) < 2e-3
    assert excess[2:] == sorted(excess[2:], reverse=True)


@pytest.mark.parametrize("schedule", [linear(40, 1e-3, 0.2), cosine(40), rectified_flow(40)], ids=lambda s: s.name)
@pytest.mark.parametrize("variance", [*VARIANCES, "learned_range"])
def test_terms_match_gaussian_kl_divergence(schedule, variance, randn):
    z_0, z_t, predicted, v = randn(5, 3), randn(5, 3), randn(5, 3), randn(5, 3).sigmoid()
    s, t = torch.tensor([1, 3, 20, 0, 0]), torch.tensor([2, 30, 40, 1, 40])
    table = torch.linspace(0, 1, 41, dtype=torch.float64)
    terms = bound_term(schedule, Prediction(predicted, v), z_0, s, t, variance=variance, z_0_mse=table)
    for i in range(5):
        a_s, a_t = schedule.alpha_bar[s[i]], schedule.alpha_bar[t[i]]
        b = 1 - a_t / a_s
        bt, c_0 = b * (1 - a_s) / (1 - a_t), a_s.sqrt() * b / (1 - a_t)
        z_t_term = (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t) * z_t[i]
        a_1, a_2 = schedule.alpha_bar[1:3]
        nonzero_bt = bt if s[i] > 0 else (1 - a_2 / a_1) * (1 - a_1) / (1 - a_2)
        sigma = {
            "fixed_small": nonzero_bt,
            "fixed_large": b,
            "optimal": bt + c_0**2 * table[t[i]],
            "learned_range": (v[i] * b.log() + (1 - v[i]) * nonzero_bt.log()).exp(),
        }[variance]
        p = torch.distributions.Normal(c_0 * predicted[i] + z_t_term, sigma.sqrt())
        if s[i] > 0:
            q = torch.distributions.Normal(c_0 * z_0[i] + z_t_term, bt.sqrt())
            expected = torch.distributions.kl_divergence(q, p).sum()
        else:
            expected = -p.log_prob(z_0[i]).sum()
        torch.testing.assert_close(terms[i], expected, rtol=1e-8, atol=1e-8)
        prediction = Prediction(predicted[i : i + 1], v[i : i + 1])
        term = bound_term(schedule, prediction, z_0[i : i + 1], int(s[i]), int(t[i]), variance=variance, z_0_mse=table)
        torch.testing.assert_close(term[0], terms[i])


def test_prior_matches_kl_to_standard_normal(randn):
    z_0 = randn(3, 2, 2)
    for schedule in (linear(40), cosine(10), rectified_flow(10)):
        a = schedule.alpha_bar[-1]
        q = torch.distributions.Normal(a.sqrt() * z_0, (1 - a).sqrt())
        expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum((1, 2))
        torch.testing.assert_close(prior_kl(schedule, z_0), expected, atol=1e-12, rtol=1e-9)


def test_half_precision_is_converted_to_float64(randn):
    z, schedule = randn(2, 3).bfloat16(), linear(10)
    v = torch.ones_like(z) / 2
    terms = [bound_term(schedule, Prediction(z, v), z, s, 5, variance="learned_range") for s in (0, 4)]
    assert {term.dtype for term in [*terms, prior_kl(schedule, z)]} == {torch.float64}
    torch.testing.assert_close(
        terms[1], bound_term(schedule, Prediction(z.double(), v), z, 4, 5, variance="learned_range")
    )


def test_L_0_density_integrates_to_one(exact_gaussian):
    schedule = vp(16)
    exact, z_t = exact_gaussian(schedule, 0.0, C), torch.tensor([[0.3]], dtype=torch.float64)
    for variance in VARIANCES:
        z_0 = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
        predicted = Prediction(exact(z_t, 1).z_0.expand_as(z_0), None)
        nll = bound_term(schedule, predicted, z_0, 0, 1, variance=variance, z_0_mse=exact_mse(schedule))
        assert torch.trapezoid((-nll).exp(), z_0[:, 0]).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("mean", [-1.3, 0.1, 0.999])
def test_discretised_probabilities_sum_to_one_and_match_scipy(mean, scale):
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    nll = discretised_nll(x, torch.full_like(x, mean), torch.tensor(scale), 2 / 255, -1.0, 1.0)
    assert nll.isfinite().all()
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-9)
    edges = np.concatenate([[-np.inf], (x[1:] + x[:-1]).numpy() / 2, [np.inf]])
    probability = np.diff(scipy.stats.norm(mean, np.float32(scale)).cdf(edges))
    is_likely = probability > 1e-6
    np.testing.assert_allclose((-nll).exp().numpy()[is_likely], probability[is_likely], rtol=1e-8)


def test_discretised_tails_are_finite_and_accurate():
    # At a distance of 60 scales from the mean, a bin contains almost the entire tail beyond its nearer edge:
    # log Phi(-y) = -y^2/2 - log(y sqrt(2 pi)) - 1/y^2.
    w = 2 / 255
    for x, scale in itertools.product((-1 + 40 * w, 1 - 40 * w), (0.01, w / 1000)):
        mean = x + math.copysign(60 * scale + w / 2, -x)
        arguments = (torch.tensor(value, dtype=torch.float64) for value in (x, mean, scale))
        expected = 60**2 / 2 + math.log(60 * (2 * math.pi) ** 0.5) + 1 / 60**2
        assert discretised_nll(*arguments, w, -1.0, 1.0).item() == pytest.approx(expected, abs=1e-6)
    x = torch.tensor([-1.0, 0.0, 1.0])
    extreme_nll = discretised_nll(x, -x - 1e3, torch.tensor(1e-3), w, -1.0, 1.0)
    assert extreme_nll.isfinite().all()
    with pytest.raises(ValueError, match=r"scale.*must be positive.*0\.0"):
        discretised_nll(x, x, torch.tensor(0.0), w, -1.0, 1.0)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [None, 4, 16])
def test_estimates_are_unbiased_with_calibrated_errors(exact_gaussian, randn, variance, steps):
    """Over repeated groups of images, (estimate - truth) / standard error has mean 0 and variance 1."""
    schedule, num_repeats, group_size = vp(33), 200, 16
    exact, table = exact_gaussian(schedule, 0.0, C, dimensions=4), exact_mse(schedule)
    z_0 = C**0.5 * randn(group_size, 4).repeat(num_repeats, 1)
    truth = expected_terms(exact, z_0[:group_size], variance, table)
    bound = variational_bound(
        exact,
        z_0,
        generators=rngs(len(z_0)),
        variance=variance,
        z_0_mse=table,
        steps=steps,
        batch_size=20_000,
    )
    torch.testing.assert_close(bound.prior, prior_kl(schedule, z_0))
    error = (bound.monte_carlo_variance.sum() / len(z_0) ** 2).sqrt()
    z_score = (bound.layers + bound.last_term - truth.sum(0).repeat(num_repeats)).mean() / error
    assert abs(z_score) < 4
    last_errors = bound.last_term - truth[0].repeat(num_repeats)
    assert abs(last_errors.mean() / last_errors.std()) * len(z_0) ** 0.5 < 4
    assert bound.monte_carlo_error == pytest.approx(error.item())
    estimates = (bound.layers + bound.last_term).reshape(num_repeats, group_size).mean(1)
    errors = bound.monte_carlo_variance.reshape(num_repeats, group_size).sum(1).sqrt() / group_size
    scores = (estimates - truth.sum(0).mean()) / errors
    ratio = (errors.square().mean() / estimates.var()).item()
    coverage = (scores.abs() < 2).double().mean().item()
    print(
        f"\n{variance}, steps {steps}: z {z_score:+.2f}, estimated / observed variance {ratio:.2f}, "
        f"within 2 errors {coverage:.3f}, error {errors.mean():.3f} of {truth.sum(0).mean():.3f}"
    )
    # From 200 repeats, a variance can be estimated to within 10%.
    assert 0.7 < ratio < 1.35
    # With 4 steps, there is a single wide stratum, whose two terms are far from normally distributed.
    assert coverage > (0.65 if steps == 4 else 0.9)


def test_estimate_matches_expected_bound(exact_gaussian, randn):
    schedule = vp(64)
    exact = exact_gaussian(schedule, 0.0, C)
    z_0 = C**0.5 * randn(3000, 1)
    bound = variational_bound(exact, z_0, generators=rngs(3000), variance="fixed_large", steps=16, batch_size=8192)
    expected = expected_bound(exact, "fixed_large")
    assert abs(bound.total.mean().item() - expected) < 4 * bound.standard_error
    assert bound.monte_carlo_error < bound.standard_error


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 9, 10])
def test_every_step_is_visited_and_curve_sums_to_layers(exact_gaussian, randn, num_steps):
    schedule, visited, calls = vp(num_steps), [], []
    exact = exact_gaussian(schedule, 0.0, C, dimensions=2)

    class RecordingDenoiser:
        def __init__(self):
            self.schedule = schedule

        def __call__(self, z_t, t, condition=None):
            visited.extend(t.tolist())
            return exact(z_t, t)

    table = exact_mse(schedule)
    bound = variational_bound(
        RecordingDenoiser(),
        randn(3, 2),
        generators=rngs(3),
        variance="optimal",
        z_0_mse=table,
        batch_size=7,
        on_batch=lambda completed, total: calls.append((completed, total)),
    )
    num_terms = 3 * num_steps
    assert visited[:num_terms] == [t for t in range(1, num_steps + 1) for _ in range(3)]
    repeated_steps = visited[num_terms:]
    assert len(repeated_steps) == 3 * min(num_steps, 8)
    assert repeated_steps[:3] == [1, 1, 1]
    assert all(2 <= t <= num_steps for t in repeated_steps[3:])
    assert calls[-1] == (len(visited), len(visited))
    assert [completed for completed, _ in calls] == sorted(min(7 * (i + 1), len(visited)) for i in range(len(calls)))
    assert bound.steps.tolist() == list(range(1, num_steps + 1))
    torch.testing.assert_close(bound.curve[0], bound.last_term.mean())
    torch.testing.assert_close(bound.curve[1:].sum(), bound.layers.mean())
    torch.testing.assert_close(bound.total, bound.prior + bound.layers + bound.last_term)


@pytest.mark.parametrize("schedule", [vp(100), linear(), cosine(), rectified_flow(50)], ids=lambda s: s.name)
@pytest.mark.parametrize("steps", [4, 6, 20, 50])
def test_strata_contribute_equally_for_standard_normal_data(schedule, steps, exact_gaussian, randn):
    visited = []
    exact = exact_gaussian(schedule, 0.0, 1.0)

    class RecordingDenoiser:
        def __init__(self):
            self.schedule = schedule

        def __call__(self, z_t, t, condition=None):
            visited.append(t)
            return exact(z_t, t)

    bound = variational_bound(
        RecordingDenoiser(), randn(40, 1), generators=rngs(40), variance="fixed_large", steps=steps, batch_size=4000
    )
    pairs = torch.cat(visited).reshape(2, steps // 2, 40)
    first_t = bound.steps - (bound.widths - 1) / 2
    last_t = bound.steps + (bound.widths - 1) / 2
    assert first_t[0] == last_t[0] == 1
    assert first_t[1:].equal(last_t[:-1] + 1)
    assert last_t[-1] == schedule.num_steps
    assert (bound.widths >= 1).all()
    assert ((pairs >= first_t[:, None]) & (pairs <= last_t[:, None])).all()
    # Without its last step, a stratum wider than one step covers at most an equal share of log(1 + snr).
    log_1_snr = -torch.log1p(-schedule.alpha_bar[1:])
    share = (log_1_snr[0] - log_1_snr[-1]) / (steps // 2 - 1)
    for first, last in zip(first_t[1:].long().tolist(), last_t[1:].long().tolist(), strict=True):
        if last > first:
            assert log_1_snr[first - 2] - log_1_snr[last - 2] <= share * (1 + 1e-9)
    torch.testing.assert_close((bound.widths * bound.curve)[1:].sum(), bound.layers.mean())
    torch.testing.assert_close(bound.curve[0], bound.last_term.mean())


def test_result_does_not_depend_on_other_images_or_batch_size(randn):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(2, 4, 3, padding=1).double()

    def network(z_t, timesteps, condition):
        return torch.tanh(
            convolution(z_t) + condition["shift"][:, None, None, None] + timesteps[:, None, None, None] / 20
        )

    denoiser = Denoiser(linear(20, 1e-3, 0.3), network, "v", learned_variance=True)
    z_0, shift = randn(5, 2, 4, 4), torch.linspace(-1, 1, 5).double()

    def measure(images, batch_size, steps, start=0):
        generators = [torch.Generator().manual_seed(start + i) for i in images]
        bound = variational_bound(
            denoiser,
            z_0[images],
            {"shift": shift[images]},
            generators=generators,
            variance="learned_range",
            steps=steps,
            batch_size=batch_size,
        )
        assert not bound.total.requires_grad
        return torch.stack([bound.prior, bound.layers, bound.last_term, bound.monte_carlo_variance], 1)

    for steps in (None, 8):
        expected = measure([0, 1, 2, 3, 4], 64, steps)
        assert measure([0, 1, 2, 3, 4], 64, steps).equal(expected)
        for batch_size in (1, 3, 1000):
            torch.testing.assert_close(measure([0, 1, 2, 3, 4], batch_size, steps), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(measure([3, 1], 4, steps), expected[[3, 1]], rtol=1e-9, atol=1e-9)
        assert (measure([0, 1, 2, 3, 4], 64, steps, start=9)[:, 1] != expected[:, 1]).all()


def test_tensor_sizes_do_not_grow_with_T(exact_gaussian):
    class RecordLargestTensor(torch.overrides.TorchFunctionMode):
        size = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.numel())
            return result

    exact = exact_gaussian(vp(500), 0.0, C, dimensions=300)
    z_0, generator = torch.zeros(3, 300), torch.Generator().manual_seed(0)
    with RecordLargestTensor() as recorder:
        variational_bound(exact, z_0, generators=rngs(3), variance="fixed_large", batch_size=16)
        fit_z_0_mse(exact, z_0, generator=generator, images_per_step=3, batch_size=16)
    assert recorder.size <= 16 * 300


def test_fitted_mse_matches_exact_denoiser(exact_gaussian, randn):
    schedule = vp(50)
    exact = exact_gaussian(schedule, 0.0, C, dimensions=192)
    z_0 = C**0.5 * randn(100, 192)

    def fit(**options):
        return fit_z_0_mse(exact, z_0, generator=torch.Generator().manual_seed(3), **options)

    table = fit()
    relative_error = (table[1:] / exact_mse(schedule)[1:] - 1).abs()
    assert table[0] == 0
    # Each entry is a mean over 16 x 192 squared Gaussian errors.
    assert relative_error.max() < 4.5 * (2 / (16 * 192)) ** 0.5
    torch.testing.assert_close(fit(batch_size=7), table)
    exact_1d = exact_gaussian(schedule, 0.0, C)
    fitted_bound, best_bound = (expected_bound(exact_1d, "optimal", mse) for mse in (table, exact_mse(schedule)))
    cost, max_cost = 192 * (fitted_bound - best_bound), 192 / 4 * relative_error.square().sum()
    print(f"\nfitted optimal Sigma costs {cost:.4f} of {192 * best_bound:.2f} nats; upper bound {max_cost:.4f}")
    assert 0 < cost < max_cost


def test_fit_uses_each_image_equally_often():
    class RecordingDenoiser:
        schedule = linear(10)

        def __call__(self, z_t, t, condition=None):
            images.extend(condition["image"].tolist())
            return Prediction(torch.ones_like(z_t), None)

    images = []
    condition = {"image": torch.arange(8)}
    table = fit_z_0_mse(RecordingDenoiser(), torch.zeros(8, 3), condition, generator=rngs(1)[0], images_per_step=4)
    assert table.tolist() == [0, *[1] * 10]
    assert np.bincount(images).tolist() == [5] * 8
    assert all(len(set(images[4 * i : 4 * i + 4])) == 4 for i in range(10))


def test_standard_error_is_computed_over_images(exact_gaussian, randn):
    exact = exact_gaussian(vp(10), 0.0, C)
    z_0 = randn(2, 1)
    bound = variational_bound(exact, z_0, generators=rngs(2), variance="fixed_large")
    total = bound.total
    assert bound.standard_error == pytest.approx(abs(total[0] - total[1]).item() / 2)
    single_image = variational_bound(exact, z_0[:1], generators=rngs(1), variance="fixed_large")
    assert math.isnan(single_image.standard_error)
    assert single_image.monte_carlo_error == pytest.approx(single_image.monte_carlo_variance[0].item() ** 0.5)


def test_invalid_arguments_raise(exact_gaussian, randn):
    exact, z_0 = exact_gaussian(vp(10), 0.0, C), randn(3, 1)

    def measure(denoiser=exact, images=3, z_0=z_0, **options):
        return variational_bound(denoiser, z_0, generators=rngs(images), **{"variance": "fixed_large", **options})

    with pytest.raises(ValueError, match=r"2 generators.*3"):
        measure(images=2)
    for steps in (2, 5, 12):
        with pytest.raises(ValueError, match=rf"steps.*even.*4 to T = 10.*None.*\b{steps}\b"):
            measure(steps=steps)
    with pytest.raises(ValueError, match=r"z_0.*image 1\b.*not finite"):
        measure(z_0=torch.tensor([[0.0], [math.inf], [math.nan]]))
    with pytest.raises(ValueError, match=r"optimal.*z_0_mse.*training split"):
        measure(variance="optimal")
    with pytest.raises(ValueError, match=r"learned_range.*\bv\b"):
        measure(variance="learned_range")

    class BrokenDenoiser:
        schedule = vp(10)

        def __call__(self, z_t, t, condition=None):
            return Prediction(torch.where((t == 7)[:, None] & (z_t == z_t[-1]), math.nan, z_t), None)

    with pytest.raises(ValueError, match=r"bound.*image 2\b.*t = 7\b.*nan"):
        measure(BrokenDenoiser(), batch_size=3)
    with pytest.raises(ValueError, match=r"squared error.*image \d.*t = 7\b.*nan"):
        fit_z_0_mse(BrokenDenoiser(), z_0, generator=rngs(1)[0], batch_size=1)
    with pytest.raises(ValueError, match=r"images_per_step.*at least 1.*0"):
        fit_z_0_mse(exact, z_0, generator=rngs(1)[0], images_per_step=0)
