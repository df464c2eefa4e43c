"""How many latent dimensions images need: of one autoencoder, its channels and spectra; of a sweep, sizes compared."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from ldm.cli import main as command
from ldm.cli.images import prepare_images
from ldm.errors import UserError, require_whole
from ldm.evaluation.features import NO_FEATURES, load_features
from ldm.evaluation.latents import sweep_report as report
from ldm.evaluation.latents import sweep_runs as runs
from ldm.evaluation.latents.report import measure_latents
from ldm.evaluation.latents.sweep import parse_list, parse_losses, parse_sizes, plan_trainings
from ldm.runs.run import Run
from ldm.runtime.device import choose_device


def latents(config: DictConfig) -> None:
    if (config.run is None) == (config.sweep is None):
        raise UserError(
            "Give one of run= and sweep=: run=<run folder> measures an autoencoder that is trained, sweep=f4c4,f4c16 "
            "trains one of each size and compares them."
        )
    options: dict[str, Any] = {
        "device": choose_device(config.device),
        "num_images": config.num_images,
        "seed": config.seed,
        "batch_size": config.batch_size,
    }
    if config.run is not None:
        measure_run(config, options)
    else:
        sweep_sizes(config, options)


def measure_run(config: DictConfig, options: dict[str, Any]) -> None:
    """Channels, spectra and PCAs of one autoencoder."""
    run = Run.open(config.run)
    report = measure_latents(run, split=config.split, **options)
    Console(highlight=False).print(report.table())
    print("\n".join(report.lines))
    data, picture, channels = report.save(run.path)
    print(f"all figures: {data}\nspectra, channels, PCA: {picture}\nwhat each channel does: {channels}")


def sweep_sizes(config: DictConfig, options: dict[str, Any]) -> None:
    """An autoencoder of each size, and what each is worth."""
    resolution, typed = config.data.resolution, command.command_line()
    choice = typed.choices["data"]
    require_whole("data.resolution", resolution, 1)
    name = config.name or f"{choice}-{resolution}"
    if name in (".", "..") or "/" in name or "\\" in name:
        raise UserError(f"name={name} must be a plain folder name. Choose another place with runs_dir=.")
    report.check_sweep_options(
        config.features, config.target_psnr_db, config.num_images, config.seed, config.batch_size
    )
    # as they were typed, for the training's own front door to read
    data = [argument for argument in typed.arguments if argument.lstrip("+~").startswith("data.")]
    trainings = plan_trainings(
        parse_sizes(config.sweep, resolution),
        parse_losses(config.losses),
        minutes=config.minutes,
        data=[f"data={choice}", *data],
        extra=parse_list(config.train),
    )
    if config.features != NO_FEATURES:  # what it lacks shows now, and a classifier is trained before the rest
        load_features(config.features, prepare_images(config.data))
    folder = Path(config.runs_dir).expanduser() / "sweeps" / name
    console = Console(highlight=False)
    console.print(runs.training_table(trainings, folder, resolution))
    print(f"time expected: {runs.describe_time_left(trainings, folder, config.minutes)}")
    runs.run_trainings(trainings, folder)
    print()
    found = report.measure_sweep(
        trainings, folder, features=config.features, target_psnr_db=config.target_psnr_db, **options
    )
    figures, picture = found.save(folder)
    console.width = max(console.width, found.width)  # a file has 80 characters a line, as Rich sees it
    console.print(found.table())
    print("\n".join(found.lines))
    print(f"all figures: {figures}\nrate and distortion: {picture}")
