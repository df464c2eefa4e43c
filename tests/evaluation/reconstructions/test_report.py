"""Tests of tools/evaluate.py for autoencoder runs."""

import json
import math
import runpy
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import ldm.metrics.features
import ldm.tracking.run
from ldm.autoencoder.autoencoder import Autoencoder
from ldm.autoencoder.patch import PatchAutoencoderKL, PatchVQModel
from ldm.data.images import ImageData, prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.errors import UserError
from ldm.evaluation import classifier
from ldm.evaluation.image_sets import image_text
from ldm.evaluation.reconstructions import report as reconstruction_report
from ldm.evaluation.reconstructions.report import (
    measure_reconstructions,
    plot_reconstructions,
    reconstruction_distances,
)
from ldm.image_grid import to_pil
from ldm.latents.contract import LatentContract
from ldm.metrics.codes import codebook_metrics
from ldm.metrics.frechet import feature_components, frechet_distance
from ldm.metrics.image import pca_reconstruction, psnr, ssim
from ldm.metrics.kernel import kernel_distance
from ldm.metrics.metric import Metric
from ldm.runs.run import Run
from ldm.runtime.paths import bundled_folder
from tests.finished_run import finished_run

CPU = torch.device("cpu")


class MeanColours(torch.nn.Module):
    """Cheap features: mean colours of a 2 x 2 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images):
        return self.weight * torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


class L1(torch.nn.Module):
    """A cheap substitute for LPIPS."""

    def forward(self, x, y):
        return (x - y).abs().mean((1, 2, 3))


def evaluate_tool() -> None:
    runpy.run_path(str(bundled_folder("tools") / "evaluate.py"), run_name="__main__")


@pytest.fixture(scope="module")
def finished_runs(make_images, tmp_path_factory) -> Path:
    """8 x 8 images in two classes, and two autoencoder runs initialised as PCAs, with a KL term and with a codebook."""
    folder = tmp_path_factory.mktemp("reconstructions")
    for seed, name in enumerate(("cat", "dog")):
        make_images(folder / "pets" / name, 60, size=8, seed=seed)
    source = ImageFolder(folder / "pets")
    images = prepare(source, resolution=8, cache_dir=folder / "cache", val_fraction=0.3, progress=False)
    torch.manual_seed(0)
    options = {"patch": 2, "latent_channels": 4, "block_out_channels": (8,), "norm_num_groups": 4, "sample_size": 8}
    models = {"kl": PatchAutoencoderKL(**options), "vq": PatchVQModel(**options, num_vq_embeddings=16)}
    for name, model in models.items():
        model.init_shortcut(images.batch(images.train_indices))
        torch.nn.init.normal_(model.core.decoder.conv_out.bias, std=0.02)
        if name == "vq":
            torch.nn.init.normal_(model.core.quantize.embedding.weight)
        finished_run(folder / "runs/vae" / name, "vae", images, model.eval(), name=name)
    return folder


@pytest.fixture
def open_run(finished_runs, tmp_path, monkeypatch):
    """Return a function that opens a copy of a run by name and updates its facts. LPIPS is unavailable."""
    (cache,) = (finished_runs / "cache").glob("pets-*")
    shutil.copytree(cache, tmp_path / "pets")
    shutil.copytree(finished_runs / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ldm.metrics.features.FEATURE_NETWORKS, "mean_colours", MeanColours)
    monkeypatch.setattr(
        reconstruction_report, "LPIPS", Mock(side_effect=UserError("perceptual=lpips needs network access."))
    )

    def open_run(name: str = "kl", **facts) -> Run:
        run = Run.open(tmp_path / "runs/vae" / name)
        run.update(data_cache=str(tmp_path / "pets"), **facts)
        return run

    return open_run


def reconstruct(run: Run) -> tuple[ImageData, torch.Tensor, torch.Tensor]:
    """Return the image data of a run, its validation images and their reconstructions."""
    images, autoencoder = run.image_data(), run.autoencoder()
    originals = images.batch(images.val_indices)
    return images, originals, autoencoder.decode(autoencoder.encode(originals)[0])


def test_metrics_equal_brute_force(open_run):
    run = open_run()
    images, originals, reconstructed = reconstruct(run)
    metrics = measure_reconstructions(run, device=CPU, features="mean_colours", batch_size=7).to_json()
    n = len(originals)
    assert (metrics["num_images"], metrics["images"]) == (n, f"pets/val@{images.fingerprint[:8]}") and n >= 24
    for key, values in (("psnr_db", psnr(originals, reconstructed)), ("ssim", ssim(originals, reconstructed))):
        assert metrics[key] == pytest.approx(values.mean().item(), rel=1e-4)
        assert metrics[f"{key}_standard_error"] == pytest.approx(values.std().item() / n**0.5, rel=1e-3)
    pca = pca_reconstruction(images.batch(images.train_indices), originals, factor=2, channels=4)
    assert metrics["pca_psnr_db"] == pytest.approx(psnr(originals, pca).mean().item(), abs=1e-3)

    network = MeanColours()
    original, decoded, train = (network(x) for x in (originals, reconstructed, images.batch(images.train_indices)))
    assert (metrics["features"], metrics["feature_dim"], metrics["fd_components"]) == ("mean_colours", 12, None)
    assert (metrics["reference"], metrics["num_reference"]) == (f"pets/train@{images.fingerprint[:8]}", len(train))
    assert metrics["fd_reconstructions"] == pytest.approx(frechet_distance(decoded, original), rel=1e-3)
    assert metrics["fd_validation"] == pytest.approx(frechet_distance(original, train), rel=1e-3)
    assert next(images.path.glob("features-mean_colours-*.npy")) and metrics["features_key"] == "mean_colours"
    assert metrics["weights_sha256"] == run.autoencoder().weights_sha256()
    assert 0 < metrics["fd_reconstructions_standard_error"] < metrics["fd_reconstructions"]
    assert metrics["fd_validation_standard_error"] > 0
    # the images are in a different order here, so the subsets differ
    assert metrics["kd_reconstructions"] == pytest.approx(kernel_distance(decoded, original, paired=True)[0], abs=0.05)
    assert metrics["kd_validation"] == pytest.approx(0, abs=0.3) and metrics["kd_validation_standard_error"] > 0

    mean, log_variance = run.autoencoder().encode(originals)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    nats = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    assert metrics["kl_nats"] == pytest.approx(nats.item(), rel=1e-4)
    assert metrics["kl_bits"] == pytest.approx(nats.item() / math.log(2), rel=1e-4)
    assert metrics["kl_bits_per_value"] == pytest.approx(metrics["kl_bits"] / 192)
    assert metrics["regulariser"] == "kl" and metrics["codebook_size"] is None and metrics["lpips"] is None


def test_few_images_use_principal_components_of_training_images():
    generator = torch.Generator().manual_seed(0)
    originals, train = (torch.randn(n, 40, generator=generator) for n in (30, 90))
    reconstructed = originals + 0.2 * torch.randn(originals.shape, generator=generator)
    metrics = reconstruction_distances(reconstructed, originals, train)
    mean, basis = feature_components(train, 15)
    expected = [(x.double() - mean) @ basis for x in (reconstructed, originals, train)]
    assert metrics["fd_components"] == 15
    assert metrics["fd_reconstructions"].value == pytest.approx(frechet_distance(*expected[:2]), rel=1e-9)
    assert metrics["fd_validation"].value == pytest.approx(frechet_distance(*expected[1:]), rel=1e-9)
    assert metrics["kd_reconstructions"] == Metric(*kernel_distance(reconstructed, originals, paired=True))
    large_set = torch.randn(200, 120, generator=generator)
    assert reconstruction_distances(large_set, large_set, large_set)["fd_components"] == 64
    small_set = reconstruction_distances(reconstructed[:7], originals[:7], train)
    assert small_set["fd_components"] == 3 and not small_set["kd_reconstructions"].is_measured
    assert small_set["fd_reconstructions"].standard_error > 0
    tiny_set = reconstruction_distances(reconstructed[:3], originals[:3], train)["fd_reconstructions"]
    assert not tiny_set.is_measured


def test_codebook_usage_and_perplexity_equal_brute_force(open_run):
    run = open_run("vq")
    images, originals, _ = reconstruct(run)
    report = measure_reconstructions(run, device=CPU, features="none", batch_size=7)
    codes = run.autoencoder().codes(run.autoencoder().encode(originals)[0]).flatten().tolist()
    share = np.array([codes.count(k) for k in set(codes)]) / len(codes)
    metrics = report.to_json()
    assert metrics["regulariser"] == "vq" and metrics["codebook_size"] == 16 and metrics["kl_bits"] is None
    assert metrics["codebook_usage"] == len(share) / 16
    assert metrics["codebook_perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    assert codebook_metrics(torch.tensor([5, 5, 5, 5, 0, 0, 0, 0]))["codebook_perplexity"] == pytest.approx(4)


def test_figure_shows_the_twelve_worst_images(open_run, monkeypatch):
    run, plotted = open_run(), {}
    monkeypatch.setattr(reconstruction_report, "plot_reconstructions", lambda *args: plotted.update(enumerate(args)))
    images, originals, reconstructed = reconstruct(run)
    measure_reconstructions(run, device=CPU, features="none")
    values = psnr(originals, reconstructed)
    worst = values.argsort()[:12]
    torch.testing.assert_close(plotted[0], originals[worst])
    torch.testing.assert_close(plotted[1], reconstructed[worst], atol=1e-4, rtol=0)
    names = [images.class_names[images.labels[images.val_indices[i]]] for i in worst]
    assert plotted[2] == [f"{values[i]:.1f} dB {name}" for i, name in zip(worst, names, strict=True)]
    assert f"12 worst of {len(values)} held-out images" in plotted[3]


def test_error_is_amplified_four_times():
    original = torch.full((1, 3, 4, 4), -0.5)
    figure = plot_reconstructions(original, original + 0.1, ["1 dB"], "title")
    centres = [figure.getpixel((64, 96 + 166 * row)) for row in range(3)]
    assert centres[0] == to_pil(original)[0].getpixel((0, 0)) and centres[1] == pytest.approx((76, 76, 76), abs=1)
    assert centres[2] == pytest.approx((51, 51, 51), abs=1), "4 x 0.1 over a range of 2 is 51 out of 255"


def test_image_text_prefers_the_caption(open_run):
    images = open_run().image_data()
    assert image_text(images, 0) == "cat"
    object.__setattr__(images, "captions", ["a sleeping cat", *[None] * (len(images) - 1)])
    assert image_text(images, 0) == "a sleeping cat" and image_text(images, len(images) - 1) == "dog"
    object.__setattr__(images, "class_names", None)
    assert image_text(images, 1) == ""


def test_command_writes_the_report_and_prints_metrics(call, open_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = open_run()
    result = call(evaluate_tool, f"run={run.path}", "features=mean_colours", "device=cpu", "num_images=24")
    assert result.code == 0, result
    metrics = json.loads((run.path / "evaluation.json").read_text())
    with Image.open(run.path / "worst_reconstructions.png") as figure:
        assert figure.width > 12 * 128 and figure.height > 3 * 128 and len(figure.getcolors(10**6)) > 50
    assert metrics["num_images"] == 24 and "evaluation.json" in result.out and "worst_reconstructions.png" in result.out
    fd = [metrics[f"fd_{name}"] for name in ("reconstructions", "reconstructions_standard_error", "validation")]
    for text in (f"{metrics['psnr_db']:.2f}", *(f"{value:.4f}" for value in fd), f"{metrics['kl_bits']:.1f}"):
        assert text in result.out
    assert "features: mean_colours" in " ".join(result.out.split())
    assert f"{metrics['fd_validation_standard_error']:.4f}" in result.out
    assert "N=24, ref=originals of the same 24 images; validation vs training: ref=pets/train" in result.out
    assert "LPIPS was skipped: perceptual=lpips needs network access." in result.out and "in the loss" not in result.out


def test_only_full_dimensional_inception_features_are_called_fid(open_run, monkeypatch):
    """The table also states the feature extractor's weights, image size and library."""
    monkeypatch.setattr(MeanColours, "is_fid", True, raising=False)
    monkeypatch.setattr(MeanColours, "key", "inception-12345678-299px", raising=False)
    monkeypatch.setattr(MeanColours, "library", "pytorch_fid", raising=False)
    report = measure_reconstructions(open_run(), device=CPU, features="mean_colours")
    names = [str(cell) for cell in report.table.columns[0].cells]
    assert report.to_json()["fd_name"] == "FID" and "FID" in names and "KD" in names
    for text in (report.lines[0], str(report.table.title)):
        assert "inception-12345678-299px (pytorch_fid)" in text
    small_set = measure_reconstructions(open_run(), device=CPU, features="mean_colours", num_images=16).to_json()
    assert small_set["fd_components"] == 8 and small_set["fd_name"] == "FD on 8 components"


@pytest.mark.parametrize("loss", ["mean_colours", "lpips"])
def test_features_used_in_the_loss_are_marked(open_run, loss):
    report = measure_reconstructions(open_run(perceptual_features=[loss]), device=CPU, features="mean_colours")
    assert report.to_json()["features_in_loss"] == ("(used in the loss)" in report.table.title)
    assert report.to_json()["features_in_loss"] == (loss == "mean_colours")


def test_lpips_is_reported_if_available(open_run, monkeypatch):
    monkeypatch.setattr(reconstruction_report, "LPIPS", L1)
    run = open_run(perceptual_features=["lpips"])
    report = measure_reconstructions(run, device=CPU, features="none")
    _, originals, reconstructed = reconstruct(run)
    values = (originals - reconstructed).abs().mean((1, 2, 3))
    assert report.to_json()["lpips"] == pytest.approx(values.mean().item(), rel=1e-4)
    assert report.to_json()["lpips_standard_error"] == pytest.approx(values.std().item() / len(values) ** 0.5, rel=1e-3)
    assert report.to_json()["lpips_in_loss"] and "used in the loss" in list(report.table.columns[3].cells)
    monkeypatch.setattr(reconstruction_report, "LPIPS", Mock(side_effect=UserError("no network")))
    without_lpips = measure_reconstructions(run, device=CPU, features="none")
    assert without_lpips.to_json()["lpips"] is None and "no network" in without_lpips.lines[0]


def test_classifier_features_and_accuracy_are_reported(open_run, monkeypatch):
    monkeypatch.setattr(classifier.load_classifier, "__kwdefaults__", {"seed": 0, "num_steps": 2})
    run = open_run()
    report = measure_reconstructions(run, device=CPU, features="classifier")
    n = report.to_json()["num_images"]
    assert report.to_json()["feature_dim"] == 64 and report.to_json()["fd_components"] == n // 2 < 64
    assert 0 <= report.to_json()["classifier_val_accuracy"] <= 1
    assert "classifier accuracy" in list(report.table.columns[0].cells)
    repeated = measure_reconstructions(run, device=CPU, features="classifier")
    assert repeated.to_json()["fd_validation"] == report.to_json()["fd_validation"]


def test_wandb_receives_metrics_and_figure(call, open_run, monkeypatch):
    wandb_run = Mock()
    monkeypatch.setattr(ldm.tracking.run, "WandbRun", wandb_run)
    run = open_run()
    digest, images = run.autoencoder().weights_sha256(), run.image_data()
    LatentContract(digest, images.fingerprint, 8, 2, 4, images.val_fraction, flip=False).save(run.path)
    result = call(evaluate_tool, f"run={run.path}", "features=none", "device=cpu", "logger=wandb")
    assert result.code == 0, result
    out, options = wandb_run.call_args.args[0], wandb_run.call_args.kwargs
    assert (options["name"], options["group"]) == ("evaluation/vae/kl", "kl")
    assert out == run.path / "evaluation", "wandb_id.txt in the run folder belongs to the training run"
    calls = {name: arguments for name, arguments, _ in wandb_run.return_value.method_calls}
    metrics = json.loads((run.path / "evaluation.json").read_text())
    assert calls["log_summary"][0]["psnr_db"] == metrics["psnr_db"] and "lpips" not in calls["log_summary"][0]
    assert (
        calls["log_images"][0] == "worst reconstructions"
        and calls["use_artifact"][0].digest == digest
        and "finish" in calls
    )
    assert (
        calls["log_artifact"][0].metadata["autoencoder_sha256"] == digest and len(calls["log_artifact"][0].files) == 2
    )


def test_non_finite_reconstructions_are_rejected(open_run, monkeypatch):
    monkeypatch.setattr(Autoencoder, "decode", lambda _, z: torch.full((len(z), 3, 8, 8), torch.nan))
    with pytest.raises(UserError, match="reconstructions for 5 of 5 images are not finite"):
        measure_reconstructions(open_run(), device=CPU, features="none", num_images=5)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("features=vgg", "features=vgg is unknown. Choose one of: efficientnet_lite, dinov2, clip, inception, mean"),
        ("num_images=1", "num_images=1 must be 2 or more"),
        ("batch_size=0", "batch_size=0 must be 1 or more"),
    ],
)
def test_invalid_command_line_options_are_rejected(call, open_run, monkeypatch, argument, message):
    monkeypatch.setattr(Autoencoder, "encode", lambda *_: pytest.fail("encoded before the options were checked"))
    run = open_run()
    result = call(evaluate_tool, f"run={run.path}", "device=cpu", argument)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result
    assert not (run.path / "evaluation.json").exists()
