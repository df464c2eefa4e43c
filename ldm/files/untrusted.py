"""Safe reading of untrusted files. A file is either parsed as data or rejected, and code in a file never runs.

Covers JSON objects with typed fields, NumPy arrays, text used in file names, and symbolic links that leave a folder.
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

LINK_FOLDERS = ("wandb",)
"""Folders in a run that can contain links created by other programs."""
RECREATE_REMEDY = "Delete the folder that contains this file. The next run will create it again."
REMEDY = "Restore the original file or create it again."

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        UserError: The file cannot be read, is not valid JSON, or does not contain an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # also invalid UTF-8, or a number with 5000 digits
        raise UserError(f"{path} cannot be read as JSON ({first_line(error)}). {REMEDY}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a JSON object, not {type(content).__name__}. {REMEDY}")
    return content


@cache
def _strict_adapter(kind: Any) -> TypeAdapter[Any]:
    """Return a strict validator: "5" and true are not numbers, numbers must be finite, an int is a valid float."""
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def check_fields(content: Mapping[str, Any], kinds: Mapping[str, Any], path: Path, *, required: bool = True) -> None:
    """Check that the fields of a JSON object have the types in `kinds`. Extra fields are ignored.

    Raises:
        UserError: A field is missing or has the wrong type. The message names the file, the field and the rule.
    """
    for name, kind in kinds.items():
        if name not in content:
            if required:
                raise UserError(f"{path} has no field {name!r}. {REMEDY}")
            continue
        try:
            _strict_adapter(kind).validate_python(content[name])
        except ValidationError as error:
            details = error.errors(include_url=False)[0]
            rule, value = details["msg"].replace("Input should", "must"), repr(details["input"])[:60]
            index = "".join(f"[{part}]" for part in details["loc"] if isinstance(part, int))
            raise UserError(f"{path}: {name!r}{index} {rule}, not {value}. {REMEDY}") from None


def to_dataclass(kind: type[T], content: Mapping[str, Any], path: Path) -> T:
    """Build a dataclass with plain fields from a JSON object.

    Raises:
        UserError: A field is missing, unknown or of the wrong type.
    """
    kinds = get_type_hints(kind)
    if unknown := sorted(content.keys() - kinds.keys()):
        raise UserError(f"{path} has unknown fields: {', '.join(unknown)[:100]}. Create the file again.")
    required = [field.name for field in fields(kind) if field.default is MISSING]  # type: ignore[arg-type]
    check_fields(content, {name: kinds[name] for name in required}, path)
    check_fields(content, kinds, path, required=False)
    return kind(**content)


def read_array(path: Path) -> np.memmap:
    """Memory-map the array in a .npy file. Object arrays are rejected because they are pickled.

    Raises:
        UserError: The file cannot be read, or is not a valid array.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy's header parser can raise anything on malicious input
        raise UserError(f"{path} cannot be read as an array ({first_line(error)}). {RECREATE_REMEDY}") from error


def reject_outside_links(folder: Path, *, allowed: Collection[str] = ()) -> None:
    """Reject a folder that contains a symbolic link to a file or folder outside it.

    Args:
        allowed: Names of entries directly in `folder` that are not checked.

    Raises:
        UserError: A link points outside the folder. The message names the link.
    """
    root = folder.resolve()
    for parent, folders, names in os.walk(root):
        if Path(parent) == root:
            folders[:], names[:] = ([name for name in entries if name not in allowed] for entries in (folders, names))
        for name in [*folders, *names]:
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                remedy = "Replace the link with a copy, or link the whole folder instead."
                raise UserError(f"{path} is a link to {path.resolve()}, which is outside its folder. {remedy}")
        folders[:] = [name for name in folders if name not in LINK_FOLDERS]


def is_plain_name(text: str) -> bool:
    """Return True if the text is a plain file name that cannot refer to a file in another folder."""
    return text not in ("", ".", "..") and not re.search(r"[\/\\\x00-\x1f\x7f\ud800-\udfff]", text)


def to_file_name(text: str, max_bytes: int = 100) -> str:
    """Convert text to at most `max_bytes` bytes for use in a file name, without separators or control characters."""
    name = "".join("-" if unicodedata.category(character)[0] == "C" else character for character in text)
    name = re.sub(r'[/\\:*?"<>|]+', "-", name).strip(" .")
    return name.encode()[:max_bytes].decode(errors="ignore") or "-"


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON and command lines can contain but UTF-8 cannot, with question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def to_one_line(text: str) -> str:
    """Make text safe for one line of terminal output.

    Control characters, line breaks, undecodable bytes and bidirectional formatting characters are escaped.
    """
    unsafe = "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(unsafe, lambda match: ascii(match[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error message, truncated to 200 characters, without a full stop."""
    lines = str(error).split("\n")
    message = next((" ".join(line.split()) for line in lines if line.strip()), "")
    return (message or type(error).__name__)[:200].rstrip(".")
