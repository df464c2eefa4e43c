"""Compute the likelihood of images under a run, in bits per dimension: the two-stage bound, term by term."""

from omegaconf import DictConfig

from ldm.errors import UserError
from ldm.likelihood.report import add_difference, check_comparable, measure_likelihood
from ldm.runs.run import Run
from ldm.runtime.device import choose_device


def likelihood(config: DictConfig) -> None:
    run = Run.open(config.run)
    selection = {key: config[key] for key in ("split", "num_images", "seed")}
    selection["steps"] = None if config.steps == "all" else config.steps
    options = {"device": choose_device(config.device), "batch_size": config.batch_size, **selection}
    ode = {"rtol": config.rtol, "atol": config.rtol, "probes": config.probes} if config.ode else None
    baseline = Run.open(config.against, "against") if config.against else None
    if baseline is not None:
        check_comparable(run, baseline, variance=config.against_variance, **selection)
    elif config.against_variance is not None:
        raise UserError(f"against_variance={config.against_variance} needs against=, the run to compare with.")
    report = measure_likelihood(run, variance=config.variance, ode=ode, **options)
    report.print()
    metrics, figure = report.save(run.path)
    if baseline is not None:
        baseline_report = measure_likelihood(baseline, variance=config.against_variance, **options)
        name = " ".join([str(baseline.path), *filter(None, [baseline_report.content.get("variance")])])
        print(f"this run minus {name}, {add_difference(report, baseline_report)}")
        report.save(run.path)
    print(f"all metrics: {metrics}\nKL term at every t: {figure}")
