"""A thing that a run takes or leaves, with the digest by which other runs name it."""

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
        digest: SHA-256 of what it is.
        metadata: What is said of it, plain values.
        files: Files and folders that belong to it; none where its description is all that may leave this machine.
    """

    type: str
    name: str
    digest: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        """Its name in W&B, where a name has one type, no other signs than these and 128 of them at most."""
        return re.sub(r"[^\w.-]+", "-", f"{self.type}-{self.name}", flags=re.ASCII)[:128]

    @property
    def alias(self) -> str:
        return f"sha-{self.digest[:12]}"

    @property
    def contents(self) -> dict[str, Path]:
        """Every file by its name in the artifact; those of a folder keep their place in it."""
        found = [(path if path.is_dir() else path.parent, file) for path in self.files for file in _files_in(path)]
        return {file.relative_to(folder).as_posix(): file for folder, file in found}


def sha256(content: str | Iterable[Path]) -> str:
    """SHA-256 of a text, or of the contents of files and folders one after the other, in the order of their names."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode()).hexdigest()
    digest = hashlib.sha256()
    for inner in (inner for path in content for inner in _files_in(path)):
        with inner.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _files_in(path: Path) -> list[Path]:
    return [file for file in (path, *sorted(path.rglob("*"))) if file.is_file()]


def plain(value: Any) -> Any:
    """A value as JSON has it: lists stay lists, numpy's numbers become numbers, what else is no plain type its text."""
    return json.loads(json.dumps(value, default=lambda other: other.item() if hasattr(other, "item") else str(other)))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config -> `a.b.c` keys with plain values; a list that holds mappings counts them, `a.0.b`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = plain(value)
    return flat
