"""ldm.tracking and ldm.training.loggers: W&B that never asks, and figures that a resume keeps."""

import csv
from types import SimpleNamespace

import pytest
import wandb
from PIL import Image

from ldm.run import Run
from ldm.tracking import WandbRun, choose_mode, flatten
from ldm.training.loggers import make_loggers


class Recorder:
    """Stands in for W&B's run."""

    def __init__(self, **options) -> None:
        self.options, self.id, self.logged, self.summary = options, options["id"], [], {}
        self.config = SimpleNamespace(update=lambda *args, **kwargs: None)

    def define_metric(self, name, step_metric) -> None:
        self.axis = (name, step_metric)

    def log(self, values, **options) -> None:
        self.logged.append((values, options))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **options: Recorder(**options))


def start(folder, **options) -> WandbRun:
    return WandbRun(folder, {"a": {"b": 1}}, project="ldm", name="vae/demo", mode="offline", **options)


def test_configs_are_flat():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


@pytest.mark.parametrize(
    ("requested", "environment", "login", "mode"),
    [
        ("disabled", "online", True, "disabled"),
        (None, "offline", True, "offline"),
        (None, None, True, "online"),
        (None, None, False, "offline"),
    ],
)
def test_only_a_key_at_hand_means_online(monkeypatch, requested, environment, login, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)

    def looked_up(prompt):
        assert not prompt, "nobody may be asked"
        return login

    monkeypatch.setattr(wandb, "login", looked_up)
    assert choose_mode(requested) == mode


def test_a_resumed_run_keeps_its_id_and_a_new_one_has_its_own(recorded, tmp_path):
    first = start(tmp_path)
    assert (tmp_path / "wandb_id.txt").read_text() == first.run.id + "\n"
    assert start(tmp_path, resume=True).run.id == first.run.id
    assert start(tmp_path).run.id != first.run.id


def test_steps_have_an_axis_of_their_own(recorded, tmp_path):
    """W&B's own counter drops what comes with a smaller step than the last: metrics after pictures, say."""
    run = start(tmp_path)
    run.log_images("samples", [Image.new("RGB", (4, 4))], ["a caption"], 1000)
    run.log({"val/loss": 0.5}, 999)
    run.summarise({"psnr_db": 20.0})
    run.finish()
    (pictures, first), (metrics, second) = run.run.logged
    assert run.run.axis == ("*", "step") and first == second == {}
    assert pictures["step"] == 1000 and pictures["samples"][0]._caption == "a caption"
    assert metrics == {"val/loss": 0.5, "step": 999}
    assert run.run.summary == {"psnr_db": 20.0} and run.run.finished
    assert run.run.options["config"] == {"a.b": 1}


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "demo").mkdir()
    return Run(tmp_path / "demo", {"stage": "vae", "name": "demo"})


def log(run: Run, steps: range, *, resume: bool, **values) -> None:
    (logger,) = make_loggers({"wandb": False}, run, resume=resume).lightning
    for step in steps:
        logger.log_metrics({"loss": 0.1 * step, **values}, step)
    logger.save()


@pytest.mark.parametrize("more", [{}, {"val/loss": 7.0}], ids=["the same columns", "a new column"])
def test_figures_go_on_after_a_resume_and_begin_anew_without(run, more):
    log(run, range(3), resume=False)
    log(run, range(3, 5), resume=True, **more)
    with (run.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4]
    assert [float(row["loss"]) for row in rows] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert all(rows[-1][key] == str(value) and rows[0][key] == "" for key, value in more.items())
    log(run, range(1), resume=False)
    assert len((run.path / "metrics.csv").read_text().splitlines()) == 2
