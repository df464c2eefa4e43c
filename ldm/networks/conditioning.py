"""What a network is conditioned on: nothing, a class or a caption, and the value that stands for 'dropped'.

A condition is a dict of batch-first tensors, handed to the network by name:
none {}; class {label [b]}; text {tokens [b, l, d], mask [b, l], pooled [b, d]}.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ldm.data.images import ImageData
from ldm.diffusion.denoiser import Condition
from ldm.errors import InputError, UserError
from ldm.files.untrusted import check_fields
from ldm.networks.text_encoder import TextEncoder
from ldm.rules import Count

Captioned = tuple[Condition, list[str | None]]
"""A condition, and in words what it asks of each sample."""

Prompts = Sequence[str] | None
Classes = Sequence[int | str] | None

Lookup = Callable[[np.ndarray, np.ndarray | None], Condition]
"""lookup(indices, draws): the condition of images; a draw from [0, 1) for each chooses among its captions."""


class Conditioning(ABC):
    """What a network is conditioned on; it knows what a request means, and the condition of an image.

    `text_dim` is the width of a caption's embeddings, None without text; so are `class_names` without classes.
    """

    kind: ClassVar[str]
    text_dim: int | None = None
    class_names: list[str] | None = None

    @abstractmethod
    def network_options(self) -> dict[str, int]:
        """What a network must be built with to take this condition."""

    @abstractmethod
    def null(self) -> Condition:
        """The dropped condition, batch 1."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain values from which `restore_conditioning` makes this conditioning again."""

    @abstractmethod
    def of_request(self, prompts: Prompts = None, classes: Classes = None, num_samples: int = 16) -> Captioned:
        """What a user asks for: a prompt or a class (its number or name) per sample; by default classes in turn.

        Raises:
            UserError: what this model is not conditioned on; a class that it does not know.
        """

    @abstractmethod
    def of_images(self, images: ImageData, indices: np.ndarray) -> Captioned:
        """The first captions or the classes of these images.

        Raises:
            UserError: images without them, or of a class that the model does not know.
        """

    @abstractmethod
    def lookup(self, images: ImageData, embed: Callable[..., Any]) -> Lookup:
        """The conditions of all images, to train on; `embed` is `ldm.latents.captions.open_captions`."""

    def examples(self, images: ImageData, prompts: Sequence[str]) -> Captioned:
        """What to show while training: these prompts, else the first validation captions; without text as asked."""
        if self.text_dim is None:
            return self.of_request()
        return self.of_request(prompts) if prompts else self.of_images(images, images.val_indices[:16])

    def is_same_encoder(self, other: "Conditioning") -> bool:
        """Whether both encode captions, if any, with the same weights, as far as these are known, else by name."""
        ours, theirs = self.state(), other.state()
        here, there = ours.get("encoder_sha256"), theirs.get("encoder_sha256")
        return here == there if here and there else ours.get("encoder") == theirs.get("encoder")


class NoCondition(Conditioning):
    """Unconditional."""

    kind = "none"

    def network_options(self) -> dict[str, int]:
        return {}

    def null(self) -> Condition:
        return {}

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def of_request(self, prompts: Prompts = None, classes: Classes = None, num_samples: int = 16) -> Captioned:
        if prompts is not None or classes is not None:
            raise UserError("This model is unconditional: it takes neither a prompt nor a label.")
        return {}, [None] * num_samples

    def of_images(self, images: ImageData, indices: np.ndarray) -> Captioned:
        return {}, [None] * len(indices)

    def lookup(self, images: ImageData, embed: Callable[..., Any]) -> Lookup:
        return lambda indices, draws: {}


class ClassCondition(Conditioning):
    """A class label; the one after the last class stands for none."""

    kind = "class"

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names: list[str] = list(class_names)

    def network_options(self) -> dict[str, int]:
        return {"num_classes": len(self.class_names)}

    def null(self) -> Condition:
        return {"label": torch.tensor([len(self.class_names)])}

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "class_names": self.class_names}

    def of_request(self, prompts: Prompts = None, classes: Classes = None, num_samples: int = 16) -> Captioned:
        if prompts is not None:
            raise UserError("This model is conditioned on class, not on text: it takes a label, but no prompt.")
        labels = self._labels([i % len(self.class_names) for i in range(num_samples)] if classes is None else classes)
        return {"label": torch.tensor(labels, dtype=torch.long)}, [self.class_names[label] for label in labels]

    def of_images(self, images: ImageData, indices: np.ndarray) -> Captioned:
        """By name: the numbers of the images' classes may be others."""
        names, labels = _class_names(images), images.require_labels()
        return self.of_request(classes=[names[labels[i]] for i in indices])

    def lookup(self, images: ImageData, embed: Callable[..., Any]) -> Lookup:
        labels = torch.tensor(images.require_labels())
        return lambda indices, draws: {"label": labels[torch.from_numpy(indices)]}

    def _labels(self, classes: Sequence[int | str]) -> list[int]:
        number = {name: label for label, name in reversed([*enumerate(self.class_names)])}
        if unknown := [name for name in dict.fromkeys(classes) if isinstance(name, str) and name not in number]:
            known = ", ".join(self.class_names)
            raise UserError(f"This model knows no class {' or '.join(map(str, unknown))}; its classes are: {known}.")
        labels = [number[one] if isinstance(one, str) else one for one in classes]
        for label in labels:
            if not 0 <= label < len(self.class_names):
                known = ", ".join(f"{i}={name}" for i, name in enumerate(self.class_names))
                raise InputError("label", label, f"does not exist. Choose one of: {known}")
        return labels


class TextCondition(Conditioning):
    """A caption through a frozen text encoder of transformers; the empty caption stands for none.

    Args:
        encoder: Folder, hub id, or the name of a packaged encoder.
        max_tokens: Captions are cut to this many tokens, and padded to it.
    """

    kind = "text"

    def __init__(self, encoder: str, max_tokens: int = 16) -> None:
        self.encoder = TextEncoder(encoder, max_tokens)
        self.text_dim: int = self.encoder.dim

    def network_options(self) -> dict[str, int]:
        return {"text_dim": self.text_dim}

    def null(self) -> Condition:
        return self.encoder.encode([""])

    def state(self) -> dict[str, Any]:
        own = {"encoder": self.encoder.name, "max_tokens": self.encoder.max_tokens}
        return {"kind": self.kind, **own, "encoder_sha256": self.encoder.sha256()}

    def of_request(self, prompts: Prompts = None, classes: Classes = None, num_samples: int = 16) -> Captioned:
        if classes is not None:
            raise UserError("This model is conditioned on text: it takes a prompt, but no label.")
        captions = [""] * num_samples if prompts is None else list(prompts)
        return self.encoder.encode(captions), list(captions)

    def of_images(self, images: ImageData, indices: np.ndarray) -> Captioned:
        captions = images.require_captions()
        return self.of_request([captions[i] for i in indices])

    def lookup(self, images: ImageData, embed: Callable[..., Any]) -> Lookup:
        images.require_captions()
        texts = [images.captions_of(i) for i in range(len(images))]
        return embed(self.encoder.encode, texts, self.state()).batch


def restore_conditioning(state: dict[str, Any], file: Path = Path("model_index.json")) -> Conditioning:
    """The conditioning that a trained pipeline was saved with, in `file`.

    Raises:
        UserError: an unknown kind, or a text encoder with other weights than in training.
    """
    kind = state.get("kind")
    if kind == "none":
        return NoCondition()
    if kind == "class":
        check_fields(state, {"class_names": list[str]}, file)
        return ClassCondition(state["class_names"])
    if kind == "text":
        check_fields(state, {"encoder": str, "max_tokens": int, "encoder_sha256": str | None}, file)
        conditioning = TextCondition(state["encoder"], state["max_tokens"])
        expected, found = state["encoder_sha256"], conditioning.encoder.sha256()
        if expected and found and expected != found:
            raise UserError(
                f"The text encoder {state['encoder']} has weights {found[:12]}, but the pipeline was trained "
                f"with {expected[:12]}. Point to the encoder that it was trained with."
            )
        return conditioning
    raise UserError(f"{file}: a conditioning on {kind} is unknown. Known are: none, class, text.")


def drop(condition: Condition, null: Condition, dropped: Tensor) -> Condition:
    """Replace the rows where `dropped` [b] is true by the null condition."""
    return {
        name: torch.where(dropped.view(-1, *(1,) * (value.ndim - 1)), null[name].to(value.device, value.dtype), value)
        for name, value in condition.items()
    }


def no_condition(images: ImageData) -> NoCondition:
    """No condition, for any images."""
    return NoCondition()


def class_condition(images: ImageData) -> ClassCondition:
    """Conditioned on the class; the images must carry labels."""
    return ClassCondition(_class_names(images))


def text_condition(images: ImageData, encoder: str, max_tokens: Annotated[Count, Field(le=100_000)]) -> TextCondition:
    """Conditioned on the caption; the images must carry captions."""
    images.require_captions()
    return TextCondition(encoder, max_tokens)


def _class_names(images: ImageData) -> list[str]:
    labels = images.require_labels()
    return images.class_names or [str(label) for label in range(max(labels) + 1)]
