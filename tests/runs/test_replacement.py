"""overwrite=true keeps the earlier run until the new run has saved a checkpoint."""

import os
import re
import shlex
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import wandb
from omegaconf import OmegaConf
from PIL import Image

import ldm.train
from ldm.files.lock import file_lock
from ldm.runs.load import find_autoencoder
from ldm.runs.lock import lock_file
from ldm.runs.replacement import Replacement, recover
from ldm.runs.run import Run
from ldm.tracking.artifact import Artifact
from ldm.tracking.run import WandbRun
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.fit import Fit
from tests.small_training import STAGE_1

VAE = [*STAGE_1, "trainer.max_steps=4", "name=x"]
RUN, BACKUP, FAILED = Path("runs/vae/x"), Path("runs/vae/.x.replaced"), Path("runs/vae/.x.failed")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, make_images) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    make_images(folder / "pets", 40)
    return folder


@pytest.fixture
def train(workspace, call, monkeypatch):
    """Function that trains in this process and returns the exit code and output. A finished run already exists."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("LDM_CACHE", str(workspace / "cache"))
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def train(*options: str):
        return call(ldm.train.main, *VAE, *options)

    if not RUN.exists():
        assert train().code == 0
    return train


def read_run() -> dict[str, bytes]:
    """Return the content of every file in the run folder."""
    return {str(file): file.read_bytes() for file in sorted(RUN.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("bug"), KeyboardInterrupt()])
def test_failed_start_restores_the_earlier_run(train, monkeypatch, error):
    content = read_run()

    def raise_error(*args, **kwargs):
        assert not RUN.joinpath("autoencoder").exists() and BACKUP.joinpath("autoencoder").is_dir()
        raise error

    with monkeypatch.context() as patch, suppress(RuntimeError):
        patch.setattr(Fit, "set_loggers", raise_error)  # called after logging starts, before training
        assert train("overwrite=true").code in (2, 130)
    assert read_run() == content and not BACKUP.exists() and (FAILED / "run.json").is_file()


def test_stop_before_the_first_checkpoint_prints_the_command_to_restart(train, monkeypatch):
    """The command must contain overwrite=true, because resume=true would resume the earlier run."""
    content = read_run()

    def stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "set_loggers", stop)
        result = train("overwrite=true", "optimizer.lr=1e-4")
    assert result.code == 143 and read_run() == content and f"restored in {RUN.resolve()}" in result.err
    command = shlex.split(result.err.strip().splitlines()[-1].partition("To continue: ")[2])
    assert command[1:3] == ["-m", "ldm.train"] and command[-1] == "overwrite=true" and "optimizer.lr=1e-4" in command
    result = train(*command[3:])
    assert result.code == 0 and read_run() != content and not BACKUP.exists()


def test_earlier_run_is_deleted_after_the_first_checkpoint(train, monkeypatch):
    has_backup = []
    save = Checkpoints._save

    def save_and_record(self, *args, **kwargs):
        has_backup.append(BACKUP.is_dir())
        save(self, *args, **kwargs)
        has_backup.append(BACKUP.is_dir())

    monkeypatch.setattr(Checkpoints, "_save", save_and_record)
    assert train("overwrite=true").code == 0
    assert has_backup[:2] == [True, False] and not BACKUP.exists()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("logger.project=a/b", "Invalid project name 'a/b'"),
        ("logger.tags=[" + "x" * 65 + "]", "65 characters"),
        ("logger.tags=3", "int"),
        ("logger.group=7", "run_group"),
    ],
)
def test_training_continues_when_wandb_rejects_a_setting(train, monkeypatch, option, reason):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    result = train("overwrite=true", "logger=wandb", option)
    assert result.code == 0 and Run.open(RUN).finished, result
    line = next(line for line in result.out.splitlines() if line.startswith("W&B rejected a setting"))
    assert reason in line and "project ldm" in line and "wandb sync --include-online" in line
    assert list(RUN.glob("wandb/offline-run-*/*.wandb"))


VARIABLES = ["MODE=nonsense", "BASE_URL=no-address", "INIT_TIMEOUT=soon", "CONSOLE=x", "RESUME=x"]


@pytest.mark.parametrize("variable", [f"WANDB_{variable}" for variable in VARIABLES])
def test_bad_wandb_environment_variable_does_not_stop_training(tmp_path, monkeypatch, capsys, variable):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(*variable.split("="))
    wandb.teardown()  # W&B reads its variables only once
    run = WandbRun(tmp_path, {}, project="ldm", name="vae/x")
    run.log({"loss": 1.0}, 0)
    run.log_images("images", [Image.new("RGB", (8, 8))], [None], 1)
    run.log_artifact(Artifact("evaluation", "x", "0" * 64))
    run.finish()
    assert capsys.readouterr().out.count("Continuing") == 1
    monkeypatch.delenv(variable.partition("=")[0])
    wandb.teardown()


def test_damaged_wandb_id_does_not_prevent_resuming(train):
    assert train("overwrite=true", "logger=wandb", "logger.mode=offline").code == 0
    (RUN / "wandb_id.txt").write_text("../../x")
    result = train("resume=true", "logger=wandb", "logger.mode=offline", "trainer.max_steps=5")
    assert result.code == 0 and "must contain the id of a W&B run" in result.out
    assert re.fullmatch(r"\w+", (RUN / "wandb_id.txt").read_text().strip())


@pytest.fixture
def earlier_content(train):
    """Simulate a kill at the start of a run with overwrite=true. Return the content of the earlier run."""
    if not (RUN / "autoencoder").is_dir():
        assert train("overwrite=true").code == 0
    content = read_run()
    RUN.rename(BACKUP)
    Run.create(RUN, OmegaConf.load(BACKUP / "config.yaml"), {"stage": "vae", "name": "x"})
    return content


def test_next_command_after_a_kill_prints_the_path_of_the_earlier_run(earlier_content, train):
    result = train()
    assert result.code == 2 and str(BACKUP.resolve()) in result.err and f"rename {BACKUP.name} to x" in result.err
    with pytest.raises(ValueError, match=re.escape(str(BACKUP.resolve()))):
        Run.open(RUN).autoencoder()
    images = Run.open(BACKUP).image_data()
    with pytest.raises(ValueError, match="no finished autoencoder for this data"):
        find_autoencoder(None, "runs", images)


def test_second_attempt_after_a_kill_keeps_the_earlier_run_until_a_checkpoint(earlier_content, train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "set_loggers", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("second failure")))
        with pytest.raises(RuntimeError, match="second failure"):
            train("overwrite=true")
    assert read_run() == earlier_content, "both attempts must leave the earlier run unchanged"
    assert train("overwrite=true").code == 0 and not BACKUP.exists()


def test_resume_after_a_kill_is_rejected_with_both_remedies(earlier_content, train):
    """Resuming would train from scratch and then delete the run that the user probably meant."""
    result = train("resume=true")
    assert result.code == 2 and str(BACKUP.resolve()) in result.err and BACKUP.is_dir()
    assert "overwrite=true instead of resume=" in result.err
    shutil.rmtree(RUN)
    BACKUP.rename(RUN)
    assert read_run() == earlier_content and train("resume=true").code == 0


def test_incomplete_run_folder_is_also_kept_until_the_first_checkpoint(tmp_path):
    """The folder has no run.json, but its checkpoints could be the only copy."""
    run = tmp_path / "x"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "weights.bin").write_bytes(b"weights")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), Replacement(run).begin(overwrite=True):
            raise KeyboardInterrupt
        assert (run / "checkpoints" / "weights.bin").is_file()
    run.rename(tmp_path / ".x.replaced")  # as left by a killed process
    with Replacement(run).begin(overwrite=True):
        assert (tmp_path / ".x.replaced" / "checkpoints" / "weights.bin").is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".x.failed") == ["x"]


def test_symlinked_run_folder_stays_a_link(train, tmp_path):
    shutil.copytree(RUN, tmp_path / "elsewhere")
    link = RUN.with_name("linked")
    link.symlink_to(tmp_path / "elsewhere")
    content = (tmp_path / "elsewhere/run.json").read_bytes()
    assert train("name=linked", "overwrite=true").code == 0
    assert link.is_symlink() and (tmp_path / "elsewhere/run.json").read_bytes() != content
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["elsewhere"]


def test_run_is_restored_after_a_kill_between_two_renames(train):
    content = read_run()
    RUN.resolve().replace(BACKUP.resolve())
    result = train()
    assert result.code == 2 and "already exists" in result.err and f"{RUN.resolve()} was restored" in result.err
    assert read_run() == content


def test_no_warning_while_another_process_replaces_the_run(tmp_path, capsys):
    backup = tmp_path / "vae" / ".x.replaced"
    backup.mkdir(parents=True)
    (backup / "run.json").write_text("{}")
    with file_lock(lock_file(tmp_path / "vae" / "x")):
        recover(tmp_path / "vae" / "x", resume=False)
    assert capsys.readouterr().err == "" and backup.is_dir()


def test_requeued_slurm_job_overwrites_only_once(train, monkeypatch):
    """A requeued job overwrites an earlier run, but resumes the run that it started itself."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    result = train("overwrite=true")
    assert result.code == 0 and "resumed from" not in result.out
    result = train("overwrite=true", "trainer.max_steps=5")
    assert result.code == 0 and "resumed from" in result.out
