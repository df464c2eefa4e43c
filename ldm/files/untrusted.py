"""Files that a stranger may have written: read as data or refused by name, and nothing in them is ever run.

JSON objects with the types of their fields, arrays of numpy, weights in safetensors, names that become files, links
that leave a folder.
"""

import json
import math
import os
import re
import types
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from ldm.errors import UserError

OWN_LINKS = ("wandb",)
"""Folders in a run in which another program keeps links of its own."""

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5000 digits
        raise UserError(
            f"{path} cannot be read as JSON ({first_line(error)}). Put back the file as it was written, or make "
            "it again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must hold a JSON object, not {type(content).__name__}. Put back the file as it was written, or "
            "make it again."
        )
    return content


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON has a type: `int`, `float` (finite; whole numbers too), `list[str] | None`, ..."""
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return any(is_a(value, inner) for inner in get_args(kind))
    if get_origin(kind) in (list, tuple):
        inner = get_args(kind)[0]
        if not isinstance(value, list):
            return False
        if inner in (int, str):  # a million names in a moment
            return set(map(type, value)) <= {inner}
        return all(is_a(part, inner) for part in value)
    if kind is float:
        return type(value) in (int, float) and -math.inf < value < math.inf
    if kind is int:
        return type(value) is int
    return value is None if kind in (None, types.NoneType) else isinstance(value, get_origin(kind) or kind)


def check_fields(content: Mapping[str, Any], kinds: Mapping[str, Any], path: Path, *, required: bool = True) -> None:
    """Refuse a JSON object whose fields are of other types than `kinds` says; other fields are left alone.

    Raises:
        UserError: naming the file, the field and what it should be.
    """
    for name, kind in kinds.items():
        if name not in content:
            if required:
                raise UserError(f"{path} has no {name!r}. Put back the file as it was written, or make it again.")
        elif not is_a(content[name], kind):
            shown = repr(content[name])
            raise UserError(
                f"{path}: {name!r} must be {_words(kind)}, not {shown[:60]}{'...' * (len(shown) > 60)}. Put back the "
                "file as it was written, or make it again."
            )


def to_dataclass(kind: type[T], content: Mapping[str, Any], path: Path) -> T:
    """A dataclass of plain fields out of a JSON object.

    Raises:
        UserError: a field that is missing, unknown or of another type.
    """
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(content.keys() - known.keys()):
        raise UserError(
            f"{path} has fields that this version does not know: {', '.join(unknown)[:100]}. Make it again."
        )
    wanted = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    check_fields(content, {name: hints[name] for name in known if name in wanted or name in content}, path)
    return kind(**content)


def _words(kind: Any) -> str:
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return " or ".join(_words(inner) for inner in get_args(kind))
    if get_origin(kind) in (list, tuple):
        return f"a list, each part {_words(get_args(kind)[0])}"
    known = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false", dict: "an object"}
    return "null" if kind in (None, types.NoneType) else known.get(get_origin(kind) or kind, str(kind))


def read_array(path: Path) -> np.memmap:
    """The array in a .npy file, memory-mapped. Arrays of objects are pickles, and refused.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # on a made-up header numpy raises whatever its parser meets
        raise UserError(
            f"{path} cannot be read as an array ({first_line(error)}). Delete the folder that it is in; it is made "
            "again."
        ) from error
    if not isinstance(array, np.memmap):
        array.close()
        raise UserError(f"{path} is an archive and not an array. Delete the folder that it is in; it is made again.")
    return array


def refuse_links_out(folder: Path, *, but: Collection[str] = ()) -> None:
    """Refuse a folder with a link in it that leads out of it: what is read or written there would be another file.

    Args:
        but: Names directly in it that may lead anywhere.

    Raises:
        UserError: naming the link.
    """
    root = folder.resolve()
    for place, folders, names in os.walk(root):
        if Path(place) == root:
            folders[:], names[:] = ([name for name in found if name not in but] for found in (folders, names))
        for name in [*folders, *names]:
            path = Path(place, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(
                    f"{path} is a link to {path.resolve()}, out of its folder, which may be a trap in a folder from a "
                    "stranger. Put the file itself there, or link the whole folder instead."
                )
        folders[:] = [name for name in folders if name not in OWN_LINKS]


def is_plain_name(text: str) -> bool:
    """Whether a text names a file in a folder, and nothing elsewhere."""
    return text not in ("", ".", "..") and not re.search(r"[\/\\\x00-\x1f\x7f\ud800-\udfff]", text)


def file_name(text: str, longest: int = 100) -> str:
    """A text as part of the name of a file: no separators or control signs, and no more bytes than that."""
    kept = "".join("-" if unicodedata.category(sign)[0] == "C" else sign for sign in text)
    kept = re.sub(r'[/\\:*?"<>|]+', "-", kept).strip(" .")
    return kept.encode()[:longest].decode(errors="ignore") or "-"


def clean_text(text: str) -> str:
    """A text that UTF-8 can hold: JSON and command lines may bring lone surrogates, which become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def one_line(text: str) -> str:
    """A text as one line of a terminal: control signs, breaks and what reorders a line are escaped."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", lambda sign: ascii(sign[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """What an error says, in one line of no more than 200 signs."""
    lines = str(error).split("\n")
    said = next((" ".join(line.split()) for line in lines if line.strip()), "")
    return (said or type(error).__name__)[:200].rstrip(".")
