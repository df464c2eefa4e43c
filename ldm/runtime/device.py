"""Where a tool computes."""

import torch

from ldm.errors import UserError


def choose_device(requested: str) -> torch.device:
    """`auto` takes a GPU where there is one, then MPS, then the CPU.

    Raises:
        UserError: a device that is not here.
    """
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if requested == "auto":
        return torch.device("cuda" if here["cuda"] else "mps" if here["mps"] else "cpu")
    if not here.get(requested.split(":")[0], False):
        found = ", ".join(name for name, present in here.items() if present)
        raise UserError(f"device={requested} is not available. Choose auto or one of: {found}.")
    return torch.device(requested)
