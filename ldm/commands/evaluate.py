"""Metrics of a run: what an autoencoder loses of held-out images, or how near samples are to the training images."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm.cli import main as command
from ldm.evaluation.curves import OF_STAGE_1, plot_curves, read_curves
from ldm.evaluation.reconstructions.report import measure_reconstructions
from ldm.evaluation.samples import report
from ldm.evaluation.samples import sweep as sampler_sweep
from ldm.metrics.report import Report
from ldm.runs.lineage import outputs, run_weights_sha256
from ldm.runs.run import Run
from ldm.runtime.device import choose_device
from ldm.tracking.run import TRAINING_ID, known_id, track_report


def evaluate(config: DictConfig) -> None:
    run = Run.open(config.run)
    found = (evaluate_autoencoder if run.stage == "vae" else evaluate_diffusion)(config, run)
    print(f"all figures: {found['files'][0]}")
    if config.logger.wandb:
        log_evaluation(config, run, found)


def evaluate_autoencoder(config: DictConfig, run: Any) -> dict[str, Any]:
    """Of a run of stage=vae: what `track_report` takes."""
    options = {key: config[key] for key in ("features", "features_path", "num_images", "seed", "batch_size")}
    report = measure_reconstructions(run, device=choose_device(config.device), **options)
    files = report.save(run.path)
    report.print()
    print(f"worst reconstructions: {files[1]}")
    if run.metrics_file.is_file():
        curves = [(f"Training of {run.path}", read_curves(run.metrics_file))]
        if (figure := plot_curves(OF_STAGE_1, curves)) is not None:
            figure.savefig(run.path / "training.png", dpi=130)
            print(f"how training went: {run.path / 'training.png'}")
    pictures = {"worst reconstructions": report.pictures[files[1].name]}
    return {"values": report.to_json(), "pictures": pictures, "files": files}


def evaluate_diffusion(config: DictConfig, run: Any) -> dict[str, Any]:
    """The same of a run of stage=diffusion; first a sweep, where sampler.steps or guidance is a list, then its knee.

    The knee's metrics do not replace those of more samples.
    """
    keys = ("features", "features_path", "num_samples", "guidance_interval", "seed", "batch_size")
    options: dict[str, Any] = {key: config[key] for key in keys} | {"folder": run.path / "evaluation"}
    steps, guidances = (list(x) if OmegaConf.is_list(x) else [x] for x in (config.sampler.steps, config.guidance))
    samplers = {value: command.construct(config.sampler, steps=value) for value in steps}
    pipeline, images = run.pipeline().to(choose_device(config.device)), run.image_data()
    weights = run_weights_sha256(run)
    found: dict[str, Any] = {"values": {}, "pictures": {}, "files": []}
    elsewhere = run.evaluation_file
    if len(steps) > 1 or len(guidances) > 1:
        swept = sampler_sweep.sweep_sampler(pipeline, images, samplers, guidances, **options)
        name, drawn = "steps" if len(steps) > 1 else "guidance", sampler_sweep.plot_sampler_sweep(swept)
        sweep = Report(f"{name}.json", {"weights_sha256": weights, **swept}, pictures={f"{name}.png": drawn})
        table, picture = sweep.save(run.path)
        found = {"values": {"sweep": swept}, "files": [table, picture]}
        found["pictures"] = {picture.name: Image.open(picture).convert("RGB")}
        found["tables"] = {"sweep": sampler_sweep.sweep_table(swept)}
        elsewhere = run.path / "evaluation" / "knee.json"
        print("\n".join([*sampler_sweep.sweep_lines(swept), f"drawn in {picture}, as numbers in {table}", ""]))
        steps, guidances = ([swept["knee"]] if len(values) > 1 else values for values in (steps, guidances))
    options |= {"guidance": guidances[0], "weights_sha256": weights}
    evaluation = report.measure_samples(pipeline, images, samplers[steps[0]], **options)
    place = report.save_unless_smaller(evaluation, run.path, elsewhere)
    evaluation.print()
    found["files"].insert(0, place)
    found["values"] |= evaluation.to_json()
    found["pictures"] |= evaluation.pictures
    return found


def log_evaluation(config: DictConfig, run: Any, found: dict[str, Any]) -> None:
    """Log the metrics as the summary of a W&B run of its own, in the group of the run that they are of."""
    name: str = run.facts.get("name", run.path.name)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    settings["logger"]["group"] = config.logger.group or name
    settings[TRAINING_ID] = known_id(run.path)
    title = f"evaluation/{run.stage}/{name}"
    track_report(run.path / "evaluation", settings, name=title, made_from=outputs(run)[:1], **found)
