"""Training gives the same weights for any split into micro-batches, ranks and restarts, and when compiled.

These tests train tiny networks in float32 on the CPU. Samples and random draws are bit-identical. Weights and their
EMA agree up to the order of float32 summation. Tolerances are ten times the measured values of `relative_error`.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file

import ldm.training.modules.base
from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics, weights_sha256
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.autoencoder.regularisers import VectorQuantised
from ldm.data.loaders import train_loader, val_loader
from ldm.data.order import batch_at
from ldm.diffusion.objective import Objective
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.schedule import cosine
from ldm.latents.contract import LatentContract
from ldm.networks.conditioning import ClassCondition
from ldm.networks.dit import DiT
from ldm.runtime.random import Draws
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.modules.adversary import Adversary
from ldm.training.modules.autoencoder import VAETraining
from ldm.training.modules.base import TrainingModule
from ldm.training.modules.diffusion import DiffusionTraining
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from ldm.training.optim.factory import OptimizerFactory
from ldm.training.stages.autoencoder import VAEStage
from ldm.training.stages.base import Stage
from tests.small_training import IMAGES, SGD, make_two_phase_training, make_vae_training, states_equal

SGD_TOLERANCE, ADAM_TOLERANCE = 3e-5, 3e-3
"""Tolerances for SGD, whose updates are proportional to the gradients, and for Adam, whose first updates are the signs
of the gradients, even of gradients that are only rounding noise."""
BATCH_SIZE, NUM_SAMPLES = 8, 28


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LATENTS = {
    "mean": random(NUM_SAMPLES, 2, 3, 4, 4),
    "log_variance": random(NUM_SAMPLES, 2, 3, 4, 4, seed=1) - 2,
    "label": torch.arange(NUM_SAMPLES) % 2,
}


def make_diffusion(objective=Objective(), optimizer=SGD, steps: int = 100) -> DiffusionTraining:  # noqa: B008
    torch.manual_seed(0)
    model = PatchAutoencoderKL(patch=2, latent_channels=3, block_out_channels=(8,), norm_num_groups=4)
    statistics = LatentStatistics([0.1, 0, 0], [1, 2, 1], [0.1] * 3, "images", weights_sha256(model))
    autoencoder = Autoencoder(model, statistics)
    classes = ClassCondition(["cat", "dog"])
    sizes = {"sample_size": 4, "in_channels": 3, "out_channels": 3, "hidden_dim": 16, "depth": 1, "head_dim": 8}
    network = DiT(patch_size=1, **sizes, **classes.network_options())
    for parameter in network.parameters():  # replace the zero initialisation
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline = LatentDiffusion(
        network=network.train(),
        autoencoder=autoencoder,
        schedule=cosine(steps),
        prediction=objective.prediction,
        conditioning=classes,
        contract=LatentContract(autoencoder.weights_sha256(), "images", 8, 2, 3, 0.05, True),
        latent_shape=(3, 4, 4),
    )
    conditions = classes.for_request(classes=[0])
    options = {"grid_conditions": conditions, "sampler": DDIM(2), "guidance": 1.0, "figures_dir": Path()}
    return DiffusionTraining(pipeline, objective, OptimizerFactory(optimizer), drop_condition=0.5, seed=0, **options)


def fetch(module: TrainingModule, indices: np.ndarray, epochs: np.ndarray | None = None) -> Any:
    rows = torch.from_numpy(indices)
    if isinstance(module, VAETraining):
        return IMAGES[rows]
    batch = {name: value[rows] for name, value in LATENTS.items()}
    return {"condition": {"label": batch.pop("label")}, **batch}


class Trajectory(Callback):
    """Records the weights before each step and after the last."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.weights.append(flat_weights(module))

    def on_train_end(self, trainer, module) -> None:
        self.weights.append(flat_weights(module))


def flat_weights(module: TrainingModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.trained.parameters()])


def relative_error(actual: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> float:
    """Return the largest error in any weight, relative to the largest change in any weight since `start`."""
    return ((actual - expected).abs().max() / (expected - start).abs().max()).item()


@dataclass
class FitResult:
    trainer: Trainer
    module: Any
    ema: Any
    weights: list[torch.Tensor]


def fit(module: Any, *, accumulate=1, steps=6, start=0, resume=None, ema=None, callbacks=(), **options) -> FitResult:
    """Train on the CPU. The loaders are built lazily, once the rank is known."""
    trajectory, ema = Trajectory(), ema or EMACallback(0.9)
    if module.second_phase_at < 1:
        callbacks = [Budget(steps, second_phase_at=module.second_phase_at), *callbacks]
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "max_steps": steps,
            "accumulate_grad_batches": accumulate,
            "callbacks": [trajectory, ema, *callbacks],
            "logger": False,
            "check_val_every_n_epoch": None,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "limit_val_batches": 0,
            "gradient_clip_val": 1.0,
            **options,
        }
    )
    loader_options = {"seed": 0, "start": start, "accumulate": accumulate, "num_ranks": trainer.world_size}
    indices = np.arange(NUM_SAMPLES)
    module.train_dataloader = lambda: train_loader(
        partial(fetch, module), indices, batch_size=BATCH_SIZE, rank=module.global_rank, **loader_options
    )
    module.val_dataloader = lambda: val_loader(partial(fetch, module), indices, batch_size=BATCH_SIZE // accumulate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, ckpt_path=resume, weights_only=True)
    return FitResult(trainer, module, ema.ema, trajectory.weights)


MODULES: dict[str, Callable[[], TrainingModule]] = {
    "kl": make_vae_training,
    "two_phases": make_two_phase_training,
    "vq": partial(make_vae_training, partial(VectorQuantised, 16, restart_after=2)),
    "chain": make_diffusion,
    "importance": partial(make_diffusion, Objective("vlb", timesteps="importance"), steps=4),
}
EVERY_MODULE = pytest.mark.parametrize("name", MODULES)
KL_AND_CHAIN = pytest.mark.parametrize("name", ["kl", "chain"])


@pytest.fixture
def recorded_draws(monkeypatch) -> list[list[torch.Tensor]]:
    """The random draws of each micro-batch, in order."""
    recorded_draws: list[list[torch.Tensor]] = []

    class RecordingDraws(Draws):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            recorded_draws.append([])

        def draw(self, function):
            draw = super().draw(function)
            recorded_draws[-1].append(draw)
            return draw

    monkeypatch.setattr(ldm.training.modules.base, "Draws", RecordingDraws)
    return recorded_draws


def group_by_step(recorded_draws: list[list[torch.Tensor]], accumulate: int) -> list[list[torch.Tensor]]:
    """Return the draws of each step, concatenated over its micro-batches."""
    steps = [recorded_draws[start : start + accumulate] for start in range(0, len(recorded_draws), accumulate)]
    return [[torch.cat(draws) for draws in zip(*step, strict=True)] for step in steps]


@KL_AND_CHAIN
def test_samples_and_draws_do_not_depend_on_the_split(name, recorded_draws):
    """Compares flips and posterior noise (kl), or views, posterior noise, t, condition dropout and eps (chain)."""
    draws, batches = {}, {}
    for accumulate in (1, 2, 4, 8):
        recorded_draws.clear()
        module, inputs = MODULES[name](), []
        losses = module.losses
        module.losses = lambda batch, draws, losses=losses, inputs=inputs: inputs.append(batch) or losses(batch, draws)
        fit(module, accumulate=accumulate, steps=3)
        draws[accumulate] = group_by_step(recorded_draws, accumulate)
        batches[accumulate] = inputs
    reference = draws.pop(1)
    assert len(reference) == 3 and len(reference[0]) == {"kl": 2, "chain": 5}[name]
    assert not torch.equal(reference[0][1], reference[1][1])
    for accumulate, steps in draws.items():
        assert states_equal(steps, reference)
        pixels = [batch if name == "kl" else batch["mean"] for batch in batches[accumulate]]
        expected = [i for step in range(3) for i in batch_at(step, size=NUM_SAMPLES, batch_size=BATCH_SIZE, seed=0)]
        assert torch.equal(torch.cat(pixels), (IMAGES if name == "kl" else LATENTS["mean"])[expected])


@EVERY_MODULE
def test_micro_batches_change_only_the_order_of_summation(name):
    """Splits 8 samples into 1, 2, 4 or 8 micro-batches. Compares the weights after one step and after ten."""
    full = fit(MODULES[name](), steps=10)
    for accumulate in (2, 4, 8):
        split = fit(MODULES[name](), accumulate=accumulate, steps=10)
        for step in (1, 10):
            error = relative_error(split.weights[step], full.weights[step], full.weights[0])
            assert error < SGD_TOLERANCE, (accumulate, step)
        for average, expected in zip(split.ema.shadow, full.ema.shadow, strict=True):
            torch.testing.assert_close(average, expected, rtol=0, atol=SGD_TOLERANCE)
    if name == "vq":
        assert (full.module.regulariser.idle_steps == 0).any() and split.module.regulariser.idle_steps.max() < 10
        assert torch.equal(full.module.regulariser.idle_steps, split.module.regulariser.idle_steps)
    if name == "importance":
        assert full.module.importance.counts.min() >= 10, "importance sampling was active"
        assert torch.equal(full.module.importance.counts, split.module.importance.counts)
        torch.testing.assert_close(full.module.importance.history, split.module.importance.history, rtol=1e-4, atol=0)


@KL_AND_CHAIN
def test_micro_batches_with_adam_agree_within_a_larger_tolerance(name):
    adam = partial(torch.optim.AdamW, lr=1e-2)
    full, split = (fit(MODULES[name](optimizer=adam), accumulate=accumulate, steps=10) for accumulate in (1, 4))
    assert relative_error(split.weights[-1], full.weights[-1], full.weights[0]) < ADAM_TOLERANCE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are started with fork")
@EVERY_MODULE
def test_two_ranks_match_a_single_rank(name, tmp_path):
    """Uses DDP with gloo. Each rank has two micro-batches of two samples."""
    one_rank = fit(MODULES[name](), steps=10)
    two_ranks = fit(MODULES[name](), accumulate=2, steps=10, devices=2, strategy="ddp_fork", default_root_dir=tmp_path)
    assert two_ranks.trainer.world_size == 2
    assert relative_error(flat_weights(two_ranks.module), one_rank.weights[-1], one_rank.weights[0]) < SGD_TOLERANCE
    if name == "vq":
        assert torch.equal(one_rank.module.regulariser.idle_steps, two_ranks.module.regulariser.idle_steps)
    if name == "importance":
        assert torch.equal(one_rank.module.importance.counts, two_ranks.module.importance.counts)


def test_with_a_discriminator_only_lambda_depends_on_the_split():
    """Lambda is computed from the first micro-batch, here two samples. With a fixed lambda, both networks agree."""

    def train(accumulate: int, fixed: bool) -> tuple[FitResult, torch.Tensor, torch.Tensor]:
        module = make_vae_training(adversary=partial(Adversary, channels=8, layers=1, ramp=2, start=1.0, weight=0.5))
        if fixed:
            module.adversary.adaptive_weight.compute = lambda *_: torch.tensor(0.7)
        for group in module.adversary.optimizer.param_groups:
            group["eps"] = 1e-2  # otherwise updates are the signs of gradients, even of rounding noise
        discriminator = module.adversary.discriminator
        start = torch.nn.utils.parameters_to_vector(discriminator.parameters()).detach()
        result = fit(module, accumulate=accumulate)
        return result, torch.nn.utils.parameters_to_vector(discriminator.parameters()).detach(), start

    for fixed, tolerance in ((True, 10 * SGD_TOLERANCE), (False, 0.3)):
        (full, expected, start), (split, actual, _) = train(1, fixed), train(4, fixed)
        assert relative_error(split.weights[-1], full.weights[-1], full.weights[0]) < tolerance
        assert relative_error(actual, expected, start) < tolerance


@pytest.mark.parametrize(("old_accumulate", "new_accumulate"), [(1, 4), (4, 1), (8, 2)])
def test_run_resumes_with_a_different_number_of_micro_batches(tmp_path, recorded_draws, old_accumulate, new_accumulate):
    uninterrupted = fit(make_diffusion())
    expected = group_by_step(recorded_draws, 1)
    recorded_draws.clear()
    stopped = fit(make_diffusion(), accumulate=old_accumulate, steps=3)
    stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = fit(make_diffusion(), accumulate=new_accumulate, start=3, resume=tmp_path / "stopped.ckpt")
    assert resumed.trainer.global_step == 6 and len(recorded_draws) == 3 * old_accumulate + 3 * new_accumulate
    stop = 3 * old_accumulate
    assert states_equal(group_by_step(recorded_draws[:stop], old_accumulate), expected[:3])
    assert states_equal(group_by_step(recorded_draws[stop:], new_accumulate), expected[3:])
    assert relative_error(resumed.weights[-1], uninterrupted.weights[-1], uninterrupted.weights[0]) < SGD_TOLERANCE


def test_step_offset_skips_the_draws_of_rolled_back_steps(recorded_draws):
    fit(make_diffusion(), steps=5)
    expected = list(recorded_draws)
    recorded_draws.clear()
    module = make_diffusion()
    module.step_offset = 2
    fit(module, steps=3, start=2)
    assert states_equal(recorded_draws, expected[2:])


def test_validation_metrics_do_not_depend_on_the_split(monkeypatch):
    monkeypatch.setattr(DiffusionTraining, "on_validation_epoch_end", lambda self: None)
    module, metrics = make_diffusion(), []
    for accumulate in (1, 2, 8):
        quiet_options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet_options)
        batches = val_loader(partial(fetch, module), np.arange(NUM_SAMPLES), batch_size=BATCH_SIZE // accumulate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metrics.append(trainer.validate(module, batches, verbose=False)[0])
    for actual in metrics[1:]:
        assert actual == pytest.approx(metrics[0], rel=1e-5)


@pytest.mark.parametrize("exception_type", [RuntimeError, SystemExit])
def test_interrupted_validation_keeps_raw_and_averaged_weights(tmp_path, exception_type):
    """Checkpoints saved during and after the validation equal those of training without validation."""

    class Interrupt(Callback):
        def on_validation_batch_end(self, trainer, module, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "during.ckpt")
            self.validated, self.average = flat_weights(module), [s.clone() for s in ema.ema.shadow]
            raise exception_type("in validation")

        def on_exception(self, trainer, module, exception) -> None:
            trainer.save_checkpoint(tmp_path / "after.ckpt")

    reference, module, interrupt, ema = fit(make_diffusion(), steps=3), make_diffusion(), Interrupt(), EMACallback(0.9)
    with pytest.raises(exception_type, match="in validation"):
        fit(module, ema=ema, callbacks=[interrupt], val_check_interval=3, limit_val_batches=1.0)
    assert torch.equal(flat_weights(module), reference.weights[-1])
    assert torch.equal(interrupt.validated, torch.cat([s.flatten() for s in reference.ema.shadow]))
    assert all(torch.equal(a, b) for a, b in zip(ema.ema.shadow, interrupt.average, strict=True))
    reference.trainer.save_checkpoint(tmp_path / "reference.ckpt")
    expected = torch.load(tmp_path / "reference.ckpt", weights_only=True)
    for file in ("during.ckpt", "after.ckpt"):
        saved = torch.load(tmp_path / file, weights_only=True)
        assert all(torch.equal(value, expected["state_dict"][key]) for key, value in saved["state_dict"].items())
        average = saved["callbacks"]["EMACallback"]["shadow"]
        assert all(torch.equal(average[k], v) for k, v in expected["callbacks"]["EMACallback"]["shadow"].items())


def make_compiled(name: str) -> Any:
    module = MODULES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns about its own imports
        (VAEStage if name == "kl" else Stage).compile(SimpleNamespace(module=module))
    return module


@KL_AND_CHAIN
def test_compiling_keeps_parameter_names_and_saves_the_average(name, tmp_path):
    """Checks the checkpoint, the EMA and the exported weights."""
    with torch.compiler.set_stance("force_eager"):
        result = fit(make_compiled(name))
    result.trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    average = checkpoint["callbacks"]["EMACallback"]["shadow"]
    result.ema.copy_to_module()
    if name == "kl":
        Autoencoder(result.module.trained).save(tmp_path / "files")
        files = load_file(tmp_path / "files" / "diffusion_pytorch_model.safetensors")
    else:
        result.module.pipeline.save(tmp_path / "files")
        files = load_file(tmp_path / "files" / "network" / "diffusion_pytorch_model.safetensors")
    keys = [*checkpoint["state_dict"], *average, *files]
    assert not [key for key in keys if "_orig_mod" in key]
    assert set(average) == {key.removeprefix("trained.") for key in checkpoint["state_dict"] if "trained." in key}
    assert all(torch.equal(files[key], value) for key, value in average.items())


@pytest.mark.slow
@KL_AND_CHAIN
def test_compiled_training_matches_eager(name):
    eager, compiled = fit(MODULES[name]()), fit(make_compiled(name))
    assert relative_error(compiled.weights[-1], eager.weights[-1], eager.weights[0]) < SGD_TOLERANCE
