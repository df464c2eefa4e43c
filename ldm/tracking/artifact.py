"""Inputs and outputs of runs, identified by their digest."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Artifact:
    """Data, an autoencoder, latents, a pipeline or an evaluation.

    Args:
        type: data, autoencoder, latents, pipeline or evaluation.
        name: Name of the run or data set.
        digest: SHA-256 of the content.
        metadata: Description, as plain values.
        files: Files and folders to upload; empty to upload the description only.
    """

    type: str
    name: str
    digest: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        """Name in W&B, where names must be unique across types, with at most 128 letters, digits, _, . and -."""
        return re.sub(r"[^\w.-]+", "-", f"{self.type}-{self.name}", flags=re.ASCII)[:128]

    @property
    def alias(self) -> str:
        """Alias in W&B, to look up a version by its digest."""
        return f"sha-{self.digest[:12]}"

    @property
    def contents(self) -> dict[str, Path]:
        """Files by their name in the artifact. Files in a folder are named relative to that folder."""
        files = [(path if path.is_dir() else path.parent, file) for path in self.files for file in _files_in(path)]
        return {file.relative_to(folder).as_posix(): file for folder, file in files}


def sha256(content: str | Iterable[Path]) -> str:
    """Return the SHA-256 of a string, or of the concatenated contents of files and folders (sorted by name)."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode()).hexdigest()
    digest = hashlib.sha256()
    for path in (file for item in content for file in _files_in(item)):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _files_in(path: Path) -> list[Path]:
    return [file for file in (path, *sorted(path.rglob("*"))) if file.is_file()]


def to_plain(value: Any) -> Any:
    """Convert a value to JSON types: NumPy scalars to numbers, and other unsupported types to strings."""
    return json.loads(json.dumps(value, default=lambda leaf: leaf.item() if hasattr(leaf, "item") else str(leaf)))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested config to `a.b.c` keys with plain values. Lists of mappings use indices, as in `a.0.b`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = to_plain(value)
    return flat
