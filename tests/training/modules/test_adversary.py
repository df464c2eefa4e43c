"""adversary and .vae: who moves whose weights, when it begins, what counts as a step, and resuming."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from ldm.autoencoder.autoencoder import weights_sha256
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.autoencoder.perceptual import Perceptual
from ldm.autoencoder.regularisers import KL, VectorQuantised
from ldm.data.loaders import train_loader
from ldm.errors import UserError
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.modules.adversary import Adversary
from ldm.training.modules.autoencoder import VAETraining
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from ldm.training.optim.factory import OptimizerFactory

IMAGES = torch.nn.functional.interpolate(
    torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1, 16, mode="nearest"
)
MODEL = partial(PatchAutoencoderKL, patch=2, latent_channels=3, block_out_channels=(8,), norm_num_groups=4)
ADVERSARY = partial(Adversary, channels=8, layers=1, ramp=2, weight=0.5)


class Watched(Callback):
    """Learning rate, lambda and the discriminator's weights after each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.weights: list[torch.Tensor | None] = []
        self.factors: list[float] = []
        self.discriminators: list[str] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        adversary = module.adversary
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if adversary is not None:
            self.weights.append(adversary.balance.weight)
            self.factors.append(adversary.balance.factor if module.playing else 0.0)
            self.discriminators.append(weights_sha256(adversary.discriminator))


def make(adversary=ADVERSARY, regulariser=KL, loss=AutoencoderLoss, seed: int = 0) -> VAETraining:
    torch.manual_seed(0)
    rule = regulariser()
    model = rule.build(MODEL, 16)
    model.init_shortcut(IMAGES)
    rule.start(model, lambda: IMAGES, 0, torch.device("cpu"))
    return VAETraining(
        model,
        loss(),
        rule,
        OptimizerFactory(partial(torch.optim.AdamW, lr=1e-2)),
        seed=seed,
        flip=True,
        pictures=Path("pictures"),
        adversary=adversary() if adversary else None,
    )


def fit(module: VAETraining, place: Path, *, steps: int = 6, batch_size: int = 8, resume=None, **options):
    """Train on IMAGES; returns the trainer, what was watched, and the EMA."""
    budget, watched, ema = Budget(max_steps=options.pop("budget", 6)), Watched(), EMACallback(0.9)
    module.progress = budget.progress
    accumulate = options.get("accumulate_grad_batches", 1)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": -1,
            "max_steps": steps,
            "callbacks": [budget, watched, ema, Checkpoints(place, budget, every_s=1e9)],
            "default_root_dir": place,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "gradient_clip_val": 1.0,
            **options,
        }
    )
    start = torch.load(resume, weights_only=True)["global_step"] if resume else 0
    order = {"batch_size": batch_size * accumulate, "seed": 0, "start": start, "accumulate": accumulate}
    batches = train_loader(lambda indices, _: IMAGES[indices], torch.arange(32).numpy(), **order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches, ckpt_path=resume, weights_only=True)
    return trainer, watched, ema.ema


def test_steps_are_the_generators(tmp_path):
    """With and without a discriminator: the same count, learning rates and EMA updates; it steps from `start` on."""
    found = {}
    for name, adversary in (("with", partial(ADVERSARY, start=3)), ("without", None)):
        module = make(adversary)
        trainer, watched, ema = fit(module, tmp_path / name)
        state = torch.load(tmp_path / name / "checkpoints/step-00000006.ckpt", weights_only=True)
        found[name] = (trainer.global_step, watched.rates, ema.num_updates, state["global_step"])
        assert len(trainer.optimizers) == 1
    assert found["with"] == found["without"] and found["with"][0] == 6
    module = make(partial(ADVERSARY, start=3))
    _, watched, _ = fit(module, tmp_path / "again")
    assert [weight is None for weight in watched.weights] == [True] * 3 + [False] * 3
    assert watched.factors == [0, 0, 0, 0, 0.25, 0.5]  # 0.5 over a ramp of 2
    before, *after = watched.discriminators[2:]
    assert set(watched.discriminators[:3]) == {before} and len({before, *after}) == 4
    assert module.adversary.begun_at == 3


def test_before_its_start_nothing_differs(tmp_path):
    """The first half of the budget trains the same weights, bit for bit."""
    weights = []
    for adversary in (partial(ADVERSARY, start=0.5), None):
        module = make(adversary)
        fit(module, tmp_path / str(len(weights)), steps=3)
        weights.append(weights_sha256(module.trained))
    assert weights[0] == weights[1]


@pytest.mark.parametrize("game", ["hinge", "non_saturating"])
def test_each_side_moves_its_own_weights(game):
    """The adversarial term reaches encoder and decoder and leaves the discriminator; its own loss the reverse."""
    module = make(partial(ADVERSARY, game))
    for parameter in module.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made = module.regulariser.reconstruct(module.trained, IMAGES, torch.randn)
    discriminator = list(module.adversary.discriminator.parameters())
    module.adversary.generator_loss(made.images).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.trained.parameters())
    assert all(p.grad is None and p.requires_grad for p in discriminator)
    module.trained.zero_grad()
    made = module.regulariser.reconstruct(module.trained, IMAGES, torch.randn)
    module.adversary.learn(IMAGES, made.images)
    assert all(p.grad is None for p in module.trained.parameters())
    assert all(p.grad is not None and p.grad.any() for p in discriminator)


def test_the_gradient_is_distortion_plus_the_weighted_adversarial_term():
    module = make()
    for parameter in module.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def gradient(playing: bool, factor: float = 0.0) -> torch.Tensor:
        module.trained.zero_grad()
        module.playing, module.adversary.balance.factor = playing, factor
        terms = module.losses(IMAGES, module.trial_draws(IMAGES))
        terms["loss"].backward()
        assert ("adversarial" in terms) == playing
        return torch.cat([p.grad.flatten() for p in module.trained.parameters()])

    plain, weighted, twice = gradient(False), gradient(True, 0.5), gradient(True, 1.0)
    torch.testing.assert_close(gradient(True, 0.0), plain)
    assert (weighted - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(twice - plain, 2 * (weighted - plain), rtol=1e-3, atol=1e-5)


def test_the_discriminator_learns_to_tell(tmp_path):
    """Reconstructions that are grey everywhere: after a few steps it tells nearly all patches apart."""
    torch.manual_seed(0)
    adversary = ADVERSARY(lr=2e-3)
    for _ in range(40):
        found = adversary.learn(IMAGES, torch.zeros_like(IMAGES))
        adversary.step(decay=1.0)
    assert found["discriminator_accuracy"] > 0.9 and found["discriminator"] < 0.5
    before = weights_sha256(adversary.discriminator)
    adversary.learn(IMAGES, torch.zeros_like(IMAGES))
    adversary.step(decay=0.0)  # where the generator's learning rate has decayed to
    assert weights_sha256(adversary.discriminator) == before


@pytest.mark.parametrize(("regulariser", "precision"), [(KL, "32-true"), (partial(VectorQuantised, 16), "bf16-mixed")])
def test_a_resumed_run_ends_as_one_never_stopped(tmp_path, regulariser, precision):
    """Weights, EMA, discriminator, its optimizer and the codebook's idle steps, from the middle of the game."""
    options = {"precision": precision, "accumulate_grad_batches": 2, "batch_size": 4, "budget": 8}
    adversary = partial(ADVERSARY, start=2)
    whole, stopped, resumed = (make(adversary, regulariser, partial(AutoencoderLoss, nll=0.1)) for _ in range(3))
    _, _, ema = fit(whole, tmp_path / "whole", steps=8, **options)
    fit(stopped, tmp_path / "parts", steps=5, **options)
    checkpoint = tmp_path / "parts/checkpoints/step-00000005.ckpt"
    _, _, ema_resumed = fit(resumed, tmp_path / "parts", steps=8, resume=str(checkpoint), **options)
    assert weights_sha256(whole) == weights_sha256(resumed) != weights_sha256(stopped)
    assert weights_sha256(whole.adversary.discriminator) == weights_sha256(resumed.adversary.discriminator)
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow, ema_resumed.shadow, strict=True))
    first, second = (m.adversary.optimizer.state_dict()["state"] for m in (whole, resumed))
    assert all(torch.equal(first[i]["exp_avg"], second[i]["exp_avg"]) for i in first)
    assert whole.adversary.begun_at == resumed.adversary.begun_at == 2


def test_accumulated_batches_make_one_step(tmp_path):
    """The discriminator's gradient is the mean over the parts; lambda is measured on the first part alone."""
    whole, parts = ADVERSARY(), ADVERSARY()
    parts.discriminator.load_state_dict(whole.discriminator.state_dict())
    parts.share = 0.5
    false = IMAGES * 0.5
    whole.learn(IMAGES, false)
    for half in (slice(0, 16), slice(16, 32)):
        parts.learn(IMAGES[half], false[half])
    for a, b in zip(whole.discriminator.parameters(), parts.discriminator.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    module = make(partial(ADVERSARY, start=0))
    trainer, watched, _ = fit(module, tmp_path, steps=3, batch_size=4, accumulate_grad_batches=2)
    assert trainer.global_step == 3 and module.adversary.share == 0.5
    assert len(set(watched.discriminators)) == 3 and len({weight.item() for weight in watched.weights}) == 3


def test_what_is_frozen_stays(tmp_path):
    """The perceptual network is in no checkpoint and no optimizer, the learned scale in both."""
    module = make(loss=partial(AutoencoderLoss, nll=1.0))
    module.loss.perceptual = Perceptual(type("Distance", (torch.nn.Linear,), {"name": "linear"})(1, 1))
    names = set(module.state_dict())
    assert "loss.log_scale" in names and not any("perceptual" in name or "discriminator" in name for name in names)
    trained = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert id(module.loss.log_scale) in trained
    assert trained == {id(p) for p in module.parameters()}


def test_the_expected_time_counts_the_game_by_its_share(monkeypatch):
    module = make(partial(ADVERSARY, start=0.25))
    times = {False: 1.0, True: 3.0}
    monkeypatch.setattr(VAETraining, "try_step", lambda self, *_: times[self.playing])
    assert module.measure_step(IMAGES, None) == 0.25 * 1 + 0.75 * 3
    assert not module.playing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "wasserstein"}, "^loss=wasserstein must be 'hinge' or 'non_saturating'"),
        ({"start": -1}, "^start=-1 must be 0 or more"),
        ({"start": 1.5}, "start=1.5 must be a whole step"),
        ({"weight": -0.1}, "weight=-0.1 must be 0 or more"),
        ({"ramp": -5}, "ramp=-5 must be 0 or more"),
        ({"layers": 0}, "layers=0 must be 1 or more"),
        ({"channels": 2.5}, "channels=2.5 must be a whole number"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        Adversary(**options)


@pytest.mark.parametrize(("layers", "resolution", "fits"), [(3, 32, True), (3, 16, False), (2, 16, True), (1, 8, True)])
def test_images_that_are_too_small_for_the_discriminator(layers, resolution, fits):
    adversary = ADVERSARY(layers=layers)
    images = torch.zeros(1, 3, resolution, resolution)
    if fits:
        adversary.check(resolution)
        assert adversary.discriminator(images).shape[-1] >= 1
        return
    with pytest.raises(UserError, match="choose adversarial.layers=2"):
        adversary.check(resolution)
