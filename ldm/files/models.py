"""Safe loading of models in the diffusers layout (config.json and safetensors) from untrusted folders."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ldm.errors import UserError
from ldm.files.untrusted import check_fields, first_line, read_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
VARIANTS = ("fp16", "bf16", "non_ema")
"""Variants of the weights that are loaded, in float32, if there are no default weights."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_LIST_LENGTH = 10_000
"""Maximum length of a list in a model's config.json. The longest legitimate lists are per-channel statistics."""
REMEDY = "Restore the original files, as written by training."


def load_model(kind: Any, folder: Path) -> Any:
    """Load a diffusers model of class `kind` from config.json and safetensors, in evaluation mode.

    A config that describes more layers or parameters than the weights next to it is rejected before the model is built.

    Raises:
        UserError: the weights are missing, pickled, damaged, not finite or for a different model. Or the config does
            not describe a model of this class, or requests quantisation.
    """
    file = folder / "config.json"
    config = read_json(file)
    if config.get("quantization_config") is not None:
        remedy = "Convert the weights to an unquantised format."
        raise UserError(f"{file} requests quantised weights (quantization_config), which are not supported. {remedy}")
    files, variant = _weight_files(folder)
    num_tensors, num_values = _count_weights(files)
    _check_config(config, num_tensors, file)
    try:
        # shapes only: allocates no memory and leaves the random state unchanged
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            num_expected = sum(value.numel() for value in kind.from_config(config).state_dict().values())
    except Exception as error:  # a constructor can raise anything when given arbitrary arguments
        raise UserError(f"{file} does not describe a valid {kind.__name__} ({first_line(error)}). {REMEDY}") from error
    if num_expected > num_values:
        shortfall = f"{num_expected} parameters, but the weights next to it contain only {num_values}"
        raise UserError(f"{file} describes {shortfall}. {REMEDY}")
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "local_files_only": True, "variant": variant}
    try:
        model, loading_info = kind.from_pretrained(folder, **options, output_loading_info=True)
    except Exception as error:  # diffusers raises OSError, RuntimeError, KeyError, ..., depending on the mismatch
        raise UserError(f"{folder}: the weights do not match the config ({first_line(error)}). {REMEDY}") from error
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(f"The weights in {folder} are incomplete. Missing: {', '.join(missing[:3])}. {REMEDY}")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            cause = "Training diverged or the file was modified."
            remedy = "Train with a lower learning rate, or restore the original file."
            raise UserError(f"The weights in {folder} are not finite ({name}). {cause} {remedy}")
    return model.eval()


def variant_name(variant: str) -> str:
    """Return the file name of a variant of the weights, as diffusers writes it."""
    return WEIGHTS.replace(".safetensors", f".{variant}.safetensors")


def _check_config(config: dict[str, Any], num_tensors: int, file: Path) -> None:
    """Reject a config with more layers than there are tensors, or with very long lists, before a model is built."""
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        too_deep = ("layers" in key or "depth" in key) and any(isinstance(v, int) and v > num_tensors for v in values)
        if too_deep or len(values) > MAX_LIST_LENGTH:
            raise UserError(f"{file}: {key}={str(value)[:40]} is too large for {num_tensors} weight tensors. {REMEDY}")


def _weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """Return the files with the weights, and the variant that they belong to, or None for the default weights."""
    for variant in (None, *VARIANTS):
        single = WEIGHTS if variant is None else variant_name(variant)
        for index in (f"{single}.index.json", f"{WEIGHTS}.index.{variant}.json"):  # depends on the version of diffusers
            if (folder / index).is_file():
                return _shards(folder / index), variant
        if (folder / single).is_file():
            return [folder / single], variant
    pickles = sorted(path.name for suffix in PICKLE_SUFFIXES for path in folder.glob(f"*{suffix}"))
    warning = f" Pickles such as {pickles[0]} can run arbitrary code and are never loaded." if pickles else ""
    raise UserError(f"{folder} has no {WEIGHTS}.{warning} Convert weights that you trust to safetensors.")


def _shards(index: Path) -> list[Path]:
    """Return the files that an index of sharded weights lists."""
    content = read_json(index)
    check_fields(content, {"weight_map": dict, "metadata": dict}, index)
    names = sorted({str(name) for name in content["weight_map"].values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            rule = "which is not a safetensors file in that folder"
            raise UserError(f"{index} lists {name[:80]!r}, {rule}. {REMEDY}")
    return [index.parent / name for name in names]


def _count_weights(files: list[Path]) -> tuple[int, int]:
    """Return the number of tensors and the number of values in safetensors files."""
    num_tensors = num_values = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                shapes = [reader.get_slice(name).get_shape() for name in reader.keys()]  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            if _starts_with(file, b"version https://git-lfs"):
                raise UserError(f"{file} is a Git LFS pointer. Download the weights with `git lfs pull`.") from error
            raise UserError(f"{file} is not a valid safetensors file ({first_line(error)}). {REMEDY}") from error
        num_tensors += len(shapes)
        num_values += sum(math.prod(shape) for shape in shapes)
    return num_tensors, num_values


def _starts_with(file: Path, prefix: bytes) -> bool:
    try:
        with file.open("rb") as content:
            return content.read(len(prefix)) == prefix
    except OSError:
        return False
