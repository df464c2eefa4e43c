"""ldm.autoencoder.patch: PCA initialisation, diffusers' interface, saving and loading."""

import pytest
import torch

from ldm.autoencoder.autoencoder import Autoencoder, weights_sha256
from ldm.autoencoder.patch import INITIAL_LOG_VARIANCE, PatchAutoencoderKL
from ldm.metrics.image import pca_reconstruction, psnr


def build(**options) -> PatchAutoencoderKL:
    torch.manual_seed(0)
    return PatchAutoencoderKL(
        **{"patch": 2, "latent_channels": 4, "block_out_channels": (8,), "norm_num_groups": 4, **options}
    )


def smooth_images(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Generate correlated noise in [-1, 1] that has most of its variance in a few principal components."""
    noise = torch.randn(count, 3, size // 4 + 1, size // 4 + 1, generator=torch.Generator().manual_seed(seed))
    coarse = torch.nn.functional.interpolate(noise, size, mode="bicubic", align_corners=True)
    fine = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed + 1))
    return (0.4 * coarse + 0.03 * fine).clamp(-1, 1)


@pytest.mark.parametrize(
    ("patch", "levels", "factor"), [(1, 1, 1), (1, 3, 4), (2, 1, 2), (2, 3, 8), (4, 1, 4), (4, 2, 8)]
)
def test_factor_is_patch_times_downsampling(patch, levels, factor):
    model = build(patch=patch, block_out_channels=(8,) * levels)
    assert model.factor == Autoencoder(model).factor == factor
    images = smooth_images(2)
    posterior = model.encode(images).latent_dist
    side = 16 // factor
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, side, side)
    assert model.decode(posterior.mean).sample.shape == images.shape
    assert Autoencoder(model).latent_shape(16) == (4, side, side)


@pytest.mark.parametrize(("patch", "levels", "channels"), [(2, 1, 4), (2, 2, 12), (4, 1, 12)])
def test_initial_shortcut_reconstructs_like_pca(patch, levels, channels):
    model = build(patch=patch, block_out_channels=(8,) * levels, latent_channels=channels)
    train, held_out = smooth_images(200), smooth_images(40, seed=7)
    model.init_shortcut(train)
    with torch.no_grad():
        ours = model(held_out).sample.clamp(-1, 1)
    pca = pca_reconstruction(train, held_out, factor=model.factor, channels=channels)
    torch.testing.assert_close(psnr(held_out, ours).mean(), psnr(held_out, pca).mean(), rtol=0, atol=0.1)
    torch.testing.assert_close(ours, pca, rtol=0, atol=1e-4)


def test_initial_latent_variance_is_component_std():
    """The initial variance of each latent channel is the standard deviation of its PCA component."""
    model, images = build(), smooth_images(300)
    model.init_shortcut(images)
    z = model.encode(images).latent_dist.mean.transpose(0, 1).flatten(1).double()
    patches = torch.nn.functional.pixel_unshuffle(images, 2).transpose(0, 1).flatten(1).double()
    components = torch.linalg.eigvalsh(torch.cov(patches)).flip(0)[:4]
    torch.testing.assert_close(z.var(1), components.sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(z.mean(1), torch.zeros(4).double(), rtol=0, atol=1e-4)


def test_initial_posterior_is_narrow():
    posterior = build().encode(smooth_images(2)).latent_dist
    torch.testing.assert_close(posterior.logvar, torch.full_like(posterior.logvar, INITIAL_LOG_VARIANCE))


def test_init_shortcut_rejects_more_channels_than_patch_dimensions():
    with pytest.raises(ValueError, match="13 latent channels.*12 dimensions.*12 channels or fewer"):
        build(latent_channels=13).init_shortcut(smooth_images(50))


def test_convolutions_are_not_zero_initialised_without_shortcut():
    model = build(shortcut=False)
    assert not any("shortcut" in name for name in model.state_dict())
    assert model(smooth_images(1)).sample.abs().max() > 0


@pytest.mark.parametrize("shortcut", [True, False])
def test_save_and_load_are_bit_exact(tmp_path, shortcut):
    model = build(shortcut=shortcut).eval()
    model.save_pretrained(tmp_path)
    loaded = PatchAutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert weights_sha256(loaded) == weights_sha256(model)
    assert loaded.config.block_out_channels == [8] and loaded.factor == 2
    expected, actual = model.state_dict(), loaded.state_dict()
    assert list(actual) == list(expected) and all(torch.equal(actual[name], expected[name]) for name in expected)
    images = smooth_images(3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).sample, model(images).sample, rtol=0, atol=0)


def test_images_in_a_batch_are_independent():
    model = build(mid_block_add_attention=True).eval()
    torch.nn.init.normal_(model.core.quant_conv.weight)
    images = smooth_images(3)
    separate = torch.cat([model.encode(image[None]).latent_dist.mean for image in images])
    torch.testing.assert_close(model.encode(images).latent_dist.mean, separate, rtol=0, atol=1e-5)


def test_autocast_keeps_moments_and_pixels_in_float32():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(smooth_images(1)).latent_dist
        sample = model.decode(posterior.mean).sample
    assert posterior.mean.dtype == posterior.logvar.dtype == sample.dtype == torch.float32
