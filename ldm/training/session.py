"""Training of one stage, from a composed config to a run folder with the trained weights."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf

from ldm.cli.images import prepare_images
from ldm.cli.main import command_line, construct
from ldm.data.accounting import account_for, accounting_rows
from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.files.atomic import clear_partials
from ldm.networks.text_encoder import load_tokenizer
from ldm.runs.disk import require_disk_space
from ldm.runs.lock import run_lock
from ldm.runs.replacement import Replacement
from ldm.runs.resume import ResumePlan
from ldm.runs.run import AutoencoderNotFoundError, Run
from ldm.runtime import launcher, shell, signals
from ldm.runtime.device import choose_device
from ldm.runtime.distributed import end_communication, is_main_process
from ldm.training.callbacks.loggers import Loggers, make_loggers
from ldm.training.callbacks.speed import (
    describe_device,
    estimate_duration,
    measure_speed,
    peak_memory_gb,
    print_table,
    reset_peak_memory,
)
from ldm.training.checks import check_batch, check_options, check_stage, option_errors
from ldm.training.fit import Fit, FitSpec
from ldm.training.optim.precision import choose_precision
from ldm.training.stages.base import Stage


def train_stage(config: DictConfig) -> None:
    """Train one stage.

    Raises:
        Interrupted: A signal requested a stop. The message says how to resume.
        UserError: The options or the data are invalid. No run has been changed.
    """
    session = Session(config)
    with session.claim_run_folder():
        images = session.prepare_images()
        stage = session.build_stage(images)
        fit = session.build_fit(stage)
        session.begin(fit)
        session.finish(fit.run_to_completion(lambda: session.build_stage(images)))


class Session:
    """A training session for one stage: config, command, run folder, and the run to resume or replace.

    Raises:
        UserError: An option is invalid. The message names the option and the remedy.
    """

    run: Run
    accounting: dict[str, Any]
    loggers: Loggers

    def __init__(self, config: DictConfig) -> None:
        self.main_process, self.start_time = is_main_process(), time.perf_counter()
        self.config, self.command = config, command_line()
        reset_peak_memory(is_first_job=not self.command.job)
        check_options(config)
        self.resume_plan = ResumePlan.from_config(config, self.command, main_process=self.main_process)
        self.replacement = Replacement(self.resume_plan.folder)
        self.precision: str | None = None
        self.plain_config: Any = OmegaConf.to_container(config, resolve=True)

    @contextmanager
    def claim_run_folder(self) -> Iterator[None]:
        """Lock the run folder and find the checkpoint to resume from.

        Raises:
            UserError: The folder is in use, is not writable, or has no checkpoint that these options can resume.
            Interrupted: A signal requested a stop. The message says how to resume.
        """
        try:
            with ExitStack() as self._stack:
                if self.main_process:
                    self._stack.enter_context(run_lock(self.resume_plan.folder))
                self.resume_plan = self.resume_plan.with_checkpoint(self.plain_config)
                yield
        except signals.Interrupted as interrupt:
            if not self.main_process:
                # Launchers kill all ranks as soon as one of them exits with a non-zero status.
                raise SystemExit(0 if launcher.has_shared_run_name() else interrupt.code) from None
            message = self.resume_plan.stop_message(str(interrupt), has_replaced_run=self.replacement.is_final)
            if interrupt.signal.name == "SIGUSR1":
                message += self.resume_plan.requeue()
            raise signals.Interrupted(interrupt.signal, message) from None

    def prepare_images(self) -> ImageData:
        """Check the options of the stage, then prepare the images.

        Raises:
            UserError: The options are not compatible, or there are too few images for a batch.
        """
        with option_errors():
            check_stage(self.config, self._stage_builder())
            images = prepare_images(self.config.data)
        expected = self.resume_plan.source_facts.get("data_fingerprint")
        if expected not in (None, images.fingerprint):
            images = ImageData.open(images.path, images.val_fraction, expected)
        self.accounting = self._account_for(images)
        if self.main_process:
            print_table(f"data {images.name}", accounting_rows(self.accounting))
        check_batch(self.config, len(images.train_indices))
        return images

    def _account_for(self, images: ImageData) -> dict[str, Any]:
        conditioning = self.config.conditioning
        if self.resume_plan.stage == "vae" or "encoder" not in conditioning:
            return account_for(images)
        return account_for(images, load_tokenizer(conditioning.encoder), conditioning.max_tokens)

    def _stage_builder(self) -> Any:
        """Return a partial of the stage's class. A resumed run keeps its autoencoder even if there is a newer one."""
        build, options = self.config.stage.build, {}
        if self.config.vae is None and (vae := self.resume_plan.source_facts.get("vae")) is not None:
            options["find_autoencoder"] = construct(build.find_autoencoder, vae=vae)
        return construct(build, **options)

    def build_stage(self, images: ImageData) -> Stage:
        """Build the stage with newly initialised weights, which are identical on every call."""
        torch.set_flush_denormal(True)  # denormal gradients in the first steps more than halve the speed on CPUs
        config, trainer = self.config, self.config.trainer
        # Choose the precision before seeding, because the benchmark draws random numbers.
        self.precision = (
            self.precision
            or self.resume_plan.source_facts.get("precision")
            or choose_precision(trainer.precision, trainer.accelerator)
        )
        seed_everything(config.seed, verbose=False)
        try:
            with option_errors():
                stage: Stage = self._stage_builder()(
                    images=images,
                    flip=config.data.flip,
                    cache_dir=config.data.cache_dir,
                    seed=config.seed,
                    folder=self.resume_plan.folder,
                    device=choose_device("cpu" if trainer.accelerator == "cpu" else "auto"),
                    init_from=config.init_from,
                )
        except AutoencoderNotFoundError as error:
            vae_command = shell.train_command(*self.command.options_for_next_stage(config, "vae"))
            raise UserError(f"{str(error)[:-1]}: {vae_command}") from error
        if trainer.compile:
            stage.compile()
        return stage

    def build_fit(self, stage: Stage) -> Fit:
        """Build a fit that starts from the checkpoint to resume, or from scratch if there is no checkpoint.

        Raises:
            UserError: The inputs differ from those of the resumed run, or there is too little disk space.
        """
        config, resume_plan = self.config, self.resume_plan
        facts = self._facts(stage)
        resume_plan.check_inputs(facts)
        if self.main_process and stage.trains:
            require_disk_space(resume_plan.folder, stage.module, config.trainer.keep_last)
        self.run = Run.compose(resume_plan.folder, config, facts)
        spec = FitSpec(
            stage=stage,
            folder=resume_plan.folder,
            config=self.plain_config,
            precision=self.precision,
            on_saved=self.replacement.finish,
        )
        return Fit(spec, resume_plan.checkpoint)

    def _facts(self, stage: Stage) -> dict[str, Any]:
        """Return the fields of run.json that describe the run. `Run` adds the machine, versions and times."""
        images, resume_plan = stage.images, self.resume_plan
        facts = {
            "stage": stage.kind,
            "name": resume_plan.folder.name,
            "command": str(self.command),
            "options": list(resume_plan.options),
            "seed": self.config.seed,
            "precision": self.precision,
            "data": images.name,
            "data_fingerprint": images.fingerprint,
            "images_fingerprint": images.images_fingerprint,
            "accounting": self.accounting,
            "data_cache": str(images.path.resolve()),
            "val_fraction": images.val_fraction,
            **({"branch": branch} if (branch := resume_plan.branch) else {}),
            **stage.facts(),
        }
        if stage.kind == "vae":
            conditioning = [] if images.conditioning == "text" else [f"conditioning={images.conditioning}"]
            facts["next_options"] = [*self.command.options_for_next_stage(self.config, "diffusion"), *conditioning]
        return facts | ({"slurm_job": job} if (job := launcher.slurm_job()) else {})

    def begin(self, fit: Fit) -> None:
        """Move an earlier run aside, write run.json, open the loggers and print the start-up table.

        From here on, the run folder is changed. Only the run.json of a resumed run is kept until training starts,
        because loading the checkpoint can still fail.
        """
        resume_plan, stage = self.resume_plan, fit.spec.stage
        rows = self._startup_rows(fit)
        if self.main_process:
            overwrite = self.config.overwrite and not resume_plan.is_same_run
            self._stack.enter_context(self.replacement.begin(overwrite=overwrite))
            for folder in (resume_plan.folder, self.run.images):
                clear_partials(folder)
            if stage.trains and resume_plan.is_same_run:
                record_run = LambdaCallback(on_train_start=lambda *_: self.run.record())
                fit.trainer.callbacks.insert(0, record_run)  # type: ignore[attr-defined]
            else:
                self.run.record()
        self.loggers = make_loggers(
            self.config.logger,
            self.run,
            resume=bool(resume_plan.resume),
            last_row=-1 if resume_plan.checkpoint is None else resume_plan.checkpoint.last_row,
            main_process=self.main_process,
        )
        fit.set_loggers(self.loggers.lightning)
        if self.main_process:
            checkpoint = resume_plan.checkpoint
            print_table(f"stage {stage.kind}" + (f", resumed from {checkpoint.path}" if checkpoint else ""), rows)

    def _startup_rows(self, fit: Fit) -> list[tuple[str, str]]:
        """Measure the speed of a training step and return the labels and values of the start-up table."""
        spec, trainer = fit.spec, fit.trainer
        rows = [
            *spec.stage.summary_rows(),
            ("device", describe_device(trainer)),
            ("precision", f"{spec.precision}"),
        ]
        if spec.stage.trains:
            batch_size = spec.micro_batch_size // trainer.world_size or 1
            duration = estimate_duration(trainer, spec.stage, fit.budget, batch_size, fit.step)
            fit.progress_bar.speed = measure_speed(trainer, spec.stage)
            rows += [("budget", f"{fit.budget}, batch size {self.config.batch_size}"), ("expected time", duration)]
        if self.resume_plan.changed_options:
            rows.append(("changed options", "; ".join(self.resume_plan.changed_options)))
        return [*rows, ("folder", str(spec.folder))]

    def finish(self, fit: Fit) -> None:
        """Save the EMA weights and the final metrics, and print the next command."""
        stage, trainer, run = fit.spec.stage, fit.trainer, self.run
        end_communication()
        if not self.main_process:
            return
        run.record()  # on_train_start does not run if the resumed run had already finished training
        if fit.ema.ema is not None:
            fit.ema.ema.copy_to_module()
        stage.module.to(trainer.strategy.root_device)  # Lightning moves the module to the CPU after training
        metrics, figure = stage.finish(run)
        metrics |= {"steps": trainer.global_step, "training_s": round(fit.budget.elapsed_s, 1)}
        if fit.guard is not None and fit.guard.skipped_steps:
            metrics["skipped_steps"] = fit.guard.skipped_steps
        duration_s = time.perf_counter() - self.start_time
        if (memory := peak_memory_gb()) is not None:
            metrics["peak_memory_gb"] = memory
        next_command = stage.next_command(run)
        device = describe_device(trainer)
        run.update(
            finished=time.time(), duration_s=round(duration_s, 1), device=device, figures=metrics, next=next_command
        )
        self.replacement.finish()
        self.loggers.log_outcome(run, metrics, figure)
        rows = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in metrics.items()]
        rows += [("images", str(path)) for path in (figure, run.images)]
        print_table(f"stage {run.stage} finished in {duration_s:.0f} s", rows)
        print(f"next: {next_command}")
