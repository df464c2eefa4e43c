"""Imports run one way, and each outside library has its own door: the contracts in pyproject.toml hold."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--no-logo"],
        cwd=root,
        env={**os.environ, "COLUMNS": "200", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_the_contracts_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_contract_catches_what_breaks_it(tmp_path):
    """A linter that passes proves nothing until it has failed: break every contract at once in a copy."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("ldm", "tools"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    trespasses = {
        ("diffusion/chain.py", "tools.sample"),
        ("diffusion/chain.py", "ldm.runs.run"),
        ("networks/dit.py", "ldm.autoencoder.autoencoder"),
        ("pipeline.py", "lightning"),
        ("pipeline.py", "omegaconf"),
        ("training/ema.py", "hydra"),
        ("training/ema.py", "wandb"),
        ("pipeline.py", "transformers"),
        ("data/images.py", "torchvision"),
    }
    for file, module in trespasses:
        with (tmp_path / "ldm" / file).open("a", encoding="utf-8") as source:
            source.write(f"\n\ndef trespass_{module.replace('.', '_')}():\n    import {module}\n")
    (tmp_path / "ldm" / "newcomer.py").write_text("", encoding="utf-8")

    done = lint_imports(tmp_path)

    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"Contracts: 0 kept, \d+ broken", done.stdout), done.stdout
    assert "newcomer" in done.stdout, "a module without a layer"
    for file, module in trespasses:
        importer = "ldm." + file.removesuffix(".py").replace("/", ".")
        assert re.search(rf"{re.escape(importer)} -> {re.escape(module)}\b", done.stdout), (importer, module)
