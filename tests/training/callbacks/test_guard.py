"""guard: what a step that went wrong leaves as it is, how it is noted, and how training goes back."""

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
from ldm.runs.checkpoints import manifests
from ldm.runs.run import Run
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.callbacks.guard import Guard, RollBack
from ldm.training.callbacks.skip_step import LARGEST, RunningNorm
from ldm.training.modules.adversary import Adversary
from ldm.training.modules.autoencoder import VAETraining
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from ldm.training.optim.muon import MuonAdamW
from tests.small_training import IMAGES, STAGE_1, Rows, same, vae

ADAMW = partial(torch.optim.AdamW, fused=True)
MOMENTUM = partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)
FAULTS = ["loss is nan", "loss is inf", "gradient is nan", "gradient is inf", "spike"]


def spoil(module: nn.Module, loss: torch.Tensor, fault: str) -> torch.Tensor:
    """A loss that is not finite while its own gradient is, a gradient that is not while the loss is, or 1e8 of both."""
    if fault.startswith("loss"):
        return loss + float(fault.split()[-1])
    if fault == "spike":
        return 1e8 * loss
    if fault == "higher":
        return 300 * loss
    parameter = next(module.parameters())
    handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * float(fault.split()[-1]))[1])
    return loss


@pytest.fixture
def make(make_module):
    """make(faults, lr=0.1, build=ADAMW): a module of one matrix, and what goes wrong with which batch of the order."""

    class Faulty(make_module):
        faults: dict[int, str] = {}

        def losses(self, x, *draws):
            terms = super().losses(x, *draws)
            batch = len(self.seen) - 1 + self.first
            if batch in self.faults:
                terms["loss"] = spoil(self.trained, terms["loss"], self.faults[batch])
            return terms

    def make(faults, lr=0.1, build=ADAMW, first=0):
        module = Faulty(lr=lr, build=build)
        module.faults, module.first = faults, first
        return module

    return make


@pytest.fixture
def guard(tmp_path):
    """guard(**options): spikes are told after two steps."""
    return lambda **options: Guard(tmp_path / "skipped_steps.jsonl", **{"warmup_steps": 2, **options})


@pytest.fixture(params=["host", "device"])
def where(request, monkeypatch) -> str:
    """Where the verdict is known: on the host at once, or as on an accelerator, in a tensor that is not looked at."""
    if request.param == "device":
        monkeypatch.setattr("ldm.training.callbacks.skip_step.is_on_host", lambda value: False)
    return request.param


def notes(guard: Guard) -> list[dict]:
    return [json.loads(line) for line in guard.notes.read_text(encoding="utf-8").splitlines()]


def states_of(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """What it keeps of each parameter."""
    return [state for inner in getattr(optimizer, "inner", [optimizer]) for state in inner.state.values()]


class Watched(Callback):
    """Weights and the optimizer's state before and after each step."""

    def __init__(self) -> None:
        self.states: list[list[torch.Tensor]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        states = [value for state in states_of(trainer.optimizers[0]) for value in state.values()]
        found = [*module.trained.parameters(), *(value for value in states if isinstance(value, torch.Tensor))]
        self.states.append([value.detach().clone() for value in found])

    def on_train_end(self, trainer, module) -> None:
        self.on_train_batch_start(trainer, module, None, 0)

    def moved(self) -> list[bool]:
        """Step by step: whether all of it changed (True) or nothing (False)."""
        found = []
        for before, after in zip(self.states[1:], self.states[2:], strict=False):
            same = {torch.equal(a, b) for a, b in zip(before, after, strict=True)}
            assert len(same) == 1
            found.append(not same.pop())
        return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_goes_wrong_changes_nothing(fit, make, guard, where, fault):
    """Weights, moments and the step count, bit for bit; the steps around it change all of them."""
    watched, watch = Watched(), guard()
    fit(make({4: fault}), [watched, watch], max_steps=7, gradient_clip_val=1.0)
    assert watched.moved() == [True, True, True, False, True, True]
    (note,) = notes(watch)
    what = {"l": "the loss is not finite", "g": "the gradient is not finite", "s": "spike"}[fault[0]]
    assert (note["step"], note["batch"], note["why"]) == (4, 4, what)
    assert isinstance(note["gradient_norm"], float) == (fault == "spike")
    assert watch.skipped_steps == 1 and watch.streak == 0


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
def test_so_it_is_with_every_optimizer(fit, make, guard, where, build, options):
    """Those that know found_inf, and those that do not; in bf16, and without clipping."""
    watched = Watched()
    fit(make({3: "gradient is nan"}, build=build), [watched, guard()], max_steps=5, **options)
    assert watched.moved() == [True, True, False, True]


@pytest.mark.parametrize("faults", [{}, {3: "spike"}])
def test_training_goes_on_as_if_the_step_had_not_been_taken(fit, make, guard, where, faults):
    """It ends with the weights of a training that computes the step's gradient and throws it away; good steps stay."""

    class Discards(type(make({}))):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            if self.trainer.global_step in faults:
                closure()
            else:
                super().optimizer_step(epoch, batch_idx, optimizer, closure)

    guarded, discards, watch = make(faults), Discards(lr=0.1, build=ADAMW), guard()
    discards.first = 0
    options = {"max_steps": 8, "gradient_clip_val": 0.1}
    first, second = EMACallback(0.9), EMACallback(0.9)
    fit(guarded, [Budget(8), first, watch], **options)
    fit(discards, [Budget(8), second], **options)
    assert weights_sha256(guarded.trained) == weights_sha256(discards.trained)
    assert watch.skipped_steps == len(faults) and watch.notes.exists() == bool(faults)
    assert first.ema.num_updates == second.ema.num_updates == 8, "the unchanged weights were averaged once more"
    assert all(torch.equal(a, b) for a, b in zip(first.ema.shadow, second.ema.shadow, strict=True))


def test_one_bad_part_spoils_an_accumulated_step(fit, make, guard, where):
    watched, watch = Watched(), guard()
    fit(make({7: "loss is inf"}), [watched, watch], max_steps=4, accumulate_grad_batches=3)
    (note,) = notes(watch)
    assert note["step"] == 2 and [loss == "inf" for loss in note["losses"]] == [False, True, False]
    moved = watched.states[::3]
    assert [torch.equal(a[0], b[0]) for a, b in zip(moved, moved[1:], strict=False)] == [False, False, True, False]


def test_the_counts_are_logged_one_step_late_and_at_intervals(fit, make, guard):
    rows, watch = Rows(), guard(log_every=4)
    fit(make({4: "spike", 9: "spike"}), [watch], max_steps=10, logger=rows, log_every_n_steps=4)
    assert rows.of("train/skipped_steps") == {3: 0, 5: 1, 7: 1, 9: 2}
    assert [note["step"] for note in notes(watch)] == [4, 9], "the last step's too"


def test_a_gradient_beside_the_clipped_ones_counts(fit, make, guard):
    """A learned scale of the loss is the optimizer's too."""

    class Scaled(type(make({}))):
        def __init__(self):
            super().__init__(lr=0.1, build=ADAMW)
            self.scale, self.first = nn.Parameter(torch.zeros(())), 0

        def losses(self, *batch):
            terms = super().losses(*batch)
            return {"loss": terms["loss"] + ((0 * self.scale).sqrt() if len(self.seen) == 3 else self.scale)}

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=True)

    watched, watch = Watched(), guard()
    fit(Scaled(), [watched, watch], max_steps=4)
    assert [note["step"] for note in notes(watch)] == [2] and watched.moved() == [True, False, True]


def test_spikes_are_told_by_the_geometric_mean():
    running = RunningNorm(max_spike=10, memory=4)
    for norm in (8.0, 4.0, 2.0, 4.0):
        assert running.limit == LARGEST
        running.add(norm)
    assert running.mean == pytest.approx(4) and running.limit == pytest.approx(40)
    running.add(64.0)
    assert running.mean == pytest.approx(4 * 10**0.25), "the fifth counts for a quarter, and for no more than the limit"
    known = running.mean, running.count
    for nothing in (0.0, math.inf, math.nan):
        running.add(nothing)
    assert (running.mean, running.count) == known


def test_a_spike_before_any_can_be_told_does_not_blind():
    running = RunningNorm(max_spike=100, memory=100)
    for k in range(100):
        running.add(1e30 if k == 50 else 1.0)
    assert 100 < running.limit < 250


def test_norms_that_stay_high_are_how_they_are(fit, make, guard, where):
    """300 times what was: a few steps are left out, and training goes on."""
    watched, watch = Watched(), guard(skips_before_rollback=4)
    faults = dict.fromkeys(range(4, 12), "higher")
    fit(make(faults, lr=1e-3), [watched, watch], max_steps=12)
    assert watched.moved() == [True, True, True, False, False, *[True] * 6] and watch.skipped_steps == 2


ROOT = Path(__file__).parents[3]
OPTIONS = [
    *STAGE_1,
    *("trainer.log_every_n_steps=2", "trainer.guard.skips_before_rollback=2", "optimizer.decay=constant"),
]
OFTEN = ["trainer.checkpoint_every_s=0"]


class Stage1(Callback):
    """Of stage 1 after each step: the autoencoder, the discriminator with its optimizer, the codebook's idle counts."""

    def __init__(self) -> None:
        self.found: list[dict[str, str]] = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        moments = module.adversary.optimizer.state_dict()["state"]
        idle = {"idle": module.regulariser.idle_steps, "codes": quantiser(module.trained).embedding.weight.detach()}
        self.found.append(
            {
                "autoencoder": weights_sha256(module.trained),
                "discriminator": weights_sha256(module.adversary.discriminator),
                "moments": str([[float(v.sum()) for v in state.values()] for state in moments.values()]),
                "codebook": str([float(value.double().sum()) for value in idle.values()]),
            }
        )


@pytest.mark.parametrize(
    ("whose", "still"),
    [
        ("autoencoder's", {"autoencoder", "discriminator", "moments", "codebook"}),
        ("discriminator's", {"discriminator", "moments"}),
    ],
)
def test_stage_1_leaves_the_other_side_and_the_codebook_as_they_are(fit, guard, where, monkeypatch, whose, still):
    """A bad step of the autoencoder stops both sides; gradients of the discriminator's own stop that one alone."""
    adversary = partial(Adversary, channels=8, layers=1, start=0, ramp=2, weight=0.5)
    module = vae(partial(VectorQuantised, 16, restart_after=2), adversary, partial(ADAMW, lr=1e-2))
    rule = module.regulariser
    monkeypatch.setattr(module, "on_before_batch_transfer", lambda batch, _: IMAGES[: len(batch)])
    monkeypatch.setattr(module, "validation_step", lambda *_: None)
    reconstruct, learn = rule.reconstruct, module.adversary.learn

    def spoiled(model, images, *noise):
        bad = whose == "autoencoder's" and module.trainer.global_step == 2
        return reconstruct(model, images * math.nan if bad else images, *noise)

    def spoiled_too(images, reconstruction):
        found = learn(images, reconstruction)
        if whose == "discriminator's" and module.trainer.global_step == 2:
            next(module.adversary.discriminator.parameters()).grad.fill_(math.inf)
        return found

    monkeypatch.setattr(rule, "reconstruct", spoiled)
    monkeypatch.setattr(module.adversary, "learn", spoiled_too)
    after, watch = Stage1(), guard()
    fit(module, [Budget(4), after, watch], max_steps=4)
    one, two, three = after.found[1:]
    assert {name for name in one if one[name] == two[name]} == still
    assert not {name for name in two if two[name] == three[name]}
    (note,) = notes(watch)
    why = "the loss is not finite" if whose == "autoencoder's" else "the discriminator's gradient is not finite"
    assert note["step"] == 2 and note["why"] == why


def test_too_many_in_a_row_ask_for_a_roll_back(fit, make, guard):
    watch = guard(skips_before_rollback=3)
    with pytest.raises(RollBack) as asked:
        fit(make({k: "spike" for k in (4, 5, 7, 8, 9, 10, 11)}), [watch], max_steps=20)
    assert (asked.value.began, asked.value.at) == (7, 11), "9 was the third, and was read after 10"
    assert asked.value.choose({}) == (0, None)
    assert asked.value.choose({1: "a", 7: "b", 8: "c"}) == (7, "b"), "8 was saved amid them"
    again = RollBack(7, 11, {**asked.value.tallies, "went_to": 7})
    assert again.choose({1: "a", 7: "b"}) == (1, "a"), "its weights may be what is wrong"
    assert again.choose({7: "b"}) == (7, "b")
    last = guard(skips_before_rollback=3, max_rollbacks=1)
    last.go_on_after(asked.value, 7)
    assert (last.offset, last.tallies["rollbacks"], last.skipped_steps) == (4, 1, 5)
    low = {**guard().state_dict(), "running": [1e-9, 7]}
    last.load_state_dict(low)
    assert last.running.mean == asked.value.average > 1e-9, "norms that are as high once more are no spikes"
    message = "steps from 4 on .* also after 1 roll-backs .*skipped_steps.jsonl .*optimizer.lr .*is 0.1.*32-true"
    with pytest.raises(UserError, match=message):
        fit(make({k: "loss is nan" for k in range(4, 9)}), [last], max_steps=20, gradient_clip_val=1.0)


@pytest.mark.parametrize("stop", [5, 6, 11])
def test_a_resumed_guard_goes_on_as_one_never_stopped(fit, make, guard, tmp_path, stop):
    """Amid a streak, just after a step that went wrong, and later: limits, counts, notes and weights."""
    faults = {5: "spike", 6: "gradient is inf", 9: "spike", 10: "spike"}

    def run(place, steps, start=0, ckpt_path=None):
        module, watch = make(faults, first=start), guard()
        budget = Budget(14, decay="constant")
        callbacks = [watch, budget, EMACallback(0.9), Checkpoints(place, budget, 3600)]
        fit(module, callbacks, max_steps=steps, start=start, ckpt_path=ckpt_path)
        return module, watch

    whole, through = run(tmp_path / "whole", 14)
    written = notes(through)
    through.notes.unlink()
    run(tmp_path / "parts", stop)
    rest, resumed = run(tmp_path / "parts", 14, stop, str(manifests(tmp_path / "parts/checkpoints")[0].path))
    assert weights_sha256(rest.trained) == weights_sha256(whole.trained)
    assert resumed.state_dict() == through.state_dict() and through.skipped_steps == 4
    assert notes(resumed) == written, "none twice"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_spike": math.nan}, "max_spike=nan must be above 1"),
        ({"skips_before_rollback": 1.5}, "skips_before_rollback=1.5 must be a whole number"),
        ({"max_rollbacks": -1}, "max_rollbacks=-1 must be 0 or more"),
    ],
)
def test_numbers_out_of_range(guard, options, message):
    with pytest.raises(UserError, match=message):
        guard(**options)


@pytest.fixture(scope="module")
def pets(tmp_path_factory, make_images) -> Path:
    return make_images(tmp_path_factory.mktemp("place") / "pets", 24)


@pytest.fixture
def train(call, pets, monkeypatch):
    """train(bad, *options): stage 1 through the front door, with losses that are NaN on these batches of the order."""
    monkeypatch.chdir(pets.parent)
    monkeypatch.setenv("LDM_CACHE", str(pets.parent / "cache"))
    losses = VAETraining.losses

    def train(name: str, bad: set[int], *options: str):
        seen: list[tuple[int, int]] = []

        def spoiled(self, images, *draws):
            terms = losses(self, images, *draws)
            if self._trainer is not None and self.trainer.training:
                seen.append((self.trainer.global_step, self.trainer.global_step + self.step_offset))
                if seen[-1][1] in bad:
                    terms["loss"] = terms["loss"] * math.nan
            return terms

        monkeypatch.setattr(VAETraining, "losses", spoiled)
        return call(ldm.train.main, *OPTIONS, f"name={name}", *options), seen

    return train


def test_training_goes_back_and_on_with_the_batches_after(train, pets):
    """From a checkpoint, else from the beginning; a run that is resumed later ends as one never stopped."""
    ended, seen = train("back", {3, 4}, "trainer.max_steps=8", *OFTEN)
    assert ended.code == 0, ended
    assert seen[:6] == [(k, k) for k in range(6)] and seen[6:] == [(k, k + 3) for k in range(3, 8)]
    assert "the steps from 3 on went wrong: back to step 3" in ended.out
    run = Run.open("runs/vae/back")
    assert run.facts["figures"]["steps"] == 8 and run.facts["figures"]["skipped_steps"] == 2
    *skipped, back = [json.loads(line) for line in (run.path / "skipped_steps.jsonl").read_text().splitlines()]
    assert [(note["step"], note["why"], len(note["images"])) for note in skipped] == [
        (3, "the loss is not finite", 8),
        (4, "the loss is not finite", 8),
    ]
    assert set(skipped[0]["images"]) < {image.name for image in pets.iterdir()}
    assert back == {"step": 3, "rolled_back_to": 3, "batches_passed_over": 3}
    with (run.path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/skipped_steps"]]
    assert (rows[-1]["train/skipped_steps"], rows[-1]["train/rollbacks"]) == ("2", "1")

    train("parts", {3, 4}, "trainer.max_steps=6", *OFTEN)
    ended, seen = train("parts", {3, 4}, "trainer.max_steps=8", "resume=true")
    assert ended.code == 0 and seen == [(6, 9), (7, 10)]
    assert same(last_checkpoint("parts"), last_checkpoint("back"))

    train("parts", {3, 4}, "trainer.max_steps=9", "trainer.guard=null", "resume=true")
    ended, seen = train("parts", {3, 4}, "trainer.max_steps=10", "trainer.guard=null", "resume=true")
    assert ended.code == 0 and seen == [(9, 12)], "the data does not go back where no guard knows of it"
    ended, seen = train("parts", {3, 4}, "trainer.max_steps=11", "resume=true")
    assert ended.code == 0 and seen == [(10, 13)]

    ended, seen = train("anew", {0, 1}, "trainer.max_steps=3")
    assert ended.code == 0 and [batch for _, batch in seen] == list(range(6))


def last_checkpoint(name: str) -> list:
    """Weights, moments, averaged weights, and what the guard knows."""
    found = torch.load(manifests(Path(f"runs/vae/{name}/checkpoints"))[0].path, weights_only=True)
    known = [found["callbacks"][callback] for callback in ("EMACallback", "Guard")]
    return [found["global_step"], found["state_dict"], found["optimizer_states"], *known]


def test_after_so_many_roll_backs_training_ends_with_what_to_try(train):
    options = ("trainer.max_steps=9", "trainer.guard.max_rollbacks=1", *OFTEN)
    ended, seen = train("lost", set(range(2, 99)), *options)
    assert ended.code == 2 and len(seen) == 5 + 3
    assert "also after 1 roll-backs" in ended.err and "optimizer.lr" in ended.err and "Traceback" not in ended.err


def test_without_a_guard_nothing_is_looked_at(train):
    ended, _ = train("unguarded", {1}, "trainer.max_steps=3", "trainer.guard=null")
    assert "skipped" not in ended.out and not Path("runs/vae/unguarded/skipped_steps.jsonl").exists()


ON_RANK_1 = """
import math
import ldm.train
from ldm.training.modules.autoencoder import VAETraining

losses = VAETraining.losses

def spoiled(self, images, draws):
    terms = losses(self, images, draws)
    if self._trainer is not None and self.trainer.training:
        print(f"rank {self.global_rank} is at {self.trainer.global_step}, {self.data_step};", flush=True)
        if self.data_step in (1, 2) and self.global_rank == 1:
            terms["loss"] = terms["loss"] + math.nan
    return terms

VAETraining.losses = spoiled
ldm.train.main()
"""


@pytest.mark.slow  # two processes that import everything: up to 25 s on a busy machine
def test_ranks_go_back_together_where_one_alone_went_wrong(pets, tmp_path):
    """Both leave out the steps, though the other's losses were finite, and both go on from the same checkpoint."""
    script = tmp_path / "on_rank_1.py"
    script.write_text(ON_RANK_1)
    options = ["trainer.max_steps=4", "trainer.devices=2", "trainer.strategy=ddp", "name=ranks"]
    done = subprocess.run(
        [sys.executable, str(script), *OPTIONS, *OFTEN, *options],
        cwd=pets.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LDM_CACHE": str(pets.parent / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [(int(step), int(batch)) for step, batch in re.findall(r"is at (\d+), (\d+);", done.stdout)]
    assert sorted(seen) == sorted(2 * [(0, 0), (1, 1), (2, 2), (3, 3), (1, 4), (2, 5), (3, 6)])
