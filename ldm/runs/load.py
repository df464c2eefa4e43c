"""Autoencoders and pipelines from a run, a folder in diffusers' layout or the hub."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ldm.autoencoder.autoencoder import CLASSES, Autoencoder
from ldm.autoencoder.identity import IdentityAutoencoder
from ldm.errors import UserError
from ldm.files.models import WEIGHTS, load_model
from ldm.files.untrusted import first_line, read_json
from ldm.runs.run import NoAutoencoder, Run
from ldm.runtime.distributed import warn
from ldm.runtime.paths import RUN_FILE
from ldm.sampling.pipeline import LatentDiffusionPipeline

IDENTITY = "identity"
"""Instead of an autoencoder: the chain works on pixels."""


def find_autoencoder(vae: str | None, runs: str, data_fingerprint: str) -> tuple[Autoencoder, str]:
    """The first stage for a stage-2 run, and where it came from.

    Args:
        vae: A run folder, a diffusers folder (or a pipeline with a `vae` folder) or a hub id; None takes the
            newest finished VAE run in `runs` on the same data; one that cannot be opened is named and left out.

    Raises:
        NoAutoencoder: nothing there.
    """
    if vae is not None:
        return load_autoencoder(vae), vae
    candidates, others = [], []
    # a name with a dot is that of a run that another one replaces
    for file in sorted(Path(runs).expanduser().glob(f"vae/[!.]*/{RUN_FILE}")):
        try:
            run = Run.open(file.parent)
            if run.finished and run.facts["data_fingerprint"] == data_fingerprint:
                candidates.append(run)
            elif run.finished:
                others.append(f"{run.path} ({run.describe_data()})")
        except UserError as error:
            warn(f"{file.parent} is left out of the autoencoders to choose from: {error}")
    if not candidates:
        other = f", only on other data: {', '.join(others[:5])}" if others else ""
        raise NoAutoencoder(
            f"There is no finished autoencoder for this data in {Path(runs) / 'vae'}{other}. Name one with vae=<run "
            "folder, diffusers folder or hub id>, or train one first."
        )
    newest = max(candidates, key=lambda run: run.facts["finished"])
    return newest.autoencoder(), str(newest.path)


def load_autoencoder(place: str) -> Autoencoder:
    """An autoencoder from a run folder, a diffusers folder (or a pipeline with a `vae` folder) or a hub id; `identity`
    for none, so that the chain works on pixels.

    Raises:
        UserError: none of these.
    """
    if place == IDENTITY:
        return Autoencoder(IdentityAutoencoder().eval())
    folder = Path(place).expanduser()
    if (folder / RUN_FILE).is_file():
        return Run.open(folder).autoencoder()
    for candidate in (folder, folder / "vae"):
        if (candidate / "config.json").is_file():
            return Autoencoder.load(candidate)
    if folder.exists():
        raise UserError(f"{place} is neither a run folder nor a diffusers folder: it has no config.json.")
    return _from_hub(place)


def load_pipeline(place: str) -> LatentDiffusionPipeline:
    """A pipeline from a run folder of stage diffusion, or from a pipeline folder."""
    folder = Path(place).expanduser()
    if (folder / RUN_FILE).is_file():
        return Run.open(folder).pipeline()
    return LatentDiffusionPipeline.load(folder)


def _from_hub(name: str) -> Autoencoder:
    errors = []
    for subfolder in (None, "vae"):
        try:
            config = Path(hf_hub_download(name, "config.json", subfolder=subfolder))
            kind = read_json(config).get("_class_name")
            if isinstance(kind, str) and kind in CLASSES:
                hf_hub_download(name, WEIGHTS, subfolder=subfolder)  # never a pickle, whatever else the hub has
                return Autoencoder(load_model(CLASSES[kind], config.parent))
            errors.append(f"it holds a {kind}, not one of {', '.join(CLASSES)}")
        except (OSError, ValueError) as error:
            errors.append(first_line(error))
            if isinstance(error, LocalEntryNotFoundError):
                break  # no hub at all, which was tried for long enough
    raise UserError(
        f"{name} is no folder here, and no autoencoder could be loaded from the hub under that name "
        f"({errors[0]}). Give a run folder, a diffusers folder or a hub id that can be reached."
    )
