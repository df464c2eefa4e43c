"""What was typed and what Hydra made of it, as values: the options that other commands repeat."""

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.cli.arguments import FREE_TEXT, quote_free_text, typed, without_stage
from ldm.tracking.artifact import flatten

SEARCH_PATH = "hydra.searchpath="
SHARED_WITH_OTHER_STAGE = (
    *("data", "seed", "batch_size", "val_images", "latent_statistics", "runs_dir", "logger"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.precision"),
    *("trainer.num_workers", "trainer.compile"),
)
"""What the next stage's command repeats of this one's: its data, its place and its machine."""


@dataclass(frozen=True)
class CommandLine:
    """One command, or one job of a multirun.

    Args:
        program: What runs: sys.argv[0].
        arguments: As they were typed.
        overrides: Those of the config, of this job.
        search_path: Those of Hydra's search path.
        choices: The choice of each config group.
        config_name: Of the primary config.
        job: The number of this job in a multirun; None without -m.
    """

    program: str
    arguments: tuple[str, ...]
    overrides: tuple[str, ...]
    search_path: tuple[str, ...]
    choices: Mapping[str, str]
    config_name: str | None
    job: int | None

    def __str__(self) -> str:
        return " ".join([self.program, *self.arguments])

    @property
    def sources(self) -> list[str]:
        """The options that say where configs of the user's own lie."""
        return [*own_config_options(self.arguments), *self.search_path]

    def options_to_continue(self, config: DictConfig) -> list[str]:
        """The options that this run was started with, but for its name and place, as a user types them."""
        elsewhere = ("name", "resume", "overwrite", "runs_dir")
        return [*self.sources, *(option for key, option in self._typed(config) if key not in elsewhere)]

    def options_to_share(self, config: DictConfig, stage: str) -> list[str]:
        """The options under which another stage sees the same data on the same machine, as a user types them.

        They are the difference between the config in force, wherever its values came from, and the one that Hydra
        composes for that stage by itself. Budgets, learning rates and networks are each stage's own.
        """
        given = self._typed(config)
        options = [f"stage={stage}", f"data={self.choices['data']}"]
        options += {key: option for key, option in given if key in ("experiment", "trainer", "logger")}.values()
        try:
            options += self._differences(config, options)
        except (HydraException, OmegaConfBaseException):  # the user's own configs have no such stage: what was typed
            options += [option for key, option in given if key.startswith("data.")]
        return [*self.sources, *options]

    def compose(self, options: Sequence[str]) -> DictConfig:
        """The config that Hydra composes from other options, as a user types them, with its interpolations."""
        overrides = [option for option in options if option not in self.sources]
        return OmegaConf.create(
            _composed(self.config_name, (*self.search_path, *quote_free_text(overrides)), tuple(self.sources))
        )

    def _typed(self, config: DictConfig) -> list[tuple[str, str]]:
        """The overrides by key, as the user typed them: free text was quoted for Hydra."""
        options = []
        for override in self.overrides:
            key = override.partition("=")[0]
            bare = key.lstrip("+")
            value = OmegaConf.select(config, bare) if without_stage(bare) in FREE_TEXT else None
            if bare != without_stage(bare):
                key, override = key.removeprefix("++"), override.removeprefix("++")
            options.append((bare, f"{key}={value}" if isinstance(value, str) else override))
        return options

    def _differences(self, config: DictConfig, options: Sequence[str]) -> list[str]:
        """What the config that Hydra composes from `options` lacks of the values in `config` that stages share."""
        own = self.compose(options)
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
                shared = is_in(key, SHARED_WITH_OTHER_STAGE) and key.startswith("data.source.") == is_source
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


def own_config_options(arguments: Sequence[str]) -> list[str]:
    """Of a command line: the options that say where configs of the user's own lie."""
    parser = argparse.ArgumentParser(add_help=False)
    for short, name in (("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir")):
        parser.add_argument(short, name)
    found, _ = parser.parse_known_args(arguments)
    return [f"--{name.replace('_', '-')}={value}" for name, value in vars(found).items() if value is not None]


def is_in(key: str, names: Sequence[str]) -> bool:
    """Whether a key of the config is one of these, or lies below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
