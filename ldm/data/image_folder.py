"""A folder of images of one's own: captions from a metadata file or text files, classes from subfolders."""

import csv
import json
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.data.sources import Record, digest_of_files, folder_name
from ldm.errors import UserError
from ldm.untrusted import clean_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


class ImageFolder:
    """Every image below `path`, in the order of the relative names. Hidden files and folders are left out.

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
        self._files = self._visible_files()
        self._images = [name for name in self._files if name.lower().endswith(IMAGE_SUFFIXES)]
        if not self._images:
            raise UserError(
                f"data.path={path} holds no images. It needs files that end in {', '.join(IMAGE_SUFFIXES)}, "
                "at any depth."
            )
        self.class_names = self._find_classes()

    @property
    def num_records(self) -> int:
        return len(self._images)

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
            yield Record(name, self._files[name].read_bytes, captions.get(name), labels.get(name.split("/")[0]))

    def _visible_files(self) -> dict[str, Path]:
        """Relative name -> path of every image, text and metadata file, sorted by name."""
        files = {}
        for path in self.path.rglob("*"):
            name = path.relative_to(self.path).as_posix()
            wanted = path.suffix.lower() in (*IMAGE_SUFFIXES, ".txt") or path.name in METADATA_NAMES
            if wanted and not any(part.startswith(".") for part in name.split("/")) and path.is_file():
                files[name] = path
        return dict(sorted(files.items()))

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
                    f"{metadata} has no column {column!r}; its columns are {', '.join(rows[0])}. It needs "
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
            if caption and caption.strip():
                captions[name] = clean_text(caption.strip())
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
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason}). Save it again in UTF-8.") from error


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
