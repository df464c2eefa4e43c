"""Print the lowest versions that pyproject.toml allows, as constraints for pip. torch is pinned as in constraints.txt.

python .github/lowest_versions.py > lowest.txt && pip install -c lowest.txt -e ".[demo,eval,data,dev]"
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
groups = [
    project["dependencies"],
    *(project["optional-dependencies"][name] for name in ("demo", "eval", "data", "dev")),
]
for requirement in sorted({text for group in groups for text in group}):
    name, lowest = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement).groups()
    if name != "torch":
        print(f"{name}=={lowest}")
print(*re.findall(r"^torch==.*$", Path("constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
