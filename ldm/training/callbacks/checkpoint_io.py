"""A checkpoint's file: written whole, with its SHA-256 taken on the way, and read without running what is in it."""

import hashlib
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from ldm.files.atomic import durable_file


class HashedWriter(BufferedWriter):
    """A file to write to that knows the SHA-256 of what it was given, and why writing failed."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path, "w"), 1 << 20)
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            size = super().write(data)
        except OSError as error:  # torch reports it as an error of its own, without the reason
            self.failure = error
            raise
        self.digest.update(data)
        return size


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole, straight into its folder. Lightning's own makes a second copy in memory, moves it from
    the folder for temporary files, where a reader can see half of it, and syncs nothing.

    Nothing is raised where the disk refuses: the other ranks wait for this one. `failure` says so instead.
    """

    def __init__(self) -> None:
        self.failure: OSError | None = None
        self.sha256, self.bytes = "", 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.failure = None
        try:
            with durable_file(Path(path)) as partial:
                with HashedWriter(partial) as file:
                    try:
                        torch.save(checkpoint, file)
                    except RuntimeError as error:
                        raise file.failure or error from error
                self.sha256, self.bytes = file.digest.hexdigest(), partial.stat().st_size
        except OSError as error:
            self.failure = error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)
