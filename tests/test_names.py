"""Names of public classes and module-level functions are unique in the package."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ldm"
SHARED = {"main"}
"""Names that several modules can define: entry points."""


def test_public_names_are_unique():
    definitions = defaultdict(list)
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                definitions[node.name].append(file.relative_to(PACKAGE).as_posix())
    assert {name: files for name, files in definitions.items() if len(files) > 1 and name not in SHARED} == {}
