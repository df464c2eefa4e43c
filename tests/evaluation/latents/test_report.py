"""Tests of tools/latents.py on finished runs."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.autoencoder.identity import IdentityAutoencoder
from ldm.autoencoder.patch import PatchAutoencoderKL
from ldm.data.images import ImageData, prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.errors import UserError
from ldm.evaluation.latents import report as latents_report
from ldm.evaluation.latents.report import SHIFTS, measure_latents, pca_curve, shift_channel
from ldm.latents.spectrum import channel_statistics
from ldm.metrics.image import patch_components, pca_reconstruction, psnr
from ldm.runs.run import Run
from ldm.runtime.paths import bundled_folder
from tests.finished_run import finished_run

DEAD_CHANNEL, CPU = 2, torch.device("cpu")


def latents_tool() -> None:
    runpy.run_path(str(bundled_folder("tools") / "latents.py"), run_name="__main__")


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory) -> ImageData:
    """A data set of 60 images with 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("latents")
    make_images(folder / "squares", 60, size=8)
    return prepare(ImageFolder(folder / "squares"), resolution=8, cache_dir=folder, val_fraction=0.2, progress=False)


@pytest.fixture(scope="module")
def finished_runs(images, tmp_path_factory) -> Path:
    """Finished runs of each stage. The autoencoder is initialised with a PCA of 4 channels, one of which is dead."""
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    model = PatchAutoencoderKL(patch=2, latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    model.init_shortcut(images.batch(images.train_indices))
    with torch.no_grad():
        for layer in (model.shortcut_in.weight, model.shortcut_in.bias):
            layer[DEAD_CHANNEL] = 0
        model.core.quant_conv.bias[4 + DEAD_CHANNEL] = 0
    finished_run(folder / "runs/vae/first", "vae", images, model)
    finished_run(folder / "runs/diffusion/first", "diffusion", images, model)
    finished_run(folder / "runs/pixels/first", "diffusion", images, IdentityAutoencoder())
    return folder


@pytest.fixture
def runs(finished_runs, tmp_path, monkeypatch) -> dict[str, Run]:
    """Copies of the finished runs, by folder name."""
    shutil.copytree(finished_runs / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return {name: Run.open(f"runs/{name}/first") for name in ("vae", "diffusion", "pixels")}


def count_colours(file: Path) -> int:
    with Image.open(file) as image:
        return len(image.convert("RGB").getcolors(10_000_000))


def test_report_of_a_run_equals_direct_computation(call, runs, images, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = runs["vae"]
    result = call(latents_tool, f"run={run.path}", "device=cpu", "batch_size=7")
    assert result.code == 0, result
    report = json.loads((run.path / "latents_report.json").read_text())
    indices = images.train_indices
    mean, log_variance = run.autoencoder().encode(images.batch(indices))
    expected = channel_statistics(mean, log_variance)
    assert report["images"] == f"{images.name}/train@{images.fingerprint[:8]}"
    assert report["num_images"] == len(indices) and report["latent_shape"] == [4, 4, 4] and report["factor"] == 2
    assert [row["channel"] for row in report["channels"]] == [0, 1, 2, 3]
    for name in ("kl_bits", "information_bits", "mean", "std", "signal_share"):
        values = [row[name] for row in report["channels"]]
        np.testing.assert_allclose(values, getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert report["kl_bits"] == pytest.approx(expected.kl_bits.sum().item(), rel=1e-4)
    assert report["dead"] == [DEAD_CHANNEL] and [row["dead"] for row in report["channels"]].index(True) == DEAD_CHANNEL
    across_channels, full = report["spectrum"]["channels"], report["spectrum"]["latents"]
    assert len(across_channels["eigenvalues"]) == 4 and len(full["eigenvalues"]) == min(len(indices), 64)
    assert across_channels["effective_rank"] == pytest.approx(3, abs=0.2), "components of a PCA are uncorrelated"
    assert across_channels["components"]["0.99"] == 3
    assert full["participation_ratio"] < full["effective_rank"] < len(indices)
    assert report["recommendation"]["rule"] == "dead" and report["recommendation"]["latent_channels"] == 3

    held_out = report["held_out"]
    originals = images.batch(images.val_indices)
    pca = pca_reconstruction(images.batch(indices), originals, factor=2, channels=4)
    reconstructed = run.autoencoder().decode(run.autoencoder().encode(originals)[0])
    assert held_out["num_images"] == len(originals)
    assert held_out["psnr_db"] == pytest.approx(psnr(originals, reconstructed).mean().item(), abs=1e-3)
    assert held_out["pca_psnr_db"] == pytest.approx(psnr(originals, pca).mean().item(), abs=1e-3)
    curve = dict(zip(*held_out["pca_curve"].values(), strict=True))
    count = held_out["pca_channels_of_equal_psnr"]
    assert curve[count] >= held_out["psnr_db"] > curve.get(count - 1, 0) and list(curve) == list(range(1, 13))

    for name, digits in (("kl_bits", 1), ("std", 3)):
        assert all(f"{row[name]:.{digits}f}" in result.out for row in report["channels"])
    assert result.out.count(" dead ") >= 1 and "latents: effective rank " in result.out
    assert f"Recommendation: {report['recommendation']['text']}" in result.out
    assert f"{held_out['psnr_db']:.2f} dB" in result.out and f"{held_out['pca_psnr_db']:.2f} dB" in result.out
    assert count_colours(run.path / "latents.png") > 200 and count_colours(run.path / "latents_channels.png") > 50


def test_diffusion_run_reports_the_same_autoencoder(runs, monkeypatch):
    plotted = []
    monkeypatch.setattr(latents_report, "plot_latents", lambda _, z_raw: plotted.append(z_raw))
    options = {"device": CPU, "split": "val", "num_images": 4}
    vae, diffusion, other_seed = (
        measure_latents(runs[name], **options, batch_size=size, seed=seed)
        for name, size, seed in (("vae", 2, 3), ("diffusion", 64, 3), ("vae", 2, 4))
    )
    assert vae.content["num_images"] == 4 and "/val@" in vae.content["images"]
    torch.testing.assert_close(plotted[0], plotted[1], rtol=1e-4, atol=1e-4)
    assert vae.content["kl_bits"] == pytest.approx(diffusion.content["kl_bits"], rel=1e-4)
    assert vae.content["held_out"]["pca_psnr_db"] == pytest.approx(diffusion.content["held_out"]["pca_psnr_db"])
    assert other_seed.content["kl_bits"] != pytest.approx(vae.content["kl_bits"])


def test_pca_curve_equals_separate_pcas():
    generator = torch.Generator().manual_seed(0)
    train, held_out = (0.5 * torch.randn(count, 3, 8, 8, generator=generator) for count in (40, 5))
    counts = [1, 2, 7, 11, 12]
    curves = pca_curve(patch_components(train.split(9), 2), held_out, 2, counts)
    assert curves.shape == (5, 5)
    for values, count in zip(curves, counts, strict=True):
        expected = psnr(held_out, pca_reconstruction(train, held_out, factor=2, channels=count))
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-3)


def test_shift_channel_shifts_one_channel_at_all_locations(runs, monkeypatch):
    autoencoder, decoded = runs["vae"].autoencoder(), []
    mean = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    decode = autoencoder.decode
    monkeypatch.setattr(autoencoder, "decode", lambda z_raw: decoded.append(z_raw) or decode(z_raw))
    shifted = shift_channel(autoencoder, mean, 1, std=0.3)
    assert shifted.shape == (2, 3, 3, 8, 8)
    torch.testing.assert_close(shifted[:, 1], decode(mean))
    for shift, z_raw in zip(SHIFTS, decoded[0].unflatten(0, (2, 3)).unbind(1), strict=True):
        difference = z_raw - mean
        torch.testing.assert_close(difference[:, 1], torch.full((2, 4, 4), 0.3 * shift))
        assert not difference[:, [0, 2, 3]].any()


def test_only_the_most_informative_channels_are_shifted(runs, monkeypatch):
    channels = []
    monkeypatch.setattr(latents_report, "plot_channels", lambda _, decoded, shifts: channels.extend(decoded))
    monkeypatch.setattr(latents_report, "NUM_SHIFTED_CHANNELS", 2)
    report = measure_latents(runs["vae"], device=CPU)
    bits = [row["information_bits"] for row in report.content["channels"]]
    assert set(channels) == set(np.argsort(bits)[-2:].tolist()) and DEAD_CHANNEL not in channels


def test_autoencoder_without_signal_is_reported(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(Autoencoder, "encode", lambda _, batch: (torch.zeros(len(batch), 4, 4, 4),) * 2)
    report = measure_latents(runs["vae"], device=CPU)
    assert report.content["dead"] == [0, 1, 2, 3] and report.content["recommendation"]["rule"] == "all_dead"
    assert report.content["spectrum"]["channels"]["effective_rank"] == 0
    assert count_colours(report.save(tmp_path)[1]) > 50


def test_latents_without_variance_or_with_nan_are_rejected(runs, monkeypatch):
    with pytest.raises(UserError, match="IdentityAutoencoder of .* predicts no variance"):
        measure_latents(runs["pixels"], device=CPU)
    monkeypatch.setattr(Autoencoder, "encode", lambda _, batch: (torch.full((len(batch), 4, 4, 4), torch.nan),) * 2)
    with pytest.raises(UserError, match="latents for 5 of 5 images are not finite"):
        measure_latents(runs["vae"], device=CPU, num_images=5)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("split=test", "split=test is unknown. Choose one of: val, train"),
        ("num_images=1", "num_images=1 must be 2 or more"),
        ("num_images=many", "num_images=many must be a whole number"),
        ("seed=1.5", "seed=1.5 must be a whole number"),
        ("batch_size=0", "batch_size=0 must be 1 or more"),
    ],
)
def test_invalid_command_line_options_are_rejected(call, runs, monkeypatch, argument, message):
    monkeypatch.setattr(Autoencoder, "encode", lambda *_: pytest.fail("encoded before the options were checked"))
    result = call(latents_tool, f"run={runs['vae'].path}", "device=cpu", argument)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result
