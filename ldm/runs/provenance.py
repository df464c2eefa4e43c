"""Provenance of a run: time, machine, git commit and library versions."""

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ldm.runtime.paths import DISTRIBUTION

PACKAGES = (DISTRIBUTION, "torch", "lightning", "diffusers", "transformers", "hydra-core", "wandb", "numpy")


def provenance() -> dict[str, Any]:
    """Return the current time, the machine, the git commit and library versions, as entries of run.json."""
    return {
        "started": time.time(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "commit": _commit(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        output = subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip()
