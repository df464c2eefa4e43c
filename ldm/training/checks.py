"""Checks made before a run folder is changed: option values, compatibility of components, and batch size."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.errors import UserError
from ldm.files.untrusted import first_line
from ldm.rules import Count, Flag, Seed, Text, apply_rules
from ldm.tracking.server import check_mode
from ldm.training.fit import CONSTRUCTOR_ERRORS, check_trainer, make_budget
from ldm.training.optim.factory import OptimizerFactory


class TrainOptions(TypedDict):
    """Rules for the top-level options of a training run."""

    runs_dir: Text
    seed: Seed
    batch_size: Count
    val_images: Count
    overwrite: Flag


def check_options(config: DictConfig) -> None:
    """Check the options that do not depend on the stage.

    Raises:
        UserError: An option is missing or invalid. The message names the option and the remedy.
    """
    if config.get("stage") is None:
        raise UserError(
            "stage is required. Use stage=vae to train the autoencoder, stage=diffusion to train the diffusion model "
            "on its latents, or stage=all to train both in order."
        )
    apply_rules(TrainOptions, config)
    values: Any = OmegaConf.to_container(config, resolve=True)
    check_trainer(values["trainer"])
    make_budget(values)
    check_mode(config.logger.get("mode"))


def check_stage(config: DictConfig, build: Any) -> None:
    """Check that the components of a stage are compatible, before the images are prepared.

    Args:
        build: Partial application of the stage's class.

    Raises:
        UserError: The components are not compatible. The message names the option and the remedy.
    """
    with option_errors():
        OptimizerFactory(build.keywords["optimizer"])(nn.Linear(1, 1))
        options = build.keywords | {"init_from": config.init_from, "flip": config.data.flip}
        build.func.check(config.data.resolution, **options)


@contextmanager
def option_errors() -> Iterator[None]:
    """Convert errors raised while building objects from the options into user errors.

    Raises:
        UserError: Building an object failed. The message contains the first line of the error.
    """
    try:
        yield
    except UserError:
        raise
    except CONSTRUCTOR_ERRORS as error:
        raise UserError(
            f"These options do not define a valid training run: {first_line(error)}. Run with --help to list the "
            "available options, or set HYDRA_FULL_ERROR=1 to see the traceback."
        ) from error


def check_batch(config: DictConfig, num_images: int) -> None:
    """Check the batch size against the number of training images and the number of micro-batches.

    Raises:
        UserError: The batch is larger than the training set or cannot be split into equal micro-batches.
    """
    if num_images < config.batch_size:
        raise UserError(
            f"batch_size={config.batch_size} exceeds the {num_images} training images. "
            f"Use batch_size={num_images} or less, or add images."
        )
    if config.batch_size % config.trainer.accumulate_grad_batches:
        raise UserError(
            f"batch_size={config.batch_size} must be a multiple of the number of micro-batches per step, "
            f"trainer.accumulate_grad_batches={config.trainer.accumulate_grad_batches}."
        )
