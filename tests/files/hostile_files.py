"""Files that a stranger may send: what they are, and the tool's own door that each is opened through.

Run as a program it opens them all, under an audit hook that writes down what Python was asked to do meanwhile.
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
import wandb  # what is imported at first use is imported before the watch begins
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
from ldm.evaluation.samples.kept import draw_and_keep
from ldm.latents.cache import LatentData
from ldm.latents.contract import LatentContract
from ldm.latents.files import decode_file
from ldm.networks.conditioning import TextCondition
from ldm.runs.load import load_autoencoder, load_pipeline
from ldm.runs.run import Run
from ldm.tracking.run import known_id

CANARY = "RAN"
Make = Callable[[Path, Path], Any]
"""Changes a copy of a sound folder; it is given that folder and the canary that a payload shall leave."""


class Payload:
    """Unpickled, it leaves a canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@dataclass(frozen=True)
class Case:
    """One hostile file.

    Args:
        base: Which sound folder.
        door: What opens it, one of `doors`.
        said: Part of the refusal; None where it is opened as the data that it is, and the code in it is left alone.
    """

    name: str
    base: str
    door: str
    make: Make
    said: str | None


def written(file: str, content: Callable[[Path], bytes]) -> Make:
    """A file of these bytes, which may name the canary."""

    def make(folder: Path, canary: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        (folder / file).write_bytes(content(canary))

    return make


def saved(save: Callable[[Any, io.BytesIO], Any], payload: Callable[[Payload], Any]) -> Callable[[Path], bytes]:
    """What a function writes that pickles."""

    def content(canary: Path) -> bytes:
        buffer = io.BytesIO()
        save(payload(Payload(canary)), buffer)
        return buffer.getvalue()

    return content


def pickled(file: str) -> Make:
    return written(file, saved(pickle.dump, lambda payload: payload))


def torch_pickled(file: str) -> Make:
    """As torch.save writes it, a zip."""
    return written(file, saved(torch.save, lambda payload: {"state_dict": payload, "global_step": 1}))


def objects(file: str) -> Make:
    save = lambda array, buffer: np.save(buffer, array, allow_pickle=True)  # noqa: E731
    return written(file, saved(save, lambda payload: np.array([payload], dtype=object)))


def text(file: str, content: str) -> Make:
    """A text, in which CANARY stands for the canary's path."""
    return written(file, lambda canary: content.replace("CANARY", str(canary)).encode())


def npy_header(header: str) -> Make:
    def content(canary: Path) -> bytes:
        said = header.replace("CANARY", str(canary)).encode() + b"\n"
        return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(said)) + said + b"\0" * 64

    return written("images.npy", content)


def safetensors_header(header: dict[str, Any], length: int | None = None) -> Make:
    content = json.dumps(header).encode()
    size = struct.pack("<Q", len(content) if length is None else length)
    return written(WEIGHTS, lambda canary: size + content + b"\0" * 64)


def bomb(file: str) -> Make:
    def make(folder: Path, canary: Path) -> None:
        with zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data", b"\0" * 20_000_000)

    return make


def changed(file: str, **values: Any) -> Make:
    def make(folder: Path, canary: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | values), encoding="utf-8")

    return make


def weights(name: str, value: torch.Tensor | float) -> Make:
    """A weight of the autoencoder that is another one, or named otherwise, among as many values."""

    def make(folder: Path, canary: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        if isinstance(value, float):
            tensors[name][0] = value
        else:
            tensors |= {name: value, "decoder.more": torch.zeros(100_000)}
        if name == "decoder.other":
            del tensors["decoder.conv_in.weight"]
        save_file(tensors, folder / WEIGHTS)

    return make


def link(file: str, target: str) -> Make:
    def make(folder: Path, canary: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return make


def without(file: str, *parts: Make) -> Make:
    """Other files in the place of one."""

    def make(folder: Path, canary: Path) -> None:
        (folder / file).unlink()
        for part in parts:
            part(folder, canary)

    return make


def many(*parts: Make) -> Make:
    return lambda folder, canary: [part(folder, canary) for part in parts]


WEIGHTS = "autoencoder/diffusion_pytorch_model.safetensors"
NETWORK = "pipeline/network/diffusion_pytorch_model.safetensors"
VAE, INDEX = "autoencoder/config.json", "pipeline/model_index.json"
SHARDS = json.dumps({"metadata": {}, "weight_map": {"decoder.conv_in.weight": "part.bin"}})
OVERLAP = {name: {"dtype": "F32", "shape": [16], "data_offsets": [i, 64 + i]} for i, name in enumerate("ab")}
RUNS_CODE = 'import os\nos.system("touch CANARY")\n'
NO_ARRAY, NO_TENSORS = "cannot be read as an array", "is no safetensors file"
HUGE = 10**9
NINES = zip("abcdefgh", "bcdefghi", strict=True)
ALIASES = "\n".join(["a: &a [x, x, x]", *(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in NINES)])
ALL_PIXELS = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 8, 8, 3), }"
AUTO_MAP = {"AutoConfig": "evil.C", "AutoModel": "evil.M"}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}

BY_DOOR: dict[tuple[str, str], dict[str, tuple[Make, str | None]]] = {
    ("vae", "autoencoder"): {
        "weights in a pickle": (without(WEIGHTS, torch_pickled("autoencoder/x.bin")), "holds no diffusion_pytorch"),
        "weights are a pickle": (pickled(WEIGHTS), NO_TENSORS),
        "weights are a torch zip": (torch_pickled(WEIGHTS), NO_TENSORS),
        "shards are pickles": (
            without(WEIGHTS, pickled("autoencoder/part.bin"), text(f"{WEIGHTS}.index.json", SHARDS)),
            "names 'part.bin', which is no safetensors",
        ),
        "weights are a bomb": (bomb(WEIGHTS), NO_TENSORS),
        "a header of 2^60 bytes": (safetensors_header({}, 2**60), NO_TENSORS),
        "offsets that overlap": (safetensors_header(OVERLAP), NO_TENSORS),
        "a weight is missing": (weights("decoder.other", torch.zeros(3)), "incomplete"),
        "a wrong shape": (weights("decoder.conv_in.weight", torch.zeros(3, 3, 3)), "do not fit its config"),
        "weights of NaN": (weights("decoder.conv_in.weight", math.nan), "are not finite"),
        "a tower of layers": (changed(VAE, layers_per_block=HUGE), "more than"),
        "a wall of channels": (changed(VAE, latent_channels=HUGE), "describes"),
        "a class of its own": (changed(VAE, _class_name="os.system"), "holds a"),
        "a class that is none": (changed(VAE, _class_name=["x"]), "holds a"),
        "a quantiser": (changed(VAE, quantization_config={}), "quantised"),
        "code beside the weights": (
            many(changed(VAE, auto_map={"AutoModel": "evil.M"}), text("autoencoder/evil.py", RUNS_CODE)),
            None,
        ),
        "statistics of text": (changed("autoencoder/latents.json", latent_mean="x"), "'latent_mean'"),
    },
    ("diffusion", "pipeline"): {
        "a pipeline's own class": (changed(INDEX, network="evil.N"), "evil.N"),
        "a custom pipeline": (
            many(changed(INDEX, _class_name=["pipeline", "Evil"]), text("pipeline/pipeline.py", RUNS_CODE)),
            None,
        ),
        "an index that is deep": (text(INDEX, "[" * 10**5), "as JSON"),
        "a chain of NaN": (changed(INDEX, schedule={"name": "x"}), "alpha_bar"),
        "a latent too large": (changed(INDEX, latent_shape=[HUGE] * 3), "fit"),
        "a contract of text": (changed("pipeline/contract.json", channels="3"), "'channels'"),
        "a variance table": (text("pipeline/optimal_variance.json", '{"z_0_mse": "x"}'), "again"),
        "a network in a pickle": (pickled(NETWORK), NO_TENSORS),
    },
    ("vae", "config"): {
        "a run that is a list": (text("run.json", "[1]"), "must hold a JSON object"),
        "a run of 5000 digits": (text("run.json", '{"format": ' + "1" * 5000 + "}"), "as JSON"),
        "a run's name is a path": (changed("run.json", name="../../victim"), "plain folder name"),
        "a link to another file": (link("evaluation.json", "/etc/hostname"), "is a link to"),
        "a link to another folder": (link("pipeline", "/"), "is a link to"),
        # what runs in a config that is composed is text in the record of a run
        "a _target_": (text("config.yaml", "network: {_target_: os.system, command: touch CANARY}"), None),
        "an interpolation": (text("config.yaml", "name: '${oc.create:{_target_: os.system}}'"), None),
        "a tag that runs": (text("config.yaml", "a: !!python/object/apply:os.system ['touch CANARY']"), "a tag or an"),
        "a tag that makes a module": (text("config.yaml", "a: !!python/module:os"), "a tag or an alias"),
        "a tag that OmegaConf knows": (text("config.yaml", "a: !!python/object/apply:pathlib.Path [x]"), "a tag or an"),
        "aliases that multiply": (text("config.yaml", ALIASES), "a tag or an alias"),
        "deep YAML": (text("config.yaml", "[" * 5000 + "]" * 5000), "cannot be read"),
        "no YAML": (text("config.yaml", "a: [1,\nb: {"), "cannot be read"),
        "twice the same key": (text("config.yaml", "a: 1\na: 2"), "cannot be read"),
        "a list as a config": (text("config.yaml", "[1, 2]"), "holds no keys"),
    },
    ("vae", "images"): {
        "a run's wrong types": (changed("run.json", data_cache=7), "'data_cache' must be a valid string"),
        "a run's images elsewhere": (changed("run.json", data_cache="/etc"), "no longer in /etc"),
    },
    ("vae", "compare"): {
        "an evaluation that is deep": (text("evaluation.json", '{"a":' * 10**5), "as JSON"),
        "a table of text": (text("metrics.csv", "step,loss\nx,y\n"), "no table of numbers"),
    },
    ("vae", "wandb"): {"an id that is a path": (text("wandb_id.txt", "../../victim"), "id of a W&B run")},
    ("cache", "cache"): {
        "images that are objects": (objects("images.npy"), NO_ARRAY),
        "images that are a pickle": (pickled("images.npy"), NO_ARRAY),
        "images that are an archive": (bomb("images.npy"), NO_ARRAY),
        "images of no size": (changed("index.json", names=[]), "index.json tells of 0 images"),
        "a header with code": (npy_header("__import__('os').system('touch CANARY')"), NO_ARRAY),
        "a header without end": (npy_header("(" * 10**6), NO_ARRAY),
        "more pixels than bytes": (npy_header(ALL_PIXELS), NO_ARRAY),
    },
    ("latents", "latents"): {"moments that are objects": (objects("moments.npy"), NO_ARRAY)},
    ("cache", "features"): {"features that are objects": (objects("features-x.npy"), NO_ARRAY)},
    ("vae", "decode"): {
        "latents in a pickle": (pickled("latents.safetensors"), NO_TENSORS),
        "latents of another shape": (
            lambda folder, _: save_file(
                {"mean": torch.zeros(2, 2)}, folder / "latents.safetensors", {"format": "1", "names": "../a"}
            ),
            "no finite latents",
        ),
    },
    ("kept", "kept"): {"samples that cost text": (changed("samples.json", cost={"samples": "x"}), "'samples' must be")},
    ("encoder", "encoder"): {
        "a tokenizer with code": (
            many(
                changed("tokenizer_config.json", **TOKENIZER),
                changed("config.json", auto_map=AUTO_MAP, model_type="evil"),
                text("evil.py", RUNS_CODE),
            ),
            "could not be loaded",
        ),
        "an encoder in a pickle": (
            without("model.safetensors", torch_pickled("pytorch_model.bin")),
            "could not be loaded",
        ),
        "an encoder's kernels": (changed("config.json", attn_implementation="evil/kernel"), "kernels"),
        "an encoder's quantiser": (changed("config.json", quantization_config={"a": 1}), "quantiser"),
    },
    ("pictures", "pictures"): {
        "captions for other files": (
            text("metadata.jsonl", '{"file_name": "../../../etc/passwd", "text": "x"}'),
            "outside of ",
        ),
        "captions by whole paths": (text("metadata.csv", "file_name,text\n/etc/passwd,x\n"), "outside of "),
        "captions too deep": (text("metadata.jsonl", "[" * 10**5), "is not JSON"),
        "a caption elsewhere": (link("000.txt", "/etc/hostname"), "is a link to"),
    },
    ("vae", "resume"): {
        "a checkpoint is a pickle": (pickled("checkpoints/last.ckpt"), "resume="),
        "a checkpoint with code": (torch_pickled("checkpoints/step-00000010.ckpt"), "resume="),
    },
    ("vae", "rerun"): {"a config in a pickle": (pickled("config.pickle"), "reads a pickle")},
}
CASES = [Case(name, *key, *case) for key, cases in BY_DOOR.items() for name, case in cases.items()]
"""Every hostile file, with its door."""


def measure_features(folder: Path) -> None:
    images = ImageData.open(folder)
    kept = folder / "features-x.npy"
    if kept.exists():
        kept.rename(folder / f"features-x-{images.fingerprint[:8]}.npy")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    reference_features(network, "x", images)


def draw_kept(sound: Path, folder: Path) -> None:
    for file in folder.glob("samples.json"):
        file.replace(next(folder.glob("samples-*.json")))
    pipeline, images = Run.open(sound / "diffusion").pipeline(), ImageData.open(sound / "cache")
    draw_and_keep(pipeline, images, DDIM(2), folder, num_samples=3, guidance=1.0, seed=0)


def resume(folder: Path) -> None:
    (checkpoint,) = (folder / "checkpoints").iterdir()
    train("stage=vae", *SHORT, f"resume={checkpoint}", f"runs_dir={folder}")


def doors(sound: Path) -> dict[str, Callable[[Path], Any]]:
    """The ways in, each given the hostile folder; parts that are sound lie in `sound`."""
    images, autoencoder = ImageData.open(sound / "cache"), Run.open(sound / "diffusion").pipeline().autoencoder
    return {
        "config": lambda folder: Run.open(folder).config(),
        "autoencoder": lambda folder: load_autoencoder(str(folder)),
        "pipeline": lambda folder: load_pipeline(str(folder)),
        "images": lambda folder: Run.open(folder).image_data(),
        "compare": lambda folder: read_runs([str(sound / "vae"), str(folder)]),
        "wandb": known_id,
        "cache": ImageData.open,
        "latents": lambda folder: LatentData(folder, LatentContract.load(folder), images),
        "features": measure_features,
        "decode": lambda folder: decode_file(autoencoder, folder / "latents.safetensors"),
        "kept": lambda folder: draw_kept(sound, folder),
        "encoder": lambda folder: TextCondition(str(folder), 8),
        "pictures": lambda folder: [record.load() for record in ImageFolder(folder).records()],
        "resume": resume,
        "rerun": lambda folder: train("--experimental-rerun", str(folder)),
    }


SHORT = ["data=image_folder", "data.path=pictures", "data.resolution=8", "trainer=cpu", "trainer.max_steps=1"]
SHORT += ["trainer.precision=32-true", "batch_size=4", "logger=csv", "data.cache_dir=cache"]
SHORT += ["autoencoder.model.block_out_channels=[32]", "autoencoder.model.latent_channels=4"]


def train(*arguments: str) -> None:
    """`python -m ldm.train`, whose paragraph becomes an error again."""
    sys.argv[1:] = arguments
    os.environ.pop("HYDRA_FULL_ERROR", None)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            ldm.train.main()
    except SystemExit as ended:
        if ended.code != 2 or "Traceback" in said.getvalue():
            raise RuntimeError(f"exit code {ended.code}: {said.getvalue()}") from ended
        message = next(line for line in said.getvalue().splitlines() if line.startswith("error: "))
        raise UserError(message.removeprefix("error: ")) from ended


WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod")
WRITES += ("os.utime",)
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "subprocess.Popen")
RUNS += ("socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "pickle.find_class", "urllib.Request")


MAKERS = (dataclasses.__file__, collections.__file__, typing.__file__)
"""Modules that make classes from text of their own."""


class Audit:
    """What Python was asked to do that opening a file has no need of. It cannot be taken away again."""

    def __init__(self, place: Path) -> None:
        self.place, self.seen, self.watching = place, list[str](), False
        self.ours = tuple(
            str(Path(path).resolve()) for path in {sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])}
        )
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        self.watching = False
        try:
            writes = event in WRITES and any(isinstance(a, str) and self._outside(a) for a in arguments)
            if event in RUNS or writes or (event == "open" and self._writes(*arguments)):
                self.seen.append(f"{event}{arguments!r}"[:300])
            elif event == "exec":
                code, caller = getattr(arguments[0], "co_filename", ""), sys._getframe(1).f_code.co_filename
                if caller in MAKERS:
                    pass
                elif not code.startswith(("<frozen", *self.ours)) or self.place.name in code:
                    self.seen.append(f"exec {code} {getattr(arguments[0], 'co_names', '')}"[:300])
        finally:
            self.watching = True

    def _writes(self, path: Any, mode: Any, flags: Any) -> bool:
        writes = isinstance(mode, str) and set(mode) & set("wax+")
        writes = writes or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        return bool(writes) and isinstance(path, str | bytes | os.PathLike) and self._outside(os.fsdecode(path))

    def _outside(self, path: str) -> bool:
        return path != os.devnull and not Path(path).absolute().is_relative_to(self.place)


def main(place: Path) -> None:
    """Open every hostile folder in `place`; a line of JSON each."""
    assert wandb
    ldm.runs.provenance._commit = lambda: None  # asks git, whose answer a run notes
    os.chdir(place)
    opened_by = doors(place / "sound")
    for base, door in dict.fromkeys((case.base, case.door) for case in CASES):
        if door not in ("resume", "rerun", "wandb", "compare", "decode"):
            opened_by[door](place / "sound" / base)
    with contextlib.suppress(ValueError):
        opened_by["compare"](place / "sound" / "diffusion")
    audit = Audit(place)
    for number, case in enumerate(CASES):
        folder, message, kind = place / f"{number:03d}", "", "opened"
        audit.seen.clear()
        audit.watching = True
        try:
            opened_by[case.door](folder)
        except Exception as error:
            kind, message = type(error).__name__, explain(error) or repr(error)
        audit.watching = False
        print(json.dumps({"name": case.name, "kind": kind, "message": message, "seen": audit.seen}), flush=True)
    audit.seen.clear()
    audit.watching = True
    pickle.loads(pickle.dumps(Payload(place / f"{CANARY}-control")))
    audit.watching = False
    print(json.dumps({"name": "control", "kind": "ran", "message": "", "seen": audit.seen}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
