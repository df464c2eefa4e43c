"""The command line of the current process, and the options that it passes on to other commands."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm.cli.arguments import FREE_TEXT, quote_text_values, strip_stage_prefix

SEARCH_PATH = "hydra.searchpath="
SHARED_BETWEEN_STAGES = (
    *("data", "seed", "batch_size", "val_images", "latent_statistics", "runs_dir", "logger", "experiment"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.precision"),
    *("trainer.num_workers", "trainer.compile"),
)
"""Options that carry over to the command for the next stage: data, run folder and hardware."""


@dataclass(frozen=True)
class CommandLine:
    """A command, or one job of a multirun.

    Args:
        program: The program, sys.argv[0].
        arguments: Arguments as typed.
        overrides: Config overrides for this job.
        search_path: Overrides for Hydra's search path.
        choices: Selected choice for each config group.
        config_name: Name of the primary config.
        job: Index of this job in a multirun; None without -m.
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
    def config_sources(self) -> list[str]:
        """Options that select the user's own config files."""
        return [*config_dir_options(self.arguments), *self.search_path]

    def options_to_resume(self, config: DictConfig) -> list[str]:
        """Return the options that this run was started with, as typed, except those for its name and folder."""
        excluded_keys = ("name", "resume", "overwrite", "runs_dir")
        return [*self.config_sources, *(option for key, option in self._options(config) if key not in excluded_keys)]

    def options_for_next_stage(self, config: DictConfig, stage: str) -> list[str]:
        """Return the options for training a different stage on the same data and hardware, as typed.

        Budgets, learning rates and networks are not shared between stages.
        """
        options = self._options(config)
        shared = [option for key, option in options if key == "trainer" or is_key_under(key, SHARED_BETWEEN_STAGES)]
        return [*self.config_sources, f"stage={stage}", *shared]

    def compose(self, options: Sequence[str]) -> DictConfig:
        """Compose a config from options as typed on the command line, without resolving interpolations."""
        overrides = quote_text_values([option for option in options if option not in self.config_sources])
        return hydra.compose(self.config_name, [*self.search_path, *overrides])

    def _options(self, config: DictConfig) -> list[tuple[str, str]]:
        """Return (key, option) for each override, as typed, without the quotes added for Hydra."""
        options = []
        for override in self.overrides:
            key = override.partition("=")[0]
            config_key = key.lstrip("+")
            value = OmegaConf.select(config, config_key) if strip_stage_prefix(config_key) in FREE_TEXT else None
            if config_key != strip_stage_prefix(config_key):
                key, override = key.removeprefix("++"), override.removeprefix("++")
            options.append((config_key, f"{key}={value}" if isinstance(value, str) else override))
        return options


def config_dir_options(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that select the user's own config files, in the form --name=value."""
    parser = argparse.ArgumentParser(add_help=False)
    for short, name in (("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir")):
        parser.add_argument(short, name)
    parsed, _ = parser.parse_known_args(arguments)
    return [f"--{name.replace('_', '-')}={value}" for name, value in vars(parsed).items() if value is not None]


def is_key_under(key: str, names: Sequence[str]) -> bool:
    """Return True if a config key is one of the names or is nested under one of them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
