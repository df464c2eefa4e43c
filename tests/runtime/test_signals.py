"""Signals, the lock of a run folder and SLURM: exit codes, messages and saved files of interrupted commands."""

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
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138}
VAE = [*STAGE_1, "trainer.max_steps=4"]


def start(workspace: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python process with the default handling of Ctrl-C, even if the tests run in the background."""
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


def until(process: subprocess.Popen[str], line: str) -> None:
    for printed in process.stdout:
        if printed.strip() == line:
            return
    raise AssertionError(process.stderr.read())


pytestmark = pytest.mark.usefixtures("default_signals")


@pytest.mark.parametrize("name", CODES)
def test_signals_raise_immediately_unless_deferred(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with signals.handling():
        with pytest.raises(signals.Interrupted) as stopped:
            os.kill(os.getpid(), number)
        assert stopped.value.code == CODES[name] and name in str(stopped.value)
        assert isinstance(stopped.value, KeyboardInterrupt)
        if name != "SIGINT":
            os.kill(os.getpid(), number)  # a second signal does not interrupt the unwinding
    assert signal.getsignal(number) is before


def test_deferred_signals_are_only_recorded(capfd):
    with signals.handling():
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        signals.stop_deferring()
        os.kill(os.getpid(), signal.SIGTERM)  # a later signal does not interrupt the unwinding
        assert signals.pending() == signal.SIGTERM, "the first signal counts"
    assert signals.pending() is None and "Ctrl-C again" in capfd.readouterr().err


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handling():
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.pending() is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", CODES)
def test_tool_unwinds_and_reports_the_signal(call, name):
    """Applies to every command except training, even if a library turns the interruption into an error."""
    unwound = []

    def task(config):
        try:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(5)
        except BaseException as error:
            unwound.append(type(error))
            raise ValueError("There is no key") from error

    ended = call(lambda: command.run("mixture", task))
    assert ended.code == CODES[name] and ended.err == f"stopped by {name}\n" and unwound == [signals.Interrupted]


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
        until(process, "working")
        process.send_signal(signal.SIGINT)
        until(process, "saving")
        process.send_signal(signal.SIGINT)  # the same Ctrl-C, forwarded by a wrapper
        time.sleep(signals.DUPLICATE_S + 0.1)
        assert process.poll() is None
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.perf_counter() - began < 2 and "stopped immediately" in err


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """scontrol(code): replace SLURM's command by one that records its calls; returns the file with the calls."""

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
    """Train in this process, and return the exit code and the output."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("LDM_CACHE", str(workspace / "cache"))
    return lambda *options: call(ldm.train.main, *VAE, *options)


def signal_in(monkeypatch, owner: type, hook: str, name: str, when=lambda *_: True) -> None:
    """Send the signal once to this process, during a method of `owner`."""
    original, sent = getattr(owner, hook), []

    def hook_with_signal(self, *args, **kwargs):
        if not sent and when(*args):
            sent.append(name)
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, hook, hook_with_signal)


def test_preempted_slurm_job_resumes_by_itself(train, workspace, scontrol, monkeypatch):
    """On SIGUSR1 the job saves a checkpoint and is requeued. After SLURM restarts it, the same command resumes."""
    calls = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    signal_in(monkeypatch, Checkpoints, "on_train_batch_end", "SIGUSR1", lambda trainer, *_: trainer.global_step == 2)
    ended = train("name=a woman's")
    assert ended.code == 138 and calls.read_text() == "requeue 17\n"
    run = workspace / "runs/vae/a woman's"
    assert [manifest.step for manifest in list_checkpoints(run / "checkpoints")] == [2]
    line = ended.err.strip().splitlines()[-1]
    assert line.startswith("stopped by SIGUSR1 after step 2; saved runs/vae/a woman's/checkpoints/step-00000002.ckpt")
    assert """'name=a woman'"'"'s' resume=true. SLURM""" in line and "requeued job 17" in line
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ended = train("name=a woman's")
    assert ended.code == 0 and "resumed from" in ended.out
    assert json.loads((run / "run.json").read_text())["figures"]["steps"] == 4


def test_slurm_job_without_a_name_is_not_requeued(train, scontrol, workspace, monkeypatch):
    """Without a name, each restart would start a new run. The printed command includes the user's own config folder."""
    calls = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (workspace / "my configs").mkdir()
    signal_in(monkeypatch, VAEStage, "__init__", "SIGUSR1")
    ended = train("--config-dir", "my configs")
    assert ended.code == 138 and not calls.exists(), ended
    assert "python -m ldm.train '--config-dir=my configs' stage=vae" in ended.err
    assert "not requeued" in ended.err and "name=" in ended.err


def test_slurm_job_started_from_another_runs_checkpoint_is_requeued(train, scontrol, workspace, monkeypatch):
    """It starts from that checkpoint until it has saved one of its own, and resumes from its own after that."""
    assert train("name=a", "trainer.max_steps=2").code == 0
    calls = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    checkpoint = "runs/vae/a/checkpoints/step-00000002.ckpt"
    command = (f"resume={checkpoint}", "name=b")

    def stop(*_):
        raise signals.Interrupted(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "run_to_end", stop)
        ended = train(*command)
    assert ended.code == 138 and f"name=b resume={checkpoint}. SLURM requeued" in ended.err, ended
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    signal_in(monkeypatch, Checkpoints, "on_train_batch_end", "SIGUSR1", lambda trainer, *_: trainer.global_step == 3)
    ended = train(*command)
    assert ended.code == 138 and checkpoint in ended.out, ended
    assert "saved runs/vae/b/checkpoints/step-00000003.ckpt" in ended.err and "name=b resume=true. SLURM" in ended.err
    assert calls.read_text() == "requeue 17\n" * 2
    ended = train(*command)
    assert ended.code == 0 and "runs/vae/b/checkpoints/step-00000003.ckpt" in ended.out, ended
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    ended = train(*command)
    assert ended.code == 2 and "runs/vae/b already exists" in ended.err, ended


@pytest.mark.parametrize("hook", ["finish", "__init__"])
def test_stop_before_and_after_training(train, workspace, monkeypatch, hook):
    """Before training there is nothing to save. After it, no partial weights are left, and resuming exports them."""
    name = f"stopped-{hook.strip('_')}"
    with monkeypatch.context() as patch:
        signal_in(patch, VAEStage, hook, "SIGTERM")
        ended = train(f"name={name}")
    assert ended.code == 143 and f"name={name} resume=true" in ended.err
    run = workspace / "runs/vae" / name
    assert not (run / "autoencoder").exists()
    assert [manifest.step for manifest in list_checkpoints(run / "checkpoints")] == ([4] if hook == "finish" else [])
    ended = train(f"name={name}", "resume=true")
    assert ended.code == 0 and (run / "autoencoder/diffusion_pytorch_model.safetensors").is_file()
    assert ("resumed from" in ended.out) == (hook == "finish")


LOCKING_PROCESS = """
import time
from pathlib import Path
from ldm.runs.lock import run_lock

with run_lock(Path("runs/vae/held")):
    print("working", flush=True)
    time.sleep(30)
"""


def test_second_training_in_a_run_folder_is_refused(train, workspace, monkeypatch):
    """It is refused until the first training has ended, even if that was killed."""
    monkeypatch.setattr("ldm.runs.lock.WAIT_S", 0.1)
    with start(workspace, "-c", LOCKING_PROCESS) as process:
        until(process, "working")
        ended = train("name=held")
        holder = f"process {process.pid} on {os.uname().nodename}, since 2"
        assert ended.code == 2 and "in use by another process" in ended.err and holder in ended.err
        process.kill()
    with run_lock(workspace / "runs/vae/held"):
        pass
    assert not list((workspace / "runs/vae").glob(".*.txt"))


def test_unwritable_runs_dir_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="vae cannot be written.* runs_dir="), run_lock(tmp_path / "file/vae/demo"):
        raise AssertionError


@pytest.mark.parametrize("moment", ["during the last step", "during the last validation"])
def test_signal_on_another_rank_at_the_end_stops_this_rank_too(train, workspace, monkeypatch, moment):
    """A rank that validated or continued without the others would wait for them forever."""
    update, hooks = Agreement.update, []

    def update_with_signal(self, trainer):
        at_end = not trainer.training and ("on_validation_end" in hooks or moment == "during the last step")
        return update(self, trainer) | ({"signal": signal.SIGTERM} if at_end else {})

    monkeypatch.setattr(Agreement, "update", update_with_signal)
    for hook in ("on_validation_start", "on_validation_end"):
        monkeypatch.setattr(ProgressBar, hook, lambda *_, hook=hook: hooks.append(hook))
    name = f"end-{moment.split()[-1]}"
    ended = train(f"name={name}", "trainer.val_check_interval=null", "trainer.max_steps=1")
    assert ended.code == 143 and "stopped by SIGTERM after step 1; saved" in ended.err
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
    """If one of two ranks receives a signal, both stop, and one checkpoint and one message are written."""
    (workspace / "ranks.py").write_text(RANKS)
    options = [*VAE, "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=6", "name=ranks"]
    with start(workspace, "ranks.py", *options) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err.count("stopped by SIGTERM after step 3; saved runs/vae/ranks/checkpoints/step-00000003.ckpt") == 1, err
    assert [manifest.step for manifest in list_checkpoints(workspace / "runs/vae/ranks/checkpoints")] == [3]
