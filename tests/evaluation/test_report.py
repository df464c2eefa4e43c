"""The evaluation of a diffusion model on untrained parts: what is kept, resumed, counted, swept and said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import ldm.features
from ldm import durable
from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics, weights_sha256
from ldm.data.image_folder import ImageFolder
from ldm.data.images import ImageData, prepare, to_uint8
from ldm.data.latents import LatentContract
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.schedule import linear
from ldm.errors import UserError
from ldm.evaluation import classifier, kept_samples, sampler_sweep
from ldm.evaluation.feature_extraction import reference_features
from ldm.evaluation.kept_samples import chosen_training_rows, draw_and_keep
from ldm.evaluation.report import Evaluation, evaluate
from ldm.evaluation.sample_distances import Measures, halves, table
from ldm.networks.conditioning import ClassCondition
from ldm.networks.dit import DiT
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import Request, draw

SAMPLER = Sampler("ddim", 3)
OPTIONS = {"guidance": 2.0, "seed": 0, "batch_size": 4}


class MeanColours(torch.nn.Module):
    """Colours of a 3 x 3 grid: features that cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images):
        return self.weight * torch.nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)


@pytest.fixture(autouse=True)
def cheap(monkeypatch) -> None:
    monkeypatch.setitem(ldm.features.CHOICES, "mean_colours", MeanColours)
    monkeypatch.setattr(classifier.load_classifier, "__kwdefaults__", {"seed": 0, "num_steps": 20})


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory) -> ImageData:
    """40 cats and 24 dogs of 8 pixels."""
    place = tmp_path_factory.mktemp("pets")
    make_images(place / "pets/cat", 40, size=8)
    make_images(place / "pets/dog", 24, size=8, seed=1)
    source = ImageFolder(place / "pets")
    return prepare(source, resolution=8, cache_dir=place / "cache", val_fraction=0.25, progress=False)


@pytest.fixture
def pipeline(images) -> LatentDiffusionPipeline:
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4).eval()
    statistics = LatentStatistics([0.1, 0, 0], [1, 2, 1], [0.1] * 3, "images", weights_sha256(model))
    parts, conditioning = Autoencoder(model, statistics), ClassCondition(["cat", "dog"])
    network = DiT(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        patch_size=2,
        hidden_dim=16,
        depth=1,
        head_dim=8,
        **conditioning.network_options(),
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return LatentDiffusionPipeline(
        network=network.eval(),
        autoencoder=parts,
        schedule=linear(50),
        prediction="v",
        conditioning=conditioning,
        contract=LatentContract(parts.weights_sha256(), "images", 8, 1, 3, 0.05, False),
        latent_shape=(3, 8, 8),
    )


def kept(pipeline, images, folder: Path, num_samples: int, **options) -> np.ndarray:
    return np.array(
        draw_and_keep(pipeline, images, SAMPLER, folder, num_samples=num_samples, **{**OPTIONS, **options}).images
    )


def test_what_is_kept_is_what_is_drawn(pipeline, images, tmp_path):
    request = Request.of_images(pipeline, images, images.train_indices[chosen_training_rows(images, 10, 0)])
    drawn = torch.cat(list(draw(pipeline, request, SAMPLER, **OPTIONS)))
    found = draw_and_keep(pipeline, images, SAMPLER, tmp_path, num_samples=10, **OPTIONS)
    assert np.array_equal(found.images, to_uint8(drawn).permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(found.batch(range(2, 5)), drawn[2:5], rtol=0, atol=1.01 / 255)
    assert found.evaluations == 2 * SAMPLER.steps and found.seconds > 0, "two branches of guidance"
    assert (
        draw_and_keep(pipeline, images, SAMPLER, tmp_path, num_samples=4, **{**OPTIONS, "guidance": 1.0}).evaluations
        == 3
    )


def test_an_interrupted_drawing_goes_on_where_it_stopped(pipeline, images, tmp_path, monkeypatch):
    whole = kept(pipeline, images, tmp_path / "whole", 14)
    decode, calls = type(pipeline).decode, []

    def stop_at_the_third(self, z):
        calls.append(len(z))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, z)

    monkeypatch.setattr(type(pipeline), "decode", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        kept(pipeline, images, tmp_path / "parts", 14)
    (file,) = (tmp_path / "parts").glob("*.bin")
    assert file.stat().st_size == 8 * 3 * 8**2
    with file.open("ab") as opened:
        opened.write(b"half an image")
    calls[:] = [0] * 5
    found = kept(pipeline, images, tmp_path / "parts", 14)
    assert calls[5:] == [4, 2] and np.array_equal(found, whole)
    assert json.loads(file.with_suffix(".json").read_text())["cost"]["samples"] == 14
    assert np.array_equal(kept(pipeline, images, tmp_path / "parts", 6), whole[:6]) and len(calls) == 7
    np.testing.assert_allclose(kept(pipeline, images, tmp_path / "parts", 20)[:14], whole)


def test_whatever_decides_a_sample_names_its_file(pipeline, images, tmp_path):
    kept(pipeline, images, tmp_path, 4)
    for changed in ({"guidance": 3.0}, {"seed": 1}, {"guidance_interval": (0.2, 0.8)}):
        kept(pipeline, images, tmp_path, 4, **changed)
    draw_and_keep(pipeline, images, Sampler("ddim", 4), tmp_path, num_samples=4, **OPTIONS)
    next(pipeline.network.parameters()).data += 1
    kept(pipeline, images, tmp_path, 4)
    assert len(list(tmp_path.glob("*.bin"))) == len(list(tmp_path.glob("*.json"))) == 6
    kept(pipeline, images, tmp_path, 4, batch_size=2, guidance=2)
    assert len(list(tmp_path.glob("*.bin"))) == 6


def test_samples_that_are_not_finite(pipeline, images, tmp_path):
    next(pipeline.network.parameters()).data *= torch.nan
    with pytest.raises(UserError, match="4 of 4 samples are not finite.*optimizer.lr"):
        kept(pipeline, images, tmp_path, 4)


def test_more_samples_than_images_begin_again(images):
    rows, n = chosen_training_rows(images, 120, 3), len(images.train_indices)
    assert sorted(rows[:n]) == list(range(n)) and np.array_equal(rows[n : 2 * n], rows[:n])
    assert np.array_equal(chosen_training_rows(images, 7, 3), rows[:7])


def test_every_row_is_measured_alike(pipeline, images, tmp_path):
    found = evaluate(pipeline, images, SAMPLER, features="mean_colours", num_samples=24, folder=tmp_path, **OPTIONS)
    figures = found.figures
    n = len(images.train_indices)
    assert (figures["num_samples"], figures["num_reference"]) == (24, n)
    assert figures["num_floor"] == min(24, n // 2) and figures["num_validation"] == len(images.val_indices)
    assert figures["fd_components"] == min(24, n // 2) // 2 and figures["fd_name"] == "FD"
    assert f"FD on {figures['fd_components']} PCA components of pets/train@" in found.lines[0]
    said = " ".join(found.lines)
    assert "3 degrees of freedom (95 % within 3.2 of them)" in said and "FD's 19 (within 2.1)" in said
    for row in ("samples", "reconstructions", "vae", "floor"):
        assert figures[f"num_{row}"] >= 22 and figures[f"fd_{row}"] >= 0, row
        assert figures[f"kd_{row}_standard_error"] > 0 and 0 <= figures[f"precision_{row}"] <= 1
        assert figures[f"density_{row}"] is None or figures[f"density_{row}"] >= 0
    assert figures["fd_floor"] < figures["fd_samples"] and "cmmd_samples" not in figures
    assert len(figures["closest_pairs"]) == 12 and figures["closest_pairs"][0]["training_image"] in images.names
    assert figures["network_evaluations_per_sample"] == 6
    found.save(tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(figures))
    assert (tmp_path / "nearest.png").is_file()
    again = evaluate(pipeline, images, SAMPLER, features="mean_colours", num_samples=24, **OPTIONS)
    assert {k: v for k, v in again.figures.items() if "seconds" not in k} == {
        k: v for k, v in figures.items() if "seconds" not in k
    }, "kept or drawn again, it is the same"


def test_classes_that_were_asked_for(pipeline, images, tmp_path):
    found = evaluate(pipeline, images, SAMPLER, features="classifier", num_samples=24, folder=tmp_path, **OPTIONS)
    assert 0 <= found.figures["class_accuracy_samples"] <= 1
    assert found.figures["class_accuracy_samples_standard_error"] <= 0.5 / 24**0.5
    assert 0 <= found.figures["class_shift_samples"] <= 1
    assert any("the class that was asked for" in line for line in found.lines)


def test_a_reference_of_other_data_or_features_is_not_taken_for_this(images, tmp_path):
    """It is kept by the features' key and the data's fingerprint."""
    here = replace(images, path=tmp_path)
    other = replace(here, fingerprint="0" * 64, images=255 - images.images)
    twice = MeanColours()
    twice.weight *= 2
    twice.key = "mean_colours-of-other-weights"
    first = reference_features(MeanColours(), "mean_colours", here)
    torch.testing.assert_close(reference_features(MeanColours(), "mean_colours", other), -first)
    assert reference_features(twice, "mean_colours", here).equal(2 * first)
    assert reference_features(MeanColours(), "mean_colours", here).equal(first)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_write_that_fails_leaves_what_was_there(images, pipeline, tmp_path, monkeypatch):
    """Nobody reads half a file, and two processes share no scratch file."""
    place, figure = tmp_path / "evaluation.json", Image.new("RGB", (4, 4))
    here = replace(images, path=tmp_path)
    Evaluation({"fd": 1}, [], {"nearest.png": figure}).save(place)
    kept(pipeline, images, tmp_path / "kept", 4)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "sync", full)
    for write in (
        Evaluation({"fd": 2}, []).save,
        Evaluation({}, [], {"nearest.png": Image.new("RGB", (9, 9))}).save,
        lambda _: kept(pipeline, images, tmp_path / "kept", 8),
        lambda _: reference_features(MeanColours(), "mean_colours", here),
        lambda _: classifier.load_classifier(here),
    ):
        with pytest.raises(OSError, match="No space"):
            write(place)
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".bin"}
    assert after == {file: content for file, content in before.items() if file.suffix != ".bin"}


def test_the_frechet_distance_takes_all_dimensions_where_it_can():
    train = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    assert Measures.choose(train, 40).components is None
    assert Measures.choose(train, 39).num_components == 19
    assert Measures.choose(train, 1000).components is None and Measures.choose(train[:78], 1000).num_components == 19
    few = Measures.choose(train, 1000).of(train[:10])
    assert few["fd"] is None and few["kd"] is not None and few["density"] is None
    some, others = halves(train, 30, seed=0)
    assert len(some) == 30 and len(others) == 70
    assert torch.equal(torch.cat([some, others]).sort(0).values, train.sort(0).values)
    clip = Measures(train, None, with_cmmd=True).of(train[:50])
    assert clip["cmmd"][0] > 0 < clip["cmmd"][1]
    lines = table({"a": (10, few), "bb": (50, clip)}, "FID")
    assert "FID" in lines[0] and "CMMD" in lines[0] and len({len(line) for line in lines}) == 1 and " - " in lines[1]


@pytest.mark.parametrize(
    ("options", "message"), [({"num_samples": 7}, "num_samples=7"), ({"batch_size": 0}, "batch_size=0")]
)
def test_numbers_that_are_none(pipeline, images, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(pipeline, images, SAMPLER, **{"features": "mean_colours", "seed": 0, **options})


@pytest.fixture
def steps(pipeline, images, tmp_path):
    samplers = {n: Sampler("ddim", n) for n in (2, 4, 8)}
    options = {"features": "mean_colours", "num_samples": 24, "batch_size": 8}
    return lambda guidances: sampler_sweep.sweep(
        pipeline, images, samplers if len(guidances) == 1 else {3: SAMPLER}, guidances, tmp_path, **options
    )


def test_a_sweep_over_steps_and_one_over_guidance(steps, tmp_path):
    found = steps([2.0])
    assert [row["value"] for row in found["rows"]] == [2, 4, 8] and found["over"] == "sampler.steps"
    assert [row["network_evaluations"] for row in found["rows"]] == [4, 8, 16]
    assert found["metric"] == "KD" and "FD" not in " ".join(sampler_sweep.lines(found)), "24 are few for 27 dimensions"
    found = steps([1.0, 2.0])
    assert found["over"] == "guidance" and [row["network_evaluations"] for row in found["rows"]] == [3, 6]
    for swept in (found, steps([2.0])):
        sampler_sweep.draw(swept).savefig(tmp_path / "sweep.png")
        assert f"{swept['over']}={swept['knee']:g} is the knee" in sampler_sweep.lines(swept)[-1]
        json.dumps(swept)


def test_a_sweep_refuses_before_it_draws(pipeline, images, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_samples, "draw", lambda *_, **__: pytest.fail("drew"))
    many = {n: Sampler("ddim", n) for n in (2, 51)}
    with pytest.raises(UserError, match="both lists"):
        sampler_sweep.sweep(pipeline, images, many, [1.0, 2.0], tmp_path)
    for guidance in ("high", True, float("nan")):
        with pytest.raises(UserError, match=f"guidance={guidance} must be a number"):
            sampler_sweep.sweep(pipeline, images, {3: SAMPLER}, [1, guidance], tmp_path)
    with pytest.raises(UserError, match="sampler=ddim with 51 steps"):
        sampler_sweep.sweep(pipeline, images, many, [1.0], tmp_path)
    with pytest.raises(UserError, match="num_samples=7"):
        sampler_sweep.sweep(pipeline, images, many, [1.0], tmp_path, num_samples=7)


def test_the_knee_is_the_cheapest_that_is_no_worse():
    def row(value, evaluations, distance, error=0.1):
        return {"value": value, "network_evaluations": evaluations, "distance": distance, "standard_error": error}

    rows = [row(5, 5, 3.0), row(10, 10, 1.25), row(20, 20, 1.1), row(50, 50, 1.0)]
    assert sampler_sweep.knee(rows) == 10, "0.25 < 2 sqrt(0.02)"
    assert sampler_sweep.knee([row(5, 5, 3.0), row(10, 10, 1.3), *rows[2:]]) == 20
    assert sampler_sweep.knee([row(1, 10, 2.0), row(2, 20, 1.0), row(3, 20, 0.9)]) == 3, "of one cost, the nearest"
