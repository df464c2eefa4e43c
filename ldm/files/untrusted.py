"""Files that a stranger may have written: read as data or refused by name, and nothing in them is ever run.

JSON objects with the types of their fields, arrays of numpy, weights in safetensors, names that become files, links
that leave a folder.
"""

import json
import os
import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ldm.errors import UserError

OWN_LINKS = ("wandb",)
"""Folders in a run in which another program keeps links of its own."""
REMADE = "Delete the folder that it is in; it is made again."
REMEDY = "Put back the file as it was written, or make it again."

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5000 digits
        raise UserError(f"{path} cannot be read as JSON ({first_line(error)}). {REMEDY}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}. {REMEDY}")
    return content


@cache
def _rule(kind: Any) -> TypeAdapter[Any]:
    """Strict: neither "5" nor true is a number, which is finite; a whole one may stand for a float."""
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def check_fields(content: Mapping[str, Any], kinds: Mapping[str, Any], path: Path, *, required: bool = True) -> None:
    """Refuse a JSON object whose fields are of other types than `kinds` says; other fields are left alone.

    Raises:
        UserError: naming the file, the field and what it should be.
    """
    for name, kind in kinds.items():
        if name not in content:
            if required:
                raise UserError(f"{path} has no {name!r}. {REMEDY}")
            continue
        try:
            _rule(kind).validate_python(content[name])
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            rule, shown = wrong["msg"].replace("Input should", "must"), repr(wrong["input"])[:60]
            place = "".join(f"[{part}]" for part in wrong["loc"] if isinstance(part, int))
            raise UserError(f"{path}: {name!r}{place} {rule}, not {shown}. {REMEDY}") from None


def to_dataclass(kind: type[T], content: Mapping[str, Any], path: Path) -> T:
    """A dataclass of plain fields out of a JSON object.

    Raises:
        UserError: a field that is missing, unknown or of another type.
    """
    kinds = get_type_hints(kind)
    if unknown := sorted(content.keys() - kinds.keys()):
        raise UserError(f"{path} has unknown fields: {', '.join(unknown)[:100]}. Make it again.")
    required = [field.name for field in fields(kind) if field.default is MISSING]  # type: ignore[arg-type]
    check_fields(content, {name: kinds[name] for name in required}, path)
    check_fields(content, kinds, path, required=False)
    return kind(**content)


def read_array(path: Path) -> np.memmap:
    """The array in a .npy file, memory-mapped. Arrays of objects are pickles, and refused.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # on a made-up header numpy raises whatever its parser meets
        raise UserError(f"{path} cannot be read as an array ({first_line(error)}). {REMADE}") from error


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
                remedy = "Put the file itself there, or link the whole folder instead."
                raise UserError(f"{path} is a link to {path.resolve()}, out of its folder. {remedy}")
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
    """A text as one line of a terminal: control signs, breaks, stray bytes and what reorders a line are escaped."""
    strange = "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(strange, lambda sign: ascii(sign[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """What an error says, in one line of no more than 200 signs."""
    lines = str(error).split("\n")
    said = next((" ".join(line.split()) for line in lines if line.strip()), "")
    return (said or type(error).__name__)[:200].rstrip(".")
