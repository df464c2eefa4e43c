"""The public API of `import ldm`: lazy imports and docstring examples."""

import doctest
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ldm

EARLIER = Path(__file__).parent / "earlier_runs"


def test_names_are_imported_lazily():
    script = "import sys, ldm; assert 'torch' not in sys.modules; ldm.cosine; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert sorted(ldm.__all__) == sorted(ldm._MODULES) and dir(ldm) == sorted(ldm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = ldm.Pipeline


@pytest.mark.parametrize("name", ["ldm", *ldm.__all__])
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    for stage in ("vae", "diffusion"):
        shutil.copytree(EARLIER / stage, tmp_path / "runs" / stage / "demo")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    item = ldm if name == "ldm" else getattr(ldm, name)
    examples = doctest.DocTestFinder(recurse=False).find(item, name)
    assert sum(len(example.examples) for example in examples) >= 2
    output: list[str] = []
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example, out=output.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)
