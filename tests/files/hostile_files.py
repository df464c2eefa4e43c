"""Corpus of hostile files, each with the entry point of ldm that opens it.

Run as a program, this module opens all files under an audit hook that records suspicious operations.
"""

import collections
import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import struct
import sys
import typing
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wandb  # imported here so that the audit does not record a lazy import
from safetensors.torch import load_file, save_file

import ldm.runs.provenance
import ldm.train
from ldm.cli.explain import explain
from ldm.data.images import ImageData
from ldm.data.sources.image_folder import ImageFolder
from ldm.diffusion.samplers.ddim import DDIM
from ldm.errors import UserError
from ldm.evaluation.comparison.runs import read_runs
from ldm.evaluation.features import reference_features
from ldm.evaluation.samples.cache import draw_cached
from ldm.latents.cache import LatentData
from ldm.latents.contract import LatentContract
from ldm.latents.files import decode_file
from ldm.networks.conditioning import TextCondition
from ldm.runs.load import load_autoencoder, load_pipeline
from ldm.runs.run import Run
from ldm.tracking.run import read_run_id

CANARY = "RAN"
Mutation = Callable[[Path, Path], Any]
"""A function of (folder, canary) that makes a valid folder hostile. The payload creates the canary file if it runs."""


class Payload:
    """Object that creates the canary file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@dataclass(frozen=True)
class Case:
    """One hostile file.

    Args:
        base: Name of the valid folder to copy.
        entry_point: Key in `entry_points` of the function that opens the folder.
        mutate: Makes the copy hostile.
        message: Part of the error message, or None if the file is opened as plain data and any code in it is ignored.
    """

    name: str
    base: str
    entry_point: str
    mutate: Mutation
    message: str | None


def write_bytes(file: str, content: Callable[[Path], bytes]) -> Mutation:
    """Write a file whose content can depend on the canary path."""

    def mutate(folder: Path, canary: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        (folder / file).write_bytes(content(canary))

    return mutate


def serialise(save: Callable[[Any, io.BytesIO], Any], payload: Callable[[Payload], Any]) -> Callable[[Path], bytes]:
    """Return a function that serialises a payload with `save`."""

    def content(canary: Path) -> bytes:
        buffer = io.BytesIO()
        save(payload(Payload(canary)), buffer)
        return buffer.getvalue()

    return content


def write_pickle(file: str) -> Mutation:
    return write_bytes(file, serialise(pickle.dump, lambda payload: payload))


def write_torch_pickle(file: str) -> Mutation:
    """Write a zip archive with torch.save."""
    return write_bytes(file, serialise(torch.save, lambda payload: {"state_dict": payload, "global_step": 1}))


def write_object_array(file: str) -> Mutation:
    save = lambda array, buffer: np.save(buffer, array, allow_pickle=True)  # noqa: E731
    return write_bytes(file, serialise(save, lambda payload: np.array([payload], dtype=object)))


def write_text(file: str, content: str) -> Mutation:
    """Write text, with CANARY replaced by the canary path."""
    return write_bytes(file, lambda canary: content.replace("CANARY", str(canary)).encode())


def write_npy_header(header: str) -> Mutation:
    def content(canary: Path) -> bytes:
        line = header.replace("CANARY", str(canary)).encode() + b"\n"
        return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(line)) + line + b"\0" * 64

    return write_bytes("images.npy", content)


def write_safetensors_header(header: dict[str, Any], length: int | None = None) -> Mutation:
    content = json.dumps(header).encode()
    size = struct.pack("<Q", len(content) if length is None else length)
    return write_bytes(WEIGHTS, lambda canary: size + content + b"\0" * 64)


def write_zip_bomb(file: str) -> Mutation:
    def mutate(folder: Path, canary: Path) -> None:
        with zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data", b"\0" * 20_000_000)

    return mutate


def edit_json(file: str, **values: Any) -> Mutation:
    def mutate(folder: Path, canary: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | values), encoding="utf-8")

    return mutate


def edit_settings(**values: Any) -> Mutation:
    """Edit the settings in the index of a pipeline."""

    def mutate(folder: Path, canary: Path) -> None:
        settings = json.loads((folder / INDEX).read_text(encoding="utf-8"))["settings"]
        edit_json(INDEX, settings=settings | values)(folder, canary)

    return mutate


def poison_modules(folder: Path, canary: Path) -> None:
    """Replace all code in a pipeline folder, which diffusers would run."""
    files = list((folder / "pipeline").rglob("*.py"))
    assert {file.parent.name for file in files} == {"pipeline", "network"}
    for file in files:
        file.write_text(MALICIOUS_CODE.replace("CANARY", str(canary)), encoding="utf-8")


def edit_weights(name: str, value: torch.Tensor | float) -> Mutation:
    """Overwrite the first value of a weight, or replace the weight and add a tensor, so that enough values remain."""

    def mutate(folder: Path, canary: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        if isinstance(value, float):
            tensors[name][0] = value
        else:
            tensors |= {name: value, "decoder.extra": torch.zeros(100_000)}
        if name == "decoder.renamed":
            del tensors["decoder.conv_in.weight"]
        save_file(tensors, folder / WEIGHTS)

    return mutate


def create_link(file: str, target: str) -> Mutation:
    def mutate(folder: Path, canary: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return mutate


def replace_file(file: str, *mutations: Mutation) -> Mutation:
    """Delete a file and write replacements."""

    def mutate(folder: Path, canary: Path) -> None:
        (folder / file).unlink()
        for mutate_folder in mutations:
            mutate_folder(folder, canary)

    return mutate


def combine(*mutations: Mutation) -> Mutation:
    return lambda folder, canary: [mutate(folder, canary) for mutate in mutations]


WEIGHTS = "autoencoder/diffusion_pytorch_model.safetensors"
NETWORK = "pipeline/network/diffusion_pytorch_model.safetensors"
VAE, INDEX = "autoencoder/config.json", "pipeline/model_index.json"
SHARDS = json.dumps({"metadata": {}, "weight_map": {"decoder.conv_in.weight": "part.bin"}})
OVERLAP = {name: {"dtype": "F32", "shape": [16], "data_offsets": [i, 64 + i]} for i, name in enumerate("ab")}
MALICIOUS_CODE = 'import os\nos.system("touch CANARY")\n'
INVALID_ARRAY, INVALID_SAFETENSORS = "cannot be read as an array", "is not a valid safetensors file"
HUGE = 10**9
ALIAS_PAIRS = zip("abcdefgh", "bcdefghi", strict=True)
ALIASES = "\n".join(["a: &a [x, x, x]", *(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in ALIAS_PAIRS)])
ALL_PIXELS = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 8, 8, 3), }"
AUTO_MAP = {"AutoConfig": "evil.C", "AutoModel": "evil.M"}
TEXT = {"kind": "text", "encoder": "evil", "max_tokens": 8, "encoder_sha256": None}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}

HOSTILE_FILES: dict[tuple[str, str], dict[str, tuple[Mutation, str | None]]] = {
    ("vae", "autoencoder"): {
        "weights in a pickle": (
            replace_file(WEIGHTS, write_torch_pickle("autoencoder/x.bin")),
            "has no diffusion_pytorch",
        ),
        "weights that are a pickle": (write_pickle(WEIGHTS), INVALID_SAFETENSORS),
        "weights saved with torch.save": (write_torch_pickle(WEIGHTS), INVALID_SAFETENSORS),
        "shards that are pickles": (
            replace_file(WEIGHTS, write_pickle("autoencoder/part.bin"), write_text(f"{WEIGHTS}.index.json", SHARDS)),
            "'part.bin', which is not a safetensors",
        ),
        "weights that are a zip bomb": (write_zip_bomb(WEIGHTS), INVALID_SAFETENSORS),
        "a header length of 2^60 bytes": (write_safetensors_header({}, 2**60), INVALID_SAFETENSORS),
        "overlapping offsets": (write_safetensors_header(OVERLAP), INVALID_SAFETENSORS),
        "a missing weight": (edit_weights("decoder.renamed", torch.zeros(3)), "incomplete"),
        "a wrong shape": (edit_weights("decoder.conv_in.weight", torch.zeros(3, 3, 3)), "do not match the config"),
        "weights with NaN": (edit_weights("decoder.conv_in.weight", math.nan), "are not finite"),
        "too many layers": (edit_json(VAE, layers_per_block=HUGE), "layers_per_block="),
        "too many channels": (edit_json(VAE, latent_channels=HUGE), "valid AutoencoderKL"),
        "a foreign class name": (edit_json(VAE, _class_name="os.system"), "AutoencoderKL"),
        "a class name that is a list": (edit_json(VAE, _class_name=["x"]), "AutoencoderKL"),
        "a quantised autoencoder": (edit_json(VAE, quantization_config={}), "quantised"),
        "code next to the weights": (
            combine(
                edit_json(VAE, auto_map={"AutoModel": "evil.M"}), write_text("autoencoder/evil.py", MALICIOUS_CODE)
            ),
            None,
        ),
        "statistics that are text": (edit_json("autoencoder/latents.json", latent_mean="x"), "'latent_mean'"),
    },
    ("diffusion", "pipeline"): {
        "a foreign network class": (edit_json(INDEX, network=["evil", "N"]), "unknown network N"),
        "a network class that is a number": (edit_json(INDEX, network=[1]), "'network'"),
        "poisoned modules": (poison_modules, None),
        "a first decoder in a pickle": (
            write_pickle("pipeline/vae/first_decoder.safetensors"),
            "is not a decoder of this autoencoder",
        ),
        "a text encoder with code": (
            combine(
                edit_settings(conditioning=TEXT),
                write_text(
                    "pipeline/text_encoder/config.json", json.dumps({"auto_map": AUTO_MAP, "model_type": "evil"})
                ),
                write_text("pipeline/text_encoder/evil.py", MALICIOUS_CODE),
            ),
            "could not be loaded",
        ),
        "settings that are a list": (edit_json(INDEX, settings=[1]), "has format None"),
        "a custom pipeline": (
            combine(
                edit_json(INDEX, _class_name=["pipeline", "Evil"]), write_text("pipeline/pipeline.py", MALICIOUS_CODE)
            ),
            None,
        ),
        "a deeply nested index": (write_text(INDEX, "[" * 10**5), "as JSON"),
        "an invalid schedule": (edit_settings(schedule={"name": "x"}), "alpha_bar"),
        "latents that are too large": (edit_settings(latent_shape=[HUGE] * 3), "[1000000000, 1000000000"),
        "a contract with text instead of a number": (edit_json("pipeline/contract.json", channels="3"), "'channels'"),
        "an invalid variance table": (
            write_text("pipeline/optimal_variance.json", '{"z_0_mse": "x"}'),
            "optimal_variance.json",
        ),
        "a network in a pickle": (write_pickle(NETWORK), INVALID_SAFETENSORS),
    },
    ("diffusion", "stable_diffusion"): {
        "a UNet in a pickle": (
            combine(
                edit_json(INDEX, _class_name="StableDiffusionPipeline"),
                write_text("pipeline/unet/config.json", "{}"),
                write_torch_pickle("pipeline/unet/diffusion_pytorch_model.bin"),
            ),
            "has no diffusion_pytorch",
        )
    },
    ("vae", "config"): {
        "run.json that is a list": (write_text("run.json", "[1]"), "must contain a JSON object"),
        "run.json with a 5000-digit number": (write_text("run.json", '{"format": ' + "1" * 5000 + "}"), "as JSON"),
        "a run name that is a path": (edit_json("run.json", name="../../victim"), "plain folder name"),
        "a link to another file": (create_link("evaluation.json", "/etc/hostname"), "is a link to"),
        "a link to another folder": (create_link("pipeline", "/"), "is a link to"),
        # in a saved config, the next two values are plain text
        "a _target_": (write_text("config.yaml", "network: {_target_: os.system, command: touch CANARY}"), None),
        "an interpolation": (write_text("config.yaml", "name: '${oc.create:{_target_: os.system}}'"), None),
        "a tag that runs code": (
            write_text("config.yaml", "a: !!python/object/apply:os.system ['touch CANARY']"),
            "a tag or an",
        ),
        "a tag that creates a module": (write_text("config.yaml", "a: !!python/module:os"), "a tag or an alias"),
        "a tag that OmegaConf supports": (
            write_text("config.yaml", "a: !!python/object/apply:pathlib.Path [x]"),
            "a tag or an",
        ),
        "exponential aliases": (write_text("config.yaml", ALIASES), "a tag or an alias"),
        "deeply nested YAML": (write_text("config.yaml", "[" * 5000 + "]" * 5000), "cannot be read"),
        "invalid YAML": (write_text("config.yaml", "a: [1,\nb: {"), "cannot be read"),
        "a duplicate key": (write_text("config.yaml", "a: 1\na: 2"), "cannot be read"),
        "a list as a config": (write_text("config.yaml", "[1, 2]"), "not a mapping"),
    },
    ("vae", "images"): {
        "a field with the wrong type": (edit_json("run.json", data_cache=7), "'data_cache' must be a valid string"),
        "a cache path outside the cache": (edit_json("run.json", data_cache="/etc"), "no longer in /etc"),
    },
    ("vae", "compare"): {
        "a deeply nested evaluation": (write_text("evaluation.json", '{"a":' * 10**5), "as JSON"),
        "a metrics table with text": (write_text("metrics.csv", "step,loss\nx,y\n"), "not a valid table"),
    },
    ("vae", "wandb"): {"a W&B id that is a path": (write_text("wandb_id.txt", "../../victim"), "id of a W&B run")},
    ("cache", "cache"): {
        "images that are an object array": (write_object_array("images.npy"), INVALID_ARRAY),
        "images that are a pickle": (write_pickle("images.npy"), INVALID_ARRAY),
        "images that are a zip bomb": (write_zip_bomb("images.npy"), INVALID_ARRAY),
        "an index without images": (edit_json("index.json", names=[]), "index.json lists 0 images"),
        "a header with code": (write_npy_header("__import__('os').system('touch CANARY')"), INVALID_ARRAY),
        "an unbalanced header": (write_npy_header("(" * 10**6), INVALID_ARRAY),
        "more pixels in the header than in the file": (write_npy_header(ALL_PIXELS), INVALID_ARRAY),
    },
    ("latents", "latents"): {"moments that are an object array": (write_object_array("moments.npy"), INVALID_ARRAY)},
    ("cache", "features"): {"features that are an object array": (write_object_array("features-x.npy"), INVALID_ARRAY)},
    ("vae", "decode"): {
        "latents in a pickle": (write_pickle("latents.safetensors"), "safetensors file ("),
        "latents with the wrong shape": (
            lambda folder, _: save_file(
                {"mean": torch.zeros(2, 2)}, folder / "latents.safetensors", {"format": "1", "names": "../a"}
            ),
            "must contain finite latents",
        ),
    },
    ("samples", "samples"): {
        "a sampling cost that is text": (edit_json("samples.json", cost={"samples": "x"}), "'samples' must be")
    },
    ("encoder", "encoder"): {
        "a tokenizer with code": (
            combine(
                edit_json("tokenizer_config.json", **TOKENIZER),
                edit_json("config.json", auto_map=AUTO_MAP, model_type="evil"),
                write_text("evil.py", MALICIOUS_CODE),
            ),
            "could not be loaded",
        ),
        "an encoder in a pickle": (
            replace_file("model.safetensors", write_torch_pickle("pytorch_model.bin")),
            "could not be loaded",
        ),
        "an encoder with foreign kernels": (edit_json("config.json", attn_implementation="evil/kernel"), "kernels"),
        "a quantised encoder": (edit_json("config.json", quantization_config={"a": 1}), "quantiser"),
    },
    ("photos", "photos"): {
        "captions for files outside the folder": (
            write_text("metadata.jsonl", '{"file_name": "../../../etc/passwd", "text": "x"}'),
            "which is outside ",
        ),
        "captions with absolute paths": (
            write_text("metadata.csv", "file_name,text\n/etc/passwd,x\n"),
            "which is outside ",
        ),
        "deeply nested captions": (write_text("metadata.jsonl", "[" * 10**5), "is not JSON"),
        "a caption that is a link": (create_link("000.txt", "/etc/hostname"), "is a link to"),
    },
    ("vae", "resume"): {
        "a checkpoint that is a pickle": (write_pickle("checkpoints/last.ckpt"), "resume="),
        "a checkpoint with code": (write_torch_pickle("checkpoints/step-00000010.ckpt"), "resume="),
    },
    ("vae", "rerun"): {"a config in a pickle": (write_pickle("config.pickle"), "reads a pickle")},
}
CASES = [Case(name, *key, *case) for key, cases in HOSTILE_FILES.items() for name, case in cases.items()]
"""All hostile files."""


def measure_features(folder: Path) -> None:
    images = ImageData.open(folder)
    cached = folder / "features-x.npy"
    if cached.exists():
        cached.rename(folder / f"features-x-{images.fingerprint[:8]}.npy")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    reference_features(network, "x", images)


def draw_samples(valid: Path, folder: Path) -> None:
    for file in folder.glob("samples.json"):
        file.replace(next(folder.glob("samples-*.json")))
    pipeline, images = Run.open(valid / "diffusion").pipeline(), ImageData.open(valid / "cache")
    draw_cached(pipeline, images, DDIM(2), folder, num_samples=3, guidance=1.0, seed=0)


def resume(folder: Path) -> None:
    (checkpoint,) = (folder / "checkpoints").iterdir()
    train("stage=vae", *SHORT_RUN, f"resume={checkpoint}", f"runs_dir={folder}")


def entry_points(valid: Path) -> dict[str, Callable[[Path], Any]]:
    """Return functions that open a hostile folder, using the valid folders in `valid` for everything else."""
    images, autoencoder = ImageData.open(valid / "cache"), Run.open(valid / "diffusion").pipeline().autoencoder
    return {
        "config": lambda folder: Run.open(folder).config(),
        "autoencoder": lambda folder: load_autoencoder(str(folder)),
        "pipeline": lambda folder: load_pipeline(str(folder)),
        "stable_diffusion": lambda folder: load_pipeline(str(folder / "pipeline")),
        "images": lambda folder: Run.open(folder).image_data(),
        "compare": lambda folder: read_runs([str(valid / "vae"), str(folder)]),
        "wandb": read_run_id,
        "cache": ImageData.open,
        "latents": lambda folder: LatentData(folder, LatentContract.load(folder), images),
        "features": measure_features,
        "decode": lambda folder: decode_file(autoencoder, folder / "latents.safetensors"),
        "samples": lambda folder: draw_samples(valid, folder),
        "encoder": lambda folder: TextCondition(str(folder), 8),
        "photos": lambda folder: [record.load() for record in ImageFolder(folder).records()],
        "resume": resume,
        "rerun": lambda folder: train("--experimental-rerun", str(folder)),
    }


SHORT_RUN = ["data=image_folder", "data.path=photos", "data.resolution=8", "trainer=cpu", "trainer.max_steps=1"]
SHORT_RUN += ["trainer.precision=32-true", "batch_size=4", "logger=csv", "data.cache_dir=cache"]
SHORT_RUN += ["autoencoder.model.block_out_channels=[32]", "autoencoder.model.latent_channels=4"]


def train(*arguments: str) -> None:
    """Run `python -m ldm.train` and raise a UserError with the message that it prints."""
    sys.argv[1:] = arguments
    os.environ.pop("HYDRA_FULL_ERROR", None)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            ldm.train.main()
    except SystemExit as exit_:
        if exit_.code != 2 or "Traceback" in stderr.getvalue():
            raise RuntimeError(f"exit code {exit_.code}: {stderr.getvalue()}") from exit_
        message = next(line for line in stderr.getvalue().splitlines() if line.startswith("error: "))
        raise UserError(message.removeprefix("error: ")) from exit_


WRITE_EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod")
WRITE_EVENTS += ("os.utime",)
EXECUTION_EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "subprocess.Popen",
)
EXECUTION_EVENTS += ("socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "pickle.find_class", "urllib.Request")


CODE_GENERATORS = (dataclasses.__file__, collections.__file__, typing.__file__)
"""Standard library modules that generate and execute code."""


class Audit:
    """Audit hook that records operations that are not needed to open a file, while `is_active` is True.

    The hook stays installed, because Python cannot remove audit hooks.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.events, self.is_active = root, list[str](), False
        self.trusted_folders = tuple(
            str(Path(path).resolve()) for path in {sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])}
        )
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_active:
            return
        self.is_active = False
        try:
            is_write = event in WRITE_EVENTS and any(isinstance(a, str) and self._is_outside(a) for a in arguments)
            if event in EXECUTION_EVENTS or is_write or (event == "open" and self._is_write(*arguments)):
                self.events.append(f"{event}{arguments!r}"[:300])
            elif event == "exec":
                code, caller = getattr(arguments[0], "co_filename", ""), sys._getframe(1).f_code.co_filename
                if caller in CODE_GENERATORS:
                    pass
                elif not code.startswith(("<frozen", *self.trusted_folders)) or self.root.name in code:
                    self.events.append(f"exec {code} {getattr(arguments[0], 'co_names', '')}"[:300])
        finally:
            self.is_active = True

    def _is_write(self, path: Any, mode: Any, flags: Any) -> bool:
        is_write = isinstance(mode, str) and set(mode) & set("wax+")
        is_write = is_write or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        return bool(is_write) and isinstance(path, str | bytes | os.PathLike) and self._is_outside(os.fsdecode(path))

    def _is_outside(self, path: str) -> bool:
        return path != os.devnull and not Path(path).absolute().is_relative_to(self.root)


def main(root: Path) -> None:
    """Open every hostile folder in `root` and print one line of JSON for each."""
    assert wandb
    ldm.runs.provenance._commit = lambda: None  # avoids running git
    os.chdir(root)
    openers = entry_points(root / "valid")
    for base, entry_point in dict.fromkeys((case.base, case.entry_point) for case in CASES):
        if entry_point not in ("resume", "rerun", "wandb", "compare", "decode"):
            openers[entry_point](root / "valid" / base)
    with contextlib.suppress(ValueError):
        openers["compare"](root / "valid" / "diffusion")
    audit = Audit(root)
    for number, case in enumerate(CASES):
        folder, message, kind = root / f"{number:03d}", "", "opened"
        audit.events.clear()
        audit.is_active = True
        try:
            openers[case.entry_point](folder)
        except Exception as error:
            kind, message = type(error).__name__, explain(error) or repr(error)
        audit.is_active = False
        print(json.dumps({"name": case.name, "kind": kind, "message": message, "events": audit.events}), flush=True)
    audit.events.clear()
    audit.is_active = True
    pickle.loads(pickle.dumps(Payload(root / f"{CANARY}-control")))
    audit.is_active = False
    print(json.dumps({"name": "control", "kind": "ran", "message": "", "events": audit.events}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
