"""Tests of ldm.evaluation.evaluation_file: writing metrics to evaluation.json and reading them back."""

import json

import pytest

from ldm.evaluation.evaluation_file import metrics_from_json
from ldm.metrics.metric import UNMEASURED, Metric, metrics_to_json, proportion_error

CONTENT = {
    "features": "dinov2",
    "num_samples": 100,
    "fd_components": 7,
    "guidance": 3.0,
    "sampler": {"method": "ddim", "steps": 5},
    "num_reconstructions": 50,
    "fd_samples": Metric(2.0, 0.1),
    "kd_floor": Metric(0.5, 0.2),
    "density_samples": UNMEASURED,
    "fd_reconstructions": Metric(1.0),
    "retrieval_at_1_reconstructions": 0.3,
    "psnr_db": Metric(20.0, 0.5),
}


def test_metrics_are_written_flat():
    content = metrics_to_json(CONTENT)
    assert content["fd_samples"] == 2.0 and content["fd_samples_standard_error"] == 0.1
    assert content["density_samples"] is content["density_samples_standard_error"] is None
    assert content["fd_reconstructions_standard_error"] is None
    assert "retrieval_at_1_reconstructions_standard_error" not in content and content["sampler"] == CONTENT["sampler"]


def test_metrics_are_read_with_the_settings_they_depend_on():
    metrics = metrics_from_json(json.loads(json.dumps(metrics_to_json(CONTENT))))
    expected = {name: value for name, value in CONTENT.items() if isinstance(value, Metric) and value.is_measured}
    assert {*metrics} == {*expected, "retrieval_at_1_reconstructions"}
    for name, metric in expected.items():
        assert (metrics[name].value, metrics[name].standard_error) == (metric.value, metric.standard_error)
    assert (metrics["fd_samples"].dof, metrics["kd_floor"].dof) == (19, 3)
    assert metrics["retrieval_at_1_reconstructions"].standard_error == pytest.approx(proportion_error(0.3, 50))
    all_settings = {"features", "num_samples", "fd_components", "guidance", "sampler.method", "sampler.steps"}
    assert {*metrics["fd_samples"].settings} == all_settings
    assert {*metrics["kd_floor"].settings} == {"features", "num_samples"}, "KD of the floor needs no sampler and no PCA"
    assert {*metrics["psnr_db"].settings} == {"num_samples"}, "PSNR does not depend on the features"
