"""What made a run: the machine, the commit, the versions of what it stands on."""

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ldm.runtime.paths import DISTRIBUTION

PACKAGES = (DISTRIBUTION, "torch", "lightning", "diffusers", "transformers", "hydra-core", "wandb", "numpy")


def provenance() -> dict[str, Any]:
    """Time, machine, commit and library versions."""
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
        said = subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip()
