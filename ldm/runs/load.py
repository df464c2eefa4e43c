"""Loading autoencoders and pipelines from a run, a diffusers folder or the Hugging Face hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ldm.autoencoder.autoencoder import AUTOENCODER_CLASSES, Autoencoder
from ldm.autoencoder.identity import IdentityAutoencoder
from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.files.models import VARIANTS, WEIGHTS, load_model, variant_name
from ldm.files.untrusted import first_line, read_json
from ldm.runs.run import AutoencoderNotFoundError, Run, is_same_data
from ldm.runtime.distributed import warn
from ldm.runtime.paths import RUN_FILE
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.stock import is_stable_diffusion_folder, read_stable_diffusion

PIPELINE_FILES = [
    *("model_index.json", "contract.json", "scheduler/*.json", "tokenizer/*"),
    *(f"{part}/*.{kind}" for part in ("network", "unet", "vae", "text_encoder") for kind in ("json", "safetensors")),
]
"""Patterns of the files to download from a pipeline on the hub."""
IDENTITY = "identity"
"""Value of vae= for diffusion in pixel space, without an autoencoder."""


def find_autoencoder(vae: str | None, runs: str, images: ImageData) -> tuple[Autoencoder, str]:
    """Return the autoencoder for a stage-2 run, and its source.

    Args:
        vae: A run folder, a diffusers folder (or a pipeline with a `vae` folder) or a hub id. If None, use
            the newest finished autoencoder run on the same images, even if their captions or classes have changed. Runs
            that cannot be opened are skipped with a warning.
        runs: Folder that contains all runs (runs_dir=).
        images: Training images of stage 2.

    Raises:
        AutoencoderNotFoundError: if `vae` is None and no finished run was trained on this data.
    """
    if vae is not None:
        return load_autoencoder(vae), vae
    candidates, other_runs = [], []
    # folders that start with a dot contain runs that are being replaced
    for file in sorted(Path(runs).expanduser().glob(f"vae/[!.]*/{RUN_FILE}")):
        try:
            run = Run.open(file.parent)
            if run.finished and is_same_data(run.data(), images):
                candidates.append(run)
            elif run.finished:
                other_runs.append(f"{run.path} ({run.describe_data()})")
        except UserError as error:
            warn(f"{file.parent} is ignored in the search for an autoencoder: {error}")
    if not candidates:
        hint = f"; these were trained on different data: {', '.join(other_runs[:5])}" if other_runs else ""
        raise AutoencoderNotFoundError(
            f"There is no finished autoencoder for this data in {Path(runs) / 'vae'}{hint}. Choose one with vae=<run "
            "folder, diffusers folder or hub id>, or train one first."
        )
    newest = max(candidates, key=lambda run: run.facts["finished"])
    return newest.autoencoder(), str(newest.path)


def load_autoencoder(source: str) -> Autoencoder:
    """Load an autoencoder.

    Args:
        source: A run folder, a diffusers folder (or a pipeline with a `vae` folder) or a hub id. `identity` selects
            diffusion in pixel space, without an autoencoder.

    Raises:
        UserError: if the source is none of these.
    """
    if source == IDENTITY:
        return Autoencoder(IdentityAutoencoder().eval())
    folder = Path(source).expanduser()
    if (folder / RUN_FILE).is_file():
        return Run.open(folder).autoencoder()
    for candidate in (folder, folder / "vae"):
        if (candidate / "config.json").is_file():
            return Autoencoder.load(candidate)
    if folder.exists():
        raise UserError(
            f"{source} is neither a run folder nor a diffusers folder: it has no config.json. Convert a single file of "
            "weights with diffusers: AutoencoderKL.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    return _load_from_hub(source)


def load_pipeline(source: str) -> LatentDiffusion:
    """Load a pipeline.

    Args:
        source: A run folder of stage diffusion, a pipeline folder, or the folder of a StableDiffusionPipeline of
            diffusers (Stable Diffusion 1 or 2); or the hub id of a pipeline.

    Raises:
        UserError: if the source is none of these.
    """
    folder = find_pipeline(source)
    if (folder / RUN_FILE).is_file():
        return Run.open(folder).pipeline()
    return read_stable_diffusion(folder) if is_stable_diffusion_folder(folder) else LatentDiffusion.load(folder)


def find_pipeline(source: str) -> Path:
    """Return the folder of a run or a pipeline. A hub id is downloaded: safetensors in full precision, without code.

    Raises:
        UserError: if there is no such folder, and no such pipeline on the hub.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    try:
        options: Any = {"allow_patterns": PIPELINE_FILES, "ignore_patterns": ["*.fp16.*", "*.non_ema.*"]}
        return Path(snapshot_download(source, **options))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} is not a local folder, and no pipeline could be downloaded from the hub under this id "
            f"({first_line(error)}). Use a run folder, a pipeline folder or an accessible hub id."
        ) from error


def _load_from_hub(name: str) -> Autoencoder:
    errors = []
    for subfolder in (None, "vae"):
        try:
            config = Path(hf_hub_download(name, "config.json", subfolder=subfolder))
            kind = read_json(config).get("_class_name")
            if isinstance(kind, str) and kind in AUTOENCODER_CLASSES:
                _download_weights(name, subfolder)
                return Autoencoder(load_model(AUTOENCODER_CLASSES[kind], config.parent))
            errors.append(f"its class is {kind}, not one of {', '.join(AUTOENCODER_CLASSES)}")
        except (OSError, ValueError) as error:
            errors.append(first_line(error))
            if isinstance(error, LocalEntryNotFoundError):
                break  # the hub cannot be reached; a second attempt would also time out
    raise UserError(
        f"{name} is not a local folder, and no autoencoder could be loaded from the hub under this id ({errors[0]}). "
        "Use a run folder, a diffusers folder or an accessible hub id."
    )


def _download_weights(name: str, subfolder: str | None) -> None:
    """Download the weights of a model, or else a variant of them: safetensors only, never a pickle."""
    files = [WEIGHTS, *map(variant_name, VARIANTS)]
    for file in files:
        try:
            hf_hub_download(name, file, subfolder=subfolder)
            return
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            if file == files[-1]:
                raise
