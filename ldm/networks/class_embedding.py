"""Adapt a class-conditional network to a different set of classes. Classes are matched by name, not by number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

NUM_NULL_CLASSES = {"num_classes": 0, "num_class_embeds": 1}
"""Number of null classes that are included in the value of each config key: 0 for DiT, 1 for the UNet."""


@dataclass(frozen=True)
class ClassChange:
    """Names of the classes whose embeddings are kept, newly initialised, or dropped."""

    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    @classmethod
    def between(cls, old: Sequence[str], new: Sequence[str]) -> "ClassChange":
        """Compare two lists of class names."""
        return cls(
            kept=tuple(name for name in new if name in old),
            new=tuple(name for name in new if name not in old),
            dropped=tuple(name for name in old if name not in new),
        )

    def __str__(self) -> str:
        parts = (("kept", self.kept), ("new", self.new), ("dropped", self.dropped))
        return "; ".join(f"{label}: {_abbreviate(names)}" for label, names in parts if names)


def replace_classes(network: Any, old: Sequence[str], new: Sequence[str]) -> nn.Module:
    """Return the network with a class embedding for the names in `new`, in this order, followed by the null class.

    Classes that are also in `old` keep their embeddings, and new classes are initialised as in a new network. The
    embedding of the null class and all other weights are copied.

    Args:
        network: A diffusers ModelMixin with a `class_embedding` of len(old) + 1 rows.
        old: Class names of the network, in the order of its embedding rows.
        new: Class names of the returned network. If they equal `old`, `network` itself is returned.

    Raises:
        ValueError: The network is not class-conditional.
    """
    if list(old) == list(new):
        return network
    key = next((key for key in NUM_NULL_CLASSES if network.config.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{type(network).__name__} has no class embedding, so its classes cannot be replaced")
    adapted = type(network).from_config({**network.config, key: len(new) + NUM_NULL_CLASSES[key]})
    weights = network.state_dict()
    old_rows, rows = weights["class_embedding.weight"], adapted.class_embedding.weight.detach().clone()
    rows[-1] = old_rows[-1]
    for row, name in enumerate(new):
        if name in old:
            rows[row] = old_rows[list(old).index(name)]
    adapted.load_state_dict({**weights, "class_embedding.weight": rows.to(old_rows.dtype)})
    return adapted.to(old_rows.device)


def _abbreviate(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
