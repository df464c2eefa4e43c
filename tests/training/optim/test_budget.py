"""ldm.training.optim.budget.Budget: the learning rate and the end, by steps and by time."""

import math

import pytest
from lightning.pytorch import Callback

from ldm.training.optim.budget import Budget


class Rates(Callback):
    """Learning rate of each batch, as it was used."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.found.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.fixture
def clock(monkeypatch):
    """A second per look at the clock that Budget sees after each batch, and none in between."""

    class Clock:
        now_s = 100.0

        def perf_counter(self) -> float:
            return self.now_s

    clock = Clock()
    monkeypatch.setattr("ldm.training.optim.budget.time", clock)
    return clock


class Ticks(Callback):
    def __init__(self, clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def on_train_batch_start(self, *_) -> None:
        self.clock.now_s += self.seconds


SHAPES = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "constant": lambda p: 1.0,
}


@pytest.mark.parametrize("decay", SHAPES)
def test_the_rate_by_steps(fit, make_module, decay):
    rates = Rates()
    trainer = fit(make_module(lr=0.5), [Budget(20, None, 5, decay), rates], max_steps=20)
    assert trainer.global_step == 20
    expected = [0.5 * min(1, (k + 1) / 5) * SHAPES[decay](k / 20) for k in range(20)]
    assert rates.found == pytest.approx(expected)


def test_the_rate_and_the_end_by_time(fit, make_module, clock):
    """2 seconds a step: 10 seconds are 5 steps, and the rate falls to nothing on the way."""
    rates = Rates()
    budget = Budget(max_time_s=10.0)
    trainer = fit(make_module(lr=0.5), [Ticks(clock, 2.0), budget, rates], max_steps=-1)
    assert trainer.global_step == 5 and budget.elapsed_s == 10
    assert rates.found == pytest.approx([0.5 * (1 - seconds / 10) for seconds in (2, 4, 6, 8, 10)])


def test_of_two_budgets_the_nearer_counts(fit, make_module, clock):
    rates = Rates()
    trainer = fit(make_module(), [Ticks(clock, 1.0), Budget(4, 100.0), rates], max_steps=4)
    assert trainer.global_step == 4
    assert rates.found == pytest.approx([0.99, 0.75, 0.5, 0.25])


def test_accumulated_steps_are_counted_as_one_and_never_cut(fit, make_module, clock):
    """The time is over after the third of five batches; the step is finished first."""
    rates = Rates()
    module = make_module()
    trainer = fit(
        module,
        [Ticks(clock, 1.0), Budget(max_time_s=3.0, decay="constant"), rates],
        max_steps=-1,
        accumulate_grad_batches=5,
    )
    assert trainer.global_step == 1 and len(module.seen) == 5


def test_time_before_a_resume_counts(clock):
    budget = Budget(max_time_s=10.0)
    budget.load_state_dict({"spent_s": 6.0})
    budget.on_train_start(type("Trainer", (), {"optimizers": []})(), None)
    clock.now_s += 1
    assert budget.elapsed_s == 7 and budget.progress(0) == pytest.approx(0.7)
    assert budget.state_dict() == {"spent_s": 7.0}


@pytest.mark.parametrize(
    ("budget", "said", "expected"),
    [
        (Budget(200), "200 steps", "30 seconds"),
        (Budget(1000), "1000 steps", "4.5 minutes"),
        (Budget(max_time_s=90.0), "1.5 minutes", "1.5 minutes"),
        (Budget(1000, 30.0), "1000 steps or 0.5 minutes", "30 seconds"),
    ],
)
def test_the_budget_in_words(budget, said, expected):
    assert str(budget) == said
    assert budget.expected(step=100, seconds_per_step=0.3) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs a budget: trainer\.max_steps=N or trainer\.max_time=HH:MM:SS"),
        ({"max_steps": 5, "decay": "sudden"}, "decay=sudden is unknown. Choose one of: linear, cosine, constant"),
    ],
)
def test_what_cannot_be_budgeted_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(**options)
