"""One process at a time makes a cache folder; the others wait for it."""

import glob
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.alone import FOR_EVER, alone
from ldm.durable import PARTIAL, restore


@contextmanager
def made_alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache folder, `.<folder>.lock`. Who had to wait should look first whether the folder is there
    now. What a killed process left of a `durable_folder` of that name is deleted.
    """

    def taken() -> float:
        logging.getLogger(__name__).warning("Another process is making %s: waiting for it to end.", folder)
        return FOR_EVER

    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f".{folder.name}.lock"), taken):
        restore(folder)
        for left in folder.parent.glob(f"{PARTIAL}*-{glob.escape(folder.name)}"):
            shutil.rmtree(left, ignore_errors=True)
        yield
