"""Caption embeddings from a tokenizer and a text encoder of the transformers library.

The folders of pipelines contain a copy of this module (see `ldm.sampling.diffusers_pipeline`), so it imports only torch
and, where it is needed, transformers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def load_text_encoder(source: str, config: Any = None, revision: str | None = None) -> Any:
    """Load a text encoder in float32 and evaluation mode: of CLIP only the text tower, and of T5 only the encoder.

    Args:
        source: Folder or Hugging Face Hub id.
        config: The model's config, if it has already been loaded.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    options: Any = {"revision": revision, "trust_remote_code": False}
    config = config or AutoConfig.from_pretrained(source, **options)
    kind: Any = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
    model = kind.from_pretrained(source, config=config, dtype=torch.float32, use_safetensors=True, **options)
    return getattr(model, "text_model", model).eval().requires_grad_(False)


@torch.no_grad()
def embed_captions(
    tokenizer: Any, encoder: Any, captions: Sequence[str], max_tokens: int, masked: bool = True
) -> dict[str, Tensor]:
    """Embed captions as tokens [b, l, d], mask [b, l] and pooled [b, d], in float32 on the encoder's device.

    `pooled` is the mean of a caption's token embeddings, scaled to norm sqrt(d) so that its entries have unit RMS.

    Args:
        masked: False to embed captions as in Stable Diffusion, as tokens only, among them those of the padding.
    """
    if tokenizer.pad_token is None:  # e.g. in GPT-2
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(
        list(captions), padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
    ).to(encoder.device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if not masked:
        return {"tokens": encoder(input_ids=ids).last_hidden_state.float()}
    tokens = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    mask = mask.to(tokens.device)  # offloading can move the encoder to another device
    weights = mask[..., None].float()
    pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
    pooled = torch.nn.functional.normalize(pooled, dim=-1) * math.sqrt(tokens.shape[-1])
    return {"tokens": tokens * weights, "mask": mask, "pooled": pooled}
