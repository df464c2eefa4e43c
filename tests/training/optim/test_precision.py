"""ldm.training.optim.precision: what `auto` becomes, and what is refused."""

import pytest
import torch

from ldm.errors import UserError
from ldm.training.optim import precision
from ldm.training.optim.precision import GAIN_NEEDED, bf16_gain, choose_precision


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("gain", "chosen"),
    [(0.3, "32-true"), (GAIN_NEEDED - 0.01, "32-true"), (GAIN_NEEDED, "bf16-mixed"), (3.0, "bf16-mixed")],
)
@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_a_cpu_is_measured(monkeypatch, capsys, accelerator, gain, chosen):
    monkeypatch.setattr(precision, "bf16_gain", lambda: gain)
    assert choose_precision("auto", accelerator) == chosen
    assert f"training in {chosen}" in capsys.readouterr().out


def test_a_gpu_takes_bf16_and_mps_fp32(monkeypatch):
    monkeypatch.setattr(precision, "bf16_gain", None)  # not to be called
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_precision("auto", "auto") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_precision("auto", "auto") == choose_precision("auto", "gpu") == "bf16-mixed"


@pytest.mark.parametrize(
    ("requested", "name"),
    [("32-true", "32-true"), ("bf16-mixed", "bf16-mixed"), (32, "32-true"), ("32", "32-true"), ("bf16", "bf16-mixed")],
)
def test_what_is_asked_for_is_taken(requested, name):
    assert choose_precision(requested, "cpu") == name


@pytest.mark.parametrize("requested", ["bf16-true", "16-mixed", 16, None])
def test_what_does_not_train_is_refused(requested):
    """Networks are handed fp32: wholly in another type they fail at the first convolution."""
    with pytest.raises(UserError, match="is unknown. Choose one of: auto, bf16-mixed, 32-true"):
        choose_precision(requested, "cpu")


def test_the_measurement_is_a_ratio_of_times():
    assert 0.01 < bf16_gain(repeats=1) < 100
