"""Tests of tools/latents.py sweep=...: planning, resuming, option errors, the recommendation and the report."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldm.cli.arguments import quote_text_values
from ldm.cli.main import child_environment
from ldm.data.images import prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.diffusion.samplers.ddim import DDIM
from ldm.errors import UserError
from ldm.evaluation.latents.sweep import (
    LOSSES,
    LatentSize,
    as_time,
    parse_list,
    parse_sizes,
    plan_stage_2,
    plan_sweep,
    run_sweep,
)
from ldm.evaluation.latents.sweep_figure import plot_size_sweep
from ldm.evaluation.latents.sweep_report import measure_sweep, recommend_size
from ldm.metrics.features import FEATURE_NETWORKS
from ldm.runs.run import Run
from ldm.runtime import child, signals
from ldm.runtime.paths import bundled_folder
from tests.evaluation.samples.test_report import MeanColours
from tests.finished_run import finished_run
from tests.sampling.test_pipeline import build_pipeline

ROOT = Path(__file__).parents[3]
TINY = "trainer=cpu,trainer.precision=32-true,trainer.max_steps=3,batch_size=8,val_images=8,logger=csv"


def latents_tool() -> None:
    runpy.run_path(str(bundled_folder("tools") / "latents.py"), run_name="__main__")


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def planned_runs(sizes: str = "f4c4,f8c16", losses: tuple[str, ...] = ("plain",), minutes: float = 2, extra=()):
    common = ["data=openmoji", *extra]
    return plan_sweep(parse_sizes(sizes, 32), list(losses), Path("a sweep"), minutes, common)


def test_sizes_lists_and_times_are_parsed_and_formatted():
    assert parse_sizes("f4c4, f8c16,f1c3,f4c4", 32) == [LatentSize(4, 4), LatentSize(8, 16), LatentSize(1, 3)]
    assert [str(size) for size in parse_sizes("f16c32", 64)] == ["f16c32"]
    assert parse_list(None) == parse_list("[]") == []
    overrides = ["batch_size=64", "optimizer.build.betas=[0.9,0.95]", "a='b,c'"]
    assert parse_list(f"[{', '.join(overrides)}]") == overrides
    assert [as_time(minutes) for minutes in (0.05, 2, 90.5)] == ["00:00:03", "00:02:00", "01:30:30"]
    names = [run.name for run in planned_runs(losses=("plain", "adversarial"))]
    assert names == ["f4c4-plain", "f4c4-adversarial", "f8c16-plain", "f8c16-adversarial"]


@pytest.mark.parametrize("name", ["f1c2", "f2c12", "f4c4", "f8c16", "f16c24", "f32c8"])
@pytest.mark.parametrize("loss", LOSSES)
def test_planned_run_has_the_requested_latent_size(name, loss):
    (planned_run,) = planned_runs(name, (loss,), extra=("batch_size=7",))
    assert planned_run.name == f"{name}-{loss}"
    _, module, *arguments = planned_run.command()
    with initialize_config_dir(str(bundled_folder("conf")), version_base="1.3"):
        config = compose("train", quote_text_values(arguments))
    assert (module, config.name, config.runs_dir) == ("ldm.train", planned_run.name, "a sweep")
    assert config.trainer.max_time == "00:02:00" and config.batch_size == 7
    with torch.device("meta"):
        model = instantiate(config.autoencoder.model)(sample_size=32)
        latent = model.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    size = planned_run.size
    assert latent.shape == (1, size.channels, 32 // size.factor, 32 // size.factor)


def test_stage_2_uses_the_same_data_and_network_on_each_autoencoder(fake_training):
    runs = planned_runs()
    run_sweep(runs)
    for run in runs:
        folder = Run.open(run.folder)
        options = ["stage=diffusion", "data=openmoji", "runs_dir=a sweep", "conditioning=class"]
        Run.create(run.folder, OmegaConf.create({}), {**folder.facts, "next_options": options})
    stage_2 = plan_stage_2(runs, 0.5)
    run_sweep(stage_2)
    for run, command in zip(stage_2, fake_training["commands"][2:], strict=True):
        assert run.folder == Path("a sweep/diffusion", run.name) and run.is_finished()
        assert command[2:] == [
            *("stage=diffusion", "data=openmoji", "conditioning=class", "network=unet_demo"),
            *(f"vae=a sweep/vae/{run.name}", "trainer.max_time=00:00:30", f"name={run.name}", "runs_dir=a sweep"),
        ]


def test_samples_of_each_autoencoder_are_measured(make_images, tmp_path, monkeypatch):
    monkeypatch.setitem(FEATURE_NETWORKS, "mean_colours", MeanColours)
    source = ImageFolder(make_images(tmp_path / "squares", 64, size=8))
    images = prepare(source, resolution=8, cache_dir=tmp_path / "cache", val_fraction=0.25, progress=False)
    pipeline, figures = build_pipeline(), {"steps": 5, "training_s": 30.0}
    (stage_1,) = plan_sweep([LatentSize(2, 4)], ["plain"], tmp_path / "sweep", 1, [])
    finished_run(
        stage_1.folder, "vae", images, pipeline.autoencoder.model, figures=figures, next_options=["stage=diffusion"]
    )
    (stage_2,) = plan_stage_2([stage_1], 1)
    run = finished_run(stage_2.folder, "diffusion", images, figures=figures)
    pipeline.save(run.pipeline_folder)
    options = {"sampler": DDIM(steps=3), "device": torch.device("cpu"), "features": "mean_colours", "num_samples": 32}
    report = measure_sweep([stage_1], [stage_2], target_psnr_db=0, **options)
    (row,) = report.content["report"]["rows"]
    evaluation = json.loads((run.path / "evaluation.json").read_text())
    assert row["kd_samples"] == evaluation["kd_samples"] > 0 and row["stage_2_minutes"] == 0.5
    assert report.content["report"]["recommendation"]["rule"] == "samples"
    assert len(report.figures["sweep.png"].axes) == 3


@pytest.fixture
def fake_training(monkeypatch) -> dict[str, list]:
    """Replace the training process with a function that records commands and returns the listed exit codes, then 0."""
    record: dict[str, list] = {"codes": [], "commands": []}

    def train(command, _):
        """Create a run folder instead of training; the run is finished if the exit code is 0."""
        record["commands"].append(command)
        arguments, code = dict(argument.split("=", 1) for argument in command[2:]), next(iter(record["codes"]), 0)
        del record["codes"][:1]
        options = [option for option in command[2:] if not option.startswith(("name=", "runs_dir=", "resume="))]
        stage = arguments["stage"]
        facts = {"stage": stage, "finished": None if code else 1.0, "options": options}
        Run.create(Path(arguments["runs_dir"], stage, arguments["name"]), OmegaConf.create({}), facts)
        if code == 130:
            raise signals.Interrupted(2)
        return code

    monkeypatch.setattr(child, "run_python", train)
    return record


def test_finished_runs_are_skipped_and_interrupted_ones_resumed(fake_training, capsys):
    fake_training["codes"] = [0, 130]
    with pytest.raises(KeyboardInterrupt):
        run_sweep(planned_runs())
    assert re.search(r"f8c16-plain, 2 of 2: .*2 minutes", capsys.readouterr().out)
    run_sweep(planned_runs("f4c4,f4c8,f8c16"))
    command, resume_command = (command for command in fake_training["commands"] if "name=f8c16-plain" in command)
    assert len(fake_training["commands"]) == 4 and resume_command == [*command, "resume=true"]
    output = capsys.readouterr().out
    assert re.search(r"3 training runs, 1 of them .*finished", output)
    assert re.search(r"f4c8-plain, 1 of 2: .*4 minutes", output)


def test_failed_run_stops_the_sweep_and_keeps_finished_runs(fake_training):
    fake_training["codes"] = [0, 2]
    with pytest.raises(UserError, match="f8c16-plain .*exit code 2") as error:
        run_sweep(planned_runs("f4c4,f8c16,f4c8"))
    assert len(fake_training["commands"]) == 2
    assert shlex.join(["python", *fake_training["commands"][-1]]) in str(error.value)
    assert Run.open("a sweep/vae/f4c4-plain").finished


@pytest.mark.parametrize("changes", [{"minutes": 3}, {"extra": ("seed=1",)}])
def test_changed_options_are_rejected_before_training(fake_training, changes):
    run_sweep(planned_runs("f8c16"))
    with pytest.raises(UserError, match="f8c16-plain .*options: .*(max_time 00:03:00|seed 1).*name="):
        run_sweep(planned_runs("f4c4,f8c16", **changes))
    assert len(fake_training["commands"]) == 1


def test_child_process_does_not_inherit_hydra_full_error(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    script = "import os, sys; sys.exit(7 + ('HYDRA_FULL_ERROR' in os.environ))"
    assert child.run_python(["-c", script], child_environment()) == 7


def row(size: str, psnr_db: float, loss: str = "plain", fd: float | None = None) -> dict:
    factor, channels = map(int, size[1:].split("c"))
    return {
        "name": f"{size}-{loss}",
        "size": size,
        "loss": loss,
        "num_values": channels * (32 // factor) ** 2,
        "psnr_db": psnr_db,
        "fd": fd,
        "features_in_loss": False,
    }


SIZES = [row("f4c16", 28), row("f4c4", 25.5), row("f8c16", 26), row("f8c4", 20)]
PLAIN, ADVERSARIAL = row("f4c4", 26, fd=9), row("f4c4", 25.2, "adversarial", fd=4)


@pytest.mark.parametrize(
    ("rows", "target", "rule", "name"),
    [
        (SIZES, 25.0, "smallest", "f8c16-plain"),  # as small as f4c4, with a higher PSNR
        (SIZES, 27, "smallest", "f4c16-plain"),
        (SIZES, 19, "smallest", "f8c4-plain"),
        (SIZES, 30, "best", "f4c16-plain"),
        ([PLAIN, ADVERSARIAL], 25, "smallest", "f4c4-adversarial"),
        ([PLAIN, ADVERSARIAL], 25.5, "smallest", "f4c4-plain"),  # the adversarial run does not reach the target
        ([PLAIN, {**ADVERSARIAL, "features_in_loss": True}], 25, "smallest", "f4c4-plain"),
    ],
)
def test_recommendation_is_the_smallest_size_that_reaches_the_target(rows, target, rule, name):
    advice = recommend_size(rows, target)
    assert (advice["rule"], advice["name"], advice["size"]) == (rule, name, name.partition("-")[0])
    assert f"target_psnr_db={target:g}" in advice["text"] and ("no size reaches" in advice["text"]) == (rule == "best")


@pytest.mark.parametrize(
    ("target", "rule", "name"),
    [(25, "samples", "f8c16-plain"), (27, "samples", "f4c16-plain"), (30, "best", "f4c16-plain")],
)
def test_recommendation_has_the_lowest_kd_of_samples(target, rule, name):
    kds = {"f4c16": 0.05, "f4c4": 0.04, "f8c16": 0.03, "f8c4": 0.02}
    advice = recommend_size([{**r, "kd_samples": kds[r["size"]]} for r in SIZES], target)
    assert (advice["rule"], advice["name"]) == (rule, name)
    assert ("lowest KD of samples" in advice["text"]) == (rule == "samples")


def test_kd_of_samples_is_ignored_if_a_loss_used_its_features():
    rows = [{**PLAIN, "kd_samples": 0.05}, {**ADVERSARIAL, "kd_samples": 0.02, "features_in_loss": True}]
    advice = recommend_size(rows, 25)
    assert (advice["rule"], advice["name"]) == ("smallest", "f4c4-plain")


def test_sweep_command_trains_runs_and_recommends_a_size(call, make_images, tmp_path, monkeypatch):
    make_images(tmp_path / "my squares, small", 60)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = ["data=image_folder", f"data.path={tmp_path / 'my squares, small'}", "data.resolution=16"]
    options = [*data, "data.val_fraction=0.2", f"train=[{TINY}]", "features=none", "device=cpu", "name=mine"]
    result = call(latents_tool, "sweep=f2c3,f4c4", "minutes=1", "target_psnr_db=5", *options)
    assert result.code == 0, result
    folder = Path("runs/sweeps/mine")
    content = json.loads((folder / "sweep.json").read_text())
    report = content["report"]
    small, large = sorted(report["rows"], key=lambda r: r["num_values"])
    assert (small["size"], small["latent_shape"], small["compression"]) == ("f4c4", [4, 4, 4], 12)
    assert (large["size"], large["num_values"], large["steps"]) == ("f2c3", 192, 3)
    for metrics in (small, large):
        run = Run.open(metrics["run"])
        assert run.finished and run.path == folder / "vae" / f"{metrics['size']}-plain"
        assert metrics["psnr_db"] == pytest.approx(run.facts["figures"]["psnr_db"], abs=0.05)
        assert metrics["kl_bits"] > 0 and metrics["fd"] is None
        curve = report["pca"][str(metrics["factor"])]
        baseline = dict(zip(curve["num_values"], curve["psnr_db"], strict=True))[metrics["num_values"]]
        assert metrics["pca_psnr_db"] == pytest.approx(baseline, abs=1e-3)
        assert f"{metrics['psnr_db']:.2f}" in result.out and f"{metrics['gain_db']:+.2f}" in result.out
        assert set(content["trainings"][f"vae/{metrics['name']}"]) < set(run.facts["options"])
    recommended_run = Run.open(folder / "vae/f4c4-plain")
    for text in (
        f"Recommendation: {small['size']}",
        "autoencoder.model.latent_channels=4",
        "trainer.max_time=00:10:00",
        recommended_run.next_training_command(),
        "f2c3-plain, 1 of 2: at most 2 minutes",
    ):
        assert text in result.out
    assert (folder / "sweep.png").stat().st_size > 10_000
    without_rate = {**report, "rows": [{**metrics, "kl_bits": None} for metrics in report["rows"]]}
    assert len(plot_size_sweep(report).axes) == 2 and len(plot_size_sweep(without_rate).axes) == 1

    monkeypatch.setattr(child, "run_python", lambda *_: pytest.fail("a finished run was started again"))
    repeated = call(latents_tool, "sweep=f4c4", "minutes=1", "target_psnr_db=99", *options)
    assert repeated.code == 0 and "no size reaches" in repeated.out, repeated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either run="),
        (["run=somewhere", "sweep=f4c4"], "either run="),
        (["sweep=f4c4,f5c4"], "'f5c4' is not a valid latent size for data.resolution=32"),
        (["sweep=f4"], "'f4' is not a valid latent size"),
        (["sweep=f64c4"], "a power of 2 that divides the resolution"),
        (["sweep=f2c13"], "at most 3 f^2"),
        (["sweep=f4c4", "losses=plain,l2"], "losses=[plain,l2] must be 'plain' or 'adversarial'"),
        (["sweep=f4c4", "minutes=0"], "minutes=0 must be 0.02 or more"),
        (["sweep=f4c4", "sample_minutes=-1"], "sample_minutes=-1 must be 0.02 or more"),
        (["sweep=f4c4", "num_samples=3"], "num_samples=3 must be"),
        (["sweep=f4c4", "train=[nonsense]"], "must be a list of overrides"),
        (["sweep=f4c4", "features=resnet"], "features=resnet is unknown"),
        (["sweep=f4c4", "target_psnr_db=high"], "target_psnr_db=high must be a number"),
        (["sweep=f4c4", "num_images=1"], "num_images=1 must be 2 or more"),
        (["sweep=f4c4", "seed=1.5"], "seed=1.5 must be a whole number"),
        (["sweep=f4c4", "batch_size=0"], "batch_size=0 must be 1 or more"),
        (["sweep=f4c4", "data.resolution=big"], "data.resolution=big must be a whole number"),
    ],
)
def test_invalid_command_line_options_are_rejected(call, monkeypatch, arguments, message):
    monkeypatch.setattr(child, "run_python", lambda *_: pytest.fail("trained before the options were checked"))
    result = call(latents_tool, *arguments)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result
