"""Check a data set before training: duplicates, class balance, captions, coverage and diversity."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.cli.images import prepare_images
from ldm.data.images import verify_images
from ldm.evaluation.data.report import FIGURES, inspect_data
from ldm.evaluation.features import NO_FEATURES, load_features
from ldm.latents.cache import verify_latents
from ldm.networks.text_encoder import load_tokenizer
from ldm.rules import apply_rules
from ldm.runs.lineage import data_artifact
from ldm.runtime.device import choose_device
from ldm.tracking.run import flatten, track_report


def data(config: DictConfig) -> None:
    options = {key: config[key] for key in ("features", "max_bits", "max_levels", "max_tokens", "seed")}
    apply_rules(inspect_data, options)  # before any image is prepared
    if config.features != NO_FEATURES:
        load_features(config.features)
    device = choose_device(config.device)
    images = prepare_images(config.data)
    tokenizer = None if images.captions is None or config.encoder is None else load_tokenizer(config.encoder)
    if config.verify:
        verified = [verify_images(images), *verify_latents(images)]
        print(f"checksums verified: {', '.join(map(str, verified))}")
    report = inspect_data(images, device=device, tokenizer=tokenizer, **options)
    out = Path(config.out or Path("runs", "data", images.name)).expanduser()
    metrics, *figures = files = report.save(out)
    for name in FIGURES - report.figures.keys():  # from an earlier report
        (out / name).unlink(missing_ok=True)
    if config.logger.wandb:
        log_data_report(config, out, report, images, files)
    report.print()
    print(f"all metrics: {metrics}\nfigures: {', '.join(map(str, figures))}")
    print("how to interpret the results: docs/your_own_images.md")


def log_data_report(config: DictConfig, out: Path, report: Any, images: Any, files: list[Path]) -> None:
    """Log the metrics as the summary of a W&B run, and the contact sheet as an image."""
    metrics = {key.replace(".", "/"): value for key, value in flatten(report.content).items() if key.count(".") < 2}
    settings: Any = OmegaConf.to_container(config, resolve=True)
    track_report(
        out,
        settings,
        name=f"data/{report.content['name']}",
        values={key: value for key, value in metrics.items() if isinstance(value, int | float)},
        figures={"contact sheet": report.figures["contact_sheet.png"]},
        inputs=[data_artifact(images.name, images.fingerprint, images.val_fraction)],
        files=files,
    )
