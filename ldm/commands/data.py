"""What is in a data set, before anything is trained on it: copies, balance, captions, coverage and diversity."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from ldm.cli.images import prepare_images
from ldm.data.images import verify_images
from ldm.errors import UserError
from ldm.evaluation.data.report import inspect_data
from ldm.evaluation.data.summary import data_table
from ldm.evaluation.features import NO_FEATURES
from ldm.latents.cache import verify_latents
from ldm.metrics.features import CHOICES
from ldm.runs.lineage import data_artifact
from ldm.runtime.device import choose_device
from ldm.tracking.run import track_report


def data(config: DictConfig) -> None:
    check_data_options(config)
    device = choose_device(config.device)
    images = prepare_images(config.data)
    if config.verify:
        verified = [verify_images(images), *verify_latents(images)]
        print(f"every byte is as it was written: {', '.join(map(str, verified))}")
    options = {key: config[key] for key in ("features", "max_bits", "max_levels", "seed")}
    report = inspect_data(images, device=device, **options)
    out = Path(config.out or Path("runs", "data", images.name)).expanduser()
    files = report.save(out)
    if config.logger.wandb:
        log_data_report(config, out, report, images, files)
    Console(highlight=False).print(data_table(report.content))
    print("What to do:" if report.content["what_to_do"] else "Nothing calls for a change.")
    for number, line in enumerate(report.content["what_to_do"], start=1):
        print(f"{number}. {line}")
    data, *pictures = files
    print(f"all figures: {data}\npictures: {', '.join(map(str, pictures))}")


def check_data_options(config: DictConfig) -> None:
    """Refuse options before any image is prepared.

    Raises:
        UserError: naming the key, its value and the rule.
    """

    if config.features not in (NO_FEATURES, *CHOICES):
        known = ", ".join([*CHOICES, NO_FEATURES])
        raise UserError(f"features={config.features} is unknown. Choose one of: {known}.")
    for key in ("data.resolution", "max_bits", "seed"):
        if type(value := OmegaConf.select(config, key)) is not int:
            raise UserError(f"{key}={value} must be a whole number.")
    if not 0 <= config.max_bits < 32:
        raise UserError(f"max_bits={config.max_bits} must be from 0 to 31: unlike images differ in 32 of the 64 bits.")
    if type(config.max_levels) not in (int, float) or not 0 <= config.max_levels <= 255:
        raise UserError(f"max_levels={config.max_levels} must be a number from 0 to 255.")


def log_data_report(config: DictConfig, out: Path, report: Any, images: Any, files: list[Path]) -> None:
    """The numbers as W&B's summary, and the contact sheet."""
    parts = {part: found for part, found in report.content.items() if isinstance(found, dict)}
    shown = {f"{part}/{key}": value for part, found in parts.items() for key, value in found.items()}
    numbers = {key: value for key, value in {**report.content, **shown}.items() if isinstance(value, int | float)}
    settings: Any = OmegaConf.to_container(config, resolve=True)
    track_report(
        out,
        settings,
        name=f"data/{report.content['name']}",
        values={**numbers, "what_to_do": "\n".join(report.content["what_to_do"])},
        pictures={"contact sheet": report.pictures["contact_sheet"]},
        made_from=[data_artifact(images.name, images.fingerprint, images.val_fraction)],
        files=files,
    )
