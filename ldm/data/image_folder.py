"""A folder of images of one's own: captions from a metadata file or text files, classes from subfolders."""

import csv
import json
import os
import posixpath
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.reading import PASSING, read_file, retried
from ldm.data.sources import Record, digest_of_files, folder_name, printable
from ldm.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


class ImageFolder:
    """Every image below `path`, in the order of the relative names. Hidden files and folders are left out.

    Whatever bears an image's name counts, a pipe or a broken link too, and so does a folder that may not be listed:
    preparation puts them into quarantine instead of losing them in silence.

    Captions: `metadata.jsonl` or `metadata.csv` in any folder, in the manner of Hugging Face's imagefolder
    (`file_name` relative to the metadata file, the text in `caption_column`); else a `.txt` beside the image.
    Classes: the folders at the first level, when there are several and no image lies outside them.

    Raises:
        UserError: the folder is missing or holds no images.
    """

    licence = None

    def __init__(self, path: str | Path, caption_column: str | None = "text"):
        self.path = Path(path).expanduser()
        self.caption_column = caption_column
        self.name = folder_name(self.path.resolve().name)
        if not self.path.is_dir():
            raise UserError(f"data.path={path} is not a folder. Name the folder that holds your images.")
        self._closed: dict[str, OSError] = {}
        try:
            self._files = retried(self._visible_files, self.path)
        except OSError as error:
            raise UserError(
                f"data.path={path} cannot be listed: {error.strerror}. Make it readable, or start again when its disk "
                "answers."
            ) from error
        self._images = [name for name in self._files if name.lower().endswith(IMAGE_SUFFIXES)]
        if not self._images:
            raise UserError(
                f"data.path={path} holds no images. It needs files that end in {', '.join(IMAGE_SUFFIXES)}, "
                "at any depth."
            )
        self.class_names = self._find_classes()

    @property
    def num_records(self) -> int:
        return len(self._images) + len(self._closed)

    def identity(self) -> dict[str, Any]:
        return {
            "path": self.path.resolve().as_posix(),
            "files": digest_of_files(self.path, self._files.values()),
            "caption_column": self.caption_column,
        }

    def records(self) -> Iterator[Record]:
        captions = self._find_captions()
        labels = {name: label for label, name in enumerate(self.class_names or [])}
        for name in self._images:
            load = partial(read_file, self._files[name])
            yield Record(printable(name), load, captions.get(name), labels.get(name.split("/")[0]))
        for name, error in self._closed.items():
            yield Record(printable(name), partial(_fail, error))

    def _visible_files(self) -> dict[str, Path]:
        """Relative name -> path of every image, text and metadata file, sorted by name."""
        self._closed.clear()
        files = {}
        for folder, folders, names in os.walk(self.path, onerror=self._closed_folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                is_text = path.suffix.lower() == ".txt" or path.name in METADATA_NAMES
                if path.suffix.lower() in IMAGE_SUFFIXES or (is_text and path.is_file()):
                    files[path.relative_to(self.path).as_posix()] = path
        return dict(sorted(files.items()))

    def _closed_folder(self, error: OSError) -> None:
        if error.errno in PASSING or Path(error.filename) == self.path:
            raise error
        self._closed[Path(error.filename).relative_to(self.path).as_posix() + "/"] = error

    def _find_classes(self) -> list[str] | None:
        folders = {name.split("/")[0] for name in self._images if "/" in name}
        if len(folders) < 2 or any("/" not in name for name in self._images):
            return None
        return sorted(folders)

    def _find_captions(self) -> dict[str, str]:
        if self.caption_column is None:
            return {}
        captions = {}
        for name in self._images:
            beside = self._files.get(str(Path(name).with_suffix(".txt").as_posix()))
            if beside is not None and (text := " ".join(self._read_text(beside).split())):
                captions[name] = text
        for name, path in self._files.items():
            if path.name in METADATA_NAMES:
                captions |= self._captions_of(path, posixpath.dirname(name), self.caption_column)
        return captions

    def _captions_of(self, metadata: Path, folder: str, caption_column: str) -> dict[str, str]:
        rows = list(_rows_of(metadata, self._read_text(metadata)))
        for column in ("file_name", caption_column):
            if rows and not any(column in row for row in rows):
                raise UserError(
                    f"{metadata} has no column {column!r}; its columns are {', '.join(map(str, rows[0]))}. It needs "
                    "`file_name` and the captions: name theirs with data.caption_column=, or read none with "
                    "data.caption_column=null."
                )
        captions, num_found = {}, 0
        for row in rows:
            relative = str(row.get("file_name") or "").replace("\\", "/")
            name = posixpath.normpath(posixpath.join(folder, relative))
            if name.startswith(("../", "/")) or name == "..":
                raise UserError(
                    f"{metadata} names {relative[:200]!r}, outside of data.path={self.path}. Write each file_name "
                    "relative to the folder of the metadata file, and put the images below data.path."
                )
            num_found += name in self._files
            caption = row.get(caption_column)
            if caption is not None and not isinstance(caption, str):
                raise UserError(f"{metadata}: the caption of {relative} must be text, not {caption!r}.")
            if caption and any("\ud800" <= letter <= "\udfff" for letter in caption):
                raise UserError(f"{metadata}: the caption of {relative} holds half a character: {caption!r}.")
            if caption and caption.strip():
                captions[name] = caption.strip()
        if rows and not num_found:
            raise UserError(
                f"{metadata} names no image that exists: its first file_name is {rows[0].get('file_name')!r}. "
                "Write each file_name relative to the folder of the metadata file."
            )
        return captions

    def _read_text(self, path: Path) -> str:
        """A caption or metadata file, which is passed on as text: none that a link leads to outside of `path`."""
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside of data.path={self.path}. Copy the file there."
            )
        try:
            return read_file(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason}). Save it again in UTF-8.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error


def _fail(error: OSError) -> bytes:
    raise error


def _rows_of(metadata: Path, text: str) -> Iterator[dict[str, Any]]:
    if metadata.suffix == ".csv":
        try:
            yield from csv.DictReader(text.splitlines(keepends=True))
        except csv.Error as error:
            raise UserError(f"{metadata} is not CSV: {error}.") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{metadata}, line {number}, is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UserError(f'{metadata}, line {number}, must be a JSON object, such as {{"file_name": ...}}.')
        yield row
