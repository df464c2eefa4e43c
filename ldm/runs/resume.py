"""A run that goes on: where it lies, by what command, and what it has in common with the run as it was begun."""

import argparse
import functools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.cli.arguments import FREE_TEXT, quote_free_text, typed
from ldm.errors import UserError
from ldm.files.untrusted import is_plain_name, read_json
from ldm.runs.checkpoints import FOLDER, manifests, run_of
from ldm.runs.replacement import recover
from ldm.runtime import shell
from ldm.runtime.paths import RUN_FILE
from ldm.tracking.artifact import flatten

SEARCH_PATH = "hydra.searchpath="
RUN_NAME = "LDM_RUN_NAME"
"""The name of this process's run, for the processes that Lightning starts."""
FACTS = (
    "stage",
    "data_fingerprint",
    "latent_shape",
    "chain_sha256",
    "loss",
    "prediction",
    "variance",
    "pretrained",
    "regulariser",
    "perceptual",
    "adversarial",
    "discriminator",
    "codebook_size",
    "likelihood",
    "trained",
)
"""Of run.json: what must not differ."""


SHARED = (
    *("seed", "batch_size", "latent_statistics", "init_from", "optimizer"),
    *("data.resolution", "data.resize", "data.flip", "data.val_fraction"),
)
DECIDES = {
    "vae": (*SHARED, "autoencoder", "regulariser", "perceptual", "adversarial"),
    "diffusion": (
        *(*SHARED, "network", "schedule", "objective", "variance", "conditioning"),
        *("data.caption_column", "data.label_column"),
    ),
}
"""Of the config of each stage: what decides weights, order and noise. Which images they are, their fingerprint says."""
MAY_CHANGE = ("optimizer.lr", "optimizer.build.lr", "optimizer.warmup_steps", "optimizer.decay")
SHOWN = (*MAY_CHANGE, "trainer.max_steps", "trainer.max_time", "trainer.gradient_clip_val", "trainer.ema_decay")
"""What a user may change on purpose, and is told of."""
OF_GRIDS = ("conditioning.guidance", "conditioning.prompts")
SHARED_WITH_OTHER_STAGE = (
    *("data", "seed", "batch_size", "val_images", "latent_statistics", "runs_dir", "logger"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.precision"),
    *("trainer.num_workers", "trainer.compile"),
)
"""What the next stage's command repeats of this one's: its data, its place and its machine."""
PATHS = ("init_from", "autoencoder.path", "conditioning.encoder", "conditioning.build.encoder", "pretrained")


def run_folder(config: DictConfig, *, main_process: bool) -> Path:
    """runs_dir/<stage>/<name>. Processes that Lightning starts find the name of the first in the environment.

    Without a name, resume=<checkpoint> goes on in the run that it lies in; with another name it begins a run there.
    A job that SLURM started again goes on from what it saved itself, whatever it was begun from.

    Raises:
        UserError: the folder is in use by another run and neither resume nor overwrite was asked for.
    """
    choices = HydraConfig.get().runtime.choices
    stage = choices["stage"]
    part = choices["autoencoder" if stage == "vae" else "network"]
    default = f"{choices['data']}-{part}-{time.strftime('%Y%m%d-%H%M%S')}"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        default += f"-{HydraConfig.get().job.num}"  # jobs may start in the same second
    if main_process:
        os.environ[RUN_NAME] = config.name or default
    name = os.environ.get(RUN_NAME, default)
    if not is_plain_name(name) or len(name.encode()) > 200:
        raise UserError(f"name={name} must be a plain folder name. Choose another place with runs_dir=.")
    folder = Path(config.runs_dir).expanduser() / stage / name
    if main_process:
        recover(folder, resume=config.resume in (True, "true") and not config.overwrite)
    exists = (folder / RUN_FILE).exists()
    restarted = bool(int(os.environ.get("SLURM_RESTART_COUNT") or 0))  # the same job, put into the queue again
    if exists and config.name is not None and restarted and (not config.overwrite or _is_of_this_job(folder)):
        config.resume = config.resume or True
    continues = config.resume
    if config.resume not in (None, False, True, "true"):
        file = Path(str(config.resume)).expanduser()
        place = folder if config.name is not None else file.parent.parent
        saved = has_saved_since(place, file)
        if restarted and saved:
            config.resume = True
            return place
        source = run_of(file)
        if config.name is None:
            return source
        # a run that was stopped before it saved anything begins at the file once more
        continues = source.resolve() == folder.resolve() or saved is False
    if main_process and exists and not (continues or config.overwrite):
        each = " With -m, each job needs a name of its own: 'name=NAME-${hydra:job.num}', or no name="
        raise UserError(
            f"{folder} exists already. Choose another name=, continue it with resume=true, or start it anew "
            f"with overwrite=true.{each + '.' if HydraConfig.get().mode == RunMode.MULTIRUN else ''}"
        )
    return folder


def slurm_job() -> dict[str, str]:
    """The job that this process belongs to under SLURM, which keeps its number when it is put into the queue again."""
    return {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if key in os.environ}


def _is_of_this_job(folder: Path) -> bool:
    """Whether this SLURM job began the run in a folder, which it may therefore continue instead of overwriting it."""
    return read_json(folder / RUN_FILE).get("slurm_job") == slurm_job()


def options_to_continue(config: DictConfig) -> list[str]:
    """The options that this run was started with, but for its name and place, as a user types them."""
    elsewhere = ("name", "resume", "overwrite", "runs_dir")
    return [*config_sources(), *(option for key, option in _typed_options(config) if key not in elsewhere)]


def _typed_options(config: DictConfig) -> list[tuple[str, str]]:
    """The overrides of this command by key, as the user typed them: free text was quoted for Hydra."""
    options = []
    for override in HydraConfig.get().overrides.task:
        key = override.partition("=")[0]
        bare = key.lstrip("+")
        value = OmegaConf.select(config, bare) if bare in FREE_TEXT else None
        options.append((bare, f"{key}={value}" if isinstance(value, str) else override))
    return options


def options_to_share(config: DictConfig, stage: str) -> list[str]:
    """The options under which another stage sees the same data on the same machine, as a user types them.

    They are the difference between the config in force, wherever its values came from, and the one that Hydra composes
    for that stage by itself. Budgets, learning rates and networks are each stage's own.
    """
    given = _typed_options(config)
    options = [f"stage={stage}", f"data={HydraConfig.get().runtime.choices['data']}"]
    options += {key: option for key, option in given if key in ("experiment", "trainer", "logger")}.values()
    try:
        options += _differences(config, options)
    except (HydraException, OmegaConfBaseException):  # the user's own configs have no such stage: what was typed
        options += [option for key, option in given if key.startswith("data.")]
    return [*config_sources(), *options]


def _differences(config: DictConfig, options: Sequence[str]) -> list[str]:
    """What the config that Hydra composes from `options` lacks of the values in `config` that stages share."""
    searched = [option for option in config_sources() if option.startswith(SEARCH_PATH)]
    overrides = (*searched, *quote_free_text(options))
    own = OmegaConf.create(_composed(HydraConfig.get().job.config_name, overrides, tuple(config_sources())))
    groups = sorted({key.partition(".")[0] for key in SHARED_WITH_OTHER_STAGE})
    values: Any = OmegaConf.to_container(config, resolve=True)
    wanted = flatten({group: values[group] for group in groups})
    found: list[str] = []
    # what a source is built from repeats other keys: only what still differs once they are set was given by itself
    for is_source in (False, True):
        values = OmegaConf.to_container(OmegaConf.masked_copy(own, groups))
        if is_source:
            values["data"] = OmegaConf.to_container(own.data, resolve=True)
        known = flatten(values)
        for key, value in wanted.items():
            shared = _is_in(key, SHARED_WITH_OTHER_STAGE) and key.startswith("data.source.") == is_source
            if shared and (key not in known or value != known[key]):
                found.append(typed(key, value, new=key not in known))
                OmegaConf.update(own, key, value)
    return found


@functools.lru_cache(maxsize=8)
def _composed(config_name: str | None, overrides: tuple[str, ...], sources: tuple[str, ...]) -> Any:
    """What Hydra composes, as plain values with their interpolations; the jobs of a multirun ask for the same.

    Args:
        sources: Where configs lie, which tells apart what has the same overrides.
    """
    return OmegaConf.to_container(hydra.compose(config_name, list(overrides)))


def place_of(folder: Path) -> list[str]:
    """The options that name a run folder."""
    runs = str(folder.parent.parent)
    return [*([] if runs == "runs" else [f"runs_dir={runs}"]), f"name={folder.name}"]


def command_line(options: Sequence[str], folder: Path, end: str = "resume=true") -> str:
    """The command that goes on with the run in `folder`, from what was typed when it was started.

    Args:
        end: How it goes on: resume=true, resume=FILE or overwrite=true.
    """
    return shell.train(*options, *place_of(folder), end)


def config_sources() -> list[str]:
    """The options of this command that say where configs of the user's own lie."""
    searched = [option for option in HydraConfig.get().overrides.hydra if option.startswith(SEARCH_PATH)]
    return [*own_config_options(sys.argv[1:]), *searched]


def own_config_options(arguments: Sequence[str]) -> list[str]:
    """Of a command line: the options that say where configs of the user's own lie."""
    parser = argparse.ArgumentParser(add_help=False)
    for short, name in (("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir")):
        parser.add_argument(short, name)
    found, _ = parser.parse_known_args(arguments)
    return [f"--{name.replace('_', '-')}={value}" for name, value in vars(found).items() if value is not None]


def branch_of(folder: Path, resume: bool | str | None, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run notes of the file that it went on from, and of the newest checkpoint that its folder held then.

    Args:
        known: What is known of the run that is continued.
    """
    if resume in (None, False, True, "true"):
        return known.get("branch")
    newest = max((found.sequence for found in manifests(folder / FOLDER)), default=-1)
    return {"file": str(Path(str(resume)).expanduser().resolve()), "after": newest}


def has_saved_since(folder: Path, file: Path) -> bool | None:
    """Whether the run in `folder` went on from that file, and has saved since; None where it never went on from it."""
    try:
        branch = read_json(folder / RUN_FILE).get("branch") if (folder / RUN_FILE).is_file() else None
    except UserError:
        return None
    if not isinstance(branch, dict) or branch.get("file") != str(file.expanduser().resolve()):
        return None
    after = branch.get("after")
    return any(type(after) is int and found.sequence > after for found in manifests(folder / FOLDER))


def check_config(
    then: Mapping[str, Any], now: Mapping[str, Any], stage: str, options: object, place: Sequence[str]
) -> list[str]:
    """Refuse options under which other weights would come out of a continued run.

    Args:
        then: The config that the run was started with, as plain values; `now` the one of this moment.
        options: What was typed then, where run.json says it.
        place: The options that name the run and how it goes on.

    Returns:
        What else changed and is worth a word, as "optimizer.lr 0.001 -> 0.0005".

    Raises:
        UserError: naming what differs, and the command that goes on.
    """
    before, after = flatten(then), flatten(now)
    changed = [key for key in sorted({*before, *after}) if not _same(key, before.get(key), after.get(key))]
    free = (*MAY_CHANGE, *OF_GRIDS)
    wrong = [key for key in changed if _is_in(key, DECIDES[stage]) and not _is_in(key, free)]
    if wrong:
        named = "; ".join(f"{key} was {_text(before.get(key))} and is {_text(after.get(key))} now" for key in wrong[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"resume= continues a run with other options than it was started with: {named}{more}. "
            f"{_remedy(options, place)}"
        )
    shown = [key for key in changed if key in SHOWN and key != "optimizer.build.lr"]
    return [f"{key} {_text(before.get(key))} -> {_text(after.get(key))}" for key in shown]


def _remedy(options: object, place: Sequence[str]) -> str:
    """With the command of then, if it is text that a terminal may show."""
    known = isinstance(options, list) and all(isinstance(option, str) and option.isprintable() for option in options)
    if not known:
        return "Give the options that it was started with: they are in its config.yaml."
    assert isinstance(options, list)
    return f"Give the options that it was started with: {shell.train(*options, *place)}"


def _is_in(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _same(key: str, then: Any, now: Any) -> bool:
    if key in PATHS and isinstance(then, str) and isinstance(now, str):  # one folder may be written in two ways
        return then == now or Path(then).expanduser().resolve() == Path(now).expanduser().resolve()
    return bool(then == now)


def _text(value: Any) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in str(value))[:60]


def check_facts(known: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse to continue a run as something else than it was started as, or on another autoencoder's latents.

    Raises:
        UserError: naming the first thing that differs.
    """
    for key in FACTS:
        if key in known and key in facts and not _same(key, known[key], facts[key]):
            raise UserError(
                f"resume= continues a run whose {key} is {known[key]}, but the options given now make it {facts[key]}. "
                "Give the options that it was started with: they are in its config.yaml."
            )
    then, now = (content.get("contract", {}).get("autoencoder_sha256") for content in (known, facts))
    if then is not None and now is not None and then != now:
        raise UserError(
            f"resume= continues a run on the latents of the autoencoder {str(then)[:12]}, which was in "
            f"vae={known.get('vae')}, but vae={facts.get('vae')} holds {now[:12]}. Name a folder that holds the one "
            "that it was started with, or begin another run with another name=."
        )
