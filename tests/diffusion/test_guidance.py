import pytest
import torch

from ldm.diffusion import chain
from ldm.diffusion.denoiser import Denoiser, DenoiserLike
from ldm.diffusion.guidance import Guided
from ldm.diffusion.schedule import linear

NULL = {"label": torch.tensor([0.0], dtype=torch.float64)}


class Network:
    """Predicts eps = (label + 1) z_t, and v = label / 10."""

    def __init__(self):
        self.batches = []

    def __call__(self, z_t, timesteps, condition):
        self.batches.append((len(z_t), len(timesteps)))
        label = condition["label"][:, None]
        return torch.cat([(label + 1) * z_t, (label / 5 - 1).expand_as(z_t)], 1)


def build(scale=3.0, interval=(0.0, 1.0), null=NULL):
    network = Network()
    return network, Guided(Denoiser(linear(10), network, "eps", True), scale, null, interval)


@pytest.mark.parametrize("t", [4, torch.tensor([2, 9]), 4.5, torch.tensor([2.5, 9.0])])
@pytest.mark.parametrize("scale", [0.0, 1.5, 3.0])
def test_guiding_z_0_is_guiding_eps_in_one_batch(t, scale, randn):
    network, guided = build(scale)
    z_t, label = randn(2, 3), torch.tensor([1.0, 2.0], dtype=torch.float64)
    answer = guided(z_t, t, {"label": label})
    cond, null = (label[:, None] + 1) * z_t, z_t
    expected = chain.to_z_0(guided.schedule, null + scale * (cond - null), z_t, t, "eps")
    torch.testing.assert_close(answer.z_0, expected)
    torch.testing.assert_close(answer.v, label[:, None].expand(2, 3) / 10)
    assert network.batches == [(4, 4)]
    assert isinstance(guided, DenoiserLike)


def test_no_guidance_runs_the_conditional_branch_alone(randn):
    z_t, condition = randn(2, 3), {"label": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    for scale, interval, t in [(1.0, (0.0, 1.0), 4), (3.0, (0.5, 0.8), 4), (3.0, (0.5, 0.8), 9)]:
        network, guided = build(scale, interval)
        answer = guided(z_t, t, condition)
        assert network.batches == [(2, 2)]
        assert answer.z_0.equal(guided.denoiser(z_t, t, condition).z_0)


def test_interval_includes_its_ends_and_acts_per_sample(randn):
    z_t, label = randn(4, 3), torch.ones(4, dtype=torch.float64)
    t = torch.tensor([4, 5, 8, 9])
    _, everywhere = build()
    _, inside = build(interval=(0.5, 0.8))
    guided, plain = everywhere(z_t, t, {"label": label}).z_0, inside.denoiser(z_t, t, {"label": label}).z_0
    expected = torch.stack([plain[0], guided[1], guided[2], plain[3]])
    torch.testing.assert_close(inside(z_t, t, {"label": label}).z_0, expected)


def test_errors(randn):
    z_t = randn(2, 3)
    _, guided = build()
    for condition, rule in [
        (None, r"needs the conditions \['label'\]"),
        ({"text": torch.zeros(2)}, r"got \['text'\]"),
        ({"label": torch.zeros(2, 5)}, "pad them to one shape"),
    ]:
        with pytest.raises(ValueError, match=rule):
            guided(z_t, 3, condition)
    with pytest.raises(ValueError, match="low <= high"):
        build(interval=(0.8, 0.5))
    with pytest.raises(ValueError, match="batch 1"):
        build(null={"label": torch.zeros(2)})
