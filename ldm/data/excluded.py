"""Files and folders that are never treated as data: runs and their parent folders, caches, operating system files."""

import re
from collections.abc import Sequence
from pathlib import Path

from ldm.data.cache import shorten
from ldm.data.images import default_cache_dir
from ldm.runtime.paths import STAGES, is_run

SYSTEM_NAMES = re.compile(
    r"__MACOSX|Network Trash Folder|Temporary Items"  # macOS
    r"|@eaDir|@Recycle|@sharebin|@tmp|#recycle|#snapshot|~snapshot|lost\+found"  # NAS systems and Linux
    r"|\$Recycle\.Bin|Recycler|Recycled|System Volume Information|Thumbs\.db|desktop\.ini",  # Windows
    re.IGNORECASE,
)
"""Names of visible files and folders that operating systems create in user folders."""


def is_system_name(name: str) -> bool:
    """Return True if the file or folder is hidden or was created by an operating system."""
    return name.startswith(".") or SYSTEM_NAMES.fullmatch(name) is not None


class FolderFilter:
    """Filter that prunes non-data folders from a directory walk and records them.

    Args:
        folders: Folders to exclude, such as the folders for runs and caches. None means the default cache folder,
            which is always excluded.
    """

    def __init__(self, folders: Sequence[str | Path | None] = ()) -> None:
        self._folders = {Path(folder or default_cache_dir()).expanduser().resolve() for folder in (None, *folders)}
        self.skipped_folders: list[str] = []
        self.system_folders: list[str] = []
        """Excluded visible folders that an operating system created."""

    def prune(self, parent: str | Path, names: Sequence[str], root: Path) -> list[str]:
        """Return the folders among `names` that can contain data. Record excluded folders by path below `root`."""
        data_folders = []
        for name in names:
            folder = Path(parent, name)
            if is_system_name(name):
                self.system_folders += [] if name.startswith(".") else [folder.relative_to(root).as_posix() + "/"]
            elif folder.resolve() in self._folders or is_run(folder) or _contains_runs(folder):
                self.skipped_folders.append(folder.relative_to(root).as_posix() + "/")
            else:
                data_folders.append(name)
        return data_folders

    def describe(self) -> str:
        """Return the names of the skipped run and cache folders as text."""
        return shorten(sorted(set(self.skipped_folders)))


def _contains_runs(folder: Path) -> bool:
    """Return True if the folder contains runs at <folder>/<stage>/<name>."""
    try:
        return any(is_run(entry) for stage in STAGES for entry in (folder / stage).glob("*"))
    except OSError:  # no permission to list the folder
        return False
