"""ldm.latents.captions: embeddings computed once, keyed by captions and encoder."""

import numpy as np
import pytest
import torch

from ldm.latents.captions import CaptionData, open_captions

CAPTIONS = ["red heart", "", "blue square", "red heart", "cat, with (brackets)", "ein Käse", "woman’s hat"]
ENCODER = {"kind": "counting", "max_tokens": 4}


def encode(captions) -> dict[str, torch.Tensor]:
    """Letters as tokens: row i depends on caption i alone."""
    rows = [[float(ord(c)) for c in caption[:4].ljust(4, "\0")] for caption in captions]
    tokens = torch.tensor(rows)[..., None].expand(-1, -1, 3).contiguous()
    return {"tokens": tokens, "mask": (tokens[..., 0] > 0).long(), "pooled": tokens.mean(1)}


def refuse(captions):
    raise AssertionError("these embeddings are in the cache")


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_rows_equal_direct_encoding(tmp_path, batch_size):
    data = open_captions(encode, CAPTIONS, ENCODER, cache_dir=tmp_path, batch_size=batch_size)
    indices = [6, 0, 0, 3]
    expected = encode([CAPTIONS[i] for i in indices])
    found = data.batch(indices)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_what_is_cached_is_not_encoded_again(tmp_path):
    first = open_captions(encode, CAPTIONS, ENCODER, cache_dir=tmp_path)
    again = open_captions(refuse, CAPTIONS, ENCODER, cache_dir=tmp_path)
    torch.testing.assert_close(again.batch([2]), first.batch([2]), rtol=0, atol=0)
    assert len(list(tmp_path.glob("[!.]*"))) == 1 and isinstance(again.arrays["tokens"], np.memmap)
    again.batch([0])["tokens"].zero_()
    torch.testing.assert_close(again.batch([0])["tokens"], encode(CAPTIONS[:1])["tokens"])


@pytest.mark.parametrize(
    ("captions", "encoder"),
    [
        ([*CAPTIONS[:-1], "another"], ENCODER),
        (CAPTIONS[::-1], ENCODER),
        (CAPTIONS, ENCODER | {"max_tokens": 5}),
        (CAPTIONS, ENCODER | {"encoder_sha256": "abc"}),
    ],
    ids=["a caption", "the order", "an option", "the weights"],
)
def test_another_content_has_a_cache_of_its_own(tmp_path, captions, encoder):
    open_captions(encode, CAPTIONS, ENCODER, cache_dir=tmp_path)
    open_captions(encode, captions, encoder, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("[!.]*"))) == 2


def test_a_broken_encoding_leaves_nothing(tmp_path):
    def dies(captions):
        if "ein Käse" in captions:
            raise KeyboardInterrupt
        return encode(captions)

    with pytest.raises(KeyboardInterrupt):
        open_captions(dies, CAPTIONS, ENCODER, cache_dir=tmp_path, batch_size=2)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert isinstance(open_captions(encode, CAPTIONS, ENCODER, cache_dir=tmp_path), CaptionData)


def test_of_several_captions_the_draw_chooses_one(tmp_path):
    several = ["red heart", ["blue", "square", "box"], ["cat"], ["x", "y"]]
    data = open_captions(encode, several, ENCODER, cache_dir=tmp_path)
    flat = ["red heart", "blue", "square", "box", "cat", "x", "y"]

    def chosen(indices, draws=None) -> list[str]:
        found = data.batch(indices, None if draws is None else np.array(draws, np.float32))["tokens"]
        known = encode(flat)["tokens"]
        return [next(text for text, one in zip(flat, known, strict=True) if torch.equal(one, row)) for row in found]

    assert chosen([0, 1, 2, 3]) == ["red heart", "blue", "cat", "x"], "without draws the first, as validation sees it"
    assert chosen([1, 1, 1, 1, 3, 3], [0, 0.34, 0.67, 0.9999999, 0.49, 0.5]) == [
        "blue",
        "square",
        "box",
        "box",
        "x",
        "y",
    ]
    assert chosen([2, 0], [0.99, 0.99]) == ["cat", "red heart"]


def test_one_caption_each_is_the_cache_that_it_always_was(tmp_path):
    one = open_captions(encode, CAPTIONS, ENCODER, cache_dir=tmp_path)
    open_captions(refuse, [[caption] for caption in CAPTIONS], ENCODER, cache_dir=tmp_path)
    assert one.counts is None
