"""ldm.networks.dit: initialisation, dependence on each input, rotary embeddings, and saving."""

import pytest
import torch

from ldm.networks.dit import DiT, rotary_angles, rotate, timestep_embedding


def randomise(network: DiT) -> DiT:
    """Randomise all weights, because a zero-initialised network outputs only zeros."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def build(**options) -> DiT:
    torch.manual_seed(1)
    sizes = {"sample_size": 4, "in_channels": 3, "out_channels": 3, "hidden_dim": 32, "depth": 2, "head_dim": 16}
    return DiT(**{**sizes, "patch_size": 1, **options}).eval()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Three samples with captions of 2, 4 and 5 tokens."""
    mask = (torch.arange(5) < torch.tensor([[2], [4], [5]])).long()
    return {
        "sample": randn(3, 3, 4, 4),
        "timestep": torch.tensor([0, 499, 999]),
        "tokens": randn(3, 5, 6, seed=1),
        "mask": mask,
        "pooled": randn(3, 6, seed=2),
    }


@pytest.fixture
def network() -> DiT:
    return randomise(build(text_dim=6))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def select(inputs: dict[str, torch.Tensor], *indices: int) -> dict[str, torch.Tensor]:
    return {name: value[list(indices)] for name, value in inputs.items()}


def samples_differ(x: torch.Tensor, y: torch.Tensor) -> list[bool]:
    """Return, for each sample, whether it differs between the two batches."""
    return [bool((a - b).abs().max() > 1e-3) for a, b in zip(x, y, strict=True)]


@pytest.mark.parametrize("out_channels", [3, 6])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_new_network_outputs_zeros_of_the_right_shape(inputs, patch_size, out_channels):
    """A learned variance doubles the output channels from 3 to 6."""
    output = build(text_dim=6, patch_size=patch_size, out_channels=out_channels)(**inputs)
    assert output.shape == (3, out_channels, 4, 4)
    assert (output == 0).all()


@pytest.mark.parametrize("patch_size", [1, 2])
def test_every_output_depends_on_every_input_pixel(patch_size):
    network = randomise(build(patch_size=patch_size))
    sample = randn(1, 3, 4, 4)
    output = network(sample, torch.tensor([10]))
    for row, column in ((0, 0), (3, 2)):
        perturbed = sample.clone()
        perturbed[0, 0, row, column] += 1
        assert ((network(perturbed, torch.tensor([10])) - output).abs() > 1e-6).all()


def test_output_depends_on_timestep_tokens_and_pooled_embedding(network, inputs):
    output = network(**inputs)
    for name in ("timestep", "tokens", "pooled"):
        rolled = {**inputs, name: inputs[name].roll(1, 0)}
        assert samples_differ(network(**rolled), output) == [True] * 3, name


def test_output_depends_on_label():
    network = randomise(build(num_classes=2))
    sample, timestep = randn(1, 3, 4, 4).expand(3, -1, -1, -1), torch.tensor([5, 5, 5])
    a, b, null = network(sample, timestep, label=torch.tensor([0, 1, 2]))
    assert samples_differ(torch.stack([a, b, null]), torch.stack([b, null, a])) == [True] * 3


def test_masked_tokens_do_not_affect_the_output(network, inputs):
    output = network(**inputs)
    noise = torch.where(inputs["mask"].bool()[..., None], 0.0, 100 * randn(3, 5, 6, seed=3))
    torch.testing.assert_close(network(**{**inputs, "tokens": inputs["tokens"] + noise}), output, rtol=0, atol=1e-5)
    perturbed = {**inputs, "tokens": inputs["tokens"] + 100 * inputs["mask"][..., None]}
    assert samples_differ(network(**perturbed), output) == [True] * 3


def test_samples_in_a_batch_are_independent(network, inputs):
    batched = network(**inputs)
    single = torch.cat([network(**select(inputs, i)) for i in range(3)])
    torch.testing.assert_close(single, batched, rtol=1e-4, atol=1e-5)


def test_output_depends_on_position(network, inputs):
    """Without position embeddings, transposing the input would only transpose the output."""
    transposed = inputs["sample"].transpose(2, 3)
    assert samples_differ(network(**{**inputs, "sample": transposed}).transpose(2, 3), network(**inputs)) == [True] * 3


def test_rotation_preserves_norms_and_scores_depend_only_on_relative_position():
    cos, sin = rotary_angles(5, 5, 16, torch.device("cpu"))
    query, key = randn(1, 1, 1, 16).expand(-1, -1, 25, -1), randn(1, 1, 1, 16, seed=1).expand(-1, -1, 25, -1)
    rotated = rotate(query, cos, sin)
    torch.testing.assert_close(rotated.norm(dim=-1), query.norm(dim=-1))
    scores = (rotated @ rotate(key, cos, sin).transpose(-1, -2))[0, 0].view(5, 5, 5, 5)
    torch.testing.assert_close(scores[1, 1, 2, 4], scores[2, 0, 3, 3])
    torch.testing.assert_close(scores[:4, :4, :4, :4], scores[1:, 1:, 1:, 1:], rtol=1e-4, atol=1e-4)


def test_timestep_embeddings_are_distinct():
    embedding = timestep_embedding(torch.arange(1000), 256)
    assert embedding.shape == (1000, 256) and embedding.abs().max() <= 1
    assert torch.pdist(embedding).min() > 0.1


@pytest.mark.parametrize(("every", "has_attention"), [(1, [True] * 4), (2, [False, True] * 2), (0, [False] * 4)])
def test_every_nth_block_has_cross_attention(every, has_attention, inputs):
    network = randomise(build(text_dim=6, depth=4, cross_attention_every=every))
    assert [block.cross_attention is not None for block in network.blocks] == has_attention
    rolled = {**inputs, "tokens": inputs["tokens"].roll(1, 0)}
    assert samples_differ(network(**rolled), network(**inputs)) == [any(has_attention)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "patch_size must divide .*4.; got 3"),
        ({"head_dim": 24}, "head_dim must be .* divides hidden_dim .32.; got 24"),
        ({"hidden_dim": 36, "head_dim": 18}, "head_dim must be .*multiple of 4 .* got 18"),
        ({"mlp_ratio": 0.7}, "mlp_ratio must be at least 0.75 .*hidden_dim.*32; got 0.7"),
    ],
)
def test_incompatible_sizes_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("options", "missing"), [({"text_dim": 6}, "tokens, mask and pooled"), ({"num_classes": 2}, "label")]
)
def test_missing_condition_is_rejected(options, missing):
    with pytest.raises(ValueError, match=f"needs .*{missing}"):
        build(**options)(randn(1, 3, 4, 4), torch.tensor([0]))


def test_loaded_network_has_the_same_outputs(network, inputs, tmp_path):
    network.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path, use_safetensors=True, low_cpu_mem_usage=False)
    configs = [{k: v for k, v in n.config.items() if not k.startswith("_")} for n in (loaded, network)]
    assert configs[0] == configs[1]
    torch.testing.assert_close(loaded(**inputs), network(**inputs), rtol=0, atol=0)


def test_autocast_output_is_close_to_full_precision(network, inputs):
    expected = network(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = network(**inputs)
    assert (actual - expected).norm() / expected.norm() < 0.05
