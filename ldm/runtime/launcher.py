"""Environment variables of the launchers (Lightning and SLURM), and SLURM's requeue command."""

import os
import subprocess

RUN_NAME = "LDM_RUN_NAME"
"""Environment variable that passes the run name to the processes started by Lightning."""


def share_run_name(name: str, *, main_process: bool) -> str:
    """Share the main process's run name with the processes that it starts, and return it."""
    if main_process:
        os.environ[RUN_NAME] = name
    return os.environ.get(RUN_NAME, name)


def has_shared_run_name() -> bool:
    """Return True if this process, or the one that started it, has set the run name."""
    return RUN_NAME in os.environ


def slurm_job() -> dict[str, str]:
    """Return the ids of the SLURM job of this process. They stay the same when the job is requeued."""
    return {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if key in os.environ}


def is_restarted_by_slurm() -> bool:
    """Return True if SLURM has requeued this job."""
    return bool(int(os.environ.get("SLURM_RESTART_COUNT") or 0))


def requeue() -> str:
    """Ask SLURM to requeue the job. Return the outcome as text to append to a message; "" outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        return ""
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f". SLURM job {job} could not be requeued: {error}"
    if result.returncode:
        return f". SLURM refused to requeue job {job}: {' '.join(result.stderr.split())}"
    return f". SLURM requeued job {job}"
