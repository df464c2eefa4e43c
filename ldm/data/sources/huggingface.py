"""Datasets from the Hugging Face Hub (downloaded or streamed), or local datasets in the same formats."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ldm.data.excluded import FolderFilter
from ldm.data.sources.base import Record, files_digest, folder_name, optional_module
from ldm.errors import InputError, UserError
from ldm.files.reading import read_file
from ldm.files.untrusted import first_line
from ldm.rules import Count, Flag, apply_rules
from ldm.runtime.paths import is_run

READER = 3
"""Reader version; changing it invalidates prepared caches."""
DEFAULT_COLUMNS = ("text", "label")
"""Default caption and label columns. A dataset can lack them, but any other configured column must exist."""


@dataclass(eq=False)
class HuggingFace:
    """One split of a hub dataset, of a folder in any layout supported by `datasets`, or of a dataset saved to disk.

    The contents of a hub dataset are not checked for changes, so that its cache can be opened offline. Set `revision`
    if the dataset can change. Streaming reads the first `num_images` images and stores only the prepared cache. The
    caption column can contain a list of captions for each image.

    Args:
        exclude: Folders for runs and caches, which are not data.

    Raises:
        UserError: `streaming` is set without `num_images`. While reading: `datasets` is not installed, or the dataset
            or a column does not exist.
    """

    path: str
    split: str = "train"
    image_column: str = "image"
    caption_column: str | None = "text"
    label_column: str | None = "label"
    streaming: Flag = False
    num_images: Count | None = None
    revision: str | None = None
    config: str | None = None
    exclude: Sequence[str | Path | None] = ()

    def __post_init__(self) -> None:
        apply_rules(HuggingFace, vars(self))
        if self.streaming and self.num_images is None:
            raise UserError("data.streaming=true requires data.num_images=N, the number of images to read.")
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
            identity |= {"path": root.as_posix(), "files": files_digest(root.parent, files)}
        return identity

    def records(self) -> Iterator[Record]:
        dataset = self._dataset
        caption_column, label_column = self._column("caption_column", dataset), self._column("label_column", dataset)
        class_names = getattr((dataset.features or {}).get(label_column or ""), "names", None)
        columns = dict.fromkeys(filter(None, (self.image_column, caption_column, label_column)))
        dataset = self._with_encoded_images(dataset.select_columns(list(columns)))
        for number, row in enumerate(self._rows(dataset)):
            cell = row.get(caption_column or "")
            cells = cell if isinstance(cell, list) else [cell]
            texts = [self._caption(text) for text in cells]
            captions = list(dict.fromkeys(text for text in texts if text))
            yield Record(
                name=f"{self.split}[{number}]",
                load=partial(_image_bytes, row[self.image_column]),
                caption=captions[0] if captions else None,
                label=self._class(number, row.get(label_column or ""), class_names),
                more_captions=tuple(captions[1:]),
            )
        self.class_names = class_names

    @cached_property
    def _dataset(self) -> Any:
        try:
            dataset = self._load()
        except UserError:
            raise
        except Exception as error:  # the hub, its client and the dataset builders raise many types of exceptions
            name = f"{self.path} (split={self.split}, config={self.config}, revision={self.revision})"
            remedy = "Check data.path, data.split, data.config and the network. Private data requires `hf auth login`."
            raise UserError(f"{name} cannot be opened: {error} {remedy}") from error
        self._column("image_column", dataset)
        return dataset

    def _load(self) -> Any:
        datasets, local = optional_module("datasets", "data"), self._local
        if (local / "dataset_dict.json").is_file():
            return self._select_split(datasets.load_from_disk(local))
        if (local / "state.json").is_file():
            dataset = datasets.load_from_disk(local)
            return self._select_split({str(dataset.split or "train"): dataset})
        path, options = str(local) if local.exists() else self.path, {"name": self.config, "revision": self.revision}
        if local.is_dir():
            self._refuse_excluded(local)
        elif local.suffix.lower() == ".parquet":
            path, options = "parquet", {"data_files": str(local)}
        elif local.exists():
            raise UserError(
                f"data.path={self.path} is a file, but only .parquet files can be read directly. Use the folder that "
                f"contains it: data.path={local.parent}"
            )
        return self._select_split(datasets.load_dataset(path, streaming=self.streaming, **options))

    def _select_split(self, splits: Mapping[str, Any]) -> Any:
        """Return the rows that the expression `split` selects, such as train+test or train[:10%].

        Raises:
            UserError: the expression is invalid, or names a split that does not exist.
        """
        if self.split in splits:
            return splits[self.split]
        datasets, existing = optional_module("datasets", "data"), ", ".join(splits)
        if self.streaming:
            rule = f"with data.streaming=true, it must be one of the splits of {self.path}: {existing}"
            raise UserError(f"data.split={self.split} cannot be read: {rule}.")
        try:
            spec = datasets.ReadInstruction.from_spec(self.split)
            parts = spec.to_absolute({name: len(rows) for name, rows in splits.items()})
        except (ValueError, AssertionError) as error:
            reason = f"{first_line(error)}. The splits of {self.path} are: {existing}"
            raise UserError(f"data.split={self.split} cannot be read: {reason}.") from error
        return datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])

    def _refuse_excluded(self, folder: Path) -> None:
        """Reject a folder that contains excluded folders, because `datasets` reads all files in all subfolders."""
        folder_filter = FolderFilter(self.exclude)
        for parent, folders, _ in os.walk(folder):
            folders[:] = folder_filter.prune(parent, folders, folder)
        if is_run(folder):
            raise UserError(f"data.path={self.path} is a run folder. Its figures are not training images.")
        # `datasets` ignores names that start with two underscores
        system_folders = {name for name in folder_filter.system_folders if "__" not in name}
        if unwanted := sorted({*folder_filter.skipped_folders} | system_folders):
            raise UserError(
                f"data.path={self.path} contains {', '.join(unwanted[:5])}, which `datasets` would read as data. "
                "Use data=image_folder, which skips these folders, or move them elsewhere."
            )

    def _rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        number = 0
        try:
            for row in itertools.islice(dataset, self.num_images):
                number += 1
                yield row
        except Exception as error:  # the exception type depends on the streaming protocol
            raise UserError(f"Reading {self.path} stopped after {number} images: {error}") from error

    def _column(self, option: str, dataset: Any) -> str | None:
        """Return the column set by an option, or None if it is a default column that the dataset lacks."""
        column, columns = getattr(self, option), dataset.column_names
        if column is None or column in columns:
            return column
        if column in DEFAULT_COLUMNS:
            return None
        raise UserError(f"{self.path} has no column {column!r}. Set data.{option}= to one of: {', '.join(columns)}.")

    def _with_encoded_images(self, dataset: Any) -> Any:
        datasets = optional_module("datasets", "data")
        try:
            return dataset.cast_column(self.image_column, datasets.Image(decode=False))
        except Exception as error:  # pyarrow and datasets raise errors of many types
            kind = (dataset.features or {}).get(self.image_column)
            rule = f"must be a column with one image per row, but {self.path} stores {kind} in it"
            raise InputError("image_column", self.image_column, rule) from error

    def _caption(self, value: Any) -> str | None:
        """Return a caption, or None if it is missing (null or blank)."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not isinstance(value, str):
            rule = f"must be a column of strings, but contains {value!r}. Choose a different column, or null"
            raise InputError("caption_column", self.caption_column, f"{rule} to ignore captions")
        return value

    def _class(self, number: int, value: Any, class_names: Sequence[str] | None) -> int | str | None:
        """Return a class, or None if it is missing: null, NaN, or -1 in a column with named classes."""
        if value is None or value != value or (class_names and value == -1):
            return None
        if isinstance(value, float) and value.is_integer():  # tables with missing values store integers as floats
            value = int(value)
        rule = None
        if not isinstance(value, int | str):
            rule = f"must be a column of integers or strings, but contains {value!r}"
        elif not str(value).strip():
            rule = f"contains an empty string in row {number}, which is no class name. Correct the row"
        elif class_names and not (isinstance(value, int) and 0 <= value < len(class_names)):
            rule = f"has {len(class_names)} named classes, but row {number} has the class {value}"
        if rule is not None:
            remedy = "Choose a different column, or null to ignore classes"
            raise InputError("label_column", self.label_column, f"{rule}. {remedy}")
        return value


def _image_bytes(cell: dict[str, Any] | None) -> bytes:
    if cell is None:
        raise ValueError("the row has no image")
    if cell["bytes"] is not None:
        return cell["bytes"]
    if "://" not in cell["path"]:
        return read_file(Path(cell["path"]))
    import fsspec  # installed with datasets; opens hf://, https:// and files in archives

    with fsspec.open(cell["path"], "rb") as file:
        return file.read()
