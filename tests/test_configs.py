"""Every yaml in conf/ composes, names things that exist, and makes what it says."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import get_args

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.diffusion.chain import PredictionType
from ldm.diffusion.schedule import NoiseSchedule, cosine
from ldm.runtime.paths import folder
from ldm.tracking.run import OPTIONS
from ldm.training.optim.factory import OptimizerFactory

CONF = folder("conf")
STAGES = ("vae", "diffusion")
TOOLS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem not in ("train", "tool"))
GROUPS = {
    path.name: sorted(file.stem for file in path.glob("*.yaml") if file.stem != "base")
    for path in CONF.iterdir()
    if path.is_dir()
}
CHOICES = [(group, choice) for group, choices in GROUPS.items() for choice in choices if group != "stage"]
PLACE = ["++data.path=/a/place", "++autoencoder.path=/a/place"]
OWN_TRAINER_KEYS = {
    "_target_",
    "max_time",
    "ema_decay",
    "compile",
    "num_workers",
    "checkpoint_every_s",
    "keep_last",
    "guard",
}


@cache
def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=True)


def of(group: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("choice", GROUPS[group])


def chosen(group: str, choice: str) -> DictConfig:
    return composed("train", "stage=diffusion", f"{group}={choice}", *PLACE)[group]


def targets(config: object) -> Iterator[dict]:
    """Every node with a _target_, as plain values."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield config
        for value in config.values():
            yield from targets(value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}-{choice}" for group, choice in CHOICES])
def test_every_choice_composes_with_both_stages(stage, group, choice):
    """Whatever it interpolates is there, and each target takes the arguments that it is given."""
    config = composed("train", f"stage={stage}", f"{group}={choice}", *PLACE)
    assert config.stage.build._target_
    plain = OmegaConf.to_container(OmegaConf.masked_copy(config, [k for k in config if k != "hydra"]), resolve=True)
    found = list(targets(plain))
    assert len(found) >= 8
    for node in found:
        target = get_object(node["_target_"])
        arguments = {key: value for key, value in node.items() if not re.fullmatch("_.*_", key)}
        if node["_target_"] != "lightning.Trainer":
            inspect.signature(target).bind_partial(**arguments)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_composes(tool):
    assert "device" in composed(tool)
    places = {"bench": "benchmarks/bench.py", "mixture": "examples/mixture/run.py"}
    assert (folder("tools").parent / places.get(tool, f"tools/{tool}.py")).is_file()


def test_the_command_line_chooses_over_the_stage():
    assert composed("train", "stage=diffusion", "optimizer=adamw").optimizer.build._target_ == "torch.optim.AdamW"
    assert composed("train", "stage=diffusion", "batch_size=7").batch_size == 7
    assert composed("train", "stage=vae", "trainer.max_time=null").trainer.max_time is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_built_with_all_that_it_needs(stage):
    """Beside the config, train() gives it the images and what belongs to the run."""
    build = instantiate(composed("train", f"stage={stage}").stage.build)
    given = ("images", "flip", "cache_dir", "seed", "folder", "device", "init_from")
    bound = inspect.signature(build.func).bind(**build.keywords, **dict.fromkeys(given))
    assert {*given, "optimizer"} <= set(bound.arguments)


@of("network")
@pytest.mark.parametrize("kind", ["none", "class", "text"])
def test_networks_answer_in_the_shape_of_the_latent(choice, kind):
    options = {"none": {}, "class": {"num_classes": 10}, "text": {"text_dim": 384}}[kind]
    with torch.device("meta"):
        network = instantiate(chosen("network", choice))(sample_size=8, in_channels=12, out_channels=12, **options)
        condition = {
            "none": {},
            "class": {"label": torch.zeros(2, dtype=torch.long)},
            "text": {"tokens": torch.zeros(2, 5, 384), "mask": torch.ones(2, 5), "pooled": torch.zeros(2, 384)},
        }[kind]
        output = network(torch.zeros(2, 12, 8, 8), torch.zeros(2, dtype=torch.long), **condition)
    assert output.shape == (2, 12, 8, 8)


@pytest.mark.parametrize("choice", [choice for choice in GROUPS["autoencoder"] if choice != "pretrained"])
def test_autoencoders_reduce_by_the_factor_of_their_name(choice):
    config = chosen("autoencoder", choice)
    with torch.device("meta"):
        autoencoder = Autoencoder(instantiate(config.model)(sample_size=32))
        mean, _ = autoencoder.encode(torch.zeros(1, 3, 32, 32))
        assert autoencoder.decode(mean).shape == (1, 3, 32, 32)
    assert mean.shape == (1, *autoencoder.latent_shape(32))
    named = re.fullmatch(r"kl_f(\d+)", choice)
    assert autoencoder.factor == (int(named[1]) if named else 4)
    assert instantiate(config.loss).kl > 0


@pytest.mark.parametrize("autoencoder", [choice for choice in GROUPS["autoencoder"] if choice != "pretrained"])
@of("regulariser")
def test_regularisers_build_every_autoencoder(autoencoder, choice):
    regulariser = instantiate(chosen("regulariser", choice))
    with torch.device("meta"):
        built = Autoencoder(regulariser.build(instantiate(chosen("autoencoder", autoencoder).model), 32))
        mean, _ = built.encode(torch.zeros(1, 3, 32, 32))
    assert regulariser.name == choice and mean.shape == (1, *built.latent_shape(32))
    assert built.has_codebook == (choice == "vq")


@of("perceptual")
def test_perceptual_distances_carry_their_weight(choice):
    config = composed(
        "train", "stage=vae", f"perceptual={choice}", *([] if choice == "none" else ["perceptual.weight=3"])
    )
    if choice == "lpips":  # an extra of its own
        assert config.perceptual.network._target_ == "ldm.autoencoder.perceptual.LPIPS"
        assert config.perceptual.weight == 3
        return
    perceptual = instantiate(config.stage.build).keywords["perceptual"]
    assert perceptual is None if choice == "none" else (perceptual.name, perceptual.weight) == (choice, 3)


@of("adversarial")
def test_adversaries_take_all_of_their_keys(choice):
    config = chosen("adversarial", choice)
    assert (config is None) == (choice == "none")
    if config is not None:
        build = instantiate(config)
        assert build().game == choice and {*build.keywords} == {*inspect.signature(build.func).parameters}


@of("schedule")
def test_schedules(choice):
    schedule = instantiate(chosen("schedule", choice))
    assert isinstance(schedule, NoiseSchedule) and schedule.name == choice and schedule.num_steps == 1000


@of("sampler")
def test_samplers_fit_the_schedules(choice):
    sampler = instantiate(chosen("sampler", choice))
    assert sampler.method == choice
    for schedule in GROUPS["schedule"]:
        sampler.check(instantiate(chosen("schedule", schedule)))


@of("objective")
def test_objectives(choice):
    objective = instantiate(chosen("objective", choice))
    assert objective.loss == choice and objective.prediction == "v"
    variance = objective.variance(None)
    assert variance == ("learned_range" if choice in ("hybrid", "vlb") else "fixed_small")
    for prediction in get_args(PredictionType):
        replace(objective, prediction=prediction).check(variance, cosine().alpha_bar)


@of("optimizer")
def test_optimizers_take_a_step(choice):
    config = composed("train", "stage=vae", f"optimizer={choice}", "optimizer.lr=0.125").optimizer
    assert config.warmup_steps >= 0 and config.decay in ("linear", "cosine", "constant")
    network = torch.nn.ModuleDict({"blocks": torch.nn.Linear(3, 3), "out": torch.nn.Linear(3, 1)})
    optimizer = OptimizerFactory(instantiate(config.build))(network)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    before = [p.detach().clone() for p in network.parameters()]
    network["out"](network["blocks"](torch.ones(2, 3))).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


@of("conditioning")
def test_conditionings_take_the_images(choice):
    config = chosen("conditioning", choice)
    assert 0 <= config.drop < 1 and config.guidance >= 1 and config.prompts == []
    build = instantiate(config.build)
    assert isinstance(build, partial) and list(inspect.signature(build).parameters)[0] == "images"
    assert build.func.__name__ == {"none": "no_condition"}.get(choice, f"{choice}_condition")


@of("trainer")
def test_trainers_know_their_keys(choice, tmp_path):
    config = chosen("trainer", choice)
    options = {key: value for key, value in config.items() if key not in OWN_TRAINER_KEYS}
    inspect.signature(lightning.Trainer).bind_partial(**options)
    assert set(config) >= OWN_TRAINER_KEYS and config._target_ == "lightning.Trainer"
    if choice in ("auto", "cpu"):
        precision = "32-true" if config.precision == "auto" else config.precision
        trainer = lightning.Trainer(
            **{**options, "precision": precision, "logger": False, "max_epochs": -1},
            default_root_dir=tmp_path,
        )
        assert trainer.val_check_interval == config.val_check_interval


@of("data")
def test_data_choices_share_their_keys(choice):
    shared = {"resolution", "resize", "val_fraction", "flip", "max_bad_fraction", "max_pixels", "cache_dir", "source"}
    config = chosen("data", choice)
    assert shared <= set(config)


@of("logger")
def test_loggers_say_all_that_is_read_of_them(choice):
    config = chosen("logger", choice)
    assert not config.wandb or set(config) == {"wandb", "upload_latents", *OPTIONS}


def keys_of_help(text: str) -> set[str]:
    """`key=value   what it does` line by line, or `Keys: a, b (file), c.` at the end."""
    listed = re.search(r"Keys: (.*?)\.\n", text, re.DOTALL)
    if listed:
        return {re.sub(r"\(.*?\)", "", key).strip() for key in listed[1].split(",")}
    return set(re.findall(r"^ {2}([a-z_.]+)=\S+ {2,}\w", text, re.MULTILINE))


@pytest.mark.parametrize("name", ["train", *TOOLS])
def test_help_names_keys_that_exist(name):
    config = composed(name, *(["stage=diffusion"] if name == "train" else []))
    keys = keys_of_help(config.hydra.help.template)
    assert len(keys) >= 2, config.hydra.help.template
    for key in keys:
        parent, _, last = key.rpartition(".")
        assert last in set(OmegaConf.select(config, parent) if parent else config), key


@pytest.mark.parametrize("name", TOOLS)
def test_help_of_a_tool_names_every_key(name):
    """Groups are listed by Hydra; bench shares the tools' `device` and has no use for it."""
    config = composed(name)
    named = keys_of_help(config.hydra.help.template)
    assert set(config) - {"hydra", "device" if name == "bench" else "hydra"} - set(GROUPS) <= named


def test_the_readme_of_a_yaml_is_its_first_line():
    """What a choice is stands at the top of its file."""
    for file in Path(CONF).rglob("*.yaml"):
        assert file.read_text(encoding="utf-8").startswith("# "), file
