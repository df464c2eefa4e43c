"""Agreement between samples and their captions, for training captions and for held-out captions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.images import ImageData
from ldm.evaluation.samples.distances import align
from ldm.evaluation.samples.memorisation import nearest_by_cosine
from ldm.metrics.metric import Metric
from ldm.metrics.neighbours import retrieval_ranks
from ldm.networks.conditioning import Conditioning


def training_retrieval(
    queries: Mapping[str, Tensor], train: Tensor, rows: Tensor, content: dict[str, Any]
) -> list[str]:
    """Measure how often the training image nearest to a sample is the image that the sample's caption belongs to.

    Args:
        queries: Features of the samples, [n, d], and of reconstructions of the captioned images, with at most n rows.
        train: Features of the training images, [m, d].
        rows: The row of the training image that each caption belongs to, [n].
        content: Content of the report, to which the metrics are added.

    Returns:
        Lines of text with the results.
    """
    header = f"Retrieval of the caption's own image among {len(train)} training images, {content['features_key']}:"
    return [header, *_retrieval(queries, train, rows, "{}", content)]


def held_out_retrieval(
    queries: Mapping[str, Tensor],
    validation: Tensor,
    train: Tensor,
    rows: Tensor,
    images: ImageData,
    conditioning: Conditioning,
    content: dict[str, Any],
) -> list[str]:
    """For held-out captions, measure caption agreement, and retrieval among the validation images.

    Caption agreement is the similarity of the prompt to the captions of the training image nearest to the sample.

    Args:
        queries: Features of samples for held-out captions, and of reconstructions of the captioned images, [n, d] each.
        validation, train: Features of all validation and all training images.
        rows: The row of the validation image that each caption belongs to, [n].
    """
    title = (
        f"retrieval of the caption's own image among {len(validation)} validation images, {content['features_key']}:"
    )
    lines = [f"{len(rows)} held-out captions: {title}"]
    lines += _retrieval(queries, validation, rows, "held_out_{}", content)
    captions = images.require_captions()
    prompts = conditioning.for_request([captions[images.val_indices[row]] for row in rows.tolist()])[0]["pooled"]
    cosines = []
    for name, features in queries.items():
        _, nearest = nearest_by_cosine(features, train)
        texts = [images.captions_of(images.train_indices[row]) for row in nearest.tolist()]
        embeddings = conditioning.for_request([text for captions in texts for text in captions])[0]["pooled"]
        matched, permuted, error = caption_agreement(prompts, embeddings.split(list(map(len, texts))))
        content[f"caption_cosine_held_out_{name}"] = Metric(matched, error)
        content.setdefault("caption_cosine_held_out_permuted", permuted)  # the samples come first
        cosines.append([name, f"{Metric(matched, error):.3f}", f"with other prompts {permuted:.3f}"])
    content["num_held_out"] = len(rows)
    lines.append("  Cosine similarity between embeddings of the prompt and of the nearest training image's caption:")
    return [*lines, *align(cosines)]


def caption_agreement(prompts: Tensor, captions: Sequence[Tensor]) -> tuple[float, float, float]:
    """Return the mean similarity of prompts to the captions of their own images and of mismatched images.

        matched = mean_i max_k cos(p_i, c_ik),   permuted = mean_{i, j != i} max_k cos(p_j, c_ik)

    Args:
        prompts: Embeddings of the prompts, [n, d], n >= 2.
        captions: For each prompt, the embeddings of all captions of its image, [k_i, d].

    Returns:
        Both means, and the standard error of the matched mean.
    """
    n = len(prompts)
    prompts = F.normalize(prompts.double(), dim=1)
    # [n, n]: column i belongs to the captions of image i
    best = torch.stack([(prompts @ F.normalize(image.double(), dim=1).T).amax(1) for image in captions], dim=1)
    matched = best.diagonal()
    permuted = (best.sum() - matched.sum()) / (n * (n - 1))
    return matched.mean().item(), permuted.item(), matched.std().item() / math.sqrt(n)


def _retrieval(
    queries: Mapping[str, Tensor], gallery: Tensor, rows: Tensor, key: str, content: dict[str, Any]
) -> list[str]:
    """Add the top-1 and top-5 retrieval rates to `content`, and return them as a table."""
    rates = {}
    for name, features in queries.items():
        ranks = retrieval_ranks(features, gallery, rows[: len(features)])
        rates[name] = [(ranks < k).float().mean().item() for k in (1, 5)]
    rates["chance"] = [min(1.0, k / len(gallery)) for k in (1, 5)]
    content |= {f"retrieval_at_{k}_{key.format(name)}": pair[k == 5] for name, pair in rates.items() for k in (1, 5)}
    return align([[name, "@1", f"{first:.2%}", "@5", f"{fifth:.2%}"] for name, (first, fifth) in rates.items()])
