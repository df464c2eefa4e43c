"""Models in diffusers' layout, out of a folder that a stranger may have written: config.json and safetensors."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ldm.errors import UserError
from ldm.files.untrusted import check_fields, first_line, read_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
LONGEST_LIST = 10_000
"""In a model's config.json; per-channel statistics are the longest that any has."""
REMEDY = "Put back the files that belong together, as training wrote them."


def load_model(kind: Any, folder: Path) -> Any:
    """A diffusers model of a class that the caller chose, from config.json and safetensors; in evaluation mode.

    The config is believed no further than the weights beside it go: a model of more layers or values than they hold is
    refused before it is built.

    Raises:
        UserError: weights that are missing, pickled, damaged, of another model, or not finite; a config that fits no
            model of this class, or asks for a quantiser.
    """
    file = folder / "config.json"
    config = read_json(file)
    if config.get("quantization_config") is not None:
        raise UserError(f"{file} asks for quantised weights (quantization_config), which are not read. Convert them.")
    num_tensors, num_values = _count(_weight_files(folder))
    _check_config(config, num_tensors, file)
    try:
        # shapes alone: neither memory nor random numbers are taken
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            described = sum(value.numel() for value in kind.from_config(config).state_dict().values())
    except Exception as error:  # a constructor that is given anything raises anything
        raise UserError(f"{file} describes no {kind.__name__} ({first_line(error)}). {REMEDY}") from error
    if described > num_values:
        raise UserError(f"{file} describes {described} values, but the weights beside it hold {num_values}. {REMEDY}")
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "local_files_only": True}
    try:
        model, found = kind.from_pretrained(folder, **options, output_loading_info=True)
    except Exception as error:  # diffusers raises OSError, RuntimeError, KeyError, ... by what does not fit
        raise UserError(f"The weights in {folder} do not fit its config ({first_line(error)}). {REMEDY}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"The weights in {folder} are incomplete: {', '.join(missing[:3])} missing. {REMEDY}")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            remedy = "Training diverged, or the file was changed: train with a lower learning rate, or put it back."
            raise UserError(f"The weights in {folder} are not finite ({name}). {remedy}")
    return model.eval()


def _check_config(config: dict[str, Any], num_tensors: int, file: Path) -> None:
    """Refuse a config with more layers than there are tensors, or with endless lists, before a model is built."""
    for key, value in config.items():
        parts = value if isinstance(value, list) else [value]
        deep = ("layers" in key or "depth" in key) and any(isinstance(p, int) and p > num_tensors for p in parts)
        if deep or len(parts) > LONGEST_LIST:
            held = f"the {num_tensors} tensors of the weights beside it"
            raise UserError(f"{file}: {key}={str(value)[:40]} is more than {held} can be of. {REMEDY}")


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / INDEX, folder / WEIGHTS
    if index.is_file():
        content = read_json(index)
        check_fields(content, {"weight_map": dict, "metadata": dict}, index)
        names = sorted({str(name) for name in content["weight_map"].values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
                raise UserError(f"{index} names {name[:80]!r}, which is no safetensors file in that folder. {REMEDY}")
        return [folder / name for name in names]
    if not single.is_file():
        pickled = "Pickled weights (.bin, .pt, .ckpt) can run code, and are never read. Convert those that you trust."
        raise UserError(f"{folder} holds no {WEIGHTS}. {pickled}")
    return [single]


def _count(files: list[Path]) -> tuple[int, int]:
    """Tensors and values in safetensors files."""
    num_tensors = num_values = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                shapes = [reader.get_slice(name).get_shape() for name in reader.keys()]  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is no safetensors file ({first_line(error)}). {REMEDY}") from error
        num_tensors += len(shapes)
        num_values += sum(math.prod(shape) for shape in shapes)
    return num_tensors, num_values
