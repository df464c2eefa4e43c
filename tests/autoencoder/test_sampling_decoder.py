"""ldm.autoencoder.sampling_decoder: training, the choice of the level, and files."""

import copy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics, set_trainable, weights_sha256
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.sampling_decoder import SAMPLING_DECODER_FILE, SamplingDecoder, decode_noisy
from ldm.errors import UserError
from tests.autoencoder.test_regularisers import PATCH, PLAIN

MODELS = {"patch": PATCH, "plain": PLAIN}
KINDS = pytest.mark.parametrize("kind", MODELS)
IMAGES = torch.nn.functional.interpolate(
    torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1, 16, mode="bilinear"
)


def make(kind: str = "patch", scale: float = 1.0):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if kind == "patch":
        model.init_shortcut(IMAGES)
    model.sampling_decoder = SamplingDecoder(model, [scale] * 3).eval()
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(model) -> torch.Tensor:
    return model.encode(IMAGES).latent_dist.mean.detach()


@KINDS
def test_untrained_copy_decodes_like_the_autoencoder_at_every_level(kind):
    model = make(kind)
    z = latents(model)
    with torch.no_grad():
        for level in (torch.zeros(1), torch.full((64,), 0.7)):
            torch.testing.assert_close(model.sampling_decoder(z, level), model.decode(z).sample)


@KINDS
def test_level_is_a_bias_of_the_first_convolution_and_zero_at_level_0(kind):
    """Each row has its own level. At level 0 the bias is 0; at a fixed level it can be folded into the convolution."""
    model = make(kind)
    decoder, z = model.sampling_decoder, latents(model)[:3]
    torch.nn.init.normal_(decoder.bias.weight)
    with torch.no_grad():
        mixed = decoder(z, torch.tensor([0.0, 0.5, 1.0]))
        torch.testing.assert_close(mixed[:1], model.decode(z[:1]).sample)
        assert (mixed[1:] - model.decode(z[1:]).sample).abs().amax((1, 2, 3)).min() > 1e-3
        first = getattr(model, "core", model).decoder.conv_in
        hidden = [torch.nn.functional.silu(decoder.hidden(torch.tensor([x, x * x]))) for x in (0.5, 0.0)]
        first.bias += decoder.bias(hidden[0] - hidden[1])
        torch.testing.assert_close(model.decode(z[1:2]).sample, mixed[1:2])


@KINDS
def test_noise_trains_only_the_sampling_decoder(kind):
    model = make(kind)
    z_raw = model.encode(IMAGES).latent_dist.mean
    noise = partial(torch.randn, generator=generator())
    decoded = decode_noisy(model.sampling_decoder, z_raw, 0.5, noise)
    AutoencoderLoss().sampling_distortion(IMAGES, decoded).backward()
    for name, parameter in model.named_parameters():
        # `hidden` gets no gradient in the first step, because the weights that follow it are still 0
        trains = name.startswith("sampling_decoder.") and ".hidden." not in name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trains, name


def test_training_on_noise_makes_decoder_robust():
    """After training, noisy latents are decoded with a much lower error, and the autoencoder itself is unchanged."""
    model, noise = make(), partial(torch.randn, generator=generator())
    before, z = weights_sha256(model.core), latents(model)
    decoder = model.sampling_decoder
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        AutoencoderLoss().sampling_distortion(IMAGES, decode_noisy(decoder, z, 0.5, noise)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weights_sha256(model.core) == before
    with torch.no_grad():
        noisy = z + 0.5 * torch.randn(z.shape, generator=generator(1))
        errors = [
            (x - IMAGES).square().mean() for x in (decoder(noisy, torch.full((1,), 0.5)), model.decode(noisy).sample)
        ]
    assert errors[0] < 0.5 * errors[1]
    decoder.choose_level(IMAGES, z, 0.5, generator())
    assert 0 < decoder.level <= 0.5


def test_chosen_level_has_the_highest_psnr():
    """The decoded images are off by the distance of the level from its best value."""
    model = make()
    decoder, z = model.sampling_decoder, latents(model)
    target = 0.3
    decoder.forward = lambda z_raw, level=None: IMAGES[: len(z_raw)] + (level - target)[:, None, None, None]
    decoder.choose_level(IMAGES[:64], z, 1.0, generator())
    assert decoder.level.item() == pytest.approx(target)


def test_noise_has_the_scale_of_each_channel():
    model = make()
    model.sampling_decoder.scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
    z, eps = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    noisy = model.sampling_decoder.add_noise(z, torch.tensor([0.0, 0.5]), eps)
    assert not noisy[0].any()
    assert noisy[1, :, 0, 0].tolist() == [0.5, 1.0, 1.5]


@KINDS
def test_files_keep_both_decoders_and_stock_classes_open_the_folder(kind, tmp_path):
    model = make(kind)
    torch.nn.init.normal_(model.sampling_decoder.bias.weight)
    model.sampling_decoder.level.fill_(0.4)
    Autoencoder(model).save(tmp_path)
    loaded, z = Autoencoder.load(tmp_path), latents(model)
    assert weights_sha256(loaded.model) == weights_sha256(model)
    with torch.no_grad():
        assert torch.equal(loaded.decode_samples(z), model.sampling_decoder(z).clamp(-1, 1))
    assert torch.equal(loaded.decode(z), Autoencoder(model).decode(z))
    stock = type(model).from_pretrained(tmp_path)
    assert torch.equal(stock.decode(z).sample, model.decode(z).sample)


def test_autoencoder_without_sampling_decoder_uses_its_own_for_samples(tmp_path):
    model = make()
    model.sampling_decoder = None
    Autoencoder(model).save(tmp_path)
    assert not (tmp_path / SAMPLING_DECODER_FILE).exists()
    loaded, z = Autoencoder.load(tmp_path), latents(model)
    assert torch.equal(loaded.decode_samples(z), loaded.decode(z))


@pytest.mark.parametrize("damage", ["truncated", "missing key", "other shape", "not finite"])
def test_damaged_file_is_rejected_and_the_remedy_works(damage, tmp_path):
    model = make()
    digest = Autoencoder(model).weights_sha256()
    statistics = LatentStatistics([0.0] * 3, [1.0] * 3, [0.1] * 3, data="data", weights_sha256=digest)
    Autoencoder(model, statistics).save(tmp_path)
    file = tmp_path / SAMPLING_DECODER_FILE
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    else:
        state = load_file(file)
        state["bias.weight"] = {
            "missing key": torch.zeros(0),
            "other shape": torch.zeros(3, 32),
            "not finite": torch.full_like(state["bias.weight"], torch.nan),
        }[damage]
        if damage == "missing key":
            del state["bias.weight"]
        save_file(state, file)
    with pytest.raises(UserError, match=rf"{SAMPLING_DECODER_FILE} .*delete it"):
        Autoencoder.load(tmp_path)
    file.unlink()
    assert Autoencoder.load(tmp_path).weights_sha256() == statistics.weights_sha256


def test_digest_of_the_latents_does_not_depend_on_the_sampling_decoder():
    model = make()
    autoencoder = Autoencoder(model)
    model.sampling_decoder.level.fill_(0.4)
    digests = autoencoder.weights_sha256(), autoencoder.sampling_decoder_sha256()
    torch.nn.init.normal_(model.sampling_decoder.bias.weight)
    assert autoencoder.weights_sha256() == digests[0] and autoencoder.sampling_decoder_sha256() != digests[1]


def test_copy_uses_its_own_level():
    model = make()
    torch.nn.init.normal_(model.sampling_decoder.bias.weight)
    z = latents(model)[:1]
    model.sampling_decoder(z, torch.ones(1)).sum().backward()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied.sampling_decoder(z, torch.ones(1)), model.sampling_decoder(z, torch.ones(1)))
        torch.nn.init.zeros_(model.sampling_decoder.bias.weight)
        assert not torch.equal(copied.sampling_decoder(z, torch.ones(1)), model.sampling_decoder(z, torch.ones(1)))


def test_trainable_parts_include_the_sampling_decoder():
    model = make()
    for part, trains in (("all", True), ("decoder", True), ("nothing", False)):
        set_trainable(model, part)
        assert {p.requires_grad for p in model.sampling_decoder.parameters()} == {trains}
