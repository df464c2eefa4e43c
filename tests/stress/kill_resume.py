"""Kill training runs at many points, resume them, and compare their outputs with an uninterrupted run.

    python tests/stress/kill_resume.py --kills 100                 both stages on emoji: 40 kills at random times, 60
                                                                   between two file operations of a save
    python tests/stress/kill_resume.py --kills 100 --signal TERM   with SIGTERM, for which the exit code must be 143

All outputs of a stage are hashed: the exported weights, the latents, and the weights, EMA weights, optimizer moments,
schedule and random states in the last checkpoint. The exit code is 0 only if all hashes of every resumed run match.
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

RANDOM_TIME_FRACTION = 0.4
NUM_STEPS = 8
COMMON_OPTIONS = (
    *("name=run", "logger=csv", "trainer=cpu", "trainer.precision=32-true", "trainer.max_time=null"),
    *(f"trainer.max_steps={NUM_STEPS}", "trainer.val_check_interval=3", "data.resolution=16", "data.cache_dir=cache"),
    *("val_images=16", "batch_size=16"),
)
STAGE_OPTIONS = {
    "vae": (
        *("stage=vae", "autoencoder.model.block_out_channels=[32]", "adversarial=hinge", "adversarial.start=2"),
        *("adversarial.ramp=2", "adversarial.layers=1"),
    ),
    "diffusion": (
        *("stage=diffusion", "vae=first/runs/vae/run", "conditioning=none", "network.block_out_channels=[32,32]"),
    ),
}
KIND_BY_PATH = {"checkpoints/": "checkpoint", "cache/": "shard", "autoencoder/": "export", "pipeline/": "export"}
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class ProcessResult:
    """Result of a process.

    Args:
        code: Exit code, or the negative signal number.
        operations: File operations, in order.
        seconds: Duration.
        output: Standard output and standard error.
    """

    code: int
    operations: list[str]
    seconds: float
    output: str


@dataclass(frozen=True)
class Kill:
    """Point at which to kill a run: after `delay_s` seconds, or before file operation number `operation`."""

    stage: str
    delay_s: float | None = None
    operation: int | None = None
    kind: str = "random"


def start(stage: str, folder: Path, *options: str, operation: int | None = None, signum: int = 0) -> tuple[int, float]:
    """Train in `folder` in a forked process, which saves the import time. Return the process id and start time.

    Args:
        options: Additional options.
        operation: Number of the file operation before which the process sends itself `signum`; None to disable.
    """
    start_s = time.monotonic()
    if child := os.fork():
        return child, start_s
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        record_operations(operation, signum)
        interval = "trainer.checkpoint_every_s=" + ("0" if signum != signal.SIGTERM else "3600")
        sys.argv = ["ldm.train", *STAGE_OPTIONS[stage], *COMMON_OPTIONS, interval, *options]
        from ldm.train import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def record_operations(operation: int | None, signum: int) -> None:
    """Log each file operation in the current folder before it happens. Send `signum` before number `operation`."""
    root, log = str(Path.cwd()), os.open("operations.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count, original_fsync = 0, os.fsync

    def record_operation(action: str, path: Any) -> None:
        nonlocal count
        file = str(Path(root, os.fsdecode(path))) if isinstance(path, str | bytes | os.PathLike) else ""
        if not file.startswith(root) or file.endswith((".txt", ".lock")):
            return
        os.write(log, f"{action} {file[len(root) + 1 :]}\n".encode())
        count += 1
        if count == operation:
            os.kill(os.getpid(), signum)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITE_FLAGS:
            record_operation("write", arguments[0])
        elif event == "os.rename":
            record_operation("rename", arguments[1])
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            record_operation(event[3:], arguments[0])

    def fsync(descriptor: int) -> None:
        if Path("/proc/self/fd").exists():
            record_operation("sync", Path(f"/proc/self/fd/{descriptor}").readlink())
        original_fsync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def wait(child: int, start_s: float, folder: Path) -> ProcessResult:
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - start_s
    return ProcessResult(
        os.waitstatus_to_exitcode(status), read_operations(folder), seconds, read(folder / "output.txt")
    )


def read_operations(folder: Path) -> list[str]:
    """Return the file operations logged so far."""
    return read(folder / "operations.txt").splitlines()


def read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def save_kind(operation: str) -> str | None:
    """Return the kind of save that a file operation belongs to, if any."""
    return next((kind for part, kind in KIND_BY_PATH.items() if part in operation), None)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a nested state with its path, excluding clocks and Lightning's loop counters."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            if key not in ("spent_s", "loops", "pytorch-lightning_version"):
                yield from leaves(value[key], f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, element in enumerate(value):
            yield from leaves(element, f"{path}/{i}")
    else:
        yield path, value


def hash_outputs(stage: str, folder: Path) -> dict[str, str]:
    """Return the hash of each output of a stage."""
    run = folder / "runs" / stage / "run"
    newest = max((run / "checkpoints").glob("step-*.ckpt"))
    state = hashlib.sha256()
    for path, value in leaves(torch.load(newest, map_location="cpu", weights_only=True)):
        state.update(path.encode())
        state.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    hashes = {"last checkpoint": state.hexdigest()}
    weights = sorted(run.glob("*/**/*.safetensors")) + sorted(run.glob("*/**/config.json"))
    arrays = sorted((folder / "cache").glob("latents-*/*.npy"))
    assert weights, f"{run} has no exported weights"
    for file in [*weights, *arrays]:
        hashes[file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashes


def make_folder(work: Path, name: str) -> Path:
    """Create a folder for a run, with the prepared images and a link `first` to the uninterrupted stage-1 run."""
    folder = work / name
    shutil.copytree(work / "images/cache", folder / "cache", ignore=shutil.ignore_patterns("latents-*"))
    (folder / "first").symlink_to(work / "uninterrupted-vae")
    return folder


def plan_kills(num_kills: int, references: dict[str, ProcessResult], seed: int) -> list[Kill]:
    """Plan 40% of the kills at random times, and the rest before file operations, balanced over the kinds of save.

    Args:
        references: Uninterrupted runs by stage.
    """
    rng = random.Random(seed)
    stages = list(references)
    num_random = round(RANDOM_TIME_FRACTION * num_kills)
    kills = []
    for i in range(num_random):
        stage = stages[i % len(stages)]
        kills.append(Kill(stage, delay_s=rng.uniform(0, references[stage].seconds)))
    operations: dict[str, list[tuple[str, int]]] = {"checkpoint": [], "shard": [], "export": []}
    for stage, reference in references.items():
        for number, operation in enumerate(reference.operations, start=1):
            if kind := save_kind(operation):
                operations[kind].append((stage, number))
    kinds = [kind for kind in operations if operations[kind]]
    for i in range(num_random, num_kills):
        kind = kinds[i % len(kinds)]
        stage, number = rng.choice(operations[kind])
        kills.append(Kill(stage, operation=number, kind=kind))
    return kills


def kill_and_resume(kill: Kill, folder: Path, signum: signal.Signals) -> tuple[str, str, dict[str, str] | None]:
    """Kill and resume a run. Return the point of the kill, the outcome, and the output hashes (None on failure)."""
    if kill.operation is not None:
        result = wait(*start(kill.stage, folder, operation=kill.operation, signum=signum), folder)
        count = min(kill.operation, len(result.operations))
    else:
        child, start_s = start(kill.stage, folder, signum=signum)
        time.sleep(max(0.0, start_s + (kill.delay_s or 0.0) - time.monotonic()))
        count = len(read_operations(folder))
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(child, signum)
        result = wait(child, start_s, folder)
    last_operation = result.operations[count - 1] if count else "nothing written yet"
    point = f"{'' if kill.delay_s is None else f'{kill.delay_s:.2f} s, '}{count}: {last_operation}"
    allowed_codes = {-signum, 0} if signum == signal.SIGKILL else {128 + signum, 0}
    if not result.operations:
        allowed_codes.add(-signum)  # killed before our signal handlers were installed
    if result.code in allowed_codes:
        status, result = f"exit code {result.code}", wait(*start(kill.stage, folder, "resume=true"), folder)
        if result.code == 0:
            return point, f"{status}, resumed", hash_outputs(kill.stage, folder)
    print(result.output, file=sys.stderr)
    return point, f"failed with exit code {result.code}", None


def stress(num_kills: int, signum: signal.Signals, seed: int, work: Path) -> int:
    """Kill and resume all runs, print a table, and return the number of runs with the same hash as without a kill."""
    (work / "images").mkdir()
    preparation = wait(*start("vae", work / "images", "trainer.max_steps=1"), work / "images")
    assert preparation.code == 0, preparation.output  # all runs share the images prepared by this one
    references, expected_hashes = {}, {}
    for stage in STAGE_OPTIONS:
        folder = make_folder(work, f"uninterrupted-{stage}")
        references[stage] = wait(*start(stage, folder, signum=signum), folder)
        if references[stage].code:
            sys.exit(f"The uninterrupted run of stage={stage} failed:\n{references[stage].output}")
        expected_hashes[stage] = hash_outputs(stage, folder)
        counts = Counter(filter(None, map(save_kind, references[stage].operations)))
        print(
            f"stage {stage}, uninterrupted: {references[stage].seconds:.1f} s, {len(references[stage].operations)} "
            f"file operations ({dict(counts)}), last checkpoint {expected_hashes[stage]['last checkpoint'][:12]}",
            flush=True,
        )
    kills, num_matching = plan_kills(num_kills, references, seed), 0
    for number, kill in enumerate(kills, start=1):
        folder = make_folder(work, f"kill-{number}")
        point, status, hashes = kill_and_resume(kill, folder, signum)
        if hashes == expected_hashes[kill.stage]:
            num_matching, verdict = num_matching + 1, "same hash"
        elif hashes is None:
            verdict = "FAILED"
        else:
            reference = expected_hashes[kill.stage]
            mismatches = [name for name in sorted({*hashes, *reference}) if hashes.get(name) != reference.get(name)]
            verdict = f"DIFFERENT HASH: {', '.join(mismatches)}"
        print(f"{number:>4} {kill.stage:<10}{kill.kind:<11}{point:<88} {status:<24} {verdict}", flush=True)
        if verdict == "same hash":
            shutil.rmtree(folder)
    print(f"{num_matching} of {len(kills)} resumed to the same hash", flush=True)
    return num_matching


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: 100)")
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL", help="signal to send (default: KILL)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the random kills (default: 0)")
    parser.add_argument("--folder", type=Path, help="folder that keeps failed runs (default: a temporary folder)")
    parser.add_argument("--data", default="openmoji", help="data= option for the runs (default: openmoji)")
    parser.add_argument("--path", type=Path, help="data.path= option for the runs, with data=image_folder")
    arguments = parser.parse_args()
    global COMMON_OPTIONS
    COMMON_OPTIONS += (f"data={arguments.data}", *([f"data.path={arguments.path.resolve()}"] if arguments.path else []))
    import ldm.training.session
    import ldm.training.stages.autoencoder
    import ldm.training.stages.diffusion  # noqa: F401  # import before forking, to save time in each run

    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.folder or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        num_matching = stress(arguments.kills, signal.Signals[f"SIG{arguments.signal}"], arguments.seed, work)
    sys.exit(0 if num_matching == arguments.kills else 1)


if __name__ == "__main__":
    main()
