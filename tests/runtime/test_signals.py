"""Signals, the lock of a run folder and SLURM: what ends a command, with which code, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ldm.train
from ldm.cli import main as command
from ldm.errors import UserError
from ldm.runs.checkpoints import manifests
from ldm.runs.lock import only_one
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


def start(place: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A Python process with Ctrl-C as a terminal has it, also where the tests themselves run in the background."""
    variables = {"PYTHONPATH": str(ROOT), "LDM_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=place,
        env={**os.environ, **variables, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def until(process: subprocess.Popen[str], line: str) -> None:
    for found in process.stdout:
        if found.strip() == line:
            return
    raise AssertionError(process.stderr.read())


pytestmark = pytest.mark.usefixtures("default_signals")


@pytest.mark.parametrize("name", CODES)
def test_at_once_where_nothing_is_held(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with signals.handled():
        with pytest.raises(signals.Interrupted) as stopped:
            os.kill(os.getpid(), number)
        assert stopped.value.code == CODES[name] and name in str(stopped.value)
        assert isinstance(stopped.value, KeyboardInterrupt)
        if name != "SIGINT":
            os.kill(os.getpid(), number)  # a second one does not break the unwinding
    assert signal.getsignal(number) is before


def test_noted_where_it_is_held(capfd):
    with signals.handled():
        signals.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        signals.release()
        os.kill(os.getpid(), signal.SIGTERM)  # one that follows does not break the unwinding
        assert signals.pending() == signal.SIGTERM, "the first one counts"
    assert signals.pending() is None and "Ctrl-C again stops at once" in capfd.readouterr().err


def test_what_the_caller_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handled():
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.pending() is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", CODES)
def test_a_tool_unwinds_and_says_so(call, name):
    """Preparing, encoding, sampling: whatever is no training; also where a library takes the signal for an error."""
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


HOLDS = """
import signal, sys, time
from ldm.runtime import signals

with signals.handled():
    signals.hold()
    print("working", flush=True)
    while signals.pending() is None:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(30)
"""


def test_a_second_interrupt_stops_at_once(tmp_path):
    with start(tmp_path, "-c", HOLDS) as process:
        until(process, "working")
        process.send_signal(signal.SIGINT)
        until(process, "saving")
        process.send_signal(signal.SIGINT)  # the same Ctrl-C, passed on by a wrapper
        time.sleep(signals.SAME_S + 0.1)
        assert process.poll() is None
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.perf_counter() - began < 2 and "stopped at once" in err


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """scontrol(code): a stand-in for SLURM's command, which notes how it was called."""

    def scontrol(code: int) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\necho no such job >&2\nexit {code}\n")
        (folder / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return tmp_path / "asked"

    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return scontrol


def test_slurm_is_asked_to_start_the_job_again(scontrol, monkeypatch, tmp_path):
    asked = scontrol(1)
    assert launcher.requeue() == "" and not asked.exists()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert launcher.requeue() == ". SLURM does not start job 17 again: no such job"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    launcher.requeue()
    assert asked.read_text() == "requeue 17\nrequeue 5_3\n"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "could not be asked to start job 5_3 again" in launcher.requeue()


# Training


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_images) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make_images(folder / "pets", 40)
    return folder


@pytest.fixture
def train(place, call, monkeypatch):
    """Train in this process; returns how it ended."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LDM_CACHE", str(place / "cache"))
    return lambda *options: call(ldm.train.main, *VAE, *options)


def arriving(monkeypatch, owner: type, hook: str, name: str, when=lambda *_: True) -> None:
    """The signal comes in a method of `owner`, once."""
    original, sent = getattr(owner, hook), []

    def arrives(self, *args, **kwargs):
        if not sent and when(*args):
            sent.append(name)
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, hook, arrives)


def test_a_preempted_job_of_slurm_goes_on_by_itself(train, place, scontrol, monkeypatch):
    """SIGUSR1: saved, queued again; and where SLURM has started it again, the same command goes on."""
    asked = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    arriving(monkeypatch, Checkpoints, "on_train_batch_end", "SIGUSR1", lambda trainer, *_: trainer.global_step == 2)
    ended = train("name=a woman's")
    assert ended.code == 138 and asked.read_text() == "requeue 17\n"
    run = place / "runs/vae/a woman's"
    assert [manifest.step for manifest in manifests(run / "checkpoints")] == [2]
    line = ended.err.strip().splitlines()[-1]
    assert line.startswith("stopped by SIGUSR1 after step 2; saved runs/vae/a woman's/checkpoints/step-00000002.ckpt")
    assert line.endswith("""'name=a woman'"'"'s' resume=true. SLURM starts job 17 again""")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ended = train("name=a woman's")
    assert ended.code == 0 and "resumed from" in ended.out
    assert json.loads((run / "run.json").read_text())["figures"]["steps"] == 4


def test_a_job_that_would_not_find_its_run_is_not_queued_again(train, scontrol, place, monkeypatch):
    """Without a name it would begin another run each time. Configs of one's own stay in the command that goes on."""
    asked = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (place / "my configs").mkdir()
    arriving(monkeypatch, VAEStage, "__init__", "SIGUSR1")
    ended = train("--config-dir", "my configs")
    assert ended.code == 138 and not asked.exists(), ended
    assert "python -m ldm.train '--config-dir=my configs' stage=vae" in ended.err
    assert ended.err.strip().endswith("without name= it would begin another run each time")


def test_a_job_that_began_at_another_runs_checkpoint_is_queued_again(train, scontrol, place, monkeypatch):
    """It begins there until it has saved something of its own, and goes on from that then."""
    assert train("name=a", "trainer.max_steps=2").code == 0
    asked = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    start = "runs/vae/a/checkpoints/step-00000002.ckpt"
    command = (f"resume={start}", "name=b")

    def stops(*_):
        raise signals.Interrupted(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "to_the_end", stops)
        ended = train(*command)
    assert ended.code == 138 and f"name=b resume={start}. SLURM starts" in ended.err, ended
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    arriving(monkeypatch, Checkpoints, "on_train_batch_end", "SIGUSR1", lambda trainer, *_: trainer.global_step == 3)
    ended = train(*command)
    assert ended.code == 138 and start in ended.out, ended
    assert "saved runs/vae/b/checkpoints/step-00000003.ckpt" in ended.err and "name=b resume=true. SLURM" in ended.err
    assert asked.read_text() == "requeue 17\n" * 2
    ended = train(*command)
    assert ended.code == 0 and "runs/vae/b/checkpoints/step-00000003.ckpt" in ended.out, ended
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    ended = train(*command)
    assert ended.code == 2 and "runs/vae/b exists already" in ended.err, ended


@pytest.mark.parametrize("hook", ["finish", "__init__"])
def test_stopped_before_and_after_training(train, place, monkeypatch, hook):
    """At the end the weights for use are not there by half, and made again; at the start there is nothing to save."""
    name = f"stopped-{hook.strip('_')}"
    with monkeypatch.context() as patch:
        arriving(patch, VAEStage, hook, "SIGTERM")
        ended = train(f"name={name}")
    assert ended.code == 143 and f"name={name} resume=true" in ended.err
    run = place / "runs/vae" / name
    assert not (run / "autoencoder").exists()
    assert [manifest.step for manifest in manifests(run / "checkpoints")] == ([4] if hook == "finish" else [])
    ended = train(f"name={name}", "resume=true")
    assert ended.code == 0 and (run / "autoencoder/diffusion_pytorch_model.safetensors").is_file()
    assert ("resumed from" in ended.out) == (hook == "finish")


HOLDER = """
import time
from pathlib import Path
from ldm.runs.lock import only_one

with only_one(Path("runs/vae/held")):
    print("working", flush=True)
    time.sleep(30)
"""


def test_a_second_training_in_a_run_folder_is_refused(train, place, monkeypatch):
    """Until the first has ended, in whatever way."""
    monkeypatch.setattr("ldm.runs.lock.WAIT_S", 0.1)
    with start(place, "-c", HOLDER) as process:
        until(process, "working")
        ended = train("name=held")
        holder = f"process {process.pid} on {os.uname().nodename}, since 2"
        assert ended.code == 2 and f"in use by another training: {holder}" in ended.err
        process.kill()
    with only_one(place / "runs/vae/held"):
        """Free again."""
    assert not list((place / "runs/vae").glob(".*.txt"))


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="vae cannot be written .* runs_dir="), only_one(tmp_path / "file/vae/demo"):
        raise AssertionError


@pytest.mark.parametrize("moment", ["amid the last step", "amid the last validation"])
def test_a_signal_of_another_rank_at_the_end_ends_this_one_too(train, place, monkeypatch, moment):
    """A rank that validated or went on alone would wait for the others for ever."""
    decide, seen = Agreement.decide, []

    def answers(self, trainer):
        over = not trainer.training and ("on_validation_end" in seen or moment == "amid the last step")
        return decide(self, trainer) | ({"signal": signal.SIGTERM} if over else {})

    monkeypatch.setattr(Agreement, "decide", answers)
    for hook in ("on_validation_start", "on_validation_end"):
        monkeypatch.setattr(ProgressBar, hook, lambda *_, hook=hook: seen.append(hook))
    name = f"end-{moment.split()[-1]}"
    ended = train(f"name={name}", "trainer.val_check_interval=null", "trainer.max_steps=1")
    assert ended.code == 143 and "stopped by SIGTERM after step 1; saved" in ended.err
    assert bool(seen) == (moment == "amid the last validation")
    assert not (place / "runs/vae" / name / "autoencoder").exists()


RANKS = """
import os, signal
from ldm.training.callbacks.checkpoints import Checkpoints

original = Checkpoints.on_train_batch_start

def arrives(self, trainer, *args):
    if trainer.global_step == 2 and trainer.global_rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    original(self, trainer, *args)

Checkpoints.on_train_batch_start = arrives
from ldm.train import main
main()
"""


def test_all_ranks_leave_together(place):
    """One of two is sent the signal: both stop after the same step, one checkpoint is saved, one line says so."""
    (place / "ranks.py").write_text(RANKS)
    options = [*VAE, "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=6", "name=ranks"]
    with start(place, "ranks.py", *options) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err.count("stopped by SIGTERM after step 3; saved runs/vae/ranks/checkpoints/step-00000003.ckpt") == 1, err
    assert [manifest.step for manifest in manifests(place / "runs/vae/ranks/checkpoints")] == [3]
