"""The repository passes ruff and mypy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check"),
        ("ruff", "format", "--check", "--diff"),
        ("mypy", "--cache-dir", str(ROOT / ".mypy_cache")),
    ],
    ids=lambda command: " ".join(command[:2]) if command[0] == "ruff" else command[0],
)
def test_linter_passes(command):
    process = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert process.returncode == 0, process.stdout + process.stderr
