"""The front door: compose the config, prepare the data, build the stage, fit, leave the weights.

python -m ldm.train stage=vae|diffusion [group=choice ...] [key=value ...]
"""

import logging
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ldm.cli import main as command
from ldm.cli.options import check_options, refused_options
from ldm.errors import UserError
from ldm.runs.resume import (
    RUN_NAME,
    branch_of,
    check_config,
    check_facts,
    command_line,
    has_saved_since,
    options_to_continue,
    options_to_share,
    place_of,
    run_folder,
    slurm_job,
)
from ldm.runtime import shell, signals


def train(config: DictConfig) -> None:
    """Run one stage. The stage, like everything else, is a choice of config.

    Raises:
        Interrupted: a signal asked to stop; with how to go on.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from ldm.runs.disk import require_writable
    from ldm.runs.lock import only_one
    from ldm.runs.replacement import Replacement
    from ldm.training.callbacks.speed import begin_peak_memory

    job = HydraConfig.get()
    begin_peak_memory(first=job.mode != RunMode.MULTIRUN or job.job.num == 0)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if config.get("stage") is None:
        raise UserError(
            "stage is required: stage=vae trains the autoencoder, stage=diffusion the model on its latents."
        )
    check_options(OmegaConf.to_container(config))  # type: ignore[arg-type]
    if config.resume is True and config.name is None:
        raise UserError("resume=true continues the run that name= gives: add name=NAME, its folder in runs/<stage>/.")
    main_process = getattr(rank_zero_only, "rank", 0) == 0
    folder = run_folder(config, main_process=main_process)
    options = options_to_continue(config)
    again = command_line(options, folder)
    from_file = None if config.resume in (None, False, True, "true") else Path(str(config.resume))
    replacement = Replacement(folder)
    try:
        if not main_process:
            train_in(folder, config, options, again, replacement, main_process=False)
            return
        require_writable(folder)
        with only_one(folder):
            train_in(folder, config, options, again, replacement, main_process=True)
    except signals.Interrupted as stopped:
        if not main_process:
            # the process that started this one ends everything at once where one of its own says more than 0
            raise SystemExit(0 if RUN_NAME in os.environ else stopped.code) from None
        said = str(stopped) if again in str(stopped) else f"{stopped}. To go on: {again}"
        if from_file and not has_saved_since(folder, from_file):
            said = said.replace(again, command_line(options, folder, f"resume={from_file}"))
        elif config.overwrite and not replacement.is_final:  # resume=true would continue the earlier run
            said = said.replace(again, command_line(options, folder, "overwrite=true"))
        if stopped.signal.name == "SIGUSR1":
            said += requeue(named=config.name is not None or from_file is not None)
        raise signals.Interrupted(stopped.signal, said) from None


def train_in(
    folder: Path, config: DictConfig, typed: list[str], again: str, replacement: Any, *, main_process: bool
) -> None:
    """Prepare the data, build the stage, train, leave the weights in the run folder.

    Args:
        typed: The options that the run is started with.
        again: The command that goes on with it.
        replacement: The run that this one may replace.
    """
    import torch
    from lightning.pytorch import seed_everything
    from lightning.pytorch.callbacks import LambdaCallback

    from ldm.files.atomic import clear_partials
    from ldm.runs.disk import require_room
    from ldm.runs.run import NoAutoencoder, Run
    from ldm.runtime.device import choose_device
    from ldm.tracking.server import check_mode
    from ldm.training.callbacks.loggers import make_loggers
    from ldm.training.callbacks.speed import describe_device, measure_speed, peak_memory_gb, print_table, time_expected
    from ldm.training.fit import Fit, Plan, check_trainer, make_budget
    from ldm.training.optim.precision import choose_precision

    started = time.perf_counter()
    kind = HydraConfig.get().runtime.choices["stage"]
    resumed, source, known, changed = what_went_before(folder, config, kind, again, quiet=not main_process)
    options: dict[str, Any] = OmegaConf.to_container(config.trainer)  # type: ignore[assignment]
    check_trainer(options)
    make_budget(options, config.optimizer.warmup_steps, config.optimizer.decay)  # none, or unreadable: refused now
    check_accelerator(options["accelerator"])
    check_mode(config.logger.get("mode"))
    with refused_options():
        build_stage = command.construct(config.stage.build)
        build_stage.func.check(config.data.resolution, **build_stage.keywords, init_from=config.init_from)
        images = command.prepare_images(config.data)
    check_batch(config, len(images.train_indices))
    torch.set_flush_denormal(True)  # the first steps' tiny gradients more than halve a CPU's speed otherwise
    precision = known.get("precision") or choose_precision(options["precision"], options["accelerator"])

    def make_stage() -> Any:
        seed_everything(config.seed, verbose=False)
        try:
            with refused_options():
                stage = build_stage(
                    images=images,
                    flip=config.data.flip,
                    cache_dir=config.data.cache_dir,
                    seed=config.seed,
                    folder=folder,
                    device=choose_device("cpu" if options["accelerator"] == "cpu" else "auto"),
                    init_from=config.init_from,
                )
        except NoAutoencoder as error:
            raise UserError(f"{str(error)[:-1]}: {shell.train(*options_to_share(config, 'vae'))}") from error
        if config.trainer.compile:
            stage.compile()
        return stage

    stage = make_stage()
    facts = {
        "stage": stage.kind,
        "name": folder.name,
        "options": typed,
        "seed": config.seed,
        "precision": precision,
        "data": images.name,
        "data_fingerprint": images.fingerprint,
        "data_cache": str(images.path.resolve()),
        "val_fraction": images.val_fraction,
        **({"branch": branch} if (branch := branch_of(folder, config.resume, known)) else {}),
        **stage.facts(),
    }
    if kind == "vae":
        needed = [] if images.conditioning == "text" else [f"conditioning={images.conditioning}"]
        facts["next_options"] = [*options_to_share(config, "diffusion"), *needed]
    facts |= {"slurm_job": job} if (job := slurm_job()) else {}
    check_facts(known, facts)
    if main_process and stage.trains:
        require_room(folder, stage.module, options["keep_last"])
    run = Run.compose(folder, config, facts)
    plan = Plan(
        stage=stage,
        folder=folder,
        options=options,
        warmup_steps=config.optimizer.warmup_steps,
        decay=config.optimizer.decay,
        batch_size=config.batch_size,
        val_images=config.val_images,
        seed=config.seed,
        precision=precision,
        loggers=(),
        again=again,
        on_saved=replacement.finish,
    )
    fit = Fit(plan, resumed)
    trainer, budget = fit.trainer, fit.budget
    rows = [
        ("data", f"{images.name}: {len(images.train_indices)} train, {len(images.val_indices)} validation"),
        ("size", f"{images.resolution} x {images.resolution} px, {images.num_bytes / 1e6:.0f} MB"),
        ("licence", images.licence or "not stated by the source"),
        *([("colour profiles", profiles)] if (profiles := images.describe_profiles()) else []),
        *stage.rows(),
        ("device", describe_device(trainer)),
        ("precision", f"{precision}"),
    ]
    if stage.trains:
        expected = time_expected(trainer, stage, budget, plan.micro_batch // trainer.world_size or 1, fit.step)
        fit.bar.speed = measure_speed(trainer, stage)
        rows += [("budget", f"{budget}, batches of {config.batch_size}"), ("time expected", expected)]
    # What is known of a run that goes on is replaced where training begins: its weights may still not fit.
    is_same_run = resumed is not None and source.resolve() == folder.resolve()
    goes_on = stage.trains and is_same_run
    with replacement.begin(overwrite=config.overwrite and not is_same_run) if main_process else nullcontext():
        if main_process:
            for place in (folder, folder / "images"):
                clear_partials(place)
            if goes_on:
                record = LambdaCallback(on_train_start=lambda *_: run.record())
                trainer.callbacks.insert(0, record)  # type: ignore[attr-defined]
            else:
                run.record()
        loggers = make_loggers(
            config.logger,
            run,
            resume=bool(config.resume),
            last_row=resumed.last_row if resumed is not None else -1,
            main_process=main_process,
        )
        fit.plan = replace(plan, loggers=loggers.lightning)
        trainer.loggers = list(loggers.lightning)
        if changed:
            rows.append(("changed", "; ".join(changed)))
        rows.append(("folder", str(folder)))
        if trainer.is_global_zero:
            print_table(f"stage {stage.kind}" + (f", resumed from {resumed.path}" if resumed else ""), rows)

        if stage.trains:
            fit = fit.to_the_end(make_stage)
            stage, trainer, budget = fit.plan.stage, fit.trainer, fit.budget
        if not trainer.is_global_zero:
            return
        if goes_on:
            run.record()  # where all was trained before, nothing began
        if fit.ema.ema is not None:
            fit.ema.ema.copy_to_module()
        stage.module.to(trainer.strategy.root_device)  # Lightning left it on the CPU
        figures: dict[str, Any] = {"steps": trainer.global_step, "training_s": round(budget.elapsed_s, 1)}
        if fit.guard is not None and fit.guard.skipped_steps:
            figures["skipped_steps"] = fit.guard.skipped_steps
        outcome = stage.finish(run)
        figures = {**outcome.figures, **figures}
        duration_s = time.perf_counter() - started
        if (memory := peak_memory_gb()) is not None:
            figures["peak_memory_gb"] = memory
        next_command = stage.next_command(run)
        run.update(finished=time.time(), duration_s=round(duration_s, 1), figures=figures, next=next_command)
        replacement.finish()
        loggers.conclude(run, figures, outcome.pictures)
        shown = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in figures.items()]
        shown += [("pictures", picture) for picture in [*outcome.pictures, str(run.images)]]
        print_table(f"stage {run.stage} finished in {duration_s:.0f} s", shown)
        print(f"next: {next_command}")


def what_went_before(
    folder: Path, config: DictConfig, kind: str, again: str, *, quiet: bool
) -> tuple[Any, Path, dict[str, Any], list[str]]:
    """The checkpoint that resume= asks for, its run's folder and facts, and which options are others now.

    Raises:
        UserError: there is no whole checkpoint, or the options given now would lead to other weights.
    """
    from ldm.runs.checkpoints import find_checkpoint
    from ldm.runs.run import CONFIG_FILE, RUN_FILE, Run

    resumed = find_checkpoint(folder, config.resume, stage=kind, quiet=quiet)
    if resumed is None:
        return None, folder, {}, []
    source = resumed.path.parent.parent
    known = Run.open(source).facts if (source / RUN_FILE).is_file() else {}
    if config.vae is None and "vae" in known:
        # the newest one may be another by now
        config.vae = config.stage.build.find_autoencoder.vae = known["vae"]
    changed: list[str] = []
    if (source / CONFIG_FILE).is_file():
        now: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
        place = [*place_of(folder), f"resume={str(config.resume).lower() if config.resume is True else config.resume}"]
        changed = check_config(Run(source, known).config(), now, kind, known.get("options"), place)
    return resumed, source, known, changed


def check_batch(config: DictConfig, num_images: int) -> None:
    """Refuse a batch that the images do not fill, or that does not fall into its parts.

    Raises:
        UserError: saying which sizes do.
    """
    if num_images < config.batch_size:
        raise UserError(
            f"There are {num_images} training images, fewer than batch_size={config.batch_size}. "
            f"Choose batch_size={num_images} or less, or add images."
        )
    if config.batch_size % config.trainer.accumulate_grad_batches:
        raise UserError(
            f"batch_size={config.batch_size} must be a multiple of "
            f"trainer.accumulate_grad_batches={config.trainer.accumulate_grad_batches}, the parts of a step."
        )


def requeue(*, named: bool) -> str:
    """Ask SLURM for the job to be started again, where it would find its run; in words what came of it."""
    if named or "SLURM_JOB_ID" not in os.environ:
        return signals.requeue()
    return ". SLURM is not asked to start the job again: without name= it would begin another run each time"


def check_accelerator(accelerator: str) -> None:
    """Refuse a trainer for a GPU where there is none.

    Raises:
        UserError: saying what to choose instead.
    """
    import torch

    if accelerator in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise UserError("This trainer= needs a GPU, and torch finds none here. Choose trainer=cpu or trainer=auto.")


def main() -> None:
    """`python -m ldm.train`."""
    command.run("train", train)


if __name__ == "__main__":
    main()
