"""How many bits per dimension a run needs for its images: the two-stage bound, term by term."""

from omegaconf import DictConfig

from ldm import command


def likelihood(config: DictConfig) -> None:
    from rich.console import Console

    from ldm.device import choose_device
    from ldm.evaluation.likelihood_report import compare, measure
    from ldm.run import Run

    run = Run.open(config.run)
    options = {
        "device": choose_device(config.device),
        "split": config.split,
        "num_images": config.num_images,
        "steps": None if config.steps == "all" else config.steps,
        "seed": config.seed,
        "batch_size": config.batch_size,
    }
    ode = {"rtol": config.rtol, "atol": config.rtol, "probes": config.probes} if config.ode else None
    other = Run.open(config.against) if config.against else None
    report = measure(run, variance=config.variance, ode=ode, **options)
    console = Console(highlight=False)
    console.print(report.table())
    if difference := report.figures.get("ode_minus_chain"):
        mean, error = difference["mean"], difference["standard_error"]
        console.print(f"ODE minus chain, paired over the images: {mean:+.4f} ± {error:.4f} bits/dim")
    if other is not None:
        against = measure(other, variance=config.against_variance, **options)
        report.figures["difference"] = {**compare(report, against), "against": against.figures}
        mean, error = (report.figures["difference"][key] for key in ("mean", "standard_error"))
        console.print(f"against {other.path}, paired over the images: {mean:+.4f} ± {error:.4f} bits/dim")
    data, picture = report.save(run.path)
    print(f"all figures: {data}\nlayer by layer: {picture}")


def main() -> None:
    command.run("likelihood", likelihood)


if __name__ == "__main__":
    main()
