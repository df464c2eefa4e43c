"""ldm.training.callbacks.guard: skipped steps do not change the state, are logged, and trigger rollbacks."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

import ldm.train
from ldm.autoencoder.autoencoder import weights_sha256
from ldm.autoencoder.regularisers import VectorQuantised, quantiser
from ldm.errors import UserError
from ldm.runs.checkpoints import list_checkpoints
from ldm.runs.run import Run
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.callbacks.guard import Guard, RollBack
from ldm.training.callbacks.skip_step import MAX_FLOAT32, RunningNorm
from ldm.training.modules.adversary import Adversary
from ldm.training.modules.autoencoder import VAETraining
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from ldm.training.optim.muon import MuonAdamW
from tests.small_training import IMAGES, STAGE_1, RecordingLogger, make_vae_training, states_equal

ADAMW = partial(torch.optim.AdamW, fused=True)
MOMENTUM = partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)
FAULTS = ["loss is nan", "loss is inf", "gradient is nan", "gradient is inf", "spike"]


def inject_fault(module: nn.Module, loss: torch.Tensor, fault: str) -> torch.Tensor:
    """Make only the loss or only the gradient non-finite, or scale both up (by 1e8 for a spike)."""
    if fault.startswith("loss"):
        return loss + float(fault.split()[-1])
    if fault == "spike":
        return 1e8 * loss
    if fault == "large loss":
        return 300 * loss
    parameter = next(module.parameters())
    handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * float(fault.split()[-1]))[1])
    return loss


@pytest.fixture
def make(make_module):
    """make(faults, lr=0.1, build=ADAMW): a linear layer with faults in the given batches of the data order."""

    class Faulty(make_module):
        faults: dict[int, str] = {}

        def losses(self, x, *draws):
            terms = super().losses(x, *draws)
            batch = len(self.batches) - 1 + self.first_batch
            if batch in self.faults:
                terms["loss"] = inject_fault(self.trained, terms["loss"], self.faults[batch])
            return terms

    def make(faults, lr=0.1, build=ADAMW, first_batch=0):
        module = Faulty(lr=lr, build=build)
        module.faults, module.first_batch = faults, first_batch
        return module

    return make


@pytest.fixture
def guard(tmp_path):
    """guard(**options): a guard that detects spikes after two steps."""
    return lambda **options: Guard(tmp_path / "skipped_steps.jsonl", **{"warmup_steps": 2, **options})


@pytest.fixture(params=["host", "device"])
def decision_device(request, monkeypatch) -> str:
    """Location of the skip decision: on the host, or on a (simulated) accelerator, where it must not be read."""
    if request.param == "device":
        monkeypatch.setattr("ldm.training.callbacks.skip_step.is_on_cpu", lambda value: False)
    return request.param


def log_entries(guard: Guard) -> list[dict]:
    return [json.loads(line) for line in guard.skip_log.read_text(encoding="utf-8").splitlines()]


def states_of(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """Return the optimizer state of each parameter."""
    return [state for inner in getattr(optimizer, "optimizers", [optimizer]) for state in inner.state.values()]


class RecordStates(Callback):
    """Records the weights and the optimizer state before each step and after the last."""

    def __init__(self) -> None:
        self.states: list[list[torch.Tensor]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        states = [value for state in states_of(trainer.optimizers[0]) for value in state.values()]
        tensors = [*module.trained.parameters(), *(value for value in states if isinstance(value, torch.Tensor))]
        self.states.append([value.detach().clone() for value in tensors])

    def on_train_end(self, trainer, module) -> None:
        self.on_train_batch_start(trainer, module, None, 0)

    def has_changed(self) -> list[bool]:
        """Return, for each step from the second on, True if all tensors changed and False if none did."""
        has_changed = []
        for before, after in zip(self.states[1:], self.states[2:], strict=False):
            equal = {torch.equal(a, b) for a, b in zip(before, after, strict=True)}
            assert len(equal) == 1
            has_changed.append(not equal.pop())
        return has_changed


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_step_leaves_weights_and_optimizer_state_unchanged(fit, make, guard, decision_device, fault):
    """Weights, moments and step counts stay bit-identical in the bad step and change in all other steps."""
    states, callback = RecordStates(), guard()
    fit(make({4: fault}), [states, callback], max_steps=7, gradient_clip_val=1.0)
    assert states.has_changed() == [True, True, True, False, True, True]
    (entry,) = log_entries(callback)
    why = {"l": "the loss is not finite", "g": "the gradient is not finite", "s": "spike"}[fault[0]]
    assert (entry["step"], entry["batch"], entry["why"]) == (4, 4, why)
    assert isinstance(entry["gradient_norm"], float) == (fault == "spike")
    assert callback.skipped_steps == 1 and callback.streak == 0


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (MOMENTUM, {}),
        (MOMENTUM, {"gradient_clip_val": None}),
        (partial(torch.optim.AdamW, fused=False), {}),
        (MuonAdamW, {"precision": "bf16-mixed"}),
        (partial(torch.optim.Adam, fused=True, weight_decay=0.1), {"precision": "bf16-mixed"}),
        (partial(torch.optim.RMSprop, momentum=0.9), {}),
    ],
)
def test_bad_step_is_skipped_with_every_optimizer(fit, make, guard, decision_device, build, options):
    """Covers optimizers with and without support for found_inf, bf16, and no clipping."""
    states = RecordStates()
    fit(make({3: "gradient is nan"}, build=build), [states, guard()], max_steps=5, **options)
    assert states.has_changed() == [True, True, False, True]


@pytest.mark.parametrize("faults", [{}, {3: "spike"}])
def test_skipping_is_equivalent_to_discarding_the_gradient(fit, make, guard, decision_device, faults):
    """The final weights equal those of a training run that computes the bad gradient but does not take the step."""

    class DiscardBadGradients(type(make({}))):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            if self.trainer.global_step in faults:
                closure()
            else:
                super().optimizer_step(epoch, batch_idx, optimizer, closure)

    guarded, discarding, callback = make(faults), DiscardBadGradients(lr=0.1, build=ADAMW), guard()
    discarding.first_batch = 0
    options = {"max_steps": 8, "gradient_clip_val": 0.1}
    ema, expected_ema = EMACallback(0.9), EMACallback(0.9)
    fit(guarded, [Budget(8), ema, callback], **options)
    fit(discarding, [Budget(8), expected_ema], **options)
    assert weights_sha256(guarded.trained) == weights_sha256(discarding.trained)
    assert callback.skipped_steps == len(faults) and callback.skip_log.exists() == bool(faults)
    assert ema.ema.num_updates == expected_ema.ema.num_updates == 8, (
        "a skipped step still updates the EMA, with the unchanged weights"
    )
    assert all(torch.equal(a, b) for a, b in zip(ema.ema.shadow, expected_ema.ema.shadow, strict=True))


def test_bad_micro_batch_skips_the_accumulated_step(fit, make, guard, decision_device):
    recorder, callback = RecordStates(), guard()
    fit(make({7: "loss is inf"}), [recorder, callback], max_steps=4, accumulate_grad_batches=3)
    (entry,) = log_entries(callback)
    assert entry["step"] == 2 and [loss == "inf" for loss in entry["losses"]] == [False, True, False]
    states = recorder.states[::3]
    assert [torch.equal(a[0], b[0]) for a, b in zip(states, states[1:], strict=False)] == [False, False, True, False]


def test_counts_are_logged_one_step_late_and_at_intervals(fit, make, guard):
    logger, callback = RecordingLogger(), guard(log_every=4)
    fit(make({4: "spike", 9: "spike"}), [callback], max_steps=10, logger=logger, log_every_n_steps=4)
    assert logger.metric("train/skipped_steps") == {3: 0, 5: 1, 7: 1, 9: 2}
    assert [entry["step"] for entry in log_entries(callback)] == [4, 9], "the last step is logged as well"


def test_gradients_of_unclipped_parameters_are_checked(fit, make, guard):
    """A learned loss scale, for example, is not clipped."""

    class Scaled(type(make({}))):
        def __init__(self):
            super().__init__(lr=0.1, build=ADAMW)
            self.scale, self.first_batch = nn.Parameter(torch.zeros(())), 0

        def losses(self, *batch):
            terms = super().losses(*batch)
            return {"loss": terms["loss"] + ((0 * self.scale).sqrt() if len(self.batches) == 3 else self.scale)}

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=True)

    states, callback = RecordStates(), guard()
    fit(Scaled(), [states, callback], max_steps=4)
    assert [entry["step"] for entry in log_entries(callback)] == [2] and states.has_changed() == [True, False, True]


def test_spike_limit_follows_the_geometric_mean():
    running = RunningNorm(max_spike=10, window=4)
    for norm in (8.0, 4.0, 2.0, 4.0):
        assert running.limit == MAX_FLOAT32
        running.add(norm)
    assert running.mean == pytest.approx(4) and running.limit == pytest.approx(40)
    running.add(64.0)
    assert running.mean == pytest.approx(4 * 10**0.25), "the fifth norm has weight 1/4 and is capped at the limit"
    state = running.mean, running.count
    for ignored in (0.0, math.inf, math.nan):
        running.add(ignored)
    assert (running.mean, running.count) == state


def test_spike_during_warm_up_does_not_inflate_the_limit():
    running = RunningNorm(max_spike=100, window=100)
    for k in range(100):
        running.add(1e30 if k == 50 else 1.0)
    assert 100 < running.limit < 250


def test_limit_adapts_to_persistently_high_norms(fit, make, guard, decision_device):
    """When norms rise by a factor of 300 and stay there, a few steps are skipped and training continues."""
    states, callback = RecordStates(), guard(skips_before_rollback=4)
    faults = dict.fromkeys(range(4, 12), "large loss")
    fit(make(faults, lr=1e-3), [states, callback], max_steps=12)
    assert states.has_changed() == [True, True, True, False, False, *[True] * 6] and callback.skipped_steps == 2


ROOT = Path(__file__).parents[3]
OPTIONS = [
    *STAGE_1,
    *("trainer.log_every_n_steps=2", "trainer.guard.skips_before_rollback=2", "optimizer.decay=constant"),
]
SAVE_EVERY_STEP = ["trainer.checkpoint_every_s=0"]


class RecordStage1(Callback):
    """Records digests of the autoencoder, the discriminator, its optimizer and the codebook after each step."""

    def __init__(self) -> None:
        self.digests: list[dict[str, str]] = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        moments = module.adversary.optimizer.state_dict()["state"]
        codebook = (module.regulariser.idle_steps, quantiser(module.trained).embedding.weight.detach())
        self.digests.append(
            {
                "autoencoder": weights_sha256(module.trained),
                "discriminator": weights_sha256(module.adversary.discriminator),
                "moments": str([[float(v.sum()) for v in state.values()] for state in moments.values()]),
                "codebook": str([float(value.double().sum()) for value in codebook]),
            }
        )


@pytest.mark.parametrize(
    ("source", "unchanged"),
    [
        ("autoencoder", {"autoencoder", "discriminator", "moments", "codebook"}),
        ("discriminator", {"discriminator", "moments"}),
    ],
)
def test_bad_step_also_skips_discriminator_and_codebook(fit, guard, decision_device, monkeypatch, source, unchanged):
    """Both networks skip a bad step of the autoencoder. Only the discriminator skips its own bad gradient."""
    adversary = partial(Adversary, channels=8, layers=1, start=0, ramp=2, weight=0.5)
    module = make_vae_training(partial(VectorQuantised, 16, restart_after=2), adversary, partial(ADAMW, lr=1e-2))
    regulariser = module.regulariser
    monkeypatch.setattr(module, "on_before_batch_transfer", lambda batch, _: IMAGES[: len(batch)])
    monkeypatch.setattr(module, "validation_step", lambda *_: None)
    reconstruct, accumulate_gradients = regulariser.reconstruct, module.adversary.accumulate_gradients

    def bad_reconstruct(model, images, *noise):
        bad = source == "autoencoder" and module.trainer.global_step == 2
        return reconstruct(model, images * math.nan if bad else images, *noise)

    def bad_gradients(images, reconstruction):
        terms = accumulate_gradients(images, reconstruction)
        if source == "discriminator" and module.trainer.global_step == 2:
            next(module.adversary.discriminator.parameters()).grad.fill_(math.inf)
        return terms

    monkeypatch.setattr(regulariser, "reconstruct", bad_reconstruct)
    monkeypatch.setattr(module.adversary, "accumulate_gradients", bad_gradients)
    recorder, callback = RecordStage1(), guard()
    fit(module, [Budget(4), recorder, callback], max_steps=4)
    before, skipped, after = recorder.digests[1:]
    assert {name for name in before if before[name] == skipped[name]} == unchanged
    assert not {name for name in skipped if skipped[name] == after[name]}
    (entry,) = log_entries(callback)
    why = "the loss is not finite" if source == "autoencoder" else "the discriminator's gradient is not finite"
    assert entry["step"] == 2 and entry["why"] == why


def test_too_many_consecutive_skips_trigger_a_rollback(fit, make, guard):
    callback = guard(skips_before_rollback=3)
    with pytest.raises(RollBack) as excinfo:
        fit(make({k: "spike" for k in (4, 5, 7, 8, 9, 10, 11)}), [callback], max_steps=20)
    rollback = excinfo.value
    assert (rollback.first_skip, rollback.step) == (7, 11), "step 9 was the third and was counted after step 10"
    assert rollback.choose_checkpoint({}) == (0, None)
    assert rollback.choose_checkpoint({1: "a", 7: "b", 8: "c"}) == (7, "b"), "8 was saved after the first skipped step"
    second_rollback = RollBack(7, 11, {**rollback.tallies, "went_to": 7})
    assert second_rollback.choose_checkpoint({1: "a", 7: "b"}) == (1, "a"), "the previous checkpoint may be the cause"
    assert second_rollback.choose_checkpoint({7: "b"}) == (7, "b")
    last_guard = guard(skips_before_rollback=3, max_rollbacks=1)
    last_guard.resume_after(rollback, 7)
    assert (last_guard.offset, last_guard.tallies["rollbacks"], last_guard.skipped_steps) == (4, 1, 5)
    last_guard.load_state_dict({**guard().state_dict(), "running": [1e-9, 7]})
    assert last_guard.running_norm.mean == rollback.average_norm > 1e-9, "norms before the rollback are not spikes"
    message = r"step 4 .*max_rollbacks=1\b.*skipped_steps\.jsonl.*optimizer\.lr .*0\.1.*trainer\.precision=32-true"
    with pytest.raises(UserError, match=message):
        fit(make({k: "loss is nan" for k in range(4, 9)}), [last_guard], max_steps=20, gradient_clip_val=1.0)


@pytest.mark.parametrize("stop", [5, 6, 11])
def test_resumed_guard_matches_an_uninterrupted_guard(fit, make, guard, tmp_path, stop):
    """Limits, counts, log and weights agree after a stop before, between or just after two bad steps."""
    faults = {5: "spike", 6: "gradient is inf", 9: "spike", 10: "spike"}

    def run(folder, steps, start=0, ckpt_path=None):
        module, callback = make(faults, first_batch=start), guard()
        budget = Budget(14, decay="constant")
        callbacks = [callback, budget, EMACallback(0.9), Checkpoints(folder, budget, 3600)]
        fit(module, callbacks, max_steps=steps, start=start, ckpt_path=ckpt_path)
        return module, callback

    expected, expected_guard = run(tmp_path / "uninterrupted", 14)
    entries = log_entries(expected_guard)
    expected_guard.skip_log.unlink()
    run(tmp_path / "stopped", stop)
    checkpoint = list_checkpoints(tmp_path / "stopped/checkpoints")[0].path
    resumed, resumed_guard = run(tmp_path / "stopped", 14, stop, str(checkpoint))
    assert weights_sha256(resumed.trained) == weights_sha256(expected.trained)
    assert resumed_guard.state_dict() == expected_guard.state_dict() and expected_guard.skipped_steps == 4
    assert log_entries(resumed_guard) == entries, "no entry appears twice"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_spike": math.nan}, r"max_spike=nan must .*\b1\b"),
        ({"skips_before_rollback": 1.5}, r"skips_before_rollback=1\.5 must .*(whole|integer)"),
        ({"max_rollbacks": -1}, r"max_rollbacks=-1 must .*\b0\b"),
    ],
)
def test_guard_rejects_invalid_options(guard, options, message):
    with pytest.raises(UserError, match=message):
        guard(**options)


@pytest.fixture(scope="module")
def pets(tmp_path_factory, make_images) -> Path:
    return make_images(tmp_path_factory.mktemp("workspace") / "pets", 24)


ONE_PHASE = "autoencoder.decoder_noise=0"
"""Without a second phase, a run can be continued with a larger budget as if it had had that budget from the start."""


@pytest.fixture
def train(call, pets, monkeypatch):
    """train(name, bad_batches, *options): train stage 1 with NaN losses in the bad batches."""
    monkeypatch.chdir(pets.parent)
    monkeypatch.setenv("LDM_CACHE", str(pets.parent / "cache"))
    losses = VAETraining.losses

    def train(name: str, bad_batches: set[int], *options: str):
        steps: list[tuple[int, int]] = []

        def bad_losses(self, images, *draws):
            terms = losses(self, images, *draws)
            if self._trainer is not None and self.trainer.training:
                steps.append((self.trainer.global_step, self.trainer.global_step + self.step_offset))
                if steps[-1][1] in bad_batches:
                    terms["loss"] = terms["loss"] * math.nan
            return terms

        monkeypatch.setattr(VAETraining, "losses", bad_losses)
        return call(ldm.train.main, *OPTIONS, f"name={name}", *options), steps

    return train


def test_training_rolls_back_and_continues_with_the_next_batches(train, pets):
    """Rolls back to a checkpoint, or to the start if there is none. Resuming later gives the same state."""
    result, steps = train("rolled-back", {3, 4}, "trainer.max_steps=8", *SAVE_EVERY_STEP, ONE_PHASE)
    assert result.code == 0, result
    assert steps[:6] == [(k, k) for k in range(6)] and steps[6:] == [(k, k + 3) for k in range(3, 8)]
    assert re.search(r"from step 3 .*back to step 3\b", result.out)
    run = Run.open("runs/vae/rolled-back")
    assert run.facts["figures"]["steps"] == 8 and run.facts["figures"]["skipped_steps"] == 2
    *skipped, rollback = [json.loads(line) for line in (run.path / "skipped_steps.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["why"], len(entry["images"])) for entry in skipped] == [
        (3, "the loss is not finite", 8),
        (4, "the loss is not finite", 8),
    ]
    assert set(skipped[0]["images"]) < {image.name for image in pets.iterdir()}
    assert rollback == {"step": 3, "rolled_back_to": 3, "batches_skipped": 3}
    with (run.path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/skipped_steps"]]
    assert (rows[-1]["train/skipped_steps"], rows[-1]["train/rollbacks"]) == ("2", "1")

    train("resumed", {3, 4}, "trainer.max_steps=6", *SAVE_EVERY_STEP, ONE_PHASE)
    result, steps = train("resumed", {3, 4}, "trainer.max_steps=8", "resume=true", ONE_PHASE)
    assert result.code == 0 and steps == [(6, 9), (7, 10)]
    assert states_equal(last_checkpoint("resumed"), last_checkpoint("rolled-back"))

    train("resumed", {3, 4}, "trainer.max_steps=9", "trainer.guard=null", "resume=true", ONE_PHASE)
    result, steps = train("resumed", {3, 4}, "trainer.max_steps=10", "trainer.guard=null", "resume=true", ONE_PHASE)
    assert result.code == 0 and steps == [(9, 12)], "the data offset is kept without a guard"
    result, steps = train("resumed", {3, 4}, "trainer.max_steps=11", "resume=true", ONE_PHASE)
    assert result.code == 0 and steps == [(10, 13)]

    result, steps = train("from-scratch", {0, 1}, "trainer.max_steps=3", ONE_PHASE)
    assert result.code == 0 and [batch for _, batch in steps] == list(range(6))


def last_checkpoint(name: str) -> list:
    """Return the step, weights, moments, averaged weights and guard state of the newest checkpoint."""
    saved = torch.load(list_checkpoints(Path(f"runs/vae/{name}/checkpoints"))[0].path, weights_only=True)
    states = [saved["callbacks"][callback] for callback in ("EMACallback", "Guard")]
    return [saved["global_step"], saved["state_dict"], saved["optimizer_states"], *states]


def test_training_stops_and_suggests_remedies_after_max_rollbacks(train):
    options = ("trainer.max_steps=9", "trainer.guard.max_rollbacks=1", *SAVE_EVERY_STEP)
    result, steps = train("diverged", set(range(2, 99)), *options)
    assert result.code == 2 and len(steps) == 5 + 3
    assert "max_rollbacks=1" in result.err and "optimizer.lr" in result.err and "Traceback" not in result.err


def test_without_a_guard_no_step_is_skipped(train):
    result, _ = train("unguarded", {1}, "trainer.max_steps=3", "trainer.guard=null")
    assert "skipped_steps" not in result.out and not Path("runs/vae/unguarded/skipped_steps.jsonl").exists()


RANK_1_SCRIPT = """
import math
import ldm.train
from ldm.training.modules.autoencoder import VAETraining

losses = VAETraining.losses

def bad_losses(self, images, draws):
    terms = losses(self, images, draws)
    if self._trainer is not None and self.trainer.training:
        print(f"rank {self.global_rank} is at {self.trainer.global_step}, {self.data_step};", flush=True)
        if self.data_step in (1, 2) and self.global_rank == 1:
            terms["loss"] = terms["loss"] + math.nan
    return terms

VAETraining.losses = bad_losses
ldm.train.main()
"""


@pytest.mark.slow  # two processes that import everything: up to 25 s on a busy machine
def test_all_ranks_roll_back_if_one_has_bad_losses(pets, tmp_path):
    """Both ranks skip the steps, although only rank 1 has bad losses, and continue from the same checkpoint."""
    script = tmp_path / "bad_rank_1.py"
    script.write_text(RANK_1_SCRIPT)
    options = ["trainer.max_steps=4", "trainer.devices=2", "trainer.strategy=ddp", "name=ranks"]
    process = subprocess.run(
        [sys.executable, str(script), *OPTIONS, *SAVE_EVERY_STEP, *options],
        cwd=pets.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LDM_CACHE": str(pets.parent / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    steps = [(int(step), int(batch)) for step, batch in re.findall(r"is at (\d+), (\d+);", process.stdout)]
    assert sorted(steps) == sorted(2 * [(0, 0), (1, 1), (2, 2), (3, 3), (1, 4), (2, 5), (3, 6)])
