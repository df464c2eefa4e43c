"""What was made from what: data -> autoencoder -> latents -> pipeline -> evaluation, each named by its digest."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.latents.contract import CONTRACT_FILE, LatentContract
from ldm.runs.run import Run
from ldm.tracking.artifact import Artifact, sha256


def inputs(run: Run) -> list[Artifact]:
    """What a finished run was made from. Of images and latents no more than their description."""
    data = data_artifact(run.facts["data"], run.facts["data_fingerprint"], run.facts["val_fraction"])
    if run.stage == "vae":
        return [data]
    contract = LatentContract.load(run.pipeline_folder)
    facts = {"weights_sha256": contract.autoencoder_sha256, "data_fingerprint": contract.data_fingerprint}
    autoencoder = Artifact("autoencoder", _name_of(run.facts["vae"]), contract.autoencoder_sha256, facts)
    return [data, autoencoder, latents_artifact(contract)]


def run_weights_sha256(run: Run) -> str | None:
    """The digest by which a run's own weights are named, its autoencoder's or its network's; None where it has none."""
    if run.stage == "vae":
        stated = (run.path / CONTRACT_FILE).is_file()
        return LatentContract.load(run.path).autoencoder_sha256 if stated else None
    files = sorted((run.pipeline_folder / "network").glob("*.safetensors"))
    return sha256(files) if files else None


def outputs(run: Run, latents: Path | None = None) -> list[Artifact]:
    """What a finished run leaves, the weights first.

    Args:
        latents: The cache that goes with a first stage's latents, where it shall be uploaded.
    """

    def told(*keys: str) -> dict[str, Any]:
        return {key: run.facts[key] for key in keys if key in run.facts}

    shared = told("format", "latent_shape", "data_fingerprint", "commit")
    if run.stage == "vae":
        contract = LatentContract.load(run.path)
        known = told("regulariser", "pretrained", "latent_statistics")
        metadata = {"weights_sha256": contract.autoencoder_sha256, **shared, **known, **_of_contract(contract)}
        files = (run.autoencoder_folder, run.path / "contract.json")
        encoded = latents_artifact(contract)
        return [
            Artifact("autoencoder", run.facts["name"], contract.autoencoder_sha256, metadata, files),
            replace(encoded, files=(latents,)) if latents is not None else encoded,
        ]
    folder = run.pipeline_folder
    contract = LatentContract.load(folder)
    digest = run_weights_sha256(run) or sha256([])
    known = told("chain_sha256", "loss", "prediction", "variance")
    metadata = {"weights_sha256": digest, **shared, **known, **_of_contract(contract)}
    return [Artifact("pipeline", run.facts["name"], digest, metadata, (folder,))]


def data_artifact(name: str, fingerprint: str, val_fraction: float) -> Artifact:
    return Artifact("data", name, fingerprint, {"data_fingerprint": fingerprint, "val_fraction": val_fraction})


def latents_artifact(contract: LatentContract) -> Artifact:
    fields = asdict(contract)
    return Artifact("latents", contract.key, sha256(repr(sorted(fields.items()))), fields)


def _of_contract(contract: LatentContract) -> dict[str, Any]:
    return {key: value for key, value in asdict(contract).items() if key not in ("data_fingerprint", "format")}


def _name_of(place: str) -> str:
    """A run's name from its folder; else the folder or hub id itself."""
    try:
        return Run.open(place).facts["name"]
    except UserError:
        return place
