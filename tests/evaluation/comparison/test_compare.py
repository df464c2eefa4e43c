"""Tests of tools/compare.py: reading runs from folders and W&B, verdicts, and the report."""

import csv
import io
import json
import re
import runpy
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import wandb
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from scipy import stats

from ldm.commands.evaluate import log_evaluation
from ldm.data.images import ImageData, prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.diffusion.samplers.ddim import DDIM
from ldm.errors import UserError
from ldm.evaluation.comparison import images as compare_images
from ldm.evaluation.comparison.compare import Comparison, compare_runs
from ldm.evaluation.comparison.images import side_by_side
from ldm.evaluation.comparison.report import ComparisonReport, format_number
from ldm.evaluation.comparison.runs import RunRecord, is_wandb_path
from ldm.evaluation.comparison.statistics import SAMPLING, SEEDS, better_direction, compare_groups, estimate, holm
from ldm.evaluation.curves import plot_curves
from ldm.metrics.metric import Metric, proportion_error
from ldm.networks.conditioning import ClassCondition
from ldm.runs.lineage import run_weights_sha256
from ldm.runs.run import Run
from ldm.runtime.paths import bundled_folder
from ldm.tracking.artifact import sha256
from ldm.tracking.comparison import track_comparison
from ldm.tracking.run import flatten

EARLIER_RUNS = Path(__file__).parents[2] / "earlier_runs"
EVALUATION = {
    "features": "efficientnet_lite",
    "features_key": "efficientnet_lite-12345678-224px",
    "num_samples": 256,
    "reference": "squares/train@abcdef01",
    "guidance": 3.0,
    "guidance_interval": [0.0, 1.0],
    "sampler": {"method": "dpmpp", "steps": 20, "clip": None},
    "kd_reconstructions": 0.01,
    "kd_reconstructions_standard_error": 0.001,
}


def call_tool(call, name: str, *arguments: str):
    return call(lambda: runpy.run_path(str(bundled_folder("tools") / f"{name}.py"), run_name="__main__"), *arguments)


def make_run(
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    stage: str = "diffusion",
    kd: float = 0.1,
    lr: float = 1e-3,
    objective: str = "simple",
    evaluation: dict | None = None,
    **facts,
) -> str:
    """Create a run folder as training and tools/evaluate.py write it, but without weights."""
    config = {
        "name": name,
        "runs_dir": str(folder),
        "seed": seed,
        "objective": {"loss": objective},
        "optimizer": {"lr": lr, "build": {"_target_": "torch.optim.AdamW", "lr": lr, "_partial_": True}},
        "logger": {"wandb": False},
        "stage": {"build": {"optimizer": {"lr": lr}, "find_autoencoder": {"runs": str(folder)}}},
    }
    default_facts = {
        "stage": stage,
        "name": name,
        "seed": seed,
        "finished": 1.0,
        "data_fingerprint": "ab" * 32,
        "contract": {"autoencoder_sha256": "cd" * 32},
        "figures": {"steps": 300, "training_s": 10.0 + seed},
    }
    run = Run.create(folder / stage / name, OmegaConf.create(config), {**default_facts, **facts})
    metrics = {**EVALUATION, "kd_samples": kd, "kd_samples_standard_error": 0.004, "retrieval_at_1_samples": 0.1}
    (run.path / "evaluation.json").write_text(json.dumps({**metrics, **(evaluation or {})}))
    with (run.path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train/loss", "val/loss"])
        writer.writeheader()
        for step in range(0, 300, 10):
            writer.writerow({"epoch": 0, "step": step, "train/loss": 1 / (1 + step) + 0.01 * seed})
        writer.writerow({"epoch": 0, "step": 299, "val/loss": 0.5 + 0.01 * seed})
    return str(run.path)


def make_runs(folder: Path, name: str, kds: tuple[float, ...], **options) -> list[str]:
    return [make_run(folder, f"{name}{seed}", seed=seed, kd=kd, **options) for seed, kd in enumerate(kds)]


def verdict(comparison: Comparison, metric: str, group: int = 1):
    (row,) = [row for row in comparison.rows if row.metric == metric]
    return row.verdicts[group - 1]


def print_to_text(comparison: Comparison) -> str:
    return ComparisonReport(comparison).print(Console(width=80, record=True, file=io.StringIO())).export_text()


def test_better_direction_follows_from_the_metric_name():
    higher = "psnr_db ssim retrieval_at_5_samples density coverage_samples"
    lower = "kd_samples fd_reconstructions val/loss_t1_to_250 lpips val/vlb_bits_per_latent_dim class_shift_samples"
    # a rate means nothing without its distortion; the remaining metrics are costs or depend only on the data
    neither = "kl_bits kd_validation fd_floor precision_floor retrieval_at_1_chance pca_psnr_db steps peak_memory_gb"
    for names, direction in ((higher, 1), (lower, -1), (neither, 0)):
        assert [better_direction(name) for name in names.split()] == [direction] * len(names.split())


def test_holm_limits_the_family_wise_error_rate():
    """Check Holm's procedure against values computed by hand, and on 17 metrics, 10 of which are correlated."""
    assert holm({"a": 0.03, "b": 0.001, "c": 0.016, "d": 0.9}) == ["b", "c"]  # the third limit is 0.05 / 2 < 0.03
    assert holm({"a": 0.02}) == ["a"] and holm({"a": 0.02, "b": 0.06, "c": 0.5}) == [] and holm({}) == []
    generator = np.random.default_rng(3)
    shared = generator.normal(0, 1, (1000, 2, 3, 1))
    values = shared * (np.arange(17) < 10) + generator.normal(0, 1, (1000, 2, 3, 17))
    p_values = stats.ttest_ind(values[:, 0], values[:, 1], axis=1, equal_var=False).pvalue
    assert np.mean([bool(holm(dict(enumerate(trial)))) for trial in p_values]) < 0.06


def test_proportion_error_is_positive_for_proportions_0_and_1():
    assert proportion_error(0.0, 256) == pytest.approx(proportion_error(1.0, 256)) != 0
    assert proportion_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)


def test_runs_with_different_seeds_form_groups_and_similar_groups_are_within_noise(tmp_path):
    kds, similar_kds = (0.10, 0.12, 0.11), (0.115, 0.1, 0.112)
    one_group = compare_runs([*make_runs(tmp_path, "a", kds)])
    assert [len(group.runs) for group in one_group.groups] == [3] and not one_group.rows[0].verdicts
    assert SEEDS in print_to_text(one_group)
    (row,) = [row for row in one_group.rows if row.metric == "kd_samples"]
    assert row.groups[0].interval == pytest.approx(stats.ttest_1samp(kds, 0).confidence_interval(0.95))
    comparison = compare_runs([*make_runs(tmp_path, "c", kds), *make_runs(tmp_path, "b", similar_kds, lr=2e-3)])
    assert [[run.name for run in group.runs] for group in comparison.groups] == [["c0", "c1", "c2"], ["b0", "b1", "b2"]]
    assert comparison.differences == {"optimizer.lr": ["0.001", "0.002"]}
    result = verdict(comparison, "kd_samples")
    assert result.verdict == "within noise" and result.difference.of == SEEDS
    test = stats.ttest_ind(similar_kds, kds, equal_var=False)
    assert result.difference.interval == pytest.approx(test.confidence_interval(0.95))
    assert result.difference.p_value == pytest.approx(test.pvalue)
    assert any(note.startswith("B vs A, all") and note.endswith("within noise.") for note in comparison.notes)


def test_shifted_group_is_significant_in_the_right_direction(tmp_path):
    group_a = make_runs(tmp_path, "a", (0.10, 0.12, 0.11))
    group_b = make_runs(tmp_path, "b", (0.20, 0.22, 0.21), lr=2e-3, evaluation={"retrieval_at_1_samples": 0.3})
    comparison = compare_runs([*group_a, *group_b])
    assert verdict(comparison, "kd_samples").verdict == "A better"
    # equal for all seeds, so only the sampling noise of 256 samples remains
    result = verdict(comparison, "retrieval_at_1_samples")
    assert result.verdict == "B better" and result.difference.of == SAMPLING
    assert comparison.equal_metrics["kd_reconstructions"] == 0.01
    assert any("Holm" in note and "kd samples (A better)" in note for note in comparison.notes)
    assert verdict(compare_runs([*group_b, *group_a]), "kd_samples").verdict == "B better"
    figure = plot_curves(comparison.curve_names(), [(group.title, run.curves) for group, run in comparison.runs])
    (panel,) = [axes for axes in figure.axes if axes.get_title() == "val/loss"]
    assert len(panel.lines) == 6 and all(line.get_marker() == "o" for line in panel.lines), "single points need markers"


def test_constant_group_is_compared_with_varying_group():
    constant, varying = [Metric(0.5)] * 3, [Metric(value) for value in (0.1, 0.2, 0.3)]
    difference = estimate(constant, varying, enough_seeds=True)
    low, high = stats.ttest_1samp((0.1, 0.2, 0.3), 0.5).confidence_interval(0.95)
    assert difference.of == SEEDS and difference.interval == pytest.approx((low - 0.5, high - 0.5))


def test_comparison_of_single_runs_covers_sampling_noise_only(tmp_path):
    comparison = compare_runs([make_run(tmp_path, "a", kd=0.1), make_run(tmp_path, "b", kd=0.105, lr=2e-3)])
    result = verdict(comparison, "kd_samples")
    assert result.verdict == "within noise" and result.difference.of == SAMPLING
    assert SAMPLING in print_to_text(comparison), "the text must not be wrapped"
    assert any(note.startswith(SAMPLING) and "at least 3 seeds per group" in note for note in comparison.notes)
    different = compare_runs([make_run(tmp_path, "c", kd=0.1), make_run(tmp_path, "d", kd=0.2, lr=2e-3)])
    assert verdict(different, "kd_samples").verdict == "A better" and "A better" in print_to_text(different)


@pytest.mark.parametrize("dof", [3, 19, np.inf])
def test_intervals_use_student_t_for_few_degrees_of_freedom(dof):
    """A difference of 2.2 standard errors is within noise with 3 degrees of freedom, but not with 19 or more."""
    group_a, group_b = [Metric(0.5, 0.01, dof)], [Metric(0.5 + 0.01 * 2.2 * 2**0.5, 0.01, dof)]
    result = compare_groups("kd", group_a, group_b, ("A", "B"), enough_seeds=False)
    low, high = stats.t(2 * dof, scale=0.01 * 2**0.5).interval(0.95)
    assert result.difference.interval == pytest.approx((result.difference.mean + low, result.difference.mean + high))
    assert (result.verdict == "within noise") == (dof == 3)


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 1)], ids=["two seeds", "one seed twice"])
def test_fewer_than_three_distinct_seeds_fall_back_to_sampling_noise(tmp_path, seeds):
    runs = [make_run(tmp_path, f"a{i}", seed=seed, kd=0.1 + i / 1000) for i, seed in enumerate(seeds)]
    comparison = compare_runs([*runs, *make_runs(tmp_path, "b", (0.1, 0.11, 0.12), lr=2e-3)])
    assert verdict(comparison, "kd_samples").difference.of == SAMPLING
    assert comparison.rows[0].groups[1].of == SEEDS, "only group B has three seeds"


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"features_key": "efficientnet_lite-00000000-224px"}, "features_key"),
        ({"num_samples": 512}, "num_samples"),
        ({"reference": "squares/train@00000000"}, "reference"),
        ({"guidance_interval": None}, "guidance_interval"),
        ({"guidance": 1.0, "sampler": {"method": "dpmpp", "steps": 50}}, "guidance, sampler.steps"),
    ],
)
def test_metrics_with_different_settings_are_not_compared(tmp_path, changes, settings):
    """Metrics that depend only on the data are compared even if the sampler differs."""
    floors = [{"fd_floor": value, "fd_floor_standard_error": 0.01} for value in (1.0, 1.2)]
    runs = [make_run(tmp_path, "a", evaluation=floors[0])]
    runs.append(make_run(tmp_path, "b", kd=0.9, lr=2e-3, evaluation={**floors[1], **changes}))
    comparison = compare_runs(runs)
    result = verdict(comparison, "kd_samples")
    assert result.verdict.startswith("not comparable: ") and settings in result.verdict and result.difference is None
    assert (verdict(comparison, "fd_floor").verdict == "differ") == ("guidance" in settings)


def test_group_with_mixed_settings_has_no_mean(tmp_path):
    dinov2_run = make_run(tmp_path, "b", seed=1, kd=0.3, evaluation={"features": "dinov2"})
    comparison = compare_runs([make_run(tmp_path, "a"), dinov2_run])
    (row,) = [row for row in comparison.rows if row.metric == "kd_samples"]
    assert row.groups == [None]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr": 2e-3}, "noise unknown"),
        ({"objective": "hybrid"}, "not comparable: objective"),
        ({"data_fingerprint": "ef" * 32}, "not comparable: data_fingerprint"),
    ],
)
def test_losses_are_comparable_only_with_equal_objective_and_data(tmp_path, changes, expected):
    comparison = compare_runs([make_run(tmp_path, "a"), make_run(tmp_path, "b", seed=1, **changes)])
    assert len(comparison.groups) == 2 and verdict(comparison, "val/loss").verdict == expected


def test_differences_omit_names_paths_and_duplicates(tmp_path):
    """Differences contain options and environment facts, but no names, no paths and no duplicates."""
    facts = {"commit": "0123456789" * 4, "versions": {"torch": "2.12"}, "precision": "bf16-mixed"}
    comparison = compare_runs([make_run(tmp_path / "x", "a"), make_run(tmp_path / "y", "b", seed=3, lr=2e-3, **facts)])
    keys = set(comparison.differences)
    assert {"optimizer.lr", "seed", "precision", "commit", "versions.torch"} <= keys
    assert not keys & {"name", "runs_dir", "optimizer.build.lr"} and not any(key.startswith("stage") for key in keys)
    assert comparison.differences["commit"][1] == "012345678901" and comparison.differences["seed"] == ["0", "3"]


def test_notes_report_unfinished_and_unevaluated_runs(tmp_path):
    run_b = make_run(tmp_path, "b", lr=2e-3, finished=None)
    (Path(run_b) / "evaluation.json").unlink()
    comparison = compare_runs([make_run(tmp_path, "a"), run_b])
    assert verdict(comparison, "kd_samples").verdict == "not in B"
    assert any("not finished" in note and run_b in note for note in comparison.notes)
    assert any("No evaluation" in note and "tools/evaluate.py" in note and run_b in note for note in comparison.notes)


def test_diverged_metrics_are_not_compared(tmp_path):
    diverged_run = make_run(tmp_path, "b", lr=2e-3, evaluation={"kd_samples": float("nan")})
    with (Path(diverged_run) / "metrics.csv").open("a", newline="") as file:
        file.write("0,399,nan,nan\n")
    comparison = compare_runs([make_run(tmp_path, "a"), diverged_run])
    assert verdict(comparison, "val/loss").verdict == verdict(comparison, "kd_samples").verdict == "not in B"
    assert any("non-finite" in note and "not compared" in note and diverged_run in note for note in comparison.notes)
    ComparisonReport(comparison).save(tmp_path / "out")
    json.loads((tmp_path / "out/compare.json").read_text(), parse_constant=pytest.fail)


def test_html_page_is_self_contained(tmp_path):
    comparison = compare_runs([make_run(tmp_path, "a<b"), make_run(tmp_path, "b", kd=0.2, lr=2e-3)])
    samples = Image.new("RGB", (20, 10), "red")
    files = ComparisonReport(comparison, samples, ["a note"], {"seed": 0}).save(tmp_path / "out")
    assert [file.name for file in files] == ["compare.json", "compare.html", "compare.png", "compare_images.png"]
    page = files[1].read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|url\(|src=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == 2 and "a&lt;b" in page and "a<b" not in page
    assert SAMPLING in page and "A better" in page
    content = json.loads(files[0].read_text())
    assert set(content) == {"confidence", "runs", "differences", "figures", "equal", "notes", "images"}
    assert content["runs"][0]["seed"] == 0 and "a note" in content["notes"]
    (row,) = [row for row in content["figures"] if row["metric"] == "kd_samples"]
    assert row["better"] == "lower" and {"mean", "interval", "of", "dof", "runs"} <= set(row["groups"][0])
    assert row["verdicts"][0]["verdict"] == "A better" and len(row["verdicts"][0]["difference"]["interval"]) == 2
    with Image.open(files[2]) as figure:
        assert figure.width > 600 and len(figure.convert("RGB").getcolors(10_000_000)) > 50


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [(0.12345, 0.0123, "0.123"), (28.4567, 1.9, "28.5"), (1e3, 99, "1000"), (-1e-5, 0.011, "0.000")],
)
def test_format_number_rounds_to_the_error_bar(value, width, text):
    assert format_number(value, width) == text


class FakeApi:
    """A fake wandb.Api that reads runs from folders and returns them as training and evaluation would log them."""

    def __init__(self, folders: dict[str, str]) -> None:
        self.all_runs = []
        for path, folder in folders.items():
            run = Run.open(folder)
            facts = {key: value for key, value in run.facts.items() if key not in ("figures", "finished")}
            with (run.path / "metrics.csv").open() as file:
                rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
            evaluation = json.loads((run.path / "evaluation.json").read_text())
            metrics = flatten({key: value for key, value in evaluation.items() if value is not None})
            evaluation_config = {"run": folder, "guidance": 3, "training_id": path.rpartition("/")[2]}
            summary = {**run.facts["figures"], "val/loss": 9.0, "_runtime": 3, "step": 299}
            summary["pipeline_sha256"] = evaluation.get("weights_sha256")
            config = flatten({**run.config(), "run": {**facts, "finished": None}})
            self.add(path, "2026-01-01", config, summary, rows)
            self.add(f"{path}e0", "2026-01-02", evaluation_config, {"kd_samples": 7.0}, [])
            self.add(f"{path}e1", "2026-01-03", evaluation_config, metrics, [])
        self.add("me/ldm/zzz", "2026-02-01", {"training_id": "zz"}, {"kd_samples": 0.9}, [])

    def add(self, path, created_at, config, summary, rows) -> None:
        options = {"created_at": created_at, "config": config, "summary_metrics": summary}
        run_id = path.rpartition("/")[2]
        self.all_runs.append(SimpleNamespace(path=path, id=run_id, scan_history=lambda: iter(rows), **options))

    def run(self, path):
        (run,) = [run for run in self.all_runs if run.path == path]
        return run

    def runs(self, project, filters):
        ((key, value),) = filters.items()
        return [run for run in self.all_runs if run.config.get(key.removeprefix("config.")) == value]


@pytest.fixture
def fake_wandb(monkeypatch):
    """Return a function that replaces wandb.Api with a fake, given a run folder for each W&B path."""

    def fake_wandb(folders: dict[str, str]) -> FakeApi:
        api = FakeApi(folders)
        monkeypatch.setattr("ldm.tracking.comparison.has_key", lambda: True)
        monkeypatch.setattr(wandb, "Api", lambda: api)
        return api

    return fake_wandb


def test_wandb_runs_give_the_same_table_as_folders(tmp_path, fake_wandb, monkeypatch):
    folders = {"me/ldm/aaa": make_run(tmp_path, "a"), "me/ldm/bbb": make_run(tmp_path, "b", kd=0.2, lr=2e-3)}
    fake_wandb(folders)
    local, remote = compare_runs(list(folders.values())), compare_runs(list(folders))
    mixed = compare_runs(["me/ldm/aaa", folders["me/ldm/bbb"]])
    assert local.rows == remote.rows == mixed.rows and local.differences == remote.differences
    assert all(run.finished for _, run in remote.runs)
    figure, notes = side_by_side(remote, DDIM(2), device=torch.device("cpu"))
    assert figure is None and "me/ldm/aaa" in notes[0]
    with pytest.raises(UserError, match="me/ldm/ccc is not a run folder.*W&B"):
        compare_runs(["me/ldm/aaa", "me/ldm/ccc"])
    monkeypatch.setattr("ldm.tracking.comparison.has_key", lambda: False)
    with pytest.raises(UserError, match="wandb login"):
        compare_runs(["me/ldm/aaa", "me/ldm/bbb"])


def test_steps_logged_twice_after_resuming_count_once(tmp_path, fake_wandb):
    """The run was killed after step 290 and resumed from step 200. Only the last value of each step is used."""
    runs = make_runs(tmp_path, "a", (0.10, 0.12, 0.11))
    with (Path(runs[1]) / "metrics.csv").open("a", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train/loss", "val/loss"])
        writer.writerows({"epoch": 0, "step": step, "train/loss": 5.0} for step in range(200, 320, 10))
        writer.writerow({"epoch": 0, "step": 299, "val/loss": 0.75})
    folders = {f"me/ldm/{name}": run for name, run in zip(("aaa", "bbb", "ccc"), runs, strict=True)}
    fake_wandb(folders)
    local, remote = compare_runs(runs), compare_runs(list(folders))
    for comparison in (local, remote):
        steps, values = comparison.runs[1][1].curves["train/loss"]
        assert steps == list(range(0, 320, 10)) and values[20:] == [5.0] * 12 and values[19] < 1
        assert comparison.runs[1][1].curves["val/loss"] == ([299], [0.75])
    # in W&B, the summary was written before the run was resumed, but the history contains later steps
    assert any("not finished" in note and note.endswith(": me/ldm/bbb.") for note in remote.notes)
    assert all(run.finished for _, run in local.runs)


def test_evaluation_of_different_weights_is_ignored(tmp_path, fake_wandb):
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", kd=0.2, lr=2e-3)]
    for run in map(Path, runs):
        weights = run / "pipeline/network/model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"weights")
        metrics = json.loads((run / "evaluation.json").read_text())
        (run / "evaluation.json").write_text(json.dumps({**metrics, "weights_sha256": sha256([weights])}))
    folders = {"me/ldm/aaa": runs[0], "me/ldm/bbb": runs[1]}
    api = fake_wandb(folders)
    assert all(verdict(compare_runs(sources), "kd_samples").verdict == "A better" for sources in (runs, list(folders)))
    weights.write_bytes(b"weights after more training")
    api.run("me/ldm/bbb").summary_metrics["pipeline_sha256"] = sha256([weights])
    for sources in (runs, list(folders)):
        comparison = compare_runs(sources)
        assert verdict(comparison, "kd_samples").verdict == "not in B"
        (note,) = [note for note in comparison.notes if "Evaluation ignored" in note]
        assert sources[1] in note and sources[0] not in note and "tools/evaluate.py" in note


def test_mistyped_folder_is_not_a_wandb_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert is_wandb_path("entity/project/1a2b3c4d")
    assert not any(map(is_wandb_path, ["runs/vae/typo", "mine/vae/typo", "vae/typo", "/entity/project/run"]))


def test_wandb_report_is_created_if_possible(tmp_path, monkeypatch):
    tracker = SimpleNamespace(mode="offline", run=SimpleNamespace(entity="me"))
    monkeypatch.setattr("ldm.tracking.comparison.track_report", lambda *_, **__: tracker)

    def track() -> str:
        config = {"logger": {"project": "ldm", "timeout_s": 0.3}}
        content = {"tables": {}, "figures": {}, "markdown": "text", "curves": ["val/loss"], "run_names": ["vae/a"]}
        return track_comparison(tmp_path, config, name="compare/a-vs-b", **content)

    assert "this run is offline" in track()
    tracker.mode = "online"
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert "pip install 'ldm-trainer[reports]'" in track()
    package = MagicMock()
    for name in ("wandb_workspaces", "wandb_workspaces.reports", "wandb_workspaces.reports.v2"):
        monkeypatch.setitem(sys.modules, name, package)
    reports = package.reports.v2
    reports.Report.return_value.url = "somewhere"
    assert track() == "W&B report: somewhere" and reports.Report.call_args.kwargs["entity"] == "me"
    assert reports.Runset.call_args.kwargs["filters"] == "Metric('Name') in ['vae/a']"
    reports.LinePlot.assert_called_once_with(title="val/loss", x="step", y=["val/loss"])
    reports.MarkdownBlock.assert_called_once_with(text="text")
    released = threading.Event()
    reports.Report.return_value.save.side_effect = lambda: released.wait(60)
    assert track() == "No W&B report: no answer within 0.3 s"
    released.set()


def test_run_without_a_name_is_named_after_its_source():
    run = RunRecord("me/ldm/aaa", {}, {"stage": "vae"}, True, {}, {}, None, {})
    assert (run.source, run.name) == ("me/ldm/aaa", "aaa")


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory) -> ImageData:
    folder = tmp_path_factory.mktemp("compared")
    for seed, name in enumerate(("cat", "dog")):
        make_images(folder / "squares" / name, 20, size=8, seed=seed)
    return prepare(ImageFolder(folder / "squares"), resolution=8, cache_dir=folder, val_fraction=0.3, progress=False)


@pytest.fixture
def workspace(images, tmp_path, monkeypatch) -> Path:
    """A folder with two runs of each stage, including weights, and a VAE run trained on different images."""
    monkeypatch.chdir(tmp_path)
    data_facts = {"data_fingerprint": images.fingerprint, "data_cache": str(images.path), "val_fraction": 0.3}
    for i, name in enumerate("ab"):
        for stage, subfolder in (("vae", "autoencoder"), ("diffusion", "pipeline")):
            folder = make_run(Path("runs"), name, stage=stage, kd=0.1 + i, lr=1e-3 * (1 + i), **data_facts)
            shutil.copytree(EARLIER_RUNS / stage / subfolder, Path(folder) / subfolder)
    make_run(Path("runs"), "elsewhere", stage="vae", **{**data_facts, "data_fingerprint": "0" * 64})
    return tmp_path


def test_reconstructions_are_shown_below_their_originals(workspace, images):
    comparison = compare_runs(["runs/vae/a", "runs/vae/b", "runs/vae/elsewhere"])
    figure, notes = side_by_side(comparison, DDIM(2), device=torch.device("cpu"), num_samples=3)
    cell = 128 + 6
    assert figure.size == (110 + 3 * cell, 6 + 3 * cell)
    rows = [np.asarray(figure.crop((110, 6 + i * cell, 110 + 128, 134 + i * cell))) for i in range(3)]
    original = images.batch(images.val_indices[:1])[0, :, 0, 0]
    assert rows[0][0, 0] == pytest.approx(((original + 1) * 127.5).numpy(), abs=3)
    assert np.array_equal(rows[1], rows[2]) and not np.array_equal(rows[0], rows[1]), "both runs have the same weights"
    assert len(notes) == 1 and "elsewhere" in notes[0] and "not trained on the images" in notes[0]


@pytest.mark.parametrize("has_images", [True, False], ids=["held-out images", "no images"])
def test_classes_are_matched_by_name(images, has_images):
    """Each column shows one class even if models order classes differently; a model without the class is skipped."""
    shown_images = images if has_images else None
    names: list[list[str]] = []
    captions = None
    for classes in (["cat", "dog"], ["cow", "dog", "cat"]):
        pipeline = SimpleNamespace(conditioning=ClassCondition(classes))
        request = compare_images._request(pipeline, shown_images, None, 6, captions)
        captions = captions or request.captions
        names.append([classes[i] for i in request.condition["label"]])
    assert names[0] == names[1] and set(names[0]) == {"cat", "dog"}
    pipeline.conditioning = ClassCondition(["dog", "bird", "fish"])
    with pytest.raises(UserError, match="label=cat .*dog, 1=bird, 2=fish"):
        compare_images._request(pipeline, shown_images, None, 6, captions)


def test_compare_reads_evaluations_logged_to_wandb(workspace, fake_wandb, monkeypatch):
    """The logged evaluation contains the sampler, the id of the training run and the digest of the run's weights."""
    logged: dict = {}
    monkeypatch.setattr(
        "ldm.commands.evaluate.track_report", lambda folder, config, **results: logged.update(config=config, **results)
    )
    run = Run.open("runs/diffusion/a")
    metrics = {**json.loads(run.evaluation_file.read_text()), "weights_sha256": run_weights_sha256(run)}
    run.evaluation_file.write_text(json.dumps(metrics))
    (run.path / "wandb_id.txt").write_text("aaa\n")
    log_evaluation(OmegaConf.create({"logger": {"group": None}}), run, {"values": metrics})
    assert logged["config"]["training_id"] == "aaa" and logged["inputs"][0].digest == metrics["weights_sha256"]
    api = fake_wandb({"me/ldm/aaa": str(run.path)})
    api.add("me/ldm/new", "2026-03-01", flatten(logged["config"]), flatten(logged["values"]), [])
    local, remote = (compare_runs([source, "runs/diffusion/b"]) for source in ("runs/diffusion/a", "me/ldm/aaa"))
    assert local.rows == remote.rows and SAMPLING in print_to_text(remote)
    assert not remote.groups[0].runs[0].has_stale_evaluation


def test_compare_command_generates_samples_and_writes_the_page(workspace, call):
    """Runs are positional arguments, the figure has one row per run, and unsupported rows are reported."""
    (workspace / "no_labels.txt").write_text("a cat\n")
    options = ["device=cpu", "sampler=ddim", "sampler.steps=2", "num_samples=2"]
    result = call_tool(call, "compare", "runs/diffusion/a", "runs/diffusion/b", *options, "prompts=no_labels.txt")
    assert result.code == 0, result.err
    assert result.out.count("Not in the figure") == 2 and "conditioned on class" in result.out
    result = call_tool(call, "compare", "runs/diffusion/a", *options, "runs/diffusion/b", "out=here")
    assert result.code == 0, result.err
    assert "No held-out images" not in result.out
    result = call_tool(call, "compare", "runs=[runs/vae/a,runs/vae/b]", *options)
    assert result.code == 0, result.err
    files = {str(file.relative_to(workspace)) for file in workspace.rglob("compare*.*")}
    for folder in ("runs/compare/a-vs-b", "here"):
        assert f"{folder}/compare.html" in files and f"{folder}/compare.png" in files
    assert "runs/compare/a-vs-b/compare_images.png" in files
    assert "Differences" in result.out and "optimizer.lr" in result.out and SAMPLING in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Required options are missing: runs"),
        (["runs/vae/a"], "A comparison needs at least 2 runs, not 1"),
        (["runs/vae/a", "runs/diffusion/a"], "Runs of different stages cannot be compared"),
        (["runs/vae/a", "runs/vae/../vae/a"], "runs/vae/../vae/a is given twice"),
        (["runs/vae/a", "runs/vae/none"], "runs=runs/vae/none does not exist"),
        (["runs/vae/a", "runs/vae/b", "num_samples=-1"], "num_samples=-1 must be 0 or more"),
        (["runs/vae/a", "runs=[runs/vae/b]"], "runs/vae/a and runs= set the same option"),
        (["runs/vae/a", "runs/vae/b", "prompts=none.txt"], "prompts=none.txt is not a file"),
    ],
)
def test_invalid_options_are_rejected_with_a_one_line_message(workspace, call, arguments, message):
    result = call_tool(call, "compare", *arguments)
    assert result.code == 2 and result.err.startswith(f"error: {message}") and result.err.count("\n") == 1
    assert not (workspace / "runs/compare").exists()
