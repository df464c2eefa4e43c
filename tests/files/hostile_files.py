"""Files that a stranger may send: what they are, and the tool's own door that each is opened through.

Run as a program it opens them all, under an audit hook that writes down what Python was asked to do meanwhile.
"""

import collections
import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
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
from safetensors.torch import load_file, save_file

CANARY = "RAN"
WEIGHTS = "diffusion_pytorch_model.safetensors"


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
        make: Changes a copy of a sound folder; it is given that folder and the canary that a payload shall leave.
        base: Which sound folder.
        door: What opens it, a function below.
        said: Part of the refusal; None where it is opened as the data that it is, and the code in it is left alone.
    """

    name: str
    base: str
    door: str
    make: Callable[[Path, Path], Any]
    said: str | None


def pickled(file: str) -> Callable[[Path, Path], Any]:
    def make(folder: Path, canary: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        (folder / file).write_bytes(pickle.dumps(Payload(canary)))

    return make


def torch_pickled(file: str) -> Callable[[Path, Path], Any]:
    """As torch.save writes it, a zip."""

    def make(folder: Path, canary: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        torch.save({"state_dict": Payload(canary), "global_step": 1}, folder / file)

    return make


def objects(file: str) -> Callable[[Path, Path], Any]:
    def make(folder: Path, canary: Path) -> None:
        np.save(folder / file, np.array([Payload(canary)], dtype=object), allow_pickle=True)

    return make


def text(file: str, content: str) -> Callable[[Path, Path], Any]:
    """A text, in which CANARY stands for the canary's path."""

    def make(folder: Path, canary: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        (folder / file).write_text(content.replace("CANARY", str(canary)), encoding="utf-8")

    return make


def binary(file: str, content: bytes) -> Callable[[Path, Path], Any]:
    return lambda folder, canary: (folder / file).write_bytes(content)


def changed(file: str, **values: Any) -> Callable[[Path, Path], Any]:
    def make(folder: Path, canary: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | values), encoding="utf-8")

    return make


def weights(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, Path], Any]:
    def make(folder: Path, canary: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return make


def safetensors_header(header: dict[str, Any] | None, length: int | None = None) -> bytes:
    content = json.dumps(header or {}).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + b"\0" * 64


def link(file: str, target: str) -> Callable[[Path, Path], Any]:
    def make(folder: Path, canary: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return make


def npy_header(file: str, header: str) -> Callable[[Path, Path], Any]:
    def make(folder: Path, canary: Path) -> None:
        said = header.replace("CANARY", str(canary)).encode("latin1") + b"\n"
        (folder / file).write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(said)) + said + b"\0" * 64)

    return make


def bomb(file: str) -> Callable[[Path, Path], Any]:
    def make(folder: Path, canary: Path) -> None:
        with zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data", b"\0" * 20_000_000)

    return make


def many(*parts: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
    return lambda folder, canary: [part(folder, canary) for part in parts]


def pickled_shards(folder: Path, canary: Path) -> None:
    (folder / "autoencoder" / WEIGHTS).unlink()
    pickled("autoencoder/part.bin")(folder, canary)
    index = {"metadata": {}, "weight_map": {"decoder.conv_in.weight": "part.bin"}}
    (folder / f"autoencoder/{WEIGHTS}.index.json").write_text(json.dumps(index))


def without_weights(file: str) -> Callable[[Path, Path], Any]:
    def make(folder: Path, canary: Path) -> None:
        shutil.move(folder / "autoencoder" / WEIGHTS, folder / "elsewhere.safetensors")
        torch_pickled(file)(folder, canary)

    return make


def missing_weight(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["decoder.conv_in.weight"]
    tensors["decoder.more"] = torch.zeros(100_000)


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["decoder.conv_in.weight"][0] = torch.nan


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["decoder.conv_in.weight"] = torch.zeros(3, 3, 3)
    tensors["decoder.more"] = torch.zeros(100_000)


RUNS_CODE = 'import os\nos.system("touch CANARY")\n'
INERT = {
    "_target_": "network: {_target_: os.system, command: touch CANARY}",
    "an interpolation": "name: '${oc.create:{_target_: os.system}}'",
}
"""What runs in a config that is composed, and is text in the record of a run."""
YAML = {
    "a tag that runs": (
        "a: !!python/object/apply:os.system ['touch CANARY']",
        "a tag or an alias",
    ),
    "a tag that makes a module": ("a: !!python/module:os", "a tag or an alias"),
    "a tag that OmegaConf knows": ("a: !!python/object/apply:pathlib.Path [x]", "a tag or an alias"),
    "aliases that multiply": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "\n".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "a tag or an alias",
    ),
    "deep": ("[" * 5000 + "]" * 5000, "cannot be read"),
    "no YAML": ("a: [1,\nb: {", "cannot be read"),
    "twice the same key": ("a: 1\na: 2", "cannot be read"),
    "a list": ("[1, 2]", "holds no keys"),
}
HUGE = 10**9

CASES = [
    Case(
        "weights in a pickle", "vae", "autoencoder", without_weights("autoencoder/x.bin"), "holds no diffusion_pytorch"
    ),
    Case("weights are a pickle", "vae", "autoencoder", pickled(f"autoencoder/{WEIGHTS}"), "is no safetensors file"),
    Case("weights are a torch zip", "vae", "autoencoder", torch_pickled(f"autoencoder/{WEIGHTS}"), "is no safetensors"),
    Case("shards are pickles", "vae", "autoencoder", pickled_shards, "names 'part.bin', which is no safetensors"),
    Case("weights are a bomb", "vae", "autoencoder", bomb(f"autoencoder/{WEIGHTS}"), "is no safetensors file"),
    Case(
        "a header of 2^60 bytes",
        "vae",
        "autoencoder",
        binary(f"autoencoder/{WEIGHTS}", safetensors_header({}, 2**60)),
        "is no safetensors file",
    ),
    Case(
        "offsets that overlap",
        "vae",
        "autoencoder",
        binary(
            f"autoencoder/{WEIGHTS}",
            safetensors_header(
                {k: {"dtype": "F32", "shape": [16], "data_offsets": [i, 64 + i]} for i, k in enumerate("ab")}
            ),
        ),
        "is no safetensors file",
    ),
    Case("a weight is missing", "vae", "autoencoder", weights(f"autoencoder/{WEIGHTS}", missing_weight), "incomplete"),
    Case(
        "a wrong shape", "vae", "autoencoder", weights(f"autoencoder/{WEIGHTS}", wrong_shape), "do not fit its config"
    ),
    Case("weights of NaN", "vae", "autoencoder", weights(f"autoencoder/{WEIGHTS}", not_finite), "are not finite"),
    Case(
        "a tower of layers",
        "vae",
        "autoencoder",
        changed("autoencoder/config.json", layers_per_block=HUGE),
        "more than",
    ),
    Case(
        "a wall of channels",
        "vae",
        "autoencoder",
        changed("autoencoder/config.json", latent_channels=HUGE),
        "describes",
    ),
    Case(
        "a class of its own",
        "vae",
        "autoencoder",
        changed("autoencoder/config.json", _class_name="os.system"),
        "holds a",
    ),
    Case(
        "a class that is none", "vae", "autoencoder", changed("autoencoder/config.json", _class_name=["x"]), "holds a"
    ),
    Case("a quantiser", "vae", "autoencoder", changed("autoencoder/config.json", quantization_config={}), "quantised"),
    Case(
        "code beside the weights",
        "vae",
        "autoencoder",
        many(
            changed("autoencoder/config.json", auto_map={"AutoModel": "evil.M"}), text("autoencoder/evil.py", RUNS_CODE)
        ),
        None,
    ),
    Case(
        "statistics of text",
        "vae",
        "autoencoder",
        changed("autoencoder/latents.json", latent_mean="x"),
        "'latent_mean'",
    ),
    Case(
        "a pipeline's own class",
        "diffusion",
        "pipeline",
        changed("pipeline/model_index.json", network="evil.N"),
        "evil.N",
    ),
    Case(
        "a custom pipeline",
        "diffusion",
        "pipeline",
        many(
            changed("pipeline/model_index.json", _class_name=["pipeline", "Evil"]),
            text("pipeline/pipeline.py", RUNS_CODE),
        ),
        None,
    ),
    Case("an index that is deep", "diffusion", "pipeline", text("pipeline/model_index.json", "[" * 10**5), "as JSON"),
    Case(
        "a chain of NaN",
        "diffusion",
        "pipeline",
        changed("pipeline/model_index.json", schedule={"name": "x"}),
        "alpha_bar",
    ),
    Case(
        "a latent too large",
        "diffusion",
        "pipeline",
        changed("pipeline/model_index.json", latent_shape=[HUGE] * 3),
        "fit",
    ),
    Case("a contract of text", "diffusion", "pipeline", changed("pipeline/contract.json", channels="3"), "'channels'"),
    Case(
        "a variance table", "diffusion", "pipeline", text("pipeline/optimal_variance.json", '{"z_0_mse": "x"}'), "again"
    ),
    Case("a network in a pickle", "diffusion", "pipeline", pickled(f"pipeline/network/{WEIGHTS}"), "is no safetensors"),
    Case("a run that is a list", "vae", "config", text("run.json", "[1]"), "must hold a JSON object"),
    Case("a run of 5000 digits", "vae", "config", text("run.json", '{"format": ' + "1" * 5000 + "}"), "as JSON"),
    Case(
        "a run's wrong types", "vae", "images", changed("run.json", data_cache=7), "'data_cache' must be a valid string"
    ),
    Case("a run's name is a path", "vae", "config", changed("run.json", name="../../victim"), "plain folder name"),
    Case("a run's images elsewhere", "vae", "images", changed("run.json", data_cache="/etc"), "no longer in /etc"),
    Case("a link to another file", "vae", "config", link("evaluation.json", "/etc/hostname"), "is a link to"),
    Case("a link to another folder", "vae", "config", link("pipeline", "/"), "is a link to"),
    Case("an evaluation that is deep", "vae", "compare", text("evaluation.json", '{"a":' * 10**5), "as JSON"),
    Case("a table of text", "vae", "compare", text("metrics.csv", "step,loss\nx,y\n"), "no table of numbers"),
    Case("an id that is a path", "vae", "wandb", text("wandb_id.txt", "../../victim"), "id of a W&B run"),
    Case("images that are objects", "cache", "cache", objects("images.npy"), "cannot be read as an array"),
    Case("images that are a pickle", "cache", "cache", pickled("images.npy"), "cannot be read as an array"),
    Case("images that are an archive", "cache", "cache", bomb("images.npy"), "is an archive"),
    Case("images of no size", "cache", "cache", changed("index.json", names=[]), "index.json tells of 0 images"),
    Case(
        "a header with code",
        "cache",
        "cache",
        npy_header("images.npy", "__import__('os').system('touch CANARY')"),
        "cannot be read as an array",
    ),
    Case("a header without end", "cache", "cache", npy_header("images.npy", "(" * 10**6), "cannot be read as an array"),
    Case(
        "more pixels than bytes",
        "cache",
        "cache",
        npy_header("images.npy", "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 8, 8, 3), }"),
        "cannot be read as an array",
    ),
    Case("moments that are objects", "latents", "latents", objects("moments.npy"), "cannot be read as an array"),
    Case("features that are objects", "cache", "features", objects("features-x.npy"), "cannot be read as an array"),
    Case("latents in a pickle", "vae", "decode", pickled("latents.safetensors"), "is no safetensors file"),
    Case(
        "latents of another shape",
        "vae",
        "decode",
        lambda folder, _: save_file(
            {"mean": torch.zeros(2, 2)}, folder / "latents.safetensors", {"format": "1", "names": "../a"}
        ),
        "no finite latents",
    ),
    Case("samples that cost text", "kept", "kept", changed("samples.json", cost={"samples": "x"}), "'samples' must be"),
    Case(
        "a tokenizer with code",
        "encoder",
        "encoder",
        many(
            changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T"),
            changed("config.json", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"}, model_type="evil"),
            text("evil.py", RUNS_CODE),
        ),
        "could not be loaded",
    ),
    Case(
        "an encoder in a pickle",
        "encoder",
        "encoder",
        lambda folder, canary: [
            (folder / "model.safetensors").unlink(),
            torch_pickled("pytorch_model.bin")(folder, canary),
        ],
        "could not be loaded",
    ),
    Case(
        "an encoder's kernels",
        "encoder",
        "encoder",
        changed("config.json", attn_implementation="evil/kernel"),
        "kernels",
    ),
    Case(
        "an encoder's quantiser",
        "encoder",
        "encoder",
        changed("config.json", quantization_config={"a": 1}),
        "quantiser",
    ),
    Case(
        "captions for other files",
        "pictures",
        "pictures",
        text("metadata.jsonl", '{"file_name": "../../../etc/passwd", "text": "x"}'),
        "outside of ",
    ),
    Case(
        "captions by whole paths",
        "pictures",
        "pictures",
        text("metadata.csv", "file_name,text\n/etc/passwd,x\n"),
        "outside of ",
    ),
    Case("captions too deep", "pictures", "pictures", text("metadata.jsonl", "[" * 10**5), "is not JSON"),
    Case("a caption elsewhere", "pictures", "pictures", link("000.txt", "/etc/hostname"), "is a link to"),
    Case("a checkpoint is a pickle", "vae", "resume", pickled("checkpoints/last.ckpt"), "resume="),
    Case("a checkpoint with code", "vae", "resume", torch_pickled("checkpoints/step-00000010.ckpt"), "resume="),
    Case("a config in a pickle", "vae", "rerun", pickled("config.pickle"), "reads a pickle"),
    *(Case(f"config: {name}", "vae", "config", text("config.yaml", made), None) for name, made in INERT.items()),
    *(Case(f"config: {name}", "vae", "config", text("config.yaml", made), said) for name, (made, said) in YAML.items()),
]
"""Every hostile file, with its door."""


class Doors:
    """The ways in, each given the hostile folder; parts that are sound lie in `sound`."""

    def __init__(self, sound: Path) -> None:
        from ldm.runs.run import Run

        self.sound = sound
        self.parts = Run.open(sound / "diffusion").pipeline()

    def config(self, folder: Path) -> None:
        from ldm.runs.run import Run

        Run.open(folder).config()

    def autoencoder(self, folder: Path) -> None:
        from ldm.runs.load import load_autoencoder

        load_autoencoder(str(folder))

    def pipeline(self, folder: Path) -> None:
        from ldm.runs.load import load_pipeline

        load_pipeline(str(folder))

    def images(self, folder: Path) -> None:
        from ldm.runs.run import Run

        Run.open(folder).image_data()

    def compare(self, folder: Path) -> None:
        from ldm.evaluation.comparison.runs import read_runs

        read_runs([str(self.sound / "vae"), str(folder)])

    def wandb(self, folder: Path) -> None:
        from ldm.tracking.run import known_id

        known_id(folder)

    def cache(self, folder: Path) -> None:
        from ldm.data.images import ImageData

        ImageData.open(folder)

    def latents(self, folder: Path) -> None:
        from ldm.data.images import ImageData
        from ldm.latents.cache import LatentData
        from ldm.latents.contract import LatentContract

        LatentData(folder, LatentContract.load(folder), ImageData.open(self.sound / "cache"))

    def features(self, folder: Path) -> None:
        from ldm.data.images import ImageData
        from ldm.evaluation.features import reference_features

        images = ImageData.open(folder)
        kept = folder / "features-x.npy"
        if kept.exists():
            kept.rename(folder / f"features-x-{images.fingerprint[:8]}.npy")
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
        reference_features(network, "x", images)

    def decode(self, folder: Path) -> None:
        from ldm.latents.files import decode_file

        decode_file(self.parts.autoencoder, folder / "latents.safetensors")

    def kept(self, folder: Path) -> None:
        from ldm.data.images import ImageData
        from ldm.diffusion.samplers.ddim import DDIM
        from ldm.evaluation.samples.kept import draw_and_keep

        images = ImageData.open(self.sound / "cache")
        for file in folder.glob("samples.json"):
            file.replace(next(folder.glob("samples-*.json")))
        draw_and_keep(self.parts, images, DDIM(2), folder, num_samples=3, guidance=1.0, seed=0)

    def encoder(self, folder: Path) -> None:
        from ldm.networks.conditioning import TextCondition

        TextCondition(str(folder), 8)

    def pictures(self, folder: Path) -> None:
        from ldm.data.sources.image_folder import ImageFolder

        for record in ImageFolder(folder).records():
            record.load()

    def resume(self, folder: Path) -> None:
        (checkpoint,) = (folder / "checkpoints").iterdir()
        train("stage=vae", *SHORT, f"resume={checkpoint}", f"runs_dir={folder}")

    def rerun(self, folder: Path) -> None:
        train("--experimental-rerun", str(folder))


SHORT = ["data=image_folder", "data.path=pictures", "data.resolution=8", "trainer=cpu", "trainer.max_steps=1"]
SHORT += ["trainer.precision=32-true", "batch_size=4", "logger=csv", "data.cache_dir=cache"]
SHORT += ["autoencoder.model.block_out_channels=[32]", "autoencoder.model.latent_channels=4"]


def train(*arguments: str) -> None:
    """`python -m ldm.train`, whose paragraph becomes an error again."""
    import ldm.train
    from ldm.errors import UserError

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


WRITES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.utime",
)
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
    import wandb  # what is imported at first use is imported before the watch begins

    import ldm.runs.provenance
    from ldm.cli.explain import explain

    assert wandb
    ldm.runs.provenance._commit = lambda: None  # asks git, whose answer a run notes
    os.chdir(place)
    doors = Doors(place / "sound")
    for base, door in dict.fromkeys((case.base, case.door) for case in CASES):
        if door not in ("resume", "rerun", "wandb", "compare", "decode"):
            getattr(doors, door)(place / "sound" / base)
    with contextlib.suppress(ValueError):
        doors.compare(place / "sound" / "diffusion")
    audit = Audit(place)
    for number, case in enumerate(CASES):
        folder, message, kind = place / f"{number:03d}", "", "opened"
        audit.seen.clear()
        audit.watching = True
        try:
            getattr(doors, case.door)(folder)
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
