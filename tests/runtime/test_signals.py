"""Interrupted commands: exit codes, messages, saved files, the lock of the run folder, and SLURM."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ldm.train
from ldm.cli import main as command
from ldm.errors import UserError
from ldm.runs.checkpoints import list_checkpoints
from ldm.runs.lock import run_lock
from ldm.runtime import launcher, signals
from ldm.runtime.distributed import Agreement
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.fit import Fit
from ldm.training.stages.autoencoder import VAEStage
from tests.small_training import STAGE_1

ROOT = Path(__file__).parents[2]
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138}
VAE = [*STAGE_1, "trainer.max_steps=4"]


def start(workspace: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python process that handles Ctrl-C by default, even if the tests run in the background."""
    variables = {"PYTHONPATH": str(ROOT), "LDM_CACHE": str(workspace / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=workspace,
        env={**os.environ, **variables, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    for output in process.stdout:
        if output.strip() == line:
            return
    raise AssertionError(process.stderr.read())


pytestmark = pytest.mark.usefixtures("default_signals")


@pytest.mark.parametrize("name", EXIT_CODES)
def test_signals_raise_immediately_unless_deferred(name):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    with signals.handling():
        with pytest.raises(signals.Interrupted) as raised:
            os.kill(os.getpid(), number)
        assert raised.value.code == EXIT_CODES[name] and name in str(raised.value)
        assert isinstance(raised.value, KeyboardInterrupt)
        if name != "SIGINT":
            os.kill(os.getpid(), number)  # a second signal does not interrupt the unwinding
    assert signal.getsignal(number) is handler


def test_deferred_signals_are_only_recorded(capfd):
    with signals.handling():
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        signals.stop_deferring()
        os.kill(os.getpid(), signal.SIGTERM)  # a later signal does not interrupt the unwinding
        assert signals.pending() == signal.SIGTERM, "first signal"
    assert signals.pending() is None and "Ctrl-C again" in capfd.readouterr().err


def test_ignored_signals_stay_ignored():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handling():
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.pending() is None
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("name", EXIT_CODES)
def test_tool_unwinds_and_reports_the_signal(call, name):
    """Every command except training must report the signal, even if a library converts it to a different exception."""
    exceptions = []

    def task(config):
        try:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(5)
        except BaseException as error:
            exceptions.append(type(error))
            raise ValueError("There is no key") from error

    result = call(lambda: command.run("mixture", task))
    assert (
        result.code == EXIT_CODES[name] and result.err == f"stopped by {name}\n" and exceptions == [signals.Interrupted]
    )


DEFERRING_PROCESS = """
import signal, sys, time
from ldm.runtime import signals

with signals.handling():
    signals.defer()
    print("working", flush=True)
    while signals.pending() is None:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(30)
"""


def test_second_interrupt_stops_immediately(tmp_path):
    with start(tmp_path, "-c", DEFERRING_PROCESS) as process:
        wait_for_line(process, "working")
        process.send_signal(signal.SIGINT)
        wait_for_line(process, "saving")
        process.send_signal(signal.SIGINT)  # the same Ctrl-C, forwarded by a wrapper
        time.sleep(signals.DUPLICATE_S + 0.1)
        assert process.poll() is None
        sent_at = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.perf_counter() - sent_at < 2 and "stopped immediately" in err


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """scontrol(code): replace SLURM's command with a script that logs its calls, and return the path of the log."""

    def scontrol(code: int) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/calls\necho no such job >&2\nexit {code}\n")
        (folder / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return tmp_path / "calls"

    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return scontrol


def test_slurm_job_is_requeued(scontrol, monkeypatch, tmp_path):
    calls = scontrol(1)
    assert launcher.requeue() == "" and not calls.exists()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert re.search("requeue job 17: no such job", launcher.requeue())
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    launcher.requeue()
    assert calls.read_text() == "requeue 17\nrequeue 5_3\n"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "job 5_3 could not be requeued" in launcher.requeue()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, make_images) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    make_images(folder / "pets", 40)
    return folder


@pytest.fixture
def train(workspace, call, monkeypatch):
    """Function that trains in this process and returns the exit code and output."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("LDM_CACHE", str(workspace / "cache"))
    return lambda *options: call(ldm.train.main, *VAE, *options)


def send_signal(monkeypatch, owner: type, hook: str, name: str, when=lambda *_: True) -> None:
    """Patch a method of `owner` to send the signal to this process, once."""
    original, sent = getattr(owner, hook), []

    def hook_with_signal(self, *args, **kwargs):
        if not sent and when(*args):
            sent.append(name)
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, hook, hook_with_signal)


def test_preempted_slurm_job_resumes_automatically(train, workspace, scontrol, monkeypatch):
    """On SIGUSR1, the job saves a checkpoint and requeues itself. After the restart, the same command resumes."""
    calls = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    send_signal(monkeypatch, Checkpoints, "on_train_batch_end", "SIGUSR1", lambda trainer, *_: trainer.global_step == 2)
    result = train("name=a woman's")
    assert result.code == 138 and calls.read_text() == "requeue 17\n"
    run = workspace / "runs/vae/a woman's"
    assert [manifest.step for manifest in list_checkpoints(run / "checkpoints")] == [2]
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("stopped by SIGUSR1 after step 2; saved runs/vae/a woman's/checkpoints/step-00000002.ckpt")
    assert """'name=a woman'"'"'s' resume=true. SLURM""" in line and "requeued job 17" in line
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    result = train("name=a woman's")
    assert result.code == 0 and "resumed from" in result.out
    assert json.loads((run / "run.json").read_text())["figures"]["steps"] == 4


def test_slurm_job_without_a_name_is_not_requeued(train, scontrol, workspace, monkeypatch):
    """Each restart would begin a new run. The printed command includes the user's config folder."""
    calls = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (workspace / "my configs").mkdir()
    send_signal(monkeypatch, VAEStage, "__init__", "SIGUSR1")
    result = train("--config-dir", "my configs")
    assert result.code == 138 and not calls.exists(), result
    assert "python -m ldm.train '--config-dir=my configs' stage=vae" in result.err
    assert "not requeued" in result.err and "name=" in result.err


def test_requeued_slurm_job_prefers_its_own_checkpoint_to_the_given_one(train, scontrol, workspace, monkeypatch):
    """A restart uses the checkpoint given by resume= only until the job has saved its own."""
    assert train("name=a", "trainer.max_steps=2").code == 0
    calls = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    checkpoint = "runs/vae/a/checkpoints/step-00000002.ckpt"
    command = (f"resume={checkpoint}", "name=b")

    def stop(*_):
        raise signals.Interrupted(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "run_to_completion", stop)
        result = train(*command)
    assert result.code == 138 and f"name=b resume={checkpoint}. SLURM requeued" in result.err, result
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    send_signal(monkeypatch, Checkpoints, "on_train_batch_end", "SIGUSR1", lambda trainer, *_: trainer.global_step == 3)
    result = train(*command)
    assert result.code == 138 and checkpoint in result.out, result
    assert "saved runs/vae/b/checkpoints/step-00000003.ckpt" in result.err and "name=b resume=true. SLURM" in result.err
    assert calls.read_text() == "requeue 17\n" * 2
    result = train(*command)
    assert result.code == 0 and "runs/vae/b/checkpoints/step-00000003.ckpt" in result.out, result
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    result = train(*command)
    assert result.code == 2 and "runs/vae/b already exists" in result.err, result


@pytest.mark.parametrize("hook", ["finish", "__init__"])
def test_signal_before_or_after_training_prints_the_resume_command(train, workspace, monkeypatch, hook):
    """Before training, nothing is saved. After it, no partial export is left, and resuming exports the weights."""
    name = f"stopped-{hook.strip('_')}"
    with monkeypatch.context() as patch:
        send_signal(patch, VAEStage, hook, "SIGTERM")
        result = train(f"name={name}")
    assert result.code == 143 and f"name={name} resume=true" in result.err
    run = workspace / "runs/vae" / name
    assert not (run / "autoencoder").exists()
    assert [manifest.step for manifest in list_checkpoints(run / "checkpoints")] == ([4] if hook == "finish" else [])
    result = train(f"name={name}", "resume=true")
    assert result.code == 0 and (run / "autoencoder/diffusion_pytorch_model.safetensors").is_file()
    assert ("resumed from" in result.out) == (hook == "finish")


LOCKING_PROCESS = """
import time
from pathlib import Path
from ldm.runs.lock import run_lock

with run_lock(Path("runs/vae/held")):
    print("working", flush=True)
    time.sleep(30)
"""


def test_run_folder_in_use_by_another_process_is_rejected(train, workspace, monkeypatch):
    """The lock is released when the first process exits, even if it was killed."""
    monkeypatch.setattr("ldm.runs.lock.WAIT_S", 0.1)
    with start(workspace, "-c", LOCKING_PROCESS) as process:
        wait_for_line(process, "working")
        result = train("name=held")
        holder = f"process {process.pid} on {os.uname().nodename}, since 2"
        assert result.code == 2 and "in use by another process" in result.err and holder in result.err
        process.kill()
    with run_lock(workspace / "runs/vae/held"):
        pass
    assert not list((workspace / "runs/vae").glob(".*.txt"))


def test_unwritable_runs_dir_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="vae cannot be written.* runs_dir="), run_lock(tmp_path / "file/vae/demo"):
        raise AssertionError


@pytest.mark.parametrize("moment", ["during the last step", "during the last validation"])
def test_signal_on_another_rank_at_the_end_stops_this_rank_too(train, workspace, monkeypatch, moment):
    """Otherwise this rank would wait forever for the rank that stopped."""
    update, hooks = Agreement.update, []

    def update_with_signal(self, trainer):
        at_end = not trainer.training and ("on_validation_end" in hooks or moment == "during the last step")
        return update(self, trainer) | ({"signal": signal.SIGTERM} if at_end else {})

    monkeypatch.setattr(Agreement, "update", update_with_signal)
    for hook in ("on_validation_start", "on_validation_end"):
        monkeypatch.setattr(ProgressBar, hook, lambda *_, hook=hook: hooks.append(hook))
    name = f"end-{moment.split()[-1]}"
    result = train(f"name={name}", "trainer.val_check_interval=null", "trainer.max_steps=1")
    assert result.code == 143 and "stopped by SIGTERM after step 1; saved" in result.err
    assert bool(hooks) == (moment == "during the last validation")
    assert not (workspace / "runs/vae" / name / "autoencoder").exists()


RANKS = """
import os, signal
from ldm.training.callbacks.checkpoints import Checkpoints

original = Checkpoints.on_train_batch_start

def send_signal(self, trainer, *args):
    if trainer.global_step == 2 and trainer.global_rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    original(self, trainer, *args)

Checkpoints.on_train_batch_start = send_signal
from ldm.train import main
main()
"""


def test_all_ranks_stop_after_the_same_step(workspace):
    """When one of two ranks receives a signal, both stop, with a single checkpoint and message."""
    (workspace / "ranks.py").write_text(RANKS)
    options = [*VAE, "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=6", "name=ranks"]
    with start(workspace, "ranks.py", *options) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err.count("stopped by SIGTERM after step 3; saved runs/vae/ranks/checkpoints/step-00000003.ckpt") == 1, err
    assert [manifest.step for manifest in list_checkpoints(workspace / "runs/vae/ranks/checkpoints")] == [3]
