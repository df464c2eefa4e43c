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
from ldm.evaluation.latents.sweep import (
    NO_SAMPLING_DECODER,
    parse_list,
    parse_sizes,
    plan_stage_2,
    plan_sweep,
    run_sweep,
)
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
    """Train an autoencoder for each latent size, and stage 2 on each of them, and compare them."""
    resolution, cli = config.data.resolution, command.command_line()
    folder = Path(config.runs_dir, "sweeps", config.name or f"{cli.choices['data']}-{resolution}").expanduser()
    options |= {key: config[key] for key in ("features", "target_psnr_db", "num_samples")}
    apply_rules(measure_sweep, options)
    with_samples = config.sample_minutes != 0 and config.features != NO_FEATURES
    if with_samples:
        apply_rules(plan_stage_2, {"sample_minutes": config.sample_minutes})
    # passed on verbatim, because the training command parses them again
    data_options = [argument for argument in cli.arguments if argument.lstrip("+~").startswith("data.")]
    common_options = [f"data={cli.choices['data']}", *data_options, *parse_list(config.train)]
    if not with_samples:
        common_options.insert(0, NO_SAMPLING_DECODER)
    losses: list[Any] = [loss.strip() for loss in str(config.losses).split(",")]
    runs = plan_sweep(parse_sizes(config.sweep, resolution), losses, folder, config.minutes, common_options)
    if config.features != NO_FEATURES:  # fail early if packages are missing, and train the classifier first
        load_features(config.features, prepare_images(config.data) if config.features == Classifier.name else None)
    device = choose_device(config.device)
    run_sweep(runs)
    stage_2 = plan_stage_2(runs, config.sample_minutes) if with_samples else []
    run_sweep(stage_2)
    report = measure_sweep(runs, stage_2, sampler=command.construct(config.sampler), device=device, **options)
    metrics, figure = report.save(folder)
    # Rich assumes 80 columns if the output is not a terminal, too few for this table
    report.print(width=max(Console().width, 25 + 14 * len(runs)))
    print(f"all metrics: {metrics}\nrate-distortion plot: {figure}")
