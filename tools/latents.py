"""How many latent dimensions the images of a run need: each channel, the spectrum of all, and PCAs of every size."""

from omegaconf import DictConfig

from ldm import command


def latents(config: DictConfig) -> None:
    from rich.console import Console

    from ldm.device import choose_device
    from ldm.evaluation.latents_report import measure
    from ldm.run import Run

    run = Run.open(config.run)
    report = measure(
        run,
        device=choose_device(config.device),
        split=config.split,
        num_images=config.num_images,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    Console(highlight=False).print(report.table())
    print("\n".join(report.lines))
    data, picture, channels = report.save(run.path)
    print(f"all figures: {data}\nspectra, channels, PCA: {picture}\nwhat each channel does: {channels}")


def main() -> None:
    command.run("latents", latents)


if __name__ == "__main__":
    main()
