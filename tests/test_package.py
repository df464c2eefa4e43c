"""Packaging: pinned versions, the source archive, the wheel and its commands."""

import configparser
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMAND = ("-c", "from ldm.cli.main import main; main()")
"""Arguments of Python that run the console command `ldm` without installing the wheel."""
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}
REQUIREMENTS = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
    if "torchvision" not in group  # these extras must match the user's torch build, so they are not pinned
]


def files_of(folder: str) -> set[str]:
    """Return the files in a folder of the checkout, except caches."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the source archive and the wheel built from it, offline."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    process = subprocess.run(build, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist, tmp_path_factory) -> Path:
    """The unpacked wheel, a folder for the import path."""
    (archive,) = dist.glob("*.whl")
    unpacked = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(archive) as file:
        file.extractall(unpacked)
    return unpacked


def run_with_wheel(wheel: Path, folder: Path, *arguments: str) -> str:
    """Run Python in an empty folder, with the wheel first on the import path; return its standard output."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(wheel), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_pins_are_exact_public_versions():
    for name, pin in PINS.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, name
        assert "+" not in specifier.version, f"{name}: local versions exist only for some platforms"


def test_pins_do_not_require_a_specific_torch_build():
    """torchvision depends on a torch build, and CUDA libraries depend on a platform."""
    assert not {"torchvision", "torchaudio", "torch-fidelity", "triton"} & PINS.keys()
    assert not [name for name in PINS if name.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_requirements_are_pinned_within_their_range(requirement):
    (pin,) = PINS[canonicalize_name(requirement.name)].specifier
    assert requirement.specifier.contains(pin.version)
    assert not requirement.extras, "extras can install unpinned packages: list the packages instead"


def test_source_archive_is_complete(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert files_of("ldm") | files_of("conf") | files_of("tools") | files_of("tests") <= names
    assert files_of("examples") | files_of("benchmarks") <= names
    assert {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"} <= names


@pytest.mark.parametrize(
    ("tag", "heading", "problem"),
    [
        ("v{}", "## [{}] - 2026-01-31", ""),
        ("v{}", "## [Unreleased]", "CHANGELOG"),
        ("v99", "## [{}] - 2026-01-31", "v99"),
    ],
)
def test_release_requires_matching_tag_and_changelog(tmp_path, tag, heading, problem):
    version = PROJECT["version"]
    (tmp_path / ".github").mkdir()
    for name in (".github/check_release.py", "pyproject.toml", "CITATION.cff"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading.format(version)}\n")
    check = [sys.executable, str(tmp_path / ".github/check_release.py"), tag.format(version)]
    process = subprocess.run(check, capture_output=True, text=True)
    assert (process.returncode == 0) == (not problem) and problem in process.stderr
    assert len(process.stderr.splitlines()) == bool(problem)


def test_wheel_contains_configs_and_tools_but_no_tests(wheel):
    names = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    assert files_of("ldm") <= names
    assert {f"ldm/{name}" for name in files_of("conf") | files_of("tools")} <= names
    assert {name.partition("/")[0] for name in names} == {"ldm", f"ldm_trainer-{PROJECT['version']}.dist-info"}


def test_ldm_help_lists_all_tools(wheel):
    entry_points = configparser.ConfigParser()
    entry_points.read(next(wheel.glob("*.dist-info")) / "entry_points.txt", encoding="utf-8")
    assert dict(entry_points["console_scripts"]) == {"ldm": "ldm.cli.main:main"}
    help_text = run_with_wheel(wheel, wheel, *COMMAND, "--help")
    for tool in (ROOT / "tools").glob("[a-z]*.py"):
        assert re.search(rf"^  {tool.stem} +\w", help_text, re.MULTILINE), tool


def test_wheel_uses_its_own_configs_and_tools(wheel, tmp_path):
    code = "from ldm.runtime.paths import bundled_folder; print(bundled_folder('conf')); print(bundled_folder('tools'))"
    conf, tools = run_with_wheel(wheel, tmp_path, "-c", code).splitlines()
    assert Path(conf).samefile(wheel / "ldm" / "conf")
    assert Path(tools).samefile(wheel / "ldm" / "tools")


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "ldm.train", "--help"),
        (*COMMAND, "train", "--help"),
        (*COMMAND, "sample", "--help"),
    ],
    ids=["module", "ldm train", "ldm sample"],
)
def test_commands_of_the_wheel_run_in_any_folder(wheel, tmp_path, arguments):
    assert run_with_wheel(wheel, tmp_path, *arguments).strip()
    assert not list(tmp_path.iterdir()), "--help must not write files"


OTHER_PROJECT = re.compile(
    r"""install\s+(?:-[\w-]+\s+)*["'`]?ldm(?=[\s"'`\[=<>~]|$)|\bldm\[(?:demo|eval|lpips|inception|data|reports|dev)\b"""
)
"""Instructions to install `ldm`, which is a different project on PyPI."""


def test_install_instructions_use_the_right_project_name():
    folders = ("ldm", "conf", "tools", "docs", "tests", "examples", "benchmarks", ".github")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    texts = (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cff", "")
    matches = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        if file.is_file() and file.suffix in texts and file != Path(__file__)
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1)
        if OTHER_PROJECT.search(line)
    ]
    assert matches == []
    assert all(map(OTHER_PROJECT.search, ['pip install "ldm[demo]"', "python -m pip install ldm", "needs ldm[eval]"]))
    assert not any(map(OTHER_PROJECT.search, ["pip install 'ldm-trainer[demo]'", "pip install -e .", "import ldm"]))


def test_wheel_has_type_information(wheel):
    assert (wheel / "ldm" / "py.typed").is_file()
