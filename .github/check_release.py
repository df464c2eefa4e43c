"""Check that a release tag matches the version in pyproject.toml and CITATION.cff, and has a section in CHANGELOG.md.

usage: python .github/check_release.py v0.1.0
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str) -> list[str]:
    """Return the reasons why this tag cannot be released."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    checks = {
        f"the tag is {tag}, but pyproject.toml has version {version}": tag == f"v{version}",
        f"CHANGELOG.md has no section ## [{version}] - DATE": re.search(
            rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE
        ),
        f"CITATION.cff does not have version: {version}": re.search(
            rf"^version: {re.escape(version)}$", citation, re.MULTILINE
        ),
    }
    return [problem for problem, passed in checks.items() if not passed]


if __name__ == "__main__":
    if reasons := problems(sys.argv[1]):
        sys.exit("\n".join(reasons))
