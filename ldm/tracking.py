"""W&B behind one small face: a run that logs numbers and pictures and never asks or waits for anything."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ID_FILE = "wandb_id.txt"


def choose_mode(requested: str | None) -> str:
    """`online` only where an API key is at hand; W&B would otherwise ask for one on the terminal."""
    if requested:
        return requested
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    import wandb

    return "online" if wandb.login(prompt=False) else "offline"


class WandbRun:
    """One run in W&B, its id kept in the run folder so that a resumed run continues it."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        project: str,
        entity: str | None = None,
        name: str,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
        resume: bool = False,
    ) -> None:
        import wandb

        self._wandb = wandb
        id_file = folder / ID_FILE
        run_id = id_file.read_text().strip() if resume and id_file.is_file() else uuid.uuid4().hex[:8]
        self.mode = choose_mode(mode)
        self.run = wandb.init(
            dir=folder,
            project=project,
            entity=entity,
            name=name,
            group=group,
            tags=list(tags),
            id=run_id,
            config=flatten(config),
            mode=self.mode,  # type: ignore[arg-type]
            resume="allow" if self.mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # an axis of our own: W&B drops what comes with a smaller step than the last, as after a validation or a resume
        self.run.define_metric("*", step_metric="step")
        id_file.write_text(run_id + "\n")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log({**metrics, "step": step})

    def log_images(self, key: str, images: Sequence[Image.Image], captions: Sequence[str | None], step: int) -> None:
        """One panel of pictures with captions."""
        panel = [self._wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
        self.run.log({key: panel, "step": step})

    def summarise(self, values: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(values))

    def finish(self) -> None:
        self.run.finish()


def track_report(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str,
    values: Mapping[str, Any],
    pictures: Mapping[str, Image.Image],
) -> None:
    """A tool's figures as the summary of a W&B run of its own, with its pictures by title.

    Args:
        folder: Of the report, made where it is missing. Not the folder of a training run: that keeps the id of its own.
        config: The tool's, with its group `logger`.
        values: Those that are no number, text or truth are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {key: config["logger"][key] for key in ("project", "entity", "group", "tags", "mode")}
    tracker = WandbRun(folder, config, name=name, **options)
    tracker.summarise({key: value for key, value in values.items() if isinstance(value, int | float | str)})
    for title, picture in pictures.items():
        tracker.log_images(title, [picture], [name.rpartition("/")[2]], 0)
    tracker.finish()


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config -> `a.b.c` keys with plain values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat
