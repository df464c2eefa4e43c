"""overwrite=true: the run that is replaced is set aside, and deleted once the new one has saved a checkpoint.

runs/<stage>/.<name>.replaced  the earlier run, until then; a start that fails puts it back
runs/<stage>/.<name>.failed    files of the last start that failed, such as its logs and skipped steps
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from ldm.errors import UserError
from ldm.files.lock import alone
from ldm.files.untrusted import read_json
from ldm.runs.checkpoints import FOLDER, manifests
from ldm.runs.lock import lock_file
from ldm.runtime.distributed import warn
from ldm.runtime.paths import RUN_FILE, is_run, set_aside
from ldm.tracking.run import finish_open_run


class Replacement:
    """The earlier run in a folder, while a new one takes its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute().resolve()  # a link to another disk stays one
        self.aside = set_aside(self.folder)
        self.failed = self.folder.with_name(f".{self.folder.name}.failed")
        self.is_final = False
        """The new run has saved a checkpoint, and the earlier one is deleted."""

    @contextmanager
    def begin(self, *, overwrite: bool) -> Iterator[None]:
        """Set the earlier run aside. It is put back if the block fails before `finish`; a kill leaves it aside.

        Only while the lock of the run folder is held.
        """
        if has_saved(self.folder):  # a kill came between the first checkpoint and the end of the deletion
            shutil.rmtree(self.aside, ignore_errors=True)
        try:
            if overwrite and self.aside.exists():
                self._keep_as_failed()  # the beginning of a start that was killed
            elif overwrite and self.folder.exists():
                self.folder.replace(self.aside)
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except BaseException:
            if not self.is_final and self.aside.exists():
                finish_open_run()  # it writes into the folder
                self._keep_as_failed()
                self.aside.replace(self.folder)
                warn(f"the earlier run is back in {self.folder}. The failed start's files are in {self.failed}.")
            raise
        self.finish()

    def finish(self) -> None:
        """Delete the earlier run: the new one has saved a checkpoint, or is complete."""
        if not self.is_final:
            self.is_final = True
            shutil.rmtree(self.aside, ignore_errors=True)

    def _keep_as_failed(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.failed, ignore_errors=True)
            self.folder.replace(self.failed)


def recover(folder: Path, *, resume: bool) -> None:
    """Say where the run is that a start with overwrite=true was replacing in `folder` when it was killed.

    It gets its name back where nothing has taken it.

    Raises:
        UserError: that start is to be resumed, but it saved nothing.
    """
    folder = folder.absolute().resolve()
    aside = set_aside(folder)
    if not aside.exists() or has_saved(folder):
        return
    try:
        with alone(lock_file(folder)):
            if not folder.exists():
                aside.replace(folder)
                warn(f"{folder} was moved aside by a start that was killed; restored.")
                return
    except (Timeout, OSError):
        return  # a training is replacing it now
    said = (
        f"{aside} holds the earlier run of {folder}, which a start with overwrite=true was replacing when it was killed"
        f", before it saved a checkpoint. To bring it back, delete {folder} and rename {aside.name} to {folder.name}"
    )
    if resume:
        raise UserError(f"{said}; to start over, use overwrite=true instead of resume=.")
    warn(f"{said}.")


def has_saved(folder: Path) -> bool:
    """Whether a run has a checkpoint, or is complete without one."""
    if any(manifests(folder / FOLDER)):
        return True
    try:
        return is_run(folder) and read_json(folder / RUN_FILE).get("finished") is not None
    except UserError:
        return False
