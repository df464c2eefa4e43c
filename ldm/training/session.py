"""One training as a handful of verbs: a composed config in, a run folder with weights out."""

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
from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.files.atomic import clear_partials
from ldm.runs.disk import require_room
from ldm.runs.lock import only_one
from ldm.runs.replacement import Replacement
from ldm.runs.resume import Continuation
from ldm.runs.run import NoAutoencoder, Run
from ldm.runtime import launcher, shell, signals
from ldm.runtime.device import choose_device
from ldm.runtime.distributed import is_main_process
from ldm.training.callbacks.loggers import Loggers, make_loggers
from ldm.training.callbacks.speed import (
    begin_peak_memory,
    describe_device,
    measure_speed,
    peak_memory_gb,
    print_table,
    time_expected,
)
from ldm.training.checks import check_batch, check_options, check_stage, refused_options
from ldm.training.fit import Fit, Plan
from ldm.training.optim.precision import choose_precision
from ldm.training.stages.base import Stage


def train_stage(config: DictConfig) -> None:
    """Train one stage.

    Raises:
        Interrupted: a signal asked to stop; with how to go on.
        UserError: bad input, before anything is changed.
    """
    session = Session(config)
    with session.claimed():
        images = session.prepare_images()
        stage = session.build_stage(images)
        fit = session.fit(stage)
        session.begin(fit)
        session.finish(fit.to_the_end(lambda: session.build_stage(images)))


class Session:
    """What a training knows beside its stage: config, command, run folder, what it continues and what it replaces.

    Raises:
        UserError: what can be refused without looking into the run folder; naming the option and the remedy.
    """

    run: Run
    loggers: Loggers

    def __init__(self, config: DictConfig) -> None:
        self.main_process, self.started = is_main_process(), time.perf_counter()
        self.config, self.command = config, command_line()
        begin_peak_memory(first=not self.command.job)
        check_options(config)
        self.continuation = Continuation.plan(config, self.command, main_process=self.main_process)
        self.replacement = Replacement(self.continuation.folder)
        self.precision: str | None = None
        self.values: Any = OmegaConf.to_container(config, resolve=True)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The run folder is this training's alone, and is searched for what it continues.

        Raises:
            UserError: it is in use, cannot be written, or holds nothing that these options continue.
            Interrupted: a signal asked to stop; with how to go on.
        """
        try:
            with ExitStack() as self._stack:
                if self.main_process:
                    self._stack.enter_context(only_one(self.continuation.folder))
                self.continuation = self.continuation.find(self.values)
                yield
        except signals.Interrupted as stopped:
            if not self.main_process:
                # what started this process ends everything at once where one of its own says more than 0
                raise SystemExit(0 if launcher.has_shared_run_name() else stopped.code) from None
            said = self.continuation.after_stop(str(stopped), has_replaced=self.replacement.is_final)
            if stopped.signal.name == "SIGUSR1":
                said += self.continuation.requeue()
            raise signals.Interrupted(stopped.signal, said) from None

    def prepare_images(self) -> ImageData:
        """The images, once the stage has nothing against its options.

        Raises:
            UserError: options that do not go together, images that do not fill a batch, or none.
        """
        with refused_options():
            check_stage(self.config, self._stage_builder())
            images = prepare_images(self.config.data)
        check_batch(self.config, len(images.train_indices))
        return images

    def _stage_builder(self) -> Any:
        """A partial of the stage's class, on the autoencoder of the run that is continued: another may be newer."""
        build, options = self.config.stage.build, {}
        if self.config.vae is None and (vae := self.continuation.known.get("vae")) is not None:
            options["find_autoencoder"] = construct(build.find_autoencoder, vae=vae)
        return construct(build, **options)

    def build_stage(self, images: ImageData) -> Stage:
        """The stage with fresh weights, the same each time."""
        torch.set_flush_denormal(True)  # the first steps' tiny gradients more than halve a CPU's speed otherwise
        config, trainer = self.config, self.config.trainer
        self.precision = (
            self.precision  # known before the seed is set: measuring it draws random numbers
            or self.continuation.known.get("precision")
            or choose_precision(trainer.precision, trainer.accelerator)
        )
        seed_everything(config.seed, verbose=False)
        try:
            with refused_options():
                stage: Stage = self._stage_builder()(
                    images=images,
                    flip=config.data.flip,
                    cache_dir=config.data.cache_dir,
                    seed=config.seed,
                    folder=self.continuation.folder,
                    device=choose_device("cpu" if trainer.accelerator == "cpu" else "auto"),
                    init_from=config.init_from,
                )
        except NoAutoencoder as error:
            first = shell.train_command(*self.command.options_to_share(config, "vae"))
            raise UserError(f"{str(error)[:-1]}: {first}") from error
        if trainer.compile:
            stage.compile()
        return stage

    def fit(self, stage: Stage) -> Fit:
        """A trainer for the stage, at the checkpoint to go on from.

        Raises:
            UserError: the run that is continued was another, or the disk has no room for checkpoints.
        """
        config, continuation = self.config, self.continuation
        facts = self._facts(stage)
        continuation.check_facts(facts)
        if self.main_process and stage.trains:
            require_room(continuation.folder, stage.module, config.trainer.keep_last)
        self.run = Run.compose(continuation.folder, config, facts)
        plan = Plan(
            stage=stage,
            folder=continuation.folder,
            config=self.values,
            precision=self.precision,
            on_saved=self.replacement.finish,
        )
        return Fit(plan, continuation.checkpoint)

    def _facts(self, stage: Stage) -> dict[str, Any]:
        """What run.json says of the run, beside where and when it is trained."""
        images, continuation = stage.images, self.continuation
        facts = {
            "stage": stage.kind,
            "name": continuation.folder.name,
            "command": str(self.command),
            "options": list(continuation.options),
            "seed": self.config.seed,
            "precision": self.precision,
            "data": images.name,
            "data_fingerprint": images.fingerprint,
            "data_cache": str(images.path.resolve()),
            "val_fraction": images.val_fraction,
            **({"branch": branch} if (branch := continuation.branch) else {}),
            **stage.facts(),
        }
        if stage.kind == "vae":
            needed = [] if images.conditioning == "text" else [f"conditioning={images.conditioning}"]
            facts["next_options"] = [*self.command.options_to_share(self.config, "diffusion"), *needed]
        return facts | ({"slurm_job": job} if (job := launcher.slurm_job()) else {})

    def begin(self, fit: Fit) -> None:
        """The point of no return: the earlier run is set aside, this one recorded, its loggers open, its table shown.

        What is known of a run that goes on is replaced where training begins: its weights may still not fit.
        """
        continuation, stage = self.continuation, fit.plan.stage
        rows = self._rows(fit)
        if self.main_process:
            overwrite = self.config.overwrite and not continuation.is_same_run
            self._stack.enter_context(self.replacement.begin(overwrite=overwrite))
            for place in (continuation.folder, self.run.images):
                clear_partials(place)
            if stage.trains and continuation.is_same_run:
                record = LambdaCallback(on_train_start=lambda *_: self.run.record())
                fit.trainer.callbacks.insert(0, record)  # type: ignore[attr-defined]
            else:
                self.run.record()
        self.loggers = make_loggers(
            self.config.logger,
            self.run,
            resume=bool(continuation.resume),
            last_row=-1 if continuation.checkpoint is None else continuation.checkpoint.last_row,
            main_process=self.main_process,
        )
        fit.log_to(self.loggers.lightning)
        if self.main_process:
            found = continuation.checkpoint
            print_table(f"stage {stage.kind}" + (f", resumed from {found.path}" if found else ""), rows)

    def _rows(self, fit: Fit) -> list[tuple[str, str]]:
        """Labels and values of the table; the speed of a step is measured for it."""
        plan, trainer, images = fit.plan, fit.trainer, fit.plan.stage.images
        rows = [
            ("data", f"{images.name}: {len(images.train_indices)} train, {len(images.val_indices)} validation"),
            ("size", f"{images.resolution} x {images.resolution} px, {images.num_bytes / 1e6:.0f} MB"),
            ("licence", images.licence or "not stated by the source"),
            *([("colour profiles", profiles)] if (profiles := images.describe_profiles()) else []),
            *plan.stage.rows(),
            ("device", describe_device(trainer)),
            ("precision", f"{plan.precision}"),
        ]
        if plan.stage.trains:
            batch_size = plan.micro_batch // trainer.world_size or 1
            expected = time_expected(trainer, plan.stage, fit.budget, batch_size, fit.step)
            fit.bar.speed = measure_speed(trainer, plan.stage)
            rows += [("budget", f"{fit.budget}, batches of {self.config.batch_size}"), ("time expected", expected)]
        if self.continuation.changed:
            rows.append(("changed", "; ".join(self.continuation.changed)))
        return [*rows, ("folder", str(plan.folder))]

    def finish(self, fit: Fit) -> None:
        """Leave the averaged weights, the last metrics and the next command."""
        stage, trainer, run = fit.plan.stage, fit.trainer, self.run
        if not self.main_process:
            return
        run.record()  # where all was trained before, nothing began
        if fit.ema.ema is not None:
            fit.ema.ema.copy_to_module()
        stage.module.to(trainer.strategy.root_device)  # Lightning left it on the CPU
        figures, picture = stage.finish(run)
        figures |= {"steps": trainer.global_step, "training_s": round(fit.budget.elapsed_s, 1)}
        if fit.guard is not None and fit.guard.skipped_steps:
            figures["skipped_steps"] = fit.guard.skipped_steps
        duration_s = time.perf_counter() - self.started
        if (memory := peak_memory_gb()) is not None:
            figures["peak_memory_gb"] = memory
        next_command = stage.next_command(run)
        run.update(finished=time.time(), duration_s=round(duration_s, 1), figures=figures, next=next_command)
        self.replacement.finish()
        self.loggers.conclude(run, figures, picture)
        shown = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in figures.items()]
        shown += [("pictures", str(place)) for place in (picture, run.images)]
        print_table(f"stage {run.stage} finished in {duration_s:.0f} s", shown)
        print(f"next: {next_command}")
