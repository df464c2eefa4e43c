"""The front door: compose the config, prepare the data, build the stage, fit, leave the weights.

python -m ldm.train stage=vae|diffusion [group=choice ...] [key=value ...]
"""

import logging
import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm import command
from ldm.errors import UserError

RUN_NAME = "LDM_RUN_NAME"


def train(config: DictConfig) -> None:
    """Run one stage. The stage, like everything else, is a choice of config."""
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.utilities import rank_zero_only

    from ldm.data.loaders import train_loader, val_loader
    from ldm.device import choose_device
    from ldm.run import RUN_FILE, Run
    from ldm.training.budget import Budget, parse_duration
    from ldm.training.callbacks import EMACallback, ProgressBar
    from ldm.training.checkpoint import LastCheckpoint, find_checkpoint, progress_of
    from ldm.training.loggers import make_loggers
    from ldm.training.precision import choose_precision
    from ldm.training.summary import describe_device, print_table, time_expected
    from ldm.training.throughput import begin_peak_memory, measure_speed, peak_memory_gb

    started = time.perf_counter()
    job = HydraConfig.get()
    begin_peak_memory(first=job.mode != RunMode.MULTIRUN or job.job.num == 0)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if config.get("stage") is None:
        raise UserError(
            "stage is required: stage=vae trains the autoencoder, stage=diffusion the model on its latents."
        )
    OmegaConf.resolve(config)
    for key in ("seed", "batch_size", "val_images", "data.resolution", "trainer.max_steps"):
        if type(value := OmegaConf.select(config, key)) is not int:
            raise UserError(f"{key}={value} must be a whole number.")
    if config.resume is True and config.name is None:
        raise UserError("resume=true continues the run that name= gives: add name=NAME, its folder in runs/<stage>/.")
    main_process = getattr(rank_zero_only, "rank", 0) == 0
    folder = run_folder(config, main_process=main_process)
    resumed = find_checkpoint(folder, config.resume)
    budget = Budget(
        config.trainer.max_steps,
        parse_duration(config.trainer.max_time),
        config.optimizer.warmup_steps,
        config.optimizer.decay,
    )
    options: dict[str, Any] = OmegaConf.to_container(config.trainer)  # type: ignore[assignment]
    for own in ("max_time", "ema_decay", "compile", "num_workers", "checkpoint_every_s"):
        options.pop(own)
    check_accelerator(options["accelerator"])
    build_stage = instantiate(config.stage.build)
    build_stage.func.check(config.data.resolution, **build_stage.keywords, init_from=config.init_from)

    images = command.prepare_images(config.data)
    if len(images.train_indices) < config.batch_size:
        raise UserError(
            f"There are {len(images.train_indices)} training images, fewer than batch_size={config.batch_size}. "
            f"Choose batch_size={len(images.train_indices)} or less, or add images."
        )
    micro_batch, rest = divmod(config.batch_size, config.trainer.accumulate_grad_batches)
    if rest:
        raise UserError(
            f"batch_size={config.batch_size} must be a multiple of "
            f"trainer.accumulate_grad_batches={config.trainer.accumulate_grad_batches}, the parts of a step."
        )
    torch.set_flush_denormal(True)  # the first steps' tiny gradients more than halve a CPU's speed otherwise
    seed_everything(config.seed, verbose=False)
    known = Run.open(folder).facts if resumed and (folder / RUN_FILE).is_file() else {}
    precision = known.get("precision") or choose_precision(options["precision"], options["accelerator"])
    stage = build_stage(
        images=images,
        flip=config.data.flip,
        cache_dir=config.data.cache_dir,
        seed=config.seed,
        folder=folder,
        device=choose_device("cpu" if options["accelerator"] == "cpu" else "auto"),
        init_from=config.init_from,
    )
    facts = {
        "stage": stage.kind,
        "name": folder.name,
        "seed": config.seed,
        "precision": precision,
        "data": images.name,
        "data_fingerprint": images.fingerprint,
        "data_cache": str(images.path.resolve()),
        "val_fraction": images.val_fraction,
        **stage.facts(),
    }
    check_resumed(known, facts)
    if config.overwrite and not resumed and main_process:
        shutil.rmtree(folder, ignore_errors=True)
    run = Run.create(folder, config, facts)
    if config.trainer.compile:
        stage.compile()
    stage.module.log_every, stage.module.progress = options["log_every_n_steps"], budget.progress
    loggers = make_loggers(config.logger, run, resume=resumed is not None, main_process=main_process)
    ema = EMACallback(config.trainer.ema_decay)
    bar = ProgressBar(budget, config.batch_size, options["log_every_n_steps"], f"stage {stage.kind}")
    try:
        trainer = Trainer(
            **{key: value for key, value in options.items() if key != "_target_"} | {"precision": precision},
            max_epochs=-1,  # steps and time are the budget
            callbacks=[budget, ema, bar, LastCheckpoint(folder, config.trainer.checkpoint_every_s)],
            logger=loggers.lightning,
            default_root_dir=folder,
        )
    except MisconfigurationException as error:
        raise UserError(f"{' '.join(str(error).split())} Choose trainer=cpu or trainer=auto.") from error
    step, budget.spent_s = progress_of(resumed)
    rows = [
        ("data", f"{images.name}: {len(images.train_indices)} train, {len(images.val_indices)} validation"),
        ("size", f"{images.resolution} x {images.resolution} px, {images.num_bytes / 1e6:.0f} MB"),
        ("licence", images.licence or "not stated by the source"),
        *stage.rows(),
        ("device", describe_device(trainer)),
        ("precision", f"{precision}"),
    ]
    if stage.trains:
        expected = time_expected(trainer, stage, budget, micro_batch // trainer.world_size or 1, step)
        bar.speed = measure_speed(trainer, stage)
        rows += [("budget", f"{budget}, batches of {config.batch_size}"), ("time expected", expected)]
    rows.append(("folder", str(folder)))
    if trainer.is_global_zero:
        print_table(f"stage {stage.kind}" + (f", resumed from {resumed}" if resumed else ""), rows)

    fit_batches = train_loader(
        stage.fetch,
        images.train_indices,
        batch_size=micro_batch,
        seed=config.seed,
        start=step * options["accumulate_grad_batches"],
        rank=trainer.global_rank,
        num_ranks=trainer.world_size,
        num_workers=config.trainer.num_workers,
    )
    val_batches = val_loader(stage.fetch, images.val_indices[: config.val_images], batch_size=micro_batch)
    if stage.trains:
        fit(trainer, stage, ema, fit_batches, val_batches, resumed)
    if not trainer.is_global_zero:
        return
    if ema.ema is not None:
        ema.ema.copy_to_module()
    stage.module.to(trainer.strategy.root_device)  # Lightning left it on the CPU
    outcome = stage.finish(run)
    duration_s = time.perf_counter() - started
    figures = {
        **outcome.figures,
        "steps": trainer.global_step,
        "training_s": round(budget.elapsed_s, 1),
    }
    if (memory := peak_memory_gb()) is not None:
        figures["peak_memory_gb"] = memory
    run.update(finished=time.time(), duration_s=round(duration_s, 1), figures=figures, next=outcome.next_command)
    loggers.conclude(run, figures, outcome.pictures)
    shown = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in figures.items()]
    shown += [("pictures", picture) for picture in [*outcome.pictures, str(run.images)]]
    print_table(f"stage {stage.kind} finished in {duration_s:.0f} s", shown)
    print(f"next: {outcome.next_command}")


def fit(trainer: Any, stage: Any, ema: Any, fit_batches: Any, val_batches: Any, resumed: str | None) -> None:
    """Train to the end of the budget, and validate there once.

    Raises:
        SystemExit: SIGTERM, with its code.
        KeyboardInterrupt: Ctrl-C.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    with warnings.catch_warnings():
        # ours is an endless loader over memory-mapped arrays: workers and epochs do not apply to it
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        try:
            trainer.fit(stage.module, fit_batches, val_batches, ckpt_path=resumed, weights_only=True)
            if ema.validated_at != trainer.global_step:
                trainer.validate(stage.module, val_batches, verbose=False)
        except SystemExit as stopped:  # how Lightning passes on SIGTERM, with exit code 0, and Ctrl-C
            if isinstance(stopped, SIGTERMException):
                raise SystemExit(128 + signal.SIGTERM) from stopped
            raise KeyboardInterrupt from stopped


def run_folder(config: DictConfig, *, main_process: bool) -> Path:
    """runs_dir/<stage>/<name>. Processes that Lightning starts find the name of the first in the environment.

    Raises:
        UserError: the folder is in use by another run and neither resume nor overwrite was asked for.
    """
    choices = HydraConfig.get().runtime.choices
    stage = choices["stage"]
    part = choices["autoencoder" if stage == "vae" else "network"]
    default = f"{choices['data']}-{part}-{time.strftime('%Y%m%d-%H%M%S')}"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        default += f"-{HydraConfig.get().job.num}"  # jobs may start in the same second
    if main_process:
        os.environ[RUN_NAME] = config.name or default
    name = os.environ.get(RUN_NAME, default)
    if "/" in name or "\\" in name or name in (".", ".."):
        raise UserError(f"name={name} must be a plain folder name. Choose another place with runs_dir=.")
    folder = Path(config.runs_dir).expanduser() / stage / name
    if main_process and (folder / "run.json").exists() and not (config.resume or config.overwrite):
        raise UserError(
            f"{folder} exists already. Choose another name=, continue it with resume=true, or start it anew "
            "with overwrite=true."
        )
    return folder


def check_accelerator(accelerator: str) -> None:
    """Refuse a trainer for a GPU where there is none.

    Raises:
        UserError: saying what to choose instead.
    """
    import torch

    if accelerator in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise UserError("This trainer= needs a GPU, and torch finds none here. Choose trainer=cpu or trainer=auto.")


def check_resumed(known: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse to continue a run as something else than it was started as.

    Raises:
        UserError: naming the first thing that differs.
    """
    for key in (
        "stage",
        "data_fingerprint",
        "latent_shape",
        "chain_sha256",
        "loss",
        "prediction",
        "variance",
        "pretrained",
        "regulariser",
        "perceptual",
        "adversarial",
        "discriminator",
        "codebook_size",
        "likelihood",
        "trained",
    ):
        if key in known and key in facts and known[key] != facts[key]:
            raise UserError(
                f"resume= continues a run whose {key} is {known[key]}, but the options given now make it {facts[key]}. "
                "Give the options that it was started with: they are in its config.yaml."
            )


def main() -> None:
    """`python -m ldm.train`."""
    command.run("train", train)


if __name__ == "__main__":
    main()
