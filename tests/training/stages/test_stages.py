"""ldm.training.modules.autoencoder and .diffusion: what a step sees, what validation says, what a stage leaves."""

import dataclasses
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
from ldm.sampling.pipeline import LatentDiffusionPipeline
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from ldm.training.stages.autoencoder import VAEStage
from ldm.training.stages.diffusion import DiffusionStage

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory) -> ImageData:
    """Sixty images of two classes."""
    place = tmp_path_factory.mktemp("stages")
    make_images(place / "pets/cat", 30, size=8)
    make_images(place / "pets/dog", 30, size=8, seed=1)
    return prepare(ImageFolder(place / "pets"), resolution=8, cache_dir=place, val_fraction=0.2, progress=False)


@pytest.fixture
def vae_stage(images, tmp_path):
    """VAEStage(flip=False)."""

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
    """DiffusionStage(flip=False, conditioning=no_condition) on a PCA of the images."""
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
                "find_autoencoder": lambda data_fingerprint: (autoencoder, "here"),
                **options,
            }
        )

    return make


def step(stage, batch, k: int = 0) -> float:
    """The loss of step k, outside of a trainer."""
    stage.module.log_every = 10**9
    stage.module._trainer = SimpleNamespace(global_step=k, global_rank=0, world_size=1, accumulate_grad_batches=1)
    loss = stage.module.training_step(batch, k)["loss"].item()
    stage.module._trainer = None
    return loss


@pytest.mark.parametrize("flip", [False, True])
def test_half_of_the_images_are_mirrored_when_asked_for(vae_stage, images, monkeypatch, flip):
    stage, seen = vae_stage(flip), []
    monkeypatch.setattr(stage.module.loss, "forward", lambda x, *_: seen.append(x) or {"loss": x.sum()})
    batch = images.batch(images.train_indices)
    step(stage, batch)
    mirrored = [torch.equal(a, b.flip(-1)) and not torch.equal(a, b) for a, b in zip(seen[0], batch, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(seen[0], batch, strict=True)]
    assert all(a or b for a, b in zip(mirrored, kept, strict=True))
    assert 0.3 < sum(mirrored) / len(mirrored) < 0.7 if flip else not any(mirrored)


def test_the_decoders_scale_is_its_error_on_the_training_split(vae_stage, images, monkeypatch):
    """An encoder that says x exactly, a decoder that is off by a known amount per colour, and wrong elsewhere."""
    offset = torch.tensor([0.1, 0.2, 0.3])
    autoencoder = vae_stage().autoencoder
    monkeypatch.setattr(autoencoder, "decode", lambda z_raw: z_raw + offset[:, None, None])

    class Exact:
        def batch(self, indices):
            assert set(indices) <= set(images.train_indices)
            pixels = images.batch(indices)
            return pixels, torch.full_like(pixels, -60.0)

    assert decoder_scale(autoencoder, images, Exact(), batch_size=7) == pytest.approx(offset.tolist(), rel=1e-4)


def test_an_autoencoder_starts_at_pca(vae_stage, images, tmp_path):
    figures, picture = vae_stage()._held_out(type("Run", (), {"images": tmp_path})())
    assert figures["psnr_db"] == pytest.approx(figures["pca_psnr_db"], abs=0.1)
    assert figures["compression"] == pytest.approx(4.0) and picture.is_file()
    assert figures["val_images"] == len(images.val_indices)


def watch(stage, monkeypatch) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """z_0 and condition of every batch that the network is given."""
    seen, denoise = [], stage.module._denoise

    def note(z_0, t, condition, draws):
        seen.append((z_0, condition))
        return denoise(z_0, t, condition, draws)

    monkeypatch.setattr(stage.module, "_denoise", note)
    return seen


@pytest.mark.parametrize("flip", [False, True])
def test_latents_reach_the_chain_with_unit_variance(diffusion_stage, images, monkeypatch, flip):
    """Over all views, and drawn from their posteriors."""
    stage = diffusion_stage(flip)
    batch, seen = stage.fetch(images.train_indices), watch(stage, monkeypatch)
    assert batch["mean"].shape == (len(images.train_indices), 1 + flip, 3, 4, 4)
    for k in range(40):
        step(stage, batch, k)
    seen = [z_0 for z_0, _ in seen]
    z = torch.stack(seen).transpose(0, 2).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(3), rtol=0, atol=0.02)
    torch.testing.assert_close(z.std(1), torch.ones(3), rtol=0, atol=0.02)
    assert not torch.equal(seen[0], seen[1])


def test_each_image_is_seen_in_either_view(diffusion_stage, images, monkeypatch):
    stage = diffusion_stage(flip=True)
    batch, seen = stage.fetch(images.train_indices), watch(stage, monkeypatch)
    batch["log_variance"].fill_(-100)
    for k in range(4):
        step(stage, batch, k)
    views = [stage.pipeline.autoencoder.standardise(batch["mean"][:, view]) for view in range(2)]
    drawn = zip(torch.cat([z_0 for z_0, _ in seen]), *(view.repeat(4, 1, 1, 1) for view in views), strict=True)
    taken = [(torch.allclose(z, first), torch.allclose(z, second)) for z, first, second in drawn]
    assert all(first or second for first, second in taken)
    mirrored = [second for first, second in taken if not (first and second)]  # a symmetric image has one view
    assert len(mirrored) > 100 and 0.4 < sum(mirrored) / len(mirrored) < 0.6


def test_a_batch_is_the_same_noise_again(diffusion_stage, images):
    stage = diffusion_stage()
    batch = stage.fetch(images.train_indices[:8])
    assert step(stage, batch, 3) == step(stage, batch, 3) != step(stage, batch, 4)


def test_labels_are_dropped_at_the_asked_rate(diffusion_stage, images, monkeypatch):
    stage = diffusion_stage(conditioning=class_condition)
    batch, seen = stage.fetch(images.train_indices), watch(stage, monkeypatch)
    assert batch["condition"]["label"].tolist() == [images.labels[i] for i in images.train_indices]
    for k in range(40):
        step(stage, batch, k)
    labels = torch.stack([condition["label"] for _, condition in seen])
    dropped = labels == 2
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (labels == batch["condition"]["label"])[~dropped].all()


def test_validation_and_the_sample_grid_use_the_averaged_weights(diffusion_stage, fit, images, monkeypatch):
    """And say the same each time for the same weights."""
    stage, drawn, ema = diffusion_stage(), [], EMACallback(0.9)
    module = stage.module
    monkeypatch.setattr(module, "draw", lambda: drawn.append(module.trained.patch_in.weight.clone()) or ([], []))
    monkeypatch.setattr("ldm.training.modules.diffusion.save_grid", lambda *_: None)
    monkeypatch.setattr("ldm.training.modules.diffusion.grid", lambda *_, **__: None)
    batch = stage.fetch(images.train_indices[:4])
    monkeypatch.setattr(module, "on_before_batch_transfer", lambda *_: batch)
    trainer = fit(module, [Budget(4), ema], max_steps=4, val_check_interval=2)
    assert len(drawn) == 2 and torch.equal(drawn[1], ema.ema.shadow[0])
    assert not torch.equal(drawn[1], module.trained.patch_in.weight)
    held_out = val_loader(stage.fetch, images.val_indices, batch_size=4)
    first = trainer.validate(module, held_out, verbose=False)
    assert trainer.validate(module, held_out, verbose=False) == first
    assert {"val/loss", "val/loss_t1_to_25", "val/loss_t76_to_100"} <= first[0].keys()


def test_a_pipeline_continues_on_its_own_latents_only(diffusion_stage, vae_stage, tmp_path):
    stage = diffusion_stage(conditioning=class_condition)
    stage.pipeline.save(tmp_path / "pipeline")
    place = str(tmp_path / "pipeline")
    again = diffusion_stage(conditioning=class_condition, init_from=place)
    assert again.pipeline.autoencoder.statistics == stage.pipeline.autoencoder.statistics
    with pytest.raises(UserError, match="trained on the condition class, .*Choose conditioning=class"):
        diffusion_stage(init_from=place)
    other = vae_stage().autoencoder
    with torch.no_grad():
        other.model.shortcut_out.bias += 1
    with pytest.raises(UserError, match="init_from was trained on latents of the autoencoder .*vae="):
        diffusion_stage(
            conditioning=class_condition, init_from=place, find_autoencoder=lambda data_fingerprint: (other, "")
        )


def test_a_pipeline_continues_on_other_classes_by_name(diffusion_stage, images, make_images, tmp_path):
    """[cat, dog] goes on as [ant, cat, fox]: what cat learned stays cat's."""
    stage = diffusion_stage(conditioning=class_condition)
    torch.nn.init.normal_(stage.pipeline.network.class_embedding.weight)
    stage.pipeline.save(tmp_path / "pipeline")
    trained = stage.pipeline.network.class_embedding.weight.detach()
    for number, name in enumerate(("ant", "cat", "fox")):
        make_images(tmp_path / "zoo" / name, 4, size=8, seed=number)
    zoo = prepare(ImageFolder(tmp_path / "zoo"), resolution=8, cache_dir=tmp_path, progress=False)
    again = diffusion_stage(conditioning=class_condition, images=zoo, init_from=str(tmp_path / "pipeline"))
    rows = again.pipeline.network.class_embedding.weight
    assert torch.equal(rows[1], trained[0]) and torch.equal(rows[3], trained[2]) and len(rows) == 4
    assert again.pipeline.conditioning.class_names == ["ant", "cat", "fox"]
    assert ("classes of init_from", "kept: cat; new: ant, fox; dropped: dog") in again.rows()


def test_a_pipeline_goes_on_with_its_own_text_encoder_only(diffusion_stage, images, tmp_path):
    """Two encoders of the same width, whose weights differ, are different; the same one may have moved."""
    first, other = (tiny_encoder(tmp_path / name, seed) for seed, name in enumerate(("first", "other")))
    shutil.copytree(first, tmp_path / "moved")
    told = dataclasses.replace(images, captions=[f"number {i}" for i in range(len(images))])
    stage = diffusion_stage(images=told, conditioning=partial(text_condition, encoder=str(first), max_tokens=4))
    stage.pipeline.save(tmp_path / "pipeline")

    def again(encoder: Path) -> DiffusionStage:
        condition = partial(text_condition, encoder=str(encoder), max_tokens=4)
        return diffusion_stage(images=told, conditioning=condition, init_from=str(tmp_path / "pipeline"))

    again(tmp_path / "moved")
    with pytest.raises(UserError) as refused:
        again(other)
    assert f"trained on captions through the text encoder {first} (" in str(refused.value)
    assert f"this run uses {other} (" in str(refused.value)
    assert f"Choose conditioning.encoder={first}." in str(refused.value)


def tiny_encoder(folder: Path, seed: int) -> Path:
    """A BERT of one layer with a vocabulary of a few words."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "number", *map(str, range(60))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def test_of_several_captions_one_is_drawn_each_epoch_and_validation_sees_the_first(diffusion_stage, images, tmp_path):
    """Which one follows from seed, epoch and image alone, whatever the batch; all of them come in time."""
    more = {i: [f"number {i} 1", f"number {i} 2"] for i in range(0, len(images), 2)}
    told = dataclasses.replace(images, captions=[f"number {i}" for i in range(len(images))], more_captions=more)
    encoder = tiny_encoder(tmp_path / "encoder", 0)
    stage = diffusion_stage(images=told, conditioning=partial(text_condition, encoder=str(encoder), max_tokens=8))
    conditioning = stage.pipeline.conditioning

    def drawn(indices, epoch=None) -> list[int]:
        """The number of the caption that each image is trained on."""
        epochs = None if epoch is None else np.full(len(indices), epoch)
        pooled = stage.fetch(np.array(indices), epochs)["condition"]["pooled"]
        found = []
        for index, row in zip(indices, pooled, strict=True):
            known = conditioning.of_request(told.captions_of(index))[0]["pooled"]
            found.append(int((known - row).abs().sum(1).argmin()))
        return found

    every = list(range(len(images)))
    assert drawn(every) == [0] * len(every)
    epochs = [drawn(every, epoch) for epoch in range(12)]
    assert all(epoch[1::2] == [0] * (len(every) // 2) for epoch in epochs), "those that have one caption"
    counts = np.bincount([number for epoch in epochs for number in epoch[::2]], minlength=3)
    assert (np.abs(counts - counts.mean()) < 5 * counts.mean() ** 0.5).all() and len({tuple(e) for e in epochs}) == 12
    assert drawn([7, 4, 0], 5) == [epochs[5][i] for i in (7, 4, 0)]
    other = diffusion_stage(images=told, conditioning=lambda _: conditioning, seed=1)
    stage, first = other, epochs[0]
    assert drawn(every, 0) != first


def test_what_a_stage_leaves_is_what_it_trained(diffusion_stage, tmp_path):
    stage = diffusion_stage(conditioning=class_condition)
    with torch.no_grad():
        for parameter in stage.module.trained.parameters():
            parameter.normal_()
    run = type(
        "Run", (), {"path": tmp_path / "run", "images": tmp_path, "pipeline_folder": tmp_path / "run" / "pipeline"}
    )()
    _, picture = stage.finish(run)
    assert stage.next_command(run).endswith(f"sample.py run={run.path} label=0")
    assert picture.is_file()
    loaded = load_autoencoder(str(tmp_path / "run/pipeline"))
    assert loaded.weights_sha256() == stage.contract.autoencoder_sha256
    assert isinstance(stage.pipeline.conditioning, ClassCondition)


def test_a_network_that_does_not_fit_is_explained(diffusion_stage):
    with pytest.raises(
        UserError, match="does not fit latents of 3 x 4 x 4: patch_size must divide the latent's side, 4; got 3"
    ):
        diffusion_stage(network=partial(DiT, patch_size=3, hidden_dim=16, depth=1, head_dim=8))


@pytest.mark.parametrize(
    ("objective", "variance"),
    [("simple", "fixed_large"), ("min_snr", "fixed_small"), ("hybrid", "learned_range"), ("vlb", "learned_range")],
)
def test_an_objective_trains_and_leaves_a_pipeline_with_its_sigma(
    diffusion_stage, images, tmp_path, objective, variance
):
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
        assert stage.module.importance.counts.sum() == len(batch["mean"]), "the last batch alone was remembered"
        assert "importance.history" in stage.module.state_dict()
    stage.finish(type("Run", (), {"path": tmp_path, "images": tmp_path, "pipeline_folder": tmp_path / "pipeline"})())
    loaded = LatentDiffusionPipeline.load(tmp_path / "pipeline")
    assert loaded.variance == variance
    z = loaded.sample(DDPM(5), {}, sample_generators(0, range(2)))
    assert z.isfinite().all()
