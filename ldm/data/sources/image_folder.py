"""A folder of images of one's own: captions from a metadata file or text files, classes from subfolders."""

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

from ldm.data.excluded import Excluded, is_system_name
from ldm.data.sources.base import Record, digest_of_files, folder_name
from ldm.errors import InputError, UserError
from ldm.files.reading import is_failure, read_file, retried
from ldm.files.untrusted import clean_text, one_line
from ldm.runtime.paths import is_run

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
RELATIVE = "Write each file_name relative to the folder of the metadata file, and put the images below that folder."
READER = 2
"""Reader version; changing it invalidates prepared caches."""


class ImageFolder:
    """Every image below `path`, in the order of the relative names.

    Runs, caches and the folders and files of systems (`ldm.data.excluded`) never count. Whatever bears an image's name
    does, a pipe or a broken link too, and so does a folder that may not be listed: preparation puts them into
    quarantine instead of losing them in silence.

    Captions: `metadata.jsonl` or `metadata.csv` in any folder, in the manner of Hugging Face's imagefolder
    (`file_name` relative to the metadata file, the text in `caption_column`); else a `.txt` next to the image, whose
    lines are joined. Several rows of one image, or a list in `caption_column`, are several captions of it.
    Classes: the folders at the first level, when there are several and no image lies outside them.

    Args:
        exclude: Folders that never count although they may lie below `path`: where runs and caches are kept.

    Raises:
        UserError: the folder is missing, holds no images, or is a run.
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
            raise InputError("path", path, "is a run folder, whose figures are not training images")
        self._excluded = Excluded(exclude)
        self._closed: dict[str, OSError] = {}
        try:
            self._files = retried(self._visible_files)
        except OSError as error:
            rule = f"cannot be listed: {error.strerror}. Make it readable, or try again when its disk answers"
            raise InputError("path", path, rule) from error
        self._images = [name for name in self._files if name.lower().endswith(IMAGE_SUFFIXES)]
        skipped = self._excluded.describe()
        if not self._images:
            found = f" outside the run and cache folders {skipped}" if skipped else ""
            rule = f"holds no images{found}: no file, at any depth, ends in {', '.join(IMAGE_SUFFIXES)}"
            raise InputError("path", path, rule)
        if skipped:
            logging.getLogger(__name__).warning("Skipped the run and cache folders %s in %s.", skipped, path)
        folders = sorted({name.split("/")[0] for name in self._images if "/" in name})
        is_sorted = len(folders) > 1 and all("/" in name for name in self._images)
        self.class_names = folders if is_sorted else None

    @property
    def num_records(self) -> int:
        return len(self._images) + len(self._closed)

    def identity(self) -> dict[str, Any]:
        return {
            "path": self.path.resolve().as_posix(),
            "files": digest_of_files(self.path, self._files.values()),
            "caption_column": self.caption_column,
            "reader": READER,
        }

    def records(self) -> Iterator[Record]:
        captions = self._find_captions()
        labels = {name: label for label, name in enumerate(self.class_names or [])}
        for name in self._images:
            texts, label = captions.get(name, []), labels.get(name.split("/")[0])
            load = partial(read_file, self._files[name])
            yield Record(one_line(name), load, next(iter(texts), None), label, more_captions=tuple(texts[1:]))
        for name, error in self._closed.items():
            yield Record(one_line(name), partial(_fail, error))

    def _visible_files(self) -> dict[str, Path]:
        """Relative name -> path of every image, text and metadata file, sorted by name."""
        self._closed.clear()
        files = {}
        for folder, folders, names in os.walk(self.path, onerror=self._closed_folder):
            folders[:] = self._excluded.prune(folder, folders, self.path)
            for path in (Path(folder, name) for name in names if not is_system_name(name)):
                is_text = path.suffix.lower() == ".txt" or path.name in METADATA_NAMES
                if path.suffix.lower() in IMAGE_SUFFIXES or (is_text and path.is_file()):
                    files[path.relative_to(self.path).as_posix()] = path
        return dict(sorted(files.items()))

    def _closed_folder(self, error: OSError) -> None:
        if is_failure(error) or Path(error.filename) == self.path:
            raise error
        self._closed[Path(error.filename).relative_to(self.path).as_posix() + "/"] = error

    def _find_captions(self) -> dict[str, list[str]]:
        if self.caption_column is None:
            return {}
        captions: dict[str, list[str]] = {}
        for name in self._images:
            beside = self._files.get(str(Path(name).with_suffix(".txt").as_posix()))
            if beside is not None and (text := " ".join(self._read_text(beside).split())):
                captions[name] = [text]
        for name, path in self._files.items():
            if path.name in METADATA_NAMES:
                captions |= self._captions_of(path, posixpath.dirname(name), self.caption_column)
        return captions

    def _captions_of(self, metadata: Path, folder: str, caption_column: str) -> dict[str, list[str]]:
        rows = list(_rows_of(metadata, self._read_text(metadata), ("file_name", caption_column)))
        captions: dict[str, list[str]] = {}
        found = 0
        for line, row in rows:
            relative = str(row.get("file_name") or "")
            if not relative or "\n" in relative:
                raise UserError(f"{metadata}, line {line}: no file_name in this row, or one of several lines. Add it.")
            name = _joined(folder, relative)
            if name.startswith(("../", "/")) or name == "..":
                raise UserError(f"{metadata} names {relative[:200]!r}, outside of {self.path}. {RELATIVE}")
            found += name in self._files
            if metadata.suffix == ".csv":
                # a quote that is missing at the end of a field closes at one in a later row: the rows between are lost
                parts = [part for cell in row.values() if "\n" in cell for part in cell.replace("\n", ",").split(",")]
                for part in (part.strip(' "') for part in parts):
                    if name != _joined(folder, part) in self._files:
                        raise UserError(f"{metadata}, line {line}: unclosed quote, up to the row of {part}. Close it.")
            cell = row.get(caption_column)
            for text in cell if isinstance(cell, list) else [cell]:
                if not isinstance(text, str | None):
                    what = f"{metadata}, line {line}: the caption of {relative}"
                    raise UserError(f"{what} must be text, not {text!r}, or a list of texts.")
                if text and (caption := clean_text(text.strip())) and caption not in captions.setdefault(name, []):
                    captions[name].append(caption)
        if rows and not found:
            first = rows[0][1].get("file_name")
            raise UserError(f"{metadata} names no image that exists: its first file_name is {first!r}. {RELATIVE}")
        return {name: texts for name, texts in captions.items() if texts}

    def _read_text(self, path: Path) -> str:
        """A caption or metadata file, which is passed on as text: none that a link leads to outside of `path`."""
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{path} is a link to {path.resolve()}, outside of {self.path}. Copy the file there.")
        try:
            return read_file(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason}). Save it again in UTF-8.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error


def _fail(error: OSError) -> bytes:
    raise error


def _joined(folder: str, name: str) -> str:
    """A name in a metadata file of this folder, from the root on."""
    return posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))


def _rows_of(metadata: Path, text: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row of a metadata file, with the line on which it begins.

    Raises:
        UserError: a file that is not CSV or JSON lines, or has not all of these columns.
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
    """Rows of a csv file whose lines end at newlines only: a caption may hold U+2028 or a form feed.

    Raises:
        UserError: a row with more or fewer fields than the header, a quote that is not closed, a column that is missing
            or named twice.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    quoting = 'Put a caption with a comma or a quote in double quotes, and double the quotes inside: "a ""b"", c".'
    line = 1
    try:
        columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        _require_columns(metadata, line, columns, required)
        line = reader.line_num + 1
        for row in reader:
            if None in row or (None in row.values() and any(row.values())):
                raise UserError(
                    f"{metadata}, line {line}: not as many fields as the header has ({', '.join(columns)}). {quoting}"
                )
            if any(row.values()):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        reason = "unclosed quote" if "end of data" in str(error) else str(error)
        raise UserError(f"{metadata}, line {line}: {reason}. {quoting}") from error


def _require_columns(metadata: Path, line: int, columns: list[str], required: Sequence[str]) -> None:
    for column in required:
        if columns.count(column) != 1:
            found = f"{columns.count(column) or 'no'} columns {column!r}; its columns are {', '.join(columns)}"
            raise UserError(
                f"{metadata}, line {line}: {found}. It needs file_name and the captions, in csv with commas between "
                "them: name the captions' column with data.caption_column=, or read none with data.caption_column=null."
            )
