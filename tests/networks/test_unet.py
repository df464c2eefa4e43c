"""ldm.networks.unet: text-conditional, class-conditional and unconditional UNets."""

import pytest
import torch

from ldm.networks.unet import ImageUNet, TextUNet, unet


def build(**options):
    torch.manual_seed(0)
    network = unet(
        **{
            "sample_size": 4,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "head_dim": 8,
            "norm_num_groups": 8,
            **options,
        }
    )
    return network.eval()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS = {"none": {}, "class": {"num_classes": 2}, "text": {"text_dim": 6}}
MASK = (torch.arange(5) < torch.tensor([[2], [4], [5]])).long()
CONDITIONS = {
    "none": {},
    "class": {"label": torch.tensor([0, 1, 2])},
    "text": {"tokens": randn(3, 5, 6, seed=1), "mask": MASK, "pooled": randn(3, 6, seed=2)},
}
SAMPLE, TIMESTEP = randn(3, 3, 4, 4), torch.tensor([0, 499, 999])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out_channels", [3, 6])
def test_output_has_the_right_shape(kind, out_channels):
    network = build(**KINDS[kind], out_channels=out_channels)
    assert isinstance(network, TextUNet if kind == "text" else ImageUNet)
    assert network(SAMPLE, TIMESTEP, **CONDITIONS[kind]).shape == (3, out_channels, 4, 4)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("none", "timestep"), ("class", "label"), ("text", "tokens"), ("text", "pooled"), ("text", "timestep")],
)
def test_output_depends_on_each_input(kind, name):
    network, inputs = build(**KINDS[kind]), {"timestep": TIMESTEP, **CONDITIONS[kind]}
    output = network(SAMPLE, **inputs)
    # the mask is not rolled, so that each sample keeps its number of tokens
    new_output = network(SAMPLE, **{**inputs, name: inputs[name].roll(1, 0)})
    assert ((new_output - output).abs().amax((1, 2, 3)) > 1e-4).all()


def test_masked_tokens_do_not_affect_the_output():
    network, inputs = build(text_dim=6), CONDITIONS["text"]
    output = network(SAMPLE, TIMESTEP, **inputs)
    noise = torch.where(MASK.bool()[..., None], 0.0, randn(3, 5, 6, seed=3))
    new_output = network(SAMPLE, TIMESTEP, **{**inputs, "tokens": inputs["tokens"] + noise})
    torch.testing.assert_close(new_output, output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_in_a_batch_are_independent(kind):
    network = build(**KINDS[kind])
    batched = network(SAMPLE, TIMESTEP, **CONDITIONS[kind])
    single = torch.cat(
        [
            network(SAMPLE[i : i + 1], TIMESTEP[i : i + 1], **{k: v[i : i + 1] for k, v in CONDITIONS[kind].items()})
            for i in range(3)
        ]
    )
    torch.testing.assert_close(single, batched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_network_has_the_same_outputs(kind, tmp_path):
    network = build(**KINDS[kind])
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path, use_safetensors=True, low_cpu_mem_usage=False).eval()
    output = network(SAMPLE, TIMESTEP, **CONDITIONS[kind])
    torch.testing.assert_close(loaded(SAMPLE, TIMESTEP, **CONDITIONS[kind]), output, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["none", "text"])
@pytest.mark.parametrize("levels", [(), (0,), (0, 1)])
def test_only_attention_levels_have_attention(kind, levels):
    network = build(**KINDS[kind], attention_levels=levels)
    down = [type(block).__name__ for block in network.down_blocks]
    up = [type(block).__name__ for block in network.up_blocks]
    assert ["Attn" in name for name in down] == [level in levels for level in range(2)]
    assert ["Attn" in name for name in up] == [level in levels for level in (1, 0)]


@pytest.mark.parametrize("kind", ["none", "text"])
def test_attention_heads_have_width_head_dim(kind):
    """UNet2DConditionModel is configured with the number of heads, UNet2DModel with the head width."""
    network = build(**KINDS[kind], attention_levels=(1,))
    heads = {module.heads for module in network.down_blocks[1].modules() if hasattr(module, "heads")}
    assert heads == {32 // 8}


def test_indivisible_latent_size_is_rejected():
    with pytest.raises(ValueError, match="3 levels.*divisible by 4"):
        build(sample_size=6, block_out_channels=(8, 8, 8))
