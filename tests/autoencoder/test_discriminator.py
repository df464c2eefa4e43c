"""ldm.autoencoder.discriminator: both sides' losses, and the weight between distortion and adversarial gradients."""

import pytest
import torch
from diffusers import AutoencoderKL

from ldm.autoencoder.discriminator import Balance, LastLayer, PatchDiscriminator, discriminator_loss, generator_loss
from ldm.autoencoder.patch import PatchAutoencoderKL


def patch_model() -> PatchAutoencoderKL:
    return PatchAutoencoderKL(patch=2, latent_channels=3, block_out_channels=(8,), norm_num_groups=4)


def plain_model() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


MODELS = pytest.mark.parametrize("make", [patch_model, plain_model])


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_losses_are_their_formulas():
    real, false = torch.tensor([0.3, 2.0]), torch.tensor([-3.0, 0.5])
    hinge = discriminator_loss("hinge", real, false)
    assert hinge.item() == pytest.approx(((0.7 + 0) / 2 + (0 + 1.5) / 2) / 2)
    assert generator_loss("hinge", false).item() == pytest.approx(1.25)
    p = torch.sigmoid
    assert discriminator_loss("non_saturating", real, false).item() == pytest.approx(
        -(p(real).log().mean() + (1 - p(false)).log().mean()).item(), rel=1e-5
    )
    assert generator_loss("non_saturating", false).item() == pytest.approx(-p(false).log().mean().item(), rel=1e-5)


@pytest.mark.parametrize("game", ["hinge", "non_saturating"])
def test_each_side_pulls_its_own_way(game):
    real, false = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    discriminator_loss(game, real, false).backward()
    assert (real.grad < 0).all() and (false.grad > 0).all()
    false = torch.zeros(4, requires_grad=True)
    generator_loss(game, false).backward()
    assert (false.grad < 0).all()


@pytest.mark.parametrize(("layers", "sight"), [(1, 16), (2, 34), (3, 70)])
def test_a_patch_is_what_a_logit_sees(layers, sight):
    """The published sizes, by the reach of one logit's gradient; an image's logits depend on that image alone."""
    discriminator = PatchDiscriminator(8, layers)
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = discriminator(images)
    middle = logits.shape[-1] // 2
    for layer in discriminator.layers:
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x  # which reaches all of its image
    discriminator(images)[0, 0, middle, middle].backward()
    rows = images.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == sight
    assert not images.grad[1].any()


@MODELS
def test_the_weight_is_the_ratio_of_gradients_at_the_last_layer(make, images):
    """lambda against autograd, and the gradient that arrives in every weight of the decoder."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    last = (model.core if make is patch_model else model).decoder.conv_out.weight
    balance = Balance(LastLayer(model), max_weight=1e4)
    balance.factor = 0.25
    judge = torch.nn.Conv2d(3, 1, 3).requires_grad_(False)

    def both(x, y):
        return (x - images).abs().mean(), -judge(y).square().mean()

    reconstruction = model(images).sample
    first, second = (
        torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in both(reconstruction, reconstruction)
    )
    expected = first.norm() / (second.norm() + 1e-4)
    distortion, adversarial = both(reconstruction, reconstruction)
    model.zero_grad()
    (distortion + 0.25 * expected * adversarial).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    distortion, adversarial = both(*balance.split(model(images).sample))
    (distortion + adversarial).backward()
    torch.testing.assert_close(balance.weight, expected)
    assert expected > 0 and wanted
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-7)


@MODELS
def test_the_weight_is_measured_once_per_step_and_bounded(make, images):
    model = make()
    balance = Balance(LastLayer(model), max_weight=2.0)

    def backward(scale: float) -> float:
        x, y = balance.split(model(images).sample)
        (scale * (x - images).square().mean() + 1e-3 * y.mean()).backward()
        return balance.weight.item()

    first = backward(1e-3)
    assert 0 < first < 2
    assert backward(1e9) == first  # a second batch of the same step
    balance.weight = None
    assert backward(1e9) == 2.0


def test_the_last_layers_input_is_kept_no_longer_than_needed(images):
    model = patch_model()
    balance = Balance(LastLayer(model), max_weight=1e4)
    with torch.no_grad():
        model(images)
    assert balance.last_layer._input is None
    balance.last_layer.keeping = False
    model(images)
    assert balance.last_layer._input is None
    balance.last_layer.keeping = True
    x, y = balance.split(model(images).sample)
    assert balance.last_layer._input is not None
    (x.sum() + y.sum()).backward()
    assert balance.last_layer._input is None


def test_lambda_does_not_depend_on_the_number_of_parts(images):
    """Gradients of a part arrive divided by their number; what keeps the ratio finite must not weigh more for it."""
    torch.manual_seed(0)
    model, weights = patch_model(), []
    for share in (1.0, 0.125):
        balance = Balance(LastLayer(model), max_weight=1e9)
        balance.share = share
        x, y = balance.split(model(images).sample)
        (share * (1e-4 * (x - images).abs().mean() + 1e-4 * y.mean())).backward()
        weights.append(balance.weight)
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("channels", [1, 8, 33, 36, 64])
def test_any_width(channels, images):
    assert PatchDiscriminator(channels, 2)(images).shape == (2, 1, 2, 2)
