"""Links in the docs point to existing files, functions and tests, and their commands use existing tools and keys."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException

from ldm.cli.arguments import bracket_lists, collect_positional, quote_text_values, strip_stage_prefix
from tests.option_keys import compose_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MATHS = ROOT / "docs" / "maths.md"
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)")


def maths_links(folder: str) -> list[tuple[str, Path]]:
    """Return the links of docs/maths.md to files in a folder, as (text without backticks, file) pairs."""
    page = MATHS.read_text(encoding="utf-8")
    links = ((name.strip("`"), (MATHS.parent / target).resolve()) for name, target in LINK.findall(page))
    return [(name, file) for name, file in links if file.is_relative_to(ROOT / folder)]


@cache
def defined_names(file: Path) -> set[str]:
    """Return the names of a module's functions, variables, and classes with their methods and fields."""

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


COMMAND = re.compile(
    r"(?:python -m (?P<train>ldm\.train)|python (?P<script>[\w/]+\.py)|ldm (?P<tool>[a-z]+)|make (?P<target>[a-z]+))"
    r"(?P<arguments>(?: (?:'[^']*'|\"[^\"]*\"|[^\s;'\"`])+(?:'[^']*'|\"[^\"]*\")?)*)"
)
"""A command that a page tells the reader to type."""
CONFIGS = {"benchmarks/bench.py": "bench", "examples/mixture/run.py": "mixture"}
"""Configs of scripts outside tools/."""


def commands_on(page: Path) -> Iterator[re.Match[str]]:
    """Yield the commands in a page's inline code and in its code blocks without a language tag."""
    text = page.read_text(encoding="utf-8")
    blocks = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for language, block in blocks.findall(text):
        for line in block.splitlines() if language == "" else ():
            yield from COMMAND.finditer(line.partition(" # ")[0])
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", blocks.sub("", text)):
        if command := COMMAND.match(span):
            yield command


def first_values(options: list[str]) -> list[str]:
    """Return the options of the first job of a multirun."""
    overrides = OverridesParser.create().parse_overrides(options)
    return [
        f"{override.input_line.partition('=')[0]}={next(iter(override.sweep_string_iterator()))}"
        if override.is_sweep_override()
        else str(override.input_line)
        for override in overrides
    ]


def compose_command(config_name: str, arguments: list[str]) -> None:
    """Compose the config of a command as if the command were run. Raise an error if a key or choice is unknown."""
    is_multirun = "-m" in arguments
    options = [strip_stage_prefix(argument) for argument in arguments if not argument.startswith("-")]
    if config_name == "compare":
        options = collect_positional(options, "runs")
    options = quote_text_values(options)
    options = first_values(options) if is_multirun else bracket_lists(options, ("sampler.steps", "guidance"))
    compose_config(config_name, *options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_pages_compose(page):
    for command in commands_on(page):
        script, tool = command["script"], command["tool"]
        arguments = shlex.split(command["arguments"])
        if target := command["target"]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target
            continue
        assert script is None or (ROOT / script).is_file(), f"{script} does not exist"
        if script is not None and script.startswith("tools/"):
            tool = Path(script).stem
        config_name = "train" if command["train"] else CONFIGS.get(script or "", tool)
        if config_name is not None and not {"--help", "--version"} & {*arguments}:
            assert (ROOT / "conf" / f"{config_name}.yaml").is_file(), command[0]
            compose_command(config_name, arguments)


def test_pages_contain_many_commands():
    assert sum(1 for page in PAGES for _ in commands_on(page)) > 80


def test_unknown_option_is_detected():
    with pytest.raises(ConfigCompositionException, match="trainer.max_stps"):
        compose_command("train", ["stage=all", "stage1.trainer.max_stps=5"])


def test_docs_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {target for _, target in LINK.findall(index)} == pages


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
