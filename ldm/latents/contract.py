"""The contract between stages 1 and 2: which weights, images and transform produced the latents."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ldm.errors import UserError
from ldm.files.atomic import write_text
from ldm.files.digest import sha256_of_values
from ldm.files.untrusted import read_json, to_dataclass

CONTRACT_FILE = "contract.json"

CONTRACT_FORMAT = 1

REMEDY = "If this file is part of a latent cache, delete the cache folder. The latents will be encoded again."


@dataclass(frozen=True)
class LatentContract:
    """Identity of a set of latents. Code that writes latents and code that reads them must agree on every field.

    >>> from pathlib import Path
    >>> from ldm import LatentContract
    >>> contract = LatentContract.load(Path("runs/vae/demo"))
    >>> pipeline_contract = LatentContract.load(Path("runs/diffusion/demo/pipeline"))
    >>> contract.check(pipeline_contract, "the autoencoder", "the pipeline")  # raises UserError if they differ
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
        """Key in the name of the cache folder: short prefixes of the first two fields, and a digest of all fields.

        Because the digest covers all fields, different contracts never share a cache.
        """
        digest = sha256_of_values(asdict(self))
        return f"{self.autoencoder_sha256[:12]}-{self.data_fingerprint[:12]}-{digest[:12]}"

    def check(self, other: "LatentContract", name: str, other_name: str) -> None:
        """Check that two contracts are equal. `name` and `other_name` identify them in the error message.

        Raises:
            UserError: The contracts differ. The message lists each differing field with both values.
        """
        differing = [
            f"{field.name} is {getattr(self, field.name)} in {name} but {getattr(other, field.name)} in {other_name}"
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
            UserError: The file is missing or damaged, or its format is not supported.
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
        supported = f"this version of ldm reads format {CONTRACT_FORMAT}"
        raise UserError(f"{path} has format {version}, but {supported}. {REMEDY}")
