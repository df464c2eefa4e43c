"""Which constructors a config may name, and the YAML that it may be written in.

A `_target_` runs what it names, found through any module: `ldm.cli.main.os.system` is a name in ldm. So names are
compared whole with a table, and a config that did not come from conf/ or the command line may hold nothing else
that runs, opens or fetches something: no YAML tags, no resolvers, none of Hydra's own settings.

Your own classes: `_target_=package.Class` on the command line is your word and is taken as it is; in a file of yours
the class is named in LDM_TRUST as well, whole, several with commas between them.

What was checked is what is made: `construct` takes plain values, in which nothing is interpolated any more.
"""

import functools
import os
import pkgutil
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from ldm.errors import UserError
from ldm.files.untrusted import first_line

TRUST = "LDM_TRUST"
SAMPLER = "ldm.diffusion.sampler.Sampler"
SAMPLERS = {
    "ddim": "ldm.diffusion.samplers.ddim.DDIM",
    "ddpm": "ldm.diffusion.samplers.ddpm.DDPM",
    "dpmpp": "ldm.diffusion.samplers.multistep.DPMSolver",
    "unipc": "ldm.diffusion.samplers.multistep.UniPC",
}
"""What SAMPLER, the one class of earlier versions, was by its `method`."""
KNOWN = frozenset(
    {
        "diffusers.AutoencoderKL",
        "diffusers.VQModel",
        "ldm.autoencoder.losses.AutoencoderLoss",
        "ldm.autoencoder.perceptual.Perceptual",
        "ldm.autoencoder.patch.PatchAutoencoderKL",
        "ldm.autoencoder.regularisers.KL",
        "ldm.autoencoder.regularisers.Unregularised",
        "ldm.autoencoder.regularisers.VectorQuantised",
        "ldm.data.sources.fashion_mnist.FashionMNIST",
        "ldm.data.sources.huggingface.HuggingFace",
        "ldm.data.sources.image_folder.ImageFolder",
        "ldm.data.sources.openmoji.OpenMoji",
        "ldm.diffusion.continuous.ode.ODESampler",
        "ldm.diffusion.objective.Objective",
        *SAMPLERS.values(),
        "ldm.diffusion.schedule.cosine",
        "ldm.diffusion.schedule.linear",
        "ldm.diffusion.schedule.rectified_flow",
        "ldm.diffusion.schedule.scaled_linear",
        "ldm.diffusion.continuous.sde.SDESampler",
        "ldm.autoencoder.perceptual.EfficientNetLiteDistance",
        "ldm.autoencoder.perceptual.LPIPS",
        "ldm.networks.dit.DiT",
        "ldm.networks.unet.unet",
        "ldm.runs.load.find_autoencoder",
        "ldm.training.modules.adversary.Adversary",
        "ldm.training.stages.diffusion.DiffusionStage",
        "ldm.networks.conditioning.class_condition",
        "ldm.networks.conditioning.no_condition",
        "ldm.networks.conditioning.text_condition",
        "ldm.training.optim.muon.MuonAdamW",
        "ldm.training.stages.autoencoder.VAEStage",
        "lightning.Trainer",
        *(
            f"torch.optim.{name}"
            for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD")
        ),
    }
)
"""Every constructor that conf/ names, and torch's optimizers. None takes a callable, a module or code by its name."""

MOVED = {
    "ldm.autoencoder.loss.AutoencoderLoss": "ldm.autoencoder.losses.AutoencoderLoss",
    "ldm.autoencoder.loss.Perceptual": "ldm.autoencoder.perceptual.Perceptual",
    "ldm.autoencoder.regulariser.KL": "ldm.autoencoder.regularisers.KL",
    "ldm.autoencoder.regulariser.Unregularised": "ldm.autoencoder.regularisers.Unregularised",
    "ldm.autoencoder.regulariser.VectorQuantised": "ldm.autoencoder.regularisers.VectorQuantised",
    "ldm.data.fashion_mnist.FashionMNIST": "ldm.data.sources.fashion_mnist.FashionMNIST",
    "ldm.data.huggingface.HuggingFace": "ldm.data.sources.huggingface.HuggingFace",
    "ldm.data.image_folder.ImageFolder": "ldm.data.sources.image_folder.ImageFolder",
    "ldm.data.openmoji.OpenMoji": "ldm.data.sources.openmoji.OpenMoji",
    "ldm.diffusion.ode.ODESampler": "ldm.diffusion.continuous.ode.ODESampler",
    "ldm.diffusion.sde.SDESampler": "ldm.diffusion.continuous.sde.SDESampler",
    "ldm.features.EfficientNetLiteDistance": "ldm.autoencoder.perceptual.EfficientNetLiteDistance",
    "ldm.features.LPIPS": "ldm.autoencoder.perceptual.LPIPS",
    "ldm.run.find_autoencoder": "ldm.runs.load.find_autoencoder",
    "ldm.training.adversary.Adversary": "ldm.training.modules.adversary.Adversary",
    "ldm.training.diffusion.Objective": "ldm.diffusion.objective.Objective",
    "ldm.training.diffusion_stage.DiffusionStage": "ldm.training.stages.diffusion.DiffusionStage",
    "ldm.training.diffusion_stage.class_condition": "ldm.networks.conditioning.class_condition",
    "ldm.training.diffusion_stage.no_condition": "ldm.networks.conditioning.no_condition",
    "ldm.training.diffusion_stage.text_condition": "ldm.networks.conditioning.text_condition",
    "ldm.training.modules.diffusion.Objective": "ldm.diffusion.objective.Objective",
    "ldm.training.muon.MuonAdamW": "ldm.training.optim.muon.MuonAdamW",
    "ldm.training.vae_stage.VAEStage": "ldm.training.stages.autoencoder.VAEStage",
}
"""Names that constructors had in earlier versions, in whose runs and configs they still stand."""
MOST_SIGNS = 4_000_000
DEEPEST = 64
_REFERENCE = re.compile(r"\$\{[\w.\[\]]*\}|\$\{oc\.select:[\w.,\s]*\}")
"""Interpolations that only repeat another value of the same config: one, and nothing beside it."""
_LOGGING_OFF = ("override hydra/job_logging", "override hydra/hydra_logging")


def check_config(config: Any, source: str, *, typed: Sequence[str] = (), interpolations: str = "none") -> None:
    """Refuse a config that names a constructor which is neither in the table, nor trusted, nor `typed` by the user.

    Args:
        config: Plain values.
        source: The file, or what else the values came from, for the message.
        typed: Arguments of the command line.
        interpolations: `none` of them, `references` as whole values to other values, or `any`.

    Raises:
        UserError: naming the source, the key, the value and the remedy.
    """
    for key, value in _values(config):
        name = key.rpartition(".")[2]
        if name == "_target_" and not _is_allowed(value, typed):
            raise UserError(
                f"{source}: {key}={_shown(value)} is none of the constructors that a config may name, and would "
                "run when it is used. If it is a class of your own, name it on the command line, or say that you "
                f"trust it: {TRUST}=package.module.Class. If the file is not yours, do not use it."
            )
        if interpolations == "any" or "${" not in f"{key}{value}":
            continue
        if interpolations == "none" or "${" in key or not _REFERENCE.fullmatch(value):
            raise UserError(
                f"{source}: {_shown(key)}={_shown(value)} is an interpolation, which reads or makes something else "
                "than the value that stands there. Write the value itself."
            )


def check_yaml(text: str, source: str, *, interpolations: str = "none") -> Any:
    """Refuse a YAML file that is more than plain values, or whose values `check_config` refuses.

    Returns:
        Its values, every scalar as the text that stands there.

    Raises:
        UserError: no YAML, tags, anchors, too large, too deep.
    """
    remedy = "If the file is not yours, do not use it."
    if len(text) > MOST_SIGNS:
        raise UserError(f"{source} has {len(text)} signs, more than a config has. {remedy}")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1
            if (tag := getattr(event, "tag", None)) is not None:
                raise UserError(f"{source}, line {line}: the tag {tag[:80]} makes an object, and is not read. {remedy}")
            if (anchor := getattr(event, "anchor", None)) is not None:
                raise UserError(
                    f"{source}, line {line}: the anchor or alias {anchor[:80]} is not read here. Write the values out."
                )
            if depth > DEEPEST:
                raise UserError(f"{source}, line {line}: values lie more than {DEEPEST} levels deep. {remedy}")
        content = yaml.load(text, Loader=yaml.BaseLoader)  # makes nothing but text, lists and mappings
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML ({first_line(error)}). Put back the file as it was written.") from error
    check_config(content, source, interpolations=interpolations)
    return content


def with_current_targets(config: Any) -> Any:
    """Plain values in which each `_target_` has its present name."""
    if isinstance(config, list):
        return [with_current_targets(part) for part in config]
    if not isinstance(config, dict):
        return config
    current = {
        key: MOVED.get(value, value) if key == "_target_" and isinstance(value, str) else with_current_targets(value)
        for key, value in config.items()
    }
    if current.get("_target_") == SAMPLER and (method := str(current.get("method"))) in SAMPLERS:
        unused = {"method", "eta", "variance"} - {"ddim": {"eta"}, "ddpm": {"variance"}}.get(method, set())
        current = {key: value for key, value in current.items() if key not in unused} | {"_target_": SAMPLERS[method]}
    return current


def check_composed_file(text: str, source: str, group: str, package: str | None) -> None:
    """Refuse a file outside conf/ that Hydra is about to compose, unless it holds plain values and our choices.

    Args:
        group: Its path among the config groups.
        package: Where its header puts it.

    Raises:
        UserError: as `check_yaml`, or what sets Hydra itself, which acts before any config can be checked, or lets go
            of a run that is there.
    """
    content = check_yaml(text, source, interpolations="references")
    values = content if isinstance(content, dict) else {}
    choices = values.get("defaults") or []
    chosen = [
        key if value is None else f"{key}: {value}"
        for entry in (choices if isinstance(choices, list) else [choices])
        for key, value in (entry.items() if isinstance(entry, dict) else [(entry, None)])
        if key not in _LOGGING_OFF
    ]
    sets_hydra = [key for key in values if str(key).partition(".")[0] == "hydra"]
    sets_hydra += [choice for choice in chosen if "hydra" in str(choice)]
    # a header may say _global_.hydra, or _group_ and _name_: parts of the path
    if sets_hydra or "hydra" in str(package or "") or re.search(r"(^|[/.])hydra($|[/.])", group):
        what = sets_hydra[0] if sets_hydra else package or group
        raise UserError(
            f"{source} sets Hydra itself ({str(what)[:80]}), which can run what it names before anything is checked. "
            "Give such settings on the command line."
        )
    overwrite = values.get("overwrite", "")
    if not isinstance(overwrite, str) or overwrite.lower() not in ("", "false", "no", "off", "null", "~"):
        raise UserError(f"{source}: overwrite={_shown(overwrite)} deletes a run. Give it on the command line.")


def construct_values(value: Any, **options: Any) -> Any:
    """What the `_target_`s in plain values make, from the inside out; `options` go to the outermost.

    As Hydra's instantiate, with _partial_, _args_ and _recursive_; it resolves interpolations once more, and would so
    make live what `check_config` saw as text.

    Raises:
        UserError: a constructor is not there, or refuses its arguments.
    """
    if isinstance(value, list):
        return [construct_values(part) for part in value]
    if not isinstance(value, dict):
        return value
    recursive = value.get("_recursive_", True)
    made = {key: construct_values(part) if recursive else part for key, part in value.items()} | options
    if "_target_" not in value:
        return made
    target, positional, partial = made.pop("_target_"), made.pop("_args_", []), made.pop("_partial_", False)
    for key in ("_recursive_", "_convert_"):
        made.pop(key, None)
    try:
        constructor = pkgutil.resolve_name(target)
        return functools.partial(constructor, *positional, **made) if partial else constructor(*positional, **made)
    except (UserError, OSError):  # which say themselves what is to be done
        raise
    except Exception as error:
        raise UserError(f"{target}: {first_line(error)}. --help lists the choices and the keys.") from error


def _is_allowed(target: Any, typed: Sequence[str]) -> bool:
    if not isinstance(target, str):
        return False
    trusted = [name.strip() for name in os.environ.get(TRUST, "").split(",") if name.strip()]
    if target == SAMPLER or MOVED.get(target, target) in KNOWN or target in trusted:
        return True
    whole = re.compile(rf"(?<![\w.]){re.escape(target)}(?![\w.])") if target else None
    return whole is not None and any("_target_" in argument and whole.search(argument) for argument in typed)


def _values(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its full key; that of a `_target_` whatever it is."""
    parts = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else None
    if parts is None:
        yield key, config
        return
    for name, part in parts:
        full = f"{key}.{name}" if key else str(name)
        if name == "_target_" and not isinstance(part, str):
            yield full, part
        yield from _values(part, full)


def _shown(value: Any) -> str:
    text = str(value)
    return text[:100] + "..." * (len(text) > 100)
