"""Device selection."""

import torch

from ldm.errors import UserError


def choose_device(requested: str) -> torch.device:
    """Return the requested device. `auto` prefers CUDA, then MPS, then the CPU.

    Raises:
        UserError: if the device is not available.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if requested == "auto":
        return torch.device("cuda" if available["cuda"] else "mps" if available["mps"] else "cpu")
    if not available.get(requested.split(":")[0], False):
        names = ", ".join(name for name, is_available in available.items() if is_available)
        raise UserError(f"device={requested} is not available. Choose auto or one of: {names}.")
    return torch.device(requested)
