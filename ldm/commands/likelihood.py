"""How many bits per dimension a run needs for its images: the two-stage bound, term by term."""

from omegaconf import DictConfig
from rich.console import Console

from ldm.errors import UserError
from ldm.likelihood.report import check_comparable, measure_likelihood, paired_difference
from ldm.runs.run import Run
from ldm.runtime.device import choose_device


def likelihood(config: DictConfig) -> None:
    run = Run.open(config.run)
    chosen = {
        "split": config.split,
        "num_images": config.num_images,
        "steps": None if config.steps == "all" else config.steps,
        "seed": config.seed,
    }
    options = {"device": choose_device(config.device), "batch_size": config.batch_size, **chosen}
    ode = {"rtol": config.rtol, "atol": config.rtol, "probes": config.probes} if config.ode else None
    other = Run.open(config.against, "against") if config.against else None
    if other is not None:
        check_comparable(run, other, variance=config.against_variance, **chosen)
    elif config.against_variance is not None:
        raise UserError(f"against_variance={config.against_variance} needs against=, the run to compare with.")
    report = measure_likelihood(run, variance=config.variance, ode=ode, **options)
    Console(highlight=False).print(report.table())
    if difference := report.figures.get("ode_minus_chain"):
        mean, error = difference["mean"], difference["standard_error"]
        print(f"ODE minus chain, paired over the images: {mean:+.4f} ± {error:.4f} bits/dim")
    data, picture = report.save(run.path)
    if other is not None:
        against = measure_likelihood(other, variance=config.against_variance, **options)
        report.figures["difference"] = {**paired_difference(report, against), "against": against.figures}
        mean, error = (report.figures["difference"][key] for key in ("mean", "standard_error"))
        name = " ".join([str(other.path), *filter(None, [against.figures.get("variance")])])
        print(f"this minus {name}, paired over the images: {mean:+.4f} ± {error:.4f} bits/dim")
        report.save(run.path)
    print(f"all figures: {data}\nlayer by layer: {picture}")
