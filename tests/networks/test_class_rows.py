"""ldm.networks.class_rows: a class keeps its embedding by its name."""

import pytest
import torch

from ldm.networks.class_rows import ClassChange, with_classes
from ldm.networks.dit import DiT
from ldm.networks.unet import unet


def dit(num_classes: int) -> DiT:
    return DiT(sample_size=8, patch_size=2, hidden_dim=32, depth=1, head_dim=16, num_classes=num_classes)


def image_unet(num_classes: int):
    return unet(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        num_classes=num_classes,
    )  # fmt: skip


@pytest.mark.parametrize("make", [dit, image_unet])
@pytest.mark.parametrize("new", [["ant", "cat"], ["dog", "cat"], ["cat"], ["ant", "cat", "dog", "emu"], ["emu", "ant"]])
def test_rows_follow_names(make, new):
    old = ["cat", "dog"]
    network = make(2)
    trained = network.class_embedding.weight.detach().clone()
    torch.manual_seed(0)
    changed = with_classes(network, old, new)
    rows = changed.class_embedding.weight
    assert rows.shape[0] == len(new) + 1 and torch.equal(rows[-1], trained[-1]), "the null class stays the last"
    for row, name in zip(rows[:-1], new, strict=True):
        known = [torch.equal(row, one) for one in trained]
        assert known == [name == "cat", name == "dog", False]
    for name, value in network.state_dict().items():
        if name != "class_embedding.weight":
            assert torch.equal(changed.state_dict()[name], value)
    # what it draws of a class that it knows is what it drew
    z_t, t = torch.randn(1, 4, 8, 8), torch.tensor([3])
    for name in set(old) & set(new):
        here, there = (net(z_t, t, label=torch.tensor([names.index(name)]))
                       for net, names in ((network, old), (changed, new)))  # fmt: skip
        torch.testing.assert_close(here, there)


def test_the_same_classes_are_the_same_network():
    network = dit(2)
    assert with_classes(network, ["a", "b"], ["a", "b"]) is network


def test_a_fresh_class_starts_as_in_a_fresh_network():
    rows = with_classes(dit(1), ["a"], ["a", *map(str, range(200))]).class_embedding.weight[1:-1]
    assert rows.std().item() == pytest.approx(0.02, rel=0.05), "DiT's own scale"


def test_the_change_names_every_class():
    change = ClassChange.between(["cat", "dog"], ["ant", "cat"])
    assert str(change) == "kept: cat; new: ant; dropped: dog"
    assert str(ClassChange.between(list("ab"), [*map(str, range(12))])).startswith("new: 0, 1, 2")


def test_a_network_without_classes_is_refused():
    network = DiT(sample_size=8, patch_size=2, hidden_dim=32, depth=1, head_dim=16)
    with pytest.raises(ValueError, match="DiT has no class embedding"):
        with_classes(network, ["a"], ["b"])
