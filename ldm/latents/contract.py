"""The contract between the stages: which weights, images and transform latents come from."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ldm.errors import UserError
from ldm.files.atomic import write_text
from ldm.files.digest import sha256_of_values
from ldm.files.untrusted import read_json, to_dataclass

CONTRACT_FILE = "contract.json"

CONTRACT_FORMAT = 1

REMEDY = "Delete its folder if that is a cache of latents; they will be encoded again."


@dataclass(frozen=True)
class LatentContract:
    """What latents are: two sides that exchange latents must agree in every field.

    >>> from pathlib import Path
    >>> from ldm import LatentContract
    >>> here = LatentContract.load(Path("runs/vae/demo"))
    >>> there = LatentContract.load(Path("runs/diffusion/demo/pipeline"))
    >>> here.check(there, "the autoencoder", "the pipeline")  # raises UserError where they differ
    """

    autoencoder_sha256: str
    data_fingerprint: str
    resolution: int
    factor: int
    channels: int
    val_fraction: float
    flip: bool
    dtype: str = "float32"
    format: int = CONTRACT_FORMAT

    @property
    def key(self) -> str:
        """Names the cache folder. It covers every field that `check` compares, so that latents under one contract never
        meet the cache of another: the first two fields to recognise, a digest of all of them."""
        digest = sha256_of_values(asdict(self))
        return f"{self.autoencoder_sha256[:12]}-{self.data_fingerprint[:12]}-{digest[:12]}"

    def check(self, other: "LatentContract", here: str, there: str) -> None:
        """Compare with the other side.

        Raises:
            UserError: naming every field that differs, with both sides.
        """
        differing = [
            f"{field.name} is {getattr(self, field.name)} in {here} but {getattr(other, field.name)} in {there}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise UserError(
                f"The latents do not fit: {'; '.join(differing)}. Use the autoencoder and the data that belong "
                "together, or start a new run."
            )

    def save(self, folder: Path) -> None:
        write_text(folder / CONTRACT_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "LatentContract":
        """Read contract.json.

        Raises:
            UserError: missing, damaged, or of another format.
        """
        path = folder / CONTRACT_FILE
        if not path.is_file():
            raise UserError(f"{folder} has no {CONTRACT_FILE}: it does not say which latents it belongs to.")
        try:
            content = read_json(path)
            if (found := content.pop("format")) == CONTRACT_FORMAT:
                return to_dataclass(cls, content, path)
        except (UserError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}). {REMEDY}") from error
        raise UserError(f"{path} has format {found}; this version reads {CONTRACT_FORMAT}. {REMEDY}")
