"""What samples are asked for: prompts, classes, or the conditions of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.files.untrusted import clean_text
from ldm.networks.conditioning import ClassCondition, Condition, TextCondition
from ldm.sampling.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True)
class Request:
    """What each sample is conditioned on; `captions` says it in words."""

    condition: Condition
    captions: list[str | None]

    @classmethod
    def make(
        cls,
        pipeline: LatentDiffusionPipeline,
        *,
        prompt: str | None = None,
        prompts: str | None = None,
        label: int | None = None,
        num_samples: int = 16,
    ) -> "Request":
        """Understand what the user asked for.

        Raises:
            UserError: a prompt for a model without text, a file that is missing or empty, a label that does not exist.
        """
        conditioning = pipeline.conditioning
        if num_samples < 1:
            raise UserError(f"num_samples={num_samples} must be at least 1.")
        if isinstance(conditioning, TextCondition):
            if label is not None:
                raise UserError("This model is conditioned on text: give prompt=... instead of label=.")
            captions = read_prompts(prompts) if prompts else [clean_text(prompt or "")] * num_samples
            return cls(conditioning.encode(captions), list(captions))
        if prompt is not None or prompts is not None:
            raise UserError(f"This model is conditioned on {conditioning.kind}, not on text: leave prompt= out.")
        if isinstance(conditioning, ClassCondition):
            names = conditioning.class_names
            labels = [i % len(names) for i in range(num_samples)] if label is None else [int(label)] * num_samples
            return cls(conditioning.encode(labels), [names[i] for i in labels])
        if label is not None:
            raise UserError("This model is unconditional: leave label= out.")
        return cls({}, [None] * num_samples)

    @classmethod
    def of_images(cls, pipeline: LatentDiffusionPipeline, images: ImageData, indices: np.ndarray) -> "Request":
        """The captions or classes of these images, where the model takes them.

        Raises:
            UserError: images without them, or of a class that the model does not know.
        """
        conditioning = pipeline.conditioning
        if isinstance(conditioning, TextCondition):
            captions = images.require_captions()
            chosen = [captions[i] for i in indices]
            return cls(conditioning.encode(chosen), list(chosen))
        if isinstance(conditioning, ClassCondition):
            labels = images.require_labels()
            names = images.class_names or [str(label) for label in range(max(labels) + 1)]
            return cls.of_classes(conditioning, [names[labels[i]] for i in indices])
        return cls({}, [None] * len(indices))

    @classmethod
    def of_classes(cls, conditioning: ClassCondition, names: Sequence[str]) -> "Request":
        """A sample of each of these classes, by name: their numbers may be others in other data.

        Raises:
            UserError: one that the model does not know.
        """
        number = {name: label for label, name in reversed([*enumerate(conditioning.class_names)])}
        if unknown := [name for name in dict.fromkeys(names) if name not in number]:
            known = ", ".join(conditioning.class_names)
            raise UserError(f"This model knows no class {' or '.join(unknown)}; its classes are: {known}.")
        return cls(conditioning.encode([number[name] for name in names]), list(names))

    def __len__(self) -> int:
        return len(self.captions)


def read_prompts(file: str) -> list[str]:
    """One caption per line; blank lines are left out."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"prompts={file} is not a file. It should hold one caption per line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"prompts={file} is not UTF-8 ({error.reason}). Save it again in UTF-8.") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise UserError(f"prompts={file} holds no caption. Write one per line.")
    return captions
