"""ldm.autoencoder.discriminator: the two adversarial losses, and the adaptive weight of the adversarial gradient."""

import pytest
import torch
from diffusers import AutoencoderKL

from ldm.autoencoder.discriminator import (
    AdaptiveWeight,
    LastLayer,
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
)
from ldm.autoencoder.patch import PatchAutoencoderKL


def patch_model() -> PatchAutoencoderKL:
    return PatchAutoencoderKL(patch=2, latent_channels=3, block_out_channels=(8,), norm_num_groups=4)


def plain_model() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


MODELS = pytest.mark.parametrize("make", [patch_model, plain_model])


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_losses_match_their_formulas():
    real, fake = torch.tensor([0.3, 2.0]), torch.tensor([-3.0, 0.5])
    hinge = discriminator_loss("hinge", real, fake)
    assert hinge.item() == pytest.approx(((0.7 + 0) / 2 + (0 + 1.5) / 2) / 2)
    assert generator_loss("hinge", fake).item() == pytest.approx(1.25)
    p = torch.sigmoid
    assert discriminator_loss("non_saturating", real, fake).item() == pytest.approx(
        -(p(real).log().mean() + (1 - p(fake)).log().mean()).item(), rel=1e-5
    )
    assert generator_loss("non_saturating", fake).item() == pytest.approx(-p(fake).log().mean().item(), rel=1e-5)


@pytest.mark.parametrize("gan_loss", ["hinge", "non_saturating"])
def test_losses_push_logits_in_opposite_directions(gan_loss):
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    discriminator_loss(gan_loss, real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake = torch.zeros(4, requires_grad=True)
    generator_loss(gan_loss, fake).backward()
    assert (fake.grad < 0).all()


@pytest.mark.parametrize(("layers", "size"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field_matches_published_patch_sizes(layers, size):
    """Measure the receptive field of a logit as the pixels with a nonzero gradient. None are in the other image."""
    discriminator = PatchDiscriminator(8, layers)
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = discriminator(images)
    middle = logits.shape[-1] // 2
    for layer in discriminator.layers:
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x  # group norm would extend the receptive field to the whole image
    discriminator(images)[0, 0, middle, middle].backward()
    rows = images.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == size
    assert not images.grad[1].any()


@MODELS
def test_adaptive_weight_is_gradient_ratio_at_last_layer(make, images):
    """Compare lambda and the resulting gradients of all weights with autograd."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    last_weight = (model.core if make is patch_model else model).decoder.conv_out.weight
    adaptive_weight = AdaptiveWeight(LastLayer(model), max_weight=1e4)
    adaptive_weight.factor = 0.25
    discriminator = torch.nn.Conv2d(3, 1, 3).requires_grad_(False)

    def losses(x, y):
        return (x - images).abs().mean(), -discriminator(y).square().mean()

    reconstruction = model(images).sample
    distortion_gradient, adversarial_gradient = (
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0] for loss in losses(reconstruction, reconstruction)
    )
    expected = distortion_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    distortion, adversarial = losses(reconstruction, reconstruction)
    model.zero_grad()
    (distortion + 0.25 * expected * adversarial).backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    distortion, adversarial = losses(*adaptive_weight.split(model(images).sample))
    (distortion + adversarial).backward()
    torch.testing.assert_close(adaptive_weight.weight, expected)
    assert expected > 0 and expected_gradients
    for name, parameter in model.named_parameters():
        if name in expected_gradients:
            torch.testing.assert_close(parameter.grad, expected_gradients[name], rtol=1e-4, atol=1e-7)


@MODELS
def test_adaptive_weight_is_computed_once_per_step_and_clamped(make, images):
    model = make()
    adaptive_weight = AdaptiveWeight(LastLayer(model), max_weight=2.0)

    def backward(scale: float) -> float:
        x, y = adaptive_weight.split(model(images).sample)
        (scale * (x - images).square().mean() + 1e-3 * y.mean()).backward()
        return adaptive_weight.weight.item()

    weight = backward(1e-3)
    assert 0 < weight < 2
    assert backward(1e9) == weight  # a second batch in the same step
    adaptive_weight.weight = None
    assert backward(1e9) == 2.0


def test_last_layer_releases_its_input_after_backward(images):
    model = patch_model()
    adaptive_weight = AdaptiveWeight(LastLayer(model), max_weight=1e4)
    with torch.no_grad():
        model(images)
    assert adaptive_weight.last_layer._input is None
    adaptive_weight.last_layer.records_input = False
    model(images)
    assert adaptive_weight.last_layer._input is None
    adaptive_weight.last_layer.records_input = True
    x, y = adaptive_weight.split(model(images).sample)
    assert adaptive_weight.last_layer._input is not None
    (x.sum() + y.sum()).backward()
    assert adaptive_weight.last_layer._input is None


def test_lambda_is_independent_of_gradient_accumulation(images):
    """Scaling gradients down for accumulation must not increase the effect of the 1e-4 in lambda's denominator."""
    torch.manual_seed(0)
    model, weights = patch_model(), []
    for loss_scale in (1.0, 0.125):
        adaptive_weight = AdaptiveWeight(LastLayer(model), max_weight=1e9)
        adaptive_weight.loss_scale = loss_scale
        x, y = adaptive_weight.split(model(images).sample)
        (loss_scale * (1e-4 * (x - images).abs().mean() + 1e-4 * y.mean())).backward()
        weights.append(adaptive_weight.weight)
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("channels", [1, 8, 33, 36, 64])
def test_discriminator_accepts_any_number_of_channels(channels, images):
    assert PatchDiscriminator(channels, 2)(images).shape == (2, 1, 2, 2)
