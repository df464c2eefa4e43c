"""Find out how many latent dimensions images need: measure one autoencoder, or train and compare several sizes."""

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
from ldm.evaluation.latents.sweep import parse_list, parse_sizes, plan_sweep, run_sweep
from ldm.evaluation.latents.sweep_report import measure_sweep
from ldm.rules import apply_rules
from ldm.runs.run import Run
from ldm.runtime.device import choose_device


def latents(config: DictConfig) -> None:
    if (config.run is None) == (config.sweep is None):
        raise UserError("Set either run= (a run folder to measure) or sweep= (latent sizes to train, e.g. sweep=f4c4).")
    options: dict[str, Any] = {key: config[key] for key in ("num_images", "seed", "batch_size")}
    if config.sweep is not None:
        sweep_sizes(config, options)
        return
    run = Run.open(config.run)
    report = measure_latents(run, split=config.split, device=choose_device(config.device), **options)
    report.print()
    metrics, spectra, channels = report.save(run.path)
    print(f"all metrics: {metrics}\nspectra, channels and PCA: {spectra}\neffect of each channel: {channels}")


def sweep_sizes(config: DictConfig, options: dict[str, Any]) -> None:
    """Train an autoencoder for each latent size and compare them."""
    resolution, cli = config.data.resolution, command.command_line()
    folder = Path(config.runs_dir, "sweeps", config.name or f"{cli.choices['data']}-{resolution}").expanduser()
    options |= {"features": config.features, "target_psnr_db": config.target_psnr_db}
    apply_rules(measure_sweep, options)
    # passed on verbatim, because the training command parses them again
    data_options = [argument for argument in cli.arguments if argument.lstrip("+~").startswith("data.")]
    common_options = [f"data={cli.choices['data']}", *data_options, *parse_list(config.train)]
    losses: list[Any] = [loss.strip() for loss in str(config.losses).split(",")]
    runs = plan_sweep(parse_sizes(config.sweep, resolution), losses, folder, config.minutes, common_options)
    if config.features != NO_FEATURES:  # fail early if packages are missing, and train the classifier first
        load_features(config.features, prepare_images(config.data) if config.features == Classifier.name else None)
    device = choose_device(config.device)
    run_sweep(runs)
    report = measure_sweep(runs, device=device, **options)
    metrics, figure = report.save(folder)
    # Rich assumes 80 columns if the output is not a terminal, too few for this table
    report.print(width=max(Console().width, 25 + 14 * len(runs)))
    print(f"all metrics: {metrics}\nrate-distortion plot: {figure}")
