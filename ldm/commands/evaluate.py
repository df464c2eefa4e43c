"""Measure the quality of a run: an autoencoder's reconstructions or a diffusion model's samples."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm.cli import main as command
from ldm.evaluation.curves import STAGE_1_CURVES, plot_curves, read_curves
from ldm.evaluation.reconstructions.report import measure_reconstructions
from ldm.evaluation.samples import report
from ldm.evaluation.samples import sweep as sampler_sweep
from ldm.metrics.report import Report
from ldm.runs.lineage import outputs, run_weights_sha256
from ldm.runs.run import Run
from ldm.runtime.device import choose_device
from ldm.tracking.run import TRAINING_ID, read_run_id, track_report


def evaluate(config: DictConfig) -> None:
    run = Run.open(config.run)
    results = (evaluate_autoencoder if run.stage == "vae" else evaluate_diffusion)(config, run)
    print(f"all metrics: {results['files'][0]}")
    if config.logger.wandb:
        log_evaluation(config, run, results)


def evaluate_autoencoder(config: DictConfig, run: Any) -> dict[str, Any]:
    """Evaluate an autoencoder; return the results as keyword arguments of `track_report`."""
    options = {key: config[key] for key in ("features", "features_path", "num_images", "seed", "batch_size")}
    report = measure_reconstructions(run, device=choose_device(config.device), **options)
    files = report.save(run.path)
    report.print()
    print(f"worst reconstructions: {files[1]}")
    if run.metrics_file.is_file():
        curves = [(f"Training curves of {run.path}", read_curves(run.metrics_file))]
        if (figure := plot_curves(STAGE_1_CURVES, curves)) is not None:
            figure.savefig(run.path / "training.png", dpi=130)
            print(f"training curves: {run.path / 'training.png'}")
    figures = {"worst reconstructions": report.figures[files[1].name]}
    return {"values": report.to_json(), "figures": figures, "files": files}


def evaluate_diffusion(config: DictConfig, run: Any) -> dict[str, Any]:
    """Evaluate a diffusion model; return the results as keyword arguments of `track_report`.

    If sampler.steps or guidance is a list, first compare its values, then evaluate at the knee of the curve. These
    results never overwrite an existing evaluation that used more samples.
    """
    keys = ("features", "features_path", "num_samples", "guidance_interval", "seed", "batch_size")
    options: dict[str, Any] = {key: config[key] for key in keys} | {"folder": run.path / "evaluation"}
    steps, guidances = (list(x) if OmegaConf.is_list(x) else [x] for x in (config.sampler.steps, config.guidance))
    samplers = {value: command.construct(config.sampler, steps=value) for value in steps}
    pipeline, images = run.pipeline().to(choose_device(config.device)), run.image_data()
    digest = run_weights_sha256(run)
    results: dict[str, Any] = {"values": {}, "figures": {}, "files": []}
    fallback_file = run.evaluation_file
    if len(steps) > 1 or len(guidances) > 1:
        sweep = sampler_sweep.sweep_sampler(pipeline, images, samplers, guidances, **options)
        name, figure = "steps" if len(steps) > 1 else "guidance", sampler_sweep.plot_sampler_sweep(sweep)
        sweep_report = Report(f"{name}.json", {"weights_sha256": digest, **sweep}, figures={f"{name}.png": figure})
        table, plot = sweep_report.save(run.path)
        results = {"values": {"sweep": sweep}, "files": [table, plot]}
        results["figures"] = {plot.name: Image.open(plot).convert("RGB")}
        results["tables"] = {"sweep": sampler_sweep.sweep_table(sweep)}
        fallback_file = run.path / "evaluation" / "knee.json"
        print("\n".join([*sampler_sweep.sweep_lines(sweep), f"figure: {plot}, metrics: {table}", ""]))
        steps, guidances = ([sweep["knee"]] if len(values) > 1 else values for values in (steps, guidances))
    options |= {"guidance": guidances[0], "weights_sha256": digest}
    evaluation = report.measure_samples(pipeline, images, samplers[steps[0]], **options)
    file = report.save_unless_smaller(evaluation, run.path, fallback_file)
    evaluation.print()
    results["files"].insert(0, file)
    results["values"] |= evaluation.to_json()
    results["figures"] |= evaluation.figures
    return results


def log_evaluation(config: DictConfig, run: Any, results: dict[str, Any]) -> None:
    """Log the metrics as the summary of a separate W&B run, grouped with the evaluated run."""
    name: str = run.facts.get("name", run.path.name)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    settings["logger"]["group"] = config.logger.group or name
    settings[TRAINING_ID] = read_run_id(run.path)
    title = f"evaluation/{run.stage}/{name}"
    track_report(run.path / "evaluation", settings, name=title, inputs=outputs(run)[:1], **results)
