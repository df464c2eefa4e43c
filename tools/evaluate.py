"""Figures of a diffusion run: kernel distance and retrieval against its training images."""

from omegaconf import DictConfig

from ldm import command


def evaluate(config: DictConfig) -> None:
    from hydra.utils import instantiate

    from ldm.device import choose_device
    from ldm.evaluation import report
    from ldm.run import Run

    run = Run.open(config.run)
    pipeline = run.pipeline().to(choose_device(config.device))
    evaluation = report.evaluate(
        pipeline,
        run.image_data(),
        instantiate(config.sampler),
        features=config.features,
        num_samples=config.num_samples,
        guidance=config.guidance,
        guidance_interval=config.guidance_interval,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    evaluation.save(run.path / "evaluation.json")
    print("\n".join(evaluation.lines))
    print(f"all figures: {run.path / 'evaluation.json'}")


def main() -> None:
    command.run("evaluate", evaluate)


if __name__ == "__main__":
    main()
