"""Shared fixtures: run commands in this process, and create small images."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ldm.cli.main
from ldm.runtime import signals
from tests.option_keys import foreign_keys

# Tensors are small. With more threads, tests run ten times slower on a busy machine.
torch.set_num_threads(1)


collect_ignore = []
if os.name == "nt":  # these tests need fork, named pipes, alarms or POSIX signals
    collect_ignore += ["runtime/test_signals.py", "cli/test_fuzz.py", "stress", "latents/test_killed_cache.py"]
    collect_ignore += ["data/test_hostile_images.py", "runs/test_replacement.py"]


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


COMMAND_VARIABLES = ("HYDRA_FULL_ERROR", "LDM_RUN_NAME")
"""Environment variables that a command sets; they must not leak into the next test."""


@pytest.fixture(autouse=True)
def reset_command_variables():
    for name in COMMAND_VARIABLES:
        os.environ.pop(name, None)
    yield
    for name in COMMAND_VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture
def default_signals():
    """Restore default signal handlers, because background processes of a shell ignore SIGINT."""
    previous = {number: signal.getsignal(number) for number in signals.HANDLED_SIGNALS}
    for number in signals.HANDLED_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., CommandResult]:
    """Return a function that runs the `main` of a command in this process, with command-line arguments.

    The function also checks that error messages mention only options of this command.
    """
    commands: list[str] = []
    original_run = ldm.cli.main.run

    def run(config_name: str, *arguments: Any, **options: Any) -> None:
        commands.append(config_name)
        original_run(config_name, *arguments, **options)

    monkeypatch.setattr("ldm.cli.main.run", run)

    def call(main: Callable[[], None], *arguments: str) -> CommandResult:
        commands.clear()
        monkeypatch.setattr(sys, "argv", [main.__module__, *arguments])
        for name in COMMAND_VARIABLES:  # set by an earlier call
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        capsys.readouterr()
        exit_code = 0
        try:
            main()
        except SystemExit as error:
            exit_code = int(error.code or 0)
        finally:
            torch.set_flush_denormal(False)  # training enables it for the whole process
        result = CommandResult(exit_code, *capsys.readouterr())
        if exit_code == 2 and commands:
            assert not foreign_keys(result.err, commands[0], arguments), result.err
        return result

    return call


def draw_images(folder: Path, count: int, *, size: int = 16, seed: int = 0) -> Path:
    """Create a folder of PNG files, each with a square on a background of a different random colour."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.tile(generator.integers(0, 256, 3, dtype=np.uint8), (size, size, 1))
        top, left = generator.integers(0, size // 2, 2)
        pixels[top : top + size // 2, left : left + size // 2] = generator.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Path]:
    """Return `draw_images`."""
    return draw_images
