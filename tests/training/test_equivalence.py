"""The same training however its steps are shared out, over micro-batches, ranks and restarts; compiled; its average.

Tiny networks in float32 on the CPU. Samples and random numbers are equal bit for bit. Weights are equal up to the
order in which float32 sums. `difference` is the largest error of a weight in units of the largest change of one; the
tolerances stand ten times above what was measured.
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
from ldm.sampling.pipeline import LatentDiffusionPipeline
from ldm.training.modules.adversary import Adversary
from ldm.training.modules.autoencoder import VAETraining
from ldm.training.modules.base import TrainingModule
from ldm.training.modules.diffusion import DiffusionTraining
from ldm.training.optim.ema import EMACallback
from ldm.training.optim.factory import OptimizerFactory
from ldm.training.stages.autoencoder import VAEStage
from ldm.training.stages.base import Stage
from tests.small_training import IMAGES, SGD, same, vae

SUMS, SIGNS = 3e-5, 3e-3
"""With SGD, whose weights move as the gradients do; with Adam, whose first steps are signs, some of them of noise."""
BATCH, NUM_SAMPLES = 8, 28


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LATENTS = {
    "mean": random(NUM_SAMPLES, 2, 3, 4, 4),
    "log_variance": random(NUM_SAMPLES, 2, 3, 4, 4, seed=1) - 2,
    "label": torch.arange(NUM_SAMPLES) % 2,
}


def chain(objective=Objective(), optimizer=SGD, steps: int = 100) -> DiffusionTraining:  # noqa: B008
    torch.manual_seed(0)
    model = PatchAutoencoderKL(patch=2, latent_channels=3, block_out_channels=(8,), norm_num_groups=4)
    first = Autoencoder(model, LatentStatistics([0.1, 0, 0], [1, 2, 1], [0.1] * 3, "images", weights_sha256(model)))
    classes = ClassCondition(["cat", "dog"])
    sizes = {"sample_size": 4, "in_channels": 3, "out_channels": 3, "hidden_dim": 16, "depth": 1, "head_dim": 8}
    network = DiT(patch_size=1, **sizes, **classes.network_options())
    for parameter in network.parameters():  # away from the zeros that it starts with
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline = LatentDiffusionPipeline(
        network=network.train(),
        autoencoder=first,
        schedule=cosine(steps),
        prediction=objective.prediction,
        conditioning=classes,
        contract=LatentContract(first.weights_sha256(), "images", 8, 2, 3, 0.05, True),
        latent_shape=(3, 4, 4),
    )
    shown = classes.of_request(classes=[0])
    options = {"shown": shown, "sampler": DDIM(2), "guidance": 1.0, "pictures": Path()}
    return DiffusionTraining(pipeline, objective, OptimizerFactory(optimizer), drop_condition=0.5, seed=0, **options)


def fetch(module: TrainingModule, indices: np.ndarray, epochs: np.ndarray | None = None) -> Any:
    rows = torch.from_numpy(indices)
    if isinstance(module, VAETraining):
        return IMAGES[rows]
    batch = {name: value[rows] for name, value in LATENTS.items()}
    return {"condition": {"label": batch.pop("label")}, **batch}


class Trajectory(Callback):
    """The weights before each step and after the last."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.weights.append(weights_of(module))

    def on_train_end(self, trainer, module) -> None:
        self.weights.append(weights_of(module))


def weights_of(module: TrainingModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.trained.parameters()])


def difference(found: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> float:
    """The largest error, in units of the largest change since `start`."""
    return ((found - expected).abs().max() / (expected - start).abs().max()).item()


@dataclass
class Fitted:
    trainer: Trainer
    module: Any
    ema: Any
    weights: list[torch.Tensor]


def fit(module: Any, *, accumulate=1, steps=6, start=0, resume=None, ema=None, callbacks=(), **options) -> Fitted:
    """Train on the CPU; the loader is made where the rank is known."""
    trajectory, ema = Trajectory(), ema or EMACallback(0.9)
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
    parts = {"seed": 0, "start": start, "accumulate": accumulate, "num_ranks": trainer.world_size}
    indices = np.arange(NUM_SAMPLES)
    module.train_dataloader = lambda: train_loader(
        partial(fetch, module), indices, batch_size=BATCH, rank=module.global_rank, **parts
    )
    module.val_dataloader = lambda: val_loader(partial(fetch, module), indices, batch_size=BATCH // accumulate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, ckpt_path=resume, weights_only=True)
    return Fitted(trainer, module, ema.ema, trajectory.weights)


MODULES: dict[str, Callable[[], TrainingModule]] = {
    "kl": vae,
    "vq": partial(vae, partial(VectorQuantised, 16, restart_after=2)),
    "chain": chain,
    "importance": partial(chain, Objective("vlb", timesteps="importance"), steps=4),
}
EACH = pytest.mark.parametrize("name", MODULES)
BOTH = pytest.mark.parametrize("name", ["kl", "chain"])


@pytest.fixture
def recorded(monkeypatch) -> list[list[torch.Tensor]]:
    """Of each micro-batch what was drawn for it, in order."""
    found: list[list[torch.Tensor]] = []

    class Recorded(Draws):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found.append([])

        def draw(self, function):
            drawn = super().draw(function)
            found[-1].append(drawn)
            return drawn

    monkeypatch.setattr(ldm.training.modules.base, "Draws", Recorded)
    return found


def by_step(recorded: list[list[torch.Tensor]], accumulate: int) -> list[list[torch.Tensor]]:
    """The draws of each step over its micro-batches."""
    steps = [recorded[first : first + accumulate] for first in range(0, len(recorded), accumulate)]
    return [[torch.cat(parts) for parts in zip(*step, strict=True)] for step in steps]


@BOTH
def test_a_sample_sees_the_same_numbers_in_every_split(name, recorded):
    """Bit for bit: flips and posterior noise; views, posterior noise, t, drops and eps."""
    found, batches = {}, {}
    for accumulate in (1, 2, 4, 8):
        recorded.clear()
        module, seen = MODULES[name](), []
        losses = module.losses
        module.losses = lambda batch, draws, losses=losses, seen=seen: seen.append(batch) or losses(batch, draws)
        fit(module, accumulate=accumulate, steps=3)
        found[accumulate] = by_step(recorded, accumulate)
        batches[accumulate] = seen
    whole = found.pop(1)
    assert len(whole) == 3 and len(whole[0]) == {"kl": 2, "chain": 5}[name]
    assert not torch.equal(whole[0][1], whole[1][1])
    for accumulate, steps in found.items():
        assert same(steps, whole)
        pixels = [batch if name == "kl" else batch["mean"] for batch in batches[accumulate]]
        expected = [i for step in range(3) for i in batch_at(step, size=NUM_SAMPLES, batch_size=BATCH, seed=0)]
        assert torch.equal(torch.cat(pixels), (IMAGES if name == "kl" else LATENTS["mean"])[expected])


@EACH
def test_micro_batches_change_nothing_but_the_order_of_sums(name):
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1: the first step is the gradient, clipped; then nine more."""
    whole = fit(MODULES[name](), steps=10)
    for accumulate in (2, 4, 8):
        parts = fit(MODULES[name](), accumulate=accumulate, steps=10)
        for step in (1, 10):
            assert difference(parts.weights[step], whole.weights[step], whole.weights[0]) < SUMS, (accumulate, step)
        for found, expected in zip(parts.ema.shadow, whole.ema.shadow, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=SUMS)
    if name == "vq":
        assert (whole.module.regulariser.idle_steps == 0).any() and parts.module.regulariser.idle_steps.max() < 10
        assert torch.equal(whole.module.regulariser.idle_steps, parts.module.regulariser.idle_steps)
    if name == "importance":
        assert whole.module.importance.counts.min() >= 10, "t was drawn by its history"
        assert torch.equal(whole.module.importance.counts, parts.module.importance.counts)
        torch.testing.assert_close(whole.module.importance.history, parts.module.importance.history, rtol=1e-4, atol=0)


@BOTH
def test_micro_batches_of_adam_differ_where_gradients_vanish(name):
    adam = partial(torch.optim.AdamW, lr=1e-2)
    whole, parts = (fit(MODULES[name](optimizer=adam), accumulate=accumulate, steps=10) for accumulate in (1, 4))
    assert difference(parts.weights[-1], whole.weights[-1], whole.weights[0]) < SIGNS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its ranks by fork")
@EACH
def test_two_ranks_train_as_one(name, tmp_path):
    """DDP over gloo, each with two micro-batches of two."""
    one = fit(MODULES[name](), steps=10)
    two = fit(MODULES[name](), accumulate=2, steps=10, devices=2, strategy="ddp_fork", default_root_dir=tmp_path)
    assert two.trainer.world_size == 2
    assert difference(weights_of(two.module), one.weights[-1], one.weights[0]) < SUMS
    if name == "vq":
        assert torch.equal(one.module.regulariser.idle_steps, two.module.regulariser.idle_steps)
    if name == "importance":
        assert torch.equal(one.module.importance.counts, two.module.importance.counts)


def test_with_a_discriminator_lambda_alone_depends_on_the_split():
    """It is measured on the first micro-batch, here of two samples. With a given one both sides train the same."""

    def trained(accumulate: int, given: bool) -> tuple[Fitted, torch.Tensor, torch.Tensor]:
        module = vae(adversary=partial(Adversary, channels=8, layers=1, ramp=2, start=1.0, weight=0.5))
        if given:
            module.adversary.balance.measure = lambda *_: torch.tensor(0.7)
        for group in module.adversary.optimizer.param_groups:
            group["eps"] = 1e-2  # or it steps by the sign of gradients that are sums of nothing
        judge = module.adversary.discriminator
        start = torch.nn.utils.parameters_to_vector(judge.parameters()).detach()
        fitted = fit(module, accumulate=accumulate)
        return fitted, torch.nn.utils.parameters_to_vector(judge.parameters()).detach(), start

    for given, tolerance in ((True, 10 * SUMS), (False, 0.3)):
        (whole, judge, start), (parts, other, _) = trained(1, given), trained(4, given)
        assert difference(parts.weights[-1], whole.weights[-1], whole.weights[0]) < tolerance
        assert difference(other, judge, start) < tolerance


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (8, 2)])
def test_a_run_resumes_in_another_split(tmp_path, recorded, before, after):
    whole = fit(chain())
    draws = by_step(recorded, 1)
    recorded.clear()
    part = fit(chain(), accumulate=before, steps=3)
    part.trainer.save_checkpoint(tmp_path / "part.ckpt")
    rest = fit(chain(), accumulate=after, start=3, resume=tmp_path / "part.ckpt")
    assert rest.trainer.global_step == 6 and len(recorded) == 3 * before + 3 * after
    found = by_step(recorded[: 3 * before], before) + by_step(recorded[3 * before :], after)
    assert same(found, draws)
    assert difference(rest.weights[-1], whole.weights[-1], whole.weights[0]) < SUMS


def test_steps_that_were_gone_back_over_are_not_seen_again(recorded):
    """An offset moves samples and draws alike."""
    fit(chain(), steps=5)
    whole = list(recorded)
    recorded.clear()
    module = chain()
    module.step_offset = 2
    fit(module, steps=3, start=2)
    assert same(recorded, whole[2:])


def test_validation_says_the_same_in_every_split(monkeypatch):
    monkeypatch.setattr(DiffusionTraining, "on_validation_epoch_end", lambda self: None)
    module, said = chain(), []
    for accumulate in (1, 2, 8):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet)
        batches = val_loader(partial(fetch, module), np.arange(NUM_SAMPLES), batch_size=BATCH // accumulate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said.append(trainer.validate(module, batches, verbose=False)[0])
    for found in said[1:]:
        assert found == pytest.approx(said[0], rel=1e-5)


# The average


@pytest.mark.parametrize("how", [RuntimeError, SystemExit])
def test_a_validation_that_breaks_off_leaves_weights_and_average_whole(tmp_path, how):
    """A checkpoint from within it and one from after it are those of training without it."""

    class Breaks(Callback):
        def on_validation_batch_end(self, trainer, module, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "within.ckpt")
            self.inside, self.average = weights_of(module), [s.clone() for s in averages.ema.shadow]
            raise how("in validation")

        def on_exception(self, trainer, module, exception) -> None:
            trainer.save_checkpoint(tmp_path / "after.ckpt")

    plain, module, breaks, averages = fit(chain(), steps=3), chain(), Breaks(), EMACallback(0.9)
    with pytest.raises(how, match="in validation"):
        fit(module, ema=averages, callbacks=[breaks], val_check_interval=3, limit_val_batches=1.0)
    assert torch.equal(weights_of(module), plain.weights[-1])
    assert torch.equal(breaks.inside, torch.cat([s.flatten() for s in plain.ema.shadow]))
    assert all(torch.equal(a, b) for a, b in zip(averages.ema.shadow, breaks.average, strict=True))
    plain.trainer.save_checkpoint(tmp_path / "plain.ckpt")
    expected = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    for file in ("within.ckpt", "after.ckpt"):
        found = torch.load(tmp_path / file, weights_only=True)
        assert all(torch.equal(value, expected["state_dict"][key]) for key, value in found["state_dict"].items())
        average = found["callbacks"]["EMACallback"]["shadow"]
        assert all(torch.equal(average[k], v) for k, v in expected["callbacks"]["EMACallback"]["shadow"].items())


# The compiler


def compiled(name: str) -> Any:
    module = MODULES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's compiler imports of torch
        (VAEStage if name == "kl" else Stage).compile(SimpleNamespace(module=module))
    return module


@BOTH
def test_compiling_changes_no_name_and_the_average_is_what_is_left(name, tmp_path):
    """In the checkpoint, the average and the files for use."""
    with torch.compiler.set_stance("force_eager"):
        fitted = fit(compiled(name))
    fitted.trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    average = checkpoint["callbacks"]["EMACallback"]["shadow"]
    fitted.ema.copy_to_module()
    if name == "kl":
        Autoencoder(fitted.module.trained).save(tmp_path / "files")
        files = load_file(tmp_path / "files" / "diffusion_pytorch_model.safetensors")
    else:
        fitted.module.pipeline.save(tmp_path / "files")
        files = load_file(tmp_path / "files" / "network" / "diffusion_pytorch_model.safetensors")
    keys = [*checkpoint["state_dict"], *average, *files]
    assert not [key for key in keys if "_orig_mod" in key]
    assert set(average) == {key.removeprefix("trained.") for key in checkpoint["state_dict"] if "trained." in key}
    assert all(torch.equal(files[key], value) for key, value in average.items())


@pytest.mark.slow
@BOTH
def test_compiled_trains_as_eager(name):
    eager, fast = fit(MODULES[name]()), fit(compiled(name))
    assert difference(fast.weights[-1], eager.weights[-1], eager.weights[0]) < SUMS
