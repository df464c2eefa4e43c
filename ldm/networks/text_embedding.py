"""Caption embeddings from a tokenizer and a text encoder of the transformers library.

The folders of text-conditional pipelines contain a copy of this module (see `ldm.sampling.diffusers_pipeline`), so it
imports only torch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def embed_captions(tokenizer: Any, encoder: Any, captions: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
    """Embed captions as tokens [b, l, d], mask [b, l] and pooled [b, d], in float32 on the encoder's device.

    `pooled` is the mean of a caption's token embeddings, scaled to norm sqrt(d) so that its entries have unit RMS.
    """
    inputs = tokenizer(
        list(captions), padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
    ).to(encoder.device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    weights = mask[..., None].float()
    pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
    pooled = torch.nn.functional.normalize(pooled, dim=-1) * math.sqrt(tokens.shape[-1])
    return {"tokens": tokens * weights, "mask": mask, "pooled": pooled}
