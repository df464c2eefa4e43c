"""Console commands: each runs the script of its name in tools/, as `python tools/<name>.py` would."""

import runpy

from ldm.runtime.paths import folder


def sample() -> None:
    _run("sample")


def decode() -> None:
    _run("decode")


def encode() -> None:
    _run("encode")


def forward() -> None:
    _run("forward")


def evaluate() -> None:
    _run("evaluate")


def likelihood() -> None:
    _run("likelihood")


def mixture() -> None:
    _run("mixture")


def latents() -> None:
    _run("latents")


def data() -> None:
    _run("data")


def compare() -> None:
    _run("compare")


def _run(tool: str) -> None:
    """Run a tool as `__main__` with this process's arguments.

    A tool is a script and no module of the package, because a checkout keeps it beside the package.
    """
    runpy.run_path(str(folder("tools") / f"{tool}.py"), run_name="__main__")
