"""Replacing a run with overwrite=true: the earlier run is deleted only once the new one has saved a checkpoint.

runs/<stage>/.<name>.replaced  the earlier run, kept until then; restored if the new run fails earlier
runs/<stage>/.<name>.failed    files of the last run that failed before its first checkpoint, such as its logs
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from ldm.errors import UserError
from ldm.files.lock import file_lock
from ldm.files.untrusted import read_json
from ldm.runs.checkpoints import FOLDER, list_checkpoints
from ldm.runs.lock import lock_file
from ldm.runtime.distributed import warn
from ldm.runtime.paths import RUN_FILE, is_run, replaced_folder
from ldm.tracking.run import finish_open_run


class Replacement:
    """Replaces the run in a folder with a new one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute().resolve()  # keeps a symbolic link to another disk in place
        self.backup = replaced_folder(self.folder)
        self.failed = self.folder.with_name(f".{self.folder.name}.failed")
        self.is_final = False
        """True once the new run has saved a checkpoint and the earlier run is deleted."""

    @contextmanager
    def begin(self, *, overwrite: bool) -> Iterator[None]:
        """Move the earlier run to `backup`, and restore it if the block fails before `finish` is called.

        If the process is killed, the earlier run stays in `backup` until `recover` is called. The caller must hold
        the lock of the run folder.
        """
        if has_saved(self.folder):  # a new run was killed before it had deleted the earlier one
            shutil.rmtree(self.backup, ignore_errors=True)
        try:
            if overwrite and self.backup.exists():
                self._move_to_failed()  # the last new run was killed before its first checkpoint
            elif overwrite and self.folder.exists():
                self.folder.replace(self.backup)
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except BaseException:
            if not self.is_final and self.backup.exists():
                finish_open_run()  # W&B still writes into the folder
                self._move_to_failed()
                self.backup.replace(self.folder)
                warn(f"the earlier run was restored in {self.folder}. Files of the failed run are in {self.failed}.")
            raise
        self.finish()

    def finish(self) -> None:
        """Delete the earlier run. Call it once the new run has saved a checkpoint or is complete."""
        if not self.is_final:
            self.is_final = True
            shutil.rmtree(self.backup, ignore_errors=True)

    def _move_to_failed(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.failed, ignore_errors=True)
            self.folder.replace(self.failed)


def recover(folder: Path, *, resume: bool) -> None:
    """Recover an earlier run whose replacement was killed before its first checkpoint.

    Move the earlier run back if `folder` does not exist, else print a warning that says where it is.

    Args:
        folder: Run folder.
        resume: True if the user wants to resume the run in the folder.

    Raises:
        UserError: if `resume` is True, because the run in `folder` has no checkpoint to resume from.
    """
    folder = folder.absolute().resolve()
    backup = replaced_folder(folder)
    if not backup.exists() or has_saved(folder):
        return
    try:
        with file_lock(lock_file(folder)):
            if not folder.exists():
                backup.replace(folder)
                warn(f"{folder} was restored: a training run with overwrite=true was killed while replacing it.")
                return
    except (Timeout, OSError):
        return  # another process is replacing the run right now
    message = (
        f"A training run with overwrite=true was killed before its first checkpoint. The earlier run from {folder} is "
        f"still in {backup}. To restore it, delete {folder} and rename {backup.name} to {folder.name}."
    )
    if resume:
        raise UserError(f"{message} To start over, use overwrite=true instead of resume=.")
    warn(message)


def has_saved(folder: Path) -> bool:
    """Return True if a run has a checkpoint, or has finished without one."""
    if any(list_checkpoints(folder / FOLDER)):
        return True
    try:
        return is_run(folder) and read_json(folder / RUN_FILE).get("finished") is not None
    except UserError:
        return False
