"""overwrite=true: the earlier run is kept until the new one has saved a checkpoint."""

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
RUN, ASIDE, FAILED = Path("runs/vae/x"), Path("runs/vae/.x.replaced"), Path("runs/vae/.x.failed")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, make_images) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    make_images(folder / "pets", 40)
    return folder


@pytest.fixture
def train(workspace, call, monkeypatch):
    """Train in this process, and return the exit code and the output. Every test starts with a finished run."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("LDM_CACHE", str(workspace / "cache"))
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def train(*options: str):
        return call(ldm.train.main, *VAE, *options)

    if not RUN.exists():
        assert train().code == 0
    return train


def digest() -> dict[str, bytes]:
    """Content of every file of the run."""
    return {str(file): file.read_bytes() for file in sorted(RUN.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("ours"), KeyboardInterrupt()])
def test_failed_start_restores_the_earlier_run(train, monkeypatch, error):
    before = digest()

    def fail(*args, **kwargs):
        assert not RUN.joinpath("autoencoder").exists() and ASIDE.joinpath("autoencoder").is_dir()
        raise error

    with monkeypatch.context() as patch, suppress(RuntimeError):
        patch.setattr(Fit, "set_loggers", fail)  # after the loggers are created, before training
        assert train("overwrite=true").code in (2, 130)
    assert digest() == before and not ASIDE.exists() and (FAILED / "run.json").is_file()


def test_stop_before_the_first_checkpoint_prints_the_command_to_restart(train, monkeypatch):
    """The command uses overwrite=true, as resume=true would resume the earlier run."""
    before = digest()

    def stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "set_loggers", stop)
        ended = train("overwrite=true", "optimizer.lr=1e-4")
    assert ended.code == 143 and digest() == before and f"restored in {RUN.resolve()}" in ended.err
    command = shlex.split(ended.err.strip().splitlines()[-1].partition("To continue: ")[2])
    assert command[1:3] == ["-m", "ldm.train"] and command[-1] == "overwrite=true" and "optimizer.lr=1e-4" in command
    ended = train(*command[3:])
    assert ended.code == 0 and digest() != before and not ASIDE.exists()


def test_earlier_run_is_deleted_after_the_first_checkpoint(train, monkeypatch):
    exists = []
    save = Checkpoints._save

    def recording(self, *args, **kwargs):
        exists.append(ASIDE.is_dir())
        save(self, *args, **kwargs)
        exists.append(ASIDE.is_dir())

    monkeypatch.setattr(Checkpoints, "_save", recording)
    assert train("overwrite=true").code == 0
    assert exists[:2] == [True, False] and not ASIDE.exists()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("logger.project=a/b", "Invalid project name 'a/b'"),
        ("logger.tags=[" + "x" * 65 + "]", "65 characters"),
        ("logger.tags=3", "int"),
        ("logger.group=7", "run_group"),
    ],
)
def test_training_continues_if_wandb_rejects_a_setting(train, monkeypatch, option, reason):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    ended = train("overwrite=true", "logger=wandb", option)
    assert ended.code == 0 and Run.open(RUN).finished, ended
    line = next(line for line in ended.out.splitlines() if line.startswith("W&B rejected a setting"))
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
    ended = train("resume=true", "logger=wandb", "logger.mode=offline", "trainer.max_steps=5")
    assert ended.code == 0 and "must contain the id of a W&B run" in ended.out
    assert re.fullmatch(r"\w+", (RUN / "wandb_id.txt").read_text().strip())


@pytest.fixture
def killed(train):
    """State after a kill during the start of a run with overwrite=true; returns the content of the earlier run."""
    if not (RUN / "autoencoder").is_dir():
        assert train("overwrite=true").code == 0
    before = digest()
    RUN.rename(ASIDE)
    Run.create(RUN, OmegaConf.load(ASIDE / "config.yaml"), {"stage": "vae", "name": "x"})
    return before


def test_after_a_kill_the_next_command_locates_the_earlier_run(killed, train):
    ended = train()
    assert ended.code == 2 and str(ASIDE.resolve()) in ended.err and f"rename {ASIDE.name} to x" in ended.err
    with pytest.raises(ValueError, match=re.escape(str(ASIDE.resolve()))):
        Run.open(RUN).autoencoder()
    fingerprint = Run.open(ASIDE).facts["data_fingerprint"]
    with pytest.raises(ValueError, match="no finished autoencoder for this data"):
        find_autoencoder(None, "runs", fingerprint)


def test_after_a_kill_a_new_start_keeps_the_earlier_run_until_its_first_checkpoint(killed, train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "set_loggers", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("again")))
        with pytest.raises(RuntimeError, match="again"):
            train("overwrite=true")
    assert digest() == killed, "the run from before both attempts"
    assert train("overwrite=true").code == 0 and not ASIDE.exists()


def test_after_a_kill_resuming_is_refused_with_both_remedies(killed, train):
    """Otherwise it would train from scratch and then delete the run that the user may have meant."""
    ended = train("resume=true")
    assert ended.code == 2 and str(ASIDE.resolve()) in ended.err and "overwrite=true instead of resume=" in ended.err
    assert ASIDE.is_dir()
    shutil.rmtree(RUN)
    ASIDE.rename(RUN)
    assert digest() == killed and train("resume=true").code == 0


def test_any_replaced_folder_is_kept_until_the_first_checkpoint(tmp_path):
    """Even if the folder is not a complete run, as it may contain all that is left of one."""
    run = tmp_path / "x"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "weights.bin").write_bytes(b"years of work")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), Replacement(run).begin(overwrite=True):
            raise KeyboardInterrupt
        assert (run / "checkpoints" / "weights.bin").is_file()
    run.rename(tmp_path / ".x.replaced")  # state after a kill
    with Replacement(run).begin(overwrite=True):
        assert (tmp_path / ".x.replaced" / "checkpoints" / "weights.bin").is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".x.failed") == ["x"]


def test_linked_run_folder_stays_a_link(train, tmp_path):
    shutil.copytree(RUN, tmp_path / "elsewhere")
    link = RUN.with_name("linked")
    link.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere/run.json").read_bytes()
    assert train("name=linked", "overwrite=true").code == 0
    assert link.is_symlink() and (tmp_path / "elsewhere/run.json").read_bytes() != before
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["elsewhere"]


def test_run_is_restored_after_a_kill_between_two_renames(train):
    before = digest()
    RUN.resolve().replace(ASIDE.resolve())
    ended = train()
    assert ended.code == 2 and "already exists" in ended.err and f"{RUN.resolve()} was restored" in ended.err
    assert digest() == before


def test_run_being_replaced_by_another_process_causes_no_warning(tmp_path, capsys):
    aside = tmp_path / "vae" / ".x.replaced"
    aside.mkdir(parents=True)
    (aside / "run.json").write_text("{}")
    with file_lock(lock_file(tmp_path / "vae" / "x")):
        recover(tmp_path / "vae" / "x", resume=False)
    assert capsys.readouterr().err == "" and aside.is_dir()


def test_requeued_slurm_job_overwrites_only_once(train, monkeypatch):
    """After a requeue, the job resumes the run that it started itself, but overwrites an earlier run."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ended = train("overwrite=true")
    assert ended.code == 0 and "resumed from" not in ended.out
    ended = train("overwrite=true", "trainer.max_steps=5")
    assert ended.code == 0 and "resumed from" in ended.out
