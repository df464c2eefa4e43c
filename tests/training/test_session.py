"""ldm.training.session: how a stage is built from the config."""

from types import SimpleNamespace

from ldm.cli.main import as_config
from ldm.training.session import Session


def test_stage_receives_prompts_without_interpolation():
    session = object.__new__(Session)
    build = {"_target_": "builtins.dict", "_partial_": True, "prompts": ["a ${b}", "\\${c}"]}
    session.config = as_config({"vae": "x", "stage": {"build": build}})
    session.resume_plan = SimpleNamespace(source_facts={})
    assert list(session._stage_builder()()["prompts"]) == ["a ${b}", "\\${c}"]
