"""ldm.autoencoder.autoencoder: the common interface to diffusers' autoencoders, and their latent statistics."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics, weights_sha256
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.errors import UserError


def plain_model() -> AutoencoderKL:
    """Build a plain diffusers autoencoder with f = 2 and three channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
    ).eval()


def patch_model() -> PatchAutoencoderKL:
    torch.manual_seed(0)
    return PatchAutoencoderKL(patch=4, latent_channels=5, block_out_channels=(8, 8), norm_num_groups=4).eval()


def with_statistics(model) -> Autoencoder:
    channels = model.config.latent_channels
    mean, std = [0.1 * i - 0.3 for i in range(channels)], [0.5 + i for i in range(channels)]
    return Autoencoder(model, LatentStatistics(mean, std, [0.1, 0.2, 0.3], "images", weights_sha256(model)))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("make", "factor", "channels"), [(plain_model, 2, 3), (patch_model, 8, 5)])
def test_factor_channels_and_shapes_match_the_model(make, factor, channels, images):
    autoencoder = Autoencoder(make())
    assert (autoencoder.factor, autoencoder.channels) == (factor, channels)
    assert autoencoder.latent_shape(16) == (channels, 16 // factor, 16 // factor)
    mean, log_variance = autoencoder.encode(images)
    assert mean.shape == log_variance.shape == (3, *autoencoder.latent_shape(16))
    decoded = autoencoder.decode(1e3 * mean)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1


@pytest.mark.parametrize(("resolution", "valid"), [(20, "16 or 24"), (31, "24 or 32"), (3, "8."), (1, "8.")])
def test_indivisible_resolution_error_suggests_valid_resolutions(resolution, valid):
    with pytest.raises(UserError, match=f"resolution={resolution} .*multiple of f = 8.*{valid}"):
        Autoencoder(patch_model()).latent_shape(resolution)


@pytest.mark.parametrize("make", [plain_model, patch_model])
def test_save_and_load_preserve_weights_and_statistics(make, images, tmp_path):
    autoencoder = with_statistics(make())
    autoencoder.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "latents.json",
    ]
    loaded = Autoencoder.load(tmp_path)
    assert loaded.statistics == autoencoder.statistics
    assert loaded.weights_sha256() == autoencoder.weights_sha256()
    assert not loaded.model.training
    for expected, actual in zip(autoencoder.encode(images), loaded.encode(images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_load_reads_plain_diffusers_folder(images, tmp_path):
    model = plain_model()
    model.save_pretrained(tmp_path)
    loaded = Autoencoder.load(tmp_path)
    assert loaded.statistics is None and loaded.factor == 2
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(images)[0], model.encode(images).latent_dist.mean, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no latent statistics"):
        loaded.standardise(torch.zeros(1, 3, 8, 8))


def test_unstandardise_inverts_standardise():
    autoencoder = with_statistics(plain_model())
    z_raw = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = autoencoder.standardise(z_raw)
    torch.testing.assert_close(autoencoder.unstandardise(z), z_raw)
    torch.testing.assert_close(z[:, 1], (z_raw[:, 1] + 0.2) / 1.5)
    torch.testing.assert_close(
        autoencoder.unstandardise(torch.zeros(1, 3, 1, 1))[0, :, 0, 0], torch.tensor([-0.3, -0.2, -0.1])
    )


def test_load_rejects_statistics_for_different_weights(tmp_path):
    with_statistics(plain_model()).save(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"] += 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    old, new = weights_sha256(plain_model())[:12], weights_sha256(AutoencoderKL.from_pretrained(tmp_path))[:12]
    with pytest.raises(UserError, match=rf"latents\.json .*{old}.*{new}"):
        Autoencoder.load(tmp_path)


def edit_json(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("latents.json", {"format": 0}, r"latents\.json .*format 0.* 1\b"),
        ("config.json", {"_class_name": "UNet2DModel"}, r"config\.json .*UNet2DModel.*AutoencoderKL"),
    ],
)
def test_load_rejects_unknown_format_or_class(tmp_path, file, values, message):
    with_statistics(plain_model()).save(tmp_path)
    edit_json(tmp_path / file, **values)
    with pytest.raises(UserError, match=message):
        Autoencoder.load(tmp_path)


def test_load_rejects_folder_without_config(tmp_path):
    with pytest.raises(UserError, match=r"not an autoencoder folder.*config\.json"):
        Autoencoder.load(tmp_path)


def test_digest_depends_only_on_weights(tmp_path):
    model = plain_model()
    digest = weights_sha256(model)
    assert weights_sha256(plain_model()) == digest
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-7
    assert weights_sha256(model) != digest
    assert weights_sha256(plain_model().to(torch.float64)) != digest
