"""ldm.training.session: what a stage is built from."""

from types import SimpleNamespace

from ldm.cli.main import as_config
from ldm.training.session import Session


def test_text_reaches_the_stage_as_it_was_typed():
    session = object.__new__(Session)
    build = {"_target_": "builtins.dict", "_partial_": True, "prompts": ["a ${b}", "\\${c}"]}
    session.config, session.continuation = as_config({"vae": "x", "stage": {"build": build}}), SimpleNamespace(known={})
    assert list(session._stage_builder()()["prompts"]) == ["a ${b}", "\\${c}"]
