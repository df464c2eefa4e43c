"""How many latent dimensions images need: of one autoencoder, its channels and spectra; of a sweep, sizes compared."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from ldm.cli import main as command
from ldm.cli.images import prepare_images
from ldm.errors import UserError
from ldm.evaluation.classifier import Classifier
from ldm.evaluation.features import NO_FEATURES, load_features
from ldm.evaluation.latents.report import measure_latents
from ldm.evaluation.latents.sweep import parse_list, parse_sizes, plan_trainings, run_trainings
from ldm.evaluation.latents.sweep_report import measure_sweep
from ldm.rules import apply_rules
from ldm.runs.run import Run
from ldm.runtime.device import choose_device


def latents(config: DictConfig) -> None:
    if (config.run is None) == (config.sweep is None):
        raise UserError("Give one of run= and sweep=: a run folder to measure, or sizes to train: sweep=f4c4,f4c16.")
    options: dict[str, Any] = {key: config[key] for key in ("num_images", "seed", "batch_size")}
    if config.sweep is not None:
        sweep_sizes(config, options)
        return
    run = Run.open(config.run)
    report = measure_latents(run, split=config.split, device=choose_device(config.device), **options)
    report.print()
    data, picture, channels = report.save(run.path)
    print(f"all figures: {data}\nspectra, channels, PCA: {picture}\nwhat each channel does: {channels}")


def sweep_sizes(config: DictConfig, options: dict[str, Any]) -> None:
    """An autoencoder of each size, and what each is worth."""
    resolution, typed = config.data.resolution, command.command_line()
    folder = Path(config.runs_dir, "sweeps", config.name or f"{typed.choices['data']}-{resolution}").expanduser()
    options |= {"features": config.features, "target_psnr_db": config.target_psnr_db}
    apply_rules(measure_sweep, options)
    # as they were typed, for the training's own front door to read
    chosen = [argument for argument in typed.arguments if argument.lstrip("+~").startswith("data.")]
    common = [f"data={typed.choices['data']}", *chosen, *parse_list(config.train)]
    losses: list[Any] = [loss.strip() for loss in str(config.losses).split(",")]
    trainings = plan_trainings(parse_sizes(config.sweep, resolution), losses, folder, config.minutes, common)
    if config.features != NO_FEATURES:  # what it lacks shows now, and a classifier is trained before the rest
        load_features(config.features, prepare_images(config.data) if config.features == Classifier.name else None)
    device = choose_device(config.device)
    run_trainings(trainings)
    report = measure_sweep(trainings, device=device, **options)
    data, picture = report.save(folder)
    # a file has 80 characters a line, as Rich sees it
    report.print(width=max(Console().width, 25 + 14 * len(trainings)))
    print(f"all figures: {data}\nrate and distortion: {picture}")
