"""An error as one paragraph for the user: what was wrong, and what to do about it."""

import errno
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from safetensors import SafetensorError

from ldm.cli.remedies import elsewhere, explain_input, has_option
from ldm.errors import InputError, UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_FAULTS = {
    errno.EROFS: "The disk is read-only{place}. Mount it for writing{elsewhere}.",
    errno.EIO: "The disk failed to read or write{place}. Look for its faults in the system's log{elsewhere}.",
    errno.EFBIG: "A file grew larger than is allowed{place}. Raise the limit (ulimit -f){elsewhere}.",
    errno.ENAMETOOLONG: "A name or a path is longer than the disk allows{place}. Give a shorter one.",
}
"""By error number: a paragraph, with its place and the options that name another one."""


def explain(error: BaseException, config: Mapping[str, Any] = {}) -> str | None:
    """One paragraph for a mistake of the user's or of their machine's; None for an error of ours.

    Args:
        config: The command's, as plain values: options are named where it has them.
    """
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, InputError):
            return explain_input(cause, config)
        if isinstance(cause, UserError):
            return str(cause)
    for cause in chain:
        if (told := _explain_disk(cause, config)) is not None:
            return told
    for cause in chain:
        if isinstance(cause, MissingMandatoryValue):
            key = getattr(cause, "full_key", None) or "a value"
            return f"{key} is required and has no default. Give it on the command line: {key}=..."
    for cause in chain:
        if isinstance(cause, OverrideParseException):
            return f"{cause.override} cannot be read. Put text with special characters in quotes: key='\"...\"'."
        if isinstance(cause, MissingConfigException) and cause.options:
            choice = str(cause.missing_cfg_file).replace("/", "=")
            return f"{choice} does not exist. Choose one of: {', '.join(cause.options)}."
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return f"There is no key {cause.full_key}. --help lists the keys, --cfg job shows all of them."
    if any(isinstance(cause, HydraException | OmegaConfBaseException) for cause in chain):
        # the innermost cause is what a user can act on: a constructor's rule, a value of the wrong type
        message = str(chain[-1] if isinstance(chain[-1], ValueError | TypeError | OmegaConfBaseException) else error)
        return " ".join(message.split()) + " --help lists the choices and the keys."
    return None


def _explain_disk(error: BaseException, config: Mapping[str, Any]) -> str | None:
    file = getattr(error, "filename", None)
    place = f" at {str(file)[:200]}" if file else ""
    if _is_from(error, _DISK_FULL):
        resume = ", with resume=true if it had saved a checkpoint" * has_option(config, "resume")
        return (
            f"The disk is full{place}. What was saved before is kept. Free some space and repeat the command{resume}"
            f"{elsewhere(config)}."
        )
    for number, said in _DISK_FAULTS.items():
        if _is_from(error, (number,)):
            return said.format(place=place, elsewhere=elsewhere(config)) + " What was saved before is kept."
    if isinstance(error, PermissionError):
        return f"No permission to read or write {file}. Change its permissions{elsewhere(config)}."
    return None


def _is_from(error: BaseException, numbers: tuple[int, ...]) -> bool:
    """Whether the system gave one of these for its reason."""
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in numbers)
    return isinstance(error, OSError) and error.errno in numbers


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
