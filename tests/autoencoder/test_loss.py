"""ldm.autoencoder.loss: each term is its formula, and moves the weights that it should."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.autoencoder.loss import AutoencoderLoss
from ldm.autoencoder.patch import PatchAutoencoderKL

NONE = {"l1": 0.0, "mse": 0.0, "kl": 0.0}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def model() -> PatchAutoencoderKL:
    """All of its weights away from the zeros that it starts with."""
    torch.manual_seed(0)
    model = PatchAutoencoderKL(patch=2, latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def terms_of(model, images, **weights):
    posterior = model.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    reconstruction = model.decode(posterior.mean + posterior.std * noise).sample
    return AutoencoderLoss(**{**NONE, **weights})(images, reconstruction, posterior), reconstruction, posterior


def test_every_term_is_its_formula(model, images):
    terms, reconstruction, posterior = terms_of(model, images, l1=2.0, mse=3.0, kl=5.0)
    error = reconstruction - images
    torch.testing.assert_close(terms["l1"], error.abs().mean())
    torch.testing.assert_close(terms["mse"], (error**2).mean())
    kl = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(terms["loss"], 2 * terms["l1"] + 3 * terms["mse"] + 5 * kl / (3 * 8 * 8))


def gradients(model, images, **weights) -> dict[str, float]:
    model.zero_grad()
    terms_of(model, images, **weights)[0]["loss"].backward()
    return {name: 0.0 if p.grad is None else p.grad.abs().sum().item() for name, p in model.named_parameters()}


def of(found: dict[str, float], *parts: str) -> list[float]:
    return [value for name, value in found.items() if any(part in name for part in parts)]


ENCODER = ("core.encoder", "core.quant_conv", "shortcut_in")
DECODER = ("core.decoder", "core.post_quant_conv", "shortcut_out")


@pytest.mark.parametrize("distortion", ["l1", "mse"])
def test_distortions_reach_encoder_and_decoder(model, images, distortion):
    found = gradients(model, images, **{distortion: 1.0})
    assert all(value > 0 for value in found.values()), found


def test_the_rate_reaches_the_encoder_alone(model, images):
    found = gradients(model, images, kl=1.0)
    assert all(value > 0 for value in of(found, *ENCODER))
    assert all(value == 0 for value in of(found, *DECODER))
    assert len(of(found, *ENCODER)) + len(of(found, *DECODER)) == len(found)


def test_no_weight_moves_nothing(model, images):
    assert not any(gradients(model, images).values())


def test_each_weight_moves_the_weights_by_its_share(model, images):
    """Gradients are linear in the weights of the terms."""
    whole = gradients(model, images, l1=0.0, mse=2.0)
    single = gradients(model, images, mse=1.0)
    for name, value in single.items():
        assert whole[name] == pytest.approx(2 * value, rel=1e-4)


def test_the_rate_keeps_its_meaning_over_resolutions(model):
    """Per pixel value: a picture tiled twice as wide has twice the nats and the same loss."""
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    posterior = model.encode(image).latent_dist
    small = AutoencoderLoss(**{**NONE, "kl": 1.0})(image, image, posterior)
    for name in ("mean", "logvar", "std", "var"):
        setattr(posterior, name, getattr(posterior, name).repeat(1, 1, 1, 2))
    wide = image.repeat(1, 1, 1, 2)
    large = AutoencoderLoss(**{**NONE, "kl": 1.0})(wide, wide, posterior)
    torch.testing.assert_close(large["kl"], 2 * small["kl"])
    torch.testing.assert_close(large["loss"], small["loss"])
