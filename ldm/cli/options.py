"""What the values of a training's options may be, for those that nothing else asks before training begins."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ldm.errors import UserError
from ldm.files.untrusted import first_line

SMALLEST = math.ulp(0.0)
"""Stands for: above 0."""


@dataclass(frozen=True)
class Rule:
    """A number from `least` to `most`, the ends included.

    Args:
        whole: Whole numbers alone.
        null: None may stand in its place.
        several: A list of such numbers.
    """

    least: float
    most: float = 1e12
    whole: bool = False
    null: bool = False
    several: bool = False

    def allows(self, value: Any) -> bool:
        if value is None:
            return self.null
        if self.several:
            return isinstance(value, list) and all(self._is_number(part) for part in value)
        return self._is_number(value)

    def _is_number(self, value: Any) -> bool:
        kinds = (int,) if self.whole else (int, float)
        return type(value) in kinds and self.least <= value <= self.most

    def __str__(self) -> str:
        what = ("a list of " if self.several else "a ") + ("whole number" if self.whole else "number")
        what += "s" * self.several
        if self.least > -math.inf:
            what += " above 0" if self.least == SMALLEST else f" of {self.least:.12g} at least"
        what += f" and {self.most:.12g} at most" if self.most < 1e12 else ""
        return what + ", or null" * self.null


def whole(least: int, most: float = 1e9, **options: bool) -> Rule:
    return Rule(least, most, whole=True, **options)


RULES = {
    "seed": whole(0, 2**32 - 1),
    "batch_size": whole(1),
    "val_images": whole(1),
    "data.resolution": whole(1, 16384),
    "data.max_pixels": whole(1, 1e12),
    "data.val_fraction": Rule(0, 1),
    "data.max_bad_fraction": Rule(0, 1),
    "data.num_images": whole(1, null=True),
    "trainer.max_steps": whole(-1, 1e12),
    "trainer.accumulate_grad_batches": whole(1),
    "trainer.log_every_n_steps": whole(1),
    "trainer.num_nodes": whole(1),
    "trainer.num_workers": whole(0, 1024),
    "trainer.num_sanity_val_steps": whole(-1),
    "trainer.val_check_interval": Rule(SMALLEST, null=True),
    "trainer.gradient_clip_val": Rule(0, null=True),
    "trainer.ema_decay": Rule(-math.inf, math.inf),
    "trainer.checkpoint_every_s": Rule(0),
    "trainer.keep_last": whole(1, 1e6),
    "trainer.guard.max_spike": Rule(1, math.inf),
    "trainer.guard.warmup_steps": whole(1),
    "trainer.guard.skips_before_rollback": whole(1),
    "trainer.guard.max_rollbacks": whole(0),
    "optimizer.lr": Rule(0),
    "optimizer.warmup_steps": whole(0),
    "optimizer.build.weight_decay": Rule(0),
    "optimizer.build.momentum": Rule(0, 1),
    "optimizer.build.betas": Rule(0, 1, several=True),
    "perceptual.weight": Rule(0),
    "adversarial.weight": Rule(0),
    "adversarial.start": Rule(0),
    "adversarial.ramp": whole(0),
    "adversarial.lr": Rule(0),
    "adversarial.max_weight": Rule(0),
    "adversarial.channels": Rule(-math.inf, 65536),
    "adversarial.layers": Rule(-math.inf, 64),
    "autoencoder.model.latent_channels": whole(1, 65536),
    "autoencoder.model.layers_per_block": whole(1, 1000),
    "autoencoder.model.block_out_channels": whole(1, 65536, several=True),
    "autoencoder.model.norm_num_groups": whole(1, 65536),
    "autoencoder.model.patch": whole(1, 4096),
    **{f"autoencoder.loss.{name}": Rule(0) for name in ("l1", "mse", "nll", "kl")},
    "regulariser.codebook_size": whole(-(10**9), 2**24),
    "regulariser.commitment": Rule(0),
    "network.patch_size": whole(1, 4096),
    "network.hidden_dim": whole(1, 65536),
    "network.depth": whole(1, 1000),
    "network.head_dim": whole(1, 65536),
    "network.mlp_ratio": Rule(SMALLEST, 1000),
    "network.cross_attention_every": whole(1),
    "network.block_out_channels": whole(1, 65536, several=True),
    "network.layers_per_block": whole(1, 1000),
    "network.attention_levels": whole(0, 64, several=True),
    "network.norm_num_groups": whole(1, 65536),
    "schedule.num_steps": whole(1, 100_000),
    "objective.gamma": Rule(SMALLEST),
    "conditioning.drop": Rule(0, 1),
    "conditioning.guidance": Rule(-1e6, 1e6),
    "conditioning.max_tokens": whole(1, 100_000),
    "sampler.steps": whole(1, 100_000),
    "sampler.clip": Rule(SMALLEST, null=True),
    "logger.timeout_s": Rule(0),
    "logger.finish_timeout_s": Rule(0),
    "logger.max_artifact_mb": Rule(0),
}
"""By key; those that a choice of config lacks are not asked. Bounds that a constructor knows better are left to it."""
SWITCHES = (
    "overwrite",
    "data.flip",
    "data.skin_tones",
    "data.streaming",
    "trainer.compile",
    "logger.wandb",
    "logger.upload_latents",
)
TEXTS = (
    "runs_dir",
    "name",
    "vae",
    "init_from",
    "data.path",
    "data.cache_dir",
    "optimizer.decay",
    "conditioning.encoder",
)
"""Paths and names; null where there is none, and numbers as they stand."""
FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, MemoryError)
"""What constructors raise on arguments that they were not made for."""
OF_SAMPLING = {
    "num_samples": whole(1),
    "batch_size": whole(1),
    "seed": whole(0, 2**63 // 1_000_003),
    "label": whole(0, null=True),
    "guidance": Rule(-1e6, 1e6),
}


def settle(values: Any) -> None:
    """Take values of a config for what they mean, in place: 1e5 is a whole number, and an empty name none."""
    for key, rule in {**RULES, **OF_SAMPLING, "trainer.val_check_interval": Rule(SMALLEST, whole=True)}.items():
        if not rule.whole:
            continue
        for _, inside, name in _places(values, key):
            value = inside[name]
            if isinstance(value, list) and rule.several:
                inside[name] = [_whole(part) for part in value]
            elif key != "trainer.val_check_interval" or value != 1:  # 1.0 is a whole epoch
                inside[name] = _whole(value)
    if isinstance(values, dict) and values.get("name") == "":
        values["name"] = None


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() and abs(value) < 2**53 else value


def check_options(
    config: Mapping[str, Any], rules: Mapping[str, Rule] = RULES, switches: tuple[str, ...] = SWITCHES
) -> None:
    """Refuse values that are of another type, or beyond what anything could be made of.

    Raises:
        UserError: naming the key, its value and what it may be.
    """
    for key, rule in rules.items():
        for place, inside, name in _places(config, key):
            if not rule.allows(value := inside[name]):
                raise UserError(f"{place}={_shown(value)} must be {rule}.")
    for key in switches:
        for place, inside, name in _places(config, key):
            if not isinstance(value := inside[name], bool):
                raise UserError(f"{place}={_shown(value)} must be true or false.")
    for key in TEXTS:
        for place, inside, name in _places(config, key):
            value = inside[name]
            if isinstance(value, dict | list | bool) or value == "" or (value is None and key == "runs_dir"):
                raise UserError(f"{place}={_shown(value)} must be text, such as a name or a path.")


@contextmanager
def refused_options() -> Iterator[None]:
    """Of what is made from options alone, an error is one of theirs; HYDRA_FULL_ERROR=1 shows where it happened.

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


def _places(config: Any, key: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where a config holds a key: as it is named, and in what is built or read from it, which may be typed as well.

    Yields:
        The whole key, the mapping that holds it and its name there.
    """
    *groups, name = key.split(".")
    for group in (groups, [*groups, "build"], [*groups, "source"]) if groups else ([],):
        inside = config
        for part in group:
            inside = inside.get(part) if isinstance(inside, dict) else None
        if isinstance(inside, dict) and name in inside:
            yield ".".join([*group, name]), inside, name


def _shown(value: Any) -> str:
    text = str(value)
    return text[:80] + "..." * (len(text) > 80)
