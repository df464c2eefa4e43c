"""Tests of ldm.latents.captions: embeddings are computed once for each combination of captions and encoder."""

import numpy as np
import pytest
import torch

from ldm.latents.captions import CaptionData, open_captions

CAPTIONS = ["red heart", "", "blue square", "red heart", "cat, with (brackets)", "ein Käse", "woman’s hat"]
ENCODER = {"kind": "counting", "max_tokens": 4}


def encode(captions) -> dict[str, torch.Tensor]:
    """Use the first four characters of each caption as its tokens."""
    rows = [[float(ord(c)) for c in caption[:4].ljust(4, "\0")] for caption in captions]
    tokens = torch.tensor(rows)[..., None].expand(-1, -1, 3).contiguous()
    return {"tokens": tokens, "mask": (tokens[..., 0] > 0).long(), "pooled": tokens.mean(1)}


def fail_on_cache_miss(captions):
    raise AssertionError("these embeddings should be in the cache")


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_rows_equal_direct_encoding(tmp_path, batch_size):
    data = open_captions(encode, CAPTIONS, ENCODER, cache_dir=tmp_path, batch_size=batch_size)
    indices = [6, 0, 0, 3]
    expected = encode([CAPTIONS[i] for i in indices])
    actual = data.batch(indices)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0)


def test_cached_captions_are_not_encoded_again(tmp_path):
    data = open_captions(encode, CAPTIONS, ENCODER, cache_dir=tmp_path)
    reopened = open_captions(fail_on_cache_miss, CAPTIONS, ENCODER, cache_dir=tmp_path)
    torch.testing.assert_close(reopened.batch([2]), data.batch([2]), rtol=0, atol=0)
    assert len(list(tmp_path.glob("[!.]*"))) == 1 and isinstance(reopened.arrays["tokens"], np.memmap)
    reopened.batch([0])["tokens"].zero_()
    torch.testing.assert_close(reopened.batch([0])["tokens"], encode(CAPTIONS[:1])["tokens"])


@pytest.mark.parametrize(
    ("captions", "encoder"),
    [
        ([*CAPTIONS[:-1], "new"], ENCODER),
        (CAPTIONS[::-1], ENCODER),
        (CAPTIONS, ENCODER | {"max_tokens": 5}),
        (CAPTIONS, ENCODER | {"encoder_sha256": "abc"}),
    ],
    ids=["caption", "order", "option", "weights"],
)
def test_changed_captions_or_encoder_get_a_separate_cache(tmp_path, captions, encoder):
    open_captions(encode, CAPTIONS, ENCODER, cache_dir=tmp_path)
    open_captions(encode, captions, encoder, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("[!.]*"))) == 2


def test_interruption_leaves_no_files(tmp_path):
    def interrupted_encode(captions):
        if "ein Käse" in captions:
            raise KeyboardInterrupt
        return encode(captions)

    with pytest.raises(KeyboardInterrupt):
        open_captions(interrupted_encode, CAPTIONS, ENCODER, cache_dir=tmp_path, batch_size=2)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert isinstance(open_captions(encode, CAPTIONS, ENCODER, cache_dir=tmp_path), CaptionData)


def test_draws_select_one_of_several_captions(tmp_path):
    captions = ["red heart", ["blue", "square", "box"], ["cat"], ["x", "y"]]
    data = open_captions(encode, captions, ENCODER, cache_dir=tmp_path)
    texts = ["red heart", "blue", "square", "box", "cat", "x", "y"]

    def select(indices, draws=None) -> list[str]:
        rows = data.batch(indices, None if draws is None else np.array(draws, np.float32))["tokens"]
        tokens = list(zip(texts, encode(texts)["tokens"], strict=True))
        return [next(text for text, token in tokens if torch.equal(token, row)) for row in rows]

    assert select([0, 1, 2, 3]) == ["red heart", "blue", "cat", "x"], "the first caption, as in validation"
    assert select([1, 1, 1, 1, 3, 3], [0, 0.34, 0.67, 0.9999999, 0.49, 0.5]) == [
        "blue",
        "square",
        "box",
        "box",
        "x",
        "y",
    ]
    assert select([2, 0], [0.99, 0.99]) == ["cat", "red heart"]


def test_lists_of_one_caption_share_the_cache_with_strings(tmp_path):
    data = open_captions(encode, CAPTIONS, ENCODER, cache_dir=tmp_path)
    open_captions(fail_on_cache_miss, [[caption] for caption in CAPTIONS], ENCODER, cache_dir=tmp_path)
    assert data.counts is None
