"""What is refused before a run folder is touched: options of no stage, parts that do not go together, odd batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.errors import UserError
from ldm.files.untrusted import first_line
from ldm.rules import Count, Seed, Switch, Text, apply_rules
from ldm.tracking.server import check_mode
from ldm.training.fit import FAULTS, check_trainer, make_budget
from ldm.training.optim.factory import OptimizerFactory


class TrainOptions(TypedDict):
    """Options of a training that belong to none of its parts."""

    runs_dir: Text
    seed: Seed
    batch_size: Count
    val_images: Count
    overwrite: Switch


def check_options(config: DictConfig) -> None:
    """Refuse what no training can be made of, whichever stage it is of.

    Raises:
        UserError: naming the option and the remedy.
    """
    if config.get("stage") is None:
        raise UserError(
            "stage is required: stage=vae trains the autoencoder, stage=diffusion the model on its latents, stage=all "
            "one after the other."
        )
    apply_rules(TrainOptions, config)
    values: Any = OmegaConf.to_container(config, resolve=True)
    check_trainer(values["trainer"])
    make_budget(values)
    check_mode(config.logger.get("mode"))


def check_stage(config: DictConfig, build: Any) -> None:
    """Refuse parts of a stage that do not go together, before its images are prepared.

    Args:
        build: A partial of the stage's class.

    Raises:
        UserError: naming the option and the remedy.
    """
    with refused_options():
        OptimizerFactory(build.keywords["optimizer"])(nn.Linear(1, 1))
        options = build.keywords | {"init_from": config.init_from, "flip": config.data.flip}
        build.func.check(config.data.resolution, **options)


@contextmanager
def refused_options() -> Iterator[None]:
    """Of what is made from options alone, an error is one of theirs.

    Raises:
        UserError: with what the constructor said.
    """
    try:
        yield
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(
            f"No training can be made of these options: {first_line(error)}. --help lists the choices and the keys; "
            "HYDRA_FULL_ERROR=1 shows where it happened."
        ) from error


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
