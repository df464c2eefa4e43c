"""ldm.autoencoder.losses: every loss term matches its formula, and its gradient reaches the right weights."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

from ldm.autoencoder.autoencoder import weights_sha256
from ldm.autoencoder.losses import BIN_WIDTH, AutoencoderLoss
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.autoencoder.perceptual import EfficientNetLiteDistance, Perceptual

ZERO_WEIGHTS = {"l1": 0.0, "mse": 0.0, "kl": 0.0}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def model() -> PatchAutoencoderKL:
    """Model whose weights are all random, because zero-initialised layers would block gradients."""
    torch.manual_seed(0)
    model = PatchAutoencoderKL(patch=2, latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def compute_terms(model, images, **weights):
    posterior = model.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    reconstruction = model.decode(posterior.mean + posterior.std * noise).sample
    loss = AutoencoderLoss(**{**ZERO_WEIGHTS, **weights})
    return loss(images, reconstruction, {"kl": posterior.kl().mean()}), reconstruction, posterior


def test_loss_terms_match_their_formulas(model, images):
    terms, reconstruction, posterior = compute_terms(model, images, l1=2.0, mse=3.0, kl=5.0)
    error = reconstruction - images
    torch.testing.assert_close(terms["l1"], error.abs().mean())
    torch.testing.assert_close(terms["mse"], (error**2).mean())
    kl = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(terms["loss"], 2 * terms["l1"] + 3 * terms["mse"] + 5 * kl / (3 * 8 * 8))


def test_loss_of_the_sampling_decoder_is_the_mean_absolute_error(model, images):
    terms, reconstruction, _ = compute_terms(model, images, l1=2.0, mse=3.0, nll=1.0)
    loss = AutoencoderLoss(l1=2.0, mse=3.0, nll=1.0)
    torch.testing.assert_close(loss.sampling_distortion(images, reconstruction), terms["l1"])


def gradients(model, images, **weights) -> dict[str, float]:
    """Return, by parameter name, the sum of the absolute values of the parameter's gradient."""
    model.zero_grad()
    compute_terms(model, images, **weights)[0]["loss"].backward()
    return {name: 0.0 if p.grad is None else p.grad.abs().sum().item() for name, p in model.named_parameters()}


def select(values: dict[str, float], *modules: str) -> list[float]:
    return [value for name, value in values.items() if any(module in name for module in modules)]


ENCODER = ("core.encoder", "core.quant_conv", "shortcut_in")
DECODER = ("core.decoder", "core.post_quant_conv", "shortcut_out")


@pytest.mark.parametrize("distortion", ["l1", "mse", "nll"])
def test_distortion_gradients_reach_encoder_and_decoder(model, images, distortion):
    values = gradients(model, ((images + 1) * 127.5).round() / 127.5 - 1, **{distortion: 1.0})
    assert all(value > 0 for value in values.values()), values


def test_kl_gradient_reaches_only_the_encoder(model, images):
    values = gradients(model, images, kl=1.0)
    encoder, decoder = select(values, *ENCODER), select(values, *DECODER)
    assert all(value > 0 for value in encoder)
    assert all(value == 0 for value in decoder)
    assert len(encoder) + len(decoder) == len(values)


def test_nll_is_the_discretised_gaussian_likelihood(images):
    """Compare with the probability of each 8-bit bin under SciPy's Gaussian. The outermost bins extend to infinity."""
    images = ((images + 1) * 127.5).round() / 127.5 - 1
    images[:, :, 0] = 1.0
    reconstruction = (images + 0.05).requires_grad_()
    loss = AutoencoderLoss(**{**ZERO_WEIGHTS, "nll": 1.0})
    loss.log_scale.data = torch.tensor([0.05, 0.1, 0.2]).log()
    nll = loss(images, reconstruction, {})["nll"]
    x, mean, scale = images.numpy(), reconstruction.detach().numpy(), np.array([0.05, 0.1, 0.2])[:, None, None]
    cdf_high = np.where(x > 1 - BIN_WIDTH / 2, 1, norm.cdf((x + BIN_WIDTH / 2 - mean) / scale))
    cdf_low = np.where(x < -1 + BIN_WIDTH / 2, 0, norm.cdf((x - BIN_WIDTH / 2 - mean) / scale))
    assert nll.item() == pytest.approx(-np.log(cdf_high - cdf_low).mean(), rel=1e-4)
    nll.backward()
    assert reconstruction.grad.isfinite().all() and (loss.log_scale.grad != 0).all()


def test_learned_scale_converges_to_rms_error(images):
    """The maximum-likelihood scale of each colour channel is the root mean square of x - x'."""
    error = (
        torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
        * torch.tensor([0.05, 0.1, 0.2])[:, None, None]
    )
    loss = AutoencoderLoss(**{**ZERO_WEIGHTS, "nll": 1.0})
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    images = images * 0.5  # away from the outermost bins, which extend to infinity
    for _ in range(200):
        optimizer.zero_grad()
        loss(images, images + error, {})["loss"].backward()
        optimizer.step()
    torch.testing.assert_close(loss.log_scale.exp(), error.square().mean((0, 2, 3)).sqrt(), rtol=0.01, atol=0)


@pytest.mark.parametrize("size", [32, 48])
def test_frozen_perceptual_distance_is_larger_for_a_shift_than_for_noise(size):
    """Only the reconstruction receives a gradient, and the distance is larger for a shift than for faint noise."""
    network = EfficientNetLiteDistance()
    perceptual = Perceptual(network, weight=2.0)
    initial_digest = weights_sha256(network)
    images = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, size, mode="nearest")
    reconstruction = (images * 0.9).requires_grad_()
    assert network(images, images).abs().max() < 1e-6
    perceptual(images, reconstruction).backward()
    assert (reconstruction.grad != 0).any() and reconstruction.grad.isfinite().all()
    assert all(p.grad is None for p in network.parameters()) and weights_sha256(network) == initial_digest
    assert [f.shape[-1] for f in network.features(images)] == [size // 2, size // 4, size // 8]
    noisy = images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert (network(images, images.roll(size // 8, -1)) > network(images, noisy)).all()


def test_perceptual_gradient_reaches_encoder_and_decoder(model, images):
    loss = AutoencoderLoss(**ZERO_WEIGHTS)
    loss.perceptual = Perceptual(EfficientNetLiteDistance(), weight=2.0)
    tiled = images.repeat(1, 1, 4, 4)
    terms = loss(tiled, model(tiled).sample, {})
    torch.testing.assert_close(terms["loss"], 2 * terms["perceptual"])
    terms["loss"].backward()
    nonzero = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"core.encoder.conv_in.weight", "shortcut_in.weight", "core.decoder.conv_out.weight"} <= nonzero


def test_zero_loss_weights_give_zero_gradients(model, images):
    assert not any(gradients(model, images).values())


def test_gradients_are_linear_in_the_loss_weights(model, images):
    doubled = gradients(model, images, l1=0.0, mse=2.0)
    single = gradients(model, images, mse=1.0)
    for name, value in single.items():
        assert doubled[name] == pytest.approx(2 * value, rel=1e-4)


def test_kl_loss_is_independent_of_resolution(model):
    """Tiling an image to twice its width doubles the KL in nats per image, but does not change the loss."""
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    posterior = model.encode(image).latent_dist
    single = AutoencoderLoss(**{**ZERO_WEIGHTS, "kl": 1.0})(image, image, {"kl": posterior.kl().mean()})
    for name in ("mean", "logvar", "std", "var"):
        setattr(posterior, name, getattr(posterior, name).repeat(1, 1, 1, 2))
    tiled_image = image.repeat(1, 1, 1, 2)
    tiled = AutoencoderLoss(**{**ZERO_WEIGHTS, "kl": 1.0})(tiled_image, tiled_image, {"kl": posterior.kl().mean()})
    torch.testing.assert_close(tiled["kl"], 2 * single["kl"])
    torch.testing.assert_close(tiled["loss"], single["loss"])
