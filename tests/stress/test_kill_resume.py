"""The short form of kill_resume.py: what a hundred kills show at length."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_resume.py")


@pytest.mark.parametrize("sent", ["KILL", "TERM"])
def test_what_is_stopped_and_resumed_ends_in_the_same_hash(make_images, tmp_path, sent):
    make_images(tmp_path / "pets", 48)
    source = ["--data", "image_folder", "--path", str(tmp_path / "pets")]
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--signal", sent, "--seed", "1", *source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "3 of 3 resumed to the same hash"
