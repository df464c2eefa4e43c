"""Shared by all tests: one thread, a command line in this process, small images."""

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

# The tensors are small: more threads only wait for each other, ten times slower on a busy machine.
torch.set_num_threads(1)


collect_ignore = []
if os.name == "nt":  # these need fork, named pipes, alarms or POSIX signals
    collect_ignore += ["runtime/test_signals.py", "cli/test_fuzz.py", "stress", "latents/test_killed_cache.py"]
    collect_ignore += ["data/test_hostile_images.py", "runs/test_replacement.py"]


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


OF_A_COMMAND = ("HYDRA_FULL_ERROR", "LDM_RUN_NAME")
"""What a command sets in the environment of its process, and would hand on to the next test's."""


@pytest.fixture(autouse=True)
def no_command_before():
    for name in OF_A_COMMAND:
        os.environ.pop(name, None)
    yield
    for name in OF_A_COMMAND:
        os.environ.pop(name, None)


@pytest.fixture
def default_signals():
    """A shell that starts the suite in the background has it ignore SIGINT, and what it starts inherits that."""
    before = {number: signal.getsignal(number) for number in signals.HANDLED}
    for number in signals.HANDLED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., Ended]:
    """Call the `main` of a command in this process, as its command line would.

    Of a mistake, the message may name only options that the command has.
    """
    commands: list[str] = []
    real = ldm.cli.main.run

    def run(config_name: str, *arguments: Any, **options: Any) -> None:
        commands.append(config_name)
        real(config_name, *arguments, **options)

    monkeypatch.setattr("ldm.cli.main.run", run)

    def call(main: Callable[[], None], *arguments: str) -> Ended:
        commands.clear()
        monkeypatch.setattr(sys, "argv", [main.__module__, *arguments])
        for name in OF_A_COMMAND:  # of a call before it
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        finally:
            torch.set_flush_denormal(False)  # training sets it for the whole process
        ended = Ended(code, *capsys.readouterr())
        if code == 2 and commands:
            assert not foreign_keys(ended.err, commands[0], arguments), ended.err
        return ended

    return call


def draw_images(folder: Path, count: int, *, size: int = 16, seed: int = 0) -> Path:
    """A folder of PNGs, each a bright square on a ground of its own colour."""
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
    """draw_images(folder, count, size=16, seed=0)."""
    return draw_images
