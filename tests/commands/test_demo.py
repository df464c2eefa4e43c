"""ldm.commands.demo: what the demo says about the number of training steps."""

from types import SimpleNamespace

import pytest

from ldm.commands.demo import EXPECTED_KD, expected_quality


@pytest.mark.parametrize(("steps", "is_slow"), [(400, True), (2_999, True), (3_000, False), (9_000, False)])
def test_demo_on_a_slow_machine_names_the_command_that_trains_for_longer(steps, is_slow):
    run = SimpleNamespace(facts={"figures": {"steps": steps}, "name": "demo", "vae": "runs/vae/demo"})
    text = expected_quality(run)
    assert f"made {steps:,} steps" in text
    assert all(f"{count:,} steps, {kd}" in text for count, kd in EXPECTED_KD.items())
    options = "stage=diffusion name=demo vae=runs/vae/demo overwrite=true trainer.max_time=00:12:00"
    assert text.endswith(f"-m ldm.train {options}") == is_slow
    assert is_slow or "\n" not in text
