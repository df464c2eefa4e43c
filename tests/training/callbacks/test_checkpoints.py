"""Checkpoints and manifests: atomic saves, retention, and the choice of the checkpoint to resume from."""

import errno
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from ldm.errors import UserError
from ldm.runs.checkpoints import Manifest, find_checkpoint, list_checkpoints
from ldm.runs.disk import checkpoint_bytes, require_disk_space
from ldm.runtime import signals
from ldm.training.callbacks.checkpoints import Checkpoints, StopTraining
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from tests.small_training import RecordingLogger


def callbacks(folder: Path, steps: int, *, interval_s: float = 3600, **options) -> list[Callback]:
    budget = Budget(steps, decay="constant")
    return [budget, EMACallback(0.9), Checkpoints(folder, budget, interval_s, **options)]


def saved_steps(folder: Path) -> list[int]:
    return [manifest.step for manifest in list_checkpoints(folder / "checkpoints")]


def resume_point(folder: Path, resume: bool | Path = True) -> Manifest:
    (folder / "run.json").touch()
    manifest = find_checkpoint(folder, resume, stage="")
    assert manifest is not None
    return manifest


def test_manifest_describes_the_checkpoint(fit, make_module, tmp_path):
    logger, options = RecordingLogger(), {"max_steps": 3, "accumulate_grad_batches": 2}
    fit(make_module(), callbacks(tmp_path, 3, stage="vae"), logger=logger, **options)
    (manifest,) = list_checkpoints(tmp_path / "checkpoints")
    assert (manifest.step, manifest.stage, manifest.why, manifest.sequence) == (3, "vae", "end", 1)
    assert manifest.find_damage() is None and manifest.trained_s > 0
    assert logger.metric("checkpoint/size_mb") == {2: manifest.bytes / 1e6}
    assert logger.metric("checkpoint/save_s") == {2: manifest.save_s}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000003.ckpt", "step-00000003.json"}
    assert torch.load(manifest.path, weights_only=True)["global_step"] == 3


class SendSignal(Callback):
    """Sends a signal to this process before a batch."""

    def __init__(self, batch: int, number: int) -> None:
        self.batch, self.number = batch, number

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("signal_number", signals.HANDLED_SIGNALS)
def test_signal_saves_a_checkpoint_before_the_next_step(fit, make_module, tmp_path, signal_number):
    with signals.handling(), pytest.raises(StopTraining) as excinfo:
        fit(make_module(), [*callbacks(tmp_path, 9), SendSignal(5, signal_number)], max_steps=9)
    assert excinfo.value.signal == signal_number and saved_steps(tmp_path) == [5]
    assert signals.pending() is None, "signals are cleared when the command ends"


def test_signal_stops_only_after_an_accumulated_step(fit, make_module, tmp_path):
    module = make_module()
    with signals.handling(), pytest.raises(StopTraining):
        fit(module, [*callbacks(tmp_path, 9), SendSignal(3, signal.SIGTERM)], max_steps=9, accumulate_grad_batches=2)
    assert saved_steps(tmp_path) == [2] and len(module.batches) == 4


class LogLosses(Callback):
    """Logs the given validation losses, one per validation."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = iter(losses)

    def on_validation_epoch_end(self, trainer, module) -> None:
        module.log("val/loss", next(self.losses))


def test_newest_checkpoints_and_the_best_one_are_kept(fit, make_module, tmp_path):
    losses = LogLosses([3.0, 1.0, 2.0, float("nan"), 1.5])
    options = {"max_steps": 10, "val_check_interval": 2}
    fit(make_module(), [*callbacks(tmp_path, 10, interval_s=0.0), losses], **options)
    manifests = list_checkpoints(tmp_path / "checkpoints")
    assert [(m.step, m.why, m.figure, m.best) for m in manifests] == [
        (10, "interval", 1.5, False),
        (9, "interval", None, False),
        (4, "validation", 1.0, True),
    ]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6


def test_resuming_from_an_earlier_step_discards_later_checkpoints(fit, make_module, tmp_path):
    fit(make_module(), callbacks(tmp_path, 6, interval_s=0.0, keep_last=9), max_steps=6)
    earlier = resume_point(tmp_path, tmp_path / "checkpoints/step-00000002.ckpt")
    resumed = callbacks(tmp_path, 3, keep_last=9, resume_from=earlier)
    fit(make_module(), resumed, max_steps=3, start=2, ckpt_path=str(earlier.path))
    assert saved_steps(tmp_path) == [3, 2, 1] and resume_point(tmp_path).step == 3
    assert resume_point(tmp_path).path.name == "step-00000003-1.ckpt", "checkpoints are never overwritten"


def damage(manifest: Manifest, kind: str) -> None:
    content = manifest.path.read_bytes()
    if kind == "flipped bit":
        content = content[:500] + bytes([content[500] ^ 1]) + content[501:]
    manifest.path.write_bytes({"truncated": content[:-1], "empty": b""}.get(kind, content))
    if kind == "missing":
        manifest.path.unlink()
    if kind == "manifest":
        manifest.file.write_text(manifest.file.read_text()[:50])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flipped bit", "SHA-256"),
        ("truncated", r"\d+ bytes.*\d+"),
        ("empty", r"\b0 bytes"),
        ("missing", "missing"),
        ("manifest", r"step-00000003\.json.*read"),
    ],
)
def test_resume_skips_a_damaged_checkpoint_with_a_warning(fit, make_module, tmp_path, capsys, kind, message):
    fit(make_module(), callbacks(tmp_path, 3, interval_s=0.0), max_steps=3)
    newest, previous = list_checkpoints(tmp_path / "checkpoints")
    damage(newest, kind)
    assert resume_point(tmp_path) == previous
    warning = capsys.readouterr().err
    assert warning.count("warning: ") == 1 and newest.path.stem in warning and re.search(message, warning)
    if kind != "manifest":
        with pytest.raises(UserError, match=r"resume=.*(intact|not a checkpoint)"):
            resume_point(tmp_path, newest.path)
    damage(previous, kind)
    with pytest.raises(UserError, match="no intact checkpoint.*overwrite=true"):
        resume_point(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 1, "step": "x"}', '{"format": 2}'])
def test_resume_rejects_a_checkpoint_with_an_invalid_manifest(tmp_path, content, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000001.json").write_text(content)
    with pytest.raises(UserError, match="no intact checkpoint"):
        resume_point(tmp_path)
    assert "step-00000001.json" in capsys.readouterr().err


def test_resume_rejects_checkpoints_from_a_different_stage_or_outside_a_run(fit, make_module, tmp_path):
    folder = tmp_path / "run"
    fit(make_module(), callbacks(folder, 1, stage="vae"), max_steps=1)
    (manifest,) = list_checkpoints(folder / "checkpoints")
    (folder / "run.json").touch()
    assert find_checkpoint(folder, manifest.path, stage="vae") == manifest
    with pytest.raises(UserError, match="stage=vae.*stage=diffusion"):
        find_checkpoint(folder, manifest.path, stage="diffusion")
    stray = shutil.copy(manifest.path, tmp_path / "stray.ckpt")
    for path in (stray, folder / "checkpoints/elsewhere.ckpt"):
        with pytest.raises(UserError, match=f"resume={path} .*not a checkpoint"):
            find_checkpoint(folder, path, stage="vae")
    manifest.file.unlink()
    with pytest.raises(UserError, match="has no manifest"):
        find_checkpoint(folder, manifest.path, stage="vae")


def test_resume_starts_from_scratch_if_nothing_was_saved(tmp_path, capsys):
    """A job that is killed and restarted can always pass resume=true, unless the run is from an older version."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000001.ckpt").touch()  # killed before the manifest was written
    assert find_checkpoint(tmp_path, True, stage="vae") is None
    assert "nothing has been saved in" in capsys.readouterr().err
    (tmp_path / "checkpoints/last.ckpt").touch()
    with pytest.raises(UserError, match="no intact checkpoint.*overwrite=true"):
        find_checkpoint(tmp_path, True, stage="vae")


@pytest.fixture
def fill_disk(monkeypatch):
    """fill_disk(*saves): make the given saves (counted from 1) fail with a full disk. Returns all attempts."""
    attempts: list[str] = []

    def fill_disk(*saves: int) -> list[str]:
        def fsync(descriptor: int) -> None:
            file = Path(f"/proc/self/fd/{descriptor}").readlink()
            if file.suffix == ".ckpt":
                attempts.append(file.name)
                if len(attempts) in saves:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("os.fsync", fsync)
        return attempts

    return fill_disk


def test_full_disk_does_not_stop_training(fit, make_module, tmp_path, capsys, fill_disk):
    """A failed save gives a warning, keeps earlier checkpoints, leaves no partial file and is retried later."""
    attempts = fill_disk(2, 3)
    fit(make_module(), callbacks(tmp_path, 5, interval_s=0.0, keep_last=9), max_steps=5)
    output = capsys.readouterr().out
    assert len(attempts) == 5 and saved_steps(tmp_path) == [5, 4, 1]
    assert output.count("warning: a checkpoint ") == 2 and "No space left" in output
    assert "step-00000001.ckpt is kept" in output and len(list((tmp_path / "checkpoints").iterdir())) == 6


def test_full_disk_at_the_end_raises_and_names_the_last_checkpoint(fit, make_module, tmp_path, fill_disk):
    fill_disk(3)
    with pytest.raises(UserError, match=r"No space left.*step-00000002\.ckpt.*resume=true"):
        fit(make_module(), callbacks(tmp_path, 3, interval_s=0.0), max_steps=3)
    assert saved_steps(tmp_path) == [2, 1] and not list((tmp_path / "checkpoints").glob(".partial-*"))


def test_file_size_limit_error_includes_the_reason_from_the_operating_system(fit, make_module, tmp_path, capsys):
    """The message contains the reason reported by the operating system instead of torch's error."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint.*File too large.*resume=true"):
            fit(make_module(), callbacks(tmp_path, 2, interval_s=0.0), max_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "warning: a checkpoint " in capsys.readouterr().out
    assert not list((tmp_path / "checkpoints").iterdir())


class Killed(BaseException):
    """Simulates a killed process."""


OPERATIONS = ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "open"))


@contextmanager
def kill_at(nth: int, folder: Path, monkeypatch) -> Iterator[list[str]]:
    """Simulate a kill at the nth file operation in `folder`. Yields the list of attempted operations."""
    operations: list[str] = []

    def wrap(operation, name: str):
        def wrapped(*args, **kwargs):
            file = Path(f"/proc/self/fd/{args[0]}").readlink() if name == "fsync" else args[0]
            if folder in file.parents:
                operations.append(name)
                if len(operations) >= nth:
                    raise Killed
            return operation(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, wrap(getattr(owner, name), name))
        with suppress(Killed):
            yield operations


@pytest.mark.parametrize("max_steps", [3, 4])
def test_kill_at_any_file_operation_leaves_an_intact_checkpoint(fit, make_module, tmp_path, monkeypatch, max_steps):
    """A resumed run is killed at each of its open, sync, rename and delete operations in turn."""
    steps = []
    fit(make_module(), callbacks(tmp_path / "run", 2, interval_s=0.0), max_steps=2)
    for nth in range(1, 100):
        folder = tmp_path / f"run-{nth}"
        shutil.copytree(tmp_path / "run", folder)
        resumed = callbacks(folder, max_steps, interval_s=0.0, resume_from=resume_point(folder))
        with kill_at(nth, folder, monkeypatch) as operations:
            fit(make_module(), resumed, max_steps=max_steps, start=2, ckpt_path=str(resume_point(folder).path))
        manifest = resume_point(folder)
        assert manifest.find_damage() is None
        assert torch.load(manifest.path, weights_only=True)["global_step"] == manifest.step
        steps.append(manifest.step)
        if len(operations) < nth:
            break
    assert {"fsync", "replace", "unlink", "open"} == set(operations) and nth > 15
    assert steps == sorted(steps) and steps[0] == 2 and steps[-1] == max_steps


def test_disk_space_is_checked_before_training(make_module, tmp_path, monkeypatch, fit):
    module = make_module(build=torch.optim.AdamW)
    assert checkpoint_bytes(module) == 4 * 6 * 4
    require_disk_space(tmp_path, module, 2)
    usage = type("Usage", (), {"free": 300})
    monkeypatch.setattr("ldm.runs.disk.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"4 checkpoints.*runs_dir=.*trainer\.keep_last=1"):
        require_disk_space(tmp_path / "new", module, 2)
    require_disk_space(tmp_path, module, 1)


def test_partial_files_of_a_killed_run_are_deleted(fit, make_module, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (".partial-12345678-step-00000001.ckpt", "step-00000009.ckpt"):
        (folder / name).write_bytes(b"partial")
    fit(make_module(), callbacks(tmp_path, 2), max_steps=2)
    assert {path.name for path in folder.iterdir()} == {"step-00000002.ckpt", "step-00000002.json"}
