"""ldm.autoencoder.regularisers: what each leaves of the latents, and which weights its terms move."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.autoencoder.patch import PatchAutoencoderKL, PatchVQModel
from ldm.autoencoder.point_posterior import LOG_VARIANCE
from ldm.autoencoder.regularisers import KL, Unregularised, VectorQuantised, flat, quantiser
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
BOTH = pytest.mark.parametrize("architecture", [PATCH, PLAIN], ids=["patch", "plain"])


@pytest.fixture
def images() -> torch.Tensor:
    coarse = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, 16, mode="bilinear")


def built(regulariser, architecture, images):
    torch.manual_seed(0)
    model = regulariser.build(architecture, 16)
    if isinstance(model, PatchAutoencoderKL | PatchVQModel):
        model.init_shortcut(images)
    for name, parameter in model.named_parameters():  # away from the zeros that the core starts with
        if "quant_conv" in name or "conv_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    regulariser.start(model, lambda: images, 0, torch.device("cpu"))
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(seed: int = 0):
    return partial(torch.randn, generator=generator(seed))


@BOTH
def test_vq_has_the_same_architecture_with_a_codebook(architecture, images):
    model = built(VectorQuantised(16), architecture, images)
    assert type(model) is {PATCH: PatchVQModel, PLAIN: VQModel}[architecture]
    kl = built(KL(), architecture, images)
    theirs = {name for name, _ in kl.named_parameters()}
    assert theirs == {name for name, _ in model.named_parameters() if "quantize" not in name}
    autoencoder = Autoencoder(model)
    assert (autoencoder.regulariser, autoencoder.codebook_size, autoencoder.channels) == ("vq", 16, 3)
    assert not autoencoder.has_density and Autoencoder(kl).has_density
    assert autoencoder.latent_shape(16) == Autoencoder(kl).latent_shape(16)


@BOTH
def test_stage_2_sees_latents_before_quantisation_and_decoding_quantises(architecture, images):
    model = built(VectorQuantised(16), architecture, images)
    autoencoder = Autoencoder(model.eval())
    z, log_variance = autoencoder.encode(images)
    assert (log_variance == LOG_VARIANCE).all()
    weight = quantiser(model).embedding.weight
    codes = autoencoder.codes(z)
    assert codes.shape == (len(images), *z.shape[2:]) and 1 < len(codes.unique()) <= 16
    nearest = (flat(z)[:, None] - weight).square().sum(-1).argmin(1)
    assert torch.equal(codes.flatten(), nearest)
    assert (flat(z) - weight[nearest]).abs().max() > 1e-3
    z_q = weight[codes].permute(0, 3, 1, 2)
    torch.testing.assert_close(autoencoder.decode(z), autoencoder.decode(z_q))
    made = VectorQuantised(16).reconstruct(model, images, None)
    torch.testing.assert_close(made.images.clamp(-1, 1), autoencoder.decode(z), atol=1e-5, rtol=0)
    assert torch.equal(made.codes, nearest)


def test_a_codebook_survives_its_files(images, tmp_path):
    model = built(VectorQuantised(16), PATCH, images)
    Autoencoder(model).save(tmp_path)
    loaded = Autoencoder.load(tmp_path)
    assert isinstance(loaded.model, PatchVQModel) and loaded.codebook_size == 16
    z, _ = loaded.encode(images)
    torch.testing.assert_close(loaded.decode(z), Autoencoder(model.eval()).decode(z))


def gradients(model, loss) -> dict[str, bool]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad is not None and bool((p.grad != 0).any()) for name, p in model.named_parameters()}


ENCODER = ("encoder", "quant_conv", "shortcut_in")


def owner(name: str) -> str:
    return name.removeprefix("core.").split(".")[0]


@BOTH
def test_the_codebook_loss_moves_encoder_and_codebook_alone(architecture, images):
    regulariser = VectorQuantised(16, commitment=0.25)
    model = built(regulariser, architecture, images)
    made = regulariser.reconstruct(model, images, noise())
    z = flat(model.encode(images).latents)
    distance = (z - quantiser(model).embedding.weight[made.codes]).square().mean()
    torch.testing.assert_close(made.terms["codebook"], 1.25 * distance)
    moved = {owner(name) for name, moves in gradients(model, made.terms["codebook"]).items() if moves}
    assert moved == ({*ENCODER, "quantize"} if architecture is PATCH else {"encoder", "quant_conv", "quantize"})


def test_the_commitment_is_what_moves_the_encoder(images):
    """diffusers' own term has its weights the other way round."""

    def sizes(commitment: float) -> tuple[float, float]:
        regulariser = VectorQuantised(16, commitment)
        model = built(regulariser, PATCH, images)
        regulariser.reconstruct(model, images, noise()).terms["codebook"].backward()
        return model.shortcut_in.weight.grad.norm().item(), quantiser(model).embedding.weight.grad.norm().item()

    encoder, codebook = sizes(0.25)
    twice, same = sizes(0.5)
    assert twice == pytest.approx(2 * encoder, rel=1e-4) and same == pytest.approx(codebook, rel=1e-5)


@BOTH
def test_a_distortion_passes_straight_through_the_codebook(architecture, images):
    regulariser = VectorQuantised(16)
    model = built(regulariser, architecture, images)
    made = regulariser.reconstruct(model, images, noise())
    found = gradients(model, (made.images - images).square().mean())
    assert all(moves == ("quantize" not in name) for name, moves in found.items()), found


def test_the_codebook_starts_where_the_latents_are(images):
    """k-means: every code is used, and the latents are nearer to it than to diffusers' start near 0."""
    regulariser = VectorQuantised(16)
    model = built(regulariser, PATCH, images)
    z = flat(model.encode(images).latents)
    error = (z - quantiser(model).embedding.weight[regulariser.reconstruct(model, images, None).codes]).square().mean()
    assert error < 0.5 * z.square().mean()
    assert len(Autoencoder(model).codes(model.encode(images).latents).unique()) >= 12


def test_idle_codes_move_to_vectors_that_have_none(images):
    """Two codes far away are never nearest; the others stay, and the moved ones are vectors of the batch."""
    regulariser = VectorQuantised(16, restart_after=3)
    model = built(regulariser, PATCH, images)
    weight = quantiser(model).embedding.weight
    with torch.no_grad():
        weight[[4, 9]] = 100.0
    before = weight.detach().clone()
    for step in range(3):
        assert torch.equal(weight[[4, 9]], before[[4, 9]])
        regulariser.reconstruct(model, images, noise())
        regulariser.after_step(model, generator(step), progress=0.5)
    z = flat(model.encode(images).latents).detach()
    for code in (4, 9):
        assert (z - weight[code]).abs().sum(1).min() < 1e-5
        distance = torch.cdist(z, before).min(1).values
        assert distance[(z - weight[code]).abs().sum(1).argmin()] > 1e-3  # it had no code of its own
    used = regulariser.reconstruct(model, images, None).codes.unique()
    assert {4, 9} <= set(used.tolist())
    assert torch.equal(weight[used[(used != 4) & (used != 9)]], before[used[(used != 4) & (used != 9)]])


def test_codes_stay_late_in_the_budget_and_where_they_are_frozen(images):
    """The averaged weights could not follow; and a decoder alone is trained on the latents as they are."""
    for progress, frozen, moves in ((0.5, False, True), (0.8, False, False), (0.5, True, False)):
        regulariser = VectorQuantised(16, restart_after=1)
        model = built(regulariser, PATCH, images)
        weight = quantiser(model).embedding.weight.requires_grad_(not frozen)
        with torch.no_grad():
            weight[4] = 100.0
        regulariser.reconstruct(model, images, noise())
        regulariser.after_step(model, generator(), progress)
        assert (weight[4] != 100).all() == moves


def test_a_code_that_any_part_of_a_step_uses_is_not_idle(images):
    regulariser = VectorQuantised(128, restart_after=1)
    model = built(regulariser, PATCH, images)
    parts = [regulariser.reconstruct(model, part, noise()).codes for part in images.split(8)]
    regulariser.forget()
    for part in images.split(8):
        regulariser.reconstruct(model, part, noise())
    before = quantiser(model).embedding.weight.detach().clone()
    regulariser.after_step(model, generator(), progress=0.0)
    used = torch.cat(parts).unique()
    assert len(used) > len(parts[-1].unique())  # the parts differ in what they use
    assert torch.equal(quantiser(model).embedding.weight[used], before[used])


@BOTH
def test_none_is_a_point_that_training_leaves_a_point(architecture, images):
    regulariser = Unregularised()
    model = built(regulariser, architecture, images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    first = None
    for step in range(3):
        optimizer.zero_grad()
        made = regulariser.reconstruct(model, images, noise(step))
        loss = (made.images - images).square().mean()
        first = loss.item() if first is None else first
        loss.backward()
        optimizer.step()
    assert made.terms == {} and loss < first
    autoencoder = Autoencoder(model)
    assert autoencoder.regulariser == "none" and not autoencoder.has_density
    _, log_variance = autoencoder.encode(images)
    assert (log_variance == LOG_VARIANCE).all()


def test_kl_draws_from_the_posterior_and_decodes_its_mean_without_noise(images):
    model = built(KL(), PATCH, images)
    drawn = [KL().reconstruct(model, images, noise(seed)).images for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    posterior = model.encode(images).latent_dist
    made = KL().reconstruct(model, images, None)
    torch.testing.assert_close(made.images, model.decode(posterior.mean).sample)
    torch.testing.assert_close(made.terms["kl"], posterior.kl().mean())


def test_what_does_not_go_together_is_refused(images):
    for wrong in ({"codebook_size": 1}, {"codebook_size": 2.5}, {"restart_after": 0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
            VectorQuantised(**wrong)
    with pytest.raises(UserError, match="commitment=-1"):
        VectorQuantised(commitment=-1)
    kl, vq, none = (built(rule, PATCH, images) for rule in (KL(), VectorQuantised(16), Unregularised()))
    with pytest.raises(UserError, match="regulariser=kl must be none"):
        KL().check(none)
    for regulariser in (KL(), Unregularised()):
        regulariser.check(kl)
        with pytest.raises(UserError, match="must be vq"):
            regulariser.check(vq)
    with pytest.raises(UserError, match="regulariser=vq must be kl or none"):
        VectorQuantised(16).check(kl)
    with pytest.raises(UserError, match="codebook_size=8 must be 16"):
        VectorQuantised(8).check(vq)
    with pytest.raises(UserError, match="needs a form with a codebook"):
        VectorQuantised(8).build(lambda **options: kl, 16)
