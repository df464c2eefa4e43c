"""What samples are asked for: prompts, classes, or the conditions of images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from ldm.data.images import ImageData
from ldm.diffusion.denoiser import Condition
from ldm.errors import UserError
from ldm.files.untrusted import clean_text
from ldm.rules import Count, Whole, checked
from ldm.sampling.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True)
class Request:
    """What each sample is conditioned on; `captions` says it in words."""

    condition: Condition
    captions: list[str | None]

    @classmethod
    @checked
    def make(
        cls,
        pipeline: LatentDiffusionPipeline,
        *,
        prompt: str | None = None,
        prompts: str | None = None,
        label: Annotated[Whole, Field(ge=0)] | None = None,
        num_samples: Count = 16,
    ) -> "Request":
        """Understand what the user asked for.

        Args:
            prompts: A file with one prompt per line, for a sample each.

        Raises:
            UserError: a file that is missing or empty, or what `Conditioning.of_request` refuses.
        """
        if prompts:
            captions: list[str] | None = read_prompts(prompts)
        else:
            captions = None if prompt is None else [clean_text(prompt)] * num_samples
        classes = None if label is None else [label] * num_samples
        return cls(*pipeline.conditioning.of_request(captions, classes, num_samples))

    @classmethod
    def of_images(cls, pipeline: LatentDiffusionPipeline, images: ImageData, indices: np.ndarray) -> "Request":
        """The captions or classes of these images, where the model takes them.

        Raises:
            UserError: as `Conditioning.of_images` does.
        """
        return cls(*pipeline.conditioning.of_images(images, indices))

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
