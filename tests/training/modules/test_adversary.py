"""ldm.training.modules.adversary and .autoencoder: gradients, start, step counts, and resume."""

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


class RecordSteps(Callback):
    """Records the learning rate, lambda and a digest of the discriminator after each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.lambdas: list[torch.Tensor | None] = []
        self.factors: list[float] = []
        self.discriminators: list[str] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        adversary = module.adversary
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if adversary is not None:
            self.lambdas.append(adversary.adaptive_weight.weight)
            self.factors.append(adversary.adaptive_weight.factor if module.adversarial_on else 0.0)
            self.discriminators.append(weights_sha256(adversary.discriminator))


def make(adversary=ADVERSARY, regulariser=KL, loss=AutoencoderLoss, seed: int = 0) -> VAETraining:
    torch.manual_seed(0)
    regulariser = regulariser()
    model = regulariser.build(MODEL, 16)
    model.init_shortcut(IMAGES)
    regulariser.initialise(model, lambda: IMAGES, 0, torch.device("cpu"))
    return VAETraining(
        model,
        loss(),
        regulariser,
        OptimizerFactory(partial(torch.optim.AdamW, lr=1e-2)),
        seed=seed,
        flip=True,
        figures_dir=Path("figures"),
        adversary=adversary() if adversary else None,
    )


def fit(module: VAETraining, folder: Path, *, steps: int = 6, batch_size: int = 8, resume=None, **options):
    """Train on IMAGES. Return the trainer, the recorded steps and the EMA."""
    budget, recorder, ema = Budget(max_steps=options.pop("budget", 6)), RecordSteps(), EMACallback(0.9)
    module.progress = budget.progress
    accumulate = options.get("accumulate_grad_batches", 1)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": -1,
            "max_steps": steps,
            "callbacks": [budget, recorder, ema, Checkpoints(folder, budget, interval_s=1e9)],
            "default_root_dir": folder,
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
    return trainer, recorder, ema.ema


def test_global_step_counts_only_generator_steps(tmp_path):
    """A discriminator does not change step counts, learning rates or EMA updates. It takes steps from `start` on."""
    counts = {}
    for name, adversary in (("with", partial(ADVERSARY, start=3)), ("without", None)):
        module = make(adversary)
        trainer, recorder, ema = fit(module, tmp_path / name)
        state = torch.load(tmp_path / name / "checkpoints/step-00000006.ckpt", weights_only=True)
        counts[name] = (trainer.global_step, recorder.rates, ema.num_updates, state["global_step"])
        assert len(trainer.optimizers) == 1
    assert counts["with"] == counts["without"] and counts["with"][0] == 6
    module = make(partial(ADVERSARY, start=3))
    _, recorder, _ = fit(module, tmp_path / "start")
    assert [value is None for value in recorder.lambdas] == [True] * 3 + [False] * 3
    assert recorder.factors == [0, 0, 0, 0, 0.25, 0.5]  # 0.5 over a ramp of 2
    initial, *updated = recorder.discriminators[2:]
    assert set(recorder.discriminators[:3]) == {initial} and len({initial, *updated}) == 4
    assert module.adversary.start_step == 3


def test_discriminator_has_no_effect_before_its_start(tmp_path):
    """Weights are bit-identical with and without a discriminator that starts after half of the budget."""
    weights = []
    for adversary in (partial(ADVERSARY, start=0.5), None):
        module = make(adversary)
        fit(module, tmp_path / str(len(weights)), steps=3)
        weights.append(weights_sha256(module.trained))
    assert weights[0] == weights[1]


@pytest.mark.parametrize("gan_loss", ["hinge", "non_saturating"])
def test_each_loss_has_gradients_only_in_its_own_network(gan_loss):
    """The generator loss has gradients only in the autoencoder, and the discriminator loss only in its own network."""
    module = make(partial(ADVERSARY, gan_loss))
    for parameter in module.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    output = module.regulariser.reconstruct(module.trained, IMAGES, torch.randn)
    discriminator = list(module.adversary.discriminator.parameters())
    module.adversary.generator_loss(output.images).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.trained.parameters())
    assert all(p.grad is None and p.requires_grad for p in discriminator)
    module.trained.zero_grad()
    output = module.regulariser.reconstruct(module.trained, IMAGES, torch.randn)
    module.adversary.accumulate_gradients(IMAGES, output.images)
    assert all(p.grad is None for p in module.trained.parameters())
    assert all(p.grad is not None and p.grad.any() for p in discriminator)


def test_gradient_is_the_sum_of_reconstruction_and_weighted_adversarial_gradients():
    module = make()
    for parameter in module.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def gradient(adversarial_on: bool, factor: float = 0.0) -> torch.Tensor:
        module.trained.zero_grad()
        module.adversarial_on, module.adversary.adaptive_weight.factor = adversarial_on, factor
        terms = module.losses(IMAGES, module.trial_draws(IMAGES))
        terms["loss"].backward()
        assert ("adversarial" in terms) == adversarial_on
        return torch.cat([p.grad.flatten() for p in module.trained.parameters()])

    plain, weighted, doubled = gradient(False), gradient(True, 0.5), gradient(True, 1.0)
    torch.testing.assert_close(gradient(True, 0.0), plain)
    assert (weighted - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(doubled - plain, 2 * (weighted - plain), rtol=1e-3, atol=1e-5)


def test_discriminator_learns_to_classify_patches():
    """After a few steps, nearly all patches of images and uniformly grey reconstructions are classified correctly."""
    torch.manual_seed(0)
    adversary = ADVERSARY(lr=2e-3)
    for _ in range(40):
        terms = adversary.accumulate_gradients(IMAGES, torch.zeros_like(IMAGES))
        adversary.step(decay=1.0)
    assert terms["discriminator_accuracy"] > 0.9 and terms["discriminator"] < 0.5
    digest = weights_sha256(adversary.discriminator)
    adversary.accumulate_gradients(IMAGES, torch.zeros_like(IMAGES))
    adversary.step(decay=0.0)  # as at the end of the generator's learning rate schedule
    assert weights_sha256(adversary.discriminator) == digest


@pytest.mark.parametrize(("regulariser", "precision"), [(KL, "32-true"), (partial(VectorQuantised, 16), "bf16-mixed")])
def test_resumed_training_matches_uninterrupted_training(tmp_path, regulariser, precision):
    """Compares all weights, the EMA and the discriminator's optimizer after a stop during adversarial training."""
    options = {"precision": precision, "accumulate_grad_batches": 2, "batch_size": 4, "budget": 8}
    adversary = partial(ADVERSARY, start=2)
    expected, stopped, resumed = (make(adversary, regulariser, partial(AutoencoderLoss, nll=0.1)) for _ in range(3))
    _, _, ema = fit(expected, tmp_path / "uninterrupted", steps=8, **options)
    fit(stopped, tmp_path / "stopped", steps=5, **options)
    checkpoint = tmp_path / "stopped/checkpoints/step-00000005.ckpt"
    _, _, ema_resumed = fit(resumed, tmp_path / "stopped", steps=8, resume=str(checkpoint), **options)
    assert weights_sha256(expected) == weights_sha256(resumed) != weights_sha256(stopped)
    assert weights_sha256(expected.adversary.discriminator) == weights_sha256(resumed.adversary.discriminator)
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow, ema_resumed.shadow, strict=True))
    states = [m.adversary.optimizer.state_dict()["state"] for m in (expected, resumed)]
    assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[0])
    assert expected.adversary.start_step == resumed.adversary.start_step == 2


def test_accumulated_batches_give_one_discriminator_step(tmp_path):
    """The gradient is the mean over micro-batches. Lambda is computed from the first micro-batch only."""
    full, split = ADVERSARY(), ADVERSARY()
    split.discriminator.load_state_dict(full.discriminator.state_dict())
    split.loss_scale = 0.5
    fake = IMAGES * 0.5
    full.accumulate_gradients(IMAGES, fake)
    for half in (slice(0, 16), slice(16, 32)):
        split.accumulate_gradients(IMAGES[half], fake[half])
    for a, b in zip(full.discriminator.parameters(), split.discriminator.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    module = make(partial(ADVERSARY, start=0))
    trainer, recorder, _ = fit(module, tmp_path, steps=3, batch_size=4, accumulate_grad_batches=2)
    assert trainer.global_step == 3 and module.adversary.loss_scale == 0.5
    assert len(set(recorder.discriminators)) == 3 and len({value.item() for value in recorder.lambdas}) == 3


def test_perceptual_network_is_neither_saved_nor_trained():
    """The checkpoint and the optimizer contain the learned scale of the loss, but not the perceptual network."""
    module = make(loss=partial(AutoencoderLoss, nll=1.0))
    module.loss.perceptual = Perceptual(type("Distance", (torch.nn.Linear,), {"name": "linear"})(1, 1))
    names = set(module.state_dict())
    assert "loss.log_scale" in names and not any("perceptual" in name or "discriminator" in name for name in names)
    trained = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert id(module.loss.log_scale) in trained
    assert trained == {id(p) for p in module.parameters()}


def test_expected_step_time_averages_over_steps_with_and_without_a_discriminator(monkeypatch):
    module = make(partial(ADVERSARY, start=0.25))
    times = {False: 1.0, True: 3.0}
    monkeypatch.setattr(VAETraining, "trial_step", lambda self, *_: times[self.adversarial_on])
    assert module.measure_step(IMAGES, None) == 0.25 * 1 + 0.75 * 3
    assert not module.adversarial_on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "wasserstein"}, r"^loss=wasserstein .*hinge.*non_saturating"),
        ({"start": -1}, r"^start=-1 must .*\b0\b"),
        ({"start": 1.5}, r"start=1\.5 must .*step.*fraction.*below 1"),
        ({"weight": -0.1}, r"weight=-0\.1 must .*\b0\b"),
        ({"ramp": -5}, r"ramp=-5 must .*\b0\b"),
        ({"layers": 0}, r"layers=0 must .*\b1\b"),
        ({"channels": 2.5}, r"channels=2\.5 must .*(whole|integer)"),
    ],
)
def test_adversary_rejects_invalid_options(options, message):
    with pytest.raises(UserError, match=message):
        Adversary(**options)


@pytest.mark.parametrize(("layers", "resolution", "fits"), [(3, 32, True), (3, 16, False), (2, 16, True), (1, 8, True)])
def test_check_rejects_images_too_small_for_the_discriminator(layers, resolution, fits):
    adversary = ADVERSARY(layers=layers)
    images = torch.zeros(1, 3, resolution, resolution)
    if fits:
        adversary.check(resolution)
        assert adversary.discriminator(images).shape[-1] >= 1
        return
    with pytest.raises(UserError, match=r"data\.resolution=16\b.*adversarial\.layers=3\b.*adversarial\.layers=2\b"):
        adversary.check(resolution)
