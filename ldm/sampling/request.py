"""A request for samples: prompts, classes, or the captions or classes of existing images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from ldm.data.images import ImageData
from ldm.diffusion.denoiser import Condition
from ldm.errors import UserError
from ldm.files.untrusted import replace_surrogates
from ldm.rules import Count, Integer, checked
from ldm.sampling.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True)
class Request:
    """The condition of each sample, as tensors and as a caption."""

    condition: Condition
    captions: list[str | None]

    @classmethod
    @checked
    def from_options(
        cls,
        pipeline: LatentDiffusionPipeline,
        *,
        prompt: str | None = None,
        prompts: str | None = None,
        label: Annotated[Integer, Field(ge=0)] | None = None,
        num_samples: Count = 16,
    ) -> "Request":
        """Build a request from command-line options.

        Args:
            prompt: Prompt for all samples.
            prompts: Text file with one prompt per line; one sample is generated for each.
            label: Class index for all samples.

        Raises:
            UserError: If the file is missing or empty, or as raised by `Conditioning.for_request`.
        """
        if prompts:
            captions: list[str] | None = read_prompts(prompts)
        else:
            captions = None if prompt is None else [replace_surrogates(prompt)] * num_samples
        classes = None if label is None else [label] * num_samples
        return cls(*pipeline.conditioning.for_request(captions, classes, num_samples))

    @classmethod
    def for_images(cls, pipeline: LatentDiffusionPipeline, images: ImageData, indices: np.ndarray) -> "Request":
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
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"prompts={file} is not encoded in UTF-8 ({error.reason}). Save it as UTF-8.") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise UserError(f"prompts={file} contains no captions. Write one per line.")
    return captions
