"""ldm.training.modules.autoencoder: the sampling decoder is trained without any effect on the autoencoder."""

import torch

from ldm.autoencoder.autoencoder import Autoencoder
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


def test_latents_do_not_depend_on_the_sampling_decoder():
    module = make_vae_training()
    mean, _ = Autoencoder(module.trained).encode(IMAGES)
    module.trained.sampling_decoder = SamplingDecoder(module.trained, [1.0] * 3)
    assert torch.equal(Autoencoder(module.trained).encode(IMAGES)[0], mean)
