"""Links in the docs point to existing files, functions and tests, and commands to existing tools and keys."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MATHS = ROOT / "docs" / "maths.md"
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)")


def maths_links(folder: str) -> list[tuple[str, Path]]:
    """Return the links of docs/maths.md to files in a folder, as (text without backticks, file)."""
    page = MATHS.read_text(encoding="utf-8")
    links = ((name.strip("`"), (MATHS.parent / target).resolve()) for name, target in LINK.findall(page))
    return [(name, file) for name, file in links if file.is_relative_to(ROOT / folder)]


@cache
def defined_names(file: Path) -> set[str]:
    """Parse a module and return its functions, variables, and classes with their methods and fields."""

    def names(body: list[ast.stmt], prefix: str = "") -> set[str]:
        result: set[str] = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                result.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                result |= names(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                result |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
        return result

    return names(ast.parse(file.read_text(encoding="utf-8")).body)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_existing_files(page):
    for text, target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"[{text}]({target})"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_point_to_existing_headings(page):
    for target, anchor in re.findall(r"\]\(([\w./]*\.md)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        headings = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_formulas_link_to_existing_functions():
    functions = maths_links("ldm")
    assert len(functions) > 50
    for text, file in functions:
        module, _, name = text.partition(".")
        assert module == file.stem and name in defined_names(file), f"{text} is not in {file}"


def test_formulas_link_to_existing_tests():
    tests = maths_links("tests")
    assert len(tests) > 50
    for text, file in tests:
        assert text.startswith("test_") and text in defined_names(file), f"{text} is not in {file}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_use_existing_tools_and_keys(page):
    commands = re.findall(r"python tools/(\w+)\.py([^`\n]*)", page.read_text(encoding="utf-8"))
    for tool, options in commands:
        assert (ROOT / "tools" / f"{tool}.py").is_file(), tool
        config = (ROOT / "conf" / f"{tool}.yaml").read_text(encoding="utf-8")
        for key in re.findall(r"\s(\w+)(?:\.\w+)*=", options):
            assert re.search(rf"^(?:  - )?{key}:", config, re.MULTILINE), f"tools/{tool}.py has no {key}="
