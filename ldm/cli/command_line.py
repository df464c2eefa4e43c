"""What was typed and what Hydra made of it, as values: the options that other commands repeat."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm.cli.arguments import FREE_TEXT, quote_free_text, without_stage

SEARCH_PATH = "hydra.searchpath="
SHARED_WITH_OTHER_STAGE = (
    *("data", "seed", "batch_size", "val_images", "latent_statistics", "runs_dir", "logger", "experiment"),
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

        Budgets, learning rates and networks are each stage's own.
        """
        typed = self._typed(config)
        shared = [option for key, option in typed if key == "trainer" or is_in(key, SHARED_WITH_OTHER_STAGE)]
        return [*self.sources, f"stage={stage}", *shared]

    def compose(self, options: Sequence[str]) -> DictConfig:
        """The config that Hydra composes from other options, as a user types them, with its interpolations."""
        overrides = quote_free_text([option for option in options if option not in self.sources])
        return hydra.compose(self.config_name, [*self.search_path, *overrides])

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
