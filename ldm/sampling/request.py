"""A request for samples: prompts, classes, or the captions or classes of existing images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.data.images import ImageData
from ldm.diffusion.denoiser import Condition
from ldm.errors import UserError
from ldm.files.untrusted import replace_surrogates
from ldm.rules import Count, checked
from ldm.sampling.pipeline import LatentDiffusion


@dataclass(frozen=True)
class Request:
    """The condition of each sample, as tensors and as a caption."""

    condition: Condition
    captions: list[str | None]

    @classmethod
    @checked
    def from_options(
        cls,
        pipeline: LatentDiffusion,
        *,
        prompt: str | None = None,
        prompts: str | None = None,
        label: int | str | Sequence[int | str] | None = None,
        num_samples: Count | None = None,
    ) -> "Request":
        """Build a request from command-line options.

        Args:
            prompt: Prompt for all samples.
            prompts: Text file with one prompt per line.
            label: A class or a list of classes, by name or number.
            num_samples: Number of samples per prompt or class. The default is 16 for a single one, and 1 for each of
                several.

        Raises:
            UserError: If both a prompt and a file are given, the file is missing or empty, or as raised by
                `Conditioning.for_request`.
        """
        if prompts and prompt is not None:
            raise UserError("prompt= and prompts= both give captions. Use only one of them.")
        texts = read_prompts(prompts) if prompts else None if prompt is None else [replace_surrogates(prompt)]
        labels = label if label is None or isinstance(label, Sequence) and not isinstance(label, str) else [label]
        several = max(len(texts or ()), len(labels or ())) > 1
        count = num_samples or (1 if several else 16)
        captions = None if texts is None else [text for text in texts for _ in range(count)]
        classes = None if labels is None else [item for item in labels for _ in range(count)]
        return cls(*pipeline.conditioning.for_request(captions, classes, count))

    @classmethod
    def for_images(cls, pipeline: LatentDiffusion, images: ImageData, indices: np.ndarray) -> "Request":
        """Build a request with the captions or classes of the given images, as the model requires.

        Raises:
            UserError: As raised by `Conditioning.for_images`.
        """
        return cls(*pipeline.conditioning.for_images(images, indices))

    def __len__(self) -> int:
        return len(self.captions)


def read_prompts(file: str) -> list[str]:
    """Read one caption per line from a text file, skipping blank lines."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"prompts={file} is not a file. Use a text file with one caption per line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split at U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"prompts={file} is not encoded in UTF-8 ({error.reason}). Save it as UTF-8.") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise UserError(f"prompts={file} contains no captions. Write one per line.")
    return captions
