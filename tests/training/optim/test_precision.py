"""ldm.training.optim.precision: the choice for "auto", aliases, and unknown precisions."""

import pytest
import torch

from ldm.errors import UserError
from ldm.training.optim import precision
from ldm.training.optim.precision import MIN_BF16_SPEEDUP, choose_precision, measure_bf16_speedup


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("speedup", "expected"),
    [(0.3, "32-true"), (MIN_BF16_SPEEDUP - 0.01, "32-true"), (MIN_BF16_SPEEDUP, "bf16-mixed"), (3.0, "bf16-mixed")],
)
@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_auto_benchmarks_the_cpu(monkeypatch, capsys, accelerator, speedup, expected):
    monkeypatch.setattr(precision, "measure_bf16_speedup", lambda: speedup)
    assert choose_precision("auto", accelerator) == expected
    assert f"training in {expected}" in capsys.readouterr().out


def test_auto_selects_bf16_on_cuda_and_fp32_on_mps(monkeypatch):
    monkeypatch.setattr(precision, "measure_bf16_speedup", None)  # must not be called
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_precision("auto", "auto") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_precision("auto", "auto") == choose_precision("auto", "gpu") == "bf16-mixed"


@pytest.mark.parametrize(
    ("requested", "name"),
    [("32-true", "32-true"), ("bf16-mixed", "bf16-mixed"), (32, "32-true"), ("32", "32-true"), ("bf16", "bf16-mixed")],
)
def test_explicit_precision_is_normalised(requested, name):
    assert choose_precision(requested, "cpu") == name


@pytest.mark.parametrize("requested", ["bf16-true", "16-mixed", 16, None])
def test_unsupported_precisions_are_rejected(requested):
    """Networks receive fp32 inputs, so a pure bf16 or fp16 network would fail at its first convolution."""
    with pytest.raises(UserError, match=rf"trainer\.precision={requested}\b.*auto, bf16-mixed, 32-true"):
        choose_precision(requested, "cpu")


def test_measured_speedup_is_a_plausible_ratio():
    assert 0.01 < measure_bf16_speedup(repeats=1) < 100
