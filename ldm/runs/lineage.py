"""Lineage of a run: data -> autoencoder -> latents -> pipeline -> evaluation, each identified by its digest."""

from dataclasses import asdict, replace
from pathlib import Path

from ldm.errors import UserError
from ldm.latents.contract import CONTRACT_FILE, LatentContract
from ldm.runs.run import Run
from ldm.tracking.artifact import Artifact, sha256

SHARED_FACTS = ("format", "latent_shape", "data_fingerprint", "commit")
STAGE_FACTS = {
    "vae": ("regulariser", "pretrained", "latent_statistics"),
    "diffusion": ("chain_sha256", "loss", "prediction", "variance"),
}
"""Entries of run.json that are copied to the metadata of the weights of each stage, in addition to SHARED_FACTS."""


def inputs(run: Run) -> list[Artifact]:
    """Return the inputs of a finished run. Images and latents are described, but not uploaded."""
    data = data_artifact(run.facts["data"], run.facts["data_fingerprint"], run.facts["val_fraction"])
    if run.stage == "vae":
        return [data]
    contract = LatentContract.load(run.pipeline_folder)
    facts = {"weights_sha256": contract.autoencoder_sha256, "data_fingerprint": contract.data_fingerprint}
    autoencoder = Artifact("autoencoder", _display_name(run.facts["vae"]), contract.autoencoder_sha256, facts)
    return [data, autoencoder, latents_artifact(contract)]


def run_weights_sha256(run: Run) -> str | None:
    """Return the digest of a run's autoencoder (stage vae) or network (stage diffusion); None if it has no weights."""
    if run.stage == "vae":
        has_contract = (run.path / CONTRACT_FILE).is_file()
        return LatentContract.load(run.path).autoencoder_sha256 if has_contract else None
    files = sorted((run.pipeline_folder / "network").glob("*.safetensors"))
    return sha256(files) if files else None


def outputs(run: Run, latents: Path | None = None) -> list[Artifact]:
    """Return the outputs of a finished run, the weights first.

    Args:
        latents: Folder with cached latents to upload, for an autoencoder run. None uploads only a description of the
            latents.
    """
    contract = LatentContract.load(run.path if run.stage == "vae" else run.pipeline_folder)
    digest = run_weights_sha256(run) or sha256([])
    keys = (*SHARED_FACTS, *STAGE_FACTS[run.stage])
    facts = {key: run.facts[key] for key in keys if key in run.facts}
    latent_facts = {key: value for key, value in asdict(contract).items() if key not in ("data_fingerprint", "format")}
    metadata = {"weights_sha256": digest, **facts, **latent_facts}
    if run.stage == "diffusion":
        return [Artifact("pipeline", run.facts["name"], digest, metadata, (run.pipeline_folder,))]
    files = (run.autoencoder_folder, run.path / CONTRACT_FILE)
    latents_output = replace(latents_artifact(contract), files=() if latents is None else (latents,))
    return [Artifact("autoencoder", run.facts["name"], digest, metadata, files), latents_output]


def data_artifact(name: str, fingerprint: str, val_fraction: float) -> Artifact:
    return Artifact("data", name, fingerprint, {"data_fingerprint": fingerprint, "val_fraction": val_fraction})


def latents_artifact(contract: LatentContract) -> Artifact:
    fields = asdict(contract)
    return Artifact("latents", contract.key, sha256(repr(sorted(fields.items()))), fields)


def _display_name(source: str) -> str:
    """Return the run's name if `source` is a run folder, else `source` itself (a folder or hub id)."""
    try:
        return Run.open(source).facts["name"]
    except UserError:
        return source
