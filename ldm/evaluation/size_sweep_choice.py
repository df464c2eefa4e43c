"""Which latent size of a sweep to go on with, why, and the commands that do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm import shell
from ldm.evaluation.size_sweep import Training, duration
from ldm.run import Run

LONGER, MOST_MINUTES = 10, 5999
"""The training that is proposed takes so many times the sweep's minutes, and so many at most."""


def recommend(rows: Sequence[Mapping[str, Any]], target_psnr_db: float) -> dict[str, Any]:
    """One size with its reason, and which of its runs.

    1. smallest: of the sizes with a run of `target_psnr_db` at least, the one with the fewest values per image, which
       is the easiest for stage 2; of equals the one with the highest PSNR.
    2. best: none has. The run with the highest PSNR.

    Of several runs of that size that may be chosen, the one with the lowest FD, where none has its features in its
    loss; otherwise the one with the highest PSNR.
    """
    reached = [row for row in rows if row["psnr_db"] >= target_psnr_db]
    best = max(rows, key=lambda row: row["psnr_db"])
    first = min(reached, key=lambda row: (row["num_values"], -row["psnr_db"])) if reached else best
    of_size = [row for row in rows if row["size"] == first["size"]]
    fair = all(row["fd"] is not None and not row["features_in_loss"] for row in of_size)
    allowed = [row for row in of_size if row in reached] or [first]
    chosen = min(allowed, key=lambda row: row["fd"]) if fair else max(allowed, key=lambda row: row["psnr_db"])
    what = f"{chosen['size']} ({chosen['num_values']} values per image), trained with the {chosen['loss']} loss"
    if reached:
        text = (
            f"{what}: {chosen['psnr_db']:.2f} dB on held-out images, with the fewest values of those that reach "
            f"target_psnr_db={target_psnr_db:g}. Fewer values are easier for stage 2."
        )
    else:
        text = (
            f"{what}: no size reaches target_psnr_db={target_psnr_db:g}, and this one comes closest with "
            f"{chosen['psnr_db']:.2f} dB. Try more minutes=, more channels or a smaller f."
        )
    if chosen["gain_db"] < 0:
        text += f" It is {-chosen['gain_db']:.1f} dB below a PCA of its size: its training has not paid yet."
    text += _compare_losses(of_size)
    return {"rule": "smallest" if reached else "best", "size": chosen["size"], "name": chosen["name"], "text": text}


def _compare_losses(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which loss has the lower FD, of the runs of one size; nothing where there is only one, or no FD."""
    if len(rows) < 2 or any(row["fd"] is None for row in rows):
        return ""
    low, *others = sorted(rows, key=lambda row: row["fd"])
    against = ", ".join(f"{row['fd']:.3g} with {row['loss']}" for row in others)
    text = f" Of its losses {low['loss']} has the lower FD: {low['fd']:.3g}, against {against}"
    if any(row["features_in_loss"] for row in rows):
        return f"{text}. But these features are in a loss, so this proves nothing: choose features= that no loss saw."
    return f"{text}, of one training each."


def commands(training: Training, folder: Path) -> dict[str, str]:
    """The same size trained for longer, and stage 2 on the run of the sweep."""
    spent = next(o for o in training.overrides if o.startswith("trainer.max_time="))
    hours, minutes, seconds = map(int, spent.partition("=")[2].split(":"))
    longer = f"trainer.max_time={duration(min(LONGER * (60 * hours + minutes + seconds / 60), MOST_MINUTES))}"
    overrides = [longer if override == spent else override for override in training.overrides]
    return {
        "train": shell.train("stage=vae", f"name={training.name}", *overrides),
        "next": Run.open(training.folder(folder)).next_training(),
    }
