"""All configs in conf/ compose, refer to existing constructors and keys, and build what their names promise."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import lightning
import pytest
import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.diffusion.chain import PredictionType
from ldm.diffusion.schedule import NoiseSchedule, cosine
from ldm.runtime.paths import bundled_folder
from ldm.tracking.run import OPTIONS
from ldm.training.optim.factory import OptimizerFactory
from tests.option_keys import compose_config

CONF = bundled_folder("conf")
STAGES = ("vae", "diffusion")
TOOLS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem not in ("train", "tool"))
GROUPS = {
    path.name: sorted(file.stem for file in path.glob("*.yaml") if file.stem != "base")
    for path in CONF.iterdir()
    if path.is_dir()
}
CHOICES = [(group, choice) for group, choices in GROUPS.items() for choice in choices if group != "stage"]
PATHS = ["++data.path=/a/path", "++autoencoder.path=/a/path"]
EXTRA_TRAINER_KEYS = {
    "_target_",
    "max_time",
    "ema_decay",
    "compile",
    "num_workers",
    "checkpoint_every_s",
    "keep_last",
    "guard",
}


def for_each_choice(group: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("choice", GROUPS[group])


def group_config(group: str, choice: str) -> DictConfig:
    return compose_config("train", "stage=diffusion", f"{group}={choice}", *PATHS)[group]


def targets(config: object) -> Iterator[dict]:
    """Yield every node with a _target_ key."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield config
        for value in config.values():
            yield from targets(value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}-{choice}" for group, choice in CHOICES])
def test_every_config_choice_composes_with_both_stages(stage, group, choice):
    """All interpolations resolve, and each target accepts its arguments."""
    config = compose_config("train", f"stage={stage}", f"{group}={choice}", *PATHS)
    assert config.stage.build._target_
    plain = OmegaConf.to_container(OmegaConf.masked_copy(config, [k for k in config if k != "hydra"]), resolve=True)
    nodes = list(targets(plain))
    assert len(nodes) >= 8
    for node in nodes:
        target = get_object(node["_target_"])
        arguments = {key: value for key, value in node.items() if not re.fullmatch("_.*_", key)}
        if node["_target_"] != "lightning.Trainer":
            inspect.signature(target).bind_partial(**arguments)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_composes(tool):
    assert "device" in compose_config(tool)
    scripts = {"bench": "benchmarks/bench.py", "mixture": "examples/mixture/run.py"}
    assert (bundled_folder("tools").parent / scripts.get(tool, f"tools/{tool}.py")).is_file()


def test_command_line_overrides_stage_defaults():
    assert compose_config("train", "stage=diffusion", "optimizer=adamw").optimizer.build._target_ == "torch.optim.AdamW"
    assert compose_config("train", "stage=diffusion", "batch_size=7").batch_size == 7
    assert compose_config("train", "stage=vae", "trainer.max_time=null").trainer.max_time is None


@pytest.mark.parametrize("stage", STAGES)
def test_stage_config_binds_all_arguments_of_its_constructor(stage):
    """The training session passes the remaining arguments, which depend on the images and the run."""
    build = instantiate(compose_config("train", f"stage={stage}").stage.build)
    session_arguments = ("images", "flip", "cache_dir", "seed", "folder", "device", "init_from")
    bound = inspect.signature(build.func).bind(**build.keywords, **dict.fromkeys(session_arguments))
    assert {*session_arguments, "optimizer"} <= set(bound.arguments)


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        *((choice, kind) for choice in GROUPS["network"] if choice != "unet_sd" for kind in ("none", "class", "text")),
        ("unet_sd", "clip_sd"),
    ],
)
def test_network_outputs_have_the_latent_shape(choice, kind):
    text = {"text_dim": 384}
    options = {"none": {}, "class": {"num_classes": 10}, "text": text, "clip_sd": text}[kind]
    with torch.device("meta"):
        network = instantiate(group_config("network", choice))(
            sample_size=8, in_channels=12, out_channels=12, **options
        )
        condition = {
            "none": {},
            "class": {"label": torch.zeros(2, dtype=torch.long)},
            "text": {"tokens": torch.zeros(2, 5, 384), "mask": torch.ones(2, 5), "pooled": torch.zeros(2, 384)},
            "clip_sd": {"tokens": torch.zeros(2, 77, 384)},
        }[kind]
        output = network(torch.zeros(2, 12, 8, 8), torch.zeros(2, dtype=torch.long), **condition)
    assert output.shape == (2, 12, 8, 8)


@pytest.mark.parametrize("choice", [choice for choice in GROUPS["autoencoder"] if choice != "pretrained"])
def test_autoencoders_match_the_factor_in_their_name(choice):
    config = group_config("autoencoder", choice)
    with torch.device("meta"):
        autoencoder = Autoencoder(instantiate(config.model)(sample_size=32))
        mean, _ = autoencoder.encode(torch.zeros(1, 3, 32, 32))
        assert autoencoder.decode(mean).shape == (1, 3, 32, 32)
    assert mean.shape == (1, *autoencoder.latent_shape(32))
    match = re.fullmatch(r"kl_f(\d+)", choice)
    assert autoencoder.factor == (int(match[1]) if match else 4)
    assert instantiate(config.loss).kl > 0


@pytest.mark.parametrize("autoencoder", [choice for choice in GROUPS["autoencoder"] if choice != "pretrained"])
@for_each_choice("regulariser")
def test_every_regulariser_supports_every_autoencoder(autoencoder, choice):
    regulariser = instantiate(group_config("regulariser", choice))
    with torch.device("meta"):
        model = Autoencoder(regulariser.build(instantiate(group_config("autoencoder", autoencoder).model), 32))
        mean, _ = model.encode(torch.zeros(1, 3, 32, 32))
    assert regulariser.name == choice and mean.shape == (1, *model.latent_shape(32))
    assert model.has_codebook == (choice == "vq")


@for_each_choice("perceptual")
def test_perceptual_weight_is_configurable(choice):
    config = compose_config(
        "train", "stage=vae", f"perceptual={choice}", *([] if choice == "none" else ["perceptual.weight=3"])
    )
    if choice == "lpips":  # needs an optional package
        assert config.perceptual.network._target_ == "ldm.autoencoder.perceptual.LPIPS"
        assert config.perceptual.weight == 3
        return
    perceptual = instantiate(config.stage.build).keywords["perceptual"]
    assert perceptual is None if choice == "none" else (perceptual.name, perceptual.weight) == (choice, 3)


@for_each_choice("adversarial")
def test_adversary_configs_set_all_arguments(choice):
    config = group_config("adversarial", choice)
    assert (config is None) == (choice == "none")
    if config is not None:
        build = instantiate(config)
        assert build().gan_loss == choice and {*build.keywords} == {*inspect.signature(build.func).parameters}


@for_each_choice("schedule")
def test_schedules_have_1000_steps(choice):
    schedule = instantiate(group_config("schedule", choice))
    assert isinstance(schedule, NoiseSchedule) and schedule.name == choice and schedule.num_steps == 1000


@for_each_choice("sampler")
def test_every_sampler_supports_every_schedule(choice):
    sampler = instantiate(group_config("sampler", choice))
    assert sampler.method == choice
    for schedule in GROUPS["schedule"]:
        sampler.check(instantiate(group_config("schedule", schedule)))


@for_each_choice("objective")
def test_objectives_support_every_prediction_type(choice):
    objective = instantiate(group_config("objective", choice))
    assert objective.loss == choice and objective.prediction == "v"
    variance = objective.variance(None)
    assert variance == ("learned_range" if choice in ("hybrid", "vlb") else "fixed_small")
    for prediction in get_args(PredictionType):
        replace(objective, prediction=prediction).check(variance, cosine().alpha_bar)


@for_each_choice("optimizer")
def test_optimizers_update_all_parameters(choice):
    config = compose_config("train", "stage=vae", f"optimizer={choice}", "optimizer.lr=0.125").optimizer
    assert config.warmup_steps >= 0 and config.decay in ("linear", "cosine", "constant")
    network = torch.nn.ModuleDict({"blocks": torch.nn.Linear(3, 3), "out": torch.nn.Linear(3, 1)})
    optimizer = OptimizerFactory(instantiate(config.build))(network)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    initial = [p.detach().clone() for p in network.parameters()]
    network["out"](network["blocks"](torch.ones(2, 3))).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, p_0) for p, p_0 in zip(network.parameters(), initial, strict=True))


@for_each_choice("conditioning")
def test_images_are_the_first_argument_of_conditioning(choice):
    config = group_config("conditioning", choice)
    assert 0 <= config.drop < 1 and config.guidance >= 1 and config.prompts == []
    build = instantiate(config.build)
    assert isinstance(build, partial) and list(inspect.signature(build).parameters)[0] == "images"
    assert build.func.__name__ == {"none": "no_condition"}.get(choice, f"{choice}_condition")


@for_each_choice("trainer")
def test_trainer_keys_are_accepted_by_lightning(choice, tmp_path):
    config = group_config("trainer", choice)
    options = {key: value for key, value in config.items() if key not in EXTRA_TRAINER_KEYS}
    inspect.signature(lightning.Trainer).bind_partial(**options)
    assert set(config) >= EXTRA_TRAINER_KEYS and config._target_ == "lightning.Trainer"
    if choice in ("auto", "cpu"):
        precision = "32-true" if config.precision == "auto" else config.precision
        trainer = lightning.Trainer(
            **{**options, "precision": precision, "logger": False, "max_epochs": -1},
            default_root_dir=tmp_path,
        )
        assert trainer.val_check_interval == config.val_check_interval


@for_each_choice("data")
def test_data_configs_have_the_shared_keys(choice):
    shared = {"resolution", "resize", "val_fraction", "flip", "max_bad_fraction", "max_pixels", "cache_dir", "source"}
    config = group_config("data", choice)
    assert shared <= set(config)


@for_each_choice("logger")
def test_logger_configs_have_all_keys(choice):
    config = group_config("logger", choice)
    assert not config.wandb or set(config) == {"wandb", "upload_latents", *OPTIONS}


def keys_of_help(text: str) -> set[str]:
    """Return the keys in a help text, from lines like `key=value   description` or from `Keys: a, b (file), c.`"""
    key_list = re.search(r"Keys: (.*?)\.\n", text, re.DOTALL)
    if key_list:
        return {re.sub(r"\(.*?\)", "", key).strip() for key in key_list[1].split(",")}
    return set(re.findall(r"^ {2}([a-z_.]+)=\S+ {2,}\w", text, re.MULTILINE))


@pytest.mark.parametrize("name", ["train", *TOOLS])
def test_keys_in_help_exist(name):
    config = compose_config(name, *(["stage=diffusion"] if name == "train" else []))
    keys = keys_of_help(config.hydra.help.template)
    assert len(keys) >= 2, config.hydra.help.template
    for key in keys:
        parent, _, name = key.rpartition(".")
        assert name in set(OmegaConf.select(config, parent) if parent else config), key


@pytest.mark.parametrize("name", TOOLS)
def test_help_of_a_tool_lists_all_keys(name):
    """Groups can be missing, because Hydra lists them. `device` can be missing for bench and export."""
    config = compose_config(name)
    help_keys = keys_of_help(config.hydra.help.template)
    assert set(config) - {"hydra", "device" if name in ("bench", "export") else "hydra"} - set(GROUPS) <= help_keys


def test_configs_start_with_a_comment():
    for file in Path(CONF).rglob("*.yaml"):
        assert file.read_text(encoding="utf-8").startswith("# "), file
