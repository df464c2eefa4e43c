"""ldm.networks.class_embedding: embeddings are matched by class name."""

import pytest
import torch

from ldm.networks.class_embedding import ClassChange, replace_classes
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
def test_embeddings_are_matched_by_class_name(make, new):
    old = ["cat", "dog"]
    network = make(2)
    old_rows = network.class_embedding.weight.detach().clone()
    torch.manual_seed(0)
    adapted = replace_classes(network, old, new)
    rows = adapted.class_embedding.weight
    assert rows.shape[0] == len(new) + 1 and torch.equal(rows[-1], old_rows[-1]), "the null class stays last"
    for row, name in zip(rows[:-1], new, strict=True):
        matches = [torch.equal(row, old_row) for old_row in old_rows]
        assert matches == [name == "cat", name == "dog", False]
    for name, value in network.state_dict().items():
        if name != "class_embedding.weight":
            assert torch.equal(adapted.state_dict()[name], value)
    # the outputs for classes in both lists do not change
    z_t, t = torch.randn(1, 4, 8, 8), torch.tensor([3])
    for name in set(old) & set(new):
        expected, actual = (net(z_t, t, label=torch.tensor([names.index(name)]))
                            for net, names in ((network, old), (adapted, new)))  # fmt: skip
        torch.testing.assert_close(actual, expected)


def test_replacing_classes_with_identical_classes_returns_the_same_network():
    network = dit(2)
    assert replace_classes(network, ["a", "b"], ["a", "b"]) is network


def test_new_classes_have_the_default_initialisation():
    rows = replace_classes(dit(1), ["a"], ["a", *map(str, range(200))]).class_embedding.weight[1:-1]
    assert rows.std().item() == pytest.approx(0.02, rel=0.05), "the scale of DiT's initialisation"


def test_class_change_lists_kept_new_and_dropped_classes():
    change = ClassChange.between(["cat", "dog"], ["ant", "cat"])
    assert str(change) == "kept: cat; new: ant; dropped: dog"
    assert str(ClassChange.between(list("ab"), [*map(str, range(12))])).startswith("new: 0, 1, 2")


def test_network_without_class_embedding_is_rejected():
    network = DiT(sample_size=8, patch_size=2, hidden_dim=32, depth=1, head_dim=16)
    with pytest.raises(ValueError, match="DiT.*no class embedding"):
        replace_classes(network, ["a"], ["b"])
