"""ldm.cli.remedies: the library's errors, with the options that the command has."""

import pickle

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.cli.explain import explain
from ldm.cli.remedies import REMEDIES
from ldm.errors import InputError
from ldm.runtime.paths import folder


@pytest.fixture(scope="module")
def options():
    """options(config_name, *overrides): a command's config as plain values."""

    def options(name: str, *overrides: str):
        with initialize_config_dir(str(folder("conf")), version_base="1.3"):
            return OmegaConf.to_container(compose(name, list(overrides)))

    return options


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("train", ["stage=vae"], "data.resolution=18 must be even."),
        ("encode", [], "resolution=18 must be even."),
        ("sample", [], "resolution 18 must be even."),
    ],
)
def test_an_argument_is_named_by_the_option_of_the_command(options, command, overrides, message):
    error = InputError("resolution", 18, "must be even")
    assert explain(error, options(command, *overrides)) == message
    assert str(error) == "resolution=18 must be even."


def test_a_remedy_names_no_option_that_the_command_lacks(options):
    error = InputError("cache_dir", "/x", "has 1 GB free")
    there = explain(error, options("train", "stage=vae"))
    assert there == "data.cache_dir=/x has 1 GB free. Or choose another disk with data.cache_dir=."
    assert explain(error, options("decode")) == "cache_dir /x has 1 GB free."
    assert explain(InputError("perceptual", "lpips", "is heavy"), options("evaluate")) == "perceptual lpips is heavy."


def test_a_value_stands_as_it_is_typed(options):
    config = options("train", "stage=diffusion")
    assert (
        explain(InputError("max_pixels", None, "must be a number"), config) == "data.max_pixels=null must be a number."
    )
    assert explain(InputError("batch_size", True, "must be a number"), config) == "batch_size=true must be a number."


def test_an_argument_that_is_no_option_is_named_plainly(options):
    assert explain(InputError("share", 2, "must be at most 1"), options("latents")) == "share 2 must be at most 1."
    assert explain(InputError("share", 2, "must be at most 1")) == "share 2 must be at most 1."


def test_an_error_of_another_process_keeps_its_parts():
    error = pickle.loads(pickle.dumps(InputError("share", 2, "must be at most 1")))
    assert (error.argument, error.value, error.rule) == ("share", 2, "must be at most 1")
    assert str(error) == "share=2 must be at most 1."


@pytest.mark.parametrize("argument", REMEDIES)
def test_remedies_are_sentences(argument):
    assert all(text[0].isupper() and text.endswith(".") for text in REMEDIES[argument])
