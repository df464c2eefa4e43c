"""Compare runs: which one is better, and is the difference more than noise?"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from rich.console import Console

from ldm.cli import main as command
from ldm.evaluation.comparison.compare import compare_runs
from ldm.evaluation.comparison.images import side_by_side
from ldm.evaluation.comparison.report import ComparisonReport
from ldm.rules import apply_rules
from ldm.runtime.device import choose_device
from ldm.sampling.draw import sampler_settings
from ldm.sampling.request import read_prompts
from ldm.tracking.comparison import track_comparison


def compare(config: DictConfig) -> None:
    options = {key: config[key] for key in ("num_samples", "prompts", "guidance", "seed", "batch_size")}
    options |= apply_rules(side_by_side, options)
    if config.prompts:
        read_prompts(config.prompts)
    device = choose_device(config.device)
    comparison = compare_runs(list(map(str, config.runs if isinstance(config.runs, ListConfig) else [config.runs])))
    sampler = command.construct(config.sampler)
    images, notes = side_by_side(comparison, sampler, device=device, **options)
    settings = {key: options[key] for key in ("num_samples", "seed")}
    if comparison.runs[0][1].stage == "diffusion":
        settings |= {"prompts": config.prompts, "guidance": config.guidance, "sampler": sampler_settings(sampler)}
    report = ComparisonReport(comparison, images, notes, settings if images is not None else {})
    out = Path(config.out or Path("runs", "compare", report.folder_name)).expanduser()
    files = report.save(out)
    report.print(Console(highlight=False, markup=False))
    if config.logger.wandb:
        print(log_comparison(config, out, report, files[2:]))
    print(f"all metrics: {files[0]} (explained in docs/comparing_runs.md)")
    print(f"HTML report: {files[1]}\nfigures: {', '.join(map(str, files[2:])) or 'none'}")


def log_comparison(config: DictConfig, out: Path, report: ComparisonReport, files: list[Path]) -> str:
    """Log tables and figures to a separate W&B run, create a W&B report, and return a line with its location."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    return track_comparison(
        out,
        settings,
        name=f"compare/{report.folder_name}",
        tables={title: (columns, rows) for title, (columns, *rows) in report.tables().items()},
        figures={file.stem: Image.open(file).convert("RGB") for file in files},
        markdown=report.markdown(),
        curves=report.comparison.curve_names(),
        run_names=[f"{run.stage}/{run.name}" for _, run in report.comparison.runs],
    )
