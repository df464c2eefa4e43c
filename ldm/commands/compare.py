"""Which run is better, and is the difference more than noise? A table, a page, curves and images of several runs."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from rich.console import Console

from ldm.cli import main as command
from ldm.errors import UserError, require_whole
from ldm.evaluation.comparison.compare import compare_runs
from ldm.evaluation.comparison.curves import curve_names
from ldm.evaluation.comparison.images import side_by_side
from ldm.evaluation.comparison.report import ComparisonReport
from ldm.runtime.device import choose_device
from ldm.sampling.draw import describe
from ldm.sampling.request import read_prompts
from ldm.tracking.comparison import track_comparison


def compare(config: DictConfig) -> None:
    check_compare_options(config)
    device = choose_device(config.device)
    comparison = compare_runs(
        list(map(str, config.runs)) if isinstance(config.runs, ListConfig) else [str(config.runs)]
    )
    options = {key: config[key] for key in ("num_samples", "prompts", "guidance", "seed", "batch_size")}
    sampler = command.construct(config.sampler)
    picture, notes = side_by_side(comparison, sampler, device=device, **options)
    drawn = {key: options[key] for key in ("num_samples", "seed")}
    if comparison.runs[0][1].stage == "diffusion":
        drawn |= {"prompts": config.prompts, "guidance": config.guidance, "sampler": describe(sampler)}
    report = ComparisonReport(comparison, picture, notes, drawn if picture is not None else {})
    out = Path(config.out or Path("runs", "compare", report.folder_name)).expanduser()
    files = report.save(out)
    console = Console(highlight=False)
    for table in report.tables():
        console.print(table)
    print("\n".join(report.lines))
    if config.logger.wandb:
        print(log_comparison(config, out, report, files))
    print(f"all figures: {files[0]}\nas a page: {files[1]}\npictures: {', '.join(map(str, files[2:])) or 'none'}")


def check_compare_options(config: DictConfig) -> None:
    """Refuse options before any run is read.

    Raises:
        UserError: naming the key, its value and the rule.
    """

    for key, least in (("num_samples", 0), ("seed", 0), ("batch_size", 1)):
        require_whole(key, config[key], least)
    if type(config.guidance) not in (int, float):
        raise UserError(f"guidance={config.guidance} must be a number, 1 for none.")
    if config.prompts:
        read_prompts(config.prompts)


def log_comparison(config: DictConfig, out: Path, report: Any, files: list[Path]) -> str:
    """Table and pictures in a W&B run of its own, and a W&B report; the line that says where it is."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    columns, rows = report.sheet()
    pictures = {}
    for file in files[2:]:
        with Image.open(file) as picture:
            pictures[file.stem] = picture.convert("RGB")
    return track_comparison(
        out,
        settings,
        name=f"compare/{report.folder_name}",
        columns=columns,
        rows=rows,
        pictures=pictures,
        markdown=report.markdown(),
        curves=curve_names(report.comparison.groups),
        compared=[f"{run.stage}/{run.name}" for _, run in report.comparison.runs],
    )
