"""Kill training at many moments, resume it, and compare what it leaves with a run that was never stopped.

    python tests/stress/kill_resume.py --kills 100                 both stages on emoji; 40 at random times, 60 between
                                                                   two file operations of a save
    python tests/stress/kill_resume.py --kills 100 --signal TERM   the same with SIGTERM, which must end with code 143

One hash of everything a stage leaves: weights for use, latents, and in the last checkpoint weights, averages, moments,
schedule and random states. Exit code 0 only if every resumed run has it.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

SHARE_AT_RANDOM = 0.4
STEPS = 8
COMMON = (
    *("name=run", "logger=csv", "trainer=cpu", "trainer.precision=32-true", "trainer.max_time=null"),
    *(f"trainer.max_steps={STEPS}", "trainer.val_check_interval=3", "data.resolution=16", "data.cache_dir=cache"),
    *("val_images=16", "batch_size=16"),
)
STAGES = {
    "vae": (
        *("stage=vae", "autoencoder.model.block_out_channels=[32]", "adversarial=hinge", "adversarial.start=2"),
        *("adversarial.ramp=2", "adversarial.layers=1"),
    ),
    "diffusion": (
        *("stage=diffusion", "vae=first/runs/vae/run", "conditioning=none", "network.block_out_channels=[32,32]"),
    ),
}
KINDS = {"checkpoints/": "checkpoint", "cache/": "shard", "autoencoder/": "export", "pipeline/": "export"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus the signal; its file operations; the seconds it took."""

    code: int
    operations: list[str]
    seconds: float
    output: str


@dataclass(frozen=True)
class Kill:
    """Where a run is stopped: after some seconds, or before its n-th file operation."""

    stage: str
    after_s: float | None = None
    operation: int | None = None
    kind: str = "random"


def start(stage: str, folder: Path, *more: str, operation: int | None = None, sent: int = 0) -> tuple[int, float]:
    """Fork a process that trains in `folder`: everything is imported already. Returns its id and when it began."""
    began = time.monotonic()
    if child := os.fork():
        return child, began
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        record(operation, sent)
        every = "trainer.checkpoint_every_s=" + ("0" if sent != signal.SIGTERM else "3600")
        sys.argv = ["ldm.train", *STAGES[stage], *COMMON, every, *more]
        from ldm.train import main

        main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def record(operation: int | None, sent: int) -> None:
    """Write down every change of a file below this folder before it happens; send a signal before one of them."""
    here, notes = str(Path.cwd()), os.open("operations.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count, synced = 0, os.fsync

    def note(what: str, path: Any) -> None:
        nonlocal count
        place = str(Path(here, os.fsdecode(path))) if isinstance(path, str | bytes | os.PathLike) else ""
        if not place.startswith(here) or place.endswith((".txt", ".lock")):
            return
        os.write(notes, f"{what} {place[len(here) + 1 :]}\n".encode())
        count += 1
        if count == operation:
            os.kill(os.getpid(), sent)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            note("write", arguments[0])
        elif event == "os.rename":
            note("rename", arguments[1])
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            note(event[3:], arguments[0])

    def fsync(descriptor: int) -> None:
        if Path("/proc/self/fd").exists():
            note("sync", Path(f"/proc/self/fd/{descriptor}").readlink())
        synced(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def wait(child: int, began: float, folder: Path) -> Ended:
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - began
    return Ended(os.waitstatus_to_exitcode(status), noted(folder), seconds, read(folder / "output.txt"))


def noted(folder: Path) -> list[str]:
    """The file operations until now."""
    return read(folder / "operations.txt").splitlines()


def read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def kind_of(operation: str) -> str | None:
    """Of which save a file operation is part."""
    return next((kind for part, kind in KINDS.items() if part in operation), None)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a nested state, with its place; clocks and counters of Lightning's own loops are left out."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            if key not in ("spent_s", "loops", "pytorch-lightning_version"):
                yield from leaves(value[key], f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from leaves(part, f"{path}/{i}")
    else:
        yield path, value


def outcome(stage: str, folder: Path) -> dict[str, str]:
    """A hash of each thing that a stage leaves."""
    run = folder / "runs" / stage / "run"
    newest = max((run / "checkpoints").glob("step-*.ckpt"))
    state = hashlib.sha256()
    for place, value in leaves(torch.load(newest, map_location="cpu", weights_only=True)):
        state.update(place.encode())
        state.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    made = {"last checkpoint": state.hexdigest()}
    weights = sorted(run.glob("*/**/*.safetensors")) + sorted(run.glob("*/**/config.json"))
    arrays = sorted((folder / "cache").glob("latents-*/*.npy"))
    assert weights, f"{run} holds no weights for use"
    for file in [*weights, *arrays]:
        made[file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return made


def new_folder(work: Path, name: str) -> Path:
    """A place of its own for one run, with the prepared images; `first` is where the reference of stage 1 is."""
    folder = work / name
    shutil.copytree(work / "images/cache", folder / "cache", ignore=shutil.ignore_patterns("latents-*"))
    (folder / "first").symlink_to(work / "never-stopped-vae")
    return folder


def plan(kills: int, references: dict[str, Ended], seed: int) -> list[Kill]:
    """40 % at random times, the rest before file operations of each kind of save, as many of each."""
    draw = random.Random(seed)
    stages = list(references)
    at_random = round(SHARE_AT_RANDOM * kills)
    planned = []
    for i in range(at_random):
        stage = stages[i % len(stages)]
        planned.append(Kill(stage, after_s=draw.uniform(0, references[stage].seconds)))
    places: dict[str, list[tuple[str, int]]] = {"checkpoint": [], "shard": [], "export": []}
    for stage, reference in references.items():
        for number, operation in enumerate(reference.operations, start=1):
            if kind := kind_of(operation):
                places[kind].append((stage, number))
    kinds = [kind for kind in places if places[kind]]
    for i in range(at_random, kills):
        kind = kinds[i % len(kinds)]
        stage, number = draw.choice(places[kind])
        planned.append(Kill(stage, operation=number, kind=kind))
    return planned


def kill_and_resume(kill: Kill, folder: Path, sent: signal.Signals) -> tuple[str, str, dict[str, str] | None]:
    """Where the kill fell, how the run ended and went on, and what it left."""
    if kill.operation is not None:
        ended = wait(*start(kill.stage, folder, operation=kill.operation, sent=sent), folder)
        count = min(kill.operation, len(ended.operations))
    else:
        child, began = start(kill.stage, folder, sent=sent)
        time.sleep(max(0.0, began + (kill.after_s or 0.0) - time.monotonic()))
        count = len(noted(folder))
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(child, sent)
        ended = wait(child, began, folder)
    last = ended.operations[count - 1] if count else "nothing written yet"
    where = f"{'' if kill.after_s is None else f'{kill.after_s:.2f} s, '}{count}: {last}"
    allowed = {-sent, 0} if sent == signal.SIGKILL else {128 + sent, 0}
    if not ended.operations:
        allowed.add(-sent)  # before anything of ours ran
    if ended.code in allowed:
        said, ended = f"ended with {ended.code}", wait(*start(kill.stage, folder, "resume=true"), folder)
        if ended.code == 0:
            return where, f"{said}, resumed", outcome(kill.stage, folder)
    print(ended.output, file=sys.stderr)
    return where, f"the last command ended with {ended.code}", None


def stress(kills: int, sent: signal.Signals, seed: int, work: Path) -> int:
    """Run it all and print the table; the number of runs that resumed to the same hash."""
    (work / "images").mkdir()
    prepared = wait(*start("vae", work / "images", "trainer.max_steps=1"), work / "images")
    assert prepared.code == 0, prepared.output  # the images are there before anything is killed
    references, expected = {}, {}
    for stage in STAGES:
        folder = new_folder(work, f"never-stopped-{stage}")
        references[stage] = wait(*start(stage, folder, sent=sent), folder)
        if references[stage].code:
            sys.exit(f"the run of stage={stage} that nobody stops ended so:\n{references[stage].output}")
        expected[stage] = outcome(stage, folder)
        counts = Counter(filter(None, map(kind_of, references[stage].operations)))
        print(
            f"stage {stage}, never stopped: {references[stage].seconds:.1f} s, {len(references[stage].operations)} "
            f"file operations ({dict(counts)}), last checkpoint {expected[stage]['last checkpoint'][:12]}",
            flush=True,
        )
    planned, same = plan(kills, references, seed), 0
    for number, kill in enumerate(planned, start=1):
        folder = new_folder(work, f"kill-{number}")
        where, ended, made = kill_and_resume(kill, folder, sent)
        if made == expected[kill.stage]:
            same, verdict = same + 1, "same hash"
        elif made is None:
            verdict = "FAILED"
        else:
            reference = expected[kill.stage]
            differing = [name for name in sorted({*made, *reference}) if made.get(name) != reference.get(name)]
            verdict = f"ANOTHER HASH: {', '.join(differing)}"
        print(f"{number:>4} {kill.stage:<10}{kill.kind:<11}{where:<88} {ended:<24} {verdict}", flush=True)
        if verdict == "same hash":
            shutil.rmtree(folder)
    print(f"{same} of {len(planned)} resumed to the same hash", flush=True)
    return same


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how often (100)")
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL", help="what is sent (KILL)")
    parser.add_argument("--seed", type=int, default=0, help="of the random times (0)")
    parser.add_argument("--folder", type=Path, help="keep the runs that failed here; default: a temporary folder")
    parser.add_argument("--data", default="openmoji", help="data= of the runs (openmoji)")
    parser.add_argument("--path", type=Path, help="data.path= of the runs, for data=image_folder")
    arguments = parser.parse_args()
    global COMMON
    COMMON += (f"data={arguments.data}", *([f"data.path={arguments.path.resolve()}"] if arguments.path else []))
    import ldm.training.session
    import ldm.training.stages.autoencoder
    import ldm.training.stages.diffusion  # noqa: F401  # what every training imports

    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.folder or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        same = stress(arguments.kills, signal.Signals[f"SIG{arguments.signal}"], arguments.seed, work)
    sys.exit(0 if same == arguments.kills else 1)


if __name__ == "__main__":
    main()
