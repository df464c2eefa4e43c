"""Tests of the mixture notebook: all cells run in order, and the results agree with exact values."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
CELLS = json.loads((FOLDER / "mixture.ipynb").read_text(encoding="utf-8"))["cells"]
CODE_CELLS = [cell for cell in CELLS if cell["cell_type"] == "code"]
PRINT_RESULTS = """
import json
gaps = {v: torch.stack([bound.total - exact_nll for bound in results]) for v, results in bounds.items()}
results = {
    "score_error": score_error,
    "p_values": {name: count["p_value"] for name, count in counts.items()},
    "sampler_errors": sampler_errors,
    "gaps": {v: gap.mean(1).tolist() for v, gap in gaps.items()},
    "gap_errors": {v: (gap.std(1) / gap.shape[1] ** 0.5).tolist() for v, gap in gaps.items()},
    "ode_differences": ode_difference.tolist(),
}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run all code cells in a new process started in examples/, and return their results."""
    script = tmp_path_factory.mktemp("notebook") / "mixture.py"
    sources = ["".join(cell["source"]) for cell in CODE_CELLS]
    script.write_text("\n\n".join([*sources, PRINT_RESULTS]), encoding="utf-8")
    process = subprocess.run(
        [sys.executable, str(script)],
        cwd=FOLDER,
        env={**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_score_equals_automatic_differentiation(results):
    assert results["score_error"] < 1e-4


def test_ddpm_reaches_the_modes_with_their_weights(results):
    assert results["p_values"]["DDPM, 200 steps"] > 1e-3


def test_deterministic_samplers_converge_at_their_orders(results):
    for name, low, high in (("DDIM", 0.8, 1.2), ("DPM-Solver++", 1.7, 3.5)):
        *_, coarse, fine = results["sampler_errors"][name]
        assert low < math.log2(coarse / fine) < high, name


def test_bound_is_not_below_the_exact_nll_and_becomes_tight(results):
    gaps, errors = results["gaps"], results["gap_errors"]
    for variance in gaps:
        assert all(gap > -3 * error for gap, error in zip(gaps[variance], errors[variance], strict=True)), variance
    assert gaps["optimal"][0] > 5 * errors["optimal"][0], "loose with 5 steps"
    assert gaps["optimal"][-1] < 0.15, "tight with 100 steps"
    assert all(optimal < fixed for optimal, fixed in zip(gaps["optimal"], gaps["fixed_small"], strict=True))


def test_ode_likelihood_equals_the_exact_likelihood(results):
    differences = results["ode_differences"]
    assert max(differences) < 5e-3 and sum(differences) / len(differences) < 1e-4


def test_stored_outputs_come_from_one_clean_run():
    """To fix a failure, run "Restart Kernel and Run All Cells" and save the notebook."""
    assert [cell["execution_count"] for cell in CODE_CELLS] == list(range(1, len(CODE_CELLS) + 1))
    outputs = [output for cell in CODE_CELLS for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
