"""A class-conditional network for other classes than it was trained on: a class is its name, not its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

NUM_CLASSES = {"num_classes": 0, "num_class_embeds": 1}
"""Key in a network's config: DiT's, which counts classes, and the UNet's, which counts the null class too."""


@dataclass(frozen=True)
class ClassChange:
    """Names of classes whose embeddings are kept, start fresh, and are dropped."""

    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    @classmethod
    def between(cls, old: Sequence[str], new: Sequence[str]) -> "ClassChange":
        return cls(
            kept=tuple(name for name in new if name in old),
            new=tuple(name for name in new if name not in old),
            dropped=tuple(name for name in old if name not in new),
        )

    def __str__(self) -> str:
        parts = (("kept", self.kept), ("new", self.new), ("dropped", self.dropped))
        return "; ".join(f"{label}: {_few(names)}" for label, names in parts if names)


def with_classes(network: Any, old: Sequence[str], new: Sequence[str]) -> nn.Module:
    """The network with one row of its class embedding for each name in `new`, and the null class after them.

    Classes among `old` keep the row that they have there; the others start as in a fresh network. All other weights,
    those of the null class included, are the network's own.

    Args:
        network: A diffusers ModelMixin with a `class_embedding` of len(old) + 1 rows.

    Raises:
        ValueError: a network whose config does not count its classes.
    """
    if list(old) == list(new):
        return network
    key = next((key for key in NUM_CLASSES if network.config.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{type(network).__name__} has no class embedding that can take other classes")
    changed = type(network).from_config({**network.config, key: len(new) + NUM_CLASSES[key]})
    weights = network.state_dict()
    trained, rows = weights["class_embedding.weight"], changed.class_embedding.weight.detach().clone()
    rows[-1] = trained[-1]
    for row, name in enumerate(new):
        if name in old:
            rows[row] = trained[list(old).index(name)]
    changed.load_state_dict({**weights, "class_embedding.weight": rows.to(trained.dtype)})
    return changed.to(trained.device)


def _few(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
