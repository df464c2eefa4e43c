"""A checkpoint's file: written whole, with its SHA-256 taken on the way, and read without running what is in it."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from ldm.files.atomic import durable_file


class HashedWriter:
    """A file to write to that knows the SHA-256 and the size of what it was given, and why writing failed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 20)
        self._digest, self.bytes = hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:  # torch reports it as an error of its own, without the reason
            self.failure = error
            raise
        self._digest.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


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
                self._write(checkpoint, partial)
        except OSError as error:
            self.failure = error

    def _write(self, checkpoint: dict[str, Any], partial: Path) -> None:
        file = HashedWriter(partial)
        try:
            torch.save(checkpoint, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            if file.failure is not None:
                raise file.failure from error
            raise
        finally:
            file.close()
        self.sha256, self.bytes = file.sha256, file.bytes

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)
