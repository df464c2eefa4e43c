"""Image folders, with captions from a metadata file or text files and classes from subfolders."""

import csv
import io
import json
import logging
import os
import posixpath
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.excluded import FolderFilter, is_system_name
from ldm.data.sources.base import Record, files_digest, folder_name
from ldm.errors import InputError, UserError
from ldm.files.reading import is_disk_failure, read_file, retry_once
from ldm.files.untrusted import replace_surrogates, to_one_line
from ldm.runtime.paths import is_run

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
PATH_REMEDY = "Make each file_name relative to the folder of the metadata file, and put the images in that folder."
READER = 2
"""Reader version; changing it invalidates prepared caches."""


class ImageFolder:
    """All images in `path` and its subfolders, ordered by their relative names.

    Runs, caches and operating system files (see `ldm.data.excluded`) are skipped. Everything with an image suffix is
    included, even pipes and broken links, and so are folders that cannot be listed. Preparation adds these to the
    quarantine list instead of silently ignoring them.

    Captions are read from `metadata.jsonl` or `metadata.csv` files in any folder, in the layout of Hugging Face's
    imagefolder (`file_name` relative to the metadata file, the caption in `caption_column`). Without a metadata entry,
    the caption is the text of a `.txt` file next to the image, joined into one line. An image has several captions if
    the metadata contains several rows for it, or a list.

    The classes are the top-level subfolders if there are at least two and they contain all images.

    Args:
        exclude: Folders in `path` to skip, such as the folders for runs and caches.

    Raises:
        UserError: the folder does not exist, contains no images, or is a run.
    """

    licence = None

    def __init__(
        self, path: str | Path, caption_column: str | None = "text", exclude: Sequence[str | Path | None] = ()
    ) -> None:
        self.path = Path(path).expanduser()
        self.caption_column = caption_column
        self.name = folder_name(self.path.resolve().name)
        if not self.path.is_dir():
            raise InputError("path", path, "is not a folder")
        if is_run(self.path):
            raise InputError("path", path, "is a run folder. Its figures are not training images")
        self._folder_filter = FolderFilter(exclude)
        self._unlistable: dict[str, OSError] = {}
        try:
            self._files = retry_once(self._visible_files)
        except OSError as error:
            rule = f"cannot be listed: {error.strerror}. Make it readable, or try again when the disk is available"
            raise InputError("path", path, rule) from error
        self._images = [name for name in self._files if name.lower().endswith(IMAGE_SUFFIXES)]
        skipped = self._folder_filter.describe()
        if not self._images:
            where = f" outside the run and cache folders {skipped}" if skipped else ""
            rule = f"contains no images{where}: no file in it or in a subfolder ends in {', '.join(IMAGE_SUFFIXES)}"
            raise InputError("path", path, rule)
        if skipped:
            logging.getLogger(__name__).warning("Skipped the run and cache folders %s in %s.", skipped, path)
        folders = sorted({name.split("/")[0] for name in self._images if "/" in name})
        is_sorted = len(folders) > 1 and all("/" in name for name in self._images)
        self.class_names = folders if is_sorted else None

    @property
    def num_records(self) -> int:
        return len(self._images) + len(self._unlistable)

    def identity(self) -> dict[str, Any]:
        return {
            "path": self.path.resolve().as_posix(),
            "files": files_digest(self.path, self._files.values()),
            "caption_column": self.caption_column,
            "reader": READER,
        }

    def records(self) -> Iterator[Record]:
        captions = self._find_captions()
        labels = {name: label for label, name in enumerate(self.class_names or [])}
        for name in self._images:
            texts, label = captions.get(name, []), labels.get(name.split("/")[0])
            load = partial(read_file, self._files[name])
            yield Record(to_one_line(name), load, next(iter(texts), None), label, more_captions=tuple(texts[1:]))
        for name, error in self._unlistable.items():
            yield Record(to_one_line(name), partial(_raise, error))

    def _visible_files(self) -> dict[str, Path]:
        """Map the relative names of all image, text and metadata files to their paths, sorted by name."""
        self._unlistable.clear()
        files = {}
        for folder, folders, names in os.walk(self.path, onerror=self._record_unlistable):
            folders[:] = self._folder_filter.prune(folder, folders, self.path)
            for path in (Path(folder, name) for name in names if not is_system_name(name)):
                is_text = path.suffix.lower() == ".txt" or path.name in METADATA_NAMES
                if path.suffix.lower() in IMAGE_SUFFIXES or (is_text and path.is_file()):
                    files[path.relative_to(self.path).as_posix()] = path
        return dict(sorted(files.items()))

    def _record_unlistable(self, error: OSError) -> None:
        if is_disk_failure(error) or Path(error.filename) == self.path:
            raise error
        self._unlistable[Path(error.filename).relative_to(self.path).as_posix() + "/"] = error

    def _find_captions(self) -> dict[str, list[str]]:
        if self.caption_column is None:
            return {}
        captions: dict[str, list[str]] = {}
        for name in self._images:
            text_file = self._files.get(str(Path(name).with_suffix(".txt").as_posix()))
            if text_file is not None and (text := " ".join(self._read_text(text_file).split())):
                captions[name] = [text]
        for name, path in self._files.items():
            if path.name in METADATA_NAMES:
                captions |= self._metadata_captions(path, posixpath.dirname(name), self.caption_column)
        return captions

    def _metadata_captions(self, metadata: Path, folder: str, caption_column: str) -> dict[str, list[str]]:
        rows = list(_read_rows(metadata, self._read_text(metadata), ("file_name", caption_column)))
        captions: dict[str, list[str]] = {}
        num_existing = 0
        for line, row in rows:
            relative = str(row.get("file_name") or "")
            if not relative or "\n" in relative:
                rule = "the row must have a file_name without line breaks"
                raise UserError(f"{metadata}, line {line}: {rule}. Correct the row.")
            name = _resolve(folder, relative)
            if name.startswith(("../", "/")) or name == "..":
                raise UserError(f"{metadata} lists {relative[:200]!r}, which is outside {self.path}. {PATH_REMEDY}")
            num_existing += name in self._files
            if metadata.suffix == ".csv":
                # A missing closing quote merges the following rows into one cell, silently losing their captions.
                parts = [part for cell in row.values() if "\n" in cell for part in cell.replace("\n", ",").split(",")]
                for part in (part.strip(' "') for part in parts):
                    if name != _resolve(folder, part) in self._files:
                        problem = f"unclosed quote that extends to the row of {part}"
                        raise UserError(f"{metadata}, line {line}: {problem}. Add the closing quote.")
            cell = row.get(caption_column)
            for text in cell if isinstance(cell, list) else [cell]:
                if not isinstance(text, str | None):
                    rule = f"the caption of {relative} must be a string or a list of strings, not {text!r}"
                    raise UserError(f"{metadata}, line {line}: {rule}.")
                caption = replace_surrogates((text or "").strip())
                if caption and caption not in captions.setdefault(name, []):
                    captions[name].append(caption)
        if rows and not num_existing:
            first = rows[0][1].get("file_name")
            raise UserError(f"{metadata} lists no existing images. Its first file_name is {first!r}. {PATH_REMEDY}")
        return {name: texts for name, texts in captions.items() if texts}

    def _read_text(self, path: Path) -> str:
        """Read a caption or metadata file. Links to files outside `path` are rejected."""
        if not path.resolve().is_relative_to(self.path.resolve()):
            target = f"{path.resolve()}, which is outside {self.path}"
            raise UserError(f"{path} is a link to {target}. Replace the link with a copy of the file.")
        try:
            return read_file(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not valid UTF-8 ({error.reason}). Save it with UTF-8 encoding.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error


def _raise(error: OSError) -> bytes:
    raise error


def _resolve(folder: str, name: str) -> str:
    """Convert a name in the metadata file of `folder` to a name relative to the root."""
    return posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))


def _read_rows(metadata: Path, text: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row of a metadata file with the number of its first line.

    Raises:
        UserError: the file is not valid CSV or JSON Lines, or lacks one of the columns.
    """
    if metadata.suffix == ".csv":
        yield from _csv_rows(metadata, text, columns)
        return
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{metadata}, line {number}, is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UserError(f'{metadata}, line {number}, must be a JSON object, such as {{"file_name": ...}}.')
        rows.append((number, row))
    if rows:
        _require_columns(metadata, rows[0][0], [*{key: None for _, row in rows for key in row}], columns)
    yield from rows


def _csv_rows(metadata: Path, text: str, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV file. Only newlines end a line, since a caption can contain U+2028 or a form feed.

    Raises:
        UserError: a row has more or fewer fields than the header, a quote is not closed, or a column is missing or
            appears twice.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    quoting = 'Put captions with commas or quotes in double quotes, and double any quotes inside: "a ""b"", c".'
    line = 1
    try:
        columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        _require_columns(metadata, line, columns, required)
        line = reader.line_num + 1
        for row in reader:
            if None in row or (None in row.values() and any(row.values())):
                rule = f"the number of fields differs from the header ({', '.join(columns)})"
                raise UserError(f"{metadata}, line {line}: {rule}. {quoting}")
            if any(row.values()):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        reason = "unclosed quote" if "end of data" in str(error) else str(error)
        raise UserError(f"{metadata}, line {line}: {reason}. {quoting}") from error


def _require_columns(metadata: Path, line: int, columns: list[str], required: Sequence[str]) -> None:
    for column in required:
        if columns.count(column) != 1:
            problem = f"expected one column {column!r}, but found {columns.count(column)} among: {', '.join(columns)}"
            raise UserError(
                f"{metadata}, line {line}: {problem}. The file must have a file_name column and a caption column, "
                "separated by commas if it is a CSV file. Choose the caption column with data.caption_column=, or use "
                "data.caption_column=null to ignore captions."
            )
