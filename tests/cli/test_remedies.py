"""Library errors are explained with the options of the command."""

import pickle

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.cli.explain import explain
from ldm.cli.remedies import REMEDIES
from ldm.errors import InputError
from ldm.runtime.paths import bundled_folder


@pytest.fixture(scope="module")
def config_of():
    """Return a function that composes the config of a command, as plain values."""

    def config_of(name: str, *overrides: str):
        with initialize_config_dir(str(bundled_folder("conf")), version_base="1.3"):
            return OmegaConf.to_container(compose(name, list(overrides)))

    return config_of


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("train", ["stage=vae"], "data.resolution=18 must be even."),
        ("encode", [], "resolution=18 must be even."),
        ("sample", [], "resolution 18 must be even."),
    ],
)
def test_argument_is_replaced_by_the_option_that_sets_it(config_of, command, overrides, message):
    error = InputError("resolution", 18, "must be even")
    assert explain(error, config_of(command, *overrides)) == message
    assert str(error) == "resolution=18 must be even."


def test_remedy_is_omitted_if_the_command_lacks_its_option(config_of):
    error = InputError("cache_dir", "/x", "has 1 GB free")
    message = explain(error, config_of("train", "stage=vae"))
    assert message.startswith("data.cache_dir=/x has 1 GB free. ") and "another disk with data.cache_dir=" in message
    assert explain(error, config_of("decode")) == "cache_dir /x has 1 GB free."
    assert explain(InputError("perceptual", "lpips", "is heavy"), config_of("evaluate")) == "perceptual lpips is heavy."


def test_value_is_formatted_as_on_the_command_line(config_of):
    config = config_of("train", "stage=diffusion")
    assert (
        explain(InputError("max_pixels", None, "must be a number"), config) == "data.max_pixels=null must be a number."
    )
    assert explain(InputError("batch_size", True, "must be a number"), config) == "batch_size=true must be a number."


def test_argument_without_an_option_is_named_without_equals_sign(config_of):
    assert explain(InputError("share", 2, "must be at most 1"), config_of("latents")) == "share 2 must be at most 1."
    assert explain(InputError("share", 2, "must be at most 1")) == "share 2 must be at most 1."


def test_pickled_error_keeps_its_attributes():
    error = pickle.loads(pickle.dumps(InputError("share", 2, "must be at most 1")))
    assert (error.argument, error.value, error.rule) == ("share", 2, "must be at most 1")
    assert str(error) == "share=2 must be at most 1."


@pytest.mark.parametrize("argument", REMEDIES)
def test_remedies_are_complete_sentences(argument):
    assert all(text[0].isupper() and text.endswith(".") for text in REMEDIES[argument])
