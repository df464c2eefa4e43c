"""Datasets of the Hugging Face hub, or local ones in the same formats, downloaded or streamed."""

import itertools
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ldm.data.excluded import Excluded
from ldm.data.sources.base import Record, digest_of_files, folder_name
from ldm.errors import UserError
from ldm.files.reading import read_file
from ldm.runtime import shell
from ldm.runtime.paths import is_run

READER = 2
"""Reader version; changing it invalidates prepared caches."""
DEFAULT_COLUMNS = ("text", "label")
"""A dataset may lack these. A caption or label column that was asked for by another name must be there."""


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

    def __init__(
        self,
        path: str,
        split: str = "train",
        image_column: str = "image",
        caption_column: str | None = "text",
        label_column: str | None = "label",
        streaming: bool = False,
        num_images: int | None = None,
        revision: str | None = None,
        config: str | None = None,
        exclude: Sequence[str | Path | None] = (),
    ) -> None:
        if streaming and num_images is None:
            raise UserError("data.streaming=true needs data.num_images=N: how many images to read from the stream.")
        if num_images is not None and num_images < 1:
            raise UserError(f"data.num_images must be at least 1, not {num_images}.")
        self.path = str(path)
        self.split = split
        self.image_column = image_column
        self.caption_column = caption_column
        self.label_column = label_column
        self.streaming = streaming
        self.num_images = num_images
        self.revision = revision
        self.config = config
        self.exclude = exclude
        self.name = folder_name(self.path if not self._is_local else Path(self.path).resolve().name)
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
        keys = (
            "path",
            "config",
            "split",
            "revision",
            "image_column",
            "caption_column",
            "label_column",
            "num_images",
        )
        identity = {key: getattr(self, key) for key in keys} | {"reader": READER}
        if self._is_local:
            root = Path(self.path).expanduser().resolve()
            files = [path for path in root.rglob("*") if path.is_file()] if root.is_dir() else [root]
            identity |= {"path": root.as_posix(), "files": digest_of_files(root.parent, files)}
        return identity

    def records(self) -> Iterator[Record]:
        dataset = self._dataset
        columns = dataset.column_names
        caption_column = self._optional_column("caption_column", columns)
        label_column = self._optional_column("label_column", columns)
        wanted = [self.image_column, *filter(None, (caption_column, label_column))]
        label_feature = (dataset.features or {}).get(label_column or "")
        class_names = getattr(label_feature, "names", None)
        dataset = dataset.select_columns(list(dict.fromkeys(wanted)))
        dataset = dataset.cast_column(self.image_column, _import_datasets().Image(decode=False))
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

    @property
    def _is_local(self) -> bool:
        return Path(self.path).expanduser().exists()

    @cached_property
    def _dataset(self) -> Any:
        try:
            dataset = self._load()
        except UserError:
            raise
        except Exception as error:  # the hub, its client and every builder raise errors of their own
            raise UserError(
                f"{self.path} (split={self.split}, config={self.config}, revision={self.revision}) cannot be "
                f"opened: {error} Check data.path, data.split and data.config, and the network; a "
                "private dataset needs `hf auth login`."
            ) from error
        columns = dataset.column_names
        if self.image_column not in columns:
            raise UserError(self._no_such_column("image_column", columns))
        return dataset

    def _load(self) -> Any:
        datasets = _import_datasets()
        local = Path(self.path).expanduser()
        if (local / "dataset_dict.json").is_file():
            return datasets.load_from_disk(local)[self.split]
        if (local / "state.json").is_file():
            return datasets.load_from_disk(local)
        options: dict[str, Any] = {"split": self.split, "streaming": self.streaming}
        if local.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=str(local), **options)
        if local.is_dir():
            self._refuse_excluded(local)
        path = str(local) if local.exists() else self.path
        return datasets.load_dataset(path, self.config, revision=self.revision, **options)

    def _refuse_excluded(self, folder: Path) -> None:
        """`datasets` reads every file below a folder, those of our own runs and of operating systems as well."""
        excluded = Excluded(self.exclude)
        for place, folders, _ in os.walk(folder):
            folders[:] = excluded.prune(place, folders, folder)
        if is_run(folder):
            raise UserError(f"data.path={self.path} is a run folder; its figures are not training images.")
        # what begins with two underscores is hidden to `datasets`
        if unwanted := sorted({*excluded.skipped, *(name for name in excluded.system if "__" not in name)}):
            shown = ", ".join(unwanted[:5])
            raise UserError(
                f"data.path={self.path} contains {shown}, whose images `datasets` would read too. Use "
                "data=image_folder, which skips them, or move them out of that folder."
            )

    def _rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        rows = iter(itertools.islice(dataset, self.num_images))
        for number in itertools.count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a stream breaks in as many ways as there are protocols
                raise UserError(f"Reading {self.path} stopped after {number} images: {error}") from error
            yield row

    def _optional_column(self, option: str, columns: list[str]) -> str | None:
        column = getattr(self, option)
        if column is None or column in columns:
            return column
        if column in DEFAULT_COLUMNS:
            return None
        raise UserError(self._no_such_column(option, columns))

    def _no_such_column(self, option: str, columns: list[str]) -> str:
        column = getattr(self, option)
        return f"{self.path} has no column {column!r}. Set data.{option}= to one of: {', '.join(columns)}."

    def _checked(self, value: Any, kind: type, option: str) -> Any:
        """A caption or a label; None where it is absent: null, an empty text, or -1 in place of a label."""
        if value is None or value == "" or (kind is int and value == -1):
            return None
        if not isinstance(value, kind):
            raise UserError(
                f"{self.path}: the column {getattr(self, option)!r} holds {value!r}, not {kind.__name__}. "
                f"Choose another with data.{option}=, or none with data.{option}=null."
            )
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


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"This data needs the package datasets: {shell.install_command('data')}") from error
    return datasets
