"""Training of both stages on a realistic, messy image folder."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm.train
from ldm.runs.run import Run

SHORT_RUN = [
    *("data=image_folder", "data.path=.", "data.resolution=16", "data.val_fraction=0.2", "batch_size=4", "logger=csv"),
    *("trainer=cpu", "trainer.precision=32-true", "trainer.max_steps=2", "trainer.max_time=null"),
]
VAE = ["stage=vae", "autoencoder.model.block_out_channels=[32]", *SHORT_RUN]
DIT = ["network=dit", "network.hidden_dim=64", "network.depth=1", "network.head_dim=32", "sampler.steps=2"]


def save_noise(path: Path, seed: int, mode: str = "RGB", **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


@pytest.fixture
def photos(tmp_path, monkeypatch, p3) -> Path:
    """Two classes of 8 images, three kinds of captions, and many files that are not data."""
    folder = tmp_path / "my photos"
    for i in range(8):
        save_noise(folder / "cat" / f"{i}.png", i, mode=("RGB", "RGBA", "L", "P")[i % 4])
        save_noise(folder / "dog" / f"{i}.jpg", 10 + i, mode="CMYK" if i == 7 else "RGB")
        (folder / "cat" / f"{i}.txt").write_text(f"a cat,\nnumber {i}\n")
    save_noise(folder / "dog" / "0.jpg", 10, icc_profile=p3)
    save_noise(folder / "dog" / "1.jpg", 11, icc_profile=b"not a profile")
    rows = [f"{i}.jpg,a dog" for i in range(7)] + ['0.jpg,"a dog, brown"', "7.jpg,ein\u2028Hund"]
    (folder / "dog" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]), encoding="utf-8")
    for name in ("__MACOSX/cat/0.png", "@eaDir/dog/0.png", "#recycle/old.png", "$RECYCLE.BIN/r.png", ".Trash-0/t.png"):
        save_noise(folder / name, 99)
    save_noise(folder / "cat" / "._0.png", 99)
    (folder / "Thumbs.db").write_bytes(b"system")
    (folder / "notes.txt").write_text("not a caption of anything")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LDM_CACHE", str(folder / "cache"))
    return folder


@pytest.fixture
def p3() -> bytes:
    from tests.data.test_pixels import P3

    return P3


def table_rows(out: str) -> dict[str, str]:
    """Parse the table printed by training into values by label."""
    cells = [line.strip("│ ").split("│") for line in out.splitlines() if line.startswith("│")]
    rows = [row for row in cells if len(row) == 2]  # a note that wraps can end in a row without a label
    return {label.strip(): value.strip() for label, value in rows if label.strip()}


def test_messy_folder_trains_both_stages(photos, call, caplog):
    """The figures and caches of the first run are in the image folder (data.path=.), but are not used as data."""
    result = call(ldm.train.main, *VAE, "name=messy")
    assert result.code == 0, result
    rows = table_rows(result.out)
    train, val = map(int, re.fullmatch(r"16: (\d+) train, (\d+) validation", rows["used"]).groups())
    assert train + val == 16
    run = Run.open("runs/vae/messy")
    converted = run.facts["accounting"]["converted"]
    assert converted["colour profile"] == 1 and converted["unreadable colour profile, treated as sRGB"] == 1
    images = run.image_data()
    names = [f"{kind}/{i}.{suffix}" for kind, suffix in (("cat", "png"), ("dog", "jpg")) for i in range(8)]
    assert images.names == names and images.class_names == ["cat", "dog"] and images.labels == [0] * 8 + [1] * 8
    assert images.captions == [f"a cat, number {i}" for i in range(8)] + ["a dog"] * 7 + ["ein\u2028Hund"]
    assert images.more_captions == {8: ["a dog, brown"]}
    next_command = shlex.split(result.out.splitlines()[-1].removeprefix("next: "))
    assert {"data=image_folder", "data.path=.", "data.resolution=16", "data.val_fraction=0.2"} < {*next_command}
    assert next_command[-1] == "vae=runs/vae/messy" and "conditioning" not in " ".join(next_command), (
        "images have captions"
    )

    assert list(Path("runs").rglob("*.png")), "the image folder contains figures of the run"
    repeated = call(ldm.train.main, *VAE, "name=again")
    assert (
        table_rows(repeated.out)["used"] == rows["used"]
        and "Skipped the run and cache folders cache/, runs/ in ." in caplog.text
    )
    assert Run.open("runs/vae/again").facts["data_fingerprint"] == run.facts["data_fingerprint"]
    result = call(ldm.train.main, "stage=diffusion", *DIT, *SHORT_RUN, "conditioning=class", "name=messy")
    assert result.code == 0, result
    assert table_rows(result.out)["autoencoder"] == "runs/vae/again" and "warning" not in table_rows(result.out)
    assert shlex.split(result.out.splitlines()[-1])[-1] == "label=0"
    index = json.loads(Path("runs/diffusion/messy/pipeline/model_index.json").read_text())
    assert index["settings"]["conditioning"]["class_names"] == ["cat", "dog"]
