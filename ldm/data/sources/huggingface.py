"""Datasets of the Hugging Face hub, or local ones in the same formats, downloaded or streamed."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ldm.data.excluded import Excluded
from ldm.data.sources.base import Record, digest_of_files, folder_name, optional_module
from ldm.errors import UserError
from ldm.files.reading import read_file
from ldm.rules import Count, Switch, apply_rules
from ldm.runtime.paths import is_run

READER = 2
"""Reader version; changing it invalidates prepared caches."""
DEFAULT_COLUMNS = ("text", "label")
"""A dataset may lack these. A caption or label column that was asked for by another name must be there."""


@dataclass(eq=False)
class HuggingFace:
    """One split of a dataset: a hub id, a folder in any layout that `datasets` reads, or one saved to disk.

    A hub dataset is known by its id and revision alone, so that its cache opens offline; set `revision` where
    the dataset may change. Streaming reads the first `num_images` and stores nothing but the prepared cache.
    A list in the column of captions holds several captions of one image.

    Args:
        exclude: Folders that are no data, where runs and caches are kept.

    Raises:
        UserError: streaming without num_images; on reading: `datasets` is missing, or what was asked for is.
    """

    path: str
    split: str = "train"
    image_column: str = "image"
    caption_column: str | None = "text"
    label_column: str | None = "label"
    streaming: Switch = False
    num_images: Count | None = None
    revision: str | None = None
    config: str | None = None
    exclude: Sequence[str | Path | None] = ()

    def __post_init__(self) -> None:
        apply_rules(HuggingFace, vars(self))
        if self.streaming and self.num_images is None:
            raise UserError("data.streaming=true needs data.num_images=N: how many images to read from the stream.")
        self.path = str(self.path)
        self._local = Path(self.path).expanduser()
        self.name = folder_name(self._local.resolve().name if self._local.exists() else self.path)
        self.class_names: list[str] | None = None

    @property
    def licence(self) -> str | None:
        return self._dataset.info.license or None

    @property
    def num_records(self) -> int | None:
        if self.streaming:
            return self.num_images
        num_rows = len(self._dataset)
        return num_rows if self.num_images is None else min(num_rows, self.num_images)

    def identity(self) -> dict[str, Any]:
        identity = {field.name: getattr(self, field.name) for field in fields(self)} | {"reader": READER}
        del identity["streaming"], identity["exclude"]
        if self._local.exists():
            root = self._local.resolve()
            files = [path for path in root.rglob("*") if path.is_file()] if root.is_dir() else [root]
            identity |= {"path": root.as_posix(), "files": digest_of_files(root.parent, files)}
        return identity

    def records(self) -> Iterator[Record]:
        dataset = self._dataset
        caption_column, label_column = self._column("caption_column", dataset), self._column("label_column", dataset)
        class_names = getattr((dataset.features or {}).get(label_column or ""), "names", None)
        wanted = dict.fromkeys(filter(None, (self.image_column, caption_column, label_column)))
        dataset = dataset.select_columns(list(wanted))
        dataset = dataset.cast_column(self.image_column, optional_module("datasets", "data").Image(decode=False))
        seen: dict[str, int] = {}
        for number, row in enumerate(self._rows(dataset)):
            label = row.get(label_column or "")
            if isinstance(label, str):
                label = seen.setdefault(label, len(seen))
            cell = row.get(caption_column or "")
            cells = cell if isinstance(cell, list) else [cell]
            texts = [self._checked(text, str, "caption_column") for text in cells]
            captions = list(dict.fromkeys(text for text in texts if text))
            yield Record(
                name=f"{self.split}[{number}]",
                load=partial(_image_bytes, row[self.image_column]),
                caption=captions[0] if captions else None,
                label=self._checked(label, int, "label_column"),
                more_captions=tuple(captions[1:]),
            )
        self.class_names = list(class_names or seen) or None

    @cached_property
    def _dataset(self) -> Any:
        try:
            dataset = self._load()
        except UserError:
            raise
        except Exception as error:  # the hub, its client and every builder raise errors of their own
            asked = f"{self.path} (split={self.split}, config={self.config}, revision={self.revision})"
            remedy = "Check data.path, data.split, data.config and the network; private data needs `hf auth login`."
            raise UserError(f"{asked} cannot be opened: {error} {remedy}") from error
        self._column("image_column", dataset)
        return dataset

    def _load(self) -> Any:
        datasets, local = optional_module("datasets", "data"), self._local
        if (local / "dataset_dict.json").is_file():
            return datasets.load_from_disk(local)[self.split]
        if (local / "state.json").is_file():
            return datasets.load_from_disk(local)
        path, options = str(local) if local.exists() else self.path, {"name": self.config, "revision": self.revision}
        if local.is_dir():
            self._refuse_excluded(local)
        elif local.suffix == ".parquet":
            path, options = "parquet", {"data_files": str(local)}
        return datasets.load_dataset(path, split=self.split, streaming=self.streaming, **options)

    def _refuse_excluded(self, folder: Path) -> None:
        """`datasets` reads every file below a folder, those of our own runs and of operating systems as well."""
        excluded = Excluded(self.exclude)
        for place, folders, _ in os.walk(folder):
            folders[:] = excluded.prune(place, folders, folder)
        if is_run(folder):
            raise UserError(f"data.path={self.path} is a run folder; its figures are not training images.")
        # what begins with two underscores is hidden to `datasets`
        if unwanted := sorted({*excluded.skipped, *(name for name in excluded.system if "__" not in name)}):
            raise UserError(
                f"data.path={self.path} contains {', '.join(unwanted[:5])}, whose images `datasets` would read too. "
                "Use data=image_folder, which skips them, or move them out of that folder."
            )

    def _rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        number = 0
        try:
            for row in itertools.islice(dataset, self.num_images):
                number += 1
                yield row
        except Exception as error:  # a stream breaks in as many ways as there are protocols
            raise UserError(f"Reading {self.path} stopped after {number} images: {error}") from error

    def _column(self, option: str, dataset: Any) -> str | None:
        """The column that an option names; None where there is none of a name that nobody asked for."""
        column, columns = getattr(self, option), dataset.column_names
        if column is None or column in columns:
            return column
        if column in DEFAULT_COLUMNS:
            return None
        shown = ", ".join(columns)
        raise UserError(f"{self.path} has no column {column!r}. Set data.{option}= to one of: {shown}.")

    def _checked(self, value: Any, kind: type, option: str) -> Any:
        """A caption or a label; None where it is absent: null, an empty text, or -1 in place of a label."""
        if value is None or value == "" or (kind is int and value == -1):
            return None
        if not isinstance(value, kind):
            remedy = f"Choose another with data.{option}=, or none with data.{option}=null."
            raise UserError(f"The column {getattr(self, option)!r} holds {value!r}, not {kind.__name__}. {remedy}")
        return kind(value)


def _image_bytes(cell: dict[str, Any] | None) -> bytes:
    if cell is None:
        raise ValueError("the row holds no image")
    if cell["bytes"] is not None:
        return cell["bytes"]
    if "://" not in cell["path"]:
        return read_file(Path(cell["path"]))
    import fsspec  # comes with datasets; opens hf://, https:// and members of archives

    with fsspec.open(cell["path"], "rb") as file:
        return file.read()
