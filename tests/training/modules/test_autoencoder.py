"""ldm.training.modules.autoencoder: the second phase trains the sampling decoder, and nothing else."""

import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.autoencoder.sampling_decoder import SamplingDecoder
from ldm.runtime.random import Draws
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from tests.small_training import IMAGES, make_two_phase_training, make_vae_training


def test_each_phase_trains_only_its_own_part():
    module = make_two_phase_training()
    for in_second_phase in (False, True):
        module.in_second_phase = in_second_phase
        module.zero_grad()
        terms = module.losses(IMAGES, Draws(0, 0, range(len(IMAGES))))
        terms["loss"].backward()
        moving = {name for name, p in module.trained.named_parameters() if p.grad is not None and p.grad.any()}
        assert moving and all(name.startswith("sampling_decoder.") == in_second_phase for name in moving)
        idle = {id(p) for p in module.idle_parameters()}
        for name, p in module.trained.named_parameters():
            assert (id(p) in idle) == (name.startswith("sampling_decoder.") != in_second_phase), name
        assert ("sampling_decoder" in terms) == in_second_phase


def test_value_of_the_loss_is_that_of_the_autoencoder_in_both_phases():
    module, values = make_two_phase_training(), []
    for module.in_second_phase in (False, True):
        values.append(module.losses(IMAGES, Draws(0, 0, range(len(IMAGES))))["loss"].item())
    assert values[0] == values[1]


def test_second_phase_trains_a_copy_of_the_decoder_and_nothing_else(tmp_path):
    """The autoencoder is bit-identical to one trained with the budget of the first phase alone."""
    alone, both = make_vae_training(), make_two_phase_training()
    train(alone, tmp_path, Budget(max_steps=4))
    train(both, tmp_path, Budget(max_steps=8, second_phase_at=0.5))
    assert Autoencoder(both.trained).weights_sha256() == Autoencoder(alone.trained).weights_sha256()
    first, second = both.trained.core.decoder, both.trained.sampling_decoder.decoder.core.decoder
    distance = sum((p - q).norm() for p, q in zip(first.parameters(), second.parameters(), strict=True))
    initial = make_two_phase_training().trained.core.decoder
    from_initial = sum((p - q).norm() for p, q in zip(initial.parameters(), second.parameters(), strict=True))
    assert 0 < distance < from_initial


def test_average_of_the_second_phase_forgets_the_first(tmp_path):
    module, average = make_two_phase_training(), EMACallback(decay=0.999)
    module.second_phase_at = 0.9
    train(module, tmp_path, Budget(max_steps=60, second_phase_at=0.9), average)
    raw = dict(module.trained.named_parameters())
    for name, value in average.state_dict()["shadow"].items():
        if not name.startswith("sampling_decoder."):
            torch.testing.assert_close(value, raw[name], rtol=1e-5, atol=1e-6)


def train(module, folder: Path, *callbacks) -> None:
    budget = callbacks[0]
    module.progress = budget.progress
    trainer = Trainer(
        accelerator="cpu",
        max_steps=budget.max_steps,
        max_epochs=-1,
        gradient_clip_val=0.01,
        default_root_dir=folder,
        callbacks=list(callbacks),
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
