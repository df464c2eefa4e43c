"""Short version of kill_resume.py, with 3 instead of 100 kills."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_resume.py")


@pytest.mark.parametrize("signal_name", ["KILL", pytest.param("TERM", marks=pytest.mark.slow)])
def test_killed_and_resumed_runs_have_the_same_hash(make_images, tmp_path, signal_name):
    make_images(tmp_path / "pets", 48)
    source = ["--data", "image_folder", "--path", str(tmp_path / "pets")]
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--signal", signal_name, "--seed", "1", *source]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.splitlines()[-1] == "3 of 3 resumed to the same hash"
