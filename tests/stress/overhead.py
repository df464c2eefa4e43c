"""Measure the overhead of fault tolerance: time per step with and without it, for both stages of the demo.

    python tests/stress/overhead.py --vae runs/vae/demo [--blocks 12] [--steps 60]

With fault tolerance, the guard checks every step, signals are checked between steps, and checkpoints are saved every
trainer.checkpoint_every_s. Without it, Lightning's loop runs with only the budget, EMA weights and the progress bar.
Blocks of steps alternate between the two. The overhead is the mean relative difference of the median step times over
all pairs of blocks, with a one-sided 95% bound (Student's t), plus the fraction of time spent on saving. The exit code
is 0 only if the bound is below 2% in both stages.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MAX_OVERHEAD = 0.02
NUM_WARM_UP = 5
"""Steps before the first timed one."""


def make_spec(stage: str, folder: Path, vae: Path | None) -> Any:
    """Return the specification of the demo's training run for a stage, with a step budget. Does not train."""
    from ldm.train import main
    from ldm.training.fit import Fit

    specs: list[Any] = []

    def capture_spec(fit: Fit, *_: Any) -> None:
        specs.append(replace(fit.spec, loggers=[]))
        sys.exit()

    Fit.run_to_completion = capture_spec  # type: ignore[assignment, method-assign]
    sys.argv = ["ldm.train", f"stage={stage}", f"runs_dir={folder}", "trainer=cpu", "trainer.max_time=null"]
    sys.argv += ["trainer.max_steps=1000000", "logger=csv", *([f"vae={vae}"] if vae else [])]
    with suppress(SystemExit):
        main()
    return specs[0]


def median_step_s(spec: Any, steps: int, *, is_protected: bool) -> float:
    """Train for `steps` steps after a warm-up, and return the median time per step in seconds."""
    from lightning.pytorch import Callback

    from ldm.training.fit import Fit

    times: list[float] = []

    class Clock(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            times.append(time.perf_counter())

    options = {**spec.options, "val_check_interval": 10**9, "max_steps": steps + NUM_WARM_UP}
    fit = Fit(replace(spec, options=options if is_protected else {**options, "guard": None}), None)
    if is_protected:
        fit.checkpoints.interval_s = float("inf")  # the cost of saving is added separately
    else:
        spec.stage.module.guard = None
        fit.trainer.callbacks.remove(fit.checkpoints)
    fit.trainer.callbacks.append(Clock())
    batches, _ = fit._batches()
    fit.trainer.fit(spec.stage.module, batches)
    return statistics.median(b - a for a, b in zip(times[NUM_WARM_UP:], times[NUM_WARM_UP + 1 :], strict=False))


def measure_overhead(stage: str, spec: Any, blocks: int, steps: int) -> float:
    """Print the components of the relative overhead, and return its upper bound."""
    overheads = []
    for number in range(blocks):
        order = (True, False) if number % 2 else (False, True)
        seconds = {is_protected: median_step_s(spec, steps, is_protected=is_protected) for is_protected in order}
        overheads.append(1 - seconds[False] / seconds[True])
        print(
            f"  block {number + 1}: {seconds[True]:.4f} s per step with it, {seconds[False]:.4f} s without", flush=True
        )
    mean, standard_error = statistics.mean(overheads), statistics.stdev(overheads) / len(overheads) ** 0.5
    from ldm.runs.checkpoints import list_checkpoints

    newest = max(list_checkpoints(spec.folder / "checkpoints"), key=lambda manifest: manifest.step)
    interval_s = spec.options["checkpoint_every_s"]
    saving_overhead = newest.save_s / interval_s
    bound = mean + float(stats.t.ppf(0.95, len(overheads) - 1)) * standard_error + saving_overhead
    print(
        f"stage {stage}: overhead {mean:+.2%} ± {standard_error:.2%} (standard error, {blocks} pairs of blocks of "
        f"{steps} steps). Saving a checkpoint of {newest.bytes / 1e6:.1f} MB takes {newest.save_s:.2f} s every "
        f"{interval_s:g} s, which adds {saving_overhead:.2%}. Upper bound on the total at 95%: {bound:.2%}",
        flush=True,
    )
    return bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12, help="number of pairs of blocks (default: 12)")
    parser.add_argument("--steps", type=int, default=60, help="steps per block (default: 60)")
    parser.add_argument("--vae", type=Path, required=True, help="stage-1 run, such as runs/vae/demo")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bounds = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("vae", "diffusion"):
            spec = make_spec(stage, Path(folder), arguments.vae if stage == "diffusion" else None)
            bounds.append(measure_overhead(stage, spec, arguments.blocks, arguments.steps))
    sys.exit(0 if max(bounds) < MAX_OVERHEAD else 1)


if __name__ == "__main__":
    main()
