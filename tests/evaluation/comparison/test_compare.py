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
from ldm.evaluation.comparison.runs import is_wandb_path
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

EARLIER = Path(__file__).parents[2] / "earlier_runs"
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


def make(
    place: Path,
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
    """Create a run folder like training and tools/evaluate.py do, without weights."""
    config = {
        "name": name,
        "runs_dir": str(place),
        "seed": seed,
        "objective": {"loss": objective},
        "optimizer": {"lr": lr, "build": {"_target_": "torch.optim.AdamW", "lr": lr, "_partial_": True}},
        "logger": {"wandb": False},
        "stage": {"build": {"optimizer": {"lr": lr}, "find_autoencoder": {"runs": str(place)}}},
    }
    known = {
        "stage": stage,
        "name": name,
        "seed": seed,
        "finished": 1.0,
        "data_fingerprint": "ab" * 32,
        "contract": {"autoencoder_sha256": "cd" * 32},
        "figures": {"steps": 300, "training_s": 10.0 + seed},
    }
    run = Run.create(place / stage / name, OmegaConf.create(config), {**known, **facts})
    figures = {**EVALUATION, "kd_samples": kd, "kd_samples_standard_error": 0.004, "retrieval_at_1_samples": 0.1}
    (run.path / "evaluation.json").write_text(json.dumps({**figures, **(evaluation or {})}))
    with (run.path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train/loss", "val/loss"])
        writer.writeheader()
        for step in range(0, 300, 10):
            writer.writerow({"epoch": 0, "step": step, "train/loss": 1 / (1 + step) + 0.01 * seed})
        writer.writerow({"epoch": 0, "step": 299, "val/loss": 0.5 + 0.01 * seed})
    return str(run.path)


def three(place: Path, name: str, kds: tuple[float, ...], **options) -> list[str]:
    return [make(place, f"{name}{seed}", seed=seed, kd=kd, **options) for seed, kd in enumerate(kds)]


def verdict(found: Comparison, metric: str, group: int = 1):
    (row,) = [row for row in found.rows if row.metric == metric]
    return row.verdicts[group - 1]


def printed(found: Comparison) -> str:
    return ComparisonReport(found).print(Console(width=80, record=True, file=io.StringIO())).export_text()


def test_better_direction_follows_from_the_metric_name():
    higher = "psnr_db ssim retrieval_at_5_samples density coverage_samples"
    lower = "kd_samples fd_reconstructions val/loss_t1_to_250 lpips val/vlb_bits_per_latent_dim class_shift_samples"
    # a rate is worth nothing without its distortion; others are of the data, whatever the model
    neither = "kl_bits kd_validation fd_floor precision_floor retrieval_at_1_chance pca_psnr_db steps peak_memory_gb"
    for names, way in ((higher, 1), (lower, -1), (neither, 0)):
        assert [better_direction(name) for name in names.split()] == [way] * len(names.split())


def test_holm_limits_the_family_wise_error_rate():
    """Holm's step-down, by hand and on 17 metrics of which most move together."""
    assert holm({"a": 0.03, "b": 0.001, "c": 0.016, "d": 0.9}) == ["b", "c"]  # 0.05 / 4, / 3, / 2: 0.03 > 0.025
    assert holm({"a": 0.02}) == ["a"] and holm({"a": 0.02, "b": 0.06, "c": 0.5}) == [] and holm({}) == []
    generator = np.random.default_rng(3)
    shared = generator.normal(0, 1, (1000, 2, 3, 1))
    drawn = shared * (np.arange(17) < 10) + generator.normal(0, 1, (1000, 2, 3, 17))
    p_values = stats.ttest_ind(drawn[:, 0], drawn[:, 1], axis=1, equal_var=False).pvalue
    assert np.mean([bool(holm(dict(enumerate(case)))) for case in p_values]) < 0.06


def test_proportion_error_is_positive_for_proportions_0_and_1():
    assert proportion_error(0.0, 256) == pytest.approx(proportion_error(1.0, 256)) != 0
    assert proportion_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)


def test_seeds_form_groups_and_similar_groups_are_within_noise(tmp_path):
    kds, others = (0.10, 0.12, 0.11), (0.115, 0.1, 0.112)
    same = compare_runs([*three(tmp_path, "a", kds)])
    assert [len(group.runs) for group in same.groups] == [3] and not same.rows[0].verdicts
    assert SEEDS in printed(same)
    (row,) = [row for row in same.rows if row.metric == "kd_samples"]
    assert row.groups[0].interval == pytest.approx(stats.ttest_1samp(kds, 0).confidence_interval(0.95))
    found = compare_runs([*three(tmp_path, "c", kds), *three(tmp_path, "b", others, lr=2e-3)])
    assert [[run.name for run in group.runs] for group in found.groups] == [["c0", "c1", "c2"], ["b0", "b1", "b2"]]
    assert found.differences == {"optimizer.lr": ["0.001", "0.002"]}
    said = verdict(found, "kd_samples")
    assert said.verdict == "within noise" and said.difference.of == SEEDS
    test = stats.ttest_ind(others, kds, equal_var=False)
    assert said.difference.interval == pytest.approx(test.confidence_interval(0.95))
    assert said.difference.p_value == pytest.approx(test.pvalue)
    assert any(note.startswith("B vs A, all") and note.endswith("within noise.") for note in found.notes)


def test_shifted_group_is_significant_in_the_right_direction(tmp_path):
    first = three(tmp_path, "a", (0.10, 0.12, 0.11))
    second = three(tmp_path, "b", (0.20, 0.22, 0.21), lr=2e-3, evaluation={"retrieval_at_1_samples": 0.3})
    found = compare_runs([*first, *second])
    assert verdict(found, "kd_samples").verdict == "A better"
    # every seed finds as many: what is left is the noise of 256 samples
    said = verdict(found, "retrieval_at_1_samples")
    assert said.verdict == "B better" and said.difference.of == SAMPLING
    assert found.equal["kd_reconstructions"] == 0.01
    assert any("Holm" in note and "kd samples (A better)" in note for note in found.notes)
    assert verdict(compare_runs([*second, *first]), "kd_samples").verdict == "B better"
    figure = plot_curves(found.curve_names(), [(group.title, run.curves) for group, run in found.runs])
    (panel,) = [axes for axes in figure.axes if axes.get_title() == "val/loss"]
    assert len(panel.lines) == 6 and all(line.get_marker() == "o" for line in panel.lines), "one point is seen"


def test_group_with_equal_values_is_compared_with_one_that_varies():
    agree, not_so = [Metric(0.5)] * 3, [Metric(value) for value in (0.1, 0.2, 0.3)]
    found = estimate(agree, not_so, enough_seeds=True)
    low, high = stats.ttest_1samp((0.1, 0.2, 0.3), 0.5).confidence_interval(0.95)
    assert found.of == SEEDS and found.interval == pytest.approx((low - 0.5, high - 0.5))


def test_single_runs_account_for_sampling_noise_only(tmp_path):
    found = compare_runs([make(tmp_path, "a", kd=0.1), make(tmp_path, "b", kd=0.105, lr=2e-3)])
    said = verdict(found, "kd_samples")
    assert said.verdict == "within noise" and said.difference.of == SAMPLING
    assert SAMPLING in printed(found), "in one piece"
    assert any(note.startswith(SAMPLING) and "at least 3 seeds per group" in note for note in found.notes)
    far = compare_runs([make(tmp_path, "c", kd=0.1), make(tmp_path, "d", kd=0.2, lr=2e-3)])
    assert verdict(far, "kd_samples").verdict == "A better" and "A better" in printed(far)


@pytest.mark.parametrize("dof", [3, 19, np.inf])
def test_few_degrees_of_freedom_use_student_t_intervals(dof):
    """A difference of 2.2 standard errors is within noise for 3 degrees of freedom, but not for many."""
    first, second = [Metric(0.5, 0.01, dof)], [Metric(0.5 + 0.01 * 2.2 * 2**0.5, 0.01, dof)]
    said = compare_groups("kd", first, second, ("A", "B"), enough_seeds=False)
    low, high = stats.t(2 * dof, scale=0.01 * 2**0.5).interval(0.95)
    assert said.difference.interval == pytest.approx((said.difference.mean + low, said.difference.mean + high))
    assert (said.verdict == "within noise") == (dof == 3)


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 1)], ids=["two", "one of them twice"])
def test_fewer_than_three_distinct_seeds_fall_back_to_sampling_noise(tmp_path, seeds):
    runs = [make(tmp_path, f"a{i}", seed=seed, kd=0.1 + i / 1000) for i, seed in enumerate(seeds)]
    found = compare_runs([*runs, *three(tmp_path, "b", (0.1, 0.11, 0.12), lr=2e-3)])
    assert verdict(found, "kd_samples").difference.of == SAMPLING
    assert found.rows[0].groups[1].of == SEEDS, "of the three alone there is one"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"features_key": "efficientnet_lite-00000000-224px"}, "features_key"),
        ({"num_samples": 512}, "num_samples"),
        ({"reference": "squares/train@00000000"}, "reference"),
        ({"guidance_interval": None}, "guidance_interval"),
        ({"guidance": 1.0, "sampler": {"method": "dpmpp", "steps": 50}}, "guidance, sampler.steps"),
    ],
)
def test_metrics_with_other_settings_get_no_verdict(tmp_path, changed, named):
    """Metrics that depend only on the data are compared even if the sampler differs."""
    floors = [{"fd_floor": value, "fd_floor_standard_error": 0.01} for value in (1.0, 1.2)]
    runs = [make(tmp_path, "a", evaluation=floors[0])]
    runs.append(make(tmp_path, "b", kd=0.9, lr=2e-3, evaluation={**floors[1], **changed}))
    found = compare_runs(runs)
    said = verdict(found, "kd_samples")
    assert said.verdict.startswith("not comparable: ") and named in said.verdict and said.difference is None
    assert (verdict(found, "fd_floor").verdict == "differ") == ("guidance" in named)


def test_group_with_mixed_settings_has_no_mean(tmp_path):
    found = compare_runs([make(tmp_path, "a"), make(tmp_path, "b", seed=1, kd=0.3, evaluation={"features": "dinov2"})])
    (row,) = [row for row in found.rows if row.metric == "kd_samples"]
    assert row.groups == [None]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lr": 2e-3}, "noise unknown"),
        ({"objective": "hybrid"}, "not comparable: objective"),
        ({"data_fingerprint": "ef" * 32}, "not comparable: data_fingerprint"),
    ],
)
def test_losses_are_comparable_only_with_equal_objective_and_data(tmp_path, changed, said):
    found = compare_runs([make(tmp_path, "a"), make(tmp_path, "b", seed=1, **changed)])
    assert len(found.groups) == 2 and verdict(found, "val/loss").verdict == said


def test_differences_omit_names_paths_and_duplicates(tmp_path):
    """Differences contain options and environment facts, but no names, no paths and no duplicates."""
    facts = {"commit": "0123456789" * 4, "versions": {"torch": "2.12"}, "precision": "bf16-mixed"}
    found = compare_runs([make(tmp_path / "x", "a"), make(tmp_path / "y", "b", seed=3, lr=2e-3, **facts)])
    keys = set(found.differences)
    assert {"optimizer.lr", "seed", "precision", "commit", "versions.torch"} <= keys
    assert not keys & {"name", "runs_dir", "optimizer.build.lr"} and not any(key.startswith("stage") for key in keys)
    assert found.differences["commit"][1] == "012345678901" and found.differences["seed"] == ["0", "3"]


def test_notes_report_unfinished_and_unevaluated_runs(tmp_path):
    place = make(tmp_path, "b", lr=2e-3, finished=None)
    (Path(place) / "evaluation.json").unlink()
    found = compare_runs([make(tmp_path, "a"), place])
    assert verdict(found, "kd_samples").verdict == "not in B"
    assert any("not finished" in note and place in note for note in found.notes)
    assert any("No evaluation" in note and "tools/evaluate.py" in note and place in note for note in found.notes)


def test_diverged_metrics_are_not_compared(tmp_path):
    place = make(tmp_path, "b", lr=2e-3, evaluation={"kd_samples": float("nan")})
    with (Path(place) / "metrics.csv").open("a", newline="") as file:
        file.write("0,399,nan,nan\n")
    found = compare_runs([make(tmp_path, "a"), place])
    assert verdict(found, "val/loss").verdict == verdict(found, "kd_samples").verdict == "not in B"
    assert any("non-finite" in note and "not compared" in note and place in note for note in found.notes)
    ComparisonReport(found).save(tmp_path / "out")
    json.loads((tmp_path / "out/compare.json").read_text(), parse_constant=pytest.fail)


def test_html_page_is_self_contained(tmp_path):
    found = compare_runs([make(tmp_path, "a<b"), make(tmp_path, "b", kd=0.2, lr=2e-3)])
    samples = Image.new("RGB", (20, 10), "red")
    files = ComparisonReport(found, samples, ["a note"], {"seed": 0}).save(tmp_path / "out")
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
    with Image.open(files[2]) as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(10_000_000)) > 50


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [(0.12345, 0.0123, "0.123"), (28.4567, 1.9, "28.5"), (1e3, 99, "1000"), (-1e-5, 0.011, "0.000")],
)
def test_format_number_rounds_to_the_error_bar(value, width, text):
    assert format_number(value, width) == text


class Recorded:
    """Replacement for wandb.Api with runs from folders, as training and tools/evaluate.py log them."""

    def __init__(self, places: dict[str, str]) -> None:
        self.known = []
        for path, place in places.items():
            run = Run.open(place)
            facts = {key: value for key, value in run.facts.items() if key not in ("figures", "finished")}
            with (run.path / "metrics.csv").open() as file:
                rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
            evaluation = json.loads((run.path / "evaluation.json").read_text())
            values = flatten({key: value for key, value in evaluation.items() if value is not None})
            asked = {"run": place, "guidance": 3, "training_id": path.rpartition("/")[2]}
            summary = {**run.facts["figures"], "val/loss": 9.0, "_runtime": 3, "step": 299}
            summary["pipeline_sha256"] = evaluation.get("weights_sha256")
            config = flatten({**run.config(), "run": {**facts, "finished": None}})
            self.add(path, "2026-01-01", config, summary, rows)
            self.add(f"{path}e0", "2026-01-02", asked, {"kd_samples": 7.0}, [])
            self.add(f"{path}e1", "2026-01-03", asked, values, [])
        self.add("me/ldm/zzz", "2026-02-01", {"training_id": "zz"}, {"kd_samples": 0.9}, [])

    def add(self, path, created_at, config, summary, rows) -> None:
        options = {"created_at": created_at, "config": config, "summary_metrics": summary}
        run_id = path.rpartition("/")[2]
        self.known.append(SimpleNamespace(path=path, id=run_id, scan_history=lambda: iter(rows), **options))

    def run(self, path):
        (run,) = [run for run in self.known if run.path == path]
        return run

    def runs(self, project, filters):
        ((key, value),) = filters.items()
        return [run for run in self.known if run.config.get(key.removeprefix("config.")) == value]


@pytest.fixture
def of_wandb(monkeypatch):
    """Return a function that replaces the W&B server by one with runs from folders, by W&B path."""

    def of_wandb(places: dict[str, str]) -> Recorded:
        api = Recorded(places)
        monkeypatch.setattr("ldm.tracking.comparison.has_key", lambda: True)
        monkeypatch.setattr(wandb, "Api", lambda: api)
        return api

    return of_wandb


def test_wandb_runs_give_the_same_table_as_folders(tmp_path, of_wandb, monkeypatch):
    places = {"me/ldm/aaa": make(tmp_path, "a"), "me/ldm/bbb": make(tmp_path, "b", kd=0.2, lr=2e-3)}
    of_wandb(places)
    near, far = compare_runs(list(places.values())), compare_runs(list(places))
    mixed = compare_runs(["me/ldm/aaa", places["me/ldm/bbb"]])
    assert near.rows == far.rows == mixed.rows and near.differences == far.differences
    assert all(run.finished for _, run in far.runs)
    picture, notes = side_by_side(far, DDIM(2), device=torch.device("cpu"))
    assert picture is None and "me/ldm/aaa" in notes[0]
    with pytest.raises(UserError, match="me/ldm/ccc is not a run folder, and W&B returned no run"):
        compare_runs(["me/ldm/aaa", "me/ldm/ccc"])
    monkeypatch.setattr("ldm.tracking.comparison.has_key", lambda: False)
    with pytest.raises(UserError, match="wandb login"):
        compare_runs(["me/ldm/aaa", "me/ldm/bbb"])


def test_steps_logged_twice_after_resuming_count_once(tmp_path, of_wandb):
    """The run was killed after step 290 and resumed from 200: the last value of a step belongs to the weights."""
    runs = three(tmp_path, "a", (0.10, 0.12, 0.11))
    with (Path(runs[1]) / "metrics.csv").open("a", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train/loss", "val/loss"])
        writer.writerows({"epoch": 0, "step": step, "train/loss": 5.0} for step in range(200, 320, 10))
        writer.writerow({"epoch": 0, "step": 299, "val/loss": 0.75})
    places = {f"me/ldm/{name}": run for name, run in zip(("aaa", "bbb", "ccc"), runs, strict=True)}
    of_wandb(places)
    near, far = compare_runs(runs), compare_runs(list(places))
    for found in (near, far):
        steps, values = found.runs[1][1].curves["train/loss"]
        assert steps == list(range(0, 320, 10)) and values[20:] == [5.0] * 12 and values[19] < 1
        assert found.runs[1][1].curves["val/loss"] == ([299], [0.75])
    # in W&B the summary holds the end of before, the history steps beyond it
    assert any("not finished" in note and note.endswith(": me/ldm/bbb.") for note in far.notes)
    assert all(run.finished for _, run in near.runs)


def test_evaluation_of_other_weights_is_ignored(tmp_path, of_wandb):
    runs = [make(tmp_path, "a"), make(tmp_path, "b", kd=0.2, lr=2e-3)]
    for run in map(Path, runs):
        weights = run / "pipeline/network/model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"weights")
        metrics = json.loads((run / "evaluation.json").read_text())
        (run / "evaluation.json").write_text(json.dumps({**metrics, "weights_sha256": sha256([weights])}))
    places = {"me/ldm/aaa": runs[0], "me/ldm/bbb": runs[1]}
    api = of_wandb(places)
    assert all(verdict(compare_runs(asked), "kd_samples").verdict == "A better" for asked in (runs, list(places)))
    weights.write_bytes(b"trained on")
    api.run("me/ldm/bbb").summary_metrics["pipeline_sha256"] = sha256([weights])
    for asked in (runs, list(places)):
        found = compare_runs(asked)
        assert verdict(found, "kd_samples").verdict == "not in B"
        (note,) = [note for note in found.notes if "Evaluation ignored" in note]
        assert asked[1] in note and asked[0] not in note and "tools/evaluate.py" in note


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
        what = {"tables": {}, "figures": {}, "markdown": "text", "curves": ["val/loss"], "compared": ["vae/a"]}
        return track_comparison(tmp_path, config, name="compare/a-vs-b", **what)

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


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory) -> ImageData:
    place = tmp_path_factory.mktemp("compared")
    for seed, name in enumerate(("cat", "dog")):
        make_images(place / "squares" / name, 20, size=8, seed=seed)
    return prepare(ImageFolder(place / "squares"), resolution=8, cache_dir=place, val_fraction=0.3, progress=False)


@pytest.fixture
def trained(images, tmp_path, monkeypatch) -> Path:
    """Two runs of each stage with weights, and one of stage vae on other images."""
    monkeypatch.chdir(tmp_path)
    of_images = {"data_fingerprint": images.fingerprint, "data_cache": str(images.path), "val_fraction": 0.3}
    for i, name in enumerate("ab"):
        for stage, part in (("vae", "autoencoder"), ("diffusion", "pipeline")):
            place = make(Path("runs"), name, stage=stage, kd=0.1 + i, lr=1e-3 * (1 + i), **of_images)
            shutil.copytree(EARLIER / stage / part, Path(place) / part)
    make(Path("runs"), "elsewhere", stage="vae", **{**of_images, "data_fingerprint": "0" * 64})
    return tmp_path


def test_reconstructions_are_drawn_below_their_originals(trained, images):
    found = compare_runs(["runs/vae/a", "runs/vae/b", "runs/vae/elsewhere"])
    picture, notes = side_by_side(found, DDIM(2), device=torch.device("cpu"), num_samples=3)
    cell = 128 + 6
    assert picture.size == (110 + 3 * cell, 6 + 3 * cell)
    rows = [np.asarray(picture.crop((110, 6 + i * cell, 110 + 128, 134 + i * cell))) for i in range(3)]
    original = images.batch(images.val_indices[:1])[0, :, 0, 0]
    assert rows[0][0, 0] == pytest.approx(((original + 1) * 127.5).numpy(), abs=3)
    assert np.array_equal(rows[1], rows[2]) and not np.array_equal(rows[0], rows[1]), "of the same weights"
    assert len(notes) == 1 and "elsewhere" in notes[0] and "other images" in notes[0]


@pytest.mark.parametrize("labelled", [True, False], ids=["held-out images", "no images"])
def test_classes_are_matched_by_name(images, labelled):
    """Each column shows one class even if models order classes differently; a model without the class is skipped."""
    known = images if labelled else None
    names: list[list[str]] = []
    captions = None
    for classes in (["cat", "dog"], ["cow", "dog", "cat"]):
        pipeline = SimpleNamespace(conditioning=ClassCondition(classes))
        request = compare_images._request(pipeline, known, None, 6, captions)
        captions = captions or request.captions
        names.append([classes[i] for i in request.condition["label"]])
    assert names[0] == names[1] and set(names[0]) == {"cat", "dog"}
    pipeline.conditioning = ClassCondition(["dog", "bird", "fish"])
    with pytest.raises(UserError, match="knows no class cat.*dog, bird, fish"):
        compare_images._request(pipeline, known, None, 6, captions)


def test_compare_reads_what_evaluate_logs(trained, of_wandb, monkeypatch):
    """The sampler, this training and its weights."""
    logged: dict = {}
    monkeypatch.setattr(
        "ldm.commands.evaluate.track_report", lambda folder, config, **found: logged.update(config=config, **found)
    )
    run = Run.open("runs/diffusion/a")
    metrics = {**json.loads(run.evaluation_file.read_text()), "weights_sha256": run_weights_sha256(run)}
    run.evaluation_file.write_text(json.dumps(metrics))
    (run.path / "wandb_id.txt").write_text("aaa\n")
    log_evaluation(OmegaConf.create({"logger": {"group": None}}), run, {"values": metrics})
    assert logged["config"]["training_id"] == "aaa" and logged["inputs"][0].digest == metrics["weights_sha256"]
    api = of_wandb({"me/ldm/aaa": str(run.path)})
    api.add("me/ldm/new", "2026-03-01", flatten(logged["config"]), flatten(logged["values"]), [])
    near, far = (compare_runs([place, "runs/diffusion/b"]) for place in ("runs/diffusion/a", "me/ldm/aaa"))
    assert near.rows == far.rows and not far.groups[0].runs[0].stale and SAMPLING in printed(far)


def test_compare_command_draws_samples_and_writes_the_page(trained, call):
    """Runs are positional arguments, the figure has one row per run, and unsupported rows are reported."""
    (trained / "no_labels.txt").write_text("a cat\n")
    options = ["device=cpu", "sampler=ddim", "sampler.steps=2", "num_samples=2"]
    ended = call_tool(call, "compare", "runs/diffusion/a", "runs/diffusion/b", *options, "prompts=no_labels.txt")
    assert ended.code == 0, ended.err
    assert ended.out.count("Not in the figure") == 2 and "conditioned on class" in ended.out
    ended = call_tool(call, "compare", "runs/diffusion/a", *options, "runs/diffusion/b", "out=here")
    assert ended.code == 0, ended.err
    assert "No held-out images" not in ended.out
    ended = call_tool(call, "compare", "runs=[runs/vae/a,runs/vae/b]", *options)
    assert ended.code == 0, ended.err
    made = {str(file.relative_to(trained)) for file in trained.rglob("compare*.*")}
    for place in ("runs/compare/a-vs-b", "here"):
        assert f"{place}/compare.html" in made and f"{place}/compare.png" in made
    assert "runs/compare/a-vs-b/compare_images.png" in made
    assert "Differences" in ended.out and "optimizer.lr" in ended.out and SAMPLING in ended.out


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
def test_mistakes_are_one_paragraph(trained, call, arguments, message):
    ended = call_tool(call, "compare", *arguments)
    assert ended.code == 2 and ended.err.startswith(f"error: {message}") and ended.err.count("\n") == 1
    assert not (trained / "runs/compare").exists()
