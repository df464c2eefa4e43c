"""ldm.runtime.random: seeding, and compatibility with the random numbers from earlier versions."""

import re
from pathlib import Path

import numpy as np
import torch

from ldm.runtime.random import derive_seed, numpy_generator, sample_generators, torch_generator


def test_generators_accept_one_seed_or_combine_several_integers():
    assert torch_generator(7).initial_seed() == 7
    assert torch_generator(7, 1).initial_seed() == derive_seed(7, 1) == 1437869018007346628
    assert numpy_generator(7).random() == np.random.default_rng(7).random()
    assert numpy_generator(7, 1).random() == np.random.default_rng(derive_seed(7, 1)).random()


def test_sample_generators_match_earlier_versions():
    (generator,) = sample_generators(3, [5])
    expected = torch.randn(4, generator=torch.Generator().manual_seed(3_000_014))
    assert torch.equal(torch.randn(4, generator=generator), expected)


def test_no_other_module_seeds_a_generator():
    root = Path(__file__).parents[2]
    files = [file for folder in ("ldm", "tools", "examples", "benchmarks") for file in (root / folder).rglob("*.py")]
    seeding = re.compile(r"Generator\([^()]*\)\.manual_seed|default_rng\(")
    seeding_files = {file.name for file in files if seeding.search(file.read_text(encoding="utf-8"))}
    assert seeding_files == {"random.py", "model_card.py"}, "in the model card, it is part of an example"
