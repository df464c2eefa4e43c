"""ldm.training.optim.budget.Budget: learning rate schedule and end of training for budgets in steps or time."""

import math

import pytest
from lightning.pytorch import Callback

from ldm.training.optim.budget import Budget


class RecordRates(Callback):
    """Records the learning rate used for each batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.fixture
def clock(monkeypatch):
    """A fake clock for Budget that only the test advances."""

    class Clock:
        now_s = 100.0

        def perf_counter(self) -> float:
            return self.now_s

    clock = Clock()
    monkeypatch.setattr("ldm.training.optim.budget.time", clock)
    return clock


class AdvanceClock(Callback):
    """Advances the clock by a fixed time per batch."""

    def __init__(self, clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def on_train_batch_start(self, *_) -> None:
        self.clock.now_s += self.seconds


DECAYS = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "constant": lambda p: 1.0,
}


def test_second_phase_has_its_own_warmup_and_decay(fit, make_module):
    rates, starts = RecordRates(), []
    module = make_module(lr=0.5)
    module.start_second_phase = lambda: starts.append(module.trainer.global_step)
    budget = Budget(20, None, 3, "linear", second_phase_at=0.6)
    fit(module, [budget, rates], max_steps=20)
    expected = [0.5 * min(1, (k + 1) / 3) * (1 - k / n) for n in (12, 8) for k in range(n)]
    assert rates.values == pytest.approx(expected)
    assert starts == [12] and budget.state_dict()["second_phase_step"] == 12


@pytest.mark.parametrize(("max_steps", "second_phase_step"), [(20, 12), (40, None)])
def test_resume_with_a_larger_budget_returns_to_the_first_phase(max_steps, second_phase_step):
    budget = Budget(max_steps, second_phase_at=0.6)
    budget.load_state_dict({"spent_s": 1.0, "second_phase_step": 12})
    budget.on_train_start(type("Trainer", (), {"optimizers": [], "global_step": 15})(), None)
    assert budget.second_phase_step == second_phase_step


@pytest.mark.parametrize("decay", DECAYS)
def test_learning_rate_follows_a_step_budget(fit, make_module, decay):
    rates = RecordRates()
    trainer = fit(make_module(lr=0.5), [Budget(20, None, 5, decay), rates], max_steps=20)
    assert trainer.global_step == 20
    expected = [0.5 * min(1, (k + 1) / 5) * DECAYS[decay](k / 20) for k in range(20)]
    assert rates.values == pytest.approx(expected)


def test_learning_rate_and_end_follow_a_time_budget(fit, make_module, clock):
    """At 2 seconds per step, a budget of 10 seconds allows 5 steps, over which the learning rate decays to zero."""
    rates = RecordRates()
    budget = Budget(max_time_s=10.0)
    trainer = fit(make_module(lr=0.5), [AdvanceClock(clock, 2.0), budget, rates], max_steps=-1)
    assert trainer.global_step == 5 and budget.elapsed_s == 10
    assert rates.values == pytest.approx([0.5 * (1 - seconds / 10) for seconds in (2, 4, 6, 8, 10)])


def test_learning_rate_follows_the_budget_with_the_larger_spent_fraction(fit, make_module, clock):
    rates = RecordRates()
    trainer = fit(make_module(), [AdvanceClock(clock, 1.0), Budget(4, 100.0), rates], max_steps=4)
    assert trainer.global_step == 4
    assert rates.values == pytest.approx([0.99, 0.75, 0.5, 0.25])


def test_accumulated_step_is_completed_after_the_time_is_up(fit, make_module, clock):
    """The time is up after the third of five batches, but the step is completed with all five."""
    rates = RecordRates()
    module = make_module()
    trainer = fit(
        module,
        [AdvanceClock(clock, 1.0), Budget(max_time_s=3.0, decay="constant"), rates],
        max_steps=-1,
        accumulate_grad_batches=5,
    )
    assert trainer.global_step == 1 and len(module.batches) == 5


def test_elapsed_time_includes_the_time_before_a_resume(clock):
    budget = Budget(max_time_s=10.0)
    budget.load_state_dict({"spent_s": 6.0})
    budget.on_train_start(type("Trainer", (), {"optimizers": [], "global_step": 0})(), None)
    clock.now_s += 1
    assert budget.elapsed_s == 7 and budget.progress(0) == pytest.approx(0.7)
    assert budget.state_dict() == {"spent_s": 7.0, "second_phase_step": None}


@pytest.mark.parametrize(
    ("budget", "text", "duration"),
    [
        (Budget(200), "200 steps", "30 seconds"),
        (Budget(1000), "1000 steps", "4.5 minutes"),
        (Budget(max_time_s=90.0), "1.5 minutes", "1.5 minutes"),
        (Budget(1000, 30.0), "1000 steps or 0.5 minutes", "30 seconds"),
    ],
)
def test_budget_and_expected_duration_as_text(budget, text, duration):
    assert str(budget) == text
    assert budget.expected_duration(step=100, seconds_per_step=0.3) == duration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"budget.*trainer\.max_steps=N.*trainer\.max_time=HH:MM:SS"),
        ({"max_steps": 5, "decay": "sudden"}, r"optimizer\.decay=sudden.*linear, cosine, constant"),
    ],
)
def test_budget_rejects_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(**options)
