"""What was made from what: data -> autoencoder -> latents -> pipeline -> evaluation, each named by its digest."""

from dataclasses import asdict, replace
from pathlib import Path

from ldm.errors import UserError
from ldm.latents.contract import CONTRACT_FILE, LatentContract
from ldm.runs.run import Run
from ldm.tracking.artifact import Artifact, sha256

OF_BOTH = ("format", "latent_shape", "data_fingerprint", "commit")
OF_STAGE = {
    "vae": ("regulariser", "pretrained", "latent_statistics"),
    "diffusion": ("chain_sha256", "loss", "prediction", "variance"),
}
"""Facts of a run that are told with its weights."""


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
    contract = LatentContract.load(run.path if run.stage == "vae" else run.pipeline_folder)
    digest = run_weights_sha256(run) or sha256([])
    known = {key: run.facts[key] for key in (*OF_BOTH, *OF_STAGE[run.stage]) if key in run.facts}
    shown = {key: value for key, value in asdict(contract).items() if key not in ("data_fingerprint", "format")}
    metadata = {"weights_sha256": digest, **known, **shown}
    if run.stage == "diffusion":
        return [Artifact("pipeline", run.facts["name"], digest, metadata, (run.pipeline_folder,))]
    files = (run.autoencoder_folder, run.path / CONTRACT_FILE)
    encoded = replace(latents_artifact(contract), files=() if latents is None else (latents,))
    return [Artifact("autoencoder", run.facts["name"], digest, metadata, files), encoded]


def data_artifact(name: str, fingerprint: str, val_fraction: float) -> Artifact:
    return Artifact("data", name, fingerprint, {"data_fingerprint": fingerprint, "val_fraction": val_fraction})


def latents_artifact(contract: LatentContract) -> Artifact:
    fields = asdict(contract)
    return Artifact("latents", contract.key, sha256(repr(sorted(fields.items()))), fields)


def _name_of(place: str) -> str:
    """A run's name from its folder; else the folder or hub id itself."""
    try:
        return Run.open(place).facts["name"]
    except UserError:
        return place
