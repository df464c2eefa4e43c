"""ldm.autoencoder.regularisers: the latents of each regulariser, and the gradients of its loss terms."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.autoencoder.patch import PatchAutoencoderKL, PatchVQModel
from ldm.autoencoder.point_posterior import LOG_VARIANCE
from ldm.autoencoder.regularisers import KL, Unregularised, VectorQuantised, quantiser, to_vectors
from ldm.errors import UserError

PATCH = partial(PatchAutoencoderKL, patch=2, latent_channels=3, block_out_channels=(8,), norm_num_groups=4)
PLAIN = partial(
    AutoencoderKL,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 8),
    norm_num_groups=4,
    latent_channels=3,
)
ARCHITECTURES = pytest.mark.parametrize("architecture", [PATCH, PLAIN], ids=["patch", "plain"])


@pytest.fixture
def images() -> torch.Tensor:
    coarse = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, 16, mode="bilinear")


def build_model(regulariser, architecture, images):
    torch.manual_seed(0)
    model = regulariser.build(architecture, 16)
    if isinstance(model, PatchAutoencoderKL | PatchVQModel):
        model.init_shortcut(images)
    for name, parameter in model.named_parameters():  # the core is initialised to zero
        if "quant_conv" in name or "conv_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    regulariser.initialise(model, lambda: images, 0, torch.device("cpu"))
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(seed: int = 0):
    return partial(torch.randn, generator=generator(seed))


@ARCHITECTURES
def test_vq_adds_a_codebook_to_the_same_architecture(architecture, images):
    model = build_model(VectorQuantised(16), architecture, images)
    assert type(model) is {PATCH: PatchVQModel, PLAIN: VQModel}[architecture]
    kl = build_model(KL(), architecture, images)
    names = {name for name, _ in kl.named_parameters()}
    assert names == {name for name, _ in model.named_parameters() if "quantize" not in name}
    autoencoder = Autoencoder(model)
    assert (autoencoder.regulariser, autoencoder.codebook_size, autoencoder.channels) == ("vq", 16, 3)
    assert not autoencoder.has_density and Autoencoder(kl).has_density
    assert autoencoder.latent_shape(16) == Autoencoder(kl).latent_shape(16)


@ARCHITECTURES
def test_encode_returns_unquantised_latents_and_decode_quantises(architecture, images):
    model = build_model(VectorQuantised(16), architecture, images)
    autoencoder = Autoencoder(model.eval())
    z, log_variance = autoencoder.encode(images)
    assert (log_variance == LOG_VARIANCE).all()
    weight = quantiser(model).embedding.weight
    codes = autoencoder.codes(z)
    assert codes.shape == (len(images), *z.shape[2:]) and 1 < len(codes.unique()) <= 16
    nearest = (to_vectors(z)[:, None] - weight).square().sum(-1).argmin(1)
    assert torch.equal(codes.flatten(), nearest)
    assert (to_vectors(z) - weight[nearest]).abs().max() > 1e-3
    z_q = weight[codes].permute(0, 3, 1, 2)
    torch.testing.assert_close(autoencoder.decode(z), autoencoder.decode(z_q))
    output = VectorQuantised(16).reconstruct(model, images, None)
    torch.testing.assert_close(output.images.clamp(-1, 1), autoencoder.decode(z), atol=1e-5, rtol=0)
    assert torch.equal(output.codes, nearest)


def test_save_and_load_preserve_codebook(images, tmp_path):
    model = build_model(VectorQuantised(16), PATCH, images)
    Autoencoder(model).save(tmp_path)
    loaded = Autoencoder.load(tmp_path)
    assert isinstance(loaded.model, PatchVQModel) and loaded.codebook_size == 16
    z, _ = loaded.encode(images)
    torch.testing.assert_close(loaded.decode(z), Autoencoder(model.eval()).decode(z))


def has_gradient(model, loss) -> dict[str, bool]:
    """Return, by parameter name, whether the loss has a nonzero gradient with respect to that parameter."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad is not None and bool((p.grad != 0).any()) for name, p in model.named_parameters()}


ENCODER = ("encoder", "quant_conv", "shortcut_in")


def submodule(name: str) -> str:
    return name.removeprefix("core.").split(".")[0]


@ARCHITECTURES
def test_codebook_loss_updates_only_encoder_and_codebook(architecture, images):
    regulariser = VectorQuantised(16, commitment=0.25)
    model = build_model(regulariser, architecture, images)
    output = regulariser.reconstruct(model, images, noise())
    z = to_vectors(model.encode(images).latents)
    distance = (z - quantiser(model).embedding.weight[output.codes]).square().mean()
    torch.testing.assert_close(output.terms["codebook"], 1.25 * distance)
    modules = {submodule(name) for name, nonzero in has_gradient(model, output.terms["codebook"]).items() if nonzero}
    assert modules == ({*ENCODER, "quantize"} if architecture is PATCH else {"encoder", "quant_conv", "quantize"})


def test_commitment_scales_only_the_encoder_gradient(images):
    """diffusers' own loss (legacy=True) scales the codebook's gradient instead."""

    def gradient_norms(commitment: float) -> tuple[float, float]:
        regulariser = VectorQuantised(16, commitment)
        model = build_model(regulariser, PATCH, images)
        regulariser.reconstruct(model, images, noise()).terms["codebook"].backward()
        return model.shortcut_in.weight.grad.norm().item(), quantiser(model).embedding.weight.grad.norm().item()

    encoder, codebook = gradient_norms(0.25)
    encoder_2, codebook_2 = gradient_norms(0.5)
    assert encoder_2 == pytest.approx(2 * encoder, rel=1e-4) and codebook_2 == pytest.approx(codebook, rel=1e-5)


@ARCHITECTURES
def test_distortion_gradient_passes_straight_through_quantisation(architecture, images):
    regulariser = VectorQuantised(16)
    model = build_model(regulariser, architecture, images)
    output = regulariser.reconstruct(model, images, noise())
    result = has_gradient(model, (output.images - images).square().mean())
    assert all(nonzero == ("quantize" not in name) for name, nonzero in result.items()), result


def test_codebook_is_initialised_by_kmeans_on_latents(images):
    """Most codes are used, and the latents are closer to the codes than to diffusers' initialisation near 0."""
    regulariser = VectorQuantised(16)
    model = build_model(regulariser, PATCH, images)
    z = to_vectors(model.encode(images).latents)
    error = (z - quantiser(model).embedding.weight[regulariser.reconstruct(model, images, None).codes]).square().mean()
    assert error < 0.5 * z.square().mean()
    assert len(Autoencoder(model).codes(model.encode(images).latents).unique()) >= 12


def test_idle_codes_restart_at_vectors_far_from_any_code(images):
    """Two distant codes are never used and restart at vectors from the batch. The codes in use do not change."""
    regulariser = VectorQuantised(16, restart_after=3)
    model = build_model(regulariser, PATCH, images)
    weight = quantiser(model).embedding.weight
    with torch.no_grad():
        weight[[4, 9]] = 100.0
    initial = weight.detach().clone()
    for step in range(3):
        assert torch.equal(weight[[4, 9]], initial[[4, 9]])
        regulariser.reconstruct(model, images, noise())
        regulariser.after_step(model, generator(step), progress=0.5)
    z = to_vectors(model.encode(images).latents).detach()
    for code in (4, 9):
        assert (z - weight[code]).abs().sum(1).min() < 1e-5
        distance = torch.cdist(z, initial).min(1).values
        assert distance[(z - weight[code]).abs().sum(1).argmin()] > 1e-3  # no code was close to this vector
    codes = regulariser.reconstruct(model, images, None).codes.unique()
    assert {4, 9} <= set(codes.tolist())
    codes = codes[(codes != 4) & (codes != 9)]
    assert torch.equal(weight[codes], initial[codes])


def test_codes_do_not_restart_late_in_training_or_when_frozen(images):
    """Late restarts would not reach the EMA weights, and the codebook is frozen if only the decoder is trained."""
    for progress, frozen, restarts in ((0.5, False, True), (0.8, False, False), (0.5, True, False)):
        regulariser = VectorQuantised(16, restart_after=1)
        model = build_model(regulariser, PATCH, images)
        weight = quantiser(model).embedding.weight.requires_grad_(not frozen)
        with torch.no_grad():
            weight[4] = 100.0
        regulariser.reconstruct(model, images, noise())
        regulariser.after_step(model, generator(), progress)
        assert (weight[4] != 100).all() == restarts


def test_code_used_in_any_accumulated_batch_is_not_idle(images):
    regulariser = VectorQuantised(128, restart_after=1)
    model = build_model(regulariser, PATCH, images)
    codes = [regulariser.reconstruct(model, batch, noise()).codes for batch in images.split(8)]
    regulariser.clear_batches()
    for batch in images.split(8):
        regulariser.reconstruct(model, batch, noise())
    initial = quantiser(model).embedding.weight.detach().clone()
    regulariser.after_step(model, generator(), progress=0.0)
    used_codes = torch.cat(codes).unique()
    assert len(used_codes) > len(codes[-1].unique())  # the batches use different codes
    assert torch.equal(quantiser(model).embedding.weight[used_codes], initial[used_codes])


@ARCHITECTURES
def test_unregularised_posterior_stays_a_point_during_training(architecture, images):
    regulariser = Unregularised()
    model = build_model(regulariser, architecture, images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    initial_loss = None
    for step in range(3):
        optimizer.zero_grad()
        output = regulariser.reconstruct(model, images, noise(step))
        loss = (output.images - images).square().mean()
        initial_loss = loss.item() if initial_loss is None else initial_loss
        loss.backward()
        optimizer.step()
    assert output.terms == {} and loss < initial_loss
    autoencoder = Autoencoder(model)
    assert autoencoder.regulariser == "none" and not autoencoder.has_density
    _, log_variance = autoencoder.encode(images)
    assert (log_variance == LOG_VARIANCE).all()


def test_kl_samples_with_noise_and_decodes_mean_without_noise(images):
    model = build_model(KL(), PATCH, images)
    samples = [KL().reconstruct(model, images, noise(seed)).images for seed in (0, 0, 1)]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    posterior = model.encode(images).latent_dist
    output = KL().reconstruct(model, images, None)
    torch.testing.assert_close(output.images, model.decode(posterior.mean).sample)
    torch.testing.assert_close(output.terms["kl"], posterior.kl().mean())


def test_invalid_options_and_mismatched_models_are_rejected(images):
    for argument in ({"codebook_size": 1}, {"codebook_size": 2.5}, {"restart_after": 0}):
        with pytest.raises(UserError, match=f"{next(iter(argument))}="):
            VectorQuantised(**argument)
    with pytest.raises(UserError, match="commitment=-1"):
        VectorQuantised(commitment=-1)
    kl, vq, none = (build_model(r, PATCH, images) for r in (KL(), VectorQuantised(16), Unregularised()))
    with pytest.raises(UserError, match="regulariser=kl .*none.*posterior is a point"):
        KL().check(none)
    for regulariser in (KL(), Unregularised()):
        regulariser.check(kl)
        with pytest.raises(UserError, match=f"regulariser={regulariser.name} .*vq.*PatchVQModel"):
            regulariser.check(vq)
    with pytest.raises(UserError, match="regulariser=vq .*kl or none.*PatchAutoencoderKL"):
        VectorQuantised(16).check(kl)
    with pytest.raises(UserError, match=r"codebook_size=8 .*\b16\b"):
        VectorQuantised(8).check(vq)
    with pytest.raises(UserError, match="regulariser=vq .*codebook.*AutoencoderKL or PatchAutoencoderKL"):
        VectorQuantised(8).build(lambda **options: kl, 16)
