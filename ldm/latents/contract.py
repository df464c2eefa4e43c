"""The contract between the stages: the weights, images and transform that produced the latents."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ldm.errors import UserError
from ldm.files.atomic import write_text
from ldm.files.digest import sha256_of_values
from ldm.files.untrusted import read_json, to_dataclass

CONTRACT_FILE = "contract.json"

CONTRACT_FORMAT = 1

REMEDY = "If it belongs to a latent cache, delete its folder. The latents will be encoded again."


@dataclass(frozen=True)
class LatentContract:
    """Identity of a set of latents. Code that writes latents and code that reads them must agree on every field.

    >>> from pathlib import Path
    >>> from ldm import LatentContract
    >>> here = LatentContract.load(Path("runs/vae/demo"))
    >>> there = LatentContract.load(Path("runs/diffusion/demo/pipeline"))
    >>> here.check(there, "the autoencoder", "the pipeline")  # raises UserError if they differ
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
        """Key used in the name of the cache folder.

        It consists of short prefixes of the first two fields, for readability, and a digest of all fields. Different
        contracts therefore never share a cache.
        """
        digest = sha256_of_values(asdict(self))
        return f"{self.autoencoder_sha256[:12]}-{self.data_fingerprint[:12]}-{digest[:12]}"

    def check(self, other: "LatentContract", here: str, there: str) -> None:
        """Check that both contracts are equal. `here` and `there` name their sources in the error message.

        Raises:
            UserError: the contracts differ. The message lists every differing field with both values.
        """
        differing = [
            f"{field.name} is {getattr(self, field.name)} in {here} but {getattr(other, field.name)} in {there}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise UserError(
                f"The latents do not match: {'; '.join(differing)}. Use the autoencoder and data from the same run, "
                "or start a new run."
            )

    def save(self, folder: Path) -> None:
        write_text(folder / CONTRACT_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "LatentContract":
        """Load the contract from contract.json.

        Raises:
            UserError: the file is missing or damaged, or its format is not supported.
        """
        path = folder / CONTRACT_FILE
        if not path.is_file():
            raise UserError(f"{folder} has no {CONTRACT_FILE}, so its latents cannot be identified.")
        try:
            content = read_json(path)
            if (version := content.pop("format")) == CONTRACT_FORMAT:
                return to_dataclass(cls, content, path)
        except (UserError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}). {REMEDY}") from error
        raise UserError(f"{path} has format {version}, but this version reads format {CONTRACT_FORMAT}. {REMEDY}")
