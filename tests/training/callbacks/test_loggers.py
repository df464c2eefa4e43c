"""ldm.training.callbacks.loggers.CsvLogger: rows by step, write errors, and rollbacks."""

import csv
import errno
import os
from pathlib import Path

import pytest

from ldm.training.callbacks.loggers import CsvLogger


def logged_steps(file: Path) -> list[int]:
    with file.open() as lines:
        return [int(row["step"]) for row in csv.DictReader(lines)]


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "metrics.csv"


def log(file: Path, steps: range, **values: float) -> CsvLogger:
    """Log steps with a new logger, as if training started or resumed at the first step."""
    logger = CsvLogger(file, steps[0] - 1)
    for step in steps:
        logger.log_metrics({"train/loss": 1.0, **values}, step)
    return logger


def test_rows_are_written_in_batches_of_100_and_at_the_end(file):
    logger = log(file, range(150))
    assert logged_steps(file) == list(range(100))
    logger.finalize("success")
    assert logged_steps(file) == list(range(150))


def test_resume_appends_rows_and_a_new_run_replaces_them(file):
    log(file, range(3)).save()
    log(file, range(3, 5), **{"val/loss": 7.0}).save()
    assert logged_steps(file) == [0, 1, 2, 3, 4]
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert rows[-1]["val/loss"] == "7.0" and rows[0]["val/loss"] == "" and rows[0]["train/loss"] == "1.0"
    log(file, range(1)).save()
    assert logged_steps(file) == [0]


def test_no_step_is_logged_twice_after_a_rollback(file):
    log(file, range(4)).save()
    logger = log(file, range(4, 6))
    logger.drop_rows_after(2)
    logger.log_metrics({"train/loss": 2.0, "val/loss": 3.0}, 3)
    logger.save()
    assert logged_steps(file) == [0, 1, 2, 3]
    CsvLogger(file)
    assert logged_steps(file) == []


def test_truncated_last_row_is_dropped(file):
    log(file, range(3), z=2.0).save()
    file.write_text(file.read_text()[:-8])
    CsvLogger(file, 2)
    assert logged_steps(file) == [0, 1]


def test_full_disk_warns_once_and_loses_no_rows(file, capsys, monkeypatch):
    logger = log(file, range(1))
    logger.save()
    content = file.read_text()

    def raise_disk_full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", raise_disk_full)
        patch.setattr(Path, "write_text", raise_disk_full)
        for step in (1, 2):
            logger.log_metrics({"val/loss": 1.0}, step)
            logger.save()
    output = capsys.readouterr().out
    assert output.count("warning: ") == 1 and "metrics.csv" in output and "No space left" in output
    assert file.read_text() == content
    logger.save()
    assert logged_steps(file) == [0, 1, 2]
