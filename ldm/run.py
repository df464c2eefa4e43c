"""A run folder: its config, weights and provenance. Every tool opens runs through here.

runs/<stage>/<name>/  config.yaml  run.json  metrics.csv  images/  checkpoints/  wandb/  lineage/
                      autoencoder/ (stage vae)  or  pipeline/ (stage diffusion)
"""

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from omegaconf import DictConfig, OmegaConf

from ldm.autoencoder.autoencoder import CLASSES, Autoencoder
from ldm.autoencoder.identity import IdentityAutoencoder
from ldm.data.images import ImageData
from ldm.durable import write_text
from ldm.errors import UserError
from ldm.pipeline import INDEX_FILE, LatentDiffusionPipeline

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
IDENTITY = "identity"
"""Instead of an autoencoder: the chain works on pixels."""
FORMAT = 1
PACKAGES = ("ldm", "torch", "lightning", "diffusers", "transformers", "hydra-core", "wandb", "numpy")


@dataclass
class Run:
    """A run folder and what run.json says of it (stage, seed, precision, versions, data, whether it finished)."""

    path: Path
    facts: dict[str, Any]

    @classmethod
    def create(cls, path: Path, config: DictConfig, facts: dict[str, Any]) -> "Run":
        """Make the folder, or take it over, and write config and provenance."""
        (path / "images").mkdir(parents=True, exist_ok=True)
        write_text(path / CONFIG_FILE, OmegaConf.to_yaml(config, resolve=True))
        run = cls(path, {"format": FORMAT, "finished": None, **provenance(), **facts})
        run.save()
        return run

    @classmethod
    def open(cls, path: Path | str, key: str = "run") -> "Run":
        """Open a run folder, which the user named with `key`=.

        Raises:
            UserError: it does not exist, is not one, or has another format.
        """
        path = Path(path).expanduser()
        if not (path / RUN_FILE).is_file():
            found = [str(folder) for folder in sorted(path.glob("*/*/")) if (folder / RUN_FILE).is_file()]
            hint = f" Runs below it: {', '.join(found[:5])}." if found else ""
            what = "is not a run folder" if path.exists() else "does not exist"
            raise UserError(
                f"{key}={path} {what} (no {RUN_FILE}).{hint} A run is made by `python -m ldm.train stage=vae` or "
                "`stage=diffusion`, in runs/<stage>/<name>."
            )
        facts = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        if facts.get("format") != FORMAT:
            raise UserError(f"{path / RUN_FILE} has format {facts.get('format')}; this version reads {FORMAT}.")
        return cls(path, facts)

    @property
    def stage(self) -> str:
        return self.facts["stage"]

    @property
    def finished(self) -> bool:
        return self.facts["finished"] is not None

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def autoencoder_folder(self) -> Path:
        return self.path / ("autoencoder" if self.stage == "vae" else "pipeline/vae")

    def config(self) -> dict[str, Any]:
        """The config as plain values. Nothing in it is instantiated."""
        return OmegaConf.to_container(OmegaConf.load(self.path / CONFIG_FILE), resolve=True)  # type: ignore

    def autoencoder(self) -> Autoencoder:
        """The autoencoder that this run trained or was trained on."""
        self._require(self.autoencoder_folder / "config.json")
        return Autoencoder.load(self.autoencoder_folder)

    def pipeline(self) -> LatentDiffusionPipeline:
        """The trained pipeline.

        Raises:
            UserError: a run of stage vae, one that did not finish, or a pipeline with another chain than it was
                trained on.
        """
        if self.stage != "diffusion":
            raise UserError(
                f"{self.path} is a run of stage={self.stage}; this needs one of stage=diffusion. "
                f"Train it: python -m ldm.train stage=diffusion vae={self.path}"
            )
        self._require(self.path / "pipeline" / INDEX_FILE)
        pipeline = LatentDiffusionPipeline.load(self.path / "pipeline")
        trained = self.facts.get("chain_sha256", pipeline.chain_sha256)  # runs of before do not say
        if pipeline.chain_sha256 != trained:
            raise UserError(
                f"{self.path / 'pipeline' / INDEX_FILE} holds a chain ({pipeline.schedule.name}, T = "
                f"{pipeline.schedule.num_steps}) that this run was not trained on: {pipeline.chain_sha256[:12]} "
                f"instead of {trained[:12]}. Put the file that training wrote back."
            )
        return pipeline

    def image_data(self) -> ImageData:
        """The prepared images that this run was trained on.

        Raises:
            UserError: their cache is gone, or holds other images.
        """
        folder = Path(self.facts["data_cache"])
        if not (folder / "index.json").is_file():
            raise UserError(
                f"The prepared images of {self.path} are no longer in {folder}. Prepare them again: start any "
                "training with the same data= options."
            )
        images = ImageData.open(folder, self.facts["val_fraction"])
        if images.fingerprint != self.facts["data_fingerprint"]:
            raise UserError(
                f"{folder} holds images {images.fingerprint[:12]}, but {self.path} was trained on "
                f"{self.facts['data_fingerprint'][:12]}. Point data.cache_dir at the images that it was trained on."
            )
        return images

    def _require(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(
                f"{self.path} holds no weights for use yet ({file.relative_to(self.path)} is missing): its "
                "training did not end. Continue it with the same command and resume=true."
            )

    def update(self, **facts: Any) -> None:
        """Change what run.json says, and write it."""
        self.facts.update(facts)
        self.save()

    def save(self) -> None:
        write_text(self.path / RUN_FILE, json.dumps(self.facts, indent=2) + "\n")


def find_autoencoder(vae: str | None, runs: str, data_fingerprint: str) -> tuple[Autoencoder, str]:
    """The first stage for a stage-2 run, and where it came from.

    Args:
        vae: A run folder, a diffusers folder (or a pipeline with a `vae` folder) or a hub id; None takes the
            newest finished VAE run in `runs` on the same data.

    Raises:
        UserError: nothing there, with the command that trains one.
    """
    if vae is not None:
        return load_autoencoder(vae), vae
    candidates = [
        run
        for file in Path(runs).expanduser().glob(f"vae/*/{RUN_FILE}")
        if (run := Run.open(file.parent)).finished and run.facts["data_fingerprint"] == data_fingerprint
    ]
    if not candidates:
        raise UserError(
            f"There is no finished autoencoder for this data in {Path(runs) / 'vae'}. Train one first: "
            "python -m ldm.train stage=vae with the same data= options; or name one with vae=<run folder, "
            "diffusers folder or hub id>."
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
            options = {"subfolder": subfolder} if subfolder else {}
            config = hf_hub_download(name, "config.json", subfolder=subfolder)
            kind = json.loads(Path(config).read_text(encoding="utf-8")).get("_class_name")
            if kind in CLASSES:
                return Autoencoder(CLASSES[kind].from_pretrained(name, use_safetensors=True, **options).eval())
            errors.append(f"it holds a {kind}, not one of {', '.join(CLASSES)}")
        except (OSError, ValueError) as error:
            errors.append(str(error).splitlines()[0])
            if isinstance(error, LocalEntryNotFoundError):
                break  # no hub at all, which was tried for long enough
    raise UserError(
        f"{name} is no folder here, and no autoencoder could be loaded from the hub under that name "
        f"({errors[0]}). Give a run folder, a diffusers folder or a hub id that can be reached."
    )


def provenance() -> dict[str, Any]:
    """Command, time, machine, commit and library versions."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": " ".join(sys.argv),
        "started": time.time(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "commit": _commit(),
        "versions": versions,
    }


def _commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
