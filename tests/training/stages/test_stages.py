"""ldm.training.stages and .modules: inputs to a training step, validation, init_from, and outputs of a stage."""

import dataclasses
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.autoencoder.regularisers import KL
from ldm.data.images import ImageData, prepare
from ldm.data.loaders import val_loader
from ldm.data.sources.image_folder import ImageFolder
from ldm.diffusion.objective import Objective
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.schedule import cosine
from ldm.errors import UserError
from ldm.latents.statistics import decoder_scale
from ldm.networks.conditioning import ClassCondition, class_condition, no_condition, text_condition
from ldm.networks.dit import DiT
from ldm.runs.load import load_autoencoder
from ldm.runtime.random import sample_generators
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from ldm.training.stages.autoencoder import VAEStage
from ldm.training.stages.diffusion import DiffusionStage

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory) -> ImageData:
    """Sixty images of two classes."""
    folder = tmp_path_factory.mktemp("stages")
    make_images(folder / "pets/cat", 30, size=8)
    make_images(folder / "pets/dog", 30, size=8, seed=1)
    return prepare(ImageFolder(folder / "pets"), resolution=8, cache_dir=folder, val_fraction=0.2, progress=False)


@pytest.fixture
def vae_stage(images, tmp_path):
    """vae_stage(flip=False, **options): a VAEStage on the images."""

    def make(flip: bool = False, **options) -> VAEStage:
        sizes = {"patch": 2, "latent_channels": 3, "block_out_channels": [8], "norm_num_groups": 4}
        return VAEStage(
            model=partial(PatchAutoencoderKL, **sizes),
            loss=AutoencoderLoss(),
            regulariser=KL(),
            optimizer=SGD,
            images=images,
            flip=flip,
            cache_dir=str(tmp_path / "cache"),
            seed=0,
            folder=tmp_path,
            device=torch.device("cpu"),
            **options,
        )

    return make


@pytest.fixture
def diffusion_stage(images, vae_stage, tmp_path):
    """diffusion_stage(flip=False, conditioning=no_condition): a DiffusionStage with an untrained autoencoder."""
    autoencoder = vae_stage().autoencoder

    def make(flip: bool = False, conditioning=no_condition, **options) -> DiffusionStage:
        sizes = {"patch_size": 1, "hidden_dim": 16, "depth": 1, "head_dim": 8}
        return DiffusionStage(
            **{
                "network": partial(DiT, **sizes),
                "schedule": cosine(100),
                "objective": Objective(),
                "variance": None,
                "conditioning": conditioning,
                "drop_condition": 0.5,
                "sampler": DDIM(2),
                "guidance": 2.0,
                "prompts": [],
                "optimizer": SGD,
                "images": images,
                "flip": flip,
                "cache_dir": str(tmp_path / "cache"),
                "seed": 0,
                "folder": tmp_path,
                "device": torch.device("cpu"),
                "find_autoencoder": lambda images: (autoencoder, "here"),
                **options,
            }
        )

    return make


def step(stage, batch, k: int = 0) -> float:
    """Return the loss in step k, computed without a trainer."""
    stage.module.log_every = 10**9
    stage.module._trainer = SimpleNamespace(global_step=k, global_rank=0, world_size=1, accumulate_grad_batches=1)
    loss = stage.module.training_step(batch, k)["loss"].item()
    stage.module._trainer = None
    return loss


@pytest.mark.parametrize("flip", [False, True])
def test_flip_mirrors_half_of_the_images(vae_stage, images, monkeypatch, flip):
    stage, inputs = vae_stage(flip), []
    monkeypatch.setattr(stage.module.loss, "forward", lambda x, *_: inputs.append(x) or {"loss": x.sum()})
    batch = images.batch(images.train_indices)
    step(stage, batch)
    mirrored = [torch.equal(a, b.flip(-1)) and not torch.equal(a, b) for a, b in zip(inputs[0], batch, strict=True)]
    unchanged = [torch.equal(a, b) for a, b in zip(inputs[0], batch, strict=True)]
    assert all(a or b for a, b in zip(mirrored, unchanged, strict=True))
    assert 0.3 < sum(mirrored) / len(mirrored) < 0.7 if flip else not any(mirrored)


def test_decoder_scale_is_the_error_on_the_training_split(vae_stage, images, monkeypatch):
    """Uses an exact encoder and a decoder with a known error per colour channel."""
    offset = torch.tensor([0.1, 0.2, 0.3])
    autoencoder = vae_stage().autoencoder
    monkeypatch.setattr(autoencoder, "decode", lambda z_raw: z_raw + offset[:, None, None])

    class ExactLatents:
        def batch(self, indices):
            assert set(indices) <= set(images.train_indices)
            pixels = images.batch(indices)
            return pixels, torch.full_like(pixels, -60.0)

    assert decoder_scale(autoencoder, images, ExactLatents(), batch_size=7) == pytest.approx(offset.tolist(), rel=1e-4)


def test_untrained_autoencoder_matches_pca(vae_stage, images, tmp_path):
    metrics, figure = vae_stage()._evaluate_held_out(type("Run", (), {"images": tmp_path})())
    assert metrics["psnr_db"] == pytest.approx(metrics["pca_psnr_db"], abs=0.1)
    assert metrics["compression"] == pytest.approx(4.0) and figure.is_file()
    assert metrics["val_images"] == len(images.val_indices)


def record_inputs(stage, monkeypatch) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Record z_0 and the condition of every batch passed to the network."""
    inputs, denoise = [], stage.module._denoise

    def record(z_0, t, condition, draws):
        inputs.append((z_0, condition))
        return denoise(z_0, t, condition, draws)

    monkeypatch.setattr(stage.module, "_denoise", record)
    return inputs


@pytest.mark.parametrize("flip", [False, True])
def test_latents_have_unit_variance_at_the_start_of_the_chain(diffusion_stage, images, monkeypatch, flip):
    """Measured over all views, with samples from the posteriors."""
    stage = diffusion_stage(flip)
    batch, inputs = stage.fetch(images.train_indices), record_inputs(stage, monkeypatch)
    assert batch["mean"].shape == (len(images.train_indices), 1 + flip, 3, 4, 4)
    for k in range(40):
        step(stage, batch, k)
    latents = [z_0 for z_0, _ in inputs]
    z = torch.stack(latents).transpose(0, 2).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(3), rtol=0, atol=0.02)
    torch.testing.assert_close(z.std(1), torch.ones(3), rtol=0, atol=0.02)
    assert not torch.equal(latents[0], latents[1])


def test_both_views_of_an_image_are_used(diffusion_stage, images, monkeypatch):
    stage = diffusion_stage(flip=True)
    batch, inputs = stage.fetch(images.train_indices), record_inputs(stage, monkeypatch)
    batch["log_variance"].fill_(-100)
    for k in range(4):
        step(stage, batch, k)
    views = [stage.pipeline.autoencoder.standardise(batch["mean"][:, view]) for view in range(2)]
    latents = zip(torch.cat([z_0 for z_0, _ in inputs]), *(view.repeat(4, 1, 1, 1) for view in views), strict=True)
    matches = [(torch.allclose(z, view_0), torch.allclose(z, view_1)) for z, view_0, view_1 in latents]
    assert all(any(match) for match in matches)
    mirrored = [is_view_1 for is_view_0, is_view_1 in matches if not (is_view_0 and is_view_1)]  # skip symmetric images
    assert len(mirrored) > 100 and 0.4 < sum(mirrored) / len(mirrored) < 0.6


def test_noise_in_a_step_is_reproducible(diffusion_stage, images):
    stage = diffusion_stage()
    batch = stage.fetch(images.train_indices[:8])
    assert step(stage, batch, 3) == step(stage, batch, 3) != step(stage, batch, 4)


def test_labels_are_dropped_at_the_given_rate(diffusion_stage, images, monkeypatch):
    stage = diffusion_stage(conditioning=class_condition)
    batch, inputs = stage.fetch(images.train_indices), record_inputs(stage, monkeypatch)
    assert batch["condition"]["label"].tolist() == [images.labels[i] for i in images.train_indices]
    for k in range(40):
        step(stage, batch, k)
    labels = torch.stack([condition["label"] for _, condition in inputs])
    dropped = labels == 2
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (labels == batch["condition"]["label"])[~dropped].all()


def test_validation_and_the_sample_grid_use_the_averaged_weights(diffusion_stage, fit, images, monkeypatch):
    """Repeated validation of the same weights gives the same metrics."""
    stage, weights, ema = diffusion_stage(), [], EMACallback(0.9)
    module = stage.module

    def record_weights():
        weights.append(module.trained.patch_in.weight.clone())
        return [], []

    monkeypatch.setattr(module, "sample_grid", record_weights)
    monkeypatch.setattr("ldm.training.modules.diffusion.save_grid", lambda *_: None)
    monkeypatch.setattr("ldm.training.modules.diffusion.grid", lambda *_, **__: None)
    batch = stage.fetch(images.train_indices[:4])
    monkeypatch.setattr(module, "on_before_batch_transfer", lambda *_: batch)
    trainer = fit(module, [Budget(4), ema], max_steps=4, val_check_interval=2)
    assert len(weights) == 2 and torch.equal(weights[1], ema.ema.shadow[0])
    assert not torch.equal(weights[1], module.trained.patch_in.weight)
    held_out = val_loader(stage.fetch, images.val_indices, batch_size=4)
    metrics = trainer.validate(module, held_out, verbose=False)
    assert trainer.validate(module, held_out, verbose=False) == metrics
    assert {"val/loss", "val/loss_t1_to_25", "val/loss_t76_to_100"} <= metrics[0].keys()


def test_init_from_rejects_a_different_autoencoder_or_conditioning(diffusion_stage, vae_stage, tmp_path):
    stage = diffusion_stage(conditioning=class_condition)
    stage.pipeline.save(tmp_path / "pipeline")
    source = str(tmp_path / "pipeline")
    fine_tuned = diffusion_stage(conditioning=class_condition, init_from=source)
    assert fine_tuned.pipeline.autoencoder.statistics == stage.pipeline.autoencoder.statistics
    with pytest.raises(UserError, match=r"init_from=.*\bclass\b.*\bnone\b.*conditioning=class"):
        diffusion_stage(init_from=source)
    modified = vae_stage().autoencoder
    with torch.no_grad():
        modified.model.shortcut_out.bias += 1
    old, new = (vae.weights_sha256()[:12] for vae in (stage.pipeline.autoencoder, modified))
    with pytest.raises(UserError, match=rf"init_from=.*autoencoder.*{old}.*{new}.*vae="):
        diffusion_stage(conditioning=class_condition, init_from=source, find_autoencoder=lambda images: (modified, ""))


def test_init_from_keeps_the_embeddings_of_shared_classes(diffusion_stage, images, make_images, tmp_path):
    """Fine-tuning from classes [cat, dog] to [ant, cat, fox] keeps the embedding of cat."""
    stage = diffusion_stage(conditioning=class_condition)
    torch.nn.init.normal_(stage.pipeline.network.class_embedding.weight)
    stage.pipeline.save(tmp_path / "pipeline")
    trained = stage.pipeline.network.class_embedding.weight.detach()
    for number, name in enumerate(("ant", "cat", "fox")):
        make_images(tmp_path / "zoo" / name, 4, size=8, seed=number)
    zoo = prepare(ImageFolder(tmp_path / "zoo"), resolution=8, cache_dir=tmp_path, progress=False)
    fine_tuned = diffusion_stage(conditioning=class_condition, images=zoo, init_from=str(tmp_path / "pipeline"))
    rows = fine_tuned.pipeline.network.class_embedding.weight
    assert torch.equal(rows[1], trained[0]) and torch.equal(rows[3], trained[2]) and len(rows) == 4
    assert fine_tuned.pipeline.conditioning.class_names == ["ant", "cat", "fox"]
    assert ("classes of init_from", "kept: cat; new: ant, fox; dropped: dog") in fine_tuned.summary_rows()


def test_init_from_rejects_a_different_text_encoder(diffusion_stage, images, tmp_path):
    """A moved copy of the encoder is accepted, but an encoder of the same size with different weights is rejected."""
    original, different = (tiny_encoder(tmp_path / name, seed) for seed, name in enumerate(("original", "different")))
    shutil.copytree(original, tmp_path / "moved")
    captioned = dataclasses.replace(images, captions=[f"number {i}" for i in range(len(images))])
    stage = diffusion_stage(images=captioned, conditioning=partial(text_condition, encoder=str(original), max_tokens=4))
    stage.pipeline.save(tmp_path / "pipeline")

    def fine_tune(encoder: Path) -> DiffusionStage:
        condition = partial(text_condition, encoder=str(encoder), max_tokens=4)
        return diffusion_stage(images=captioned, conditioning=condition, init_from=str(tmp_path / "pipeline"))

    fine_tune(tmp_path / "moved")
    message = rf"text encoder.*{re.escape(str(original))} \(.*{re.escape(str(different))} \(.*conditioning\.encoder="
    with pytest.raises(UserError, match=message + re.escape(str(original))):
        fine_tune(different)


def tiny_encoder(folder: Path, seed: int) -> Path:
    """Save a one-layer BERT with a vocabulary of a few words."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "number", *map(str, range(60))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def test_training_samples_one_caption_per_epoch_and_validation_uses_the_first(diffusion_stage, images, tmp_path):
    """The choice is uniform over the captions and depends only on seed, epoch and image, not on the batch."""
    more_captions = {i: [f"number {i} 1", f"number {i} 2"] for i in range(0, len(images), 2)}
    captions = [f"number {i}" for i in range(len(images))]
    captioned = dataclasses.replace(images, captions=captions, more_captions=more_captions)
    encoder = tiny_encoder(tmp_path / "encoder", 0)
    stage = diffusion_stage(images=captioned, conditioning=partial(text_condition, encoder=str(encoder), max_tokens=8))
    conditioning = stage.pipeline.conditioning

    def caption_numbers(subset, epoch=None) -> list[int]:
        """Return the index of the caption used for each image."""
        epochs = None if epoch is None else np.full(len(subset), epoch)
        pooled = stage.fetch(np.array(subset), epochs)["condition"]["pooled"]
        numbers = []
        for index, row in zip(subset, pooled, strict=True):
            embeddings = conditioning.for_request(captioned.captions_of(index))[0]["pooled"]
            numbers.append(int((embeddings - row).abs().sum(1).argmin()))
        return numbers

    indices = list(range(len(images)))
    assert caption_numbers(indices) == [0] * len(indices)
    epochs = [caption_numbers(indices, epoch) for epoch in range(12)]
    assert all(epoch[1::2] == [0] * (len(indices) // 2) for epoch in epochs), "images with a single caption"
    counts = np.bincount([number for epoch in epochs for number in epoch[::2]], minlength=3)
    assert (np.abs(counts - counts.mean()) < 5 * counts.mean() ** 0.5).all() and len({tuple(e) for e in epochs}) == 12
    assert caption_numbers([7, 4, 0], 5) == [epochs[5][i] for i in (7, 4, 0)]
    stage = diffusion_stage(images=captioned, conditioning=lambda _: conditioning, seed=1)
    assert caption_numbers(indices, 0) != epochs[0]


def test_finish_saves_the_pipeline_and_a_figure(diffusion_stage, tmp_path):
    stage = diffusion_stage(conditioning=class_condition)
    with torch.no_grad():
        for parameter in stage.module.trained.parameters():
            parameter.normal_()
    run = type(
        "Run", (), {"path": tmp_path / "run", "images": tmp_path, "pipeline_folder": tmp_path / "run" / "pipeline"}
    )()
    _, figure = stage.finish(run)
    assert stage.next_command(run).endswith(f"sample.py run={run.path} label=0")
    assert figure.is_file()
    loaded = load_autoencoder(str(tmp_path / "run/pipeline"))
    assert loaded.weights_sha256() == stage.contract.autoencoder_sha256
    assert isinstance(stage.pipeline.conditioning, ClassCondition)


def test_network_that_does_not_fit_the_latents_is_rejected(diffusion_stage):
    with pytest.raises(UserError, match=r"3 x 4 x 4 latents: patch_size must .*\b4\b.*\b3\b"):
        diffusion_stage(network=partial(DiT, patch_size=3, hidden_dim=16, depth=1, head_dim=8))


@pytest.mark.parametrize(
    ("objective", "variance"),
    [("simple", "fixed_large"), ("min_snr", "fixed_small"), ("hybrid", "learned_range"), ("vlb", "learned_range")],
)
def test_each_objective_trains_and_saves_its_variance(diffusion_stage, images, tmp_path, objective, variance):
    timesteps = "importance" if objective == "vlb" else "uniform"
    stage = diffusion_stage(
        objective=Objective(objective, timesteps=timesteps),
        variance="fixed_large" if variance == "fixed_large" else None,
    )
    out = stage.module.trained.patch_out
    assert out.out_features == (6 if variance == "learned_range" else 3)
    batch = stage.fetch(images.train_indices[:8])
    optimizer = torch.optim.Adam(stage.module.trained.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = stage.module.losses(batch, stage.module.trial_draws(batch))["loss"]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    stage.module._trainer = SimpleNamespace(accumulate_grad_batches=1)
    stage.module.on_train_batch_end(None, batch, 0)
    if objective == "vlb":
        assert stage.module.importance.counts.sum() == len(batch["mean"]), "only the last batch was recorded"
        assert "importance.history" in stage.module.state_dict()
    stage.finish(type("Run", (), {"path": tmp_path, "images": tmp_path, "pipeline_folder": tmp_path / "pipeline"})())
    loaded = LatentDiffusion.load(tmp_path / "pipeline")
    assert loaded.variance == variance
    z = loaded.sample(DDPM(5), {}, sample_generators(0, range(2)))
    assert z.isfinite().all()
