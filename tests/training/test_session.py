"""ldm.training.session: what a stage is built from."""

from types import SimpleNamespace

from ldm.cli.main import as_config
from ldm.training.session import Session


def builder(known: dict, vae: str | None = None) -> dict:
    """What a stage that notes its options is given."""
    find = {"_target_": "builtins.dict", "_partial_": True, "vae": vae}
    build = {"_target_": "builtins.dict", "_partial_": True, "find_autoencoder": find, "prompts": ["a ${b}", "\\${c}"]}
    session = object.__new__(Session)
    session.config = as_config({"vae": vae, "stage": {"build": build}})
    session.continuation = SimpleNamespace(known=known)
    return session._stage_builder()()


def test_text_reaches_the_stage_as_it_was_typed():
    assert list(builder({})["prompts"]) == ["a ${b}", "\\${c}"]


def test_a_run_that_goes_on_keeps_its_autoencoder():
    """A newer one may lie in runs/ by now; one that the user names is taken."""
    assert builder({"vae": "runs/vae/first"})["find_autoencoder"]() == {"vae": "runs/vae/first"}
    assert builder({"vae": "runs/vae/first"}, vae="runs/vae/other")["find_autoencoder"]() == {"vae": "runs/vae/other"}
    assert builder({})["find_autoencoder"]() == {"vae": None}
