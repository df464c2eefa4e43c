"""Explain errors to the user in one paragraph: what went wrong and how to fix it."""

import errno
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from safetensors import SafetensorError

from ldm.cli.remedies import explain_input, has_option, suggest_other_disk
from ldm.errors import InputError, UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_FAULTS = {
    errno.EROFS: "The disk is read-only{path}. Remount it as writable{other_disk}.",
    errno.EIO: "Reading from or writing to the disk failed{path}. Check the system log for disk errors{other_disk}.",
    errno.EFBIG: "A file exceeds the maximum file size{path}. Raise the limit (ulimit -f){other_disk}.",
    errno.ENAMETOOLONG: "A file name or path is too long for the file system{path}. Use a shorter one.",
}
"""Messages by error number."""


def explain(error: BaseException, config: Mapping[str, Any] = {}) -> str | None:
    """Return a one-paragraph explanation of a user error or a disk error, or None for any other error (a bug).

    Args:
        config: Config of the command, as plain values. The explanation mentions only options in this config.
    """
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, InputError):
            return explain_input(cause, config)
        if isinstance(cause, UserError):
            return str(cause)
    for cause in chain:
        if (message := _explain_disk_error(cause, config)) is not None:
            return message
    for cause in chain:
        if isinstance(cause, MissingMandatoryValue):
            key = getattr(cause, "full_key", None) or "a value"
            return f"{key} is required and has no default. Set it on the command line: {key}=..."
    for cause in chain:
        if isinstance(cause, OverrideParseException):
            return f"{cause.override} cannot be parsed. Put text with special characters in quotes: key='\"...\"'."
        if isinstance(cause, MissingConfigException) and cause.options:
            choice = str(cause.missing_cfg_file).replace("/", "=")
            return f"{choice} does not exist. Choose one of: {', '.join(cause.options)}."
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return f"There is no key {cause.full_key}. See --help for common keys, or --cfg job for all keys."
    if any(isinstance(cause, HydraException | OmegaConfBaseException) for cause in chain):
        # the innermost cause is the most specific, such as a constructor's rule or a value of the wrong type
        message = str(chain[-1] if isinstance(chain[-1], ValueError | TypeError | OmegaConfBaseException) else error)
        return " ".join(message.split()) + " See --help for the available choices and keys."
    return None


def _explain_disk_error(error: BaseException, config: Mapping[str, Any]) -> str | None:
    file = getattr(error, "filename", None)
    path = f" at {str(file)[:200]}" if file else ""
    other_disk = suggest_other_disk(config)
    if _has_errno(error, _DISK_FULL):
        resume = " (with resume=true if it had saved a checkpoint)" * has_option(config, "resume")
        return (
            f"The disk is full{path}. Files saved earlier are intact. Free some space and repeat the command{resume}"
            f"{other_disk}."
        )
    for number, message in _DISK_FAULTS.items():
        if _has_errno(error, (number,)):
            return message.format(path=path, other_disk=other_disk) + " Files saved earlier are intact."
    if isinstance(error, PermissionError):
        return f"Permission to read or write {file} was denied. Change its permissions{other_disk}."
    return None


def _has_errno(error: BaseException, numbers: tuple[int, ...]) -> bool:
    """Return True if the error is an operating system error with one of these numbers."""
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in numbers)
    return isinstance(error, OSError) and error.errno in numbers


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
