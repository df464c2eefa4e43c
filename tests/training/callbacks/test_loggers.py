"""ldm.training.callbacks.loggers.CsvLogger: rows by step, also where the disk refuses them or training goes back."""

import csv
import errno
import os
from pathlib import Path

import pytest

from ldm.training.callbacks.loggers import CsvLogger


def steps(file: Path) -> list[int]:
    with file.open() as lines:
        return [int(row["step"]) for row in csv.DictReader(lines)]


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "metrics.csv"


def test_rows_are_written_a_hundred_at_a_time_and_at_the_end(file):
    logger = CsvLogger(file, resume=False)
    for step in range(150):
        logger.log_metrics({"train/loss": 1.0}, step)
    assert steps(file) == list(range(100))
    logger.finalize("success")
    assert steps(file) == list(range(150))


def test_training_that_goes_back_logs_no_step_twice(file):
    logger = CsvLogger(file, resume=False)
    for step in range(6):
        logger.log_metrics({"train/loss": 1.0}, step)
        if step == 3:
            logger.save()
    logger.go_back(2)
    logger.log_metrics({"train/loss": 2.0, "val/loss": 3.0}, 3)
    logger.save()
    assert steps(file) == [0, 1, 2, 3]
    again = CsvLogger(file, resume=True)
    again.go_back(-1)
    assert steps(file) == []


def test_a_row_that_a_kill_cut_is_left_out(file):
    logger = CsvLogger(file, resume=False)
    for step in range(3):
        logger.log_metrics({"a": 1.0, "z": 2.0}, step)
    logger.save()
    file.write_text(file.read_text()[:-8])
    CsvLogger(file, resume=True).go_back(2)
    assert steps(file) == [0, 1]


@pytest.mark.parametrize("more", [{}, {"val/loss": 1.0}], ids=["the same columns", "a new column"])
def test_a_full_disk_is_said_once_and_loses_nothing(file, capsys, monkeypatch, more):
    logger = CsvLogger(file, resume=False)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    before = file.read_text()

    def refuses(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuses)
        patch.setattr(Path, "write_text", refuses)
        for step in (1, 2):
            logger.log_metrics({"loss": 1.0, **more}, step)
            logger.save()
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "metrics.csv: No space left" in said
    assert file.read_text() == before
    logger.save()
    assert steps(file) == [0, 1, 2]
