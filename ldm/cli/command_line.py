"""The command line of the current process, and the options to pass on when it prints or composes another command."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm.cli.arguments import FREE_TEXT, quote_free_text, strip_stage_prefix

SEARCH_PATH = "hydra.searchpath="
SHARED_BETWEEN_STAGES = (
    *("data", "seed", "batch_size", "val_images", "latent_statistics", "runs_dir", "logger", "experiment"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.precision"),
    *("trainer.num_workers", "trainer.compile"),
)
"""Options that the command for the next stage takes over from this one: data, run folder and hardware."""


@dataclass(frozen=True)
class CommandLine:
    """A command, or one job of a multirun.

    Args:
        program: The program, sys.argv[0].
        arguments: Arguments as the user typed them.
        overrides: Config overrides of this job.
        search_path: Overrides of Hydra's search path.
        choices: The choice in each config group.
        config_name: Name of the primary config.
        job: Number of this job in a multirun; None without -m.
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
        """Options that point to the user's own config files."""
        return [*config_dir_options(self.arguments), *self.search_path]

    def options_to_resume(self, config: DictConfig) -> list[str]:
        """Return the options that this run was started with, as a user types them, without its name and folder."""
        excluded = ("name", "resume", "overwrite", "runs_dir")
        return [*self.config_sources, *(option for key, option in self._options(config) if key not in excluded)]

    def options_for_next_stage(self, config: DictConfig, stage: str) -> list[str]:
        """Return the options for training another stage on the same data and hardware, as a user types them.

        Budgets, learning rates and networks are not shared between stages.
        """
        options = self._options(config)
        shared = [option for key, option in options if key == "trainer" or is_key_under(key, SHARED_BETWEEN_STAGES)]
        return [*self.config_sources, f"stage={stage}", *shared]

    def compose(self, options: Sequence[str]) -> DictConfig:
        """Compose a config from other options, given as a user types them; interpolations are not resolved."""
        overrides = quote_free_text([option for option in options if option not in self.config_sources])
        return hydra.compose(self.config_name, [*self.search_path, *overrides])

    def _options(self, config: DictConfig) -> list[tuple[str, str]]:
        """Return (key, option) for each override, as the user typed it, without the quotes added for Hydra."""
        options = []
        for override in self.overrides:
            key = override.partition("=")[0]
            bare = key.lstrip("+")
            value = OmegaConf.select(config, bare) if strip_stage_prefix(bare) in FREE_TEXT else None
            if bare != strip_stage_prefix(bare):
                key, override = key.removeprefix("++"), override.removeprefix("++")
            options.append((bare, f"{key}={value}" if isinstance(value, str) else override))
        return options


def config_dir_options(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that point to the user's own config files, in the form --name=value."""
    parser = argparse.ArgumentParser(add_help=False)
    for short, name in (("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir")):
        parser.add_argument(short, name)
    parsed, _ = parser.parse_known_args(arguments)
    return [f"--{name.replace('_', '-')}={value}" for name, value in vars(parsed).items() if value is not None]


def is_key_under(key: str, names: Sequence[str]) -> bool:
    """Return True if a config key is one of the names, or nested below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
