"""A run folder: its config, weights and provenance. Every tool opens runs through here.

A run folder may come from a stranger: what it holds is read as data and checked, and nothing in it is run.

runs/<stage>/<name>/  config.yaml  run.json  metrics.csv  images/  checkpoints/  wandb/  lineage/
                      autoencoder/ (stage vae)  or  pipeline/ (stage diffusion)
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.cli.targets import with_current_targets
from ldm.data.images import ImageData
from ldm.errors import InputError, UserError
from ldm.files.atomic import write_text
from ldm.files.untrusted import check_fields, first_line, is_plain_name, read_json, refuse_links_out
from ldm.rules import Whole, checked
from ldm.runs.provenance import provenance
from ldm.runtime import shell
from ldm.runtime.paths import RUN_FILE, STAGES, is_run, set_aside
from ldm.runtime.random import numpy_generator
from ldm.sampling.pipeline import INDEX_FILE, LatentDiffusionPipeline

SPLITS = ("val", "train")
CONFIG_FILE = "config.yaml"
EVALUATION_FILE = "evaluation.json"
FORMAT = 1
KINDS: dict[str, Any] = {
    **dict.fromkeys(("name", "vae", "data", "data_cache", "data_fingerprint", "chain_sha256"), str),
    **dict.fromkeys(("options", "next_options", "perceptual_features"), list[str]),
    **dict.fromkeys(("contract", "versions"), dict),
    **dict.fromkeys(("autoencoder_data", "branch", "figures"), dict | None),
    "finished": float | None,
    "seed": int,
    "val_fraction": float,
    "latent_shape": list[int],
}
"""Of the facts that are used of a run; it need not have them all."""
LINKED = ("checkpoints", "images")
"""Folders in a run that clusters keep on another disk; nothing of a run's weights for use is read from them."""


class Facts(dict[str, Any]):
    """What run.json says; what it does not say and is asked for is named to the user."""

    def __init__(self, content: dict[str, Any], file: Path) -> None:
        super().__init__(content)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.file} does not say {key!r}, which this needs. Put back the file that training wrote.")


@dataclass
class Run:
    """A run folder and what run.json says of it (stage, seed, precision, versions, data, whether it finished).

    >>> from ldm import Run
    >>> run = Run.open("runs/diffusion/demo")
    >>> run.stage, run.finished, run.config()["schedule"]["num_steps"]
    ('diffusion', True, 1000)
    >>> pipeline = run.pipeline()
    """

    path: Path
    facts: dict[str, Any]
    composed: DictConfig | None = field(default=None, repr=False)
    """The config that this process composed for the run itself."""

    @classmethod
    def create(cls, path: Path, config: DictConfig, facts: dict[str, Any]) -> "Run":
        """Make the folder, or take it over, and write config and provenance."""
        run = cls.compose(path, config, facts)
        run.record()
        return run

    @classmethod
    def compose(cls, path: Path, config: DictConfig, facts: dict[str, Any]) -> "Run":
        """A run of this process, of which nothing is on the disk before `record`."""
        content = {"format": FORMAT, "finished": None, **provenance(), **facts}
        return cls(path, Facts(content, path / RUN_FILE), config)

    def record(self) -> None:
        """Write config and provenance, over those that were there."""
        self.images.mkdir(parents=True, exist_ok=True)
        write_text(self.path / CONFIG_FILE, OmegaConf.to_yaml(self.composed, resolve=True))
        self.save()

    @classmethod
    def open(cls, path: Path | str, key: str = "run") -> "Run":
        """Open a run folder, which the user named with `key`=.

        Raises:
            UserError: it does not exist, is not one, has another format, says what no run says of itself, or holds a
                link that leads out of it.
        """
        path = Path(path).expanduser()
        if not (path / RUN_FILE).is_file():
            found = [str(file.parent) for file in sorted(path.glob(f"*/[!.]*/{RUN_FILE}"))]
            hint = f" Runs below it: {', '.join(found[:5])}." if found else _hint_at_replaced(path)
            what = "is not a run folder" if path.exists() else "does not exist"
            raise UserError(
                f"{key}={path} {what} (no {RUN_FILE}).{hint} A run is made by `python -m ldm.train stage=vae` or "
                "`python -m ldm.train stage=diffusion`, in runs/<stage>/<name>."
            )
        refuse_links_out(path, but=LINKED)
        facts = read_json(path / RUN_FILE)
        if facts.get("format") != FORMAT:
            raise UserError(f"{path / RUN_FILE} has format {facts.get('format')}; this version reads {FORMAT}.")
        check_fields(facts, KINDS, path / RUN_FILE, required=False)
        if facts.get("stage") not in STAGES or not is_plain_name(facts.get("name", "a")):
            rule = f"the stage must be {' or '.join(STAGES)}, and the name a plain folder name"
            raise UserError(f"{path / RUN_FILE}: {rule}. Put back the file that training wrote.")
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
        """What was logged while it trained; none of an autoencoder that was not trained."""
        return self.path / "metrics.csv"

    @property
    def evaluation_file(self) -> Path:
        """The metrics that tools/evaluate.py measured last, where it did."""
        return self.path / EVALUATION_FILE

    def config(self) -> dict[str, Any]:
        """The config as plain values. Nothing in it is instantiated, interpolated or made by a tag.

        Raises:
            UserError: it is missing, or no YAML of plain values.
        """
        if self.composed is not None:
            return OmegaConf.to_container(self.composed, resolve=True)  # type: ignore[return-value]
        file = self.path / CONFIG_FILE
        try:
            text = file.read_text(encoding="utf-8")
            events = yaml.parse(text, Loader=yaml.SafeLoader)
            if any(getattr(event, "tag", None) or getattr(event, "anchor", None) for event in events):
                raise ValueError("it holds a tag or an alias, which training writes nowhere")
            content = OmegaConf.to_container(OmegaConf.create(text))
            if not isinstance(content, dict):
                raise ValueError("it holds no keys with values")
        except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
            said = first_line(error)
            raise UserError(f"{file} cannot be read ({said}). Put back the file as it was written.") from error
        return with_current_targets(content)

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
                f"{self.path} is a run of stage {self.stage}; this needs one of stage diffusion. "
                f"Train it: {self.next_training()}"
            )
        self._require(self.pipeline_folder / INDEX_FILE)
        pipeline = LatentDiffusionPipeline.load(self.pipeline_folder)
        pipeline.run = str(self.path)
        trained = self.facts.get("chain_sha256", pipeline.chain_sha256)  # runs of before do not say
        if pipeline.chain_sha256 != trained:
            raise UserError(
                f"{self.path / 'pipeline' / INDEX_FILE} holds a chain ({pipeline.schedule.name}, T = "
                f"{pipeline.schedule.num_steps}) that this run was not trained on: {pipeline.chain_sha256[:12]} "
                f"instead of {trained[:12]}. Put the file that training wrote back."
            )
        return pipeline

    def next_training(self) -> str:
        """The command that trains stage 2 on this autoencoder, with its data and the conditioning that they allow."""
        options = self.facts.get("next_options")
        if options is None:  # a run of an earlier version: what was typed for stage 1
            shared = ("data", "runs_dir", "batch_size", "--config-dir", "--config-path", "--config-name")
            typed = self.facts.get("options", [])
            options = ["stage=diffusion", *(option for option in typed if re.split("[.=]", option)[0] in shared)]
        # a stranger's run.json may put neither a constructor nor control characters into a command that a user copies
        safe = [option for option in options if "_target_" not in option and option.isprintable()]
        return shell.train_command(*safe, f"vae={self.path}")

    def describe_data(self) -> str:
        """The data that it was trained on, by name and fingerprint."""
        return f"{self.facts.get('data', 'unknown data')} {str(self.facts.get('data_fingerprint'))[:8]}"

    def image_data(self) -> ImageData:
        """The prepared images that this run was trained on.

        Raises:
            UserError: their cache is gone, damaged, or holds other images.
        """
        folder = Path(self.facts["data_cache"])
        if not (folder / "index.json").is_file():
            raise UserError(
                f"The prepared images of {self.path} are no longer in {folder}. Prepare them again: start any "
                "training with the same data options."
            )
        refuse_links_out(folder)
        images = ImageData.open(folder, self.facts["val_fraction"])
        if images.fingerprint != self.facts["data_fingerprint"]:
            raise UserError(
                f"{folder} holds images {images.fingerprint[:12]}, but {self.path} was trained on "
                f"{self.facts['data_fingerprint'][:12]}. Point data.cache_dir at the images that it was trained on."
            )
        return images

    def _require(self, file: Path) -> None:
        if not file.is_file():
            missing = f"{self.path} holds no weights for use yet ({file.relative_to(self.path)} is missing)"
            remedy = f"Continue it: python -m ldm.train ... resume=true.{_hint_at_replaced(self.path)}"
            raise UserError(f"{missing}: its training did not end. {remedy}")

    def update(self, **facts: Any) -> None:
        """Change what run.json says, and write it."""
        self.facts.update(facts)
        self.save()

    def save(self) -> None:
        write_text(self.path / RUN_FILE, json.dumps(self.facts, indent=2) + "\n")


def _hint_at_replaced(path: Path) -> str:
    """Where the earlier run is, if a start with overwrite=true was killed before it saved anything."""
    aside = set_aside(path.absolute().resolve())
    if not (aside / RUN_FILE).is_file():
        return ""
    return f" The earlier run, which was being replaced when that training was killed, is in {aside}."


class NoAutoencoder(UserError):
    """No run of stage 1 has this data."""


def data_of_autoencoder(place: str, autoencoder: Autoencoder) -> dict[str, str] | None:
    """`fingerprint` and `description` of the data that an autoencoder, loaded from `place`, was trained on.

    None where nothing is known of it, and for a pretrained one that was used as it came.
    """
    folder = Path(place).expanduser().absolute()
    # `place` is a run, its autoencoder, its pipeline or that pipeline's
    if (path := next((path for path in (folder, *folder.parents[:2]) if is_run(path)), None)) is not None:
        run = Run.open(path)
        if run.stage == "diffusion":
            return run.facts.get("autoencoder_data")
        if run.facts.get("trained") == "nothing" or "data_fingerprint" not in run.facts:
            return None
        return {"fingerprint": run.facts["data_fingerprint"], "description": run.describe_data()}
    known = autoencoder.statistics
    return None if known is None else {"fingerprint": known.data, "description": f"data {known.data[:8]}"}


@checked
def choose_images(
    run: Run, split: str, num_images: Annotated[Whole, Field(ge=2)], seed: Whole
) -> tuple[ImageData, np.ndarray]:
    """The images of a run, and the indices of those that the seed chooses from a split: two for a standard error.

    Raises:
        UserError: an unknown split, fewer than two images, numbers that are none.
    """
    if split not in SPLITS:
        raise UserError(f"split={split} is unknown. Choose one of: {', '.join(SPLITS)}.")
    images = run.image_data()
    members = images.val_indices if split == "val" else images.train_indices
    if len(members) < 2:
        raise InputError("split", split, f"holds {len(members)} image of {images.name}, and a standard error needs 2")
    return images, numpy_generator(seed, 2).permutation(members)[:num_images]
