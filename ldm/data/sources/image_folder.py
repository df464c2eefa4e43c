"""A folder of images of one's own: captions from a metadata file or text files, classes from subfolders."""

import csv
import io
import json
import logging
import os
import posixpath
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.excluded import Excluded, is_system_name
from ldm.data.sources.base import Record, digest_of_files, folder_name, printable
from ldm.errors import InputError, UserError
from ldm.files.reading import is_failure, read_file, retried
from ldm.runtime.paths import is_run

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
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
        self._excluded = Excluded(exclude)
        if is_run(self.path):
            raise InputError("path", path, "is a run folder, whose figures are not training images")
        self._closed: dict[str, OSError] = {}
        try:
            self._files = retried(self._visible_files)
        except OSError as error:
            rule = f"cannot be listed: {error.strerror}. Make it readable, or try again when its disk answers"
            raise InputError("path", path, rule) from error
        self._images = [name for name in self._files if name.lower().endswith(IMAGE_SUFFIXES)]
        if not self._images:
            found = f" outside the run and cache folders {self._excluded.describe()}" if self._excluded.skipped else ""
            rule = f"holds no images{found}: no file, at any depth, ends in {', '.join(IMAGE_SUFFIXES)}"
            raise InputError("path", path, rule)
        if self._excluded.skipped:
            skipped = self._excluded.describe()
            logging.getLogger(__name__).warning("Skipped the run and cache folders %s in %s.", skipped, path)
        self.class_names = self._find_classes()

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
            load = partial(read_file, self._files[name])
            texts = captions.get(name, [])
            caption, label = texts[0] if texts else None, labels.get(name.split("/")[0])
            yield Record(printable(name), load, caption, label, more_captions=tuple(texts[1:]))
        for name, error in self._closed.items():
            yield Record(printable(name), partial(_fail, error))

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

    def _find_classes(self) -> list[str] | None:
        folders = {name.split("/")[0] for name in self._images if "/" in name}
        if len(folders) < 2 or any("/" not in name for name in self._images):
            return None
        return sorted(folders)

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
        num_found = 0
        for line, row in rows:
            relative = str(row.get("file_name") or "").replace("\\", "/")
            if not relative or "\n" in relative:
                raise UserError(f"{metadata}, line {line}: no file_name in this row, or one of several lines. Add it.")
            name = posixpath.normpath(posixpath.join(folder, relative))
            if name.startswith(("../", "/")) or name == "..":
                raise UserError(
                    f"{metadata} names {relative[:200]!r}, outside of {self.path}. Write each file_name relative to "
                    "the folder of the metadata file, and put the images below that folder."
                )
            num_found += name in self._files
            if metadata.suffix == ".csv":
                self._refuse_swallowed_rows(row, name, metadata, line, folder)
            for caption in _texts(row.get(caption_column), f"{metadata}, line {line}: the caption of {relative}"):
                if (caption := caption.strip()) and caption not in captions.setdefault(name, []):
                    captions[name].append(caption)
        if rows and not num_found:
            raise UserError(
                f"{metadata} names no image that exists: its first file_name is {rows[0][1].get('file_name')!r}. "
                "Write each file_name relative to the folder of the metadata file."
            )
        return {name: texts for name, texts in captions.items() if texts}

    def _refuse_swallowed_rows(self, row: dict[str, str], own: str, metadata: Path, line: int, folder: str) -> None:
        """A quote that is missing at the end of a field closes at one in a later row, and the rows between are lost.

        Raises:
            UserError: a field of several lines names another image between its commas.
        """
        for cell in row.values():
            for part in cell.replace("\n", ",").split(",") if "\n" in cell else ():
                name = posixpath.normpath(posixpath.join(folder, part.strip(' "')))
                if name in self._files and name != own:
                    raise UserError(
                        f"{metadata}, line {line}: unclosed quote. The field that it opens reaches into the row of "
                        f"{part.strip()}. Close the quote."
                    )

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


def _texts(value: Any, what: str) -> list[str]:
    """The captions in a cell: none, a text, or a list of texts.

    Raises:
        UserError: it holds something else, or an unpaired surrogate.
    """
    texts = value if isinstance(value, list) else [] if value is None else [value]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{what} must be text, not {text!r}, or a list of texts.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{what} contains an unpaired surrogate: {text!r}.")
    return texts


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
        _require_columns(metadata, rows[0][0], {key: None for _, row in rows for key in row}, columns)
    yield from rows


def _csv_rows(metadata: Path, text: str, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a csv file whose lines end at newlines only: a caption may hold U+2028 or a form feed.

    Raises:
        UserError: a row with more or fewer fields than the header, a quote that is not closed, a column that is missing
            or named twice.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    columns: list[str] = []
    quoting = 'Put a caption with a comma or a quote in double quotes, and double the quotes inside: "a ""b"", c".'
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "unclosed quote" if "end of data" in str(error) else str(error)
            raise UserError(f"{metadata}, line {line}: {reason}. {quoting}") from error
        if not any(cell.strip() for cell in cells):
            continue
        if not columns:
            columns = [cell.strip() for cell in cells]
            _require_columns(metadata, line, columns, required)
            if doubled := {name for name in columns if name and columns.count(name) > 1}:
                raise UserError(f"{metadata}, line {line}: duplicate column {', '.join(doubled)}. Rename one.")
        elif len(cells) != len(columns):
            raise UserError(
                f"{metadata}, line {line}: {len(cells)} fields, but the header has {len(columns)} "
                f"({', '.join(columns)}). {quoting}"
            )
        else:
            yield line, dict(zip(columns, cells, strict=True))


def _require_columns(metadata: Path, line: int, columns: Collection[str], required: Sequence[str]) -> None:
    for column in required:
        if column not in columns:
            raise UserError(
                f"{metadata}, line {line}: no column {column!r}; its columns are {', '.join(columns)}. It needs "
                "`file_name` and the captions, in csv with commas between them: name the captions' column with "
                "data.caption_column=, or read none with data.caption_column=null."
            )
