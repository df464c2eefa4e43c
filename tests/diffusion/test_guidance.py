import pytest
import torch

from ldm.diffusion import chain
from ldm.diffusion.denoiser import Denoiser, DenoiserLike
from ldm.diffusion.guidance import Guided
from ldm.diffusion.schedule import linear

NULL = {"label": torch.tensor([0.0], dtype=torch.float64)}


class Network:
    """A network that predicts eps = (label + 1) z_t and v = label / 10."""

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
def test_guiding_z_0_matches_guiding_eps_in_one_batch(t, scale, randn):
    network, guided = build(scale)
    z_t, label = randn(2, 3), torch.tensor([1.0, 2.0], dtype=torch.float64)
    predicted = guided(z_t, t, {"label": label})
    cond, null = (label[:, None] + 1) * z_t, z_t
    expected = chain.to_z_0(guided.schedule, null + scale * (cond - null), z_t, t, "eps")
    torch.testing.assert_close(predicted.z_0, expected)
    torch.testing.assert_close(predicted.v, label[:, None].expand(2, 3) / 10)
    assert network.batches == [(4, 4)]
    assert isinstance(guided, DenoiserLike)


def test_without_guidance_only_conditional_branch_runs(randn):
    z_t, condition = randn(2, 3), {"label": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    for scale, interval, t in [(1.0, (0.0, 1.0), 4), (3.0, (0.5, 0.8), 4), (3.0, (0.5, 0.8), 9)]:
        network, guided = build(scale, interval)
        predicted = guided(z_t, t, condition)
        assert network.batches == [(2, 2)]
        assert predicted.z_0.equal(guided.denoiser(z_t, t, condition).z_0)


def test_interval_includes_endpoints_and_applies_per_sample(randn):
    z_t, label = randn(4, 3), torch.ones(4, dtype=torch.float64)
    t = torch.tensor([4, 5, 8, 9])
    _, always_guided = build()
    _, interval_guided = build(interval=(0.5, 0.8))
    guided, unguided = (
        always_guided(z_t, t, {"label": label}).z_0,
        interval_guided.denoiser(z_t, t, {"label": label}).z_0,
    )
    expected = torch.stack([unguided[0], guided[1], guided[2], unguided[3]])
    torch.testing.assert_close(interval_guided(z_t, t, {"label": label}).z_0, expected)


def test_invalid_arguments_raise(randn):
    z_t = randn(2, 3)
    _, guided = build()
    for condition, message in [
        (None, r"conditions \['label'\].*\[\]"),
        ({"text": torch.zeros(2)}, r"conditions \['label'\].*\['text'\]"),
        ({"label": torch.zeros(2, 5)}, r"'label'.*\[5\].*\[\].*pad"),
    ]:
        with pytest.raises(ValueError, match=message):
            guided(z_t, 3, condition)
    with pytest.raises(ValueError, match=r"interval.*low <= high.*\(0\.8, 0\.5\)"):
        build(interval=(0.8, 0.5))
    with pytest.raises(ValueError, match=r"'label'.*batch size 1\b.*\[2\]"):
        build(null={"label": torch.zeros(2)})
