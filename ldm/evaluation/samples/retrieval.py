"""Does an image show what its caption says? By the caption's own image, and for captions that training never saw."""

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


def training_retrieval(found: Mapping[str, Tensor], train: Tensor, rows: Tensor, content: dict[str, Any]) -> list[str]:
    """Is the training image of a training caption the one that its sample is nearest to?

    Args:
        found: Features of samples and of reconstructions of the captions' own images, [n, d] and at most as many.
        train: Of the training images, [m, d].
        rows: The training image of each sample's caption, [n].
        content: Of the report, to which metrics are added; lines that explain them are returned.
    """
    head = f"Retrieval of the caption's own image among {len(train)} training images, {content['features_key']}:"
    return [head, *_retrieval(found, train, rows, "{}", content)]


def held_out_retrieval(
    found: Mapping[str, Tensor],
    validation: Tensor,
    train: Tensor,
    rows: Tensor,
    images: ImageData,
    conditioning: Conditioning,
    content: dict[str, Any],
) -> list[str]:
    """The same for captions of validation images: which of these is nearest, and what the nearest training image shows.

    Args:
        found: Features of samples for held-out captions and of reconstructions of their own images, [n, d] each.
        validation, train: Of all validation and training images.
        rows: The validation image of each sample's caption, [n].
    """
    among = f"retrieval of the own image among {len(validation)} validation images, {content['features_key']}:"
    lines = [f"{len(rows)} captions that training never saw: {among}"]
    lines += _retrieval(found, validation, rows, "held_out_{}", content)
    captions = images.require_captions()
    prompts = conditioning.of_request(prompts=[captions[images.val_indices[row]] for row in rows.tolist()])[0]["pooled"]
    cosines = []
    for name, part in found.items():
        _, nearest = nearest_by_cosine(part, train)
        texts = [images.captions_of(images.train_indices[row]) for row in nearest.tolist()]
        shown = conditioning.of_request(prompts=[text for several in texts for text in several])[0]["pooled"]
        own, permuted, error = caption_agreement(prompts, shown.split([len(several) for several in texts]))
        content[f"caption_cosine_held_out_{name}"] = Metric(own, error)
        content.setdefault("caption_cosine_held_out_permuted", permuted)  # of the samples, which come first
        cosines.append([name, f"{Metric(own, error):.3f}", f"with other prompts {permuted:.3f}"])
    content["num_held_out"] = len(rows)
    lines.append("  cosine of the prompt's embedding and that of the caption of the nearest training image:")
    return [*lines, *align(cosines)]


def caption_agreement(prompts: Tensor, shown: Sequence[Tensor]) -> tuple[float, float, float]:
    """How near the captions of an image are to a prompt, next to all the same captions with other prompts.

        own = mean_i max_k cos(p_i, c_ik),   permuted = mean_{i, j != i} max_k cos(p_j, c_ik)

    Args:
        prompts: Embeddings of what was asked for, [n, d], two or more.
        shown: Of what was found, by sample the embeddings of all captions of one image, [k_i, d] each.

    Returns:
        Both means, and the standard error of the first.
    """
    n = len(prompts)
    prompts = F.normalize(prompts.double(), dim=1)
    # [n, n], the captions of image i in column i
    best = torch.stack([(prompts @ F.normalize(part.double(), dim=1).T).amax(1) for part in shown], dim=1)
    own = best.diagonal()
    others = (best.sum() - own.sum()) / (n * (n - 1))
    return own.mean().item(), others.item(), own.std().item() / math.sqrt(n)


def _retrieval(
    found: Mapping[str, Tensor], gallery: Tensor, rows: Tensor, form: str, content: dict[str, Any]
) -> list[str]:
    shares = {}
    for name, features in found.items():
        ranks = retrieval_ranks(features, gallery, rows[: len(features)])
        shares[name] = [(ranks < k).float().mean().item() for k in (1, 5)]
    shares["chance"] = [min(1.0, k / len(gallery)) for k in (1, 5)]
    content |= {f"retrieval_at_{k}_{form.format(name)}": both[k == 5] for name, both in shares.items() for k in (1, 5)}
    return align([[name, "@1", f"{first:.2%}", "@5", f"{fifth:.2%}"] for name, (first, fifth) in shares.items()])
