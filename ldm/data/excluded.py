"""What never counts as data: runs, the folders of runs and caches, and what operating systems put among files."""

import re
from collections.abc import Sequence
from pathlib import Path

from ldm.data.cache import shorten
from ldm.data.images import default_cache_dir
from ldm.runtime.paths import STAGES, is_run

SYSTEM_NAMES = re.compile(
    r"__MACOSX|Network Trash Folder|Temporary Items"  # archives of macOS
    r"|@eaDir|@Recycle|@sharebin|@tmp|#recycle|#snapshot|~snapshot|lost\+found"  # NAS systems and Linux
    r"|\$Recycle\.Bin|Recycler|Recycled|System Volume Information|Thumbs\.db|desktop\.ini",  # Windows
    re.IGNORECASE,
)
"""Of files and folders that systems put among a user's. Others are hidden."""


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden, or a system's own."""
    return name.startswith(".") or SYSTEM_NAMES.fullmatch(name) is not None


class Excluded:
    """Decides which folders below a folder of data are not data, and remembers them.

    Args:
        folders: Always excluded: where runs and caches are kept. None stands for the default cache.
    """

    def __init__(self, folders: Sequence[str | Path | None] = ()) -> None:
        self._folders = {Path(folder or default_cache_dir()).expanduser().resolve() for folder in (None, *folders)}
        self.skipped: list[str] = []
        self.system: list[str] = []
        """Folders of operating systems among them that are not hidden."""

    def prune(self, parent: str | Path, names: Sequence[str], root: Path) -> list[str]:
        """Those of the folders `names` in `parent` that count as data; `root` is where the search began."""
        kept = []
        for name in names:
            folder = Path(parent, name)
            if is_system_name(name):
                self.system += [] if name.startswith(".") else [folder.relative_to(root).as_posix() + "/"]
            elif folder.resolve() in self._folders or is_run(folder) or _holds_runs(folder):
                self.skipped.append(folder.relative_to(root).as_posix() + "/")
            else:
                kept.append(name)
        return kept

    def describe(self) -> str:
        """The run and cache folders that were skipped, as text."""
        return shorten(sorted(set(self.skipped)))


def _holds_runs(folder: Path) -> bool:
    """Whether runs are kept in a folder, in <folder>/<stage>/<name>."""
    try:
        return any(is_run(entry) for stage in STAGES for entry in (folder / stage).glob("*"))
    except OSError:  # it may not be listed
        return False
