"""Tests of pretrained autoencoders: small random models with the configs of SD, SDXL, SD3, FLUX, DC-AE and TAESD."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

import ldm.train
from ldm.autoencoder.autoencoder import Autoencoder, published_statistics, set_trainable, weights_sha256
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.errors import UserError
from ldm.runs.load import load_autoencoder
from ldm.runs.run import Run

SMALL_MODEL = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 32,
}
CONFIGS = {
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True},
    "sdxl_normalised": {
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "latents_mean": [-1.6, 1.1, 1.7, -0.8],
        "latents_std": [8.4, 5.9, 5.3, 6.1],
    },
    "sd3": {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
    },
    "flux": {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
EACH_CONFIG = pytest.mark.parametrize("config_name", CONFIGS)
SHORT_RUN = [
    "stage=vae",
    "logger=csv",
    "trainer=cpu",
    "trainer.max_time=null",
    "trainer.precision=32-true",
    "batch_size=8",
]
SHORT_RUN += ["trainer.max_steps=2", "data.resolution=32"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with one model per config. The folder `sd` is a pipeline folder, with its model in `vae`."""
    folder = tmp_path_factory.mktemp("models")
    for name, options in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoencoderKL(**SMALL_MODEL, **options)
        model.save_pretrained(folder / name / ("vae" if name == "sd" else ""))
    return folder


@pytest.fixture
def train(make_images, tmp_path, monkeypatch, call):
    """Function that trains one stage (by default, stage 1) in this process on 20 images of 32 x 32 pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    make_images(tmp_path / "images", 20, size=32)

    def train(*options: str, stage: tuple[str, ...] = tuple(SHORT_RUN)):
        return call(ldm.train.main, *stage, "data=image_folder", "data.path=images", "data.val_fraction=0.2", *options)

    return train


@EACH_CONFIG
def test_encode_and_decode_match_diffusers(models, config_name):
    autoencoder = load_autoencoder(str(models / config_name))
    folder = models / config_name / ("vae" if config_name == "sd" else "")
    expected = AutoencoderKL.from_pretrained(folder)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, log_variance = autoencoder.encode(images)
    with torch.no_grad():
        posterior = expected.encode(images).latent_dist
        assert torch.equal(mean, posterior.mean) and torch.equal(log_variance, posterior.logvar)
        assert torch.equal(autoencoder.decode(mean), expected.decode(mean).sample.clamp(-1, 1))
    assert autoencoder.factor == 8 and autoencoder.latent_shape(32) == (CONFIGS[config_name]["latent_channels"], 4, 4)
    assert autoencoder.regulariser == "kl" and autoencoder.has_density


@pytest.mark.parametrize("key", ["in_channels", "out_channels"])
def test_autoencoder_must_have_three_colour_channels(tmp_path, key):
    AutoencoderKL(**SMALL_MODEL, **{key: 1}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{key}=1 .*must be 3"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scaling_factor", 0),
        ("scaling_factor", float("nan")),
        ("latents_mean", [0.1, 0.2]),
        ("latents_mean", "none"),
        ("latents_std", [1.0] * 5),
        ("latents_std", [1.0, 1.0, 0.0, 1.0]),
    ],
)
def test_published_statistics_must_be_valid(tmp_path, key, value):
    config = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, key: value}
    model = AutoencoderKL(**SMALL_MODEL, latent_channels=4)
    model.register_to_config(**config)
    with pytest.raises(UserError, match=rf"{key}=.* in config\.json must be"):
        published_statistics(model)


def test_variant_weights_are_loaded_if_there_are_no_others(tmp_path):
    model = AutoencoderKL(**SMALL_MODEL).half()
    model.save_pretrained(tmp_path, variant="fp16")
    loaded = load_autoencoder(str(tmp_path)).model
    assert loaded.dtype == torch.float32
    assert all(torch.equal(value, model.state_dict()[name].float()) for name, value in loaded.state_dict().items())
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded = load_autoencoder(str(tmp_path)).model
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in sharded.state_dict().items())


def test_weights_that_cannot_be_loaded_are_explained(tmp_path):
    AutoencoderKL(**SMALL_MODEL).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="no config.json.*from_single_file"):
        load_autoencoder(str(weights))
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
        load_autoencoder(str(tmp_path))
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="diffusion_pytorch_model.bin can run arbitrary code.*safetensors"):
        load_autoencoder(str(tmp_path))


@EACH_CONFIG
def test_published_statistics_match_diffusers_pipelines(models, config_name):
    """(z_raw - mean) / std equals the network input in each diffusers pipeline."""
    config = CONFIGS[config_name]
    mean, std = published_statistics(load_autoencoder(str(models / config_name)).model)
    z_raw = torch.randn(1, config["latent_channels"], 2, 2)
    if "latents_mean" in config:
        centre, spread = (torch.tensor(config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
        expected = (z_raw - centre) * config["scaling_factor"] / spread
    else:
        expected = (z_raw - config.get("shift_factor", 0)) * config["scaling_factor"]
    ours = (z_raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(ours, expected)


def test_patch_autoencoder_has_no_published_statistics():
    assert published_statistics(PatchAutoencoderKL(patch=2, block_out_channels=(8,), norm_num_groups=4)) is None


@EACH_CONFIG
def test_training_only_the_decoder_does_not_change_latents(models, config_name):
    model = load_autoencoder(str(models / config_name)).model.train()
    set_trainable(model, "decoder")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    initial_moments = model.encode(images).latent_dist.parameters.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    reconstruction = model.decode(model.encode(images).latent_dist.mean).sample
    (reconstruction - images).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.encode(images).latent_dist.parameters, initial_moments)
    assert not torch.equal(model.decode(model.encode(images).latent_dist.mean).sample, reconstruction)
    set_trainable(model, "all")
    assert all(p.requires_grad for p in model.parameters())
    set_trainable(model, "nothing")
    assert not any(p.requires_grad for p in model.parameters())


@EACH_CONFIG
def test_untrained_run_keeps_pretrained_weights_and_measures_statistics(models, config_name, train):
    """With autoencoder.train=nothing, the default, the run takes no steps and counts as finished."""
    result = train("autoencoder=pretrained", f"autoencoder.path={models / config_name}", "name=pretrained")
    assert result.code == 0, result
    assert "none trainable" in result.out and "expected time" not in result.out
    run = Run.open("runs/vae/pretrained")
    autoencoder = run.autoencoder()
    assert weights_sha256(autoencoder.model) == weights_sha256(load_autoencoder(str(models / config_name)).model)
    assert autoencoder.model.config.scaling_factor == CONFIGS[config_name]["scaling_factor"]
    statistics = autoencoder.statistics
    mean, log_variance = autoencoder.encode(run.image_data().batch(run.image_data().train_indices))
    torch.testing.assert_close(torch.tensor(statistics.latent_mean), mean.mean((0, 2, 3)), rtol=0.01, atol=0.01)
    std = (mean.var((0, 2, 3), correction=0) + log_variance.exp().mean((0, 2, 3))).sqrt()
    torch.testing.assert_close(torch.tensor(statistics.latent_std), std, rtol=1e-3, atol=0)
    assert run.facts["figures"]["steps"] == 0 and run.finished


def test_run_uses_published_statistics(models, train):
    options = ("autoencoder=pretrained", f"autoencoder.path={models / 'sd3'}", "latent_statistics=published")
    assert train(*options, "name=published").code == 0
    statistics = Run.open("runs/vae/published").autoencoder().statistics
    assert statistics.latent_mean == [0.0609] * 16
    assert statistics.latent_std == pytest.approx([1 / 1.5305] * 16)
    result = train("latent_statistics=published", "name=fresh")
    assert result.code == 2
    assert "latent_statistics=published" in result.err and "pretrained autoencoder" in result.err


@pytest.mark.parametrize(
    ("config_name", "trainable"), [("sdxl", "all"), ("sdxl", "decoder"), ("sd3", "decoder"), ("flux", "decoder")]
)
def test_fine_tuning_changes_only_the_trainable_weights(models, train, config_name, trainable):
    """Compare all weights with the pretrained model, after two steps, in diffusers."""
    options = ("autoencoder=pretrained", f"autoencoder.path={models / config_name}", f"autoencoder.train={trainable}")
    result = train(*options, "name=tuned", "adversarial=hinge", "adversarial.start=0")
    assert result.code == 0, result
    tuned = AutoencoderKL.from_pretrained(Run.open("runs/vae/tuned").autoencoder_folder)
    pretrained = AutoencoderKL.from_pretrained(models / config_name)
    is_equal = {
        name: torch.equal(a, b)
        for (name, a), (_, b) in zip(tuned.named_parameters(), pretrained.named_parameters(), strict=True)
    }
    changed = {name.split(".")[0] for name, equal in is_equal.items() if not equal}
    encoder, decoder = {"encoder", "quant_conv"}, {"decoder", "post_quant_conv"}
    expected = decoder if trainable == "decoder" else encoder | decoder
    assert changed == expected & {name for name, _ in pretrained.named_children()}
    assert Run.open("runs/vae/tuned").facts["pretrained"] == str(models / config_name)


def test_stage_2_trains_on_pretrained_autoencoder(models, train):
    network = ["network=dit", "network.hidden_dim=16", "network.depth=1", "network.head_dim=8", "conditioning=none"]
    diffusion = ("stage=diffusion", *SHORT_RUN[1:], *network)
    pretrained = ("autoencoder=pretrained", f"autoencoder.path={models / 'flux'}")
    result = train(*pretrained, "name=flux", "val_images=4", stage=diffusion)
    assert result.code == 0, result
    pipeline = Run.open("runs/diffusion/flux").pipeline()
    assert pipeline.latent_shape == (16, 4, 4)
    assert pipeline.autoencoder.weights_sha256() == weights_sha256(load_autoencoder(str(models / "flux")).model)


@pytest.mark.parametrize(
    ("options", "details"),
    [
        (["autoencoder.path=nowhere/at/all"], ["nowhere/at/all"]),
        (["autoencoder.train=encoder"], ["autoencoder.train=encoder", "'all', 'decoder' or 'nothing'"]),
        (["autoencoder.train=all", "regulariser=vq"], ["regulariser=vq", "kl or none"]),
        (["data.resolution=36"], ["data.resolution=36", "multiple of f = 8", "32 or 40"]),
    ],
)
def test_invalid_options_are_rejected(models, train, options, details):
    result = train("autoencoder=pretrained", f"autoencoder.path={models / 'sd'}", *options)
    assert result.code == 2 and "Traceback" not in result.err
    assert all(detail in result.err for detail in details), result.err


def test_pretrained_autoencoder_requires_a_path(train):
    result = train("autoencoder=pretrained")
    assert result.code == 2 and "autoencoder.path" in result.err


def write_deterministic(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    if name == "dc":
        sides: dict = {}
        for side in ("encoder", "decoder"):
            sides |= {f"{side}_block_types": ("ResBlock", "EfficientViTBlock"), f"{side}_block_out_channels": (8, 16)}
            sides |= {f"{side}_layers_per_block": (1, 1), f"{side}_qkv_multiscales": ((), (5,))}
        model = AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.41407, **sides)
    else:
        sizes = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8))
        blocks = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1, 1))
        model = AutoencoderTiny(**sizes, **blocks, latent_channels=4)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "channels", "scale"), [("dc", 8, 1 / 0.41407), ("tiny", 4, 1.0)])
def test_deterministic_autoencoders_are_measured_fine_tuned_and_used(tmp_path, train, name, channels, scale):
    folder = write_deterministic(name, tmp_path / name)
    autoencoder = load_autoencoder(str(folder))
    kind = {"dc": AutoencoderDC, "tiny": AutoencoderTiny}[name]
    original = kind.from_pretrained(folder)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, log_variance = autoencoder.encode(images)
    with torch.no_grad():
        assert torch.equal(mean, original.encode(images)[0]) and (log_variance == -30).all()
        assert torch.equal(autoencoder.decode(mean), original.decode(mean).sample.clamp(-1, 1))
    assert autoencoder.latent_shape(32) == (channels, 16, 16) and autoencoder.regulariser == "none"
    assert published_statistics(original) == ([0.0] * channels, pytest.approx([scale] * channels))
    options = ("autoencoder=pretrained", f"autoencoder.path={folder}", "autoencoder.train=decoder", "name=tuned")
    assert "regulariser=kl must be none" in train(*options).err
    result = train(*options, "regulariser=none", "adversarial=hinge", "adversarial.start=0")
    assert result.code == 0, result
    tuned = kind.from_pretrained("runs/vae/tuned/autoencoder")
    for part, is_trained in (("encoder", False), ("decoder", True)):
        digests = {weights_sha256(getattr(model, part)) for model in (tuned, original)}
        assert len(digests) == 1 + is_trained, part
    network = ["network=dit", "network.hidden_dim=16", "network.depth=1", "network.head_dim=8", "conditioning=none"]
    result = train(
        "vae=runs/vae/tuned", "name=stage2", "val_images=4", *network, stage=("stage=diffusion", *SHORT_RUN[1:])
    )
    assert result.code == 0 and Run.open("runs/diffusion/stage2").pipeline().latent_shape == (channels, 16, 16)


def test_load_rejects_unsupported_diffusers_class(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AsymmetricAutoencoderKL"}))
    with pytest.raises(UserError, match=r"config\.json .*AsymmetricAutoencoderKL.*AutoencoderKL"):
        Autoencoder.load(tmp_path)
