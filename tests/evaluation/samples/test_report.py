"""Tests of sample evaluation with untrained networks: caching, resuming, metrics, sweeps and messages."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import ldm.metrics.features
from ldm.data.images import ImageData, prepare, to_uint8
from ldm.data.sources.image_folder import ImageFolder
from ldm.diffusion.samplers.ddim import DDIM
from ldm.errors import UserError
from ldm.evaluation import classifier
from ldm.evaluation.features import reference_features
from ldm.evaluation.image_sets import VAEAlone
from ldm.evaluation.samples import cache as sample_cache
from ldm.evaluation.samples import report
from ldm.evaluation.samples import sweep as sampler_sweep
from ldm.evaluation.samples.cache import condition_rows, draw_cached
from ldm.evaluation.samples.distances import Measures, distance_table, fd_name, split_train
from ldm.evaluation.samples.report import measure_samples, save_unless_smaller
from ldm.evaluation.samples.retrieval import caption_agreement, held_out_retrieval
from ldm.files import atomic
from ldm.metrics.frechet import frechet_replicates
from ldm.metrics.report import Report
from ldm.networks.conditioning import ClassCondition
from ldm.runtime.random import sample_generators
from ldm.sampling.draw import draw_batches
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import Request
from tests.sampling.test_pipeline import build_pipeline

SAMPLER = DDIM(3)
OPTIONS = {"guidance": 2.0, "seed": 0, "batch_size": 4}


class MeanColours(torch.nn.Module):
    """Cheap features: mean colours of a 3 x 3 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images):
        return self.weight * torch.nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)


@pytest.fixture(autouse=True)
def cheap_features(monkeypatch) -> None:
    monkeypatch.setitem(ldm.metrics.features.FEATURE_NETWORKS, "mean_colours", MeanColours)
    monkeypatch.setattr(classifier.load_classifier, "__kwdefaults__", {"seed": 0, "num_steps": 20})


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory) -> ImageData:
    """Images of 40 cats and 24 dogs with 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("pets")
    make_images(folder / "pets/cat", 40, size=8)
    make_images(folder / "pets/dog", 24, size=8, seed=1)
    source = ImageFolder(folder / "pets")
    return prepare(source, resolution=8, cache_dir=folder / "cache", val_fraction=0.25, progress=False)


@pytest.fixture
def pipeline() -> LatentDiffusion:
    return build_pipeline(ClassCondition(["cat", "dog"]))


def sample(pipeline, images, folder: Path, num_samples: int, **options) -> np.ndarray:
    options = {"num_samples": num_samples, **OPTIONS, **options}
    return np.array(draw_cached(pipeline, images, SAMPLER, folder, **options).images)


def test_cached_samples_equal_uncached_samples(pipeline, images, tmp_path):
    request = Request.for_images(pipeline, images, images.train_indices[condition_rows(images.train_indices, 10, 0)])
    expected = torch.cat(list(draw_batches(pipeline, request, SAMPLER, **OPTIONS)))
    samples = draw_cached(pipeline, images, SAMPLER, tmp_path, num_samples=10, **OPTIONS)
    assert np.array_equal(samples.images, to_uint8(expected).permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(samples.batch(range(2, 5)), expected[2:5], rtol=0, atol=1.01 / 255)
    assert samples.evaluations == 2 * SAMPLER.steps and samples.seconds > 0, "guidance evaluates two branches"
    unguided = draw_cached(pipeline, images, SAMPLER, tmp_path, num_samples=4, **{**OPTIONS, "guidance": 1.0})
    assert unguided.evaluations == 3


def test_interrupted_sampling_resumes(pipeline, images, tmp_path, monkeypatch):
    expected = sample(pipeline, images, tmp_path / "complete", 14)
    decode, calls = type(pipeline).decode, []

    def interrupt_third_call(self, z):
        calls.append(len(z))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, z)

    monkeypatch.setattr(type(pipeline), "decode", interrupt_third_call)
    with pytest.raises(KeyboardInterrupt):
        sample(pipeline, images, tmp_path / "interrupted", 14)
    (file,) = (tmp_path / "interrupted").glob("*.bin")
    assert file.stat().st_size == 8 * 3 * 8**2
    with file.open("ab") as stream:
        stream.write(b"part of an image")
    calls[:] = [0] * 5  # the third call has passed, so decoding is no longer interrupted
    resumed = sample(pipeline, images, tmp_path / "interrupted", 14)
    assert calls[5:] == [4, 2] and np.array_equal(resumed, expected)
    assert json.loads(file.with_suffix(".json").read_text())["cost"]["samples"] == 14
    assert np.array_equal(sample(pipeline, images, tmp_path / "interrupted", 6), expected[:6]) and len(calls) == 7
    np.testing.assert_allclose(sample(pipeline, images, tmp_path / "interrupted", 20)[:14], expected)


def test_cache_key_depends_on_all_sampling_inputs(pipeline, images, tmp_path, monkeypatch):
    sample(pipeline, images, tmp_path, 4)
    for changes in ({"guidance": 3.0}, {"seed": 1}, {"guidance_interval": (0.2, 0.8)}):
        sample(pipeline, images, tmp_path, 4, **changes)
    draw_cached(pipeline, images, DDIM(4), tmp_path, num_samples=4, **OPTIONS)
    sample(pipeline, images, tmp_path, 4, split="val")
    next(pipeline.network.parameters()).data += 1
    sample(pipeline, images, tmp_path, 4)
    assert len(list(tmp_path.glob("*.bin"))) == len(list(tmp_path.glob("*.json"))) == 7
    sample(pipeline, images, tmp_path, 4, batch_size=2, guidance=2)
    assert len(list(tmp_path.glob("*.bin"))) == 7
    monkeypatch.setattr(sample_cache, "FORMAT", 0)
    sample(pipeline, images, tmp_path, 4)
    assert len(list(tmp_path.glob("*.bin"))) == 8, "samples in a different format are not reused"


def test_samples_of_another_process_are_not_overwritten(pipeline, images, tmp_path, monkeypatch):
    """The number of cached samples is read again after the lock has been acquired."""
    expected = sample(pipeline, images, tmp_path / "complete", 8)
    (file,) = (tmp_path / "complete").glob("*.bin")
    with FileLock(file.with_suffix(".lock")):
        with pytest.raises(UserError, match=f"Another process is .*{file.name}"):
            sample(pipeline, images, tmp_path / "complete", 12)
        assert np.array_equal(sample(pipeline, images, tmp_path / "complete", 4), expected[:4]), "reading needs no lock"
    acquire, calls = FileLock.acquire, []

    def acquire_after_other_process(self, *arguments, **options):
        if not calls:
            calls.append(self)
            sample(pipeline, images, tmp_path / "shared", 4)
        return acquire(self, *arguments, **options)

    starts = []

    def record_start(*arguments, first: int, **options):
        starts.append(first)
        return draw_batches(*arguments, first=first, **options)

    monkeypatch.setattr(FileLock, "acquire", acquire_after_other_process)
    monkeypatch.setattr(sample_cache, "draw_batches", record_start)
    assert np.array_equal(sample(pipeline, images, tmp_path / "shared", 8), expected)
    assert starts == [0, 4], "the other process generates the first 4 samples, this process the rest"


def test_non_finite_samples_are_rejected(pipeline, images, tmp_path):
    next(pipeline.network.parameters()).data *= torch.nan
    with pytest.raises(UserError, match="4 of 4 samples are not finite.*optimizer.lr"):
        sample(pipeline, images, tmp_path, 4)


def test_condition_rows_repeat_if_there_are_few_images(images):
    train_indices = images.train_indices
    rows, n = condition_rows(train_indices, 120, 3), len(train_indices)
    assert sorted(rows[:n]) == list(range(n)) and np.array_equal(rows[n : 2 * n], rows[:n])
    assert np.array_equal(condition_rows(train_indices, 7, 3), rows[:7])


def test_all_image_sets_get_the_same_metrics(pipeline, images, tmp_path):
    result = measure_samples(pipeline, images, SAMPLER, tmp_path, features="mean_colours", num_samples=24, **OPTIONS)
    metrics = result.to_json()
    n, components = len(images.train_indices), metrics["fd_components"]
    assert (metrics["num_samples"], metrics["num_reference"]) == (24, n) and components == min(24, n // 2) // 2
    assert metrics["num_floor"] == min(24, n // 2) and metrics["num_validation"] == len(images.val_indices)
    assert metrics["num_per_subset_samples"] == 6
    assert metrics["num_per_subset_validation"] == metrics["num_validation"] // 4
    assert metrics["fd_name"] == f"FD on {components} components" and "subset" in result.lines[1].split()
    assert f"FD on {components} PCA components of pets/train@" in result.lines[0] and max(map(len, result.lines)) < 160
    for row in ("samples", "reconstructions", "vae", "floor"):
        assert metrics[f"num_{row}"] >= 22 and metrics[f"fd_{row}"] >= 0, row
        assert metrics[f"kd_{row}_standard_error"] > 0 and 0 <= metrics[f"precision_{row}"] <= 1
        assert metrics[f"density_{row}"] is None or metrics[f"density_{row}"] >= 0
    assert metrics["fd_floor"] < metrics["fd_samples"] and "cmmd_samples" not in metrics
    assert len(metrics["closest_pairs"]) == 12 and metrics["closest_pairs"][0]["training_image"] in images.names
    assert metrics["network_evaluations_per_sample"] == 6
    result.save(tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(metrics))
    assert (tmp_path / "nearest.png").is_file()
    options = {"features": "mean_colours", "num_samples": 24, **OPTIONS}
    repeated = measure_samples(pipeline, images, SAMPLER, tmp_path / "other", **options).to_json()
    expected, actual = ({k: v for k, v in x.items() if "seconds" not in k} for x in (metrics, repeated))
    assert actual == expected, "sampling again gives the same metrics"


def test_vae_alone_decodes_noise_without_unstandardising(pipeline):
    """N(0, I) is the prior of raw latents z_raw, so noise is decoded without undoing the standardisation."""
    noise = torch.stack([torch.randn(3, 8, 8, generator=g) for g in sample_generators(5, range(2, 4))])
    images = VAEAlone(pipeline, 4, seed=5).batch([2, 3])
    assert images.equal(pipeline.autoencoder.decode(noise))
    assert not torch.allclose(images, pipeline.decode(noise), atol=1e-3), "mean 0.1 and std 2 are not applied"


def test_misclassification_causes_no_class_shift(pipeline, images, tmp_path, monkeypatch):
    """If the classifier predicts "dog" for everything, samples and images have the same class distribution."""
    constant_classifier = classifier.Classifier(2).eval()
    torch.nn.init.zeros_(constant_classifier.head.weight)
    constant_classifier.head.bias.data = torch.tensor([0.0, 1.0])
    constant_classifier.val_accuracy = 0.4
    calls = []
    constant_classifier.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    monkeypatch.setattr(report, "load_features", lambda *_: constant_classifier)
    data = replace(images, path=tmp_path)
    result = measure_samples(pipeline, data, SAMPLER, tmp_path, features="classifier", num_samples=24, **OPTIONS)
    assert result.to_json()["class_shift_samples"] == result.to_json()["class_shift_validation"] == 0
    conditions = images.train_indices[condition_rows(images.train_indices, 24, 0)]
    dogs = np.mean([images.labels[i] == 1 for i in conditions])
    assert result.to_json()["class_accuracy_samples"] == pytest.approx(dogs)
    assert sum(calls) == len(images) + 3 * 24, "each image once: all data, samples, reconstructions, VAE alone"


def test_smaller_evaluation_does_not_replace_a_larger_one(tmp_path):
    file, fallback_file = tmp_path / "run/evaluation.json", tmp_path / "demo/evaluation.json"

    def save(num_samples: int, weights: str) -> Path:
        metrics = {"weights_sha256": weights, "num_samples": num_samples}
        report = Report(file.name, metrics, figures={"nearest.png": Image.new("RGB", (4, 4))})
        return save_unless_smaller(report, file.parent, fallback_file)

    assert save(3000, "a") == file and save(256, "a") == fallback_file
    assert json.loads(file.read_text())["num_samples"] == 3000 and fallback_file.with_name("nearest.png").is_file()
    assert save(256, "b") == file and json.loads(file.read_text())["num_samples"] == 256, "different weights"
    file.write_text("")
    assert save(256, "b") == file, "an unreadable file is replaced"


def test_reference_features_are_cached_by_data_and_network(images, tmp_path):
    """The cache key contains the network key and the data fingerprint."""
    local_images = replace(images, path=tmp_path)
    inverted_images = replace(local_images, fingerprint="0" * 64, images=255 - images.images)
    doubled_network = MeanColours()
    doubled_network.weight *= 2
    doubled_network.key = "mean_colours-other-weights"
    features = reference_features(MeanColours(), "mean_colours", local_images)
    torch.testing.assert_close(reference_features(MeanColours(), "mean_colours", inverted_images), -features)
    assert reference_features(doubled_network, "mean_colours", local_images).equal(2 * features)
    assert reference_features(MeanColours(), "mean_colours", local_images).equal(features)
    assert len(list(tmp_path.iterdir())) == 3


def test_failed_write_keeps_existing_files(images, pipeline, tmp_path, monkeypatch):
    """Files are written atomically."""
    local_images = replace(images, path=tmp_path)
    Report("evaluation.json", {"fd": 1}, figures={"nearest.png": Image.new("RGB", (4, 4))}).save(tmp_path)
    sample(pipeline, images, tmp_path / "cache", 4)
    contents = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def raise_disk_full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "sync", raise_disk_full)
    for write in (
        Report("evaluation.json", {"fd": 2}).save,
        Report("other.json", {}, figures={"nearest.png": Image.new("RGB", (9, 9))}).save,
        lambda _: sample(pipeline, images, tmp_path / "cache", 8),
        lambda _: reference_features(MeanColours(), "mean_colours", local_images),
        lambda _: classifier.load_classifier(local_images),
    ):
        with pytest.raises(OSError, match="No space"):
            write(tmp_path)
    new_contents = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.suffix != ".bin"}
    assert new_contents == {file: content for file, content in contents.items() if file.suffix != ".bin"}


def test_frechet_distance_uses_all_dimensions_if_possible():
    train = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    assert Measures.choose(train, 40).components is None
    assert Measures.choose(train, 39).num_components == 19
    assert Measures.choose(train, 1000).components is None and Measures.choose(train[:78], 1000).num_components == 19
    metrics = Measures.choose(train, 1000).all(train[:10])
    assert [metrics[name].is_measured for name in ("fd", "kd", "density")] == [False, True, False]
    subset, rest = split_train(train, 30, seed=0)
    assert len(subset) == 30 and len(rest) == 70
    assert torch.equal(torch.cat([subset, rest]).sort(0).values, train.sort(0).values)
    clip_metrics = Measures(train, None, with_cmmd=True).all(train[:50])
    assert clip_metrics["cmmd"].value > 0 < clip_metrics["cmmd"].standard_error
    lines = distance_table({"a": (10, 2, metrics), "bb": (50, 12, clip_metrics)}, "FID")
    assert fd_name(MeanColours(), None) == "FD" and fd_name(MeanColours(), 3) == "FD on 3 components"
    assert {"FID", "subset", "CMMD"} <= {*lines[0].split()} and "-" in lines[1].split()
    assert len({len(line) for line in lines}) == 1


def test_sweeps_report_quality_and_cost_by_steps_or_guidance(pipeline, images, tmp_path):
    sweep = partial(sampler_sweep.sweep_sampler, pipeline, images, features="mean_colours", num_samples=24)
    by_steps = sweep({n: DDIM(n) for n in (2, 4, 8)}, [2.0], tmp_path)
    assert [row["value"] for row in by_steps["rows"]] == [2, 4, 8] and by_steps["over"] == "sampler.steps"
    assert [row["network_evaluations"] for row in by_steps["rows"]] == [4, 8, 16]
    assert min(row["above_best"] for row in by_steps["rows"]) == 0 < by_steps["rows"][0]["standard_error"]
    assert by_steps["metric"].startswith("FD on ") and by_steps["metric"].endswith(" components"), "24 < 2 x 27"
    lines = sampler_sweep.sweep_lines(by_steps)
    assert by_steps["metric"] in lines[0] and "KD" in lines[1] and "mean_colours" in lines[0]
    assert len({len(line) for line in lines[1:5]}) == 1
    columns, cells = sampler_sweep.sweep_table(by_steps)
    assert columns[:2] == ["sampler.steps", "network_evaluations"] and {len(row) for row in cells} == {len(columns)}
    assert [row[0] for row in cells] == [2, 4, 8]
    by_guidance = sweep({3: SAMPLER}, [1.0, 2.0], tmp_path)
    assert by_guidance["over"] == "guidance" and [row["network_evaluations"] for row in by_guidance["rows"]] == [3, 6]
    for result in (by_guidance, by_steps):
        sampler_sweep.plot_sampler_sweep(result).savefig(tmp_path / "sweep.png")
        assert f"{result['over']}={result['knee']:g} is the knee" in sampler_sweep.sweep_lines(result)[-1]
        json.dumps(result)


def test_sweep_checks_all_values_before_sampling(pipeline, images, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_cache, "draw_batches", lambda *_, **__: pytest.fail("sampling started"))
    one_sampler, two_samplers = {3: SAMPLER}, {n: DDIM(n) for n in (2, 51)}
    for samplers, guidances, num_samples, message in (
        (two_samplers, [1, 2], 8, "both lists"),
        (one_sampler, [1, "high"], 8, "guidance=high must be a number"),
        (two_samplers, [1], 8, "sampler=ddim with 51 steps"),
        (one_sampler, [1], 7, "num_samples=7 must be 8 or more"),
    ):
        with pytest.raises(UserError, match=message):
            sampler_sweep.sweep_sampler(pipeline, images, samplers, guidances, tmp_path, num_samples=num_samples)
    with pytest.raises(UserError, match="num_samples=7 must be 8 or more"):
        measure_samples(pipeline, images, SAMPLER, tmp_path, num_samples=7)


def test_knee_is_the_cheapest_value_within_noise():
    def row(value, evaluations, above, error=0.1):
        fields = {"value": value, "network_evaluations": evaluations, "distance": 1 + above}
        return {**fields, "above_best": above, "above_best_standard_error": error if above else 0.0}

    rows = [row(5, 5, 2.0), row(10, 10, 0.19), row(20, 20, 0.1), row(50, 50, 0)]
    assert sampler_sweep.knee(rows) == 10, "0.19 < 2 x 0.1"
    assert sampler_sweep.knee([row(5, 5, 2.0), row(10, 10, 0.21), *rows[2:]]) == 20
    assert sampler_sweep.knee([row(1, 10, 1.0), row(2, 20, 0.1), row(3, 20, 0)]) == 3, "equal costs: smaller distance"


def test_shared_noise_reduces_the_error_of_differences():
    """The jackknife error of the difference matches its spread, and is smaller than the error of a single distance."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 4, generator=generator)
    differences, single_distances = [], []
    for _ in range(60):
        noise = torch.randn(200, 4, generator=generator)
        sets = [noise + 0.5, noise + 0.55 + 0.05 * torch.randn(200, 4, generator=generator)]
        distances, replicates = zip(*(frechet_replicates(samples, reference) for samples in sets), strict=True)
        rows = [{"distance": distance} for distance in distances]
        sampler_sweep.compare_with_best(rows, replicates)
        assert (rows[0]["above_best"], rows[0]["above_best_standard_error"]) == (0, 0)
        differences.append((rows[1]["above_best"], rows[1]["above_best_standard_error"]))
        single_distances.append(distances[1])
    values, errors = np.transpose(differences)
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(ddof=1), rel=0.25)
    assert values.std() < 0.4 * np.std(single_distances)
    assert (values > 2 * errors).mean() > 0.9, "errors of independent samples would hide this difference"


@pytest.mark.parametrize("counts", [[1] * 9, [1, 3, 2, 3]], ids=["one caption each", "several captions"])
def test_caption_agreement_equals_brute_force(counts):
    """Only the best caption of each image counts."""
    n = len(counts)
    prompts, captions = (torch.randn(k, 5, generator=torch.Generator().manual_seed(k)) for k in (n, sum(counts) + 20))
    captions = captions[: sum(counts)]
    cosines = torch.nn.functional.cosine_similarity(prompts[:, None], captions, dim=-1)
    best = torch.stack([columns.amax(1) for columns in cosines.split(counts, dim=1)], dim=1)
    matched, permuted, error = caption_agreement(prompts, (3 * captions).split(counts))
    assert matched == pytest.approx(best.diagonal().mean().item(), rel=1e-5)
    assert permuted == pytest.approx(best[~torch.eye(n, dtype=torch.bool)].mean().item(), rel=1e-5)
    assert error == pytest.approx(best.diagonal().std().item() / n**0.5, rel=1e-5)
    with_opposites = [torch.cat([-prompt[None], prompt[None]]) for prompt in prompts]
    assert caption_agreement(prompts, with_opposites)[0] == pytest.approx(1), "only the best caption of an image counts"


def test_held_out_captions_are_retrieved_among_held_out_images(images):
    """The samples equal training images with the right captions, so the caption agreement is 1."""
    captions = [f"{i % 4}" for i in range(len(images))]
    captioned_images = replace(images, captions=captions)

    class Encoder:
        def for_request(self, prompts):
            numbers = torch.tensor([int(prompt) for prompt in prompts])
            return {"pooled": torch.nn.functional.one_hot(numbers, 4).float()}, prompts

    features = torch.randn(len(images), 8, generator=torch.Generator().manual_seed(0))
    train, validation = (features[torch.from_numpy(rows)] for rows in (images.train_indices, images.val_indices))
    rows = torch.from_numpy(condition_rows(images.val_indices, 9, 0))
    row_of_caption = {name: [i for i in images.train_indices if captions[i] == name][0] for name in "0123"}
    texts = [captions[images.val_indices[row]] for row in rows]
    queries = {"samples": features[[row_of_caption[name] for name in texts]], "reconstructions": validation[rows]}
    metrics = {"features_key": "random"}
    lines = held_out_retrieval(queries, validation, train, rows, captioned_images, Encoder(), metrics)
    assert metrics["num_held_out"] == 9 and metrics["retrieval_at_1_held_out_reconstructions"] == 1
    assert metrics["retrieval_at_5_held_out_chance"] == 5 / len(validation)
    assert metrics["caption_cosine_held_out_samples"].value == 1 > metrics["caption_cosine_held_out_permuted"]
    expected = np.mean([a == b for i, a in enumerate(texts) for j, b in enumerate(texts) if i != j])
    assert metrics["caption_cosine_held_out_permuted"] == pytest.approx(expected)
    assert "9 held-out captions" in lines[0] and f"{len(validation)} validation images" in lines[0]
