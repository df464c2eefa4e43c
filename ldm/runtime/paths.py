"""Where conf/ and tools/ are, next to the package in a checkout and inside it in a wheel, and how a run is known."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
RUN_FILE = "run.json"
"""The file that marks a run folder."""
STAGES = ("vae", "diffusion")
DISTRIBUTION = "ldm-trainer"
"""Our name on PyPI, where `ldm` is another project."""


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, as far as it can be read."""
    try:
        return (folder / RUN_FILE).is_file()
    except OSError:
        return False


def set_aside(run: Path) -> Path:
    """Where a run folder lies while another run, which has not saved anything yet, takes its place."""
    return run.with_name(f".{run.name}.replaced")


def folder(name: str) -> Path:
    """The folder `conf` or `tools`."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
