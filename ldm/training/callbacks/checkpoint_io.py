"""Checkpoint files: atomic writes that are hashed on the fly, and reads that do not execute pickled code."""

import hashlib
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from ldm.files.atomic import atomic_write


class HashingWriter(BufferedWriter):
    """A writer that computes the SHA-256 of the file on the fly and stores the error in `failure` if a write fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path, "w"), 1 << 20)
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            size = super().write(data)
        except OSError as error:  # torch.save replaces this error with one that has no reason
            self.failure = error
            raise
        self.digest.update(data)
        return size


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically.

    Lightning's implementation makes a second copy of the checkpoint in memory and does not sync the file. It also moves
    the file from the system's temporary folder, so that readers can see a partly written file.

    A write error is stored in `failure` instead of being raised, because the other ranks are waiting for this rank.
    """

    def __init__(self) -> None:
        self.failure: OSError | None = None
        self.sha256, self.bytes = "", 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.failure = None
        try:
            with atomic_write(Path(path)) as partial:
                with HashingWriter(partial) as file:
                    try:
                        torch.save(checkpoint, file)
                    except RuntimeError as error:
                        raise file.failure or error from error
                self.sha256, self.bytes = file.digest.hexdigest(), partial.stat().st_size
        except OSError as error:
            self.failure = error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)
