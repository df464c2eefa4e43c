"""Captions of an image folder, from metadata files and from text files next to the images."""

import csv
import io
import json
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ldm.data.cache import count, shorten
from ldm.errors import UserError
from ldm.files.reading import read_file
from ldm.files.untrusted import replace_surrogates

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
PATH_REMEDY = "Make each file_name relative to the folder of the metadata file, and put the images in that folder."


def is_metadata(path: Path) -> bool:
    """Return True if a file has the name of a metadata file, in any case."""
    return path.name.lower() in METADATA_NAMES


class FolderCaptions:
    """The captions of the images of a folder.

    Captions are read from the `metadata.jsonl` or `metadata.csv` in the folder of an image or in the nearest folder
    above it that lists the image, in the layout of Hugging Face's imagefolder. Images that no metadata file lists get
    the text of cat.txt or cat.png.txt, with its lines joined.

    A name still matches if it differs from the file's only in case, Unicode normalisation or percent-encoding, unless
    it matches several images.

    Args:
        root: The image folder.
        files: Relative name -> path of all image, text and metadata files.
        images: Relative names of the images.
        column: Column of the metadata files that contains the captions.

    Raises:
        UserError: a text or metadata file is invalid or cannot be read.
    """

    def __init__(self, root: Path, files: Mapping[str, Path], images: Sequence[str], column: str) -> None:
        self._root, self._files, self._images, self._column = root, files, images, column
        self._root_resolved = root.resolve()
        self._names: dict[str, list[str]] = {}
        for name in images:
            self._names.setdefault(_fold(name), []).append(name)
        self._unmatched_rows: list[str] = []
        self._disagreements: list[str] = []
        self.by_image = self._from_text_files()
        metadata = [name for name, path in files.items() if is_metadata(path)]
        for name in sorted(metadata, key=lambda name: name.count("/")):  # the nearest metadata file is read last
            captions = self._from_metadata(files[name], posixpath.dirname(name))
            self._disagreements += [
                f"{image} ({shorten(self.by_image[image], 1)} / {shorten(texts, 1)} in {name})"
                for image, texts in captions.items()
                if self.by_image.get(image, texts) != texts
            ]
            self.by_image |= captions

    def notes(self) -> list[str]:
        """Return sentences about names that match no image or several, and about captions that disagree."""
        notes = []
        if names := self._unused_text_files:
            notes.append(f"{count(len(names), 'text file')} without a matching image: {shorten(names)}")
        if names := self._unmatched_rows:
            notes.append(f"{count(len(names), 'metadata row')} without a matching image: {shorten(names)}")
        if examples := self._disagreements:
            rule = "different captions in two files, of which the metadata file nearest to the image is used"
            notes.append(f"{count(len(examples), 'image')} with {rule}: {shorten(examples, 3)}")
        return notes

    def _from_text_files(self) -> dict[str, list[str]]:
        text_files: dict[str, list[str]] = {}
        for name, path in self._files.items():
            if path.suffix.lower() == ".txt":
                text_files.setdefault(_fold(name), []).append(name)
        stems = Counter(_fold(stem) for stem in {posixpath.splitext(name)[0] for name in self._images})
        captions, used = {}, set()
        for name in self._images:
            stem = posixpath.splitext(name)[0]
            exact = [text_file for text_file in (f"{stem}.txt", f"{name}.txt") if text_file in self._files]
            similar = text_files.get(_fold(f"{stem}.txt"), []) if stems[_fold(stem)] == 1 else []
            similar = similar or (
                text_files.get(_fold(f"{name}.txt"), []) if len(self._names[_fold(name)]) == 1 else []
            )
            if not exact and len(similar) != 1:
                continue
            text_file = (exact or similar)[0]
            used.add(text_file)
            if text := " ".join(self._read_text(self._files[text_file]).split()):
                captions[name] = [text]
        self._unused_text_files = sorted({name for names in text_files.values() for name in names} - used)
        return captions

    def _match(self, name: str) -> str | None:
        """Return the name of the image that a row of a metadata file lists, or None if there is none or several."""
        if name in self._files:
            return name
        matches = self._names.get(_fold(name)) or self._names.get(_fold(unquote(name))) or []
        return matches[0] if len(matches) == 1 else None

    def _from_metadata(self, metadata: Path, folder: str) -> dict[str, list[str]]:
        rows = list(_read_rows(metadata, self._read_text(metadata), ("file_name", self._column)))
        captions: dict[str, list[str]] = {}
        num_matched = 0
        for line, row in rows:
            relative = str(row.get("file_name") or "")
            if not relative or "\n" in relative:
                rule = "the row must have a file_name without line breaks"
                raise UserError(f"{metadata}, line {line}: {rule}. Correct the row.")
            listed = _resolve(folder, relative)
            if listed.startswith(("../", "/")) or listed == "..":
                raise UserError(f"{metadata} lists {relative[:200]!r}, which is outside {self._root}. {PATH_REMEDY}")
            name = self._match(listed)
            num_matched += name is not None
            if metadata.suffix.lower() == ".csv":
                # A missing closing quote merges the following rows into one cell, silently losing their captions.
                parts = [part for cell in row.values() if "\n" in cell for part in cell.replace("\n", ",").split(",")]
                for part in (part.strip(' "') for part in parts):
                    if listed != _resolve(folder, part) in self._files:
                        problem = f"unclosed quote that extends into the row for {part}"
                        raise UserError(f"{metadata}, line {line}: {problem}. Add the closing quote.")
            texts = []
            cell = row.get(self._column)
            for text in cell if isinstance(cell, list) else [cell]:
                if not isinstance(text, str | None):
                    problem = f"the caption of {relative} must be a string or a list of strings, not {text!r}"
                    raise UserError(f"{metadata}, line {line}: {problem}.")
                texts.append(replace_surrogates((text or "").strip()))
            if name is None:
                self._unmatched_rows.append(listed)
                continue
            known = captions.setdefault(name, [])
            known += [text for text in dict.fromkeys(texts) if text and text not in known]
        if rows and not num_matched:
            first = rows[0][1].get("file_name")
            raise UserError(
                f"None of the images listed in {metadata} exist. Its first file_name is {first!r}. {PATH_REMEDY}"
            )
        return {name: texts for name, texts in captions.items() if texts}

    def _read_text(self, path: Path) -> str:
        """Read a caption or metadata file. Links to files outside the image folder are rejected."""
        target = path.resolve()
        if not (target.is_relative_to(self._root_resolved) or target.parent == path.parent.resolve()):
            link = f"{path} is a link to {target}, which is outside {self._root}"
            raise UserError(f"{link}. Replace the link with a copy of the file.")
        try:
            text = read_file(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not valid UTF-8 ({error.reason}). Save it with UTF-8 encoding.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
        if "\0" in text:
            raise UserError(f"{path} contains null characters, as UTF-16 text does. Save it with UTF-8 encoding.")
        return text


def _fold(name: str) -> str:
    """Return a key that is equal for names that differ only in case or Unicode normalisation."""
    return unicodedata.normalize("NFC", name).casefold()


def _resolve(folder: str, name: str) -> str:
    """Convert a name in the metadata file of `folder` to a name relative to the root."""
    return posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))


def _read_rows(metadata: Path, text: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row of a metadata file with the number of its first line.

    Raises:
        UserError: the file is not valid CSV or JSON Lines, or lacks one of the columns.
    """
    if metadata.suffix.lower() == ".csv":
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
