"""What the launchers of this process say in its environment: Lightning, torchrun and SLURM."""

import os
import subprocess

RUN_NAME = "LDM_RUN_NAME"
"""The name of this process's run, for the processes that Lightning starts."""


def share_run_name(name: str, *, main_process: bool) -> str:
    """The name that the main process chose, in all processes that it starts."""
    if main_process:
        os.environ[RUN_NAME] = name
    return os.environ.get(RUN_NAME, name)


def has_shared_run_name() -> bool:
    """Whether this process, or the one that started it, has named its run."""
    return RUN_NAME in os.environ


def slurm_job() -> dict[str, str]:
    """The job that this process belongs to under SLURM, which keeps its number when it is put into the queue again."""
    return {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if key in os.environ}


def is_restarted_by_slurm() -> bool:
    """Whether SLURM put this very job into the queue again."""
    return bool(int(os.environ.get("SLURM_RESTART_COUNT") or 0))


def requeue() -> str:
    """Under SLURM, ask for the job to be started again later; says in words whether that was granted."""
    job = os.environ.get("SLURM_JOB_ID")
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        return ""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f". SLURM could not be asked to start job {job} again: {error}"
    if done.returncode:
        return f". SLURM does not start job {job} again: {' '.join(done.stderr.split())}"
    return f". SLURM starts job {job} again"
