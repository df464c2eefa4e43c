"""What the protections cost: steps per second of the demo's two stages with them and without, in blocks by turns.

    python tests/stress/price.py [--blocks 12] [--steps 60]

With: the guard over every step's numbers, signals looked for between the steps, checkpoints saved every
trainer.checkpoint_every_s. Without: Lightning's loop with the budget, the averaged weights and the progress bar. The
loss is that of the median step, of the blocks in pairs, with a one-sided bound at 95 % (Student's t), and a save's
share of the seconds between two. Exit code 0 only if the bound stays below 2 % in both stages.
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

LIMIT = 0.02
WARM_UP = 5


def make_plan(stage: str, folder: Path, vae: Path | None) -> Any:
    """The demo's own configuration of a stage, in steps: as its training is about to begin."""
    from ldm.train import main
    from ldm.training.fit import Fit

    plans: list[Any] = []

    def begins(fit: Fit, *_: Any) -> None:
        plans.append(replace(fit.plan, loggers=[]))
        sys.exit()

    Fit.to_the_end = begins  # type: ignore[assignment, method-assign]
    sys.argv = ["ldm.train", f"stage={stage}", f"runs_dir={folder}", "trainer=cpu", "trainer.max_time=null"]
    sys.argv += ["trainer.max_steps=1000000", "logger=csv", *([f"vae={vae}"] if vae else [])]
    with suppress(SystemExit):
        main()
    return plans[0]


def block(plan: Any, steps: int, *, protected: bool) -> float:
    """Seconds of the median step of a fit of this many."""
    from lightning.pytorch import Callback

    from ldm.training.fit import Fit

    times: list[float] = []

    class Clock(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            times.append(time.perf_counter())

    options = {**plan.options, "val_check_interval": 10**9, "max_steps": steps + WARM_UP}
    fit = Fit(replace(plan, options=options if protected else {**options, "guard": None}), None)
    if protected:
        fit.checkpoints.every_s = float("inf")  # what a save costs is counted apart
    else:
        plan.stage.module.guard = None
        fit.trainer.callbacks.remove(fit.checkpoints)
    fit.trainer.callbacks.append(Clock())
    batches, _ = fit._batches()
    fit.trainer.fit(plan.stage.module, batches)
    return statistics.median(b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False))


def price(stage: str, plan: Any, blocks: int, steps: int) -> float:
    """The upper bound of the share of speed that is lost; prints what it is made of."""
    lost = []
    for number in range(blocks):
        order = (True, False) if number % 2 else (False, True)
        seconds = {protected: block(plan, steps, protected=protected) for protected in order}
        lost.append(1 - seconds[False] / seconds[True])
        print(f"  block {number + 1}: {seconds[True]:.4f} s a step, {seconds[False]:.4f} s without", flush=True)
    mean, error = statistics.mean(lost), statistics.stdev(lost) / len(lost) ** 0.5
    from ldm.runs.checkpoints import manifests

    newest = max(manifests(plan.folder / "checkpoints"), key=lambda found: found.step)
    every_s = plan.options["checkpoint_every_s"]
    saves = newest.save_s / every_s
    bound = mean + float(stats.t.ppf(0.95, len(lost) - 1)) * error + saves
    print(
        f"stage {stage}: {mean:+.2%} +- {error:.2%} (standard error, {blocks} pairs of blocks of {steps} steps); a "
        f"checkpoint of {newest.bytes / 1e6:.1f} MB takes {newest.save_s:.2f} s, every {every_s:g} s: {saves:.2%}. "
        f"Upper bound of the loss, 95 %: {bound:.2%}",
        flush=True,
    )
    return bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12, help="pairs of blocks (12)")
    parser.add_argument("--steps", type=int, default=60, help="steps of a block (60)")
    parser.add_argument("--vae", type=Path, required=True, help="a run of stage 1: runs/vae/demo")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bounds = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("vae", "diffusion"):
            plan = make_plan(stage, Path(folder), arguments.vae if stage == "diffusion" else None)
            bounds.append(price(stage, plan, arguments.blocks, arguments.steps))
    sys.exit(0 if max(bounds) < LIMIT else 1)


if __name__ == "__main__":
    main()
