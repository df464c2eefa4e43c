"""Access to W&B's server without terminal prompts or long waits."""

import netrc
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar
from urllib.parse import urlsplit

from ldm.errors import UserError

MODES = ("online", "offline", "disabled")

T = TypeVar("T")


def check_mode(mode: str | None, key: str = "logger.mode") -> None:
    """Check that a mode is valid; None means that it is not set.

    Raises:
        UserError: for an unknown mode. The message lists the valid modes.
    """
    if mode and mode not in MODES:
        raise UserError(f"{key}={mode} is unknown. Choose one of: {', '.join(MODES)}, or leave it unset.")


def choose_mode(requested: str | None) -> str:
    """Return the requested mode, else the mode set by WANDB_DISABLED or WANDB_MODE, else a default.

    The default is "online" if there is an API key. Otherwise it is "offline", because W&B would prompt for the key.

    Raises:
        UserError: for an unknown mode.
    """
    mode = os.environ.get("WANDB_MODE", "").lower()
    env_mode = {"run": "online", "dryrun": "offline"}.get(mode, mode)  # older names, which wandb still accepts
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "y", "on"):
        env_mode = "disabled"
    for key, value in (("logger.mode", requested), ("WANDB_MODE", env_mode)):
        check_mode(value, key)
        if value:
            return value
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Return True if W&B has credentials for its server. Unlike `wandb.login`, this does not contact the server."""
    import wandb

    settings = wandb.setup().settings
    if os.environ.get("WANDB_API_KEY") or settings.api_key or settings.identity_token_file:
        return True
    try:
        credentials = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return credentials.authenticators(urlsplit(settings.base_url).netloc) is not None


def with_timeout(call: Callable[[], T], seconds: float) -> T:
    """Run `call` in a thread, and return its result.

    Raises:
        TimeoutError: if there is no result within `seconds`. The thread keeps running until the process exits.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([result], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return result.result()
