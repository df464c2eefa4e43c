"""Paths of run folders, and of conf/ and tools/, which are inside the package (wheel) or next to it (checkout)."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
RUN_FILE = "run.json"
"""The file that marks a run folder."""
STAGES = ("vae", "diffusion")
DISTRIBUTION = "ldm-trainer"
"""Name of this package on PyPI, where `ldm` is a different project."""


def is_run(folder: Path) -> bool:
    """Return True if a folder is readable and contains a run."""
    try:
        return (folder / RUN_FILE).is_file()
    except OSError:
        return False


def replaced_folder(run: Path) -> Path:
    """Return the folder that keeps an earlier run until its replacement has saved a checkpoint."""
    return run.with_name(f".{run.name}.replaced")


def bundled_folder(name: str) -> Path:
    """Return the path of the bundled folder with this name, "conf" or "tools"."""
    in_package = _PACKAGE / name
    return in_package if in_package.is_dir() else _PACKAGE.parent / name
