"""ldm.training.modules.autoencoder: the sampling decoder is trained without any effect on the autoencoder."""

import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from ldm.autoencoder.autoencoder import Autoencoder, weights_sha256
from ldm.autoencoder.sampling_decoder import SamplingDecoder
from ldm.runtime.random import Draws
from tests.small_training import IMAGES, make_vae_training


def compute(decoder_noise: float):
    """Return the loss terms and the gradients of one batch, by name."""
    module = make_vae_training()
    if decoder_noise:
        module.trained.sampling_decoder = SamplingDecoder(module.trained, [1.0] * 3)
        module.decoder_noise = decoder_noise
    terms = module.losses(IMAGES, Draws(0, 0, range(len(IMAGES))))
    terms["loss"].backward()
    return terms, {name: p.grad for name, p in module.trained.named_parameters() if p.grad is not None}


def test_sampling_decoder_does_not_change_the_loss_or_the_gradients_of_the_autoencoder():
    terms, gradients = compute(0.0)
    noisy_terms, noisy_gradients = compute(0.5)
    assert noisy_terms["loss"] == terms["loss"] and noisy_terms["sampling_decoder"] > 0
    for name, gradient in gradients.items():
        assert torch.equal(noisy_gradients[name], gradient), name
    added = noisy_gradients.keys() - gradients.keys()
    assert added and all(name.startswith("sampling_decoder.") for name in added)


def test_training_the_sampling_decoder_leaves_the_autoencoder_bit_identical(tmp_path):
    """The gradients of both parts are clipped separately, so a large gradient of one does not shrink the other's."""
    digests = {}
    for decoder_noise in (0.0, 100.0):
        module = make_vae_training()
        if decoder_noise:
            module.trained.sampling_decoder = SamplingDecoder(module.trained, [1.0] * 3)
            before = weights_sha256(module.trained.sampling_decoder)
        module.decoder_noise = decoder_noise
        train(module, tmp_path)
        digests[decoder_noise] = Autoencoder(module.trained).weights_sha256()
    assert digests[0.0] == digests[100.0]
    assert weights_sha256(module.trained.sampling_decoder) != before


def train(module, folder: Path, steps: int = 4) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=0.01,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(IMAGES, batch_size=4))


def test_latents_do_not_depend_on_the_sampling_decoder():
    module = make_vae_training()
    mean, _ = Autoencoder(module.trained).encode(IMAGES)
    module.trained.sampling_decoder = SamplingDecoder(module.trained, [1.0] * 3)
    assert torch.equal(Autoencoder(module.trained).encode(IMAGES)[0], mean)
