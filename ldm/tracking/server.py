"""W&B's server, without ever asking on the terminal or waiting for long."""

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
    """Refuse an unknown mode; None is none asked for.

    Raises:
        UserError: naming the key and the modes that exist.
    """
    if mode and mode not in MODES:
        raise UserError(f"{key}={mode} is unknown. Choose one of: {', '.join(MODES)}, or leave it out.")


def choose_mode(requested: str | None) -> str:
    """`online` only where an API key is at hand; W&B would otherwise ask for one on the terminal.

    Raises:
        UserError: an unknown mode.
    """
    for key, mode in (("logger.mode", requested), ("WANDB_MODE", os.environ.get("WANDB_MODE"))):
        check_mode(mode, key)
        if mode:
            return mode
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B has credentials for its server. `wandb.login` would ask the server about them, and wait for it."""
    import wandb

    settings = wandb.setup().settings
    if os.environ.get("WANDB_API_KEY") or settings.api_key or settings.identity_token_file:
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urlsplit(settings.base_url).netloc) is not None


def bounded(call: Callable[[], T], seconds: float) -> T:
    """Return what `call` returns, and give it up after so many seconds.

    Raises:
        TimeoutError: given up. It may go on in its thread, which ends with the process at the latest.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()
