"""ldm.training: the averaged weights while validating, the progress line, the checkpoint, noise per batch."""

import contextlib
import errno
import signal

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ldm.errors import UserError
from ldm.training.budget import Budget
from ldm.training.callbacks import EMACallback, ProgressBar
from ldm.training.checkpoint import LastCheckpoint, find_checkpoint
from ldm.training.stage import OptimizerFactory


class Weights(Callback):
    """The weights after each optimizer step."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        self.found.append(module.trained.weight.detach().clone())


class Rows(Logger):
    """What Lightning writes, by step."""

    name, version = "rows", "0"

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *_) -> None: ...

    def log_metrics(self, metrics, step) -> None:
        self.found.append((step, metrics))


def test_a_row_holds_the_loss_of_its_own_step(fit, make_module):
    module, rows, losses = make_module(lr=0.3), Rows(), []
    module.log_every = 3
    train = module.losses
    module.losses = lambda *batch: losses.append(train(*batch)) or losses[-1]
    fit(module, [Budget(7)], max_steps=7, logger=rows, log_every_n_steps=3)
    assert [(step, row["train/loss"]) for step, row in rows.found] == [(k, losses[k]["loss"].item()) for k in (2, 5)]


def test_timing_a_step_changes_nothing(make_module):
    module = make_module()
    weight = module.trained.weight.detach().clone()
    assert module.measure_step(torch.ones(4, 2), contextlib.nullcontext) > 0
    assert torch.equal(module.trained.weight, weight) and module.trained.weight.grad is None


def reference_ema(start: torch.Tensor, weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    average = start.clone()
    for k, weight in enumerate(weights):
        d = min(decay, (1 + k) / (10 + k))
        average = d * average + (1 - d) * weight
    return average


@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_sees_the_average_and_training_goes_on_without_it(fit, make_module, accumulate):
    module, plain = make_module(lr=0.3), make_module(lr=0.3)
    options = {"max_steps": 8, "accumulate_grad_batches": accumulate, "val_check_interval": 4 * accumulate}
    ema = EMACallback(0.9)
    fit(module, [Budget(8), ema], **options)
    fit(plain, [Budget(8)], **options)
    assert ema.ema.num_updates == 8
    assert torch.equal(module.trained.weight, plain.trained.weight), "averaging changes nothing of the training"
    assert len(module.validated) == 2
    assert not torch.equal(module.validated[1], plain.validated[1])


def test_the_average_is_taken_once_per_optimizer_step(fit, make_module):
    module, weights, ema = make_module(lr=0.3), Weights(), EMACallback(0.9)
    start = module.trained.weight.detach().clone()
    fit(module, [Budget(6), ema, weights], max_steps=6, accumulate_grad_batches=3)
    after_each = [*weights.found[1:], module.trained.weight.detach()]
    assert len(after_each) == 6
    torch.testing.assert_close(ema.ema.shadow[0], reference_ema(start, after_each, 0.9))


def test_a_failed_validation_leaves_the_raw_weights(fit, make_module):
    class Fails(type(make_module())):
        def validation_step(self, x, batch_idx):
            self.inside = self.trained.weight.detach().clone()
            raise RuntimeError("in validation")

    module, weights, ema = Fails(lr=0.3), Weights(), EMACallback(0.9)
    with pytest.raises(RuntimeError, match="in validation"):
        fit(module, [Budget(6), ema, weights], max_steps=6, val_check_interval=3)
    assert torch.equal(module.inside, ema.ema.shadow[0])
    assert not torch.equal(module.inside, module.trained.weight)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_noise_depends_on_the_seed_and_the_step_alone(fit, make_module, accumulate):
    whole, resumed = make_module(), make_module()
    fit(whole, max_steps=6, accumulate_grad_batches=accumulate)
    noise = [value for _, value in whole.seen]
    assert len(set(noise)) == 6 * accumulate
    resumed.step_offset = 4
    fit(resumed, max_steps=2, start=4, accumulate_grad_batches=accumulate)
    assert [value for _, value in resumed.seen] == noise[4 * accumulate :]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_fit_ends_with_the_same_weights(fit, make_module, tmp_path, accumulate):
    """Momentum, averages, order and noise all go on where they were."""

    def module():
        return make_module(lr=0.1, build=torch.optim.AdamW)

    def callbacks(folder, steps):
        return [Budget(steps, decay="constant"), EMACallback(0.9), LastCheckpoint(tmp_path / folder, 3600)]

    options = {"accumulate_grad_batches": accumulate}
    whole, part, rest = module(), module(), module()
    through = callbacks("whole", 10)
    fit(whole, through, max_steps=10, **options)
    fit(part, callbacks("part", 6), max_steps=6, **options)
    found = find_checkpoint(tmp_path / "part", True)
    continued = callbacks("part", 10)
    trainer = fit(rest, continued, max_steps=10, start=6, ckpt_path=found, **options)
    assert trainer.global_step == 10
    assert part.seen + rest.seen == whole.seen
    assert torch.equal(rest.trained.weight, whole.trained.weight)
    assert torch.equal(continued[1].ema.shadow[0], through[1].ema.shadow[0])


def test_a_checkpoint_is_kept_between_steps_and_at_the_end(fit, make_module, tmp_path):
    class Saves(LastCheckpoint):
        def _save(self, trainer):
            super()._save(trainer)
            saved.append((trainer.global_step, torch.load(self.path, weights_only=True)["global_step"]))

    saved: list[tuple[int, int]] = []
    fit(make_module(), [Budget(3), Saves(tmp_path, 0.0)], max_steps=3, accumulate_grad_batches=2)
    assert saved == [(1, 1), (2, 2), (3, 3), (3, 3)]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


class Stops(Callback):
    """Ends training from outside, before the optimizer's next step."""

    def __init__(self, batch: int, how: type[BaseException]) -> None:
        self.batch, self.how = batch, how

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.batch:
            raise self.how


@pytest.mark.parametrize("how", [KeyboardInterrupt, SIGTERMException])
@pytest.mark.parametrize(("accumulate", "batch"), [(1, 6), (2, 12)])
def test_what_is_stopped_can_be_resumed(fit, make_module, tmp_path, monkeypatch, how, accumulate, batch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Lightning would turn Ctrl-C off for all of pytest

    def module():
        return make_module(lr=0.1, build=torch.optim.AdamW)

    options = {"max_steps": 10, "accumulate_grad_batches": accumulate}
    whole, part, rest = module(), module(), module()
    fit(whole, [Budget(10), EMACallback(0.9)], **options)
    last = LastCheckpoint(tmp_path, 3600)
    with pytest.raises(SystemExit):
        fit(part, [Budget(10), EMACallback(0.9), last, Stops(batch, how)], **options)
    start = {"start": batch // accumulate, "ckpt_path": str(last.path)}
    fit(rest, [Budget(10), EMACallback(0.9), LastCheckpoint(tmp_path, 3600)], **start, **options)
    assert part.seen + rest.seen == whole.seen
    assert torch.equal(rest.trained.weight, whole.trained.weight)


def test_nothing_is_saved_amid_an_accumulated_step(fit, make_module, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    callbacks = [Budget(10), LastCheckpoint(tmp_path, 3600), Stops(3, KeyboardInterrupt)]
    with pytest.raises(SystemExit):
        fit(make_module(), callbacks, max_steps=10, accumulate_grad_batches=2)
    assert not (tmp_path / "checkpoints").exists()


def test_a_save_that_fails_leaves_the_last_checkpoint_whole(fit, make_module, tmp_path, monkeypatch):
    fit(make_module(), [Budget(2), LastCheckpoint(tmp_path, 3600)], max_steps=2)
    before = (tmp_path / "checkpoints/last.ckpt").read_bytes()

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        fit(make_module(), [Budget(3), LastCheckpoint(tmp_path, 0.0)], max_steps=3)
    assert (tmp_path / "checkpoints/last.ckpt").read_bytes() == before
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("resume", [False, None])
def test_no_resume_starts_anew(tmp_path, resume):
    assert find_checkpoint(tmp_path, resume) is None


@pytest.mark.parametrize("resume", [True, "true", "elsewhere.ckpt"])
def test_a_checkpoint_that_is_not_there_is_named(tmp_path, resume):
    with pytest.raises(UserError, match="there is no checkpoint .*ckpt"):
        find_checkpoint(tmp_path, resume)


def test_gradients_are_clipped_to_the_norm(fit, make_module):
    module = make_module(lr=1.0)
    start = torch.cat([p.detach().flatten() for p in module.trained.parameters()])
    fit(module, max_steps=1, gradient_clip_val=0.01)
    moved = torch.cat([p.detach().flatten() for p in module.trained.parameters()]) - start
    torch.testing.assert_close(moved.norm(), torch.tensor(0.01), rtol=1e-3, atol=0)


def test_off_a_terminal_progress_is_a_line_now_and_then(fit, make_module, capsys, monkeypatch):
    monkeypatch.setattr(ProgressBar, "LINE_EVERY_S", 0.0)
    budget = Budget(4)
    fit(make_module(), [budget, ProgressBar(budget, 4, 2, "stage line")], max_steps=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage line")]
    assert [line.split(",")[0] for line in lines] == [
        f"stage line: {share:>4}" for share in ("25%", "50%", "75%", "100%")
    ]
    assert "step 4, loss " in lines[-1] and "nan images/s" not in lines[-1]


def test_biases_and_norms_are_not_decayed():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.GroupNorm(2, 4), torch.nn.Linear(4, 4))
    network[2].requires_grad_(False)
    optimizer = OptimizerFactory(lambda groups: torch.optim.AdamW(groups, weight_decay=0.1))(network)
    decayed = {group["weight_decay"]: [tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups}
    assert decayed == {0.1: [(4, 3, 1, 1)], 0.0: [(4,), (4,), (4,)]}
