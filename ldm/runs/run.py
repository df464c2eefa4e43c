"""A run folder with its config, weights and provenance. Every tool opens runs through this module.

A run folder can come from an untrusted source: its files are read as data and checked, and nothing in it is executed.

runs/<stage>/<name>/  config.yaml  run.json  metrics.csv  images/  checkpoints/  wandb/  lineage/
                      autoencoder/ (stage vae)  or  pipeline/ (stage diffusion)
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.cli.targets import update_targets
from ldm.data.cache import count
from ldm.data.images import ImageData
from ldm.errors import InputError, UserError
from ldm.files.atomic import write_text
from ldm.files.untrusted import check_fields, first_line, is_plain_name, read_json, reject_outside_links
from ldm.rules import Integer, checked
from ldm.runs.provenance import provenance
from ldm.runtime import shell
from ldm.runtime.paths import RUN_FILE, STAGES, is_run, replaced_folder
from ldm.runtime.random import numpy_generator
from ldm.sampling.pipeline import INDEX_FILE, LatentDiffusion

SPLITS = ("val", "train")
CONFIG_FILE = "config.yaml"
EVALUATION_FILE = "evaluation.json"
FORMAT = 1
FACT_TYPES: dict[str, Any] = {
    **dict.fromkeys(("name", "vae", "data", "data_cache", "data_fingerprint", "chain_sha256"), str),
    **dict.fromkeys(("options", "next_options", "perceptual_features"), list[str]),
    **dict.fromkeys(("contract", "versions"), dict),
    **dict.fromkeys(("autoencoder_data", "branch", "figures"), dict | None),
    "finished": float | None,
    "seed": int,
    "val_fraction": float,
    "latent_shape": list[int],
}
"""Types of the run.json entries that are read. Every entry is optional."""
LINKABLE_FOLDERS = ("checkpoints", "images")
"""Folders that can be links to a different disk, as is common on clusters. They contain no exported weights."""


class Facts(dict[str, Any]):
    """Contents of run.json. Raises a UserError for a missing key."""

    def __init__(self, content: dict[str, Any], file: Path) -> None:
        super().__init__(content)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.file} has no entry {key!r}, which is required. Restore the file that training wrote.")


@dataclass
class Run:
    """A run folder and the contents of its run.json (stage, seed, precision, versions, data, finish time).

    >>> from ldm import Run
    >>> run = Run.open("runs/diffusion/demo")
    >>> run.stage, run.finished, run.config()["schedule"]["num_steps"]
    ('diffusion', True, 1000)
    >>> pipeline = run.pipeline()
    """

    path: Path
    facts: dict[str, Any]
    composed_config: DictConfig | None = field(default=None, repr=False)
    """Config of the run if this process trains it; None for a run opened from disk."""

    @classmethod
    def create(cls, path: Path, config: DictConfig, facts: dict[str, Any]) -> "Run":
        """Create the run folder if it does not exist, and write config and provenance."""
        run = cls.compose(path, config, facts)
        run.record()
        return run

    @classmethod
    def compose(cls, path: Path, config: DictConfig, facts: dict[str, Any]) -> "Run":
        """Return a new run without writing it to disk; `record` does that."""
        content = {"format": FORMAT, "finished": None, **provenance(), **facts}
        return cls(path, Facts(content, path / RUN_FILE), config)

    def record(self) -> None:
        """Write config and provenance, replacing existing files."""
        self.images.mkdir(parents=True, exist_ok=True)
        write_text(self.path / CONFIG_FILE, OmegaConf.to_yaml(self.composed_config, resolve=True))
        self.save()

    @classmethod
    def open(cls, path: Path | str, key: str = "run") -> "Run":
        """Open a run folder. Error messages mention `key` as the option that set the path.

        Raises:
            UserError: if the folder does not exist, is not a run, has an unsupported format or invalid entries, or
                contains a link to a file outside the folder.
        """
        path = Path(path).expanduser()
        if not (path / RUN_FILE).is_file():
            runs = [str(file.parent) for file in sorted(path.glob(f"*/[!.]*/{RUN_FILE}"))]
            hint = f" It contains these runs: {', '.join(runs[:5])}." if runs else _replaced_run_hint(path)
            problem = "is not a run folder" if path.exists() else "does not exist"
            raise UserError(
                f"{key}={path} {problem} (no {RUN_FILE}).{hint} `python -m ldm.train stage=vae` or `python -m "
                "ldm.train stage=diffusion` creates a run in runs/<stage>/<name>."
            )
        reject_outside_links(path, allowed=LINKABLE_FOLDERS)
        facts = read_json(path / RUN_FILE)
        if facts.get("format") != FORMAT:
            raise UserError(f"{path / RUN_FILE} has format {facts.get('format')}; this version reads {FORMAT}.")
        check_fields(facts, FACT_TYPES, path / RUN_FILE, required=False)
        if facts.get("stage") not in STAGES or not is_plain_name(facts.get("name", "a")):
            rule = f"stage must be {' or '.join(STAGES)}, and name must be a plain folder name"
            raise UserError(f"{path / RUN_FILE}: {rule}. Restore the file that training wrote.")
        return cls(path, Facts(facts, path / RUN_FILE))

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
        return self.path / "autoencoder" if self.stage == "vae" else self.pipeline_folder / "vae"

    @property
    def pipeline_folder(self) -> Path:
        return self.path / "pipeline"

    @property
    def metrics_file(self) -> Path:
        """Path of the metrics logged during training. The file does not exist if nothing was trained."""
        return self.path / "metrics.csv"

    @property
    def evaluation_file(self) -> Path:
        """Path of the metrics from the last evaluation. The file exists once tools/evaluate.py has been run."""
        return self.path / EVALUATION_FILE

    def config(self) -> dict[str, Any]:
        """Return the config as plain values, without creating objects or resolving interpolations and YAML tags.

        Raises:
            UserError: if config.yaml is missing, or is not YAML with plain values.
        """
        if self.composed_config is not None:
            return OmegaConf.to_container(self.composed_config, resolve=True)  # type: ignore[return-value]
        file = self.path / CONFIG_FILE
        try:
            text = file.read_text(encoding="utf-8")
            events = yaml.parse(text, Loader=yaml.SafeLoader)
            if any(getattr(event, "tag", None) or getattr(event, "anchor", None) for event in events):
                raise ValueError("it contains a tag or an alias, which training never writes")
            content = OmegaConf.to_container(OmegaConf.create(text))
            if not isinstance(content, dict):
                raise ValueError("it is not a mapping")
        except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
            reason = first_line(error)
            raise UserError(f"{file} cannot be read ({reason}). Restore the file that training wrote.") from error
        return update_targets(content)

    def autoencoder(self) -> Autoencoder:
        """Load the autoencoder that this run trained (stage vae) or was trained with (stage diffusion)."""
        self._require(self.autoencoder_folder / "config.json")
        return Autoencoder.load(self.autoencoder_folder)

    def pipeline(self) -> LatentDiffusion:
        """Load the trained pipeline.

        Raises:
            UserError: for a VAE run, an unfinished run, or a noise schedule that differs from the one used in training.
        """
        if self.stage != "diffusion":
            raise UserError(
                f"{self.path} is a {self.stage} run, but a diffusion run is needed. "
                f"Train one: {self.next_training_command()}"
            )
        self._require(self.pipeline_folder / INDEX_FILE)
        pipeline = LatentDiffusion.load(self.pipeline_folder)
        pipeline.run = str(self.path)
        expected_sha256 = self.facts.get("chain_sha256", pipeline.chain_sha256)  # older runs do not have this entry
        if pipeline.chain_sha256 != expected_sha256:
            raise UserError(
                f"{self.path / 'pipeline' / INDEX_FILE} contains a diffusion chain ({pipeline.schedule.name}, T = "
                f"{pipeline.schedule.num_steps}) other than the one used in training: its digest is "
                f"{pipeline.chain_sha256[:12]} instead of {expected_sha256[:12]}. Restore the file that training wrote."
            )
        return pipeline

    def next_training_command(self) -> str:
        """Return the command that trains stage 2 on this autoencoder, with the same data and matching conditioning."""
        options = self.facts.get("next_options")
        if options is None:  # a run from an earlier version: use the options of stage 1
            shared = ("data", "runs_dir", "batch_size", "--config-dir", "--config-path", "--config-name")
            stage_1 = self.facts.get("options", [])
            options = ["stage=diffusion", *(option for option in stage_1 if re.split("[.=]", option)[0] in shared)]
        # an untrusted run.json must not add constructors or control characters to a command that a user copies
        safe_options = [option for option in options if "_target_" not in option and option.isprintable()]
        return shell.train_command(*safe_options, f"vae={self.path}")

    def describe_data(self) -> str:
        """Return the name and the fingerprint of the training data."""
        return f"{self.facts.get('data', 'unknown data')} {str(self.facts.get('data_fingerprint'))[:8]}"

    def data(self) -> dict[str, Any]:
        """Return the fingerprints and a description of the training data."""
        return {
            "fingerprint": self.facts["data_fingerprint"],
            "images_fingerprint": self.facts.get("images_fingerprint"),
            "description": self.describe_data(),
        }

    def image_data(self) -> ImageData:
        """Open the prepared images that this run was trained on.

        Raises:
            UserError: if the image cache was deleted, is damaged or contains different images.
        """
        folder = Path(self.facts["data_cache"])
        if not (folder / "index.json").is_file():
            raise UserError(
                f"The prepared images for {self.path} are no longer in {folder}. To prepare them again, start a "
                "training run with the same data options."
            )
        reject_outside_links(folder)
        images = ImageData.open(folder, self.facts["val_fraction"], self.facts["data_fingerprint"])
        if images.fingerprint != self.facts["data_fingerprint"]:
            raise UserError(
                f"{folder} contains images with fingerprint {images.fingerprint[:12]}, but {self.path} was trained on "
                f"{self.facts['data_fingerprint'][:12]}. Restore the images that this run was trained on."
            )
        return images

    def _require(self, file: Path) -> None:
        if not file.is_file():
            missing = f"{self.path} has no exported weights yet ({file.relative_to(self.path)} is missing)"
            remedy = f"Resume it with python -m ldm.train ... resume=true.{_replaced_run_hint(self.path)}"
            raise UserError(f"{missing}, because training did not finish. {remedy}")

    def update(self, **facts: Any) -> None:
        """Update entries of run.json and write it."""
        self.facts.update(facts)
        self.save()

    def save(self) -> None:
        """Write run.json."""
        write_text(self.path / RUN_FILE, json.dumps(self.facts, indent=2) + "\n")


def _replaced_run_hint(path: Path) -> str:
    """Return a hint with the path of the earlier run, if a run with overwrite=true was killed while replacing it."""
    backup = replaced_folder(path.absolute().resolve())
    if not (backup / RUN_FILE).is_file():
        return ""
    return f" A run with overwrite=true was killed while replacing the earlier run, which is now in {backup}."


class AutoencoderNotFoundError(UserError):
    """No autoencoder run was trained on this data."""


def is_same_data(data: Mapping[str, Any], images: ImageData) -> bool:
    """Return True if `data`, as returned by `Run.data`, describes the same images. Captions and classes may differ.

    Runs from earlier versions have no fingerprint of the images alone, so their captions and classes must match too.
    """
    return images.fingerprint == data["fingerprint"] or images.images_fingerprint == data.get("images_fingerprint")


def data_of_autoencoder(source: str, autoencoder: Autoencoder) -> dict[str, Any] | None:
    """Describe the data that the autoencoder loaded from `source` was trained on, in the format of `Run.data`.

    Return None if the data is unknown, or if the autoencoder is pretrained and was not trained further.
    """
    folder = Path(source).expanduser().absolute()
    # the folder can be a run, its autoencoder, its pipeline or the vae folder of that pipeline
    if (path := next((path for path in (folder, *folder.parents[:2]) if is_run(path)), None)) is not None:
        run = Run.open(path)
        if run.stage == "diffusion":
            return run.facts.get("autoencoder_data")
        if run.facts.get("trained") == "nothing" or "data_fingerprint" not in run.facts:
            return None
        return run.data()
    stats = autoencoder.statistics
    return None if stats is None else {"fingerprint": stats.data, "description": f"data {stats.data[:8]}"}


@checked
def choose_images(
    run: Run, split: str, num_images: Annotated[Integer, Field(ge=2)], seed: Integer
) -> tuple[ImageData, np.ndarray]:
    """Return the images of a run, and the indices of up to `num_images` random images from a split.

    At least two images are required to compute a standard error.

    Raises:
        UserError: for an unknown split, a split with fewer than two images, or an invalid `num_images` or `seed`.
    """
    if split not in SPLITS:
        raise UserError(f"split={split} is unknown. Choose one of: {', '.join(SPLITS)}.")
    images = run.image_data()
    members = images.val_indices if split == "val" else images.train_indices
    if len(members) < 2:
        rule = f"has {count(len(members), 'image')} of {images.name}, but at least 2 are needed"
        raise InputError("split", split, rule)
    return images, numpy_generator(seed, 2).permutation(members)[:num_images]
