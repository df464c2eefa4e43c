"""Noise into many modes: a mixture of Gaussians, sampled with a trained network and with the exact denoiser."""

from pathlib import Path

from omegaconf import DictConfig

from ldm.cli import main as command


def mixture(config: DictConfig) -> None:
    from rich.console import Console

    from ldm.evaluation.mixture_study import study
    from ldm.runtime.device import choose_device

    found = study(
        command.construct(config.schedule),
        command.construct(config.sampler),
        steps=config.steps,
        num_samples=config.num_samples,
        seed=config.seed,
        device=choose_device(config.device),
    )
    out = Path(config.out).expanduser()
    found.save(out)
    Console().print(found.table)
    print(f"both chains as a picture: {out / 'mixture.png'}; all figures: {out / 'mixture.json'}")


def main() -> None:
    command.run("mixture", mixture)


if __name__ == "__main__":
    main()
