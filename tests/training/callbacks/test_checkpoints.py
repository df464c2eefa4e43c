"""checkpoints and manifest: what is saved is whole, what is kept, and which one is gone on from."""

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from ldm.errors import UserError
from ldm.runs.checkpoints import Manifest, find_checkpoint, manifests
from ldm.runs.disk import checkpoint_bytes, require_room
from ldm.runtime import signals
from ldm.training.callbacks.checkpoints import Checkpoints, StopTraining
from ldm.training.optim.budget import Budget
from ldm.training.optim.ema import EMACallback
from tests.small_training import Rows


def callbacks(folder: Path, steps: int, *, every_s: float = 3600, **options) -> list[Callback]:
    budget = Budget(steps, decay="constant")
    return [budget, EMACallback(0.9), Checkpoints(folder, budget, every_s, **options)]


def steps_in(folder: Path) -> list[int]:
    return [manifest.step for manifest in manifests(folder / "checkpoints")]


def found(folder: Path, resume: bool | Path = True) -> Manifest:
    (folder / "run.json").touch()
    manifest = find_checkpoint(folder, resume, stage="")
    assert manifest is not None
    return manifest


def test_a_manifest_says_what_was_saved(fit, make_module, tmp_path):
    rows, options = Rows(), {"max_steps": 3, "accumulate_grad_batches": 2}
    fit(make_module(), callbacks(tmp_path, 3, stage="vae"), logger=rows, **options)
    (manifest,) = manifests(tmp_path / "checkpoints")
    assert (manifest.step, manifest.stage, manifest.why, manifest.sequence) == (3, "vae", "end", 1)
    assert manifest.fault() is None and manifest.trained_s > 0
    assert rows.of("checkpoint/size_mb") == {2: manifest.bytes / 1e6}
    assert rows.of("checkpoint/save_s") == {2: manifest.save_s}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000003.ckpt", "step-00000003.json"}
    assert torch.load(manifest.path, weights_only=True)["global_step"] == 3


class Sends(Callback):
    """A signal before a batch."""

    def __init__(self, batch: int, number: int) -> None:
        self.batch, self.number = batch, number

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", signals.HANDLED)
def test_a_signal_saves_before_the_next_step(fit, make_module, tmp_path, number):
    with signals.handled(), pytest.raises(StopTraining) as stopped:
        fit(make_module(), [*callbacks(tmp_path, 9), Sends(5, number)], max_steps=9)
    assert stopped.value.signal == number and steps_in(tmp_path) == [5]
    assert signals.pending() is None, "forgotten with the command"


def test_a_step_that_accumulates_is_finished_first(fit, make_module, tmp_path):
    module = make_module()
    with signals.handled(), pytest.raises(StopTraining):
        fit(module, [*callbacks(tmp_path, 9), Sends(3, signal.SIGTERM)], max_steps=9, accumulate_grad_batches=2)
    assert steps_in(tmp_path) == [2] and len(module.seen) == 4


class Judged(Callback):
    """A validation figure of one's own at each validation."""

    def __init__(self, figures: list[float]) -> None:
        self.figures = iter(figures)

    def on_validation_epoch_end(self, trainer, module) -> None:
        module.log("val/loss", next(self.figures))


def test_the_last_ones_and_the_best_are_kept(fit, make_module, tmp_path):
    judged = Judged([3.0, 1.0, 2.0, float("nan"), 1.5])
    options = {"max_steps": 10, "val_check_interval": 2}
    saves = callbacks(tmp_path, 10, every_s=0.0)
    fit(make_module(), [*saves, judged], **options)
    kept = manifests(tmp_path / "checkpoints")
    assert [(m.step, m.why, m.figure, m.best) for m in kept] == [
        (10, "interval", 1.5, False),
        (9, "interval", None, False),
        (4, "validation", 1.0, True),
    ]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6


def test_what_was_saved_after_the_point_that_a_run_goes_back_to_is_no_longer_the_newest(fit, make_module, tmp_path):
    fit(make_module(), callbacks(tmp_path, 6, every_s=0.0, keep_last=9), max_steps=6)
    old = found(tmp_path, tmp_path / "checkpoints/step-00000002.ckpt")
    again = callbacks(tmp_path, 3, keep_last=9, resumed=old)
    fit(make_module(), again, max_steps=3, start=2, ckpt_path=str(old.path))
    assert steps_in(tmp_path) == [3, 2, 1] and found(tmp_path).step == 3
    assert found(tmp_path).path.name == "step-00000003-1.ckpt", "no file takes the place of another"


def damage(manifest: Manifest, how: str) -> None:
    content = manifest.path.read_bytes()
    if how == "a bit":
        content = content[:500] + bytes([content[500] ^ 1]) + content[501:]
    manifest.path.write_bytes({"cut": content[:-1], "empty": b""}.get(how, content))
    if how == "gone":
        manifest.path.unlink()
    if how == "manifest":
        manifest.file.write_text(manifest.file.read_text()[:50])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a bit", "its SHA-256 is"),
        ("cut", "bytes, and was saved with"),
        ("empty", "it has 0 bytes"),
        ("gone", "the file is missing"),
        ("manifest", "step-00000003.json cannot be read"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_it_used(fit, make_module, tmp_path, capsys, how, said):
    fit(make_module(), callbacks(tmp_path, 3, every_s=0.0), max_steps=3)
    newest, before = manifests(tmp_path / "checkpoints")
    damage(newest, how)
    assert found(tmp_path) == before
    warning = capsys.readouterr().err
    assert warning.count("warning: ") == 1 and newest.path.stem in warning and said in warning
    if how != "manifest":
        with pytest.raises(UserError, match="resume=true for the newest whole one|there is no such checkpoint"):
            found(tmp_path, newest.path)
    damage(before, how)
    with pytest.raises(UserError, match="none of the checkpoints in .* is whole. Start anew with overwrite=true"):
        found(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 1, "step": "x"}', '{"format": 2}'])
def test_a_manifest_that_is_none_is_no_checkpoint(tmp_path, content, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000001.json").write_text(content)
    with pytest.raises(UserError, match="none of the checkpoints"):
        found(tmp_path)
    assert "step-00000001.json" in capsys.readouterr().err


def test_only_what_training_left_in_a_run_is_resumed(fit, make_module, tmp_path):
    folder = tmp_path / "run"
    fit(make_module(), callbacks(folder, 1, stage="vae"), max_steps=1)
    (manifest,) = manifests(folder / "checkpoints")
    (folder / "run.json").touch()
    assert find_checkpoint(folder, manifest.path, stage="vae") == manifest
    with pytest.raises(UserError, match="is of stage=vae, and this is stage=diffusion"):
        find_checkpoint(folder, manifest.path, stage="diffusion")
    stray = shutil.copy(manifest.path, tmp_path / "stray.ckpt")
    for path in (stray, folder / "checkpoints/elsewhere.ckpt"):
        with pytest.raises(UserError, match=f"resume={path}: there is no such checkpoint in the checkpoints folder"):
            find_checkpoint(folder, path, stage="vae")
    manifest.file.unlink()
    with pytest.raises(UserError, match="has no manifest"):
        find_checkpoint(folder, manifest.path, stage="vae")


def test_resume_begins_where_nothing_was_saved(tmp_path, capsys):
    """So that a job that is killed and started again and again may always say it; not where an earlier version did."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000001.ckpt").touch()  # a kill came before its manifest
    assert find_checkpoint(tmp_path, True, stage="vae") is None
    assert "nothing was saved in" in capsys.readouterr().err
    (tmp_path / "checkpoints/last.ckpt").touch()
    with pytest.raises(UserError, match="none of the checkpoints in .*overwrite=true"):
        find_checkpoint(tmp_path, True, stage="vae")


@pytest.fixture
def full(monkeypatch):
    """full(*saves): those of them, counted from 1, find no room when they are synced."""
    counted: list[str] = []

    def full(*saves: int) -> list[str]:
        def fsync(descriptor: int) -> None:
            file = Path(f"/proc/self/fd/{descriptor}").readlink()
            if file.suffix == ".ckpt":
                counted.append(file.name)
                if len(counted) in saves:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("os.fsync", fsync)
        return counted

    return full


def test_a_full_disk_ends_no_training(fit, make_module, tmp_path, capsys, full):
    """It is said, what was saved stays, nothing half is left, and the next save is tried."""
    tried = full(2, 3)
    fit(make_module(), callbacks(tmp_path, 5, every_s=0.0, keep_last=9), max_steps=5)
    said = capsys.readouterr().out
    assert len(tried) == 5 and steps_in(tmp_path) == [5, 4, 1]
    assert said.count("warning: a checkpoint cannot be saved") == 2 and "No space left" in said
    assert "step-00000001.ckpt is kept" in said and len(list((tmp_path / "checkpoints").iterdir())) == 6


def test_a_full_disk_at_the_end_is_said_with_what_is_kept(fit, make_module, tmp_path, full):
    full(3)
    with pytest.raises(UserError, match="step-00000002.ckpt is kept. Make room.*resume=true"):
        fit(make_module(), callbacks(tmp_path, 3, every_s=0.0), max_steps=3)
    assert steps_in(tmp_path) == [2, 1] and not list((tmp_path / "checkpoints").glob(".partial-*"))


def test_a_limit_of_the_systems_own(fit, make_module, tmp_path, capsys):
    """A file that must not grow so large: the reason is the system's, not torch's."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(UserError, match=r"\(File too large\); nothing was saved before"):
            fit(make_module(), callbacks(tmp_path, 2, every_s=0.0), max_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "warning: a checkpoint cannot be saved" in capsys.readouterr().out
    assert not list((tmp_path / "checkpoints").iterdir())


class Killed(BaseException):
    """What a kill looks like from inside: nothing is done any more."""


OPERATIONS = ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "open"))


@contextmanager
def killed_at(nth: int, folder: Path, monkeypatch) -> Iterator[list[str]]:
    """The nth file operation in `folder` is not done, nor is any after it; yields the operations."""
    done: list[str] = []

    def wrap(operation, name: str):
        def counted(*args, **kwargs):
            file = Path(f"/proc/self/fd/{args[0]}").readlink() if name == "fsync" else args[0]
            if folder in file.parents:
                done.append(name)
                if len(done) >= nth:
                    raise Killed
            return operation(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, wrap(getattr(owner, name), name))
        with suppress(Killed):
            yield done


@pytest.mark.parametrize("last", [3, 4])
def test_a_kill_between_any_two_file_operations_leaves_a_whole_one(fit, make_module, tmp_path, monkeypatch, last):
    """A run that goes on from one of its checkpoints: each opening, sync, rename and deletion is the last in turn."""
    steps = []
    fit(make_module(), callbacks(tmp_path / "run", 2, every_s=0.0), max_steps=2)
    for nth in range(1, 100):
        folder = tmp_path / f"run-{nth}"
        shutil.copytree(tmp_path / "run", folder)
        more = callbacks(folder, last, every_s=0.0, resumed=found(folder))
        with killed_at(nth, folder, monkeypatch) as done:
            fit(make_module(), more, max_steps=last, start=2, ckpt_path=str(found(folder).path))
        manifest = found(folder)
        assert manifest.fault() is None
        assert torch.load(manifest.path, weights_only=True)["global_step"] == manifest.step
        steps.append(manifest.step)
        if len(done) < nth:
            break
    assert {"fsync", "replace", "unlink", "open"} == set(done) and nth > 15
    assert steps == sorted(steps) and steps[0] == 2 and steps[-1] == last


def test_room_is_estimated_before_training(make_module, tmp_path, monkeypatch, fit):
    module = make_module(build=torch.optim.AdamW)
    assert checkpoint_bytes(module) == 4 * 6 * 4
    require_room(tmp_path, module, 2)
    free = type("Usage", (), {"free": 300})
    monkeypatch.setattr("ldm.runs.disk.shutil.disk_usage", lambda _: free)
    with pytest.raises(UserError, match="room for 4 checkpoints of about .*runs_dir=.*trainer.keep_last=1"):
        require_room(tmp_path / "new", module, 2)
    require_room(tmp_path, module, 1)


def test_what_a_kill_left_is_cleared(fit, make_module, tmp_path):
    place = tmp_path / "checkpoints"
    place.mkdir()
    for name in (".partial-12345678-step-00000001.ckpt", "step-00000009.ckpt"):
        (place / name).write_bytes(b"half")
    fit(make_module(), callbacks(tmp_path, 2), max_steps=2)
    assert {path.name for path in place.iterdir()} == {"step-00000002.ckpt", "step-00000002.json"}
