"""Conditioning of the diffusion model: none, a class or a caption.

A condition is a dict of batch-first tensors that are passed to the network as keyword arguments:
{} if unconditional, {label [b]} for classes, {tokens [b, l, d], mask [b, l], pooled [b, d]} for text.
Each kind has a null condition, used for condition dropout in training and for classifier-free guidance.
"""

import difflib
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

NamedCondition = tuple[Condition, list[str | None]]
"""A condition, with the caption or class name of each sample (None if unconditional)."""

Prompts = Sequence[str] | None
Classes = Sequence[int | str] | None

MAX_CHOICES = 50
"""Models with more classes do not list all of them in an error."""

Lookup = Callable[[np.ndarray, np.ndarray | None], Condition]
"""(image indices, draws) -> condition. A uniform draw from [0, 1) per image selects one of its captions."""


class Conditioning(ABC):
    """Builds the conditions for a network from user requests or from images.

    `text_dim` is the width of the caption embeddings, or None without text. `class_names` is None without classes.
    """

    kind: ClassVar[str]
    text_dim: int | None = None
    class_names: list[str] | None = None

    @abstractmethod
    def network_options(self) -> dict[str, int]:
        """Return the network constructor arguments that enable this conditioning."""

    @abstractmethod
    def null(self) -> Condition:
        """Return the null condition, with batch size 1."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return a JSON-serialisable state, from which `restore_conditioning` rebuilds this conditioning."""

    @abstractmethod
    def for_request(self, prompts: Prompts = None, classes: Classes = None, num_samples: int = 16) -> NamedCondition:
        """Build the condition for one prompt or one class (name or number) per sample.

        If neither is given, build `num_samples` conditions, cycling through the classes or using the empty caption.

        Raises:
            UserError: The model does not support this kind of condition, or does not have a requested class.
        """

    @abstractmethod
    def for_images(self, images: ImageData, indices: np.ndarray) -> NamedCondition:
        """Build the condition from the first caption or the class of each of these images.

        Raises:
            UserError: The images have no captions or classes, or a class that the model does not have.
        """

    @abstractmethod
    def lookup(self, images: ImageData, embed: Callable[..., Any]) -> Lookup:
        """Return a function that looks up conditions for training; `embed` is `ldm.latents.captions.open_captions`."""

    def examples(self, images: ImageData, prompts: Sequence[str]) -> NamedCondition:
        """Build the condition for the sample grid. With text, use the prompts or the first validation captions."""
        if self.text_dim is None:
            return self.for_request()
        return self.for_request(prompts) if prompts else self.for_images(images, images.val_indices[:16])

    def has_same_encoder(self, other: "Conditioning") -> bool:
        """Return True if both use the same text encoder. Compare digests, or names if a digest is unknown."""
        state, other_state = self.state(), other.state()
        sha256, other_sha256 = state.get("encoder_sha256"), other_state.get("encoder_sha256")
        return sha256 == other_sha256 if sha256 and other_sha256 else state.get("encoder") == other_state.get("encoder")


class NoCondition(Conditioning):
    """No conditioning."""

    kind = "none"

    def network_options(self) -> dict[str, int]:
        return {}

    def null(self) -> Condition:
        return {}

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def for_request(self, prompts: Prompts = None, classes: Classes = None, num_samples: int = 16) -> NamedCondition:
        if prompts is not None or classes is not None:
            raise UserError("This model is unconditional. Remove the prompt or label.")
        return {}, [None] * num_samples

    def for_images(self, images: ImageData, indices: np.ndarray) -> NamedCondition:
        return {}, [None] * len(indices)

    def lookup(self, images: ImageData, embed: Callable[..., Any]) -> Lookup:
        return lambda indices, draws: {}


class ClassCondition(Conditioning):
    """Conditioning on a class label. The label after the last class is the null class."""

    kind = "class"

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names: list[str] = list(class_names)

    def network_options(self) -> dict[str, int]:
        return {"num_classes": len(self.class_names)}

    def null(self) -> Condition:
        return {"label": torch.tensor([len(self.class_names)])}

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "class_names": self.class_names}

    def for_request(self, prompts: Prompts = None, classes: Classes = None, num_samples: int = 16) -> NamedCondition:
        if prompts is not None:
            raise UserError("This model is conditioned on classes, not on text. Give a label instead of a prompt.")
        cycle = [i % len(self.class_names) for i in range(num_samples)]
        labels = cycle if classes is None else self._labels(classes)
        return {"label": torch.tensor(labels, dtype=torch.long)}, [self.class_names[label] for label in labels]

    def for_images(self, images: ImageData, indices: np.ndarray) -> NamedCondition:
        # match by name, because the images may number the classes differently
        names, labels = _class_names(images), images.require_labels()
        return self.for_request(classes=[names[labels[i]] for i in indices])

    def lookup(self, images: ImageData, embed: Callable[..., Any]) -> Lookup:
        labels = torch.tensor(images.require_labels())
        return lambda indices, draws: {"label": labels[torch.from_numpy(indices)]}

    def _labels(self, classes: Sequence[int | str]) -> list[int]:
        """Return the labels of classes. A number is a class of that name if there is one, else a label."""
        label_of = {str(label): label for label in range(len(self.class_names))}
        label_of |= {name: label for label, name in reversed([*enumerate(self.class_names)])}
        items = [str(item) for item in classes]
        if unknown := [item for item in dict.fromkeys(items) if item not in label_of]:
            choices = [name if name == str(label) else f"{label}={name}" for label, name in enumerate(self.class_names)]
            if len(choices) > MAX_CHOICES:
                similar = difflib.get_close_matches(unknown[0], self.class_names, cutoff=0.3) or self.class_names[:3]
                choices = [f"{len(choices)} classes, such as {', '.join(similar)}"]
            rule = f"is not a class of this model. Its classes are: {', '.join(choices)}"
            raise InputError("label", ", ".join(unknown), rule)
        return [label_of[item] for item in items]


class TextCondition(Conditioning):
    """Conditioning on a caption, encoded by a frozen text encoder. The empty caption is the null condition.

    Args:
        encoder: Folder, hub id, or the name of a packaged encoder.
        max_tokens: Captions are truncated or padded to this number of tokens.
        options: Further options of `TextEncoder`.
    """

    kind = "text"

    def __init__(self, encoder: str, max_tokens: int = 16, **options: Any) -> None:
        self.encoder = TextEncoder(encoder, max_tokens, **options)
        self.text_dim: int = self.encoder.dim

    def network_options(self) -> dict[str, int]:
        return {"text_dim": self.text_dim}

    def null(self) -> Condition:
        return self.encoder.encode([""])

    def state(self) -> dict[str, Any]:
        encoder = self.encoder
        state = {"kind": self.kind, "encoder": encoder.name, "max_tokens": encoder.max_tokens}
        state |= {} if encoder.masked else {"masked": False}
        state |= {} if encoder.revision is None else {"revision": encoder.revision}
        return {**state, "encoder_sha256": encoder.sha256()}

    def for_request(self, prompts: Prompts = None, classes: Classes = None, num_samples: int = 16) -> NamedCondition:
        if classes is not None:
            raise UserError("This model is conditioned on text, not on classes. Give a prompt instead of a label.")
        captions = [""] * num_samples if prompts is None else list(prompts)
        return self.encoder.encode(captions), list(captions)

    def for_images(self, images: ImageData, indices: np.ndarray) -> NamedCondition:
        captions = images.require_captions()
        return self.for_request([captions[i] for i in indices])

    def lookup(self, images: ImageData, embed: Callable[..., Any]) -> Lookup:
        images.require_captions()
        texts = [images.captions_of(i) for i in range(len(images))]
        return embed(self.encoder.encode, texts, self.state()).batch


def restore_conditioning(state: dict[str, Any], file: Path = Path("model_index.json")) -> Conditioning:
    """Rebuild the conditioning of a saved pipeline from its `state`, read from `file`.

    Raises:
        UserError: The kind is unknown, or the text encoder's weights differ from those used in training.
    """
    kind = state.get("kind")
    if kind == "none":
        return NoCondition()
    if kind == "class":
        check_fields(state, {"class_names": list[str]}, file)
        return ClassCondition(state["class_names"])
    if kind == "text":
        check_fields(state, {"encoder": str, "max_tokens": int, "encoder_sha256": str | None}, file)
        check_fields(state, {"masked": bool, "revision": str}, file, required=False)
        options = {"masked": state.get("masked", True), "revision": state.get("revision")}
        if (file.parent / "text_encoder").is_dir():
            options |= {"folder": file.parent, "sha256": state["encoder_sha256"]}
        conditioning = TextCondition(state["encoder"], state["max_tokens"], **options)
        expected, actual = state["encoder_sha256"], conditioning.encoder.sha256()
        if expected and actual and expected != actual:
            raise UserError(
                f"The text encoder {state['encoder']} has the weights {actual[:12]}, but the pipeline was trained with "
                f"{expected[:12]}. Restore the original encoder."
            )
        return conditioning
    raise UserError(f"{file}: the conditioning {kind} is unknown. It must be one of: none, class, text.")


def drop(condition: Condition, null: Condition, mask: Tensor) -> Condition:
    """Replace the rows where `mask` [b] is True with the null condition."""
    return {
        name: torch.where(mask.view(-1, *(1,) * (value.ndim - 1)), null[name].to(value.device, value.dtype), value)
        for name, value in condition.items()
    }


def no_condition(images: ImageData) -> NoCondition:
    """Build the conditioning of an unconditional model."""
    return NoCondition()


def class_condition(images: ImageData) -> ClassCondition:
    """Build the conditioning on the classes of the images.

    Raises:
        UserError: The images have no labels.
    """
    return ClassCondition(_class_names(images))


def text_condition(images: ImageData, encoder: str, max_tokens: Annotated[Count, Field(le=100_000)]) -> TextCondition:
    """Build the conditioning on captions.

    Raises:
        UserError: The images have no captions, or the encoder cannot be loaded.
    """
    images.require_captions()
    return TextCondition(encoder, max_tokens)


def clip_sd_condition(
    images: ImageData, encoder: str, max_tokens: Annotated[Count, Field(le=100_000)]
) -> TextCondition:
    """Build the conditioning on captions as in Stable Diffusion: the tokens of CLIP, those of the padding included.

    Raises:
        UserError: The images have no captions, or the encoder cannot be loaded.
    """
    images.require_captions()
    return TextCondition(encoder, max_tokens, masked=False)


def _class_names(images: ImageData) -> list[str]:
    labels = images.require_labels()
    return images.class_names or [str(label) for label in range(max(labels) + 1)]
