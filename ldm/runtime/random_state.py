"""State of the global random generators as tensors and plain numbers, for checkpoints."""

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the global generators of torch (CPU, and CUDA if that is the device), NumPy and Python."""
    version, keys, gauss = random.getstate()
    _, words, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.tensor(np.asarray(words, np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, torch.tensor(keys), gauss],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore a state returned by `random_state`."""
    torch.set_rng_state(state["torch"])
    words, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", words.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
