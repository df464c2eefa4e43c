"""Image folders, with captions from a metadata file or text files and classes from subfolders."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.cache import count, shorten
from ldm.data.classes import NO_CLASSES, natural_key
from ldm.data.excluded import FolderFilter, is_system_name
from ldm.data.pixels import IMAGE_SUFFIXES
from ldm.data.sources.base import Record, files_digest, folder_name
from ldm.data.sources.captions import FolderCaptions, is_metadata
from ldm.errors import InputError
from ldm.files.reading import is_disk_failure, read_file, retry_once
from ldm.files.untrusted import to_one_line
from ldm.runtime.paths import is_run

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
"""Names of top-level folders that are splits of a data set rather than classes, if all of them are."""
READER = 3
"""Reader version; changing it invalidates prepared caches."""


class ImageFolder:
    """All images in `path` and its subfolders, ordered by their relative names.

    Links to files and folders are followed; each folder is read once, under its real path if that is in `path`. Runs,
    caches and operating system files (see `ldm.data.excluded`) are skipped. Anything with the extension of an image is
    included, even a pipe or a broken link, and so are folders that cannot be listed. Preparation records these in the
    quarantine list instead of silently ignoring them.

    Captions: see `ldm.data.sources.captions.FolderCaptions`. An image can have several captions, given by several rows
    or by a list in `caption_column`.

    Classes: the top-level subfolders in natural order, if there are several and every image is in one of them. If all
    of them are named after splits (train, val, test), the classes are their subfolders.

    Args:
        exclude: Folders to skip even if they are in `path`, such as those that store runs and caches.

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
            raise InputError("path", path, "is a run folder, whose figures are not training images")
        self._filter = FolderFilter(exclude)
        self._unlistable: dict[str, OSError] = {}
        self.skipped: Counter[str] = Counter()
        try:
            self._files = retry_once(self._visible_files)
        except OSError as error:
            rule = f"cannot be listed: {error.strerror}. Make it readable, or try again when its disk is available"
            raise InputError("path", path, rule) from error
        self._images = [name for name in self._files if name.lower().endswith(IMAGE_SUFFIXES)]
        skipped = self._filter.describe()
        if not self._images:
            where = f" outside the run and cache folders {skipped}" if skipped else ""
            rule = f"contains no images{where}: no file in it or its subfolders ends in {', '.join(IMAGE_SUFFIXES)}"
            raise InputError("path", path, rule)
        if skipped:
            logging.getLogger(__name__).warning("Skipped the run and cache folders %s in %s.", skipped, path)
        self._notes = [f"skipped the run and cache folders {skipped}"] if skipped else []
        self._caption_notes: list[str] = []
        self._classes, self.class_names = self._find_classes()

    @property
    def num_records(self) -> int:
        return len(self._images) + len(self._unlistable)

    @property
    def notes(self) -> list[str]:
        return self._notes + self._caption_notes

    def identity(self) -> dict[str, Any]:
        return {
            "path": self.path.resolve().as_posix(),
            "files": files_digest(self.path, self._files.values()),
            "caption_column": self.caption_column,
            "reader": READER,
        }

    def records(self) -> Iterator[Record]:
        captions: dict[str, list[str]] = {}
        if self.caption_column is not None:
            found = FolderCaptions(self.path, self._files, self._images, self.caption_column)
            captions = found.by_image
            self._caption_notes = found.notes()
        for name in self._images:
            texts, load = captions.get(name, []), partial(read_file, self._files[name])
            label = self._classes.get(name)
            yield Record(to_one_line(name), load, next(iter(texts), None), label, more_captions=tuple(texts[1:]))
        for name, error in self._unlistable.items():
            yield Record(to_one_line(name), partial(_raise, error))

    def _find_classes(self) -> tuple[dict[str, str], list[str] | None]:
        """Return the class of each image, and all class names; both are empty if the folders are not classes."""
        parts = {name: name.split("/") for name in self._images}
        tops = {folders[0] for folders in parts.values() if len(folders) > 1}
        level = 0
        if tops and all(len(folders) > 1 and folders[0].lower() in SPLIT_NAMES for folders in parts.values()):
            level = 1
            splits = ", ".join(f"{name}/" for name in sorted(tops))
            self._notes.append(f"{splits} are splits, not classes; their images are combined and split again")
        classes = {name: folders[level] for name, folders in parts.items() if len(folders) > level + 1}
        names = sorted(set(classes.values()), key=natural_key)
        if len(names) > 1 and len(classes) == len(parts):
            return classes, names
        if loose := [name for name in parts if name not in classes] if names else []:
            where = "is in none" if len(loose) == 1 else "are in none"
            self._notes.append(
                f"{NO_CLASSES}: {count(len(loose), 'image')} {where} of the class folders: {shorten(loose)}"
            )
        elif names:
            self._notes.append(f"{NO_CLASSES}: all images are in one folder, {names[0]}/")
        return {}, None

    def _visible_files(self) -> dict[str, Path]:
        """Map the relative names of all image, text and metadata files to their paths, sorted by name."""
        self._unlistable.clear()
        self.skipped.clear()
        files, links, visited = {}, [self.path], set()
        while links:  # folders behind links are read last, so that a folder in `path` keeps its real name
            for folder, folders, names in os.walk(links.pop(0), onerror=self._record_unlistable):
                real_path = os.path.realpath(folder)
                if real_path in visited:
                    folders[:] = []
                    continue
                visited.add(real_path)
                folders[:] = sorted(self._filter.prune(folder, folders, self.path))
                links += [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
                for path in (Path(folder, name) for name in names):
                    suffix = path.suffix.lower()
                    is_text = suffix == ".txt" or is_metadata(path)
                    if is_system_name(path.name):
                        self.skipped["hidden or system file"] += suffix in IMAGE_SUFFIXES
                    elif suffix in IMAGE_SUFFIXES or (is_text and path.is_file()):
                        files[path.relative_to(self.path).as_posix()] = path
                    elif not is_text:
                        self.skipped[f"{suffix} file" if suffix else "file without suffix"] += 1
        return dict(sorted(files.items()))

    def _record_unlistable(self, error: OSError) -> None:
        if is_disk_failure(error) or Path(error.filename) == self.path:
            raise error
        self._unlistable[Path(error.filename).relative_to(self.path).as_posix() + "/"] = error


def _raise(error: OSError) -> bytes:
    raise error
